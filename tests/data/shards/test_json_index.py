"""Records of a JSON file are found in one pass, exactly as the parser would cut them."""

import json
import random
import tracemalloc

import pytest

from mmcl.data.shards import json_index
from mmcl.data.shards.json_index import find_records
from mmcl.data.stored_sample import BadSample
from tests.data.convert.llava_files import put


def value(draw, depth=0):
    """Any JSON value, its texts full of what a careless scanner would take for structure."""
    sort = draw.randrange(6 if depth < 4 else 3)
    if sort == 0:
        return draw.choice([draw.randrange(100), None, True, -1.5])
    if sort < 3:
        return "".join(draw.choice('ab"\\[]{},ü\n ') for _ in range(draw.randrange(12)))
    count = range(draw.randrange(4))
    if sort == 3:
        return [value(draw, depth + 1) for _ in count]
    return {f'{number}",[': value(draw, depth + 1) for number in count}


def read_all(path):
    records = find_records(path)
    return [records.read(place) for place in range(len(records))]


@pytest.mark.parametrize("piece", [3, 64, 8 << 20])
def test_records_are_those_of_the_parser_wherever_pieces_end(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(json_index, "_CHUNK", piece)
    draw = random.Random(piece)
    for _ in range(60):
        records = [value(draw) for _ in range(draw.randrange(1, 6))]
        text = json.dumps(records, indent=draw.choice([None, 1]), ensure_ascii=draw.random() < 0.5)
        path = put(tmp_path / "x.json", text)
        assert read_all(path) == json.loads(text)


def test_lines_are_records_whatever_the_file_is_called(tmp_path):
    records = [{"a": "two\u2028lines"}, {"b": [1]}, {"c": {}}]
    lines = "\n".join(json.dumps(one, ensure_ascii=False) for one in records)
    for name in ("a.jsonl", "a.json"):
        assert read_all(put(tmp_path / name, f"\ufeff{lines}\r\n\n  \n")) == records
    assert read_all(put(tmp_path / "b.json", json.dumps(records[1], indent=2))) == [records[1]]
    assert read_all(put(tmp_path / "c.jsonl", "[1]\n2")) == [[1], 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no samples"),
        ("[]", "holds no samples"),
        ("[ \n ]", "holds no samples"),
        ("3", "holds no samples .it starts with byte 0x33."),
        (b"\xff\xfe[\x00]\x00", "holds no samples .it starts with byte 0xff.*saved as UTF-8"),
        ("[{", "ends at byte 2 in the middle of its list"),
        ('["a]', "ends at byte 4 in the middle"),
        ("[" * 100_000, "ends at byte 100000 in the middle"),
        ('[1] {"a": 2}', "continues after the end of its list at byte 3"),
    ],
)
def test_a_file_that_is_no_list_says_why(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        find_records(put(tmp_path / "x.json", content))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{'a': 1}", "not JSON"),
        ("", "not JSON"),
        ('{"a": }', "not JSON"),
        (b'{"a": "\xff"}', "not JSON .*utf-8"),
        ("[" * 65 + "]" * 65, "nested more than 64 deep"),
        ("[" * 50_000 + "]" * 50_000, "nested more than 64 deep"),
        (f'"{"x" * (4 << 20)}"', "has 4194306 bytes, more than 4194304"),
    ],
)
def test_one_bad_record_is_reported_and_the_others_are_read(tmp_path, record, message):
    raw = record if isinstance(record, bytes) else record.encode()
    records = find_records(put(tmp_path / "x.json", b'[{"a": 0},' + raw + b',{"a": 2}]'))
    assert (records.read(0), records.read(2)) == ({"a": 0}, {"a": 2})
    with pytest.raises(BadSample, match=message):
        records.read(1)


def test_brackets_inside_of_texts_are_not_depth(tmp_path):
    record = {"text": "[" * 500 + '\\"'}
    assert read_all(put(tmp_path / "x.json", [record])) == [record]


def test_a_file_that_changed_is_not_read_on(tmp_path):
    records = find_records(put(tmp_path / "x.json", "[1, 2]"))
    put(tmp_path / "x.json", "[1, 2, 3]")
    with pytest.raises(RuntimeError, match=r"x\.json changed since it was indexed"):
        records.read(0)


def test_memory_does_not_grow_with_the_objects_of_a_file(tmp_path):
    record = {f"key {n}": [n] * 20 for n in range(40)}
    path = put(tmp_path / "x.json", [record] * 4000)
    tracemalloc.start()
    records = find_records(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(records) == 4000
    # As Python objects the file would take some 200 MB; a piece and what is found in it remains.
    assert peak < 12 * path.stat().st_size
