from dataclasses import replace

import pytest
import torch

from mmcl.core import IGNORE_INDEX, ReplayPlan, TaskStream
from mmcl.core.seeding import hash_seed
from mmcl.data import open_stream, train_loader
from mmcl.data.batches.train_loader import ResumableBatchSampler
from tests.data.small_stream import CutAndNoise, labelled, same, write_stream, write_tar


def replay_of(*pairs, share=0.3, keep="reference"):
    tasks, samples = zip(*pairs, strict=True)
    return ReplayPlan(torch.tensor(tasks), torch.tensor(samples), share, keep)


OLD = replay_of((0, 3), (0, 9), (1, 2))


class Place:
    """A run that counts what it did."""

    def __init__(self, epoch=0, done=0):
        self.epoch, self.done = epoch, done

    def __call__(self):
        return self.epoch, self.done


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return open_stream(write_stream(tmp_path_factory.mktemp("stream"), sizes=(10, 7, 23)))


def load(prepared, task=2, replay_plan=OLD, **options):
    options = {"global_batch_size": 8, "seed": 3, **options}
    return train_loader(prepared, task, CutAndNoise(), replay_plan=replay_plan, **options)


def epochs(loader_of, count):
    """All batches of some epochs, from a loader that is iterated again for each."""
    place = Place()
    loader = loader_of(position=place)
    found = []
    for place.epoch in range(count):
        found.append(list(loader))
        assert len(found[-1]) == len(loader)
    return found


def test_a_batch_holds_new_samples_then_replayed_ones_with_their_ids(prepared):
    batches = list(load(prepared))
    assert len(batches) == 4  # 23 new samples, 8 - 2 rows a batch
    for batch in batches:
        assert batch.is_replay.tolist() == [False] * (len(batch) - 2) + [True] * 2
        assert batch.images.shape == (len(batch), 3, 4, 4)
        assert batch.images.dtype == torch.uint8
        assert batch.input_ids is None
        assert batch.errors == ()
        assert batch.loss_weight == 1.0
        for row in range(len(batch)):
            task, sample = int(batch.task_ids[row]), int(batch.sample_ids[row])
            assert batch.keys[row] == f"{'abc'[task]}train{sample:03d}"
            assert int(batch.labels[row]) == 2 * task + sample % 2
            assert bool(batch.is_replay[row]) == (task < 2)


def test_every_new_sample_comes_once_in_every_epoch_with_recall_on(prepared):
    for batches in epochs(lambda **own: load(prepared, **own), 3):
        new = torch.cat([batch.sample_ids[~batch.is_replay] for batch in batches])
        assert sorted(new.tolist()) == list(range(23))


def test_labels_are_columns_of_the_learned_order_for_old_and_new_samples(tmp_path):
    write_stream(tmp_path)
    stream = open_stream(TaskStream.read(tmp_path / "small.yaml", order=[2, 0, 1]))
    (batch,) = load(stream, 1, replay_of((0, 0), (0, 1), share=0.2), global_batch_size=12)
    expected = [0, 1] if batch.sample_ids[-2:].tolist() == [0, 1] else [1, 0]
    assert batch.labels[-2:].tolist() == expected
    assert set(batch.labels[:-2].tolist()) == {2, 3}
    assert batch.keys[-1].startswith("ctrain")


def test_images_are_those_of_the_transform_with_the_seed_of_the_sample(prepared):
    batch = list(load(prepared, position=Place(2)))[0]
    reader = prepared.reader(2, "train")
    from mmcl.data import decode_image

    for row in (0, 1):
        sample = int(batch.sample_ids[row])
        pixels = decode_image(reader.read(sample).members["png"])
        made = CutAndNoise()(pixels, None, hash_seed(3, 2, sample, 2))
        assert made.image.equal(batch.images[row])
    old = int(batch.task_ids[-1]), int(batch.sample_ids[-1])
    pixels = decode_image(prepared.reader(old[0], "train").read(old[1]).members["png"])
    assert CutAndNoise()(pixels, None, hash_seed(3, *old, 2, 2)).image.equal(batch.images[-1])


