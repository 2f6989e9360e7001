"""Export of a CLIP as one weight file that open_clip loads."""

from __future__ import annotations

import warnings
from pathlib import Path

from safetensors.torch import save_file

from mmcl.core import Strategy, write_atomic
from mmcl.data.remote.location import sha256_of
from mmcl.export.hf import strategies_of
from mmcl.lightning.module import ContinualModule


def write_clip(module: ContinualModule, file: Path, *, half: bool) -> str:
    """Write the CLIP's weights to a file, in float16 if ``half``.

    Args:
        module: with a trained CLIP.
        file: ends in .safetensors, by which open_clip knows such files.
        half: write float16.

    Returns:
        A report: file, bytes and sha256.

    Raises:
        TypeError: if the model is not one of open_clip.
    """
    clip = getattr(module.model, "clip", None)
    if clip is None:
        raise TypeError(
            f"{type(module.model).__name__} has no open_clip model to export: use --as transformers"
        )
    dropped = [each for each in strategies_of(module.strategy) if _is_beyond_weights(each)]
    if dropped:
        names = ", ".join(type(strategy).__name__ for strategy in dropped)
        warnings.warn(
            f"{names} predicts with more than the CLIP's weights (prompts or another head), which "
            "are not in this file",
            stacklevel=2,
        )
    state = {name: value.detach().contiguous() for name, value in clip.state_dict().items()}
    if half:
        state = {name: value.half() for name, value in state.items()}
    write_atomic(file, lambda path: save_file(state, path))
    return f"{file}: {file.stat().st_size} bytes, sha256 {sha256_of(file)}"


def _is_beyond_weights(strategy: Strategy) -> bool:
    return strategy.overrides("prompts") or strategy.overrides("transform_output")
