"""One method, one file; every ``Strategy`` in this folder is found by itself.

``mmcl.strategies.EWC`` imports the file that defines ``EWC``; a new strategy is a new file here (or
anywhere on the path, by its full ``class_path``), and no list has to be edited.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from mmcl.core import Chain, Strategy


def discover() -> dict[str, type[Strategy]]:
    """Import every file of this folder and return its strategies by class name, sorted."""
    found: dict[str, type[Strategy]] = {"Chain": Chain}
    for module in pkgutil.iter_modules(__path__, prefix=f"{__name__}."):
        for name, value in vars(importlib.import_module(module.name)).items():
            is_own = isinstance(value, type) and value.__module__ == module.name
            if is_own and issubclass(value, Strategy) and not name.startswith("_"):
                found[name] = value
    return dict(sorted(found.items()))


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    known = discover()
    if name not in known:
        raise AttributeError(f"there is no strategy {name}: known are {', '.join(known)}")
    return known[name]


def __dir__() -> list[str]:
    return sorted([*discover(), "discover"])
