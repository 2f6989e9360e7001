"""Nodes with a cache each, simulated on one machine, read a task's shards from a web server."""

import pytest
import torch

from mmcl.core import ReplayPlan, TaskStream
from mmcl.data import eval_loader, open_stream, train_loader
from tests.data.remote.test_remote_stream import wait_for_threads
from tests.data.small_stream import CutAndNoise, labelled, same, write_tar
from tests.toys.http_server import serving

SHARDS, EACH, TEST = 24, 3, 4
GLOBAL_BATCH = 8


@pytest.fixture(scope="module")
def far(tmp_path_factory):
    """A server, and the card of two tasks of remote shards, the first of them of one shard."""
    folder = tmp_path_factory.mktemp("far")
    with pytest.MonkeyPatch.context() as patched, serving() as site:
        patched.setenv("no_proxy", "*")

        def put(name, count):
            path = write_tar(folder / "x.tar", labelled(count, name=f"{name}-"))
            return site.put(f"/{name}.tar", path.read_bytes())

        old = put("old", 7)
        train = [put(f"train{number:02d}", EACH) for number in range(SHARDS)]
        test = [put(f"test{number:02d}", EACH) for number in range(TEST)]
        counts = "".join(f"  {name}: {EACH}\n" for name in [*train, *test])
        (folder / "far.yaml").write_text(
            f"name: far\nscenario: domain\nclasses: [a, b]\ncounts:\n{counts}  {old}: 7\ntasks:\n"
            f"- name: first\n  train: {old}\n  test: {test[0]}\n"
            f"- name: second\n  train: [{', '.join(train)}]\n  test: [{', '.join(test)}]\n"
        )
        yield site, folder / "far.yaml"


class Node:
    """A node with a cache of its own and some of the ranks."""

    def __init__(self, far, folder, ranks, world, **cache):
        self.site, card = far
        self.ranks, self.world = ranks, world
        self.prepared = open_stream(TaskStream.read(card), cache_dir=folder, **cache)

    def epoch(self, number=0, done=0, **options):
        """The batches of its ranks, which read side by side."""
        options = {
            "replay_plan": None, "global_batch_size": GLOBAL_BATCH, "seed": 1, "window": 4,
            **options,
        }  # fmt: skip
        loaders = [
            train_loader(
                self.prepared, 1, CutAndNoise(), position=lambda: (number, done), rank=rank,
                world=self.world, **options,
            )
            for rank in self.ranks
        ]  # fmt: skip
        ranks = list(zip(*map(iter, loaders), strict=True))
        if not options.get("workers"):  # which have threads of their own
            wait_for_threads()
        return ranks

    def fetched(self, work):
        """What ``work`` returns, and the paths that the node fetched for it."""
        before = len(self.site.asked)
        result = work()
        return result, [path for path, _ in self.site.asked[before:]]


def nodes_of(far, folder, nodes, devices=1, **cache):
    world = nodes * devices
    ranks = [range(node * devices, (node + 1) * devices) for node in range(nodes)]
    return [
        Node(far, folder / f"node{number}", own, world, **cache) for number, own in enumerate(ranks)
    ]


def joined(steps):
    """The global batches: (W,) batches of every step, sample i of rank r at place i * W + r."""
    found = []
    for ranks in steps:
        keys = [""] * sum(len(batch) for batch in ranks)
        for rank, batch in enumerate(ranks):
            keys[rank :: len(ranks)] = batch.keys
        found.append(keys)
    return found


def all_ranks(per_node):
    return [tuple(b for part in step for b in part) for step in zip(*per_node, strict=True)]


