"""mmcl: continual learning for vision-language models, as a PyTorch Lightning plugin.

Names are imported when they are first used, so ``import mmcl`` loads no third party.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmcl import strategies as strategies
    from mmcl.core import (
        Batch,
        Chain,
        StepModule,
        Strategy,
        Task,
        TaskStream,
        begin_task,
        begin_tasks,
        end_task,
        step,
    )
    from mmcl.data import (
        ImageCaptionCollate,
        ImageLabelCollate,
        collate_captions,
        collate_images,
        replay_loader,
    )
    from mmcl.evaluation import AccuracyMatrix, evaluate
    from mmcl.lightning import ContinualDataModule, ContinualModule, StrategyCallback
    from mmcl.models import HFTrainerCallback, ImageTextToText, OpenCLIP

__version__ = "0.1.0"

__all__ = [
    "AccuracyMatrix", "Batch", "Chain", "ContinualDataModule", "ContinualModule",
    "HFTrainerCallback", "ImageCaptionCollate", "ImageLabelCollate", "ImageTextToText", "OpenCLIP",
    "StepModule", "Strategy", "StrategyCallback", "Task", "TaskStream", "__version__", "begin_task",
    "begin_tasks", "collate_captions", "collate_images", "end_task", "evaluate", "replay_loader",
    "step", "strategies",
]  # fmt: skip

_DEFINED_IN = {
    "mmcl.core": (
        "Batch", "Chain", "StepModule", "Strategy", "Task", "TaskStream", "begin_task",
        "begin_tasks", "end_task", "step",
    ),
    "mmcl.data": (
        "ImageCaptionCollate", "ImageLabelCollate", "collate_captions", "collate_images",
        "replay_loader",
    ),
    "mmcl.evaluation": ("AccuracyMatrix", "evaluate"),
    "mmcl.lightning": ("ContinualDataModule", "ContinualModule", "StrategyCallback"),
    "mmcl.models": ("HFTrainerCallback", "ImageTextToText", "OpenCLIP"),
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
