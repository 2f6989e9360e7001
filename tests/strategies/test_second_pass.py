"""A second pass of the model (Fisher, teacher, reference gradient, scores) runs the whole chain.

Each strategy that makes one stands in a chain with strategies that give prompts, gates or adapters,
and is compared with a pass through that chain which is written here.
"""

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.nn import functional

from mmcl.core import Batch, Chain, begin_task, end_task, forward, step, trainable_parameters
from mmcl.core.seeding import generator, hash_priorities
from mmcl.layers import MoELoRALinear, find_layers
from mmcl.strategies import (
    AGEM,
    EWC,
    L2P,
    OSF,
    CLMoE,
    DarkReplay,
    ExperienceReplay,
    FeatureReplay,
    HiDe,
    LoRA,
    LoRARouter,
    LwF,
    ModalPrompt,
    MoELoRA,
)
from tests.strategies.generative_fixtures import steps_of
from tests.strategies.plain_loop import batches_of, whole
from tests.toys.toy_clip import StandIn, a_batch, a_task, task_batches
from tests.toys.toy_llava import a_llava, an_answer_task

# Batches here are made one by one, without the samples that a member would replay.
pytestmark = pytest.mark.filterwarnings("ignore:ExperienceReplay planned")
SMALL = {"pool_size": 4, "prompt_length": 2, "top_k": 2}
# Members before which a strategy stands; the model's weights learn in all of these chains.
COMPANY = {
    "L2P": lambda: [L2P("text", freeze=("image",), **SMALL)],
    "LoRARouter": lambda: [LoRARouter(rank=2, train_projector=True)],
    "CLMoE": lambda: [CLMoE(rank=2)],
    "ModalPrompt": lambda: [ModalPrompt(prompt_length=2), LoRA(rank=2)],
    "HiDe": lambda: [HiDe(rank=2)],
    "OSF": lambda: [OSF()],
    "L2P on classes": lambda: [L2P(freeze=("text",), **SMALL)],
}
SIZE, CHOSEN = 16, 4
RATES = {"OSF": 0.05, "L2P": 0.05, "L2P on classes": 0.05}
CASES = [
    pytest.param((name, is_last), marks=[pytest.mark.slow] if is_last and name != "CLMoE" else [])
    for name in COMPANY
    for is_last in (False, True)
]


def is_generative(name):
    return "classes" not in name


def task_of(name, index):
    return an_answer_task(index, SIZE) if is_generative(name) else a_task(index, size=SIZE)


def pass_over(name, model, task):
    return batches_of(model if is_generative(name) else None)(task)[: SIZE // 8]


def chain_of(name, is_first):
    """A chain of the company and of all strategies that make a second pass of their own."""
    passing = [
        LwF(alpha=0.1),
        AGEM(buffer_size=9, reference_batch_size=CHOSEN),
        ExperienceReplay(buffer_size=6, selection="loss"),
    ]
    if name != "OSF":
        passing.append(EWC(ewc_lambda=0.1, decay=0.0, fisher_samples=CHOSEN))
    company = COMPANY[name]()
    return Chain([*passing, *company] if is_first else [*company, *passing])


def built(name, is_first):
    model = a_llava() if is_generative(name) else StandIn()
    chain = chain_of(name, is_first)
    chain.attach(model)
    return model, chain


def learn(name, model, chain, index, end=True):
    begin_task(model, chain, task_of(name, index))
    steps_of(model, chain, pass_over(name, model, index), RATES.get(name, 0.5))
    if end:
        end_task(model, chain, task_of(name, index), pass_over(name, model, index))


@cache
def _learned(case):
    model, chain = built(*case)
    for index in range(2):
        learn(case[0], model, chain, index)
    return model, chain


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]} {'last' if case[1] else 'first'}")
def case(request):
    """A company, and whether it stands behind the strategies instead of before them."""
    return request.param


def learned(case):
    """A model and a chain after two tasks, still in training mode, for one test alone."""
    return copy.deepcopy(_learned(case))


def member(chain, kind):
    (found,) = (one for one in chain.leaves() if isinstance(one, kind))
    return found


def rows_of(batch):
    """The samples one by one, answers without the padding of longer ones."""
    for row in torch.arange(len(batch))[:, None]:
        one = batch.take(row)
        if one.is_generative:
            end = int(one.attention_mask.sum())
            one = replace(
                one,
                input_ids=one.input_ids[:, :end],
                attention_mask=one.attention_mask[:, :end],
                labels=one.labels[:, :end],
            )
        yield one


def log_likelihood(model, chain, one):
    """Sum of log p of the sample's label or scored tokens, and how many there are."""
    output = forward(model.eval(), chain, one)
    targets = one.labels if output.target_ids is None else output.target_ids
    return -functional.cross_entropy(output.logits, targets, reduction="sum"), len(targets)


