"""Names of classes in prompts: from a file, known for WordNet ids, remarked on, and told apart."""

import json

import pytest
import torch
import yaml
from open_clip import IMAGENET_CLASSNAMES
from timm.data import ImageNetInfo

from mmcl.core import TaskStream
from mmcl.core.card import validate_card
from mmcl.data.convert.class_names import is_readable, naming_remark, read_class_names
from mmcl.data.convert.convert import convert, open_input
from mmcl.data.convert.record import ConvertOptions
from mmcl.data.validate.validate import check_stream
from mmcl.evaluation.evaluators import make_eval_spec
from mmcl.models.open_clip.wordnet_names import wordnet_names
from tests.data.convert.llava_files import jpeg, put
from tests.data.convert.test_convert import class_folders, contents, parquet

IDS = ["n01440764", "n02012849", "n03126707"]
NAMES = ["tench", "crane", "crane"]


@pytest.mark.parametrize(
    "name",
    ["n01440764", "001.Black_footed_Albatross", "American_Crow", "class_12", "class 3", "7", "3.0",
     "AnnualCrop", "label12", "12-daisy"],
)  # fmt: skip
def test_names_that_no_caption_has_are_remarked_on(name):
    assert not is_readable(name)
    remark = naming_remark(["dog", name], "a photo of a {}.")
    assert remark.startswith(f"remark: 1 of 2 class names are as no caption has them ('{name}')")
    assert f'"a photo of a {name}."' in remark
    assert "--class_names FILE" in remark


def test_good_names_are_not_remarked_on():
    good = ["dog", "great white shark", "iPod", "T-shirt", "Audi A5 Coupe 2012", "jack-o'-lantern"]
    assert naming_remark(good, "{}") == ""
    assert all(map(is_readable, IMAGENET_CLASSNAMES))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("n.txt", "tench\ncrane\ncrane\n"),
        ("n.txt", "n02012849\tcrane\nn03126707\tcrane\nn01440764\ttench\n"),
        ("n.txt", "n01440764 tench\nn02012849 crane\nn03126707 crane\nn00000001 no, such\n"),
        ("n.csv", "n01440764,tench\nn02012849,crane\nn03126707,crane\n"),
        ("n.csv", "id,class_name,more\nn01440764,tench,1\nn02012849,crane,2\nn03126707,crane,3\n"),
        ("n.csv", "name;wnid\ntench;n01440764\ncrane;n02012849\ncrane;n03126707\n"),
        ("n.json", dict(zip(IDS, NAMES, strict=True))),
        ("n.json", {str(n): [IDS[n], NAMES[n]] for n in range(3)}),
        ("n.json", NAMES),
        ("n.json", [list(pair) for pair in zip(IDS, NAMES, strict=True)]),
        ("n.json", {"id2label": dict(zip(IDS, NAMES, strict=True))}),
    ],
)
def test_a_file_of_class_names_is_read_in_the_usual_forms(tmp_path, name, content):
    found, notes = read_class_names(put(tmp_path / name, content), IDS)
    assert found == dict(zip(IDS, NAMES, strict=True))
    assert len(notes) == ("n00000001" in str(content))


@pytest.mark.parametrize(
    ("content", "classes"),
    [("a\nb\nc\nd\n", ["0", "2", "3"]), ("a\nb\nc\nd\n", ["1", "3", "4"])],
)
def test_numbered_classes_are_named_by_number(tmp_path, content, classes):
    found, _ = read_class_names(put(tmp_path / "n.txt", content), classes)
    assert list(found) == classes
    assert list(found.values()) == ["a", "c", "d"]
    found, _ = read_class_names(put(tmp_path / "n.json", {"a": 0, "c": 2, "d": 3}), ["0", "2", "3"])
    assert found == {"0": "a", "2": "c", "3": "d"}


