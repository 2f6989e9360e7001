import math

import pytest
import torch

from mmcl.ops.routing import (
    cosine_similarity,
    count_choices,
    ema_weights,
    gather_prompts,
    group_max,
    k_means,
    key_pull_loss,
    match_keys,
    one_hot_gates,
    soft_gates,
    top_k_ascending,
    top_k_gates,
    top_k_mask,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine(a, b):
    length = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / length if length else 0.0


def test_similarity_is_the_weighted_sum_of_cosines():
    features, means = (draw(5, 3), draw(5, 4, seed=1)), (draw(2, 3, seed=2), draw(2, 4, seed=3))
    found = cosine_similarity(features, means, (0.3, 0.7))
    for row in range(5):
        for task in range(2):
            expected = sum(
                share * cosine(f[row].tolist(), m[task].tolist())
                for f, m, share in zip(features, means, (0.3, 0.7), strict=True)
            )
            assert float(found[row, task]) == pytest.approx(expected, abs=1e-6)


def test_a_sample_without_an_image_has_similarity_zero():
    assert cosine_similarity((torch.zeros(1, 3),), (draw(2, 3),), (1.0,)).tolist() == [[0, 0]]


def test_similarity_in_other_embeddings_names_both_dims():
    with pytest.raises(ValueError, match="samples have dim 3 and tasks 4"):
        cosine_similarity((draw(1, 3),), (draw(1, 4),), (1.0,))


def test_soft_gates_are_a_softmax_over_known_tasks_only():
    scores, known = draw(4, 3).double(), torch.tensor([True, False, True])
    gates = soft_gates(scores, known, 0.1)
    for row in range(4):
        weights = [math.exp(float(scores[row, task]) / 0.1) for task in (0, 2)]
        expected = [weights[0] / sum(weights), 0.0, weights[1] / sum(weights)]
        assert gates[row].tolist() == pytest.approx(expected)


def test_one_known_task_has_all_the_weight():
    assert soft_gates(draw(2, 2), torch.tensor([False, True]), 0.1).tolist() == [[0, 1]] * 2


def test_one_hot_gates_open_one_adapter():
    assert one_hot_gates(torch.tensor([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]


def test_the_largest_weights_are_kept_and_sum_to_one_again():
    gates = top_k_gates(torch.tensor([[0.1, 0.4, 0.2, 0.3]]), 2)
    torch.testing.assert_close(gates, torch.tensor([[0.0, 4 / 7, 0.0, 3 / 7]]))
    assert top_k_mask(torch.tensor([0.1, 0.4, 0.2, 0.3]), 2).tolist() == [False, True, False, True]


def test_kept_weights_have_a_gradient():
    scores = draw(2, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: top_k_gates(s.softmax(-1), 2), scores)


def test_the_best_column_comes_last_and_few_columns_are_all_taken():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.7, 0.2, 0.3]])
    assert top_k_ascending(scores, 2).tolist() == [[2, 1], [2, 0]]
    assert top_k_ascending(scores, 9).tolist() == [[0, 2, 1], [1, 2, 0]]
    assert top_k_ascending(scores, 0).shape == (2, 0)


def test_experts_that_led_only_before_keep_the_smaller_share():
    before = torch.tensor([True, True, False, False])
    now = torch.tensor([True, False, True, False])
    assert ema_weights(before, now, 0.7).tolist() == pytest.approx([0.7, 0.3, 0.7, 0.7])


def test_a_group_scores_as_its_best_column():
    scores = torch.tensor([[1.0, 5.0, 3.0], [4.0, 2.0, 0.0]])
    found = group_max(scores, torch.tensor([0, 2, 0]), 3)
    assert found.tolist() == [[3, -math.inf, 5], [4, -math.inf, 2]]


def test_k_means_finds_separate_clusters():
    clusters = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    rows = clusters.repeat(20, 1) + 0.1 * draw(60, 2)
    found = k_means(rows, 3, torch.Generator().manual_seed(0))
    distance = torch.cdist(clusters.double(), found).min(1).values
    assert float(distance.max()) < 0.1
    for centre in found:
        own = [row for row in rows.double() if torch.cdist(row[None], found).argmin() ==
               torch.cdist(centre[None], found).argmin()]  # fmt: skip
        torch.testing.assert_close(centre, torch.stack(own).mean(0))


def test_k_means_returns_no_more_centers_than_different_vectors():
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    found = k_means(rows, 5, torch.Generator().manual_seed(0))
    assert sorted(found.tolist()) == [[0.0, 1.0], [1.0, 0.0]]


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


def test_a_key_is_its_own_best_match():
    keys = torch.eye(4)
    index, similarity = match_keys(3.0 * keys, keys, top_k=1)
    assert index.flatten().tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(similarity, torch.ones(4, 1))


def test_matches_agree_with_cosines_computed_one_by_one():
    query, keys = torch.randn(5, 7), torch.randn(6, 7)
    index, similarity = match_keys(query, keys, top_k=3)
    for row in range(5):
        cosines = [
            float((query[row] * key).sum() / (query[row].norm() * key.norm())) for key in keys
        ]
        best = sorted(range(6), key=lambda entry: -cosines[entry])[:3]
        assert index[row].tolist() == best
        torch.testing.assert_close(similarity[row], torch.tensor([cosines[b] for b in best]))


def test_a_match_does_not_depend_on_the_rest_of_the_batch():
    query, keys = torch.randn(5, 7), torch.randn(6, 7)
    together, _ = match_keys(query, keys, top_k=2)
    alone = torch.cat([match_keys(row[None], keys, top_k=2)[0] for row in query])
    assert torch.equal(together, alone)


def test_top_k_beyond_the_pool_names_the_pool_size():
    with pytest.raises(ValueError, match=r"1 to 4 \(the pool size\), got 5"):
        match_keys(torch.randn(2, 3), torch.randn(4, 3), top_k=5)


def test_a_query_of_another_dim_is_refused():
    with pytest.raises(ValueError, match="query has dim 3 but keys have 4"):
        match_keys(torch.randn(2, 3), torch.randn(4, 4), top_k=1)


def test_every_sample_gets_its_own_prompts_in_order():
    prompts = torch.randn(4, 3, 5)
    index = torch.tensor([[2, 0], [1, 3]])
    gathered = gather_prompts(prompts, index)
    assert gathered.shape == (2, 6, 5)
    for row in range(2):
        for place in range(2):
            for token in range(3):
                expected = prompts[index[row, place], token]
                assert torch.equal(gathered[row, 3 * place + token], expected)


def test_pull_is_minus_the_mean_over_samples_of_the_summed_similarity():
    similarity = torch.tensor([[0.5, 0.25], [1.0, -0.25]])
    assert float(key_pull_loss(similarity)) == -(0.75 + 0.75) / 2


def test_making_the_pull_small_turns_the_chosen_key_to_the_query():
    query = torch.tensor([[1.0, 0.0]])
    key = torch.tensor([[0.6, 0.8]], requires_grad=True)
    _, similarity = match_keys(query, key, top_k=1)
    (slope,) = torch.autograd.grad(key_pull_loss(similarity), key)
    _, closer = match_keys(query, key - 0.1 * slope, top_k=1)
    assert float(closer.detach()) > float(similarity.detach())


def test_choices_are_counted_for_every_entry_of_the_pool():
    index = torch.tensor([[0, 2], [2, 3]])
    counts = count_choices(index, 5)
    assert counts.tolist() == [1, 0, 2, 1, 0]
    assert counts.dtype == torch.int64
