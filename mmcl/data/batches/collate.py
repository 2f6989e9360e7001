"""Collation: stored samples become examples by their task's needs, examples become a batch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmcl.core import (
    IGNORE_INDEX,
    IMAGE_TOKEN,
    Batch,
    Conversation,
    ProcessedSample,
    Reference,
    Task,
    Transform,
    Turn,
)
from mmcl.core.image_values import ImagesAre, as_uint8, stack_images
from mmcl.core.seeding import hash_seed
from mmcl.data.decode import decode_image, rgb_array
from mmcl.data.shards.llava_json import apply_template, has_visible_text, read_dialogue
from mmcl.data.shards.tar_index import IMAGES
from mmcl.data.stored_sample import BadSample, Sample

_WHOLE_NUMBER = re.compile(rb"\s*([0-9]{1,18})\s*")


@dataclass(frozen=True)
class Example:
    """One example of a batch: the processed sample, and where it came from.

    Attributes:
        processed: output of the transform for the sample.
        label: column of its class, or IGNORE_INDEX.
        task_id: index of its task.
        sample_id: its number in that task.
        key: its key in the shard.
        is_replay: True where the sample is not of the task that is trained.
        reference: right answers of a generative sample.
        source_id: see ``Batch.source_ids``.
        in_loss: False where it is not in the task loss.
        num_bytes: bytes of the sample's members.
    """

    processed: ProcessedSample
    label: int
    task_id: int
    sample_id: int
    key: str
    is_replay: bool = False
    reference: Reference | None = None
    source_id: int = 0
    in_loss: bool = True
    num_bytes: int = 0


def make_example(
    sample: Sample,
    number: int,
    task: Task,
    transform: Transform,
    *,
    seed: int,
    max_pixels: int,
    is_replay: bool = False,
) -> Example:
    """Make an example: decode a sample and apply the model's transform.

    Args:
        sample: the sample as it is stored.
        number: number of the sample in its task.
        task: says which members are needed: ``.cls`` to classify, ``.json`` to answer, none
            besides the image for "image", else the text member.
        transform: the model's transform.
        seed: seed of the sample's augmentation.
        max_pixels: largest image that is decoded.
        is_replay: marks the example as replayed.

    Raises:
        BadSample: if a member is missing or broken, or the label is not one of the task's.
    """
    label, reference = IGNORE_INDEX, None
    if task.task_type == "instruction":
        dialogue, pixels = _conversation(sample, task, max_pixels)
        row = transform(pixels, dialogue, seed)
        if row.labels is not None and not bool((row.labels != IGNORE_INDEX).any()):
            raise BadSample("its answer is beyond the model's max_length: raise it or shorten it")
        reference = dialogue.reference
    else:
        text = None
        if task.task_type == "classification":
            label = _class_column(sample, task)
        elif task.task_type != "image":
            text = _text(sample, task.text_field.lower())
        row = transform(decode_image(_image_bytes(sample), max_pixels), text, seed)
    size = sum(map(len, sample.members.values()))
    return Example(
        row, label, task.index, number, sample.key, is_replay, num_bytes=size, reference=reference
    )


def collate(
    examples: Sequence[Example],
    errors: Sequence[str] = (),
    weight: float = 1.0,
    room: Tensor | None = None,
) -> Batch:
    """Collate examples into a batch; texts are padded with 0 to the longest.

    Examples without text are all padding.

    Args:
        examples: at least one, images of one size.
        errors: descriptions of the samples that could not be read.
        weight: see ``Batch.loss_weight``.
        room: (bytes,) uint8 buffer for the images if they fit; None = new memory.
    """
    owners = [n for n, example in enumerate(examples) if example.processed.image is not None]
    images = [e.processed.image for e in examples if e.processed.image is not None]
    texts = [example.processed.input_ids for example in examples]
    tokens, mask = _padded(texts) if any(text is not None for text in texts) else (None, None)
    is_mixed = any(example.source_id for example in examples)
    in_loss = [example.in_loss for example in examples]
    return Batch(
        images=_stacked(images, room) if images else None,
        image_owner=torch.tensor(owners) if 0 < len(images) < len(examples) else None,
        labels=_labels(examples),
        task_ids=torch.tensor([example.task_id for example in examples]),
        input_ids=tokens,
        attention_mask=mask,
        sample_ids=torch.tensor([example.sample_id for example in examples]),
        is_replay=torch.tensor([example.is_replay for example in examples]),
        source_ids=torch.tensor([example.source_id for example in examples]) if is_mixed else None,
        in_loss=None if all(in_loss) else torch.tensor(in_loss),
        num_bytes=torch.tensor([example.num_bytes for example in examples]),
        keys=tuple(example.key for example in examples),
        references=tuple(e.reference for e in examples if e.reference is not None),
        errors=tuple(errors),
        loss_weight=weight,
    )


def _stacked(images: Sequence[Tensor], room: Tensor | None) -> Tensor:
    size = len(images) * images[0].nbytes
    if room is None or images[0].dtype != torch.uint8 or size > len(room):
        return torch.stack(list(images))
    return torch.stack(list(images), out=room[:size].view(len(images), *images[0].shape))


def _padded(texts: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Return (B, L) int64 token ids, padded with 0, and (B, L) bool mask; None is all padding."""
    known = [torch.zeros(0, dtype=torch.int64) if text is None else text for text in texts]
    input_ids = pad_sequence(known, batch_first=True)
    lengths = torch.tensor([len(text) for text in known])
    return input_ids, torch.arange(input_ids.shape[1])[None] < lengths[:, None]


