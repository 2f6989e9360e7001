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
from typing import Literal, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor, nn

from mmcl.core import Chain, begin_task, end_task, forward, generate, step, trainable_parameters
from mmcl.strategies import discover
from tests.strategies.plain_loop import batches_of, learn, lesson, loader, whole
from tests.toys.toy_clip import StandIn, a_task
from tests.toys.toy_llava import a_llava, an_answer_task

KNOWN = discover()
TASKS = {
    "classes": [a_task(index) for index in range(3)],
    "answers": [an_answer_task(index) for index in range(3)],
}
SMALL = {"rank": 2}
FEW = {"ewc_lambda": 10.0, "fisher_samples": 8}
# Small arguments, or members, for one kind of model or for both; a strategy that is not named is
# made without arguments, but for a rank, which is small.
ARGUMENTS = {
    "Chain": lambda: {"strategies": [KNOWN["EWC"](ewc_lambda=10.0), KNOWN["LwF"]()]},
    "Chain answers": lambda: {
        "strategies": [KNOWN["LoRA"](rank=2), KNOWN["EWC"](**FEW), KNOWN["LwF"]()]
    },
    "EWC": lambda: {"ewc_lambda": 10.0},
    "EWC answers": lambda: FEW,
    "L2P answers": lambda: {"modality": "text", "pool_size": 4, "prompt_length": 2, "top_k": 2},
    "RanPAC": lambda: {"projection_dim": 40},
}
PAPER = re.compile(r"^Paper: (none|[^,]+ \d{4}, arXiv:\d{4}\.\d{4,5})\.", re.MULTILINE)
# Arguments that a constructor refuses, and words of the message.
BAD_ARGUMENTS = [
    ("AGEM", {"reference_batch_size": 0}, "reference_batch_size is 0: draw at least 1"),
    ("CLMoE", {"top_k": 5}, "top_k must be 1 to 4"),
    ("CLMoE", {"momentum": 1.5}, "momentum is 1.5"),
    ("CLMoE", {"instance_weight": -1.0}, "instance_weight -1.0"),
    ("DarkReplay", {"draws_per_sample": 0}, "draws_per_sample is 0, expected above 0"),
    ("EWC", {"decay": 2}, "decay 2"),
    ("EWC", {"group": 1}, "group is 1 and .*: compare captions with 2 or more"),
    ("EWC", {"fisher_samples": 0}, "fisher_samples 0"),
    ("ExperienceReplay", {"buffer_size": 0}, "buffer_bytes 0: store at least 1, or use Finetune"),
    ("ExperienceReplay", {"buffer_bytes": -5}, "buffer_bytes -5: store at least 1"),
    ("ExperienceReplay", {"selection": "ring"}, "choose one of reservoir, class_balanced, h"),
    ("ExperienceReplay", {"allocation": "most"}, "choose one of none, task_balanced"),
    ("ExperienceReplay", {"selection": "herding", "score_order": "low"},
     "'low' and selection 'herding'"),
    ("ExperienceReplay", {"selection": "loss", "candidate_pool_size": 0},
     "candidate_pool_size is 0, expected 1 or more"),
    ("ExperienceReplay", {"replay_ratio": 1.0},
     "replay_ratio is 1.0, expected more than 0 and less than 1"),
    ("ExperienceReplay", {"storage": "none"}, "choose 'reference' or 'copy'; with"),
    ("FeatureReplay", {"modality": "text"}, "modality is 'text': only 'image' features"),
    ("FeatureReplay", {"replay_ratio": 0}, "replay_ratio is 0, expected more than 0"),
    ("FeatureReplay", {"compression": "int4"},
     "compression is 'int4' and storage 'memory': choose"),
    ("FeatureReplay", {"storage": "disk", "buffer_bytes": 9},
     "bytes is 9 and storage 'disk': bound"),
    ("HiDe", {"temperature": 0.0}, "temperature is 0.0.*: give "),
    ("HiDe", {"image_weight": 2.0}, "image_weight 2.0.*: give "),
    ("HiDe", {"expanded_layers": 0}, "expanded_layers 0: give "),
    ("L2P", {"pool_size": 4, "top_k": 5}, r"1 to 4 \(the pool size\), got 5"),
    ("L2P", {"prompt_length": 0}, "prompt_length is 0"),
    ("LoRARouter", {"prototypes": 0}, "prototypes is 0.*: give "),
    ("LoRARouter", {"ridge": 0.0}, "ridge 0.0: give "),
    ("LoRARouter", {"router": "ridge", "prototypes": 2}, "several prototypes have no use"),
    ("LwF", {"temperature": 0}, "temperature 0"),
    ("LwF", {"teacher": "first"}, "teacher is 'first', expected 'previous' or 'base'"),
    *(("ModalPrompt", {word: 0}, "1 or more of the first three") for word in
      ("prompt_length", "transfer", "top_k")),
    ("ModalPrompt", {"align_weight": -1.0}, "align_weight -1.0: give 1 or more of the first three"),
    ("MoELoRA", {"num_experts": 0}, "num_experts is 0"),
    ("MoELoRA", {"samples": -1}, "samples -1"),
    ("NCM", {"scale": 0}, "scale is 0"),
    ("OLoRA", {"overlap_weight": -1.0}, "overlap_weight is -1.0"),
    ("OLoRA", {"decay": -1.0}, "decay -1.0"),
    *(("OSF", {"preserve": preserve, "growth": growth}, f"is {preserve} and growth {growth}") for
      preserve, growth in ((0.0, 0.1), (1.0, 0.1), (0.5, 1.0), (0.5, -0.1))),
    ("RanPAC", {"ridges": (0.0, 1.0)}, "at least one ridge, all above 0"),
    ("RegLoRA", {"reg_weight": -1.0}, "reg_weight is -1.0"),
    ("RegLoRA", {"top_fraction": 0.0}, "top_fraction 0.0"),
    ("RegLoRA", {"top_fraction": 1.5}, "top_fraction 1.5"),
    ("WiseFT", {"alpha": 1.5}, r"alpha is 1\.5"),
]  # fmt: skip
OF_THE_MODEL = {
    "target_modules",
    "modality",
}  # whether such an argument fits is known when attached
# What is trainable after two tasks with replay, on a model that gives class scores.
TRAINABLE = {
    "LoRA": r"patch\.lora_[AB]\.default\.weight",
    "MoELoRA": r"patch\.(A|B|router)",
    "OLoRA": r"patch\.adapters\.1\.lora_[AB]",
    "OSF": r".*\.osf_svd_params\..*",
    "RegLoRA": r"patch\.adapters\.1\.lora_[AB]",
}


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
PAIRS = [pair for pair, message in REFUSALS.items() if not message]


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
    output = forward(model.eval(), strategy.eval(), batch)
    if output.sample_index is None:
        return list(output.logits), []
    scores = [output.logits[output.sample_index == row] for row in range(len(batch))]
    return scores, generate(model, strategy, batch, max_new_tokens=4)


