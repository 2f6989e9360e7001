"""A task is taken off a card: class numbers, other tasks and their shards stay as they are."""

import pytest
import yaml

from mmcl.core import TaskStream
from mmcl.core.card import read_card
from mmcl.data import open_stream
from mmcl.data.convert.task_removal import remove_task
from mmcl.data.shards.stream_writer import load_card, put_tasks, save_card
from tests.core.test_shard_lists import entry
from tests.data.small_stream import labelled, write_stream, write_tar


def change(folder, edit):
    path = folder / "small.yaml"
    content = yaml.safe_load(path.read_text())
    edit(content)
    path.write_text("# made by hand\n" + yaml.safe_dump(content, sort_keys=False))
    return path


def labels(stream):
    """Key of every training sample -> the name of its class, as a run reads it."""
    opened, found = open_stream(stream), {}
    for task in opened.stream:
        names = opened.stream.classes_seen(task.index)
        reader = opened.reader(task.index, "train")
        for number in range(len(reader)):
            sample = reader.read(number)
            column = task.label_to_class[int(sample.members["cls"])]
            found[sample.key] = names[column]
    return found


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("name", ["task-a", "task-b", "task-c"])
def test_every_class_keeps_its_number(tmp_path, name, listed):
    before = labels(write_stream(tmp_path))
    path = change(tmp_path, lambda card: None if listed else card.pop("classes"))
    removed = remove_task(path, name)
    after = labels(TaskStream.read(path))
    assert after == {key: label for key, label in before.items() if key[0] != name[-1]}
    assert [task.name for task in TaskStream.read(path)] == [
        each for each in ("task-a", "task-b", "task-c") if each != name
    ]
    own = {"task-a": ("c0", "c1"), "task-b": ("c2", "c3"), "task-c": ("c4", "c5")}[name]
    is_last = name == "task-c"
    assert removed.dropped_classes == (own if is_last else ())
    assert removed.unused_classes == (() if is_last else own)
    assert "c5" not in path.read_text() if is_last else "c5" in path.read_text()
    assert path.read_text().startswith("# made by hand\n")


def test_shards_stay_unless_they_are_to_be_deleted(tmp_path):
    write_stream(tmp_path)
    path = tmp_path / "small.yaml"
    removed = remove_task(path, "task-b")
    assert removed.unused == ("b-train.tar", "b-test.tar")
    assert (tmp_path / "b-train.tar").exists()
    open_stream(TaskStream.read(path))
    assert (tmp_path / "c-train.tar.index").exists()
    removed = remove_task(path, "task-c", delete_shards=True)
    assert removed.unused == ("c-train.tar", "c-test.tar")
    assert sorted(each.name for each in tmp_path.glob("c-*")) == []
    assert (tmp_path / "a-train.tar").exists()


def test_a_shard_that_something_else_lists_is_not_deleted(tmp_path):
    write_stream(tmp_path)
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere.tar"
    write_tar(elsewhere, labelled(3, (2, 3), name="else"))
    other = yaml.safe_load((tmp_path / "small.yaml").read_text())
    other["tasks"] = [{**other["tasks"][1], "train": "b-{test..x}.tar", "test": "b-test.tar"}]

    def edit(card):
        card["tasks"][1]["train"] = [
            "b-train.tar",
            "c-test.tar",
            str(elsewhere),
            "http://a.b/c.tar",
        ]

    path = change(tmp_path, edit)
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    (tmp_path / "notes.yaml").write_text("[unfinished: b-train.tar")
    removed = remove_task(path, "task-b", delete_shards=True)
    assert removed.unused == ()
    assert removed.kept == {
        "c-test.tar": "the card lists it elsewhere",
        "b-train.tar": "notes.yaml lists it",
        str(elsewhere): "it is outside of the card's folder",
        "http://a.b/c.tar": "it is an address",
        "b-test.tar": "other.yaml lists it",
    }
    assert elsewhere.exists()
    assert all((tmp_path / name).exists() for name in ("b-train.tar", "b-test.tar", "c-test.tar"))


def test_hashes_and_counts_of_its_shards_are_removed_and_of_others_kept(tmp_path):
    write_stream(tmp_path)
    names = [f"{letter}-{split}.tar" for letter in "abc" for split in ("train", "test")]

    def edit(card):
        card["hashes"] = dict.fromkeys(names, "0" * 64)
        card["counts"] = dict.fromkeys(names, 5)
        card["notes"] = "kept"

    path = change(tmp_path, edit)
    remove_task(path, "task-b")
    content = yaml.safe_load(path.read_text())
    left = [name for name in names if name[0] != "b"]
    assert (list(content["hashes"]), list(content["counts"])) == (left, left)
    assert content["notes"] == "kept"
    assert list(content)[:2] == ["name", "classes"]


def test_an_eval_only_task_and_a_source_are_removed(tmp_path):
    write_stream(tmp_path)

    def edit(card):
        card["eval_only"] = [{"name": "probe", "test": "c-test.tar", "classes": ["c4", "c5"]}]
        card["sources"] = {"web": {"shards": "b-test.tar"}, "task-a": {"shards": "b-test.tar"}}
        card["tasks"][0]["mixture"] = {"web": 0.25}

    path = change(tmp_path, edit)
    with pytest.raises(ValueError, match="'web' is mixed into 'task-a': take it out of their 'mix"):
        remove_task(path, "web")
    with pytest.raises(ValueError, match="a task and a source 'task-a': say which with --section"):
        remove_task(path, "task-a")
    assert remove_task(path, "task-a", "sources").section == "sources"
    assert remove_task(path, "probe").section == "eval_only"
    card = read_card(path)
    assert (list(card.sources), card.eval_only, len(card.tasks)) == (["web"], (), 3)
    assert "eval_only" not in path.read_text()


def test_what_is_not_there_or_the_only_task_is_refused_and_changes_nothing(tmp_path):
    write_stream(tmp_path, sizes=(4,))
    path = tmp_path / "small.yaml"
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match="no task, eval-only task or source 'task-x': did you mean"
    ):
        remove_task(path, "task-x")
    with pytest.raises(ValueError, match="no source 'task-a'"):
        remove_task(path, "task-a", "sources")
    with pytest.raises(ValueError, match="is the only task of 'small': delete the card instead"):
        remove_task(path, "task-a", delete_shards=True)
    with pytest.raises(FileNotFoundError, match="there is no stream card"):
        remove_task(tmp_path / "none.yaml", "task-a")
    assert path.read_bytes() == before
    assert (tmp_path / "a-train.tar").exists()


def test_a_card_of_very_many_shards_keeps_its_hash_file(tmp_path):
    path = tmp_path / "s.yaml"
    content = {"name": "s", "scenario": "domain"}
    for name, count in (("a", 1200), ("b", 30)):
        task, hashes = entry(name, count)
        content = put_tasks(content, [task], hashes, dict.fromkeys(hashes, 2))
    save_card(path, content, [])
    removed = remove_task(path, "a")
    assert len(removed.unused) == 1201
    card = read_card(path)
    assert set(card.hashes) == set(card.counts) == {*card.tasks[0].train, *card.tasks[0].test}
    assert load_card(path)["hashes"] == card.hashes
    assert "hashes: s.hashes.tsv" in path.read_text()
