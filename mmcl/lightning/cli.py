"""ContinualCLI: one parser for the sequence and for Lightning's own subcommands."""

from __future__ import annotations

import logging
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities.exceptions import (  # type: ignore[attr-defined]
    MisconfigurationException,  # handed on from Fabric
)

from mmcl.lightning.data import ContinualData
from mmcl.lightning.mistakes import Misconfigured, config_files, explain, file_faults, refusal
from mmcl.lightning.module import ContinualModule
from mmcl.lightning.shard_folder import METADATA, expect_plain
from mmcl.strategies import discover

_DEFAULTS = {"trainer.logger": False, "trainer.max_epochs": 1}
_IS_RENAMED = hasattr(LightningArgumentParser, "instantiate")  # by jsonargparse 4.49
_LINKED = ("model.seed", "data.seed")
_USAGE = "%(prog)s --config X [--config OVERLAY] [--setting.name value ...]"


def quiet() -> None:
    """Silence what Lightning says of itself: devices found, tips, ends of epochs."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger(f"{name}.utilities.rank_zero").setLevel(logging.WARNING)


class ContinualCLI(LightningCLI):
    """Parse a run's configuration and build its parts.

    Args:
        argv: options; None = those of the process.
        subcommands: True for Lightning's ``fit``, ``validate``, ``test`` and ``predict``, which
            run at once; False to parse only, for the sequence.
        program: name shown in the usage line.
        description: shown by ``--help``.
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
        self._parsers: dict[str, LightningArgumentParser] = {}
        discover()  # so that a strategy can be named by its class name alone
        super().__init__(
            ContinualModule,
            ContinualData,
            save_config_callback=None,
            seed_everything_default=0,
            parser_kwargs={"prog": program, "description": description, **_usages(subcommands)},
            args=None if argv is None else list(argv),
            run=subcommands,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what a run has beside model, data and trainer."""
        parser.add_argument("--name", type=str | None, help="of the run; default: the config's")
        parser.add_argument("--runs", type=str, default="runs", help="folder of all runs")
        parser.add_argument(
            "--save_every_steps", type=int, default=200, help="steps between checkpoints, 0 = none"
        )
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.seed")
        parser.set_defaults(_DEFAULTS)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser that raises what is wrong, so that it can be said in sentences."""
        return super().init_parser(**{"usage": _USAGE, **kwargs, "exit_on_error": False})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the options given, without Lightning's remark on giving any.

        Raises:
            Misconfigured: a line for every fault of the configuration files, or the first one
                of the options.
        """
        words = list(sys.argv[1:] if args is None else args)
        own = self._subcommand_parsers.get(words[0], parser) if words and self._runs else parser
        known = {*own.get_defaults(skip_validation=True).keys(), *_LINKED}
        faults = [fault for file in config_files(words) for fault in file_faults(file, known)]
        if not faults:
            try:
                self.config = parser.parse_args(words)
            except ArgumentError as error:
                faults.append(explain(str(error), known))
        if len(faults) == 1:
            raise Misconfigured(faults[0])
        if faults:
            listed = "\n".join(f"  - {fault}" for fault in faults)
            raise Misconfigured(f"the configuration has {len(faults)} faults:\n{listed}")

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        # Lightning unpickles remote checkpoints unless told not to, and those in shards always.
        given = {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}
        folder = Path(str(given.get("ckpt_path")))
        if (folder / METADATA).is_file():
            expect_plain(folder)
        return given

    def instantiate_classes(self) -> None:
        """Build everything for a subcommand, nothing yet for the sequence."""
        if self.subcommand is not None:
            super().instantiate_classes()

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.config["seed_everything"])

    @property
    def folder(self) -> Path:
        """Folder of the run: ``runs/<name>``, by default named after the config and the seed.

        ``configs/digits/tiny_ewc.yaml`` with seed 1 gives ``runs/digits-tiny_ewc-seed1``.
        """
        name = self.config.get("name")
        if not name:
            file = Path(str((self.config.get("config") or ["run"])[0])).absolute()
            is_sorted = file.parent.parent.name == "configs"
            name = f"{file.parent.name}-{file.stem}" if is_sorted else file.stem
            name += f"-seed{self.seed}" if self.seed else ""
        return Path(str(self.config["runs"])) / str(name)

    def plain(self) -> dict[str, Any]:
        """Return the whole configuration as plain values."""
        # Null stays, for it may stand against a default.
        keep_null = {"skip_unset" if _IS_RENAMED else "skip_none": False}
        text = self.parser.dump(self.config, skip_link_targets=False, **keep_null)
        values: dict[str, Any] = yaml.safe_load(text)
        values.pop("config", None)
        return values

    def make_module(self) -> ContinualModule:
        """Build model and strategy anew."""
        module: ContinualModule = self._build("model", ContinualModule)
        return module

    def make_data(self) -> ContinualData:
        """Build the datamodule."""
        data: ContinualData = self._build("data", ContinualData)
        return data

    def make_trainer(self, **settings: Any) -> pl.Trainer:
        """Build a fresh Trainer with fresh callbacks.

        Args:
            settings: win over the configuration; ``callbacks`` are added to its own.

        Raises:
            ValueError: if Lightning refuses them, a missing device or package among the reasons.
        """
        own = dict(self._build("trainer", pl.Trainer))
        given = own.get("callbacks") or []
        callbacks = [*(given if isinstance(given, list) else [given]), *settings.pop("callbacks")]
        try:
            return pl.Trainer(**{**own, **settings, "callbacks": callbacks})
        except (MisconfigurationException, ModuleNotFoundError) as error:
            reason = " ".join(str(error).split()).rstrip(".!")
            raise ValueError(
                f"Lightning refuses these trainer settings ({reason}): correct "
                "trainer.accelerator, trainer.devices or trainer.strategy, or install what it names"
            ) from error

    def _build(self, key: str, kind: type) -> Any:
        # A run makes two Trainers a task, and reading their options takes a tenth of a second.
        parser = self._parsers.get(key)
        if parser is None:
            parser = self._parsers[key] = LightningArgumentParser()
            parser.add_lightning_class_args(kind, key)
        values = parser.parse_object({key: self.config[key].as_dict()})
        made = parser.instantiate if _IS_RENAMED else parser.instantiate_classes
        try:
            return made(values)[key]
        except ValueError as error:
            raise ValueError(refusal(error)) from error


def _usages(subcommands: bool) -> dict[str, dict[str, str]]:
    names = LightningCLI.subcommands() if subcommands else ()
    return {name: {"usage": _USAGE.replace("%(prog)s", f"mmcl {name}")} for name in names}
