"""LoRARouter learns one LoRA for each task alone, and sends every row through one of them.

Paper: none of its own. One adapter a task behind a router is MR-LoRA, Zhao et al. 2025,
arXiv:2506.05453; routers are means as in SimpleCIL, arXiv:2303.07338, or ridge as in CF-Router.
Code followed: none; written from the equations.
Differs: rows are recognised by the frozen guide, so no pass through the language model is needed;
sums are float64 over all ranks, so tasks may come in any order; every row has its own slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, cast

import torch
from torch import Tensor, nn

from mmcl.core import NO_PROMPTS, VLM, Batch, Prompts, Strategy, Task, require
from mmcl.core.distributed import gather_rows, sum_over_ranks
from mmcl.core.randomness import generator, ranks_of
from mmcl.layers import LowRankSlots, install, installed
from mmcl.layers.adapting import Which, check_sizes, frozen_linears, grow_slots
from mmcl.layers.choosing import choose_slots
from mmcl.memory import Snapshot, lowest, pass_numbers
from mmcl.memory.task_means import Features, TaskMeans
from mmcl.ops.prototypes import solve_ridge
from mmcl.ops.routing import best_of_groups, k_means, likeness, one_hot_gates

By = Literal["both", "image", "text"]
_GATE = "lora_router"


class LoRARouter(Strategy):
    """Independent low-rank slots, one for each task, and a router that picks one for each row.

    In training new rows go through the slot of their task, which starts from the frozen model.
    Remembered rows go through the frozen slots of their own tasks: they teach old slots nothing
    and disturb no new one, but where the projector learns they hold it to what old slots expect.

    In evaluation (``strategy.eval()``) rows whose task the scenario tells go through its slot,
    others where ``route`` sends them; until the first pass over a task ended, through its slot.

    Args:
        rank: r of each slot.
        alpha: None = 2 * rank.
        dropout: of the slot's input in training, 0 to 1.
        layers: which linear layers: "all", or those of "attention" or "mlp".
        by: what rows are recognised by: picture, question ("text") or both, half each.
        router: "prototype" = the task whose mean points most alike, "ridge" = ridge regression from
            embeddings to tasks, solved in closed form.
        prototypes: means of each task, found by k-means among ``samples`` rows; 1 = the exact mean.
        ridge: added to the diagonal, above 0.
        samples: rows of a task, chosen by ``seed``, that k-means and the report look at.
        train_projector: let the projector between the towers learn as well.
        seed: of the slots' start, the choice of samples and k-means.

    **Remembers** a mean of E float64 numbers for each task and modality (times ``prototypes``);
    "ridge" also M^2 for M = E numbers of all modalities. Slots, r (d_in + d_out) numbers for each
    layer and task, are the model's.

    **Asks of the model** ``answer``, ``linears``, ``freeze``, ``gates``, ``embed``.
    """

    def __init__(
        self,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        layers: Which = "all",
        by: By = "both",
        router: Literal["prototype", "ridge"] = "prototype",
        prototypes: int = 1,
        ridge: float = 0.1,
        samples: int = 4096,
        train_projector: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_sizes(rank, dropout)
        if by not in ("both", "image", "text") or router not in ("prototype", "ridge"):
            raise ValueError(
                f"by is '{by}' and router '{router}': choose by of 'both', 'image', 'text' and "
                "router of 'prototype', 'ridge'"
            )
        if min(prototypes, samples) < 1 or ridge <= 0 or (router == "ridge" and prototypes > 1):
            raise ValueError(
                f"prototypes is {prototypes}, samples {samples} and ridge {ridge}: give 1 or more "
                "prototypes and samples and a ridge above 0; several prototypes have no use for "
                "router 'ridge'"
            )
        self.rank, self.alpha, self.dropout = rank, 2 * rank if alpha is None else alpha, dropout
        self.layers, self.train_projector, self.router = layers, train_projector, router
        self.prototypes, self.ridge, self.samples, self.seed = prototypes, ridge, samples, seed
        self.means = TaskMeans(("image", "text") if by == "both" else (by,))
        self.solved = Snapshot()
        self._task = 0

    def attach(self, model: VLM) -> None:
        """Freeze the model and put layers with the first task's slot into its language model."""
        able = require(model, "answer", "linears", "freeze", "gates", "embed", by=self)
        names = frozen_linears(model, self.layers, self.train_projector, self)
        scale = self.alpha / self.rank
        install(
            able, names, lambda linear: LowRankSlots(linear, scale, self.dropout, able.gates, _GATE)
        )
        grow_slots(model, 1, self.rank, self.seed)

    def begin_task(self, model: VLM, task: Task) -> None:
        """Add a slot for the task and freeze those before it."""
        grow_slots(model, task.index + 1, self.rank, self.seed)
        self._task = task.index
        choose_slots(_layers(model), "one", (task.index,))

    def prompts(self, model: VLM, batch: Batch) -> Prompts:
        """Choose one slot for every row."""
        layers = _layers(model)
        slots = len(layers[0].slots) if layers else 0
        if not slots:
            return NO_PROMPTS
        if self.training and (batch.recalled is None or not bool(batch.recalled.any())):
            choose_slots(layers, "one", (self._task,))
            return NO_PROMPTS
        choice = self._learned_by(batch) if self.training else self._asked(model, batch, slots)
        choose_slots(layers, "gates", range(slots))
        return Prompts(gates={_GATE: one_hot_gates(choice, slots)})

    @torch.no_grad()
    def route(self, model: VLM, batch: Batch) -> Tensor:
        """Return the slot that each row would go through if nobody told its task.

        Args:
            model: that embeds.
            batch: B rows; their task numbers are not looked at.

        Returns:
            (B,) int64, among the tasks that have ended.

        Raises:
            RuntimeError: before the first task ended.
        """
        if self.means.is_empty:
            raise RuntimeError("LoRARouter knows no task yet: route rows after the first end_task")
        return self._route(self.means.features(model, batch, self))

    @torch.no_grad()
    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Take the task's means, and solve anew."""
        kept = _Sample(self.samples, self.seed, task.index)
        grams: list[Tensor] = []

        def watch(batch: Batch, features: Features) -> None:
            rows = torch.cat(features, 1)
            kept.add(batch, rows)
            if self.router == "ridge":
                grams[:] = [rows.T @ rows + (grams[0] if grams else 0)]

        self.means.learn(model, task, batches, self, watch)
        rows = kept.over_ranks()
        solved = self.solved.tensors
        if self.router == "ridge":
            gram = sum_over_ranks(grams[0]) + solved.get("gram", torch.zeros_like(grams[0]))
            solved |= {"gram": gram, "head": _head(gram, self.means, self.ridge)}
        elif self.prototypes > 1:
            solved |= self._with_centres(rows, task.index)
        self.solved.take(solved)
        home = (self._route(_parts(rows, self.means.sums)) == task.index).sum()
        self.solved.take({**solved, "home": torch.stack([home, torch.full_like(home, len(rows))])})

    def holdings(self) -> Mapping[str, int]:
        """Return how many tasks can be recognised."""
        return {"tasks": int((self.means.counts > 0).sum())}

    def idle(self) -> tuple[str, ...]:
        """Name the last task's slot if the router sends none of the task's own rows there."""
        if "home" not in self.solved.tensors:
            return super().idle()
        home, rows = self.solved.get("home").tolist()
        found = f"slot {len(self.means.counts) - 1} was chosen for none of {rows} rows of its task"
        return super().idle() + ((found,) if home == 0 else ())

    def _learned_by(self, batch: Batch) -> Tensor:
        """The slot of each row of a training step: the current one, or an old row's own."""
        now = torch.full_like(batch.task, self._task)
        if batch.recalled is None:
            return now
        is_old = batch.recalled & (batch.task >= 0) & (batch.task < self._task)
        return torch.where(is_old, batch.task, now)

    def _asked(self, model: VLM, batch: Batch, slots: int) -> Tensor:
        is_told = (batch.task >= 0) & (batch.task < slots)
        if bool(is_told.all()):
            return batch.task
        is_open = not self.means.knows(self._task)
        other = torch.full_like(batch.task, self._task) if is_open else self.route(model, batch)
        return torch.where(is_told, batch.task, other)

    def _route(self, features: Features) -> Tensor:
        counts, solved = self.means.counts, self.solved.tensors
        if "head" in solved:
            scores = torch.cat(features, 1) @ solved["head"]
        else:
            shares = [1 / len(features)] * len(features)
            if "centres" in solved:
                scores = likeness(features, _parts(solved["centres"], features), shares)
                scores = best_of_groups(scores, solved["owner"], len(counts))
            else:
                scores = likeness(features, self.means.sums, shares)
        return scores.masked_fill(counts.to(scores.device) == 0, -torch.inf).argmax(1)

    def _with_centres(self, rows: Tensor, task: int) -> dict[str, Tensor]:
        found = k_means(rows, self.prototypes, generator(self.seed, task))
        owner = torch.full((len(found),), task, device=found.device)
        old = self.solved.tensors
        if "centres" not in old:
            return {"centres": found, "owner": owner}
        return {
            "centres": torch.cat([old["centres"].to(found), found]),
            "owner": torch.cat([old["owner"].to(owner), owner]),
        }


