"""Contract of a strategy: what every strategy must hold, checked on stand-in models.

Checks need no test framework. ``tests/strategies/test_contract.py`` runs them on mmcl's strategies.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from mmcl.core import (
    VLM,
    Batch,
    Chain,
    Strategy,
    Task,
    begin_task,
    end_task,
    forward,
    generate,
    step,
)
from mmcl.strategies import ExperienceReplay, Finetune
from mmcl.testing.stand_ins import DualEncoder, answer_task, class_task, small_llava
from mmcl.testing.training_loop import (
    batches_of,
    mixed_batches,
    train_tasks,
    training_steps,
    whole_task,
)

ModelKind = Literal["classes", "answers"]
Outcome = Literal["ok", "failed", "refused"]
MODEL_KINDS: tuple[ModelKind, ...] = get_args(ModelKind)
_REPLAYED = 6


class ContractError(AssertionError):
    """Error of a check that does not hold."""


@dataclass(frozen=True)
class CheckResult:
    """Result of one check.

    Attributes:
        model: kind of the stand-in model.
        check: what must hold, a sentence.
        outcome: "ok", "failed", or "refused" if the strategy does not take such a model.
        message: what failed, or the strategy's reason.
    """

    model: ModelKind
    check: str
    outcome: Outcome
    message: str = ""


class StrategyContract:
    """Contract of a strategy on one kind of stand-in model, three tasks of 24 samples each.

    Args:
        make: builds the strategy, the same at every call.
        kind: "classes" = a dual encoder that scores classes, "answers" = a generative model.
    """

    def __init__(self, make: Callable[[], Strategy], kind: ModelKind) -> None:
        self.make, self.kind = make, kind
        new_task = class_task if kind == "classes" else answer_task
        self.tasks = [new_task(index) for index in range(3)]
        self._trained: dict[int, tuple[Any, Strategy]] = {}

    def new_model(self) -> Any:
        """Return a new model; all are equal."""
        return DualEncoder() if self.kind == "classes" else small_llava()

    def build(self) -> tuple[Any, Strategy]:
        """Return a new model, and the strategy attached to it."""
        model, strategy = self.new_model(), self.make()
        strategy.attach(model)
        return model, strategy

    def trained(self, count: int) -> tuple[Any, Strategy]:
        """Return a copy of model and strategy after ``count`` tasks."""
        if count not in self._trained:
            last = self.tasks[count - 1 : count]
            pair = self.build() if count == 0 else train_tasks(*self.trained(count - 1), last)
            self._trained[count] = pair
        return copy.deepcopy(self._trained[count])

    def checkpoint(self, model: Any, strategy: Strategy) -> dict[str, Any]:
        """Return a copy of what a run saves: all but the weights that ``attach`` leaves frozen."""
        first, _ = self.trained(0)
        frozen = {n for n, p in first.named_parameters() if not p.requires_grad}
        weights = {n: value for n, value in model.state_dict().items() if n not in frozen}
        return copy.deepcopy({"model": weights, "strategy": strategy.state_dict()})

    def restored(self, state: Mapping[str, Any], tasks: Iterable[Task]) -> tuple[Any, Strategy]:
        """Return a new model and strategy with these tasks begun and a checkpoint's state."""
        model, strategy = self.build()
        for task in tasks:
            begin_task(model, strategy, task)
        unknown = model.load_state_dict(state["model"], strict=False).unexpected_keys
        _expect(not unknown, f"begin_task does not make {unknown} again: it must for every task")
        strategy.load_state_dict(state["strategy"])
        return model.eval(), strategy.eval()

    def some_samples(self, model: Any) -> Batch:
        """Return eight samples of each of the first two tasks."""
        few = torch.arange(8)
        return whole_task(0, model).take(few).join(whole_task(1, model).take(few))

    def check_finished_task(self) -> None:
        """A checkpoint after a task predicts and trains on as the strategy that wrote it."""
        model, strategy = self.trained(2)
        state = through_file(self.checkpoint(model, strategy))
        copied = self.restored(state, self.tasks[:2])
        batch = self.some_samples(model)
        expected = predict(model, strategy, batch)
        _expect_same(expected, predict(*copied, batch), "predictions of the loaded strategy")
        train_tasks(model, strategy, self.tasks[2:])
        train_tasks(*copied, self.tasks[2:])
        _expect_same(whole_state(model, strategy), whole_state(*copied), "after one more task,")

    def check_middle_of_task(self) -> None:
        """A checkpoint in the middle of a task resumes as if nothing had happened."""
        model, strategy = self.trained(2)
        running = training_steps(model, strategy, self.tasks[2])
        next(running)
        next(running)
        state = through_file(self.checkpoint(model, strategy))
        copied = self.restored(state, self.tasks)
        list(running)
        list(training_steps(*copied, self.tasks[2], begun=True, start=2))
        _expect_same(whole_state(model, strategy), whole_state(*copied), "after the task,")

    def check_per_sample(self) -> None:
        """A prediction depends on no other sample of the batch, and not on its position."""
        model, strategy = self.trained(2)
        batch = self.some_samples(model)
        scores, texts = predict(model, strategy, batch)
        order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(3))
        moved, moved_texts = predict(model, strategy, batch.take(order))
        for position, index in enumerate(order.tolist()):
            expect_close(scores[index], moved[position], "scores of a sample in another position")
        _expect(not texts or moved_texts == [texts[i] for i in order], "answers change by position")
        for index in range(len(batch)):
            alone, text = predict(model, strategy, batch.take(torch.tensor([index])))
            expect_close(scores[index], alone[0], "scores of a sample alone")
            _expect(text == texts[index : index + 1], "an answer alone differs from one in a batch")

    def check_inference(self) -> None:
        """A prediction changes nothing that is stored."""
        model, strategy = self.trained(2)
        before = whole_state(model, strategy)
        predict(model, strategy, whole_task(1, model))
        _expect_same(before, whole_state(model, strategy), "after a prediction,")

    def check_merged_adapters(self) -> None:
        """Merged adapters predict the same, and the weights come back to the bit."""
        model, strategy = self.trained(2)
        before, batch = whole_state(model, strategy), whole_task(1, model)
        scores, texts = predict(model, strategy, batch)
        with strategy.merged_adapters(model):
            merged, merged_texts = predict(model, strategy, batch)
        _expect_same(before, whole_state(model, strategy), "after merged_adapters,")
        _expect(texts == merged_texts, "answers with merged adapters differ")
        for left, right in zip(scores, merged, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)

    def check_seed(self) -> None:
        """Two runs with one seed end with equal weights and state."""
        again = train_tasks(*self.build(), self.tasks[:2])
        _expect_same(whole_state(*self.trained(2)), whole_state(*again), "in a second run,")

    def check_hooks_write_nothing(self) -> None:
        """No hook writes on the batch, the output or, in a step, the weights."""
        model, strategy = self.build()
        for task in self.tasks[:2]:
            begin_task(model, strategy, task)
            for batch in mixed_batches(task.index, strategy.replay_plan(), model):
                given, weights = tensors_of(batch), copy.deepcopy(model.state_dict())
                done = step(model, strategy, batch)
                _expect_same(weights, model.state_dict(), "in a step, the model's")
                seen, logits = tensors_of(done.batch), done.output.logits.clone()
                strategy.after_step(model, done.batch, done.output)
                _expect_same(given, tensors_of(batch), "in a step, the batch's")
                _expect_same(seen, tensors_of(done.batch), "in after_step, the batch's")
                _expect_same(logits, done.output.logits, "in after_step, output.logits")
            batches = batches_of(model)(task.index)
            passed = [tensors_of(batch) for batch in batches]
            end_task(model, strategy, task, batches)
            _expect_same(passed, [tensors_of(batch) for batch in batches], "in end_task, batches")

    def check_penalties(self) -> None:
        """Every penalty has a gradient on some step of the second or third task."""
        model, strategy = self.trained(1)
        found: set[str] = set()
        active: set[str] = set()

        def watch(done: Any) -> None:
            trainable = [
                p for p in (*model.parameters(), *strategy.parameters()) if p.requires_grad
            ]
            for name, term in done.terms.items():
                found.add(name)
                if name == "task" or not term.requires_grad:
                    continue
                gradients = torch.autograd.grad(
                    term, trainable, retain_graph=True, allow_unused=True
                )
                if any(g is not None and bool(g.any()) for g in gradients):
                    active.add(name)

        for task in self.tasks[1:]:
            list(training_steps(model, strategy, task, watch=watch))
        idle = sorted(found - active - {"task"})
        _expect(not idle, f"penalties without gradient in both tasks: {', '.join(idle)}")

    def check_buffers(self) -> None:
        """Every buffer holds something after a task."""
        _, strategy = self.trained(1)
        empty = [name for name, count in strategy.buffer_sizes().items() if count == 0]
        _expect(not empty, f"empty after a task: {', '.join(empty)}")

    def check_state(self) -> None:
        """The state is tensors and plain values, and its size is known."""
        _, strategy = self.trained(1)
        state = dict(strategy.state_dict())
        _expect_same(state, dict(through_file(state)), "read back from a file,")
        fewest = 1 if any(strategy.buffer_sizes().values()) else 0
        size = strategy.state_bytes()
        _expect(size >= fewest, f"state_bytes() is {size}, and the buffers hold something")

    def check_missing_members(self) -> None:
        """A model without optional members is taken, or refused with what is missing."""
        try:
            self.make().attach(cast(VLM, nn.Linear(2, 2)))
        except TypeError as error:
            _expect(" needs " in str(error), f"attach raises TypeError without a reason: {error}")
        except Exception as error:
            raise ContractError(
                f"attach raises {type(error).__name__}: {error}; begin it with mmcl.core.require("
                "model, 'embed', by=self), for the members that it uses"
            ) from error

    def check_chain(self) -> None:
        """In a chain with Finetune it trains the model to the same weights as alone."""
        model, chain = self.new_model(), Chain([self.make(), Finetune()])
        chain.attach(model)
        chained, _ = train_tasks(model, chain, self.tasks[:2])
        alone = self.trained(2)[0].state_dict()
        _expect_same(alone, chained.state_dict(), "in a chain, the model's")

    def check_chain_with_replay(self) -> None:
        """In a chain with ExperienceReplay it trains the same parameters, or both are named."""
        model, replay = self.new_model(), ExperienceReplay(_REPLAYED)
        chain, (alone, plain) = Chain([self.make(), replay]), self.trained(2)
        chain.attach(model)
        if plain.replay_plan() is not None:
            try:
                train_tasks(model, chain, self.tasks[:2])
            except ValueError as error:
                _expect("ExperienceReplay" in str(error), f"the error does not name both: {error}")
                return
            raise ContractError("two plans of samples to mix in were taken, and one was dropped")
        train_tasks(model, chain, self.tasks[:2])
        scores, _ = predict(model, chain, self.some_samples(model))
        _expect(not any(bool(score.isnan().any()) for score in scores), "scores are not numbers")
        _expect(len(replay.memory) == _REPLAYED, "the replay buffer is not filled")
        trained, expected = (
            [name for name, p in each.named_parameters() if p.requires_grad]
            for each in (model, alone)
        )
        _expect(trained == expected, f"trainable with replay: {trained}, alone: {expected}")


