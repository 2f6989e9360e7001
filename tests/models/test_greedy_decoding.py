"""mmcl's loop beside transformers' ``generate`` on the same inputs."""

import logging
from dataclasses import replace

import pytest
import torch

from mmcl.core import NO_PROMPTS, Prompts
from mmcl.models import ImageTextToText
from mmcl.models.hf_vlm.decoding import generation
from mmcl.models.hf_vlm.decoding.greedy_decoding import GreedyDecoder, UnsupportedCacheError
from tests.models import hf_reference
from tests.models.family_reference import SAMPLES
from tests.models.small_families import FAMILIES, write_family
from tests.models.test_candidate_scoring import Gated, sharpened
from tests.models.test_generation import always
from tests.toys.toy_llava import a_dialogue_batch, a_llava

BY_GENERATE = {"gemma3": "sliding window of 24", "lfm2_vl": "LinearAttentionLayer"}


@pytest.fixture
def model():
    return sharpened(a_llava(seed=3, num_layers=2))


@torch.no_grad()
def by_generate(model, batch, prompts=NO_PROMPTS, count=8, transform_output=None):
    """Texts of transformers' ``generate``."""
    settings = generation._settings(model, count, model.end_token_ids)
    images = model.image_inputs.forward_kwargs(model.lm, batch)
    model.eval()
    new = generation._generate(
        model, model._questions(batch), images, prompts, settings, transform_output
    )
    return [model.chat_tokenizer.decode(answer) for answer in new]


def native_batch(model, names):
    from mmcl.data.batches.collate import Example, collate

    transform, examples = model.transform(True), []
    for number, name in enumerate(names):
        conversation, images = SAMPLES[name]
        pixels = images if len(images) > 1 else (images[0] if images else None)
        made = transform(pixels, conversation, 0)
        examples.append(Example(made, -100, 0, number, name, reference=conversation.reference))
    return collate(examples)


@pytest.mark.parametrize(
    "family", [name for name in sorted(FAMILIES) if not name.startswith("paligemma")]
)
def test_answers_of_every_family_are_those_of_generate(family, tmp_path, caplog):
    model = ImageTextToText(str(write_family(tmp_path, family)))
    batch = native_batch(model, list(SAMPLES))
    with caplog.at_level(logging.INFO, logger="mmcl.models.hf_vlm.decoding.greedy_decoding"):
        answers = model.generate(batch, max_new_tokens=8)
    assert answers == by_generate(model, batch)
    assert len(set(answers)) > 1
    wanted = BY_GENERATE.get(family, "by mmcl's loop: equal to transformers' generate")
    assert wanted in caplog.text
    assert list(model.decoder._proven.values()) == [family not in BY_GENERATE]


class Ends:
    """Ends sample b after ``lengths[b]`` tokens; notes the samples of every step."""

    def __init__(self, lengths, end):
        self.lengths, self.end, self.samples = torch.tensor(lengths), end, []

    def __call__(self, output):
        step = len(self.samples)
        self.samples.append(output.sample_index.tolist())
        logits = output.logits.clone()
        logits[:, self.end] = logits.min() - 1
        over = self.lengths[output.sample_index] <= step
        logits[over, self.end] = logits.max() + 1
        return replace(output, logits=logits)


def test_samples_that_have_ended_leave_the_batch_and_the_others_do_not_notice(model):
    batch = hf_reference.a_batch(model, (0, 1, 2, 3, 4, 5), hidden=(1, 4))
    lengths, end = [1, 9, 2, 2, 9, 1], model.end_token_ids[0]
    ours, theirs = Ends(lengths, end), Ends(lengths, end)
    found = model.generate(batch, transform_output=ours, max_new_tokens=12)
    assert found == by_generate(model, batch, count=12, transform_output=theirs)
    everyone = [0, 1, 2, 3, 4, 5]
    assert ours.samples == [everyone, everyone, [1, 2, 3, 4], *[[1, 4]] * 7]
    assert theirs.samples == [everyone] * 10


def test_gates_follow_the_samples_that_stay(model):
    layer = model.lm.model.language_model.layers[0].self_attn
    layer.v_proj = Gated(layer.v_proj, model.gates)
    batch = hf_reference.a_batch(model, (0, 1, 2, 3))
    prompts = Prompts(gates={"g": torch.tensor([[0.0, 0], [1, 0], [0, 3], [-1, 5]])})
    lengths, end = [6, 1, 1, 5], model.end_token_ids[0]
    ours, theirs = Ends(lengths, end), Ends(lengths, end)
    found = model.generate(batch, prompts, transform_output=ours, max_new_tokens=8)
    assert found == by_generate(model, batch, prompts, transform_output=theirs)
    assert ours.samples[2:] == [[0, 3]] * 4 + [[0]]
    assert list(model.decoder._proven.values()) == [True]