class _Sample:
    """A uniform sample of the rows of a pass, the same however ranks share the pass."""

    def __init__(self, size: int, seed: int, task: int) -> None:
        self.size, self.seed, self.task = size, seed, task
        self.rows: Tensor | None = None
        self.ranks = torch.zeros(0, dtype=torch.int64)
        self._seen = 0

    def add(self, batch: Batch, rows: Tensor) -> None:
        """Offer the rows of a batch, (B, M)."""
        own = ranks_of(self.seed, self.task, pass_numbers(batch, self._seen)).to(rows.device)
        self._seen += len(batch)
        if self.rows is not None:
            rows, own = torch.cat([self.rows, rows]), torch.cat([self.ranks, own])
        kept = lowest(own, self.size)
        self.rows, self.ranks = rows[kept], own[kept]

    def over_ranks(self) -> Tensor:
        """Return (up to size, M), by rank; after at least one batch."""
        rows = cast(Tensor, self.rows)
        everyone = gather_rows(rows)
        return everyone[lowest(gather_rows(self.ranks.to(rows.device)), self.size)]


def _layers(model: VLM) -> list[LowRankSlots]:
    return list(installed(cast(nn.Module, model), LowRankSlots).values())


def _parts(rows: Tensor, like: Features) -> Features:
    """Cut rows (R, M) that stand side by side into parts as wide as those of ``like``."""
    start, parts = 0, []
    for part in like:
        parts.append(rows[:, start : start + part.shape[1]])
        start += part.shape[1]
    return tuple(parts)


def _head(gram: Tensor, means: TaskMeans, ridge: float) -> Tensor:
    """(M, T) regression from embeddings to tasks; the cross sums are the sums of each task."""
    head = solve_ridge(gram, torch.cat(means.sums, 1).T.contiguous(), ridge)
    if head is None:
        raise RuntimeError(
            f"ridge {ridge:g} does not make the sums solvable: the embeddings hold nan or inf, or "
            "a larger ridge is needed"
        )
    return head
