"""Samples that stay where they lie: a LLaVA-style JSON and its picture folder, used in place.

A card lists them as ``<something>.loose.json``, a small file that says where the JSON and the
pictures are. What a sample holds, its key included, is what the shards of ``mmcl data make`` would
hold, so a run over loose files sees the same batches as one over shards.
"""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmcl.data.builders.llava_json import LlavaSample, read_sample
from mmcl.data.faults import BadSample, BadShard
from mmcl.data.shard import Numbers, Origin, Sample
from mmcl.data.shards.loose_index import LooseIndex, open_loose_index
from mmcl.data.shards.picture_files import PictureFolder, picture_folder

FORMAT = "mmcl-loose/1"
SUFFIX = ".loose.json"
_MAX_BYTES = 1 << 20
_FIELDS = {"format": str, "records": str, "images": str, "samples": int, "sha256": str,
           "bytes": int, "keys": str, "answer_field": str, "places": str}  # fmt: skip
_OPTIONAL = frozenset({"places", "keys", "answer_field"})


@dataclass(frozen=True)
class LooseSet:
    """What a ``.loose.json`` says.

    Attributes:
        records: the JSON list or JSON lines.
        images: folder from which its picture paths start.
        samples: n, its usable records or those of ``places``.
        sha256: of the JSON.
        bytes: of the JSON.
        keys: how every key starts.
        answer_field: of records with ``text`` in place of ``conversations``.
        places: file (``.npy``, int64, rising) of the records that belong to it, "" = all.
    """

    records: Path
    images: Path
    samples: int
    sha256: str
    bytes: int
    keys: str = "sample"
    answer_field: str = "answer"
    places: str = ""


@dataclass
class LooseShard:
    """The samples of a ``.loose.json``; implements ``Shard``, opened when first needed.

    Args:
        origin: the ``.loose.json``.
        name: of it as the card has it.
        cache: folder for the index of a JSON that lies in a read-only folder; None = keep none
            there.
    """

    origin: Origin | Path | str
    name: str
    cache: Path | None
    is_remote: bool = field(default=False, init=False)
    _opened: _Opened | None = field(default=None, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        """Return n, the number of samples.

        Raises:
            BadShard: if the file, its JSON or its pictures are missing or not as it says.
        """
        return len(self._open().places)

    def key(self, place: int) -> str:
        """Return the key of a sample, its number in the JSON and its id there."""
        opened = self._open()
        number = int(opened.places[place])
        try:
            raw = opened.index.records.read(number)
        except BadSample:
            raw = None
        stated = raw.get("id", raw.get("question_id")) if isinstance(raw, dict) else None
        return sample_key(opened.stated.keys, number, "" if stated is None else str(stated))

    def key_hashes(self) -> npt.NDArray[np.uint64]:
        """Return (n,) hashes of the numbers in the JSON, with which keys begin."""
        places = self._open().places.astype(np.uint64)
        mixed = (places + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        return np.asarray(mixed ^ (mixed >> np.uint64(27)), dtype=np.uint64)

    def read(self, place: int) -> Sample:
        """Return a sample: its dialogue, and its picture as jpg, png or webp if it has one.

        Raises:
            BadSample: if the record cannot be used, or its picture is missing, outside of the
                folder, too large or of another format.
            RuntimeError: if the JSON changed since it was indexed.
        """
        opened = self._open()
        number = int(opened.places[place])
        said = opened.sample(number)
        members = {"json": said.data}
        if said.picture is not None:
            extension, data = opened.pictures.read(said.picture)
            members[extension] = data
        return Sample(sample_key(opened.stated.keys, number, said.name), self.name, members)

    def lengths(self, member: str) -> Numbers:
        """Return (n,) bytes of a text member as a shard would hold it; only "json" has any."""
        opened = self._open()
        if member.lower() != "json":
            return np.zeros(len(opened.places), dtype=np.int64)
        return opened.index.said[opened.places]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the index behind: another process reads it from its file."""
        return {**self.__dict__, "_opened": None}

    def _open(self) -> _Opened:
        if self._opened is None:
            path = self.origin.path() if not isinstance(self.origin, Path | str) else self.origin
            self._opened = _opened(Path(path), self.cache)
        return self._opened


@dataclass(frozen=True)
class _Opened:
    """What a shard holds once it was looked at; ``places`` (n,) are numbers in the JSON."""

    stated: LooseSet
    index: LooseIndex
    places: Numbers
    pictures: PictureFolder

    def sample(self, number: int) -> LlavaSample:
        return read_sample(self.index.records.read(number), (), self.stated.answer_field)


def sample_key(stem: str, number: int, name: str) -> str:
    """Return the key of a sample: where it belongs, its place in the source, its name there."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:40].strip("-")
    return f"{stem}-{number:07d}" + (f"-{plain}" if plain else "")


def read_loose_set(path: Path) -> LooseSet:
    """Read a ``.loose.json``.

    Raises:
        BadShard: if it is missing or anything about it is odd.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise BadShard(f"is larger than {_MAX_BYTES} bytes: this is no {SUFFIX}")
        raw = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise BadShard(f"cannot be read ({error.strerror}): make it again") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadShard):
            raise
        raise BadShard("is not JSON: make it again with mmcl data make --in_place") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise BadShard(f"does not say format '{FORMAT}': make it with mmcl data make --in_place")
    for name, kind in _FIELDS.items():
        missing = name not in raw and name not in _OPTIONAL
        if missing or (name in raw and type(raw[name]) is not kind):
            raise BadShard(f"has no usable '{name}': make it again")
    own = {key: raw[key] for key in _FIELDS if key in raw and key != "format"}
    folder = path.parent
    return LooseSet(**{**own, "records": folder / own["records"], "images": folder / own["images"]})


def _opened(path: Path, cache: Path | None) -> _Opened:
    stated = read_loose_set(path)
    try:
        index = open_loose_index(stated.records, stated.answer_field, cache)
        pictures = picture_folder(stated.images)
    except FileNotFoundError as error:
        raise BadShard(f"names what is not there ({error})") from None
    except ValueError as error:
        raise BadShard(f"names a file that cannot be used ({error})") from None
    if index.sha256 != stated.sha256.lower():
        raise BadShard(
            f"was made for other samples: {stated.records} changed since; give mmcl data make "
            "--in_place again"
        )
    places = np.arange(len(index.records), dtype=np.int64)
    if stated.places:
        places = _places(path.parent / stated.places, len(places))
    if len(places) != stated.samples:
        raise BadShard(f"says {stated.samples} samples and has {len(places)}: make it again")
    return _Opened(stated, index, places, pictures)


def _places(path: Path, count: int) -> Numbers:
    """Read the records' numbers that belong to a set."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stored = np.load(path, allow_pickle=False)
    # A broken header fails in any way, and one that promises too much for want of memory.
    except Exception:
        raise BadShard(f"names {path.name}, which cannot be read: make it again") from None
    is_good = isinstance(stored, np.ndarray) and stored.dtype == np.int64 and stored.ndim == 1
    if not is_good or (
        len(stored) and not (stored[0] >= 0 and stored[-1] < count and (np.diff(stored) > 0).all())
    ):
        raise BadShard(f"names {path.name}, which is not a rising list of records: make it again")
    return np.asarray(stored, dtype=np.int64)
