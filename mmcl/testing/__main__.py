"""``python -m mmcl.testing my_package.my_file:MyStrategy``: contract checks, a line each."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from mmcl.core import Strategy
from mmcl.testing.contract import MODEL_KINDS, check_strategy


def main(argv: Sequence[str] | None = None) -> int:
    """Run the contract checks on a strategy; 0 if all hold, 1 if one fails, 2 for wrong options."""
    parser = argparse.ArgumentParser(
        prog="python -m mmcl.testing",
        description="Check a strategy against the contract that all strategies of mmcl hold, on a "
        "small dual encoder (classes) and a small generative model (answers).",
    )
    parser.add_argument("strategy", help="module:Class, for example my_package.my_file:MyStrategy")
    parser.add_argument("--args", default="{}", help="its arguments as JSON: '{\"l2\": 0.1}'")
    parser.add_argument("--model", choices=MODEL_KINDS, help="check on one of the models alone")
    given = parser.parse_args(argv)
    try:
        cls, arguments = find_strategy(given.strategy), _arguments(given.args)
        cls(**arguments)
    except (ImportError, TypeError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    torch.set_num_threads(1)  # such small models are several times slower on more
    failed = 0
    kinds = MODEL_KINDS if given.model is None else (given.model,)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for result in check_strategy(lambda: cls(**arguments), kinds):
            failed += result.outcome == "failed"
            reason = f" {result.message}" if result.message else ""
            print(f"{result.outcome:8}{result.model:9}{result.check}{reason}", flush=True)
    print(f"{failed} failed" if failed else f"{cls.__name__} holds the contract")
    return int(failed > 0)


def find_strategy(path: str) -> type[Strategy]:
    """Return the strategy of a path ``module:Class`` or ``module.Class``.

    Raises:
        ImportError: if there is no such module.
        TypeError: if it is no strategy.
        ValueError: if the module has no such class, or none is named.
    """
    module, _, name = path.rpartition(":" if ":" in path else ".")
    if not module:
        raise ValueError(f"the strategy is '{path}': give its module too, as in my_file:{path}")
    loaded = importlib.import_module(module)
    found: Any = getattr(loaded, name, None)
    if found is None:
        raise ValueError(f"{module} has no class '{name}': check its name")
    if not (isinstance(found, type) and issubclass(found, Strategy)):
        raise TypeError(f"{path} is no strategy: inherit from mmcl.Strategy")
    return found


def _arguments(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"--args is {text}: give a JSON object, such as '{{\"l2\": 0.1}}'")
    return found


if __name__ == "__main__":
    sys.exit(main())
