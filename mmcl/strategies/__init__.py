"""Strategies, one method a file; each is imported when it is first used.

``from mmcl.strategies import EWC`` imports ``ewc.py`` alone: a file is named after its class, in
lower case with underscores anywhere. A new strategy is a new file here (or anywhere on the path, by
its full ``class_path``). The block for type checkers and editors is compared with the folder by
``tests/test_public_api.py``.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from mmcl.core import Chain, Strategy

if TYPE_CHECKING:
    from mmcl.strategies.agem import AGEM as AGEM
    from mmcl.strategies.cl_moe import CLMoE as CLMoE
    from mmcl.strategies.dark_replay import DarkReplay as DarkReplay
    from mmcl.strategies.ewc import EWC as EWC
    from mmcl.strategies.experience_replay import ExperienceReplay as ExperienceReplay
    from mmcl.strategies.feature_replay import FeatureReplay as FeatureReplay
    from mmcl.strategies.finetune import Finetune as Finetune
    from mmcl.strategies.hide import HiDe as HiDe
    from mmcl.strategies.joint import Joint as Joint
    from mmcl.strategies.l2p import L2P as L2P
    from mmcl.strategies.lora import LoRA as LoRA
    from mmcl.strategies.lora_router import LoRARouter as LoRARouter
    from mmcl.strategies.lwf import LwF as LwF
    from mmcl.strategies.modal_prompt import ModalPrompt as ModalPrompt
    from mmcl.strategies.moe_lora import MoELoRA as MoELoRA
    from mmcl.strategies.ncm import NCM as NCM
    from mmcl.strategies.o_lora import OLoRA as OLoRA
    from mmcl.strategies.osf import OSF as OSF
    from mmcl.strategies.ranpac import RanPAC as RanPAC
    from mmcl.strategies.recycle_distillation import RecycleDistillation as RecycleDistillation
    from mmcl.strategies.reg_lora import RegLoRA as RegLoRA
    from mmcl.strategies.weight_merging import WeightMerging as WeightMerging
    from mmcl.strategies.wise_ft import WiseFT as WiseFT

__all__ = ["Chain", "discover"]


def discover() -> dict[str, type[Strategy]]:
    """Import every file of this folder and return its strategies by class name, sorted."""
    found: dict[str, type[Strategy]] = {"Chain": Chain}
    for module in pkgutil.iter_modules(__path__, prefix=f"{__name__}."):
        for name, value in vars(importlib.import_module(module.name)).items():
            is_own = isinstance(value, type) and value.__module__ == module.name
            if is_own and issubclass(value, Strategy) and not name.startswith("_"):
                found[name] = value
    return dict(sorted(found.items()))


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    for module in pkgutil.iter_modules(__path__):
        if module.name.replace("_", "") == name.lower():
            found = vars(importlib.import_module(f"{__name__}.{module.name}"))
            if name in found:
                return found[name]
    raise AttributeError(f"there is no strategy {name}: known are {', '.join(discover())}")


def __dir__() -> list[str]:
    return sorted([*discover(), "discover"])
