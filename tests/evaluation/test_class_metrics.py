"""Metrics per class against loops over the samples, and against cases solved by hand."""

import random
from collections import Counter

import pytest

from mmcl.evaluation import (
    AccuracyMatrix,
    Column,
    Prediction,
    RunFiles,
    compute_class_metrics,
    confusion_matrix,
    predictions_path,
    write_predictions,
)
from mmcl.evaluation.class_metrics import ConfusionMatrix, read_confusions
from mmcl.evaluation.continual_metrics import Undefined, forgetting_of

CLASS_INCREMENTAL = [("ant", "bee"), ("cat", "dog", "eel"), ("fox", "gnu")]
DOMAIN_INCREMENTAL = [("ant", "bee", "cat")] * 3
SOME_REPEATED = [("ant", "bee"), ("bee", "cat"), ("ant", "dog")]


def guesses(stream, seed=0):
    """(row, column) -> a (target, predicted) pair per test sample, the same samples in each row."""
    draw, found = random.Random(seed), {}
    for column, classes in enumerate(stream):
        targets = [name for name in classes for _ in range(draw.randint(3, 9))]
        draw.shuffle(targets)
        for row in range(len(stream) + 1):
            seen = sorted({name for task in stream[: max(row, column + 1)] for name in task})
            found[row, column] = [
                (target, target if draw.random() < 0.5 else draw.choice(seen)) for target in targets
            ]
    return found


def a_matrix(cells, tasks, types=()):
    types = types or ("classification",) * tasks
    columns = [Column(f"task {n}", types[n - 1]) for n in range(1, tasks + 1)]
    matrix = AccuracyMatrix("s", "class", columns, [Column("held out")])
    for (row, column), pairs in cells.items():
        matrix.set(row, column, sum(target == text for target, text in pairs) / len(pairs))
    return matrix


def counted(cells):
    return {cell: Counter(pairs) for cell, pairs in cells.items()}


def accuracy_by_loop(cells, name, places):
    right = seen = 0
    for place in places:
        for target, text in cells[place]:
            if target == name:
                seen += 1
                right += text == name
    return right / seen


def forgetting_by_loop(cells, name, columns, last):
    """Mean over the class's tasks i < T of its best accuracy in rows i..T-1 minus that in row T."""
    total = 0.0
    for column in columns:
        best = -1.0
        for row in range(column + 1, last):
            best = max(best, accuracy_by_loop(cells, name, [(row, column)]))
        total += best - accuracy_by_loop(cells, name, [(last, column)])
    return total / len(columns)


@pytest.mark.parametrize("stream", [CLASS_INCREMENTAL, DOMAIN_INCREMENTAL, SOME_REPEATED])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_class_metrics_are_those_of_loops_over_the_samples(stream, after):
    cells = guesses(stream, seed=after)
    found = compute_class_metrics(a_matrix(cells, 3), counted(cells), after)
    learned = [name for task in stream[:after] for name in task]
    assert [each.name for each in found] == list(dict.fromkeys(learned))
    for each in found:
        columns = [n for n, task in enumerate(stream[:after]) if each.name in task]
        assert each.tasks == tuple(f"task {n + 1}" for n in columns)
        in_last = [pair for n in columns for pair in cells[after, n] if pair[0] == each.name]
        assert each.samples == len(in_last)
        for row in range(after + 1):
            wanted = accuracy_by_loop(cells, each.name, [(row, n) for n in columns])
            assert each.accuracies[row].value == pytest.approx(wanted, abs=1e-12)
        wanted = accuracy_by_loop(cells, each.name, [(n + 1, n) for n in columns])
        assert each.learning.value == pytest.approx(wanted, abs=1e-12)
        assert each.final is each.accuracies[after]
        earlier = [n for n in columns if n + 1 < after]
        if earlier:
            wanted = forgetting_by_loop(cells, each.name, earlier, after)
            assert each.forgetting.value == pytest.approx(wanted, abs=1e-12)
        else:
            assert each.forgetting.value is None
            assert each.reasons == ("no task was learned after the class",)
        wrong = [text for _, text in in_last if text != each.name]
        assert dict(each.confused_with) == Counter(wrong)
        numbers = [number for _, number in each.confused_with]
        assert numbers == sorted(numbers, reverse=True)


@pytest.mark.parametrize("stream", [CLASS_INCREMENTAL, DOMAIN_INCREMENTAL, SOME_REPEATED])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_the_confusion_matrix_is_that_of_a_loop_over_the_samples(stream, after):
    cells = guesses(stream, seed=10 + after)
    confusion = confusion_matrix(a_matrix(cells, 3), counted(cells), after)
    wanted = [[0] * len(confusion.classes) for _ in confusion.classes]
    for column in range(after):
        for target, text in cells[after, column]:
            wanted[confusion.classes.index(target)][confusion.classes.index(text)] += 1
    assert confusion.rows == wanted
    first = [
        next(f"task {n + 1}" for n, task in enumerate(stream) if c in task)
        for c in confusion.classes
    ]
    assert list(confusion.tasks) == first


def test_a_task_of_one_class_is_forgotten_as_its_column_is():
    cells = guesses([("ant",), ("bee",), ("cat",)], seed=3)
    matrix = a_matrix(cells, 3)
    by_class = compute_class_metrics(matrix, counted(cells))
    for task in (1, 2):
        assert by_class[task - 1].forgetting.value == forgetting_of(matrix, task).value


