"""Loss on the line between checkpoints: the barrier of a quadratic, merged adapters, refusals."""

import math

import pytest
import torch
from torch import nn

from mmcl.diagnostics.connectivity import (
    Checkpoint,
    connect,
    evenly_spaced_points,
    file_part,
    loss_barrier,
    measure_line,
)
from mmcl.diagnostics.interpolated_weights import copy_weights, different_weights, merged_weights
from mmcl.diagnostics.task_loss import measure_task
from mmcl.strategies import L2P, LoRA, MoELoRA, OLoRA
from tests.diagnostics.diagnosed import (
    begun,
    clip_module,
    llava_module,
    probes_of,
    small_data,
    with_noise,
)


def quadratic(sign):
    """The loss 5 + sign / 2 * (theta - c)^T H (theta - c), and its analytic barrier."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, generator=generator).double()
    hessian, center = root @ root.T, torch.randn(4, generator=generator).double()
    ends = [{"w": torch.randn(4, generator=generator).double()} for _ in range(2)]

    def loss(weights):
        away = weights["w"] - center
        return float(50 + sign * away @ hessian @ away / 2)

    step = ends[1]["w"] - ends[0]["w"]
    return loss, ends, float(step @ hessian @ step)


def test_a_concave_quadratic_has_the_analytic_barrier():
    loss, (start, end), curvature = quadratic(-1)
    positions = evenly_spaced_points(101)  # with mu = 1/2
    losses = measure_line(loss, start, end, positions)
    # L(mu) - line = mu (1 - mu) d^T H d / 2, at most d^T H d / 8.
    assert loss_barrier(positions, losses) == pytest.approx(curvature / 8)
    few = evenly_spaced_points(26)  # the nearest points are 12 / 25 and 13 / 25
    nearest = 12 / 25 * 13 / 25 * curvature / 2
    assert loss_barrier(few, measure_line(loss, start, end, few)) == pytest.approx(nearest)


def test_a_convex_quadratic_has_no_barrier():
    loss, (start, end), _ = quadratic(1)
    positions = evenly_spaced_points(26)
    assert loss_barrier(positions, measure_line(loss, start, end, positions)) == 0


def test_the_ends_of_a_line_are_exact():
    start, end = ({"w": torch.randn(3)} for _ in range(2))
    found = measure_line(dict, start, end, [0.0, 0.5, 1.0])
    assert torch.equal(found[0]["w"], start["w"])
    assert torch.equal(found[2]["w"], end["w"])
    torch.testing.assert_close(found[1]["w"], (start["w"] + end["w"]) / 2)


@pytest.mark.parametrize(
    ("positions", "losses", "words"),
    [
        ([0.0, 0.5, 1.0], [1.0, math.nan, 1.0], "the loss at mu = 0.5 is nan"),
        ([0.0, 0.5, 1.0], [1.0, math.inf, 1.0], "is inf"),
        ([0.1, 1.0], [1.0, 1.0], "from 0.1 to 1.0"),
        ([0.0, 1.0], [1.0], "2 positions and 1 losses"),
    ],
)
def test_a_barrier_without_a_value_says_why(positions, losses, words):
    with pytest.raises(ValueError, match=words):
        loss_barrier(positions, losses)


def test_two_points_are_too_few_for_a_barrier():
    with pytest.raises(ValueError, match="points is 2: give 3"):
        evenly_spaced_points(2)


def end_of(name, module, tasks=2):
    return Checkpoint(name, tasks, lambda: module)


def test_every_point_has_the_loss_of_a_model_with_interpolated_weights(tmp_path):
    data = small_data(tmp_path)
    probes = probes_of(data)
    first, second = (clip_module(tmp_path, seed=seed) for seed in (0, 1))
    found = connect(end_of("a", first), end_of("b", second), probes, [0, 1], points=5)
    assert [each.name for each in found.panels[0].series] == ["mean", "task-a", "task-b"]
    mixed = clip_module(tmp_path, seed=2)
    for index, mu in enumerate((0.0, 0.25, 0.5, 0.75, 1.0)):
        one, other = first.model.state_dict(), second.model.state_dict()
        mixed.model.load_state_dict({k: torch.lerp(one[k], other[k], mu) for k in one})
        for column in (0, 1):
            expected = measure_task(mixed, probes, 2, column, with_score=True)
            loss, score = (panel.series[1 + column].values[index] for panel in found.panels)
            assert loss == pytest.approx(expected.loss, rel=1e-4)
            assert score == expected.score
    assert found.metrics[0].value >= 0
    assert "onnected" in found.notes[0]


def test_a_module_has_its_own_bits_after_it_ran_the_line(tmp_path):
    data = small_data(tmp_path)
    first, second = (clip_module(tmp_path, seed=seed) for seed in (0, 1))
    before = copy_weights(first.state_dict())
    connect(end_of("a", first), end_of("b", second), probes_of(data), [0], points=3)
    assert all(torch.equal(before[name], tensor) for name, tensor in first.state_dict().items())


@pytest.mark.parametrize("strategy", [LoRA, OLoRA])
def test_adapters_are_interpolated_in_the_product(tmp_path, strategy):
    data = small_data(tmp_path, kind="instruction")
    probes = probes_of(data)
    ends = [
        with_noise(begun(llava_module(tmp_path, strategy(rank=2)), data), seed, only="lora_")
        for seed in (1, 2)
    ]
    merged = []
    for module in ends:
        with merged_weights(module) as own:
            merged.append(copy_weights(own))
    plain = llava_module(tmp_path)
    assert merged[0].keys() == plain.model.state_dict().keys()
    halfway = {name: (one + merged[1][name]) / 2 for name, one in merged[0].items()}
    plain.model.load_state_dict(halfway)
    expected = measure_task(plain, probes, 1, 0).loss
    found = connect(
        end_of("a", ends[0], 1), end_of("b", ends[1], 1), probes, [0], points=3, with_score=False
    )
    losses = found.panels[0].series[0].values
    assert losses[1] == pytest.approx(expected, rel=1e-4)
    assert losses[0] == pytest.approx(measure_task(ends[0], probes, 1, 0).loss, rel=1e-4)
    assert losses[2] == pytest.approx(measure_task(ends[1], probes, 1, 0).loss, rel=1e-4)


def test_a_merged_weight_is_the_base_plus_the_scaled_product(tmp_path):
    data = small_data(tmp_path, kind="instruction")
    module = with_noise(begun(llava_module(tmp_path, LoRA(rank=2)), data), 1, only="lora_")
    state = copy_weights(module.model.state_dict())
    with merged_weights(module) as own:
        merged = copy_weights(own)
    name = next(name for name in state if name.endswith("q_proj.lora_A.default.weight"))
    layer = name.removesuffix(".lora_A.default.weight")
    A, B = state[name], state[f"{layer}.lora_B.default.weight"]
    expected = state[f"{layer}.base_layer.weight"] + 2.0 * B @ A  # alpha / rank
    torch.testing.assert_close(merged[f"{layer}.weight"], expected)


@pytest.mark.parametrize(("strategy", "words"), [(L2P, "L2P predicts with more")])
def test_predictions_that_need_more_than_weights_are_refused(tmp_path, strategy, words):
    data = small_data(tmp_path)
    made = [
        with_noise(
            begun(clip_module(tmp_path, strategy(pool_size=4, prompt_length=2, top_k=2)), data),
            seed, size=3.0,
        )
        for seed in (1, 2)
    ]  # fmt: skip
    with pytest.raises(ValueError, match=words):
        connect(end_of("a", made[0]), end_of("b", made[1]), probes_of(data), [0, 1], points=3)


def test_routed_experts_are_refused(tmp_path):
    data = small_data(tmp_path, kind="instruction")
    made = [
        with_noise(begun(llava_module(tmp_path, MoELoRA(rank=2)), data), seed, size=1.0)
        for seed in (1, 2)
    ]
    with pytest.raises(ValueError, match="MoELoRA predicts with more than weights"):
        connect(
            end_of("a", made[0], 1), end_of("b", made[1], 1), probes_of(data), [0], points=3,
            with_score=False,
        )  # fmt: skip


def test_running_statistics_that_differ_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    start, end = (copy_weights(model.state_dict()) for _ in range(2))
    end["1.running_mean"] += 1
    with pytest.raises(ValueError, match=r"the buffer '1.running_mean' differs .* frozen Batch"):
        different_weights(start, end, model)


def test_weights_of_other_shapes_or_names_are_refused():
    model = nn.Linear(2, 2)
    start = copy_weights(model.state_dict())
    with pytest.raises(ValueError, match=r"'weight' has shape \(2, 2\) in one and \(3, 2\)"):
        different_weights(start, {**start, "weight": torch.zeros(3, 2)}, model)
    with pytest.raises(ValueError, match="'extra' is in one of them only"):
        different_weights(start, {**start, "extra": torch.zeros(1)}, model)
    assert different_weights(start, start, model) == []


def test_infinities_that_are_equal_lie_on_no_line_and_do_no_harm(tmp_path):
    data = small_data(tmp_path)  # the causal mask of a CLIP is a buffer with -inf
    first, second = (clip_module(tmp_path, seed=seed) for seed in (0, 1))
    found = connect(end_of("a", first), end_of("b", second), probes_of(data), [0], points=3)
    assert all(value is not None for value in found.panels[0].series[0].values)


def test_a_name_becomes_a_part_of_a_file_name():
    assert file_part("runs/ä b@3") == "runs---b@3"
