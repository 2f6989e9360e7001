"""Cards from strangers: nothing of them is run, and an error is a sentence of bounded length."""

import pytest

from mmcl.core import TaskStream
from mmcl.core.card import MAX_ERRORS, MAX_SHARDS, expand
from mmcl.core.card.card_reader import MAX_MERGED, MAX_VALUES, parse_yaml
from mmcl.core.card.schema import MAX_QUOTED, escape_unprintable, repr_short

CARD = """\
name: birds
scenario: class
tasks:
  - {name: a, classes: [owl, jay], train: a.tar, test: b.tar}
"""


def refusal(tmp_path, text):
    """Error message of a card that is refused."""
    card = tmp_path / "card.yaml"
    card.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"card\.yaml") as caught:
        TaskStream.read(card)
    assert type(caught.value) is ValueError
    assert len(str(caught.value)) < 50_000
    return str(caught.value)


def laughs(levels=9, width=9):
    """Lists of lists, each repeated in the next: ``width ** levels`` texts in few lines."""
    lines = ["l0: &l0 [ha]"]
    for level in range(1, levels + 1):
        repeated = ", ".join([f"*l{level - 1}"] * width)
        lines.append(f"l{level}: &l{level} [{repeated}]")
    return "notes:\n" + "".join(f"  {line}\n" for line in lines)


def test_the_card_that_the_others_are_made_of_is_a_good_one(tmp_path):
    (tmp_path / "card.yaml").write_text(CARD)
    assert TaskStream.read(tmp_path / "card.yaml")[0].classes == ("owl", "jay")


@pytest.mark.parametrize(
    "field",
    [
        "description",
        "task_type",
        "epochs",
        "hashes",
        "counts",
        "eval_only",
        "mixture",
        "sources",
        "x",
    ],
)
def test_a_billion_laughs_are_not_written_out(tmp_path, field):
    message = refusal(tmp_path, f"{laughs()}{field}: *l9\n{CARD}")
    assert f"more than {MAX_VALUES} values, most of them repeated by an alias" in message
    assert "birds" not in message


def test_some_thousand_laughs_are_shown_in_part(tmp_path):
    message = refusal(tmp_path, f"{laughs(levels=5)}description: *l5\n{CARD}")
    assert "the card has description [[[[...], " in message
    assert len(message) < 500


def test_merges_of_merges_are_counted_before_they_are_made():
    lines = ["l0: &l0 {a: 1, b: 2, c: 3}"]
    for level in range(1, 30):
        parts = ", ".join([f"*l{level - 1}"] * 9)
        lines.append(f"l{level}: &l{level} {{<<: [{parts}]}}")
    with pytest.raises(ValueError, match=rf"more than {MAX_MERGED} merged entries|values"):
        parse_yaml("\n".join(lines))


def test_entries_that_are_merged_in_once_are_there():
    assert parse_yaml("d: &d {a: 1, b: 2}\ne: {<<: *d, b: 3}")["e"] == {"a": 1, "b": 3}


@pytest.mark.parametrize("text", ["&a [*a]", "&a {b: *a}", "&a {<<: *a}", "&a {b: [1, {c: *a}]}"])
def test_what_contains_itself_is_refused(tmp_path, text):
    assert "a list or mapping that contains itself" in refusal(tmp_path, f"notes: {text}\n{CARD}")


@pytest.mark.parametrize("text", ["[" * 10_000_000, "{a: " * 100_000, "- " * 100_000, "? " * 9999])
def test_ten_million_brackets_are_one_sentence(tmp_path, text):
    assert "nested too deeply" in refusal(tmp_path, text)


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.mkdir ['{trap}']",
        "!!python/object/new:os.mkdir ['{trap}']",
        "!!python/object/apply:subprocess.call [[mkdir, '{trap}']]",
        "!!python/name:os.mkdir",
        "!!python/module:antigravity",
        "!!python/tuple [a]",
        "!mmcl x",
    ],
)
def test_tags_make_no_objects_wherever_they_are(tmp_path, value):
    value = value.replace("{trap}", str(tmp_path / "sprung"))
    for text in (value, f"{CARD}description: {value}\n", f"? {value}\n: 1\n{CARD}"):
        assert "could not determine a constructor for the tag" in refusal(tmp_path, text)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "value", ["!!int ''", "!!bool x", "!!float x", "!!timestamp x", "2020-13-45", "!!int 0x"]
)
def test_a_tag_that_does_not_fit_its_value_is_one_sentence(tmp_path, value):
    assert "is not YAML" in refusal(tmp_path, f"{CARD}epochs: {value}\n")


@pytest.mark.parametrize("number", ["9" * 5000, "0x" + "f" * 50_000, "1" + ":59" * 30_000])
def test_a_number_of_thousands_of_digits_is_not_parsed(tmp_path, number):
    message = refusal(tmp_path, f"{CARD}epochs: {number}\n")
    assert f"a number of {len(number)} characters" in message


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ("{0..99999999999}.tar", f"names more than {MAX_SHARDS} shards"),
        ("{0..9999}/{0..9999}.tar", f"names more than {MAX_SHARDS} shards"),
        ("{0..1}" * 64 + ".tar", f"names more than {MAX_SHARDS} shards"),
        ("{0..99999999999999999999999}.tar", "counts beyond"),
        (f"{{0..{'9' * 5000}}}.tar", "counts beyond"),
        ("{7..3}.tar", "names no shard: write the smaller number first"),
    ],
)
def test_a_range_of_too_many_shards_is_not_written_out(tmp_path, shards, message):
    assert f"task 0 ('a') has train: '{shards[:20]}" in refusal(
        tmp_path, CARD.replace("a.tar", f"'{shards}'")
    )
    assert message in refusal(tmp_path, CARD.replace("a.tar", f"'{shards}'"))


