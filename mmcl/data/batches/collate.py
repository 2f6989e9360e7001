"""Collation: stored samples become examples by their task's needs, examples become a batch."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmcl.core import (
    IGNORE_INDEX,
    IMAGE_TOKEN,
    Batch,
    Conversation,
    Pixels,
    ProcessedSample,
    Reference,
    Task,
    Transform,
)
from mmcl.core.card.schema import repr_short
from mmcl.core.seeding import hash_seed
from mmcl.data.batches.caption_member import read_captions
from mmcl.data.batches.shared_memory import ImageStack
from mmcl.data.decode import decode_image
from mmcl.data.image_formats import MAX_IMAGES, image_members
from mmcl.data.shards.llava_json import apply_template, read_dialogue
from mmcl.data.shards.sample_fields import json_value
from mmcl.data.shards.tar_index import IMAGES
from mmcl.data.stored_sample import BadSample, Sample

PREPARED_AHEAD = 32
"""Samples that are read before the first of them is decoded."""

_Item = TypeVar("_Item")
_Prepared = TypeVar("_Prepared")
_WHOLE_NUMBER = re.compile(rb"\s*([0-9]{1,18})\s*")


class Example(NamedTuple):
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
        image_id: see ``Batch.image_ids``.
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
    image_id: int = -1


_UNPROCESSED = ProcessedSample(None)


def prepare_ahead(
    items: Sequence[_Item], prepare: Callable[[_Item], _Prepared]
) -> Iterator[tuple[_Item, _Prepared | BadSample]]:
    """Prepare some items at a time, and yield each with what was prepared, or with its error.

    Decoding an image empties the processor's cache of everything else: what is done between two
    images takes three times as long as what is done for some samples in a row.

    Args:
        items: in order.
        prepare: returns what is needed of an item, such as its sample, or raises BadSample.
    """

    def prepared(item: _Item) -> _Prepared | BadSample:
        try:
            return prepare(item)
        except BadSample as bad:
            return bad

    for start in range(0, len(items), PREPARED_AHEAD):
        chunk = items[start : start + PREPARED_AHEAD]
        yield from zip(chunk, list(map(prepared, chunk)), strict=True)


class PreparedExample(NamedTuple):
    """Example before its images are decoded.

    Attributes:
        example: all of it but ``processed``.
        text: caption or conversation, or None.
        images: the files of its images.
        seed: seed of its augmentation.
    """

    example: Example
    text: str | Conversation | None
    images: tuple[bytes, ...]
    seed: int


def mixes_captions_and_classes(tasks: Iterable[Task]) -> bool:
    """Return whether samples of these tasks and sources have captions as well as classes.

    In one batch, classes are then learned as captions: the contrastive loss compares all samples,
    as in FLYP (Goyal et al. 2023, arXiv:2212.00638).
    """
    kinds = {task.task_type for task in tasks}
    return "classification" in kinds and not kinds.isdisjoint(("captioning", "retrieval"))


def prepare_example(
    sample: Sample, number: int, task: Task, *, seed: int, is_replay: bool = False,
    as_caption: bool = False,
) -> PreparedExample:  # fmt: skip
    """Prepare an example: everything but its images, which ``finish_example`` decodes.

    Arguments and errors are those of ``make_example``. With ``as_caption``, a sample with a class
    has a caption too: the name in one of the task's templates, which the seed draws.
    """
    label, reference, image_id = IGNORE_INDEX, None, -1
    text: str | Conversation | None = None
    if task.task_type == "instruction":
        text, images = _conversation(sample, task)
        reference = text.reference
    else:
        if task.task_type == "classification":
            number_on_card = _class_number(sample, task)
            label = task.label_to_class[number_on_card]
            if as_caption:
                template = draw_caption(task.templates or ("{}",), seed)
                text = template.format(task.label_names[number_on_card])
        elif task.task_type != "image":
            text = draw_caption(read_captions(sample.members, task.text_field), seed)
        images = (_image_bytes(sample),)
        image_id = -1 if text is None else hash_image(images[0])
    size = sum(map(len, sample.members.values()))
    example = Example(
        _UNPROCESSED, label, task.index, number, sample.key, is_replay, reference, num_bytes=size,
        image_id=image_id,
    )  # fmt: skip
    return PreparedExample(example, text, images, seed)


def finish_example(
    prepared: PreparedExample, transform: Transform, max_pixels: int, stack: ImageStack | None
) -> Example:
    """Finish an example: decode its images, apply the model's transform, and stack them.

    Raises:
        BadSample: if an image is broken, or no token of an answer is left.
    """
    example, text, images, seed = prepared
    pixels: Pixels = None
    if len(images) == 1:
        pixels = decode_image(images[0], max_pixels)
    elif images:
        pixels = tuple(decode_image(image, max_pixels) for image in images)
    processed = transform(pixels, text, seed)
    labels = processed.labels if isinstance(text, Conversation) else None
    if labels is not None and not bool((labels != IGNORE_INDEX).any()):
        raise BadSample("its answer is beyond the model's max_length: raise it or shorten it")
    if stack is not None:
        processed = stack.place(processed)
    return example._replace(processed=processed)


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
            besides the image for "image", else that of ``text_field``.
        transform: the model's transform.
        seed: seed of the sample's augmentation, and of the draw of one of several captions.
        max_pixels: largest image that is decoded.
        is_replay: marks the example as replayed.

    Raises:
        BadSample: if a member is missing or broken, or the label is not one of the task's.
    """
    prepared = prepare_example(sample, number, task, seed=seed, is_replay=is_replay)
    return finish_example(prepared, transform, max_pixels, stack=None)


