"""Replay buffers and stored state: sample references, tensor and disk buffers, snapshots."""

from mmcl.memory.disk_buffer import MmapStore
from mmcl.memory.replay_index import ReplayIndex
from mmcl.memory.snapshot import Snapshot
from mmcl.memory.tensor_buffer import TensorBuffer

__all__ = ["MmapStore", "ReplayIndex", "Snapshot", "TensorBuffer"]