def _labels(examples: Sequence[Example]) -> Tensor:
    """Return (B,) class columns, or (B, L) target tokens, padded with IGNORE_INDEX."""
    targets = [e.processed.labels for e in examples if e.processed.labels is not None]
    if not targets:
        return torch.tensor([example.label for example in examples])
    if len(targets) < len(examples):
        raise ValueError("samples with target tokens and samples with classes met in one batch")
    return pad_sequence(targets, batch_first=True, padding_value=IGNORE_INDEX)


def _conversation(
    sample: Sample, task: Task, max_pixels: int
) -> tuple[Conversation, Tensor | None]:
    """Return the conversation of a sample and its decoded image, None if it has no image."""
    if "json" not in sample.members:
        raise BadSample("it has no conversation (.json)")
    dialogue = apply_template(read_dialogue(sample.members["json"]), *task.templates[:1] or ("{}",))
    image_tokens = sum(turn.text.count(IMAGE_TOKEN) for turn in dialogue.turns)
    if any(extension in sample.members for extension in IMAGES):
        if image_tokens > 1:
            raise BadSample(f"its conversation shows {image_tokens} images and it has one")
        if not image_tokens:
            first = dialogue.turns[0]
            with_image = Turn(first.role, f"{IMAGE_TOKEN}\n{first.text}")
            dialogue = replace(dialogue, turns=(with_image, *dialogue.turns[1:]))
        return dialogue, decode_image(_image_bytes(sample), max_pixels)
    if image_tokens:
        raise BadSample(f"its conversation shows {image_tokens} images and it has none")
    return dialogue, None


def _image_bytes(sample: Sample) -> bytes:
    for extension in IMAGES:
        if extension in sample.members:
            return sample.members[extension]
    raise BadSample(f"it has no image (.{', .'.join(IMAGES)})")


def _class_column(sample: Sample, task: Task) -> int:
    """Return the column of a sample's class; its ``.cls`` holds the card's label."""
    if "cls" not in sample.members:
        raise BadSample("it has no label (.cls)")
    stated = sample.members["cls"]
    matched = _WHOLE_NUMBER.fullmatch(stated)
    if matched is None:
        raise BadSample(f"its label is {stated[:20]!r}, expected a whole number")
    label = int(matched[1])
    if label >= len(task.label_to_class):
        raise BadSample(
            f"its label is {label}, the card has classes 0 to {len(task.label_to_class) - 1}"
        )
    if task.label_to_class[label] < 0:
        raise BadSample(f"its label is {label}, which is not a class of task '{task.name}'")
    return task.label_to_class[label]


def _text(sample: Sample, member: str) -> str:
    if member not in sample.members:
        raise BadSample(f"it has no caption (.{member})")
    try:
        text = sample.members[member].decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadSample(f"its caption (.{member}) is not UTF-8 ({error.reason})") from None
    if not has_visible_text(text):
        raise BadSample(f"its caption (.{member}) is empty")
    return text


@dataclass(frozen=True)
class ImageLabelCollate:
    """Collate function for a dataset of (image, label) pairs, such as torchvision's.

    ``DataLoader(dataset, batch_size=32, collate_fn=ImageLabelCollate(model.transform(True)))``
    yields ``Batch``. Augmentation is seeded by torch's generator, which a DataLoader seeds in every
    worker.

    Attributes:
        transform: of the model, ``model.transform(train)``.
        task: index of the task that the samples come from.
    """

    transform: Transform
    task: int = 0

    def __call__(self, pairs: Sequence[Any], seeds: Sequence[int] | None = None) -> Batch:
        """Batch of B pairs.

        Args:
            pairs: image, a PIL image or a tensor (3, H, W) of uint8 or of floats from 0 to 1, of
                any size; and class index.
            seeds: B seeds of augmentation; None = drawn from torch's generator.
        """
        known = [_pair(item) for item in pairs]
        seeds = [_seed() for _ in pairs] if seeds is None else seeds
        images = [
            cast(Tensor, self.transform(_pixels(image), None, seed).image)
            for (image, _), seed in zip(known, seeds, strict=True)
        ]
        return Batch.from_images(images, [_label(label) for _, label in known], task=self.task)


