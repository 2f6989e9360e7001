import torch

from mmcl.ops.feature_quantization import dequantize_int8, quantize_int8


def vectors():
    draw = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-8, 5, 40)[:, None, None]
    return torch.randn(40, 5, 33, generator=draw) * sizes


def test_no_number_is_more_than_half_a_step_off():
    values = vectors()
    rounded, scale = quantize_int8(values)
    off = (dequantize_int8(rounded, scale) - values).abs().amax(-1)
    assert rounded.dtype == torch.int8
    assert scale.dtype == torch.float16
    assert scale.shape == values.shape[:-1]
    assert bool((off <= scale.float() / 2 * (1 + 1e-6)).all())


def test_a_step_is_the_largest_number_over_127_within_half_precision():
    values = vectors()
    _, scale = quantize_int8(values)
    wanted = values.abs().amax(-1) / 127
    assert bool((scale.float() >= wanted).all())
    # Next above in float16: a thousandth more, or 6e-8 where float16 has no smaller step.
    assert bool((scale.float() <= wanted * (1 + 2**-10) + 2**-24).all())


def test_signs_zeros_and_the_largest_number_survive():
    values = torch.tensor([[127.0, -127.0, 0.0, 63.0], [0.0, 0.0, 0.0, 0.0]])
    rounded, scale = quantize_int8(values)
    assert rounded.tolist() == [[127, -127, 0, 63], [0, 0, 0, 0]]
    assert torch.equal(dequantize_int8(rounded, scale), values)


def test_half_precision_is_taken_as_well():
    values = vectors()[10:30].half()
    rounded, scale = quantize_int8(values)
    off = (dequantize_int8(rounded, scale) - values.float()).abs().amax(-1)
    assert bool((off <= scale.float() / 2 * (1 + 1e-6)).all())
