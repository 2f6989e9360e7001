"""What every strategy promises, found by itself: a new file in mmcl/strategies is tested here.

Each is run on a model that gives class scores and on one that answers in words, on those of the
two that it does not refuse.
"""

import copy
import inspect
import io
import re
import sys
from dataclasses import fields
from functools import cache

import pytest
import torch
from torch import Tensor

from mmcl.core import Chain, answer, begin_task, end_task, run, step
from mmcl.strategies import discover
from tests.stand_in import StandIn, a_task
from tests.stand_in_llava import a_llava, an_answer_task
from tests.strategies.bare_loop import batches_of, learn, lesson, loader, whole

KNOWN = discover()
TASKS = {
    "classes": [a_task(index) for index in range(3)],
    "answers": [an_answer_task(index) for index in range(3)],
}
# Small arguments, or members, for one kind of model or for both; a strategy that is not named is
# made without arguments, but for a rank, which is small.
ARGUMENTS = {
    "Chain": lambda: {"strategies": [KNOWN["EWC"](weight=10.0), KNOWN["LwF"]()]},
    "Chain answers": lambda: {
        "strategies": [KNOWN["LoRA"](rank=2), KNOWN["EWC"](weight=10.0, samples=8), KNOWN["LwF"]()]
    },
    "EWC": lambda: {"weight": 10.0},
    "EWC answers": lambda: {"weight": 10.0, "samples": 8},
    "L2P answers": lambda: {"modality": "text", "pool": 4, "length": 2, "top_k": 2},
    "RanPAC": lambda: {"width": 40},
}
SMALL = {"rank": 2}
WITHOUT_PAPER = {"Chain", "Finetune", "Joint"}


def arguments_of(name, kind):
    made = ARGUMENTS.get(f"{name} {kind}", ARGUMENTS.get(name, dict))()
    taken = inspect.signature(KNOWN[name]).parameters
    return {**{word: value for word, value in SMALL.items() if word in taken}, **made}


@cache
def _llava():
    return a_llava()


def a_model(kind):
    return StandIn() if kind == "classes" else copy.deepcopy(_llava())


def build(name, kind):
    model = a_model(kind)
    strategy = KNOWN[name](**arguments_of(name, kind))
    strategy.attach(model)
    return model, strategy


def refusal(name, kind):
    """What a strategy says that does not want a model of this kind, or nothing."""
    try:
        build(name, kind)
    except TypeError as error:
        return str(error)
    return ""


REFUSALS = {(name, kind): refusal(name, kind) for name in sorted(KNOWN) for kind in TASKS}
PAIRS = [pair for pair, said in REFUSALS.items() if not said]


@cache
def _learned(pair, count):
    if count == 0:
        return build(*pair)
    return learn(*copy.deepcopy(_learned(pair, count - 1)), TASKS[pair[1]][count - 1 : count])


def learned(pair, count):
    """A model and a strategy after so many tasks, for one test alone."""
    return copy.deepcopy(_learned(pair, count))


def checkpoint(name, kind, model, strategy):
    """What a run keeps, copied: all but the weights that attach leaves frozen."""
    first, _ = _learned((name, kind), 0)
    frozen = {n for n, p in first.named_parameters() if not p.requires_grad}
    weights = {n: value for n, value in model.state_dict().items() if n not in frozen}
    return copy.deepcopy({"model": weights, "strategy": strategy.state_dict()})


def everything(model, strategy):
    """All that there is, copied."""
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


def restored(name, kind, state, tasks):
    """A fresh model and strategy, grown for the tasks, with a checkpoint's state."""
    model, strategy = build(name, kind)
    for task in tasks:
        begin_task(model, strategy, task)
    assert not model.load_state_dict(state["model"], strict=False).unexpected_keys
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


@pytest.fixture(params=PAIRS, ids=[" ".join(pair) for pair in PAIRS])
def pair(request):
    """The name of a strategy, and a kind of model that it works on."""
    return request.param


def some_rows(model):
    """Rows of the first two tasks."""
    few = torch.arange(8)
    return whole(0, model).take(few).join(whole(1, model).take(few))


@torch.no_grad()
def answers(model, strategy, batch):
    """Scores of every row, one tensor each, and what a model that says words says."""
    output = run(model.eval(), strategy.eval(), batch)
    if output.rows is None:
        return list(output.logits), []
    scores = [output.logits[output.rows == row] for row in range(len(batch))]
    return scores, answer(model, strategy, batch, max_new_tokens=4)


def test_a_checkpoint_answers_and_goes_on_as_the_strategy_that_wrote_it(pair):
    tasks = TASKS[pair[1]]
    model, strategy = learned(pair, 2)
    copied = restored(*pair, through_a_file(checkpoint(*pair, model, strategy)), tasks[:2])
    batch = some_rows(model)
    assert same(answers(model, strategy, batch), answers(*copied, batch))
    learn(model, strategy, tasks[2:])
    learn(*copied, tasks[2:])
    assert same(everything(model, strategy), everything(*copied))


