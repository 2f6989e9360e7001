"""Safe YAML parser for untrusted cards: plain values, bounded size, no duplicate keys.

A file of its own: the defence against hostile YAML is read and fuzzed without the schema.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import yaml

MAX_NUMBER = 64
"""Characters of a number or date, at most: parsing time grows with the square of the length."""
MAX_VALUES = 20_000_000
"""Values of a card, at most, counting what each ``*alias`` repeats."""
MAX_MERGED = 100_000
"""Entries that mappings merge from other mappings (``<<``), at most, in total."""

_MERGE = "tag:yaml.org,2002:merge"
_LONG = frozenset({"tag:yaml.org,2002:str", "tag:yaml.org,2002:binary"})


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