def test_a_checkpoint_answers_and_resumes_as_the_strategy_that_wrote_it(pair):
    tasks = TASKS[pair[1]]
    model, strategy = learned(pair, 2)
    copied = restored(*pair, through_a_file(checkpoint(*pair, model, strategy)), tasks[:2])
    batch = some_rows(model)
    assert same(answers(model, strategy, batch), answers(*copied, batch))
    learn(model, strategy, tasks[2:])
    learn(*copied, tasks[2:])
    assert same(everything(model, strategy), everything(*copied))


def test_a_checkpoint_in_the_middle_of_a_task_resumes_as_if_nothing_happened(pair):
    tasks = TASKS[pair[1]]
    model, strategy = learned(pair, 2)
    going = lesson(model, strategy, tasks[2])
    next(going)
    next(going)
    copied = restored(*pair, through_a_file(checkpoint(*pair, model, strategy)), tasks)
    list(going)
    list(lesson(*copied, tasks[2], begun=True, start=2))
    assert same(everything(model, strategy), everything(*copied))


def test_a_sample_is_answered_alike_alone_in_company_and_in_any_place(pair):
    model, strategy = learned(pair, 2)
    batch = some_rows(model)
    scores, texts = answers(model, strategy, batch)
    alone = [answers(model, strategy, batch.take(torch.tensor([row]))) for row in range(len(batch))]
    near(torch.stack(scores) if not texts else torch.cat(scores), _joined(alone, bool(texts)))
    assert texts == [text for _, own in alone for text in own]
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(3))
    moved, moved_texts = answers(model, strategy, batch.take(order))
    for place, row in enumerate(order.tolist()):
        near(scores[row], moved[place])
    assert moved_texts == [texts[row] for row in order.tolist()[: len(texts)]]


def _joined(alone, are_tokens):
    rows = [scores[0] for scores, _ in alone]
    return torch.cat(rows) if are_tokens else torch.stack(rows)


def test_an_answer_changes_nothing_that_is_stored(pair):
    model, strategy = learned(pair, 2)
    before = everything(model, strategy)
    answers(model, strategy, whole(1, model))
    assert same(before, everything(model, strategy))


