"""What ``import mmcl`` gives: names that are imported when used, and typed."""

import subprocess
import sys
from pathlib import Path

import pytest

import mmcl
from mmcl import strategies

HERE = Path(__file__).parent.parent
PUBLIC = [
    "OpenCLIP", "ImageTextToText", "Chain", "Strategy", "Batch", "Task", "TaskStream", "step",
    "begin_task", "end_task", "StrategyCallback", "ContinualModule", "ContinualDataModule",
    "ImageLabelCollate", "ImageCaptionCollate", "strategies", "__version__", "begin_tasks",
    "collate_images", "collate_captions", "replay_loader", "evaluate", "AccuracyMatrix",
    "StepModule", "HFTrainerCallback",
]  # fmt: skip


def output_of(code):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, check=True
    )
    return done.stdout.strip()


def test_every_public_name_is_there():
    assert sorted(mmcl.__all__) == sorted(PUBLIC)
    assert all(getattr(mmcl, name) is not None for name in PUBLIC)
    assert set(dir(mmcl)) == set(PUBLIC)


def test_the_version_is_the_packages():
    stated = (HERE / "setup.cfg").read_text().split("version = ")[1].split()[0]
    assert mmcl.__version__ == stated


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(
        AttributeError, match="'mmcl' has no 'CLIP': it has AccuracyMatrix, Batch, Chain"
    ):
        _ = mmcl.CLIP


def test_import_mmcl_loads_no_third_party():
    heavy = "{'torch', 'torchvision', 'transformers', 'pytorch_lightning', 'open_clip', 'numpy'}"
    assert output_of(f"import sys, mmcl; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_a_strategy_imports_its_own_file_alone():
    code = (
        "import sys; from mmcl.strategies import EWC; "
        "print(sorted(m for m in sys.modules if m.startswith('mmcl.strategies.')))"
    )
    assert output_of(code) == "['mmcl.strategies.ewc']"


def test_the_types_of_strategies_are_those_of_the_folder():
    text = Path(strategies.__file__).read_text(encoding="utf-8")
    stated = [line for line in text.splitlines() if line.startswith("    from mmcl.strategies.")]
    expected = [
        f"    from {cls.__module__} import {name} as {name}"
        for name, cls in strategies.discover().items()
        if cls.__module__.startswith(strategies.__name__)
    ]
    assert sorted(stated) == sorted(expected)


def test_each_strategy_is_found_by_its_name():
    for name, cls in strategies.discover().items():
        assert getattr(strategies, name) is cls


def test_an_unknown_strategy_is_refused_with_the_known_ones():
    with pytest.raises(AttributeError, match="there is no strategy Ewc: known are AGEM, CLMoE"):
        _ = strategies.Ewc


@pytest.mark.slow
def test_a_type_checker_sees_the_public_names(tmp_path):
    user = tmp_path / "user.py"
    user.write_text(
        "import mmcl\nfrom mmcl.strategies import EWC\n"
        "reveal_type(mmcl.OpenCLIP('tiny'))\nreveal_type(EWC(ewc_lambda=1.0))\n"
        "EWC(weight=1.0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", str(user)],
        capture_output=True, text=True, cwd=HERE,
    )  # fmt: skip
    assert '"mmcl.models.open_clip.model.OpenCLIP"' in done.stdout
    assert '"mmcl.strategies.ewc.EWC"' in done.stdout
    assert 'Unexpected keyword argument "weight" for "EWC"' in done.stdout
