"""Lightning's Trainer settings in a run over tasks: each is obeyed, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint, Timer
from pytorch_lightning.plugins.io import AsyncCheckpointIO
from pytorch_lightning.profilers import (
    AdvancedProfiler,
    Profiler,
    PyTorchProfiler,
    SimpleProfiler,
)

TRAINER_DEFAULTS = {
    "use_distributed_sampler": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
}
"""Trainer arguments of a run whose configuration does not set them: it has its own loaders,
checkpoints and progress line, and no validation without ``data.validation_share``."""

_TRUE_PRECISIONS = ("16-true", "bf16-true", "64-true", "transformer-engine")
_PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
_NEEDS_A_STEP = "a task ends after its last step, so it needs one: give 1 or more"


@dataclass(frozen=True)
class Rule:
    """What a run over tasks does with one argument of Lightning's Trainer.

    Attributes:
        meaning: what it does, one phrase, for an argument that is obeyed.
        allowed: values that are obeyed; empty = all.
        instead: for the other values, why they are refused and what to use.
        needs_validation: whether all values except ``allowed`` need a validation part.
    """

    meaning: str
    allowed: tuple[Any, ...] = ()
    instead: str = ""
    needs_validation: bool = False

    def refuses(self, value: Any, has_validation: bool) -> bool:
        """Return whether a value is refused."""
        if not self.instead or (self.needs_validation and has_validation):
            return False
        # 0 == False and 1 == 1.0 in Python, but not in a Trainer.
        return not any(value == each and type(value) is type(each) for each in self.allowed)


_VALIDATION = "there is no validation part to run it on: set data.validation_share, such as 0.1"
_OWN_CHECKPOINTS = (
    "a run writes its own checkpoints, from which it resumes and is evaluated: set "
    "checkpoint_every_n_steps (0 = only after every task), keep_best, or add a ModelCheckpoint to "
    "trainer.callbacks for others"
)
TRAINER_ARGUMENTS: dict[str, Rule] = {
    "accelerator": Rule("as in Lightning"),
    "strategy": Rule("as in Lightning; FSDP1 and DeepSpeed stage 3 are refused"),
    "devices": Rule("as in Lightning; batches and steps do not depend on it"),
    "num_nodes": Rule("as in Lightning"),
    "precision": Rule("as in Lightning, except that weights stay in float32: no 'true' precision"),
    "logger": Rule("as in Lightning"),
    "callbacks": Rule("new ones for every task; they can monitor `val/loss` and `val/<score>`"),
    "fast_dev_run": Rule("n batches of every task and test split; nothing is kept"),
    "max_epochs": Rule("per task; `epochs` on the card goes first"),
    "min_epochs": Rule("per task, before a callback may stop it"),
    "max_steps": Rule("optimizer steps per task; the learning rate ends there"),
    "min_steps": Rule("per task, before a callback may stop it"),
    "max_time": Rule("per task, over all its starts"),
    "limit_train_batches": Rule("global batches of an epoch, or a fraction of them"),
    "limit_val_batches": Rule(
        "as in Lightning, on the validation part", (None, 0, 0.0), _VALIDATION, True
    ),
    "limit_test_batches": Rule(
        "",
        (None, 1.0),
        "a cell of the matrix is measured on its whole test split: data.max_samples limits every "
        "split, to the same samples on any number of devices",
    ),
    "limit_predict_batches": Rule(
        "", (None, 1.0), "a run predicts nothing: give it to `mmcl predict`"
    ),
    "overfit_batches": Rule("the same global batches and augmentation in every epoch"),
    "val_check_interval": Rule(
        "global batches, or a fraction of an epoch", (None, 1.0), _VALIDATION, True
    ),
    "check_val_every_n_epoch": Rule("as in Lightning", (1,), _VALIDATION, True),
    "num_sanity_val_steps": Rule("as in Lightning, but 0 by default", (None, 0), _VALIDATION, True),
    "log_every_n_steps": Rule("as in Lightning"),
    "enable_checkpointing": Rule("", (None,), _OWN_CHECKPOINTS),
    "enable_progress_bar": Rule("false: no progress line"),
    "enable_model_summary": Rule("true: a summary before every task"),
    "accumulate_grad_batches": Rule(
        "micro-batches of a device's part of a global batch, whose size stays"
    ),
    "gradient_clip_val": Rule("as in Lightning, after the strategy's project_gradients"),
    "gradient_clip_algorithm": Rule("as in Lightning"),
    "deterministic": Rule("as in Lightning"),
    "benchmark": Rule("as in Lightning"),
    "inference_mode": Rule("as in Lightning, in evaluation"),
    "use_distributed_sampler": Rule("either value: mmcl's loaders divide samples over devices"),
    "profiler": Rule("as in Lightning; written to profiles/ in the run directory"),
    "detect_anomaly": Rule("as in Lightning"),
    "barebones": Rule("as in Lightning; callbacks have nothing to monitor"),
    "plugins": Rule("as in Lightning; AsyncCheckpointIO is refused"),
    "sync_batchnorm": Rule("as in Lightning"),
    "reload_dataloaders_every_n_epochs": Rule("as in Lightning; the batches stay the same"),
    "default_root_dir": Rule(
        "", (None,), "the files of a run are in its directory: set output_dir and run_name"
    ),
    "enable_autolog_hparams": Rule("as in Lightning"),
    "model_registry": Rule(
        "", (None,), "a run uploads nothing: `mmcl export` writes its model for other libraries"
    ),
}
"""Every argument of Lightning's Trainer, and what ``mmcl train`` does with it."""


