import pytest
import torch

from mmcl.data import eval_loader, open_stream
from tests.data.small_stream import CutAndNoise, labelled, picture, same, write_stream


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return open_stream(write_stream(tmp_path_factory.mktemp("stream"), sizes=(10, 23), test_size=9))


def test_a_test_pass_gives_the_samples_in_order_with_their_numbers(prepared):
    loader = eval_loader(prepared, 1, CutAndNoise(), batch=4)
    batches = list(loader)
    assert len(batches) == len(loader) == 3
    assert torch.cat([batch.sample_ids for batch in batches]).tolist() == list(range(9))
    assert batches[0].keys[0] == "btest000"
    assert torch.cat([batch.task_ids for batch in batches]).tolist() == [1] * 9
    assert torch.cat([batch.labels for batch in batches]).tolist() == [2, 3] * 4 + [2]
    assert max(len(batch) for batch in batches) <= 4


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_can_be_repeated_and_does_not_depend_on_workers(prepared, workers):
    loader = eval_loader(prepared, 1, CutAndNoise(), split="train", batch=5, workers=workers)
    first, second = list(loader), list(loader)
    alone = list(eval_loader(prepared, 1, CutAndNoise(), split="train", batch=5))
    assert len(loader) == len(first) == 5
    assert all(same(*pair) for pair in zip(first, second, strict=True))
    assert all(same(*pair) for pair in zip(first, alone, strict=True))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_a_pass_by_stride_with_equally_many_batches(prepared, world):
    ranks = [
        list(
            eval_loader(prepared, 1, CutAndNoise(), split="train", batch=3, rank=rank, world=world)
        )
        for rank in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    seen = []
    for parts in zip(*ranks, strict=True):
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        put_together = [0] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            put_together[rank::world] = part.sample_ids.tolist()
        seen += put_together
    assert seen == list(range(23))


def test_more_ranks_than_samples_leave_some_without_batches(tmp_path):
    prepared = open_stream(write_stream(tmp_path, sizes=(4,), test_size=2))
    loaders = [
        eval_loader(prepared, 0, CutAndNoise(), batch=4, rank=rank, world=3) for rank in range(3)
    ]
    assert [len(loader) for loader in loaders] == [1, 1, 0]
    assert [len(list(loader)) for loader in loaders] == [1, 1, 0]


def bad(*numbers):
    return [(f"bad{number}.png", picture(number)) for number in numbers]


EMPTY = [("empty.png", b""), ("empty.cls", b"0")]


def test_bad_samples_are_left_out_and_named_and_all_bad_batches_are_skipped(tmp_path):
    members = bad(0, 1) + labelled(3) + bad(2, 3, 4, 5) + labelled(1, start=3) + bad(6, 7)
    prepared = open_stream(write_stream(tmp_path, sizes=(4,), a_test=members))
    loader = eval_loader(prepared, 0, CutAndNoise(), batch=2)
    batches = list(loader)
    assert len(loader) == 6
    assert [batch.sample_ids.tolist() for batch in batches] == [[2, 3], [4], [9]]
    named = [[error.split(" ")[0] for error in batch.errors] for batch in batches]
    assert named == [["bad0", "bad1"], ["bad2"], ["bad3", "bad4", "bad5", "bad6", "bad7"]]
    assert batches[0].errors[0] == (
        "bad0 in a-test.tar: it has no label (.cls): its members are .png"
    )


def test_a_split_without_a_readable_sample_is_an_error(tmp_path):
    prepared = open_stream(write_stream(tmp_path, sizes=(4,), a_test=bad(0, 1, 2) + EMPTY))
    with pytest.raises(ValueError, match="no sample of the test split of 'task-a' could be"):
        list(eval_loader(prepared, 0, CutAndNoise(), batch=2))


def test_a_batch_below_one_is_refused(prepared):
    with pytest.raises(ValueError, match="batch is 0, expected at least 1"):
        eval_loader(prepared, 0, CutAndNoise(), split="train", batch=0)
