"""Finetune: train on each task as it comes and do nothing about forgetting; the lower bound.

Paper: none; every continual-learning paper has it as a baseline.
Code followed: none.
Where we differ: nowhere.
"""

from __future__ import annotations

from mmcl.core import Strategy


class Finetune(Strategy):
    """Train on the tasks one after another.

    **Remembers** nothing. **Asks of the model** nothing beyond a forward pass and a loss.
    """
