import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from mmcl.ops.optimal_transport import wasserstein_cost


def solved(cost, supply, demand):
    """The same as a linear programme over the whole plan."""
    rows, columns = cost.shape
    sums = [np.repeat(np.eye(rows)[row], columns) for row in range(rows)]
    sums += [np.tile(np.eye(columns)[column], rows) for column in range(columns)]
    parts = np.concatenate([supply / supply.sum(), demand / demand.sum()])
    return linprog(cost.flatten(), A_eq=np.array(sums), b_eq=parts).fun


@pytest.mark.parametrize("seed", range(24))
def test_the_cost_is_that_of_the_linear_programme(seed):
    g = torch.Generator().manual_seed(seed)
    rows, columns = torch.randint(1, 12, (2,), generator=g).tolist()
    cost = torch.rand(rows, columns, generator=g).double()
    if seed % 3 == 0:
        cost = (4 * cost).round()  # many plans of one price
    supply, demand = (torch.randint(1, 7, (n,), generator=g) for n in (rows, columns))
    expected = solved(cost.numpy(), supply.numpy(), demand.numpy())
    assert wasserstein_cost(cost, supply, demand) == pytest.approx(expected, abs=1e-9)


def test_by_hand():
    # Half of the one point moves each way; of the two points nothing has to move.
    ones = torch.ones(1, dtype=torch.int64)
    assert wasserstein_cost(torch.tensor([[1.0, 3.0]]), ones, torch.tensor([1, 1])) == 2.0
    near = torch.tensor([[0.0, 5.0], [5.0, 0.0]])
    assert wasserstein_cost(near, torch.tensor([2, 2]), torch.tensor([7, 7])) == 0.0
    # A third of the left heap has to cross.
    assert wasserstein_cost(near, torch.tensor([2, 1]), torch.tensor([1, 2])) == pytest.approx(
        5 / 3
    )


def test_on_a_line_it_is_the_area_between_the_two_distributions():
    g = torch.Generator().manual_seed(0)
    left, right = torch.rand(30, generator=g).double(), torch.rand(30, generator=g).double() + 0.3
    once = torch.ones(30, dtype=torch.int64)
    expected = float((left.sort().values - right.sort().values).abs().mean())
    cost = (left[:, None] - right).abs()
    assert wasserstein_cost(cost, once, once) == pytest.approx(expected)


def test_empty_sets_and_costs_without_end_are_refused():
    none, one = torch.zeros(0, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    for cost, supply in ((torch.zeros(0, 1), none), (torch.full((1, 1), torch.inf), one)):
        with pytest.raises(ValueError, match="give two sets of one point or more"):
            wasserstein_cost(cost, supply, one)