def test_shards_are_counted_over_the_whole_card(tmp_path, monkeypatch):
    for module in ("schema", "shard_names"):
        monkeypatch.setattr(f"mmcl.core.card.{module}.MAX_SHARDS", 100)
    text = CARD.replace("a.tar", "'{0..59}.tar'").replace("b.tar", "'{60..99}.tar'")
    (tmp_path / "card.yaml").write_text(text)
    assert len(TaskStream.read(tmp_path / "card.yaml")[0].train) == 60
    assert "names more than 100 shards" in refusal(tmp_path, text.replace("99", "100"))


def test_several_ranges_stand_for_all_their_pairs():
    assert expand("{0..1}-{08..10}.tar") == [
        "0-08.tar", "0-09.tar", "0-10.tar", "1-08.tar", "1-09.tar", "1-10.tar"
    ]  # fmt: skip
    assert expand("{a..c}{0,1}.tar") == ["a0.tar", "a1.tar", "b0.tar", "b1.tar", "c0.tar", "c1.tar"]
    assert len(expand("{0..0}" * 5000)) == 1


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (CARD + "name: owls\n", "name"),
        (CARD.replace("name: a,", "name: a, name: b,"), "name"),
        (CARD + "hashes: {a.tar: x, a.tar: y}\n", "a.tar"),
        (CARD + "notes: {n: 1, 'n': 2}\n", "n"),
    ],
)
def test_a_key_that_comes_twice_is_named(tmp_path, text, key):
    assert f"the key '{key}' comes twice" in refusal(tmp_path, text)


@pytest.mark.parametrize("name", ["yes", "3", "null", "1.5", "2020-01-01", "[owl]", "{owl: 1}"])
def test_what_yaml_takes_for_no_text_is_no_name(tmp_path, name):
    message = refusal(tmp_path, CARD.replace("owl", name))
    assert "task 0 ('a') has classes[0] " in message
    assert "expected text: put names like 'yes' or '3' in quotes" in message
    shards = f"[{name}]"
    for field in ("train", "test"):
        message = refusal(tmp_path, CARD.replace(f"{field}: ", f"{field}: {shards}, n: "))
        assert "task 0 ('a') has t" in message
    message = refusal(tmp_path, CARD.replace("name: a", f"name: {name}"))
    assert f"task 0 has {'no ' * (name == 'null')}" in message


@pytest.mark.parametrize("text", [r"a\0b", r"a\x1b[2Jb", r"a\ud800b", r"a\x9bb", r"a\nb"])
def test_no_name_holds_control_characters(tmp_path, text):
    for field in ("name: birds", "name: a", "train: a.tar", "test: b.tar"):
        message = refusal(tmp_path, CARD.replace(field, f'{field.partition(":")[0]}: "{text}"'))
        assert "without control characters" in message
        assert message.partition("\n  - ")[2].isprintable()


def test_templates_may_hold_line_breaks(tmp_path):
    (tmp_path / "card.yaml").write_text(f'{CARD}templates: ["Question: {{}}\\n\\tAnswer:"]\n')
    assert TaskStream.read(tmp_path / "card.yaml")[0].templates == ("Question: {}\n\tAnswer:",)


@pytest.mark.parametrize(
    "content", [b"name: \xff", b"name: a\0b", b"\x80\x04K\x01.", b"PK\x03\x04"]
)
def test_bytes_that_are_no_text_are_one_sentence(tmp_path, content):
    assert "is not YAML" in refusal(tmp_path, content)


@pytest.mark.parametrize("content", ["", "3", "~", "a", "[1, 2]", "--- {}"])
def test_yaml_that_is_no_card_names_what_is_missing(tmp_path, content):
    assert "the card has no 'tasks', expected a list" in refusal(tmp_path, content)


def test_thousands_of_errors_are_counted(tmp_path):
    message = refusal(tmp_path, CARD + "".join(f"k{n}: 1\n" for n in range(3000)))
    assert message.endswith(f"and {3000 - MAX_ERRORS} more")


def test_values_of_a_megabyte_are_shown_in_part(tmp_path):
    long = "x" * 1_000_000
    for text in (
        CARD.replace("class\n", f"{long}\n"),
        CARD.replace("name: a", f"name: {long}, kind: no"),
        CARD + f"{long[:1000]}: 1\n",
        CARD + f"templates: [{long}]\n",
        CARD + f"mixture: {{{long[:1000]}: 0.5}}\n",
    ):
        assert len(refusal(tmp_path, text)) < 2000


def test_a_hash_that_is_no_text_is_named(tmp_path):
    message = refusal(tmp_path, CARD + "hashes: {a.tar: [1], b.tar: 7}\n")
    assert "the card has hashes['a.tar'] [1], expected text" in message
    assert "the card has hashes['b.tar'] 7, expected text" in message


@pytest.mark.parametrize("value", ["x" * 10**6, list(range(10**6)), {"a": ["b" * 10**6]}, 10**3000])
def test_a_quote_is_short_and_on_one_line(value):
    text = repr_short(value)
    assert len(text) <= MAX_QUOTED + 3
    assert text.isprintable()


def test_a_short_value_is_quoted_whole():
    assert repr_short(["a", 1, None]) == "['a', 1, None]"
    assert repr_short("abcdef", limit=3) == "'ab..."


def test_nothing_in_a_sanitized_text_steers_a_terminal():
    assert escape_unprintable("a\x1b[2J\nb\ud800") == r"a\x1b[2J\nb\ud800"
    assert escape_unprintable("größe ok") == "größe ok"
