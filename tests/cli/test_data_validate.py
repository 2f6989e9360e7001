"""`mmcl data validate` and `mmcl data preview`, as a person gives them."""

import json

import pytest

from tests.data.small_stream import labelled, picture

EXAM = {"b_test": labelled(5, (2, 3), name="bexam")}
"""In place of a part of which two images have the same noise."""


@pytest.fixture
def good(desk):
    """A desk with a stream without any error."""
    desk.stream((16, 12, 12), **EXAM)
    return desk


def test_a_good_stream_is_printed_as_a_table(good):
    status, out, err = good.give("data", "validate", good.card, "--num_workers", 0)
    assert (status, err) == (0, "")
    # Two training images of the noise are equal as well, which is a warning; captions are not used.
    assert "note: of 55 samples these members are not used" in out
    others = ("warning: ", "note: ")
    lines = [line.split() for line in out.splitlines() if not line.startswith(others)]
    titles = ["task", "type", "train", "test", "bytes", "classes", "smallest", "largest"]
    assert lines[0] == [*titles, "images"]
    assert lines[2][:4] == ["task-b", "classification", "12", "5"]
    assert lines[2][6:] == ["2", "c2", "(6)", "c2", "(6)", "8", "×", "6"]
    assert "warning: no shard has a hash on the card" in out
    assert "stream 'small' is good: 55 samples in" in out.splitlines()[-1]


def test_every_error_is_printed_and_the_status_is_1(desk):
    members = [(n, b"9" if n.endswith("cls") else c) for n, c in labelled(2, name="atrain")]
    desk.stream((16, 12, 12), a_train=members, **EXAM)
    (desk.folder / "stream" / "c-test.tar").unlink()
    status, out, err = desk.give("data", "validate", desk.card, "--num_workers", 0)
    assert (status, err) == (1, "")
    assert out.splitlines()[0] == "stream 'small' has 3 errors:"
    assert "  - task 'task-a' (train): atrain001 in a-train.tar: its label is 9, the card" in out
    assert "  - task 'task-c': shard c-test.tar is missing" in out
    assert "is good" not in out


def test_a_limit_says_how_much_was_looked_into(good):
    status, out, _ = good.give("data", "validate", good.card, "--max_samples", 3)
    assert status == 0
    assert out.splitlines()[-1].startswith(
        "stream 'small': no error in the 18 that were decoded, of 55 samples"
    )


def test_json_holds_everything(good):
    status, out, _ = good.give("data", "validate", good.card, "--json", "--pixels")
    found = json.loads(out)
    assert (status, found["is_good"], found["errors"]) == (0, True, [])
    assert found["tasks"][0]["train"]["classes"] == {"c0": 8, "c1": 8}
    assert found["tasks"][0]["test"]["images"]["median"] == [8, 6]


def test_an_image_that_is_too_large_is_an_error(good):
    status, out, _ = good.give("data", "validate", good.card, "--max_pixels", 40)
    assert status == 1
    assert "its image is 8 x 6, more than 40 pixels" in out
    assert "and 11 more in task 'task-a' (train) of this sort" in out


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        ([], 2, "the following arguments are required: CARD"),
        (["none.yaml"], 1, "there is no stream card none.yaml"),
        (["{card}", "--max_samples", "0"], 1, "max_samples is 0"),
        (["{card}", "--num_workers", "-2"], 1, "num_workers is -2"),
        (["{card}", "--workers=2"], 2, "the option --workers is called --num_workers now"),
        (["{card}", "--cache", "x"], 2, "the option --cache is called --cache_dir now"),
        (["{card}", "--limit", "2"], 2, "the option --limit is called --max_samples now"),
        (["{card}", "--cache_limit", "many"], 2, "invalid parse_size value: 'many'"),
        (["{card}", "--samples", "4"], 2, "unrecognized arguments: --samples 4"),
    ],
)
def test_what_cannot_be_understood_is_one_sentence(good, words, status, sentence):
    words = [word.format(card=good.card) for word in words]
    got, _, err = good.give("data", "validate", *words)
    assert got == status
    assert sentence in err
    assert err.count("\n") == 1


def test_show_writes_a_page_beside_the_card(good):
    status, out, err = good.give("data", "preview", good.card, "--samples", 3)
    page = good.card.with_suffix(".html")
    assert (status, err, out) == (0, "", f"page: {page}\n")
    text = page.read_text("utf-8")
    assert text.count("data:image/png;base64,") == 9
    assert "class-incremental" in text
    assert '<p class="label">c3</p>' in text


def test_show_counts_in_a_fraction_on_request(good):
    out = good.folder / "pages" / "x.html"
    words = ("--max_samples", 4, "--out", out, "--samples", 0)
    assert good.give("data", "preview", good.card, *words)[0] == 0
    assert "are counted in 24 of 55 samples, evenly spaced" in out.read_text("utf-8")


def test_show_shows_a_stream_with_errors_and_lists_them(desk):
    hostile = b"<script>alert(1)</script>"
    members = [
        (name, hostile if name.endswith("000.txt") else content)
        for name, content in labelled(4, name="atrain")
    ]
    members[4] = (members[4][0], picture(1)[:50])
    desk.stream((16, 12, 12), a_train=members, **EXAM)
    (desk.folder / "stream" / "b-train.tar").unlink()
    desk.rewrite_card(
        lambda card: card.update(task_type="captioning", description="All <b>bad</b>.")
    )
    status, out, _ = desk.give("data", "preview", desk.card)
    assert status == 0
    assert out.splitlines()[0] == "the page lists 2 errors"
    text = desk.card.with_suffix(".html").read_text("utf-8")
    assert "<h2>2 errors</h2>" in text
    assert "shard b-train.tar is missing" in text
    assert "All &lt;b&gt;bad&lt;/b&gt;." in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "<script" not in text


def test_show_shows_what_a_broken_card_says(good):
    good.rewrite_card(lambda card: card.update(scenario="clas"))
    assert good.give("data", "preview", good.card)[0] == 0
    text = good.card.with_suffix(".html").read_text("utf-8")
    assert "expected one of task, class, domain" in text
    good.card.write_text("x: [")
    assert good.give("data", "preview", good.card)[0] == 0
    assert "is not YAML" in good.card.with_suffix(".html").read_text("utf-8")


def test_show_shows_questions_and_the_most_frequent_answers(asking):
    assert asking.give("data", "preview", asking.card, "--samples", 2)[0] == 0
    text = asking.card.with_suffix(".html").read_text("utf-8")
    assert '<p class="user">What colour is it?</p>' in text
    assert "The most frequent right answers" in text


@pytest.mark.parametrize("action", ["validate", "preview"])
def test_both_have_help_with_an_example(desk, action):
    status, out, _ = desk.give("data", action, "--help")
    assert status == 0
    assert f"usage: mmcl data {action}" in out
    assert f"  mmcl data {action} data/digits/digits.yaml" in out
