"""FeatureReplay: freeze the image tower and rehearse its stored outputs instead of pictures.

Paper: Pellegrini et al. 2020, Latent Replay for Real-Time Continual Learning, arXiv:1912.01100.
Code followed: none; the replay layer is the tower's output, the natural cut of a CLIP or LLaVA.
Where we differ: the tower is frozen from the start instead of slowed, so stored rows never age;
the memory is a uniform sample of everything seen, not h slots replaced per task; no CWR head.
Stored in product-quantised form as in REMIND, Hayes et al. 2020, arXiv:1910.02509, but for the
length of a token, which is kept apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmcl.core import UNSCORED, Batch, Modality, Output, Strategy, Task, device_of, require
from mmcl.core.model import VLM
from mmcl.core.randomness import generator
from mmcl.memory import RowFiles, Rows, fill_file, fill_rows, global_rows, own_stride
from mmcl.memory.codebook import Codebook
from mmcl.memory.drift import Probes
from mmcl.memory.encoding import picture_features
from mmcl.ops.packing import PACKED, STORES, Store, from_bytes, levelled, pack, unpack
from mmcl.ops.product_quantisation import expect_parts, learn_centroids

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
        memory_bytes: bytes of rows remembered, and of the codebook of "pq"; 0 = not bounded by
            bytes; for place "memory" only.
        store: "float16"; "int8" with a float16 scale for each of the N tokens, which is off by
            half a 127th of the token's largest number at most; or "pq", product-quantised: each
            token is cut into ``subvectors`` parts of one byte, the number of the nearest of 256
            centroids, which are learned from the first task and then stay. That task is read twice,
            and has to show what later ones are like: after a narrow one "int8" remembers better.
        place: "memory" holds features in main memory and in every checkpoint. "disk" writes them
            to one file a task, which checkpoints name by sha256; a file that no remembered row
            needs goes at the first step of the next task.
        folder: of the files, one for each run; None = the run's ``memory/``. On several nodes a
            folder that all of them see.
        subvectors: parts of a token with "pq"; divides the width of features.
        drift_probes: pictures of the first task that are encoded again at the end of every task and
            after a checkpoint was loaded, to see that features still hold (``drift``); 0 = none.

    **Remembers** per row 2 bytes per feature number (float16; 1 for int8, and 2 for each token;
    ``subvectors`` + 2 for each token with pq, and a codebook of 1024 bytes per feature number), 16
    bytes for label and task, 16 of marks, and 9 per text token of captions, 17 of answers. On disk
    the features are in files, 16 bytes a row name their places, and a task's file stays whole
    while one of its rows is remembered. A probe is a picture and 16 of its tokens, in float32 and
    as stored. **Asks of the model** ``encode``, ``freeze``, and ``fingerprint`` if it has one: rows
    of another encoder are refused.
    """

    def __init__(
        self,
        samples: int = 1000,
        share: float = 0.5,
        modality: Modality = "image",
        seed: int = 0,
        memory_bytes: int = 0,
        store: Store = "float16",
        place: Literal["memory", "disk"] = "memory",
        folder: str | None = None,
        subvectors: int = 32,
        drift_probes: int = 32,
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
        if store not in STORES or place not in ("memory", "disk"):
            raise ValueError(
                f"store is '{store}' and place '{place}': choose 'float16', 'int8' or 'pq', and "
                "'memory' or 'disk'"
            )
        if place == "disk" and memory_bytes:
            raise ValueError(
                f"memory_bytes is {memory_bytes} and place 'disk': bound rows on disk by samples"
            )
        self.share = share
        self.seed = seed
        self.store = store
        self.subvectors = subvectors
        self.memory_bytes = memory_bytes
        self.memory = Rows(samples, capacity_bytes=memory_bytes, seed=seed, growing=_GROWING)
        self.files = RowFiles() if place == "disk" else None
        self._has_own_folder = folder is not None
        if self.files is not None and folder is not None:
            self.files.folder = Path(folder)
        self.codebook = Codebook(seed)
        self.probes = Probes(drift_probes, seed)
        self._steps = self._steps_here = 0
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
        if self.files is not None and not self._steps_here:
            self.files.expect_writable()
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
        self._steps_here += 1
        if self.probes.is_due:
            self._look(model)
        if self.files is not None:
            # What took their place was saved when the last task ended.
            self.files.sweep()

    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Store features of a uniform sample of everything seen so far."""
        device = device_of(model)
        if self.store == "pq":
            self._learn_codebook(model, task, batches, device)
        if self.memory_bytes:
            self.memory.capacity_bytes = self.codebook.rest_of(self.memory_bytes)
        batches = self.probes.watched(batches, task.index)

        def columns(batch: Batch) -> dict[str, Tensor]:
            batch = self._encoded(model, batch)
            return {**_plain_columns(batch), **self._pack(_features_of(batch))}

        if self.files is None:
            fill_rows(self.memory, batches, task.index, columns, device)
        else:
            fill_file(self.files, self.memory, batches, task.index, columns, PACKED, device)
        self.probes.settle(device, lambda images: self._seen(model, images), self._pack)
        self._look(model)

    @property
    def drift(self) -> Mapping[str, float]:
        """How far features of the probes were from those stored when last looked at.

        ``relative_l2`` and ``cosine`` compare exact features, ``stored_relative_l2`` and
        ``stored_cosine`` those that are replayed; empty before the first look.
        """
        return dict(self.probes.seen)

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
        self.probes.is_due = True

    def _learn_codebook(
        self, model: VLM, task: Task, batches: Iterable[Batch], device: torch.device
    ) -> None:
        def tokens(batch: Batch) -> Tensor:
            return levelled(_features_of(self._encoded(model, batch)))[0]

        def learn(vectors: Tensor) -> Tensor:
            return learn_centroids(vectors, self.subvectors, seed=self.seed)

        self.codebook.learn(batches, task.index, tokens, learn, device)

    def _look(self, model: VLM) -> None:
        self.probes.look(device_of(model), lambda images: self._seen(model, images), self._unpack)

    def _encoded(self, model: VLM, batch: Batch) -> Batch:
        if batch.features is None:
            encode = require(model, "encode", by=self).encode
            features = picture_features(encode, batch, self._shape)
            batch = replace(batch, features=features, images=None, owner=None)
        if batch.features is not None:
            self._shape = tuple(batch.features.shape[1:])
            if self.store == "pq":
                width = self._shape[-1]
                expect_parts(width, self.subvectors)
                self.codebook.rest_of(self.memory_bytes or 1 << 62, width)
        return batch

    @torch.no_grad()
    def _seen(self, model: VLM, images: Tensor) -> Tensor:
        """Return (P, N, D) of pictures (P, 3, H, W) alone."""
        labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        found: Tensor = require(model, "encode", by=self).encode(Batch(images, labels, labels))
        return found

    def _pack(self, features: Tensor) -> dict[str, Tensor]:
        return pack(features, self.store, self.codebook.centroids)

    def _unpack(self, columns: Mapping[str, Tensor]) -> Tensor:
        return unpack(columns, self.codebook.centroids)

    def _remembered(self, rows: Mapping[str, Tensor], batch: Batch) -> Batch:
        """Return remembered rows as a batch beside which ``batch`` can stand."""
        if self.files is not None and self._shape is not None:
            stored = self.files.take(rows["file"], rows["slot"])
            rows = {**rows, **from_bytes(stored, self._shape, self.store, self.subvectors)}
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
        packed = {name: rows[name].to(device) for name in PACKED if name in rows}
        return replace(remembered, features=self._unpack(packed))


def _features_of(batch: Batch) -> Tensor:
    if batch.features is None:
        raise ValueError("FeatureReplay has no features to store: model.encode gave none")
    return batch.features


def _plain_columns(batch: Batch) -> dict[str, Tensor]:
    columns = {"labels": batch.labels, "task": batch.task}
    if batch.tokens is not None:
        is_real = batch.mask
        columns["tokens"] = batch.tokens
        columns["mask"] = torch.ones_like(batch.tokens).bool() if is_real is None else is_real
    return columns
