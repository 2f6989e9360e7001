"""Samples that a card has already are told of, or refused, when they are appended again."""

import pytest
import yaml

from mmcl.data import check_stream
from mmcl.data.convert.convert import convert, open_input
from mmcl.data.convert.record import ConvertOptions
from mmcl.data.convert.task_files import InPlace
from tests.data.convert.llava_files import asked, jpeg, put, quizzed, train_set
from tests.data.convert.test_convert import class_folders, pictures


def appended(source, out, name, images=None, in_place=None, **options):
    """Append a task to the card of a folder; return the notes."""
    _, converted = convert(
        open_input(source, None, images), None, out, ConvertOptions(name), append=True,
        in_place=in_place, **options,
    )  # fmt: skip
    return list(converted.notes)


def begun(source, out, images=None, in_place=None):
    return convert(
        open_input(source, None, images), None, out, ConvertOptions("mine"), in_place=in_place
    )[0]


def test_the_same_folder_under_a_second_name_is_refused(tmp_path):
    class_folders(tmp_path / "set", {"a": 6, "b": 6})
    out = tmp_path / "out"
    card = begun(tmp_path / "set", out)
    before = card.read_bytes()
    refusal = (
        "all 12 images of task 'again' and their texts are those of task 'mine' on .*mine.yaml"
    )
    with pytest.raises(
        ValueError, match=f"{refusal}: give --allow_duplicates to append them again"
    ):
        appended(tmp_path / "set", out, "again")
    assert card.read_bytes() == before
    assert not list(out.glob("again*"))
    notes = appended(tmp_path / "set", out, "again", allow_duplicates=True)
    assert notes == ["12 of 12 images of task 'again' are also in task 'mine'"]
    assert [task["name"] for task in yaml.safe_load(card.read_text())["tasks"]] == ["mine", "again"]
    # Once there, the same call writes the same task again and does not compare it with itself.
    assert appended(tmp_path / "set", out, "again", allow_duplicates=True) == notes


def test_a_part_of_the_images_is_counted_by_task(tmp_path):
    first = class_folders(tmp_path / "first", {"a": 6, "b": 6})
    second = class_folders(tmp_path / "second", {"c": 5}, start=50)
    third = class_folders(tmp_path / "third", {"e": 4}, start=80)
    for number, data in enumerate([*first["a"][:4], *second["c"][:2]]):
        put(tmp_path / "third" / "e" / f"x{number}.jpg", data)
    out = tmp_path / "out"
    begun(tmp_path / "first", out)
    assert appended(tmp_path / "second", out, "second") == []
    notes = appended(tmp_path / "third", out, "third")
    every = {*third["e"], *first["a"][:4], *second["c"][:2]}
    assert notes == [
        f"{len(every & set(first['a']))} of {len(every)} images of task 'third' are also in task "
        "'mine'",
        "2 of 10 images of task 'third' are also in task 'second'",
    ]


def test_the_same_images_with_other_texts_are_told_and_not_refused(tmp_path):
    pictures(tmp_path / "pics", 6)
    for name, word in (("t", "seen"), ("u", "drawn")):
        put(
            tmp_path / f"{name}.csv",
            "path,text\n" + "".join(f"{n}.jpg,{word} {n}\n" for n in range(6)),
        )
    out = tmp_path / "out"
    begun(tmp_path / "t.csv", out, tmp_path / "pics")
    notes = appended(tmp_path / "u.csv", out, "u", tmp_path / "pics")
    assert notes == ["6 of 6 images of task 'u' are also in task 'mine'"]
    with pytest.raises(ValueError, match="all 6 images of task 'v' .* of task 'mine'"):
        appended(tmp_path / "t.csv", out, "v", tmp_path / "pics")


def test_questions_are_compared_in_place_and_in_shards(tmp_path):
    source, images = train_set(tmp_path, 6)
    out = tmp_path / "out"
    begun(source, out, images, InPlace(images, images))
    with pytest.raises(ValueError, match="all 6 images of task 'again' .* of task 'mine'"):
        appended(source, out, "again", images)
    other = [asked(n, f"sub/{n}.jpg", question="Where?") for n in range(4)]
    other += [quizzed(9, "sub/9.jpg")]
    put(images / "sub" / "9.jpg", jpeg(9))
    put(tmp_path / "other.json", other)
    notes = appended(tmp_path / "other.json", out, "other", images)
    assert notes == ["4 of 5 images of task 'other' are also in task 'mine'"]


def test_texts_without_images_and_remote_shards_are_not_compared(tmp_path):
    source = put(tmp_path / "words.json", [asked(number) for number in range(5)])
    out = tmp_path / "out"
    card = begun(source, out)
    assert appended(source, out, "again") == []
    content = yaml.safe_load(card.read_text())
    content["tasks"][0]["train"] = ["http://localhost:1/far.tar"]
    card.write_text(yaml.safe_dump(content))
    source, images = train_set(tmp_path, 5)
    notes = appended(source, out, "seen", images)
    assert notes == ["not compared with the card: http://localhost:1/far.tar (is remote)"]


def test_validation_tells_of_tasks_that_share_training_images(tmp_path):
    first = class_folders(tmp_path / "first", {"a": 6, "b": 6})
    class_folders(tmp_path / "second", {"c": 5}, start=50)
    class_folders(tmp_path / "third", {"e": 4}, start=80)
    out = tmp_path / "out"
    path = begun(tmp_path / "first", out)
    appended(tmp_path / "second", out, "second")
    assert not [line for line in check_stream(path, num_workers=0).warnings if "share" in line]
    for number, data in enumerate(first["a"]):
        put(tmp_path / "third" / "e" / f"x{number}.jpg", data)
    appended(tmp_path / "third", out, "third")
    trained = {name: set(_images(out, path, name)) for name in ("mine", "third")}
    shared = len(trained["mine"] & trained["third"])
    assert 0 < shared < len(trained["third"])
    found = check_stream(path, num_workers=0)
    assert [line for line in found.warnings if "training images" in line] == [
        f"task 'third' has {shared} of its {len(trained['third'])} training images also in task "
        "'mine'"
    ]


def _images(out, path, name):
    from tests.data.convert.test_convert import read

    card = yaml.safe_load(path.read_text())
    return [one["jpg"] for one in read(out, card, name, "train")]
