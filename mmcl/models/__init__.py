"""Other people's models behind the VLM protocol."""

from mmcl.models.open_clip import OpenCLIP

__all__ = ["OpenCLIP"]
