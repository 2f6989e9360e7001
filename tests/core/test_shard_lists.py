"""Cards of very many shards: ranges of names, and hashes and counts in a file of their own."""

import hashlib
import os
import time

import pytest
import yaml

from mmcl.core.card import card_schema, expand, read_card, validate_card
from mmcl.core.card.shard_lists import MAX_INLINE, hash_file_name, shard_list
from mmcl.data.shards.stream_writer import load_card, put_tasks, save_card

TASKS = [{"name": "a", "task_type": "captioning", "train": "a-{0..2}.tar", "test": "b.tar"}]


def sha(name):
    return hashlib.sha256(name.encode()).hexdigest()


def write_card(folder, **more):
    path = folder / "s.yaml"
    path.write_text(yaml.safe_dump({"name": "s", "scenario": "domain", "tasks": TASKS, **more}))
    return path


def entry(name, count):
    train = [f"{name}-train-{number:05d}.tar" for number in range(count)]
    return {
        "name": name, "task_type": "captioning", "train": shard_list(train),
        "test": [f"{name}-test-00000.tar"], "size": count, "test_size": 1,
    }, {shard: sha(shard) for shard in [*train, f"{name}-test-00000.tar"]}  # fmt: skip


def test_a_file_states_hashes_and_counts(tmp_path):
    (tmp_path / "x.tsv").write_text(f"a-0.tar\t{sha('0')}\t7\na-1.tar\t\t9\nb.tar\t{sha('b')}\t\n")
    card = read_card(write_card(tmp_path, hashes="x.tsv"))
    assert card.hashes == {"a-0.tar": sha("0"), "b.tar": sha("b")}
    assert card.counts == {"a-0.tar": 7, "a-1.tar": 9}


def test_counts_of_the_card_itself_take_the_place_of_those_of_the_file(tmp_path):
    (tmp_path / "x.tsv").write_text(f"a-0.tar\t{sha('0')}\t7\n")
    card = read_card(write_card(tmp_path, hashes="x.tsv", counts={"b.tar": 3}))
    assert (card.hashes, card.counts) == ({"a-0.tar": sha("0")}, {"b.tar": 3})
    card = read_card(write_card(tmp_path, counts="x.tsv"))
    assert (card.hashes, card.counts) == ({}, {"a-0.tar": 7})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a.tar\tzz\t7\n", "line 1 is 'a.tar\\\\tzz\\\\t7', expected name, sha256 in hex"),
        (f"a.tar\t{sha('a')}\n", "line 1 is "),
        (f"a.tar\t{sha('a')}\t7\textra\n", "line 1 is "),
        (f"a.tar {sha('a')} 7\n", "line 1 is "),
        (f"a.tar\t{sha('a')}\t-7\n", "line 1 is "),
        (f"\t{sha('a')}\t7\n", "line 1 is "),
        (f" \t{sha('a')}\t7\n", "line 1 is "),
        (f"a\x1b[31m.tar\t{sha('a')}\t7\n", "line 1 is "),
        (f"a.tar\t{sha('a')}\t7\r\n", "line 1 is "),
        (f"a.tar\t{sha('a')}\t7\n\nb.tar\t\t\n", "line 2 is ''"),
        (f"a.tar\t{sha('a')}\t7\na.tar\t\t8\n", "line 2 names 'a.tar' again: list each shard once"),
        ("x" * 10_000, "line 1 is 'xxx"),
        ("bad\n" * 50, "line 5 is 'bad', .*; and 45 more"),
    ],
)
def test_a_wrong_line_is_named_by_its_number(tmp_path, text, said):
    (tmp_path / "x.tsv").write_text(text, newline="")
    with pytest.raises(ValueError, match=said):
        read_card(write_card(tmp_path, hashes="x.tsv"))


def test_a_file_that_is_missing_or_no_text_or_elsewhere_is_refused(tmp_path):
    (tmp_path / "x.tsv").write_bytes(b"\xff\xfe\0")
    os.mkfifo(tmp_path / "pipe.tsv")
    for name, said in (
        ("x.tsv", "is not UTF-8"), ("none.tsv", "there is no file"), ("..", "there is no file"),
        ("pipe.tsv", "there is no file"), ("../x.tsv", "is a path, expected a file next to it"),
        ("/etc/passwd", "is a path, expected a file next to it"), ("", "there is no file"),
    ):  # fmt: skip
        _, errors = validate_card(write_card(tmp_path, hashes=name))
        assert len(errors) == 1, name
        assert said in errors[0], name
        assert "hashes in a file that cannot be used" in errors[0], name


