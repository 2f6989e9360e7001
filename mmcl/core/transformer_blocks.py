"""Transformer blocks of a model: the repeated modules that run one after another."""

from __future__ import annotations

from typing import Any

from torch import nn


def fsdp_blocks(model: Any) -> list[nn.Module]:
    """Return the transformer blocks that every training step runs on every process, in order.

    FSDP wraps these one by one. They are ``model.blocks()`` if the model has that method, else the
    blocks of every stack with a trainable parameter: a frozen stack may be skipped in a step.

    Args:
        model: a VLM that is a torch module.
    """
    own = getattr(model, "blocks", None)
    if callable(own):
        return list(own())
    return [block for stack in module_stacks(model) if _is_trainable(stack) for block in stack]


def module_stacks(module: nn.Module) -> list[list[nn.Module]]:
    """Return every stack of a module: the blocks of a ModuleList or Sequential of one block type.

    Only outermost stacks are returned. A block has submodules and parameters: a sequence of plain
    layers is no stack.

    Args:
        module: module to search, from the top down.
    """
    found = []
    for child in module.children():
        blocks = list(child.children())
        is_list = isinstance(child, nn.ModuleList | nn.Sequential)
        if is_list and len({type(block) for block in blocks}) == 1 and _is_block(blocks[0]):
            found.append(blocks)
        else:
            found += module_stacks(child)
    return found


def _is_block(module: nn.Module) -> bool:
    has_children = next(module.children(), None) is not None
    return has_children and next(module.parameters(), None) is not None


def _is_trainable(stack: list[nn.Module]) -> bool:
    return any(parameter.requires_grad for block in stack for parameter in block.parameters())
