import copy

import torch

from mmcl.core import trainable_parameters
from mmcl.strategies.finetune import Finetune
from mmcl.strategies.wise_ft import WiseFT
from tests.strategies.plain_loop import learn
from tests.toys.toy_clip import StandIn, a_task


def weights(model):
    return {name: value.detach().clone() for name, value in trainable_parameters(model).items()}


def fine_tuned(model, task):
    return weights(learn(copy.deepcopy(model), Finetune(), [task])[0])


def test_alpha_one_is_fine_tuning_and_alpha_zero_changes_nothing():
    start, after = weights(StandIn()), fine_tuned(StandIn(), a_task(0))
    kept = weights(learn(StandIn(), WiseFT(alpha=0.0), [a_task(0)])[0])
    moved = weights(learn(StandIn(), WiseFT(alpha=1.0), [a_task(0)])[0])
    assert all(torch.equal(kept[name], start[name]) for name in start)
    assert all(torch.equal(moved[name], after[name]) for name in start)


def test_each_task_ends_between_its_beginning_and_its_end():
    model, strategy = StandIn(), WiseFT(alpha=0.3)
    for task in (a_task(0), a_task(1)):
        before, after = weights(model), fine_tuned(model, task)
        learn(model, strategy, [task])
        for name, found in weights(model).items():
            expected = 0.7 * before[name].double() + 0.3 * after[name].double()
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


def test_the_line_may_start_at_the_first_weights():
    model, strategy = StandIn(), WiseFT(alpha=0.3, anchor="start")
    first = weights(model)
    learn(model, strategy, [a_task(0)])
    after = fine_tuned(model, a_task(1))
    learn(model, strategy, [a_task(1)])
    for name, found in weights(model).items():
        expected = 0.7 * first[name].double() + 0.3 * after[name].double()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


def test_a_weight_that_is_named_keeps_its_new_value():
    after = fine_tuned(StandIn(), a_task(0))
    found = weights(learn(StandIn(), WiseFT(alpha=0.5, exclude=("names.weight",)), [a_task(0)])[0])
    assert torch.equal(found["names.weight"], after["names.weight"])
    assert not torch.equal(found["patch.weight"], after["patch.weight"])


def test_frozen_weights_and_buffers_stay():
    model = StandIn()
    model.register_buffer("steps", torch.tensor(3))
    model.freeze("image")
    before = model.patch.weight.clone()
    learn(model, WiseFT(alpha=0.5), [a_task(0)])
    assert torch.equal(model.patch.weight, before)
    assert int(model.steps) == 3
