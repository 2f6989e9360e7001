import copy

import pytest
import torch

from mmcl.core import Chain, begin_task, trainable_parameters
from mmcl.ops import model_merging as merging
from mmcl.strategies import LoRA
from mmcl.strategies.finetune import Finetune
from mmcl.strategies.weight_merging import WeightMerging
from tests.strategies.plain_loop import learn
from tests.toys.toy_clip import StandIn, a_task
from tests.toys.toy_llava import a_llava, an_answer_task


def weights(model):
    return {name: value.detach().clone() for name, value in trainable_parameters(model).items()}


def put(model, new):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in trainable_parameters(model).items():
            parameter.copy_(new[name])
    return model


def fine_tuned(model, task):
    return weights(learn(copy.deepcopy(model), Finetune(), [task])[0])


def expect_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7)


def reference(method, start, tasks=3):
    """Weights after some tasks, by a loop that keeps everything."""
    first = StandIn()
    base, now, ends, vectors = weights(first), weights(first), [], []
    for index in range(tasks):
        begin = base if start == "base" else now
        end = fine_tuned(put(first, begin), a_task(index))
        ends.append(end)
        vectors.append({n: end[n] - begin[n] for n in end})
        added = [{n: base[n] + v[n] for n in v} for v in vectors]
        if method == "average":
            now = {n: sum(e[n] for e in ends) / len(ends) for n in base}
        elif method == "ema":
            now = {n: 0.7 * (now if index else base)[n] + 0.3 * end[n] for n in base}
        elif method == "task_arithmetic":
            now = {n: base[n] + 0.5 * sum(v[n] for v in vectors) for n in base}
        elif method == "dare":
            now = merging.dare(base, added, 0.4, 7, 0.5)
        else:
            extra = {"density": 0.3} if method == "ties" else {}
            now = getattr(merging, method)(base, ends, scale=0.5, **extra)
    return now


SETTINGS = {"share": 0.3, "scale": 0.5, "density": 0.3, "drop_rate": 0.4, "seed": 7}


@pytest.mark.parametrize("start", ["merged", "base"])
@pytest.mark.parametrize("method", ["average", "ema", "task_arithmetic", "ties", "dare", "magmax"])
def test_the_weights_are_those_of_a_loop_that_keeps_every_task(method, start):
    strategy = WeightMerging(method, start, **SETTINGS)
    model, _ = learn(StandIn(), strategy, [a_task(0), a_task(1), a_task(2)])[:2]
    expect_equal(weights(model), reference(method, start))


@pytest.mark.parametrize("method", ["ema", "average", "ties", "dare"])
def test_a_resumed_run_ends_with_the_same_bits(method):
    whole, strategy = StandIn(), WeightMerging(method, "base", **SETTINGS)
    learn(whole, strategy, [a_task(0)])
    resumed, fresh = copy.deepcopy(whole), WeightMerging(method, "base", **SETTINGS)
    begin_task(StandIn(), fresh, a_task(0))
    fresh.load_state_dict(strategy.state_dict())
    learn(whole, strategy, [a_task(1)])
    learn(resumed, fresh, [a_task(1)])
    ends = weights(resumed)
    assert all(torch.equal(ends[name], tensor) for name, tensor in weights(whole).items())


def test_adapters_are_refused_with_the_way_out():
    model, chain = a_llava(), Chain([LoRA(rank=2), WeightMerging()])
    chain.attach(model)
    with pytest.raises(ValueError, match="no adapter of their rank.*mmcl merge"):
        begin_task(model, chain, an_answer_task(0))


def test_other_weights_than_in_the_first_task_are_refused():
    model, strategy = StandIn(), WeightMerging()
    learn(model, strategy, [a_task(0)])
    model.freeze("image")
    with pytest.raises(ValueError, match="train the same parts in every task"):
        begin_task(model, strategy, a_task(1))


@pytest.mark.parametrize(
    "wrong",
    [{"method": "mean"}, {"start": "last"}, {"share": 2}, {"density": 0}, {"drop_rate": 1}],
)
def test_arguments_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*expected"):
        WeightMerging(**wrong)
