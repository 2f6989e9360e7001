"""Stored features: the codebook that compresses them, and the monitor of their drift."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmcl.core.batch import Batch
from mmcl.core.distributed import all_gather_samples, rank_and_world
from mmcl.core.seeding import hash_priorities, hash_seed
from mmcl.memory.distributed_fill import fill_buffer, pass_sample_ids
from mmcl.memory.snapshot import Snapshot
from mmcl.memory.tensor_buffer import TensorBuffer


@torch.no_grad()
def image_features(
    encode: Callable[[Batch], Tensor], batch: Batch, shape: tuple[int, ...] | None
) -> Tensor:
    """Return the image features (B, N, D) of a batch, zeros for a sample without an image.

    They are float32 or wider, whatever the precision of the encoder.

    Samples have one image or none; ``encode`` gives (B, N, D) of samples with one each, and
    ``shape`` is N and D, if they are known.

    Raises:
        ValueError: if a sample has several images, or none has one and ``shape`` is not known.
    """
    count, device = len(batch), batch.labels.device
    if not batch.has_images:
        if shape is None:
            raise ValueError(
                f"FeatureReplay was given {count} samples without an image before any with one: "
                "use a first task with images, or ExperienceReplay"
            )
        return torch.zeros(count, *shape, device=device)
    if batch.image_owner is None:
        return _widened(encode(batch))
    if int(batch.image_owner.bincount(minlength=count).max()) > 1:
        raise ValueError(
            "FeatureReplay was given samples with several images and stores one image per "
            "sample: use ExperienceReplay for such data"
        )
    features = _widened(encode(batch.take(batch.image_owner)))
    return features.new_zeros(count, *features.shape[1:]).index_copy(0, batch.image_owner, features)


def _widened(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))


_CENTROIDS = 256
_SAMPLES, _TOKENS = 8192, 2
"""Fitted to 32 vectors for each of 256 centroids, or 64 where a sample has several tokens."""
_CODEBOOK_STREAM = 0xC0DEB0


class Codebook(nn.Module):
    """Centroids for product quantization; fixed once fitted, so that old codes stay valid.

    Args:
        seed: seed of the sample that they are fitted to.

    **Remembers** the centroids, float32. **Asks of the model** nothing; the encoder is passed in.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = hash_seed(seed, _CODEBOOK_STREAM)
        self.held = Snapshot()

    @property
    def centroids(self) -> Tensor | None:
        """Centroids (S, K, D / S) float32, None before they are fitted."""
        return None if self.held.is_empty else self.held.get("centroids")

    def remaining_bytes(self, buffer_bytes: int, dim: int = 0) -> int:
        """Return the bytes of a budget for samples and codebook that remain for samples.

        Before the codebook is fitted its size is estimated by ``dim``, D.

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


_SPACED_TOKENS = 16
"""Tokens of an image that are compared, evenly spaced over all of them."""
_DRIFT_STREAM = 0x9E0BE5
_EXPLAINED = 0.02
"""Relative distance that rounding may explain: five times the step of bfloat16, 2 ** -8."""

Encode = Callable[[Tensor], Tensor]
Pack = Callable[[Tensor], Mapping[str, Tensor]]
Unpack = Callable[[Mapping[str, Tensor]], Tensor]


class DriftMonitor(nn.Module):
    """Drift monitor: images of the first task that has any, with their features at that time.

    A fingerprint shows that weights are the same; the distance of features then and now shows
    whether their outputs are, on this device, in this precision, with these library versions.

    Args:
        count: images, a uniform sample of the task; 0 = none.
        seed: seed of the selection.

    Attributes:
        last_measurement: the last measurement; empty before the first.
        is_due: whether a measurement was requested for the next step.

    **Remembers** each image as it enters the tower (uint8), and 16 of its tokens at most, exact
    (float32) and as stored. **Asks of the model** nothing; the encoder is passed in.
    """

    def __init__(self, count: int, seed: int) -> None:
        super().__init__()
        if count < 0:
            raise ValueError(f"drift_images is {count}: give a number of images, or 0 for none")
        self.count = count
        self.seed = hash_seed(seed, _DRIFT_STREAM)
        self.held = Snapshot()
        self.last_measurement: dict[str, float] = {}
        self.is_due = False
        self._chosen: list[TensorBuffer] = []  # a list, so that no module sees a module

    def __len__(self) -> int:
        """Return the number of images held."""
        return 0 if self.held.is_empty else len(self.held.get("images"))

    def __bool__(self) -> bool:
        """Return True: an empty monitor is still a module; use ``len``."""
        return True

    def sample_from(self, batches: Iterable[Batch], task: int) -> Iterator[Batch]:
        """Yield the batches of an exact pass, selecting images from them if there are none yet."""
        if not self.count or len(self):
            yield from batches
            return
        own, seen = TensorBuffer(self.count, seed=self.seed), 0
        self._chosen = [own]
        for batch in batches:
            _offer(own, batch, pass_sample_ids(batch, seen), task)
            seen += len(batch)
            yield batch

    def commit(self, device: torch.device, encode: Encode, pack: Pack) -> None:
        """Store the images that all ranks selected in the pass, if any, with their features.

        Args:
            device: of the encoder, for communication between ranks.
            encode: (P, 3, H, W) uint8 -> (P, N, D).
            pack: features -> the columns that store them.
        """
        if not self._chosen:
            return
        images = _gathered_images(self._chosen.pop(), device)[: self.count]
        if not len(images):
            return
        exact = _spaced_tokens(encode(images))
        stored = {f"stored.{name}": column for name, column in pack(exact).items()}
        self.held.take({"images": images, "exact": exact, **stored})

    def measure(self, device: torch.device, encode: Encode, unpack: Unpack) -> None:
        """Encode the images again and measure the distance of the features from the stored ones.

        Warns, on rank 0, if it is larger than rounding explains. ``last_measurement`` then has
        ``images``, their number; ``relative_l2`` and ``cosine`` of features now and then (0
        and 1 where nothing changed); ``stored_relative_l2`` and ``stored_cosine`` of features now
        and as stored, which include the rounding of the storage format.

        The device is the encoder's, ``encode`` as in ``commit``; ``unpack`` is its ``pack`` undone.
        """
        self.is_due = False
        if not len(self):
            return
        held = {name: tensor.to(device) for name, tensor in self.held.tensors.items()}
        now = _spaced_tokens(encode(held["images"]))
        packed = {n.removeprefix("stored."): c for n, c in held.items() if n.startswith("stored.")}
        length = held["exact"].double().norm()
        distance, cosine = _distance(now, held["exact"], length)
        stored_distance, stored_cosine = _distance(now, unpack(packed), length)
        self.last_measurement = {
            "images": float(len(self)),
            "relative_l2": distance,
            "cosine": cosine,
            "stored_relative_l2": stored_distance,
            "stored_cosine": stored_cosine,
        }
        # Not ">", so that nan warns as well.
        if not distance <= _EXPLAINED and rank_and_world()[0] == 0:
            warnings.warn(
                f"features have drifted: {len(self)} images of the first task are now at a "
                f"relative distance of {distance:.3g} from what was stored for them, of which "
                f"rounding explains {_EXPLAINED}; load the image tower that made the stored "
                "features, or start with an empty buffer",
                stacklevel=2,
            )


def _offer(own: TensorBuffer, batch: Batch, numbers: Tensor, task: int) -> None:
    if batch.images is None:
        return
    index = torch.arange(len(batch))
    if batch.image_owner is not None:
        owner = batch.image_owner.cpu()
        index = torch.full((len(batch),), -1).index_copy(0, owner, torch.arange(len(owner)))
    wanted = (index >= 0) & own.would_keep(numbers, task)
    images = batch.images[index[wanted].to(batch.images.device)]
    own.add({"images": images}, numbers[wanted], task)


def _gathered_images(chosen: TensorBuffer, device: torch.device) -> Tensor:
    """Return images (P, 3, H, W) of all ranks on the device, in order of priority."""
    held = chosen.columns.get("images", torch.zeros(0, 0, 0, 0, dtype=torch.uint8))
    # A rank without an image has to know the others' shape.
    shape = all_gather_samples(torch.tensor([held.shape[1:]], device=device)).amax(0)
    if not int(shape.prod()):
        return held
    images = held if len(held) else held.new_zeros(0, *shape.tolist())
    order = all_gather_samples(chosen.priorities.to(device)).argsort(stable=True)
    return all_gather_samples(images.to(device))[order]


def _spaced_tokens(features: Tensor) -> Tensor:
    count = features.shape[1]
    index = torch.arange(min(_SPACED_TOKENS, count)) * count // min(_SPACED_TOKENS, count)
    return features[:, index.to(features.device)].detach().float()


def _distance(now: Tensor, then: Tensor, length: Tensor) -> tuple[float, float]:
    """Return the L2 distance relative to a length, and the mean cosine similarity of tokens."""
    now, then = now.double(), then.double()
    distance = (now - then).norm() / length.clamp(min=torch.finfo(torch.float32).tiny)
    return float(distance), float(functional.cosine_similarity(now, then, dim=-1).mean())
