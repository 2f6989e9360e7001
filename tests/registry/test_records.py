"""Records of bases and adapters: written once, read strictly, listed as a tree."""

import json

import pytest

from mmcl.registry.records import MAX_RECORD_BYTES, AdapterRecord, BaseRecord, Registry, Signature

SIGNATURE = Signature("a" * 64, "b" * 64, "c" * 64)


def base(name, letter="0", **more):
    return BaseRecord(name, letter * 64, "tiny:built-in", "mmcl.models.OpenCLIP", SIGNATURE, **more)


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "registry")


def test_a_record_is_read_as_it_was_written(registry):
    first = base("v1", stage="cpt", evaluation={"digits": 0.5})
    adapter = AdapterRecord("radiology", "0" * 64, "lora", "runs/a@2", ("q.weight",), 8, "findings")
    registry.add(first)
    registry.add(adapter)
    assert registry.bases() == [first]
    assert registry.adapters() == [adapter]
    assert registry.base_of(adapter) == first
    assert registry.find("v1") == first
    assert registry.find("v2") is None


def test_bases_are_listed_below_their_parents(registry):
    for name, letter, parent in (
        ("v2", "2", ""),
        ("v3", "3", "v2"),
        ("a1", "1", "v3"),
        ("b", "4", ""),
    ):
        registry.add(base(name, letter, parent=parent))
    assert [(depth, one.id) for depth, one in registry.tree()] == [
        (0, "b"), (0, "v2"), (1, "v3"), (2, "a1"),
    ]  # fmt: skip


def test_an_id_is_taken_once_for_bases_and_adapters(registry):
    registry.add(base("v1"))
    with pytest.raises(ValueError, match="the id 'v1' is taken"):
        registry.add(AdapterRecord("v1", "0" * 64, "lora", "runs/a@1"))


def test_a_parent_has_to_be_registered(registry):
    with pytest.raises(ValueError, match=r"there is no base 'v0' .*bases: none"):
        registry.add(base("v1", parent="v0"))


@pytest.mark.parametrize("name", ["", "../v1", "a/b", ".hidden", "x" * 101, "a b"])
def test_an_id_is_a_plain_file_name(name):
    with pytest.raises(ValueError, match="letters, digits, dots"):
        base(name)


def test_a_fingerprint_is_a_hash():
    with pytest.raises(ValueError, match="expected 64 hex digits"):
        base("v1", "z")


def edited(registry, **changes):
    file = registry.add(base("v1"))
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}))
    return file


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pickle": 1}, "pickle"),
        ({"stage": "rlhf"}, "stage"),
        ({"evaluation": {"digits": "good"}}, "evaluation"),
        ({"id": "v2"}, "expected 'v1', the file's name"),
        ({"signature": {"shapes": "a"}}, "signature"),
    ],
)
def test_a_record_of_another_form_is_refused_by_its_key(registry, changes, words):
    edited(registry, **changes)
    with pytest.raises(ValueError, match=words):
        registry.bases()


def test_a_record_is_bounded(registry):
    file = registry.add(base("v1"))
    file.write_text(" " * (MAX_RECORD_BYTES + 1))
    with pytest.raises(ValueError, match="at most 1048576 are read"):
        registry.bases()


def test_a_circle_of_parents_is_named(registry):
    registry.add(base("v1"))
    registry.add(base("v2", "2", parent="v1"))
    file = registry.folder / "bases" / "v1.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "parent": "v2"}))
    with pytest.raises(ValueError, match="parents of v1, v2 .* form a circle"):
        registry.tree()


def test_an_empty_registry_has_no_records(registry):
    assert [registry.bases(), registry.adapters(), registry.tree()] == [[], [], []]
