import io
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from mmcl.core import Chain, begin_task, end_task, forward, step, trainable_parameters
from mmcl.core.seeding import generator, hash_priorities
from mmcl.models import OpenCLIP
from mmcl.strategies import CLMoE, LoRA, ModalPrompt
from mmcl.strategies.agem import AGEM
from mmcl.strategies.l2p import L2P
from tests.toys.toy_clip import StandIn, a_batch, a_task, task_batches
from tests.toys.toy_llava import a_llava, an_answer_task, dialogue_batches


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def after_a_task(**arguments):
    model, strategy = StandIn(), AGEM(**arguments)
    begin_task(model, strategy, a_task(0))
    end_task(model, strategy, a_task(0), task_batches(0))
    begin_task(model, strategy, a_task(1))
    return model, strategy


def unlearn(model, strategy):
    """Leave a gradient that raises the loss on the first task."""
    (-step(model, strategy, a_batch(8)).loss).backward()


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def reference_vector(model, strategy, seed, step_number, rows):
    """The gradient of the memory's mean loss as one vector, row after row."""
    columns = strategy.memory.columns
    places = torch.randperm(len(strategy.memory), generator=generator(seed, step_number))[:rows]
    total = 0
    for place in places.tolist():
        row = replace(a_batch(1), images=columns["images"][place][None])
        loss = functional.cross_entropy(model(row).logits, columns["labels"][place][None])
        parts = torch.autograd.grad(loss, list(model.parameters()))
        total = total + torch.cat([part.flatten() for part in parts])
    return total / len(places)


def test_a_conflicting_gradient_is_projected_as_one_vector():
    model, strategy = after_a_task(buffer_size=16, reference_batch_size=6, seed=3)
    unlearn(model, strategy)
    gradient = flat_gradient(model)
    reference = reference_vector(model, strategy, 3, 0, 6)
    assert float(gradient @ reference) < 0
    strategy.project_gradients(model)
    expected = gradient - (gradient @ reference) / (reference @ reference) * reference
    torch.testing.assert_close(flat_gradient(model), expected, rtol=1e-4, atol=1e-6)
    assert abs(float(flat_gradient(model) @ reference)) < 1e-4 * float(reference @ reference)


def test_a_gradient_without_conflict_is_untouched():
    model, strategy = after_a_task()
    step(model, strategy, a_batch(8)).loss.backward()
    before = flat_gradient(model)
    strategy.project_gradients(model)
    assert torch.equal(flat_gradient(model), before)


def test_in_the_first_task_nothing_is_projected():
    model, strategy = StandIn(), AGEM()
    begin_task(model, strategy, a_task(0))
    step(model, strategy, a_batch(8)).loss.backward()
    before = flat_gradient(model)
    strategy.project_gradients(model)
    assert torch.equal(flat_gradient(model), before)
    assert strategy.inactive_parts() == ("memory is empty",)


def test_a_model_without_trainable_parameters_is_reported():
    model, strategy = StandIn(), Chain([L2P(), AGEM()])
    strategy.attach(model)
    for task in (a_task(0), a_task(1)):
        begin_task(model, strategy, task)
        step(model, strategy, a_batch(8, task.index)).loss.backward()
        strategy.project_gradients(model)
        end_task(model, strategy, task, task_batches(task.index))
    found = "AGEM: the model has no trainable parameters, so no gradient was projected"
    assert found in strategy.inactive_parts()
    model, strategy = after_a_task()
    assert strategy.inactive_parts() == ()


def test_a_parameter_without_a_gradient_counts_as_zero():
    model, strategy = after_a_task(buffer_size=16, reference_batch_size=16)
    unlearn(model, strategy)
    model.patch.bias.grad = torch.zeros_like(model.patch.bias)
    gradient = flat_gradient(model)
    reference = reference_vector(model, strategy, 0, 0, 16)
    model.patch.bias.grad = None
    strategy.project_gradients(model)
    expected = gradient - (gradient @ reference) / (reference @ reference) * reference
    torch.testing.assert_close(flat_gradient(model), expected, rtol=1e-4, atol=1e-6)


def test_frozen_parameters_stay_without_a_gradient():
    model, strategy = after_a_task()
    model.freeze("image")
    unlearn(model, strategy)
    strategy.project_gradients(model)
    assert model.patch.weight.grad is None
    assert model.names.weight.grad is not None


