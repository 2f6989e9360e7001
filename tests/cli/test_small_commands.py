"""Lists and builders, and Lightning's own commands."""

import re
import runpy
import sys

import pytest

from mmcl.cli.strategies import describe
from mmcl.strategies import discover
from mmcl.streams.public_sets import list_sets
from mmcl.streams.registry import STREAMS

# Lightning speaks through rich, which asks the terminal for its width.
LIGHTNING = ["fit", "validate", "test", "predict"]


def test_strategies_names_every_strategy_in_a_row_of_its_own(desk):
    status, out, err = desk.give("strategies", "--markdown", "--long")
    assert (status, err) == (0, "")
    rows = [row.strip("| ").split(" | ") for row in out.splitlines()[2:]]
    assert [row[0] for row in rows] == list(discover())
    assert all(len(row) == 4 and row[1] and row[2] != "-" and row[3] != "-" for row in rows)


def test_strategies_as_a_list_for_the_eye_has_a_line_for_each(desk):
    status, out, _ = desk.give("strategies")
    assert status == 0
    lines = [line.split(maxsplit=1) for line in out.splitlines() if line.startswith("  ")]
    assert sorted(name for name, _ in lines) == sorted(discover())
    assert all(what.endswith(".") for _, what in lines)


def test_strategies_stand_under_the_kind_of_model_that_they_need(desk):
    out = desk.give("strategies")[1]
    groups = [set(re.findall(r"^  (\w+)", each, re.M)) for each in f"\n{out}".split("\nwith a")[1:]]
    any_model, generative, classifying = groups
    assert {"LoRA", "OLoRA", "MoELoRA"} <= generative
    assert {"NCM", "RanPAC", "DarkReplay"} <= classifying
    assert {"EWC", "Joint", "ExperienceReplay", "Chain"} <= any_model
    assert any_model | generative | classifying == set(discover())


def test_strategies_shows_everything_about_one(desk):
    status, out, err = desk.give("strategies", "EWC")
    assert (status, err) == (0, "")
    assert out.startswith("mmcl.strategies.ewc.EWC\n")
    for part in ("Args:", "Remembers", "Asks of the model"):
        assert part in out
    status, _, err = desk.give("strategies", "ewcc")
    assert status == 2
    assert "did you mean EWC?" in err


def test_data_list_names_every_stream(desk):
    status, out, err = desk.give("data", "list")
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == [*STREAMS, *list_sets()]


@pytest.mark.slow
def test_data_build_makes_a_stream_that_a_run_can_take(desk):
    assert desk.give("data", "build", "digits", "--out", "data/digits")[0] == 0
    assert (desk.folder / "data" / "digits" / "digits.yaml").is_file()
    status, out, _ = desk.run(
        "--data.stream", "digits", "--data.max_samples", "16", command=["check"]
    )
    assert status == 0
    assert "digits, class-incremental, 5 tasks" in out


def test_digits_in_another_class_order_need_a_folder_of_their_own(desk):
    words = ("data", "build", "digits", "--class_order_seed", "1993")
    status, _, err = desk.give(*words)
    assert status == 2
    assert "mmcl data build digits: error: data/digits is the folder of data.stream digits" in err
    assert not (desk.folder / "data").exists()
    assert desk.give(*words, "--out", "data/other")[0] == 0
    assert (desk.folder / "data" / "other" / "digits.yaml").is_file()


@pytest.mark.parametrize("key", ["class_order_seed", "init_cls"])
def test_a_class_order_for_a_run_is_refused_with_the_command_that_sets_it(desk, key):
    status, _, err = desk.run(f"--data.{key}", "1993")
    assert status == 2
    assert "classes are split into tasks when a stream is made, see mmcl data convert" in err
    assert err.count("\n") == 1


def test_data_build_of_an_unknown_stream_lists_the_known(desk):
    status, _, err = desk.give("data", "build", "digit")
    assert status == 1
    assert "digits_domains" in err


@pytest.mark.parametrize("command", LIGHTNING)
def test_lightnings_commands_work_on_a_task(desk, command):
    status, out, err = desk.run("--data.task_index", "1", command=[command])
    assert status == 0
    assert "arning" not in err
    for noise in ("GPU available", "TPU", "litlogger", "does not have many workers", "Tip"):
        assert noise not in out + err


