"""`mmcl data build <public set>`: streams from the published layout of a benchmark."""

import pytest

from mmcl.core import TaskStream
from tests.streams.test_public_sets import mllm_dcl


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (["build", "ucit"], 2, "--source"),
        (["build", "ucit", "--source", "nowhere"], 1, "no folder nowhere"),
        (["build", "uict"], 1, "of the public sets coin, mllm_acl, mllm_dcl, ucit"),
        (["build", "ucit", "--source", ".", "--tasks", "GQA"], 1, "ucit has no task 'GQA'"),
        (["build", "ucit", "--source", ".", "--max_samples", "0"], 1, "max_samples is 0"),
    ],
)
def test_what_is_wrong_is_one_sentence(desk, monkeypatch, words, status, sentence):
    monkeypatch.chdir(desk.folder)
    got, _, err = desk.give("data", *words)
    assert got == status
    assert sentence in err
    assert err.count("\n") == 1


def test_a_public_set_is_built(desk):
    mllm_dcl(desk.folder / "source")
    out = desk.folder / "out"
    words = (
        "--source",
        desk.folder / "source",
        "--out",
        out,
        "--tasks",
        "Med,Fin",
        "--max_samples",
        2,
    )
    status, printed, err = desk.give("data", "build", "mllm_dcl", *words)
    assert (status, err) == (0, "")
    assert printed.splitlines()[-1] == str(out / "mllm_dcl.yaml")
    stream = TaskStream.read(out / "mllm_dcl.yaml")
    assert [(task.name, task.size) for task in stream] == [("Med", 2), ("Fin", 2)]


@pytest.mark.parametrize("words", [["convert"], ["build"], ["build", "ucit"], ["list"]])
def test_every_action_has_help(desk, words):
    status, out, _ = desk.give("data", *words, "--help")
    assert status == 0
    assert "usage: mmcl data" in out
