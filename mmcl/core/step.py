"""Training step, forward pass and generation: the functions in which model and strategy meet."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmcl.core.batch import IGNORE_INDEX, Batch
from mmcl.core.distributed import all_reduce_sum, rank_and_world
from mmcl.core.master_weights import keep_master_weights
from mmcl.core.model import (
    STEP_MEMBERS,
    VLM,
    MissingMembersError,
    Output,
    missing_members,
    require,
    set_frozen_to_eval,
    without_adapters,
)
from mmcl.core.strategy import TASK_PROGRESS, Strategy, device_of, trainable_parameters
from mmcl.core.task import Task


@dataclass(frozen=True)
class StepOutput:
    """Result of a training step before the backward pass.

    Attributes:
        loss: scalar, the sum of the terms; call ``backward`` on it.
        terms: "task" and every penalty by name, each a scalar.
        batch: the samples of the forward pass, replayed ones included.
        output: the model's output after the strategy's ``transform_output``.
    """

    loss: Tensor
    terms: Mapping[str, Tensor]
    batch: Batch
    output: Output


def forward(model: VLM, strategy: Strategy, batch: Batch) -> Output:
    """Forward pass of training and inference: prompts, model, ``transform_output``.

    Raises:
        ValueError: if the model's output does not carry the prompts that the model was given.
    """
    prompts = strategy.prompts(model, batch)
    output = model(batch, prompts)
    if output.prompts is not prompts and prompts.is_given and not output.prompts.is_given:
        raise ValueError(
            f"{type(model).__name__} returned an Output without the prompts of "
            f"{type(strategy).__name__}: return Output(..., prompts=prompts) from forward(batch, "
            "prompts), after adding prompts.tokens to the tokens of its towers"
        )
    return strategy.transform_output(model, batch, output)


def generate(model: VLM, strategy: Strategy, batch: Batch, **how: Any) -> list[str]:
    """Generate the answers of a batch with a generative model, through the hooks of ``forward``.

    Args:
        model: has ``generate(batch, prompts, transform_output=..., **how)``.
        strategy: attached to the model; its ``transform_output`` gets the next-token scores (B, V)
            of every decoding step.
        batch: samples whose tokens end before or after the answer; an answer in them is not read.
        how: ``candidates`` and ``max_new_tokens`` of the model's method.

    Returns:
        B generated texts.

    Raises:
        TypeError: if the model is not generative.
    """
    able = require(model, "generate", by=strategy)
    transform_output = None
    if strategy.overrides("transform_output"):

        def transform_output(output: Output) -> Output:
            return strategy.transform_output(model, batch, output)

    texts: list[str] = able.generate(
        batch, strategy.prompts(model, batch), transform_output=transform_output, **how
    )
    return texts


def step(model: VLM, strategy: Strategy, batch: Batch) -> StepOutput:
    """Compute the loss of a training step; the caller runs backward and the optimizer.

    Args:
        model: any VLM.
        strategy: attached to the model, with a task begun.
        batch: samples of the task, and those that the loader mixed in.

    Raises:
        MissingMembersError: if the model lacks a member of the protocol.
        RuntimeError: if no task was begun, as the strategy's other hooks would not run either; or
            if the loss has no gradient, see ``check_trainable``.
        TypeError: if ``batch`` is not a Batch.
        ValueError: if two loss terms have one name.
    """
    _check_step(model, strategy, batch)
    for module in strategy.frozen_modules:
        if module.training:  # model.train() was called after begin_task
            module.eval()
    vars(strategy)["_has_stepped"] = True
    if vars(strategy).get("_planned_replay") and not vars(strategy)["_has_replayed"]:
        # Looked at only until the first replayed sample: on a GPU it waits for the device.
        vars(strategy)["_has_replayed"] = _holds_replay(batch)
    batch = strategy.extend_batch(model, batch)
    output = forward(model, strategy, batch)
    loss = strategy.objective(model, batch, output)
    if loss is None:
        loss = model.loss(output, batch)
    terms: dict[str, Tensor] = {"task": loss}
    for name, term in strategy.penalty(model, batch, output).items():
        if name in terms:
            raise ValueError(f"two loss terms are named '{name}': give each penalty its own name")
        terms[name] = term
        loss = loss + term
    if not loss.requires_grad and torch.is_grad_enabled():
        check_trainable(model, strategy, has_gradient=False)
    return StepOutput(loss, terms, batch, output)


def _check_step(model: VLM, strategy: Strategy, batch: Batch) -> None:
    """Check what a step was given; see ``step``."""
    if not isinstance(batch, Batch):
        raise TypeError(
            f"step was given a {type(batch).__name__}, expected a mmcl.Batch: make one with "
            "mmcl.Batch.from_images(images, labels), or give the DataLoader "
            "collate_fn=mmcl.collate_images"
        )
    if strategy.current_task is None:
        raise RuntimeError(
            f"{type(strategy).__name__} was given a step before begin_task: in Lightning add "
            "callbacks=[StrategyCallback()] to the Trainer, in a bare loop call "
            "mmcl.core.begin_task(model, strategy, task) first"
        )
    if missing := missing_members(model, STEP_MEMBERS):
        raise MissingMembersError(model, {"a training step": missing})


class StepModule(nn.Module):
    """Model and strategy as one module whose call is a training step, for DDP and other wrappers.

    ``DistributedDataParallel`` sums gradients of what runs inside of its module's call only; so
    outside of Lightning wrap this one, and call it with a batch.

    Args:
        model: a VLM that is a torch module.
        strategy: attached to the model.

    Attributes:
        last_step: result of the last call.
    """

    last_step: StepOutput | None = None

    def __init__(self, model: nn.Module, strategy: Strategy) -> None:
        super().__init__()
        self.model, self.strategy = model, strategy

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return {"loss": ...} of a training step, see ``step``."""
        self.last_step = step(cast(VLM, self.model), self.strategy, batch)
        return {"loss": self.last_step.loss}


