"""FeatureReplay in front of a LLaVA's projector, rounded to bytes, and on disk."""

import copy
import io
from dataclasses import replace

import pytest
import torch

from mmcl.core import IGNORE_INDEX, Chain, begin_task, end_task, step, trainable_parameters
from mmcl.data.batches.collate import Example, collate
from mmcl.strategies.feature_replay import FeatureReplay
from tests.toys.toy_clip import StandIn, a_batch, a_task, task_batches
from tests.toys.toy_llava import (
    a_dialogue,
    a_dialogue_batch,
    a_llava,
    an_answer_task,
    dialogue_batches,
)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def attached(**arguments):
    model, strategy = a_llava(), FeatureReplay(**arguments)
    strategy.attach(model)
    begin_task(model, strategy, an_answer_task(0))
    return model, strategy


def learned(tasks=1, storage_dir=None, **arguments):
    """A strategy that has seen the exact pass of some tasks and begun the next."""
    model, strategy = attached(**arguments)
    if storage_dir is not None:
        strategy.set_memory_dir(storage_dir)
    for task in range(tasks):
        end_task(model, strategy, an_answer_task(task), dialogue_batches(model, task))
        begin_task(model, strategy, an_answer_task(task + 1))
    return model, strategy


def files_of(folder):
    return sorted(path.name for path in (folder / "features").iterdir())


def test_features_stand_in_for_images_at_the_projector():
    model, strategy = attached()
    assert not any("vision_tower" in name for name in trainable_parameters(model))
    batch = a_dialogue_batch(model)
    plain = model.loss(model(batch), batch)
    done = step(model, strategy, batch)
    assert done.batch.images is None
    assert done.batch.features.shape == (8, 4, 16)
    torch.testing.assert_close(done.loss, plain)


def test_stored_answers_give_the_loss_of_their_own_samples():
    model, strategy = learned(buffer_size=6, replay_ratio=0.4)
    batch = a_dialogue_batch(model, rows=4, task=1)
    joined = strategy.extend_batch(model, batch)
    assert joined.is_replay.tolist() == [False] * 4 + [True] * 3
    old = [one.take(torch.tensor([row])) for one in dialogue_batches(model) for row in range(8)]
    for row in range(4, 7):
        own = joined.take(torch.tensor([row]))
        tokens = own.input_ids[own.attention_mask]
        found = [
            float(model.loss(model(other), other).detach())
            for other in old
            if torch.equal(other.input_ids[other.attention_mask], tokens)
        ]
        loss = float(model.loss(model(own), own).detach())
        assert min(abs(loss - other) for other in found) < 1e-3


def test_samples_of_other_lengths_end_in_tokens_that_are_not_scored():
    model, strategy = learned(tasks=2, buffer_size=20)
    columns = strategy.memory.columns
    assert columns["input_ids"].shape == columns["labels"].shape == columns["attention_mask"].shape
    assert set(columns["task_ids"].tolist()) == {0, 1}
    is_padding = ~columns["attention_mask"]
    assert bool(is_padding.any())
    assert bool((columns["labels"][is_padding] == IGNORE_INDEX).all())
    assert not columns["input_ids"][is_padding].any()


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_bytes_are_off_by_half_a_step_of_each_token(tmp_path, place):
    model, exact = learned(buffer_size=12)
    _, rounded = learned(buffer_size=12, compression="int8", storage=place, storage_dir=tmp_path)
    batch = a_dialogue_batch(model, rows=4, task=1)
    left, right = (s.extend_batch(model, batch).features[4:] for s in (exact, rounded))
    largest = left.abs().amax(-1, keepdim=True)
    assert bool(((left - right).abs() <= largest / 253 + largest / 1024).all())
    assert not torch.equal(left, right)