CHECKS: dict[str, Callable[[StrategyContract], None]] = {
    str(check.__doc__): check
    for name, check in vars(StrategyContract).items()
    if name.startswith("check_")
}
"""What must hold, a sentence -> its check, which raises if it does not."""


def check_strategy(
    make: Callable[[], Strategy], kinds: Sequence[ModelKind] = MODEL_KINDS
) -> Iterator[CheckResult]:
    """Check a strategy against the contract, on stand-ins of a dual encoder and a generative model.

    Args:
        make: builds the strategy, the same at every call.
        kinds: models to check it on, of "classes" and "answers".

    Yields:
        the result of each check, or one "refused" for a kind of model that ``attach`` refuses with
        a TypeError of what it needs; a strategy that refuses all kinds has failed.
    """
    refused = 0
    for kind in kinds:
        contract = StrategyContract(make, kind)
        try:
            contract.trained(0)
        except Exception as error:
            refused += isinstance(error, TypeError) and " needs " in str(error)
            is_refused = refused and refused < len(kinds)
            outcome: Outcome = "refused" if is_refused else "failed"
            yield CheckResult(kind, "It takes such a model.", outcome, _reason(error))
            continue
        for title, check in CHECKS.items():
            try:
                check(contract)
            except Exception as error:
                yield CheckResult(kind, title, "failed", _reason(error))
            else:
                yield CheckResult(kind, title, "ok")


