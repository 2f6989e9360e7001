"""``mmcl merge`` on runs: facts of the inputs, and options refused by name."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText

from mmcl.data.remote.location import sha256_of


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
