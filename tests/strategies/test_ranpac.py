from dataclasses import replace

import numpy as np
import pytest
import torch

from mmcl.core import Output, begin_task, end_task, forward, trainable_parameters
from mmcl.core.seeding import hash_priorities
from mmcl.strategies.ranpac import RanPAC
from tests.strategies.plain_loop import learn, whole
from tests.toys.toy_clip import StandIn, a_task, task_batches

ORDER = (0, 1, 2)


def taught(order=ORDER, cut=task_batches, **arguments):
    model, strategy = StandIn(), RanPAC(**{"projection_dim": 50, **arguments})
    strategy.attach(model)
    for index in order:
        begin_task(model, strategy, a_task(index))
        end_task(model, strategy, a_task(index), cut(index))
    return model, strategy


def one_by_one(index):
    batch = whole(index)
    return [batch.take(row[None]) for row in torch.randperm(len(batch))]


def lifted_rows(model, strategy):
    """Every row of all tasks, lifted in numpy, its one-hot target, and whether it is held out."""
    batch = whole(0).join(whole(1)).join(whole(2))
    features = model.embed(batch, "image").double().numpy()
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    lifted = np.maximum(unit @ strategy._projection.numpy(), 0)
    held = [
        int(hash_priorities(0, int(task), sample[None])) % 5 == 0
        for task, sample in zip(batch.task_ids, batch.sample_ids, strict=True)
    ]
    return lifted, np.eye(6)[batch.labels.numpy()], np.array(held)


def joint_ridge(lifted, targets, ridge):
    rows = np.concatenate([lifted, np.sqrt(ridge) * np.eye(lifted.shape[1])])
    wanted = np.concatenate([targets, np.zeros((lifted.shape[1], targets.shape[1]))])
    return np.linalg.lstsq(rows, wanted, rcond=None)[0]


def test_tasks_one_after_another_give_the_joint_ridge_solution():
    model, strategy = taught(ridges=(0.1,))
    lifted, targets, _ = lifted_rows(model, strategy)
    found = strategy.sums.get("head").numpy()
    np.testing.assert_allclose(found, joint_ridge(lifted, targets, 0.1), atol=1e-8)


def test_scores_are_the_lifted_features_times_the_solution():
    model, strategy = taught(ridges=(0.1,))
    lifted, targets, _ = lifted_rows(model, strategy)
    batch = whole(0).join(whole(1)).join(whole(2))
    found = forward(model, strategy, batch).logits
    expected = lifted @ joint_ridge(lifted, targets, 0.1)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    assert float((found.argmax(1) == batch.labels).float().mean()) > 0.9


def test_the_ridge_is_the_best_on_the_held_out_samples():
    ridges = (1e-3, 0.1, 10.0, 1000.0)
    model, strategy = taught(ridges=ridges)
    lifted, targets, held = lifted_rows(model, strategy)
    assert 5 <= held.sum() <= 25
    errors = {}
    for ridge in ridges:
        weights = joint_ridge(lifted[~held], targets[~held], ridge)
        errors[ridge] = ((lifted[held] @ weights - targets[held]) ** 2).sum()
    best = min(errors, key=errors.__getitem__)
    expected = joint_ridge(lifted, targets, best)
    np.testing.assert_allclose(strategy.sums.get("head").numpy(), expected, atol=1e-8)


@pytest.mark.parametrize(
    "other", [{"order": (2, 0, 1)}, {"cut": one_by_one}], ids=["order of tasks", "order of rows"]
)
def test_the_solution_does_not_depend_on(other):
    model, strategy = taught()
    other_model, other_strategy = taught(**other)
    batch = whole(0).join(whole(1))
    torch.testing.assert_close(
        forward(other_model, other_strategy, batch).logits,
        forward(model, strategy, batch).logits,
        rtol=0,
        atol=1e-5,
    )


def test_the_projection_is_a_function_of_the_seed_and_not_in_the_checkpoint():
    _, first = taught()
    _, second = taught()
    _, third = taught(seed=1)
    assert torch.equal(first._projection, second._projection)
    assert not torch.equal(first._projection, third._projection)
    assert "_projection" not in "".join(first.state_dict())
    fresh = RanPAC(projection_dim=50)
    fresh.load_state_dict(first.state_dict())
    model = StandIn()
    assert torch.equal(
        forward(model, fresh, whole(0)).logits, forward(model, first, whole(0)).logits
    )


def test_batches_without_sample_ids_are_split_by_position_in_the_pass():
    def without_ids(index):
        return [replace(batch, sample_ids=None) for batch in task_batches(index)]

    ids = torch.cat([batch.sample_ids for batch in task_batches(0)])
    assert torch.equal(ids, torch.arange(len(ids)))  # the toy's ids are positions
    _, named = taught()
    _, counted = taught(cut=without_ids)
    assert int(counted.sums.get("held")) == int(named.sums.get("held")) > 0
    assert torch.equal(counted.sums.get("head"), named.sums.get("head"))


def test_the_models_own_scores_stay_before_any_task():
    model, strategy = StandIn(), RanPAC(projection_dim=50)
    strategy.attach(model)
    assert torch.equal(forward(model, strategy, whole(0)).logits, model(whole(0)).logits)


def test_a_class_that_was_not_met_is_impossible_and_a_narrow_probe_is_left_alone():
    model, strategy = taught((0,))
    batch = whole(0)
    logits = forward(model, strategy, batch).logits
    assert torch.isneginf(logits[:, 2:]).all()
    assert torch.isfinite(logits[:, :2]).all()
    narrow = Output(model(batch).logits[:, :1])
    assert strategy.transform_output(model, batch, narrow) is narrow


def test_samples_without_a_label_do_not_count():
    def with_unscored(index):
        batch = whole(index)
        extra = batch.take(torch.arange(5))
        extra.labels.fill_(-100)
        return [batch, extra]

    _, plain = taught()
    _, strategy = taught(cut=with_unscored)
    torch.testing.assert_close(
        strategy.sums.get("head"), plain.sums.get("head"), rtol=1e-6, atol=1e-6
    )


def test_nothing_learns_and_classes_are_held():
    model, strategy = StandIn(), RanPAC(projection_dim=50)
    strategy.attach(model)
    learn(model, strategy, [a_task(0), a_task(1)])
    assert trainable_parameters(model) == {}
    assert strategy.buffer_sizes() == {"classes": 4}
