"""Layouts of the field become the same conversations: turns, images, options, system prompts."""

import base64
import csv
import json

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from mmcl.data.convert.convert import convert, open_input
from mmcl.data.convert.inputs.columns import ColumnOptions
from mmcl.data.convert.record import ConvertOptions
from mmcl.data.convert.task_files import InPlace
from mmcl.data.shards.json_shard import JsonShard
from mmcl.data.shards.llava_json import read_dialogue, read_sample
from mmcl.data.stored_sample import BadSample
from tests.data.convert.llava_files import jpeg, put
from tests.data.shards.shard_files import read_samples

ASKED, HUE = "Which hue?", "teal"
LETTERS = "Answer with the option's letter from the given choices directly."


def converted(source, out, images=None, in_place=False, **more):
    """Convert a source; return key -> members of all samples, and the notes."""
    options = ColumnOptions(**more)
    opened = open_input(source, None, images, options=options, in_place=in_place)
    follow = InPlace(images or source.parent, images or source.parent, "answer",
                     options.follow_links)  # fmt: skip
    card, made = convert(
        opened, None, out, ConvertOptions("mine", test_fraction=0.5),
        in_place=follow if in_place else None,
    )  # fmt: skip
    task = yaml.safe_load(card.read_text())["tasks"][0]
    names = [*task["train"], *task["test"]]
    if not in_place:
        return read_samples(out / name for name in names), list(made.notes)
    samples = {}
    for name in names:
        shard = JsonShard(out / name, name, None)
        samples |= {one.key: dict(one.members) for one in map(shard.read, range(len(shard)))}
    return samples, list(made.notes)


def turns_of(members):
    return [(turn.role, turn.text) for turn in read_dialogue(members["json"]).turns]


def pictured(folder, count=6):
    for number in range(count):
        put(folder / f"{number}.jpg", jpeg(number))
    return folder


def said(asked, answer=HUE):
    return [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]


