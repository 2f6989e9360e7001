"""Checks of a checkpoint before it is loaded: that it is whole, and that it holds no pickles.

torch.distributed.checkpoint reads the file ``.metadata`` and every single value, such as a learning
rate, by plain pickle, which runs whatever is in it; only tensors are read with ``weights_only``.
"""

from __future__ import annotations

import errno
import hashlib
import io
import pickle
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

METADATA = ".metadata"
"""File that every sharded checkpoint has."""
METADATA_HASH = ".metadata.sha256"
"""File with the sha256 of that one."""
_PATH_TYPES = frozenset({"Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"})
_ALLOWED = {
    "torch": frozenset({"Size"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "torch.distributed.checkpoint.metadata": frozenset({
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties",
        "BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING",
    }),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
    "collections": frozenset({"OrderedDict"}),
    "pathlib": _PATH_TYPES,
    "pathlib._local": _PATH_TYPES,
}  # fmt: skip
"""Types in the metadata of a sharded checkpoint, by module; all of them only hold values."""


class LostCheckpoint(OSError):
    """Error of a checkpoint that is missing or damaged.

    Args:
        path: path of the checkpoint.
        problem: what is wrong, as the words after its name.

    Attributes:
        reason: what is wrong, for a sentence that ends with what is done about it.
    """

    def __init__(self, path: Path, problem: str) -> None:
        self.reason = f"{path} {problem}"
        super().__init__(f"{self.reason}: restore it, or choose another state (--after_task)")


def check_whole(path: Path) -> None:
    """Check that a checkpoint exists and is undamaged: a file, or a folder of shards.

    ``torch.save`` stores a CRC-32 of every record, which ``torch.load`` does not compare. Comparing
    takes about 0.6 s per GB.

    Raises:
        LostCheckpoint: if it is missing or damaged.
        OSError: if it cannot be read for another reason, such as its permissions.
    """
    if path.is_dir():
        problem = _folder_damage(path)
    elif path.is_file():
        with path.open("rb") as file:
            problem = _damage(file) or _directory_damage(path)
    else:
        raise LostCheckpoint(path, "is missing")
    if problem:
        raise LostCheckpoint(path, f"is damaged ({problem})")


def _damage(file: IO[bytes]) -> str:
    """Return how a file of ``torch.save`` is damaged, "" if it is whole."""
    try:
        with zipfile.ZipFile(file) as zipped:
            # Records of torch.save are stored; compressed ones could expand without end.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in zipped.infolist()):
                return "torch.save did not write it"
            record = zipped.testzip()
    except Exception as error:  # damaged bytes can raise anything
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        return f"{type(error).__name__}: {error}"
    return f"the checksum of {record} is wrong" if record else ""


def _directory_damage(path: Path) -> str:
    """Return what torch finds wrong with a file's directory of records, which has no checksum."""
    try:
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    except Exception:  # pickled objects are refused where the checkpoint is loaded
        return ""
    return ""


def _folder_damage(folder: Path) -> str:
    """Return how a sharded checkpoint is damaged, "" if it is whole or ``reject_pickles`` is due.

    Every stored value of torch.distributed.checkpoint is a file of ``torch.save`` within a file.
    """
    parts = [(path, 0, path.stat().st_size) for path in sorted(folder.rglob("*.pt"))]
    if (folder / METADATA).is_file():
        content, noted = (folder / METADATA).read_bytes(), folder / METADATA_HASH
        if noted.is_file() and noted.read_text().strip() != hashlib.sha256(content).hexdigest():
            return f"the checksum of {METADATA} is wrong"
        try:
            stored = _RestrictedUnpickler(io.BytesIO(content)).load().storage_data.values()
            parts += [(folder / each.relative_path, each.offset, each.length) for each in stored]
        except Exception:
            return ""
    elif any(folder.glob("*.distcp")):
        return f"{METADATA} is missing"
    for path, offset, length in parts:
        if not path.resolve().is_relative_to(folder.resolve()):
            return ""
        if not path.is_file():
            return f"{path.name} is missing"
        with path.open("rb") as file:
            file.seek(offset)
            problem = _damage(io.BytesIO(file.read(length)))
        if problem:
            return f"{path.name}: {problem}"
    return ""


def reject_pickles(folder: Path) -> None:
    """Check that a sharded checkpoint holds only tensors and plain values, and no other pickles.

    Raises:
        ValueError: if it holds anything else, or is broken.
    """
    try:
        with (folder / METADATA).open("rb") as file:
            metadata = _RestrictedUnpickler(file).load()
        _check_values(folder, metadata)
    # Hostile bytes fail in as many ways as pickle has opcodes.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{folder} cannot be read ({type(error).__name__}: {reason}): it is broken or holds "
            "pickled objects, which are never run; restore it, or remove the run directory"
        ) from None


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_type or name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):  # so Python 3.11.2 pickles an enum's member
            return lambda enum, member: enum[member]
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _check_values(folder: Path, metadata: Metadata) -> None:
    """Load every value that is not a tensor as torch will, but without its pickled objects."""
    for index, location in metadata.storage_data.items():
        name = location.relative_path
        if Path(name).name != name or getattr(location, "transform_descriptors", None):
            raise ValueError(f"a value is stored in {name!r}")
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            with (folder / name).open("rb") as file:
                file.seek(location.offset)
                torch.load(io.BytesIO(file.read(location.length)), weights_only=True)
