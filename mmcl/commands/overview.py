"""``mmcl --help``: the commands first, then the settings of a run."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from mmcl.commands import COMMANDS, LIGHTNING
from mmcl.lightning.data import ContinualData
from mmcl.lightning.module import ContinualModule

_LIGHTNING_DOES = {
    "fit": "Lightning's own, on one task (data.task): train",
    "validate": "score the selected task",
    "test": "score every task until the selected one, and the probes",
    "predict": "print an answer for every test row of the selected task",
}
_FIRST_WORDS = (
    "Learn a stream of tasks with a vision-language model, from one YAML file. The same command "
    "goes on with a run that was stopped, trains what was appended to its card, and shows the "
    "result of a finished one."
)
_LAST_WORDS = (
    "A second --config is laid over the first. A strategy can be given by its class name alone: "
    "--model.strategy EWC --model.strategy.weight 10. --print_config shows the whole "
    "configuration, --debug the trace of an error. Every setting, Lightning's Trainer included: "
    "mmcl sequence --help."
)


def main(argv: Sequence[str]) -> int:
    """Print what can be done, and the settings of a run with a line each."""
    console = Console(highlight=False, markup=False)
    console.print(
        "usage: mmcl [command] --config X [--config OVERLAY] [--setting.name value ...]\n"
    )
    console.print(_FIRST_WORDS + "\n")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    for name, what in COMMANDS.items():
        table.add_row(name, what)
    for name in LIGHTNING:
        table.add_row(name, _LIGHTNING_DOES[name])
    console.print("commands:")
    console.print(table)
    settings = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    for name, what in _settings():
        settings.add_row(f"--{name}", what)
    console.print("\nsettings:")
    console.print(settings)
    console.print("\n" + _LAST_WORDS)
    return 0 if argv else 2


def _settings() -> Iterator[tuple[str, str]]:
    yield "name, --runs", "of the run, and the folder of all runs: a run lies in <runs>/<name>"
    yield "seed_everything", "seed of the run"
    yield "save_every_steps", "steps between checkpoints inside a task, 0 = none"
    for group, kind in (("model", ContinualModule), ("data", ContinualData)):
        for name, what in arguments(kind):
            if name != "seed":
                yield f"{group}.{name}", what
    yield "trainer.max_epochs", "passes over every task; trainer.* are the arguments of Lightning's"
    yield "trainer.devices", "Trainer: accelerator, devices, strategy, precision, ..."


def arguments(kind: type) -> Iterator[tuple[str, str]]:
    """Read name and explanation of every argument from a class docstring."""
    text = inspect.getdoc(kind) or ""
    part = re.search(r"Args:\n(.*?)(?:\n\n|\Z)", text, re.DOTALL)
    for found in re.finditer(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", part[1] if part else "", re.M):
        yield found[1], " ".join(found[2].split())
