"""A checkpoint in shards, looked through before torch unpickles it.

torch.distributed.checkpoint reads the file ``.metadata`` and every single value, such as a learning
rate, by plain pickle, which runs whatever is in it; only tensors are read with ``weights_only``.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

METADATA = ".metadata"
"""Name of the file without which there are no shards."""

_PATHS = frozenset({"Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"})
_KNOWN = {
    "torch": frozenset({"Size"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "torch.distributed.checkpoint.metadata": frozenset(
        {
            "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata",
            "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
            "_MEM_FORMAT_ENCODING",
        }
    ),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
    "collections": frozenset({"OrderedDict"}),
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
}  # fmt: skip
"""What the metadata of a checkpoint is made of; none of it does anything but hold values."""


def expect_plain(folder: Path) -> None:
    """Check that a checkpoint in shards holds tensors and plain values alone; none is run.

    Raises:
        ValueError: if it holds anything else, or is broken.
    """
    try:
        with (folder / METADATA).open("rb") as file:
            metadata = _Plain(file).load()
        _expect_plain_values(folder, metadata)
    # Hostile bytes fail in as many ways as pickle has opcodes.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{folder} cannot be read ({type(error).__name__}: {reason}): it is broken or holds "
            "pickled objects, which are never run; restore it, or remove the run's folder"
        ) from None


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_type or name in _KNOWN.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _expect_plain_values(folder: Path, metadata: Metadata) -> None:
    """Load every value that is no tensor as torch will, but without its pickled objects."""
    for index, place in metadata.storage_data.items():
        name = place.relative_path
        if Path(name).name != name or getattr(place, "transform_descriptors", None):
            raise ValueError(f"a value lies in {name!r}")
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            with (folder / name).open("rb") as file:
                file.seek(place.offset)
                torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
