"""Several images a sample: written, read, decoded in order, validated, shown, copied for replay."""

import io
import json

import pytest
import torch
from PIL import Image

from mmcl.core import ProcessedSample, ReplayPlan, Task, TaskStream
from mmcl.data.batches.collate import collate, make_example
from mmcl.data.convert.convert import convert, open_input
from mmcl.data.convert.record import ConvertOptions
from mmcl.data.convert.task_files import InPlace
from mmcl.data.decode import decode_image
from mmcl.data.image_formats import image_members
from mmcl.data.remote.location import LocalFile
from mmcl.data.shards.open_stream import open_stream
from mmcl.data.shards.replay_copies import ReplayCopyReader, save_replay_copies
from mmcl.data.shards.sample_fields import SampleFields
from mmcl.data.shards.stream_writer import write_shard
from mmcl.data.shards.tar_shard import TarShard
from mmcl.data.stored_sample import BadSample
from mmcl.data.validate.preview import draw_samples
from mmcl.data.validate.validate import check_stream
from tests.data.convert.llava_files import jpeg, put

TASK = Task(0, "vqa", task_type="instruction", scorer="exact")


def record(images, mark="", answer="yes"):
    turns = [{"from": "human", "value": f"{mark}Alike?"}, {"from": "gpt", "value": answer}]
    return {"image": images, "conversations": turns}


def mixed(folder, pairs=4):
    """Write records of two images, one, none and eleven; return the file."""
    for number in range(24):
        kind = "PNG" if number % 3 == 0 else "JPEG"
        put(folder / "pics" / f"{number}.img", jpeg(number, kind))
    names = [f"{n}.img" for n in range(24)]
    records = [record(names[n : n + 2], "<image>\n<image>\n") for n in range(pairs)]
    records += [record(names[12], "<image>\n"), record([], answer="no"), record(names[13:])]
    return put(folder / "mixed.json", records)


def stream_of(folder, **more):
    source = mixed(folder)
    opened = open_input(source, images=folder / "pics")
    options = ConvertOptions("vqa", test_fraction=0.3)
    card, _ = convert(opened, None, folder / "out", options, **more)
    return open_stream(TaskStream.read(card))


def samples_of(prepared):
    readers = [prepared.reader(0, split) for split in ("train", "test")]
    return [reader.read(number) for reader in readers for number in range(len(reader))]


def seen_of(sample, task=TASK):
    """The pixels and the conversation that a model's transform gets, and the example."""
    seen = []

    def keep(pixels, text, seed):
        seen.append((pixels, text))
        images = pixels if isinstance(pixels, tuple) else () if pixels is None else (pixels,)
        tokens = torch.ones(3, dtype=torch.int64)
        image = torch.stack(images) if len(images) > 1 else (*images, None)[0]
        return ProcessedSample(image, tokens, tokens)

    example = make_example(sample, 0, task, keep, seed=0, max_pixels=10_000)
    return (*seen[0], example)


def test_the_images_of_a_sample_are_members_in_natural_order():
    names = ["10.png", "json", "2.jpg", "0.jpg", "1.webp", "cls"]
    assert image_members(names) == ["0.jpg", "1.webp", "2.jpg", "10.png"]
    assert image_members(["txt", "png"]) == ["png"]
    assert image_members(["left.jpg", "json"]) == []


def test_shards_and_files_in_place_give_the_same_samples(tmp_path):
    shards = samples_of(stream_of(tmp_path / "a"))
    pics = tmp_path / "b" / "pics"
    loose = samples_of(stream_of(tmp_path / "b", in_place=InPlace(pics, pics)))
    assert {one.key: dict(one.members) for one in loose} == {
        one.key: dict(one.members) for one in shards
    }
    assert sorted(len(image_members(one.members)) for one in shards) == [0, 1, 2, 2, 2, 2, 11]


def test_a_model_gets_every_image_in_order_with_a_mark_each(tmp_path):
    for sample in samples_of(stream_of(tmp_path)):
        number = int(sample.key.rpartition("-")[2])
        own = {4: [12], 5: [], 6: list(range(13, 24))}.get(number, [number, number + 1])
        files = [(tmp_path / "pics" / f"{n}.img").read_bytes() for n in own]
        pixels, text, _ = seen_of(sample)
        given = pixels if isinstance(pixels, tuple) else () if pixels is None else (pixels,)
        assert isinstance(pixels, tuple) == (len(own) > 1)
        assert all(a.equal(decode_image(b)) for a, b in zip(given, files, strict=True))
        assert text.turns[0].text == "<image>\n" * len(own) + "Alike?"


def test_a_batch_holds_the_images_of_all_samples_and_whose_they_are(tmp_path):
    samples = samples_of(stream_of(tmp_path))
    batch = collate([seen_of(sample)[2] for sample in samples])
    counts = [len(image_members(sample.members)) for sample in samples]
    owners = [index for index, count in enumerate(counts) for _ in range(count)]
    assert batch.image_owner.tolist() == owners
    pixels = [decode_image(one.members[n]) for one in samples for n in image_members(one.members)]
    assert batch.images.equal(torch.stack(pixels))


