"""Code, tables and links of the README and the docs: they run, are the commands' and exist."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import mmcl
from mmcl.cli import main
from tests.strategies.plain_loop import batches_of, loader
from tests.test_plugin import TASKS, Foreign, answers, fit, learn_by_hand
from tests.toys.toy_clip import StandIn, a_task, task_batches

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def code(page, index):
    """Return a python block of a page, with a small model for the big one and a quiet trainer."""
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL
    )
    blocks = [block for block in blocks if not block.startswith("--8<--")]
    text = blocks[index].replace('mmcl.OpenCLIP("ViT-B-16", pretrained="openai")', "StandIn()")
    quiet = (
        "max_epochs=1, accelerator='cpu', logger=False, enable_checkpointing=False, "
        "enable_progress_bar=False, enable_model_summary=False"
    )
    return text.replace("max_epochs=1", quiet)


def learn(model, strategy):
    """Train on two tasks with the loop of docs/plugin.md."""
    for index in range(2):
        names = {
            "mmcl": mmcl, "model": model, "strategy": strategy, "task": a_task(index),
            "loader": task_batches(index),
            "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        }  # fmt: skip
        exec(code("docs/plugin.md", 0), names)
    return names["out"]


def test_the_example_of_the_readme_learns_two_tasks():
    scope = {}
    exec(code("README.md", 0), scope)
    assert set(scope["out"].terms) == {"task", "ewc"}
    assert scope["out"].terms["task"] < 0.5
    assert scope["strategy"].current_task.index == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_lightning_module_of_the_readme_learns_two_tasks():
    scope = {"StandIn": StandIn}
    exec(code("README.md", 1), scope)
    module = scope["MyModule"]()
    scope["trainer"].fit(module, DataLoader(task_batches(0), batch_size=None))
    assert len(module.strategy.buffer_sizes()) == 2
    assert all(count > 0 for count in module.strategy.buffer_sizes().values())
    exec("trainer =" + code("README.md", 1).split("trainer =")[1], scope)
    scope["trainer"].fit(module, DataLoader(task_batches(1), batch_size=None))
    assert module.strategy.current_task.index == 1
    assert {"dark_logits", "ewc"} <= set(module.trainer.callback_metrics)


def test_the_bare_loop_of_the_docs_learns():
    scope = {"StandIn": StandIn}
    exec(code("README.md", 1).split("trainer =")[0], scope)
    module = scope["MyModule"]()
    before = module.model.patch.weight.detach().clone()
    learn(module.model, module.strategy)
    assert not torch.equal(module.model.patch.weight, before)
    assert all(count > 0 for count in module.strategy.buffer_sizes().values())


def test_the_generative_example_of_the_docs_gives_a_loss_and_a_prediction():
    scope = {}
    exec(code("docs/plugin.md", 1), scope)
    assert scope["loss"].isfinite()
    assert len(scope["predictions"]) == 1


@pytest.mark.parametrize("name", ["L2P", "RanPAC", "EWC", "LoRA", "FeatureReplay", "LwF", "NCM"])
def test_the_model_of_the_docs_learns_in_a_lightning_module_as_in_a_bare_loop(name):
    arguments = {"L2P": {"pool_size": 4, "top_k": 2}, "RanPAC": {"projection_dim": 40}}
    models = []
    for _ in range(2):
        scope = {"__name__": "my_clip"}
        exec(code("docs/model.md", 0), scope)
        torch.manual_seed(0)
        model = scope["MyCLIP"](dim=16, size=8, patch=4)
        model.set_classes([f"class {n}" for n in range(6)], ["a {}.", "photo of a {}"])
        models.append((model, getattr(mmcl.strategies, name)(**arguments.get(name, {}))))
    (model, strategy), (foreign, its_strategy) = models
    strategy.attach(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    learn_by_hand(model, strategy, TASKS)
    module = Foreign(its_strategy, foreign)
    for task in TASKS:
        module.train()
        batches = loader(task.index, its_strategy.replay_plan(), foreign)
        fit(module, batches, [mmcl.StrategyCallback(task, batches_of(module.model)(task.index))])
    torch.testing.assert_close(answers(foreign, its_strategy), answers(model, strategy))
    after = dict(model.named_parameters())
    assert all(not torch.equal(value, after[n]) for n, value in before.items())


def test_the_loop_of_the_page_on_models_learns(tmp_path, monkeypatch):
    (tmp_path / "my_clip.py").write_text(code("docs/model.md", 0), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_clip", raising=False)
    scope = {}
    exec(code("docs/model.md", 1), scope)
    assert set(scope["out"].terms) == {"task", "ewc"}
    names = [name for name, p in scope["model"].named_parameters() if p.requires_grad]
    assert all(".lora_" in name for name in names)
    monkeypatch.delitem(sys.modules, "my_clip")


def test_the_strategy_of_the_docs_trains_and_survives_a_checkpoint():
    scope = {}
    exec(code("docs/own_strategy.md", 0), scope)
    model, strategy = StandIn(), scope["StayClose"](l2_lambda=0.5)
    strategy.attach(model)
    assert learn(model, strategy).terms["stay_close"] > 0
    scope_of_tests = {"StayClose": scope["StayClose"]}
    exec(code("docs/own_strategy.md", 1), scope_of_tests)
    assert scope_of_tests["failed"] == []
    again = scope["StayClose"]()
    again.load_state_dict(strategy.state_dict())
    assert torch.equal(again.start["patch.weight"], strategy.start["patch.weight"])


@pytest.mark.parametrize(
    ("page", "options"), [("README.md", []), ("docs/strategies.md", ["--long"])]
)
def test_the_table_of_strategies_is_the_commands(capsys, page, options):
    assert main(["strategies", "--markdown", *options]) == 0
    assert capsys.readouterr().out.strip() in (ROOT / page).read_text(encoding="utf-8")


def test_the_long_table_is_a_markdown_table(capsys):
    assert main(["strategies", "--long"]) == 2
    assert "add --markdown" in capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
    for named in re.findall(r"(?<![\w/])(?:configs|tests|mmcl)/[\w/]+\.\w+", text):
        assert (ROOT / named).exists(), named


def test_the_number_of_strategies_in_the_readme_is_that_of_the_files():
    count = len(list((ROOT / "mmcl/strategies").glob("*.py"))) - 1
    assert f"**A strategy is one file**: {count} of them" in README