@pytest.mark.parametrize(("nodes", "devices"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_nodes_fetch_disjoint_shards_and_read_the_same_global_batches(
    far, tmp_path, nodes, devices
):
    # 18 samples or 6 shards a lane: the edges of lanes are those of shards.
    whole = joined(nodes_of(far, tmp_path / "one", 1)[0].epoch(lanes=4))
    read, paths = [], []
    for node in nodes_of(far, tmp_path / "some", nodes, devices):
        batches, fetched = node.fetched(lambda node=node: node.epoch(lanes=4))
        read.append(batches)
        paths.append(fetched)
        assert len(fetched) == len(set(fetched)) == SHARDS // nodes
        again, fetched = node.fetched(lambda node=node: node.epoch(1, lanes=4))
        assert fetched == []  # lanes hold the same shards in every epoch
        assert joined(again) != joined(batches)
    assert len({path for fetched in paths for path in fetched}) == SHARDS
    assert joined(all_ranks(read)) == whole
    keys = [key for batch in whole for key in batch]
    assert len(keys) == len(set(keys)) == SHARDS * EACH


def test_without_lanes_every_node_fetches_every_shard(far, tmp_path):
    for node in nodes_of(far, tmp_path, 2):
        _, fetched = node.fetched(node.epoch)
        assert len(fetched) == len(set(fetched)) == SHARDS


def test_a_shard_between_two_nodes_is_fetched_by_both_and_no_other_twice(far, tmp_path):
    paths = []
    for node in nodes_of(far, tmp_path, 4):
        paths += node.fetched(lambda node=node: node.epoch(lanes=4, global_batch_size=10))[1]
    assert SHARDS <= len(paths) <= SHARDS + 3
    assert len(set(paths)) == SHARDS


@pytest.mark.parametrize("nodes", [1, 2, 3, 4])
def test_any_number_of_nodes_resumes_after_any_batch(far, tmp_path, nodes):
    whole = joined(nodes_of(far, tmp_path / "one", 1)[0].epoch(2, lanes=4))
    some = nodes_of(far, tmp_path / "some", nodes)
    for done in range(len(whole)):
        rest = all_ranks([node.epoch(2, done, lanes=4) for node in some])
        assert joined(rest) == whole[done:]


def test_replayed_samples_come_in_their_slots_beside_lanes(far, tmp_path):
    replay_plan = ReplayPlan(torch.zeros(3, dtype=torch.int64), torch.arange(3), 0.25)
    read = [
        node.epoch(lanes=2, replay_plan=replay_plan, accumulation=2)
        for node in nodes_of(far, tmp_path, 2)
    ]
    steps = all_ranks(read)
    new = [
        sample
        for step in steps
        for batch in step
        for sample in batch.sample_ids[~batch.is_replay].tolist()
    ]
    assert sorted(new) == list(range(SHARDS * EACH))
    for first, second in zip(steps[0::2], steps[1::2], strict=True):
        assert sum(int(batch.is_replay.sum()) for batch in (*first, *second)) == 2
        assert sum(len(batch) for batch in (*first, *second)) == GLOBAL_BATCH


@pytest.mark.parametrize(("nodes", "devices"), [(1, 4), (2, 2)])
def test_lanes_are_read_through_a_cache_that_holds_three_windows(far, tmp_path, nodes, devices):
    limit = 3 * devices * max(map(len, far[0].contents.values()))
    whole = joined(nodes_of(far, tmp_path / "one", 1)[0].epoch(lanes=4))
    read = []
    for node in nodes_of(far, tmp_path / "some", nodes, devices, cache_limit=limit):
        batches, fetched = node.fetched(lambda node=node: node.epoch(lanes=4))
        read.append(batches)
        assert len(fetched) == len(set(fetched)) == SHARDS // nodes
    assert joined(all_ranks(read)) == whole


def test_workers_read_what_one_process_reads_in_lanes(far, tmp_path):
    node = nodes_of(far, tmp_path, 2)[1]
    alone, workers = node.epoch(lanes=4), node.epoch(lanes=4, workers=2)
    assert all(
        same(*pair) for step in zip(alone, workers, strict=True) for pair in zip(*step, strict=True)
    )


@pytest.mark.parametrize("nodes", [1, 2, 4])
@pytest.mark.parametrize(("split", "shards"), [("test", TEST), ("train", SHARDS)])
def test_a_node_fetches_the_shards_that_it_evaluates(far, tmp_path, nodes, split, shards):
    ids, lengths = [], set()
    for node in nodes_of(far, tmp_path, nodes):

        def work(node=node):
            (rank,) = node.ranks
            return list(eval_loader(
                node.prepared, 1, CutAndNoise(), batch=5, rank=rank, world=nodes, split=split,
                in_ranges=True,
            ))  # fmt: skip

        batches, fetched = node.fetched(work)
        assert len(fetched) == len(set(fetched)) == shards // nodes
        assert max(len(batch) for batch in batches) <= 5
        lengths.add(len(batches))
        ids += torch.cat([batch.sample_ids for batch in batches]).tolist()
    assert ids == list(range(shards * EACH))
    assert len(lengths) == 1
