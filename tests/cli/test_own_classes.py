"""Models and strategies of one's own in a run: the pages' code, found in the working directory."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mmcl import cli
from tests.cli.test_bad_input import refused
from tests.data.small_stream import write_tar

ROOT = Path(__file__).parent.parent.parent
STRATEGIES = {
    "L2P": {"pool_size": 2, "prompt_length": 2, "top_k": 2},
    "RanPAC": {"projection_dim": 40},
    "EWC": {"ewc_lambda": 10.0},
    "LoRA": {"rank": 4},
}
TRAINED = {
    "L2P": {"strategy.keys", "strategy.pool"},
    "RanPAC": set(),
    "EWC": {
        f"model.{name}" for name in (
            "image.patches.weight", "image.patches.bias", "image.places.weight", "image.qkv.weight",
            "image.qkv.bias", "image.out.weight", "image.out.bias", "text.weight",
        )
    },
    "LoRA": {f"model.image.{p}.lora_{m}.default.weight" for p in ("qkv", "out") for m in "AB"},
}  # fmt: skip
"""Trained weights of a run, all of which change in its last two tasks."""
PLAIN = """
import torch
from mmcl.core import Output

class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(3, 6)

    def forward(self, batch, prompts=None):
        return Output(self.head(batch.images.float().mean((2, 3))))

    def loss(self, output, batch):
        return torch.nn.functional.cross_entropy(output.logits, batch.labels)
"""


def blocks(page, language):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def png(label, number):
    rng = np.random.default_rng(100 * label + number)
    pixels = rng.integers(0, 60, (16, 16, 3)) + 190 * np.array(
        [label & 1, label >> 1 & 1, label >> 2]
    )
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def own(desk, monkeypatch):
    """A desk with the model of docs/model.md in ``my_clip.py``; each class has a color."""
    (desk.folder / "my_clip.py").write_text(blocks("model.md", "python")[0])
    (desk.folder / "plain.py").write_text(PLAIN)
    for index, letter in enumerate("abc"):
        for part, count in (("train", 16), ("test", 8)):
            labels = [2 * index + n % 2 for n in range(count)]
            keys = [f"{letter}{part}{n:03d}" for n in range(count)]
            write_tar(desk.folder / "stream" / f"{letter}-{part}.tar", [
                member for n, (key, label) in enumerate(zip(keys, labels, strict=True))
                for member in (
                    (f"{key}.png", png(label, n + len(part))), (f"{key}.cls", b"%d" % label)
                )
            ])  # fmt: skip
    monkeypatch.setattr(sys, "path", [*sys.path])
    cli.add_working_directory()
    yield desk
    for name in ("my_clip", "plain", "my_strategy", "my_package"):
        sys.modules.pop(name, None)


def run_of(strategy, arguments):
    """The configuration of the page with another strategy, more epochs and the desk's stream."""
    config = yaml.safe_load(blocks("model.md", "yaml")[0])
    config["model"]["strategy"] = {"class_path": strategy, "init_args": arguments}
    config["model"]["learning_rate"] = 0.01
    config["data"] = {"stream": "stream/small.yaml", "global_batch_size": 8}
    config["trainer"]["max_epochs"] = 2
    return config


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_model_of_the_page_is_trained_by_a_run(own, strategy):
    own.config.write_text(yaml.safe_dump(run_of(strategy, STRATEGIES[strategy])))
    status, out, err = own.run()
    assert status == 0, err
    matrix = json.loads((own.results / "matrix.json").read_text())["values"]
    assert all(cell is not None for row in matrix for cell in row)
    first, last = (
        torch.load(own.results / f"checkpoints/task_0{task}.ckpt", weights_only=True)["state_dict"]
        for task in (0, 2)
    )
    assert {name for name in last if name.startswith("model.")} == {
        name for name in TRAINED[strategy] if name.startswith("model.")
    }
    assert all(not torch.equal(first[name], last[name]) for name in TRAINED[strategy])
    if strategy == "RanPAC":
        assert min(matrix[task + 1][task] for task in range(3)) == 1.0