def test_answers_with_merged_adapters_are_the_same_and_weights_come_back(pair):
    model, strategy = learned(pair, 2)
    before, batch = everything(model, strategy), whole(1, model)
    scores, texts = answers(model, strategy, batch)
    with strategy.merged_adapters(model):
        merged, merged_texts = answers(model, strategy, batch)
    assert same(before, everything(model, strategy))
    assert texts == merged_texts
    for left, right in zip(scores, merged, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def test_two_runs_with_one_seed_are_equal(pair):
    again = learn(*build(*pair), TASKS[pair[1]][:2])
    assert same(everything(*learned(pair, 2)), everything(*again))


def test_no_hook_writes_on_what_it_is_given(pair):
    model, strategy = build(*pair)
    for task in TASKS[pair[1]][:2]:
        begin_task(model, strategy, task)
        for batch in loader(task.index, strategy.replay_plan(), model):
            given, weights = copy.deepcopy(batch), copy.deepcopy(model.state_dict())
            done = step(model, strategy, batch)
            assert same(weights, model.state_dict())
            seen, logits = copy.deepcopy(tensors_of(done.batch)), done.output.logits.clone()
            strategy.after_step(model, done.batch, done.output)
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
    empty = [store for store, count in strategy.buffer_sizes().items() if count == 0]
    assert empty == []


def test_state_is_plain_and_its_size_is_known(pair):
    _, strategy = learned(pair, 1)
    state = strategy.state_dict()
    assert same(dict(state), dict(through_a_file(state)))
    assert strategy.state_bytes() >= 0
    if any(strategy.buffer_sizes().values()):
        assert strategy.state_bytes() > 0


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_the_docstrings_state_what_is_stored_what_the_model_needs_and_the_paper(name):
    kind = KNOWN[name]
    text = inspect.getdoc(kind)
    assert "**Remembers**" in text
    assert "**Asks of the model**" in text
    if name != "Chain":
        assert len(PAPER.findall(sys.modules[kind.__module__].__doc__)) == 1


def _with_bad_values():
    """Every strategy and argument that has a bad value by its name or type, and the value."""
    for name, kind in sorted(KNOWN.items()):
        hints = get_type_hints(kind.__init__)
        for word in inspect.signature(kind).parameters:
            if word == "rank":
                yield name, word, 0
            elif word == "dropout":
                yield name, word, 1.0
            elif get_origin(hints.get(word)) is Literal and word not in OF_THE_MODEL:
                yield name, word, "nonsense"


@pytest.mark.parametrize(("name", "word", "bad"), list(_with_bad_values()))
def test_a_bad_value_is_refused_with_the_argument_and_the_value(name, word, bad):
    with pytest.raises(ValueError, match=rf"\b{word} (is )?{bad!r}.*(choose|expected|give) "):
        KNOWN[name](**{word: bad})


@pytest.mark.parametrize(("name", "given", "words"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused_with_the_reason(name, given, words):
    with pytest.raises(ValueError, match=words):
        KNOWN[name](**given)


class Bare(nn.Module):
    """A model without any of the optional members."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 2)


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_a_model_without_the_required_members_is_refused_by_name(name):
    asks = inspect.getdoc(KNOWN[name]).partition("**Asks of the model**")[2].split("\n\n")[0]
    members = re.findall(r"``(\w+)", asks.partition(" if ")[0])
    if not members or "nothing" in asks:
        return
    with pytest.raises(TypeError, match=rf"{name} needs model\.{members[0]}.*Bare has none"):
        KNOWN[name]().attach(Bare())


def test_every_strategy_can_stand_in_a_chain(pair):
    name, kind = pair
    model = a_model(kind)
    chain = Chain([KNOWN[name](**arguments_of(name, kind)), KNOWN["Finetune"]()])
    chain.attach(model)
    chained, _ = learn(model, chain, TASKS[kind][:2])
    assert same(_learned(pair, 2)[0].state_dict(), chained.state_dict())


def test_every_strategy_trains_in_a_chain_with_replay(pair):
    name, kind = pair
    model = a_model(kind)
    chain = Chain([KNOWN[name](**arguments_of(name, kind)), KNOWN["ExperienceReplay"](6)])
    if _learned(pair, 2)[1].replay_plan() is not None:
        with pytest.raises(
            ValueError, match=f"{name} and ExperienceReplay .* leave one of them out"
        ):
            learn(model, chain, TASKS[kind][:2])
        return
    chain.attach(model)
    learn(model, chain, TASKS[kind][:2])
    scores, _ = answers(model, chain, some_rows(model))
    assert not any(bool(torch.isnan(score).any()) for score in scores)
    assert len(chain.members[1].memory) == 6
    assert set(trainable_parameters(model)) == set(trainable_parameters(_learned(pair, 2)[0]))
    if kind == "classes" and name in TRAINABLE:
        assert all(re.fullmatch(TRAINABLE[name], weight) for weight in trainable_parameters(model))


def test_every_strategy_works_on_some_model():
    assert {name for name, _ in PAIRS} == set(KNOWN)


def test_a_model_is_refused_with_what_is_required_and_what_to_use():
    for (name, _), message in REFUSALS.items():
        assert re.search(r"needs .*: (use|wrap|add) ", message) if message else True, name
    refused = {
        kind: {n for (n, k), message in REFUSALS.items() if message and k == kind} for kind in TASKS
    }
    assert refused["answers"] == {"DarkReplay", "NCM", "RanPAC"}
    assert refused["classes"] == {"CLMoE", "HiDe", "LoRARouter", "ModalPrompt"}
