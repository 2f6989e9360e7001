from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from mmcl.core import IGNORE_INDEX, Batch, Prompts
from mmcl.models import OpenCLIP

NAMES, TEMPLATES = ("zero", "one", "red circle"), ("a photo of a {}.", "the {}")


@pytest.fixture(scope="module")
def clip():
    model = OpenCLIP("tiny", pretrained="built-in").eval()
    model.set_classes(NAMES, TEMPLATES)
    return model


def images(rows=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (rows, 3, 64, 64), dtype=torch.uint8, generator=g)
    return Batch(images, torch.arange(rows) % 3, torch.zeros(rows, dtype=torch.int64))


def captions(texts):
    tokens = OpenCLIP("tiny").tokenizer(texts)
    batch = images(len(texts))
    return Batch(
        batch.images, torch.full((len(texts),), IGNORE_INDEX), batch.task_ids, input_ids=tokens
    )


def test_class_scores_are_those_of_open_clip(clip):
    batch = images()
    image = clip.clip.encode_image(clip._pixels(batch), normalize=True)
    classes = []
    for name in NAMES:
        tokens = clip.tokenizer([template.format(name) for template in TEMPLATES])
        mean = clip.clip.encode_text(tokens, normalize=True).mean(0)
        classes.append(mean / mean.norm())
    want = clip.clip.logit_scale.exp() * image @ torch.stack(classes).T
    torch.testing.assert_close(clip(batch).logits, want, atol=1e-4, rtol=1e-5)


def test_the_caption_loss_is_open_clips_own_when_captions_differ(clip):
    batch = captions(["a red circle", "the digit two", "Q", "a blue square on a green ground"])
    image = clip.clip.encode_image(clip._pixels(batch), normalize=True)
    text = clip.clip.encode_text(batch.input_ids, normalize=True)
    logits = clip.clip.logit_scale.exp() * image @ text.T
    label = torch.arange(4)
    want = (functional.cross_entropy(logits, label) + functional.cross_entropy(logits.T, label)) / 2
    torch.testing.assert_close(clip.loss(clip(batch), batch), want, atol=1e-6, rtol=1e-6)


def test_equal_captions_are_positives_of_each_other(clip):
    batch = captions(["a cat", "a dog", "a cat"])
    output = clip(batch)
    image, text = output.image, output.text
    logits = clip.clip.logit_scale.exp() * image @ text.T
    target = torch.tensor([[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]])
    want = sum(-(target * m.log_softmax(1)).sum(1).mean() for m in (logits, logits.T)) / 2
    torch.testing.assert_close(clip.loss(output, batch), want)


def test_padding_does_not_change_which_captions_are_equal(clip):
    batch = captions(["a cat", "a dog"])
    longer = functional.pad(batch.input_ids, (0, 5))
    padded = Batch(batch.images, batch.labels, batch.task_ids, input_ids=longer)
    torch.testing.assert_close(clip.loss(clip(padded), padded), clip.loss(clip(batch), batch))


@pytest.mark.parametrize(
    "places",
    [
        {("image", 0): (5, 160)},
        {("image", 0): (2, 160), ("image", 3): (4, 160)},
        {("text", 0): (3, 128)},
        {("image", 1): (2, 160), ("text", 1): (2, 128)},
    ],
)
def test_prompted_samples_do_not_depend_on_their_batch(clip, places):
    batch, g = images(), torch.Generator().manual_seed(1)
    tokens = {place: torch.randn(6, *shape, generator=g) for place, shape in places.items()}
    with torch.no_grad():
        together = clip(batch, Prompts(tokens)).logits
        plain = clip(batch).logits
        for row in range(6):
            own = Prompts({place: t[row : row + 1] for place, t in tokens.items()})
            alone = clip(batch.take(torch.tensor([row])), own).logits
            torch.testing.assert_close(alone[0], together[row], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together, plain, atol=1e-3)


def test_text_prompts_in_a_class_text_are_those_of_one_text_at_a_time(clip):
    batch = images(2)
    added = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(2))
    got = clip(batch, Prompts({("text", 0): added})).logits
    text = clip.clip
    image = clip(batch).image
    for row in range(2):
        for column, name in enumerate(NAMES):
            units = []
            for template in TEMPLATES:
                tokens = clip.tokenizer([template.format(name)])
                length = int((tokens != 0).sum())
                hidden = text.token_embedding(tokens) + text.positional_embedding
                hidden = hidden[:, :length]
                hidden = torch.cat([hidden[:, :1], added[row : row + 1], hidden[:, 1:]], 1)
                mask = torch.full((length + 3, length + 3), float("-inf")).triu(1)
                hidden = text.transformer(hidden, attn_mask=mask)
                pooled = text.ln_final(hidden[:, -1]) @ text.text_projection
                units.append(functional.normalize(pooled, dim=-1))
            mean = functional.normalize(torch.stack(units).mean(0), dim=-1)
            want = text.logit_scale.exp() * (image[row] * mean[0]).sum()
            torch.testing.assert_close(got[row, column], want, atol=1e-4, rtol=1e-4)


def test_class_embeddings_follow_a_changed_weight():
    model = OpenCLIP("tiny", freeze=["text"])
    model.set_classes(NAMES, TEMPLATES)
    before = model(images()).text
    assert model(images()).text is before  # kept while the frozen tower stands still
    with torch.no_grad():
        model.clip.ln_final.weight.mul_(torch.linspace(0.5, 1.5, 128))
    assert not torch.allclose(model(images()).text, before)


