"""ExperienceReplay: mix a few old samples, decoded and augmented afresh, into every batch.

Paper: Chaudhry et al. 2019, On Tiny Episodic Memories in Continual Learning, arXiv:1902.10486.
Code followed: none; the method is a sampling rule, stated in the paper's algorithm 1.
Where we differ: the memory changes when a task ends, not at every step, and is chosen by hash: the
same uniform sample with no generator to save; old rows take an exact share of the global batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mmcl.core import UNSCORED, Batch, Recall, Strategy, Task, device_of
from mmcl.core.distributed import gather_rows
from mmcl.core.model import VLM
from mmcl.core.recall import Keep
from mmcl.memory import References, pass_numbers
from mmcl.memory.references import Policy


class ExperienceReplay(Strategy):
    """Remember which old samples to read again.

    The loader realises ``recall()``. A loop of the user's own must do so too when it builds a
    task's loader; samples are numbered as its batches number them (``Batch.sample``), or by their
    place in the pass that ``end_task`` is given (row i of rank r is sample i * W + r).

    Args:
        samples: samples remembered over all tasks, at least 1.
        share: part of every global batch that old samples take, above 0 and below 1.
        policy: "reservoir" = a uniform sample of everything seen, "balanced" = equally many of
            every class (reads the labels in one pass over each task).
        keep: "references" reads old samples from their shards, "copies" writes them under the
            run's folder, for data that has to be let go.
        seed: of the choice.

    **Remembers** 24 bytes per sample (copies, if kept, are files). **Asks of the model** nothing.
    """

    def __init__(
        self,
        samples: int = 200,
        share: float = 0.5,
        policy: Policy = "reservoir",
        keep: Keep = "references",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if samples < 1:
            raise ValueError(f"samples is {samples}: remember at least 1, or use Finetune")
        if not 0 < share < 1:
            raise ValueError(
                f"share is {share}, expected more than 0 and less than 1: "
                "it is the part of each batch that old samples take"
            )
        if keep not in ("references", "copies"):
            raise ValueError(f"keep is '{keep}': choose 'references' or 'copies'")
        self.share = share
        self.keep = keep
        self.memory = References(samples, policy, seed)

    def recall(self) -> Recall | None:
        """Return the remembered samples and their share; None before the first task ended."""
        if not len(self.memory):
            return None
        return Recall(self.memory.task, self.memory.sample, self.share, self.keep)

    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Choose among everything seen so far and the samples of this task."""
        if self.memory.policy == "reservoir" and task.size:
            self.memory.offer(task.index, torch.arange(task.size))
            return
        numbers, labels = _read_pass(batches, labelled=self.memory.policy == "balanced")
        device = device_of(model)
        everyone = gather_rows(torch.stack([numbers, labels], 1).to(device)).cpu()
        self.memory.offer(task.index, everyone[:, 0], everyone[:, 1])

    def holdings(self) -> Mapping[str, int]:
        """Return how many samples are remembered."""
        return {"memory": len(self.memory)}


def _read_pass(batches: Iterable[Batch], *, labelled: bool) -> tuple[Tensor, Tensor]:
    """Return number and class of every sample of this rank's pass, (R,) int64 each."""
    numbers = [torch.zeros(0, dtype=torch.int64)]
    labels = [torch.zeros(0, dtype=torch.int64)]
    seen = 0
    for batch in batches:
        numbers.append(pass_numbers(batch, seen))
        seen += len(batch)
        if not labelled:
            labels.append(torch.full((len(batch),), -1))
            continue
        if batch.labels.dim() != 1 or bool((batch.labels == UNSCORED).any()):
            raise ValueError(
                "policy is 'balanced' and the task has samples without a class: "
                "choose policy='reservoir' for captions and answers"
            )
        labels.append(batch.labels.cpu())
    return torch.cat(numbers), torch.cat(labels)