def roles(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


TEXT = {"type": "text", "text": ASKED}
SHOWN = [("user", f"<image>\n{ASKED}"), ("assistant", HUE)]
RECORDS = {
    "from and value": (
        {"id": 7, "image": "0.jpg", "conversations": said(f"<image>\n{ASKED}")}, SHOWN),
    "user and assistant in from": (
        {"image": "0.jpg", "conversations": [{"from": "user", "value": f"<image>\n{ASKED}"},
                                             {"from": "assistant", "value": HUE}]}, SHOWN),
    "role and content": (
        {"image": ["0.jpg"], "conversations": roles(("user", f"<image>\n{ASKED}"),
                                                    ("assistant", HUE))}, SHOWN),
    "messages": (
        {"messages": roles(("user", f"<image>\n{ASKED}"), ("assistant", HUE)),
         "images": ["0.jpg"]}, SHOWN),
    "messages with a system": (
        {"messages": roles(("system", "Be short."), ("user", f"<image>\n{ASKED}"),
                           ("assistant", HUE)), "images": ["0.jpg"]},
        [("system", "Be short."), *SHOWN]),
    "system turn of LLaVA": (
        {"image": "0.jpg", "conversations": [{"from": "system", "value": "Be short."},
                                             *said(f"<image>\n{ASKED}")]},
        [("system", "Be short."), *SHOWN]),
    "system key": (
        {"image": "0.jpg", "system": "Be short.", "conversations": said(f"<image>\n{ASKED}")},
        [("system", "Be short."), *SHOWN]),
    "empty system turn": (
        {"image": "0.jpg", "messages": roles(("system", ""), ("user", f"<image>\n{ASKED}"),
                                             ("assistant", HUE))}, SHOWN),
    "parts with paths": (
        {"messages": roles(("user", [{"type": "image", "image": "0.jpg"}, TEXT]),
                           ("assistant", [{"type": "text", "text": HUE}]))},
        [("user", f"<image>{ASKED}"), ("assistant", HUE)]),
    "parts with image_url": (
        {"messages": roles(("user", [TEXT, {"type": "image_url",
                                            "image_url": {"url": "file:0.jpg"[5:]}}]),
                           ("assistant", HUE))},
        [("user", f"{ASKED}<image>"), ("assistant", HUE)]),
    "parts that take the next image": (
        {"messages": roles(("user", [{"type": "image"}, TEXT]), ("assistant", HUE)),
         "images": ["0.jpg"]},
        [("user", f"<image>{ASKED}"), ("assistant", HUE)]),
    "parts by number": (
        {"messages": roles(("user", [{"index": 0, "type": "image", "text": None},
                                     {"index": None, "type": "text", "text": ASKED}]),
                           ("assistant", [{"index": None, "type": "text", "text": HUE}])),
         "images": ["0.jpg"]},
        [("user", f"<image>{ASKED}"), ("assistant", HUE)]),
    "query and response": (
        {"query": f"<image>{ASKED}", "response": HUE, "images": ["0.jpg"]},
        [("user", f"<image>{ASKED}"), ("assistant", HUE)]),
    "query with history and system": (
        {"query": "And now?", "response": HUE, "history": [[f"<image>{ASKED}", "gold"]],
         "system": "Be short.", "images": ["0.jpg"]},
        [("system", "Be short."), ("user", f"<image>{ASKED}"), ("assistant", "gold"),
         ("user", "And now?"), ("assistant", HUE)]),
    "instruction, input and output": (
        {"instruction": ASKED, "input": "Look closely.", "output": HUE, "image": "0.jpg"},
        [("user", f"{ASKED}\nLook closely."), ("assistant", HUE)]),
    "tags of Qwen-VL": (
        {"conversations": [{"from": "user", "value": f"Picture 1: <img>0.jpg</img>\n{ASKED}"},
                           {"from": "assistant", "value": HUE}]},
        [("user", f"Picture 1: <image>\n{ASKED}"), ("assistant", HUE)]),
    "prompt and completion": (
        {"prompt": roles(("system", "Be short."), ("user", [{"type": "image"}, TEXT])),
         "completion": roles(("assistant", HUE)), "images": ["0.jpg"]},
        [("system", "Be short."), ("user", f"<image>{ASKED}"), ("assistant", HUE)]),
    "prompt and completion as texts": (
        {"prompt": ASKED, "completion": HUE, "images": ["0.jpg"]},
        [("user", ASKED), ("assistant", HUE)]),
    "label of POPE": (
        {"question_id": 1, "image": "0.jpg", "text": ASKED, "label": "yes"},
        [("user", ASKED), ("assistant", "yes")]),
    "an image token in an answer": (
        {"image": "0.jpg", "conversations": said(f"<image>\n{ASKED}", "It writes <image>.")},
        [("user", f"<image>\n{ASKED}"), ("assistant", "It writes <image>.")]),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_a_layout_becomes_these_turns_as_shards_and_in_place(tmp_path, name):
    record, turns = RECORDS[name]
    pictured(tmp_path / "pics")
    records = [json.loads(json.dumps(record).replace("0.jpg", f"{n}.jpg")) for n in range(4)]
    source = put(tmp_path / "s.json", records)
    shards, notes = converted(source, tmp_path / "out", tmp_path / "pics")
    assert [turns_of(members) for members in shards.values()] == [turns] * 4
    assert sorted(members["jpg"] for members in shards.values()) == sorted(map(jpeg, range(4)))
    assert notes == []
    in_place, _ = converted(source, tmp_path / "loose", tmp_path / "pics", in_place=True)
    assert in_place == shards


def test_a_label_that_is_a_number_is_no_answer_and_messages_come_before_a_prompt():
    with pytest.raises(BadSample, match="has no right answer"):
        read_sample({"image": "0.jpg", "text": ASKED, "label": 1})
    both = {
        "messages": said(ASKED),
        "prompt": roles(("user", "x")),
        "completion": roles(("y", "z")),
    }
    assert [turn.text for turn in read_dialogue(read_sample(both).data).turns] == [ASKED, HUE]


QUESTIONS = {
    "choices and a number": {"choices": ["pink", HUE, "gold"], "answer": 1},
    "options and a letter": {"options": ["pink", HUE, "gold"], "answer": "B"},
    "options and the text": {"options": ["pink", HUE, "gold"], "answer": HUE},
    "lettered options": {"options": ["A. pink", "B. teal", "C. gold"], "answer": "(B)"},
    "options as a mapping": {"options": {"A": "pink", "B": HUE, "C": "gold"}, "answer": "B."},
    "options as a text": {"options": "['pink', 'teal', 'gold']", "answer": "B"},
    "options of a key each": {"option_a": "pink", "option_b": HUE, "option_c": "gold",
                              "answer": HUE},
    "A-OKVQA": {"choices": ["pink", HUE, "gold"], "correct_choice_idx": 1},
    "keys of small letters": {"a": "pink", "b": HUE, "c": "gold", "answer": "b"},
    "columns of letters": {"A": "pink", "B": HUE, "C": "gold", "D": "", "answer": "b"},
}  # fmt: skip


@pytest.mark.parametrize("name", QUESTIONS)
@pytest.mark.parametrize("hint", ["", "It is a color."])
def test_options_and_hint_are_asked_as_the_field_asks_them(tmp_path, name, hint):
    pictured(tmp_path / "pics")
    records = [
        {"question": ASKED, "hint": hint, "image": f"{n}.jpg", **QUESTIONS[name]} for n in range(4)
    ]
    source = put(tmp_path / "s.json", records)
    samples, _ = converted(source, tmp_path / "out", tmp_path / "pics")
    lines = [*([hint] if hint else []), ASKED, "A. pink", "B. teal", "C. gold", LETTERS]
    assert [turns_of(members) for members in samples.values()] == [
        [("user", "\n".join(lines)), ("assistant", "B")]
    ] * 4
    in_place, _ = converted(source, tmp_path / "loose", tmp_path / "pics", in_place=True)
    assert in_place == samples


def test_numbered_images_of_a_question_are_in_the_order_in_which_it_shows_them(tmp_path):
    rows = [
        {"question": "Is <image 2> like <image 1>?", "options": "['<image 2>', 'no']",
         "answer": "A", "image_1": hub(n), "image_2": hub(n + 1), "image_3": None}
        for n in range(4)
    ]  # fmt: skip
    table = pyarrow.Table.from_pylist(rows)
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = table.set_column(5, "image_3", pyarrow.nulls(4, image))
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    samples, _ = converted(tmp_path / "t.parquet", tmp_path / "out")
    text = f"Is <image> like <image>?\nA. <image>\nB. no\n{LETTERS}"
    assert {turns_of(members)[0] for members in samples.values()} == {("user", text)}
    shown = sorted(tuple(members[f"{n}.jpg"] for n in range(3)) for members in samples.values())
    assert shown == sorted((jpeg(n + 1), jpeg(n), jpeg(n + 1)) for n in range(4))
    with pytest.raises(BadSample, match="shows the images 3 and it has 1"):
        read_sample({"question": "<image 3>?", "answer": "a", "image": "a.jpg"})


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_tables_of_alpaca_and_of_dialogues_lose_nothing(tmp_path, suffix):
    source = tmp_path / f"t.{suffix}"

    def read(rows):
        if suffix == "csv":
            rows = [{key: str(value) for key, value in row.items()} for row in rows]
            with source.open("w", newline="") as file:
                table = csv.DictWriter(file, list(rows[0]))
                table.writeheader()
                table.writerows(rows)
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source)
        samples, _ = converted(source, tmp_path / f"out{len(rows[0])}")
        return sorted(map(turns_of, samples.values()))

    rows = [{"instruction": ASKED, "input": f"It is {n}.", "output": HUE} for n in range(4)]
    assert read(rows) == [[("user", f"{ASKED}\nIt is {n}."), ("assistant", HUE)] for n in range(4)]
    rows = [{"query": f"And {n}?", "response": HUE, "history": [[ASKED, "gold"]],
             "system": "Be short."} for n in range(4)]  # fmt: skip
    assert read(rows) == [
        [("system", "Be short."), ("user", ASKED), ("assistant", "gold"), ("user", f"And {n}?"),
         ("assistant", HUE)] for n in range(4)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"choices": ["a", "b"], "answer": 2}, "its answer '2' is none of its options A, B"),
        ({"choices": ["1", "2"], "answer": "1"}, "its answer '1' may be A or B of its options"),
        ({"choices": ["B", "A"], "answer": "A"}, "'A' may be A or B"),
        ({"choices": [1, 2], "answer": 1}, "its options and its answer are numbers"),
        ({"choices": ["a", "b"], "answer": ["a", "b"]}, "its answer names 2 options"),
        ({"choices": "a or b", "answer": "a"}, "its options are 'a or b', expected a list"),
        ({"choices": {"x": "a", "y": "b"}, "answer": "a"}, "keys are not the letters"),
        ({"choices": [["a"], "b"], "answer": "b"}, "one of its options is"),
        ({"choices": ["a", "b"], "answer": ""}, "it has no right answer"),
        ({"answer": "a", "videos": ["x.mp4"]}, "it has a video, .* --ignore_columns videos"),
        ({"answer": "a", "audio": "x.wav"}, "it has an audio"),
        ({"answer": "a", "history": ["b"]}, "'history' is not a list of pairs"),
        ({"answer": "a", "id": {"x": 1}}, "its id is .* expected a text or a number"),
        ({"answer": "a", "image": "x.jpg", "images": ["y.jpg"]}, "'image' and 'images' differ"),
        ({"answer": "a", "image": ["x.jpg", None]}, "its 'image' is 'None', expected a path"),
    ],
)
def test_a_question_that_is_not_certain_is_refused(more, sentence):
    with pytest.raises(BadSample, match=sentence):
        read_sample({"question": "Which?", **more})


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"messages": roles(("user", ASKED), ("tool", "x"))}, "turn 1 .* but from 'tool'"),
        ({"messages": roles(("user", ASKED), ("assistant", HUE), ("system", "x"),
                            ("assistant", HUE))}, "turn 2 .* but from 'system'"),
        ({"messages": roles(("user", [{"type": "video", "video": "a.mp4"}]),
                            ("assistant", HUE))}, "a part of type 'video'"),
        ({"messages": roles(("user", ASKED), ("assistant", [{"type": "image", "image": "a.jpg"}]))},
         "shows an image, only questions may"),
        ({"messages": roles(("user", [{"type": "image"}, TEXT]), ("assistant", HUE))},
         "has 1 image tokens .* and it has no image"),
        ({"messages": roles(("user", [{"type": "image"}, {"type": "image", "path": "b.jpg"}]),
                            ("assistant", HUE))}, "shows 2 images and it has 0"),
        ({"messages": roles(("user", [{"type": "image", "image": "a.jpg"}]), ("assistant", HUE)),
          "images": ["b.jpg"]}, "shows 1 images and it lists 1 more"),
        ({"messages": roles(("system", "a"), ("user", ASKED), ("assistant", HUE)), "system": "b"},
         "has 'system' and a system turn"),
        ({"conversations": said("<image><image>"), "images": ["a", "b", "c"]},
         "has 2 image tokens .* and it has 3 images"),
        ({"conversations": said("Where is <bbox>?"), "objects": {"bbox": [[1, 2, 3, 4]]}},
         "its text has <bbox>"),
        ({"conversations": said(ASKED), "images": [["a.jpg"]]}, "expected a path"),
    ],
)  # fmt: skip
def test_a_conversation_that_is_not_understood_is_refused(record, sentence):
    with pytest.raises(BadSample, match=sentence):
        read_sample(record)