def make_pairs(
    sample: Sample, number: int, task: Task, transform: Transform, *, seed: int, max_pixels: int
) -> list[Example]:
    """Make one example for every caption of a sample, all with its image, decoded once.

    A sample of another task, or of one caption, gives the one example of ``make_example``, whose
    arguments and errors these are.
    """
    if task.task_type not in ("captioning", "retrieval"):
        return [make_example(sample, number, task, transform, seed=seed, max_pixels=max_pixels)]
    captions = read_captions(sample.members, task.text_field)
    image = _image_bytes(sample)
    pixels, size = decode_image(image, max_pixels), sum(map(len, sample.members.values()))
    rows = [transform(pixels, text, seed) for text in captions]
    return [
        Example(
            replace(row, image=rows[0].image), IGNORE_INDEX, task.index, number, sample.key,
            num_bytes=size, image_id=hash_image(image),
        )
        for row in rows
    ]  # fmt: skip


def hash_image(data: bytes | memoryview) -> int:
    """Hash the bytes of an image to its identity in [0, 2**63), the same in every process."""
    # A checksum of each half: a tenth of the time of blake2b, a hundredth of decoding a JPEG.
    plain = memoryview(data).cast("B")
    half = len(plain) // 2
    return (zlib.crc32(plain[:half]) << 32 | zlib.crc32(plain[half:])) >> 1


def collate(
    examples: Sequence[Example],
    errors: Sequence[str] = (),
    weight: float = 1.0,
    stack: ImageStack | None = None,
) -> Batch:
    """Collate examples into a batch; texts are padded with 0 to the longest.

    Examples without text are all padding.

    Args:
        examples: at least one, images of one size.
        errors: descriptions of the samples that could not be read.
        weight: see ``Batch.loss_weight``.
        stack: has the images that were placed as they were made; None = they are stacked here.
    """
    counts = [example.processed.num_images for example in examples]
    is_one_each = all(count == 1 for count in counts)
    images = [image for example in examples for image in _each(example)]
    texts = [example.processed.input_ids for example in examples]
    tokens, mask = pad_texts(texts) if any(text is not None for text in texts) else (None, None)
    is_mixed = any(example.source_id for example in examples)
    in_loss = [example.in_loss for example in examples]
    image_ids = [example.image_id for example in examples]
    return Batch(
        images=_stacked(images, stack) if images else None,
        image_owner=None if is_one_each or not sum(counts) else _owners(counts),
        labels=_labels(examples),
        task_ids=torch.tensor([example.task_id for example in examples]),
        input_ids=tokens,
        attention_mask=mask,
        sample_ids=torch.tensor([example.sample_id for example in examples]),
        is_replay=torch.tensor([example.is_replay for example in examples]),
        source_ids=torch.tensor([example.source_id for example in examples]) if is_mixed else None,
        in_loss=None if all(in_loss) else torch.tensor(in_loss),
        num_bytes=torch.tensor([example.num_bytes for example in examples]),
        image_ids=torch.tensor(image_ids) if max(image_ids) >= 0 else None,
        image_inputs=tuple(one for e in examples for one in e.processed.image_inputs),
        keys=tuple(example.key for example in examples),
        references=tuple(e.reference for e in examples if e.reference is not None),
        errors=tuple(errors),
        loss_weight=weight,
    )


