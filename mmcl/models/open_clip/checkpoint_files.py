"""Reading of checkpoint files: any file or folder of weights to tensors, without running code.

What a pickle names beside tensors (the arguments of a training script, numpy scalars, the modules
of a TorchScript archive) becomes an ``Inert`` object, which only holds what it was given; a class
that is in no list is refused by name. TorchScript is never loaded: its records are copied into an
ordinary file of torch in memory, without its code.
"""

from __future__ import annotations

import io
import json
import pickletools
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz")
PREFERRED_FILES = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors",
    "model.safetensors.index.json", "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model.pth", "model.pth",
)  # fmt: skip
"""Names under which a folder holds its weights, the first one that is there is read."""
_MAX_PICKLE_BYTES, _MAX_INDEX_BYTES = 256 << 20, 64 << 20
_MAX_NODES = 5_000_000  # values of a checkpoint that are looked through for tensors
_SAVE_TENSORS = (
    "save its state_dict alone (torch.save(model.state_dict(), ...)), or as .safetensors"
)


class NamedTensor(NamedTuple):
    """A tensor of a checkpoint.

    Attributes:
        container: keys of the nested dicts that hold it, with dots, such as "state_dict".
        key: its name in the innermost of them.
        tensor: as stored.
    """

    container: str
    key: str
    tensor: Tensor

    @property
    def name(self) -> str:
        """Container and key, with a dot between them."""
        return f"{self.container}.{self.key}" if self.container else self.key


