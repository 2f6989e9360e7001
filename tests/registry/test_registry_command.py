"""``mmcl registry`` and ``mmcl upgrade check``, and heads in closed form."""

import json

import pytest

from mmcl.evaluation import AccuracyMatrix
from mmcl.registry.records import Registry
from mmcl.registry.sources import model_config

pytestmark = pytest.mark.slow


def folder(consumer):
    return ["--registry", str(consumer.folder / "registry")]


def add(consumer, what, source, name, *more):
    return consumer.give("registry", "add", what, source, "--id", name, *more, *folder(consumer))


def test_bases_and_adapters_are_added_listed_and_shown(tuned):
    old, newer = tuned.runs.path("old"), tuned.runs.path("next")
    assert add(tuned, "base", f"{old}@0", "v1", "--stage", "cpt")[0] == 0
    assert add(tuned, "base", newer, "v2", "--parent", "v1")[0] == 0
    status, output = add(tuned, "adapter", f"{old}@task-a", "consumer")
    assert status == 0
    assert "not registered" not in output
    _, output = tuned.give("registry", "list", *folder(tuned))
    assert output.index("v1") < output.index("v2") < output.index("consumer")
    assert "weight_delta" in output
    status, output = tuned.give("registry", "show", "consumer", *folder(tuned))
    assert "registered base: v1" in output
    matrix = AccuracyMatrix.read(old / "matrix.json")
    assert f"evaluation.task-a: {matrix.values[1][0]}" in output


def test_an_adapter_of_an_unknown_base_is_added_and_said_to_be_one(adapted):
    status, output = add(adapted, "adapter", f"{adapted.runs.path('old')}@2", "consumer")
    assert status == 0
    assert "is not registered" in output
    record = Registry(adapted.folder / "registry").adapters()[0]
    assert (record.kind, record.rank, record.task) == ("lora", 2, "task-b")
    assert all(name.endswith("_proj.weight") for name in record.targets)


def test_options_of_the_other_kind_of_record_are_refused(tuned):
    status, output = add(tuned, "adapter", tuned.runs.path("old"), "a", "--parent", "v1")
    assert (status, "--parent is of bases" in output) == (2, True)
    status, output = add(tuned, "base", "tiny:built-in", "b", "--from", "x")
    assert (status, "--from is of adapters" in output) == (2, True)


def test_a_state_before_training_is_no_adapter(tuned):
    status, output = add(tuned, "adapter", f"{tuned.runs.path('old')}@0", "a")
    assert status == 1
    assert "is before training, where there is no adapter" in output


def check(consumer, base, *more):
    adapter = f"{consumer.runs.path('old')}@task-a"
    return consumer.give("upgrade", "check", adapter, "--to", base, *folder(consumer), *more)


@pytest.mark.parametrize("kind", ["tuned", "adapted"])
def test_an_adapter_that_fits_is_scored_with_the_next_base(kind, request):
    consumer = request.getfixturevalue(kind)
    status, output = check(consumer, consumer.runs.path("next"), "--data", consumer.runs.card)
    assert status == 0, output
    assert output.count("ok ") >= 3
    assert "differs" not in output
    assert "scores, %: old base and adapter" in output


def test_an_adapter_that_does_not_fit_has_a_status_of_its_own(tuned):
    status, output = check(tuned, "tiny:built-in")
    assert status == 5
    assert "differs shapes: 'ln_final.bias' is (16,) in the old base and (128,)" in output
    assert "ok tokenizer" in output
    assert "differs processor" in output
    assert "the adapter does not fit" in output


def test_an_id_of_the_registry_names_base_and_adapter(tuned):
    old, newer = tuned.runs.path("old"), tuned.runs.path("next")
    add(tuned, "base", newer, "v2")
    add(tuned, "adapter", f"{old}@task-a", "consumer")
    status, output = tuned.give("upgrade", "check", "consumer", "--to", "v2", *folder(tuned))
    assert status == 0, output
    status, output = tuned.give("upgrade", "check", "v2", "--to", "v2", *folder(tuned))
    assert "'v2' is a base" in output
    status, output = tuned.give("upgrade", "check", "consumer", "--to", "consumer", *folder(tuned))
    assert "'consumer' is an adapter" in output


def test_a_head_is_solved_again_from_features_of_the_next_base(tuned):
    if not tuned.runs.path("head").exists():
        tuned.runs.finish("head", "NCM", data__task_order="[0,1]")
    words = ["recycle", tuned.runs.path("head"), "--to", tuned.runs.path("next"), *folder(tuned),
             "--out", tuned.folder / "out"]  # fmt: skip
    status, output = tuned.give(*words, "--mode", "init")
    assert (status, "which no gradient trains" in output) == (1, True)
    status, output = tuned.give(*words, "--mode", "direct")
    assert (status, "give --data with the card of its training data" in output) == (1, True)
    status, output = tuned.give(*words, "--mode", "direct", "--data", tuned.runs.card)
    assert status == 0, output
    assert "next base and head" in output
    run = tuned.folder / "out" / "run"
    # a run on the exported base, made by hand, ends with the same matrix
    base = {"class_path": "mmcl.models.OpenCLIP",
            "init_args": {"model": str(tuned.folder / "out" / "base")}}  # fmt: skip
    model, tuned.runs.model = tuned.runs.model, base
    try:
        tuned.runs.finish("by-hand", "NCM", data__task_order="[0,1]")
    finally:
        tuned.runs.model = model
    own = json.loads((run / "matrix.json").read_text())
    assert (
        own["values"]
        == json.loads((tuned.runs.path("by-hand") / "matrix.json").read_text())["values"]
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tiny:built-in", {"model": "tiny", "pretrained": "built-in"}),
        ("ViT-B-32:openai", {"model": "ViT-B-32", "pretrained": "openai"}),
        ("hf-hub:a/b", {"model": "hf-hub:a/b", "pretrained": None}),
        ("tiny-llava", {"model": "tiny-llava"}),
        ("llava-hf/llava-1.5-7b-hf", {"model": "llava-hf/llava-1.5-7b-hf"}),
    ],
)
def test_a_base_is_named_as_models_are(text, expected, tmp_path):
    assert model_config(text, Registry(tmp_path), None)["init_args"] == expected


def test_settings_of_use_are_kept_for_the_next_base(tmp_path):
    like = {"class_path": "mmcl.models.ImageTextToText",
            "init_args": {"model": "tiny-llava", "max_length": 64, "seed": 3}}  # fmt: skip
    made = model_config("owner/name", Registry(tmp_path), like)["init_args"]
    assert made == {"model": "owner/name", "max_length": 64, "image_aspect_ratio": "pad"}
