"""Plan of a recycling: the options that its folder was made with, so that a resume has the same."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmcl.core import write_atomic
from mmcl.evaluation import strict_json

PLAN, BASE = "plan.json", "base"


def check_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    """Check that a folder is new, or holds a recycling of the same options.

    Raises:
        ValueError: naming the first option that differs.
    """
    file = folder / PLAN
    if not file.is_file():
        discard(folder)  # a base that a killed call exported may be another one
        if folder.exists() and any(not p.name.startswith(f".{BASE}.") for p in folder.iterdir()):
            raise ValueError(f"{folder} exists and is no recycling: give a new folder as --out")
        return
    known = strict_json.read(file)
    old = known if isinstance(known, dict) else {}
    for name, value in plan.items():
        if old.get(name) != value:
            raise ValueError(
                f"{folder} holds another recycling ({name} is {old.get(name)!r} there and "
                f"{value!r} now): give another --out, or the same options to resume"
            )


def write_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    """Write the options of a recycling to its folder."""
    write_atomic(folder / PLAN, strict_json.to_bytes(dict(plan)))


def discard(folder: Path) -> None:
    """Remove the exported base of a folder without a plan, and the folder if it is empty then."""
    if (folder / PLAN).is_file():
        return
    shutil.rmtree(folder / BASE, ignore_errors=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
