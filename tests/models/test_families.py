"""Native inputs of every family equal transformers' own processor and model, batch for batch."""

import copy
from dataclasses import replace

import pytest
import torch

from mmcl.core import Task, begin_task, step
from mmcl.data.batches.collate import Example, collate
from mmcl.models import ImageTextToText
from mmcl.strategies import LoRA
from tests.models import family_reference
from tests.models.family_reference import SAMPLES
from tests.models.small_families import FAMILIES, write_family

BATCHES = {
    "images": ("one", "two", "middle", "between", "one"),
    "mixed": ("text", "one", "turns", "text", "two"),
    "text": ("text", "text"),
    "single": ("middle",),
    "system": ("system", "one"),
}


CASES = [
    (family, name)
    for family in sorted(FAMILIES)
    for name in BATCHES
    if family not in family_reference.WITHOUT_CHAT or name in ("images", "single")
]


def most_varied(family):
    """Names of the samples of the most varied batch that a family takes."""
    return BATCHES["images" if family in family_reference.WITHOUT_CHAT else "mixed"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    known = {}

    def folder(family):
        if family not in known:
            known[family] = write_family(tmp_path_factory.mktemp(family), family)
        return str(known[family])

    return folder


@pytest.fixture(scope="module")
def models(folders):
    known = {}

    def model(family):
        if family not in known:
            known[family] = ImageTextToText(folders(family)).eval()
        return known[family]

    return model


def a_batch(model, names):
    """A batch of samples as the loader makes it."""
    transform, examples = model.transform(True), []
    for number, name in enumerate(names):
        conversation, images = SAMPLES[name]
        pixels = images if len(images) > 1 else images[0] if images else None
        processed = transform(pixels, conversation, 0)
        reference = conversation.reference
        examples.append(Example(processed, -100, 0, number, name, reference=reference))
    return collate(examples)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_tokens_loss_and_scores_are_the_models_own(family, name, models):
    model, names = models(family), BATCHES[name]
    batch = a_batch(model, names)
    reference = family_reference.reference(model.lm, model.processor, names)
    inputs, loss, logits, targets = reference
    assert torch.equal(batch.attention_mask.long(), inputs["attention_mask"])
    assert torch.equal(model._padded_tokens(batch), inputs["input_ids"])
    assert torch.equal(batch.labels, inputs["labels"])
    with torch.no_grad():
        output = model(batch)
    torch.testing.assert_close(model.loss(output, batch), loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.logits, logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(output.target_ids, targets)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_scores_depend_on_every_image(family, models, monkeypatch):
    model = models(family)
    conversation, (first, second) = SAMPLES["two"]
    with torch.no_grad():
        scores = model(a_batch(model, ["two"])).logits
        for images in ((255 - first, second), (first, 255 - second)):
            monkeypatch.setitem(SAMPLES, "two", (conversation, images))
            other = model(a_batch(model, ["two"])).logits
            assert (other - scores).abs().max() > 1e-2 * scores.abs().max()


@pytest.mark.parametrize(("family", "name"), CASES)
def test_answers_are_those_of_generate(family, name, models):
    model, names = models(family), BATCHES[name]
    found = model.generate(a_batch(model, names), max_new_tokens=8)
    assert found == family_reference.answers(model.lm, model.processor, names)
    assert len(set(found)) == len(set(names))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_sample_does_not_see_the_others_of_its_batch(family, models):
    model, names = models(family), most_varied(family)
    batch = a_batch(model, names)
    ones = [a_batch(model, [name]) for name in names]
    with torch.no_grad():
        together, alone = model(batch), torch.cat([model(one).logits for one in ones])
    torch.testing.assert_close(together.logits, alone, rtol=1e-4, atol=1e-4)
    answers = [model.generate(one, max_new_tokens=6)[0] for one in ones]
    assert model.generate(batch, max_new_tokens=6) == answers
    shown = torch.cat([model.embed(one, "image") for one in ones])
    torch.testing.assert_close(model.embed(batch, "image"), shown, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_gradients_are_the_models_own(family, folders):
    names = most_varied(family)
    model = ImageTextToText(folders(family), freeze=[])
    own = copy.deepcopy(model.lm)
    inputs, *_ = family_reference.reference(own, model.processor, names)
    own(**inputs).loss.backward()
    batch = a_batch(model, names)
    model.loss(model(batch), batch).backward()
    for (name, expected), parameter in zip(
        own.named_parameters(), model.lm.parameters(), strict=True
    ):
        gradient = torch.zeros_like(expected) if expected.grad is None else expected.grad
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_every_trainable_weight_has_a_gradient_in_every_batch(family, name, folders):
    model = ImageTextToText(folders(family), freeze=[])
    batch = a_batch(model, BATCHES[name])
    model.loss(model(batch), batch).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_lora_trains_every_target_and_answers_merged_as_unmerged(family, folders):
    model = ImageTextToText(folders(family))
    names = most_varied(family)
    batch, strategy = a_batch(model, names), LoRA(rank=2)
    targets = model.target_linears()
    with torch.no_grad():
        before = model(batch).logits
    strategy.attach(model)
    begin_task(model, strategy, Task(0, "answers", task_type="instruction"))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and "lora" in n.lower()}
    assert len(trained) == 2 * len(targets)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for number in range(2):
        done = step(model, strategy, batch)
        if number == 0:
            torch.testing.assert_close(done.output.logits, before)
        optimizer.zero_grad()
        done.loss.backward()
        optimizer.step()
    assert [n for n, p in trained.items() if p.grad is None or not p.grad.any()] == []
    plain = model.generate(batch, max_new_tokens=6)
    with strategy.merged_adapters(model):
        assert model.generate(batch, max_new_tokens=6) == plain


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_candidates_are_scored_as_if_each_were_the_answer(family, models):
    model, words = models(family), ("red", "a long blue one", "x")
    names = [name for name in most_varied(family) if name != "turns"]
    scores = []
    for name in names:
        conversation, images = SAMPLES[name]
        question = conversation.turns[0].text
        own = []
        for word in words:
            sample = {"x": (family_reference.dialogue(question, word), images)}
            _, loss, logits, _ = family_reference.reference(
                model.lm, model.processor, ["x"], sample
            )
            own.append(-float(loss) * len(logits))
        scores.append(own)
    expected = [words[max(range(3), key=own.__getitem__)] for own in scores]
    assert model.generate(a_batch(model, names), candidates=list(words)) == expected


@pytest.mark.parametrize("family", ["gemma3", "paligemma", "paligemma2", "idefics3"])
def test_stored_features_replace_squares(family, folders):
    model = ImageTextToText(folders(family), image_inputs="square").eval()
    batch = a_batch(model, ["one", "middle"])
    stored = replace(batch, images=None, features=model.encode_image(batch))
    with torch.no_grad():
        torch.testing.assert_close(model(stored).logits, model(batch).logits)
    answers = model.generate(batch, max_new_tokens=6)
    assert model.generate(stored, max_new_tokens=6) == answers
    assert len(set(answers)) == 2


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_vl"])
def test_native_inputs_are_not_stored_as_features(family, models):
    model = models(family)
    with pytest.raises(ValueError, match="image_inputs='square', or use raw replay"):
        model.encode_image(a_batch(model, ["one", "middle"]))


@pytest.mark.parametrize("family", family_reference.WITHOUT_CHAT)
def test_paligemma_takes_a_question_without_an_image_in_the_same_form(family, models):
    model = models(family)
    batch = a_batch(model, ["text"])
    tokens = batch.input_ids
    assert model.processor.tokenizer.decode(tokens[0]) == "<bos>one and two?\nthree<eos>"
    with torch.no_grad():
        expected = model.lm(
            input_ids=tokens, labels=batch.labels, token_type_ids=(batch.labels != -100).long()
        )
        found = model(batch)
    torch.testing.assert_close(model.loss(found, batch), expected.loss, rtol=1e-5, atol=1e-5)
