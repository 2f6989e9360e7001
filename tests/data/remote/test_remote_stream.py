"""A stream whose shards lie behind a web server, larger than the cache may be."""

import threading
import time

import pytest
import torch

from mmcl.core import TaskStream
from mmcl.data import open_stream, train_loader
from tests.data.small_stream import CutAndNoise, labelled, write_tar
from tests.toys.http_server import serving

SHARDS, EACH = 6, 5


@pytest.fixture
def far(tmp_path, monkeypatch):
    """A server, and the card of a stream of one task in six shards there."""
    monkeypatch.setenv("no_proxy", "*")
    with serving() as site:
        names = []
        for number in range(SHARDS):
            path = write_tar(tmp_path / "x.tar", labelled(EACH, name=f"shard{number}-"))
            names.append(site.put(f"/train-{number}.tar", path.read_bytes()))
        path = write_tar(tmp_path / "x.tar", labelled(3, name="test"))
        test = site.put("/test.tar", path.read_bytes())
        counts = "".join(f"  {name}: {EACH}\n" for name in names)
        card = tmp_path / "far.yaml"
        card.write_text(
            f"name: far\nscenario: class\nclasses: [a, b]\ncounts:\n{counts}  {test}: 3\n"
            f"tasks:\n- name: all\n  train: [{', '.join(names)}]\n  test: {test}\n"
        )
        yield site, card


def fetched(site):
    return [site.count(f"/train-{number}.tar") for number in range(SHARDS)]


def epoch(prepared, number=0, **options):
    loader = train_loader(
        prepared, 0, CutAndNoise(), replay_plan=None, global_batch_size=4, seed=1,
        position=lambda: (number, 0), **options,
    )  # fmt: skip
    return list(loader)


def test_nothing_is_fetched_before_it_is_read(far, tmp_path):
    site, card = far
    prepared = open_stream(TaskStream.read(card), cache_dir=tmp_path / "cache")
    assert prepared.stream[0].size == SHARDS * EACH
    assert site.asked == []


@pytest.mark.parametrize("window", [1, 2])
def test_an_epoch_fetches_each_shard_once_though_the_cache_holds_few(far, tmp_path, window):
    site, card = far
    size = max(map(len, site.contents.values()))
    limit = size * (2 * window + 2)
    prepared = open_stream(TaskStream.read(card), cache_dir=tmp_path / "cache", cache_limit=limit)
    keys = [key for batch in epoch(prepared, window=window) for key in batch.keys]
    assert len(set(keys)) == SHARDS * EACH
    wait_for_threads()
    assert fetched(site) == [1] * SHARDS
    held = sum(file.stat().st_size for file in (tmp_path / "cache" / "shards").glob("*.tar"))
    assert held <= limit


def test_ranks_and_a_second_start_see_the_same_batches(far, tmp_path):
    _, card = far
    whole = epoch(open_stream(TaskStream.read(card), cache_dir=tmp_path / "one"), 3, window=2)
    prepared = open_stream(TaskStream.read(card), cache_dir=tmp_path / "two")
    ranks = [epoch(prepared, 3, window=2, rank=rank, world=2) for rank in range(2)]
    for batch, first, second in zip(whole, *ranks, strict=True):
        assert batch.keys[0::2] == first.keys
        assert batch.keys[1::2] == second.keys
        assert torch.equal(batch.images[0::2], first.images)


def test_a_shard_of_another_count_than_the_card_says_ends_the_run_by_name(far, tmp_path):
    site, card = far
    path = write_tar(tmp_path / "x.tar", labelled(EACH - 1, name="other"))
    site.put("/train-2.tar", path.read_bytes())
    prepared = open_stream(TaskStream.read(card), cache_dir=tmp_path / "cache")
    with pytest.raises(RuntimeError, match=r"train-2.tar holds 4 samples and the card says 5"):
        epoch(prepared)


def wait_for_threads():
    until = time.monotonic() + 10
    while threading.active_count() > 3 and time.monotonic() < until:
        time.sleep(0.02)
