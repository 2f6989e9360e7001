"""Files from strangers: what they carry is never run."""

import json
import os
import pickle

import pytest
import torch

from tests.cli.test_bad_input import refused
from tests.data.small_stream import labelled


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


@pytest.fixture
def crater(desk):
    """What would be there if the bomb had gone off."""
    return desk.folder / "crater"


@pytest.fixture
def bomb(desk, crater):
    """A checkpoint file that runs code when it is unpickled."""
    file = desk.folder / "bomb.ckpt"
    torch.save({"state_dict": Bomb(crater)}, file)
    torch.load(file, weights_only=False)
    assert crater.exists(), "the bomb is dead, so it would prove nothing"
    crater.rmdir()
    return file


@pytest.mark.parametrize("extension", ["pyd", "pkl", "pth", "pickle", "npy", "ten"])
def test_a_pickle_in_a_shard_lies_there_unread(desk, crater, bomb, extension):
    members = labelled(16, name="atrain")
    desk.stream(a_train=[*members, (f"atrain015.{extension}", bomb.read_bytes())])
    status, _, err = desk.run(command=["check"])
    assert (status, err) == (0, "")
    assert not crater.exists()


@pytest.mark.parametrize("name", ["pipe:mkdir {crater}", "pipe:mkdir {crater}; cat a-train.tar"])
def test_a_pipe_is_refused(desk, crater, name):
    desk.rewrite_card(lambda card: card["tasks"][0].update(train=[name.format(crater=crater)]))
    assert refused(desk.run(), "pipe:", "allow_pipes")
    assert not crater.exists()


def test_a_pipe_that_the_user_allows_is_run(desk, crater):
    shard = desk.folder / "stream" / "a-train.tar"
    pipe = f"pipe:mkdir {crater} && cat {shard}"
    desk.rewrite_card(lambda card: card["tasks"][0].update(train=[pipe]))
    desk.run("--data.allow_pipes", "true", command=["check"])
    assert crater.exists()


def test_a_kept_checkpoint_with_a_pickle_is_refused(learned, crater, bomb):
    (learned.results / "checkpoints" / "task_01.ckpt").write_bytes(bomb.read_bytes())
    output = learned.give("evaluate", learned.results, "--after_task", "2")
    assert refused(output, "task_01.ckpt cannot be read", "never run")
    assert not crater.exists()


def test_a_mid_task_checkpoint_with_a_pickle_is_refused(learned, crater, bomb):
    state = learned.results / "run.json"
    text = state.read_text()
    assert '"finished_tasks": 3' in text
    assert '"last_checkpoint": null' in text
    text = text.replace('"finished_tasks": 3', '"finished_tasks": 2').replace(
        '"task": 3', '"task": 2'
    )
    state.write_text(
        text.replace('"last_checkpoint": null', '"last_checkpoint": "checkpoints/last.ckpt"')
    )
    (learned.results / "checkpoints" / "last.ckpt").write_bytes(bomb.read_bytes())
    assert refused(learned.run(), "pickled objects")
    assert not crater.exists()


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_checkpoint_with_a_pickle_is_refused_by_lightnings_commands(desk, crater, bomb, command):
    assert refused(desk.run("--ckpt_path", bomb, command=[command]), "pickled objects")
    assert not crater.exists()


def test_weights_with_a_pickle_are_refused(desk, crater, bomb):
    weights = bomb.rename(desk.folder / "weights.pt")
    assert refused(desk.run("--model.model.pretrained", weights), "weights.pt does not load")
    assert not crater.exists()


def test_an_image_of_too_many_pixels_is_a_bad_sample(desk):
    import zlib

    def chunk(kind, data):
        body = kind + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    head = (60_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    rows = zlib.compress(bytes(1000))
    huge = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    members = [("huge.png", huge), ("huge.cls", b"0"), *labelled(15, name="atrain")]
    desk.stream(a_train=members)
    assert refused(desk.run(), "huge in a-train.tar", "pixels")


def test_members_with_climbing_names_write_nothing(desk):
    extra = [("../../escaped.png", b"x"), ("/tmp/escaped.cls", b"0")]
    desk.stream(a_train=[*labelled(16, name="atrain"), *extra])
    desk.run("--data.max_bad_fraction", "0.5", command=["check"])
    assert list(desk.folder.parent.rglob("escaped*")) == []


@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_checkpoint_in_shards_with_a_pickle_is_refused(desk, crater, bomb, command):
    folder = desk.folder / "shards.ckpt"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Bomb(crater)))
    (folder / "meta.pt").write_bytes(bomb.read_bytes())
    assert refused(desk.run("--ckpt_path", folder, command=[command]), "shards.ckpt", "never run")
    assert not crater.exists()


@pytest.mark.parametrize(
    ("last", "output"),
    [
        ("checkpoints/last_0000001.ckpt", "last_0000001.ckpt"),
        ("../../elsewhere", "its checkpoint is outside of the run directory"),
    ],
)
def test_a_mid_task_checkpoint_in_shards_with_a_pickle_is_refused(
    learned, crater, bomb, last, output
):
    state = json.loads((learned.results / "run.json").read_text())
    state.update(finished_tasks=2, task=2, last_checkpoint=last)
    (learned.results / "run.json").write_text(json.dumps(state))
    folder = learned.results / last
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Bomb(crater)))
    (folder / "meta.pt").write_bytes(bomb.read_bytes())
    assert refused(learned.run(), output)
    assert not crater.exists()