class Inert:
    """Object in place of one of a class that is not weights; it holds nothing and runs nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        """Return an empty object, whatever the pickle gives."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        """Hold the state, which may have tensors."""
        self.state = state


class InertDict:
    """Plain dict in place of one of a class of its own, such as ``defaultdict``."""

    def __new__(cls, *args: Any) -> dict[Any, Any]:  # type: ignore[misc]  # torch fills dicts only
        """Return an empty dict, which the pickle fills."""
        return {}


def _first(value: Any, *rest: Any) -> Any:
    return value


_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMPY_DTYPES = (
    "Bool", "Int8", "Int16", "Int32", "Int64", "UInt8", "UInt16", "UInt32", "UInt64", "Float16",
    "Float32", "Float64", "Str",
)  # fmt: skip
_INERT_CLASSES = (
    *(f"{module}.{name}" for module in _NUMPY for name in ("scalar", "_reconstruct")),
    "numpy.dtype", "numpy.ndarray", *(f"numpy.dtypes.{name}DType" for name in _NUMPY_DTYPES),
    "argparse.Namespace", "types.SimpleNamespace",
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local")
      for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    "builtins.dict", "builtins.list", "builtins.tuple", "builtins.int", "builtins.float",
    "builtins.str", "builtins.bool", "typing.Any",
    *(f"omegaconf.{name}" for name in (
        "dictconfig.DictConfig", "listconfig.ListConfig", "base.ContainerMetadata", "base.Metadata",
        "base.SCMode", "nodes.AnyNode", "nodes.StringNode", "nodes.IntegerNode", "nodes.FloatNode",
        "nodes.BooleanNode",
    )),
)  # fmt: skip
_INERT_DICTS = (
    "collections.defaultdict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)
_TORCHSCRIPT_FUNCTIONS = tuple(
    f"torch.jit._pickle.{name}"
    for name in (
        "build_intlist", "build_tensorlist", "build_doublelist", "build_boollist",
        "build_tensor_from_id", "restore_type_tag",
    )
)  # fmt: skip


def read_checkpoint(path: Path) -> tuple[NamedTensor, ...]:
    """Read all tensors of a checkpoint file, by its content and not by its suffix.

    It may be of safetensors or of torch (new or old form, TorchScript), the index of a checkpoint
    in several files, or a folder that holds one of these.

    Raises:
        FileNotFoundError: if the path, or a file that an index names, does not exist.
        ValueError: if it is no checkpoint, is cut off, or names a class that is not allowed.
    """
    file = weights_file(path) if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no checkpoint {file}: give a .pt or .safetensors file of this architecture"
        )
    with file.open("rb") as opened:
        head = opened.read(512)
    if file.name.endswith(".index.json"):
        return _read_shards(file)
    if reason := _not_weights(file, head):
        raise ValueError(reason)
    if head[:4] == b"PK\x03\x04":
        return _read_zip(file)
    if _is_safetensors(file, head):
        return tuple(_find_tensors(load_file(file)))
    return tuple(_find_tensors(_load_pickle(file, file)))


def activation_in_file(path: Path) -> bool | None:
    """Return whether weights need QuickGELU (True) or GELU (False); None = the file does not say.

    Archives of TorchScript say so in their code, which is read as text. Those in OpenAI's form
    (with ``input_resolution``) are OpenAI's CLIPs, which have QuickGELU.
    """
    if not path.is_file() or not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        code = [each for each in archive.infolist() if re.search(r"(^|/)code/", each.filename)]
        pickles = [each for each in archive.infolist() if each.filename.endswith("data.pkl")]
        found = _activation_of(archive, code)
        if found is not None or not code or not pickles:
            return found
        is_small = pickles[0].file_size <= _MAX_PICKLE_BYTES
        is_openai = is_small and b"input_resolution" in archive.read(pickles[0])
    return True if is_openai else None


def weights_file(folder: Path) -> Path:
    """Return the file or index of weights in a folder, by the names of ``PREFERRED_FILES``.

    Raises:
        FileNotFoundError: if the folder has no weights.
        ValueError: if it has several and none with such a name.
    """
    for name in PREFERRED_FILES:
        if (folder / name).is_file():
            return folder / name
    if (folder / ".metadata").is_file():
        raise ValueError(
            f"{folder} is a checkpoint of torch.distributed in shards: convert it by python -m "
            "torch.distributed.checkpoint.format_utils dcp_to_torch, and give the file"
        )
    found = sorted(file for file in folder.iterdir() if file.suffix in WEIGHT_SUFFIXES)
    if not found:
        raise FileNotFoundError(
            f"the folder {folder} has no weights: it needs a file such as "
            f"{PREFERRED_FILES[0]}, {PREFERRED_FILES[2]} or one that ends in "
            f"{', '.join(WEIGHT_SUFFIXES)}"
        )
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:5])
        raise ValueError(
            f"the folder {folder} has {len(found)} files of weights ({names}): give one of them"
        )
    return found[0]


def _not_weights(file: Path, head: bytes) -> str | None:
    """Return why a file cannot hold weights, by its first bytes."""
    start = head.lstrip()[:64].lower()
    if not head:
        return f"{file} is empty: download or copy it again"
    if head.startswith(b"version https://git-lfs"):
        return f"{file} is a pointer of Git LFS, not the weights: run 'git lfs pull' there"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return f"{file} is a web page, not weights: the download gave an error page, repeat it"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!")):
        return f"{file} is a compressed archive: unpack it and give the file of weights in it"
    if head.startswith(b"\x89HDF") or head.startswith(b"\x08\x00\x00\x00TFL3"):
        return f"{file} is a file of Keras or TensorFlow: convert it to torch and save a state_dict"
    if head[257:262] == b"ustar":
        return f"{file} is a tar archive: unpack it and give the file of weights in it"
    return None


def _is_safetensors(file: Path, head: bytes) -> bool:
    length = int.from_bytes(head[:8], "little")
    is_header = head[8:9] == b"{" and 2 <= length < file.stat().st_size
    if file.suffix == ".safetensors" and not is_header:
        raise ValueError(f"{file} is cut off or no safetensors file: download or copy it again")
    return is_header


def _read_shards(index: Path) -> tuple[NamedTensor, ...]:
    if index.stat().st_size > _MAX_INDEX_BYTES:
        raise ValueError(f"{index} has more than {_MAX_INDEX_BYTES} bytes, which no index needs")
    content = json.loads(index.read_text(encoding="utf-8"))
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no 'weight_map': give the index of a sharded checkpoint")
    names = sorted({str(name) for name in weight_map.values()})
    climbing = [name for name in names if Path(name).name != name]
    if climbing:
        raise ValueError(f"{index} names {climbing[0]!r}, which is not a file beside it")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index} names {len(names)} files and {len(missing)} are missing "
            f"({', '.join(missing[:5])}): download them all"
        )
    tensors = [t for name in names for t in read_checkpoint(index.parent / name)]
    absent = sorted(weight_map.keys() - {tensor.key for tensor in tensors})
    if absent:
        raise ValueError(f"{index} names {absent[0]!r}, which is in none of its files")
    return tuple(tensors)


def _read_zip(file: Path) -> tuple[NamedTensor, ...]:
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{file} is cut off (a zip archive without its end): download it again")
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        pickles = [each for each in records if each.filename.endswith("data.pkl")]
        if not pickles:
            inside = ", ".join(each.filename for each in records[:3])
            raise ValueError(
                f"{file} is a zip archive without weights of torch (it holds {inside}): unpack it "
                "and give the file of weights in it"
            )
        _expect_bounded(file, records, pickles[0])
        folder = pickles[0].filename.removesuffix("data.pkl")
        is_torchscript = f"{folder}constants.pkl" in archive.namelist()
        if not is_torchscript:
            return tuple(_find_tensors(_load_pickle(file, file, mmap=True)))
        plain, classes = _without_code(archive, folder)
    return tuple(_find_tensors(_load_pickle(file, plain, classes=classes)))


def _expect_bounded(
    file: Path, records: Iterable[zipfile.ZipInfo], pickled: zipfile.ZipInfo
) -> None:
    """Check that reading an archive takes no more memory than the file has bytes."""
    # torch stores its records uncompressed and reads what another program compressed.
    data = [each for each in records if "/data/" in each.filename or each is pickled]
    compressed = [each for each in data if each.compress_type != zipfile.ZIP_STORED]
    if compressed or sum(each.file_size for each in data) > file.stat().st_size:
        raise ValueError(
            f"the records of {file} are compressed or overlap, which torch never writes and which "
            f"may expand to any size: {_SAVE_TENSORS}"
        )
    if pickled.file_size > _MAX_PICKLE_BYTES:
        raise ValueError(
            f"the pickle of {file} has {pickled.file_size} bytes, at most {_MAX_PICKLE_BYTES} are "
            f"read: {_SAVE_TENSORS}"
        )


def _without_code(archive: zipfile.ZipFile, folder: str) -> tuple[io.BytesIO, set[str]]:
    """Copy the tensors of a TorchScript archive; return the copy and the classes that it names."""
    pickled = archive.read(f"{folder}data.pkl")
    try:
        named = {str(arg).replace(" ", ".") for op, arg, _ in pickletools.genops(pickled)
                 if op.name == "GLOBAL"}  # fmt: skip
    except ValueError as error:
        raise ValueError(f"the pickle of the archive cannot be parsed ({error})") from error
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as copied:
        for record in archive.infolist():
            rest = record.filename.removeprefix(folder)
            is_data = rest.startswith("data/")
            if is_data or rest in ("data.pkl", "version", ".data/version", "byteorder"):
                copied.writestr(f"archive/{rest}", archive.read(record))
    content.seek(0)
    return content, {name for name in named if name.startswith("__torch__.")}


def _activation_of(archive: zipfile.ZipFile, code: list[zipfile.ZipInfo]) -> bool | None:
    """Return whether the code of an archive computes QuickGELU (True) or GELU; None = neither."""
    sources = [each for each in code if each.filename.endswith(".py")]
    if sum(each.file_size for each in sources) > _MAX_PICKLE_BYTES:
        return None
    text = b"".join(archive.read(each) for each in sources)
    if b"1.702" in text or (b"torch.sigmoid(" in text and b"gelu(" not in text):
        return True
    return False if b"gelu(" in text else None


def _load_pickle(
    file: Path, source: Path | io.BytesIO, *, mmap: bool = False, classes: Iterable[str] = ()
) -> Any:
    """Load a file of torch with tensors, plain values and ``Inert`` objects.

    Args:
        file: for messages.
        source: what is read.
        mmap: map the file, so that tensors that are not used are not read.
        classes: further classes that become ``Inert``.
    """
    allowed = [(Inert, name) for name in (*_INERT_CLASSES, *classes)]
    dicts = [(InertDict, name) for name in _INERT_DICTS]
    functions = [(_first, name) for name in _TORCHSCRIPT_FUNCTIONS]
    try:
        with torch.serialization.safe_globals([*allowed, *dicts, *functions]):
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap or None)
    except Exception as error:  # damaged and hostile bytes fail in as many ways as there are bytes
        text = " ".join(str(error).split())
        found = re.search(r"Unsupported global: GLOBAL (\S+)|unsupported GLOBAL (\S+)", text)
        if found is not None:
            raise ValueError(
                f"{file} has a pickle of {found[1] or found[2]}, whose code would run, and it is "
                f"never run: {_SAVE_TENSORS}"
            ) from error
        reason = (
            text.partition("WeightsUnpickler error: ")[2].partition(" Check the doc")[0] or text
        )
        raise ValueError(
            f"{file} is damaged or no checkpoint of torch or safetensors ({reason[:200]}): "
            f"{_SAVE_TENSORS}"
        ) from error


def _find_tensors(content: Any) -> Iterator[NamedTensor]:
    """Yield all tensors in nested dicts, lists and inert objects, each container once."""
    # A list that holds another one twice, and so on, has exponentially many paths.
    visited: set[int] = set()
    stack: list[tuple[str, str, Any]] = [("", "", content)]
    for _ in range(_MAX_NODES):
        if not stack:
            return
        container, key, value = stack.pop()
        if isinstance(value, Tensor):
            yield NamedTensor(container, key, value)
            continue
        if isinstance(value, Inert):
            stack.append((container, key, value.state))
            continue
        if not isinstance(value, Mapping | list | tuple) or id(value) in visited:
            continue
        visited.add(id(value))
        path = f"{container}.{key}" if container and key else container or key
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        stack.extend((path, str(name), child) for name, child in reversed(list(items)))
    raise ValueError(f"the checkpoint has more than {_MAX_NODES} values: {_SAVE_TENSORS}")
