"""Codebook: centroids that are learned once from a sample of a task, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from mmcl.core.batch import Batch
from mmcl.core.distributed import gather_rows, rank_and_world
from mmcl.core.randomness import mix, ranks_of
from mmcl.memory.dealing import fill_rows
from mmcl.memory.rows import Rows
from mmcl.memory.snapshot import Snapshot

_CENTROIDS = 256
_ROWS, _TOKENS = 8192, 2
"""Learned from 32 vectors for each of 256 centroids, or 64 where a row has several tokens."""
_STREAM = 0xC0DEB0


class Codebook(nn.Module):
    """Centroids for product quantisation; fixed once learned, so that old codes stay valid.

    Args:
        seed: of the sample that they are learned from.

    **Remembers** the centroids, float32. **Asks of the model** nothing; what encodes is given.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = mix(seed, _STREAM)
        self.held = Snapshot()

    @property
    def centroids(self) -> Tensor | None:
        """(S, K, D / S) float32, None before they are learned."""
        return None if self.held.is_empty else self.held.get("centroids")

    def rest_of(self, memory_bytes: int, width: int = 0) -> int:
        """Return the bytes of a budget that are left for rows.

        Args:
            memory_bytes: of rows and codebook together.
            width: D, from which the codebook is reckoned before it is learned.

        Raises:
            ValueError: if nothing is left.
        """
        known = self.centroids
        taken = 4 * (_CENTROIDS * width if known is None else known.numel())
        if taken >= memory_bytes:
            raise ValueError(
                f"memory_bytes is {memory_bytes} and the codebook alone takes {taken}: give more, "
                "or choose store='int8'"
            )
        return memory_bytes - taken

    def learn(
        self,
        batches: Iterable[Batch],
        task: int,
        tokens: Callable[[Batch], Tensor],
        learn: Callable[[Tensor], Tensor],
        device: torch.device,
    ) -> None:
        """Learn from a uniform sample of one exact pass: two tokens of each of 8192 rows at most.

        Nothing is done if that was done before.

        Rank 0 learns and sends, since k-means magnifies what two processors round differently.

        Args:
            batches: this rank's stride of the data, each sample once.
            task: index of the task.
            tokens: batch -> (B, N, D) of numbers near 1, zeros where there is no picture.
            learn: (M, D) float32 in random order -> (S, K, D / S).
            device: where ranks can talk.

        Raises:
            ValueError: if no row has a picture, or some rank has no rows, or the data can be read
                only once.
        """
        if not self.held.is_empty:
            return
        if isinstance(batches, Iterator):
            raise ValueError(
                "store is 'pq' and the first task can be read only once: give end_task a list or a "
                "loader, since centroids are learned before anything is stored"
            )
        sample = Rows(_ROWS, seed=self.seed)

        def columns(batch: Batch) -> dict[str, Tensor]:
            return {"vectors": _some_tokens(tokens(batch), batch, self.seed).to(torch.float16)}

        fill_rows(sample, batches, task, columns, device)
        vectors = sample.columns["vectors"].flatten(0, 1).float()
        vectors = vectors[vectors.any(1)]
        rank, world = rank_and_world()
        own = learn(vectors) if rank == 0 else vectors.new_zeros(0, 0, 0)
        if world > 1:
            sizes = gather_rows(torch.tensor([own.shape], device=device))[0].tolist()
            own = gather_rows(own.flatten().to(device)).view(sizes)
        self.held.take({"centroids": own.to(device)})


def _some_tokens(features: Tensor, batch: Batch, seed: int) -> Tensor:
    """Return (B, T, D), at most two tokens of each row, drawn by the number of its sample."""
    rows, count = features.shape[:2]
    samples = torch.arange(rows) if batch.sample is None else batch.sample.cpu()
    numbers = samples[:, None] * count + torch.arange(count)
    places = ranks_of(seed, count, numbers).argsort(dim=1, stable=True)[:, :_TOKENS]
    return features[torch.arange(rows)[:, None], places.to(features.device)]
