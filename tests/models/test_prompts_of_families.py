"""Soft prompts in native families: prompts that are embeddings of words equal those words.

So the reference is transformers alone, with the words as tokens in its inputs: it gives them their
positions, on three axes where a family has them, and its masks.
"""

import pytest
import torch

from mmcl.core import Prompts
from mmcl.models import ImageTextToText
from tests.models import family_reference
from tests.models.family_reference import SAMPLES, WITHOUT_CHAT
from tests.models.small_families import FAMILIES, write_family
from tests.models.test_families import a_batch

WORDS = "a red one"
BATCHES = {"images": ("one", "two", "between"), "mixed": ("text", "middle", "two")}
CASES = [
    (family, name)
    for family in sorted(FAMILIES)
    for name in BATCHES
    if family not in WITHOUT_CHAT or name == "images"
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    known = {}

    def model(family):
        if family not in known:
            folder = tmp_path_factory.mktemp(family)
            write_family(folder, family)
            known[family] = ImageTextToText(str(folder)).eval()
        return known[family]

    return model


def words_of(model):
    return torch.tensor(model.processor.tokenizer(WORDS, add_special_tokens=False)["input_ids"])


def prompts_of(model, words, samples):
    embedded = model.lm.get_input_embeddings()(words).detach()
    return Prompts({("text", 0): embedded.expand(samples, -1, -1)})


def place_of(model, row):
    """Where prompts enter: behind the begin token if a sample begins with it, else in front."""
    return int(row[0] == model.processor.tokenizer.bos_token_id)


def with_words(model, inputs, words, starts):
    """Inputs of transformers with the words put into every sample, which begins at ``starts``."""
    added = {
        "input_ids": words, "attention_mask": torch.ones_like(words),
        "labels": torch.full_like(words, -100),
    }  # fmt: skip
    longer = {}
    for name, value in inputs.items():
        if value.shape[:2] != inputs["input_ids"].shape or value.is_floating_point():
            longer[name] = value
            continue
        rows = []
        for row, start in zip(value, starts, strict=True):
            own = inputs["input_ids"][len(rows)]
            cut = start + place_of(model, own[start:])
            rows.append(torch.cat([row[:cut], added.get(name, torch.zeros_like(words)), row[cut:]]))
        longer[name] = torch.stack(rows)
    return longer


@pytest.mark.parametrize(("family", "name"), CASES)
def test_scores_with_prompts_are_those_with_the_words(family, name, models):
    model, names = models(family), BATCHES[name]
    words = words_of(model)
    inputs, *_ = family_reference.reference(model.lm, model.processor, names)
    longer = with_words(model, inputs, words, [0] * len(names))
    batch, prompts = a_batch(model, names), prompts_of(model, words, len(names))
    with torch.no_grad():
        expected = model.lm(**longer)
        found, without = model(batch, prompts), model(batch)
    torch.testing.assert_close(model.loss(found, batch), expected.loss, rtol=1e-5, atol=1e-5)
    rows, steps = torch.nonzero(longer["labels"][:, 1:] != -100, as_tuple=True)
    torch.testing.assert_close(found.logits, expected.logits[rows, steps], rtol=1e-4, atol=1e-5)
    assert (found.logits - without.logits).abs().max() > 1e-3


@pytest.mark.parametrize(("family", "name"), CASES)
def test_answers_with_prompts_are_those_with_the_words(family, name, models):
    model, names = models(family), BATCHES[name]
    words = words_of(model)
    conversations, images = zip(*(SAMPLES[one] for one in names), strict=True)
    inputs = family_reference.processed(
        model.processor, conversations, images, for_generation=True, side="left"
    )
    inputs.pop("labels", None)
    starts = inputs["attention_mask"].argmax(1).tolist()
    longer = with_words(model, inputs, words, starts)
    with torch.no_grad():
        tokens = model.lm.generate(**longer, do_sample=False, max_new_tokens=8)
    new = tokens[:, longer["input_ids"].shape[1] :]
    expected = [model.chat_tokenizer.decode(row) for row in new]
    prompts = prompts_of(model, words, len(names))
    assert model.generate(a_batch(model, names), prompts, max_new_tokens=8) == expected


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_prompts_learn_in_every_family(family, models):
    model, names = models(family), BATCHES["images"]
    prompts = prompts_of(model, words_of(model), len(names))
    learned = prompts.tokens["text", 0].clone().requires_grad_()
    batch = a_batch(model, names)
    model.loss(model(batch, Prompts({("text", 0): learned})), batch).backward()
    assert learned.grad.abs().amax((1, 2)).min() > 0
