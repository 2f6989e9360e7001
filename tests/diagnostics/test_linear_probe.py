"""The ridge probe against normal equations in loops, and what a representation forgot."""

import pytest
import torch

from mmcl.diagnostics.linear_probe import (
    collect_features,
    fit_probe,
    linear_probe,
    ridge_classifier,
)
from mmcl.evaluation.matrix import AccuracyMatrix, Column
from tests.diagnostics.diagnosed import clip_module, llava_module, probes_of, small_data


def gaussian(rows, dims, seed=0):
    return torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize(("rows", "dims"), [(12, 3), (5, 9)])
def test_the_ridge_solution_has_no_gradient(rows, dims):
    x, t = gaussian(rows, dims), gaussian(rows, 2, seed=1)
    weight, bias = ridge_classifier(x, t, 0.3)
    means = [sum(float(x[n, d]) for n in range(rows)) / rows for d in range(dims)]
    squares = [(float(x[n, d]) - means[d]) ** 2 for n in range(rows) for d in range(dims)]
    penalty = 0.3 * sum(squares) / (rows * dims)
    for k in range(2):
        errors = [
            sum(float(x[n, d] * weight[d, k]) for d in range(dims)) + float(bias[k] - t[n, k])
            for n in range(rows)
        ]
        assert sum(errors) == pytest.approx(0, abs=1e-9)
        for d in range(dims):
            slope = sum(error * float(x[n, d]) for n, error in enumerate(errors)) / rows
            assert slope + penalty * float(weight[d, k]) == pytest.approx(0, abs=1e-9)


def test_separable_classes_of_any_numbers_are_told_apart():
    labels = torch.tensor([7, 2, 39] * 10)
    x = gaussian(30, 6) * 0.05 + torch.nn.functional.one_hot(labels % 3, 6)
    test = gaussian(9, 6, seed=1) * 0.05 + torch.nn.functional.one_hot(labels[:9] % 3, 6)
    assert fit_probe((x, labels), (test, labels[:9])).accuracy == 1.0


def test_features_that_say_nothing_give_no_more_than_chance():
    labels = torch.arange(400) % 2
    found = fit_probe((gaussian(400, 5), labels), (gaussian(400, 5, seed=1), labels))
    assert 0.4 < found.accuracy < 0.6


def test_constant_features_have_a_probe_that_names_the_frequent_class():
    labels = torch.tensor([1, 1, 1, 1, 0, 1])
    found = fit_probe((torch.ones(6, 3), labels), (torch.ones(4, 3), torch.tensor([1, 1, 0, 0])))
    assert found.accuracy == 0.5


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        ((torch.ones(3, 2), torch.tensor([0, 1, 0])), (torch.ones(1, 2), torch.zeros(1)), "got 3"),
        ((torch.ones(6, 2), torch.zeros(6)), (torch.ones(1, 2), torch.zeros(1)), "of 1$"),
        ((torch.ones(6, 2), torch.arange(6)), (torch.ones(0, 2), torch.zeros(0)), "no test"),
        (
            (torch.full((6, 2), torch.nan), torch.arange(6)),
            (torch.ones(1, 2), torch.zeros(1)),
            "not finite",
        ),
    ],
)
def test_a_probe_that_cannot_be_trained_says_why(train, test, words):
    with pytest.raises(ValueError, match=words):
        fit_probe(train, test)


def test_features_of_a_clip_are_its_image_embeddings_with_their_classes(tmp_path):
    data = small_data(tmp_path)
    module = clip_module(tmp_path)
    features, labels = collect_features(module, probes_of(data), 2, 1, "train")
    expected = torch.cat(
        [module.model.embed(b, "image") for b in probes_of(data).batches(module.model, 1, "train")]
    )
    torch.testing.assert_close(features, expected)
    assert sorted(set(labels.tolist())) == [2, 3]


