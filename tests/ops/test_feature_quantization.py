import pytest
import torch

from mmcl.ops.feature_quantization import (
    dequantize_int8,
    fit_centroids,
    from_bytes,
    pack,
    quantize_int8,
    rms_normalize,
    unpack,
)


def features(rows=5, tokens=3, width=8, seed=0):
    return torch.randn(rows, tokens, width, generator=torch.Generator().manual_seed(seed))


def centroids(subvectors=4):
    return fit_centroids(rms_normalize(features(60).flatten(0, 1))[0], subvectors, seed=0)


def relative(left, right):
    return float((left - right).norm() / left.norm())


@pytest.mark.parametrize(
    ("store", "bytes_a_row", "worst"),
    [("float16", 3 * 8 * 2, 5e-4), ("int8", 3 * 8 + 3 * 2, 0.01), ("pq", 3 * 4 + 3 * 2, 0.3)],
)
def test_features_come_back_from_columns_and_from_bytes(store, bytes_a_row, worst):
    given, known = features(), centroids()
    columns = pack(given, store, known)
    subvectors = [column.contiguous().flatten(1).view(torch.uint8) for column in columns.values()]
    rows = torch.cat(subvectors, 1)
    assert rows.shape == (5, bytes_a_row)
    back = unpack(columns, known)
    assert back.dtype == torch.float32
    assert 0 < relative(given, back) < worst
    again = from_bytes(rows, (3, 8), store, 4)
    assert list(again) == list(columns)
    assert all(torch.equal(again[name], columns[name]) for name in columns)


def test_tokens_of_zeros_stay_zeros_and_lengths_are_kept_apart():
    given, known = features(), centroids()
    given[1] = 0
    longer = given * torch.tensor([1e-4, 1.0, 1e4])[:, None]
    plain, back = unpack(pack(given, "pq", known), known), unpack(pack(longer, "pq", known), known)
    assert not back[1].any()
    for token, times in enumerate((1e-4, 1.0, 1e4)):
        torch.testing.assert_close(back[:, token], plain[:, token] * times, rtol=2e-3, atol=0)


def test_levelled_vectors_have_a_root_mean_square_of_one():
    unit, scale = rms_normalize(torch.tensor([[3.0, -4.0], [0.0, 0.0], [1e-12, 0.0]]))
    assert scale.tolist() == pytest.approx([12.5**0.5, 0.0, 0.0], rel=1e-3)
    torch.testing.assert_close(unit[0].square().mean(), torch.tensor(1.0), rtol=2e-3, atol=0)
    assert not unit[1:].any()
    assert bool(torch.isfinite(rms_normalize(torch.full((1, 4), 1e30))[0]).all())


def test_codes_without_a_codebook_are_refused():
    with pytest.raises(ValueError, match="compression is 'pq' and centroids is None"):
        pack(features(), "pq")


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