def check_trainer_settings(settings: Mapping[str, Any], has_validation: bool) -> None:
    """Check that a run can obey all settings of a Trainer.

    Args:
        settings: arguments of the Trainer, as configured.
        has_validation: whether the run has a validation part.

    Raises:
        ValueError: naming all settings that it cannot obey, and what to use.
    """
    refused = [
        f"trainer.{name} is {value!r}: {rule.instead}"
        for name, value in settings.items()
        if (rule := TRAINER_ARGUMENTS[name]).refuses(value, has_validation)
    ]
    for name in ("max_epochs", "max_steps", "limit_train_batches"):
        if settings.get(name) == 0:
            refused.append(f"trainer.{name} is 0: {_NEEDS_A_STEP}")
    limits = (settings.get("max_steps", -1), settings.get("max_time"))
    if settings.get("max_epochs") == -1 and limits == (-1, None):
        refused.append(
            "trainer.max_epochs is -1 and a task would never end: set trainer.max_steps or "
            "trainer.max_time"
        )
    if settings.get("val_check_interval") is not None and not isinstance(
        settings["val_check_interval"], int | float
    ):
        refused.append(
            "trainer.val_check_interval is a time, and a resumed run would validate after other "
            "steps: give a number of batches, or a fraction of an epoch"
        )
    plugins = settings.get("plugins") or []
    plugins = plugins if isinstance(plugins, Sequence) else [plugins]
    if any(isinstance(plugin, AsyncCheckpointIO) for plugin in plugins):
        refused.append(
            "trainer.plugins has AsyncCheckpointIO, and a run that is killed could not resume "
            "from a half-written checkpoint: leave it out"
        )
    if refused:
        raise ValueError("; ".join(refused))


def complete_settings(
    configured: Mapping[str, Any], given: Mapping[str, Any], has_validation: bool
) -> dict[str, Any]:
    """Return the arguments of a Trainer of a run: its defaults, the configuration, what is given.

    Args:
        configured: the configuration, checked.
        given: what the run sets; overrides the configuration.
        has_validation: whether the run has a validation part.
    """
    callbacks = given.get("callbacks") or []
    has_value = {name: configured.get(name) is not None for name in TRAINER_DEFAULTS}
    own = {name: value for name, value in TRAINER_DEFAULTS.items() if not has_value[name]}
    own |= {"use_distributed_sampler": False, "enable_progress_bar": False}
    if has_validation:
        own.pop("limit_val_batches", None)
    # Lightning refuses these callbacks if the setting of their kind is off.
    kinds: tuple[tuple[str, type], ...] = (
        ("enable_checkpointing", Checkpoint),
        ("enable_progress_bar", pl.callbacks.ProgressBar),
        ("enable_model_summary", pl.callbacks.ModelSummary),
    )
    own |= {n: True for n, kind in kinds if any(isinstance(c, kind) for c in callbacks)}
    settings = {**configured, **own, **given}
    root = given.get("default_root_dir")
    if settings.get("profiler") is not None and root is not None:
        settings["profiler"] = _to_files(settings["profiler"], Path(str(root)) / "profiles")
    return settings


def _to_files(profiler: Profiler | str, folder: Path) -> Profiler | str:
    """Let a profiler write files: its reports would go to Lightning's log, which is silent."""
    if isinstance(profiler, str):
        if profiler.lower() not in _PROFILERS:
            return profiler
        made: Profiler = _PROFILERS[profiler.lower()]()
        profiler = made
    profiler.dirpath = profiler.dirpath or folder
    profiler.filename = profiler.filename or "profile"
    return profiler


def check_precision(trainer: pl.Trainer) -> None:
    """Check that a Trainer leaves weights and the state of strategies in their own precision.

    Raises:
        ValueError: naming what to use instead.
    """
    precision = str(trainer.precision)
    if precision.startswith(_TRUE_PRECISIONS):
        raise ValueError(
            f"trainer.precision is {precision!r}, which would convert the float64 statistics and "
            "the memory of strategies too, and frozen weights by whose hash checkpoints are "
            "checked: use 'bf16-mixed', '16-mixed' or '32-true'; a large frozen model is loaded "
            "in half precision by its own argument (dtype of mmcl.models.ImageTextToText)"
        )


def direct_checkpoints(trainer: Any, folder: Path, task: int) -> None:
    """Give every ModelCheckpoint without a ``dirpath`` a folder of its own for a task.

    Args:
        trainer: new.
        folder: folder of the run's own checkpoints.
        task: index of the task.

    Raises:
        ValueError: if one would write among the run's own checkpoints.
    """
    for callback in trainer.callbacks:
        if not isinstance(callback, ModelCheckpoint):
            continue
        if callback.dirpath is None:
            callback.dirpath = str(folder / f"task_{task:02d}")
        elif Path(callback.dirpath).resolve() == folder.resolve():
            raise ValueError(
                f"a ModelCheckpoint has the dirpath {folder}, where the run's own checkpoints are: "
                "leave dirpath out, or give it another folder"
            )


