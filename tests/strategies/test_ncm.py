import numpy as np
import pytest
import torch

from mmcl.core import Output, begin_task, end_task, forward, trainable_parameters
from mmcl.strategies.ncm import NCM
from tests.strategies.plain_loop import learn, whole
from tests.toys.toy_clip import StandIn, a_task, task_batches


def taught(order=(0, 1, 2), cut=task_batches):
    model, strategy = StandIn(), NCM()
    strategy.attach(model)
    for index in order:
        begin_task(model, strategy, a_task(index))
        end_task(model, strategy, a_task(index), cut(index))
    return model, strategy


def one_by_one(index):
    batch = whole(index)
    return [batch.take(row[None]) for row in torch.randperm(len(batch))]


def test_scores_are_cosines_with_the_mean_unit_feature_of_each_class():
    model, strategy = taught()
    batch = whole(0).join(whole(1)).join(whole(2))
    features = model.embed(batch, "image").double().numpy()
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    found = forward(model, strategy, batch).logits
    for label in range(6):
        mean = unit[batch.labels.numpy() == label].mean(0)
        expected = 100 * unit @ mean / np.linalg.norm(mean)
        np.testing.assert_allclose(found[:, label].numpy(), expected, rtol=1e-5)
    assert float((found.argmax(1) == batch.labels).float().mean()) > 0.9


def test_means_do_not_depend_on_the_order_of_tasks_or_on_batches():
    _, joint = taught()
    for other in (taught((2, 0, 1)), taught(cut=one_by_one)):
        for name in ("sums", "counts"):
            torch.testing.assert_close(
                other[1].means.get(name), joint.means.get(name), rtol=1e-6, atol=1e-6
            )


def test_the_models_own_scores_stay_before_any_task():
    model, strategy = StandIn(), NCM()
    strategy.attach(model)
    batch = whole(0)
    assert torch.equal(forward(model, strategy, batch).logits, model(batch).logits)


def test_a_class_that_was_not_met_is_impossible():
    model, strategy = taught((0,))
    logits = forward(model, strategy, whole(0)).logits
    assert logits.shape == (24, 6)
    assert torch.isneginf(logits[:, 2:]).all()
    assert torch.isfinite(logits[:, :2]).all()


def test_a_probe_with_fewer_classes_keeps_the_models_scores():
    model, strategy = taught()
    batch = whole(0)
    own = model(batch)
    narrow = Output(own.logits[:, :3], own.image, own.text)
    assert strategy.transform_output(model, batch, narrow) is narrow


def test_nothing_learns_and_classes_are_held():
    model, strategy = StandIn(), NCM()
    strategy.attach(model)
    learn(model, strategy, [a_task(0), a_task(1)])
    assert trainable_parameters(model) == {}
    assert strategy.buffer_sizes() == {"means": 4}


def test_a_task_without_samples_is_an_error_that_says_what_to_give():
    model, strategy = StandIn(), NCM()
    with pytest.raises(RuntimeError, match="NCM saw no samples of task 'task 0'"):
        strategy.end_task(model, a_task(0), [])
