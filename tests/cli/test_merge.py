"""``mmcl merge`` on runs: facts of the inputs, and options refused by name."""

import json
import shutil
from argparse import ArgumentTypeError

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from mmcl.cli.merge_fisher import measure_fisher
from mmcl.cli.merge_sweep import number_or_range
from mmcl.core.seeding import generator
from mmcl.data.remote.location import sha256_of
from mmcl.diagnostics import ProbeData
from mmcl.evaluation import AccuracyMatrix
from mmcl.evaluation.diagnostic_record import Diagnostic
from mmcl.lightning.config.run_reference import RunReference
from tests.diagnostics.diagnosed import clip_module, small_data


def test_checkpoints_of_a_run_become_one_model(answered):
    run = next((answered.folder / "runs").iterdir())
    status, out, err = answered.give(
        "merge", f"{run}@1", f"{run}@2", "merged", "--method", "ema", "--decay", "0.25"
    )
    assert (status, err) == (0, "")
    assert "merged: a transformers model" in out
    facts = json.loads((answered.folder / "merged" / "merge.json").read_text())
    assert facts["arguments"] == {"share": 0.75}
    assert [each["sha256"] for each in facts["inputs"]] == [
        sha256_of(run / "checkpoints" / f"task_0{index}.ckpt") for index in (0, 1)
    ]
    for tasks in ("1", "2"):
        given = ("export", str(run), f"after{tasks}", "--as", "transformers", "--after_task", tasks)
        assert answered.give(*given)[0] == 0
    first, second, merged = (
        AutoModelForImageTextToText.from_pretrained(answered.folder / name).state_dict()
        for name in ("after1", "after2", "merged")
    )
    assert any(not torch.equal(first[name], second[name]) for name in first)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, 0.25 * first[name] + 0.75 * second[name])


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--method", "average", "--density", "0.2"], "--density is not used by --method average"),
        (["--method", "wise", "--base", "x"], "--base is not used by --method wise"),
        (["--method", "average", "--weights", "a,b"], "--weights is 'a,b': give numbers"),
        (["--method", "soup"], "invalid choice: 'soup'"),
    ],
)
def test_an_option_that_is_not_used_is_refused(desk, words, wanted):
    status, _, err = desk.give("merge", "a", "b", "out", *words)
    assert status == 2
    assert wanted in err


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0:1:0.1", [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]),
        ("-0.2:0.2:0.2", [-0.2, 0, 0.2]),
        (".5:.5:1", [0.5]),
    ],
)
def test_a_range_has_both_ends_and_exact_decimals(text, values):
    assert list(number_or_range(text).values) == values


def test_a_range_has_at_most_101_values():
    assert len(number_or_range("0:1:0.01").values) == 101
    with pytest.raises(ArgumentTypeError, match="has 102 values"):
        number_or_range("0:1.01:0.01")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("half", "'half' is no number and no range"),
        ("0:1", "the range '0:1' is malformed"),
        ("0:1:0.1:2", "malformed"),
        ("0:one:0.1", "malformed"),
        ("0:inf:1", "malformed"),
        ("1:0:0.1", "is empty: give a stop"),
        ("0:1:0", "the step of the range '0:1:0' is 0"),
        ("0:1:-0.1", "is -0.1: give more than 0"),
        ("0:1:0.3", "does not reach its stop 1"),
    ],
)
def test_a_range_that_is_none_is_refused(desk, text, wanted):
    status, _, err = desk.give("merge", "a", "b", "out", "--method", "wise", f"--alpha={text}")
    assert status == 2
    assert wanted in err


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--method", "fisher", "--old", "a"], "--old is used by a sweep"),
        (["--method", "average", "--samples", "2"], "--samples is used by a sweep"),
        (["--method", "wise", "--old", "a"], "--old is used by a sweep"),
        (["--method", "wise", "--alpha", "0.5", "--data", "x"], "--data is used by a sweep"),
        (["--method", "wise", "--alpha", "0:2:1"], "--alpha has 2: give 0 to 1"),
        (["--method", "ema", "--decay", "0:1:0.1"], "invalid float value: '0:1:0.1'"),
        (["--method", "wise", "--scale", "0:1:0.1"], "--scale is not used by --method wise"),
    ],
)
def test_options_of_a_sweep_are_refused_elsewhere(desk, words, wanted):
    status, _, err = desk.give("merge", "a", "b", "out", *words)
    assert status == 2
    assert wanted in err


