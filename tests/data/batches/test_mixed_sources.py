"""Samples of other sources mixed into a task: exact slots, the same on any ranks and workers."""

from dataclasses import replace

import pytest
import torch

from mmcl.core import IGNORE_INDEX, GlobalBatch, ReplayPlan, TaskStream
from mmcl.data import open_stream, train_loader
from tests.data.small_stream import (
    CutAndNoise,
    coloured,
    labelled,
    same,
    write_answer_stream,
    write_stream,
    write_tar,
)

OLD = ReplayPlan(torch.tensor([0, 0, 1]), torch.tensor([3, 9, 2]), replay_ratio=0.25)


def with_sources(
    folder, sources, mixture, task_type="classification", write=write_stream, **changes
):
    """A small stream of three tasks that all mix in the sources."""
    card = folder / "small.yaml"
    write(
        folder,
        sizes=(10, 7, 23),
        **({"task_type": task_type} if write is write_stream else {}),
        **changes,
    )
    card.write_text(f"sources: {sources}\nmixture: {mixture}\n{card.read_text()}")
    return open_stream(TaskStream.read(card))


@pytest.fixture(scope="module")
def pictured(tmp_path_factory):
    """A stream that classifies, beside pictures alone and labelled pictures of old classes."""
    folder = tmp_path_factory.mktemp("pictured")
    shown = [m for m in labelled(11, name="general") if m[0].endswith(".png")]
    write_tar(folder / "general.tar", shown)
    write_tar(folder / "old.tar", labelled(9, (0, 1, 5), name="old"))
    sources = (
        "{general: {task_type: image, shards: general.tar, size: 11}, "
        "old: {task_type: classification, shards: [old.tar]}}"
    )
    return with_sources(folder, sources, "{general: 0.25, old: 0.125}")


def load(prepared, task=1, replay_plan=OLD, **options):
    options = {"global_batch_size": 16, "seed": 3, **options}
    if task == 0:
        replay_plan = None
    elif task == 1:
        replay_plan = replace(
            replay_plan,
            task_ids=replay_plan.task_ids[:2],
            sample_ids=replay_plan.sample_ids[:2],
        )
    return train_loader(prepared, task, CutAndNoise(), replay_plan=replay_plan, **options)


@pytest.mark.parametrize("task", [0, 1, 2])
def test_every_global_batch_has_the_exact_slots_of_every_source(pictured, task):
    for batch in load(pictured, task):
        assert (batch.source_ids == 1).sum() == 4
        assert (batch.source_ids == 2).sum() == 2
        assert (batch.is_replay & (batch.source_ids == 0)).sum() == (4 if task else 0)
        assert (batch.task_ids[batch.source_ids > 0] == -1).all()
        assert batch.is_replay[batch.source_ids > 0].all()
        assert all(
            batch.keys[row].startswith("general") for row in torch.where(batch.source_ids == 1)[0]
        )


def test_images_have_no_label_and_unseen_classes_none_either(pictured):
    met = set()
    for batch in load(pictured, 1):
        assert (batch.labels[batch.source_ids == 1] == IGNORE_INDEX).all()
        assert not batch.in_loss[batch.source_ids == 1].any()
        assert batch.in_loss[batch.source_ids != 1].all()
        met |= set(batch.labels[batch.source_ids == 2].tolist())
    assert met <= {0, 1, IGNORE_INDEX}
    later = {label for _ in range(3) for b in load(pictured, 2) for label in b.labels.tolist()}
    assert 5 in later


@pytest.mark.parametrize("group", [0, 2])
@pytest.mark.parametrize(("world", "parts"), [(2, 1), (4, 1), (1, 2), (2, 2)])
def test_ranks_and_micro_batches_have_the_same_global_batches_and_weigh_samples_in_the_loss(
    pictured, world, parts, group
):
    whole = list(load(pictured, 2, group=group))
    ranks = [
        list(load(pictured, 2, rank=rank, world=world, accumulation=parts, group=group))
        for rank in range(world)
    ]
    assert {len(batches) for batches in ranks} == {len(whole) * parts}
    for number, batch in enumerate(whole):
        pieces = [ranks[r][number * parts + p] for p in range(parts) for r in range(world)]
        keys = [""] * len(batch)
        for place, piece in enumerate(pieces):
            keys[place :: world * parts] = piece.keys
        assert tuple(keys) == batch.keys
        scored = [int(p.in_loss.sum()) if p.in_loss is not None else len(p) for p in pieces]
        new = sum(int((~piece.is_replay).sum()) for piece in pieces)
        general = sum(
            int((piece.source_ids > 0).sum()) for piece in pieces if piece.source_ids is not None
        )
        for place, (piece, count) in enumerate(zip(pieces, scored, strict=True)):
            sizes = (len(batch), new, general, sum(scored), place // world, parts)
            assert piece.global_batch == GlobalBatch(*sizes)
            assert piece.loss_weight == pytest.approx(count * world * parts / sum(scored))


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_batches(pictured, workers):
    alone = list(load(pictured, 2))
    together = list(load(pictured, 2, workers=workers))
    assert len(alone) == len(together)
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))


def test_a_bad_sample_of_a_source_is_replaced_by_another_of_it(tmp_path):
    members = [m for m in labelled(3, name="general") if m[0].endswith(".png")]
    members[1] = (members[1][0], b"no picture")
    write_tar(tmp_path / "general.tar", members)
    sources = "{general: {task_type: image, shards: general.tar}}"
    prepared = with_sources(tmp_path, sources, "{general: 0.25}")
    errors = set()
    for batch in load(prepared, 0):
        errors |= set(batch.errors)
        own = [key for key, source in zip(batch.keys, batch.source_ids, strict=True) if source]
        assert len(own) == 4
        assert set(own) <= {"general000", "general002"}
    assert len(errors) == 1
    assert "general001 in general.tar" in errors.pop()