def test_a_checkpoint_in_the_middle_of_a_task_goes_on_as_if_nothing_happened(pair):
    tasks = TASKS[pair[1]]
    model, strategy = learned(pair, 2)
    going = lesson(model, strategy, tasks[2])
    next(going)
    next(going)
    copied = restored(*pair, through_a_file(checkpoint(*pair, model, strategy)), tasks)
    list(going)
    list(lesson(*copied, tasks[2], begun=True, start=2))
    assert same(everything(model, strategy), everything(*copied))


def test_a_row_is_answered_alike_alone_in_company_and_in_any_place(pair):
    model, strategy = learned(pair, 2)
    batch = some_rows(model)
    scores, said = answers(model, strategy, batch)
    alone = [answers(model, strategy, batch.take(torch.tensor([row]))) for row in range(len(batch))]
    near(torch.stack(scores) if not said else torch.cat(scores), _joined(alone, bool(said)))
    assert said == [text for _, texts in alone for text in texts]
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(3))
    moved, said_moved = answers(model, strategy, batch.take(order))
    for place, row in enumerate(order.tolist()):
        near(scores[row], moved[place])
    assert said_moved == [said[row] for row in order.tolist()[: len(said)]]


def _joined(alone, are_tokens):
    rows = [scores[0] for scores, _ in alone]
    return torch.cat(rows) if are_tokens else torch.stack(rows)


def test_an_answer_changes_nothing_that_is_remembered(pair):
    model, strategy = learned(pair, 2)
    before = everything(model, strategy)
    answers(model, strategy, whole(1, model))
    assert same(before, everything(model, strategy))


def test_answers_with_folded_adapters_are_the_same_and_weights_come_back(pair):
    model, strategy = learned(pair, 2)
    before, batch = everything(model, strategy), whole(1, model)
    scores, said = answers(model, strategy, batch)
    with strategy.folded(model):
        folded, said_folded = answers(model, strategy, batch)
    assert same(before, everything(model, strategy))
    assert said == said_folded
    for left, right in zip(scores, folded, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def test_two_runs_with_one_seed_are_equal(pair):
    again = learn(*build(*pair), TASKS[pair[1]][:2])
    assert same(everything(*learned(pair, 2)), everything(*again))


def test_no_hook_writes_on_what_it_is_given(pair):
    model, strategy = build(*pair)
    for task in TASKS[pair[1]][:2]:
        begin_task(model, strategy, task)
        for batch in loader(task.index, strategy.recall(), model):
            given, weights = copy.deepcopy(batch), copy.deepcopy(model.state_dict())
            done = step(model, strategy, batch)
            assert same(weights, model.state_dict())
            seen, logits = copy.deepcopy(tensors_of(done.batch)), done.output.logits.clone()
            strategy.observe(model, done.batch, done.output)
            assert same(tensors_of(given), tensors_of(batch))
            assert same(seen, tensors_of(done.batch))
            assert torch.equal(logits, done.output.logits)
        batches = batches_of(model)(task.index)
        given = copy.deepcopy(batches)
        end_task(model, strategy, task, batches)
        assert all(map(same, map(tensors_of, given), map(tensors_of, batches)))


def test_every_penalty_has_a_gradient_on_some_step_of_the_second_or_third_task(pair):
    tasks = TASKS[pair[1]]
    model, strategy = learned(pair, 1)
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

    for task in tasks[1:]:
        list(lesson(model, strategy, task, watch=watch))
    assert met == alive


def test_every_store_holds_something_after_a_task(pair):
    _, strategy = learned(pair, 1)
    empty = [store for store, count in strategy.holdings().items() if count == 0]
    assert empty == []


def test_state_is_plain_and_its_size_is_known(pair):
    _, strategy = learned(pair, 1)
    state = strategy.state_dict()
    assert same(dict(state), dict(through_a_file(state)))
    assert strategy.bytes_remembered() >= 0
    if any(strategy.holdings().values()):
        assert strategy.bytes_remembered() > 0


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_the_docstrings_say_what_is_remembered_what_is_asked_and_which_paper(name):
    kind = KNOWN[name]
    said = inspect.getdoc(kind)
    assert "**Remembers**" in said
    assert "**Asks of the model**" in said
    if name not in WITHOUT_PAPER:
        assert re.search(r"arXiv:\d{4}\.\d{4,5}", sys.modules[kind.__module__].__doc__)


def test_every_strategy_can_stand_in_a_chain(pair):
    name, kind = pair
    model = a_model(kind)
    chain = Chain([KNOWN[name](**arguments_of(name, kind)), KNOWN["Finetune"]()])
    chain.attach(model)
    chained, _ = learn(model, chain, TASKS[kind][:2])
    assert same(_learned(pair, 2)[0].state_dict(), chained.state_dict())


def test_every_strategy_works_on_some_model():
    assert {name for name, _ in PAIRS} == set(KNOWN)


def test_a_model_is_refused_with_what_is_asked_and_what_to_use():
    for (name, _), said in REFUSALS.items():
        assert re.search(r"needs .*: (use|wrap|add) ", said) if said else True, name
    refused = {name for (name, kind), said in REFUSALS.items() if said and kind == "answers"}
    assert refused == {"DarkReplay", "NCM", "RanPAC"}
