"""LoRARouter trains one independent LoRA adapter per task and routes every sample to one of them.

Paper: none. One adapter per task behind a router is MR-LoRA, Zhao et al. 2025, arXiv:2506.05453;
routers are prototypes as in SimpleCIL, arXiv:2303.07338, or ridge regression as in CF-Router.
Code followed: none; written from the equations.
Differs: samples are routed by the frozen routing encoder, so no pass through the language model is
needed; sums are float64 over all ranks, so tasks may come in any order; every sample has its own
adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from mmcl.core import NO_PROMPTS, VLM, Batch, Prompts, Strategy, Task, device_of, require
from mmcl.core.distributed import all_reduce_sum
from mmcl.core.seeding import generator
from mmcl.layers.adapters import TaskAdapters, set_active_adapters
from mmcl.layers.target_layers import TargetModules
from mmcl.memory import Snapshot, TensorBuffer
from mmcl.memory.distributed_fill import gather_buffer, pass_sample_ids
from mmcl.memory.task_embeddings import Features, TaskPrototypes
from mmcl.ops.prototypes import solve_ridge
from mmcl.ops.routing import cosine_similarity, group_max, k_means, one_hot_gates

RouteBy = Literal["both", "image", "text"]
_GATE = "lora_router"


class LoRARouter(Strategy):
    """One independent LoRA adapter per task, and a router that selects one for each sample.

    In training new samples go through the adapter of their task, which starts from the frozen
    model. Replayed samples go through the frozen adapters of their own tasks: they change no
    adapter, but a trainable projector stays fit for the old ones.

    In evaluation (``strategy.eval()``) samples with a task id go through that task's adapter, other
    samples through the one that ``route`` returns; mid-task, through the current task's.

    Args:
        rank: r of each adapter.
        alpha: the scale of adapters is alpha / rank; None = 2 * rank.
        dropout: of the adapters' input in training, 0 to below 1.
        target_modules: "all" linear layers, or those of "attention" or "mlp".
        route_by: embeddings that the router sees: "image", "text" (the question) or "both", half
            each.
        router: "prototype" = the task of highest cosine similarity to its prototypes, "ridge" =
            ridge regression from embeddings to tasks, solved in closed form.
        prototypes: number per task, by k-means over ``samples`` samples; 1 = the exact mean.
        ridge: number added to the diagonal, above 0.
        samples: samples of a task, chosen by ``seed``, for k-means and the check of the router.
        train_projector: train the projector between the towers as well.
        seed: seed of the adapters' initial values, the choice of samples and k-means.

    **Remembers** a prototype of E float64 numbers for each task and modality (times
    ``prototypes``); "ridge" also M^2 for M = E numbers of all modalities. Adapters,
    r (d_in + d_out) numbers for each layer and task, are the model's.

    **Asks of the model** ``generate``, ``target_linears``, ``freeze``, ``gates``, ``embed``.
    """

    def __init__(
        self,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        target_modules: TargetModules = "all",
        route_by: RouteBy = "both",
        router: Literal["prototype", "ridge"] = "prototype",
        prototypes: int = 1,
        ridge: float = 0.1,
        samples: int = 4096,
        train_projector: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.adapters = TaskAdapters(rank, alpha, dropout, target_modules, train_projector, seed)
        if route_by not in ("both", "image", "text") or router not in ("prototype", "ridge"):
            raise ValueError(
                f"route_by is '{route_by}' and router '{router}': choose route_by of 'both', "
                "'image', 'text' and router of 'prototype', 'ridge'"
            )
        if min(prototypes, samples) < 1 or ridge <= 0 or (router == "ridge" and prototypes > 1):
            raise ValueError(
                f"prototypes is {prototypes}, samples {samples} and ridge {ridge}: give 1 or more "
                "prototypes and samples and a ridge above 0; several prototypes have no use for "
                "router 'ridge'"
            )
        self.router, self.prototypes, self.ridge = router, prototypes, ridge
        self.samples, self.seed = samples, seed
        self.means = TaskPrototypes(("image", "text") if route_by == "both" else (route_by,))
        self.solved = Snapshot()
        self._task = 0

    def attach(self, model: VLM) -> None:
        """Freeze the model and inject the first task's adapter into its language model."""
        require(model, "generate", "target_linears", "freeze", "gates", "embed", by=self)
        self.adapters.attach(model, by=self, gates=_GATE)

    def begin_task(self, model: VLM, task: Task) -> None:
        """Add an adapter for the task and freeze those before it."""
        layers = self.adapters.begin_task(model, task.index)
        self._task = task.index
        set_active_adapters(layers.values(), "one", (task.index,))

    def prompts(self, model: VLM, batch: Batch) -> Prompts:
        """Return one-hot gates: one adapter for every sample."""
        layers = list(self.adapters.layers_of(model).values())
        # A copy of this strategy that is a teacher knows fewer adapters than the model has.
        count = min(len(layers[0].adapters), self._task + 1) if layers else 0
        if not count:
            return NO_PROMPTS
        if self.training and (batch.is_replay is None or not bool(batch.is_replay.any())):
            set_active_adapters(layers, "one", (self._task,))
            return NO_PROMPTS
        index = self._train_index(batch) if self.training else self._test_index(model, batch, count)
        set_active_adapters(layers, "gates", range(count))
        return Prompts(gates={_GATE: one_hot_gates(index, count)})

    @torch.no_grad()
    def route(self, model: VLM, batch: Batch) -> Tensor:
        """Return the adapter to which each sample is routed without its task id.

        (B,) int64, among the tasks that have ended.

        Raises:
            RuntimeError: before the first task ended.
        """
        if self.means.is_empty:
            raise RuntimeError("LoRARouter has no task yet: route samples after the first end_task")
        return self._route(self.means.features(model, batch, self))

    @torch.no_grad()
    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Compute the task's prototypes, and solve the router again."""
        kept, seen = TensorBuffer(self.samples, seed=self.seed), 0
        grams: list[Tensor] = []

        def watch(batch: Batch, features: Features) -> None:
            nonlocal seen
            joined = torch.cat(features, 1)
            kept.add({"embeddings": joined}, pass_sample_ids(batch, seen), task.index)
            seen += len(batch)
            if self.router == "ridge":
                grams[:] = [joined.T @ joined + (grams[0] if grams else 0)]

        self.means.fit(model, task, batches, self, watch)
        sample = gather_buffer(kept, device_of(model))["embeddings"]
        solved = self.solved.tensors
        if self.router == "ridge":
            gram = all_reduce_sum(grams[0]) + solved.get("gram", torch.zeros_like(grams[0]))
            solved |= {"gram": gram, "head": _head(gram, self.means, self.ridge)}
        elif self.prototypes > 1:
            solved |= self._with_centers(sample, task.index)
        self.solved.take(solved)
        home = (self._route(_split(sample, self.means.sums)) == task.index).sum()
        total = torch.full_like(home, len(sample))
        self.solved.take({**solved, "home": torch.stack([home, total])})

    def buffer_sizes(self) -> Mapping[str, int]:
        """Return the number of tasks with a prototype."""
        return {"tasks": int((self.means.counts > 0).sum())}

    def inactive_parts(self) -> tuple[str, ...]:
        """Report the last task's adapter if no sample of the task is routed to it."""
        if "home" not in self.solved.tensors:
            return super().inactive_parts()
        home, total = self.solved.get("home").tolist()
        number = len(self.means.counts) - 1
        found = f"adapter {number} was chosen for none of {total} samples of its task"
        return super().inactive_parts() + ((found,) if home == 0 else ())

    def _train_index(self, batch: Batch) -> Tensor:
        """Return (B,) adapter of each sample in training: the current, or a replayed one's own."""
        now = torch.full_like(batch.task_ids, self._task)
        if batch.is_replay is None:
            return now
        is_old = batch.is_replay & (batch.task_ids >= 0) & (batch.task_ids < self._task)
        return torch.where(is_old, batch.task_ids, now)

    def _test_index(self, model: VLM, batch: Batch, count: int) -> Tensor:
        """Return (B,) adapter of each sample in evaluation: of its task id, or as routed."""
        has_task = (batch.task_ids >= 0) & (batch.task_ids < count)
        if bool(has_task.all()):
            return batch.task_ids
        if self.means.has(self._task):
            return torch.where(has_task, batch.task_ids, self.route(model, batch))
        return torch.where(has_task, batch.task_ids, self._task)

    def _route(self, features: Features) -> Tensor:
        counts, solved = self.means.counts, self.solved.tensors
        if "head" in solved:
            scores = torch.cat(features, 1) @ solved["head"]
        else:
            weights = [1 / len(features)] * len(features)
            if "centers" in solved:
                scores = cosine_similarity(features, _split(solved["centers"], features), weights)
                scores = group_max(scores, solved["owner"], len(counts))
            else:
                scores = cosine_similarity(features, self.means.sums, weights)
        return scores.masked_fill(counts.to(scores.device) == 0, -torch.inf).argmax(1)

    def _with_centers(self, sample: Tensor, task: int) -> dict[str, Tensor]:
        found = k_means(sample, self.prototypes, generator(self.seed, task))
        owner = torch.full((len(found),), task, device=found.device)
        old, new = self.solved.tensors, {"centers": found, "owner": owner}
        if "centers" not in old:
            return new
        return {name: torch.cat([old[name].to(own), own]) for name, own in new.items()}


def _split(joined: Tensor, like: Features) -> Features:
    """Split (R, M) into the modalities' columns, with the dims of ``like``."""
    return torch.split(joined, [features.shape[1] for features in like], dim=1)


def _head(gram: Tensor, means: TaskPrototypes, ridge: float) -> Tensor:
    """Return the (M, T) ridge regression from embeddings to tasks, from each task's sums."""
    head = solve_ridge(gram, torch.cat(means.sums, 1).T.contiguous(), ridge)
    if head is None:
        raise RuntimeError(
            f"the router cannot be solved with ridge {ridge:g}: check the embeddings for nan and "
            "inf, or give a larger ridge"
        )
    return head
