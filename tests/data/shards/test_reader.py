import pickle

import numpy as np
import pytest

from mmcl.data.shards.reader import Reader
from mmcl.data.stored_sample import BadShard, Sample


class Listed:
    """A shard of texts in memory."""

    def __init__(self, name, *texts, is_remote=False):
        self.name, self.texts, self.is_remote, self.opened = name, texts, is_remote, 0

    def __len__(self):
        return len(self.texts)

    def key(self, place):
        return f"{self.name}{place}"

    def read(self, place):
        return Sample(self.key(place), self.name, {"txt": self.texts[place].encode()})

    def text_bytes(self, member):
        self.opened += 1
        return np.array([len(text) * (member == "txt") for text in self.texts], dtype=np.int64)


def shards():
    return [
        Listed("a", "1", "22"),
        Listed("b"),
        Listed("c", "333", "4444", "55555"),
        Listed("d", "666666"),
    ]


def test_numbers_go_on_from_shard_to_shard():
    reader = Reader(shards())
    assert [reader.read(number).key for number in range(6)] == ["a0", "a1", "c0", "c1", "c2", "d0"]
    assert [reader.key(number) for number in (0, 5)] == ["a0", "d0"]
    assert reader.describe(3) == "c1 in c"
    assert reader.sizes.tolist() == [2, 0, 3, 1]
    assert reader.sizes.dtype == np.int64
    assert len(reader) == 6
    for number in (-1, 6):
        with pytest.raises(IndexError, match=f"sample {number} is outside 0 to 5"):
            reader.read(number)


def test_chosen_positions_are_the_samples_there_are():
    reader = Reader(shards(), np.array([1, 3, 4]))
    assert [reader.read(number).key for number in range(3)] == ["a1", "c1", "c2"]
    assert reader.sizes.tolist() == [1, 0, 2, 0]
    assert reader.text_bytes("txt").tolist() == [2, 4, 5]
    assert reader.contains(np.array([-1, 0, 2, 3])).tolist() == [False, True, True, False]
    assert reader.shards[3].opened == 0


def test_lengths_are_given_in_the_requested_order():
    reader = Reader(shards())
    assert reader.text_bytes("txt").tolist() == [1, 2, 3, 4, 5, 6]
    assert reader.text_bytes("json").tolist() == [0] * 6
    assert reader.text_bytes("txt", np.array([5, 0, 3, 3, 1])).tolist() == [6, 1, 4, 4, 2]
    chosen = Reader(shards(), np.array([0, 2, 5]))
    assert chosen.text_bytes("txt", np.array([2, 0])).tolist() == [6, 1]
    assert chosen.text_bytes("txt", np.array([], dtype=np.int64)).tolist() == []


@pytest.mark.parametrize("chosen", [[2, 1], [1, 1], [-1, 0], [5, 6]])
def test_chosen_indices_that_do_not_increase_or_are_outside_are_refused(chosen):
    with pytest.raises(ValueError, match="in shards of 6 samples: give indices that increase"):
        Reader(shards(), np.array(chosen))


def test_a_reader_of_nothing_is_empty():
    assert len(Reader([])) == len(Reader(shards(), np.array([], dtype=np.int64))) == 0
    assert Reader([]).text_bytes("txt").tolist() == Reader([]).sizes.tolist() == []


def test_a_reader_is_remote_if_a_shard_is():
    assert not Reader(shards()).is_remote
    assert Reader([*shards(), Listed("e", is_remote=True)]).is_remote


def test_numbers_are_found_among_very_many_shards():
    shard = Listed("x", "1", "22", "333")
    reader = Reader([shard] * 100_000)
    assert len(reader) == 300_000
    assert reader.read(299_999).members == {"txt": b"333"}
    assert reader.read(150_001).members == {"txt": b"22"}
    assert pickle.loads(pickle.dumps(reader)).key(299_998) == "x1"


def test_a_name_for_a_person_stays_on_one_line_and_moves_no_cursor():
    shard = Listed("x", "1")
    shard.key = lambda place: "two\nlines\x1b[2J"
    reader = Reader([shard])
    assert reader.key(0) == "two\nlines\x1b[2J"
    assert reader.describe(0) == "two\\nlines\\x1b[2J in x"
    shard.key = lambda place: "schön/\\xff 'a'"
    assert reader.describe(0) == "schön/\\xff 'a' in x"


def test_a_shard_that_cannot_be_opened_for_its_lengths_is_named():
    shard = Listed("x", "1")

    def fail(member):
        raise BadShard("is truncated")

    shard.text_bytes = fail
    with pytest.raises(RuntimeError, match="shard x is truncated"):
        Reader([shard]).text_bytes("txt")