@torch.no_grad()
def answers(model, chain, batch):
    return forward(model.eval(), chain.eval(), batch).logits


def test_the_teacher_is_the_whole_chain_as_it_was(case):
    name = case[0]
    model, chain = learned(case)
    batch = pass_over(name, model, 2)[0]
    expected = answers(*copy.deepcopy((model, chain)), batch)
    learn(name, model, chain, 2, end=False)
    now = answers(*copy.deepcopy((model, chain)), batch)
    assert float((now - expected).abs().max()) > 1e-3
    taught = member(chain, LwF)._teacher_logits(model, batch)
    torch.testing.assert_close(taught, expected, rtol=0, atol=1e-5)
    assert torch.equal(answers(model, chain, batch), now)


def test_the_teacher_of_a_loaded_checkpoint_is_the_same_in_the_midst_and_at_the_end_of_a_task(case):
    name = case[0]
    model, chain = learned(case)
    batch = pass_over(name, model, 2)[0]
    expected = answers(*copy.deepcopy((model, chain)), batch)
    found = []
    for count in (2, 3):  # a checkpoint of the second task's end, and one in the midst of the third
        if count == 3:
            learn(name, model, chain, 2, end=False)
        fresh, other = built(*case)
        for index in range(count):
            begin_task(fresh, other, task_of(name, index))
        fresh.load_state_dict(copy.deepcopy(model.state_dict()))
        other.load_state_dict(copy.deepcopy(chain.state_dict()))
        if count == 2:
            learn(name, fresh, other, 2, end=False)
        found.append(member(other, LwF)._teacher_logits(fresh, batch))
    for taught in found:
        torch.testing.assert_close(taught, expected, rtol=0, atol=1e-5)


def test_the_distillation_of_a_step_is_towards_the_whole_chain(case):
    name = case[0]
    model, chain = learned(case)
    batch = pass_over(name, model, 2)[0]
    expected = answers(*copy.deepcopy((model, chain)), batch)
    begin_task(model, chain, task_of(name, 2))
    steps_of(model, chain, pass_over(name, model, 2), RATES.get(name, 0.5))
    done = step(model.train(), chain.train(), batch)
    known = 4 if not is_generative(name) else expected.shape[1]
    teacher = (expected[:, :known] / 2).log_softmax(1)
    student = (done.output.logits.detach()[:, :known] / 2).log_softmax(1)
    divergence = (teacher.exp() * (teacher - student)).sum(1).mean() * 4
    torch.testing.assert_close(done.terms["lwf"].detach(), 0.1 * divergence, rtol=1e-3, atol=1e-6)


def test_the_fisher_is_that_of_the_whole_chain(case):
    name = case[0]
    if name == "OSF":
        pytest.skip("refused")
    model, chain = learned(case)
    hashes = hash_priorities(0, 1, torch.arange(SIZE)).tolist()
    chosen = sorted(range(SIZE), key=lambda sample: hashes[sample])[:CHOSEN]
    weights = trainable_parameters(model)
    totals = {weight: torch.zeros_like(p).double() for weight, p in weights.items()}
    rows = [one for batch in pass_over(name, model, 1) for one in rows_of(batch)]
    for sample in chosen:
        likelihood, _ = log_likelihood(model, chain, rows[sample])
        slopes = torch.autograd.grad(likelihood, list(weights.values()), allow_unused=True)
        for weight, slope in zip(weights, slopes, strict=True):
            totals[weight] += 0 if slope is None else slope.double() ** 2 / CHOSEN
    importance = member(chain, EWC).importance
    for weight, expected in totals.items():
        found = importance.get(weight).double()
        largest = float(expected.max())
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6 * largest + 1e-12)
    assert any(bool(total.any()) for total in totals.values())


def test_the_reference_gradient_is_that_of_the_whole_chain(case):
    model, chain = learned(case)
    begin_task(model, chain, task_of(case[0], 2))
    agem = member(chain, AGEM)
    columns = agem.memory.columns
    places = torch.randperm(9, generator=generator(0, agem._steps))[:CHOSEN]
    weights = list(trainable_parameters(model).values())
    total, count = [torch.zeros_like(weight) for weight in weights], 0
    for place in places.tolist():
        row = {column: values[place][None] for column, values in columns.items()}
        batch = Batch(**row, is_replay=torch.ones(1, dtype=torch.bool))
        likelihood, tokens = log_likelihood(model, chain, batch)
        slopes = torch.autograd.grad(-likelihood, weights, allow_unused=True)
        total = [t if g is None else t + g for t, g in zip(total, slopes, strict=True)]
        count += tokens
    for found, expected in zip(agem._reference(model, weights), total, strict=True):
        torch.testing.assert_close(found, expected / count, rtol=1e-3, atol=1e-6)