def test_the_schema_for_editors_allows_a_file():
    for key in ("hashes", "counts"):
        assert card_schema()["properties"][key]["type"] == ["object", "string"]


def test_a_list_of_very_many_shards_becomes_ranges_that_name_the_same_shards():
    few = [f"a-{number:05d}.tar" for number in range(MAX_INLINE)]
    assert shard_list(few) == few
    many = [f"a-{number:05d}.tar" for number in range(98_990, 100_010)]
    assert shard_list(many) == ["a-{98990..100009}.tar"]
    zeros = [f"a-{number:05d}.tar" for number in range(100_010)]
    assert shard_list(zeros) == ["a-{00000..100009}.tar"]
    mixed = [*zeros[:700], *zeros[701:1200], "other.tar", "b{1..2}.tar", *zeros[5:9]]
    assert shard_list(mixed)[:3] == ["a-{00000..00699}.tar", "a-{00701..01199}.tar", "other.tar"]
    for names in (many, zeros, mixed[:1200]):
        assert [shard for name in shard_list(names) for shard in expand(name)] == names


def test_a_writer_keeps_a_short_card_in_one_file(tmp_path):
    task, hashes = entry("a", 900)
    path = tmp_path / "s.yaml"
    save_card(path, put_tasks({"name": "s", "scenario": "domain"}, [task], hashes, {}), [])
    assert not (tmp_path / hash_file_name(path)).exists()
    assert yaml.safe_load(path.read_text())["hashes"] == hashes


def test_a_writer_puts_very_many_hashes_into_a_file_and_appends_to_it(tmp_path):
    path = tmp_path / "s.yaml"
    first, hashes = entry("a", 1200)
    counts = dict.fromkeys(hashes, 5)
    save_card(path, put_tasks({"name": "s", "scenario": "domain"}, [first], hashes, counts), [])
    text = path.read_text()
    assert "hashes: s.hashes.tsv" in text
    assert "a-train-{00000..01199}.tar" in text
    assert len(text) < 1000
    second, more = entry("b", 3)
    save_card(path, put_tasks(load_card(path), [second], more, dict.fromkeys(more, 6)), [])
    card = read_card(path)
    assert card.hashes == {**hashes, **more}
    assert card.counts == {**counts, **dict.fromkeys(more, 6)}
    # Made again with fewer shards: those of the old ones are gone, and the file is kept.
    fewer, rest = entry("a", 2)
    save_card(path, put_tasks(load_card(path), [fewer], rest, {}), [])
    assert read_card(path).hashes == {**more, **rest}
    assert load_card(path)["hashes"] == {**more, **rest}


def test_a_card_that_is_killed_while_it_is_written_has_all_its_hashes(tmp_path, monkeypatch):
    path = tmp_path / "s.yaml"
    first, hashes = entry("a", 1200)
    save_card(path, put_tasks({"name": "s", "scenario": "domain"}, [first], hashes, {}), [])

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("mmcl.data.shards.stream_writer.write_atomic", killed)
    second, more = entry("b", 1500)
    content = {**load_card(path), "tasks": [second], "hashes": more, "counts": {}}
    with pytest.raises(KeyboardInterrupt):
        save_card(path, content, [])
    monkeypatch.undo()
    card = read_card(path)
    assert [task.name for task in card.tasks] == ["a"]
    assert hashes.items() <= card.hashes.items()
    save_card(path, content, [])
    assert read_card(path).hashes == more


@pytest.mark.slow
def test_a_card_of_a_million_shards_is_read_in_seconds(tmp_path):
    names = [f"a-{number:06d}.tar" for number in range(1_000_000)]
    with (tmp_path / "x.tsv").open("w") as file:
        file.writelines(f"{name}\t{sha(name)}\t1000\n" for name in names)
    tasks = [{**TASKS[0], "train": "a-{000000..999999}.tar"}]
    start = time.process_time()
    card = read_card(write_card(tmp_path, tasks=tasks, hashes="x.tsv"))
    assert time.process_time() - start < 20
    assert len(card.hashes) == len(card.counts) == len(card.tasks[0].train) == 1_000_000
