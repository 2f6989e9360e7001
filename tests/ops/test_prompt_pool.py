import pytest
import torch

from mmcl.ops.prompt_pool import count_choices, gather_prompts, key_pull_loss, match_keys


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
