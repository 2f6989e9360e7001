"""Codebook: product-quantization centroids, fitted once to a sample of a task, on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from mmcl.core.batch import Batch
from mmcl.core.distributed import all_gather_samples, rank_and_world
from mmcl.core.seeding import hash_priorities, hash_seed
from mmcl.memory.distributed_fill import fill_buffer
from mmcl.memory.snapshot import Snapshot
from mmcl.memory.tensor_buffer import TensorBuffer


@torch.no_grad()
def image_features(
    encode: Callable[[Batch], Tensor], batch: Batch, shape: tuple[int, ...] | None
) -> Tensor:
    """Return the image features (B, N, D) of a batch, zeros for a sample without an image.

    Args:
        encode: (B, N, D) of samples with one image each.
        batch: samples with one image or none.
        shape: N and D, if they are known.

    Raises:
        ValueError: if a sample has several images, or none has one and ``shape`` is not known.
    """
    count, device = len(batch), batch.labels.device
    if batch.images is None:
        if shape is None:
            raise ValueError(
                f"FeatureReplay was given {count} samples without an image before any with one: "
                "use a first task with images, or ExperienceReplay"
            )
        return torch.zeros(count, *shape, device=device)
    if batch.image_owner is None:
        return encode(batch)
    if int(batch.image_owner.bincount(minlength=count).max()) > 1:
        raise ValueError(
            "FeatureReplay was given samples with several images and stores one image per "
            "sample: use ExperienceReplay for such data"
        )
    features = encode(batch.take(batch.image_owner))
    return features.new_zeros(count, *features.shape[1:]).index_copy(0, batch.image_owner, features)


_CENTROIDS = 256
_SAMPLES, _TOKENS = 8192, 2
"""Fitted to 32 vectors for each of 256 centroids, or 64 where a sample has several tokens."""
_STREAM = 0xC0DEB0


class Codebook(nn.Module):
    """Centroids for product quantization; fixed once fitted, so that old codes stay valid.

    Args:
        seed: seed of the sample that they are fitted to.

    **Remembers** the centroids, float32. **Asks of the model** nothing; the encoder is passed in.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = hash_seed(seed, _STREAM)
        self.held = Snapshot()

    @property
    def centroids(self) -> Tensor | None:
        """Centroids (S, K, D / S) float32, None before they are fitted."""
        return None if self.held.is_empty else self.held.get("centroids")

    def remaining_bytes(self, buffer_bytes: int, dim: int = 0) -> int:
        """Return the bytes of a budget that remain for samples.

        Args:
            buffer_bytes: of samples and codebook together.
            dim: D, to estimate the codebook's size before it is fitted.

        Raises:
            ValueError: if nothing remains.
        """
        known = self.centroids
        used = 4 * (_CENTROIDS * dim if known is None else known.numel())
        if used >= buffer_bytes:
            raise ValueError(
                f"buffer_bytes is {buffer_bytes} and the codebook alone takes {used}: give more, "
                "or choose compression='int8'"
            )
        return buffer_bytes - used

    def fit(
        self,
        batches: Iterable[Batch],
        task: int,
        tokens: Callable[[Batch], Tensor],
        compute: Callable[[Tensor], Tensor],
        device: torch.device,
    ) -> None:
        """Fit centroids to a uniform sample of one exact pass: two tokens of at most 8192 samples.

        Does nothing if they were fitted before. Rank 0 fits and sends, since k-means magnifies
        differences in rounding between processors.

        Args:
            batches: this rank's stride of the data, each sample once.
            task: index of the task.
            tokens: batch -> (B, N, D) of numbers near 1, zeros where there is no image.
            compute: (M, D) float32 in random order -> (S, K, D / S).
            device: for communication between ranks.

        Raises:
            ValueError: if no sample has an image, or some rank has no samples, or the data can be
                read only once.
        """
        if not self.held.is_empty:
            return
        if isinstance(batches, Iterator):
            raise ValueError(
                "compression is 'pq' and the first task can be read only once: give end_task a "
                "list or a loader, since centroids are fitted before anything is stored"
            )
        sample = TensorBuffer(_SAMPLES, seed=self.seed)

        def columns(batch: Batch) -> dict[str, Tensor]:
            return {"vectors": _drawn_tokens(tokens(batch), batch, self.seed).to(torch.float16)}

        fill_buffer(sample, batches, task, columns, device)
        vectors = sample.columns["vectors"].flatten(0, 1).float()
        vectors = vectors[vectors.any(1)]
        rank, world = rank_and_world()
        centroids = compute(vectors) if rank == 0 else vectors.new_zeros(0, 0, 0)
        if world > 1:
            sizes = all_gather_samples(torch.tensor([centroids.shape], device=device))[0].tolist()
            centroids = all_gather_samples(centroids.flatten().to(device)).view(sizes)
        self.held.take({"centroids": centroids.to(device)})


def _drawn_tokens(features: Tensor, batch: Batch, seed: int) -> Tensor:
    """Return (B, T, D), at most two tokens of each sample, drawn by its sample id."""
    batch_size, count = features.shape[:2]
    samples = torch.arange(batch_size) if batch.sample_ids is None else batch.sample_ids.cpu()
    numbers = samples[:, None] * count + torch.arange(count)
    index = hash_priorities(seed, count, numbers).argsort(dim=1, stable=True)[:, :_TOKENS]
    return features[torch.arange(batch_size)[:, None], index.to(features.device)]