def test_the_memory_holds_equally_many_of_every_task():
    model, strategy = StandIn(), AGEM(buffer_size=12, seed=2)
    for index in range(3):
        end_task(model, strategy, a_task(index), task_batches(index))
        counts = Counter(strategy.memory.columns["task_ids"].tolist())
        assert counts == dict.fromkeys(range(index + 1), 12 // (index + 1))
    hashes = hash_priorities(2, 1, torch.arange(24)).tolist()
    chosen = sorted(range(24), key=lambda sample: hashes[sample])[:4]
    images = torch.cat([batch.images for batch in task_batches(1)])
    own = strategy.memory.columns["task_ids"] == 1
    assert torch.equal(strategy.memory.columns["images"][own], images[chosen])


def test_draws_change_with_every_step():
    model, strategy = after_a_task(buffer_size=24, reference_batch_size=4)
    first = strategy._reference(model, list(model.parameters()))
    strategy.project_gradients(model)
    second = strategy._reference(model, list(model.parameters()))
    assert not torch.equal(first[0], second[0])


def test_a_checkpoint_resumes_as_the_original():
    model, original = after_a_task(buffer_size=10, reference_batch_size=4)
    spoiled = replace(a_batch(8), labels=1 - a_batch(8).labels)
    step(model, original, spoiled).loss.backward()
    original.project_gradients(model)
    fresh = AGEM(buffer_size=10, reference_batch_size=4)
    begin_task(model, fresh, a_task(1))
    fresh.load_state_dict(through_a_file(original.state_dict()))
    gradients = []
    for strategy in (original, fresh):
        model.zero_grad()
        end_task(model, strategy, a_task(1), task_batches(1))
        unlearn(model, strategy)
        strategy.project_gradients(model)
        gradients.append(flat_gradient(model))
    assert torch.equal(*gradients)


def test_captions_come_back_with_their_tokens():
    tokens = torch.arange(8)[:, None].expand(8, 3)
    captions = [replace(batch, input_ids=tokens) for batch in task_batches(0)]
    model, strategy = StandIn(), AGEM(buffer_size=5)
    end_task(model, strategy, a_task(0), captions)
    columns = strategy.memory.columns
    assert columns["input_ids"].shape == (5, 3)
    assert columns["attention_mask"].all()


def test_samples_that_share_images_are_refused():
    shared = replace(a_batch(4), image_owner=torch.tensor([0, 0, 1, 2]))
    with pytest.raises(ValueError, match="AGEM was given samples that share or lack images"):
        end_task(StandIn(), AGEM(), a_task(), [shared])


def test_samples_that_are_answered_are_stored_with_labels_for_every_token():
    model, strategy = a_llava(), AGEM(buffer_size=20, reference_batch_size=6, seed=3)
    for task in (0, 1):
        begin_task(model, strategy, an_answer_task(task))
        end_task(model, strategy, an_answer_task(task), dialogue_batches(model, task))
    columns = strategy.memory.columns
    assert bool((columns["labels"][~columns["attention_mask"]] == -100).all())
    rows = [
        batch.take(torch.tensor([row]))
        for task in (0, 1)
        for batch in dialogue_batches(model, task)
        for row in range(8)
    ]
    places = torch.randperm(20, generator=generator(3, 0))[:6]
    own = [
        next(row for row in rows if torch.equal(row.images[0], columns["images"][place]))
        for place in places.tolist()
    ]
    weights = list(trainable_parameters(model).values())
    words = [int((row.labels != -100).sum()) for row in own]
    losses = [model.loss(model(row), row) * count for row, count in zip(own, words, strict=True)]
    expected = torch.autograd.grad(sum(losses) / sum(words), weights)
    found = strategy._reference(model, weights)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [CLMoE, ModalPrompt], ids=lambda make: make.__name__)
def test_stored_questions_are_embedded_by_a_routing_encoder(make):
    model = a_llava(routing_encoder=OpenCLIP("tiny", "built-in").eval())
    chain = Chain([make(), LoRA(rank=2), AGEM()] if make is ModalPrompt else [make(rank=2), AGEM()])
    chain.attach(model)
    begin_task(model, chain, an_answer_task(0))
    batches = dialogue_batches(model, 0)
    end_task(model, chain, an_answer_task(0), batches)
    begin_task(model, chain, an_answer_task(1))
    (agem,) = (member for member in chain.members if isinstance(member, AGEM))
    weights = list(trainable_parameters(model).values())
    total, count = 0, 0
    for batch in batches:
        old = replace(batch, is_replay=torch.ones(8, dtype=torch.bool))
        words = int((old.labels != -100).sum())
        total = total + words * model.loss(forward(model, chain, old), old)
        count += words
    expected = torch.autograd.grad(total / count, weights, allow_unused=True)
    for found, slope in zip(agem._reference(model, weights), expected, strict=True):
        slope = torch.zeros_like(found) if slope is None else slope
        torch.testing.assert_close(found, slope, rtol=1e-3, atol=1e-6)
