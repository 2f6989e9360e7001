"""Batch: the tensors of one step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from mmcl.core.image_values import ImagesAre, as_uint8, stack_images
from mmcl.core.padding import pad_id_of, real_tokens
from mmcl.core.sample import Reference
from mmcl.core.seeding import hash_priorities

IGNORE_INDEX = -100
"""Label of a sample or token that the task loss ignores, as in torch's cross entropy."""

_SAMPLE_FIELDS = (
    "labels", "task_ids", "input_ids", "attention_mask", "features", "sample_ids", "is_replay",
    "source_ids", "in_loss", "num_bytes", "image_ids",
)  # fmt: skip

_SMALL_BYTES = 1 << 16
_BY_VALUE = (torch.int64, torch.bool, torch.uint8, torch.float32)


@dataclass(frozen=True)
class GlobalBatch:
    """Sizes of the global batch of which a batch is one micro-batch on one rank.

    Attributes:
        samples: number of samples over all ranks and accumulated micro-batches.
        new: of these, samples of the current task.
        from_sources: of these, samples of the stream's sources.
        in_loss: of these, samples in the task loss.
        micro_batch: number of this micro-batch, from 0.
        micro_batches: accumulated micro-batches of every rank.
    """

    samples: int
    new: int
    from_sources: int
    in_loss: int
    micro_batch: int
    micro_batches: int


