"""PyTorch Lightning integration: the only package that imports pytorch_lightning."""

from mmcl.lightning.continual_run import ContinualRun
from mmcl.lightning.datamodule import ContinualDataModule
from mmcl.lightning.module import ContinualModule
from mmcl.lightning.optimization.optimizers import ParamGroup
from mmcl.lightning.strategy_callback import StrategyCallback

__all__ = [
    "ContinualDataModule",
    "ContinualModule",
    "ContinualRun",
    "ParamGroup",
    "StrategyCallback",
]
