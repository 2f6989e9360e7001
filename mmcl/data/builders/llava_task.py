"""What a task is made from where its data are instruction files and picture folders, and how."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

SHARD_BYTES = 256 << 20


@dataclass(frozen=True)
class LlavaTask:
    """What a task is made from.

    Args:
        name: of the task; letters, digits, - and _.
        train: instruction file to learn from.
        images: folders from which its image paths start; the first that has the file is taken.
        test: instruction file to score on; None holds out a share of the training pictures.
        test_images: as ``images``, for the test file.
        references: file with all right answers of the test questions, see `read_references`.
        answer_field: of the test file's records.
        scorer: of the card.
        max_new_tokens: of the card; None leaves it to the default.
    """

    name: str
    train: Path
    images: tuple[Path, ...]
    test: Path | None = None
    test_images: tuple[Path, ...] = ()
    references: Path | None = None
    answer_field: str = "answer"
    scorer: str = "exact"
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", self.name):
            raise ValueError(f"task name is {self.name!r}, expected letters, digits, - and _")


@dataclass(frozen=True)
class Options:
    """How a task is made.

    Args:
        seed: of what is drawn: the held-out pictures and the limit's choice.
        hold_out: share of the training samples that is tested on where there is no test file.
        limit: 200 = at most 200 samples of each file, 0.02 = that share of them; None = all.
        shard_bytes: size at which a shard is closed; at least one sample is in each.
        max_faults: share of a file's samples that may be unusable.
    """

    seed: int = 0
    hold_out: float = 0.02
    limit: int | float | None = None
    shard_bytes: int = SHARD_BYTES
    max_faults: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.hold_out < 1:
            raise ValueError(f"hold_out is {self.hold_out}, expected a share between 0 and 1")
        if not 0 <= self.max_faults <= 1:
            raise ValueError(f"max_faults is {self.max_faults}, expected a share from 0 to 1")
        if self.shard_bytes < 1:
            raise ValueError(f"shard_bytes is {self.shard_bytes}, expected 1 or more")
        share = isinstance(self.limit, float) and 0 < self.limit <= 1
        if not (self.limit is None or share or (self.limit >= 1 and self.limit == int(self.limit))):
            raise ValueError(
                f"limit is {self.limit}, expected a number of samples such as 200, or a share "
                "such as 0.02"
            )


@dataclass(frozen=True)
class LeftOut:
    """A sample that cannot be used: which file, which place in it, its id and the reason."""

    file: str
    position: int
    name: str
    reason: str

    def __str__(self) -> str:
        # Ids and paths come from the file: nothing in them may steer a terminal or fill it.
        line = f"{self.file}, sample {self.position} (id '{self.name[:60]}'): {self.reason[:300]}"
        return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in line)
