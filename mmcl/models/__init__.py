"""Models of open_clip and transformers behind the VLM protocol."""

from mmcl.models.open_clip.model import OpenCLIP

__all__ = ["HFTrainerCallback", "ImageTextToText", "OpenCLIP", "TinyLlava"]


def __getattr__(name: str) -> object:
    # Importing transformers' models takes a second, which a run on a CLIP does not need.
    if name == "ImageTextToText":
        from mmcl.models.hf_vlm.model import ImageTextToText

        return ImageTextToText
    if name == "HFTrainerCallback":
        from mmcl.models.hf_vlm.trainer_callback import HFTrainerCallback

        return HFTrainerCallback
    if name == "TinyLlava":
        from mmcl.models.tiny_llava.build import TinyLlava

        return TinyLlava
    raise AttributeError(f"module 'mmcl.models' has no {name!r}: it has {', '.join(__all__)}")
