"""Runs that take a second: a random CLIP of 25,000 weights on three tasks of noise."""

import json

import torch
import yaml
from torch import Tensor

from mmcl.metrics import AccuracyMatrix
from mmcl.models.loading import TINY
from mmcl.strategies import discover
from tests.data.small_stream import write_stream
from tests.lightning.killing import command, in_process

SIZES = (20, 17, 16)
ARGUMENTS = {
    "AGEM": {"samples": 12, "reference_rows": 8},
    "Chain": {
        "strategies": [
            {"class_path": "mmcl.strategies.EWC", "init_args": {"weight": 10.0}},
            {"class_path": "mmcl.strategies.ExperienceReplay", "init_args": {"samples": 12}},
        ]
    },
    "DarkReplay": {"samples": 12},
    "EWC": {"weight": 10.0, "samples": 12},
    "ExperienceReplay": {"samples": 12, "keep": "copies"},
    "FeatureReplay": {"samples": 12},
    "L2P": {"pool": 4, "length": 2, "top_k": 2},
    "RanPAC": {"width": 40},
}
"""Of strategies that are not made without; sizes that fit the small stream."""


def small_model(folder, **vision):
    """Write an architecture with the vocabulary of the tiny CLIP; return its path as text."""
    architecture = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8, **vision,
        },
        "text_cfg": {
            "context_length": 16, "vocab_size": 1154, "width": 16, "heads": 2, "layers": 1,
            "tokenizer_kwargs": {"bpe_path": str(TINY / "bpe.txt.gz")},
        },
    }  # fmt: skip
    file = folder / "small.json"
    file.write_text(json.dumps(architecture))
    return str(file)


def strategy_of(name):
    """A strategy as a configuration names it."""
    return {"class_path": f"mmcl.strategies.{name}", "init_args": ARGUMENTS.get(name, {})}


class SmallRuns:
    """A stream, a model and a folder for the runs of one test.

    Args:
        folder: empty.
        sizes: training samples of every task.
        kind: of the stream.
        test_size: test samples of every task.
        vision: changes to the image tower.
    """

    def __init__(self, folder, sizes=SIZES, kind="classify", test_size=6, **vision):
        self.folder = folder
        (folder / "stream").mkdir()
        write_stream(folder / "stream", sizes, test_size=test_size, kind=kind)
        self.card = folder / "stream" / "small.yaml"
        self.model = small_model(folder, **vision)

    def words(self, name, strategy="Finetune", **changes):
        """The command line of a run; ``changes`` are dotted options with ``__`` for the dot."""
        config = {
            "seed_everything": 0,
            "model": {
                "model": {"class_path": "mmcl.models.OpenCLIP", "init_args": {"model": self.model}},
                "strategy": strategy if isinstance(strategy, dict) else strategy_of(strategy),
                "learning_rate": 3e-3,
                "warmup": 2,
                "schedule": "cosine",
            },
            "data": {"stream": str(self.card), "global_batch": 8},
            "save_every_steps": 2,
            "trainer": {"max_epochs": 2, "accelerator": "cpu"},
        }
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config))
        options = [f"--{key.replace('__', '.')}={value}" for key, value in changes.items()]
        return [
            "--config",
            str(file),
            "--runs",
            str(self.folder / "runs"),
            "--name",
            name,
            *options,
        ]

    def start(self, name, strategy="Finetune", kill=None, **changes):
        """Give the command of a run; return its exit status and what it said."""
        said = self.folder / f"{name}.said"
        status = in_process(command, self.words(name, strategy, **changes), said, kill)
        return status, " ".join(said.read_text().split())

    def finish(self, name, strategy="Finetune", **changes):
        """Run to the end; return what was said."""
        status, said = self.start(name, strategy, **changes)
        assert status == 0, said
        return said

    def path(self, name):
        """The folder of a run."""
        return self.folder / "runs" / name

    def kept(self, name, task=-1):
        """The state dict of a kept checkpoint."""
        files = sorted((self.path(name) / "checkpoints").glob("task_*.ckpt"))
        return torch.load(files[task], weights_only=True)["state_dict"]

    def matrix(self, name):
        """The matrix of a run."""
        return AccuracyMatrix.read(self.path(name) / "matrix.json")

    def differences(self, name, other):
        """What differs between the ends of two runs, empty if they are equal to the bit."""
        found = [] if self._bytes(name) == self._bytes(other) else ["matrix.json"]
        first, second = self.kept(name), self.kept(other)
        keys = {**first, **second}
        return found + [k for k in keys if not same(first.get(k), second.get(k))]

    def _bytes(self, name):
        return (self.path(name) / "matrix.json").read_bytes()


def same(left, right):
    """Tell whether two states are equal to the bit."""
    if isinstance(left, Tensor):
        is_alike = isinstance(right, Tensor) and left.dtype == right.dtype
        return is_alike and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def all_strategies():
    """The names of every strategy there is."""
    return sorted(discover())