@pytest.mark.parametrize(
    "extra",
    [{}, {"image": None}, {"image": []}, {"image": ""}, {"images": [""]},
     {"image": {"bytes": None, "path": None}}],
)  # fmt: skip
def test_however_it_is_marked_a_record_may_have_no_image(extra):
    assert read_sample({"conversations": said(ASKED), **extra}).images == ()


@pytest.mark.parametrize("stated", [3, "b7a1-uuid", 2.5, "id/é"])
def test_ids_are_texts_or_numbers(stated):
    assert read_sample({"conversations": said(ASKED), "id": stated}).name == str(stated)


@pytest.mark.parametrize(
    ("key", "value"),
    [("choices", ["a", "b"]), ("hint", "x"), ("tools", [{"name": "f"}]), ("rejected", "no")],
)
def test_a_key_that_looks_meaningful_is_refused_unless_ignored(tmp_path, key, value):
    records = [{"conversations": said(f"{ASKED} {n}"), key: value} for n in range(4)]
    source = put(tmp_path / "s.json", records)
    with pytest.raises(
        ValueError, match=f"records with the key '{key}', .* --ignore_columns {key}"
    ):
        converted(source, tmp_path / "out")
    samples, notes = converted(source, tmp_path / "out", ignore_columns=(key,))
    assert (len(samples), notes) == (4, [])


