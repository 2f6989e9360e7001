"""Changes to bytes, drawn so that small ones come first and every one is named."""

from hypothesis import strategies as st

PLACES = st.integers(0, 1 << 20)
_FLIP = st.tuples(st.just("flip"), PLACES, st.integers(0, 7))
_SET = st.tuples(st.just("set"), PLACES, st.binary(min_size=1, max_size=8))
_INSERT = st.tuples(st.just("insert"), PLACES, st.binary(min_size=1, max_size=40))
_CUT = st.tuples(st.just("cut"), PLACES, st.integers(1, 2000))
_COPY = st.tuples(st.just("copy"), PLACES, PLACES, st.integers(1, 2000))
_END = st.tuples(st.just("end"), PLACES)
CHANGES = st.lists(st.one_of(_FLIP, _SET, _INSERT, _CUT, _COPY, _END), min_size=1, max_size=6)


def mutated(data, changes):
    """Return the bytes after these changes; places count from the start, round and round."""
    for name, place, *more in changes:
        data = bytearray(data or b"\0")
        place %= len(data)
        if name == "flip":
            data[place] ^= 1 << more[0]
        elif name == "set":
            data[place : place + len(more[0])] = more[0]
        elif name == "insert":
            data[place:place] = more[0]
        elif name == "cut":
            del data[place : place + more[0]]
        elif name == "copy":
            data[place:place] = data[more[0] % len(data) :][: more[1]]
        else:
            del data[place:]
    return bytes(data)


def expect_shown(error, *parts, limit=4000):
    """Check that an error's text can be written to a terminal or a file, and is no page."""
    text = str(error)
    text.encode()
    assert 0 < len(text) < limit
    assert all(part in text for part in parts)
