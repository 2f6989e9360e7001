"""Export of trained models for open_clip, transformers and peft."""

from mmcl.export.hf import write_model
from mmcl.export.open_clip import write_clip
from mmcl.export.peft import exportable_adapter, write_adapter
from mmcl.lightning.module import ContinualModule

__all__ = ["FORMATS", "default_format", "write_adapter", "write_clip", "write_model"]

FORMATS = {"open_clip": write_clip, "transformers": write_model, "peft": write_adapter}
"""Format -> function of the module, the target and ``half``, which returns a report."""


def default_format(module: ContinualModule) -> str:
    """Return the format of a model's export unless the user chooses another."""
    if getattr(module.model, "clip", None) is not None:
        return "open_clip"
    return "transformers" if exportable_adapter(module) is None else "peft"
