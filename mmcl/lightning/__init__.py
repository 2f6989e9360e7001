"""The only folder that imports pytorch_lightning."""

from mmcl.lightning.hooks import StrategyHooks

__all__ = ["StrategyHooks"]
