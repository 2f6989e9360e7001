"""Drift monitor: a few images that are encoded again, to measure the drift of stored features."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmcl.core.batch import Batch
from mmcl.core.distributed import all_gather_samples, rank_and_world
from mmcl.core.seeding import hash_seed
from mmcl.memory.distributed_fill import pass_sample_ids
from mmcl.memory.snapshot import Snapshot
from mmcl.memory.tensor_buffer import TensorBuffer

_TOKENS = 16
"""Tokens of an image that are compared, evenly spaced over all of them."""
_STREAM = 0x9E0BE5
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
        self.seed = hash_seed(seed, _STREAM)
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
        """Yield the batches of an exact pass, selecting images from them if there are none yet.

        Args:
            batches: this rank's stride of a task, each sample once.
            task: index of the task.
        """
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

        Args:
            device: of the encoder.
            encode: (P, 3, H, W) uint8 -> (P, N, D).
            unpack: stored columns -> features.
        """
        self.is_due = False
        if not len(self):
            return
        held = {name: tensor.to(device) for name, tensor in self.held.tensors.items()}
        now = _spaced_tokens(encode(held["images"]))
        prefix = "stored."
        packed = {
            name.removeprefix(prefix): column
            for name, column in held.items()
            if name.startswith(prefix)
        }
        length = held["exact"].double().norm()
        exact = _distance(now, held["exact"], length)
        stored = _distance(now, unpack(packed), length)
        self.last_measurement = {
            "images": float(len(self)),
            "relative_l2": exact[0],
            "cosine": exact[1],
            "stored_relative_l2": stored[0],
            "stored_cosine": stored[1],
        }
        # Not ">", so that nan warns as well.
        if not exact[0] <= _EXPLAINED and rank_and_world()[0] == 0:
            warnings.warn(
                f"features have drifted: {len(self)} images of the first task are now at a "
                f"relative distance of {exact[0]:.3g} from what was stored for them, of which "
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
    index = torch.arange(min(_TOKENS, count)) * count // min(_TOKENS, count)
    return features[:, index.to(features.device)].detach().float()


def _distance(now: Tensor, then: Tensor, length: Tensor) -> tuple[float, float]:
    """Return the L2 distance relative to a length, and the mean cosine similarity of tokens."""
    now, then = now.double(), then.double()
    distance = (now - then).norm() / length.clamp(min=torch.finfo(torch.float32).tiny)
    return float(distance), float(functional.cosine_similarity(now, then, dim=-1).mean())