@pytest.mark.slow
def test_a_sweep_scores_the_line_as_connect_does_and_exports_the_best(learned):
    words = ("--method", "wise", "--alpha", "0:1:0.5")
    status, out, err = learned.give("merge", "small_run@2", "small_run", "swept", *words)
    assert status == 0, err
    folder = learned.folder / "swept"
    found = json.loads((folder / "sweep.json").read_text())
    assert (found["old"], found["new"]) == (["task-a", "task-b"], ["task-c"])
    assert [point["value"] for point in found["points"]] == [
        0, 0.5, 1,
    ]  # fmt: skip
    assert learned.give("connect", "small_run@2", "small_run", "--points", 3)[0] == 0
    file = learned.results / "diagnostics" / "connect_small_run@2_small_run@3.json"
    panel = next(panel for panel in Diagnostic.read(file).panels if panel.is_score)
    line = {series.name: series.values for series in panel.series}
    for index, point in enumerate(found["points"]):
        for task in ("task-a", "task-b", "task-c"):
            assert point["scores"][task] == line[task][index]
        old = (line["task-a"][index] + line["task-b"][index]) / 2
        assert point["old"] == pytest.approx(old)
        assert point["mean"] == pytest.approx((old + line["task-c"][index]) / 2)
    means = [point["mean"] for point in found["points"]]
    best = found["points"][means.index(max(means))]["value"]
    assert found["best"] == best
    assert json.loads((folder / "model" / "merge.json").read_text())["arguments"] == {"alpha": best}
    assert (folder / "sweep.md").read_text().strip() in out
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    plain = ("--method", "wise", "--alpha", str(best))
    assert learned.give("merge", "small_run@2", "small_run", "plain", *plain)[0] == 0
    one, two = (
        load_file(learned.folder / name / "open_clip_model.safetensors")
        for name in ("swept/model", "plain")
    )
    assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.slow
def test_a_sweep_of_task_vectors_scores_named_tasks_of_another_card(learned):
    card = learned.folder / "other" / "small.yaml"
    shutil.copytree(learned.card.parent, card.parent)
    card.write_text(card.read_text().replace("task-", "other-"))
    words = ("small_run@1", "small_run", "out", "--method", "ties", "--scale", "0:1:1")
    status, _, err = learned.give("merge", *words, "--data", card)
    assert status == 2
    assert "no old tasks to score" in err
    assert "give --old and --new, any of other-a, other-b, other-c" in err
    groups = ("--old", "other-c", "--new", "other-a,other-b")
    status, _, err = learned.give("merge", *words, "--data", card, *groups, "--samples", "3")
    assert status == 0, err
    found = json.loads((learned.folder / "out" / "sweep.json").read_text())
    assert (found["old"], found["new"]) == (["other-c"], ["other-a", "other-b"])
    for groups, wanted in (
        (("--old", "task-a", "--new", "task-a"), "'task-a' is old and new"),
        (("--old", "x", "--new", "task-a"), "--old has 'x', which is no task"),
    ):
        status, _, err = learned.give("merge", *words[:2], "again", *words[3:], *groups)
        assert status == 2
        assert wanted in err
    status, _, err = learned.give("merge", "small_run", "small_run@2", "again", *words[3:])
    assert "no new tasks to score" in err


@pytest.mark.slow
def test_a_model_that_answers_is_swept_over_its_adapters_products(answered):
    run = next((answered.folder / "runs").iterdir())
    words = ("--method", "wise", "--alpha", "0:1:1")
    status, _, err = answered.give("merge", f"{run}@1", f"{run}@2", "swept", *words)
    assert status == 0, err
    found = json.loads((answered.folder / "swept" / "sweep.json").read_text())
    matrix = AccuracyMatrix.read(run / "matrix.json")
    assert len(found["points"][1]["scores"]) == 2
    for number, score in enumerate(found["points"][1]["scores"].values()):
        assert score == pytest.approx(matrix.get(2, number))


@pytest.mark.slow
def test_a_fisher_merge_weighs_weights_by_what_each_run_learned(learned):
    words = ("small_run@1", "small_run@2", "fisher", "--method", "fisher", "--samples", "6")
    status, _, err = learned.give("merge", *words)
    assert status == 0, err
    facts = json.loads((learned.folder / "fisher" / "merge.json").read_text())
    assert [each["fisher_tasks"] for each in facts["inputs"]] == [["task-a"], ["task-a", "task-b"]]
    assert (facts["samples"], facts["data"]) == (6, None)
    merged = load_file(learned.folder / "fisher" / "open_clip_model.safetensors")
    sets, fishers = [], []
    for name in ("small_run@1", "small_run@2"):
        reference = RunReference.parse(name)
        run = reference.open()
        module = reference.load(run)
        run.data.setup()
        tasks = reference.finished_tasks(run)
        probes = ProbeData(run.data, samples=6)
        sets.append(dict(module.model.clip.state_dict()))
        fishers.append(measure_fisher(module, probes, tasks, list(range(tasks))))
    for name, tensor in merged.items():
        if name in fishers[0]:
            one, two = (each[name].clamp(min=1e-6) for each in fishers)
            expected = (one * sets[0][name] + two * sets[1][name]) / (one + two)
            torch.testing.assert_close(tensor, expected)
    status, _, err = learned.give("merge", "small_run@0", "small_run", "no", *words[3:])
    assert status == 1
    assert "small_run@0 has learned no task" in err