def loss_weight(batch: Batch) -> float:
    """Return the loss weight of a batch that makes the mean over ranks equal the global mean.

    A loss over classes is a mean over samples, which the loader counts. A loss over answers is a
    mean over the tokens in the loss: their counts are summed over ranks here; accumulated
    micro-batches are still weighted by their samples.
    """
    if not batch.is_generative or rank_and_world()[1] == 1:
        return batch.loss_weight
    tokens, samples = int((batch.labels != IGNORE_INDEX).sum()), batch.num_in_loss
    all_tokens, all_samples = _sums(batch, tokens, samples)
    factor = (tokens / max(1, samples)) * (all_samples / max(1, all_tokens))
    return batch.loss_weight * factor


def subset_weight(batch: Batch, count: int, samples: int, total: int | None = None) -> float:
    """Return the factor of a mean over some samples that makes it the mean of the global batch.

    The loss is multiplied by ``loss_weight(batch)``, which is right for a mean over the samples in
    the task loss. A penalty that is a mean over others, for example the new ones, is multiplied by
    this as well. All ranks must call it in the same step. A mean over samples is exact if ``total``
    is given. Else, and over tokens of answers, means are exact over ranks, and those of accumulated
    micro-batches are weighted by their samples. A batch of loss weight 0 adds nothing.

    Args:
        batch: the samples of the step.
        count: number of values in this batch's mean: its samples, or scored tokens of answers.
        samples: number of samples in this batch's mean.
        total: number of such samples in the global batch over all ranks and micro-batches; None =
            only this micro-batch's are known.
    """
    world, sizes = rank_and_world()[1], batch.global_batch
    parts = 1 if sizes is None else sizes.micro_batches
    if world * parts == 1:
        return 1.0
    weight = loss_weight(batch)
    all_counts, all_samples, all_weights = _sums(batch, count, samples, batch.loss_weight)
    if parts == 1:
        fraction = 1.0
    elif total is None:
        fraction = all_weights / (world * parts)
    else:
        fraction = all_samples / max(1, total)
    return count / max(1, all_counts) * fraction * world * parts / weight if weight else 0.0


def _sums(batch: Batch, *numbers: float) -> list[float]:
    """Return the sums of numbers over all ranks."""
    own = torch.tensor(numbers, dtype=torch.float64, device=batch.labels.device)
    sums: list[float] = all_reduce_sum(own).tolist()
    return sums


def check_trainable(model: VLM, strategy: Strategy, *, has_gradient: bool = True) -> None:
    """Check that a step can train something: a parameter, or a strategy that needs none.

    A strategy that has both ``end_task`` and ``transform_output`` (RanPAC, NCM) may learn without
    a gradient.

    Args:
        model: model of the step.
        strategy: attached to the model.
        has_gradient: False = the loss of a step has no gradient, so trainable parameters, if there
            are any, take no part in it.

    Raises:
        RuntimeError: with the frozen parameters, and the strategies that froze them.
    """
    trainable = [*trainable_parameters(model)]
    trainable += [name for name, p in strategy.named_parameters() if p.requires_grad]
    if trainable and has_gradient:
        return
    parts = [part for part in strategy.modules() if isinstance(part, Strategy)]
    leaves = [part for part in parts if sum(isinstance(m, Strategy) for m in part.modules()) == 1]
    if not trainable and any(
        part.overrides("end_task") and part.overrides("transform_output") for part in leaves
    ):
        return
    names = " and ".join(type(part).__name__ for part in leaves)
    frozen = [without_adapters(n) for n, p in model.named_parameters() if not p.requires_grad]
    by = {type(part).__name__: part.frozen_names for part in leaves if part.frozen_names}
    earlier = [name for name in frozen if not any(name in its for its in by.values())]
    reasons = [f"{name} froze {_grouped(its)}" for name, its in by.items()]
    reasons += [f"{_grouped(earlier)} was frozen before"] if earlier else []
    problem = f"{names} and the model have no trainable parameter"
    if trainable:
        problem = f"the loss depends on no trainable parameter ({_grouped(trainable)} train)"
    raise RuntimeError(
        f"the loss has no gradient, because {problem}: {'; '.join(reasons) or 'nothing is frozen'}."
        " Leave a part that the loss depends on trainable (`freeze` of the model or the strategy), "
        "or add a strategy that trains something, such as LoRA or L2P"
    )


