"""Noise on weights: its size, its seed, exact restoring; the loss rise against loops."""

import math

import pytest
import torch
from torch import nn

from mmcl.core.seeding import generator
from mmcl.diagnostics.flatness import add_noise, flatness, loss_rise
from mmcl.diagnostics.interpolated_weights import copy_weights
from mmcl.strategies import LoRA
from tests.diagnostics.diagnosed import (
    begun,
    clip_module,
    llava_module,
    probes_of,
    small_data,
    with_noise,
)


def large():
    """A model with a weight of many entries, one of zeros, and one in half precision."""
    model = nn.ParameterDict(
        {
            "wide": nn.Parameter(3.0 * torch.randn(200, 200)),
            "zeros": nn.Parameter(torch.zeros(10)),
            "narrow": nn.Parameter(torch.randn(50).half()),
        }
    )
    model.register_buffer("count", torch.tensor(7.0))
    return model


def test_noise_has_the_size_of_the_weights_and_leaves_zeros_and_buffers():
    model = large()
    before = copy_weights(model.state_dict())
    with add_noise(model, 0.1, 0):
        noise = model["wide"].detach() - before["wide"]
        size = before["wide"].square().mean().sqrt()
        assert float(noise.std() / size) == pytest.approx(0.1, rel=0.03)
        assert abs(float(noise.mean() / size)) < 0.002
        assert torch.equal(model["zeros"], before["zeros"])
        assert not torch.equal(model["narrow"], before["narrow"])
        assert float(model.count) == 7.0


def test_weights_are_restored_bit_for_bit_also_after_an_error():
    model = large()
    before = copy_weights(model.state_dict())
    with pytest.raises(RuntimeError, match="stop"), add_noise(model, 1.0, 0):
        raise RuntimeError("stop")
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())


def test_noise_is_a_function_of_its_seeds():
    model = large()
    found = []
    for seeds in ((1, 2), (1, 2), (1, 3)):
        with add_noise(model, 0.1, *seeds):
            found.append(model["wide"].detach().clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("sigma", [-1.0, math.inf, math.nan])
def test_a_size_that_is_none_is_refused(sigma):
    with pytest.raises(ValueError, match="give a finite number"), add_noise(large(), sigma, 0):
        pass


def test_the_loss_rise_of_a_quadratic_is_the_mean_over_draws():
    model = nn.Linear(3, 2, bias=False).double()
    weight = model.weight.detach().clone()

    def measure():
        weight = model.weight.detach()
        return [float(weight.square().sum()), float(weight.sum())]

    found = loss_rise(model, measure, measure(), sigma=0.1, draws=4, seed=5)
    size = math.sqrt(sum(w * w for row in weight.tolist() for w in row) / 6)
    rises = [0.0, 0.0]
    for draw in range(4):
        noise = torch.randn(2, 3, generator=generator(5, draw, 0)).double()
        for i in range(2):
            for j in range(3):
                w, e = float(weight[i, j]), 0.1 * size * float(noise[i, j])
                rises[0] += ((w + e) ** 2 - w * w) / 4
                rises[1] += e / 4
    assert found == pytest.approx(rises)
    assert torch.equal(model.weight, weight)


def test_no_draws_are_refused():
    with pytest.raises(ValueError, match="draws is 0"):
        loss_rise(nn.Linear(1, 1), lambda: [1.0], [1.0], sigma=0.1, draws=0, seed=0)


def test_every_state_has_a_rise_for_the_tasks_that_it_learned_and_lost_ones_are_named(tmp_path):
    data = small_data(tmp_path)
    modules = {1: clip_module(tmp_path, seed=1), 2: None, 0: clip_module(tmp_path)}
    found = flatness(modules.get, probes_of(data), [0, 1, 2], sigmas=(0.0, 0.1), draws=2)
    still, moved = (series.values for series in found.panels[0].series)
    assert still == [0.0, 0.0, None]
    assert moved[0] != 0
    assert moved[2] is None
    first, second = (series.values for series in found.panels[1].series)
    assert second[1] is None  # not learned yet in row 1
    assert None not in first[:2]
    assert found.notes == ["The checkpoint after 'task-b' is lost, so it is left out."]
    assert found.x_names == ["zero-shot", "task-a", "task-b"]


def test_merged_adapters_get_their_bits_back(tmp_path):
    data = small_data(tmp_path, kind="instruction")
    module = with_noise(begun(llava_module(tmp_path, LoRA(rank=2)), data), 1, only="lora_")
    before = copy_weights(module.state_dict())
    found = flatness(lambda row: module, probes_of(data), [1], sigmas=(0.05,), draws=1)
    assert found.panels[0].series[0].values[0] != 0
    assert all(torch.equal(before[name], one) for name, one in module.state_dict().items())
