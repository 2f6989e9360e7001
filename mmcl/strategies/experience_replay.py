"""ExperienceReplay: mix a few old samples, decoded and augmented afresh, into every batch.

Paper: Chaudhry et al. 2019, On Tiny Episodic Memories in Continual Learning, arXiv:1902.10486;
herding: Rebuffi et al. 2017, arXiv:1611.07725; k-centre: Sener and Savarese 2018, arXiv:1708.00489;
uncertainty: Bang et al. 2021, arXiv:2103.17230; InsCL: Wang et al. 2024, arXiv:2403.11435.
Code followed: none; each is a sampling rule, stated in its paper.
Where we differ: the memory changes when a task ends, not at every step; the uniform sample is one
by hash; old rows take an exact share of the global batch. Uncertainty is the entropy of one answer,
not votes over augmented copies. InsCL draws from all old data and has a language model tag every
instruction: here it draws from the memory, and tags are a question's words, counted in its task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from mmcl.core import UNSCORED, Batch, Recall, Strategy, Task, device_of, require, run
from mmcl.core.model import VLM
from mmcl.core.randomness import mix
from mmcl.core.recall import Keep
from mmcl.core.rest import evaluating
from mmcl.memory import (
    References,
    Rows,
    classes_of,
    fill_rows,
    herding,
    k_centre,
    read_names,
    sizes_of,
)
from mmcl.memory.allocation import by_distance, repeated
from mmcl.memory.instructions import Instructions, tags_of
from mmcl.memory.ordering import Scores, by_information, in_groups, ranked
from mmcl.ops.scores_of_rows import entropies_of_rows, information_of_rows, losses_of_rows
from mmcl.ops.transport import transport_cost

Policy = Literal[
    "reservoir", "balanced", "herding", "k_centre", "loss", "uncertainty", "information"
]
Allocation = Literal["flat", "equal_tasks", "inscl"]

_SCORES: dict[str, Scores] = {"loss": "high", "uncertainty": "spread"}


class ExperienceReplay(Strategy):
    """Remember which old samples to read again.

    The loader realises ``recall()``. A loop of the user's own must do so too when it builds a
    task's loader; samples are numbered as its batches number them (``Batch.sample``), or by their
    place in the pass that ``end_task`` is given (row i of rank r is sample i * W + r).

    What is kept does not hang on the number of processes or the size of batches, but for rounding.
    Policies other than the first two make an ordered list of samples when a task ends, of each of
    its classes or, where rows have none, of the task; a memory that has to shrink keeps the same
    number of each list's beginning, and nothing is read again. What embeds texts for "inscl" should
    stay as it is, as a guide does. "loss" and "uncertainty" ask the model without other members'
    prompts.

    Args:
        samples: samples remembered over all tasks, 0 = not bounded by samples.
        share: part of every global batch that old samples take, above 0 and below 1.
        policy: "reservoir" = a uniform sample of everything seen. "balanced" = equally many of
            every class (reads the labels in one pass over each task). "herding" = those whose mean
            picture embedding stays nearest to the class's. "k_centre" = those that leave no
            picture of the task far from all of them. "loss" and "uncertainty" = by the cross
            entropy of the right answer, or by the entropy of the model's own (mean over an
            answer's tokens), see ``scores``; not for captions, whose loss hangs on their batch.
            "information" = questions or captions of rare words, every different one first.
        keep: "references" reads old samples from their shards, "copies" writes them under the
            run's folder, for data that has to be let go.
        seed: of the choice.
        memory_bytes: bytes of the remembered samples' members at most, 0 = not bounded by bytes;
            with ``samples``, both hold. Needs a loader that states them, and a pass over each task.
        allocation: "flat" = as the policy has it; "equal_tasks" = equally many of every task;
            "inscl" = equally many are remembered, and of each task those come back more often
            whose questions or captions lie further from the present ones: in proportion to the
            Wasserstein distance of their embeddings. Needs ``preview``.
        scores: which to keep of "loss" and "uncertainty": "high", "low", or "spread" over all
            of them. None = "high" for loss, "spread" for uncertainty.
        pool: candidates of a task for the policies that look at pictures, scores or words: a
            uniform sample of it, the smallest hashes. Bounds what a pass holds and computes.
        instructions: rows of a task whose texts "inscl" compares.

    **Remembers** 40 bytes per sample (copies, if kept, are files). "inscl" also remembers 2 E + 8
    bytes for each of ``instructions`` text embeddings a task.

    **Asks of the model** nothing; ``embed`` for "herding", "k_centre" and "inscl".
    """

    def __init__(
        self,
        samples: int = 200,
        share: float = 0.5,
        policy: Policy = "reservoir",
        keep: Keep = "references",
        seed: int = 0,
        memory_bytes: int = 0,
        allocation: Allocation = "flat",
        scores: Scores | None = None,
        pool: int = 20000,
        instructions: int = 256,
    ) -> None:
        super().__init__()
        _expect_numbers(samples, memory_bytes, share, pool, instructions)
        _expect_words(policy, keep, allocation, scores)
        self.share, self.keep, self.seed, self.pool = share, keep, seed, pool
        self.policy = policy
        self.scores: Scores = scores or _SCORES.get(policy, "high")
        self.memory = References(
            samples,
            "reservoir" if policy == "reservoir" else "balanced",
            seed,
            capacity_bytes=memory_bytes,
            by_task=allocation != "flat",
        )
        self.instructions = Instructions(instructions, seed) if allocation == "inscl" else None

    def attach(self, model: VLM) -> None:
        """Check that the model embeds, where the policy asks for it."""
        if self.policy in ("herding", "k_centre") or self.instructions is not None:
            require(model, "embed", by=self)

    def preview(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Look at what the rows of a task ask, before its loader is built.

        Args:
            model: attached to.
            task: that was begun.
            batches: this rank's stride of the task's data, or of a uniform sample of it; read only
                by "inscl", and once for each task.
        """
        known = self.instructions
        if known is None or known.knows(task.index):
            return
        with evaluating(cast(nn.Module, model)):
            known.learn(model, task, batches, by=self)
        points, counts = known.of(task.index)
        distances = {}
        for old in range(task.index):
            if known.knows(old):
                others, theirs = known.of(old)
                distances[old] = transport_cost(1 - points @ others.T, counts, theirs)
        known.put_distances(task.index, distances)

    def recall(self) -> Recall | None:
        """Return the remembered samples and their share; None before the first task ended."""
        if not len(self.memory):
            return None
        task, sample = self.memory.task, self.memory.sample
        counts = self._counts()
        if counts:
            order = torch.argsort(self.memory.order, stable=True)
            places = order[repeated(task[order], counts)].sort().values
            task, sample = task[places], sample[places]
        return Recall(task, sample, self.share, self.keep)

    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Choose among everything seen so far and the samples of this task."""
        if self.policy not in ("reservoir", "balanced"):
            self._offer_ordered(model, task, batches)
            return
        if self.policy == "reservoir" and task.size and not self.memory.capacity_bytes:
            self.memory.offer_range(task.index, task.size)
            return
        numbers, labels, sizes = read_names(batches, device_of(model)).unbind(1)
        if self.policy == "balanced" and bool((labels < 0).any()):
            raise ValueError(
                "policy is 'balanced' and the task has samples without a class: "
                "choose policy='reservoir' for captions and answers"
            )
        self.memory.offer(task.index, numbers, labels, sizes=sizes)

    def holdings(self) -> Mapping[str, int]:
        """Return how many samples are remembered."""
        return {"memory": len(self.memory)}

    def idle(self) -> tuple[str, ...]:
        """Name an empty memory, and an allocation that was told nothing about the task."""
        parts = super().idle()
        known = self.instructions
        if known is None or self.current is None or known.knows(self.current.index):
            return parts
        return (
            *parts,
            "allocation 'inscl' saw no instructions of the task (preview was not called), so every "
            "remembered sample came equally often",
        )

    def _counts(self) -> dict[int, int]:
        """Return how often each task's samples come while the present one is learned, by InsCL."""
        known, current = self.instructions, self.current
        tasks = sorted(set(self.memory.task.tolist()))
        # At a task's end recall() names all that is remembered, so that copies of it are kept.
        if known is None or current is None or current.index in tasks:
            return {}
        distances = known.distances(current.index)
        if not set(tasks) <= set(distances):
            return {}
        return by_distance(len(self.memory), {task: distances[task] for task in tasks})

    @torch.no_grad()
    def _offer_ordered(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Make the lists of a task that ended, from a pool of its samples."""
        found = Rows(self.pool, seed=self.seed)

        def columns(batch: Batch) -> dict[str, Tensor]:
            return {
                "sample": cast(Tensor, batch.sample),
                "labels": classes_of(batch),
                "bytes": sizes_of(batch),
                "seen": self._seen(model, batch),
            }

        with evaluating(cast(nn.Module, model)):
            fill_rows(found, batches, task.index, columns, device_of(model))
        if not len(found):
            return
        table = found.columns
        # k-centre and words look at a task as a whole.
        by_class = self.policy not in ("k_centre", "information")
        labels = table["labels"] if by_class else torch.full_like(table["labels"], -1)
        order_of = self._order_of(task, table["seen"], self.memory.room(table["bytes"]))
        chosen, places = in_groups(labels, order_of)
        samples, sizes = table["sample"][chosen], table["bytes"][chosen]
        self.memory.offer(task.index, samples, labels[chosen], sizes=sizes, places=places)

    def _seen(self, model: VLM, batch: Batch) -> Tensor:
        """Return what the policy looks at: (B, E) embeddings, (B,) scores or (B, K) tags."""
        if self.policy in ("herding", "k_centre"):
            seen: Tensor = require(model, "embed", by=self).embed(batch, "image").float()
            return seen
        if self.policy == "information":
            return tags_of(batch)
        _expect_scores(batch, self.policy)
        output = run(model, self, batch)
        rows, count = output.rows, len(batch)
        if self.policy == "uncertainty":
            return entropies_of_rows(output.logits, rows, count)
        targets = batch.labels if output.targets is None else output.targets
        return losses_of_rows(output.logits, targets, rows, count)

    def _order_of(self, task: Task, seen: Tensor, room: int) -> Callable[[Tensor], Tensor]:
        """Return what orders the members of a group."""
        most = max(1, room)
        if self.policy == "herding":
            return lambda members: herding(seen[members], most)
        if self.policy == "k_centre":
            return lambda members: k_centre(seen[members], most, mix(self.seed, task.index))
        if self.policy == "information":
            different, which = torch.unique(seen, dim=0, return_inverse=True)
            worth = information_of_rows(different)[which]
            return lambda members: by_information(worth[members], which[members])
        return lambda members: ranked(seen[members], self.scores)


def _expect_scores(batch: Batch, policy: str) -> None:
    if batch.is_answered or not bool((batch.labels == UNSCORED).any()):
        return
    raise ValueError(
        f"policy is '{policy}' and the task has rows without a right answer of their own, such as "
        "captions, whose loss hangs on what else is in the batch: choose 'reservoir', 'herding', "
        "'k_centre' or 'information'"
    )


def _expect_numbers(samples: int, size: int, share: float, pool: int, instructions: int) -> None:
    if samples < 0 or size < 0 or samples + size == 0:
        raise ValueError(
            f"samples is {samples} and memory_bytes {size}: remember at least 1, or use Finetune"
        )
    if not 0 < share < 1:
        raise ValueError(
            f"share is {share}, expected more than 0 and less than 1: "
            "it is the part of each batch that old samples take"
        )
    for name, count in (("pool", pool), ("instructions", instructions)):
        if count < 1:
            raise ValueError(f"{name} is {count}, expected 1 or more: it counts rows of a task")


def _expect_words(policy: str, keep: str, allocation: str, scores: str | None) -> None:
    if keep not in ("references", "copies"):
        raise ValueError(
            f"keep is '{keep}': choose 'references' or 'copies'; with 'none' old samples are given "
            "up, so use a strategy that stores rows (FeatureReplay, DarkReplay) or no replay"
        )
    for name, word, known in (("policy", policy, Policy), ("allocation", allocation, Allocation)):
        if word not in get_args(known):
            raise ValueError(f"{name} is '{word}': choose one of {', '.join(get_args(known))}")
    if scores is not None and (policy not in _SCORES or scores not in get_args(Scores)):
        raise ValueError(
            f"scores is '{scores}' and policy '{policy}': 'high', 'low' or 'spread' goes with "
            f"{sorted(_SCORES)}, leave it out otherwise"
        )