def _grouped(names: Sequence[str]) -> str:
    """Return parameter names as the modules they are in, with the number of parameters of each."""
    depth = 1
    if len({name.partition(".")[0] for name in names}) == 1:
        depth = 2  # one module around all, such as `clip`
    counts = Counter(".".join(name.split(".")[:depth]) for name in names)
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def begin_task(model: VLM, strategy: Strategy, task: Task) -> None:
    """Begin a task: run ``before_task`` and ``begin_task``, then set ``current_task``.

    The model's frozen modules are put into evaluation mode, and stay there in every ``step``. A
    model with ``master_weights`` gets float32 parameters where it trains narrower ones.
    """
    strategy.before_task(model, task)
    strategy.begin_task(model, task)
    if getattr(model, "master_weights", False):
        keep_master_weights(cast(nn.Module, model))
    strategy.current_task, strategy.is_task_ended = task, False
    strategy.frozen_modules = set_frozen_to_eval(model)
    plan = strategy.replay_plan()
    planned = 0 if plan is None else len(plan)
    vars(strategy).update(_planned_replay=planned, _has_replayed=False, _has_stepped=False)


def begin_tasks(model: VLM, strategy: Strategy, state: Mapping[str, Any]) -> int | None:
    """Begin the tasks of a checkpoint in a new model and strategy, before its state is loaded.

    Some strategies add parameters in every task; the state of a checkpoint fits once they exist.

    Args:
        model: new, as it was before its first task.
        strategy: new, attached to the model.
        state: state dict of the strategy, or of a module that holds it.

    Returns:
        The number of the checkpoint's task, None if no task had begun; its tasks are 0 to this one.
    """
    found = [value for key, value in state.items() if key.split(".")[-1] == TASK_PROGRESS]
    if not found:
        return None
    last = int(found[0][0])
    for index in range(last + 1):
        begin_task(model, strategy, Task(index, f"task {index}"))
    return last


def end_task(model: VLM, strategy: Strategy, task: Task, batches: Iterable[Batch]) -> None:
    """End a task: run the strategy's ``end_task`` with one exact pass over the training data.

    Samples of the pass that are marked ``is_replay`` are left out: they are not of this task. The
    others are moved to the model's device. A strategy whose replay plan was not realized is warned
    of by name.

    Args:
        model: model after the task's last step.
        strategy: attached to the model.
        task: task that ends.
        batches: this rank's samples of the training data, see ``Strategy.end_task``.
    """
    _warn_of_missing_replay(model, strategy, task)
    new = NewSamples(batches, device_of(model))
    # Without a length it can be read once only, and a chain shares it out.
    strategy.end_task(model, task, new if hasattr(batches, "__len__") else iter(new))
    strategy.is_task_ended = True


def _holds_replay(batch: Batch) -> bool:
    """Whether some sample is a replayed one; samples of other sources are marked so as well."""
    if batch.is_replay is None:
        return False
    is_old = (
        batch.is_replay if batch.source_ids is None else batch.is_replay & (batch.source_ids == 0)
    )
    return bool(is_old.any())


def _warn_of_missing_replay(model: VLM, strategy: Strategy, task: Task) -> None:
    """Warn of a replay plan of which no batch of any rank held a sample."""
    planned = vars(strategy).get("_planned_replay", 0)
    if not planned or not vars(strategy)["_has_stepped"]:
        return
    # A rank may have none of the few replayed samples of each global batch.
    own = torch.tensor([float(vars(strategy)["_has_replayed"])], device=device_of(model))
    if not float(all_reduce_sum(own)):
        warnings.warn(
            f"{_replaying(strategy)} planned to replay {planned} stored samples and no batch of "
            f"task '{task.name}' held a replayed one, so nothing was replayed: build the task's "
            "loader with mmcl.replay_loader(dataset, strategy, batch_size, earlier=...)",
            stacklevel=3,
        )


class NewSamples:
    """Iterable over batches on a device, without the samples that are marked as replayed."""

    def __init__(self, batches: Iterable[Batch], device: torch.device) -> None:
        self.batches, self.device = batches, device

    def __iter__(self) -> Iterator[Batch]:
        for batch in (batch.to(self.device) for batch in self.batches):
            if batch.is_replay is None or not bool(batch.is_replay.any()):
                yield batch
            elif not bool(batch.is_replay.all()):
                yield batch.take(torch.nonzero(~batch.is_replay).flatten())

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]  # of those that have a length


def _replaying(strategy: Strategy) -> str:
    """Return the name of the member that has a replay plan."""
    members: list[Strategy] = [m for m in strategy.modules() if isinstance(m, Strategy)]
    return next(type(m).__name__ for m in reversed(members) if m.overrides("replay_plan"))
