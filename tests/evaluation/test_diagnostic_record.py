"""Records of diagnostics: read as they were written, refused by name otherwise."""

import json

import pytest

from mmcl.evaluation.continual_metrics import MetricValue
from mmcl.evaluation.diagnostic_record import (
    DIAGNOSTICS,
    Diagnostic,
    Panel,
    Series,
    diagnostic_files,
)
from mmcl.evaluation.run_files import RunFiles


def record(**changes):
    values = {
        "name": "connect_a@1_b@2",
        "title": "Between a and b",
        "text": "how",
        "x_label": "mu",
        "x_values": (0.0, 0.5, 1.0),
        "panels": (Panel("loss", (Series("mean", (1.0, None, 2.5)),)),),
        "metrics": (MetricValue("barrier", None, "max", "a loss is inf"),),
        "notes": ("No verdict.",),
        "settings": {"points": "3"},
    }
    return Diagnostic(**values | changes)


def test_a_record_is_read_as_it_was_written(tmp_path):
    file = tmp_path / "one.json"
    record().write(file)
    assert Diagnostic.read(file) == record(x_names=())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "../up"}, "name is '../up'"),
        ({"name": ".hidden"}, "name is '.hidden'"),
        ({"panels": ()}, "there are 0 panels"),
        ({"x_names": ("a",)}, "'x_names' has 1 values for 3 points"),
        ({"x_values": (0.0,)}, "'mean' has 3 values for 1 points"),
    ],
)
def test_a_record_that_is_none_says_why(changes, words):
    with pytest.raises(ValueError, match=words):
        record(**changes)


def test_a_value_that_is_not_finite_is_not_written(tmp_path):
    bad = record(panels=(Panel("loss", (Series("mean", (1.0, float("nan"), 2.5)),)),))
    with pytest.raises(ValueError, match="finite number"):
        bad.write(tmp_path / "one.json")
    assert not (tmp_path / "one.json").exists()


def test_a_run_has_its_records_and_notes_those_that_cannot_be_read(tmp_path):
    folder = tmp_path / DIAGNOSTICS
    folder.mkdir()
    record().write(folder / "good.json")
    (folder / "bad.json").write_text(json.dumps({"name": "bad"}))
    (folder / "huge.json").write_bytes(b" " * (4 * 2**20 + 1))
    assert [file.name for file in diagnostic_files(tmp_path)] == [
        "bad.json", "good.json", "huge.json",
    ]  # fmt: skip
    run = RunFiles.read(tmp_path)
    assert [each.name for each in run.diagnostics] == ["connect_a@1_b@2"]
    assert len(run.notes) == 2
    assert "'title' is missing" in run.notes[0]
    assert "is larger than" in run.notes[1]