def test_what_is_dropped_of_llava_records_is_listed_once_and_an_idle_option_is_named(tmp_path):
    records = [{"conversations": said(f"{ASKED} {n}"), "model": "x", "empty": ""} for n in range(4)]
    source = put(tmp_path / "s.json", records)
    _, notes = converted(source, tmp_path / "out", ignore_columns=("modle",))
    assert notes == [
        "--ignore_columns names modle, which s.json does not have", "not used of s.json: model",
    ]  # fmt: skip


def test_a_system_prompt_can_be_ignored_but_not_in_place(tmp_path):
    records = [{"conversations": said(f"{ASKED} {n}"), "system": "Be short."} for n in range(4)]
    source = put(tmp_path / "s.json", records)
    samples, _ = converted(source, tmp_path / "out", ignore_columns=("system",))
    assert {turns_of(members)[0][0] for members in samples.values()} == {"user"}
    with pytest.raises(ValueError, match="names system, and --in_place reads records as they are"):
        converted(source, tmp_path / "loose", in_place=True, ignore_columns=("system",))


# Tables


def tsv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        table.writeheader()
        table.writerows(rows)
    return path


def bench_row(number, **more):
    options = {"A": "teal", "B": "pink", "C": "gold", "D": ""}
    about = {"answer": "ABC"[number % 3], "category": "hue", "l2-category": "color"}
    row = {"index": number, "question": ASKED, "hint": "nan", **options, **about}
    return {**row, **more}


