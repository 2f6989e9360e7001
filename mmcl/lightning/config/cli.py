"""ContinualCLI: the parser of ``mmcl train`` and of Lightning's own subcommands."""

from __future__ import annotations

import logging
import sys
from argparse import ArgumentError
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from jsonargparse import Namespace
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import CSVLogger, Logger
from pytorch_lightning.utilities.exceptions import (  # type: ignore[attr-defined]
    MisconfigurationException,  # re-exported from Fabric
)

from mmcl.evaluation.gates import Gate, parse_gates
from mmcl.lightning.checkpoints.checkpoint_checks import METADATA, reject_pickles
from mmcl.lightning.checkpoints.checkpoint_io import KeepBest
from mmcl.lightning.config.config_errors import (
    ConfigError,
    config_files,
    constructor_error,
    explain_parser_error,
    validate_config,
)
from mmcl.lightning.config.trainer_settings import (
    check_precision,
    check_trainer_settings,
    complete_settings,
    order_unions,
)
from mmcl.lightning.datamodule import ContinualDataModule
from mmcl.lightning.module import ContinualModule
from mmcl.lightning.stages.budget import ComputeBudget, RunBudget
from mmcl.lightning.stages.lineage import START
from mmcl.strategies import discover

_DEFAULTS = {"trainer.logger": False, "trainer.max_epochs": 1}
_LINKED = ("model.seed", "data.seed")
_USAGE = "%(prog)s --config X [--config OVERLAY] [--setting.name value ...]"