@dataclass(frozen=True)
class ImageCaptionCollate:
    """Collate function for a dataset of (image, caption) pairs, such as torchvision's.

    Of an image with several captions, as in ``CocoCaptions``, one is drawn at random.

    Attributes:
        transform: of the model, ``model.transform(train)``.
        task: index of the task that the samples come from.
    """

    transform: Transform
    task: int = 0

    def __call__(self, pairs: Sequence[Any], seeds: Sequence[int] | None = None) -> Batch:
        """Batch of B pairs.

        Args:
            pairs: image as in ``ImageLabelCollate``; and its caption, or a list of captions.
            seeds: B seeds of the draw and of augmentation; None = from torch's generator.

        Raises:
            ValueError: if a sample has no caption, or the model has no tokenizer.
        """
        seeds = [_seed() for _ in pairs] if seeds is None else seeds
        samples = [
            self.transform(_pixels(image), _one_of(text, seed), seed)
            for (image, text), seed in zip(map(_pair, pairs), seeds, strict=True)
        ]
        if any(sample.input_ids is None for sample in samples):
            raise ValueError(
                "the transform gives no token ids: use model.transform(...) of a model with a "
                "tokenizer, or ImageLabelCollate for class labels"
            )
        input_ids, mask = _padded([sample.input_ids for sample in samples])
        images = [cast(Tensor, sample.image) for sample in samples]
        batch = Batch.from_images(images, task=self.task)
        return replace(batch, input_ids=input_ids, attention_mask=mask)


def collate_images(
    pairs: Sequence[Any], *, task: int = 0, images_are: ImagesAre | None = None,
    mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
) -> Batch:  # fmt: skip
    """Collate (image, label) pairs of a dataset that has resized its images, as torchvision's can.

    ``DataLoader(dataset, batch_size=32, collate_fn=mmcl.collate_images)`` yields ``Batch``;
    ``functools.partial`` sets arguments. ``ImageLabelCollate`` applies the model's own transform.

    Args:
        pairs: B pairs (or mappings with "image" and "label"): an image, (3, H, W) uint8 or floating
            or a PIL image, all of one size; and a class index.
        task: index of the task that the samples come from.
        images_are: as in ``Batch.from_images``, with ``mean`` and ``std``.
        mean: of the three channels.
        std: of the three channels.

    Raises:
        ValueError: if an item is no pair, sizes differ, or the images are not ``images_are``.
    """
    known = [_pair(item) for item in pairs]
    images = stack_images([_tensor(image) for image, _ in known])
    labels = [_label(label) for _, label in known]
    return Batch.from_images(images, labels, task=task, images_are=images_are, mean=mean, std=std)


def collate_captions(
    pairs: Sequence[Any], *, tokenizer: Callable[[Sequence[str]], Tensor], task: int = 0,
    images_are: ImagesAre | None = None, mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Batch:  # fmt: skip
    """Collate (image, caption) pairs of a dataset that has resized its images.

    Use it as ``functools.partial(mmcl.collate_captions, tokenizer=model.tokenizer)``. Of several
    captions of an image one is drawn by torch's generator.

    Args:
        pairs: as in ``collate_images``, with a caption or a list of captions for the label.
        tokenizer: B texts -> (B, L) token ids padded with 0.
        task: index of the task that the samples come from.
        images_are: as in ``Batch.from_images``, with ``mean`` and ``std``.
        mean: of the three channels.
        std: of the three channels.

    Raises:
        ValueError: if an item is no pair, a caption is missing, sizes differ, or the images are not
            ``images_are``.
    """
    known = [_pair(item) for item in pairs]
    images = stack_images([_tensor(image) for image, _ in known])
    texts = [_one_of(text, _seed()) for _, text in known]
    return Batch.from_texts(
        texts, images, tokenizer=tokenizer, task=task, images_are=images_are, mean=mean, std=std
    )


def _pair(item: Any) -> tuple[Any, Any]:
    """Return the image and the label or text of a dataset's item."""
    if isinstance(item, Mapping) and "image" in item:
        for name in ("label", "labels", "caption", "text"):
            if name in item:
                return item["image"], item[name]
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    has = f"keys {', '.join(map(str, item))}" if isinstance(item, Mapping) else "no two parts"
    raise ValueError(
        f"an item of the dataset is {type(item).__name__} with {has}, expected (image, label) or a "
        "mapping with 'image' and 'label': write a collate_fn that returns mmcl.Batch.from_images"
    )


def _label(label: Any) -> int:
    if isinstance(label, str) or not hasattr(label, "__int__"):
        raise ValueError(
            f"a label is {label!r}, expected a class index: map names to 0, 1, ... in the order of "
            "model.set_classes"
        )
    return int(label)


def _tensor(image: Any) -> Tensor:
    return image if isinstance(image, Tensor) else _pixels(image)


def _pixels(image: Any) -> Tensor:
    """Pixels (3, H, W) uint8 of a PIL image, by the rules of files (`rgb_array`), or a tensor."""
    if isinstance(image, Tensor):
        return as_uint8(image)
    if not hasattr(image, "convert"):
        raise ValueError(
            f"an image is {type(image).__name__}, expected a PIL image or a tensor (3, H, W): give "
            "the dataset a transform that makes one"
        )
    return torch.from_numpy(rgb_array(image)).permute(2, 0, 1).contiguous()


def _one_of(texts: str | Sequence[str], seed: int) -> str:
    if isinstance(texts, str):
        return texts
    if not texts:
        raise ValueError("a sample has an empty list of captions: give it one, or leave it out")
    return texts[hash_seed(seed) % len(texts)]


def _seed() -> int:
    return int(torch.randint(1 << 31, ()))
