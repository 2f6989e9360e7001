"""Runs that take a second: a random CLIP of 25,000 weights on three tasks of noise.

Or a random LLaVA of as many on three tasks of coloured squares, where the kind is "instruction".
"""

import copy
import inspect
import json
from functools import cache

import torch
import yaml
from torch import Tensor

from mmcl.evaluation import AccuracyMatrix
from mmcl.models.open_clip.loading import TINY
from mmcl.strategies import discover
from tests.behaviour.kill_runs import command, in_process
from tests.data.small_stream import write_answer_stream, write_stream
from tests.toys.toy_clip import StandIn
from tests.toys.toy_llava import a_llava

SIZES = (20, 17, 16)
ARGUMENTS = {
    "AGEM": {"buffer_size": 12, "reference_batch_size": 8},
    "Chain": {
        "strategies": [
            {"class_path": "mmcl.strategies.EWC", "init_args": {"ewc_lambda": 10.0}},
            {"class_path": "mmcl.strategies.ExperienceReplay", "init_args": {"buffer_size": 12}},
        ]
    },
    "DarkReplay": {"buffer_size": 12},
    "Chain instruction": {
        "strategies": [
            {"class_path": "mmcl.strategies.LoRA", "init_args": {"rank": 2}},
            {
                "class_path": "mmcl.strategies.EWC",
                "init_args": {"ewc_lambda": 10.0, "fisher_samples": 12},
            },
            {"class_path": "mmcl.strategies.LwF", "init_args": {"teacher": "base"}},
            {"class_path": "mmcl.strategies.ExperienceReplay", "init_args": {"buffer_size": 12}},
        ]
    },
    "EWC": {"ewc_lambda": 10.0, "fisher_samples": 12},
    "ExperienceReplay": {"buffer_size": 12, "storage": "copy"},
    "FeatureReplay": {"buffer_size": 12},
    "FeatureReplay instruction": {"buffer_size": 12, "compression": "int8", "storage": "disk"},
    "L2P": {"pool_size": 4, "prompt_length": 2, "top_k": 2},
    "L2P instruction": {"modality": "text", "pool_size": 4, "prompt_length": 2, "top_k": 2},
    "RanPAC": {"projection_dim": 40},
}
"""Of strategies that are not made without, or of one kind of stream; sizes that fit it."""
SMALL = {"rank": 2}
"""Of every strategy that takes it."""


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


def small_llava(folder):
    """Write the architecture of a tower; return a LLaVA with it as a configuration names it."""
    architecture = {
        "embed_dim": 8,
        "vision_cfg": {
            "image_size": 16, "layers": 2, "width": 16, "patch_size": 8, "head_width": 8,
        },
        "text_cfg": {
            "context_length": 8, "vocab_size": 64, "width": 8, "heads": 2, "layers": 1,
            "tokenizer_kwargs": {"bpe_path": str(TINY / "bpe.txt.gz")},
        },
    }  # fmt: skip
    file = folder / "small.json"
    file.write_text(json.dumps(architecture))
    small = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 32, "max_length": 64}
    options = {"tower": str(file), "tower_weights": None, **small}
    return {"class_path": "mmcl.models.TinyLlava", "init_args": options}


def arguments_of(name, kind="classification"):
    """The arguments of a strategy for a kind of stream."""
    taken = inspect.signature(discover()[name]).parameters
    small = {word: value for word, value in SMALL.items() if word in taken}
    return {**small, **ARGUMENTS.get(f"{name} {kind}", ARGUMENTS.get(name, {}))}


def strategy_of(name, kind="classification"):
    """A strategy as a configuration names it."""
    return {"class_path": f"mmcl.strategies.{name}", "init_args": arguments_of(name, kind)}


class SmallRuns:
    """A stream, a model and a folder for the runs of one test.

    Args:
        folder: empty.
        sizes: training samples of every task.
        kind: of the stream.
        test_size: test samples of every task.
        vision: changes to the image tower of a CLIP.
        changes: members of shards, see ``write_stream``.
    """

    def __init__(
        self, folder, sizes=SIZES, kind="classification", test_size=6, changes=None, **vision
    ):
        self.folder, self.kind = folder, kind
        (folder / "stream").mkdir()
        changes = changes or {}
        if kind == "instruction":
            write_answer_stream(folder / "stream", sizes, test_size=test_size, **changes)
            self.model = small_llava(folder)
        else:
            write_stream(folder / "stream", sizes, test_size=test_size, task_type=kind, **changes)
            init_args = {"model": small_model(folder, **vision)}
            self.model = {"class_path": "mmcl.models.OpenCLIP", "init_args": init_args}
        self.card = folder / "stream" / "small.yaml"

    def words(self, name, strategy="Finetune", **changes):
        """The command line of a run; ``changes`` are dotted options with ``__`` for the dot."""
        config = {
            "seed_everything": 0,
            "model": {
                "model": self.model,
                "strategy": strategy
                if isinstance(strategy, dict)
                else strategy_of(strategy, self.kind),
                "learning_rate": 3e-3,
                "warmup_steps": 2,
                "lr_schedule": "cosine",
            },
            "data": {"stream": str(self.card), "global_batch_size": 8},
            "checkpoint_every_n_steps": 2,
            "trainer": {"max_epochs": 2, "accelerator": "cpu"},
        }
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config))
        options = [f"--{key.replace('__', '.')}={value}" for key, value in changes.items()]
        return [
            "--config",
            str(file),
            "--output_dir",
            str(self.folder / "runs"),
            "--run_name",
            name,
            *options,
        ]

    def start(self, name, strategy="Finetune", kill=None, before=(), **changes):
        """Give the command of a run; return its exit status and its output."""
        output = self.folder / f"{name}.output"
        status = in_process(command, self.words(name, strategy, **changes), output, kill, before)
        return status, " ".join(output.read_text().split())

    def finish(self, name, strategy="Finetune", **changes):
        """Run to the end; return its output."""
        status, output = self.start(name, strategy, **changes)
        assert status == 0, output
        return output

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
        left, right = self._texts(name), self._texts(other)
        found = [file for file in {**left, **right} if left.get(file) != right.get(file)]
        first, second = self.kept(name), self.kept(other)
        keys = {**first, **second}
        return found + [k for k in keys if not same(first.get(k), second.get(k))]

    def _texts(self, name):
        folder = self.path(name)
        matrices = [folder / "matrix.json", *folder.glob("lenient.json")]
        matrices += folder.glob("retrieval.json")
        files = [*matrices, *(folder / "answers").rglob("*.jsonl")]
        return {str(file.relative_to(folder)): file.read_bytes() for file in files}


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


def all_strategies(kind="classification"):
    """The names of every strategy that takes a CLIP, or a LLaVA where the kind is "instruction"."""
    return [name for name in sorted(discover()) if _is_taken(name, kind)]


class _Clip(StandIn):
    """Has what OpenCLIP has, and nothing more."""

    @property
    def target_linears(self):
        raise AttributeError("linears")


@cache
def _replacement(kind):
    if kind == "instruction":
        return a_llava()
    model = _Clip()
    del model.gates
    return model


def _is_taken(name, kind):
    model = copy.deepcopy(_replacement(kind))
    known, arguments = discover(), arguments_of(name, kind)
    if "strategies" in arguments:
        arguments["strategies"] = [
            known[member["class_path"].rpartition(".")[2]](**member["init_args"])
            for member in arguments["strategies"]
        ]
    try:
        known[name](**arguments).attach(model)
    except TypeError:
        return False
    return True