@pytest.mark.parametrize("command", ["train", "check"])
def test_all_members_that_anything_needs_are_named_in_one_sentence(own, command):
    config = run_of("Chain", {"strategies": [{"class_path": "L2P"}, {"class_path": "LoRA"}]})
    config["model"]["model"] = {"class_path": "plain.Plain"}
    own.config.write_text(yaml.safe_dump(config))
    assert refused(
        own.run(command=[command]),
        "L2P needs model.embed(batch, modality) -> (B, D) and model.prompt_dims: {modality: token "
        "dim} and model.freeze(*towers), LoRA needs model.target_linears(target_modules) -> {name: "
        "nn.Linear} and model.freeze(*towers), a run needs model.transform(train) -> "
        "mmcl.core.Transform, a stream with classes ('small') needs model.set_classes(names, "
        "templates, tasks), and Plain has none: wrap it in mmcl.models or add the methods, as in "
        "docs/model.md",
    )
    assert not (own.results / "checkpoints").exists()


@pytest.mark.parametrize("command", ["train", "check", "fit", "test"])
def test_a_model_without_transform_and_classes_is_refused_before_the_first_step(own, command):
    config = run_of("Finetune", {})
    config["model"]["model"] = {"class_path": "plain.Plain"}
    own.config.write_text(yaml.safe_dump(config))
    assert refused(own.run(command=[command]), "a run needs model.transform(train)", "set_classes")


@pytest.mark.parametrize("command", ["train", "check", "fit"])
def test_a_run_that_cannot_train_anything_says_what_is_frozen(desk, command):
    def freeze(config):
        config["model"]["model"]["init_args"]["freeze"] = ["image", "text"]

    desk.configure("EWC", freeze)
    assert refused(
        desk.run(command=[command]),
        "EWC and the model have no trainable parameter: clip.",
        "clip.visual (",
        "was frozen before. Leave a part that the loss depends on trainable",
    )


def console_script(folder, *words):
    """Run ``mmcl`` as an installed console script in a folder, whose path is not searched."""
    script = folder.parent / "bin" / "mmcl"
    script.parent.mkdir(exist_ok=True)
    script.write_text("from mmcl.cli import script\nscript()\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, script, *map(str, words)],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("program", ["mmcl", "train.py"])
def test_a_program_finds_the_model_and_the_strategy_of_the_pages_beside_it(own, program):
    (own.folder / "my_package").mkdir()
    (own.folder / "my_package" / "__init__.py").touch()
    (own.folder / "my_package" / "close.py").write_text(blocks("own_strategy.md", "python")[0])
    config = run_of("my_package.close.StayClose", {"l2_lambda": 0.5})
    config["data"] |= {"num_workers": 1, "task_order": [0]}
    config["trainer"]["max_epochs"] = 1
    own.config.write_text(yaml.safe_dump(config))
    if program == "mmcl":
        done = console_script(own.folder, "--config", own.config.name)
    else:
        done = subprocess.run(
            [sys.executable, ROOT / "train.py", "--config", own.config.name],
            cwd=own.folder, capture_output=True, text=True,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "after, %" in done.stdout


def test_the_working_directory_hides_no_package_and_lends_no_plain_folder(tmp_path, monkeypatch):
    for name in ("plain_folder", "pack"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "build.py").write_text("found = True")
    (tmp_path / "pack" / "__init__.py").touch()
    (tmp_path / "yaml.py").write_text("raise RuntimeError('the installed one is hidden')")
    code = (
        "import importlib.util as u, sys; from mmcl import cli; "
        "sys.path = [p for p in sys.path if p]; cli.add_working_directory(); import yaml; "
        "assert sys.path[-1] == sys.argv[1] and u.find_spec('plain_folder') is None; "
        "import pack.build; assert pack.build.found and yaml.safe_load('1') == 1"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=tmp_path, env=environment, check=True
    )


def test_a_class_in_a_folder_without_init_is_refused_with_what_to_add(own):
    (own.folder / "my_plain").mkdir()
    (own.folder / "my_plain" / "close.py").write_text("class Close: pass")
    own.config.write_text(yaml.safe_dump(run_of("my_plain.close.Close", {})))
    assert refused(
        own.run(),
        "no module 'my_plain' on the path: my_plain/ has no __init__.py, add an empty one",
    )
