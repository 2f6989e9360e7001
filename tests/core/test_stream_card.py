import pytest
import yaml

from mmcl.core import TaskStream
from mmcl.core.card import card_schema, schema, validate_card

CARD = {
    "name": "birds",
    "scenario": "class",
    "templates": ["a photo of {}."],
    "tasks": [
        {"name": "a", "classes": ["owl", "jay"], "train": "a-{000..002}.tar", "test": ["t.tar"]},
        {"name": "b", "classes": ["jay", "kite"], "train": ["b.tar"], "test": ["u.tar"]},
    ],
    "eval_only": [{"name": "p", "classes": ["kite", "owl"], "test": ["p.tar"]}],
}


def write(tmp_path, **changes):
    card = tmp_path / "card.yaml"
    card.write_text(yaml.safe_dump({**CARD, **changes}))
    return card


def test_classes_are_numbered_by_first_appearance(tmp_path):
    stream = TaskStream.read(write(tmp_path))
    assert stream.classes_seen(1) == ("owl", "jay", "kite")
    assert [task.classes for task in stream] == [("owl", "jay"), ("kite",)]
    assert stream[1].class_ids == (1, 2)
    assert stream[1].label_to_class == (-1, 1, 2)


def test_another_order_renumbers_the_classes_and_labels_still_find_them(tmp_path):
    stream = TaskStream.read(write(tmp_path), order=[1, 0])
    assert stream.classes_seen(1) == ("jay", "kite", "owl")
    # the card's labels are owl 0, jay 1, kite 2, whatever the order
    assert stream[0].label_to_class == (-1, 0, 1)
    assert stream[1].label_to_class == (2, 0, -1)


def test_an_eval_only_task_has_a_label_space_of_its_own(tmp_path):
    task = TaskStream.read(write(tmp_path)).eval_only_tasks[0]
    assert task.is_eval_only
    assert task.classes == ("kite", "owl")
    assert task.label_to_class == (1, -1, 0)


def test_braces_are_expanded_with_their_zeros(tmp_path):
    assert TaskStream.read(write(tmp_path))[0].train == ("a-000.tar", "a-001.tar", "a-002.tar")


def test_all_errors_are_listed_at_once(tmp_path):
    tasks = [
        {"name": "a", "clases": ["owl"], "train": ["a.tar"], "test": ["a.tar"], "size": -1},
        {"name": "a", "classes": ["owl"], "train": [], "test": ["b.tar"], "task_type": "sing"},
    ]
    with pytest.raises(ValueError, match="has 8 errors") as caught:
        TaskStream.read(write(tmp_path, tasks=tasks, scenario="wild"))
    text = str(caught.value)
    for part in (
        "unknown key 'clases': did you mean 'classes'?",
        "tests on shards it trains on",
        "size -1",
        "train: an empty list",
        "task_type 'sing'",
        "scenario 'wild'",
        "two tasks named 'a'",
    ):
        assert part in text


def test_a_card_in_the_old_form_is_refused_by_sentences_that_name_the_new_keys(tmp_path):
    old = {
        "name": "birds", "scenario": "class", "licence": "CC0", "kind": "answer", "share": 0.25,
        "decode": "candidates", "text": "de.txt", "mix": {"general": 0.5},
        "classes": ["owl", "jay"], "templates": ["{}"],
        "sources": {"general": {"kind": "answer", "shards": "g.tar"}},
        "tasks": [{"name": "a", "train": "a.tar", "test": "t.tar"}],
        "probes": [{"name": "p", "kind": "classify", "test": "p.tar"}],
    }  # fmt: skip
    path = tmp_path / "card.yaml"
    path.write_text(yaml.safe_dump(old, sort_keys=False))
    card, errors = validate_card(path)
    keys = {
        "licence": "license", "kind": "task_type", "share": "replay_ratio", "decode": "decoding",
        "text": "text_field", "mix": "mixture", "probes": "eval_only",
    }  # fmt: skip
    now = "which is called '{}' now: rename it"
    is_answer = f"has task_type 'answer', {now.format('instruction')}"
    assert sorted(errors) == sorted(
        [
            *(f"the card has the key '{key}', {now.format(new)}" for key, new in keys.items()),
            f"the card {is_answer}",
            f"source 'general' has the key 'kind', {now.format('task_type')}",
            f"source 'general' {is_answer}",
            f"eval-only task 0 ('p') has the key 'kind', {now.format('task_type')}",
            f"eval-only task 0 ('p') has task_type 'classify', {now.format('classification')}",
            "eval-only task 0 ('p') lets candidates compete (decoding) but has task_type "
            "'classification' and 2 'classes': they are the answers of a task of task_type "
            "'instruction'",
        ]
    )
    task = card.tasks[0]
    assert (card.license, task.task_type, task.replay_ratio) == ("CC0", "instruction", 0.25)
    assert (task.decoding, task.text_field, task.mixture) == (
        "candidates", "de.txt", {"general": 0.5},
    )  # fmt: skip


