"""Captions of a stored sample: a text member, or texts at a key of its ``.json`` member.

A file of its own, since the card's ``text_field`` is understood here alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mmcl.core.card.schema import escape_unprintable
from mmcl.data.shards.llava_json import has_visible_text
from mmcl.data.shards.sample_fields import member_name
from mmcl.data.stored_sample import BadSample, one_line

MAX_CAPTIONS = 1000
"""Samples with more captions are bad: each is a pair at evaluation."""
_LISTED_KEYS = 12


def text_member(text_field: str) -> str:
    """Return the name of a text among ``Sample.members``: "json" of "json.captions"."""
    return "json" if member_name(text_field) == "json" else text_field.lower()


def read_captions(members: Mapping[str, bytes], text_field: str) -> list[str]:
    """Read the captions of a sample, at least one, without the spaces around them.

    Args:
        members: of the sample, extension in lower case -> content.
        text_field: a text member, which is one caption; or ``json.<key>[.<key>...]``, a text or a
            list of texts in the ``.json`` member. A key below a list is looked up in each entry, a
            number is the place of one.

    Raises:
        BadSample: if the member or a key is missing, or a caption is no text, empty, not UTF-8, or
            one of more than ``MAX_CAPTIONS``.
    """
    member = text_member(text_field)
    if member not in members:
        raise BadSample(f"it has no caption (.{member})")
    try:
        text = members[member].decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample(f"its caption (.{member}) is not UTF-8 ({error.reason})") from None
    if member != "json":
        return [_visible(text, f"caption (.{member})")]
    _, *keys = text_field.strip().removeprefix(".").split(".")
    found = _values(_parsed(text), keys, text_field)
    if not found:
        raise BadSample(f"its captions ({text_field}) are an empty list: give it one or more")
    if len(found) > MAX_CAPTIONS:
        raise BadSample(f"it has {len(found)} captions ({text_field}), more than {MAX_CAPTIONS}")
    name = f"caption ({text_field})"
    if len(found) == 1:
        return [_visible(found[0], name)]
    return [_visible(one, f"{name} number {n}") for n, one in enumerate(found, 1)]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise BadSample(f"its captions (.json) are not JSON ({one_line(error)})") from None


def _values(found: Any, keys: Sequence[str], text_field: str) -> list[Any]:
    """Return the values below a path of keys; the entries of a list are looked into one by one."""
    if isinstance(found, list) and keys and keys[0].isdecimal():
        if int(keys[0]) >= len(found):
            raise BadSample(
                f"its list in .json has no entry {keys[0]} of text_field {text_field}: it has "
                f"{len(found)}"
            )
        return _values(found[int(keys[0])], keys[1:], text_field)
    if isinstance(found, list):
        return [value for each in found for value in _values(each, keys, text_field)]
    if not keys:
        if isinstance(found, dict):
            raise BadSample(
                f"its caption ({text_field}) is a mapping with the keys {_listed(found)}: name one "
                f"of them, text_field: {text_field}.<key>"
            )
        return [found]
    if not isinstance(found, dict):
        raise BadSample(
            f"its .json has no key {keys[0]!r} of text_field {text_field}: there is a "
            f"value of type {type(found).__name__}"
        )
    if keys[0] not in found:
        raise BadSample(
            f"its .json has no key {keys[0]!r} of text_field {text_field}, it has {_listed(found)}"
        )
    return _values(found[keys[0]], keys[1:], text_field)


def _listed(found: Mapping[str, Any]) -> str:
    names = [escape_unprintable(name[:40]) for name in list(found)[:_LISTED_KEYS]]
    more = f" and {len(found) - len(names)} more" if len(found) > len(names) else ""
    return f"{', '.join(names) or 'none'}{more}"


def _visible(text: Any, name: str) -> str:
    if not isinstance(text, str):
        kind = "null" if text is None else f"of type {type(text).__name__}"
        raise BadSample(f"its {name} is {kind}, expected a text")
    if not has_visible_text(text):
        raise BadSample(f"its {name} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadSample(f"its {name} holds half of a character (a lone surrogate)") from None
    return text.strip()
