"""Diagnostics of checkpoints: mode connectivity, representation similarity, flatness, probes."""

from mmcl.diagnostics.connectivity import Checkpoint, connect, loss_barrier, measure_line
from mmcl.diagnostics.flatness import add_noise, flatness, loss_rise
from mmcl.diagnostics.interpolated_weights import merged_weights
from mmcl.diagnostics.linear_probe import fit_probe, linear_probe
from mmcl.diagnostics.recovery import recovery, recovery_index
from mmcl.diagnostics.representations import compare_representations
from mmcl.diagnostics.task_loss import ProbeData, measure_task

__all__ = [
    "Checkpoint", "ProbeData", "add_noise", "compare_representations", "connect", "fit_probe",
    "flatness", "merged_weights", "linear_probe", "loss_barrier", "loss_rise", "measure_line",
    "measure_task", "recovery", "recovery_index",
]  # fmt: skip