def test_captions_of_a_source_come_with_captions(tmp_path):
    write_tar(tmp_path / "general.tar", labelled(6, name="general"))
    sources = (
        "{general: {task_type: captioning, shards: general.tar, text_field: de.txt, scored: false}}"
    )
    prepared = with_sources(tmp_path, sources, "{general: 0.25}", task_type="captioning")
    for batch in load(prepared, 0):
        texts = [
            bytes(row[mask].tolist())
            for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
        ]
        for text, source in zip(texts, batch.source_ids.tolist(), strict=True):
            assert text.startswith(b"Bild" if source else b"picture")
        assert batch.in_loss.tolist() == [source == 0 for source in batch.source_ids.tolist()]


def test_the_errors_of_sources_on_a_card_are_reported_together(tmp_path):
    card = tmp_path / "small.yaml"
    write_stream(tmp_path)
    card.write_text(
        "sources: {a: {task_type: instruction, shards: a.tar}, "
        "b: {task_type: image, shards: b.tar, scored: true}, c: {shards: c.tar, weight: 2}}\n"
        f"mixture: {{a: 0.5, b: 0.6, d: 0.1, c: 2}}\nreplay_ratio: 0.1\n{card.read_text()}"
    )
    with pytest.raises(ValueError, match="errors") as told:
        TaskStream.read(card)
    for part in (
        "mixes in 'a' of task_type 'instruction', expected image or classification or captioning",
        "source 'b' has scored True",
        "mixes in 'd', which is none of the card's 'sources' ('a', 'b', 'c')",
        "has mixture['c'] 2, expected more than 0 and less than 1",
        "source 'c' has the unknown key 'weight'",
        "gives 1.3 of every batch to replayed samples and sources",
    ):
        assert part in str(told.value)


def test_a_source_that_is_missing_is_an_error_of_the_stream(tmp_path):
    with pytest.raises(ValueError, match="source 'general': shard nowhere.tar is missing"):
        with_sources(tmp_path, "{general: {shards: nowhere.tar}}", "{general: 0.25}")


def test_the_share_on_the_card_is_read(tmp_path):
    write_stream(tmp_path)
    card = tmp_path / "small.yaml"
    card.write_text(f"replay_ratio: 0.5\n{card.read_text()}    replay_ratio: 0.125\n")
    assert [task.replay_ratio for task in TaskStream.read(card)] == [0.5, 0.5, 0.125]


def test_conversations_of_an_unscored_source_are_given_and_not_in_the_loss(tmp_path):
    from tests.toys.toy_llava import a_llava

    write_tar(tmp_path / "general.tar", coloured(6, name="general"))
    sources = "{general: {task_type: instruction, shards: general.tar, scored: false}}"
    prepared = with_sources(tmp_path, sources, "{general: 0.25}", write=write_answer_stream)
    transform = a_llava().transform(True)
    loader = train_loader(prepared, 0, transform, replay_plan=None, global_batch_size=8, seed=0)
    for batch in loader:
        of_source = batch.source_ids > 0
        assert (batch.labels[of_source] == IGNORE_INDEX).all()
        assert (batch.labels[~of_source] != IGNORE_INDEX).any(1).all()


@pytest.mark.parametrize("options", [{"window": 0}, {"group": -1}])
def test_a_window_of_nothing_is_refused(pictured, options):
    with pytest.raises(ValueError, match="give 1 or more shards"):
        load(pictured, **options)


def spelled(batch):
    """The text of every sample of a batch."""
    return [
        bytes(ids[mask].tolist()).decode()
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """A stream that classifies, with captions and classes as sources."""
    folder = tmp_path_factory.mktemp("captioned")
    write_tar(folder / "general.tar", labelled(11, name="general"))
    write_tar(folder / "later.tar", labelled(9, (4, 5), name="later"))
    sources = (
        "{general: {task_type: captioning, shards: general.tar}, "
        "later: {task_type: classification, shards: later.tar, templates: ['seen {}']}}"
    )
    return with_sources(folder, sources, "{general: 0.25, later: 0.125}")


def test_beside_captions_every_class_is_learned_as_a_caption_of_its_name(captioned):
    templates = [*captioned.stream.tasks[1].templates]
    drawn = set()
    with pytest.warns(UserWarning, match=r"'task-b' have captions and classes: .* label_smoothing"):
        loader = load(captioned, 1)
    for batch in [*loader, *loader]:
        assert batch.attention_mask.any(1).all()
        for row, text in enumerate(spelled(batch)):
            label, source = int(batch.labels[row]), int(batch.source_ids[row])
            if source == 1:
                assert text.startswith("picture ")
                assert label == IGNORE_INDEX
            elif source == 2:  # its class is met later, and its name is known all the same
                assert text in ("seen c4", "seen c5")
                assert label == IGNORE_INDEX
            else:
                assert label in ((0, 1) if batch.is_replay[row] else (2, 3))
                assert text in [template.format(f"c{label}") for template in templates]
                drawn.add(text)
    assert drawn == {"c1", "c2", "c3"}


def test_classes_stay_classes_without_captions(pictured):
    assert all(batch.input_ids is None for batch in load(pictured, 1))
