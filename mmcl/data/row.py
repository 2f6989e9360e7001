"""From a sample to a row: which members a task needs; and how rows become a batch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmcl.core import PICTURE, UNSCORED, Batch, Dialogue, Reference, Row, Task, Transform, Turn
from mmcl.data.decode import decode_image
from mmcl.data.dialogue import read_dialogue, says_something, templated
from mmcl.data.faults import BadSample
from mmcl.data.shard import Sample
from mmcl.data.shards.index import IMAGES

READ_KINDS = ("classify", "caption", "retrieve", "answer")
_WHOLE_NUMBER = re.compile(rb"\s*([0-9]{1,18})\s*")


@dataclass(frozen=True)
class MadeRow:
    """A row as its model takes it, and where it came from.

    Attributes:
        row: what the transform made of the sample.
        label: column of its class, or UNSCORED.
        task: it belongs to.
        sample: its number inside that task.
        key: its name.
        is_recalled: True where the row is not of the task that is learned.
        reference: of rows that are answered.
        source: see ``Batch.source``.
        is_scored: False where it has no part in the task loss.
        bytes: of the sample's members.
    """

    row: Row
    label: int
    task: int
    sample: int
    key: str
    is_recalled: bool = False
    reference: Reference | None = None
    source: int = 0
    is_scored: bool = True
    bytes: int = 0


def make_row(
    sample: Sample,
    number: int,
    task: Task,
    transform: Transform,
    *,
    seed: int,
    max_pixels: int,
    is_recalled: bool = False,
) -> MadeRow:
    """Decode a sample and hand it to the model's transform.

    Args:
        sample: as it lies in its shard.
        number: of the sample inside its task.
        task: says which members are needed: ``.cls`` to classify, ``.json`` to answer, none
            besides the picture for "picture", else the text member.
        transform: of the model.
        seed: of the sample's augmentation.
        max_pixels: largest picture that is decoded.
        is_recalled: marks the row as a remembered one.

    Raises:
        BadSample: if a member is missing or broken, or the label is not one of the task's.
    """
    label, reference = UNSCORED, None
    if task.kind == "answer":
        dialogue, pixels = _asked(sample, task, max_pixels)
        row = transform(pixels, dialogue, seed)
        if row.labels is not None and not bool((row.labels != UNSCORED).any()):
            raise BadSample("its answer lies behind the model's max_length: raise it or shorten it")
        reference = dialogue.reference
    else:
        text = None
        if task.kind == "classify":
            label = _column(sample, task)
        elif task.kind != "picture":
            text = _text(sample, task.text.lower())
        row = transform(decode_image(_picture(sample), max_pixels), text, seed)
    taken = sum(map(len, sample.members.values()))
    return MadeRow(
        row, label, task.index, number, sample.key, is_recalled, bytes=taken, reference=reference
    )


def collate(
    rows: Sequence[MadeRow],
    faults: Sequence[str] = (),
    weight: float = 1.0,
    room: Tensor | None = None,
) -> Batch:
    """Put rows together; texts are padded with 0 to the longest, rows without text are all padding.

    Args:
        rows: at least one, pictures of one size.
        faults: what could not be read on the way.
        weight: see ``Batch.weight``.
        room: (bytes,) uint8 into which pictures are laid if they fit; None = new memory.
    """
    shown = [(place, made.row.image) for place, made in enumerate(rows)]
    images = [image for _, image in shown if image is not None]
    texts = [made.row.tokens for made in rows]
    tokens, mask = _padded(texts) if any(text is not None for text in texts) else (None, None)
    owner = None
    if len(images) < len(rows):
        owner = torch.tensor(
            [place for place, image in shown if image is not None], dtype=torch.int64
        )
    return Batch(
        images=_stacked(images, room) if images else None,
        owner=owner if images else None,
        labels=_labels(rows),
        task=torch.tensor([made.task for made in rows]),
        tokens=tokens,
        mask=mask,
        sample=torch.tensor([made.sample for made in rows]),
        recalled=torch.tensor([made.is_recalled for made in rows]),
        source=torch.tensor([made.source for made in rows])
        if any(m.source for m in rows)
        else None,
        scored=_scored(rows),
        bytes=torch.tensor([made.bytes for made in rows]),
        keys=tuple(made.key for made in rows),
        references=tuple(made.reference for made in rows if made.reference is not None),
        faults=tuple(faults),
        weight=weight,
    )


def _stacked(images: Sequence[Tensor], room: Tensor | None) -> Tensor:
    size = len(images) * images[0].nbytes
    if room is None or images[0].dtype != torch.uint8 or size > len(room):
        return torch.stack(list(images))
    return torch.stack(list(images), out=room[:size].view(len(images), *images[0].shape))


def _padded(texts: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    longest = max(len(text) for text in texts if text is not None)
    tokens = torch.zeros(len(texts), longest, dtype=torch.int64)
    mask = torch.zeros(len(texts), longest, dtype=torch.bool)
    for place, text in enumerate(texts):
        if text is not None:
            tokens[place, : len(text)] = text
            mask[place, : len(text)] = True
    return tokens, mask


def _scored(rows: Sequence[MadeRow]) -> Tensor | None:
    scored = [made.is_scored for made in rows]
    return None if all(scored) else torch.tensor(scored)


def _labels(rows: Sequence[MadeRow]) -> Tensor:
    """Return (B,) classes, or (B, L) tokens to be said, padded with UNSCORED."""
    said = [made.row.labels for made in rows if made.row.labels is not None]
    if not said:
        return torch.tensor([made.label for made in rows])
    if len(said) < len(rows):
        raise ValueError("rows that are answered and rows with classes met in one batch")
    return torch.nn.utils.rnn.pad_sequence(said, batch_first=True, padding_value=UNSCORED)


def _asked(sample: Sample, task: Task, max_pixels: int) -> tuple[Dialogue, Tensor | None]:
    """Return the dialogue of a sample and its picture; it may have none."""
    if "json" not in sample.members:
        raise BadSample("it has no dialogue (.json)")
    dialogue = templated(read_dialogue(sample.members["json"]), *task.templates[:1] or ("{}",))
    marks = sum(turn.text.count(PICTURE) for turn in dialogue.turns)
    if any(extension in sample.members for extension in IMAGES):
        if marks > 1:
            raise BadSample(f"its dialogue shows {marks} pictures and it has one")
        if not marks:
            first = dialogue.turns[0]
            shown = Turn(first.speaker, f"{PICTURE}\n{first.text}")
            dialogue = replace(dialogue, turns=(shown, *dialogue.turns[1:]))
        return dialogue, decode_image(_picture(sample), max_pixels)
    if marks:
        raise BadSample(f"its dialogue shows {marks} pictures and it has none")
    return dialogue, None


def _picture(sample: Sample) -> bytes:
    for extension in IMAGES:
        if extension in sample.members:
            return sample.members[extension]
    raise BadSample(f"it has no picture (.{', .'.join(IMAGES)})")


def _column(sample: Sample, task: Task) -> int:
    """Return the column of a sample's class; the card's label stands in ``.cls``."""
    if "cls" not in sample.members:
        raise BadSample("it has no label (.cls)")
    stated = sample.members["cls"]
    found = _WHOLE_NUMBER.fullmatch(stated)
    if found is None:
        raise BadSample(f"its label is {stated[:20]!r}, expected a whole number")
    label = int(found[1])
    if label >= len(task.columns):
        raise BadSample(f"its label is {label}, the card has classes 0 to {len(task.columns) - 1}")
    if task.columns[label] < 0:
        raise BadSample(f"its label is {label}, which is not a class of task '{task.name}'")
    return task.columns[label]


def _text(sample: Sample, member: str) -> str:
    if member not in sample.members:
        raise BadSample(f"it has no caption (.{member})")
    try:
        text = sample.members[member].decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadSample(f"its caption (.{member}) is not UTF-8 ({error.reason})") from None
    if not says_something(text):
        raise BadSample(f"its caption (.{member}) is empty")
    return text
