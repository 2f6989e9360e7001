"""Probes: a few pictures that are encoded again and again, to see whether features still hold."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmcl.core.batch import Batch
from mmcl.core.distributed import gather_rows, rank_and_world
from mmcl.core.randomness import mix
from mmcl.memory.dealing import pass_numbers
from mmcl.memory.rows import Rows
from mmcl.memory.snapshot import Snapshot

_TOKENS = 16
"""Tokens of a picture that are compared, spread evenly over all of them."""
_STREAM = 0x9E0BE5
_EXPLAINED = 0.02
"""Relative distance that arithmetic may explain: five times the step of bfloat16, 2 ** -8."""

Encode = Callable[[Tensor], Tensor]
Pack = Callable[[Tensor], Mapping[str, Tensor]]
Unpack = Callable[[Mapping[str, Tensor]], Tensor]


class Probes(nn.Module):
    """Pictures of the first task that has any, with their features as they were then.

    A fingerprint says that weights are the same; the distance of features then and now says
    whether they give the same, on this device, in this precision, with this release of a library.

    Args:
        count: pictures, a uniform sample of the task; 0 = none.
        seed: of the choice.

    Attributes:
        seen: what the last look saw; empty before the first.
        is_due: whether somebody wants a look at the next occasion.

    **Remembers** each picture as it enters the tower (uint8), and 16 of its tokens at most, exact
    (float32) and as stored. **Asks of the model** nothing; what encodes is given.
    """

    def __init__(self, count: int, seed: int) -> None:
        super().__init__()
        if count < 0:
            raise ValueError(f"drift_probes is {count}: give a number of pictures, or 0 for none")
        self.count = count
        self.seed = mix(seed, _STREAM)
        self.held = Snapshot()
        self.seen: dict[str, float] = {}
        self.is_due = False
        self._chosen: list[Rows] = []  # a list, so that no module sees a module

    def __len__(self) -> int:
        """Return the number of pictures held."""
        return 0 if self.held.is_empty else len(self.held.get("images"))

    def __bool__(self) -> bool:
        """Return True: an empty store is still a module; ask ``len``."""
        return True

    def watched(self, batches: Iterable[Batch], task: int) -> Iterator[Batch]:
        """Give an exact pass through, choosing pictures on the way if there are none yet.

        Args:
            batches: this rank's stride of a task, each sample once.
            task: index of the task.
        """
        if not self.count or len(self):
            yield from batches
            return
        own, seen = Rows(self.count, seed=self.seed), 0
        self._chosen = [own]
        for batch in batches:
            _offer(own, batch, pass_numbers(batch, seen), task)
            seen += len(batch)
            yield batch

    def settle(self, device: torch.device, encode: Encode, pack: Pack) -> None:
        """Keep what all ranks chose in the pass that is through, if it has any pictures.

        Args:
            device: where ranks can talk and the encoder is.
            encode: (P, 3, H, W) uint8 -> (P, N, D).
            pack: features -> the columns that store them.
        """
        if not self._chosen:
            return
        images = _gathered(self._chosen.pop(), device)[: self.count]
        if not len(images):
            return
        exact = _some_tokens(encode(images))
        stored = {f"stored.{name}": column for name, column in pack(exact).items()}
        self.held.take({"images": images, "exact": exact, **stored})

    def look(self, device: torch.device, encode: Encode, unpack: Unpack) -> None:
        """Encode the pictures again and note how far the features are from those of then.

        Warns, on rank 0, if they are farther than arithmetic explains. ``seen`` then has
        ``probes``, the number of pictures; ``relative_l2`` and ``cosine`` of features now and then
        (0 and 1 where nothing changed); ``stored_relative_l2`` and ``stored_cosine`` of features
        now and what was stored, which are off by its rounding as well.

        Args:
            device: of the encoder.
            encode: (P, 3, H, W) uint8 -> (P, N, D).
            unpack: stored columns -> features.
        """
        self.is_due = False
        if not len(self):
            return
        held = {name: tensor.to(device) for name, tensor in self.held.tensors.items()}
        now = _some_tokens(encode(held["images"]))
        beginning = "stored."
        packed = {
            name.removeprefix(beginning): column
            for name, column in held.items()
            if name.startswith(beginning)
        }
        length = held["exact"].double().norm()
        exact = _apart(now, held["exact"], length)
        stored = _apart(now, unpack(packed), length)
        self.seen = {
            "probes": float(len(self)),
            "relative_l2": exact[0],
            "cosine": exact[1],
            "stored_relative_l2": stored[0],
            "stored_cosine": stored[1],
        }
        # Not ">": what is not a number is to be named as well.
        if not exact[0] <= _EXPLAINED and rank_and_world()[0] == 0:
            warnings.warn(
                f"features have drifted: {len(self)} pictures of the first task are now at a "
                f"relative distance of {exact[0]:.3g} from what was stored for them, of which "
                f"rounding explains {_EXPLAINED}; load the image tower that made the remembered "
                "rows, or start with an empty memory",
                stacklevel=2,
            )


def _offer(own: Rows, batch: Batch, numbers: Tensor, task: int) -> None:
    if batch.images is None:
        return
    pictures = torch.arange(len(batch))
    if batch.owner is not None:
        owner = batch.owner.cpu()
        pictures = torch.full((len(batch),), -1).index_copy(0, owner, torch.arange(len(owner)))
    wanted = (pictures >= 0) & own.accepts(numbers, task)
    images = batch.images[pictures[wanted].to(batch.images.device)]
    own.insert({"images": images}, numbers[wanted], task)


def _gathered(chosen: Rows, device: torch.device) -> Tensor:
    """Return pictures (P, 3, H, W) of all ranks on the device, those of smallest hash first."""
    held = chosen.columns.get("images", torch.zeros(0, 0, 0, 0, dtype=torch.uint8))
    # A rank without a picture has to know what the others' look like.
    sides = gather_rows(torch.tensor([held.shape[1:]], device=device)).amax(0)
    if not int(sides.prod()):
        return held
    images = held if len(held) else held.new_zeros(0, *sides.tolist())
    order = gather_rows(chosen.ranks.to(device)).argsort(stable=True)
    return gather_rows(images.to(device))[order]


def _some_tokens(features: Tensor) -> Tensor:
    count = features.shape[1]
    places = torch.arange(min(_TOKENS, count)) * count // min(_TOKENS, count)
    return features[:, places.to(features.device)].detach().float()


def _apart(now: Tensor, then: Tensor, length: Tensor) -> tuple[float, float]:
    """Return the distance of all over a length, and the mean cosine of tokens."""
    now, then = now.double(), then.double()
    distance = (now - then).norm() / length.clamp(min=torch.finfo(torch.float32).tiny)
    return float(distance), float(functional.cosine_similarity(now, then, dim=-1).mean())
