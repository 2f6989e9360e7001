"""Sequential fine-tuning trains on each task without any measure against forgetting; lower bound.

Paper: none. Every continual-learning paper has it as a baseline.
Code followed: none.
Differs: nothing.
"""

from __future__ import annotations

from mmcl.core import Strategy


class Finetune(Strategy):
    """Sequential fine-tuning: train on the tasks one after another; the lower bound.

    **Remembers** nothing. **Asks of the model** nothing beyond a forward pass and a loss.
    """