def test_augmentation_changes_from_epoch_to_epoch(prepared):
    first, second = epochs(lambda **own: load(prepared, **own), 2)
    by_sample = [
        {
            int(s): i
            for b in one
            for s, i, r in zip(b.sample_ids, b.images, b.is_replay, strict=True)
            if not r
        }
        for one in (first, second)
    ]
    assert any(not by_sample[0][n].equal(by_sample[1][n]) for n in range(23))


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (4, 1), (1, 2), (2, 2), (1, 4)])
def test_any_number_of_ranks_and_micro_batches_has_the_same_global_batches(
    prepared, world, accumulation
):
    whole = list(load(prepared))
    ranks = [
        list(load(prepared, world=world, rank=rank, accumulation=accumulation))
        for rank in range(world)
    ]
    for number, batch in enumerate(whole):
        rows = torch.zeros(len(batch), dtype=torch.bool)
        weights = 0.0
        for rank in range(world):
            for part in range(accumulation):
                micro = ranks[rank][number * accumulation + part]
                places = torch.arange(part * world + rank, len(batch), world * accumulation)
                expected = batch.take(places)
                sizes = replace(batch.global_batch, micro_batch=part, micro_batches=accumulation)
                expected = replace(expected, loss_weight=micro.loss_weight, global_batch=sizes)
                assert same(micro, expected)
                assert micro.loss_weight == pytest.approx(
                    len(micro) * world * accumulation / len(batch)
                )
                weights += micro.loss_weight
                rows[places] = True
        assert rows.all()
        assert weights == pytest.approx(world * accumulation)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_resumed_at_any_position_goes_on_as_if_it_had_never_stopped(prepared, accumulation):
    whole = epochs(lambda **own: load(prepared, accumulation=accumulation, **own), 2)
    for epoch in range(2):
        for done in range(len(whole[epoch])):
            rest = list(load(prepared, accumulation=accumulation, position=Place(epoch, done)))
            assert len(rest) == len(whole[epoch]) - done
            assert all(same(*pair) for pair in zip(rest, whole[epoch][done:], strict=True))


def test_an_epoch_done_to_its_end_is_the_start_of_the_next(prepared):
    place = Place(0, 4)
    found = list(load(prepared, position=place))
    assert same(found[0], next(iter(load(prepared, position=Place(1)))))
    assert len(found) == 4


def test_position_is_read_at_every_iter_and_the_length_stays(prepared):
    place = Place()
    loader = load(prepared, position=place)
    first = list(loader)
    place.done = 3
    assert len(loader) == 4
    (last,) = loader
    assert same(last, first[3])


def test_two_workers_give_what_none_gives_over_epochs_and_a_resume(prepared):
    alone = epochs(lambda **own: load(prepared, **own), 2)
    place = Place(0, 2)
    loader = load(prepared, workers=2, position=place)
    found = [list(loader)]
    place.epoch, place.done = 1, 0
    found.append(list(loader))
    assert all(same(*pair) for pair in zip(found[0], alone[0][2:], strict=True))
    assert all(same(*pair) for pair in zip(found[1], alone[1], strict=True))


def test_spawned_workers_can_be_sent_the_dataset(prepared):
    import pickle

    loader = load(prepared)
    request = next(iter(loader.batch_sampler))
    again = pickle.loads(pickle.dumps(loader.dataset))
    expected = next(iter(loader))
    assert same(again.__getitems__(pickle.loads(pickle.dumps(request))), expected)


def test_iterating_draws_nothing_from_the_global_generator(prepared):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    list(load(prepared))
    assert torch.get_rng_state().equal(before)


def test_joint_training_visits_old_and_new_once(prepared):
    everything = [(task, sample) for task, size in ((0, 10), (1, 7)) for sample in range(size)]
    loader = load(prepared, replay_plan=replay_of(*everything, share=None))
    assert len(loader) == 5
    seen = [
        (int(task), int(sample))
        for batch in loader
        for task, sample in zip(batch.task_ids, batch.sample_ids, strict=True)
    ]
    assert sorted(seen) == sorted(everything + [(2, sample) for sample in range(23)])


