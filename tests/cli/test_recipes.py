"""The recipes of docs/recipes.md: published numbers, and ``mmcl check`` on a small LLaVA-1.5."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

from mmcl.lightning.config.cli import ContinualCLI
from mmcl.streams.public_sets import read_set
from tests.cli.test_check import line
from tests.data.small_stream import coloured, write_tar
from tests.models.small_vlms import write_model

HOUSE = Path(__file__).parent.parent.parent
PAGE = (HOUSE / "docs" / "recipes.md").read_text()
BENCHMARKS = ("ucit", "coin", "mllm_dcl", "mllm_acl")
FOLDER = "configs/llava_7b"
EPOCHS = {"mllm_dcl": {"Med": 3, "Sci": 2}, "mllm_acl": {"OCR": 3, "APP": 3}}
RATES = {"ucit": 2e-4, "coin": 2e-4, "mllm_dcl": 2e-5, "mllm_acl": 2e-4}
RANKS = {"ucit": 16, "coin": 128, "mllm_dcl": 32, "mllm_acl": 32}
EXPERTS = {"ucit": (3, 6), "coin": (16, 8), "mllm_dcl": (7, 5), "mllm_acl": (8, 4)}


def recipes():
    """(benchmark, method) -> options, of the tables of the page."""
    found = {}
    for benchmark in BENCHMARKS:
        section = PAGE.split(f"`{benchmark}.yaml`", 1)[1].split("\n## ", 1)[0]
        for row in re.findall(r"^\| [^|]+ \| (`[^|]+) \|", section, re.MULTILINE):
            file, *options = re.findall(r"`([^`]+)`", row)
            words = [word for option in options for word in option.split()]
            method = file.removesuffix(".yaml")
            found[benchmark, "lora" if method == benchmark else method] = words
    return found


RECIPES = recipes()
METHODS = ("lora", *sorted({method for _, method in RECIPES} - {"lora"}))


def command(benchmark, method):
    """The command line of a recipe; LoRA is the benchmark's file alone."""
    files = [benchmark] if method == "lora" else [benchmark, method]
    words = [word for file in files for word in ("--config", f"{FOLDER}/{file}.yaml")]
    return [*words, *RECIPES[benchmark, method]]


@cache
def settings(benchmark, method):
    return ContinualCLI(command(benchmark, method)).plain()


@pytest.fixture(autouse=True)
def _at_home(monkeypatch):
    monkeypatch.chdir(HOUSE)


def test_the_page_has_every_method_on_every_benchmark():
    assert METHODS == (
        "lora", "cl_moe", "hide", "lora_router", "modal_prompt", "moe_lora", "o_lora", "sefe"
    )  # fmt: skip
    assert set(RECIPES) == {(b, method) for b in BENCHMARKS for method in METHODS}
    files = {file.stem for file in (HOUSE / FOLDER).glob("*.yaml")}
    assert files == {*BENCHMARKS, *METHODS} - {"lora"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_recipe_has_the_published_numbers(benchmark, method):
    found = settings(benchmark, method)
    model, data, trainer = found["model"], found["data"], found["trainer"]
    assert found["output_dir"] == f"runs/llava_7b/{benchmark}"
    assert found["run_name"] == method
    arguments = model["strategy"]["init_args"]
    if method == "modal_prompt":
        assert arguments["prompt_length"] == (10 if benchmark in ("ucit", "coin") else 20)
        assert (model["learning_rate"], trainer["max_epochs"]) == (2e-4, 10)
        assert (model["param_groups"], data["task_epochs"]) == (None, None)
        return
    rank, experts = EXPERTS[benchmark]
    if method == "moe_lora":
        assert (arguments["rank"], arguments["num_experts"]) == (rank, experts)
    elif (benchmark, method) in {("coin", "hide"), ("coin", "cl_moe")}:
        assert arguments["rank"] == 8
    else:
        assert arguments["rank"] == RANKS[benchmark]
    if method == "cl_moe":
        assert arguments["num_experts"] == (4 if benchmark == "coin" else experts)
    if method == "o_lora":
        # 0.05 of the sum over 224 layers and rank x rank entries.
        weight = 0.05 * 224 * RANKS[benchmark] ** 2
        assert arguments["overlap_weight"] == pytest.approx(weight, rel=1e-3)
    assert (arguments["alpha"], arguments["dropout"]) == (None, 0.05)  # None is 2 x rank
    assert arguments["train_projector"] is (method != "lora_router")
    groups = None if method == "lora_router" else {"projector": 2e-5}
    assert model["param_groups"] == groups
    assert model["learning_rate"] == RATES[benchmark]
    assert (model["weight_decay"], model["warmup_steps"], model["lr_schedule"]) == (
        0.0, 0.03, "cosine",
    )  # fmt: skip
    assert data["task_epochs"] == EPOCHS.get(benchmark)
    assert trainer["max_epochs"] == 1


@cache
def small_folder(root):
    """A LLaVA-1.5 of a few thousand weights, and a stream of 8 samples a task of each benchmark."""
    torch.manual_seed(0)
    write_model(root / "llava", "llava")
    for benchmark in BENCHMARKS:
        entries, folder = [], root / benchmark
        folder.mkdir()
        for place, task in enumerate(read_set(benchmark).tasks):
            for part, count in (("train", 8), ("test", 4)):
                write_tar(folder / f"{task.name}-{part}.tar", coloured(count, place, part))
            entries.append(
                {
                    "name": task.name,
                    "scorer": "exact",  # the answers are colors
                    "max_new_tokens": 2,
                    "train": f"{task.name}-train.tar",
                    "test": f"{task.name}-test.tar",
                }
            )
        card = {
            "name": benchmark, "scenario": "domain", "task_type": "instruction", "tasks": entries
        }  # fmt: skip
        (root / benchmark / f"{benchmark}.yaml").write_text(yaml.safe_dump(card))
    return root


def checked(desk, root, benchmark, method):
    """What ``mmcl check`` prints for a recipe on the small model and stream."""
    given = [
        *command(benchmark, method),
        f"--model.model.init_args.model={root / 'llava'}",
        f"--data.stream={root / benchmark / benchmark}.yaml",
        f"--output_dir={desk.folder}",
        "--data.num_workers=0",
        "--data.global_batch_size=8",
        "--trainer.accelerator=cpu",
    ]
    if settings(benchmark, method)["model"]["model"]["init_args"]["routing_encoder"]:
        encoder = "--model.model.init_args.routing_encoder.init_args"
        given += [f"{encoder}.model=tiny", f"{encoder}.pretrained=built-in"]
    return desk.give("check", *given)


@pytest.fixture(scope="session")
def recipe_root(tmp_path_factory):
    """The small model and streams."""
    return small_folder(tmp_path_factory.mktemp("recipes"))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_every_recipe_passes_check(desk, recipe_root, monkeypatch, benchmark, method):
    monkeypatch.chdir(HOUSE)
    status, out, err = checked(desk, recipe_root, benchmark, method)
    assert (status, err) == (0, "")
    found = settings(benchmark, method)
    epochs, every = found["data"]["task_epochs"] or {}, found["trainer"]["max_epochs"]
    for task in read_set(benchmark).tasks:
        kind, training, test, steps, *_ = line(out, f"{task.name} ").split()
        assert (kind, training, test) == ("instruction", "8", "4")
        assert int(steps) == epochs.get(task.name, every)  # one batch an epoch
    assert found["model"]["strategy"]["class_path"].rpartition(".")[2] in out
    assert "the configuration works" in out