def test_features_of_a_generative_model_are_of_the_question_alone(tmp_path):
    data = small_data(tmp_path, kind="instruction")
    card = tmp_path / "stream" / "small.yaml"
    text = card.read_text().replace("tasks:", "classes: [red, green, blue, yellow]\ntasks:", 1)
    card.write_text(text.replace("  - name: task-a", "  - name: task-a\n    classes: [red, green, "
                                 "blue, yellow]"))  # fmt: skip
    data = type(data)(str(card), eval_batch_size=4)
    data.setup()
    module, probes = llava_module(tmp_path), probes_of(data)
    features, labels = collect_features(module, probes, 1, 0, "train")
    assert labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    blocks, seen = module.model.blocks(), []
    handle = blocks[-1].register_forward_hook(lambda m, given, output: seen.append(output))
    for batch in probes.batches(module.model, 0, "train"):
        with torch.no_grad():
            module.model(batch)
        hidden = seen.pop()
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        for index in range(len(batch)):
            end = int((batch.labels[index] != -100).nonzero()[0])
            expected = hidden[index, :end].mean(0)
            torch.testing.assert_close(features[0], expected, rtol=1e-4, atol=1e-5)
            features = features[1:]
    handle.remove()
    found = linear_probe(lambda row: module, probes, [0, 1], [0, 1], None)
    assert "'task-b' after 'zero-shot': no training sample has an answer" in found.notes[0]
    first, second = found.panels[0].series
    assert None not in first.values
    assert second.values == [None, None]


def test_samples_whose_answer_is_no_class_are_left_out_and_counted(tmp_path):
    data = small_data(tmp_path, sizes=(12, 12), kind="instruction")
    card = tmp_path / "stream" / "small.yaml"
    text = card.read_text().replace("tasks:", "classes: [red, green, blue]\ntasks:", 1)
    names = "  - name: task-a\n    classes: [red, green, blue]"
    card.write_text(text.replace("  - name: task-a", names))
    data = type(data)(str(card), eval_batch_size=4)
    data.setup()
    module = llava_module(tmp_path)
    found = linear_probe(lambda row: module, probes_of(data), [0], [0], None)
    expected = "3 training samples of 'task-a' and 1 test samples have an answer that is no class"
    assert expected in found.notes[0]


def test_tasks_without_classes_are_left_out_by_name(tmp_path):
    data = small_data(tmp_path, kind="captioning")
    found = linear_probe(lambda row: clip_module(tmp_path), probes_of(data), [0], [0, 1], None)
    assert found.notes[0] == "'task-a' has no classes and is left out."
    assert found.metrics[0].value is None


def test_forgetting_is_the_probe_just_after_learning_minus_the_probe_at_the_end(tmp_path):
    data = small_data(tmp_path, sizes=(12, 12, 12))
    modules = {row: clip_module(tmp_path, seed=row) for row in range(4)}
    matrix = AccuracyMatrix("small", "class", [Column(f"task-{name}") for name in "abc"])
    for row in range(4):
        for column in range(3):
            matrix.set(row, column, (10 - row - column) / 10)
    found = linear_probe(modules.get, probes_of(data), [0, 1, 2, 3], [0, 1, 2], matrix)
    values = {metric.name: metric.value for metric in found.metrics}
    curves = {series.name: series.values for series in found.panels[0].series}
    lost = [curves["task-a"][1] - curves["task-a"][3], curves["task-b"][2] - curves["task-b"][3]]
    assert values["representation forgetting, task-a"] == pytest.approx(lost[0])
    assert values["mean representation forgetting"] == pytest.approx(sum(lost) / 2)
    assert values["read-out forgetting, task-a"] == pytest.approx(0.2)
    assert values["mean read-out forgetting"] == pytest.approx((0.2 + 0.1) / 2)


def test_a_lost_state_leaves_its_forgetting_undefined(tmp_path):
    data = small_data(tmp_path, sizes=(12, 12))
    modules = {1: None, 2: clip_module(tmp_path)}
    found = linear_probe(modules.get, probes_of(data), [1, 2], [0, 1], None)
    assert found.metrics[0].value is None
    assert found.metrics[0].reason == "a value is missing"
    assert "the checkpoint after 'task-a' is lost" in found.notes[0]
