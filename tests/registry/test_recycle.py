"""An adapter is moved to the next base: as it is, as start, as teacher; killed and resumed."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mmcl.lightning.config.run_reference import RunReference
from mmcl.registry.learning_curve import CurvePoint, LearningCurve
from mmcl.registry.records import Registry
from mmcl.registry.recycle import add_delta
from mmcl.registry.signatures import base_weights
from mmcl.registry.sources import build_module, find_adapter, lora_config, model_config
from tests.behaviour.kill_runs import KILLED, command, in_process
from tests.lightning.small_runs import same

pytestmark = pytest.mark.slow


def results(consumer, out):
    return json.loads((consumer.folder / out / "recycle.json").read_text())


def state(consumer, name):
    text = f"{consumer.runs.path(name.partition('@')[0])}@{name.partition('@')[2]}"
    return base_weights(RunReference.parse(text).load().model)


def matrix(folder):
    return json.loads((folder / "matrix.json").read_text())["values"]


def test_a_weight_delta_is_added_to_each_weight(tuned):
    assert tuned.give(*tuned.words("direct", "out"))[0] == 0
    moved = load_file(tuned.folder / "out" / "start" / "open_clip_model.safetensors")
    old, new, after = state(tuned, "old@0"), state(tuned, "next@1"), state(tuned, "old@1")
    assert sum(not torch.equal(old[name], after[name]) for name in old) > 10
    for name, value in moved.items():
        expected = new[name].double() + after[name].double() - old[name].double()
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6)
    scores = results(tuned, "out")["scores"]
    assert all(isinstance(scores[name], float) for name in ("old", "bare", "direct"))


def test_direct_on_the_same_base_is_the_tuned_model(tuned):
    assert tuned.give(*tuned.words("direct", "out", base="old@0"))[0] == 0
    moved = load_file(tuned.folder / "out" / "start" / "open_clip_model.safetensors")
    after = state(tuned, "old@1")
    for name, value in moved.items():
        torch.testing.assert_close(value, after[name], rtol=1e-7, atol=0)
    scores = results(tuned, "out")["scores"]
    assert scores["direct"] == scores["old"]


def test_a_lora_adapter_on_the_same_base_is_the_same_to_the_bit(adapted):
    status, output = adapted.give(*adapted.words("direct", "out", base="old@0"))
    assert status == 0, output
    config = yaml.safe_load((adapted.runs.path("old") / "config.yaml").read_text())["model"][
        "model"
    ]
    base = model_config(str(adapted.folder / "out" / "base"), Registry(adapted.folder), config)
    adapter = str(adapted.folder / "out" / "adapter")
    moved = build_module(base, lora_config(adapter=adapter)).model.state_dict()
    reference = RunReference.parse(f"{adapted.runs.path('old')}@1").load().model.state_dict()
    assert sum("lora_" in name and bool(value.any()) for name, value in moved.items()) > 4
    assert same(dict(moved), dict(reference))
    scores = results(adapted, "out")["scores"]
    assert scores["direct"] == scores["old"]


def test_the_base_of_an_adapter_is_the_state_that_its_run_started_from(tuned):
    start = f"{tuned.runs.path('next')}@1"
    tuned.runs.finish("started", "Finetune", data__task_order="[0]", start_from=start)
    adapter = find_adapter(f"{tuned.runs.path('started')}@1", Registry(tuned.folder))
    assert same(base_weights(adapter.load_base().model), state(tuned, "next@1"))
    words = tuned.words("direct", "out", adapter="started@task-a")
    assert tuned.give(*words)[0] == 0  # to next@1 itself, where direct use is the tuned model
    scores = results(tuned, "out")["scores"]
    assert scores["direct"] == scores["old"]


@pytest.mark.parametrize("kind", ["tuned", "adapted"])
def test_init_at_step_0_equals_direct(kind, request):
    consumer = request.getfixturevalue(kind)
    status, output = consumer.give(*consumer.words("init", "out"))
    assert status == 0, output
    found = results(consumer, "out")
    first, last = found["recycled"]["points"][0], found["recycled"]["points"][-1]
    assert (first["step"], last["step"]) == (0, 6)
    assert first["score"] == found["scores"]["direct"]
    assert found["scratch"]["points"][0]["score"] == found["scores"]["bare"]
    assert [point["step"] for point in found["recycled"]["points"]] == [0, 2, 4, 6]
    # one step of the other run is of the same operations: no teacher
    assert found["scratch"]["points"][-1]["step"] == 6
    assert (consumer.folder / "out" / "recycle.png").stat().st_size > 1000
    run = consumer.folder / "out" / "run"
    assert matrix(run)[1][0] == last["score"]
    status, output = consumer.give("export", run, consumer.folder / "exported")
    assert status == 0, output


@pytest.mark.parametrize("kind", ["tuned", "adapted"])
def test_both_distils_and_the_other_run_has_equal_operations(kind, request):
    consumer = request.getfixturevalue(kind)
    status, output = consumer.give(*consumer.words("both", "out"))
    assert status == 0, output
    found = results(consumer, "out")
    recycled, scratch = found["recycled"], found["scratch"]
    steps = scratch["points"][-1]["step"]
    assert steps > 6  # the teacher's operations become steps
    one = scratch["flops"] / steps
    assert abs(recycled["flops"] - scratch["flops"]) <= 0.6 * one
    config = yaml.safe_load((consumer.folder / "out" / "run" / "config.yaml").read_text())
    assert "RecycleDistillation" in json.dumps(config["model"]["strategy"])
    assert ("LoRA" in json.dumps(config["model"]["strategy"])) == (kind == "adapted")


def test_equal_operations_hold_where_the_samples_are_no_multiple_of_a_batch(tuned):
    words = tuned.words("init", "out", "--samples", "6", "--batch_size", "4", "--steps", "8")
    status, output = tuned.give(*words)
    assert status == 0, output
    found = results(tuned, "out")
    assert found["scratch"]["points"][-1]["step"] == 8
    assert found["scratch"]["flops"] == found["recycled"]["flops"]


def test_distill_starts_from_the_next_base_alone(tuned):
    assert tuned.give(*tuned.words("distill", "out", "--against", "nothing"))[0] == 0
    found = results(tuned, "out")
    assert found["recycled"]["points"][0]["score"] == found["scores"]["bare"]
    assert found["scratch"] is None


def test_the_few_samples_are_balanced_and_the_seed_chooses_them(tuned):
    picked = []
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert tuned.give(*tuned.words("direct", out, "--seed", seed))[0] == 0
        folder = tuned.folder / out / "data"
        record = json.loads((folder / "few_shot.json").read_text())
        assert record["per_class"] == {"c0": 4, "c1": 4}
        picked.append((folder / "train.tar").read_bytes())
    assert picked[0] == picked[1] != picked[2]


@pytest.mark.parametrize(("moment", "count"), [("score", 5), ("ended", 1), ("written", 9)])
def test_a_killed_recycling_resumes_to_the_same_end(tuned, moment, count):
    words = tuned.words("both", "whole")
    assert in_process(command, words) == 0
    again = tuned.words("both", "killed")
    log = tuned.folder / "log"
    assert in_process(command, again, log, (moment, count)) == KILLED
    assert in_process(command, again, log) == 0, log.read_text()
    whole, killed = tuned.folder / "whole", tuned.folder / "killed"
    for run in ("run", "scratch"):
        file = f"{run}/checkpoints/task_00.ckpt"
        first, second = (
            torch.load(folder / file, weights_only=True)["state_dict"] for folder in (whole, killed)
        )
        assert same(first, second)
        assert matrix(whole / run) == matrix(killed / run)
    left, right = results(tuned, "whole"), results(tuned, "killed")
    for name in ("scores", "recycled", "scratch", "steps_to_target"):
        assert left[name] == right[name]


def test_a_folder_of_another_recycling_is_refused_by_the_option(tuned):
    assert tuned.give(*tuned.words("direct", "out"))[0] == 0
    status, output = tuned.give(*tuned.words("direct", "out", "--seed", 3))
    assert status == 1
    assert "holds another recycling (seed is 0 there and 3 now)" in output


def test_an_adapter_of_another_architecture_is_refused_by_the_first_shape(tuned):
    words = tuned.words("direct", "out")
    words[words.index("--to") + 1] = "tiny:built-in"
    status, output = tuned.give(*words)
    assert status == 1
    assert "shapes: 'ln_final.bias' is (16,) in the old base and (128,) in the new" in output
    assert not (tuned.folder / "out").exists()


def test_a_model_of_another_type_is_refused(tuned):
    words = tuned.words("direct", "out")
    words[words.index("--to") + 1] = "tiny-llava"
    status, output = tuned.give(*words)
    assert status == 1
    assert "an adapter fits no model of another type" in output


def test_another_tokenizer_is_refused_for_a_teacher(adapted, tmp_path):
    status, output = adapted.give("export", adapted.runs.path("next"), tmp_path / "base", "--as",
                                  "transformers")  # fmt: skip
    assert status == 0, output
    file = tmp_path / "base" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    names = list(vocabulary)[-2:]
    vocabulary[names[0]], vocabulary[names[1]] = vocabulary[names[1]], vocabulary[names[0]]
    file.write_text(json.dumps(content))
    words = adapted.words("distill", "out")
    words[words.index("--to") + 1] = str(tmp_path / "base")
    status, output = adapted.give(*words)
    assert status == 1
    assert "tokenizer: token" in output
    assert not (adapted.folder / "out").exists()


def test_a_mode_that_trains_needs_data(tuned):
    words = tuned.words("init", "out")
    place = words.index("--data")
    status, output = tuned.give(*words[:place], *words[place + 2 :])
    assert status == 1
    assert "--mode init trains, and there is no --data" in output


def test_fewer_samples_than_classes_are_refused(tuned):
    status, output = tuned.give(*tuned.words("init", "out", "--samples", 1))
    assert status == 1
    assert "--samples is 1 and task 'task-a' has 2 classes" in output


def test_an_unknown_option_is_refused(tuned):
    status, output = tuned.give(*tuned.words("direct", "out", "--sample", 3, "--beta", 3))
    assert status == 2
    assert "unrecognized arguments: --beta" in output


def test_delta_of_other_shapes_names_the_weight():
    class Clip:
        def __init__(self, size):
            self.clip = torch.nn.Linear(size, 2)

    old = base_weights(Clip(3))
    tuned = {name: value + 1 for name, value in old.items()}
    with pytest.raises(ValueError, match=r"'weight' is \(2, 3\) .* and \(2, 4\) in the next"):
        add_delta(Clip(4), tuned, old)


def test_steps_to_a_target_are_those_of_the_first_evaluation_that_reaches_it():
    scores = [(0, 0.1), (2, None), (4, 0.5), (6, 0.4)]
    curve = LearningCurve([CurvePoint(step, value) for step, value in scores], 1e6)
    assert [curve.steps_to(target) for target in (0.1, 0.5, 0.3, 0.6, None)] == [
        0,
        4,
        4,
        None,
        None,
    ]
    assert (curve.steps, curve.last_score) == (6, 0.4)
