from statistics import fmean

import pytest

from mmcl.evaluation import AccuracyMatrix, Column
from mmcl.evaluation.declared_metrics import (
    ability_delta,
    compute_declared_metrics,
    declared_names,
    forward_transfer_of,
    fuar,
    probe_grid,
    stage_rows,
    vertical_forgetting,
)


def matrix_of(tasks, eval_only, columns, shift=None):
    """Matrix from columns of scores by row; a column may be shorter than the rows."""
    matrix = AccuracyMatrix("s", "domain", tasks, eval_only, shift=shift)
    for column, values in enumerate(columns):
        for row, value in enumerate(values):
            matrix.set(row, column, value)
    return matrix


def facts(invariant, updated, new):
    tasks = [Column(f"t{n}") for n in range(1, len(invariant))]
    probes = [
        Column(kind, knowledge=kind)
        for kind, values in (("invariant", invariant), ("updated", updated), ("new", new))
        if values
    ]
    scores = [each for each in (invariant, updated, new) if each]
    return matrix_of(tasks, probes, [[0.5] * len(invariant)] * len(tasks) + scores)


def test_fuar_of_one_update_solved_by_hand():
    # Lost 0.8 - 0.6, gained 0.3 - 0.1 and 0.5 - 0.1: 0.2 / 0.6.
    value = fuar(facts([0.8, 0.6], [0.1, 0.3], [0.1, 0.5])).value
    assert value == pytest.approx(1 / 3)


def test_fuar_sums_over_all_earlier_rows():
    invariant, updated, new = [0.8, 0.9, 0.7], [0.1, 0.4, 0.2], [0.0, 0.1, 0.5]
    matrix = facts(invariant, updated, new)
    lost = gained = 0.0
    for i in range(2):
        lost += max(0.0, invariant[i] - invariant[2])
        gained += max(0.0, updated[2] - updated[i]) + max(0.0, new[2] - new[i])
    assert fuar(matrix).value == pytest.approx(lost / gained)
    assert fuar(matrix, 1).value == pytest.approx(0.0)  # nothing is forgotten after task 1


def test_fuar_without_a_gain_has_a_reason_and_no_value():
    metric = fuar(facts([0.8, 0.6], [0.3, 0.3], [0.1, 0.0]))
    assert metric.value is None
    assert metric.reason.startswith("no gain")


def test_fuar_says_which_probes_and_cells_it_lacks():
    lacking = matrix_of([Column("t")], [Column("n", knowledge="new")], [[0, 1], [0, 1]])
    assert fuar(lacking).reason == "no eval-only task has knowledge 'invariant'"
    lacking = matrix_of([Column("t")], [Column("f", knowledge="invariant")], [[0, 1], [0, 1]])
    assert fuar(lacking).reason == "no eval-only task has knowledge 'updated' or 'new'"
    holed = facts([0.8, 0.6], [0.1, 0.3], None)
    holed.set(0, 1, None)
    assert fuar(holed).reason == "not measured: 'invariant' in row 0 (zero-shot)"
    assert fuar(holed, 0).reason == "no task is learned yet"


def life(shift=None):
    stages = {"w1": "cpt", "w2": "cpt", "d": "dap", "c": "cft"}
    tasks = [Column(name, stage=stage) for name, stage in stages.items()]
    probes = [
        Column("objects", ability="general"),
        Column("vqa", "instruction", ability="general"),
        Column("refusal", ability="safety"),
        Column("plain"),
    ]
    scores = [[0.1 * row for row in range(5)] for _ in tasks]
    scores += [
        [0.8, 0.7, 0.6, 0.5, 0.4],
        [0.6, 0.6, 0.7, 0.3, 0.3],
        [0.0, 0.1, 0.1, 0.1, 0.2],
        [0.9] * 5,
    ]
    return matrix_of(tasks, probes, scores, shift)


def test_a_stage_ends_with_the_last_task_of_its_run():
    assert [(end.stage, end.row, end.last_task) for end in stage_rows(life())] == [
        ("", 0, ""), ("cpt", 2, "w2"), ("dap", 3, "d"), ("cft", 4, "c")
    ]  # fmt: skip
    assert stage_rows(matrix_of([Column("t")], [], [[0, 1]])) == []


def test_vertical_forgetting_is_the_mean_loss_of_general_probes():
    matrix = life()
    values = matrix.values
    for end in stage_rows(matrix)[1:]:
        by_hand = fmean([values[0][k] - values[end.row][k] for k in (4, 5)])
        assert vertical_forgetting(matrix, end).value == pytest.approx(by_hand)


