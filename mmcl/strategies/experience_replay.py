"""Experience replay mixes old samples, decoded and augmented again, into every batch.

Paper: Chaudhry et al. 2019, arXiv:1902.10486.
Herding: Rebuffi et al. 2017, arXiv:1611.07725. K-center: Sener and Savarese 2018, arXiv:1708.00489.
Uncertainty: Bang et al. 2021, arXiv:2103.17230. InsCL: Wang et al. 2024, arXiv:2403.11435.
Pools: Garg et al. 2024, arXiv:2310.16226 (TiC-CLIP).
Code followed: none; each is a sampling rule, stated in its paper.
Differs: the buffer changes when a task ends, not at every step; the reservoir is by hash; replayed
samples are an exact fraction of the global batch. Uncertainty is the entropy of one prediction, not
votes over augmented copies. InsCL draws from all old data and has a language model tag every
instruction: here it draws from the buffer, and tags are a question's words, counted in its task.
The pools of TiC-CLIP bound the old data kept; here they are shares of the replayed samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from mmcl.core import IGNORE_INDEX, Batch, ReplayPlan, Strategy, Task, device_of, forward, require
from mmcl.core.model import VLM, eval_mode
from mmcl.core.seeding import hash_seed
from mmcl.core.strategy import Storage
from mmcl.memory import ReplayIndex, TensorBuffer
from mmcl.memory.distributed_fill import class_ids, collect_metadata, fill_buffer, sample_bytes
from mmcl.memory.selection import (
    ScoreOrder,
    herding,
    inscl_counts,
    k_center_greedy,
    largest_remainder,
    order_by_information,
    order_by_score,
    order_within_groups,
    repeat_to_counts,
    sample_entropies,
    sample_losses,
    tag_information,
)
from mmcl.memory.task_embeddings import InstructionEmbeddings, tags_of
from mmcl.ops.optimal_transport import wasserstein_cost

Selection = Literal[
    "reservoir", "class_balanced", "herding", "k_center", "loss", "uncertainty", "information"
]
Allocation = Literal["none", "task_balanced", "inscl"]
Pool = Literal["all", "exponential", "equal"]

_SCORE_ORDERS: dict[str, ScoreOrder] = {"loss": "high", "uncertainty": "spread"}


class ExperienceReplay(Strategy):
    """Experience replay from a buffer of references to old samples, which are read again.

    The loader reads the samples of ``replay_plan()``. A custom training loop must do so too when it
    builds a task's loader; sample ids are those of its batches (``Batch.sample_ids``), or positions
    in the pass that ``end_task`` is given (sample i of rank r has the id i * W + r).

    The selection does not depend on the number of processes or the batch size, up to rounding.
    Selections other than the first two order the samples when a task ends, per class or, for
    samples without one, per task; a buffer that has to shrink keeps the same number from the start
    of each list, and nothing is read again. The text encoder of "inscl" should be frozen, as a
    routing encoder is.

    Args:
        buffer_size: samples held over all tasks, 0 = not bounded by samples.
        replay_ratio: fraction of replayed samples in every global batch, above 0 and below 1.
        selection: "reservoir" = a uniform sample of everything seen. "class_balanced" = equally
            many of every class (reads the labels in one pass over each task). "herding" = exemplars
            whose mean image embedding is nearest to the class mean. "k_center" = those that
            minimize the largest distance of an image of the task to them. "loss" and "uncertainty"
            = by the cross entropy of the true answer, or by the entropy of the prediction (mean
            over an answer's tokens), see ``score_order``; not for captions, whose loss depends on
            their batch. "information" = questions or captions of rare words, every different one
            first.
        storage: "reference" reads old samples from their shards, "copy" writes them to the run
            directory, for data that will be deleted.
        seed: seed of the selection.
        buffer_bytes: bytes of the samples held, 0 = not bounded by bytes; with
            ``buffer_size``, both hold. Needs a loader that states them, and a pass over each task.
        allocation: "none" = as the selection has it; "task_balanced" = equally many of every task;
            "inscl" = equally many are stored, and tasks are replayed in proportion to the
            Wasserstein distance of the embeddings of their questions or captions from the current
            ones. Needs ``preview``.
        score_order: which to keep of "loss" and "uncertainty": "high", "low", or "spread" over all
            of them. None = "high" for loss, "spread" for uncertainty.
        candidate_pool_size: candidates of a task where images, scores or words are compared:
            a uniform sample of it. Bounds memory and time of the pass.
        instructions: samples of a task whose texts "inscl" compares.
        replay_pool: shares of the earlier tasks in what is replayed. "all" = in proportion to what
            is stored of each. "exponential" = weight 1 for the last task before this one, 1/2 for
            the one before that, and so on. "equal" = equally many of each. The batch,
            ``replay_ratio`` and the number of steps are the same for all three. A task that has
            fewer samples stored than its share repeats them, one whose share is below half a sample
            may have none.

    **Remembers** 40 bytes per sample (copies, if kept, are files). "inscl" also stores 2 E + 8
    bytes for each of ``instructions`` text embeddings per task.

    **Asks of the model** nothing; ``embed`` for "herding", "k_center" and "inscl".
    """

    def __init__(
        self,
        buffer_size: int = 200,
        replay_ratio: float = 0.5,
        selection: Selection = "reservoir",
        storage: Storage = "reference",
        seed: int = 0,
        buffer_bytes: int = 0,
        allocation: Allocation = "none",
        score_order: ScoreOrder | None = None,
        candidate_pool_size: int = 20000,
        instructions: int = 256,
        replay_pool: Pool = "all",
    ) -> None:
        super().__init__()
        _expect_numbers(buffer_size, buffer_bytes, replay_ratio, candidate_pool_size, instructions)
        _expect_words(selection, storage, allocation, score_order)
        _expect_pool(replay_pool, allocation)
        self.replay_ratio, self.storage, self.seed = replay_ratio, storage, seed
        self.candidate_pool_size = candidate_pool_size
        self.selection = selection
        self.replay_pool = replay_pool
        self.score_order: ScoreOrder = score_order or _SCORE_ORDERS.get(selection, "high")
        self.memory = ReplayIndex(
            buffer_size,
            "reservoir" if selection == "reservoir" else "class_balanced",
            seed,
            capacity_bytes=buffer_bytes,
            by_task=allocation != "none",
        )
        is_inscl = allocation == "inscl"
        self.instructions = InstructionEmbeddings(instructions, seed) if is_inscl else None

    def attach(self, model: VLM) -> None:
        """Check that the model embeds, where the selection needs it."""
        if self.selection in ("herding", "k_center") or self.instructions is not None:
            require(model, "embed", by=self)

    def preview(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Embed instructions of a task, before its loader is built; for "inscl" only."""
        texts = self.instructions
        if texts is None or texts.has(task.index):
            return
        with eval_mode(cast(nn.Module, model)):
            texts.fit(model, task, batches, by=self)
        points, counts = texts.get(task.index)
        distances = {}
        for old in filter(texts.has, range(task.index)):
            old_points, old_counts = texts.get(old)
            distances[old] = wasserstein_cost(1 - points @ old_points.T, counts, old_counts)
        texts.put_distances(task.index, distances)

    def replay_plan(self) -> ReplayPlan | None:
        """Return the buffer's samples and their fraction; None before the first task ended."""
        if not len(self.memory):
            return None
        task, sample = self.memory.task_ids, self.memory.sample_ids
        counts = self._counts()
        if counts:
            order = torch.argsort(self.memory.priority, stable=True)
            index = order[repeat_to_counts(task[order], counts)].sort().values
            task, sample = task[index], sample[index]
        return ReplayPlan(task, sample, self.replay_ratio, self.storage)

    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Update the buffer with the samples of this task."""
        if self.selection not in ("reservoir", "class_balanced"):
            self._offer_ordered(model, task, batches)
            return
        if self.selection == "reservoir" and task.size and not self.memory.capacity_bytes:
            self.memory.add_range(task.index, task.size)
            return
        numbers, labels, sizes = collect_metadata(batches, device_of(model)).unbind(1)
        if self.selection == "class_balanced" and bool((labels < 0).any()):
            raise ValueError(
                "selection is 'class_balanced' and the task has samples without a class: "
                "choose selection='reservoir' for captions and answers"
            )
        self.memory.add(task.index, numbers, labels, sizes=sizes)

    def buffer_sizes(self) -> Mapping[str, int]:
        """Return the number of samples in the buffer."""
        return {"memory": len(self.memory)}

    def inactive_parts(self) -> tuple[str, ...]:
        """Report an empty buffer, and an "inscl" allocation without instructions of the task."""
        messages = super().inactive_parts()
        texts = self.instructions
        if texts is None or self.current_task is None or texts.has(self.current_task.index):
            return messages
        return (
            *messages,
            "allocation 'inscl' saw no instructions of the task (preview was not called), so every "
            "stored sample was replayed equally often",
        )

    def _counts(self) -> dict[int, int]:
        """Return the replayed samples of each task by pool or InsCL, empty = the whole buffer."""
        texts, current = self.instructions, self.current_task
        tasks = sorted(set(self.memory.task_ids.tolist()))
        # At a task's end replay_plan() lists the whole buffer, so that copies of it are kept.
        if current is None or current.index in tasks:
            return {}
        if self.replay_pool != "all":
            return pool_counts(len(self.memory), self.replay_pool, current.index, tasks)
        if texts is None:
            return {}
        distances = texts.distances(current.index)
        if not set(tasks) <= set(distances):
            return {}
        return inscl_counts(len(self.memory), {task: distances[task] for task in tasks})

    @torch.no_grad()
    def _offer_ordered(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Offer the samples of a task that ended in the selection's order, from a pool of them."""
        found = TensorBuffer(self.candidate_pool_size, seed=self.seed)

        def columns(batch: Batch) -> dict[str, Tensor]:
            return {
                "sample_ids": cast(Tensor, batch.sample_ids),
                "labels": class_ids(batch),
                "num_bytes": sample_bytes(batch),
                "seen": self._seen(model, batch),
            }

        with eval_mode(cast(nn.Module, model)):
            fill_buffer(found, batches, task.index, columns, device_of(model))
        if not len(found):
            return
        table = found.columns
        # k-center and words order a task as a whole.
        by_class = self.selection not in ("k_center", "information")
        labels = table["labels"] if by_class else torch.full_like(table["labels"], -1)
        room = self.memory.remaining_capacity(table["num_bytes"])
        order_of = self._order_of(task, table["seen"], max(1, room))
        chosen, positions = order_within_groups(labels, order_of)
        samples, sizes = table["sample_ids"][chosen], table["num_bytes"][chosen]
        self.memory.add(task.index, samples, labels[chosen], sizes=sizes, positions=positions)

    def _seen(self, model: VLM, batch: Batch) -> Tensor:
        """Return the selection's input: (B, E) embeddings, (B,) scores or (B, K) tags."""
        if self.selection in ("herding", "k_center"):
            seen: Tensor = require(model, "embed", by=self).embed(batch, "image").float()
            return seen
        if self.selection == "information":
            return tags_of(batch)
        _expect_scores(batch, self.selection)
        output = forward(model, self.root, batch)
        index, count = output.sample_index, len(batch)
        if self.selection == "uncertainty":
            return sample_entropies(output.logits, index, count)
        targets = batch.labels if output.target_ids is None else output.target_ids
        return sample_losses(output.logits, targets, index, count)

    def _order_of(self, task: Task, seen: Tensor, most: int) -> Callable[[Tensor], Tensor]:
        """Return the function that orders the members of a group."""
        if self.selection == "herding":
            return lambda members: herding(seen[members], most)
        if self.selection == "k_center":
            seed = hash_seed(self.seed, task.index)
            return lambda members: k_center_greedy(seen[members], most, seed)
        if self.selection == "information":
            different, which = torch.unique(seen, dim=0, return_inverse=True)
            worth = tag_information(different)[which]
            return lambda members: order_by_information(worth[members], which[members])
        return lambda members: order_by_score(seen[members], self.score_order)


def pool_counts(
    total: int, pool: Literal["exponential", "equal"], current: int, tasks: Iterable[int]
) -> dict[int, int]:
    """Allocate replayed samples to earlier tasks by their age, up to rounding.

    Args:
        total: number of replayed samples.
        pool: "exponential" = halving with every task of age, "equal" = the same for each.
        current: index of the task that is trained.
        tasks: indices of the earlier tasks, each below ``current``.
    """
    ages = {task: current - task for task in tasks}
    halves = [1.0 if pool == "equal" else 0.5 ** (age - 1) for age in ages.values()]
    weights = torch.tensor(halves, dtype=torch.float64)
    return dict(zip(ages, largest_remainder(total, weights).tolist(), strict=True))


def _expect_pool(pool: str, allocation: str) -> None:
    if pool not in get_args(Pool):
        raise ValueError(f"replay_pool is '{pool}': choose one of {', '.join(get_args(Pool))}")
    if pool != "all" and allocation == "inscl":
        raise ValueError(
            f"replay_pool is '{pool}' and allocation 'inscl', and both say how often a task is "
            "replayed: choose replay_pool 'all', or allocation 'none' or 'task_balanced'"
        )


def _expect_scores(batch: Batch, selection: str) -> None:
    if batch.is_generative or not bool((batch.labels == IGNORE_INDEX).any()):
        return
    raise ValueError(
        f"selection is '{selection}' and the task has samples without a true answer of their own, "
        "such as captions, whose loss depends on the batch: choose 'reservoir', 'herding', "
        "'k_center' or 'information'"
    )


def _expect_numbers(
    buffer_size: int, buffer_bytes: int, replay_ratio: float, pool: int, instructions: int
) -> None:
    if buffer_size < 0 or buffer_bytes < 0 or buffer_size + buffer_bytes == 0:
        raise ValueError(
            f"buffer_size is {buffer_size} and buffer_bytes {buffer_bytes}: store at least 1, or "
            "use Finetune"
        )
    if not 0 < replay_ratio < 1:
        raise ValueError(
            f"replay_ratio is {replay_ratio}, expected more than 0 and less than 1: "
            "it is the fraction of replayed samples in each batch"
        )
    for name, count in (("candidate_pool_size", pool), ("instructions", instructions)):
        if count < 1:
            raise ValueError(f"{name} is {count}, expected 1 or more: it counts samples of a task")


def _expect_words(selection: str, storage: str, allocation: str, score_order: str | None) -> None:
    if storage not in ("reference", "copy"):
        raise ValueError(
            f"storage is '{storage}': choose 'reference' or 'copy'; with 'none' old samples are "
            "not kept, so use a strategy that stores them (FeatureReplay, DarkReplay) or no replay"
        )
    for name, word, known in (
        ("selection", selection, Selection), ("allocation", allocation, Allocation)
    ):  # fmt: skip
        if word not in get_args(known):
            raise ValueError(f"{name} is '{word}': choose one of {', '.join(get_args(known))}")
    if score_order is not None and (
        selection not in _SCORE_ORDERS or score_order not in get_args(ScoreOrder)
    ):
        raise ValueError(
            f"score_order is '{score_order}' and selection '{selection}': give 'high', 'low' or "
            f"'spread' with selection {' or '.join(sorted(_SCORE_ORDERS))}, else leave it out"
        )
