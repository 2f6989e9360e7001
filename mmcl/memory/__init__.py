"""What is remembered: references to old samples, rows of tensors, snapshots of weights."""

from mmcl.memory.dealing import (
    classes_of,
    fill_rows,
    global_rows,
    own_stride,
    pass_numbers,
    read_names,
    sizes_of,
    visit_numbers,
)
from mmcl.memory.file_rows import fill_file
from mmcl.memory.files import RowFiles
from mmcl.memory.references import References
from mmcl.memory.rows import Rows
from mmcl.memory.selection import (
    class_balanced,
    herding,
    k_centre,
    lowest,
    lowest_of_range,
    reservoir,
)
from mmcl.memory.snapshot import Snapshot

__all__ = [
    "References",
    "RowFiles",
    "Rows",
    "Snapshot",
    "class_balanced",
    "classes_of",
    "fill_file",
    "fill_rows",
    "global_rows",
    "herding",
    "k_centre",
    "lowest",
    "lowest_of_range",
    "own_stride",
    "pass_numbers",
    "read_names",
    "reservoir",
    "sizes_of",
    "visit_numbers",
]
