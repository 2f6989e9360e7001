"""Check of an adapter against the next base model, as ``mmcl upgrade check`` prints it.

A file of its own because it writes nothing: recycling does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmcl.registry.records import Registry
from mmcl.registry.recycle import RecycleOptions, Recycling, Scores
from mmcl.registry.signatures import FitCheck, base_weights, compare
from mmcl.registry.sources import (
    Adapter,
    build_module,
    export_base,
    model_config,
    touched_weights,
)


def check_fit(adapter: Adapter, base: str, registry: Registry, folder: Path) -> list[FitCheck]:
    """Compare an adapter's base with the next one.

    Args:
        adapter: from ``find_adapter``.
        base: the next base as the command line names it.
        registry: where ids are looked up.
        folder: where a state of a run is exported to.

    Returns:
        One line for each of shapes, tokenizer, processor and so on.
    """
    text = export_base(base, registry, folder / "base")
    old = adapter.load_base().model
    new = build_module(model_config(text, registry, adapter.base)).model
    touched: list[str] = []
    if adapter.kind != "head":  # a head is solved again, in any number of dimensions
        touched = touched_weights(adapter.load(), base_weights(old))
    return compare(old, new, touched)


def direct_scores(
    adapter: Adapter, options: RecycleOptions, registry: Registry, folder: Path,
    changes: Sequence[str] = (),
) -> Scores:  # fmt: skip
    """Return the scores of the old base with the adapter, the next base, and both together.

    Raises:
        ValueError: if the adapter is a head in closed form.
    """
    if adapter.kind == "head":
        raise ValueError(
            f"{adapter.name} is a head in closed form, which has no direct use on another base: "
            "solve it again with mmcl recycle --mode direct --data CARD"
        )
    return Recycling(adapter, options, registry, folder, changes).run().scores
