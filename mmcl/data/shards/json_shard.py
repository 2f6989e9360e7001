"""JSON shard: the samples of a LLaVA-style JSON and its image folder, used in place.

A card lists them as ``<something>.loose.json``, a small file with the paths of the JSON and the
images. Members and key of a sample equal those that ``mmcl data convert`` would write to shards, so
a run over the files in place gets the same batches as one over shards.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmcl.data.image_formats import as_members
from mmcl.data.remote.location import ShardLocation
from mmcl.data.shards.image_folder import ImageFolder, load_image, open_image_folder
from mmcl.data.shards.json_index import JsonIndex, open_json_index
from mmcl.data.shards.llava_json import read_sample, record_id
from mmcl.data.shards.sample_fields import SampleFields
from mmcl.data.stored_sample import BadSample, BadShard, IntArray, Sample, are_increasing

FORMAT = "mmcl-loose/1"
SUFFIX = ".loose.json"
_MAX_BYTES = 1 << 20
_FIELDS = {"format": str, "records": str, "images": str, "samples": int, "sha256": str,
           "bytes": int, "keys": str, "answer_field": str, "indices": str,
           "follow_links": bool}  # fmt: skip
_OPTIONAL = frozenset({"indices", "keys", "answer_field", "follow_links"})


@dataclass(frozen=True)
class JsonShardSpec:
    """Fields of a ``.loose.json``.

    Attributes:
        records: path of the JSON list or JSON lines.
        images: folder to which its image paths are relative.
        samples: n, the number of its records, or of those in ``indices``.
        sha256: hash of the JSON.
        bytes: size of the JSON.
        keys: prefix of every key.
        answer_field: field of the answer in records with ``text`` instead of ``conversations``.
        indices: file (``.npy``, int64, increasing) of the numbers of its records, "" = all.
        follow_links: whether links in the folder of images may lead outside of it.
    """

    records: Path
    images: Path
    samples: int
    sha256: str
    bytes: int
    keys: str = "sample"
    answer_field: str = "answer"
    indices: str = ""
    follow_links: bool = False


@dataclass
class JsonShard:
    """Shard of the samples of a ``.loose.json``, opened when first needed.

    Args:
        origin: location of the ``.loose.json``.
        name: its name on the card.
        cache: cache folder for the index of a JSON in a read-only folder; None = no cache.
    """

    origin: ShardLocation | Path | str
    name: str
    cache: Path | None
    is_remote: bool = field(default=False, init=False)
    _opened: _Opened | None = field(default=None, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        """Return n, the number of samples.

        Raises:
            BadShard: if the file, its JSON or its images are missing or not as it says.
        """
        return len(self._open().numbers)

    def key(self, index: int) -> str:
        """Return the key of a sample: the set's prefix, its number in the JSON and its id there."""
        opened = self._open()
        number = int(opened.numbers[index])
        try:
            name = record_id(opened.index.records.read(number))
        except BadSample:
            name = ""
        return sample_key(opened.stated.keys, number, name)

    def key_hashes(self) -> npt.NDArray[np.uint64]:
        """Return (n,) numbers of the records in the JSON, which are hashes without collisions."""
        return self._open().numbers.astype(np.uint64)

    def read(self, index: int, fields: SampleFields | None = None) -> Sample:
        """Return a sample: its conversation, and its image by its extension, or several.

        Its members have no other names, so ``fields`` choose none.

        Raises:
            BadSample: if the record cannot be used, or its image is missing, outside of the
                folder, too large or of another format.
            RuntimeError: if the JSON changed since it was indexed.
        """
        opened = self._open()
        number = int(opened.numbers[index])
        record = read_sample(opened.index.records.read(number), (), opened.stated.answer_field)
        images = [load_image(image, opened.images.read) for image in record.images]
        members = {"json": record.data, **as_members(images)}
        return Sample(sample_key(opened.stated.keys, number, record.name), self.name, members)

    def text_bytes(self, member: str, fields: SampleFields | None = None) -> IntArray:
        """Return (n,) bytes of a text member as a tar would hold it, 0 for all but "json"."""
        opened = self._open()
        if member.lower() != "json":
            return np.zeros(len(opened.numbers), dtype=np.int64)
        return opened.index.text_bytes[opened.numbers]

    def image_heads(
        self, index: int, limit: int | None, fields: SampleFields | None = None
    ) -> list[bytes]:
        """Return the first ``limit`` bytes of each image of a sample, None = all of them.

        Raises:
            BadSample: as ``read``.
        """
        opened = self._open()
        stored = opened.index.records.read(int(opened.numbers[index]))
        images = read_sample(stored, (), opened.stated.answer_field).images
        if limit == 0:
            return [b""] * len(images)
        read = partial(opened.images.read, limit=limit)
        return [load_image(image, read)[1][:limit] for image in images]

    def field_error(self, fields: SampleFields) -> str:
        """Return why a task cannot take its fields from this shard, "" if it can."""
        if not fields.image:
            return ""
        return f"is a JSON whose records name their images: leave out image_field '{fields.image}'"

    def digest(self) -> str:
        """Return a hash of the JSON's content, the records used and the way of reading them."""
        opened = self._open()
        options = f"{opened.index.sha256} {opened.stated.keys} {opened.stated.answer_field}"
        options += " follow_links" * opened.stated.follow_links
        numbers = np.ascontiguousarray(opened.numbers, "<i8").tobytes()
        return hashlib.sha256(options.encode("utf-8", "backslashreplace") + numbers).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the index: another process reads it from its file."""
        return {**self.__dict__, "_opened": None}

    def _open(self) -> _Opened:
        if self._opened is None:
            path = self.origin.path() if not isinstance(self.origin, Path | str) else self.origin
            self._opened = _opened(Path(path), self.cache)
        return self._opened


@dataclass(frozen=True)
class _Opened:
    """State of an opened shard; ``numbers`` (n,) are those of its records in the JSON."""

    stated: JsonShardSpec
    index: JsonIndex
    numbers: IntArray
    images: ImageFolder


def sample_key(stem: str, number: int, name: str) -> str:
    """Return the key of a sample: the prefix of its set, its number in the source, its name."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:40].strip("-")
    return f"{stem}-{number:07d}" + (f"-{plain}" if plain else "")


