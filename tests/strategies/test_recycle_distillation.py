"""Distillation from an old base with its adapter, against plain loops."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from mmcl.core import ProcessedSample, begin_task, step
from mmcl.strategies.recycle_distillation import RecycleDistillation
from tests.toys.toy_clip import StandIn, a_batch, a_task
from tests.toys.toy_llava import a_dialogue_batch, a_llava, an_answer_task


def divergence(teacher, student, temperature):
    """T^2 * KL, mean over samples, in plain loops."""
    total = 0.0
    for t_row, s_row in zip(teacher.tolist(), student.tolist(), strict=True):
        t = [math.exp(value / temperature) for value in t_row]
        s = [math.exp(value / temperature) for value in s_row]
        for p, q in zip(t, s, strict=True):
            total += p / sum(t) * math.log((p / sum(t)) / (q / sum(s)))
    return temperature**2 * total / len(teacher)


def cross_entropy(logits, labels):
    rows = zip(logits.double().tolist(), labels.tolist(), strict=True)
    losses = [math.log(sum(math.exp(v) for v in row)) - row[label] for row, label in rows]
    return sum(losses) / len(losses)


def other(model, seed=1):
    """A copy with other weights."""
    moved, draw = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return moved


def begun(model, strategy, task):
    strategy.attach(model)
    begin_task(model, strategy, task)
    return model, strategy


def test_the_loss_is_that_of_the_formula():
    teacher = other(StandIn())
    model, strategy = begun(
        StandIn(), RecycleDistillation(teacher, alpha=0.7, temperature=5.0), a_task(0)
    )
    batch = a_batch()
    done = step(model, strategy, batch)
    student, target = done.output.logits.detach(), teacher(batch).logits.detach()
    expected = 0.3 * cross_entropy(student, batch.labels)
    expected += 0.7 * divergence(target.double(), student.double(), 5.0)
    assert float(done.loss.detach()) == pytest.approx(expected, rel=1e-4)
    assert set(done.terms) == {"task", "distillation"}


def test_the_error_of_the_embeddings_has_half_its_weight():
    teacher = other(StandIn())
    model, strategy = begun(StandIn(), RecycleDistillation(teacher, hidden_weight=3.0), a_task(0))
    batch = a_batch()
    done = step(model, strategy, batch)
    own, its = done.output.image.detach(), teacher(batch).image.detach()
    squares = [
        (a - b) ** 2
        for left, right in zip(own.tolist(), its.tolist(), strict=True)
        for a, b in zip(left, right, strict=True)
    ]
    assert float(done.terms["hidden"].detach()) == pytest.approx(
        1.5 * sum(squares) / len(squares), rel=1e-4
    )


def test_answers_are_distilled_at_the_scored_tokens():
    model = a_llava()
    teacher = other(model)
    model, strategy = begun(model, RecycleDistillation(teacher, temperature=4.0), an_answer_task(0))
    batch = a_dialogue_batch(model)
    done = step(model, strategy, batch)
    student, target = done.output.logits.detach(), teacher(batch).logits.detach()
    assert len(student) == len(done.output.target_ids)
    expected = 0.9 * divergence(target.double(), student.double(), 4.0)
    assert float(done.terms["distillation"].detach()) == pytest.approx(expected, rel=1e-3)


def test_embeddings_of_a_model_without_them_are_refused():
    model = a_llava()
    model, strategy = begun(model, RecycleDistillation(hidden_weight=1.0), an_answer_task(0))
    with pytest.raises(ValueError, match="hidden_weight is 1.0, and .* no image embeddings"):
        step(model, strategy, a_dialogue_batch(model))


def test_only_the_student_gets_gradients_and_the_teacher_is_no_state():
    teacher = other(StandIn())
    before = copy.deepcopy(teacher.state_dict())
    model, strategy = begun(StandIn(), RecycleDistillation(teacher), a_task(0))
    step(model, strategy, a_batch()).loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert any(parameter.grad is not None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert not [name for name in strategy.state_dict() if "weight" in name]


def test_a_checkpoint_of_another_teacher_is_refused():
    _, first = begun(StandIn(), RecycleDistillation(other(StandIn(), 1)), a_task(0))
    _, second = begun(StandIn(), RecycleDistillation(other(StandIn(), 2)), a_task(0))
    _, same = begun(StandIn(), RecycleDistillation(other(StandIn(), 1)), a_task(0))
    same.load_state_dict(first.state_dict())
    with pytest.raises(RuntimeError, match="give the same teacher's weights"):
        second.load_state_dict(first.state_dict())


class Reader(nn.Module):
    """A model whose transform gives fixed tokens and one image."""

    def __init__(self, tokens, level=0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        image = torch.full((3, 4, 4), level, dtype=torch.uint8)
        self.sample = ProcessedSample(image, torch.tensor(tokens))

    def transform(self, train):
        return lambda pixels, text, seed: self.sample


@pytest.mark.parametrize(
    ("teacher", "part"),
    [
        (Reader([1, 2]), "tokens"),
        (Reader([1, 4]), "tokens"),
        (Reader([1, 2, 3], 9), "image inputs"),
    ],
)
def test_a_teacher_that_reads_a_sample_otherwise_is_refused(teacher, part):
    with pytest.raises(ValueError, match=f"teacher and student make other {part} of one sample"):
        RecycleDistillation(teacher).attach(Reader([1, 2, 3]))
    RecycleDistillation(Reader([1, 2, 3])).attach(Reader([1, 2, 3]))


@pytest.mark.parametrize("bad", [{"alpha": 1.5}, {"temperature": 0.0}, {"hidden_weight": -1.0}])
def test_arguments_out_of_range_are_refused_by_name(bad):
    (name, value), *_ = bad.items()
    with pytest.raises(ValueError, match=rf"{name} (is )?{value}"):
        RecycleDistillation(**bad)


def test_a_batch_of_no_scored_tokens_adds_nothing():
    model = a_llava()
    model, strategy = begun(model, RecycleDistillation(), an_answer_task(0))
    batch = a_dialogue_batch(model)
    empty = replace(batch, labels=torch.full_like(batch.labels, -100))
    assert float(step(model, strategy, empty).loss.detach()) == 0.0
