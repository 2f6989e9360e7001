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
