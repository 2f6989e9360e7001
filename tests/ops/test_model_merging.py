import pytest
import torch

from mmcl.ops import model_merging as merging


def sets(count, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    shapes = {"a": (3, 4), "b": (5,), "c": ()}
    return [
        {
            n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)
            for n, s in shapes.items()
        }
        for _ in range(count)
    ]


def flat(weights):
    return torch.cat([tensor.flatten() for tensor in weights.values()]).tolist()


def expect_entries(found, entries):
    assert flat(found) == pytest.approx(entries, abs=1e-12)


def test_the_average_is_the_weighted_mean_of_each_entry():
    three = sets(3)
    rows = zip(*map(flat, three), strict=True)
    expect_entries(merging.average(three, [1, 2, 5]), [(a + 2 * b + 5 * c) / 8 for a, b, c in rows])
    assert all(torch.equal(merging.average(three[:1])[n], three[0][n]) for n in three[0])


def test_the_moving_average_is_the_loop():
    three = sets(3)
    expected = flat(three[0])
    for one in three[1:]:
        expected = [0.7 * old + 0.3 * new for old, new in zip(expected, flat(one), strict=True)]
    expect_entries(merging.ema(three, 0.3), expected)


def test_wise_is_exact_at_both_ends():
    a, b = sets(2, torch.float32)
    for alpha, end in ((0.0, a), (1.0, b)):
        assert all(torch.equal(merging.wise(a, b, alpha)[name], end[name]) for name in end)


def test_task_arithmetic_adds_scaled_vectors():
    base, x, y = sets(3)
    rows = zip(flat(base), flat(x), flat(y), strict=True)
    expected = [b + 0.4 * ((p - b) + (q - b)) for b, p, q in rows]
    expect_entries(merging.task_arithmetic(base, [x, y], 0.4), expected)


def test_magmax_takes_the_entry_that_moved_most():
    base, x, y = sets(3)
    expected = []
    for b, p, q in zip(flat(base), flat(x), flat(y), strict=True):
        expected.append(b + 0.5 * (p - b if abs(p - b) >= abs(q - b) else q - b))
    expect_entries(merging.magmax(base, [x, y], 0.5), expected)


def test_ties_is_the_loop():
    base, *others = sets(4)
    start = flat(base)
    vectors = []
    for other in others:
        vector = [o - b for o, b in zip(flat(other), start, strict=True)]
        order = sorted(range(len(vector)), key=lambda i: (-abs(vector[i]), i))
        kept = set(order[: round(0.4 * len(vector))])
        vectors.append([v if i in kept else 0.0 for i, v in enumerate(vector)])
    expected = []
    for b, *entries in zip(start, *vectors, strict=True):
        total = sum(entries)
        agree = [v for v in entries if v * total > 0]
        expected.append(b + 0.7 * (sum(agree) / len(agree) if agree else 0.0))
    expect_entries(merging.ties(base, others, 0.4, 0.7), expected)


@pytest.mark.parametrize(("density", "kept"), [(0.2, 2), (0.3, 3), (0.7, 7), (1.0, 10)])
def test_ties_keeps_exactly_its_fraction_also_of_equal_magnitudes(density, kept):
    base, other = {"w": torch.zeros(10)}, {"w": torch.ones(10)}
    found = merging.ties(base, [other], density)["w"]
    assert found.tolist() == [1.0] * kept + [0.0] * (10 - kept)


def test_ties_resolves_a_sum_of_zero_by_the_sign_of_most():
    base = {"w": torch.zeros(3)}
    x, y = {"w": torch.tensor([1.0, 2.0, 3.0])}, {"w": torch.tensor([-1.0, 2.0, 1.0])}
    assert merging.ties(base, [x, y], 1.0)["w"].tolist() == [1.0, 2.0, 2.0]


def test_ties_refuses_nan():
    base, other = {"w": torch.zeros(2)}, {"w": torch.tensor([float("nan"), 1.0])}
    with pytest.raises(ValueError, match="NaN"):
        merging.ties(base, [other])


