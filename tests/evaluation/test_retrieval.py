import pytest
import torch

from mmcl.evaluation.retrieval import recall_at_k


def by_loops(query, gallery, query_ids, gallery_ids, k):
    """Sort the gallery for each query, wrong before right where two are alike."""
    hits = 0
    for row, wanted in zip(query, query_ids, strict=True):
        cosine = [float(torch.cosine_similarity(row, other, dim=0)) for other in gallery]
        order = sorted(range(len(gallery)), key=lambda n: (-cosine[n], gallery_ids[n] == wanted))
        hits += any(gallery_ids[n] == wanted for n in order[:k])
    return hits / len(query)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_recall_equals_a_sort_by_hand(chunk):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    captions = torch.randint(0, 15, (40,), generator=generator)
    table = torch.randn(15, 6, generator=generator, dtype=torch.float64)
    text = table[captions] + 0.5 * image
    found = recall_at_k(image, text, captions, ks=(1, 3, 10), chunk=chunk)
    ids = captions.tolist()
    for k in (1, 3, 10):
        assert found.image_to_text[k] == by_loops(image, text, ids, ids, k)
        assert found.text_to_image[k] == by_loops(text, image, ids, ids, k)
    assert 0 < found.image_to_text[1] < 1
    assert (found.texts, found.images) == (40, 40)


def test_distinct_captions_count_once():
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(30, 5, generator=generator)
    captions = torch.randint(0, 8, (30,), generator=generator)
    text = torch.randn(8, 5, generator=generator)[captions]
    found = recall_at_k(image, text, captions, ks=(1, 3), is_distinct=True)
    first = [captions.tolist().index(each) for each in dict.fromkeys(captions.tolist())]
    gallery, ids = text[first].double(), captions[first].tolist()
    for k in (1, 3):
        expected = by_loops(image.double(), gallery, captions.tolist(), ids, k)
        assert found.image_to_text[k] == expected
    assert found.texts == len(first) < 30


def test_equal_captions_are_all_hits():
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert recall_at_k(image, text, torch.tensor([0, 1]), ks=(1,)).image_to_text[1] == 0.0
    assert recall_at_k(image, text, torch.tensor([4, 4]), ks=(1,)).image_to_text[1] == 1.0


def test_a_collapsed_model_finds_nothing():
    alike = torch.randn(1, 16).expand(300, 16)
    found = recall_at_k(alike, alike, torch.arange(300), ks=(1, 10), chunk=7)
    assert found.image_to_text == {1: 0.0, 10: 0.0}
    assert found.text_to_image == {1: 0.0, 10: 0.0}


def test_length_does_not_matter_and_a_zero_row_is_no_error():
    image = torch.eye(3)
    scale = torch.tensor([[1e-3], [7.0], [1e4]])
    found = recall_at_k(image * scale, image, torch.arange(3), ks=(1,))
    assert found.image_to_text[1] == 1.0
    assert recall_at_k(torch.zeros(2, 3), image[:2], torch.arange(2), ks=(1,)).images == 2


def test_a_tiny_difference_that_float32_would_lose_still_decides():
    image = torch.tensor([[1.0, 0.0]] * 2, dtype=torch.float64)
    text = torch.tensor([[1.0, 1e-5], [1.0, 2e-5]], dtype=torch.float64)
    found = recall_at_k(image, text, torch.tensor([0, 1]), ks=(1,))
    assert found.image_to_text[1] == 0.5


def test_embeddings_that_are_not_finite_are_refused():
    bad = torch.tensor([[float("nan"), 1.0]])
    with pytest.raises(ValueError, match="not finite"):
        recall_at_k(bad, torch.ones(1, 2), torch.tensor([0]))


@pytest.mark.parametrize(
    ("shapes", "ks", "sentence"),
    [
        (((2, 3), (3, 3), 2), (1,), "pair them"),
        (((2, 3), (2, 3), 3), (1,), "pair them"),
        (((0, 3), (0, 3), 0), (1,), "at least one pair"),
        (((2, 3), (2, 3), 2), (0,), "every k is at least 1"),
    ],
)
def test_wrong_input_is_named(shapes, ks, sentence):
    image, text, rows = shapes
    with pytest.raises(ValueError, match=sentence):
        recall_at_k(torch.ones(image), torch.ones(text), torch.zeros(rows, dtype=torch.long), ks)