def big(number):
    """An image file of more than 131,072 bytes, the limit of a cell in csv by default."""
    return jpeg(number) + bytes(140_000) + b"\xff\xd9"


def test_a_benchmark_table_has_images_in_base64_also_by_the_row_that_has_them(tmp_path):
    rows = [bench_row(n, image=base64.b64encode(big(n)).decode()) for n in range(3)]
    rows += [bench_row(n, image=str(n - 3), question="And this?") for n in range(3, 6)]
    samples, notes = converted(tsv(tmp_path / "b.tsv", rows), tmp_path / "out")
    assert sorted(members["jpg"] for members in samples.values()) == sorted(
        [*map(big, range(3)), *map(big, range(3))]
    )
    options = "A. teal\nB. pink\nC. gold"
    texts = {turns_of(members)[0][1] for members in samples.values()}
    assert texts == {f"{asked}\n{options}\n{LETTERS}" for asked in (ASKED, "And this?")}
    assert sorted(turns_of(members)[1][1] for members in samples.values()) == list("AABBCC")
    assert notes == ["not used of b.tsv: index, category, l2-category"]


def test_a_benchmark_table_of_paths_and_one_of_yes_and_no(tmp_path):
    pictured(tmp_path / "pics")
    rows = [bench_row(n, image_path=f"{n}.jpg") for n in range(6)]
    samples, _ = converted(tsv(tmp_path / "b.tsv", rows), tmp_path / "out", tmp_path / "pics")
    assert sorted(members["jpg"] for members in samples.values()) == sorted(map(jpeg, range(6)))
    keys = ("index", "question", "category", "answer")
    rows = [
        {**{key: bench_row(n)[key] for key in keys}, "answer": "Yes",
         "image": base64.b64encode(jpeg(n)).decode(), "image_path": f"x/{n}.jpg"} for n in range(6)
    ]  # fmt: skip
    samples, notes = converted(tsv(tmp_path / "mme.tsv", rows), tmp_path / "mme")
    assert {tuple(turns_of(members)) for members in samples.values()} == {
        (("user", ASKED), ("assistant", "Yes"))
    }
    assert sorted(members["jpg"] for members in samples.values()) == sorted(map(jpeg, range(6)))
    assert notes == ["not used of mme.tsv: index, category, image_path"]


