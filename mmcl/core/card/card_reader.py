"""Reader of stream cards: a YAML parser for untrusted files, and checks that compare fields."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from mmcl.core.card.schema import (
    MAX_ERRORS,
    Card,
    CardErrors,
    SourceEntry,
    TaskEntry,
    escape_unprintable,
    nearest,
    repr_short,
)
from mmcl.core.card.shard_lists import take_hash_files

MAX_CARD_BYTES = 64 << 20
MAX_NUMBER = 64
"""Characters of a number or date, at most: parsing time grows with the square of the length."""
MAX_VALUES = 20_000_000
"""Values of a card, at most, counting what each ``*alias`` repeats."""
MAX_MERGED = 100_000
"""Entries that mappings merge from other mappings (``<<``), at most, in total."""

_MERGE = "tag:yaml.org,2002:merge"
_LONG = frozenset({"tag:yaml.org,2002:str", "tag:yaml.org,2002:binary"})
SOURCE_TYPES: Mapping[str, Sequence[str]] = {
    "classification": ("image", "classification", "captioning", "retrieval"),
    "captioning": ("captioning", "retrieval", "classification"),
    "retrieval": ("captioning", "retrieval", "classification"),
    "instruction": ("instruction",),
}
"""Task type -> types of the sources that it may mix in. Beside captions, classes are captions."""


def read_card(path: Path, scorers: Sequence[str] = ()) -> Card:
    """Read and check a stream card.

    Args:
        path: YAML file.
        scorers: names that tasks may give as ``scorer``; empty = any.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: with one line for every error found.
    """
    card, errors = validate_card(path, scorers)
    if errors:
        lines = "\n".join(f"  - {error}" for error in errors)
        count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
        raise ValueError(f"stream card {path} has {count}:\n{lines}")
    return card


def validate_card(path: Path, scorers: Sequence[str] = ()) -> tuple[Card, list[str]]:
    """Read a stream card as far as it can be read; see ``read_card``.

    Returns:
        the card, with defaults in place of what is wrong, and one line for every error.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is too large, or not YAML.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no stream card {path}: build the stream (mmcl data build <name>) "
            "or give the path of a card"
        )
    if path.stat().st_size > MAX_CARD_BYTES:
        raise ValueError(f"{path} is larger than {MAX_CARD_BYTES} bytes: this is not a card")
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not YAML: {escape_unprintable(str(error))}") from None
    errors = CardErrors(scorers, path.parent)
    listed = take_hash_files(raw, path.parent, errors)
    card = _check_entries(Card.model_validate(raw, context=errors), errors)
    card = card.model_copy(update=listed)
    more = len(errors.found) - MAX_ERRORS
    return card, errors.found[:MAX_ERRORS] + [f"and {more} more"] * (more > 0)


def card_schema() -> dict[str, Any]:
    """Return the JSON schema of a card's YAML file, for editors that complete and check it."""
    return Card.model_json_schema()


def _check_entries(card: Card, errors: CardErrors) -> Card:
    """Note what does not fit together; return the card with inherited classes filled in."""
    sources, tasks, eval_only = {}, [], []
    for name, source in card.sources.items():
        with errors.at(f"source {repr_short(name)}"):
            sources[name] = _check_source(source, card, errors)
    for n, task in enumerate(card.tasks):
        with errors.at(f"task {n}", task.name or None):
            tasks.append(_check_task(task, card, errors, known=card.classes))
            _check_mixture(task, card, errors)
    for n, task in enumerate(card.eval_only):
        with errors.at(f"eval-only task {n}", task.name or None):
            eval_only.append(_check_task(task, card, errors))
    names = Counter(task.name for task in tasks + eval_only if task.name)
    for name in sorted(name for name, count in names.items() if count > 1):
        errors.add(f"has two tasks named {repr_short(name)}: give each its own name")
    classes = card.classes or tuple(dict.fromkeys(n for task in tasks for n in task.classes))
    _check_class_names(card, [*tasks, *eval_only], {*classes, *card.classes}, errors)
    entries = {"sources": sources, "tasks": tuple(tasks), "eval_only": tuple(eval_only)}
    return card.model_copy(update={**entries, "classes": classes})


def _check_task(task: TaskEntry, card: Card, errors: CardErrors, known: Sequence[str] = ()) -> Any:
    classes = task.classes or card.classes
    if task.task_type == "classification" and not classes:
        errors.add("has no 'classes': name them here or at the top")
    unknown = sorted(set(task.classes) - set(known)) if known else []
    if unknown:
        errors.add(f"has classes {repr_short(unknown)} that the card's 'classes' lack: add them")
    both = sorted(set(task.train) & set(task.test))
    if both:
        errors.add(f"tests on shards it trains on: {repr_short(both)}")
    if task.decoding == "candidates" and not (task.task_type == "instruction" and classes):
        errors.add(
            f"lets candidates compete (decoding) but has task_type '{task.task_type}' and "
            f"{len(classes)} 'classes': they are the answers of a task of task_type 'instruction'"
        )
    # A name may be followed by the version of its rule, as in exact/1.
    scorer = task.scorer.partition("/")[0]
    if task.task_type == "instruction" and errors.scorers and scorer not in errors.scorers:
        hint = nearest(task.scorer, errors.scorers)
        errors.add(f"has the unknown scorer {repr_short(task.scorer)}: {hint}")
    return task.model_copy(update={"classes": classes})


