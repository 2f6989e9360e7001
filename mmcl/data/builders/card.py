"""The card of a built stream: YAML that a person reads and `TaskStream.read` understands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from mmcl.data.builders.shards import ShardPlan


def card_text(card: Mapping[str, Any], header: Sequence[str]) -> str:
    """Write a card as YAML, short lists on one line, below a header of comments.

    Args:
        card: the fields of the card, in the order in which they will stand.
        header: lines such as the command that made it and the licence.

    Returns:
        The text of the file.
    """
    comments = "".join(f"# {line}\n" for line in header)
    return comments + yaml.dump(
        dict(card), Dumper=_CardDumper, sort_keys=False, allow_unicode=True, width=100
    )


def card_task(
    name: str, train: Sequence[ShardPlan], test: Sequence[ShardPlan], **fields: Any
) -> dict[str, Any]:
    """Describe one task of a card by the shards that hold it.

    Args:
        name: of the task.
        train: shards to learn from.
        test: shards to score on.
        fields: what else the card says of the task, such as ``classes`` or ``text``.

    Returns:
        The entry of ``tasks``, sizes summed over the shards.
    """
    return {
        "name": name,
        **fields,
        "train": [plan.name for plan in train],
        "test": [plan.name for plan in test],
        "size": sum(plan.count for plan in train),
        "test_size": sum(plan.count for plan in test),
    }


def card_counts(plans: Sequence[ShardPlan]) -> dict[str, int]:
    """Return how many samples each shard holds, for the key ``counts`` of a card."""
    return {plan.name: plan.count for plan in plans}


class _CardDumper(yaml.SafeDumper):
    """Names without spaces side by side, other lists in lines of their own, no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_list(dumper: yaml.SafeDumper, data: list[Any]) -> yaml.SequenceNode:
    is_plain = all(isinstance(item, str) for item in data)
    # YAML may break a line inside a name of two words, which is right but hard to read.
    fits = is_plain and (len(str(data)) <= 80 or not any(" " in item for item in data))
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=fits)


def _represent_dict(dumper: yaml.SafeDumper, data: dict[str, Any]) -> yaml.MappingNode:
    return dumper.represent_mapping("tag:yaml.org,2002:map", data.items(), flow_style=False)


_CardDumper.add_representer(list, _represent_list)
_CardDumper.add_representer(dict, _represent_dict)
