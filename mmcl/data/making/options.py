"""How a stream is made from somebody's own data."""

from __future__ import annotations

import re
from dataclasses import dataclass

_SCENARIOS = ("class", "domain", "task")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class MakeOptions:
    """How a stream is made.

    Args:
        name: of the stream and its card; letters, digits, - and _.
        task: name of the task where there is only one; "" takes ``name``.
        scenario: "class", "domain" or "task"; None = "class" where tasks have classes of their
            own, else "domain".
        classes_per_task: cut the classes, in their order, into tasks of so many; None = do not.
        test_share: of the samples that is held out where the source has no test part.
        seed: of the held-out choice.
        shard_samples: at which a shard is closed.
        shard_bytes: at which a shard is closed; at least one sample is in each.
        skip_bad: leave out what cannot be used.
        workers: processes.
        licence: of the data, for the card.
        scorer: of answers.
    """

    name: str
    task: str = ""
    scenario: str | None = None
    classes_per_task: int | None = None
    test_share: float = 0.1
    seed: int = 0
    shard_samples: int = 1000
    shard_bytes: int = 256 << 20
    skip_bad: bool = False
    workers: int = 1
    licence: str = ""
    scorer: str = "exact"

    def __post_init__(self) -> None:
        for what, name in (("name", self.name), ("task", self.task or self.name)):
            if not _NAME.fullmatch(name):
                raise ValueError(f"{what} is {name!r}, expected up to 64 letters, digits, - and _")
        if not 0 < self.test_share < 1:
            raise ValueError(f"test_share is {self.test_share}, expected a share between 0 and 1")
        if self.scenario not in (None, *_SCENARIOS):
            raise ValueError(f"scenario is {self.scenario!r}, expected {', '.join(_SCENARIOS)}")
        for name in ("classes_per_task", "shard_samples", "shard_bytes", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected 1 or more")