def quiet() -> None:
    """Silence Lightning's log messages: devices found, tips, ends of epochs."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger(f"{name}.utilities.rank_zero").setLevel(logging.WARNING)


class ContinualCLI(LightningCLI):
    """Parser of a run's configuration, which also builds module, data and trainer.

    Args:
        argv: command-line options; None = those of the process.
        subcommands: True for Lightning's ``fit``, ``validate``, ``test`` and ``predict``, which
            run at once; False to parse only.
        program: program name of the usage line.
        description: text of ``--help``.
    """

    def __init__(
        self,
        argv: Sequence[str] | None = None,
        *,
        subcommands: bool = False,
        program: str = "train.py",
        description: str = "",
    ) -> None:
        quiet()
        self._runs = subcommands
        self.run_folder: Path | None = None  # of a run that was moved
        self._parsed: dict[str, tuple[LightningArgumentParser, Namespace]] = {}
        discover()  # so that a class name alone selects a strategy
        names = LightningCLI.subcommands() if subcommands else ()
        usages = {name: {"usage": _USAGE.replace("%(prog)s", f"mmcl {name}")} for name in names}
        super().__init__(
            ContinualModule,
            ContinualDataModule,
            save_config_callback=None,
            seed_everything_default=0,
            parser_kwargs={"prog": program, "description": description, **usages},
            args=None if argv is None else list(argv),
            run=subcommands,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of a run other than model, data and trainer."""
        parser.add_argument("--run_name", type=str | None, help="run name (default: config file)")
        parser.add_argument("--output_dir", type=str, default="runs", help="directory of all runs")
        parser.add_argument(
            "--checkpoint_every_n_steps",
            type=int,
            default=200,
            help="steps between mid-task checkpoints, 0 = none",
        )
        parser.add_argument(
            "--keep_best",
            type=KeepBest | None,
            help="end every task with the weights of its lowest validation loss, or of its highest "
            "score (null: with those of its last step)",
        )
        parser.add_argument(
            "--start_from", type=str | None,
            help="another run's state whose weights this run starts from: RUN@3 or RUN@task",
        )  # fmt: skip
        parser.add_argument(
            "--gates", type=list[dict[str, Any]], default=[],
            help="limits that must be kept after each task: [{task: NAME, max_drop: 2.0}]",
        )  # fmt: skip
        parser.add_argument(
            "--budget", type=RunBudget, default=RunBudget(),
            help="limits of each task and of the stream, and bytes that the strategy keeps",
        )  # fmt: skip
        order_unions(parser)
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.seed")
        parser.set_defaults(_DEFAULTS)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Create a parser that raises its errors, so that they become sentences."""
        return super().init_parser(**{"usage": _USAGE, **kwargs, "exit_on_error": False})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse options and configuration files.

        Raises:
            ConfigError: with all errors of the configuration files, or the first one of the
                options.
        """
        argv = list(sys.argv[1:] if args is None else args)
        used = self._subcommand_parsers.get(argv[0], parser) if argv and self._runs else parser
        known = {*used.get_defaults(skip_validation=True).keys(), *_LINKED}
        errors = [error for file in config_files(argv) for error in validate_config(file, known)]
        if not errors:
            try:
                self.config = parser.parse_args(argv)
            except ArgumentError as error:
                errors.append(explain_parser_error(str(error), known))
        if len(errors) == 1:
            raise ConfigError(errors[0])
        if errors:
            lines = "\n".join(f"  - {error}" for error in errors)
            raise ConfigError(f"the configuration has {len(errors)} errors:\n{lines}")

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        # Lightning unpickles remote checkpoints by default, and sharded ones always.
        kwargs = {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}
        folder = Path(str(kwargs.get("ckpt_path")))
        if (folder / METADATA).is_file():
            reject_pickles(folder)
        return kwargs

    def instantiate_classes(self) -> None:
        """Build everything for a subcommand, nothing yet for ``mmcl train``."""
        if self.subcommand is not None:
            self._refuse_run_settings(self.subcommand)
            try:
                super().instantiate_classes()
            except ValueError as error:
                raise ValueError(constructor_error(error)) from error

    def _refuse_run_settings(self, subcommand: str) -> None:
        """Refuse settings of whole runs, which Lightning's commands would not obey."""
        given = self.config[subcommand]
        has_budget = RunBudget(**_budget(given["budget"])) != RunBudget()
        is_set = {"start_from": given["start_from"]}
        if subcommand == "fit":
            is_set |= {"gates": given["gates"], "budget": has_budget}
        if names := [name for name, value in is_set.items() if value]:
            raise ConfigError(
                f"mmcl {subcommand} is of one task and does not obey {', '.join(names)}: leave it "
                "out, or use mmcl train"
            )

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the Trainer of a subcommand; the loaders divide samples over devices themselves."""
        trainer = super().instantiate_trainer(**{**kwargs, "use_distributed_sampler": False})
        check_precision(trainer)
        return trainer

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.config["seed_everything"])

    @property
    def folder(self) -> Path:
        """Run directory ``<output_dir>/<run_name>``, named after config file and seed by default.

        ``configs/digits/tiny_ewc.yaml`` with seed 1 gives ``runs/digits-tiny_ewc-seed1``.
        """
        name = self.config.get("run_name")
        if not name:
            file = Path(str((self.config.get("config") or ["run"])[0])).absolute()
            has_group = file.parent.parent.name == "configs"
            name = f"{file.parent.name}-{file.stem}" if has_group else file.stem
            name += f"-seed{self.seed}" if self.seed else ""
        if self.is_fast_dev_run:
            name = f".fast_dev_run-{name}"
        return Path(str(self.config["output_dir"])) / str(name)

    @property
    def start_from(self) -> str | None:
        """State of another run whose weights this run starts from."""
        text: str | None = self.config.get("start_from")
        return text

    @property
    def is_fast_dev_run(self) -> bool:
        """Whether this is Lightning's ``fast_dev_run``, whose directory is removed at its end."""
        return bool(self.config["trainer"]["fast_dev_run"])

    def plain(self) -> dict[str, Any]:
        """Return the whole configuration as plain values."""
        # Nulls stay, because one may override a default.
        text = self.parser.dump(self.config, skip_link_targets=False, skip_unset=False)
        values: dict[str, Any] = yaml.safe_load(text)
        values.pop("config", None)
        return values

    def make_module(self) -> ContinualModule:
        """Build a new module with model and strategy."""
        given = {}
        if self.start_from:
            given["start_weights"] = str((self.run_folder or self.folder) / START)
        module: ContinualModule = self._build("model", ContinualModule, **given)
        return module

    def make_data(self) -> ContinualDataModule:
        """Build the datamodule."""
        data: ContinualDataModule = self._build("data", ContinualDataModule)
        return data

    def make_gates(self) -> list[Gate]:
        """Build the gates of the run.

        Raises:
            ValueError: naming the first wrong one.
        """
        return parse_gates(self.config["gates"])

    def make_budget(self) -> RunBudget:
        """Build the budget of the run.

        Raises:
            ValueError: if a limit is not above 0.
        """
        return RunBudget(**_budget(self.config["budget"]))

    def make_loggers(self) -> list[Logger]:
        """Build the configured loggers; True is one that writes ``logs/metrics.csv`` of the run.

        Raises:
            ValueError: if the package of a logger is not installed.
        """
        logger = self.config["trainer"].as_dict()["logger"]
        if logger in (True, None):
            return [CSVLogger(self.folder, name="", version="logs")]
        built = logger and self._build("trainer", pl.Trainer, logger=logger)["logger"]
        return list(built) if isinstance(built, Iterable) else [built] if built else []

    def make_trainer(self, **settings: Any) -> pl.Trainer:
        """Build a new Trainer with new callbacks.

        Args:
            settings: override the configuration; ``callbacks`` are added to the configured ones,
                and loggers are only those given here.

        Raises:
            ValueError: if a run cannot obey a setting, or Lightning refuses them, for example for a
                missing device or package.
        """
        configured = dict(self._build("trainer", pl.Trainer, logger=False))
        has_validation = bool(self.config["data"]["validation_share"])
        check_trainer_settings(configured, has_validation)
        own = configured.get("callbacks") or []
        callbacks = [*(own if isinstance(own, list) else [own]), *settings.pop("callbacks")]
        given = {**settings, "callbacks": callbacks}
        try:
            trainer = pl.Trainer(**complete_settings(configured, given, has_validation))
        except (MisconfigurationException, ModuleNotFoundError) as error:
            reason = " ".join(str(error).split()).rstrip(".!")
            raise ValueError(
                f"Lightning refuses these trainer settings ({reason}): correct "
                "trainer.accelerator, trainer.devices or trainer.strategy, or install what it names"
            ) from error
        check_precision(trainer)
        return trainer

    def _build(self, key: str, kind: type, **changes: Any) -> Any:
        # A run builds two Trainers per task, and parsing the options costs more than building one.
        cached = f"{key} {changes}"
        if cached not in self._parsed:
            parser = LightningArgumentParser()
            parser.add_lightning_class_args(kind, key)
            order_unions(parser)
            values = parser.parse_object({key: {**self.config[key].as_dict(), **changes}})
            self._parsed[cached] = parser, values
        parser, values = self._parsed[cached]
        try:
            return parser.instantiate(values)[key]
        except ValueError as error:
            raise ValueError(constructor_error(error)) from error


def _budget(given: Any) -> dict[str, Any]:
    """Return the arguments of a ``RunBudget`` from its parsed values."""
    scopes = {name: ComputeBudget(**vars(given[name])) for name in ("task", "stream")}
    return {**scopes, "buffer_bytes": given["buffer_bytes"]}
