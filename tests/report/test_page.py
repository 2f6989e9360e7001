import json
import re
from html.parser import HTMLParser

import pytest

from mmcl.evaluation import AccuracyMatrix, Column, RunSummary
from mmcl.evaluation.run_files import RunFiles
from mmcl.report import write_report

ATTACK = "<script>alert(1)</script>\"'><img src=http://evil.example/x onerror=alert(1)>"


class Tags(HTMLParser):
    """Collects what a browser would see: tags, addresses, ids."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.ids, self.handlers = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "action"):
                self.addresses.append(value)
            if name == "id":
                self.ids.append(value)
            if name.startswith("on"):
                self.handlers.append(name)


@pytest.fixture
def without_plots(monkeypatch):
    """Leave the drawing out where a test is about something else."""
    monkeypatch.setattr("mmcl.report.page._draw", lambda *_: {})
    monkeypatch.setattr("mmcl.report.plots.heat_map", lambda *_: b"")


def page_of(folder):
    path = write_report(folder)
    assert path == folder / "report.html"
    return path.read_text("utf-8")


def test_a_whole_run_becomes_one_page_with_every_part(make_run):
    folder = make_run()
    page = page_of(folder)
    for words in (
        "digits_er",
        "ExperienceReplay",
        "OpenCLIP tiny",
        "class-incremental",
        "finished",
        "Accuracy matrix",
        "Seen and unseen tasks",
        "Each task over training",
        "Forgetting per task",
        "Time and memory",
        "Predictions",
        "1/T sum over i of a[i][i]",
        "Bad samples that were left out: 1",
        "train-000.tar · 000017 · broken JPEG",
        "class_path: ExperienceReplay",
        "2.15.0",
        "9c1f9c1f",
    ):
        assert words in page, words
    assert page.count("data:image/png;base64,") == 5
    names = {path.name for path in (folder / "figures").iterdir()}
    assert {"matrix.png", "matrix.svg", "curves.svg", "forgetting.svg", "cost.svg"} <= names


def test_the_page_asks_for_nothing_outside_itself(make_run):
    page = page_of(make_run())
    seen = Tags(page)
    assert all(address.startswith(("data:image/png", "#")) for address in seen.addresses)
    assert not {"script", "link", "iframe", "object"} & set(seen.tags)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert "default-src 'none'" in page


def test_no_two_parts_of_the_page_share_an_id_and_every_reference_is_met(make_run):
    page = page_of(make_run())
    ids = Tags(page).ids
    assert len(ids) == len(set(ids))
    wanted = re.findall(r"url\(#([^)]+)\)", page) + re.findall(r'xlink:href="#([^"]+)"', page)
    assert wanted
    assert set(wanted) <= set(ids)


def test_the_same_run_gives_the_same_page(make_run):
    folder = make_run()
    assert page_of(folder) == page_of(folder)


def test_colours_of_the_plots_follow_light_and_dark(make_run):
    page = page_of(make_run())
    assert "var(--ink)" in page
    body = page.split("</style>", 1)[1]
    assert "#1f2430" not in body


def test_untrusted_names_are_shown_and_never_run(make_run):
    folder = make_run(tasks=(ATTACK, "b", ATTACK + "c"), stream=ATTACK)
    (folder / "config.yaml").write_text(ATTACK)
    summary = json.loads((folder / "summary.json").read_text())
    for key in ("name", "strategy", "model"):
        summary[key] = ATTACK
    summary["warnings"] = [ATTACK]
    summary["errors"] = [ATTACK, {"key": ATTACK}]
    summary["versions"] = summary["hashes"] = {ATTACK: ATTACK}
    summary["metrics"][0]["definition"] = ATTACK
    summary["metrics"][-1] |= {"name": ATTACK, "value": None, "reason": ATTACK}
    (folder / "summary.json").write_text(json.dumps(summary))
    seen = Tags(page_of(folder))
    assert "script" not in seen.tags
    assert seen.handlers == []
    assert all(address.startswith(("data:image/png", "#")) for address in seen.addresses)


def test_odd_letters_do_not_break_the_page(make_run):
    folder = make_run(tasks=("\x00\x1b[2J", "\ud800", "$\\frac{$ 日本"))
    page = page_of(folder)
    assert "\x00" not in page
    assert "\x1b" not in page


def test_an_empty_folder_still_gets_a_page(tmp_path):
    assert "no task learned yet" in page_of(tmp_path)


@pytest.mark.usefixtures("without_plots")
@pytest.mark.parametrize(
    "name",
    ["summary.json", "ledger.json", "config.yaml", "figures/samples.json", "matrix.json"],
)
def test_any_part_may_be_missing(make_run, name):
    folder = make_run()
    (folder / name).unlink()
    assert "Please read" not in page_of(folder)


@pytest.mark.usefixtures("without_plots")
@pytest.mark.parametrize(
    "name", ["summary.json", "ledger.json", "config.yaml", "figures/samples.json", "matrix.json"]
)
def test_a_broken_part_is_named_and_the_rest_is_shown(make_run, name):
    folder = make_run()
    (folder / name).write_bytes(b"\xff{")
    page = page_of(folder)
    assert "Please read" in page
    assert f"{name} is not UTF-8" in page


@pytest.mark.usefixtures("without_plots")
def test_a_broken_answer_file_is_named(make_run):
    folder = make_run()
    (folder / "answers" / "row_00" / "col_00.jsonl").write_text("{")
    assert "col_00.jsonl line 1 is not valid JSON" in page_of(folder)


@pytest.mark.usefixtures("without_plots")
def test_a_half_done_run_shows_the_figures_of_its_last_complete_row(tmp_path):
    matrix = AccuracyMatrix("s", "class", [Column("a"), Column("b"), Column("c")])
    for row, column, value in [(1, 0, 0.9), (2, 0, 0.25), (2, 1, 0.5), (3, 0, 0.1)]:
        matrix.set(row, column, value)
    matrix.write(tmp_path / "matrix.json")
    page = page_of(tmp_path)
    assert ">after task 2 of 3<" in page
    assert '<div class="value">37.5<small>%</small></div>' in page
    assert '<div class="value">+65.0<small>pp</small></div>' in page


def test_an_undefined_figure_shows_its_reason_and_no_number(tmp_path):
    matrix = AccuracyMatrix("s", "class", [Column("a")])
    matrix.set(1, 0, 0.9)
    matrix.write(tmp_path / "matrix.json")
    assert "needs two learned tasks" in page_of(tmp_path)


@pytest.mark.usefixtures("without_plots")
def test_warnings_stand_on_the_page(make_run):
    folder = make_run()
    raw = json.loads((folder / "summary.json").read_text())
    raw["warnings"] = ["EWC had no effect over task 2"]
    (folder / "summary.json").write_text(json.dumps(raw))
    assert "EWC had no effect over task 2" in page_of(folder)


def test_samples_carry_the_answers_before_when_learned_and_at_the_end(make_run):
    sample = RunFiles.read(make_run()).samples[1]
    assert (sample.task, sample.target) == ("two-three", "two")
    predictions = {row: (each.text, each.correct) for row, each in sample.predictions.items()}
    assert predictions == {
        "zero-shot": ("zero", False),
        "two-three": ("two", True),
        "eight-nine": ("two", True),
    }


@pytest.mark.parametrize("name", ["../config.yaml", "/etc/hostname", "sub/x.png", "."])
def test_an_image_outside_the_figures_folder_is_refused(make_run, name):
    folder = make_run()
    entry = {"task": "zero-one", "key": "000", "target": "zero", "image": name}
    (folder / "figures" / "samples.json").write_text(json.dumps([entry]))
    run = RunFiles.read(folder)
    assert run.samples == []
    assert "is not a small file in figures/" in run.notes[0]


def test_an_image_that_is_no_png_is_refused(make_run):
    folder = make_run()
    (folder / "figures" / "sample_0.png").write_bytes(b"<svg onload=alert(1)>")
    run = RunFiles.read(folder)
    assert len(run.samples) == 4
    assert "is not a PNG" in run.notes[0]


def test_a_linked_image_is_refused(make_run):
    folder = make_run()
    (folder / "figures" / "sample_0.png").unlink()
    (folder / "figures" / "sample_0.png").symlink_to(folder / "figures" / "sample_1.png")
    assert len(RunFiles.read(folder).samples) == 4


def test_no_such_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="give a run directory"):
        write_report(tmp_path / "nothing")


@pytest.mark.usefixtures("without_plots")
def test_an_unfinished_summary_says_where_the_run_stands(make_run):
    folder = make_run(is_finished=False)
    assert not RunSummary.read(folder / "summary.json").finished
    assert ">after task 5 of 5<" in page_of(folder)
