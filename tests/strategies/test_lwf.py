import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from mmcl.core import (
    IGNORE_INDEX,
    Batch,
    Chain,
    Output,
    begin_task,
    end_task,
    step,
    trainable_parameters,
)
from mmcl.strategies.l2p import L2P
from mmcl.strategies.lora import LoRA
from mmcl.strategies.lwf import LwF
from tests.strategies.plain_loop import learn
from tests.toys.toy_clip import StandIn, a_batch, a_task, task_batches
from tests.toys.toy_llava import a_dialogue_batch, a_llava, an_answer_task, dialogue_batches


def divergence(teacher, student, temperature):
    """T^2 * KL, mean over rows, in plain loops."""
    total = 0.0
    for t_row, s_row in zip(teacher.tolist(), student.tolist(), strict=True):
        t = [math.exp(value / temperature) for value in t_row]
        s = [math.exp(value / temperature) for value in s_row]
        for p, q in zip(t, s, strict=True):
            total += p / sum(t) * math.log((p / sum(t)) / (q / sum(s)))
    return temperature**2 * total / len(teacher)


def after_a_task(**arguments):
    """A model that learned task 0 and then moved on, its old self, and the strategy."""
    model, strategy = learn(StandIn(), LwF(**arguments), [a_task(0)])
    old = copy.deepcopy(model)
    begin_task(model, strategy, a_task(1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator()))
    return model, old, strategy


def test_nothing_is_kept_during_the_first_task():
    model, strategy = StandIn(), LwF()
    begin_task(model, strategy, a_task(0))
    assert set(step(model, strategy, a_batch()).terms) == {"task"}


def test_the_term_is_the_divergence_over_the_classes_of_earlier_tasks():
    model, old, strategy = after_a_task(alpha=0.5, temperature=3.0)
    batch = a_batch(task=1)
    done = step(model, strategy, batch)
    teacher = old(batch).logits.detach()[:, :2].double()
    student = done.output.logits.detach()[:, :2].double()
    expected = 0.5 * divergence(teacher, student, 3.0)
    assert float(done.terms["lwf"].detach()) == pytest.approx(expected, rel=1e-4)


def test_a_model_that_has_not_moved_has_no_loss():
    model, strategy = learn(StandIn(), LwF(), [a_task(0)])
    begin_task(model, strategy, a_task(1))
    term = step(model, strategy, a_batch(task=1)).terms["lwf"]
    assert float(term.detach()) == pytest.approx(0.0, abs=1e-6)


def test_replayed_samples_are_left_out():
    model, _, strategy = after_a_task()
    new, old = a_batch(task=1), a_batch(rows=3, task=0)
    replayed = Batch(
        old.images,
        old.labels,
        old.task_ids,
        sample_ids=old.sample_ids,
        is_replay=torch.ones(3).bool(),
    )
    alone = step(model, strategy, new).terms["lwf"]
    mixed = step(model, strategy, replayed.join(new)).terms["lwf"]
    torch.testing.assert_close(alone, mixed)
    assert "lwf" not in step(model, strategy, replayed).terms


def test_the_classes_known_before_a_task_include_all_earlier_ones():
    model, strategy = learn(StandIn(), LwF(), [a_task(0), a_task(1)])
    assert strategy.known == 4
    fresh = LwF()
    fresh.load_state_dict(strategy.state_dict())
    assert fresh.known == 4


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(12, 4), nn.Embedding(9, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, batch, prompts=None):
        image = self.norm(self.image(batch.images.flatten(1).float() / 255))
        return Output(3 * image @ self.text(batch.input_ids).mean(1).T)

    def loss(self, output, batch):
        return output.logits.sum() * 0


def captions(count=5):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 2, 2), generator=g, dtype=torch.uint8)
    labels = torch.full((count,), -100)
    tokens = torch.randint(0, 9, (count, 3), generator=g)
    return Batch(images, labels, torch.zeros(count, dtype=torch.int64), input_ids=tokens)