def test_a_stage_that_has_not_ended_has_no_vertical_forgetting():
    end = stage_rows(life())[-1]
    metric = vertical_forgetting(life(), end, after=3)
    assert metric.reason == "the stage has not ended: 3 of its 4 tasks are learned"


def test_ability_delta_is_the_mean_change_of_its_probes():
    assert ability_delta(life(), "general").value == pytest.approx((-0.4 - 0.3) / 2)
    assert ability_delta(life(), "safety", 2).value == pytest.approx(0.1)
    reason = "no eval-only task has ability 'instruction'"
    assert ability_delta(life(), "instruction").reason == reason


def test_the_grid_has_losses_and_ratios_or_why_there_are_none():
    grid = probe_grid(life())
    assert [end.title for end, _ in grid] == ["before training", "cpt (w2)", "dap (d)", "cft (c)"]
    (column, objects), _, (_, refusal) = grid[2][1]
    assert column.name == "objects"
    assert objects.score.value == 0.5
    assert objects.loss.value == pytest.approx(0.3)
    assert objects.relative_loss.value == pytest.approx(0.3 / 0.8)
    assert objects.retention.value == pytest.approx(0.5 / 0.8)
    assert refusal.loss.value == pytest.approx(-0.1)
    assert refusal.retention.reason == "'refusal' scored 0 before training"
    assert refusal.relative_loss.reason == "'refusal' scored 0 before training"
    assert objects.lenient is None


def test_lenient_scores_stand_beside_strict_ones():
    matrix = life()
    lenient = matrix.empty_copy()
    for row, value in enumerate([0.7, 0.7, 0.7, 0.6, 0.65]):
        lenient.set(row, 5, value)
    vqa = probe_grid(matrix, lenient)[3][1][1][1]
    assert (vqa.score.value, vqa.lenient.value) == (0.3, 0.65)
    assert vqa.lenient_loss.value == pytest.approx(0.05)
    named = {each.name: each for each in compute_declared_metrics(matrix, lenient)}
    strict = named["vertical forgetting after cft (c)"].value
    assert strict == pytest.approx((0.4 + 0.3) / 2)
    loose = named["lenient vertical forgetting after cft (c)"].value
    assert loose == pytest.approx((0.4 + 0.05) / 2)


def test_forward_transfer_to_a_language_starts_from_zero_shot():
    matrix = life("language")
    assert forward_transfer_of(matrix, 3).value == pytest.approx(0.2)
    assert forward_transfer_of(matrix, 3, after=2).reason == "task 3 is not learned yet"
    names = [each.name for each in compute_declared_metrics(matrix)]
    assert names[:3] == [f"forward transfer of {name}" for name in ("w2", "d", "c")]


def test_a_matrix_without_declarations_has_no_declared_metrics():
    matrix = matrix_of([Column("a"), Column("b")], [Column("e")], [[0.1, 0.2, 0.3]] * 3)
    assert compute_declared_metrics(matrix, matrix.empty_copy()) == []
    assert declared_names(matrix) == []
    assert not {"shift", "stages", "knowledge", "abilities"} & set(matrix.to_json().split('"'))


def test_a_temporal_card_shows_the_metrics_of_time():
    names = declared_names(matrix_of([Column("a")], [], [[0.1, 0.2]], "temporal"))
    assert names == ["in-domain (TiC)", "backward (TiC)", "forward (TiC)"]


@pytest.mark.parametrize("matrix", [life("temporal"), facts([0.8, 0.6], [0.1, 0.3], None)])
def test_declarations_survive_the_file(matrix):
    again = AccuracyMatrix.from_json(matrix.to_json())
    assert again.to_json() == matrix.to_json()
    assert again.shift == matrix.shift
    for mine, read in zip(matrix.columns, again.columns, strict=True):
        for key in ("stage", "knowledge", "ability"):
            assert getattr(mine, key) == getattr(read, key)


def test_an_unknown_declaration_in_a_file_is_refused():
    text = life("temporal").to_json().replace('"temporal"', '"tidal"')
    with pytest.raises(ValueError, match="'shift' is 'tidal', expected one of temporal, content"):
        AccuracyMatrix.from_json(text)
    text = life().to_json().replace('"stages": ["cpt", ', '"stages": [')
    with pytest.raises(ValueError, match="'stages' has 7 entries for 8 columns"):
        AccuracyMatrix.from_json(text)
