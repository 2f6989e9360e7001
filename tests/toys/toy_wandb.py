"""A stand-in for wandb in offline mode: what is logged goes into a file named after the run's id.

Like wandb's own process, it has what it was given when the run is killed, and takes nothing back.
"""

import json
import sys
import types
from pathlib import Path

from pytorch_lightning.loggers import wandb as lightning_wandb


class Run:
    """A run as ``wandb.init`` returns it."""

    def __init__(self, folder, name):
        self.id, self.name, self.file = name, name, folder / f"{name}.jsonl"

    def define_metric(self, *args, **kwargs):
        pass

    def log(self, values):
        with self.file.open("a") as file:
            file.write(json.dumps(values) + "\n")

    def finish(self):
        self.log({"finished": True})


def init(**settings):
    """Begin a run, or continue one of the same id."""
    assert settings["resume"] == "allow"
    return Run(Path(settings["dir"]), settings["id"])


def install():
    """Put the stand-in in the place of the package, in this process."""
    module = types.ModuleType("wandb")
    module.init, module.run = init, None
    parts = {
        "wandb": module,
        "wandb.sdk": types.ModuleType("wandb.sdk"),
        "wandb.sdk.lib": types.ModuleType("wandb.sdk.lib"),
        "wandb.wandb_run": types.ModuleType("wandb.wandb_run"),
    }
    parts["wandb.sdk.lib"].RunDisabled = type("RunDisabled", (), {})
    parts["wandb.wandb_run"].Run = Run
    sys.modules.update(parts)
    lightning_wandb._WANDB_AVAILABLE = True
