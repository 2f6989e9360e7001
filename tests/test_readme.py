"""README says what is so: its code runs, its table is the command's, its files exist."""

import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from mmcl.commands import main
from mmcl.core import begin_task, end_task, step
from tests.stand_in import StandIn, a_task, task_batches

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def code_of(place):
    """Return a block with the small stand-in for the big model, its trainer kept quiet."""
    text = BLOCKS[place].replace('OpenCLIP("ViT-B-16", pretrained="openai")', "StandIn()")
    quiet = (
        "max_epochs=1, accelerator='cpu', logger=False, enable_checkpointing=False, "
        "enable_progress_bar=False, enable_model_summary=False"
    )
    return text.replace("max_epochs=1", quiet)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_lightning_module_of_the_readme_learns_two_tasks():
    scope = {"StandIn": StandIn}
    exec(code_of(0), scope)
    module = scope["Mine"]()
    scope["trainer"].fit(module, DataLoader(task_batches(0), batch_size=None))
    assert len(module.strategy.holdings()) == 2
    assert all(count > 0 for count in module.strategy.holdings().values())
    exec("trainer =" + code_of(0).split("trainer =")[1], scope)
    scope["trainer"].fit(module, DataLoader(task_batches(1), batch_size=None))
    assert module.strategy.current.index == 1
    assert {"dark_logits", "ewc"} <= set(module.trainer.callback_metrics)


def test_the_bare_loop_of_the_readme_learns():
    scope = {"StandIn": StandIn}
    exec(code_of(0).split("trainer =")[0], scope)
    module = scope["Mine"]()
    model, strategy = module.model, module.strategy
    before = model.patch.weight.detach().clone()
    for index in range(2):
        names = {
            "begin_task": begin_task, "end_task": end_task, "step": step, "model": model,
            "strategy": strategy, "task": a_task(index), "loader": task_batches(index),
            "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        }  # fmt: skip
        exec(code_of(1), names)
    assert not torch.equal(model.patch.weight, before)
    assert all(count > 0 for count in strategy.holdings().values())


def test_the_table_of_strategies_is_the_commands(capsys):
    assert main(["strategies", "--markdown"]) == 0
    assert capsys.readouterr().out.strip() in README


def test_what_the_readme_links_to_is_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for config in re.findall(r"configs/[\w/]+\.yaml", README):
        assert (ROOT / config).exists(), config