def test_class_texts_embedded_under_autocast_are_not_used_outside_of_it(clip):
    clip.set_classes(NAMES, TEMPLATES)
    with torch.no_grad():
        plain = clip(images()).text
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.equal(clip(images()).text, plain)
        assert torch.equal(clip(images()).text, plain)


def test_classes_set_in_evaluation_can_be_trained_on():
    model = OpenCLIP("tiny", freeze=["image"])
    with torch.inference_mode():
        model.set_classes(NAMES, TEMPLATES)
        model(images())
    model.loss(model(images()), images()).backward()
    assert model.clip.token_embedding.weight.grad.abs().sum() > 0


def test_a_frozen_tower_gets_no_gradient_and_the_other_does():
    model = OpenCLIP("tiny", freeze=["image"])
    model.set_classes(NAMES, TEMPLATES)
    assert model.is_frozen("image")
    assert not model.is_frozen("text")
    model.loss(model(images()), images()).backward()
    assert all(p.grad is None for p in model.tower("image"))
    assert all(p.grad is not None for p in model.tower("text"))


def test_features_replace_images(clip):
    batch = images()
    stored = Batch(None, batch.labels, batch.task_ids, features=clip.encode_image(batch))
    torch.testing.assert_close(clip(stored).logits, clip(batch).logits)


def test_image_prompts_refuse_features(clip):
    batch = images(2)
    stored = Batch(None, batch.labels, batch.task_ids, features=clip.encode_image(batch))
    with pytest.raises(ValueError, match="skip the image tower"):
        clip(stored, Prompts({("image", 0): torch.zeros(2, 1, 160)}))


def test_the_fingerprint_is_of_frozen_weights_only():
    model = OpenCLIP("tiny", freeze=["text"], seed=0)
    mark = model.fingerprint()
    with torch.no_grad():
        model.clip.visual.proj.add_(1)
    assert model.fingerprint() == mark
    with torch.no_grad():
        model.clip.text_projection.add_(1)
    assert model.fingerprint() != mark


def test_a_task_loss_leaves_other_tasks_classes_out():
    model = OpenCLIP("tiny", logit_scope="task")
    model.set_classes(NAMES, TEMPLATES, tasks=[0, 0, 1])
    batch = images(2)
    logits = model(batch).logits
    want = functional.cross_entropy(logits[:, :2], batch.labels)
    torch.testing.assert_close(model.loss(model(batch), batch), want)


def test_a_sample_of_another_source_is_compared_with_all_classes():
    model = OpenCLIP("tiny", logit_scope="task")
    model.set_classes(NAMES, TEMPLATES, tasks=[0, 0, 1])
    batch = images(2)
    batch = Batch(batch.images, torch.tensor([0, 2]), torch.tensor([0, -1]))
    logits = model(batch).logits
    own = functional.cross_entropy(logits[:1, :2], batch.labels[:1])
    other = functional.cross_entropy(logits[1:], batch.labels[1:])
    torch.testing.assert_close(model.loss(model(batch), batch), (own + other) / 2)


def test_unscored_captions_are_no_negatives_either(clip):
    batch = images(4)
    tokens = torch.tensor([[5, 6, 7], [5, 8, 7], [9, 6, 7], [9, 9, 7]])
    captioned = Batch(
        batch.images, batch.labels, batch.task_ids, input_ids=tokens, attention_mask=tokens > 0
    )
    some = replace(captioned, in_loss=torch.tensor([True, False, True, False]))
    two = captioned.take(torch.tensor([0, 2]))
    torch.testing.assert_close(clip.loss(clip(some), some), clip.loss(clip(two), two))


def test_unscored_samples_are_left_out_of_the_mean(clip):
    batch = images(4)
    some = Batch(batch.images, torch.tensor([0, 1, IGNORE_INDEX, IGNORE_INDEX]), batch.task_ids)
    two = batch.take(torch.tensor([0, 1]))
    torch.testing.assert_close(clip.loss(clip(some), some), clip.loss(clip(two), two))


def test_a_forward_pass_without_classes_names_what_to_call():
    with pytest.raises(RuntimeError, match=r"model\.set_classes"):
        OpenCLIP("tiny")(images())


def test_the_answer_is_the_name_of_the_best_class(clip):
    best = clip(images()).logits.argmax(1)
    assert clip.generate(images()) == [NAMES[column] for column in best]


def test_the_tokenizer_returns_padded_token_ids(clip):
    tokens = clip.tokenizer(["a cat", "the digit two"])
    assert tokens.dtype == torch.int64
    assert tokens.shape == (2, clip.clip.context_length)
    lengths = (tokens != 0).sum(1)
    assert all((row[:n] != 0).all() for row, n in zip(tokens, lengths, strict=True))
    transform = clip.transform(False)
    sample = transform(torch.zeros(3, 8, 8, dtype=torch.uint8), "a cat", 0)
    assert torch.equal(tokens[0, : lengths[0]], sample.input_ids)


def test_the_tokenizer_is_read_only_and_a_model_without_one_is_named():
    model = OpenCLIP("tiny")
    with pytest.raises(AttributeError):
        model.tokenizer = None
    model._tokenizer = None
    with pytest.raises(TypeError, match="the model 'tiny' has no tokenizer"):
        _ = model.tokenizer
