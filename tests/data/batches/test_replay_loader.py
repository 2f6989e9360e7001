"""Replay over any map-style dataset, and the exact pass of a task, as a foreign loop uses them."""

import random
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import mmcl
from mmcl.core import Batch, ReplayPlan, Strategy
from mmcl.data import TaskPass
from tests.distributed.ranks import call_on_ranks


class Numbered:
    """Sample i of task t is an image of level 20 t + i; an item counts how often it was read."""

    def __init__(self, task, count=10):
        self.task, self.count, self.read = task, count, Counter()

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.read[index] += 1
        return torch.full((3, 4, 4), 20 * self.task + index, dtype=torch.uint8), 2 * self.task


class Planned(Strategy):
    """Strategy with a fixed replay plan."""

    def __init__(self, tasks=(0, 0, 1), samples=(3, 7, 1), ratio=0.25):
        super().__init__()
        self.plan = ReplayPlan(torch.tensor(tasks), torch.tensor(samples), ratio)

    def replay_plan(self):
        return self.plan


def begun(strategy, task):
    mmcl.begin_task(nn.Linear(1, 1), strategy, mmcl.Task(task, f"task {task}"))
    return strategy


def a_loader(strategy=None, count=10, batch_size=4, **options):
    strategy = begun(Planned() if strategy is None else strategy, 2)
    earlier = [Numbered(0), Numbered(1)]
    return mmcl.replay_loader(Numbered(2, count), strategy, batch_size, earlier=earlier, **options)


def test_every_batch_has_the_exact_share_and_every_new_sample_comes_once():
    loader = a_loader(count=12)
    for _ in range(2):
        batches, new, old = list(loader), [], Counter()
        assert len(batches) == len(loader) == 4
        for batch in batches:
            assert int(batch.is_replay.sum()) == 1  # a quarter of 4
            levels = batch.images[:, 0, 0, 0].long()
            assert levels.tolist() == (20 * batch.task_ids + batch.sample_ids).tolist()
            assert batch.labels.tolist() == (2 * batch.task_ids).tolist()
            assert (batch.task_ids == 2).tolist() == (~batch.is_replay).tolist()
            new += batch.sample_ids[~batch.is_replay].tolist()
            pairs = zip(batch.task_ids.tolist(), batch.sample_ids.tolist(), strict=True)
            old.update(pair for pair in pairs if pair[0] < 2)
        assert sorted(new) == list(range(12))
        assert set(old) == {(0, 3), (0, 7), (1, 1)}


def test_a_plan_without_a_ratio_visits_every_old_sample_once():
    loader = a_loader(Planned(ratio=None))
    ids = [
        (t, i)
        for b in loader
        for t, i in zip(b.task_ids.tolist(), b.sample_ids.tolist(), strict=True)
    ]
    assert sorted(ids) == [(0, 3), (0, 7), (1, 1), *((2, i) for i in range(10))]


def order(loader):
    return [(b.task_ids.tolist(), b.sample_ids.tolist()) for b in loader]


def test_the_order_is_that_of_the_seed_and_the_epoch():
    first, again = a_loader(), a_loader()
    epochs = [order(first), order(first)]
    assert epochs[0] != epochs[1]
    again.set_epoch(1)
    assert order(again) == epochs[1]
    assert order(a_loader(seed=1)) != epochs[0]


def test_a_loader_continues_where_its_state_was_taken():
    loader, seen = a_loader(), []
    whole = order(a_loader())
    for batch in loader:
        seen.append((batch.task_ids.tolist(), batch.sample_ids.tolist()))
        if len(seen) == 2:
            break
    resumed = a_loader()
    resumed.load_state_dict(loader.state_dict())
    resumed.set_epoch(0)  # as Lightning does, which must not start the epoch again
    assert seen + order(resumed) == whole


def test_old_samples_are_read_again_from_their_own_dataset():
    loader = a_loader()
    list(loader), list(loader)
    first = loader.items.datasets[0]
    assert set(first.read) == {3, 7}
    assert sum(first.read.values()) > 2


class Noisy(Numbered):
    """Augments with the three generators that people use."""

    def __getitem__(self, index):
        draws = [float(torch.rand(())), random.random(), float(np.random.rand())]  # noqa: NPY002
        image = torch.tensor(draws).view(3, 1, 1).expand(3, 2, 2).mul(255).to(torch.uint8)
        return image, index


def levels(loader):
    return {
        (int(t), int(i)): image[:, 0, 0].tolist()
        for batch in loader
        for t, i, image in zip(batch.task_ids, batch.sample_ids, batch.images, strict=True)
    }