@pytest.mark.parametrize(
    ("images", "mark", "sentence"),
    [
        (2, "<image>", "shows 1 images and it has 2"),
        (2, "<image>" * 3, "shows 3 images and it has 2"),
        (1, "<image>" * 2, "shows 2 images and it has one"),
        (0, "<image>", "shows 1 images and it has none"),
    ],
)
def test_marks_are_as_many_as_images(tmp_path, images, mark, sentence):
    members = {f"{n}.jpg": jpeg(n) for n in range(images)}
    members = {"jpg": jpeg(0)} if images == 1 else members
    text = json.dumps({"conversations": record([], mark)["conversations"]})
    write_shard(tmp_path / "a.tar", [{"__key__": "a", "json": text, **members}])
    shard = TarShard(LocalFile(tmp_path / "a.tar"), "a.tar", None)
    with pytest.raises(BadSample, match=sentence):
        seen_of(shard.read(0, SampleFields.of(TASK)))


def test_a_template_leaves_marks_inside_of_a_question_where_they_are(tmp_path):
    task = Task(0, "vqa", task_type="instruction", scorer="exact", templates=("Q: {}",))
    for mark, text in (
        ("<image>\n<image>\n", "<image>\n<image>\nQ: Alike?"),
        ("Is <image> as <image>? ", "Q: Is <image> as <image>? Alike?"),
    ):
        members = {f"{n}.jpg": jpeg(n) for n in range(2)}
        system = {"from": "system", "value": "Be short."}
        content = json.dumps({"conversations": [system, *record([], mark)["conversations"]]})
        write_shard(tmp_path / "a.tar", [{"__key__": "a", "json": content, **members}])
        sample = TarShard(LocalFile(tmp_path / "a.tar"), "a.tar", None).read(0)
        turns = seen_of(sample, task)[1].turns
        assert [turn.text for turn in turns] == ["Be short.", text, "yes"]


def test_a_plain_image_beside_numbered_ones_is_refused_by_name(tmp_path):
    text = json.dumps({"conversations": record([])["conversations"]})
    write_shard(
        tmp_path / "a.tar",
        [{"__key__": "a", "json": text, "0.jpg": jpeg(0), "1.jpg": jpeg(1)},
         {"__key__": "b", "json": text, "jpg": jpeg(0), "1.jpg": jpeg(1)},
         {"__key__": "c", "json": text, "jpg": jpeg(0)}],
    )  # fmt: skip
    shard = TarShard(LocalFile(tmp_path / "a.tar"), "a.tar", None)
    assert "has 2 image members, .1.jpg, .jpg" in shard.field_error(SampleFields.of(TASK))
    with pytest.raises(BadSample, match="2 image members"):
        shard.read(1, SampleFields.of(TASK))
    assert set(shard.read(0, SampleFields.of(TASK)).members) == {"0.jpg", "1.jpg", "json"}
    assert "2 image members" in shard.field_error(SampleFields("captioning", text="json.x"))
    chosen = SampleFields("instruction", image="1.jpg", text="json")
    assert set(shard.read(0, chosen).members) == {"jpg", "json"}


def test_validate_and_preview_know_every_image(tmp_path):
    prepared = stream_of(tmp_path)
    found = check_stream(tmp_path / "out" / "vqa.yaml", num_workers=1)
    assert found.errors == ()
    drawn = draw_samples(prepared.stream, prepared.stream[0], "train", 9)
    counts = {len(image_members(one.members)) for one in samples_of(prepared)[: len(drawn)]}
    widths = {Image.open(io.BytesIO(one.thumbnail)).width for one in drawn if one.thumbnail}
    assert widths == {8 * count for count in counts if count}


def test_copies_for_replay_hold_every_image(tmp_path):
    prepared = stream_of(tmp_path)
    reader = prepared.reader(0, "train")
    numbers = torch.arange(len(reader))
    plan = ReplayPlan(torch.zeros_like(numbers), numbers)
    save_replay_copies(prepared, plan, tmp_path / "memory", 0)
    copies = ReplayCopyReader(tmp_path / "memory", 0)
    for number in range(len(reader)):
        own, copy = reader.read(number), copies.read(number)
        assert (own.key, dict(own.members)) == (copy.key, dict(copy.members))
        assert copies.text_bytes("json")[number] == len(own.members["json"])


def test_the_same_images_are_known_when_a_task_is_appended(tmp_path):
    stream_of(tmp_path)
    again = open_input(tmp_path / "mixed.json", images=tmp_path / "pics")
    options = ConvertOptions("more", test_fraction=0.3)
    with pytest.raises(ValueError, match="all 6 images of task 'more' and their texts are those"):
        convert(again, None, tmp_path / "out", options, append=True)
