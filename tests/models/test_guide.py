import pytest
import torch
from torch.nn import functional

from mmcl.core import Batch
from mmcl.models import OpenCLIP
from mmcl.models.guide import one_a_row
from tests.models import native_chats as native
from tests.stand_in_llava import a_dialogue_batch, a_llava


@pytest.fixture(scope="module")
def model():
    return a_llava(guide=OpenCLIP("tiny", "built-in").eval())


def without(batch, *hidden):
    """The batch with some rows' pictures taken away."""
    kept = torch.tensor([row for row in range(len(batch)) if row not in hidden])
    return Batch(
        batch.images[kept], batch.labels, batch.task, kept, batch.tokens, batch.mask,
        references=batch.references,
    )  # fmt: skip


def test_pictures_are_embedded_by_the_guide_at_its_own_size(model):
    batch = a_dialogue_batch(model, 3)
    large = functional.interpolate(
        batch.images.float(), (model.guide.size,) * 2, mode="bicubic", antialias=True
    )
    seen = Batch(large.round().clamp(0, 255).byte(), batch.task, batch.task)
    torch.testing.assert_close(model.embed(batch, "image"), model.guide.embed(seen, "image"))
    assert model.embed(batch, "image").shape == (3, model.embed_width)


def test_questions_are_embedded_by_the_guide_as_texts(model):
    batch = a_dialogue_batch(model, 3, task=1)
    transform = model.guide.transform(False)
    tokens = transform(None, "Name the colour of the thing.", 0).tokens[None].repeat(3, 1)
    asked = Batch(None, batch.task, batch.task, tokens=tokens, mask=tokens != 0)
    torch.testing.assert_close(model.embed(batch, "text"), model.guide.embed(asked, "text"))


def test_a_row_without_a_picture_has_the_zero_vector(model):
    for one in (model, a_llava()):
        batch = a_dialogue_batch(one, 3)
        whole, some = one.embed(batch, "image"), one.embed(without(batch, 1), "image")
        torch.testing.assert_close(some[[0, 2]], whole[[0, 2]])
        assert not some[1].any()
        nothing = Batch(None, batch.labels, batch.task, tokens=batch.tokens, mask=batch.mask)
        assert torch.equal(one.embed(nothing, "image"), torch.zeros(3, one.embed_width))


def test_a_row_with_two_pictures_has_their_mean():
    seen = functional.normalize(torch.randn(3, 4), dim=-1)
    labels = torch.zeros(2, dtype=torch.int64)
    batch = Batch(None, labels, labels, owner=torch.tensor([0, 0, 1]))
    expected = functional.normalize(torch.stack([(seen[0] + seen[1]) / 2, seen[2]]), dim=-1)
    torch.testing.assert_close(one_a_row(seen, batch), expected)


def test_without_a_guide_pictures_are_what_enters_the_projector():
    model = a_llava()
    batch = a_dialogue_batch(model, 3)
    expected = functional.normalize(model.encode(batch).mean(1), dim=-1)
    torch.testing.assert_close(model.embed(batch, "image"), expected)
    assert model.embed(batch, "image").shape == (3, model.embed_width)


def test_without_a_guide_questions_are_their_words_without_the_picture():
    model = a_llava()
    batch = a_dialogue_batch(model, 2)
    words = model.lm.get_input_embeddings().weight
    for row, one in enumerate(native.one_by_one(batch)):
        start = int(torch.nonzero(one.labels[0] != -100)[0, 0])
        asked = one.tokens[0, :start]
        mean = words[asked[asked != model.pixels.token]].mean(0)
        torch.testing.assert_close(
            model.embed(batch, "text")[row], functional.normalize(mean, dim=-1)
        )


def test_the_guide_never_learns_and_is_in_the_fingerprint(model):
    assert not any(p.requires_grad for p in model.guide.parameters())
    assert model.fingerprint() != a_llava().fingerprint()


def test_the_guide_refuses_features_in_place_of_pictures(model):
    batch = a_dialogue_batch(model, 2)
    stored = Batch(None, batch.labels, batch.task, features=torch.zeros(2, 4, 16))
    with pytest.raises(ValueError, match="needs pictures and these rows have features"):
        model.embed(stored, "image")


def test_the_guide_needs_the_questions(model):
    batch = a_dialogue_batch(model, 2)
    with pytest.raises(ValueError, match="0 questions for 2 rows: .*batch.references"):
        model.embed(Batch(batch.images, batch.labels, batch.task), "text")