@dataclass(frozen=True)
class Batch:
    """Samples of one step. B samples, M images, L tokens, N image tokens, D feature dim.

    Attributes:
        images: (M, 3, H, W) uint8, decoded and resized; the model normalizes them on its device.
        labels: (B,) int64 class index (column of the class scores); for generative samples (B, L)
            int64 target token at each position. -100 = not in the loss.
        task_ids: (B,) int64 index of the task that each sample belongs to.
        image_owner: (M,) int64 index of the sample that each image belongs to, in increasing order;
            None = one image a sample, in order.
        input_ids: (B, L) int64 token ids, padded; None if samples have no text of their own.
        attention_mask: (B, L) bool, True on real tokens, False on padding behind them; the ids of
            padding do not count.
        features: (B, N, D) output of the frozen encoder, used in place of images.
        sample_ids: (B,) int64 number of each sample inside its task; (task, sample) identifies it.
        is_replay: (B,) bool, True for samples that are not of the current task: replayed, or of
            another source; None = all are of the current task.
        source_ids: (B,) int64, 0 for samples of the task and of memory, n for those of the stream's
            n-th source (their ``task_ids`` is -1); None = all 0.
        in_loss: (B,) bool, False for samples of a source that the task loss leaves out; None = all
            are in the loss.
        num_bytes: (B,) int64 size of each sample in its shard; None = not known.
        image_ids: (B,) int64 identity of each sample's image, by content: samples of equal ids show
            the same image, so that the caption of one describes the other; -1 = an image that no
            other sample shows. None = all are -1.
        image_inputs: M mappings from names of a model's arguments to tensors, which its own image
            processor made of each image; beside ``images``, or in place of them; or empty.
        keys: B sample keys, which trace a sample back to its shard; or empty.
        references: for generative samples, B questions with their right answers; or empty.
        errors: one sentence for each sample that could not be read while this batch was made.
        notes: one sentence for each sample of which the model takes only a part.
        loss_weight: factor of the loss that turns the mean over ranks and accumulated micro-batches
            into the mean over the global batch: own samples * ranks * micro-batches / samples of
            the global batch.
        global_batch: sizes of the global batch, None = not known.
    """

    images: Tensor | None
    labels: Tensor
    task_ids: Tensor
    image_owner: Tensor | None = None
    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    features: Tensor | None = None
    sample_ids: Tensor | None = None
    is_replay: Tensor | None = None
    source_ids: Tensor | None = None
    in_loss: Tensor | None = None
    num_bytes: Tensor | None = None
    image_ids: Tensor | None = None
    image_inputs: tuple[Mapping[str, Tensor], ...] = ()
    keys: tuple[str, ...] = ()
    references: tuple[Reference, ...] = ()
    errors: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    loss_weight: float = 1.0
    global_batch: GlobalBatch | None = None

    @classmethod
    def from_images(
        cls,
        images: Tensor | Sequence[Tensor],
        labels: Tensor | Sequence[int] | None = None,
        *,
        task: int | Tensor = 0,
        images_are: ImagesAre | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> Batch:
        """Batch of one image a sample, with a class label each if they are known.

        Args:
            images: (B, 3, H, W) at the model's size, or B images (3, H, W).
            labels: (B,) class indices; None = none, which is enough for inference.
            task: index of the task that all samples come from, or (B,) one each.
            images_are: "uint8" = levels from 0 to 255; "unit" = floats from 0 to 1, as the
                ``ToTensor`` of torchvision gives them; "normalized" = those after ``Normalize(mean,
                std)``, which is undone here, since a model normalizes on its device. None = by type
                and range.
            mean: of the three channels, for "normalized".
            std: of the three channels, for "normalized".

        Raises:
            ValueError: if a shape differs, or the images are not what ``images_are`` says, or it is
                None and their range does not tell.
        """
        stacked = images if isinstance(images, Tensor) else stack_images(images)
        if stacked.dim() != 4 or stacked.shape[1] != 3:
            raise ValueError(f"images has shape {tuple(stacked.shape)}, expected (B, 3, H, W)")
        pixels = as_uint8(stacked, images_are, mean, std)
        count, device = len(pixels), pixels.device
        given = IGNORE_INDEX if labels is None else labels
        return cls(pixels, _per_sample("labels", given, count, device),
            _per_sample("task", task, count, device))  # fmt: skip

    @classmethod
    def from_texts(
        cls,
        texts: Sequence[str],
        images: Tensor | Sequence[Tensor] | None = None,
        *,
        tokenizer: Callable[[Sequence[str]], Tensor],
        task: int | Tensor = 0,
        images_are: ImagesAre | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> Batch:
        """Batch of one text a sample, such as captions, with or without the images they describe.

        Args:
            texts: B texts.
            images: as in ``from_images``; None = texts alone, for ``model.embed(batch, "text")``.
            tokenizer: B texts -> (B, L) token ids padded on the right, such as ``model.tokenizer``
                or what ``open_clip.get_tokenizer`` returns. They are padded with its
                ``pad_token_id``, or that of the tokenizer that it wraps; 0 where it states none.
            task: index of the task that all samples come from, or (B,) one each.
            images_are: as in ``from_images``, with ``mean`` and ``std``.
            mean: of the three channels.
            std: of the three channels.

        Raises:
            ValueError: if there are no texts, or not as many as images.
        """
        if isinstance(texts, str) or not texts:
            raise ValueError(f"texts is {texts!r}: give a list with one text for each sample")
        input_ids = tokenizer(list(texts)).long()
        if images is None:
            labels = _per_sample("labels", IGNORE_INDEX, len(texts), input_ids.device)
            task_ids = _per_sample("task", task, len(texts), input_ids.device)
            batch = cls(None, labels, task_ids)
        else:
            batch = cls.from_images(images, task=task, images_are=images_are, mean=mean, std=std)
        if len(batch) != len(input_ids):
            raise ValueError(f"there are {len(texts)} texts for {len(batch)} images: give one each")
        input_ids = input_ids.to(batch.labels.device)
        mask = real_tokens(input_ids, pad_id_of(tokenizer))
        return replace(batch, input_ids=input_ids, attention_mask=mask)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle small tensors by value: torch opens a file for each one that it sends itself."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        inputs = [_by_value(each) for each in values.pop("image_inputs")]
        return _received, (_by_value(values), inputs)

    def __len__(self) -> int:
        """Return B, the number of samples."""
        return int(self.labels.shape[0])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch with every tensor on a device; itself if ``labels`` is there already."""
        if self.labels.device == torch.device(device):
            return self
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, from which a GPU copies faster."""
        return self._map(lambda tensor: tensor.pin_memory())

    def take(self, rows: Tensor) -> Batch:
        """Return the selected samples, in the given order, with their images.

        Args:
            rows: (R,) int64 sample indices, 0 to B-1; an index may appear twice.
        """
        values = {name: getattr(self, name) for name in _SAMPLE_FIELDS}
        taken: dict[str, Any] = {name: v[rows] for name, v in values.items() if v is not None}
        chosen = rows
        if self.image_owner is not None:
            found = [torch.nonzero(self.image_owner == row).flatten() for row in rows]
            owners = [torch.full_like(own, index) for index, own in enumerate(found)]
            empty = self.image_owner[:0]
            chosen, taken["image_owner"] = torch.cat([*found, empty]), torch.cat([*owners, empty])
        if self.images is not None:
            taken["images"] = self.images[chosen]
        if self.image_inputs:
            taken["image_inputs"] = tuple(self.image_inputs[index] for index in chosen.tolist())
        indices = rows.tolist()
        for name in ("keys", "references"):
            texts = getattr(self, name)
            taken[name] = tuple(texts[index] for index in indices) if texts else ()
        return replace(self, **taken)

    def join(self, other: Batch) -> Batch:
        """Return the samples of two batches, this one's first.

        Texts are padded to the longer of the two. A field that is None on one side must be None on
        the other, except those with a default: ``is_replay`` (False), ``sample_ids`` (-1),
        ``source_ids`` (0), ``in_loss`` (True), ``num_bytes`` (-1) and ``image_ids`` (-1).

        Raises:
            ValueError: if one side has images, tokens or features and the other has none; answers
                to text alone may be joined with answers to images.
        """
        joined: dict[str, Any] = {}
        left, right = _with_defaults(self, other), _with_defaults(other, self)
        left, right = _padded(left, right), _padded(right, left)
        for name in _SAMPLE_FIELDS:
            joined[name] = _joined(name, getattr(left, name), getattr(right, name))
        joined["images"] = _joined("images", left.images, right.images, _lacks_images(left, right))
        joined["image_inputs"] = left.image_inputs + right.image_inputs
        has_owners = left.image_owner is not None or right.image_owner is not None
        if has_owners or left.has_images != right.has_images:
            joined["image_owner"] = torch.cat([_owners(left), _owners(right) + len(left)])
        for name in ("keys", "references"):
            ours, theirs = getattr(left, name), getattr(right, name)
            is_whole = len(ours) == len(left) and len(theirs) == len(right)
            joined[name] = ours + theirs if is_whole else ()
        errors, notes = self.errors + other.errors, self.notes + other.notes
        return replace(self, errors=errors, notes=notes, **joined)

    @property
    def has_images(self) -> bool:
        """Whether some sample has an image: pixels or what a processor made of them."""
        return bool(self.image_inputs) or (self.images is not None and len(self.images) > 0)

    @property
    def num_in_loss(self) -> int:
        """Number of samples that the task loss does not leave out."""
        return len(self) if self.in_loss is None else int(self.in_loss.sum())

    @property
    def is_generative(self) -> bool:
        """Whether the labels are target tokens to be generated, not classes."""
        return self.labels.dim() == 2

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = [(field.name, getattr(self, field.name)) for field in fields(self)]
        changed: dict[str, Any] = {n: change(v) for n, v in values if isinstance(v, Tensor)}
        inputs = tuple({n: change(v) for n, v in each.items()} for each in self.image_inputs)
        return replace(self, image_inputs=inputs, **changed)


def text_ids(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Hash the text of every sample: equal ids are equal texts, whatever their padding.

    Args:
        input_ids: (B, L) int64 token ids.
        attention_mask: (B, L) bool, True on real tokens; None = all are real.

    Returns:
        (B,) int64, the same in every process.
    """
    is_real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    # The place among real tokens, so that padding on either side does not count.
    position = is_real.cumsum(1) << 32
    return (hash_priorities(0, 0, input_ids + position) * is_real).sum(1)


def _per_sample(
    name: str, given: Tensor | Sequence[int] | int, count: int, device: torch.device
) -> Tensor:
    if isinstance(given, int):
        return torch.full((count,), given, dtype=torch.int64, device=device)
    values = torch.as_tensor(given, dtype=torch.int64, device=device)
    if values.shape != (count,):
        raise ValueError(
            f"{name} has shape {tuple(values.shape)} for {count} samples: give one for each"
        )
    return values


def _is_small(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_cpu
        and value.dtype in _BY_VALUE
        and value.nbytes <= _SMALL_BYTES
        and not value.requires_grad
    )


def _by_value(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide values into those that torch sends, and arrays of the small tensors."""
    small = {name: value.numpy() for name, value in values.items() if _is_small(value)}
    return {n: v for n, v in values.items() if n not in small}, small


def _received(values: tuple[Any, Any], inputs: list[tuple[Any, Any]]) -> Batch:
    return Batch(image_inputs=tuple(map(_tensors, inputs)), **_tensors(values))


def _tensors(sent: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    values, small = sent
    return {**values, **{name: torch.from_numpy(array) for name, array in small.items()}}


def _owners(batch: Batch) -> Tensor:
    if batch.image_owner is not None:
        return batch.image_owner
    if not batch.has_images:
        return batch.labels.new_zeros(0)
    return torch.arange(len(batch), device=batch.labels.device)


def _with_defaults(batch: Batch, other: Batch) -> Batch:
    """Return the batch with defaults in those of its empty fields that the joined batch fills."""
    labels, count = batch.labels, len(batch)
    defaults: dict[str, Any] = {
        "is_replay": labels.new_zeros(count, dtype=torch.bool),
        "sample_ids": labels.new_full((count,), -1),
    }
    if_other_has = {
        "source_ids": labels.new_zeros(count),
        "in_loss": labels.new_ones(count, dtype=torch.bool),
        "num_bytes": labels.new_full((count,), -1),
        "image_ids": labels.new_full((count,), -1),
    }
    defaults |= {n: value for n, value in if_other_has.items() if getattr(other, n) is not None}
    if batch.input_ids is not None:
        defaults["attention_mask"] = torch.ones_like(batch.input_ids, dtype=torch.bool)
    missing = {n: value for n, value in defaults.items() if getattr(batch, n) is None}
    return replace(batch, **missing)


def _padded(batch: Batch, other: Batch) -> Batch:
    if batch.input_ids is None or other.input_ids is None or batch.attention_mask is None:
        return batch
    missing = other.input_ids.shape[1] - batch.input_ids.shape[1]
    if missing <= 0:
        return batch
    pad = torch.nn.functional.pad
    labels = batch.labels
    if batch.is_generative:
        labels = pad(labels, (0, missing), value=IGNORE_INDEX)
    tokens, mask = pad(batch.input_ids, (0, missing)), pad(batch.attention_mask, (0, missing))
    return replace(batch, input_ids=tokens, attention_mask=mask, labels=labels)


def _lacks_images(left: Batch, right: Batch) -> bool:
    """Return whether both sides answer questions, and one of them has questions alone."""
    is_text = [one.is_generative and not one.has_images for one in (left, right)]
    return any(is_text) and left.features is None and right.features is None


def _joined(
    name: str, left: Tensor | None, right: Tensor | None, may_lack: bool = False
) -> Tensor | None:
    if left is None and right is None:
        return None
    if may_lack and (left is None or right is None):
        return left if right is None else right
    if left is None or right is None:
        raise ValueError(
            f"one batch has {name} and the other has not: join batches of the same kind "
            f"(encode the images first if the replayed samples are features)"
        )
    return torch.cat([left, right.to(left.device)])
