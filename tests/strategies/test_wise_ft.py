import copy
from functools import partial

import pytest
import torch

from mmcl.core import Chain, begin_task, end_task, trainable_parameters
from mmcl.layers.adapters import adapter_layers
from mmcl.strategies import EWC, OSF, CLMoE, HiDe, LoRA, LoRARouter, LwF, MoELoRA, OLoRA, RegLoRA
from mmcl.strategies.finetune import Finetune
from mmcl.strategies.wise_ft import WiseFT
from tests.strategies.plain_loop import learn
from tests.toys.toy_clip import StandIn, a_batch, a_task, task_batches
from tests.toys.toy_llava import a_llava, an_answer_task, dialogue_batches


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


def moved(model, seed):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))


def changes(model, x):
    """What each adapted layer adds to the output of its base, in float64, with all its adapters."""
    layers = adapter_layers(model)
    return {
        name: (layer(own) - layer.get_submodule(base)(own)).detach()
        for name, layer in layers.items()
        for base in ("base", "base_layer")
        if hasattr(layer, base)
        for own in [x[:, : layer.in_features].float()]
    }


def wise_tasks(member, anchor):
    """Changes of all layers before, at the end of and after three tasks that WiseFT averages."""
    model, chain = a_llava(), Chain([member, WiseFT(alpha=0.3, anchor=anchor)])
    chain.attach(model)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for index in range(3):
        begin_task(model, chain, an_answer_task(index))
        before = changes(model, x)
        moved(model, index)
        after = changes(model, x)
        projector = {n: p.detach().clone() for n, p in trainable_parameters(model).items()}
        end_task(model, chain, an_answer_task(index), dialogue_batches(model, index))
        yield before, after, changes(model, x), projector, model


@pytest.mark.parametrize("make", [OLoRA, RegLoRA, HiDe, LoRARouter], ids=lambda make: make.__name__)
def test_the_weight_of_a_layer_with_an_adapter_per_task_is_interpolated(make):
    for before, after, found, *_ in wise_tasks(make(rank=2), "previous"):
        for name in found:
            expected = 0.7 * before[name] + 0.3 * after[name]
            if make in (HiDe, LoRARouter):  # one adapter at a time, the task's own
                expected = 0.3 * after[name]
            assert float((after[name] - before[name]).norm()) > 1e-3
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [LoRA, partial(MoELoRA, num_experts=3)], ids=["LoRA", "MoELoRA"])
def test_the_weight_of_an_adapter_of_all_tasks_is_interpolated_from_the_start(make):
    for _, after, found, *_ in wise_tasks(make(rank=2), "start"):
        for name in found:
            assert float(after[name].norm()) > 1e-3
            torch.testing.assert_close(found[name], 0.3 * after[name], rtol=1e-4, atol=1e-5)


def test_a_projector_beside_adapters_is_interpolated_as_it_is():
    start = weights(a_llava())
    for *_, end, model in wise_tasks(LoRA(rank=2, train_projector=True), "start"):
        names = [name for name in trainable_parameters(model) if "lora_" not in name]
        assert names
        for name in names:
            expected = 0.7 * start[name] + 0.3 * end[name]
            torch.testing.assert_close(trainable_parameters(model)[name].detach(), expected)


REFUSED = [
    (lambda: [LoRA(rank=2), WiseFT()], "trained by every task.*use anchor='start'"),
    (lambda: [WiseFT(), MoELoRA(rank=2)], "trained by every task.*use anchor='start'"),
    (lambda: [OLoRA(rank=2), WiseFT(anchor="start")], "frozen; use anchor='previous'"),
    (lambda: [CLMoE(rank=2), WiseFT()], "experts are trained by every task"),
    (lambda: [CLMoE(rank=2), WiseFT(anchor="start")], "experts are trained by every task"),
    (lambda: [OSF(), WiseFT()], "is no factor of a LoRA product; fine-tune the layer in full"),
    (lambda: [WiseFT(anchor="start"), Chain([OSF()])], "is no factor of a LoRA product"),
    (lambda: [LoRA(rank=2, options={"use_dora": True}), WiseFT(anchor="start")], "no factor"),
    (lambda: [OSF(), EWC()], "EWC compares weights of different tasks, and OSF"),
    (lambda: [Chain([EWC()]), Chain([OSF()])], "EWC compares weights of different tasks, and OSF"),
]


@pytest.mark.parametrize(("members", "words"), REFUSED, ids=range(len(REFUSED)))
def test_weights_whose_average_or_fisher_means_nothing_are_refused_at_the_first_task(
    members, words
):
    model, chain = a_llava(), Chain(members())
    chain.attach(model)
    with pytest.raises(ValueError, match=words):
        begin_task(model, chain, an_answer_task(0))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("is_first", [False, True])
def test_anchors_and_teachers_are_the_averaged_weights_in_any_order(is_first, nested):
    ewc, lwf, wise = EWC(), LwF(), WiseFT(alpha=0.3)
    others = [Chain([ewc, lwf])] if nested else [ewc, lwf]
    model, chain = StandIn(), Chain([wise, *others] if is_first else [*others, wise])
    chain.attach(model)
    learn(model, chain, [a_task(0)])
    alone = EWC()
    alone.end_task(model, a_task(0), task_batches(0))
    torch.testing.assert_close(ewc.importance.tensors, alone.importance.tensors)
    learn(model, chain, [a_task(1)])
    for name, value in weights(model).items():
        assert torch.equal(ewc.anchors.get(name), value)
        assert torch.equal(lwf.teacher.get(name), value)
    begin_task(model, chain, a_task(2))
    assert float(ewc.penalty(model, a_batch(task=2), None)["ewc"].detach()) == 0
