import re

from mmcl.report.stream_page import (
    ShownSample,
    ShownStream,
    ShownTask,
    answer_bars,
    class_bars,
    class_map,
    size_bars,
    stream_page,
)
from tests.report.test_page import ATTACK, Tags

PNG = b"\x89PNG\r\n\x1a\n" + b"0" * 40


def a_stream(name="birds", **changes):
    samples = (
        ShownSample("k1", "a.tar", "duck", PNG, "8 × 6"),
        ShownSample("k2", "a.tar", "", b"\xff\xd8\xff...", "640 × 480", (("", "a duck"),)),
        ShownSample("k3", "a.tar", turns=tuple((("user", "What?"), ("assistant", "That."))) * 5),
    )
    tasks = (
        ShownTask("ponds", "task", (("task_type", "classification"), ("training", "1,200")),
                  1200, 3,
                  (("duck", 700, 2), ("swan", 500, 1)), samples=samples),
        ShownTask("lakes", "task", (("task_type", "classification"),), 5, 3, (("gull", 5, 3),)),
        ShownTask("quiz", "task", (("task_type", "instruction"),), 5, 3, (),
                  (("yes", 3), ("no", 2)), 5),
        ShownTask("far", "eval-only task", (), 0, 9),
    )  # fmt: skip
    facts = (("scenario", "class-incremental"),)
    return ShownStream(name, facts, tasks=tasks, **changes)


def test_the_page_shows_every_part():
    page = stream_page(
        a_stream(
            about="Birds on water.", origin=(("License", "CC0"),), errors=("shard x is missing",),
            warnings=("a warning",), counted="counted in 5 of 10 samples",
        )
    )  # fmt: skip
    for words in (
        "<h1>birds</h1>", "Birds on water.", "CC0", "<h2>1 error</h2>", "shard x is missing",
        "a warning", "counted in 5 of 10 samples", "Which classes in which task", "1,200",
        '<p class="label">duck</p>', "640 × 480", "a duck", "and 4 more turns",
        "The most frequent right answers", '<span class="role">eval-only task</span>',
        "No sample can be shown.",
    ):  # fmt: skip
        assert words in page, words
    assert page.count("data:image/png;base64,") == 1
    assert page.count("data:image/jpeg;base64,") == 1


def test_hostile_captions_and_names_are_shown_and_never_run():
    sample = ShownSample(
        ATTACK, ATTACK, ATTACK, PNG, ATTACK, (("", ATTACK), (ATTACK, ATTACK), ("user", "\x1b[31m"))
    )
    task = ShownTask(
        ATTACK, "task", ((ATTACK, ATTACK),), 3, 1, ((ATTACK, 3, 1), ("b", 0, 0)), samples=(sample,)
    )
    quiz = ShownTask(ATTACK, ATTACK, (), 3, 1, (), ((ATTACK, 3), ("$\\frac", 1)), 4)
    stream = ShownStream(
        ATTACK, ((ATTACK, ATTACK),), ATTACK, ((ATTACK, ATTACK),), (ATTACK,), (ATTACK,), ATTACK,
        (task, task, quiz),
    )  # fmt: skip
    page = stream_page(stream)
    seen = Tags(page)
    assert "script" not in seen.tags
    assert seen.tags.count("img") == 2
    assert seen.handlers == []
    assert all(address.startswith(("data:image/png", "#")) for address in seen.addresses)
    assert "\x1b" not in page
    assert page.count("&lt;script&gt;") > 10


def test_the_page_asks_for_nothing_outside_itself_and_its_ids_are_its_own():
    page = stream_page(a_stream())
    seen = Tags(page)
    assert not {"script", "link", "iframe", "object"} & set(seen.tags)
    assert "default-src 'none'" in page
    assert not re.search(r"url\((?!#)", page)
    assert len(seen.ids) == len(set(seen.ids))
    wanted = re.findall(r"url\(#([^)]+)\)", page) + re.findall(r'xlink:href="#([^"]+)"', page)
    assert set(wanted) <= set(seen.ids)
    assert "#1f2430" not in page.split("</style>", 1)[1]
    assert stream_page(a_stream()) == page


def test_a_stream_of_which_nothing_is_known_still_has_a_page():
    page = stream_page(ShownStream("x", errors=("it is not YAML",)))
    assert "it is not YAML" in page
    assert "<svg" not in page


def test_a_map_of_classes_needs_two_tasks_of_them():
    one = ShownStream("x", tasks=a_stream().tasks[:1])
    assert "Which classes in which task" not in stream_page(one)


def test_plots_hold_from_nothing_to_very_much():
    for svg in (
        size_bars([]),
        size_bars([("a", 0, 0)]),
        size_bars([(f"task {n}", n, 10**n % 7) for n in range(60)]),
        class_bars([("a", 0, 0)], "one"),
        class_bars([(f"c{n}", n, 0) for n in range(32)], "some"),
        class_bars([(f"c{n}", n, 1) for n in range(1000)], "many"),
        answer_bars([], 0, "nothing"),
        answer_bars([("x" * 500, 1)], 1, "long"),
        class_map(["a", "b"], ["x"], [[0], [10**7]]),
        class_map(["a"], [f"c{n}" for n in range(1000)], [list(range(1000))]),
    ):
        assert svg.startswith(b"<?xml")
