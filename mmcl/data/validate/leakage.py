"""Leakage: test samples that are trained on, reported with both names, across all tasks.

A file of its own: it compares across all tasks, after every split was added up.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mmcl.core import Task, TaskStream
from mmcl.data.errors import NAMED, ErrorList
from mmcl.data.protocols import IntArray, Split
from mmcl.data.shards.open_stream import display_name
from mmcl.data.validate.duplicates import TrainFingerprints, joined
from mmcl.data.validate.results import tasks_and_sources
from mmcl.data.validate.split_check import SplitAccumulator

Splits = Mapping[tuple[int, Split], SplitAccumulator]


def report_leakage(
    stream: TaskStream, splits: Splits, errors: ErrorList, warnings: ErrorList
) -> None:
    """Compare the test samples of every task and eval-only task with all training samples.

    The same image in training and test is an error; of samples with questions, the same image and
    question. A known image with another question is a warning.

    Args:
        stream: that is validated.
        splits: (column, train or test) -> what was found there.
        errors: errors: the first samples of each task, and the number of the others.
        warnings: warnings: one for each task with other questions about known images.
    """
    train = _Training(stream, splits)
    tested = [
        (task, splits[task.index, "test"])
        for task in stream.all_tasks
        if (task.index, "test") in splits
    ]
    lookup = TrainFingerprints(train.fingerprints)
    leaked = [lookup.find(split.fingerprints) for _, split in tested]
    del lookup  # 16 bytes a sample
    lookup = TrainFingerprints(train.fingerprints, by_image=True)
    for (task, split), same in zip(tested, leaked, strict=True):
        _report_leaked(task, split, train, same, errors)
        same_image = np.where(same < 0, lookup.find(split.fingerprints), -1)
        _report_known_images(task, split, train, same_image, warnings)


class _Training:
    """Training samples of a whole stream, one split after the other.

    Attributes:
        splits: (task, its training split).
        starts: (splits + 1,) index where each begins among the fingerprints.
        fingerprints: (n, 3) fingerprints.
    """

    def __init__(self, stream: TaskStream, splits: Splits) -> None:
        self.splits = [
            (task, splits[task.index, "train"])
            for task in tasks_and_sources(stream)
            if (task.index, "train") in splits
        ]
        sizes = [split.decoded for _, split in self.splits]
        self.starts: IntArray = np.cumsum([0, *sizes], dtype=np.int64)
        self.fingerprints = joined(
            [found.fingerprints for _, split in self.splits for _, found in split.shards]
        )

    def sample_name(self, index: int) -> str:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        task, split = self.splits[number]
        return f"{split.sample_name(index - int(self.starts[number]))} of {display_name(task)}"


def _report_leaked(
    task: Task, split: SplitAccumulator, train: _Training, same: IntArray, errors: ErrorList
) -> None:
    leaked = np.flatnonzero(same >= 0)
    what = "image and question" if task.task_type == "instruction" else "image"
    lines = [
        f"{display_name(task)} (test): {split.sample_name(index)} is trained on, it has the {what} "
        f"of {train.sample_name(int(same[index]))}: remove it from one of them"
        for index in leaked[:NAMED].tolist()
    ]
    errors.add_some(lines, f"test samples of '{task.name}' are trained on", len(leaked))


def _report_known_images(
    task: Task, split: SplitAccumulator, train: _Training, same: IntArray, warnings: ErrorList
) -> None:
    known = np.flatnonzero(same >= 0).tolist()
    if known:
        warnings.add(
            f"{len(known):,} test samples of {display_name(task)} have another question about an "
            f"image that is trained on, such as {split.sample_name(known[0])} and "
            f"{train.sample_name(int(same[known[0]]))}"
        )
