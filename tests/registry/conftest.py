"""A consumer's run on a small base, and the supplier's next base, made once and copied."""

import pytest

from mmcl.cli import main
from tests.lightning.small_runs import SmallRuns


class Consumer:
    """Runs of a consumer, and commands on them.

    Args:
        runs: small runs; "old" is finished after its first two tasks, "next" after the third.
        capsys: captures the output of commands.
    """

    def __init__(self, runs, capsys):
        self.runs, self.folder, self.capsys = runs, runs.folder, capsys

    def give(self, *words):
        """Give a command; return its exit status and both outputs on one line."""
        self.capsys.readouterr()
        status = main([str(word) for word in words])
        output = self.capsys.readouterr()
        return status, " ".join((output.out + output.err).split())

    def words(self, mode, out, *more, adapter="old@task-a", base="next"):
        """The words of a recycling of the first task's adapter."""
        return [
            "recycle", self.runs.path(adapter.partition("@")[0]).as_posix() + "@"
            + adapter.partition("@")[2], "--to", str(self.runs.path(base.partition("@")[0]))
            + ("@" + base.partition("@")[2] if "@" in base else ""),
            "--mode", mode, "--out", str(self.folder / out), "--registry",
            str(self.folder / "registry"), "--data", str(self.runs.card), "--samples", "8",
            "--steps", "6", "--evaluate_every", "2", "--batch_size", "4", "--trainer.accelerator",
            "cpu", *more,
        ]  # fmt: skip


def _made(folder, strategy, kind):
    runs = SmallRuns(folder, (16, 12, 12), kind=kind)
    runs.finish("old", strategy, data__task_order="[0,1]")
    runs.finish(
        "next", "Finetune" if kind == "classification" else strategy, data__task_order="[2]"
    )
    return runs


@pytest.fixture(scope="session")
def consumer_folders(tmp_path_factory):
    """Folders of finished runs by kind of stream."""
    return {
        kind: _made(tmp_path_factory.mktemp(kind), strategy, kind)
        for kind, strategy in (("classification", "Finetune"), ("instruction", "LoRA"))
    }


def _consumer(kind, folders, capsys, tmp_path):
    runs = folders[kind]
    consumer = Consumer(runs, capsys)
    consumer.folder = tmp_path
    return consumer


@pytest.fixture
def tuned(consumer_folders, capsys, tmp_path):
    """A consumer with a CLIP that was tuned in full."""
    return _consumer("classification", consumer_folders, capsys, tmp_path)


@pytest.fixture
def adapted(consumer_folders, capsys, tmp_path):
    """A consumer with a LoRA adapter of a LLaVA."""
    return _consumer("instruction", consumer_folders, capsys, tmp_path)
