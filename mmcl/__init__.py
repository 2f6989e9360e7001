"""mmcl: continual learning for vision-language models, as a PyTorch Lightning plugin.

Names are imported when they are first used, so ``import mmcl`` loads no third party.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmcl import strategies as strategies
    from mmcl.core import Batch, Chain, Strategy, Task, TaskStream, begin_task, end_task, step
    from mmcl.data import ImageCaptionCollate, ImageLabelCollate
    from mmcl.lightning import ContinualDataModule, ContinualModule, StrategyCallback
    from mmcl.models import ImageTextToText, OpenCLIP

__version__ = "0.1.0"

__all__ = [
    "Batch", "Chain", "ContinualDataModule", "ContinualModule", "ImageCaptionCollate",
    "ImageLabelCollate", "ImageTextToText", "OpenCLIP", "Strategy", "StrategyCallback", "Task",
    "TaskStream", "__version__", "begin_task", "end_task", "step", "strategies",
]  # fmt: skip

_DEFINED_IN = {
    "mmcl.core": (
        "Batch", "Chain", "Strategy", "Task", "TaskStream", "begin_task", "end_task", "step",
    ),
    "mmcl.data": ("ImageCaptionCollate", "ImageLabelCollate"),
    "mmcl.lightning": ("ContinualDataModule", "ContinualModule", "StrategyCallback"),
    "mmcl.models": ("ImageTextToText", "OpenCLIP"),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    for module, names in _DEFINED_IN.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    if name == "strategies":
        return importlib.import_module("mmcl.strategies")
    raise AttributeError(f"module 'mmcl' has no {name!r}: it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