def test_an_empty_recall_is_no_recall(prepared):
    none = ReplayPlan(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 0.5)
    pairs = zip(load(prepared, replay_plan=none), load(prepared, replay_plan=None), strict=True)
    assert all(same(*pair) for pair in pairs)


def test_captions_are_padded_to_the_longest_of_the_batch(tmp_path):
    stream = write_stream(tmp_path, task_type="captioning")
    stream.tasks = (stream[0], replace(stream[1], text_field="de.txt"), stream[2])
    prepared = open_stream(stream)
    (batch,) = load(prepared, 0, None, global_batch_size=16)
    assert batch.labels.tolist() == [IGNORE_INDEX] * 10
    lengths = [len(f"picture {n}" + " again" * (n % 3)) for n in batch.sample_ids.tolist()]
    assert batch.attention_mask.sum(1).tolist() == lengths
    assert batch.input_ids.shape == (10, max(lengths))
    assert (batch.input_ids[~batch.attention_mask] == 0).all()
    row = batch.sample_ids.tolist().index(4)
    assert bytes(batch.input_ids[row][batch.attention_mask[row]].tolist()) == b"picture 4 again"
    (german,) = load(prepared, 1, None, global_batch_size=16)
    assert bytes(german.input_ids[0].tolist()).startswith(b"Bild")


def test_beside_replayed_captions_samples_with_classes_have_captions_of_their_names(tmp_path):
    stream = write_stream(tmp_path)
    stream.tasks = (replace(stream[0], task_type="captioning"), *stream.tasks[1:])
    with pytest.warns(UserWarning, match="'task-b' have captions and classes"):
        (batch,) = load(open_stream(stream), 1, replay_of((0, 1), share=0.1), global_batch_size=8)
    texts = [
        bytes(ids[mask].tolist()).decode()
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]
    assert texts == [*(f"c{label}" for label in batch.labels.tolist()[:-1]), "picture 1 again"]
    assert set(batch.labels.tolist()[:-1]) == {2, 3}
    assert batch.labels[-1] == IGNORE_INDEX


# Refusals


@pytest.mark.parametrize(("world", "accumulation"), [(8, 1), (1, 8), (4, 2)])
def test_a_rank_or_micro_batch_without_samples_is_refused(prepared, world, accumulation):
    words = r"a batch of 7 samples for \d devices x \d accumulated micro-batches: use fewer devices"
    with pytest.raises(ValueError, match=words):
        load(prepared, world=world, accumulation=accumulation)


@pytest.mark.parametrize("name", ["global_batch_size", "accumulation"])
def test_counts_below_one_are_refused(prepared, name):
    with pytest.raises(ValueError, match=f"{name} is 0, expected at least 1"):
        load(prepared, replay_plan=None, **{name: 0})


def test_a_finished_task_is_not_read_when_nothing_is_kept(prepared):
    with pytest.raises(RuntimeError, match=r"finished tasks \[0\] but its storage is 'none'"):
        load(prepared, replay_plan=replay_of((0, 1), keep="none"))


def test_copies_need_their_readers(prepared):
    with pytest.raises(ValueError, match=r"pass replay_readers=\{task: ReplayCopyReader"):
        load(prepared, replay_plan=replay_of((0, 1), keep="copy"))


def test_only_finished_tasks_and_existing_samples_can_be_replayed(prepared):
    with pytest.raises(ValueError, match=r"replay_plan names tasks \[2\] while task 2 is trained"):
        load(prepared, replay_plan=replay_of((2, 1)))
    with pytest.raises(ValueError, match="1 samples of task 0 that are not there, sample 10"):
        load(prepared, replay_plan=replay_of((0, 9), (0, 10)))


def test_a_sampler_has_its_length_before_it_is_iterated(prepared):
    sampler = load(prepared, accumulation=2).batch_sampler
    assert isinstance(sampler, ResumableBatchSampler)
    assert len(sampler) == 8


def test_a_shard_rewritten_between_tasks_is_noticed(tmp_path):
    prepared = open_stream(write_stream(tmp_path))
    write_tar(tmp_path / "a-train.tar", labelled(2))
    with pytest.raises(RuntimeError, match="changed or vanished"):
        list(load(prepared, 0, None))