@pytest.mark.parametrize("store", ["float16", "int8"])
def test_disk_gives_what_memory_gives(tmp_path, store):
    model, in_memory = learned(tasks=2, buffer_size=10, compression=store)
    _, on_disk = learned(
        tasks=2, buffer_size=10, compression=store, storage="disk", storage_dir=tmp_path
    )
    batch = a_dialogue_batch(model, rows=4, task=2)
    left, right = (strategy.extend_batch(model, batch) for strategy in (in_memory, on_disk))
    for name in ("features", "labels", "input_ids", "task_ids", "attention_mask"):
        assert torch.equal(getattr(left, name), getattr(right, name))
    assert on_disk.state_bytes() < in_memory.state_bytes()
    assert len(files_of(tmp_path)) == 2
    bytes_a_row = 4 * 16 * 2 if store == "float16" else 4 * 16 + 4 * 2
    assert on_disk.files.row_bytes == bytes_a_row


def test_a_classifiers_features_go_to_disk_as_well(tmp_path):
    model, strategy = (
        StandIn(),
        FeatureReplay(buffer_size=5, storage="disk", storage_dir=str(tmp_path)),
    )
    strategy.attach(model)
    strategy.set_memory_dir(tmp_path / "another")
    begin_task(model, strategy, a_task(0))
    end_task(model, strategy, a_task(0), task_batches(0))
    joined = strategy.extend_batch(model, a_batch(4, task=1))
    assert joined.features.shape == (8, 1, 16)
    assert len(list(tmp_path.glob("rows_*.bin"))) == 1
    assert not (tmp_path / "another").exists()


def test_a_file_goes_when_no_sample_needs_it_and_the_next_task_has_begun(tmp_path):
    model, strategy = learned(tasks=1, buffer_size=1, storage="disk", storage_dir=tmp_path)
    task, before = 1, files_of(tmp_path)
    while files_of(tmp_path) == before:  # until a later task's row takes the one place
        end_task(model, strategy, an_answer_task(task), dialogue_batches(model, task))
        begin_task(model, strategy, an_answer_task(task + 1))
        task += 1
    assert len(files_of(tmp_path)) == 2
    kept = through_a_file(strategy.state_dict())
    done = step(model, strategy, a_dialogue_batch(model, task=task))
    strategy.after_step(model, done.batch, done.output)
    assert set(files_of(tmp_path)).isdisjoint(before)
    fresh = FeatureReplay(buffer_size=1, storage="disk")
    fresh.attach(model)
    fresh.set_memory_dir(tmp_path)
    fresh.load_state_dict(kept)
    begin_task(model, fresh, an_answer_task(task))
    again = step(model, fresh, a_dialogue_batch(model, task=task))
    assert torch.equal(done.batch.features, again.batch.features)
    fresh.after_step(model, again.batch, again.output)  # the same files once more
    assert len(files_of(tmp_path)) == 1


def test_a_task_that_ends_again_from_the_same_state_writes_the_same_file(tmp_path):
    model, strategy = learned(tasks=1, buffer_size=9, storage="disk", storage_dir=tmp_path)
    before = copy.deepcopy(strategy.state_dict())
    for _ in range(2):
        strategy.load_state_dict(before)
        end_task(model, strategy, an_answer_task(1), dialogue_batches(model, 1))
        files = files_of(tmp_path)
        assert len(files) == 2


def test_a_file_that_was_changed_or_is_missing_is_refused(tmp_path):
    model, strategy = learned(buffer_size=6, storage="disk", storage_dir=tmp_path)
    [file] = (tmp_path / "features").iterdir()
    content = file.read_bytes()
    state = through_a_file(strategy.state_dict())
    for changed in (content[:-1], content + b"\0", b"\1" + content[1:]):
        file.write_bytes(changed)
        strategy.load_state_dict(state)
        with pytest.raises(ValueError, match="stored rows were changed: .* restore it"):
            strategy.extend_batch(model, a_dialogue_batch(model, task=1))
    file.unlink()
    strategy.load_state_dict(state)
    with pytest.raises(FileNotFoundError, match="stored rows are missing: there is no"):
        strategy.extend_batch(model, a_dialogue_batch(model, task=1))