def test_replay_is_selected_by_the_losses_of_the_whole_chain(case):
    name = case[0]
    model, chain = learned(case)
    rows = [one for batch in pass_over(name, model, 1) for one in rows_of(batch)]
    with torch.no_grad():
        pairs = [log_likelihood(model, chain, one) for one in rows]
    losses = [-float(total) / tokens for total, tokens in pairs]
    memory = member(chain, ExperienceReplay).memory
    found = sorted(memory.sample_ids[memory.task_ids == 1].tolist())
    if is_generative(name):
        expected = sorted(sorted(range(SIZE), key=lambda sample: -losses[sample])[: len(found)])
    else:  # from each class its own
        labels = [int(one.labels) for one in rows]
        expected = []
        for label in sorted(set(labels)):
            own = sorted((s for s in range(SIZE) if labels[s] == label), key=lambda s: -losses[s])
            expected += own[: sum(labels[sample] == label for sample in found)]
    assert found == sorted(expected)
    assert len(found) > 1


@pytest.mark.parametrize("name", ["L2P", "ModalPrompt"])
@pytest.mark.parametrize("is_first", [False, True])
def test_the_weights_of_experts_are_measured_over_prompts_and_tokens(name, is_first):
    company = COMPANY[name]()[:1]
    experts = MoELoRA(num_experts=3, rank=2, samples=5)
    model, chain = a_llava(), Chain([experts, *company] if is_first else [*company, experts])
    chain.attach(model)
    learn(name, model, chain, 0)
    layers = list(find_layers(model, MoELoRALinear).values())
    inputs = [[] for _ in layers]
    hooks = [
        layer.register_forward_pre_hook(lambda layer, given, own=own: own.append(given[0][0]))
        for layer, own in zip(layers, inputs, strict=True)
    ]
    rows = list(rows_of(pass_over(name, model, 0)[0]))[:5]
    with torch.no_grad():
        for one in rows:
            forward(model.eval(), chain, one)
    for hook in hooks:
        hook.remove()
    length = sum(one.input_ids.shape[1] + 2 * (2 if name == "L2P" else 1) for one in rows)
    for layer, seen, found in zip(layers, inputs, experts.mean_weights, strict=True):
        tokens = torch.cat(seen)
        assert len(tokens) == length
        expected = (tokens @ layer.router.T).softmax(1).mean(0).detach()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("is_first", [False, True])
def test_stored_logits_are_those_of_the_whole_chain(is_first):
    prompts, replay = L2P(**SMALL), DarkReplay(buffer_size=50)
    model, chain = StandIn(), Chain([replay, prompts] if is_first else [prompts, replay])
    chain.attach(model)
    begin_task(model, chain, a_task(0))
    done = step(model, chain, a_batch())
    with torch.no_grad():
        expected = torch.cat([forward(model, chain, one).logits for one in rows_of(a_batch())])
    chain.after_step(model, done.batch, done.output)
    order = hash_priorities(0, 0, torch.arange(8)).argsort()
    torch.testing.assert_close(replay.memory.columns["logits"], expected[order], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["L2P", "CLMoE", "LoRARouter"])
def test_monitored_features_are_those_of_training(name):
    company = [L2P("text", **SMALL)] if name == "L2P" else COMPANY[name]()
    replay = FeatureReplay(buffer_size=8, drift_images=4)
    model, chain = a_llava(), Chain([*company, replay])
    chain.attach(model)
    learn(name, model, chain, 0)
    held = replay.drift_monitor.held
    images, exact = held.get("images"), held.get("exact")
    batch = whole(0, model)
    with torch.no_grad():
        features = chain.extend_batch(model.train(), batch).features
    for image, expected in zip(images, exact, strict=True):
        (place,) = (n for n in range(len(batch)) if torch.equal(batch.images[n], image))
        torch.testing.assert_close(features[place], expected, rtol=0, atol=1e-5)
    assert replay.drift["relative_l2"] < 1e-6


def test_the_drift_monitor_sees_what_another_member_trains_in_the_image_tower():
    model, chain = StandIn(), Chain([FeatureReplay(buffer_size=8, drift_images=4), LoRA(rank=2)])
    chain.attach(model)
    begin_task(model, chain, a_task(0))
    end_task(model, chain, a_task(0), task_batches(0))
    begin_task(model, chain, a_task(1))
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.3)
    with pytest.warns(UserWarning, match="features have drifted"):
        end_task(model, chain, a_task(1), task_batches(1))
