"""Replay buffers and stored state: sample references, tensor and disk buffers, snapshots."""

from mmcl.memory.disk_buffer import MmapStore, fill_disk_buffer
from mmcl.memory.distributed_fill import (
    class_ids,
    collect_metadata,
    fill_buffer,
    global_count,
    global_sample_ids,
    pass_sample_ids,
    rank_stride,
    sample_bytes,
)
from mmcl.memory.replay_index import ReplayIndex
from mmcl.memory.selection import (
    class_balanced,
    herding,
    k_center_greedy,
    reservoir,
    smallest_priorities,
    smallest_priorities_in_range,
)
from mmcl.memory.snapshot import Snapshot
from mmcl.memory.tensor_buffer import TensorBuffer

__all__ = [
    "ReplayIndex",
    "MmapStore",
    "TensorBuffer",
    "Snapshot",
    "class_balanced",
    "class_ids",
    "fill_disk_buffer",
    "fill_buffer",
    "global_count",
    "herding",
    "k_center_greedy",
    "smallest_priorities",
    "smallest_priorities_in_range",
    "rank_stride",
    "pass_sample_ids",
    "collect_metadata",
    "reservoir",
    "sample_bytes",
    "global_sample_ids",
]
