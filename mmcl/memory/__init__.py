"""What is remembered: references to old samples, rows of tensors, snapshots of weights."""

from mmcl.memory.dealing import fill_rows, global_rows, own_stride, pass_numbers, visit_numbers
from mmcl.memory.files import RowFiles
from mmcl.memory.references import References
from mmcl.memory.rows import Rows
from mmcl.memory.selection import class_balanced, herding, k_centre, lowest, reservoir
from mmcl.memory.snapshot import Snapshot

__all__ = [
    "References",
    "RowFiles",
    "Rows",
    "Snapshot",
    "class_balanced",
    "fill_rows",
    "global_rows",
    "herding",
    "k_centre",
    "lowest",
    "own_stride",
    "pass_numbers",
    "reservoir",
    "visit_numbers",
]
