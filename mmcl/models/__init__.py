"""Other people's models behind the VLM protocol."""

from mmcl.models.open_clip import OpenCLIP

__all__ = ["ImageTextToText", "OpenCLIP", "TinyLlava"]


def __getattr__(name: str) -> object:
    # transformers' models take a second to import; a run on a CLIP does without.
    if name == "ImageTextToText":
        from mmcl.models.image_text import ImageTextToText

        return ImageTextToText
    if name == "TinyLlava":
        from mmcl.models.assembled import TinyLlava

        return TinyLlava
    raise AttributeError(f"module 'mmcl.models' has no {name!r}")
