"""``mmcl --help``: the list of commands, then the settings of a run."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from mmcl.cli import COMMANDS, LIGHTNING
from mmcl.lightning.datamodule import ContinualDataModule
from mmcl.lightning.module import ContinualModule

_LIGHTNING_COMMANDS = {
    "fit": "Lightning's own, on one task (data.task_index): train",
    "validate": "evaluate the selected task",
    "test": "evaluate every task until the selected one, and the eval-only tasks",
    "predict": "print a prediction for every test sample of the selected task",
}
_INTRODUCTION = (
    "Train a vision-language model on a stream of tasks, from one YAML file. The same command "
    "resumes a stopped run, trains on tasks that were appended to its card, and shows the results "
    "of a finished run."
)
_NOTES = (
    "A second --config overrides the first. A strategy can be given by its class name alone: "
    "--model.strategy EWC --model.strategy.ewc_lambda 10. --print_config shows the whole "
    "configuration, --debug the trace of an error. mmcl train --help lists every setting, "
    "including those of Lightning's Trainer."
)


def main(argv: Sequence[str]) -> int:
    """Print the commands and the settings of a run, a line each."""
    console = Console(highlight=False, markup=False)
    console.print(
        "usage: mmcl [command] --config X [--config OVERLAY] [--setting.name value ...]\n"
    )
    console.print(_INTRODUCTION + "\n")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    for name, summary in COMMANDS.items():
        table.add_row(name, summary)
    for name in LIGHTNING:
        table.add_row(name, _LIGHTNING_COMMANDS[name])
    console.print("commands:")
    console.print(table)
    settings = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    for name, summary in _settings():
        settings.add_row(f"--{name}", summary)
    console.print("\nsettings:")
    console.print(settings)
    console.print("\n" + _NOTES)
    return 0 if argv else 2


def _settings() -> Iterator[tuple[str, str]]:
    yield (
        "run_name, --output_dir",
        "name of the run and directory of all runs: output_dir/run_name",
    )
    yield "seed_everything", "seed of the run"
    yield "checkpoint_every_n_steps", "steps between mid-task checkpoints, 0 = none"
    for group, cls in (("model", ContinualModule), ("data", ContinualDataModule)):
        for name, summary in arguments(cls):
            if name != "seed":
                yield f"{group}.{name}", summary
    yield "trainer.max_epochs", "epochs of every task; trainer.* are the arguments of Lightning's"
    yield "trainer.devices", "Trainer: accelerator, devices, strategy, precision, ..."


def arguments(cls: type) -> Iterator[tuple[str, str]]:
    """Yield the name and the description of every argument in a class docstring."""
    text = inspect.getdoc(cls) or ""
    args = re.search(r"Args:\n(.*?)(?:\n\n|\Z)", text, re.DOTALL)
    for match in re.finditer(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", args[1] if args else "", re.M):
        yield match[1], " ".join(match[2].split())
