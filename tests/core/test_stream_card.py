import pytest
import yaml

from mmcl.core import TaskStream

CARD = {
    "name": "birds",
    "scenario": "class",
    "templates": ["a photo of {}."],
    "tasks": [
        {"name": "a", "classes": ["owl", "jay"], "train": "a-{000..002}.tar", "test": ["t.tar"]},
        {"name": "b", "classes": ["jay", "kite"], "train": ["b.tar"], "test": ["u.tar"]},
    ],
    "probes": [{"name": "p", "classes": ["kite", "owl"], "test": ["p.tar"]}],
}


def write(tmp_path, **changes):
    card = tmp_path / "card.yaml"
    card.write_text(yaml.safe_dump({**CARD, **changes}))
    return card


def test_classes_are_numbered_by_first_appearance(tmp_path):
    stream = TaskStream.read(write(tmp_path))
    assert stream.classes_until(1) == ("owl", "jay", "kite")
    assert [task.classes for task in stream] == [("owl", "jay"), ("kite",)]
    assert stream[1].labels == (1, 2)
    assert stream[1].columns == (-1, 1, 2)


def test_another_order_numbers_the_classes_anew_and_labels_still_find_them(tmp_path):
    stream = TaskStream.read(write(tmp_path), order=[1, 0])
    assert stream.classes_until(1) == ("jay", "kite", "owl")
    # the card's labels are owl 0, jay 1, kite 2, whatever the order
    assert stream[0].columns == (-1, 0, 1)
    assert stream[1].columns == (2, 0, -1)


def test_a_probe_has_a_label_space_of_its_own(tmp_path):
    probe = TaskStream.read(write(tmp_path)).probes[0]
    assert probe.is_probe
    assert probe.classes == ("kite", "owl")
    assert probe.columns == (1, -1, 0)


def test_braces_are_expanded_with_their_zeros(tmp_path):
    assert TaskStream.read(write(tmp_path))[0].train == ("a-000.tar", "a-001.tar", "a-002.tar")


def test_all_faults_are_told_at_once(tmp_path):
    tasks = [
        {"name": "a", "clases": ["owl"], "train": ["a.tar"], "test": ["a.tar"], "size": -1},
        {"name": "a", "classes": ["owl"], "train": [], "test": ["b.tar"], "kind": "sing"},
    ]
    with pytest.raises(ValueError, match="has 8 faults") as caught:
        TaskStream.read(write(tmp_path, tasks=tasks, scenario="wild"))
    text = str(caught.value)
    for part in (
        "unknown key 'clases': did you mean 'classes'?",
        "tests on shards it trains on",
        "size -1",
        "train []",
        "kind 'sing'",
        "scenario 'wild'",
        "two tasks are named 'a'",
    ):
        assert part in text


def test_a_missing_card_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="mmcl data build"):
        TaskStream.read(tmp_path / "none.yaml")


def test_a_card_that_is_no_yaml_is_one_sentence(tmp_path):
    card = tmp_path / "card.yaml"
    card.write_text("a: [1,")
    with pytest.raises(ValueError, match="is not YAML"):
        TaskStream.read(card)


def test_yaml_tags_make_no_objects(tmp_path):
    card = tmp_path / "card.yaml"
    card.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(ValueError, match="is not YAML"):
        TaskStream.read(card)


@pytest.mark.parametrize("order", [[0, 0], [2], [-1], []])
def test_an_order_names_tasks_of_the_card_none_twice(tmp_path, order):
    with pytest.raises(ValueError, match="some of 0 to 1, none twice"):
        TaskStream.read(write(tmp_path), order=order)


def test_a_task_that_the_order_leaves_out_is_not_part_of_the_stream(tmp_path):
    stream = TaskStream.read(write(tmp_path), order=[1])
    assert [task.index for task in stream] == [0]
    assert stream[0].name == TaskStream.read(write(tmp_path))[1].name
    assert set(stream.classes_until(0)) == set(stream[0].classes)
