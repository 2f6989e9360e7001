"""Streams whose tasks are trained several times: kills, more repeats later, and their cells."""

import pytest
import yaml

from tests.behaviour.kill_runs import KILLED
from tests.distributed.ranks import on_ranks
from tests.lightning.small_runs import SmallRuns

pytestmark = pytest.mark.slow


def change_card(runs, **changes):
    """Write other top-level keys into the card."""
    card = yaml.safe_load(runs.card.read_text()) | changes
    runs.card.write_text(yaml.safe_dump(card, sort_keys=False))


@pytest.mark.parametrize("strategy", ["ExperienceReplay", "EWC", "RanPAC", "L2P", "Joint", "LwF"])
def test_a_killed_cyclic_run_ends_as_one_that_was_left_alone(tmp_path, strategy):
    runs = SmallRuns(tmp_path, sizes=(12, 10))
    options = {"data__repeats": 2}
    runs.finish("alone", strategy, **options)
    for moment in (("ended", 3), ("score", 1)):  # in the second cycle
        status, output = runs.start("killed", strategy, kill=moment, **options)
        assert status == KILLED, output
    output = runs.finish("killed", strategy, **options)
    assert "resuming" in output
    assert runs.differences("killed", "alone") == []


def test_every_occurrence_has_the_cells_of_its_task(runs):
    runs.finish("cyclic", data__repeats=2)
    matrix = runs.matrix("cyclic")
    assert matrix.rows[1:] == matrix.names
    assert matrix.names[:4] == ("task-a", "task-b", "task-c", "task-a (2)")
    assert matrix.missing() == []
    for row in matrix.values:
        assert row[:3] == row[3:]
    answers = runs.path("cyclic") / "answers"
    assert not any("05" in file.name for file in answers.rglob("*.jsonl"))


def test_the_first_cycle_is_that_of_a_run_without_repeats(runs):
    runs.finish("once", data__max_samples=10)
    runs.finish("cyclic", data__max_samples=10, data__repeats=2)
    once, cyclic = runs.matrix("once"), runs.matrix("cyclic")
    assert [row[:3] for row in cyclic.values[:4]] == list(once.values)


def test_repeats_can_be_raised_and_not_lowered(runs):
    runs.finish("whole", "ExperienceReplay", data__repeats=3)
    runs.finish("grown", "ExperienceReplay")
    runs.finish("grown", "ExperienceReplay", data__repeats=2)
    output = runs.finish("grown", "ExperienceReplay", data__repeats=3)
    assert "resuming after task 5 ('task-c (2)')" in output
    assert runs.differences("grown", "whole") == []
    assert yaml.safe_load((runs.path("grown") / "config.yaml").read_text())["data"]["repeats"] == 3
    status, output = runs.start("grown", "ExperienceReplay", data__repeats=1)
    assert status == 1
    assert "'task-a (2)'" in output


def test_a_task_incremental_cell_is_of_the_occurrence_that_was_trained_last(runs):
    change_card(runs, scenario="task")
    runs.finish("cyclic", "LoRA" if runs.kind == "instruction" else "Finetune", data__repeats=2)
    assert runs.matrix("cyclic").missing() == []


def test_answers_are_copied_strictly_and_leniently(tmp_path):
    runs = SmallRuns(tmp_path, sizes=(8, 8), kind="instruction")
    runs.finish("cyclic", "LoRA", data__repeats=2)
    for name in ("matrix.json", "lenient.json"):
        matrix = type(runs.matrix("cyclic")).read(runs.path("cyclic") / name)
        assert matrix.missing() == []
        assert all(row[:2] == row[2:] for row in matrix.values)


def test_class_texts_of_the_own_task_alone_are_refused_for_repeated_tasks(runs):
    option = {"data__repeats": 2, "model__model__logit_scope": "task"}
    status, output = runs.start("cyclic", **option)
    assert status == 1
    assert "use logit_scope 'seen'" in output


def test_a_task_that_is_appended_to_the_card_of_a_cyclic_run_is_refused(runs):
    full = yaml.safe_load(runs.card.read_text())["tasks"]
    change_card(runs, tasks=full[:2])
    runs.finish("cyclic", data__repeats=2)
    change_card(runs, tasks=full)
    status, output = runs.start("cyclic", data__repeats=2)
    assert status == 1
    assert "task 2 ('task-a (2)') is not the one this run was trained on" in output


def test_two_processes_train_a_cycle_more_and_copy_its_cells(tmp_path):
    runs = SmallRuns(tmp_path, sizes=(12, 10), test_size=7)
    still = {"model__optimizer": "torch.optim.SGD", "model__optimizer.lr": 0.0}
    for repeats in (1, 2):
        words = runs.words("two", data__repeats=repeats, **still)
        folder = tmp_path / f"ranks_{repeats}"
        assert on_ranks(words, folder, world=2) == [0, 0], (folder / "output_0").read_text()
    runs.finish("one", data__repeats=2, **still)
    assert runs.matrix("two").missing() == []
    assert runs.matrix("two").values == runs.matrix("one").values


def test_a_validation_part_is_the_same_in_every_cycle(runs):
    options = {"data__repeats": 2, "data__validation_share": 0.2}
    output = runs.finish("cyclic", **options)
    assert "task-a (2)" in output
    assert runs.matrix("cyclic").missing() == []
