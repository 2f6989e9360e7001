import pytest
import torch

from mmcl.ops import feature_quantization
from mmcl.ops.feature_quantization import decode, encode, fit_centroids


def some_vectors(count, width, seed=0):
    """Vectors in clusters of different sizes with correlated entries, as features are."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, width, generator=g) @ torch.randn(width, width, generator=g)
    centers = 3 * torch.randn(40, width, generator=g)
    return mixed + centers[torch.randint(40, (count,), generator=g)]


def distortion(vectors, centroids):
    return float((vectors - decode(encode(vectors, centroids), centroids)).square().sum())


def test_each_part_is_replaced_by_its_nearest_centroid():
    vectors, centroids = some_vectors(30, 6), torch.randn(3, 11, 2)
    codes = encode(vectors.view(5, 6, 6), centroids)
    assert codes.dtype == torch.uint8
    assert codes.shape == (5, 6, 3)
    for row, own in enumerate(codes.view(30, 3).tolist()):
        for part, code in enumerate(own):
            piece = vectors[row, 2 * part : 2 * part + 2]
            distances = [float((piece - centroid).square().sum()) for centroid in centroids[part]]
            assert distances[code] == min(distances)
    expected = [
        torch.cat([centroids[p, c] for p, c in enumerate(own)]) for own in codes[2].tolist()
    ]
    assert torch.equal(decode(codes, centroids)[2], torch.stack(expected))


def test_vectors_are_encoded_alike_in_pieces_of_any_size(monkeypatch):
    vectors, centroids = some_vectors(40, 8), torch.randn(4, 256, 2)
    whole = encode(vectors, centroids)
    monkeypatch.setattr(feature_quantization, "_VECTORS_TOGETHER", 7)
    assert torch.equal(encode(vectors, centroids), whole)


@pytest.mark.parametrize("count", [1, 2, 100, 256])
def test_as_many_vectors_as_centroids_come_back_as_they_were(count):
    vectors = some_vectors(count, 8)
    centroids = fit_centroids(vectors, 4, seed=0)
    assert centroids.shape == (4, count, 2)
    assert torch.equal(decode(encode(vectors, centroids), centroids), vectors)


def test_centroids_of_tight_clouds_are_their_means():
    g = torch.Generator().manual_seed(1)
    centers = 100 * torch.randn(256, 3, generator=g)
    clouds = centers[:, None] + 0.01 * torch.randn(256, 8, 3, generator=g)
    vectors = clouds.transpose(0, 1).reshape(-1, 3)
    [found] = fit_centroids(vectors, 1, seed=0)
    means = clouds.mean(1)
    nearest = torch.cdist(means.double(), found.double()).argmin(1)
    assert sorted(nearest.tolist()) == list(range(256))
    torch.testing.assert_close(found[nearest], means, rtol=0, atol=1e-3)


def test_centroids_that_lose_all_vectors_move_to_distant_vectors():
    few = some_vectors(9, 4)
    vectors = few[torch.arange(3000) % 9 * (torch.arange(3000) % 7 == 0)]
    centroids = fit_centroids(vectors, 2, seed=0)
    assert bool(torch.isfinite(centroids).all())
    assert distortion(vectors, centroids) == 0


def test_a_lonely_vector_far_away_gets_a_centroid():
    # It comes after the vectors that the start is drawn from, so only an empty centroid reaches it.
    near = torch.arange(200.0)[torch.arange(5000) % 200][:, None]
    vectors = torch.cat([near, torch.tensor([[1e6]])])
    assert distortion(vectors, fit_centroids(vectors, 1, seed=0)) == 0


def test_a_seed_gives_the_same_centroids_to_the_bit_and_another_others():
    vectors = some_vectors(900, 8)
    one, again, other = (fit_centroids(vectors, 2, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_rounds_bring_centroids_nearer():
    vectors = some_vectors(2000, 4)
    errors = [distortion(vectors, fit_centroids(vectors, 1, seed=0, rounds=r)) for r in (0, 1, 9)]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.slow
@pytest.mark.parametrize("width", [4, 16])
def test_centroids_are_as_good_as_those_of_scikit_learn(width):
    cluster = pytest.importorskip("sklearn.cluster")
    vectors = some_vectors(6000, width)
    theirs = cluster.KMeans(256, n_init=1, random_state=0, max_iter=300).fit(vectors.numpy())
    ours = distortion(vectors, fit_centroids(vectors, 1, seed=0))
    assert ours <= 1.05 * theirs.inertia_


@pytest.mark.slow
def test_codes_are_as_good_as_those_of_faiss():
    faiss = pytest.importorskip("faiss")
    vectors = some_vectors(6000, 16)
    theirs = faiss.ProductQuantizer(16, 4, 8)
    theirs.train(vectors.numpy())
    lost = vectors - torch.from_numpy(theirs.decode(theirs.compute_codes(vectors.numpy())))
    assert distortion(vectors, fit_centroids(vectors, 4, seed=0)) <= 1.05 * lost.square().sum()


def test_subvectors_that_do_not_divide_the_dim_name_those_that_do():
    with pytest.raises(ValueError, match="subvectors is 5 and features have dim 12: .* 1, 2, 3, 4"):
        fit_centroids(torch.zeros(3, 12), 5, seed=0)
    with pytest.raises(ValueError, match="subvectors is 0"):
        fit_centroids(torch.zeros(3, 12), 0, seed=0)
    with pytest.raises(ValueError, match="there are 0 vectors to compute"):
        fit_centroids(torch.zeros(0, 12), 4, seed=0)