def check_monitors(trainer: Any, metrics: Sequence[str]) -> None:
    """Check that callbacks monitor metrics that the validation of a task logs.

    Args:
        trainer: its callbacks are checked; a name that does not start with "val/" may come from
            another callback.
        metrics: names of the metrics; empty = there is no validation part.

    Raises:
        ValueError: naming the callback and the metrics that there are.
    """
    for callback in trainer.callbacks:
        monitor = getattr(callback, "monitor", None)
        if not isinstance(monitor, str) or not monitor.startswith("val/") or monitor in metrics:
            continue
        known = f"the validation of this task logs {' and '.join(metrics)}: monitor one of them"
        reason = known if metrics else _VALIDATION
        raise ValueError(f"{type(callback).__name__} monitors '{monitor}', and {reason}")


def count_global_batches(trainer: pl.Trainer, parts: int) -> None:
    """Let a Trainer accumulate, and count the global batches of ``mmcl`` before a fit.

    In ``limit_train_batches`` and ``val_check_interval`` Lightning counts the micro-batches of a
    device, whose number depends on the devices.

    Args:
        trainer: new, before its fit.
        parts: micro-batches of a device that make up its part of a global batch.
    """
    trainer.accumulate_grad_batches = parts
    if isinstance(trainer.limit_train_batches, int):
        trainer.limit_train_batches *= parts
    if isinstance(trainer.val_check_interval, int):
        trainer.val_check_interval *= parts


def limit_to_whole_steps(trainer: pl.Trainer, batches: int) -> None:
    """Round a Trainer's fraction of the ``batches`` of an epoch down to whole optimizer steps.

    Raises:
        ValueError: if nothing is left.
    """
    limit, parts = trainer.limit_train_batches, trainer.accumulate_grad_batches
    if not isinstance(limit, float) or limit == 1.0:
        return
    steps = int(batches // parts * limit)
    if not steps:
        raise ValueError(
            f"trainer.limit_train_batches (or overfit_batches) is {limit:g} of {batches // parts} "
            "global batches, which is less than one: give a larger fraction, or a number of them"
        )
    trainer.limit_train_batches = steps * parts


def planned_steps(trainer: pl.Trainer) -> tuple[int, int]:
    """Return the optimizer steps of all epochs of a fit, and those up to ``max_steps``.

    Both are 0 if only a time or a callback ends the fit.
    """
    # The single micro-batch of a task without trainable parameters is a step as well.
    steps_per_epoch = -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)
    full = steps_per_epoch * max(0, int(trainer.max_epochs or 1))
    if trainer.max_steps == -1:
        return full, full
    return full, min(full or trainer.max_steps, trainer.max_steps)


def early_end(trainer: Any, done: int, full: int, limit: str | None = None) -> str:
    """Return why a fit ended after ``done`` of ``full`` steps, "" if it took all of them.

    Args:
        trainer: after the fit.
        done: its steps.
        full: steps of all epochs, 0 = they have no end.
        limit: what else limited them.
    """
    if done >= full:
        return ""
    timers = [each.time_remaining() for each in trainer.callbacks if isinstance(each, Timer)]
    stopping = [c.monitor for c in trainer.callbacks if isinstance(c, EarlyStopping)]
    if limit:
        why = limit
    elif 0 < trainer.max_steps <= done:
        why = f"trainer.max_steps {trainer.max_steps}"
    elif any(seconds is not None and seconds <= 0 for seconds in timers):
        why = "trainer.max_time"
    else:
        why = f"EarlyStopping on {', '.join(stopping)}" if stopping else "a callback"
    return f"was ended by {why} after {done} of {full} steps"


def expect_no_early_end(trainer: Any, keeps_best: bool) -> None:
    """Check that nothing ends a task of an infinite schedule before its planned last step.

    Raises:
        ValueError: naming the setting or callback.
    """
    stopping = [type(c).__name__ for c in trainer.callbacks if isinstance(c, Timer | EarlyStopping)]
    if keeps_best or stopping:
        name = "keep_best" if keeps_best else f"trainer.callbacks ({stopping[0]}) or max_time"
        raise ValueError(
            f"lr_schedule is 'infinite', whose annealed branch begins at the last step of a task, "
            f"and {name} chooses another: leave it out, or use lr_schedule rewarm_cosine"
        )


def order_unions(parser: Any) -> None:
    """Let a parser try int before float for every setting that may be either.

    typing caches ``Optional[Union[int, float]]`` under a key that ignores the order, so it depends
    on what was imported first whether 1 (one batch) is parsed as 1.0 (all of them).
    """
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)
        kinds = get_args(hint)
        if get_origin(hint) in (Union, UnionType) and {int, float} <= set(kinds):
            others = [kind for kind in kinds if kind is not int]
            others.insert(others.index(float), int)
            action._typehint = reduce(or_, others)
