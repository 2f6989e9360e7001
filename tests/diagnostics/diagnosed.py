"""Modules and data for the tests of diagnostics: a small CLIP or LLaVA on a small stream."""

from types import SimpleNamespace

import torch

from mmcl.core import begin_task
from mmcl.diagnostics import ProbeData
from mmcl.lightning.datamodule import ContinualDataModule
from mmcl.lightning.module import ContinualModule
from mmcl.models import OpenCLIP, TinyLlava
from tests.data.small_stream import write_answer_stream, write_stream
from tests.lightning.small_runs import small_llava, small_model


def small_data(folder, sizes=(8, 8), kind="classification", **options):
    """Write a stream and return its opened datamodule."""
    (folder / "stream").mkdir(exist_ok=True)
    if kind == "instruction":
        write_answer_stream(folder / "stream", sizes, test_size=5)
    else:
        write_stream(folder / "stream", sizes, test_size=5, task_type=kind)
    data = ContinualDataModule(str(folder / "stream" / "small.yaml"), eval_batch_size=4, **options)
    data.setup()
    return data


def clip_module(folder, strategy=None, seed=0):
    """A random CLIP in evaluation mode; another seed gives other weights of the same shapes."""
    model = OpenCLIP(small_model(folder), seed=seed)
    return ContinualModule(model, strategy).eval()


def llava_module(folder, strategy=None):
    """A random LLaVA in evaluation mode."""
    options = small_llava(folder)["init_args"]
    return ContinualModule(TinyLlava(**options), strategy).eval()


def begun(module, data, tasks=1):
    """Begin the first tasks of a stream."""
    for task in data.stream.tasks[:tasks]:
        begin_task(module.model, module.strategy, task)
    return module.eval()


def with_noise(module, seed, size=0.3, only=""):
    """Add noise to the trainable parameters whose names hold ``only``."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and only in name:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return module


def probes_of(data, samples=None):
    """Probe data on the CPU."""
    return ProbeData(data, "cpu", samples)


def namespace(**values):
    """An object with these attributes."""
    return SimpleNamespace(**values)