def test_a_list_of_images_in_a_cell_is_several_images(tmp_path):
    encoded = [base64.b64encode(jpeg(n)).decode() for n in range(5)]
    rows = [
        {"index": n, "image": str(encoded[n : n + 2]), "image_path": f"['{n}.jpg', 'x.jpg']",
         "question": ASKED, "answer": "a"} for n in range(4)
    ]  # fmt: skip
    samples, _ = converted(tsv(tmp_path / "b.tsv", rows), tmp_path / "out")
    found = sorted((members["0.jpg"], members["1.jpg"]) for members in samples.values())
    assert found == sorted((jpeg(n), jpeg(n + 1)) for n in range(4))


@pytest.mark.parametrize("column", ["video", "image_url", "tools"])
def test_a_column_that_looks_meaningful_to_a_question_is_refused(tmp_path, column):
    rows = [{"question": ASKED, "answer": str(n), column: "x"} for n in range(4)]
    with pytest.raises(ValueError, match=f"{column}.*--ignore_columns {column}"):
        converted(tsv(tmp_path / "t.tsv", rows), tmp_path / "out")
    samples, _ = converted(tmp_path / "t.tsv", tmp_path / "out", ignore_columns=(column,))
    assert len(samples) == 4


def hub(number):
    return {"bytes": jpeg(number), "path": f"{number}.jpg"}


PARQUET = {
    "conversations": lambda n: {"id": str(n), "conversations": said(f"<image>\n{ASKED}"),
                                "data_source": "own", "image": hub(n)},
    "texts": lambda n: {"images": [hub(n)],
                        "texts": [{"user": ASKED, "assistant": HUE, "source": "own"}]},
    "messages": lambda n: {"messages": roles(("user", f"<image>{ASKED}"), ("assistant", HUE)),
                           "images": [hub(n)]},
    "parts": lambda n: {"messages": roles(
        ("user", [{"index": 0, "text": None, "type": "image"},
                  {"index": None, "text": ASKED, "type": "text"}]),
        ("assistant", [{"index": None, "text": HUE, "type": "text"}])), "images": [hub(n)]},
    "a path": lambda n: {"messages": roles(("user", ASKED), ("assistant", HUE)),
                         "image": f"pics/{n}.jpg"},
    "bytes": lambda n: {"conversations": roles(("user", ASKED), ("assistant", HUE)),
                        "image": jpeg(n)},
}  # fmt: skip


