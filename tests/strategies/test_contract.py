"""What every strategy promises, found by itself: a new file in mmcl/strategies is tested here."""

import copy
import inspect
import io
import re
import sys
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from mmcl.core import Chain, begin_task, end_task, run, step
from mmcl.strategies import discover
from tests.stand_in import StandIn, a_task, task_batches
from tests.strategies.bare_loop import learn, lesson, loader, whole

TASKS = [a_task(index) for index in range(3)]
KNOWN = discover()
# Small arguments, or members; every other strategy is made without arguments.
ARGUMENTS = {
    "Chain": lambda: {"strategies": [KNOWN["EWC"](weight=10.0), KNOWN["LwF"]()]},
    "EWC": lambda: {"weight": 10.0},
    "RanPAC": lambda: {"width": 40},
}
WITHOUT_PAPER = {"Chain", "Finetune", "Joint"}


def build(name):
    model = StandIn()
    strategy = KNOWN[name](**ARGUMENTS.get(name, dict)())
    strategy.attach(model)
    return model, strategy


def everything(model, strategy):
    """All that a checkpoint holds, copied."""
    return copy.deepcopy({"model": model.state_dict(), "strategy": strategy.state_dict()})


def same(left, right):
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[name], right[name]) for name in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def restored(name, state, tasks):
    """A fresh model and strategy, grown for the tasks, with a checkpoint's state."""
    model, strategy = build(name)
    for task in tasks:
        begin_task(model, strategy, task)
    model.load_state_dict(state["model"])
    strategy.load_state_dict(state["strategy"])
    return model.eval(), strategy.eval()


def tensors_of(batch):
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def near(left, right):
    """Equal where infinite, and to a millionth of the largest score elsewhere."""
    is_finite = torch.isfinite(left)
    assert torch.equal(left[~is_finite], right[~is_finite])
    largest = float(left[is_finite].abs().max())
    torch.testing.assert_close(
        left[is_finite], right[is_finite], rtol=0, atol=1e-6 * max(1, largest)
    )


@pytest.fixture(params=sorted(KNOWN))
def name(request):
    return request.param


@torch.no_grad()
def answers(model, strategy, batch):
    return run(model.eval(), strategy.eval(), batch).logits


def test_a_checkpoint_answers_and_goes_on_as_the_strategy_that_wrote_it(name):
    model, strategy = learn(*build(name), TASKS[:2])
    state = through_a_file(everything(model, strategy))
    copied = restored(name, state, TASKS[:2])
    batch = whole(0).join(whole(1))
    assert torch.equal(answers(model, strategy, batch), answers(*copied, batch))
    learn(model, strategy, TASKS[2:])
    learn(*copied, TASKS[2:])
    assert same(everything(model, strategy), everything(*copied))


def test_a_checkpoint_in_the_middle_of_a_task_goes_on_as_if_nothing_happened(name):
    model, strategy = learn(*build(name), TASKS[:2])
    going = lesson(model, strategy, TASKS[2])
    next(going)
    next(going)
    copied = restored(name, through_a_file(everything(model, strategy)), TASKS)
    list(going)
    list(lesson(*copied, TASKS[2], begun=True, start=2))
    assert same(everything(model, strategy), everything(*copied))


def test_a_row_is_answered_alike_alone_in_company_and_in_any_place(name):
    model, strategy = learn(*build(name), TASKS[:2])
    batch = whole(0).join(whole(1))
    together = answers(model, strategy, batch)
    alone = [answers(model, strategy, batch.take(torch.tensor([row]))) for row in range(len(batch))]
    near(together, torch.cat(alone))
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(3))
    near(together[order], answers(model, strategy, batch.take(order)))


def test_an_answer_changes_nothing_that_is_remembered(name):
    model, strategy = learn(*build(name), TASKS[:2])
    before = everything(model, strategy)
    answers(model, strategy, whole(1))
    assert same(before, everything(model, strategy))


def test_two_runs_with_one_seed_are_equal(name):
    first, second = learn(*build(name), TASKS), learn(*build(name), TASKS)
    assert same(everything(*first), everything(*second))


def test_no_hook_writes_on_what_it_is_given(name):
    model, strategy = build(name)
    for task in TASKS[:2]:
        begin_task(model, strategy, task)
        for batch in loader(task.index, strategy.recall()):
            given, weights = copy.deepcopy(batch), copy.deepcopy(model.state_dict())
            done = step(model, strategy, batch)
            assert same(weights, model.state_dict())
            seen, logits = copy.deepcopy(tensors_of(done.batch)), done.output.logits.clone()
            strategy.observe(model, done.batch, done.output)
            assert same(tensors_of(given), tensors_of(batch))
            assert same(seen, tensors_of(done.batch))
            assert torch.equal(logits, done.output.logits)
        batches = task_batches(task.index)
        given = copy.deepcopy(batches)
        end_task(model, strategy, task, batches)
        assert all(map(same, map(tensors_of, given), map(tensors_of, batches)))


def test_every_penalty_has_a_gradient_on_some_step_of_the_second_or_third_task(name):
    model, strategy = learn(*build(name), TASKS[:1])
    met, alive = set(), set()

    def watch(done):
        wanted = [p for p in [*model.parameters(), *strategy.parameters()] if p.requires_grad]
        for term in set(done.terms) - {"task"}:
            met.add(term)
            if not done.terms[term].requires_grad:
                continue
            slopes = torch.autograd.grad(
                done.terms[term], wanted, retain_graph=True, allow_unused=True
            )
            if any(slope is not None and bool(slope.any()) for slope in slopes):
                alive.add(term)

    for task in TASKS[1:]:
        list(lesson(model, strategy, task, watch=watch))
    assert met == alive


def test_every_store_holds_something_after_a_task(name):
    model, strategy = learn(*build(name), TASKS[:1])
    empty = [store for store, count in strategy.holdings().items() if count == 0]
    assert empty == []


def test_state_is_plain_and_its_size_is_known(name):
    model, strategy = learn(*build(name), TASKS[:1])
    state = strategy.state_dict()
    assert same(dict(state), dict(through_a_file(state)))
    assert strategy.bytes_remembered() >= 0
    if any(strategy.holdings().values()):
        assert strategy.bytes_remembered() > 0


def test_the_docstrings_say_what_is_remembered_what_is_asked_and_which_paper(name):
    kind = KNOWN[name]
    said = inspect.getdoc(kind)
    assert "**Remembers**" in said
    assert "**Asks of the model**" in said
    if name not in WITHOUT_PAPER:
        assert re.search(r"arXiv:\d{4}\.\d{4,5}", sys.modules[kind.__module__].__doc__)


def test_every_strategy_can_stand_in_a_chain(name):
    model = StandIn()
    chain = Chain([KNOWN[name](**ARGUMENTS.get(name, dict)()), KNOWN["Finetune"]()])
    chain.attach(model)
    alone, chained = learn(*build(name), TASKS[:2]), learn(model, chain, TASKS[:2])
    assert same(alone[0].state_dict(), chained[0].state_dict())