@pytest.mark.slow
def test_the_fisher_of_all_weights_is_that_of_a_loop_over_samples(tmp_path):
    data, module = small_data(tmp_path), clip_module(tmp_path)
    module.model.clip.visual.requires_grad_(False)
    probes = ProbeData(data)
    found = measure_fisher(module, probes, 1, [0])
    spec = probes.spec(1, 0)
    module.model.set_classes(spec.prompt_names or spec.names, spec.task.templates)
    weights = dict(module.model.clip.named_parameters())
    assert found.keys() == weights.keys()
    assert not any(p.requires_grad for p in module.model.clip.visual.parameters())
    module.model.clip.requires_grad_(True)
    sums, count = (
        {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in weights.items()},
        0,
    )
    for batch in probes.batches(module.model, 0, "train"):
        for row in range(len(batch)):
            logits = module.model(batch.take(torch.tensor([row]))).logits[0]
            chances = logits.detach().softmax(0)
            label = torch.multinomial(chances.double(), 1, generator=generator(0, 0, count))
            module.zero_grad()
            logits.log_softmax(0)[label].sum().backward()
            for name, weight in weights.items():
                sums[name] += 0 if weight.grad is None else weight.grad.double() ** 2
            count += 1
    assert count == 8
    for name, diagonal in found.items():
        torch.testing.assert_close(diagonal, (sums[name] / count).float(), rtol=1e-3, atol=1e-7)
    assert any(float(found[name].sum()) > 0 for name in found if name.startswith("visual"))
    assert any(float(found[name].sum()) > 0 for name in found if name.startswith("transformer"))


@pytest.mark.slow
def test_a_fisher_merge_of_adapters_measures_the_weights_that_they_change(answered):
    run = next((answered.folder / "runs").iterdir())
    words = ("--method", "fisher", "--samples", "2")
    status, _, err = answered.give("merge", f"{run}@1", f"{run}@2", "fisher", *words)
    assert status == 0, err
    for tasks in ("1", "2"):
        given = ("export", str(run), f"after{tasks}", "--as", "transformers", "--after_task", tasks)
        assert answered.give(*given)[0] == 0
    first, second, merged = (
        AutoModelForImageTextToText.from_pretrained(answered.folder / name).state_dict()
        for name in ("after1", "after2", "fisher")
    )
    changed = [name for name in first if not torch.equal(first[name], second[name])]
    assert changed
    for name in changed:  # between both, and not in the middle everywhere
        low, high = (
            torch.minimum(first[name], second[name]),
            torch.maximum(first[name], second[name]),
        )
        assert bool((merged[name] >= low - 1e-6).all() and (merged[name] <= high + 1e-6).all())
    middle = [
        torch.allclose(merged[n], (first[n] + second[n]) / 2, rtol=0, atol=1e-7) for n in changed
    ]
    assert not all(middle)


@pytest.mark.slow
def test_an_export_is_merged_as_the_checkpoint_that_it_was_written_from(learned):
    for target, tasks in (("one", "1"), ("two.safetensors", "3")):
        words = ("export", "small_run", target, "--as", "open_clip", "--after_task", tasks)
        assert learned.give(*words)[0] == 0
    merge = ("--method", "task_arithmetic", "--scale", "0.5")
    for inputs in (
        ("small_run@1", "small_run", "runs_merged"),
        ("one", "two.safetensors", "merged", "--like", "small_run"),
    ):
        status, _, err = learned.give("merge", *inputs, *merge)
        assert status == 0, err
    expected, found = (
        load_file(learned.folder / name / "open_clip_model.safetensors")
        for name in ("runs_merged", "merged")
    )
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    fact = json.loads((learned.folder / "merged" / "merge.json").read_text())["inputs"][1]
    assert fact["sha256"] == sha256_of(learned.folder / "two.safetensors")
    assert fact["like"] == "small_run"


@pytest.mark.slow
def test_an_export_that_does_not_fit_is_refused_by_a_name(learned):
    assert learned.give("export", "small_run", "one", "--as", "open_clip")[0] == 0
    file = learned.folder / "one" / "open_clip_model.safetensors"
    weights = load_file(file)
    name = "logit_scale"
    pair = ("merge", "one", "small_run", "out", "--method", "wise")
    like = ("--like", "small_run")
    for changed, wanted in (
        ({n: t for n, t in weights.items() if n != name}, f"lacks '{name}'"),
        ({**weights, "more": torch.zeros(1)}, "has 'more', which the model lacks"),
        ({**weights, name: torch.zeros(3)}, f"has '{name}' of shape (3,), the model of ()"),
    ):
        save_file(changed, file)
        status, _, err = learned.give(*pair, *like)
        assert status == 1
        assert wanted in err
    save_file(weights, file)
    for words, wanted in (
        (pair, "one is an export: give --like RUN"),
        (("merge", "small_run@1", *pair[2:], *like), "--like is used by exports"),
        ((*pair, *like, "--alpha", "0:1:1"), "give --old and --new, any of task-a"),
        ((*pair[:-1], "fisher", *like), "does not say what it has learned"),
    ):
        status, _, err = learned.give(*words)
        assert status != 0
        assert wanted in err
    assert not (learned.folder / "out").exists()
