"""FeatureReplay: freeze the image tower and rehearse its stored outputs instead of pictures.

Paper: Pellegrini et al. 2020, Latent Replay for Real-Time Continual Learning, arXiv:1912.01100.
Code followed: none; the replay layer is the tower's output, the natural cut of a CLIP or LLaVA.
Where we differ: the tower is frozen from the start instead of slowed, so stored rows never age;
the memory is a uniform sample of everything seen, not h slots replaced per task; no CWR head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from mmcl.core import UNSCORED, Batch, Modality, Output, Strategy, Task, device_of, require
from mmcl.core.model import VLM
from mmcl.core.randomness import generator
from mmcl.memory import RowFiles, Rows, fill_rows, global_rows, own_stride
from mmcl.ops.rounding import from_int8, to_int8

_GROWING = {"tokens": 0, "mask": 0, "labels": UNSCORED}


class FeatureReplay(Strategy):
    """Train what stands behind a frozen image tower on new and remembered features.

    Features are of the un-augmented picture: the pooled or projected tokens of a CLIP, what enters
    the projector of a LLaVA. Prompts for the image tower contradict this method: a batch of
    features does not pass it. Rows without a picture (text alone, in a stream of answers) have
    features of zeros, which no token of theirs asks for; rows with several are refused.

    Args:
        samples: rows remembered, 0 = not bounded by rows.
        share: part of every global batch, remembered rows included, that they take; between 0
            and 1. A memory smaller than that is gone through more than once.
        modality: "image"; nothing is gained by storing the text tower's output, which is computed
            once per class and not once per row.
        seed: of choice and draws.
        memory_bytes: bytes remembered, 0 = not bounded by bytes; for place "memory" only.
        store: "float16", or "int8" with a float16 scale for each of the N tokens, which is off by
            half a 127th of the token's largest number at most.
        place: "memory" holds features in main memory and in every checkpoint. "disk" writes them
            to one file a task, which checkpoints name by sha256; a file that no remembered row
            needs goes at the first step of the next task.
        folder: of the files, one for each run; None = the run's ``memory/``.

    **Remembers** per row 2 bytes per feature number (float16; 1 for int8, and 2 for each token), 16
    bytes for label and task, 16 of marks, and 9 per text token of captions, 17 of answers. On disk
    the features are in files, 16 bytes a row name their places, and a task's file stays whole
    while one of its rows is remembered. **Asks of the model** ``encode``, ``freeze``, and
    ``fingerprint`` if it has one: rows of another encoder are refused.
    """

    def __init__(
        self,
        samples: int = 1000,
        share: float = 0.5,
        modality: Modality = "image",
        seed: int = 0,
        memory_bytes: int = 0,
        store: Literal["float16", "int8"] = "float16",
        place: Literal["memory", "disk"] = "memory",
        folder: str | None = None,
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
        if store not in ("float16", "int8") or place not in ("memory", "disk"):
            raise ValueError(
                f"store is '{store}' and place '{place}': choose 'float16' or 'int8', and "
                "'memory' or 'disk'"
            )
        if place == "disk" and memory_bytes:
            raise ValueError(
                f"memory_bytes is {memory_bytes} and place 'disk': bound rows on disk by samples"
            )
        self.share = share
        self.seed = seed
        self.store = store
        self.memory = Rows(samples, capacity_bytes=memory_bytes, seed=seed, growing=_GROWING)
        self.files = RowFiles() if place == "disk" else None
        self._has_own_folder = folder is not None
        if self.files is not None and folder is not None:
            self.files.folder = Path(folder)
        self._steps = 0
        self._shape: tuple[int, ...] | None = None

    def attach(self, model: VLM) -> None:
        """Freeze the image tower and note which it is."""
        able = require(model, "encode", "freeze", by=self)
        able.freeze("image")
        self.memory.bind(able.fingerprint() if hasattr(model, "fingerprint") else "")

    def keep_in(self, folder: Path) -> None:
        """Take a folder, unless one was given."""
        if self.files is not None and not self._has_own_folder:
            self.files.folder = folder / "features"

    def replay(self, model: VLM, batch: Batch) -> Batch:
        """Return the batch as features, with remembered rows behind.

        From the first step, when nothing is remembered yet: what contradicts features is to fail
        in the first task, not in the second.
        """
        if self.files is not None:
            self.files.place()
        if batch.images is not None or self._shape is not None:
            batch = self._encoded(model, batch)
        if not len(self.memory):
            return batch
        device = batch.labels.device
        new = global_rows(len(batch), device)
        count = max(1, round(self.share / (1 - self.share) * new))
        places = self.memory.choose(count, generator(self.seed, self._steps))
        rows = self.memory.take(own_stride(places))
        joined = batch.join(self._remembered(rows, batch))
        # Ranks may have joined one row more or less: keep the mean over ranks the global mean.
        weight = batch.weight * (len(joined) / len(batch)) * (new / (new + count))
        return replace(joined, weight=weight)

    def observe(self, model: VLM, batch: Batch, output: Output) -> None:
        """Count the step, so that the next draw is another; remove files that are not needed."""
        self._steps += 1
        if self.files is not None:
            # What took their place was saved when the last task ended.
            self.files.sweep()

    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Store features of a uniform sample of everything seen so far."""
        device = device_of(model)

        def columns(batch: Batch) -> dict[str, Tensor]:
            batch = self._encoded(model, batch)
            return {**_plain_columns(batch), **self._packed(batch)}

        if self.files is None:
            fill_rows(self.memory, batches, task.index, columns, device)
            return
        group = 1 + max(self.files.groups, default=-1)
        with self.files.spool() as spool:

            def places(batch: Batch) -> dict[str, Tensor]:
                batch = self._encoded(model, batch)
                slots = spool.add(_as_bytes(self._packed(batch)))
                named = {"file": torch.full_like(slots, group), "slot": slots}
                return {**_plain_columns(batch), **named}

            fill_rows(self.memory, batches, task.index, places, device)
            held = self.memory.columns
            is_new = held["file"] == group
            self.files.settle(group, held["slot"][is_new], device)
        self.memory.put("slot", torch.where(is_new, is_new.cumsum(0) - 1, held["slot"]))
        for unused in set(self.files.groups) - set(held["file"].tolist()):
            self.files.let_go(unused)

    def holdings(self) -> Mapping[str, int]:
        """Return how many rows are remembered."""
        return {"memory": len(self.memory)}

    def get_extra_state(self) -> dict[str, Any]:
        """Return the number of steps done, which seeds the draws, and N and D of a row."""
        return {"steps": self._steps, "shape": list(self._shape or ())}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take the number of steps of a checkpoint."""
        self._steps = int(state["steps"])
        self._shape = tuple(int(size) for size in state.get("shape", ())) or None

    def _encoded(self, model: VLM, batch: Batch) -> Batch:
        if batch.features is None:
            batch = replace(batch, features=self._features(model, batch), images=None, owner=None)
        if batch.features is not None:
            self._shape = tuple(batch.features.shape[1:])
        return batch

    @torch.no_grad()
    def _features(self, model: VLM, batch: Batch) -> Tensor:
        """Return (B, N, D), zeros for a row without a picture."""
        rows, device = len(batch), batch.labels.device
        if batch.images is None:
            if self._shape is None:
                raise ValueError(
                    f"FeatureReplay was given {rows} rows without a picture before any with one: "
                    "let the first task show pictures, or use ExperienceReplay"
                )
            return torch.zeros(rows, *self._shape, device=device)
        encode = require(model, "encode", by=self).encode
        if batch.owner is None:
            return cast(Tensor, encode(batch))
        if int(batch.owner.bincount(minlength=rows).max()) > 1:
            raise ValueError(
                "FeatureReplay was given rows with several pictures and remembers one for each "
                "row: use ExperienceReplay for such data"
            )
        seen: Tensor = encode(batch.take(batch.owner))
        return seen.new_zeros(rows, *seen.shape[1:]).index_copy(0, batch.owner, seen)

    def _packed(self, batch: Batch) -> dict[str, Tensor]:
        if batch.features is None:
            raise ValueError("FeatureReplay has no features to store: model.encode gave none")
        if self.store == "float16":
            return {"features": batch.features.to(torch.float16)}
        rounded, scale = to_int8(batch.features)
        return {"features": rounded, "scale": scale}

    def _remembered(self, rows: Mapping[str, Tensor], batch: Batch) -> Batch:
        """Return remembered rows as a batch beside which ``batch`` can stand."""
        if self.files is not None and self._shape is not None:
            stored = self.files.take(rows["file"], rows["slot"])
            rows = {**rows, **_from_bytes(stored, self._shape, self.store)}
        device, count = batch.labels.device, len(rows["labels"])
        remembered = Batch(
            images=None,
            labels=rows["labels"],
            task=rows["task"],
            tokens=rows.get("tokens"),
            mask=rows.get("mask"),
            recalled=torch.ones(count, dtype=torch.bool),
            keys=("",) * count if batch.keys else (),
        ).to(device)
        features = rows["features"].to(device)
        if "scale" in rows:
            return replace(remembered, features=from_int8(features, rows["scale"].to(device)))
        return replace(remembered, features=features.to(torch.float32))


def _plain_columns(batch: Batch) -> dict[str, Tensor]:
    columns = {"labels": batch.labels, "task": batch.task}
    if batch.tokens is not None:
        is_real = batch.mask
        columns["tokens"] = batch.tokens
        columns["mask"] = torch.ones_like(batch.tokens).bool() if is_real is None else is_real
    return columns


def _as_bytes(packed: Mapping[str, Tensor]) -> Tensor:
    """Return (R, bytes of a row) uint8: features, then scales."""
    parts = [column.contiguous().flatten(1).view(torch.uint8) for column in packed.values()]
    return torch.cat(parts, 1)


def _from_bytes(rows: Tensor, shape: tuple[int, ...], store: str) -> dict[str, Tensor]:
    """Return the columns that ``_as_bytes`` was given, of features (N, D)."""
    count, numbers = len(rows), prod(shape)
    if store == "float16":
        return {"features": rows.view(torch.float16).view(count, *shape)}
    features = rows[:, :numbers].contiguous().view(torch.int8).view(count, *shape)
    scale = rows[:, numbers:].contiguous().view(torch.float16)
    return {"features": features, "scale": scale.view(count, *shape[:-1])}
