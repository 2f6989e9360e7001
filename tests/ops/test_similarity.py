"""Linear CKA and similarity of attention maps against loops."""

import math

import pytest
import torch

from mmcl.ops.similarity import attention_similarity, linear_cka


def features(rows=12, dims=5, seed=0):
    return torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed))


def hsic_of_loops(x, y):
    """Trace of K H L H, with H the centering matrix, entry by entry."""
    n = len(x)
    k = [[sum(a * b for a, b in zip(p, q, strict=True)) for q in x] for p in x]
    m = [[sum(a * b for a, b in zip(p, q, strict=True)) for q in y] for p in y]

    def centered(gram):
        rows = [sum(row) / n for row in gram]
        total = sum(rows) / n
        return [[gram[i][j] - rows[i] - rows[j] + total for j in range(n)] for i in range(n)]

    k, m = centered(k), centered(m)
    return sum(k[i][j] * m[j][i] for i in range(n) for j in range(n))


def unbiased_hsic_of_loops(x, y):
    """Mean over all different i, j, q, r of the U-statistic of HSIC: slow and independent."""
    n = len(x)
    k, m = (x @ x.T).tolist(), (y @ y.T).tolist()
    total = 0.0
    for i in range(n):
        for j in range(n):
            for q in range(n):
                for r in range(n):
                    if len({i, j, q, r}) == 4:
                        total += k[i][j] * (m[i][j] + m[q][r] - 2 * m[i][q])
    return total / math.perm(n, 4)


def test_linear_cka_equals_the_ratio_of_loops():
    x, y = features().double(), features(dims=7, seed=1).double()
    both = hsic_of_loops(x.tolist(), y.tolist())
    own = [hsic_of_loops(each.tolist(), each.tolist()) for each in (x, y)]
    expected = both / math.sqrt(own[0] * own[1])
    assert float(linear_cka(x, y)) == pytest.approx(expected, rel=1e-10)


def test_unbiased_cka_equals_the_u_statistic_of_loops():
    x, y = features(7, 3).double(), features(7, 4, seed=1).double()
    both = unbiased_hsic_of_loops(x, y)
    own = [unbiased_hsic_of_loops(each, each) for each in (x, y)]
    expected = both / math.sqrt(own[0] * own[1])
    assert float(linear_cka(x, y, unbiased=True)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("unbiased", [False, True])
def test_cka_does_not_change_under_rotation_scaling_and_shift(unbiased):
    x, y = features().double(), features(dims=7, seed=1).double()
    rotation, _ = torch.linalg.qr(features(7, 7, seed=2).double())
    changed = 300.0 * y @ rotation + 5.0
    kept = linear_cka(x, y, unbiased=unbiased)
    torch.testing.assert_close(linear_cka(x, changed, unbiased=unbiased), kept)
    torch.testing.assert_close(linear_cka(y, changed, unbiased=unbiased), torch.ones_like(kept))


def test_cka_changes_under_a_transform_that_is_not_orthogonal():
    x = features().double()
    stretched = x * torch.tensor([50.0, 1, 1, 1, 1])
    assert float(linear_cka(x, stretched)) < 0.9


def test_unbiased_cka_of_unrelated_wide_features_is_near_zero_and_the_biased_one_is_not():
    x, y = features(20, 400), features(20, 400, seed=1)
    assert float(linear_cka(x, y)) > 0.9
    assert abs(float(linear_cka(x, y, unbiased=True))) < 0.1


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_cka_of_tiny_and_huge_features_is_finite(scale):
    x = features()
    assert float(linear_cka(x, x.double() * scale)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (torch.full((5, 3), 0.1), features(5, 3), "first features are the same"),
        (features(5, 3), torch.zeros(5, 2), "second features are the same"),
        (features(5, 3), features(4, 3), r"shapes \(5, 3\) and \(4, 3\)"),
        (features(1, 3), features(1, 3), "1 samples: give 2"),
        (features(5, 3), features(5, 3).fill_(math.nan), "second features have values"),
        (features(5, 3), features(5, 0), "second features are the same"),
    ],
)
def test_cka_without_a_value_says_why(x, y, words):
    with pytest.raises(ValueError, match=words):
        linear_cka(x, y)


def test_unbiased_cka_needs_four_samples():
    with pytest.raises(ValueError, match="3 samples: give 4"):
        linear_cka(features(3), features(3, seed=1), unbiased=True)


def test_attention_similarity_equals_the_cosine_of_loops_and_skips_padding():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(2, 3, 4, 4, generator=generator).softmax(-1) for _ in range(2))
    is_real = torch.tensor([[True, True, False, False], [True] * 4])
    found = attention_similarity(a, b, is_real)
    for sample in range(2):
        for head in range(3):
            rows = [row for row in range(4) if is_real[sample, row]]
            p = [float(a[sample, head, r, c]) for r in rows for c in range(4)]
            q = [float(b[sample, head, r, c]) for r in rows for c in range(4)]
            dot = sum(s * t for s, t in zip(p, q, strict=True))
            norms = math.sqrt(sum(s * s for s in p) * sum(t * t for t in q))
            assert float(found[sample, head]) == pytest.approx(dot / norms)
    torch.testing.assert_close(attention_similarity(a, a), torch.ones(2, 3).double())


def test_attention_maps_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 2, 3, 3\) and \(1, 2, 4, 4\)"):
        attention_similarity(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 4, 4))
