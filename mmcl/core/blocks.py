"""The repeated blocks of a model, which are computed one after another."""

from __future__ import annotations

from typing import Any

from torch import nn


def blocks_of(model: Any) -> list[nn.Module]:
    """Return the blocks that every training step runs on every process, in the model's order.

    They are what ``model.blocks()`` says. Of a model that does not say, they are the blocks of each
    stack in which something learns: what is frozen may be left out of a step.

    Args:
        model: a VLM that is a torch module.
    """
    own = getattr(model, "blocks", None)
    if callable(own):
        return list(own())
    learning = [stack for stack in stacks(model) if _learns(stack)]
    return [block for stack in learning for block in stack]


def stacks(module: nn.Module) -> list[list[nn.Module]]:
    """Return the children of every list or sequence of modules of one kind, outermost ones only.

    A block has modules of its own: a row of plain layers is no stack.

    Args:
        module: is searched from the top down.
    """
    found = []
    for child in module.children():
        inside = list(child.children())
        is_row = isinstance(child, nn.ModuleList | nn.Sequential)
        if is_row and len({type(block) for block in inside}) == 1 and _is_block(inside[0]):
            found.append(inside)
        else:
            found += stacks(child)
    return found


def _is_block(module: nn.Module) -> bool:
    has_parts = next(module.children(), None) is not None
    return has_parts and next(module.parameters(), None) is not None


def _learns(stack: list[nn.Module]) -> bool:
    return any(parameter.requires_grad for block in stack for parameter in block.parameters())