def test_dare_drops_or_rescales_and_depends_on_seed_set_and_name():
    base, other = {"v": torch.zeros(4000), "w": torch.zeros(4000)}, {}
    other = {name: torch.ones(4000) for name in base}
    found = merging.dare(base, [other], 0.75, seed=1)
    assert set(found["w"].unique().tolist()) == {0.0, 4.0}
    assert abs(float(found["w"].mean()) - 1) < 0.15
    assert torch.equal(found["w"], merging.dare(base, [other], 0.75, seed=1)["w"])
    assert not torch.equal(found["w"], found["v"])
    assert not torch.equal(found["w"], merging.dare(base, [other], 0.75, seed=2)["w"])
    alone = {"w": base["w"]}, [{"w": other["w"]}]
    assert torch.equal(found["w"], merging.dare(*alone, 0.75, seed=1)["w"])


def test_dare_without_drops_is_task_arithmetic():
    base, x, y = sets(3)
    expect_entries(merging.dare(base, [x, y], 0.0), flat(merging.task_arithmetic(base, [x, y])))


def test_fisher_weighs_each_entry_and_averages_where_nothing_was_measured():
    a, b = {"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([3.0, 3.0])}
    found = merging.fisher(
        [a, b], [{"w": torch.tensor([3.0, 0.0])}, {"w": torch.tensor([1.0, 0.0])}]
    )
    torch.testing.assert_close(found["w"], torch.tensor([1.5, 2.0]))


def test_fisher_refuses_a_missing_or_negative_diagonal():
    a = {"w": torch.ones(2)}
    for diagonal in ({}, {"w": torch.tensor([-1.0, 1.0])}, {"w": torch.ones(3)}):
        with pytest.raises(ValueError, match="'w' in set 1"):
            merging.fisher([a], [diagonal])


def test_half_precision_is_accumulated_in_float32_and_returned_in_half():
    many = [{"w": torch.tensor([1.0 + i / 128]).bfloat16()} for i in range(100)]
    exact = sum(float(each["w"]) for each in many) / 100
    found = merging.average(many)["w"]
    assert found.dtype == torch.bfloat16
    assert found.item() == torch.tensor(exact).bfloat16().item()


def test_integers_come_from_the_last_set():
    one, two = ({"ids": torch.tensor([n]), "w": torch.tensor([float(n)])} for n in (1, 5))
    for found in (merging.average([one, two]), merging.ties(one, [two], 1.0)):
        assert found["ids"].tolist() == [5]


def test_sets_that_differ_are_refused_by_name():
    a = {"w": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"'w' has shape \(2,\) in set 1 and \(3,\) in set 2"):
        merging.average([a, {"w": torch.zeros(3)}])
    with pytest.raises(ValueError, match="'v' is in set 2 and not in set 1"):
        merging.average([a, {**a, "v": torch.zeros(1)}])
    with pytest.raises(ValueError, match="'w' is in set 1 and not in set 2"):
        merging.average([a, {}])
    with pytest.raises(ValueError, match="no weights to merge"):
        merging.average([])
    with pytest.raises(ValueError, match="besides the base"):
        merging.magmax(a, [])


@pytest.mark.parametrize(
    "call",
    [
        lambda a: merging.average([a], [0.0]),
        lambda a: merging.average([a], [1.0, 2.0]),
        lambda a: merging.average([a, a], [-1.0, 3.0]),
        lambda a: merging.ema([a], 1.5),
        lambda a: merging.wise(a, a, float("nan")),
        lambda a: merging.dare(a, [a], 1.0),
        lambda a: merging.ties(a, [a], 0.0),
        lambda a: merging.fisher([a], [a], 0.0),
        lambda a: merging.fisher([a], []),
    ],
)
def test_numbers_out_of_range_are_refused(call):
    with pytest.raises(ValueError, match="give"):
        call({"w": torch.ones(2)})