def benchmark(image, text, owner, k):
    """R@k both ways as open_clip's and CLIP_benchmark's loops count it; owner[n] = text n's image.

    ``image`` has every image once.
    """
    scores = text.double() @ image.double().T
    ways = []
    for table, right in (
        (scores.T, [{n for n, own in enumerate(owner) if own == m} for m in range(len(image))]),
        (scores, [{own} for own in owner]),
    ):
        best = [sorted(range(len(row)), key=lambda n: -float(row[n]))[:k] for row in table]
        hits = [bool(right[q] & set(found)) for q, found in enumerate(best)]
        ways.append(sum(hits) / len(hits))
    return ways


def five_captions(images=12, dim=6, noise=1.2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize
    image = unit(torch.randn(images, dim, generator=draw, dtype=torch.float64), dim=1)
    owner = torch.randperm(5 * images, generator=draw) % images
    spread = noise * torch.randn(5 * images, dim, generator=draw, dtype=torch.float64)
    return image, unit(image[owner] + spread, dim=1), owner


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_five_captions_an_image_are_counted_as_the_field_counts_them(chunk):
    image, text, owner = five_captions()
    captions, ids = torch.arange(len(owner)), owner * 1000 + 3
    found = recall_at_k(image[owner], text, captions, image_ids=ids, chunk=chunk)
    assert (found.images, found.texts) == (12, 60)
    for k in (1, 5, 10):
        expected = benchmark(image, text, owner.tolist(), k)
        assert [found.image_to_text[k], found.text_to_image[k]] == expected
    assert 0 < found.text_to_image[1] < 1
    assert found.mean == (found.image_to_text[1] + found.text_to_image[1]) / 2


def test_a_perfect_model_of_five_captions_scores_1():
    image, text, owner = five_captions(noise=0.01)
    ids = {"captions": torch.arange(60), "image_ids": owner}
    found = recall_at_k(image[owner], text, ks=(1,), **ids)
    assert (found.image_to_text[1], found.text_to_image[1]) == (1.0, 1.0)
    alone = recall_at_k(image[owner], text, torch.arange(60), ks=(1,))
    assert alone.text_to_image[1] == 0.0  # the same image in five pairs would rival itself


def test_two_images_solved_by_hand():
    image = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    # Of the first image one caption is right and one nearer to the second; of the second both are.
    text = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.1, 1.0], [0.3, 0.7]])
    shown = torch.tensor([8, 8, 9, 9])
    found = recall_at_k(image, text, torch.arange(4), ks=(1, 2), image_ids=shown)
    assert found.image_to_text == {1: 1.0, 2: 1.0}
    assert found.text_to_image == {1: 0.75, 2: 1.0}
    assert (found.images, found.texts) == (2, 4)


def test_a_caption_that_two_images_share_hits_both():
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[0.0, 1.0], [1.0, 0.1], [0.0, 1.0]])
    ids = {"image_ids": torch.tensor([0, 1, 1])}
    pairs = image[[0, 1, 1]]
    apart = recall_at_k(pairs, text, torch.tensor([0, 1, 2]), ks=(1,), **ids)
    assert (apart.image_to_text[1], apart.text_to_image[1]) == (0.0, 1 / 3)
    shared = recall_at_k(pairs, text, torch.tensor([0, 1, 0]), ks=(1,), **ids)
    assert (shared.image_to_text[1], shared.text_to_image[1]) == (0.5, 2 / 3)


def test_pairs_without_an_id_show_their_own_images():
    image = torch.eye(3)
    ids = torch.tensor([-1, 5, -1])
    found = recall_at_k(image, image, torch.arange(3), ks=(1,), image_ids=ids)
    assert (found.images, found.mean) == (3, 1.0)
    with pytest.raises(ValueError, match="image_ids 2: pair them"):
        recall_at_k(image, image, torch.arange(3), image_ids=ids[:2])