def read_json_set(path: Path) -> JsonShardSpec:
    """Read a ``.loose.json``.

    Raises:
        BadShard: if it is missing or not valid.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise BadShard(f"is larger than {_MAX_BYTES} bytes: this is not a {SUFFIX}")
        raw = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise BadShard(f"cannot be read ({error.strerror}): make it again") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadShard):
            raise
        raise BadShard("is not JSON: make it again with mmcl data convert --in_place") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise BadShard(f"does not say format '{FORMAT}': make it with mmcl data convert --in_place")
    for name, kind in _FIELDS.items():
        missing = name not in raw and name not in _OPTIONAL
        if missing or (name in raw and type(raw[name]) is not kind):
            raise BadShard(f"has no usable '{name}': make it again")
    fields = {key: raw[key] for key in _FIELDS if key in raw and key != "format"}
    paths = {key: path.parent / fields[key] for key in ("records", "images")}
    return JsonShardSpec(**{**fields, **paths})


def _opened(path: Path, cache: Path | None) -> _Opened:
    stated = read_json_set(path)
    try:
        index = open_json_index(stated.records, stated.answer_field, cache)
        images = open_image_folder(stated.images, follow_links=stated.follow_links)
    except FileNotFoundError as error:
        raise BadShard(f"names a file that is missing ({error})") from None
    except ValueError as error:
        raise BadShard(f"names a file that cannot be used ({error})") from None
    if index.sha256 != stated.sha256.lower():
        raise BadShard(
            f"was made for other samples: {stated.records} changed since; give mmcl data convert "
            "--in_place again"
        )
    numbers = np.arange(len(index.records), dtype=np.int64)
    if stated.indices:
        numbers = _read_numbers(path.parent / stated.indices, len(numbers))
    if len(numbers) != stated.samples:
        raise BadShard(f"says {stated.samples} samples and has {len(numbers)}: make it again")
    return _Opened(stated, index, numbers, images)


def _read_numbers(path: Path, count: int) -> IntArray:
    """Read the numbers of the records that belong to a set."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stored = np.load(path, allow_pickle=False)
    # A broken header raises any error, and one with a huge shape a MemoryError.
    except Exception:
        raise BadShard(f"names {path.name}, which cannot be read: make it again") from None
    is_list = isinstance(stored, np.ndarray) and stored.dtype == np.int64 and stored.ndim == 1
    if not is_list or not are_increasing(stored, count):
        raise BadShard(
            f"names {path.name}, which is not an increasing list of records: make it again"
        )
    return np.asarray(stored, dtype=np.int64)
