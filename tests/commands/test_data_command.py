"""`mmcl data convert` and `mmcl data build <public set>`: streams from LLaVA-style data."""

import pytest

from mmcl.core import TaskStream
from tests.data.builders.llava_files import asked, put, train_set
from tests.data.builders.test_public_sets import mllm_dcl


def converted(desk, *words, name="vqa"):
    train, images = train_set(desk.folder)
    asks = ("--images", images, "--name", name, "--out", desk.folder / "out", "--hold_out", "0.4")
    return desk.give("data", "convert", train, *asks, *words)


def test_convert_makes_a_stream_and_says_what_is_in_it(desk):
    status, out, err = converted(desk, "--scorer", "contains")
    card = desk.folder / "out" / "vqa.yaml"
    assert (status, err) == (0, "")
    assert "vqa              3 to learn from, 2 to test on, scored by contains" in out
    assert out.splitlines()[-1] == str(card)
    assert TaskStream.read(card)[0].scorer == "contains"


def test_convert_appends_a_task(desk):
    converted(desk)
    status, _, err = converted(desk, "--append", "--max_new_tokens", "9", name="more")
    assert (status, err) == (0, "")
    stream = TaskStream.read(desk.folder / "out" / "vqa.yaml")
    assert [(t.name, t.max_new_tokens) for t in stream] == [("vqa", 64), ("more", 9)]


def test_convert_names_what_it_left_out(desk):
    images = train_set(desk.folder)[1]
    records = [asked(number, f"sub/{number}.jpg") for number in range(5)]
    records[3]["image"] = "sub/none.jpg"
    train = put(desk.folder / "bad.json", records)
    words = ("data", "convert", train, "--images", images, "--name", "x", "--out", desk.folder)
    status, _, err = desk.give(*words)
    assert status == 1
    assert "1 of 5 samples" in err
    assert "give --max_faults 0.2" in err
    status, out, _ = desk.give(*words, "--max_faults", "0.21")
    assert status == 0
    assert "1 left out" in out
    assert "bad.json, sample 3 (id 'id/3'): its picture sub/none.jpg is missing" in out


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["convert"], 2, "the following arguments are required: TRAIN"),
        (["convert", "a.json", "--images", ".", "--name", "a", "--out", "o"], 1, "a.json"),
        (["convert", "a", "--images", "no", "--name", "a", "--out", "o"], 1, "no folder no"),
        (
            ["convert", "a", "--images", ".", "--name", "a", "--out", "o", "--scorer", "exakt"],
            1,
            "there is no scorer 'exakt': choose one of exact",
        ),
        (
            ["convert", "a", "--images", ".", "--name", "a", "--out", "o", "--card", "c.yaml"],
            1,
            "give --append as well",
        ),
        (["build", "ucit"], 2, "--source"),
        (["build", "ucit", "--source", "nowhere"], 1, "no folder nowhere"),
        (["build", "uict"], 1, "of the public sets coin, mllm_acl, mllm_dcl, ucit"),
        (["build", "ucit", "--source", ".", "--tasks", "GQA"], 1, "ucit has no task 'GQA'"),
        (["build", "ucit", "--source", ".", "--limit", "0"], 1, "limit is 0"),
    ],
)
def test_what_is_wrong_is_one_sentence(desk, monkeypatch, words, status, said):
    monkeypatch.chdir(desk.folder)
    got, _, err = desk.give("data", *words)
    assert got == status
    assert said in err
    assert err.count("\n") == 1


def test_a_public_set_is_built(desk):
    mllm_dcl(desk.folder / "source")
    out = desk.folder / "out"
    words = ("--source", desk.folder / "source", "--out", out, "--tasks", "Med,Fin", "--limit", 2)
    status, said, err = desk.give("data", "build", "mllm_dcl", *words)
    assert (status, err) == (0, "")
    assert said.splitlines()[-1] == str(out / "mllm_dcl.yaml")
    stream = TaskStream.read(out / "mllm_dcl.yaml")
    assert [(task.name, task.size) for task in stream] == [("Med", 2), ("Fin", 2)]


@pytest.mark.parametrize("words", [["convert"], ["build"], ["build", "ucit"], ["list"]])
def test_every_action_has_help(desk, words):
    status, out, _ = desk.give("data", *words, "--help")
    assert status == 0
    assert "usage: mmcl data" in out