@torch.no_grad()
def predict(model: Any, strategy: Strategy, batch: Batch) -> tuple[list[Tensor], list[str]]:
    """Return the scores of every sample, and the answers of a generative model (else none)."""
    output = forward(model.eval(), strategy.eval(), batch)
    if output.sample_index is None:
        return list(output.logits), []
    scores = [output.logits[output.sample_index == index] for index in range(len(batch))]
    return scores, generate(model, strategy, batch, max_new_tokens=4)


def whole_state(model: Any, strategy: Strategy) -> dict[str, Any]:
    """Return a copy of all weights and state."""
    return copy.deepcopy({"model": model.state_dict(), "strategy": strategy.state_dict()})


def through_file(state: Any) -> Any:
    """Return a state as it is read from a file, where only tensors and plain values are allowed."""
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def tensors_of(batch: Batch) -> dict[str, Tensor]:
    """Return copies of the tensors of a batch by field name."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value.clone() for name, value in values.items() if isinstance(value, Tensor)}


def first_difference(left: Any, right: Any, path: str = "") -> str | None:
    """Return the path of the first entry in which two nested states differ, None if in none."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        if list(left) != list(right):
            return f"{path} keys {sorted(set(left) ^ set(right), key=str) or 'in their order'}"
        pairs: Iterable[tuple[Any, Any, Any]] = ((key, left[key], right[key]) for key in left)
    elif isinstance(left, list | tuple) and isinstance(right, list | tuple):
        if len(left) != len(right):
            return f"{path} of length {len(left)} and {len(right)}"
        pairs = ((index, *both) for index, both in enumerate(zip(left, right, strict=True)))
    elif isinstance(left, Tensor):
        return None if isinstance(right, Tensor) and torch.equal(left, right) else path
    else:
        return None if left == right else path
    found = (first_difference(a, b, f"{path}.{key}".strip(".")) for key, a, b in pairs)
    return next((where for where in found if where is not None), None)


def expect_close(left: Tensor, right: Tensor, what: str) -> None:
    """Check that scores are equal where infinite, and to a millionth of the largest elsewhere.

    Raises:
        ContractError: naming ``what`` and the largest difference.
    """
    is_finite = torch.isfinite(left)
    _expect(torch.equal(left[~is_finite], right[~is_finite]), f"{what}: others are infinite")
    gap = (left[is_finite] - right[is_finite]).abs().max()
    limit = 1e-6 * max(1.0, float(left[is_finite].abs().max()))
    _expect(float(gap) <= limit, f"{what} differ by {float(gap):.3g}")


def _expect(holds: bool, problem: str) -> None:
    if not holds:
        raise ContractError(problem)


def _expect_same(left: Any, right: Any, where: str) -> None:
    found = first_difference(left, right)
    _expect(found is None, f"{where} {found} differs".replace("  ", " "))


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ContractError) else f"{type(error).__name__}: {text}"