def test_captions_keep_the_similarity_of_images_and_texts_both_ways():
    model, strategy, batch = Pairs().eval(), LwF(), captions()
    end_task(model, strategy, a_task(0), [])
    old = copy.deepcopy(model)
    begin_task(model, strategy, a_task(1))
    with torch.no_grad():
        model.image.weight.add_(0.2)
    done = step(model, strategy, batch)
    teacher, student = old(batch).logits.detach(), done.output.logits.detach()
    expected = (divergence(teacher, student, 2.0) + divergence(teacher.T, student.T, 2.0)) / 2
    assert float(done.terms["lwf"].detach()) == pytest.approx(expected, rel=1e-4)


def test_asking_the_teacher_leaves_running_statistics_alone():
    model, strategy, batch = Pairs().train(), LwF(), captions()
    end_task(model, strategy, a_task(0), [])
    output = model(batch)
    before = copy.deepcopy(model.state_dict())
    strategy.penalty(model, batch, output)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.norm.training


def test_the_teacher_stays_while_the_model_learns():
    model, strategy = learn(StandIn(), LwF(), [a_task(0)])
    before = {name: value.clone() for name, value in strategy.teacher.tensors.items()}
    begin_task(model, strategy, a_task(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in task_batches(1):
        step(model, strategy, batch).loss.backward()
        optimizer.step()
    after = strategy.teacher.tensors
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not torch.equal(before["names.weight"], model.names.weight)


def moved(model, seed=0):
    """Move what learns."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))


def answering(*members, tasks=1):
    """A LLaVA and a chain that learned tasks, and the model as it was after each."""
    model, chain = a_llava(), Chain(members)
    chain.attach(model)
    olds = [copy.deepcopy(model)]
    for index in range(tasks):
        begin_task(model, chain, an_answer_task(index))
        moved(model, index)
        end_task(model, chain, an_answer_task(index), dialogue_batches(model, index))
        olds.append(copy.deepcopy(model))
    begin_task(model, chain, an_answer_task(tasks))
    moved(model, 9)
    return model, chain, olds


def test_answers_are_distilled_over_the_vocabulary_at_every_scored_token():
    model, chain, olds = answering(LwF(alpha=0.5, temperature=3.0))
    batch = a_dialogue_batch(model, task=1)
    done = step(model, chain, batch)
    teacher, student = olds[-1](batch).logits.detach(), done.output.logits.detach()
    expected = 0.5 * divergence(teacher.double(), student.double(), 3.0)
    assert float(done.terms["lwf"].detach()) == pytest.approx(expected, rel=1e-3)


def test_scored_tokens_of_replayed_samples_are_left_out():
    model, chain, _ = answering(LwF())
    new, old = a_dialogue_batch(model, task=1), a_dialogue_batch(model, rows=3)
    old = replace(old, is_replay=torch.ones(3, dtype=torch.bool))
    alone = step(model, chain, new).terms["lwf"]
    torch.testing.assert_close(alone, step(model, chain, old.join(new)).terms["lwf"])
    assert "lwf" not in step(model, chain, old).terms
    unscored = replace(new, labels=torch.full_like(new.labels, -100))
    assert "lwf" not in step(model, chain, unscored).terms


def test_a_teacher_under_lora_costs_its_adapter_and_answers_as_the_previous_model():
    model, chain, olds = answering(LoRA(rank=2), LwF(), tasks=2)
    batch = a_dialogue_batch(model, task=2)
    lwf = chain.members[1]
    assert set(lwf.teacher.tensors) == set(trainable_parameters(model))
    taught = lwf._teacher_logits(model, batch)
    torch.testing.assert_close(taught, olds[-1](batch).logits.detach())
    assert not torch.equal(taught, model(batch).logits)


def test_the_base_teaches_from_the_first_step_and_stores_nothing_of_adapters():
    base = a_llava()
    model, chain, _ = answering(LoRA(rank=2), LwF(teacher="base"), tasks=2)
    lwf = chain.members[1]
    assert lwf.state_bytes() < 50
    batch = a_dialogue_batch(model, task=2)
    done = step(model, chain, batch)
    taught = lwf._teacher_logits(model, batch)
    torch.testing.assert_close(taught, base(batch).logits.detach())
    expected = divergence(taught.double(), done.output.logits.detach().double(), 2.0)
    assert float(done.terms["lwf"].detach()) == pytest.approx(expected, rel=1e-3)
    first = LwF(teacher="base")
    begin_task(model, first, an_answer_task(0))
    assert "lwf" in step(model, first, batch).terms


def test_the_base_is_copied_where_weights_outside_of_adapters_learn():
    base = a_llava()
    model, chain, _ = answering(LoRA(rank=2, train_projector=True), LwF(teacher="base"))
    lwf = chain.members[1]
    assert lwf.teacher.tensors
    assert all("projector" in name for name in lwf.teacher.tensors)
    batch = a_dialogue_batch(model, task=1)
    torch.testing.assert_close(lwf._teacher_logits(model, batch), base(batch).logits.detach())


def test_the_base_teaches_over_all_classes_of_a_model_that_classifies():
    model, strategy = StandIn(), LwF(teacher="base")
    old = copy.deepcopy(model)
    begin_task(model, strategy, a_task(0))
    moved(model)
    batch = a_batch()
    done = step(model, strategy, batch)
    teacher, student = old(batch).logits.detach(), done.output.logits.detach()
    expected = divergence(teacher.double(), student.double(), 2.0)
    assert float(done.terms["lwf"].detach()) == pytest.approx(expected, rel=1e-4)


class Grows(LwF):
    """Adds a weight of its own to the model in each task, as one adapter per task does."""

    def begin_task(self, model, task):
        if not hasattr(model, f"added_{task.index}"):
            setattr(model, f"added_{task.index}", nn.Parameter(torch.zeros(6)))
        super().begin_task(model, task)


class Added(StandIn):
    def forward(self, batch, prompts=None):
        output = super().forward(batch)
        shift = sum(p for name, p in self.named_parameters() if name.startswith("added_"))
        return replace(output, logits=output.logits + shift)


def test_what_a_task_adds_to_a_model_is_not_taught_as_it_moves():
    model, strategy = learn(Added(), Grows(), [a_task(0)])
    old = copy.deepcopy(model)
    begin_task(model, strategy, a_task(1))
    moved(model)
    taught = strategy._teacher_logits(model, a_batch(task=1))
    torch.testing.assert_close(taught, old(a_batch(task=1)).logits.detach())


def with_sources(batch, places):
    """The batch with some of its rows from a general set."""
    is_general = torch.zeros(len(batch), dtype=torch.bool)
    is_general[places] = True
    return replace(
        batch,
        task_ids=batch.task_ids.masked_fill(is_general, -1),
        labels=batch.labels.masked_fill(is_general, IGNORE_INDEX),
        source_ids=is_general.long(),
        in_loss=~is_general,
        is_replay=is_general,
    )


def test_samples_of_sources_are_distilled_and_no_others():
    model, old, _ = after_a_task()
    strategy = LwF(distill_on="sources")
    task = replace(a_task(1), mixture=((1, 0.5),))
    learned, strategy = learn(StandIn(), strategy, [replace(a_task(0), mixture=((1, 0.5),))])
    old = copy.deepcopy(learned)
    begin_task(learned, strategy, task)
    with torch.no_grad():
        for parameter in learned.parameters():
            parameter.add_(0.1)
    batch = with_sources(a_batch(rows=6, task=1), [1, 4, 5])
    done = step(learned, strategy, batch)
    distilled = [1, 4, 5]
    teacher = old(batch).logits.detach()[distilled, :2].double()
    student = done.output.logits.detach()[distilled, :2].double()
    expected = divergence(teacher, student, 2.0)
    assert float(done.terms["lwf"].detach()) == pytest.approx(expected, rel=1e-4)
    assert "lwf" not in step(learned, strategy, a_batch(task=1)).terms


def test_a_task_that_mixes_in_no_source_is_refused():
    with pytest.raises(ValueError, match="mixes in none"):
        begin_task(StandIn(), LwF(distill_on="sources"), a_task(0))


def test_the_teacher_of_a_frozen_model_with_prompts_is_no_empty_one():
    model, chain = StandIn(), Chain([L2P(), LwF()])
    chain.attach(model)
    learn(model, chain, [a_task(0)])
    assert not [part for part in chain.inactive_parts() if "LwF" in part]
    alone = LwF()
    end_task(model, alone, a_task(0), [])
    assert alone.inactive_parts() == ("teacher is empty",)
