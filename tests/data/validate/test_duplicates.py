"""Twins among fingerprints, compared with a search over a dictionary."""

import numpy as np
import pytest

from mmcl.data.shards.open_stream import find_repeats
from mmcl.data.stored_sample import hash_bytes
from mmcl.data.validate.aggregate import TrainFingerprints, joined
from mmcl.data.validate.shard_check import sample_fingerprint


def prints_of(pairs):
    return np.array([sample_fingerprint(*pair) for pair in pairs], dtype=np.uint64).reshape(-1, 3)


def drawn(count, seed):
    """Pairs of a picture and a question, few enough of each that many meet again; some empty."""
    draw = np.random.default_rng(seed)
    pictures = [b"", *(f"picture {n}".encode() for n in range(30))]
    asked = [b"", *(f"question {n}".encode() for n in range(5))]
    pairs = zip(draw.integers(0, 31, count), draw.integers(0, 6, count), strict=True)
    return [(pictures[one], asked[other]) for one, other in pairs]


@pytest.mark.parametrize("by_image", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_first_twin_of_every_sample_is_found_and_none_is_invented(by_image, seed):
    train, test = drawn(60, seed), drawn(80, 100 + seed)
    first = {}
    for place, pair in enumerate(train):
        first.setdefault(pair[0] if by_image else pair, place)
    wanted = [
        -1 if (pair[0] if by_image else pair) in (b"", (b"", b""))
        else first.get(pair[0] if by_image else pair, -1)
        for pair in test
    ]  # fmt: skip
    found = TrainFingerprints(prints_of(train), by_image).find(prints_of(test))
    assert found.tolist() == wanted
    assert max(wanted) >= 0


def test_hashes_that_agree_in_half_are_no_twins():
    train = np.array([[7, 1, 0], [7, 2, 0], [7, 3, 0]], dtype=np.uint64)
    test = np.array([[7, 3, 0], [7, 4, 0], [8, 1, 0]], dtype=np.uint64)
    assert TrainFingerprints(train).find(test).tolist() == [2, -1, -1]


def test_nothing_is_found_among_nothing():
    none, some = joined([]), prints_of([(b"a", b"")])
    assert TrainFingerprints(none).find(some).tolist() == [-1]
    assert TrainFingerprints(some).find(none).tolist() == []


@pytest.mark.parametrize("seed", range(3))
def test_repeats_name_the_first_of_their_kind(seed):
    hashes = np.random.default_rng(seed).integers(0, 20, 40).astype(np.uint64)
    later, first = find_repeats(hashes)
    seen, wanted = {}, []
    for place, value in enumerate(hashes.tolist()):
        if value in seen:
            wanted.append((place, seen[value]))
        seen.setdefault(value, place)
    assert list(zip(later.tolist(), first.tolist(), strict=True)) == wanted


def test_hashes_are_known_ones():
    # blake2b of "abc" with 8 bytes, from the reference of RFC 7693 as other programs print it.
    import hashlib

    assert hash_bytes(b"abc") == int(hashlib.blake2b(b"abc", digest_size=8).hexdigest(), 16)
    halves = hashlib.blake2b(b"abc", digest_size=16).hexdigest()
    assert sample_fingerprint(b"abc", b"") == (int(halves[:16], 16), int(halves[16:], 16), 0)