@pytest.mark.parametrize("name", PARQUET)
def test_parquet_of_conversations_is_read(tmp_path, name):
    pictured(tmp_path / "pics")
    rows = [PARQUET[name](n) for n in range(4)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    samples, _ = converted(tmp_path / "t.parquet", tmp_path / "out")
    assert sorted(members["jpg"] for members in samples.values()) == sorted(map(jpeg, range(4)))
    for members in samples.values():
        (role, text), answer = turns_of(members)
        assert (role, text.replace("<image>", "").strip()) == ("user", ASKED)
        assert answer == ("assistant", HUE)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_conversations_of_text_alone_and_as_json_in_a_cell_are_read(tmp_path, suffix):
    source = tmp_path / f"t.{suffix}"
    turns = [roles(("system", "Be short."), ("user", f"{ASKED} {n}"), ("assistant", HUE))
             for n in range(4)]  # fmt: skip
    if suffix == "csv":
        with source.open("w", newline="") as file:
            csv.writer(file).writerows([["messages"], *([json.dumps(own)] for own in turns)])
    else:
        pyarrow.parquet.write_table(pyarrow.table({"messages": turns}), source)
    samples, _ = converted(source, tmp_path / "out")
    assert sorted(map(turns_of, samples.values())) == [
        [("system", "Be short."), ("user", f"{ASKED} {n}"), ("assistant", HUE)] for n in range(4)
    ]


def test_scienceqa_is_one_task_of_questions_with_and_without_images(tmp_path):
    rows = [
        {"image": hub(n) if n % 2 else None, "question": ASKED, "choices": ["pink", "teal"],
         "answer": n % 2, "hint": "It is a color." if n % 2 else "", "task": "closed choice",
         "grade": "g2", "subject": "art", "category": "hue", "skill": "x", "lecture": "y",
         "solution": "z", "split": "train" if n else "test"}
        for n in range(4)
    ]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    samples, notes = converted(tmp_path / "t.parquet", tmp_path / "out")
    assert [("jpg" in members, *turns_of(members)[1]) for members in samples.values()] == [
        (True, "assistant", "B"), (False, "assistant", "A"), (True, "assistant", "B"),
        (False, "assistant", "A"),
    ]  # fmt: skip
    unused = "task, grade, subject, category, skill, lecture, solution"
    assert notes[0] == f"not used of t.parquet: {unused}"
    assert "3 train samples are trained on, 1 test samples are the test samples" in notes[1]


def test_problems_of_scienceqa_are_read_by_their_ids_and_splits(tmp_path):
    problems = {}
    for number in range(6):
        split = "train" if number < 4 else "test"
        problem = {"question": ASKED, "choices": ["pink", "teal"], "answer": number % 2,
                   "hint": "", "image": None, "task": "closed choice", "lecture": "y",
                   "solution": "{z}, \"", "split": split}  # fmt: skip
        if number % 2:
            put(tmp_path / "images" / split / str(number) / "image.png", jpeg(number))
            problem["image"] = "image.png"
        problems[str(number)] = problem
    source = put(tmp_path / "problems.json", json.dumps(problems, indent=1))
    samples, notes = converted(source, tmp_path / "out", tmp_path / "images")
    assert {
        key: (members.get("jpg"), turns_of(members)[1][1]) for key, members in samples.items()
    } == {
        f"mine-{'train' if n < 4 else 'test'}-{n:07d}-{n}": (
            jpeg(n) if n % 2 else None,
            "AB"[n % 2],
        )
        for n in range(6)
    }
    assert "not used of problems.json: id, task, lecture, solution" in notes
    in_place, _ = converted(source, tmp_path / "loose", tmp_path / "images", in_place=True)
    assert in_place == samples


def test_a_mapping_that_holds_no_records_is_one_record(tmp_path):
    source = put(tmp_path / "s.json", {"info": {"a": 1}, "rows": [1, 2]})
    with pytest.raises(ValueError, match="has the columns info, rows"):
        converted(source, tmp_path / "out")


def test_other_names_of_an_image_beside_it_are_only_listed(tmp_path):
    pictured(tmp_path)
    records = [{"image": f"{n}.jpg", "image_url": "https://a.b", "conversations": said(ASKED)}
               for n in range(4)]  # fmt: skip
    _, notes = converted(put(tmp_path / "s.json", records), tmp_path / "out")
    assert notes == ["s.json, 4 samples: 'image_url' is not used, they have images"]


def test_numbered_columns_of_captions_are_a_list(tmp_path):
    pictured(tmp_path)
    rows = [{"image": f"{n}.jpg", "caption_1": f"b{n}", "caption_0": f"a{n}", "caption_10": ""}
            for n in range(4)]  # fmt: skip
    samples, _ = converted(tsv(tmp_path / "t.tsv", rows), tmp_path / "out")
    assert sorted(json.loads(members["json"])["captions"] for members in samples.values()) == [
        [f"a{n}", f"b{n}"] for n in range(4)
    ]


def test_a_folder_of_tables_is_read_by_its_splits(tmp_path):
    pictured(tmp_path / "set" / "images")
    for split, numbers in (("train", range(4)), ("test", range(4, 6))):
        rows = [{"path": f"images/{n}.jpg", "text": f"number {n}"} for n in numbers]
        tsv(tmp_path / "set" / f"{split}.tsv", rows)
    card, _ = convert(open_input(tmp_path / "set"), None, tmp_path / "out", ConvertOptions("mine"))
    task = yaml.safe_load(card.read_text())["tasks"][0]
    assert (task["size"], task["test_size"], card.name) == (4, 2, "mine.yaml")
    tsv(tmp_path / "set" / "val.tsv", [{"path": "images/0.jpg", "label": "x"}])
    with pytest.raises(ValueError, match="has other columns than"):
        open_input(tmp_path / "set")


def test_linked_folders_are_followed_only_if_the_option_is_given(tmp_path):
    pictured(tmp_path / "elsewhere")
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics" / "linked").symlink_to(tmp_path / "elsewhere")
    records = [{"image": f"linked/{n}.jpg", "conversations": said(ASKED)} for n in range(4)]
    source = put(tmp_path / "s.json", records)
    with pytest.raises(ValueError, match=r"leads outside .*--follow_links"):
        converted(source, tmp_path / "out", tmp_path / "pics")
    samples, _ = converted(source, tmp_path / "out", tmp_path / "pics", follow_links=True)
    assert sorted(members["jpg"] for members in samples.values()) == sorted(map(jpeg, range(4)))
    in_place, _ = converted(
        source, tmp_path / "loose", tmp_path / "pics", in_place=True, follow_links=True
    )
    assert in_place == samples
    records[0]["image"] = "../elsewhere/0.jpg"
    put(source, records)
    with pytest.raises(ValueError, match="leads outside"):
        converted(source, tmp_path / "dots", tmp_path / "pics", follow_links=True)


def test_images_in_addresses_of_data_are_read_and_others_refused(tmp_path):
    def record(address):
        part = {"type": "image_url", "image_url": {"url": address}}
        return {"messages": roles(("user", [part, TEXT]), ("assistant", HUE))}

    address = "data:image/jpeg;base64,"
    encoded = [address + base64.b64encode(jpeg(n)).decode() for n in range(4)]
    source = put(tmp_path / "s.json", list(map(record, encoded)))
    samples, _ = converted(source, tmp_path / "out")
    assert sorted(members["jpg"] for members in samples.values()) == sorted(map(jpeg, range(4)))
    text = source.read_text()
    for wrong, sentence in (("data:text/plain,x", "expected data:image"),
                            ("https://a.b/c.jpg", "is remote")):  # fmt: skip
        source.write_text(text.replace(encoded[0], wrong))
        with pytest.raises(ValueError, match=sentence):
            converted(source, tmp_path / "wrong")
