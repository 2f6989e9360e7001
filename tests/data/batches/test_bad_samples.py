import numpy as np
import pytest
import torch

from mmcl.core import ReplayPlan
from mmcl.core.seeding import hash_seed
from mmcl.data import open_stream, train_loader
from mmcl.data.batches.train_loader import BatchRequest
from tests.data.small_stream import CutAndNoise, labelled, picture, write_stream


def replay_of(*pairs, share=0.3, keep="reference"):
    tasks, samples = zip(*pairs, strict=True)
    return ReplayPlan(torch.tensor(tasks), torch.tensor(samples), share, keep)


def load(prepared, task=2, replay_plan=None, **options):
    options = {"global_batch_size": 8, "seed": 3, **options}
    return train_loader(prepared, task, CutAndNoise(), replay_plan=replay_plan, **options)


OLD = replay_of((0, 8), (0, 3), (1, 2))
BAD = [
    ("x0", [("x0.png", b"\x89PNG broken"), ("x0.cls", b"4")], "its image is not JPEG, PNG"),
    ("x1", [("x1.jpg", picture(1, "JPEG")[:-10]), ("x1.cls", b"4")], "its JPEG is broken"),
    ("x2", [("x2.png", picture(2))], "it has no label (.cls)"),
    ("x3", [("x3.cls", b"4")], "it has no image (.jpg, .jpeg, .png, .webp"),
    ("x4", [("x4.png", picture(4)), ("x4.cls", b"1")], "its label is 1, which is not a class of"),
    ("x5", [("x5.png", picture(5)), ("x5.cls", b"17")], "its label is 17, the card has classes 0"),
    ("x6", [("x6.png", picture(6)), ("x6.cls", b"-4")], "its label is b'-4', expected a whole"),
    ("x7", [("x7.png", picture(7, size=(40, 40))), ("x7.cls", b"4")], "40 x 40, more than 1000"),
]


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    members = labelled(15, (4, 5), name="good-") + [one for bad in BAD for one in bad[1]]
    old = labelled(8) + [("old.png", b""), ("old.cls", b"0")]
    folder = tmp_path_factory.mktemp("broken")
    return open_stream(write_stream(folder, sizes=(10, 7, 23), c_train=members, a_train=old))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_keeps_its_slot_and_is_named(broken, workers):
    loader = load(broken, replay_plan=OLD, max_pixels=1000, workers=workers)
    batches = list(loader)
    errors = [error for batch in batches for error in batch.errors]
    for key, _, reason in BAD:
        assert any(f.startswith(f"{key} in c-train.tar: ") and reason in f for f in errors), key
    assert [len(batch) for batch in batches] == [7, 8, 8, 8]
    keys = {key for batch in batches for key in batch.keys}
    assert not keys & {bad[0] for bad in BAD}
    assert any(error == "old in a-train.tar: its image is empty (0 bytes)" for error in errors)
    for batch in batches:
        assert batch.is_replay.tolist() == [False] * (len(batch) - 2) + [True] * 2
        for key, sample, task in zip(batch.keys, batch.sample_ids, batch.task_ids, strict=True):
            assert broken.reader(int(task), "train").read(int(sample)).key == key


def test_replacements_are_the_same_on_any_number_of_ranks_and_in_any_run(broken):
    whole = list(load(broken, replay_plan=OLD, max_pixels=1000))
    parts = [list(load(broken, replay_plan=OLD, max_pixels=1000, world=2, rank=r)) for r in (0, 1)]
    for batch, *halves in zip(whole, *parts, strict=True):
        for rank, half in enumerate(halves):
            assert half.keys == batch.keys[rank::2]
            assert half.images.equal(batch.images[rank::2])


def test_a_replacement_is_drawn_from_seed_task_sample_and_attempt(broken):
    rows = load(broken, replay_plan=None, max_pixels=1000).dataset
    for number, (key, _, _) in enumerate(BAD, start=15):
        draws = (hash_seed(3, 2, number, attempt) % 23 for attempt in range(1, 100))
        batch = rows.__getitems__(BatchRequest(0, np.array([number]), 1.0))
        assert batch.keys == (f"good-{next(draw for draw in draws if draw < 15):03d}",)
        assert batch.errors[0].startswith(f"{key} in c-train.tar")


def test_the_run_ends_after_a_hundred_bad_samples_in_a_row(tmp_path):
    members = [(f"k{n}.{kind}", b"") for n in range(5) for kind in ("png", "cls")]
    prepared = open_stream(write_stream(tmp_path, sizes=(4,), a_train=members))
    with pytest.raises(ValueError, match="100 samples in a row could not be read in task"):
        list(load(prepared, 0, None))


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        ([], r"it has no caption \(.txt\)"),
        ([("x.txt", b"\xff\xfe")], r"its caption \(.txt\) is not UTF-8"),
        ([("x.txt", b" \n")], r"its caption \(.txt\) is empty"),
    ],
)
def test_bad_captions_are_named(tmp_path, member, reason):
    members = [*labelled(3), ("x.png", picture()), *member]
    prepared = open_stream(
        write_stream(tmp_path, sizes=(4,), task_type="captioning", a_train=members)
    )
    (batch,) = load(prepared, 0, None)
    assert len(batch) == 4
    with pytest.raises(ValueError, match=f"^x in a-train.tar: {reason}"):
        raise ValueError(batch.errors[0])