@pytest.mark.parametrize(("old", "new"), schema.RENAMED_VALUES["task_type"].items())
def test_every_old_task_type_names_the_new_one(tmp_path, old, new):
    source = {"task_type": old, "shards": "g.tar"}
    _, errors = validate_card(write(tmp_path, sources={"general": source}))
    assert (
        f"source 'general' has task_type '{old}', which is called '{new}' now: rename it" in errors
    )


def test_a_card_with_errors_is_read_as_far_as_possible(tmp_path):
    card, errors = validate_card(write(tmp_path, scenario=3, epochs=-1, citation=7, license="CC0"))
    assert len(errors) == 3
    assert (card.scenario, card.epochs, card.citation, card.license) == ("task", 0, "", "CC0")
    assert [task.name for task in card.tasks] == ["a", "b"]


def test_an_empty_text_is_left_out_and_an_empty_number_or_choice_is_an_error(tmp_path):
    empty = dict.fromkeys(
        ("description", "text_field", "scorer", "replay_ratio", "mixture", "sources", "hashes")
    )
    assert validate_card(write(tmp_path, **empty))[1] == []
    assert len(validate_card(write(tmp_path, task_type=None, epochs=None, stage=None))[1]) == 3


def test_tasks_inherit_what_they_do_not_state_and_eval_only_tasks_never_train(tmp_path):
    stream = TaskStream.read(write(tmp_path, epochs=3, text_field="de.txt", replay_ratio=0.25))
    assert [(task.epochs, task.text_field, task.replay_ratio) for task in stream] == [
        (3, "de.txt", 0.25)
    ] * 2
    assert (stream.eval_only_tasks[0].replay_ratio, stream.eval_only_tasks[0].train) == (None, ())
    assert stream[0].templates == ("a photo of {}.",)


def test_every_key_of_the_schema_for_editors_is_described():
    found = card_schema()
    assert found["required"] == ["name", "scenario", "tasks"]
    assert found["$defs"]["EvalOnlyEntry"]["required"] == ["name", "test"]
    for form in (found, *found["$defs"].values()):
        assert not form["additionalProperties"]
        assert all(key["description"] for key in form["properties"].values())


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
    assert set(stream.classes_seen(0)) == set(stream[0].classes)


def test_a_card_declares_shift_knowledge_and_ability(tmp_path):
    probe = {"name": "p", "classes": ["owl"], "test": ["p.tar"]}
    declared = [{**probe, "knowledge": "updated"}, {**probe, "name": "q", "ability": "safety"}]
    stream = TaskStream.read(write(tmp_path, shift="temporal", eval_only=declared))
    assert stream.shift == "temporal"
    assert [task.knowledge for task in stream.eval_only_tasks] == ["updated", None]
    assert [task.ability for task in stream.eval_only_tasks] == [None, "safety"]
    assert TaskStream.read(write(tmp_path)).shift is None


def test_unknown_declarations_are_refused(tmp_path):
    probe = {"name": "p", "classes": ["owl"], "test": ["p.tar"], "knowledge": "old", "ability": 3}
    tasks = [{**CARD["tasks"][0], "ability": "general"}]
    with pytest.raises(ValueError, match="has 4 errors") as caught:
        TaskStream.read(write(tmp_path, shift="tidal", eval_only=[probe], tasks=tasks))
    text = str(caught.value)
    assert "has shift 'tidal', expected one of temporal, content, language" in text
    assert "has knowledge 'old', expected one of invariant, updated, new" in text
    assert "has ability 3, expected one of general, instruction, safety" in text
    assert "task 0 ('a') has the unknown key 'ability'" in text
