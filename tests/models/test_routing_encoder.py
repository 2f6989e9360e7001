import pytest
import torch
from torch.nn import functional

from mmcl.core import Batch
from mmcl.models import OpenCLIP
from mmcl.models.hf_vlm.routing_encoder import pool_images
from tests.models import hf_reference
from tests.toys.toy_llava import a_dialogue_batch, a_llava


@pytest.fixture(scope="module")
def model():
    return a_llava(routing_encoder=OpenCLIP("tiny", "built-in").eval())


def without(batch, *hidden):
    """The batch without the images of some samples."""
    kept = torch.tensor([row for row in range(len(batch)) if row not in hidden])
    return Batch(
        batch.images[kept], batch.labels, batch.task_ids, kept, batch.input_ids,
        batch.attention_mask, references=batch.references,
    )  # fmt: skip


def test_images_are_embedded_by_the_routing_encoder_at_its_own_size(model):
    batch = a_dialogue_batch(model, 3)
    large = functional.interpolate(
        batch.images.float(), (model.routing_encoder.size,) * 2, mode="bicubic", antialias=True
    )
    seen = Batch(large.round().clamp(0, 255).byte(), batch.task_ids, batch.task_ids)
    torch.testing.assert_close(
        model.embed(batch, "image"), model.routing_encoder.embed(seen, "image")
    )
    assert model.embed(batch, "image").shape == (3, model.embed_dim)


def test_questions_are_embedded_by_the_routing_encoder_as_texts(model):
    batch = a_dialogue_batch(model, 3, task=1)
    transform = model.routing_encoder.transform(False)
    tokens = transform(None, "Name the colour of the thing.", 0).input_ids[None].repeat(3, 1)
    questions = Batch(
        None, batch.task_ids, batch.task_ids, input_ids=tokens, attention_mask=tokens != 0
    )
    torch.testing.assert_close(
        model.embed(batch, "text"), model.routing_encoder.embed(questions, "text")
    )


def test_a_sample_without_an_image_has_the_zero_vector(model):
    for one in (model, a_llava()):
        batch = a_dialogue_batch(one, 3)
        whole, some = one.embed(batch, "image"), one.embed(without(batch, 1), "image")
        torch.testing.assert_close(some[[0, 2]], whole[[0, 2]])
        assert not some[1].any()
        nothing = Batch(
            None,
            batch.labels,
            batch.task_ids,
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
        )
        assert torch.equal(one.embed(nothing, "image"), torch.zeros(3, one.embed_dim))


def test_a_sample_with_two_images_has_their_mean():
    seen = functional.normalize(torch.randn(3, 4), dim=-1)
    labels = torch.zeros(2, dtype=torch.int64)
    batch = Batch(None, labels, labels, image_owner=torch.tensor([0, 0, 1]))
    expected = functional.normalize(torch.stack([(seen[0] + seen[1]) / 2, seen[2]]), dim=-1)
    torch.testing.assert_close(pool_images(seen, batch), expected)


def test_without_a_routing_encoder_images_are_mean_projector_inputs():
    model = a_llava()
    batch = a_dialogue_batch(model, 3)
    expected = functional.normalize(model.encode_image(batch).mean(1), dim=-1)
    torch.testing.assert_close(model.embed(batch, "image"), expected)
    assert model.embed(batch, "image").shape == (3, model.embed_dim)


def test_without_a_routing_encoder_questions_are_mean_word_embeddings():
    model = a_llava()
    batch = a_dialogue_batch(model, 2)
    words = model.lm.get_input_embeddings().weight
    for row, one in enumerate(hf_reference.one_by_one(batch)):
        start = int(torch.nonzero(one.labels[0] != -100)[0, 0])
        question = one.input_ids[0, :start]
        mean = words[question[question != model.image_inputs.image_token_id]].mean(0)
        torch.testing.assert_close(
            model.embed(batch, "text")[row], functional.normalize(mean, dim=-1)
        )


def test_the_routing_encoder_is_frozen_and_is_in_the_fingerprint(model):
    assert not any(p.requires_grad for p in model.routing_encoder.parameters())
    assert model.fingerprint() != a_llava().fingerprint()


def test_the_routing_encoder_refuses_features_instead_of_images(model):
    batch = a_dialogue_batch(model, 2)
    stored = Batch(None, batch.labels, batch.task_ids, features=torch.zeros(2, 4, 16))
    with pytest.raises(ValueError, match="needs images and these samples have stored features"):
        model.embed(stored, "image")


def test_the_routing_encoder_needs_the_questions(model):
    batch = a_dialogue_batch(model, 2)
    with pytest.raises(ValueError, match="0 references for 2 samples: .*batch.references"):
        model.embed(Batch(batch.images, batch.labels, batch.task_ids), "text")
