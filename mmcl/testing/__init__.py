"""Contract checks for strategies of one's own, and small stand-in models and batches to test with.

``python -m mmcl.testing my_package.my_file:MyStrategy`` checks a strategy from the command line.
"""

from mmcl.testing.contract import (
    CHECKS,
    CheckResult,
    ContractError,
    StrategyContract,
    check_strategy,
)
from mmcl.testing.stand_ins import (
    DualEncoder,
    answer_batch,
    answer_batches,
    answer_task,
    class_batch,
    class_batches,
    class_task,
    small_llava,
)
from mmcl.testing.training_loop import train_tasks, training_steps

__all__ = [
    "CHECKS", "CheckResult", "ContractError", "DualEncoder", "StrategyContract", "answer_batch",
    "answer_batches", "answer_task", "check_strategy", "class_batch", "class_batches", "class_task",
    "small_llava", "train_tasks", "training_steps",
]  # fmt: skip
