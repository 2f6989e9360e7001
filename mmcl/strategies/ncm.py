"""NCM classifies by the nearest class mean (prototype) of frozen image features.

Paper: Zhou et al. 2023, arXiv:2303.07338. There called SimpleCIL.
Code followed: none; written from the equations.
Differs: features have length 1 before they are averaged, as CLIP compares directions; the mean is
kept as a sum and a count, so tasks and processes may come in any order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mmcl.core import VLM, Batch, Output, Strategy, Task, require, require_classes
from mmcl.core.distributed import all_reduce_sum
from mmcl.memory.snapshot import Snapshot
from mmcl.ops.prototypes import class_sums, cosine_scores


class NCM(Strategy):
    """Nearest class mean (prototype) classifier on a frozen encoder.

    Replaces the class scores by ``scale`` times the cosine similarity with class means. A class
    without samples scores -inf. The model's own scores stay before the first task's end, for
    samples with captions, and where there are fewer scores than known classes (an evaluation task
    with its own classes).

    Args:
        scale: factor of the cosine, for probabilities; the best class does not depend on it.

    **Remembers** D float64 numbers and one count for each class, D the embedding dim.

    **Asks of the model** ``embed`` and ``freeze``, and class scores: one that answers in words is
    refused. It freezes both towers.
    """

    def __init__(self, scale: float = 100.0) -> None:
        super().__init__()
        if scale <= 0:
            raise ValueError(f"scale is {scale}, expected more than 0: CLIP's own is 100")
        self.scale = scale
        self.means = Snapshot()

    def attach(self, model: VLM) -> None:
        """Freeze both towers: old class means hold only while features stay as they are."""
        require_classes(model, by=self, instead="LoRA or ExperienceReplay")
        require(model, "embed", "freeze", by=self).freeze("image", "text")

    def transform_output(self, model: VLM, batch: Batch, output: Output) -> Output:
        """Replace the scores by cosine similarity with class means."""
        if self.means.is_empty or batch.input_ids is not None:
            return output
        sums, counts = self.means.get("sums"), self.means.get("counts")
        missing = output.logits.shape[1] - len(counts)
        if missing < 0 or not len(counts):
            return output
        features = require(model, "embed", by=self).embed(batch, "image")
        scores = self.scale * cosine_scores(features, sums, counts)
        scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
        # Not in half precision, which would make classes tie.
        wide = torch.promote_types(output.logits.dtype, torch.float32)
        return replace(output, logits=scores.to(wide))

    @torch.no_grad()
    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Add the task's features to the class sums."""
        old = self.means.tensors
        classes = max(max(task.class_ids, default=-1) + 1, len(old["counts"]) if old else 0)
        sums: Tensor | None = None
        for batch in batches:
            features = require(model, "embed", by=self).embed(batch, "image")
            own = class_sums(features, batch.labels, classes)
            if sums is None:
                sums, counts = own
            else:
                sums, counts = sums + own[0], counts + own[1]
        if sums is None:
            raise RuntimeError(
                f"NCM saw no samples of task '{task.name}' on this process: give end_task the "
                "task's training batches, or use fewer processes"
            )
        sums, counts = all_reduce_sum(sums), all_reduce_sum(counts)
        if old:
            sums[: len(old["sums"])] += old["sums"]
            counts[: len(old["counts"])] += old["counts"]
        self.means.take({"sums": sums, "counts": counts})

    def buffer_sizes(self) -> Mapping[str, int]:
        """Return the number of classes with a mean."""
        counts = self.means.tensors.get("counts")
        return {"means": 0 if counts is None else int((counts > 0).sum())}
