"""RunSummary: what a run came to, kept in summary.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mmcl.core.atomic import write_atomic
from mmcl.metrics import jsontext
from mmcl.metrics.figure import Figure
from mmcl.metrics.matrixcheck import SCENARIOS

Fault = str | Mapping[str, str]


@dataclass(frozen=True)
class RunSummary:
    """Everything about a run that fits on a page.

    Args:
        name: of the run.
        stream: of the stream.
        scenario: task, class or domain.
        strategy: such as ``ExperienceReplay``.
        model: such as ``OpenCLIP ViT-B-16``.
        seed: of the run.
        figures: the numbers, undefined ones with their reason.
        versions: library -> version.
        hashes: what -> sha256: card, weights ...
        faults: bad samples, each a sentence or a mapping such as shard, key, reason.
        warnings: sentences a person must read, such as that a strategy had no effect.
        seconds: wall time of everything.
        finished: whether the whole stream was learned and scored.
    """

    name: str
    stream: str
    scenario: str
    strategy: str
    model: str
    seed: int
    figures: Sequence[Figure] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    faults: Sequence[Fault] = ()
    warnings: Sequence[str] = ()
    seconds: float = 0.0
    finished: bool = False

    def figure(self, name: str) -> Figure | None:
        """Give the figure of that name, None if the run has none."""
        return next((figure for figure in self.figures if figure.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """Give plain values as they stand in summary.json."""
        return {
            **{each.name: getattr(self, each.name) for each in fields(self)},
            "figures": [asdict(figure) for figure in self.figures],
            "versions": dict(self.versions),
            "hashes": dict(self.hashes),
            "faults": [each if isinstance(each, str) else dict(each) for each in self.faults],
            "warnings": list(self.warnings),
        }

    @classmethod
    def from_dict(cls, raw: object, source: str = "summary.json") -> RunSummary:
        """Read plain values.

        Raises:
            ValueError: naming every fault at once, if they are not a summary.
        """
        known = {each.name for each in fields(cls)}
        if not isinstance(raw, dict) or set(raw) != known:
            odd = sorted(known ^ set(raw)) if isinstance(raw, dict) else sorted(known)
            raise ValueError(
                f"{source} is no summary of a run: missing or unknown {', '.join(odd)}"
            )
        faults = [key for key in raw if not _is_good(key, raw[key])]
        if faults:
            raise ValueError(
                f"{source} is no summary of a run: cannot read {', '.join(faults)}; "
                f"write it with RunSummary.write"
            )
        figures = tuple(Figure(**each) for each in raw["figures"])
        lists = {key: tuple(raw[key]) for key in ("faults", "warnings")}
        return cls(**{**raw, **lists, "figures": figures})

    @classmethod
    def read(cls, path: Path) -> RunSummary:
        """Read summary.json.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is not a summary.
        """
        return cls.from_dict(jsontext.parse(jsontext.read_text(path), str(path)), str(path))

    def write(self, path: Path) -> None:
        """Write summary.json, all of it or nothing.

        Raises:
            ValueError: if it holds something that ``read`` would refuse.
        """
        plain = self.to_dict()
        RunSummary.from_dict(plain, "this summary")
        write_atomic(path, jsontext.to_bytes(plain))


def _is_good(key: str, value: Any) -> bool:
    if key == "scenario":
        return value in SCENARIOS
    if key == "seed":
        return isinstance(value, int) and not isinstance(value, bool)
    if key == "finished":
        return isinstance(value, bool)
    if key == "seconds":
        return jsontext.is_number(value) and value >= 0
    return _is_good_list(key, value)


def _is_good_list(key: str, value: Any) -> bool:
    if key == "figures":
        return isinstance(value, list) and all(map(_is_figure, value))
    if key in ("versions", "hashes"):
        return _is_text_map(value)
    if key == "faults":
        return isinstance(value, list) and all(
            isinstance(each, str) or _is_text_map(each) for each in value
        )
    return jsontext.is_text_list(value) if key == "warnings" else isinstance(value, str)


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())


def _is_figure(raw: Any) -> bool:
    if not isinstance(raw, dict) or set(raw) != {"name", "value", "definition", "reason"}:
        return False
    words = isinstance(raw["name"], str) and isinstance(raw["definition"], str)
    value, reason = raw["value"], raw["reason"]
    if value is None:
        return words and isinstance(reason, str)
    return words and jsontext.is_number(value) and reason is None
