import csv
import io
import json
import statistics

import pytest
from PIL import Image

from mmcl.evaluation import RunSummary
from mmcl.report import compare


@pytest.fixture
def six_runs(make_run):
    return [
        make_run(f"{strategy.lower()}-seed{seed}", strategy=strategy, seed=seed, loss=loss)
        for strategy, loss in (("Finetune", 0.3), ("Joint", 0.01))
        for seed in (2, 0, 1)
    ]


def average_of(folder):
    return RunSummary.read(folder / "summary.json").metric("average accuracy").value


def test_runs_that_differ_in_the_seed_are_one_group_and_the_best_comes_first(six_runs):
    found = compare(six_runs)
    assert [group.label for group in found.groups] == ["Joint", "Finetune"]
    assert [group.seeds for group in found.groups] == [(0, 1, 2)] * 2


def test_mean_and_deviation_are_those_of_the_seeds(six_runs):
    finetune = compare(six_runs).groups[1].stats[0]
    values = [average_of(folder) for folder in six_runs[:3]]
    assert finetune.name == "average accuracy"
    assert finetune.mean == pytest.approx(sum(values) / 3)
    assert finetune.deviation == pytest.approx(statistics.stdev(values))


def test_one_seed_has_no_deviation(make_run):
    stats = compare([make_run("a")]).groups[0].stats[0]
    assert stats.deviation is None
    assert "±" not in stats.text


def test_the_curve_is_the_average_accuracy_after_each_task(six_runs):
    group = compare(six_runs).groups[1]
    assert len(group.curve) == 5
    assert sorted(group.curve[-1]) == sorted(average_of(folder) for folder in six_runs[:3])


def test_runs_of_one_strategy_under_two_names_are_told_apart(make_run):
    runs = [make_run("er_small_s0", seed=0), make_run("er_large_s0", seed=0)]
    labels = {group.label for group in compare(runs).groups}
    assert labels == {"ExperienceReplay · er_small", "ExperienceReplay · er_large"}


def test_a_bare_number_at_the_end_is_the_seed_only_if_it_is_the_seed(make_run):
    runs = [make_run("er-0", seed=0), make_run("er-1", seed=1), make_run("er-100", seed=2)]
    assert sorted(group.seeds for group in compare(runs).groups) == [(0, 1), (2,)]


def test_the_same_seed_twice_is_refused(make_run):
    runs = [make_run("er-seed0", seed=0), make_run("er-seed1", seed=0)]
    with pytest.raises(ValueError, match="are both 'ExperienceReplay' with seed 0"):
        compare(runs)


def test_another_stream_is_refused_by_name(make_run):
    runs = [make_run("a"), make_run("b", stream="emoji")]
    with pytest.raises(ValueError, match="differ in stream: .*'digits'.*'emoji'"):
        compare(runs)


def test_other_tasks_are_refused_with_the_first_that_differs(make_run):
    runs = [make_run("a", tasks=("x", "y")), make_run("b", tasks=("x", "z"))]
    with pytest.raises(ValueError, match=r"differ in columns: .*name='y'.*name='z'"):
        compare(runs)
    with pytest.raises(ValueError, match="differ in tasks: .* has 2, .* has 5"):
        compare([runs[0], make_run("c")])


def test_an_unfinished_run_is_left_out_and_named(make_run):
    done, open_ = make_run("er-seed0"), make_run("er-seed1", seed=1, is_finished=False)
    found = compare([done, open_])
    assert found.groups[0].seeds == (0,)
    assert found.notes == (f"left out, not finished: {open_}",)
    with pytest.raises(ValueError, match="none finished"):
        compare([open_])


def test_a_figure_that_one_seed_lacks_is_undefined_for_the_group(make_run):
    runs = [make_run("er-seed0"), make_run("er-seed1", seed=1)]
    raw = json.loads((runs[0] / "summary.json").read_text())
    raw["metrics"][0] |= {"value": None, "reason": "not measured"}
    (runs[0] / "summary.json").write_text(json.dumps(raw))
    stats = compare(runs).groups[0].stats[0]
    assert (stats.mean, stats.text, stats.reason) == (None, "·", "not measured")


def test_a_folder_without_a_summary_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"summary\.json"):
        compare([tmp_path])


def test_the_table_has_a_line_per_group(six_runs):
    lines = compare(six_runs).text().split("\n")
    assert [line.split()[:2] for line in lines[-2:]] == [["Joint", "3"], ["Finetune", "3"]]
    assert all("±" in line for line in lines[-2:])


def test_everything_is_written(six_runs, tmp_path):
    found = compare(six_runs)
    page = found.write(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "comparison.html", "comparison.png", "comparison.csv", "comparison.tex",
    }  # fmt: skip
    Image.open(tmp_path / "out" / "comparison.png").verify()
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "comparison.csv").read_text())))
    assert float(rows[0]["average accuracy mean"]) == found.groups[0].stats[0].mean
    assert r"\pm" in found.latex()
    assert "<script" not in page.read_text()


def test_names_of_runs_are_untrusted(make_run, tmp_path):
    folder = make_run("run", strategy="<script>alert(1)</script>$\\frac{$")
    page = compare([folder]).write(tmp_path / "out").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
