"""``mmcl check``: a dry run that writes nothing."""

import json

import pytest

from mmcl.cli.check import duration
from tests.data.small_stream import labelled


def files(folder):
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


def line(out, title):
    """The rest of the line that begins with a title."""
    return next(row[len(title) :].strip() for row in out.splitlines() if row.startswith(title))


def test_a_good_configuration_is_estimated_and_the_run_folder_is_not_made(desk):
    status, out, err = desk.run(command=["check"])
    assert (status, err) == (0, "")
    assert not (desk.folder / "runs").exists()
    assert line(out, "task-a").split()[:4] == ["classification", "16", "5", "2"]
    assert line(out, "task-c").split()[:4] == ["classification", "12", "5", "2"]
    assert line(out, "stream") == "small, class-incremental, 3 tasks"
    assert line(out, "the run").startswith("about ")
    assert "nothing was written to runs/small_run" in out


def test_the_folder_of_a_finished_run_stays_as_it_is(learned):
    before = {file: file.stat().st_mtime_ns for file in files(learned.results)}
    assert learned.run(command=["check"])[0] == 0
    assert before == {file: file.stat().st_mtime_ns for file in files(learned.results)}


def test_a_folder_with_another_run_is_refused_before_hours_are_spent(learned):
    status, _, err = learned.run("--model.learning_rate", "0.5", command=["check"])
    assert status == 1
    assert "model.learning_rate" in err


@pytest.mark.parametrize(
    ("strategy", "steps"),
    [
        # Batches of 8: 16, 12 and 12 new samples; half of a batch is replay after the first task.
        ("ExperienceReplay", ["2", "3", "3"]),
        # All old samples come once more: 16, 16 + 12, 28 + 12.
        ("Joint", ["2", "4", "5"]),
        ("RanPAC", ["1", "1", "1"]),
    ],
)
def test_steps_are_those_that_the_run_will_take(desk, strategy, steps):
    changes = {
        "ExperienceReplay": {"buffer_size": 12, "replay_ratio": 0.5},
        "RanPAC": {"projection_dim": 40},
    }

    def configure(config):
        config["model"]["strategy"]["init_args"] = changes.get(strategy, {})

    desk.configure(strategy, configure)
    status, out, _ = desk.run(command=["check"])
    assert status == 0
    assert [line(out, f"task-{letter}").split()[3] for letter in "abc"] == steps


def test_the_size_of_the_strategy_state_is_printed(desk):
    desk.configure("NCM")
    _, out, _ = desk.run(command=["check"])
    # Two classes of 16 float64 sums and a count, beside the strategy's own small state.
    assert line(out, "strategy state").endswith("after the first 16 samples")
    assert line(out, "parameters").endswith("0 trainable, with the strategy's")


def test_a_bad_sample_is_named_and_the_check_continues(desk):
    members = [("bad.png", b"\x89PNG no"), ("bad.cls", b"0"), *labelled(15, name="atrain")]
    desk.stream(a_train=members)
    status, out, _ = desk.run("--data.max_bad_fraction", "0.1", command=["check"])
    assert status == 0
    assert "cannot be read: bad in a-train.tar" in out


def test_a_shard_with_another_hash_is_found(desk):
    desk.rewrite_card(lambda card: card.update(hashes={"a-train.tar": "0" * 64}))
    status, _, err = desk.run(command=["check"])
    assert status == 1
    assert "a-train.tar has the sha256" in err


def test_a_strategy_that_does_not_fit_the_model_is_found(desk):
    def plain(config):
        config["model"]["model"] = {"class_path": "tests.cli.plain_model.PlainModel"}

    desk.configure("NCM", plain)
    status, _, err = desk.run(command=["check"])
    assert status == 1
    assert err.startswith("error: NCM needs model.embed")


def test_estimated_durations_are_rounded():
    assert [duration(s) for s in (0.42, 50, 600, 9000)] == ["0.4 s", "50 s", "10 min", "2.5 h"]


def test_epochs_of_a_task_in_the_run_take_the_place_of_the_cards(desk):
    desk.rewrite_card(lambda card: card["tasks"][2].update(epochs=4))
    options = ("--data.task_epochs", '{"task-b": 3}')
    status, out, _ = desk.run(*options, command=["check"])
    assert status == 0
    # Batches of 8: 16 samples once, 12 three times, 12 four times.
    assert [line(out, f"task-{letter}").split()[3] for letter in "abc"] == ["2", "6", "8"]
    assert desk.run(*options)[0] == 0
    ledger = json.loads((desk.results / "ledger.json").read_text())["tasks"]
    assert [task["samples_new"] for task in ledger] == [16, 36, 48]
    assert [task["steps"] for task in ledger] == [2, 6, 8]


@pytest.mark.parametrize(
    ("given", "wrong"), [('{"task-d": 2}', "'task-d' 2 epochs"), ('{"task-a": 0}', "'task-a' 0")]
)
def test_epochs_of_an_unknown_task_are_refused_with_the_known_ones(desk, given, wrong):
    status, _, err = desk.run("--data.task_epochs", given, command=["check"])
    assert status == 1
    assert f"data.task_epochs gives {wrong}" in err
    assert "task-a, task-b, task-c" in err


def test_epochs_may_name_tasks_that_the_order_leaves_out(desk):
    options = ("--data.task_epochs", '{"task-b": 3}', "--data.task_order", "[0,2]")
    assert desk.run(*options, command=["check"])[0] == 0
