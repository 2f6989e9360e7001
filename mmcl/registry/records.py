"""Registry: a folder with one JSON record for each base model and for each adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from mmcl.core import write_atomic
from mmcl.evaluation import strict_json
from mmcl.evaluation.strict_json import Count

AdapterKind = Literal["lora", "weight_delta", "head"]
MAX_RECORD_BYTES = 1 << 20
MAX_RECORDS = 10_000
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_HASH = re.compile(r"[0-9a-f]{64}|")


@dataclass(frozen=True)
class Signature:
    """What two base models share if an adapter of one fits the other.

    Attributes:
        shapes: sha256 of the names and shapes of all weights.
        tokenizer: sha256 of the vocabulary, "" without a tokenizer.
        processor: sha256 of the description of the preprocessing.
        image_token: id of the image token, -1 without one.
        chat_template: sha256 of the chat template, "" without one.
    """

    shapes: str
    tokenizer: str
    processor: str
    image_token: int = -1
    chat_template: str = ""


@dataclass(frozen=True)
class BaseRecord:
    """Record of a base model.

    Attributes:
        id: unique in the registry.
        fingerprint: sha256 of all its weights.
        source: what the model's configuration loads: a name, folder or file, or RUN@task.
        model: class path of the model.
        signature: its architecture.
        parent: id of the base that it was trained further from, "" = none.
        stage: stage of its last training, "cpt", "dap" or "cft", "" = not stated.
        evaluation: name of a task -> score, 0 to 1.
    """

    id: str
    fingerprint: str
    source: str
    model: str
    signature: Signature
    parent: str = ""
    stage: Literal["", "cpt", "dap", "cft"] = ""
    evaluation: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the id and the fingerprint.

        Raises:
            ValueError: if one has another form.
        """
        _expect_names({"id": self.id, "parent": self.parent or "none"}, self.fingerprint)


@dataclass(frozen=True)
class AdapterRecord:
    """Record of an adapter: adapted weights that belong to one base model.

    Attributes:
        id: unique in the registry.
        base: fingerprint of the base model that it was trained on.
        kind: "lora", "weight_delta" (a model tuned in full) or "head" (in closed form).
        source: RUN@task, or a folder.
        targets: names of the adapted weights or layers.
        rank: largest rank of a LoRA adapter, 0 for other kinds.
        task: name of its task.
        evaluation: name of a task -> score, 0 to 1.
    """

    id: str
    base: str
    kind: AdapterKind
    source: str
    targets: Sequence[str] = ()
    rank: Count = 0
    task: str = ""
    evaluation: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the id and the fingerprint of the base.

        Raises:
            ValueError: if one has another form.
        """
        _expect_names({"id": self.id}, self.base)


R = TypeVar("R", BaseRecord, AdapterRecord)
_FOLDERS: dict[type, str] = {BaseRecord: "bases", AdapterRecord: "adapters"}


class Registry:
    """Folder of records: ``bases/ID.json`` and ``adapters/ID.json``.

    Args:
        folder: made by the first ``add``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, record: BaseRecord | AdapterRecord) -> Path:
        """Write a record, atomically; return its file.

        Raises:
            ValueError: if its id is taken, or the parent of a base is not registered.
        """
        for kind in _FOLDERS:
            if self._file(kind, record.id).exists():
                raise ValueError(
                    f"the id '{record.id}' is taken in {self.folder}: give another --id, or remove "
                    f"{self._file(kind, record.id)}"
                )
        if isinstance(record, BaseRecord) and record.parent:
            self.base(record.parent)
        file = self._file(type(record), record.id)
        write_atomic(file, strict_json.to_bytes(asdict(record)))
        return file

    def bases(self) -> list[BaseRecord]:
        """Return all records of bases, by id."""
        return self._all(BaseRecord)

    def adapters(self) -> list[AdapterRecord]:
        """Return all records of adapters, by id."""
        return self._all(AdapterRecord)

    def base(self, name: str) -> BaseRecord:
        """Return the record of a base.

        Raises:
            ValueError: if there is none, with the ids that there are.
        """
        found = self.find(name)
        if not isinstance(found, BaseRecord):
            known = ", ".join(record.id for record in self.bases()) or "none"
            raise ValueError(
                f"there is no base '{name}' in {self.folder} (bases: {known}): give one of them, "
                f"or add it with mmcl registry add base PATH --id {name}"
            )
        return found

    def find(self, name: str) -> BaseRecord | AdapterRecord | None:
        """Return the record of an id, None if there is none."""
        if not _ID.fullmatch(name):
            return None
        if self._file(BaseRecord, name).is_file():
            return _read(BaseRecord, self._file(BaseRecord, name))
        if self._file(AdapterRecord, name).is_file():
            return _read(AdapterRecord, self._file(AdapterRecord, name))
        return None

    def base_of(self, adapter: AdapterRecord) -> BaseRecord | None:
        """Return the registered base of an adapter, None if it is not registered."""
        return next((base for base in self.bases() if base.fingerprint == adapter.base), None)

    def tree(self) -> list[tuple[int, BaseRecord]]:
        """Return the bases with their depth, each after its parent.

        Raises:
            ValueError: if parents form a circle.
        """
        bases = self.bases()
        known = {base.id for base in bases}
        found: list[tuple[int, BaseRecord]] = []

        def add(parent: str, depth: int) -> None:
            for base in bases:
                if (base.parent if base.parent in known else "") == parent:
                    found.append((depth, base))
                    add(base.id, depth + 1)

        add("", 0)
        if len(found) < len(bases):
            lost = sorted(known - {base.id for _, base in found})
            raise ValueError(
                f"the parents of {', '.join(lost)} in {self.folder} form a circle: correct the "
                "'parent' of one record"
            )
        return found

    def _all(self, kind: type[R]) -> list[R]:
        files = sorted((self.folder / _FOLDERS[kind]).glob("*.json"))
        if len(files) > MAX_RECORDS:
            raise ValueError(
                f"{self.folder} has {len(files)} records of one kind, at most {MAX_RECORDS} are "
                "read: use several registries"
            )
        return [_read(kind, file) for file in files]

    def _file(self, kind: type, name: str) -> Path:
        return self.folder / _FOLDERS[kind] / f"{name}.json"


def _read(kind: type[R], file: Path) -> R:
    """Read a record strictly: known keys and types, bounded size, an id that is the file's name."""
    if (size := file.stat().st_size) > MAX_RECORD_BYTES:
        raise ValueError(
            f"{file} has {size} bytes, at most {MAX_RECORD_BYTES} are read: write it again with "
            "mmcl registry add"
        )
    record = strict_json.load(kind, strict_json.read(file), str(file))
    if record.id != file.stem:
        raise ValueError(
            f"{file} has the id '{record.id}', expected '{file.stem}', the file's name: rename it"
        )
    return record


def _expect_names(names: Mapping[str, str], fingerprint: str) -> None:
    for key, name in names.items():
        if not _ID.fullmatch(name):
            raise ValueError(
                f"{key} is {name[:120]!r}: use 1 to 100 letters, digits, dots, - and _, beginning "
                "with a letter or digit"
            )
    if not _HASH.fullmatch(fingerprint):
        raise ValueError(f"the fingerprint is {fingerprint[:80]!r}, expected 64 hex digits")