def test_forgetting_by_hand_is_not_clamped():
    right, wrong = [("ant", "ant")], [("ant", "bee")]
    cells = {(row, column): [("bee", "bee")] for row in range(4) for column in (1, 2)}
    cells |= {(0, 0): 4 * right, (1, 0): right + 3 * wrong, (2, 0): 2 * right + 2 * wrong}
    cells |= {(3, 0): 3 * right + wrong}
    (ant, bee) = compute_class_metrics(a_matrix(cells, 3), counted(cells))
    # Best of rows 1 and 2 is 0.5; row 0 is before the task and does not count.
    assert ant.forgetting.value == -0.25
    assert ant.learning.value == 0.25
    assert ant.confused_with == (("bee", 1),)
    assert bee.forgetting.value == 0.0


def test_a_row_without_predictions_leaves_what_needs_it_undefined_with_the_reason():
    cells = guesses(CLASS_INCREMENTAL)
    counts = counted(cells)
    del counts[2, 0]
    found = {each.name: each for each in compute_class_metrics(a_matrix(cells, 3), counts)}
    reason = "no predictions of 'task 1' in row 2 (task 2)"
    ant, cat = found["ant"], found["cat"]
    assert ant.accuracies[2].value is None
    assert ant.forgetting.value is None
    assert ant.reasons == (reason,)
    assert None not in (ant.final.value, ant.learning.value, cat.forgetting.value)
    del counts[3, 1]
    with pytest.raises(Undefined, match=r"no predictions of 'task 2' in row 3 \(task 3\)"):
        confusion_matrix(a_matrix(cells, 3), counts)


def test_a_class_that_is_only_predicted_has_no_accuracy_and_is_in_the_confusion_matrix():
    cells = {(row, column): [("bee", "ant")] for row in range(3) for column in range(2)}
    matrix = a_matrix(cells, 2)
    bee, ant = compute_class_metrics(matrix, counted(cells))
    assert (bee.final.value, bee.forgetting.value) == (0.0, 0.0)
    assert (ant.samples, ant.tasks, ant.final.value) == (0, (), None)
    assert ant.reasons == ("the class has no test sample",)
    confusion = confusion_matrix(matrix, counted(cells))
    assert (confusion.classes, confusion.rows) == (("bee", "ant"), [[0, 2], [0, 0]])


def test_only_learned_classification_tasks_count():
    cells = guesses(CLASS_INCREMENTAL)
    types = ("classification", "instruction", "classification")
    matrix, counts = a_matrix(cells, 3, types), counted(cells)
    counts[3, 3] = Counter({("held", "out"): 5})
    names = [each.name for each in compute_class_metrics(matrix, counts) if each.tasks]
    assert names == ["ant", "bee", "fox", "gnu"]
    assert compute_class_metrics(matrix, counts, after=0) == []
    with pytest.raises(Undefined, match="no classification task is learned yet"):
        confusion_matrix(matrix, counts, after=0)
    with pytest.raises(Undefined, match="there is no test sample"):
        confusion_matrix(matrix, {(1, 0): {}}, after=1)
    with pytest.raises(ValueError, match="after is 4"):
        compute_class_metrics(matrix, counts, after=4)


def test_many_classes_are_summed_by_task_or_evenly_and_keep_every_sample():
    draw = random.Random(0)
    names, tasks = [f"c{n}" for n in range(12)], [f"t{n // 4}" for n in range(12)]
    counts = {(i, j): draw.randint(0, 5) for i in range(12) for j in range(12)}
    confusion = ConfusionMatrix(tuple(names), tuple(tasks), counts)
    assert confusion.group(12) is confusion
    for most, size in ((3, 4), (2, 6)):
        wanted = [[0] * (12 // size) for _ in range(12 // size)]
        for i in range(12):
            for j in range(12):
                wanted[i // size][j // size] += counts[i, j]
        assert confusion.group(most).rows == wanted
    assert confusion.group(3).classes == ("t0 (4)", "t1 (4)", "t2 (4)")
    assert confusion.group(2).classes == ("c0 … c5", "c6 … c11")


def test_blocks_are_the_classes_of_a_task():
    def blocks(*tasks):
        return ConfusionMatrix(tuple(map(str, range(len(tasks)))), tasks, {}).blocks

    assert blocks("a", "a", "b", "c", "c", "") == [(0, 2), (2, 3), (3, 5)]
    assert blocks("a", "a", "") == blocks("a", "b", "") == blocks() == []


def test_pairs_are_counted_from_the_file_that_a_run_writes(tmp_path):
    pairs = guesses(CLASS_INCREMENTAL)[3, 1] + [("\u2028", "=1+1"), ("\u2028", "\ud800")]
    answers = [Prediction(str(n), *pair, pair[0] == pair[1]) for n, pair in enumerate(pairs)]
    write_predictions(tmp_path / "a.jsonl", answers)
    assert read_confusions(tmp_path / "a.jsonl") == Counter(pairs)


@pytest.mark.parametrize("line", ["[]", "3", '{"target": "a"}', '{"target": "a", "text": 1}'])
def test_a_line_that_is_no_prediction_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"target": "a", "text": "b"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"a.jsonl line 2 has no 'target' and 'text'"):
        read_confusions(tmp_path / "a.jsonl")


def test_a_run_gives_the_counts_of_measured_cells_only(tmp_path):
    cells = guesses(CLASS_INCREMENTAL)
    matrix = a_matrix(cells, 3)
    for (row, column), pairs in cells.items():
        answers = [Prediction("k", *pair, pair[0] == pair[1]) for pair in pairs]
        write_predictions(predictions_path(tmp_path, row, column), answers)
    matrix.set(2, 1, None)
    matrix.write(tmp_path / "matrix.json")
    predictions_path(tmp_path, 0, 2).unlink()
    wanted = {cell: own for cell, own in counted(cells).items() if cell not in ((2, 1), (0, 2))}
    run = RunFiles.read(tmp_path)
    assert run.confusions == wanted
    assert run.notes == []