def test_prompts_are_read_and_stay_those_of_their_samples(model):
    batch = hf_reference.a_batch(model, (0, 1, 2), hidden=(2,))
    g = torch.Generator().manual_seed(4)
    prompts = Prompts({("text", 0): torch.randn(3, 2, model.prompt_dims["text"], generator=g)})
    answers = model.generate(batch, prompts, max_new_tokens=8)
    assert answers == by_generate(model, batch, prompts)
    assert answers != model.generate(batch, max_new_tokens=8)


def test_a_transform_of_the_scores_is_called_once_a_step_and_not_by_the_proof(model):
    transform_output = always(3)
    model.generate(a_dialogue_batch(model, 2), transform_output=transform_output, max_new_tokens=3)
    assert len(transform_output.steps) == 3


def test_every_kind_of_input_is_proven_once(model):
    batch, calls = hf_reference.a_batch(model, (0, 1)), []
    plain = model.lm.generate
    model.lm.generate = lambda **given: calls.append(1) or plain(**given)
    for _ in range(2):
        model.generate(batch, max_new_tokens=2)
    assert len(calls) == 1
    for one in hf_reference.one_by_one(batch):
        model.generate(one, max_new_tokens=2)
    assert len(calls) == 2  # samples of one length


def test_a_loop_that_differs_is_not_used_and_the_log_says_so(model, monkeypatch, caplog):
    plain = GreedyDecoder._advance

    def wrong(self, model, questions, samples, tokens, step, cache):
        return plain(self, model, questions, samples, tokens + 1, step, cache)

    monkeypatch.setattr(GreedyDecoder, "_advance", wrong)
    batch = hf_reference.a_batch(model, (0, 1))
    assert model.generate(batch, max_new_tokens=8) == by_generate(model, batch)
    assert "by transformers' generate: scores differ by up to" in caplog.text


def test_a_decoder_that_refuses_a_keyword_is_left_to_generate(model, monkeypatch, caplog):
    def refuses(*given):
        raise TypeError("no such keyword")

    monkeypatch.setattr(GreedyDecoder, "_advance", refuses)
    batch = hf_reference.a_batch(model, (0, 1))
    assert model.generate(batch, max_new_tokens=8) == by_generate(model, batch)
    assert "TypeError: no such keyword" in caplog.text


def test_questions_too_long_for_the_cache_are_left_to_generate_after_a_proof(model, monkeypatch):
    batch = hf_reference.a_batch(model, (0, 1))
    model.generate(batch, max_new_tokens=2)

    def full(*given):
        raise UnsupportedCacheError("a sliding window")

    monkeypatch.setattr(GreedyDecoder, "_read", full)
    assert model.generate(batch, max_new_tokens=8) == by_generate(model, batch)
    assert list(model.decoder._proven.values()) == [False]


def test_answers_beyond_the_first_room_of_the_cache_are_right(model, monkeypatch):
    from mmcl.models.hf_vlm.decoding.greedy_decoding import _InPlaceLayer

    monkeypatch.setattr(_InPlaceLayer, "_CHUNK", 3)
    batch = hf_reference.a_batch(model, (0, 1, 2))
    model.end_token_ids = [10_000]
    assert model.generate(batch, max_new_tokens=20) == by_generate(model, batch, count=20)


def test_one_token_is_enough(model):
    batch = hf_reference.a_batch(model, (0, 1))
    assert model.generate(batch, max_new_tokens=1) == by_generate(model, batch, count=1)


def test_an_image_with_several_questions_goes_through_the_tower_once(model):
    first = hf_reference.a_batch(model, (0, 1, 2))
    batch = replace(first, images=first.images[[0, 1, 0]])
    seen, tower = [], model.lm.model.vision_tower
    model.image_inputs.forward_kwargs(model.lm, batch)  # proves which layers of the tower are read
    tower.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    answers = model.generate(batch, max_new_tokens=6)
    assert seen == [2]
    assert answers == by_generate(model, batch, count=6)
    assert model.generate(first, max_new_tokens=6) == by_generate(model, first, count=6)


@pytest.mark.parametrize("family", ["internvl", "smolvlm", "qwen2_vl", "gemma3"])
def test_repeated_images_of_other_families_are_those_of_generate(family, tmp_path):
    model = ImageTextToText(str(write_family(tmp_path, family)))
    batch = native_batch(model, ["one", "middle", "one", "two"])
    assert model.generate(batch, max_new_tokens=6) == by_generate(model, batch, count=6)
