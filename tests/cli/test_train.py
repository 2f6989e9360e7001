"""``mmcl train`` from the command line."""

import json
import re
import warnings

import pytest

from mmcl.cli import train
from mmcl.report import write_report


@pytest.mark.slow
def test_one_command_leaves_a_whole_run_directory(desk, monkeypatch):
    monkeypatch.setattr(train, "write_report", write_report)
    status, out, err = desk.run()
    assert (status, err) == (0, "")
    assert "after, %" in out
    assert f"report: runs/{desk.config.stem}/report.html" in out
    found = {path.name for path in desk.results.iterdir()}
    assert found >= {
        "config.yaml", "matrix.json", "summary.json", "ledger.json", "answers", "report.html",
        "figures", "run.json", "checkpoints",
    }  # fmt: skip
    page = (desk.results / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_what_is_not_used_the_scores_and_the_table_are_printed_and_nothing_else(desk):
    status, out, err = desk.run()
    assert (status, err) == (0, "")
    note, *lines = out.splitlines()
    assert note.startswith("of 55 samples these members are not used")
    assert [line.split(":")[0] for line in lines[:4]] == [
        "before training", "after 'task-a'", "after 'task-b'", "after 'task-c'",
    ]  # fmt: skip
    assert lines[4].startswith("after, %")


def test_the_same_command_on_a_finished_run_shows_its_result_at_once(learned):
    kept = {file: file.stat().st_mtime_ns for file in learned.results.glob("checkpoints/*")}
    status, out, _ = learned.run()
    assert status == 0
    assert "all 3 tasks are finished" in out
    assert "after, %" in out
    assert kept == {file: file.stat().st_mtime_ns for file in learned.results.glob("checkpoints/*")}


def test_another_configuration_in_the_same_folder_is_refused_by_the_name_of_the_difference(learned):
    status, _, err = learned.run("--model.learning_rate", "0.5")
    assert status == 1
    assert "model.learning_rate is 0.001 there and 0.5 here" in err


def test_a_mistake_that_was_corrected_before_any_training_is_no_other_run(desk):
    assert desk.run("--data.stream", "nowhere.yaml")[0] == 1
    assert desk.run("--data.max_samples", "8")[0] == 0


def test_dotted_options_and_a_second_configuration_are_laid_over_the_first(desk):
    overlay = desk.folder / "overlay.yaml"
    overlay.write_text("run_name: laid\ndata:\n  max_samples: 8\n")
    assert desk.run("--config", overlay, "--trainer.max_epochs", "2")[0] == 0
    ledger = json.loads((desk.folder / "runs" / "laid" / "ledger.json").read_text())
    costs = ledger["tasks"]
    assert [cost["samples_new"] for cost in costs] == [16, 16, 16]


def test_a_strategy_is_named_by_its_class_alone(desk):
    words = ["--model.strategy", "EWC", "--model.strategy.ewc_lambda", "3", "--print_config"]
    status, out, _ = desk.run(*words)
    assert status == 0
    assert re.search(r"class_path: mmcl\.strategies\.(ewc\.)?EWC\n", out)
    assert "ewc_lambda: 3.0" in out


def test_print_config_gives_a_configuration_that_can_be_given_back(desk):
    _, out, _ = desk.run("--print_config")
    desk.config.write_text(out)
    assert desk.run("--print_config") == (0, out, "")


def test_help_shows_the_commands_first(desk):
    status, out, _ = desk.give("--help")
    assert status == 0
    assert out.index("commands:") < out.index("settings:")
    for name in ("check", "evaluate", "compare", "strategies", "predict", "--data.stream"):
        assert name in out
    assert desk.give() == (2, out, "")


def test_a_warning_is_one_line(desk):
    # A share of nothing: every penalty of EWC with ewc_lambda 0 is inactive.
    desk.configure("EWC", lambda c: c["model"]["strategy"].update(init_args={"ewc_lambda": 0.0}))
    warnings.simplefilter("default")
    status, _, err = desk.run()
    assert status == 0
    assert err.count("warning: EWC has an inactive part in task 'task-b'") == 1
    assert all(line.startswith("warning: ") for line in err.splitlines())
