"""Export of trained models for open_clip, transformers and peft."""

from mmcl.export.formats import FORMATS, default_format, write_adapter, write_clip, write_model

__all__ = ["FORMATS", "default_format", "write_adapter", "write_clip", "write_model"]
