"""LightningDataModule of a stream of tasks, with one selected task for training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from mmcl.core import ReplayPlan, Strategy, Task, TaskStream
from mmcl.core.card import Stage
from mmcl.data import (
    ReplayCopyReader,
    eval_loader,
    open_stream,
    save_replay_copies,
    train_loader,
)
from mmcl.data.batches.lanes import expect_lanes, lanes_warning
from mmcl.data.batches.train_loader import WINDOW
from mmcl.data.remote.cache import parse_size
from mmcl.data.shards.replay_copies import released_tasks
from mmcl.evaluation.evaluators import EvalSpec, make_eval_spec
from mmcl.evaluation.scorers import SCORERS
from mmcl.lightning.config.stream_settings import StageData, apply_settings
from mmcl.lightning.config.trainer_settings import count_global_batches, limit_to_whole_steps
from mmcl.lightning.model_support import check_model_supports_stream
from mmcl.lightning.strategy_callback import OnDevice
from mmcl.streams.registry import card_path, find_stream

PREVIEWED = 1024
"""Samples of a task that a strategy may see before the task's loader is built."""


class ContinualDataModule(pl.LightningDataModule):
    """Datamodule that reads a stream of tasks from shards.

    Args:
        stream: name of a stream that mmcl can build ("digits"), or the path of a card or of its
            folder.
        data_dir: folder of built streams.
        global_batch_size: samples of one optimizer step over all devices, replay samples included.
        micro_batch_size: maximum samples of a forward pass on one device; more are accumulated.
            None = no limit.
        eval_batch_size: batch size of evaluation on one device.
        num_workers: processes that read and decode, 0 = none.
        task_order: task indices in training order, a subset is allowed; None = as on the card. The
            order of classes is set when a stream is made: mmcl data convert --class_order_seed.
        repeats: times that all tasks are trained in that order, None = 1; a second is "name (2)".
        task_epochs: task name -> epochs of that task, in place of the card's; the other tasks have
            those of the card, else ``trainer.max_epochs``.
        stages: stage of a task, "cpt", "dap" or "cft" -> its epochs, mixture and replay ratio, in
            place of the card's, see ``StageData``.
        max_samples: 200 = at most 200 samples of every split of a task, 0.02 = that fraction,
            1 = one sample, 1.0 = all.
        validation_share: fraction of the training samples of every task that is held out: it is
            never trained on, replayed or passed over by a strategy; ``fit`` measures val/loss and
            val/<score> on it. 0 = no validation.
        max_bad_fraction: fraction of a task's samples that may be unreadable before the run ends.
        allow_pipes: let a card run ``pipe:`` commands to open shards.
        verify_hashes: read every shard once and compare it with the card's hashes.
        cache_dir: folder for remote shards; None = $MMCL_CACHE or the user's cache folder.
        cache_limit: size limit of that folder, such as "200GB"; None = no limit.
        shuffle_window: remote shards whose samples are shuffled together; local ones all are.
        shuffle_lanes: parts of a task's remote shards that are read in parallel, a multiple of the
            number of devices: then a node fetches only its own. The order of samples depends on
            it. None = 1, and a warning where several nodes fetch the same shards.
        group_by_length: batches over which samples are sorted by the length of text and images
            before they are cut into batches, to reduce padding; 0 = no sorting.
        task_index: index of the task of ``fit`` and ``validate``; ``mmcl train`` sets it.
        seed: seed of order, augmentation and limits.
    """

    wrap_train_loader: Callable[[Any], Any] | None = None  # of a dry run
    memory: Path | None = None

    def __init__(
        self,
        stream: str = "digits",
        data_dir: str = "data",
        global_batch_size: int = 64,
        micro_batch_size: int | None = None,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        task_order: Sequence[int] | None = None,
        repeats: int | None = None,
        task_epochs: Mapping[str, int] | None = None,
        stages: Mapping[Stage, StageData] | None = None,
        max_samples: int | float | None = None,
        validation_share: float = 0.0,
        max_bad_fraction: float = 0.01,
        allow_pipes: bool = False,
        verify_hashes: bool = False,
        cache_dir: str | None = None,
        cache_limit: str | int | None = None,
        shuffle_window: int = WINDOW,
        shuffle_lanes: int | None = None,
        group_by_length: int = 0,
        task_index: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"global_batch_size": global_batch_size, "eval_batch_size": eval_batch_size}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"data.{name} is {size}, expected a number of samples, 1 or more")
        self.stream_name, self.data_dir = stream, Path(data_dir)
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.eval_batch_size, self.num_workers = eval_batch_size, num_workers
        self.task_order, self.repeats = task_order, 1 if repeats is None else repeats
        self.task_epochs, self.stages = dict(task_epochs or {}), dict(stages or {})
        is_count = max_samples is not None and max_samples > 1
        self.max_samples = int(max_samples or 0) if is_count else max_samples
        _check_share(validation_share)
        self.validation_share, self.verify_hashes = validation_share, verify_hashes
        self.cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        self.cache_limit = None if cache_limit is None else parse_size(cache_limit)
        self.shuffle_window, self.group_by_length = shuffle_window, group_by_length
        self.shuffle_lanes = expect_lanes(shuffle_lanes, global_batch_size)
        self.allow_pipes, self.max_bad_fraction = allow_pipes, max_bad_fraction
        self.task_index, self.seed = task_index, seed
        self.on_build: Callable[[int, int], None] | None = None
        self._start = (0, 0)
        self._prepared: Any = None
        self._counted_for: Any = None
        self._limit_val: int | float = 1.0

    @property
    def card(self) -> Path:
        """Path of the card, which may not be built yet."""
        return card_path(self.stream_name, self.data_dir)

    def prepare_data(self) -> None:
        """Build the stream if it is one of mmcl's and does not exist yet."""
        if not self.card.is_file() and not self.stream_name.endswith((".yaml", ".yml")):
            stream, _ = find_stream(self.stream_name)
            # Ranks start together: the builder takes a lock, and the next rank finds the stream.
            stream.builder()(self.card.parent, progress=self.on_build)

    def setup(self, stage: str | None = None) -> None:
        """Open and check the card and its shards, once; before a fit, see its Trainer's counts."""
        if stage == "fit" and self.trainer is not None:
            self.count_global_batches(self.trainer)
            self._limit_val = self.trainer.limit_val_batches
            if not self.validation_share:
                self.trainer.limit_val_batches = 0
        if self._prepared is None:
            self._prepared = open_stream(
                self.declared_stream,
                finished=self.released_tasks,
                max_samples=self.max_samples,
                validation_share=self.validation_share,
                seed=self.seed,
                allow_pipes=self.allow_pipes,
                verify_hashes=self.verify_hashes,
                cache_dir=self.cache_dir,
                cache_limit=self.cache_limit,
            )

    def teardown(self, stage: str) -> None:
        """Let the Trainer of a fit validate again, which it could not without a validation part."""
        if stage == "fit" and self.trainer is not None:
            self.trainer.limit_val_batches = self._limit_val

    @cached_property
    def declared_stream(self) -> TaskStream:
        """Stream of card, ``stages`` and ``task_epochs``, before samples are counted."""
        stream = TaskStream.read(self.card, self.task_order, tuple(SCORERS), self.repeats)
        if self.task_epochs or self.stages:
            known = [task.name for task in TaskStream.read(self.card)]
            apply_settings(stream, known, self.task_epochs, self.stages)
        return stream

    @property
    def released_tasks(self) -> list[int]:
        """Tasks whose replay samples were copied and whose training shards are missing."""
        return [] if self.memory is None else released_tasks(self.declared_stream, self.memory)

    @property
    def prepared(self) -> Any:
        """Open stream with its readers; calls ``setup``."""
        self.setup()
        return self._prepared

    @property
    def stream(self) -> TaskStream:
        """Stream of tasks with counted sizes."""
        stream: TaskStream = self.prepared.stream
        return stream

    def set_task(self, task: int) -> None:
        """Select the task of the next ``fit``, from its first batch."""
        self.task_index, self._start = task, (0, 0)

    def start_task(self, trainer: pl.Trainer) -> Task:
        """Return the task of ``fit``, and set its classes on the model."""
        check_model_supports_stream(self.stream, trainer.lightning_module.model)
        self.set_model_classes(trainer.lightning_module.model)
        return self.stream[self.task_index]

    def set_model_classes(self, model: Any) -> None:
        """Set the model's classes: all classes seen until the selected task."""
        seen = self.stream.tasks[: self.task_index + 1]
        names = self.stream.prompt_names(self.stream.classes_seen(self.task_index))
        if names and hasattr(model, "set_classes"):
            first_seen = [task.index for task in seen for _ in task.classes]
            # Tensors made in the inference mode of a validation could not be used in training.
            with torch.inference_mode(False):
                model.set_classes(names, seen[-1].templates, first_seen)

    def accumulate_grad_batches(self, world: int, configured: int = 1) -> int:
        """Return the number of micro-batches that each device accumulates per optimizer step.

        Args:
            world: number of processes.
            configured: the Trainer's ``accumulate_grad_batches``.

        Raises:
            ValueError: if that leaves larger micro-batches than ``micro_batch_size``.
        """
        largest = self.micro_batch_size
        needed = 1 if largest is None else -(-self.global_batch_size // (largest * world))
        if configured == 1:
            return needed
        if configured < needed:
            raise ValueError(
                f"trainer.accumulate_grad_batches is {configured}, and data.micro_batch_size "
                f"{largest} needs {needed}: set one of the two"
            )
        return configured

    def count_global_batches(self, trainer: Any) -> None:
        """Set a Trainer's accumulation, and let it count global batches; once per Trainer."""
        if trainer is not self._counted_for:
            self._counted_for, configured = trainer, trainer.accumulate_grad_batches
            parts = self.accumulate_grad_batches(trainer.world_size, configured)
            count_global_batches(trainer, parts)

    def train_dataloader(self) -> Any:
        """Return the loader of the selected task, from the resumed position."""
        trainer = self._active_trainer()
        module = trainer.lightning_module
        check_model_supports_stream(self.stream, module.model)
        replay_plan = self._replay_plan(module.strategy)
        loader = train_loader(
            self.prepared,
            self.task_index,
            module.model.transform(True),
            replay_plan=replay_plan,
            replay_readers=self._replay_readers(replay_plan),
            global_batch_size=self.global_batch_size,
            accumulation=trainer.accumulate_grad_batches,
            seed=self.seed,
            **self._loader_options(),
            position=self._next_position,
            window=self.shuffle_window,
            lanes=self.shuffle_lanes or 1,
            group=self.group_by_length,
        )
        limit_to_whole_steps(trainer, len(loader))
        task, is_joint = self.stream[self.task_index], replay_plan and not replay_plan.replay_ratio
        if warning := lanes_warning(
            self.shuffle_lanes, task.name, trainer.world_size, nodes=trainer.num_nodes,
            is_joint=bool(is_joint), is_remote=self.prepared.reader(task.index, "train").in_windows,
        ):  # fmt: skip
            warnings.warn(warning, stacklevel=2)
        return loader if self.wrap_train_loader is None else self.wrap_train_loader(loader)

    def task_pass(self, few: int | None = None) -> Any:
        """Return this rank's loader of one unaugmented pass over the selected task.

        Args:
            few: number of samples, None = all.
        """
        options = self._evaluation_options()
        return eval_loader(self.prepared, self.task_index, **options, split="train", few=few)

    def test_loaders(self, columns: Sequence[int]) -> list[Any]:
        """Return this rank's test loader of each requested matrix column.

        Raises:
            ValueError: if there are more devices than samples, or the model does not support the
                stream.
        """
        trainer = self._active_trainer()
        check_model_supports_stream(self.stream, trainer.lightning_module.model)
        for task in (self.stream.evaluated_task(column) for column in columns):
            # A rank without batches skips on_test_epoch_end, and the others would wait for it.
            if task.test_size < trainer.world_size:
                raise ValueError(
                    f"the test split of '{task.name}' has {task.test_size} samples for "
                    f"{trainer.world_size} devices: use fewer devices"
                )
        options = self._evaluation_options()
        return [eval_loader(self.prepared, column, **options) for column in columns]

    def column(self, row: int, column: int) -> EvalSpec:
        """Return the evaluation of matrix cell (row, column)."""
        return make_eval_spec(self.stream, row, column)

    def default_columns(self, stage: str) -> list[EvalSpec]:
        """Return the evaluations of Lightning's own ``test`` and ``validate``."""
        columns = self._default_columns() if stage == "test" else [self.task_index]
        return [self.column(self.task_index + 1, index) for index in columns]

    def test_dataloader(self) -> list[Any]:
        """Return the test loaders of every task until the selected one and eval-only tasks."""
        return self.test_loaders(self._default_columns())

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        """Names of what validation logs for the selected task; none without a validation part."""
        score = self.column(self.task_index + 1, self.task_index).score
        return ("val/loss", f"val/{score}") if self.validation_share else ()

    def val_dataloader(self) -> list[Any]:
        """Return the loader of the selected task's validation part, as a list.

        Without such a part ``fit`` has no validation, and Lightning's ``validate`` uses the test
        split, by whose score no setting may be chosen.

        Raises:
            ValueError: if there are more devices than samples.
        """
        task, trainer = self.stream[self.task_index], self._active_trainer()
        if not self.validation_share:
            return self.test_loaders([self.task_index])
        check_model_supports_stream(self.stream, trainer.lightning_module.model)
        size = len(self.prepared.reader(self.task_index, "validation"))
        if size < trainer.world_size:
            raise ValueError(
                f"the validation part of '{task.name}' has {size} samples for {trainer.world_size} "
                "devices: use fewer devices, or a larger data.validation_share"
            )
        options = self._evaluation_options()
        return [eval_loader(self.prepared, self.task_index, **options, split="validation")]

    def predict_dataloader(self) -> Any:
        """Return the test loader of the selected task."""
        return self.test_loaders([self.task_index])[0]

    def save_replay_copies(self, replay_plan: ReplayPlan | None, task: int) -> None:
        """Copy the replay samples of a finished task if the strategy stores copies."""
        if replay_plan is not None and replay_plan.storage == "copy" and self.memory is not None:
            save_replay_copies(self.prepared, replay_plan, self.memory, task)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the task: the epoch, and the finished batches of it."""
        trainer = self._active_trainer()
        # After a resume Lightning restarts the counters of the epoch, but not these.
        done = int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)
        epoch, batches = divmod(done, max(1, int(trainer.num_training_batches)))
        parts = trainer.accumulate_grad_batches
        lanes = self.shuffle_lanes or 1
        return {
            "task": self.task_index, "epoch": epoch, "batches": batches, "parts": parts,
            "lanes": lanes,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume after the processed batches."""
        if state["task"] != self.task_index:
            raise ValueError(
                f"the checkpoint is of task {state['task']} and task {self.task_index} is "
                "selected: give --data.task_index the checkpoint's number"
            )
        if (lanes := state.get("lanes", 1)) != (self.shuffle_lanes or 1):
            raise ValueError(
                f"data.shuffle_lanes is {self.shuffle_lanes} and the checkpoint was written with "
                f"{lanes}, in another order of samples: resume with data.shuffle_lanes={lanes}"
            )
        # Whole steps were saved; on other devices they have another number of micro-batches.
        now = self._active_trainer().accumulate_grad_batches
        self._start = (state["epoch"], state["batches"] // state.get("parts", now) * now)

    def _replay_plan(self, strategy: Strategy) -> ReplayPlan | None:
        """Return the strategy's replay plan, with the card's replay ratio if it has one."""
        if strategy.overrides("preview"):
            module = self._active_trainer().lightning_module
            batches = OnDevice(self.task_pass(few=PREVIEWED), module.device)
            strategy.preview(module.model, self.stream[self.task_index], batches)
        replay_plan, ratio = strategy.replay_plan(), self.stream[self.task_index].replay_ratio
        if replay_plan is None or replay_plan.replay_ratio is None or ratio is None:
            return replay_plan
        return replace(replay_plan, replay_ratio=ratio)

    def _default_columns(self) -> list[int]:
        eval_only = range(len(self.stream), len(self.stream.all_tasks))
        return [*range(self.task_index + 1), *eval_only]

    def _next_position(self) -> tuple[int, int]:
        # Called once per epoch: after the first, epochs start at their first batch.
        (epoch, done), self._start = self._start, (self._start[0] + 1, 0)
        # With overfit_batches every epoch is the first one again, augmentation included.
        return (0 if self._active_trainer().overfit_batches else epoch), done

    def _replay_readers(self, replay_plan: ReplayPlan | None) -> dict[int, Any]:
        if replay_plan is None or replay_plan.storage != "copy" or self.memory is None:
            return {}
        tasks = sorted(set(replay_plan.task_ids.tolist()))
        return {task: ReplayCopyReader(self.memory, task) for task in tasks}

    def _loader_options(self) -> dict[str, Any]:
        trainer = self._active_trainer()
        ranks = {"rank": trainer.global_rank, "world": trainer.world_size}
        return {**ranks, "workers": self.num_workers}

    def _evaluation_options(self) -> dict[str, Any]:
        transform = self._active_trainer().lightning_module.model.transform(False)
        options = {**self._loader_options(), "transform": transform, "batch": self.eval_batch_size}
        return {**options, "in_ranges": (self.shuffle_lanes or 1) > 1}

    def _active_trainer(self) -> Any:
        if self.trainer is None:
            raise RuntimeError(
                "the datamodule has no trainer: pass it as datamodule= to Trainer.fit or test"
            )
        return self.trainer


def check_bad_fraction(
    errors: Sequence[str], samples: str, size: int, max_bad_fraction: float
) -> None:
    """Check that no more than a fraction of ``size`` samples could not be read.

    Raises:
        ValueError: naming the first errors.
    """
    if len(errors) > max_bad_fraction * max(1, size):
        raise ValueError(
            f"{len(errors)} {samples} cannot be read, more than data.max_bad_fraction="
            f"{max_bad_fraction:g} of {size} allows: {'; '.join(errors[:5])}"
        )


def _check_share(validation_share: float) -> None:
    if not 0 <= validation_share < 1:
        raise ValueError(
            f"data.validation_share is {validation_share}, expected a fraction of the training "
            "samples, from 0 to less than 1"
        )
