"""The stream of a model's life: its stages, captions, classes, source and probes."""

import tarfile

import pytest

from mmcl.core.task import TaskStream
from mmcl.data import open_stream
from mmcl.streams.digits import CLASSES
from mmcl.streams.emoji_table import EmojiFont, find_font
from mmcl.streams.life import SIZES, YEARS, build


@pytest.fixture(scope="module")
def font():
    try:
        return EmojiFont(find_font())
    except (FileNotFoundError, ValueError) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def card(font, tmp_path_factory):
    folder = tmp_path_factory.mktemp("life")
    return build(folder, font.path, per_group=12, general=20, probe=8)


def members(shard):
    with tarfile.open(shard) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_the_card_has_all_stages_a_general_source_and_probes(card):
    stream = TaskStream.read(card)
    assert [(task.stage, task.task_type) for task in stream.tasks] == [
        *[("cpt", "captioning")] * 3, ("dap", "captioning"), *[("cft", "classification")] * 2,
    ]  # fmt: skip
    assert [source.task.name for source in stream.sources] == ["general"]
    assert {task.ability for task in stream.all_tasks if task.is_eval_only} == {"general"}
    assert [stream.tasks[index].class_ids for index in (4, 5)] == [
        tuple(range(5)), tuple(range(5, 10)),
    ]  # fmt: skip


def test_every_emoji_is_in_the_task_of_its_years(card, font):
    prepared = open_stream(TaskStream.read(card))
    found = set()
    for index, (first, last) in enumerate(YEARS):
        reader = prepared.reader(index, "train")
        captions = [reader.read(number).members["txt"].decode() for number in range(len(reader))]
        assert all(captions.count(caption) == SIZES["train"] for caption in captions)
        assert stream_name(prepared, index) == f"emoji_{first}_{last}"
        assert not found & set(captions)
        found |= set(captions)
    assert 48 <= len(found) <= 96


def stream_name(prepared, index):
    return prepared.stream.tasks[index].name


def test_scans_of_both_class_tasks_are_those_of_the_captions(card):
    folder = card.parent
    captioned = members(folder / "scans-train.tar")
    classes = members(folder / "zero_to_four-train.tar") | members(
        folder / "five_to_nine-train.tar"
    )
    assert len(captioned) == len(classes)
    for name, data in captioned.items():
        key, extension = name.split(".")
        number = key.rpartition("-")[2]
        label = int(captioned[f"{key}.cls"])
        own = ("zero_to_four", "five_to_nine")[label > 4]
        assert classes[f"{own}-{number}.{extension}"] == data
        assert captioned[f"{key}.txt"].decode() == f"the handwritten digit {CLASSES[label]}"
