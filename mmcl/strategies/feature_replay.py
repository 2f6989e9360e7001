"""FeatureReplay: freeze the image tower and rehearse its stored outputs instead of pictures.

Paper: Pellegrini et al. 2020, Latent Replay for Real-Time Continual Learning, arXiv:1912.01100.
Code followed: none; the replay layer is the tower's output, the natural cut of a CLIP or LLaVA.
Where we differ: the tower is frozen from the start instead of slowed, so stored rows never age;
the memory is a uniform sample of everything seen, not h slots replaced per task; no CWR head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmcl.core import Batch, Modality, Output, Strategy, Task, device_of, require
from mmcl.core.model import VLM
from mmcl.core.randomness import generator
from mmcl.memory import Rows, fill_rows, global_rows, own_stride

_TEXT = ("tokens", "mask")


class FeatureReplay(Strategy):
    """Train what stands behind a frozen image tower on new and remembered features.

    Features are of the un-augmented picture. Prompts for the image tower contradict this method:
    a batch of features does not pass it.

    Args:
        samples: rows remembered, 0 = not bounded by rows.
        share: part of every global batch, remembered rows included, that they take; between 0
            and 1. A memory smaller than that is gone through more than once.
        modality: "image"; nothing is gained by storing the text tower's output, which is computed
            once per class and not once per row.
        seed: of choice and draws.
        memory_bytes: bytes remembered, 0 = not bounded by bytes.

    **Remembers** per row 2 bytes per feature number (float16), 16 bytes for label and task, 16 of
    marks, and 9 per text token of captions. **Asks of the model** ``encode``, ``freeze``, and
    ``fingerprint`` if it has one: rows of another encoder are refused.
    """

    def __init__(
        self,
        samples: int = 1000,
        share: float = 0.5,
        modality: Modality = "image",
        seed: int = 0,
        memory_bytes: int = 0,
    ) -> None:
        super().__init__()
        if modality != "image":
            raise ValueError(
                f"modality is '{modality}': only 'image' features can be replayed, since the text "
                "tower is run once per class and not once per row"
            )
        if not 0 < share < 1:
            raise ValueError(
                f"share is {share}, expected more than 0 and less than 1: "
                "it is the part of each batch that remembered rows take"
            )
        self.share = share
        self.seed = seed
        self.memory = Rows(samples, capacity_bytes=memory_bytes, seed=seed, growing=_TEXT)
        self._steps = 0

    def attach(self, model: VLM) -> None:
        """Freeze the image tower and note which it is."""
        able = require(model, "encode", "freeze", by=self)
        able.freeze("image")
        self.memory.bind(able.fingerprint() if hasattr(model, "fingerprint") else "")

    def replay(self, model: VLM, batch: Batch) -> Batch:
        """Return the batch as features, with remembered rows behind.

        From the first step, when nothing is remembered yet: what contradicts features is to fail
        in the first task, not in the second.
        """
        batch = self._encoded(model, batch)
        if not len(self.memory):
            return batch
        device = batch.labels.device
        new = global_rows(len(batch), device)
        count = max(1, round(self.share / (1 - self.share) * new))
        places = self.memory.choose(count, generator(self.seed, self._steps))
        rows = self.memory.take(own_stride(places))
        joined = batch.join(_batch_of(rows, batch))
        # Ranks may have joined one row more or less: keep the mean over ranks the global mean.
        weight = batch.weight * (len(joined) / len(batch)) * (new / (new + count))
        return replace(joined, weight=weight)

    def observe(self, model: VLM, batch: Batch, output: Output) -> None:
        """Count the step, so that the next draw is another."""
        self._steps += 1

    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Store features of a uniform sample of everything seen so far."""

        def columns(batch: Batch) -> dict[str, Tensor]:
            return _columns_of(self._encoded(model, batch))

        fill_rows(self.memory, batches, task.index, columns, device_of(model))

    def holdings(self) -> Mapping[str, int]:
        """Return how many rows are remembered."""
        return {"memory": len(self.memory)}

    def get_extra_state(self) -> dict[str, Any]:
        """Return the number of steps done, which seeds the draws."""
        return {"steps": self._steps}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take the number of steps of a checkpoint."""
        self._steps = int(state["steps"])

    def _encoded(self, model: VLM, batch: Batch) -> Batch:
        if batch.features is not None:
            return batch
        with torch.no_grad():
            features = require(model, "encode", by=self).encode(batch).detach()
        return replace(batch, images=None, owner=None, features=features)


def _columns_of(batch: Batch) -> dict[str, Tensor]:
    columns = {"labels": batch.labels, "task": batch.task}
    if batch.features is not None:
        columns["features"] = batch.features.to(torch.float16)
    if batch.tokens is not None:
        is_real = batch.mask
        columns["tokens"] = batch.tokens
        columns["mask"] = torch.ones_like(batch.tokens).bool() if is_real is None else is_real
    return columns


def _batch_of(rows: Mapping[str, Tensor], batch: Batch) -> Batch:
    """Return remembered rows as a batch beside which ``batch`` can stand."""
    count = len(rows["labels"])
    remembered = Batch(
        images=None,
        labels=rows["labels"],
        task=rows["task"],
        tokens=rows.get("tokens"),
        mask=rows.get("mask"),
        recalled=torch.ones(count, dtype=torch.bool),
        keys=("",) * count if batch.keys else (),
    )
    device = batch.labels.device
    features = rows["features"].to(device).to(torch.float32)
    return replace(remembered.to(device), features=features)