def test_names_that_spell_the_classes_are_found_in_any_order(tmp_path):
    classes = ["American_Crow", "cat", "great-white-shark"]
    file = put(tmp_path / "n.txt", "great white shark\nAmerican crow\ncat\n")
    found, _ = read_class_names(file, classes)
    assert found == dict(zip(classes, ["American crow", "cat", "great white shark"], strict=True))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("n.txt", "n01440764 tench\n", "no name for 2 of 3 classes .'n02012849', 'n03126707'."),
        ("n.txt", "a\nb\n", "has 2 names and there are 3 classes"),
        ("n.json", {"n01440764": {"x": 1}}, "in no known form"),
        ("n.json", "{", "cannot be read as UTF-8 or JSON"),
        ("n.txt", b"\xff", "cannot be read as UTF-8"),
    ],
)
def test_a_file_that_does_not_name_the_classes_is_refused(tmp_path, name, content, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_class_names(put(tmp_path / name, content), IDS)
    with pytest.raises(FileNotFoundError, match="correct --class_names"):
        read_class_names(tmp_path / "none", IDS)


def test_wordnet_ids_of_imagenet_have_the_names_of_open_clip():
    info = ImageNetInfo()
    ids = info.label_names()
    assert ids == sorted(ids)  # the order of torchvision's ImageFolder and of the logits
    assert wordnet_names(ids) == dict(zip(ids, IMAGENET_CLASSNAMES, strict=True))
    # Both lists are in one order: nearly all names share a word with WordNet's, shifted ones not.
    lemmas = [set(info.index_to_description(n).lower().split()) for n in range(1000)]
    lemmas = [{word.strip(",") for word in words} for words in lemmas]
    words = [set(name.lower().split()) for name in IMAGENET_CLASSNAMES]
    assert sum(bool(a & b) for a, b in zip(words, lemmas, strict=True)) > 900
    assert sum(bool(a & b) for a, b in zip(words, lemmas[1:], strict=False)) < 300
    assert wordnet_names(["n00005787", "n99999999", "dog"]) == {"n00005787": "benthos"}


def converted(tmp_path, **options):
    class_folders(tmp_path / "set", dict.fromkeys(IDS, 4))
    look_up = options.pop("look_up", lambda _: {})
    return convert(
        open_input(tmp_path / "set"), None, tmp_path / "out",
        ConvertOptions("mine", classes_per_task=2, **options), look_up=look_up,
    )  # fmt: skip


def test_classes_stay_ids_and_have_names_in_prompts_told_apart_elsewhere(tmp_path):
    names = put(tmp_path / "names.txt", "\n".join(NAMES))
    path, _ = converted(tmp_path, class_names=names)
    card = yaml.safe_load(path.read_text())
    assert card["classes"] == IDS
    assert card["class_names"] == dict(zip(IDS, NAMES, strict=True))
    stream = TaskStream.read(path)
    assert stream.classes_seen(1) == tuple(IDS)
    spec = make_eval_spec(stream, 2, 0)
    assert spec.prompt_names == ("tench", "crane", "crane")
    assert spec.names == ("tench (n01440764)", "crane (n02012849)", "crane (n03126707)")

    class Model(torch.nn.Module):
        def set_classes(self, names, templates, tasks=()):
            self.names = names

    from mmcl.evaluation.evaluators import make_evaluator

    model = Model()
    make_evaluator(spec).reset(model)
    assert model.names == ("tench", "crane", "crane")


def test_names_may_be_edited_on_the_card_and_the_shards_stay(tmp_path):
    path, _ = converted(tmp_path, look_up=wordnet_names)
    before = {name: data for name, data in contents(tmp_path / "out").items() if ".tar" in name}
    card = yaml.safe_load(path.read_text())
    assert card["class_names"]["n02012849"] == "crane bird"
    path.write_text(path.read_text().replace("crane bird", "common crane"))
    again, result = converted(tmp_path, look_up=wordnet_names)
    assert yaml.safe_load(again.read_text())["class_names"]["n02012849"] == "common crane"
    after = {name: data for name, data in contents(tmp_path / "out").items() if ".tar" in name}
    assert after == before
    assert "3 WordNet ids are named in prompts ('n01440764': tench)" in result.notes
    assert not any("remark" in note for note in result.notes)


def test_two_labels_of_one_name_in_a_table_are_two_classes(tmp_path):
    names = ["ant", "crane", "bee", "crane"]
    columns = {"image": [jpeg(n) for n in range(12)], "label": [n % 4 for n in range(12)]}
    source = parquet(tmp_path / "t.parquet", columns, names)
    path, _ = convert(
        open_input(source), None, tmp_path / "out", ConvertOptions("mine", test_fraction=0.3)
    )
    card = yaml.safe_load(path.read_text())
    assert card["classes"] == ["ant", "1", "bee", "3"]
    assert card["class_names"] == {"1": "crane", "3": "crane"}
    stream = TaskStream.read(path)
    assert stream.display_names(stream[0].classes) == ("ant", "crane (1)", "bee", "crane (3)")


def test_validate_remarks_on_names_that_no_caption_has(tmp_path):
    path, _ = converted(tmp_path)
    findings = check_stream(path)
    (remark,) = [line for line in findings.warnings if line.startswith("remark")]
    assert "3 of 3 class names" in remark
    assert "a photo of a n01440764." in remark
    path.write_text(
        path.read_text() + "class_names: {n01440764: tench, n02012849: a, n03126707: b}\n"
    )
    findings = check_stream(path)
    assert not any(line.startswith("remark") for line in findings.warnings)
    assert findings.errors == ()


def test_class_names_of_no_class_are_an_error_of_the_card(tmp_path):
    path, _ = converted(tmp_path)
    path.write_text(path.read_text() + "class_names: {n09999999: x, n01440764: 3}\n")
    _, errors = validate_card(path)
    assert any("class_names for ['n09999999'], which are none of its" in line for line in errors)
    assert any("class_names" in line and "3" in line for line in errors)


def test_a_file_of_class_names_is_refused_without_classes(tmp_path):
    put(tmp_path / "0.jpg", jpeg(0))
    put(tmp_path / "t.csv", "path,text\n0.jpg,x\n")
    options = ConvertOptions("mine", class_names=put(tmp_path / "n.json", json.dumps({})))
    with pytest.raises(ValueError, match="--class_names names classes, and .* is captioning"):
        convert(open_input(tmp_path / "t.csv"), None, tmp_path / "out", options)