def _each(example: Example) -> Sequence[Tensor]:
    """Return the images (3, H, W) of an example."""
    image = example.processed.image
    return () if image is None else (image,) if image.dim() == 3 else image.unbind()


def _owners(counts: Sequence[int]) -> Tensor:
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def _stacked(images: Sequence[Tensor], stack: ImageStack | None) -> Tensor:
    placed = None if stack is None else stack.images(len(images))
    return torch.stack(list(images)) if placed is None else placed


def pad_texts(texts: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Pad texts with 0 to (B, L) int64 token ids and (B, L) bool mask; None is all padding."""
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


def _conversation(sample: Sample, task: Task) -> tuple[Conversation, tuple[bytes, ...]]:
    """Return the conversation of a sample and the files of its images.

    Image tokens in the questions are as many as the images; without any, one for each image is put
    in front of the first question.
    """
    if "json" not in sample.members:
        raise BadSample("it has no conversation (.json)")
    dialogue = apply_template(read_dialogue(sample.members["json"]), *task.templates[:1] or ("{}",))
    tokens = sum(turn.text.count(IMAGE_TOKEN) for turn in dialogue.turns if turn.role == "user")
    images = image_members(sample.members)
    if tokens not in (0, len(images)) or len(images) > MAX_IMAGES:
        has = {0: "none", 1: "one"}.get(len(images), str(len(images)))
        raise BadSample(f"its conversation shows {tokens} images and it has {has}")
    if images and not tokens:
        place = next(index for index, turn in enumerate(dialogue.turns) if turn.role == "user")
        first = dialogue.turns[place]
        shown = replace(first, text=f"{IMAGE_TOKEN}\n" * len(images) + first.text)
        turns = (*dialogue.turns[:place], shown, *dialogue.turns[place + 1 :])
        dialogue = replace(dialogue, turns=turns)
    return dialogue, tuple(sample.members[name] for name in images)


def _image_bytes(sample: Sample) -> bytes:
    for extension in IMAGES:
        if extension in sample.members:
            return sample.members[extension]
    raise BadSample(f"it has no image (.{', .'.join(IMAGES)})")


def _class_number(sample: Sample, task: Task) -> int:
    """Return the number on the card of a sample's class, whose label is a number or a name."""
    stated = _stated_label(sample, task)
    matched, name = _WHOLE_NUMBER.fullmatch(stated), stated.decode("utf-8", "replace").strip()
    if matched is None and name not in task.label_names:
        raise BadSample(
            f"its label is {stated[:20]!r}, expected a whole number or one of the card's classes"
        )
    label = task.label_names.index(name) if matched is None else int(matched[1])
    if label >= len(task.label_to_class):
        raise BadSample(
            f"its label is {label}, the card has classes 0 to {len(task.label_to_class) - 1}"
        )
    if task.label_to_class[label] < 0:
        raise BadSample(f"its label is {label}, which is not a class of task '{task.name}'")
    return label


def _stated_label(sample: Sample, task: Task) -> bytes:
    field = task.label_field.strip(" .")
    if field.lower().startswith("json.") and "json" in sample.members:
        label = json_value(sample.members["json"], field)
        if isinstance(label, bool) or not isinstance(label, int | str):
            raise BadSample(f"its label ({field}) is {repr_short(label, 40)}, expected a number")
        return str(label).encode("utf-8", "surrogatepass")
    if "cls" not in sample.members:
        raise BadSample("it has no label (.cls)")
    return sample.members["cls"]


def draw_caption(texts: str | Sequence[str], seed: int) -> str:
    """Draw one of the captions of an image by a seed.

    Raises:
        ValueError: if there are none.
    """
    if isinstance(texts, str):
        return texts
    if not texts:
        raise ValueError("a sample has an empty list of captions: give it one, or leave it out")
    return texts[hash_seed(seed) % len(texts)]
