"""The only folder that imports pytorch_lightning."""

from mmcl.lightning.data import ContinualData
from mmcl.lightning.hooks import StrategyHooks
from mmcl.lightning.module import ContinualModule
from mmcl.lightning.sequence import SequenceRun

__all__ = ["ContinualData", "ContinualModule", "SequenceRun", "StrategyHooks"]
