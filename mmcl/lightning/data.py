"""ContinualData: the stream as a LightningDataModule that knows which task is learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from mmcl.core import Recall, Strategy, Task, TaskStream
from mmcl.data import CopiesReader, keep_copies, pass_loader, prepare, test_loader, train_loader
from mmcl.data.builders.streams import card_path, find_stream
from mmcl.data.loader import WINDOW
from mmcl.data.remote.cache import bytes_of
from mmcl.data.shards.keep import given_up
from mmcl.lightning.hooks import OnDevice
from mmcl.lightning.scoring import Column, asked_of
from mmcl.lightning.suited import expect_suited
from mmcl.metrics.scorers import SCORERS

PREVIEWED = 1024
"""Samples of a task that a strategy may see before the task's loader is made."""


class ContinualData(pl.LightningDataModule):
    """Read a stream of tasks from shards.

    Args:
        stream: name of a stream that mmcl can build ("digits"), or the path of a card or of the
            folder it lies in.
        root: folder under which built streams lie.
        global_batch: rows of one optimiser step over all devices, recalled ones included.
        device_batch: most rows a device takes at once; more are accumulated. None = all at once.
        test_batch: rows at once in evaluation.
        workers: processes that read and decode, 0 = none.
        order: task positions in the order to learn them, those left out are not learned; None = as
            on the card.
        limit: 200 = at most so many samples of every part of a task, 0.02 = such a share.
        max_faults: share of a task's samples that may be unreadable before the run ends.
        allow_pipes: let a card run ``pipe:`` commands to open shards.
        verify_hashes: read every shard once and compare it with the card's hashes.
        cache: folder for remote shards; None = $MMCL_CACHE or the user's cache folder.
        cache_limit: bytes that remote shards may take there, such as "200GB"; None = no limit.
        window: remote shards whose samples are shuffled together; local ones all are.
        group_lengths: batches over which rows are sorted by the length of their text before they
            are cut into batches, so that little is padded; 0 = not.
        task: which task ``fit`` and ``validate`` use; the sequence sets it.
        seed: of order, augmentation and limits.
    """

    def __init__(
        self,
        stream: str = "digits",
        root: str = "data",
        global_batch: int = 64,
        device_batch: int | None = None,
        test_batch: int = 256,
        workers: int = 0,
        order: Sequence[int] | None = None,
        limit: float | None = None,
        max_faults: float = 0.01,
        allow_pipes: bool = False,
        verify_hashes: bool = False,
        cache: str | None = None,
        cache_limit: str | int | None = None,
        window: int = WINDOW,
        group_lengths: int = 0,
        task: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for what, rows in (("global_batch", global_batch), ("test_batch", test_batch)):
            if rows < 1:
                raise ValueError(f"data.{what} is {rows}, expected a number of rows, 1 or more")
        self.stream_name, self.root = stream, Path(root)
        self.global_batch, self.device_batch = global_batch, device_batch
        self.test_batch, self.workers = test_batch, workers
        self.order, self.max_faults = order, max_faults
        self.limit = int(limit) if limit is not None and limit >= 1 else limit
        self.allow_pipes, self.verify_hashes = allow_pipes, verify_hashes
        self.cache = None if cache is None else Path(cache).expanduser()
        self.cache_limit = None if cache_limit is None else bytes_of(cache_limit)
        self.window, self.group_lengths = window, group_lengths
        self.task, self.seed = task, seed
        self.memory: Path | None = None
        self.on_build: Callable[[int, int], None] | None = None
        self._start = (0, 0)
        self._prepared: Any = None

    @property
    def card(self) -> Path:
        """The card's path; it may not be built yet."""
        return card_path(self.stream_name, self.root)

    def prepare_data(self) -> None:
        """Build the stream if it is one of mmcl's and not there yet."""
        if not self.card.is_file() and not self.stream_name.endswith((".yaml", ".yml")):
            stream, _ = find_stream(self.stream_name)
            # Ranks start together: the builder lets one at a time in, and the next finds it done.
            stream.builder()(self.card.parent, progress=self.on_build)

    def setup(self, stage: str | None = None) -> None:
        """Read and check the card and its shards, once."""
        if self._prepared is None:
            self._prepared = prepare(
                self.on_card,
                finished=self.given_up,
                limit=self.limit,
                seed=self.seed,
                allow_pipes=self.allow_pipes,
                verify_hashes=self.verify_hashes,
                cache=self.cache,
                cache_limit=self.cache_limit,
            )

    @cached_property
    def on_card(self) -> TaskStream:
        """The stream as the card states it, before anything is counted or limited."""
        return TaskStream.read(self.card, self.order, tuple(SCORERS))

    @property
    def given_up(self) -> list[int]:
        """Tasks whose old samples were copied and whose training shards are gone."""
        return [] if self.memory is None else given_up(self.on_card, self.memory)

    @property
    def prepared(self) -> Any:
        """The checked stream with its readers; ``setup`` first."""
        self.setup()
        return self._prepared

    @property
    def stream(self) -> TaskStream:
        """The tasks, with the sizes that were counted."""
        stream: TaskStream = self.prepared.stream
        return stream

    def select(self, task: int) -> None:
        """Choose the task that the next ``fit`` trains on, from its beginning."""
        self.task, self._start = task, (0, 0)

    def begin(self, trainer: pl.Trainer) -> Task:
        """Return the task that ``fit`` learns, and show its classes to the model."""
        self.show_classes(trainer.lightning_module.model)
        return self.stream[self.task]

    def show_classes(self, model: Any) -> None:
        """Let the model compare with all classes met until the task that is learned."""
        seen = self.stream.tasks[: self.task + 1]
        names = self.stream.classes_until(self.task)
        if names and hasattr(model, "set_classes"):
            first_met = [task.index for task in seen for _ in task.classes]
            model.set_classes(names, seen[-1].templates, first_met)

    def accumulation(self, world: int) -> int:
        """Return how many parts of a global batch each device takes one after another."""
        if self.device_batch is None:
            return 1
        return -(-self.global_batch // (self.device_batch * world))

    def train_dataloader(self) -> Any:
        """Return the loader of the selected task, from where it was left."""
        trainer = self._running()
        expect_suited(self.stream, trainer.lightning_module.model)
        recall = self._recall(trainer.lightning_module.strategy)
        return train_loader(
            self.prepared,
            self.task,
            trainer.lightning_module.model.transform(True),
            recall=recall,
            recall_readers=self._readers(recall),
            global_batch=self.global_batch,
            accumulation=trainer.accumulate_grad_batches,
            seed=self.seed,
            **self._dealt(),
            position=self._next_position,
            window=self.window,
            group=self.group_lengths,
        )

    def exact_pass(self, few: int | None = None) -> Any:
        """Return this rank's part of one unaugmented pass over the selected task, or few of it."""
        trainer = self._running()
        return pass_loader(
            self.prepared,
            self.task,
            trainer.lightning_module.model.transform(False),
            batch=self.test_batch,
            **self._dealt(),
            few=few,
        )

    def test_loaders(self, columns: Sequence[int]) -> list[Any]:
        """Return one loader for each matrix column asked, this rank's part of it.

        Raises:
            ValueError: if there are more devices than samples, or the stream does not suit the
                model.
        """
        trainer = self._running()
        expect_suited(self.stream, trainer.lightning_module.model)
        for task in (self.stream.column(column) for column in columns):
            # Lightning skips the end of the test on a rank without batches, and the others wait.
            if task.test_size < trainer.world_size:
                raise ValueError(
                    f"the test part of '{task.name}' has {task.test_size} samples for "
                    f"{trainer.world_size} devices: use fewer devices"
                )
        return [
            test_loader(
                self.prepared,
                column,
                trainer.lightning_module.model.transform(False),
                batch=self.test_batch,
                **self._dealt(),
            )
            for column in columns
        ]

    def column(self, row: int, column: int) -> Column:
        """Return what the cell (row, column) asks."""
        return asked_of(self.stream, row, column)

    def default_columns(self, stage: str) -> list[Column]:
        """Return the columns that Lightning's own ``test`` and ``validate`` score."""
        if stage == "test":
            return [self.column(self.task + 1, number) for number in self._default_numbers()]
        return [self.column(self.task + 1, self.task)]

    def test_dataloader(self) -> list[Any]:
        """Return the test part of every task until the selected one, and of the probes."""
        return self.test_loaders(self._default_numbers())

    def val_dataloader(self) -> list[Any]:
        """Return the test part of the selected task."""
        return self.test_loaders([self.task])

    def predict_dataloader(self) -> Any:
        """Return the test part of the selected task."""
        return self.test_loaders([self.task])[0]

    def keep(self, recall: Recall | None, task: int) -> None:
        """Copy the recalled samples of a finished task where the strategy asks for copies."""
        if recall is not None and recall.keep == "copies" and self.memory is not None:
            keep_copies(self.prepared, recall, self.memory, task)

    def state_dict(self) -> dict[str, Any]:
        """Return where the task stands: the epoch, and the batches done in it."""
        trainer = self._running()
        # Of a resumed run Lightning counts the batches of an epoch anew, but not these.
        done = int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)
        epoch, batches = divmod(done, max(1, int(trainer.num_training_batches)))
        return {"task": self.task, "epoch": epoch, "batches": batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the batches that were processed."""
        if state["task"] != self.task:
            raise ValueError(
                f"the checkpoint is of task {state['task']} and task {self.task} is selected: "
                "give --data.task the checkpoint's number"
            )
        self._start = (state["epoch"], state["batches"])

    def _recall(self, strategy: Strategy) -> Recall | None:
        """Let the strategy look at the task; return what it recalls, at the card's share if any."""
        if strategy.uses("preview"):
            module = self._running().lightning_module
            few = OnDevice(self.exact_pass(few=PREVIEWED), module.device)
            strategy.preview(module.model, self.stream[self.task], few)
        recall, share = strategy.recall(), self.stream[self.task].share
        stated = recall is not None and recall.share is not None and share is not None
        return replace(recall, share=share) if recall is not None and stated else recall

    def _default_numbers(self) -> list[int]:
        probes = range(len(self.stream), len(self.stream.columns))
        return [*range(self.task + 1), *probes]

    def _next_position(self) -> tuple[int, int]:
        # Asked once for each epoch: after the first, epochs start at their beginning.
        position, self._start = self._start, (self._start[0] + 1, 0)
        return position

    def _readers(self, recall: Recall | None) -> dict[int, Any]:
        if recall is None or recall.keep != "copies" or self.memory is None:
            return {}
        tasks = sorted(set(recall.task.tolist()))
        return {task: CopiesReader(self.memory, task) for task in tasks}

    def _dealt(self) -> dict[str, int]:
        trainer = self._running()
        ranks = {"rank": trainer.global_rank, "world": trainer.world_size}
        return {**ranks, "workers": self.workers}

    def _running(self) -> Any:
        if self.trainer is None:
            raise RuntimeError("the data has no trainer: pass it as datamodule= to fit or test")
        return self.trainer