def test_augmentation_is_seeded_per_sample_and_leaves_the_users_generators_alone():
    def made(batch_size):
        strategy = begun(Planned((0,), (3,)), 1)
        return mmcl.replay_loader(Noisy(1), strategy, batch_size, earlier=[Noisy(0)])

    loader = made(4)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]  # noqa: NPY002
    first, second = levels(loader), levels(loader)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert all(first[key] != second[key] for key in set(first) & set(second))
    new = {key: value for key, value in first.items() if key[0] == 1}
    assert new == {key: value for key, value in levels(made(5)).items() if key[0] == 1}


def on_rank(rank, world):
    loader = a_loader(count=12, batch_size=4 // world)
    return order(loader), [batch.sample_ids.tolist() for batch in loader.task_pass()]


@pytest.mark.slow
def test_two_processes_share_the_batches_of_one(tmp_path):
    alone = order(a_loader(count=12))
    (left, own), (right, other) = call_on_ranks(on_rank, tmp_path)
    for batch, one, two in zip(alone, left, right, strict=True):
        assert [batch[1][0::2], batch[1][1::2]] == [one[1], two[1]]
    assert sorted(number for batch in own + other for number in batch) == list(range(12))
    assert own[0] == [0, 2]


def test_the_pass_has_the_tasks_own_samples_once_and_in_order():
    loader = a_loader()
    list(loader)
    batches = list(loader.task_pass())
    assert [i for b in batches for i in b.sample_ids.tolist()] == list(range(10))
    assert {t for b in batches for t in b.task_ids.tolist()} == {2}
    assert not any(bool(b.is_replay.any()) for b in batches)
    few = [i for b in loader.task_pass(few=4) for i in b.sample_ids.tolist()]
    assert len(set(few)) == 4
    assert few == sorted(few)


def test_workers_give_the_same_batches():
    assert order(a_loader(num_workers=1)) == order(a_loader())


@pytest.mark.parametrize(
    ("strategy", "task", "message"),
    [
        (Planned((0, 1), (1, 1)), 1, r"tasks \[0, 1\] and earlier has 1 datasets in task 1"),
        (Planned((0,), (10,)), 1, r"replays sample 10 of task 0 and earlier\[0\] has 10: give"),
    ],
)
def test_a_plan_that_the_datasets_do_not_hold_is_refused(strategy, task, message):
    loader = mmcl.replay_loader(Numbered(task), begun(strategy, task), 4, earlier=[Numbered(0)])
    with pytest.raises(ValueError, match=message):
        len(loader)


def test_a_loader_before_its_task_and_what_is_no_batch_are_refused():
    with pytest.raises(RuntimeError, match=r"before the task began: call mmcl.begin_task"):
        len(mmcl.replay_loader(Numbered(0), Planned(), 4))
    with pytest.raises(ValueError, match="batch_size is 0 and dataset has 10 samples"):
        mmcl.replay_loader(Numbered(0), Planned(), 0)
    with pytest.raises(TypeError, match="collate_fn returned list, expected a mmcl.Batch"):
        next(iter(TaskPass(Numbered(0), list, 4, task=0)))


def test_images_are_collated_from_pairs_and_mappings():
    image = Image.new("RGB", (2, 2), (255, 0, 51))
    pairs = [(image, 1), {"image": torch.zeros(3, 2, 2), "label": torch.tensor(2)}]
    batch = mmcl.collate_images(pairs[:1], task=3)
    assert batch.images[0, :, 0, 0].tolist() == [255, 0, 51]
    assert (batch.labels.tolist(), batch.task_ids.tolist()) == ([1], [3])
    assert mmcl.collate_images(pairs[1:]).labels.tolist() == [2]


def test_captions_are_collated_with_the_tokenizer():
    def tokenizer(texts):
        return torch.tensor([[len(text), 0] for text in texts])

    collate = partial(mmcl.collate_captions, tokenizer=tokenizer)
    batch = collate([(torch.zeros(3, 2, 2), "one"), (torch.zeros(3, 2, 2), ["three"])])
    assert batch.input_ids.tolist() == [[3, 0], [5, 0]]
    assert isinstance(batch, Batch)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([torch.zeros(3, 2, 2)], "an item of the dataset is Tensor with no two parts, expected"),
        ([{"pixels": 1}], "is dict with keys pixels, expected .image, label."),
        ([(torch.zeros(3, 2, 2), "owl")], "a label is 'owl', expected a class index"),
        ([("a.png", 0)], "an image is str, expected a PIL image or a tensor"),
        ([(torch.zeros(3, 2, 2), 0), (torch.zeros(3, 4, 2), 0)],
         r"sizes \(3, 2, 2\), \(3, 4, 2\): bring them to the model's"),
    ],
)  # fmt: skip
def test_items_that_are_no_pairs_are_refused(items, message):
    with pytest.raises(ValueError, match=message):
        mmcl.collate_images(items)