def _check_class_names(
    card: Card, tasks: Sequence[Any], classes: set[str], errors: CardErrors
) -> None:
    """Note names of classes that the card does not have, and of answers, which are the classes."""
    every = classes.union(*(task.classes for task in tasks))
    if unknown := sorted(card.class_names.keys() - every):
        errors.add(f"has class_names for {repr_short(unknown)}, which are none of its 'classes'")
    for task in tasks:
        if task.decoding == "candidates" and card.class_names.keys() & set(task.classes):
            errors.add(
                f"has class_names for classes of task {repr_short(task.name)}, whose answers "
                "(decoding: candidates) are the classes: name these in 'classes'"
            )


def _check_mixture(task: TaskEntry, card: Card, errors: CardErrors) -> None:
    suited = SOURCE_TYPES.get(task.task_type, ())
    for name in task.mixture:
        source = card.sources.get(name)
        if source is None:
            known = ", ".join(map(repr_short, card.sources))[:80] or "there are none"
            errors.add(
                f"mixes in {repr_short(name)}, which is none of the card's 'sources' ({known})"
            )
        elif source.task_type not in suited:
            errors.add(
                f"has task_type '{task.task_type}' and mixes in {repr_short(name)} of task_type "
                f"'{source.task_type}', expected {' or '.join(suited) or 'no source'}: one loss "
                "compares all samples of a batch"
            )
    total = sum(task.mixture.values()) + (task.replay_ratio or 0)
    if total >= 1:
        errors.add(
            f"gives {total:g} of every batch to replayed samples and sources "
            "(replay_ratio, mixture): leave some to its own"
        )


def _check_source(source: SourceEntry, card: Card, errors: CardErrors) -> SourceEntry:
    is_classified = source.task_type == "classification"
    classes = source.classes or (card.classes if is_classified else ())
    foreign = sorted(set(classes) - set(card.classes))
    if is_classified and (foreign or not classes):
        errors.add(
            "has task_type 'classification' and has classes "
            f"{repr_short(foreign) if foreign else 'none'} "
            "that the card's own 'classes' lack: list them at the top"
        )
    if source.in_loss and source.task_type == "image":
        errors.add(
            "has scored True, expected false for images alone: they have no loss of their own"
        )
    return source.model_copy(update={"classes": classes})


def parse_yaml(text: str) -> Any:
    """Parse YAML to plain values (no objects), in time and memory bounded by its length.

    Raises:
        ValueError: if it is not YAML, or breaks a limit; the message is one line.
    """
    try:
        return _PlainLoader(text).get_single_data()
    except RecursionError:
        raise ValueError("its lists and mappings are nested too deeply") from None
    # A tag that does not fit its value (!!int '', !!timestamp x) raises any type of error.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        kind = "" if isinstance(error, yaml.YAMLError | ValueError) else type(error).__name__
        raise ValueError(" ".join(part for part in (kind, reason) if part)) from None


class _PlainLoader(yaml.SafeLoader):
    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.values: dict[int, int] = {}
        self.merged = 0

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        if len(node.value) > MAX_NUMBER and node.tag not in _LONG:
            _refuse(node, f"a number of {len(node.value)} characters")
        return node

    def compose_sequence_node(self, anchor: Any) -> yaml.SequenceNode:
        node = super().compose_sequence_node(anchor)
        self.count(node, node.value)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        self.count(node, (part for pair in node.value for part in pair))
        # PyYAML silently takes the last of two equal keys.
        known = set()
        for key, _ in node.value:
            identity = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if identity in known and identity is not None and key.tag != _MERGE:
                _refuse(key, f"the key {key.value[:80]!r} comes twice")
            known.add(identity)
        return node

    def count(self, node: yaml.Node, parts: Iterable[yaml.Node]) -> None:
        """Count the values of a list or mapping; an alias counts every time it is used."""
        total = 1
        for part in parts:
            held = 1 if isinstance(part, yaml.ScalarNode) else self.values.get(id(part))
            if held is None:
                _refuse(node, "a list or mapping that contains itself")
            total += held
        if total > MAX_VALUES:
            _refuse(node, f"more than {MAX_VALUES} values, most of them repeated by an alias")
        self.values[id(node)] = total

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # Merges of merges multiply, so merged mappings are flattened and counted first.
        merged = [value for key, value in node.value if key.tag == _MERGE]
        listed = [v.value if isinstance(v, yaml.SequenceNode) else [v] for v in merged]
        parts = [part for some in listed for part in some if isinstance(part, yaml.MappingNode)]
        for part in {id(part): part for part in parts}.values():
            self.flatten_mapping(part)
        self.merged += sum(len(part.value) for part in parts)
        if self.merged > MAX_MERGED:
            _refuse(node, f"more than {MAX_MERGED} merged entries (<<)")
        super().flatten_mapping(node)


def _refuse(node: yaml.Node, reason: str) -> NoReturn:
    raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark)
