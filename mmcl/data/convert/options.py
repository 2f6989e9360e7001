"""Options of a conversion."""

from __future__ import annotations

import re
from dataclasses import dataclass

_SCENARIOS = ("class", "domain", "task")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class ConvertOptions:
    """Options of a conversion.

    Args:
        name: of the stream and its card; letters, digits, - and _.
        task: name of the task if there is only one; "" takes ``name``.
        scenario: "class", "domain" or "task"; None = "class" if every task has its own classes,
            else "domain".
        classes_per_task: split the classes, in their order, into tasks of this many; None = do not.
        test_fraction: fraction of the samples that is held out if the input has no test split.
        seed: of the held-out draw and of ``max_samples``.
        max_samples: 200 = at most 200 samples of each input, 0.02 = that fraction; None = all.
        shard_samples: samples at which a shard is closed.
        shard_bytes: size at which a shard is closed; at least one sample is in each.
        max_bad_fraction: fraction of an input's samples that may be bad and are left out.
        num_workers: processes.
        license: of the data, for the card.
        scorer: of answers.
        max_new_tokens: of an answer, for the card; None = the card's default.
    """

    name: str
    task: str = ""
    scenario: str | None = None
    classes_per_task: int | None = None
    test_fraction: float = 0.1
    seed: int = 0
    max_samples: int | float | None = None
    shard_samples: int = 1000
    shard_bytes: int = 256 << 20
    max_bad_fraction: float = 0.0
    num_workers: int = 1
    license: str = ""
    scorer: str = "exact"
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        for what, name in (("name", self.name), ("task", self.task or self.name)):
            if not _NAME.fullmatch(name):
                raise ValueError(f"{what} is {name!r}, expected up to 64 letters, digits, - and _")
        if not 0 < self.test_fraction < 1:
            raise ValueError(
                f"test_fraction is {self.test_fraction}, expected a fraction between 0 and 1"
            )
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(
                f"max_bad_fraction is {self.max_bad_fraction}, expected a fraction from 0 to 1"
            )
        if self.scenario not in (None, *_SCENARIOS):
            raise ValueError(f"scenario is {self.scenario!r}, expected {', '.join(_SCENARIOS)}")
        positive = (
            "classes_per_task", "shard_samples", "shard_bytes", "num_workers", "max_new_tokens",
        )  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected 1 or more")
        self._expect_max_samples()

    def _expect_max_samples(self) -> None:
        most = self.max_samples
        is_fraction = isinstance(most, float) and 0 < most <= 1
        if not (most is None or is_fraction or (most >= 1 and most == int(most))):
            raise ValueError(
                f"max_samples is {most}, expected a number of samples such as 200, or a fraction "
                "such as 0.02"
            )

    def sample_count(self, total: int) -> int:
        """Return how many of ``total`` samples ``max_samples`` leaves."""
        if self.max_samples is None:
            return total
        if isinstance(self.max_samples, float) and self.max_samples <= 1:
            return max(1, round(self.max_samples * total))
        return min(total, int(self.max_samples))