def test_a_checkpoint_cannot_name_a_file_elsewhere(tmp_path):
    _, strategy = learned(buffer_size=6, storage="disk", storage_dir=tmp_path)
    state = strategy.files.get_extra_state()
    for name in ("../../run.json", "/etc/passwd", "rows_000_.bin"):
        for wrong in ({"files": [[0, name, 1]]}, {"unused": [name]}):
            with pytest.raises(ValueError, match="which is no file of rows"):
                strategy.files.set_extra_state({**state, **wrong})


def test_features_on_disk_of_another_encoder_are_refused(tmp_path):
    _, strategy = learned(buffer_size=6, storage="disk", storage_dir=tmp_path)
    other, fresh = a_llava(seed=1), FeatureReplay(buffer_size=6, storage="disk")
    fresh.attach(other)
    with pytest.raises(ValueError, match="stored rows were made by encoder"):
        fresh.load_state_dict(through_a_file(strategy.state_dict()))


def test_disk_without_a_folder_fails_at_the_first_step():
    model, strategy = attached(storage="disk")
    with pytest.raises(
        RuntimeError, match="storage is 'disk' and there is no folder: give storage_dir="
    ):
        step(model, strategy, a_dialogue_batch(model))


def test_two_stores_in_a_chain_have_folders_of_their_own(tmp_path):
    model = a_llava()
    chain = Chain([FeatureReplay(buffer_size=4, storage="disk", seed=seed) for seed in (0, 1)])
    chain.attach(model)
    chain.set_memory_dir(tmp_path)
    begin_task(model, chain, an_answer_task(0))
    end_task(model, chain, an_answer_task(0), dialogue_batches(model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["member_0", "member_1"]
    assert len(list(tmp_path.rglob("rows_*.bin"))) == 2


def mixed_batch(model, rows=6, task=0, bare=(1, 4)):
    """Rows of a task, some of text alone."""
    transform = model.transform(True)
    pixels = torch.full((3, 16, 16), 90, dtype=torch.uint8)
    made = []
    for row in range(rows):
        dialogue = a_dialogue(task, row)
        if row in bare:
            first, *others = dialogue.turns
            first = replace(first, text=first.text.replace("<image>\n", ""))
            dialogue = replace(dialogue, turns=(first, *others))
        shown = None if row in bare else pixels + row
        made.append(Example(transform(shown, dialogue, 0), -100, task, row, f"m{row}"))
    return collate(made)


def test_samples_without_an_image_have_zeros_and_change_no_loss():
    model, strategy = attached()
    batch = mixed_batch(model)
    plain = model.loss(model(batch), batch)
    done = step(model, strategy, batch)
    assert done.batch.features.shape == (6, 4, 16)
    assert not done.batch.features[[1, 4]].any()
    assert bool(done.batch.features[[0, 2, 3, 5]].any(-1).any(-1).all())
    torch.testing.assert_close(done.loss, plain)


def test_a_batch_of_text_alone_is_joined_to_stored_images():
    model, strategy = attached(buffer_size=6)
    end_task(model, strategy, an_answer_task(0), [mixed_batch(model)])
    bare = mixed_batch(model, rows=3, task=1, bare=(0, 1, 2))
    assert bare.images is None
    joined = strategy.extend_batch(model, bare)
    assert joined.features.shape == (6, 4, 16)
    alone = model.loss(model(bare), bare)
    own = joined.take(torch.arange(3))
    torch.testing.assert_close(model.loss(model(own), own), alone)
    assert model.generate(own, max_new_tokens=3) == model.generate(bare, max_new_tokens=3)


def test_text_alone_before_any_image_is_learned_and_not_stored():
    model, strategy = attached()
    bare = mixed_batch(model, bare=range(6))
    assert step(model, strategy, bare).batch.features is None
    with pytest.raises(ValueError, match="6 samples without an image before any with one: use a"):
        end_task(model, strategy, an_answer_task(0), [bare])


def test_samples_of_several_images_are_refused():
    model, strategy = attached()
    batch = a_dialogue_batch(model, rows=3)
    shared = replace(batch, image_owner=torch.tensor([0, 0, 2]))
    with pytest.raises(ValueError, match="several images and stores one image per sample: use Exp"):
        strategy.extend_batch(model, shared)