def test_predict_prints_key_and_answer_of_every_test_row(desk):
    _, out, _ = desk.run("--data.task_index", "1", command=["predict"])
    answers = re.findall(r"^(btest\d{3})\t(\w+)$", out, re.MULTILINE)
    assert [key for key, _ in answers] == [f"btest{number:03d}" for number in range(5)]
    assert {name for _, name in answers} <= {"c0", "c1", "c2", "c3"}


def test_test_scores_every_task_until_the_selected_one(desk):
    _, out, _ = desk.run("--data.task_index", "1", command=["test"])
    assert "accuracy/task-a" in out
    assert "accuracy/task-b" in out
    assert "accuracy/task-c" not in out


def test_what_fit_saves_test_loads(desk):
    assert desk.run(command=["fit"])[0] == 0
    (saved,) = desk.folder.rglob("*.ckpt")
    assert desk.run("--ckpt_path", saved, command=["test"])[0] == 0


@pytest.mark.filterwarnings("ignore:.*has an inactive part")
@pytest.mark.parametrize("strategy", sorted(discover()))
def test_every_strategy_is_fitted_by_lightning_alone(desk, strategy):
    desk.configure(strategy)
    if describe(strategy, discover()[strategy]).model == "answers":
        desk.ask(strategy)
    status, _, err = desk.run(command=["fit"])
    assert (status, err) == (0, "")


@pytest.mark.parametrize("command", [[], ["train"], ["check"], ["fit"]])
def test_print_config_prints_and_runs_nothing(desk, command):
    status, out, err = desk.run("--print_config", command=command)
    assert (status, err) == (0, "")
    assert "class_path: mmcl.models.OpenCLIP" in out
    assert not (desk.folder / "runs").exists()


@pytest.mark.parametrize(
    "command",
    ["check", "compare", "data", "evaluate", "export", "fit", "report", "strategies", "train"],
)
def test_every_command_has_help(desk, command):
    status, out, _ = desk.give(command, "--help")
    assert status == 0
    assert "usage" in out.lower()


def run_as_module(monkeypatch, *words):
    """Run ``python -m mmcl`` in this process; return its exit status."""
    monkeypatch.setattr(sys, "argv", ["mmcl", *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("mmcl", run_name="__main__", alter_sys=True)
    return ended.value.code


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--help"], "mmcl [command]"),
        (["data", "convert", "--help"], "mmcl data convert"),
        (["data", "build", "digits", "--help"], "mmcl data build digits"),
        (["compare", "--help"], "mmcl compare"),
        (["check", "--help"], "mmcl check"),
    ],
)
def test_python_m_mmcl_is_the_command_mmcl(desk, monkeypatch, words, name):
    assert run_as_module(monkeypatch, *words) == 0
    shown = desk.capsys.readouterr().out
    assert shown.startswith(f"usage: {name} ")
    assert shown == desk.give(*words)[1]


def test_python_m_mmcl_has_the_exit_status_of_the_command(desk, monkeypatch):
    assert run_as_module(monkeypatch, "nothing") == 2
    assert "there is no command 'nothing'" in desk.capsys.readouterr().err
    assert run_as_module(monkeypatch, "--config", str(desk.config)) == 0
    assert (desk.results / "matrix.json").is_file()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["sequence"], "'sequence' is called 'train' now"),
        (["score"], "'score' is called 'rescore' now"),
        (["data", "check"], "'check' is called 'validate' now"),
        (["data", "show"], "'show' is called 'preview' now"),
    ],
)
def test_a_renamed_command_is_refused_with_its_new_name(desk, old, new):
    status, out, err = desk.give(*old, "x")
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert new in err


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        (
            "--model.strategy.init_args.replay_ratio",
            "1.5",
            "replay_ratio is 1.5, expected more than 0",
        ),
        (
            "--data.global_batch_size",
            "0",
            "data.global_batch_size is 0, expected a number of samples",
        ),
    ],
)
def test_a_value_that_a_class_refuses_is_one_sentence(desk, option, value, sentence):
    status, _, err = desk.run("--model.strategy", "ExperienceReplay", option, value)
    assert status == 1
    assert sentence in err
    assert err.count("\n") == 1
