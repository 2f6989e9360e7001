"""What may be wrong with a matrix file, all of it at once."""

from typing import Any, get_args

from mmcl.core.task import Scenario
from mmcl.metrics.jsontext import is_count, is_number, is_text_list

SCENARIOS: tuple[str, ...] = get_args(Scenario)
KEYS = ("scenario", "stream", "rows", "columns", "tasks", "kinds", "scores", "sizes", "values")


def faults(raw: object) -> list[str]:
    """List what keeps a parsed file from being an accuracy matrix, empty if nothing does."""
    if not isinstance(raw, dict):
        return [f"it is a {type(raw).__name__}, expected an object with {', '.join(KEYS)}"]
    absent = [f"{key!r} is missing" for key in KEYS if key not in raw]
    foreign = [f"{str(key)!r} is not a key of it" for key in raw if key not in KEYS]
    if absent or foreign:
        return absent + foreign
    return _head_faults(raw) or _length_faults(raw) or _value_faults(raw)


def _head_faults(raw: dict[str, Any]) -> list[str]:
    found = [
        f"{key!r} must be a list of strings"
        for key in ("rows", "columns", "kinds", "scores")
        if not is_text_list(raw[key])
    ]
    if raw["scenario"] not in SCENARIOS:
        found.append(f"scenario is {raw['scenario']!r}, expected one of {', '.join(SCENARIOS)}")
    if not isinstance(raw["stream"], str):
        found.append("'stream' must be a string")
    if not is_count(raw["tasks"]):
        found.append(f"tasks is {raw['tasks']!r}, expected the number of task columns")
    if not isinstance(raw["sizes"], list) or not all(map(is_count, raw["sizes"])):
        found.append("'sizes' must be a list of sample counts")
    if not isinstance(raw["values"], list):
        found.append("'values' must be a list of rows")
    return found


def _length_faults(raw: dict[str, Any]) -> list[str]:
    width, tasks, height = len(raw["columns"]), raw["tasks"], len(raw["rows"])
    found = [
        f"{key!r} has {len(raw[key])} entries for {width} columns"
        for key in ("kinds", "scores", "sizes")
        if len(raw[key]) != width
    ]
    if not 1 <= tasks <= width:
        found.append(f"tasks is {tasks}, expected 1 to {width} (the number of columns)")
    elif not 1 <= height <= tasks + 1:
        found.append(f"it has {height} rows, expected 1 to {tasks + 1} for {tasks} tasks")
    if len(raw["values"]) != height:
        found.append(f"'values' has {len(raw['values'])} rows, 'rows' names {height}")
    twice = sorted({name for name in raw["columns"] if raw["columns"].count(name) > 1})
    return found + [f"column {name!r} occurs twice" for name in twice]


def _value_faults(raw: dict[str, Any]) -> list[str]:
    found = []
    for name, row in zip(raw["rows"], raw["values"], strict=True):
        if not isinstance(row, list) or len(row) != len(raw["columns"]):
            found.append(f"row {name!r} is not a list of {len(raw['columns'])} values")
            continue
        bad = [value for value in row if value is not None and not is_number(value)]
        if bad:
            found.append(f"row {name!r} holds {bad[0]!r}, expected finite numbers or null")
    return found
