"""Latent replay freezes the image tower and replays a buffer of its stored features.

Paper: Pellegrini et al. 2020, arXiv:1912.01100.
Code followed: none; the replay layer is the tower's output, the natural cut of a CLIP or LLaVA.
Differs: the tower is frozen from the start instead of slowed, so stored features stay valid; the
buffer is a uniform sample of everything seen, not h slots replaced per task; no CWR head.
Product quantization is that of REMIND, Hayes et al. 2020, arXiv:1910.02509, but the norm of a token
is stored separately.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmcl.core import Batch, Modality, Output, Strategy, Task, device_of, require
from mmcl.core.distributed import rank_and_world
from mmcl.core.model import VLM, is_generative_model
from mmcl.core.seeding import generator
from mmcl.memory import MmapStore, TensorBuffer
from mmcl.memory.disk_buffer import fill_disk_buffer
from mmcl.memory.distributed_fill import (
    TOKEN_PADDING,
    batch_columns,
    fill_buffer,
    global_count,
    rank_stride,
    replayed_batch,
)
from mmcl.memory.stored_features import Codebook, DriftMonitor, image_features
from mmcl.ops.feature_quantization import (
    COMPRESSIONS,
    PACKED,
    Compression,
    expect_subvectors,
    fit_centroids,
    from_bytes,
    pack,
    rms_normalize,
    unpack,
)


class FeatureReplay(Strategy):
    """Latent replay: train the layers behind a frozen image tower on new and stored features.

    Features are those of the image without augmentation: the pooled or projected tokens of a CLIP,
    the projector's input of a LLaVA. Prompts for the image tower contradict this method: a batch of
    features does not pass through it. Samples without an image (text alone, in a stream of answers)
    have features of zeros, which none of their tokens uses; samples with several are refused.

    Args:
        buffer_size: samples held, 0 = not bounded by samples.
        replay_ratio: fraction of replayed samples in every global batch, between 0 and 1. A buffer
            smaller than that is replayed more than once per step.
        modality: "image"; nothing is gained by storing the text tower's output, which is computed
            once per class and not once per sample.
        seed: seed of selection and draws.
        buffer_bytes: buffer size in bytes, with the codebook of "pq"; 0 = not bounded by bytes; for
            storage "memory" only.
        compression: "float16"; "int8" with a float16 scale for each of the N tokens, with an error
            of at most half a 127th of the token's largest number; or "pq", product quantization:
            each token is cut into ``subvectors`` of one byte, the index of the nearest of 256
            centroids, which are fitted to the first task and then fixed. That task is read twice,
            and should be representative of later ones: after a narrow one "int8" is more accurate.
        storage: "memory" holds features in main memory and in every checkpoint. "disk" writes them
            to one file per task, which checkpoints name by sha256; a file that no stored sample
            needs is deleted at the first step of the next task.
        storage_dir: folder of the files, one for each run; None = the run's ``memory/``. On several
            nodes a folder that all of them share.
        subvectors: pieces of a token with "pq"; their number divides the dim of features.
        drift_images: images of the first task that are encoded again at the end of every task and
            after a checkpoint was loaded, to measure the drift of features (``drift``); 0 = none.

    **Remembers** per sample 2 bytes per feature number (float16; 1 for int8, and 2 for each token;
    ``subvectors`` + 2 for each token with pq, and a codebook of 1024 bytes per feature number), 16
    bytes for label and task, 16 for priority and group, and 9 per text token of captions, 17 of
    answers. On disk the features are in files, 16 bytes per sample locate them, and a task's file
    stays whole while one of its samples is stored. For drift, an image and 16 of its tokens, in
    float32 and as stored. **Asks of the model** ``encode_image``, ``freeze``, and ``fingerprint``
    if it has one: features of another encoder are refused.
    """

    def __init__(
        self,
        buffer_size: int = 1000,
        replay_ratio: float = 0.5,
        modality: Modality = "image",
        seed: int = 0,
        buffer_bytes: int = 0,
        compression: Compression = "float16",
        storage: Literal["memory", "disk"] = "memory",
        storage_dir: str | None = None,
        subvectors: int = 32,
        drift_images: int = 32,
    ) -> None:
        super().__init__()
        if modality != "image":
            raise ValueError(
                f"modality is '{modality}': only 'image' features can be replayed, since the text "
                "tower is run once per class and not once per sample"
            )
        if not 0 < replay_ratio < 1:
            raise ValueError(
                f"replay_ratio is {replay_ratio}, expected more than 0 and less than 1: "
                "it is the fraction of replayed samples in each batch"
            )
        if compression not in COMPRESSIONS or storage not in ("memory", "disk"):
            raise ValueError(
                f"compression is '{compression}' and storage '{storage}': choose a compression of "
                "'float16', 'int8', 'pq' and a storage of 'memory', 'disk'"
            )
        if storage == "disk" and buffer_bytes:
            raise ValueError(
                f"buffer_bytes is {buffer_bytes} and storage 'disk': bound the buffer by samples"
            )
        self.replay_ratio, self.seed, self.buffer_bytes = replay_ratio, seed, buffer_bytes
        self.compression: Compression = compression
        self.subvectors = subvectors
        self.memory = TensorBuffer(
            buffer_size, capacity_bytes=buffer_bytes, seed=seed, padded_columns=TOKEN_PADDING
        )
        self.files = MmapStore() if storage == "disk" else None
        self._has_own_dir = storage_dir is not None
        if self.files is not None and storage_dir is not None:
            self.files.directory = Path(storage_dir)
        self.codebook = Codebook(seed)
        self.drift_monitor = DriftMonitor(drift_images, seed)
        self._steps = self._steps_here = 0
        self._shape: tuple[int, ...] | None = None

    def attach(self, model: VLM) -> None:
        """Freeze the image tower and bind the buffer to its fingerprint."""
        able = require(model, "encode_image", "freeze", by=self)
        tower = able.parts().get("image", ()) if is_generative_model(model) else ()
        if any(parameter.requires_grad for parameter in tower):
            raise ValueError(
                "parameters of the image tower are trainable (by freeze of the model, or by an "
                "adapter in it), and FeatureReplay stores features of a frozen one: add 'image' to "
                "freeze and adapt other towers, or use ExperienceReplay"
            )
        able.freeze("image")
        self.memory.bind_encoder(able.fingerprint() if hasattr(model, "fingerprint") else "")

    def set_memory_dir(self, folder: Path) -> None:
        """Set the folder of the files, unless one was given."""
        if self.files is not None and not self._has_own_dir:
            self.files.directory = folder / "features"

    def extend_batch(self, model: VLM, batch: Batch) -> Batch:
        """Return the batch as features, with samples of the buffer behind.

        Features are used from the first step, when the buffer is empty, so that what contradicts
        them fails in the first task, not in the second.
        """
        if self.files is not None and not self._steps_here:
            self.files.expect_writable()
        if batch.images is not None or self._shape is not None:
            batch = self._encoded(model, batch)
        if not len(self.memory):
            return batch
        device, sizes = batch.labels.device, batch.global_batch
        if sizes is None:
            samples, in_loss, first, parts = (
                global_count(len(batch), device), global_count(batch.num_in_loss, device), 0, 1
            )  # fmt: skip
        else:
            samples, in_loss = sizes.samples, sizes.in_loss
            first, parts = sizes.micro_batch, sizes.micro_batches
        count = max(1, round(self.replay_ratio / (1 - self.replay_ratio) * samples))
        index = self.memory.sample_indices(count, generator(self.seed, self._steps))
        own = rank_stride(index, first, parts)
        joined = batch.join(self._replayed(self.memory.get(own), batch))
        if sizes is not None:
            sizes = replace(sizes, samples=samples + count, in_loss=in_loss + count)
        # Parts may have joined one sample more or less: keep their mean that of the global batch.
        weight = joined.num_in_loss * rank_and_world()[1] * parts / (in_loss + count)
        return replace(joined, loss_weight=weight, global_batch=sizes)

    def after_step(self, model: VLM, batch: Batch, output: Output) -> None:
        """Count the step, so that the next draw differs; delete files that are not needed."""
        sizes = batch.global_batch
        # All micro-batches of a global batch share one draw.
        self._steps += sizes is None or sizes.micro_batch == sizes.micro_batches - 1
        self._steps_here += 1
        if self.drift_monitor.is_due:
            self._measure_drift(model)
        if self.files is not None:
            # A checkpoint without them was saved when the last task ended.
            self.files.delete_unused()

    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Store features of a uniform sample of everything seen so far."""
        device = device_of(model)
        if self.compression == "pq":
            self._fit_codebook(model, task, batches, device)
        if self.buffer_bytes:
            self.memory.capacity_bytes = self.codebook.remaining_bytes(self.buffer_bytes)
        batches = self.drift_monitor.sample_from(batches, task.index)

        def columns(batch: Batch) -> dict[str, Tensor]:
            batch = self._encoded(model, batch)
            return {**batch_columns(batch), **self._pack(_features_of(batch))}

        if self.files is None:
            fill_buffer(self.memory, batches, task.index, columns, device)
        else:
            fill_disk_buffer(self.files, self.memory, batches, task.index, columns, PACKED, device)
        self.drift_monitor.commit(device, partial(self._encode_images, model), self._pack)
        self._measure_drift(model)

    @property
    def drift(self) -> Mapping[str, float]:
        """Drift of the features of the monitored images at the last measurement.

        ``relative_l2`` and ``cosine`` compare exact features, ``stored_relative_l2`` and
        ``stored_cosine`` those that are replayed; empty before the first measurement.
        """
        return dict(self.drift_monitor.last_measurement)

    def buffer_sizes(self) -> Mapping[str, int]:
        """Return the number of samples in the buffer."""
        return {"memory": len(self.memory)}

    def get_extra_state(self) -> dict[str, Any]:
        """Return the number of steps, which seeds the draws, and N and D of a sample."""
        return {"steps": self._steps, "shape": list(self._shape or ())}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Load the number of steps of a checkpoint."""
        self._steps = int(state["steps"])
        self._shape = tuple(int(size) for size in state.get("shape", ())) or None
        self.drift_monitor.is_due = True

    def _fit_codebook(
        self, model: VLM, task: Task, batches: Iterable[Batch], device: torch.device
    ) -> None:
        def tokens(batch: Batch) -> Tensor:
            return rms_normalize(_features_of(self._encoded(model, batch)))[0]

        def compute(vectors: Tensor) -> Tensor:
            return fit_centroids(vectors, self.subvectors, seed=self.seed)

        self.codebook.fit(batches, task.index, tokens, compute, device)

    def _measure_drift(self, model: VLM) -> None:
        encode = partial(self._encode_images, model)
        self.drift_monitor.measure(device_of(model), encode, self._unpack)

    def _encoded(self, model: VLM, batch: Batch) -> Batch:
        if batch.features is None:
            encode = require(model, "encode_image", by=self).encode_image
            features = image_features(encode, batch, self._shape)
            batch = replace(batch, features=features, images=None, image_owner=None)
        if batch.features is not None:
            self._shape = tuple(batch.features.shape[1:])
            if self.compression == "pq":
                dim = self._shape[-1]
                expect_subvectors(dim, self.subvectors)
                self.codebook.remaining_bytes(self.buffer_bytes or 1 << 62, dim)
        return batch

    @torch.no_grad()
    def _encode_images(self, model: VLM, images: Tensor) -> Tensor:
        """Return the features (P, N, D) of images (P, 3, H, W)."""
        labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        able = require(model, "encode_image", by=self)
        found: Tensor = able.encode_image(Batch(images, labels, labels))
        return found

    def _pack(self, features: Tensor) -> dict[str, Tensor]:
        return pack(features, self.compression, self.codebook.centroids)

    def _unpack(self, columns: Mapping[str, Tensor]) -> Tensor:
        return unpack(columns, self.codebook.centroids)

    def _replayed(self, columns: Mapping[str, Tensor], batch: Batch) -> Batch:
        """Return columns of the buffer as a batch that ``batch`` can be joined with."""
        if self.files is not None and self._shape is not None:
            stored = self.files.get(columns["file"], columns["file_row"])
            packed = from_bytes(stored, self._shape, self.compression, self.subvectors)
            columns = {**columns, **packed}
        device = batch.labels.device
        packed = {name: columns[name].to(device) for name in PACKED if name in columns}
        plain = {name: column for name, column in columns.items() if name not in packed}
        return replace(replayed_batch(plain, batch).to(device), features=self._unpack(packed))


def _features_of(batch: Batch) -> Tensor:
    if batch.features is None:
        raise ValueError("FeatureReplay has no features to store: model.encode_image gave none")
    return batch.features
