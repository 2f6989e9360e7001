from dataclasses import replace

import pytest
import torch
from torch import nn

from mmcl.core import NO_PROMPTS, Prompts
from mmcl.models.hf_vlm.decoding import generation
from mmcl.models.hf_vlm.decoding.generation import candidate_log_probs
from tests.toys.toy_llava import a_dialogue_batch, a_llava

TEXTS = ["red", "a", "it is yellow.", "blue and green, or nothing of the kind", "R"]


@pytest.fixture(scope="module")
def model():
    return sharpened(a_llava(seed=3, num_layers=2))


def sharpened(model):
    """Larger weights, so that answers differ between samples."""
    with torch.no_grad():
        for parameter in model.lm.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


def known(model, texts=TEXTS):
    return [model.chat_tokenizer.answer_tokens(text) for text in texts]


def plain(model, batch, prompts=NO_PROMPTS, texts=TEXTS):
    """Log probabilities through the training pass, one question and one answer at a time."""
    found = torch.zeros(len(batch), len(texts))
    for row in range(len(batch)):
        one = batch.take(torch.tensor([row]))
        start = int(torch.nonzero(one.labels[0] != -100)[0, 0])
        for column, answer in enumerate(known(model, texts)):
            tokens = torch.cat([one.input_ids[:, :start], answer[None]], 1)
            labels = torch.cat([torch.full((1, start), -100), answer[None]], 1)
            sample = replace(
                one, input_ids=tokens, labels=labels, attention_mask=torch.ones_like(tokens) > 0
            )
            own = Prompts(
                {place: t[row : row + 1] for place, t in prompts.tokens.items()},
                gates={name: gate[row : row + 1] for name, gate in prompts.gates.items()},
            )
            log_probs = model(sample, own).logits.log_softmax(-1)
            found[row, column] = log_probs.gather(1, answer[:, None]).sum()
    return found


@torch.no_grad()
def scores(model, batch, prompts=NO_PROMPTS, transform_output=None, texts=TEXTS):
    images = model.image_inputs.forward_kwargs(model.lm, batch)
    questions = model._questions(batch)
    return candidate_log_probs(
        model, questions, images, prompts, known(model, texts), transform_output
    )


def prompts_of(model, questions, gates=None):
    g = torch.Generator().manual_seed(2)
    made = torch.randn(questions, 3, model.prompt_dims["text"], generator=g)
    return Prompts({("text", 0): made}, gates=gates or {})


@torch.no_grad()
def test_encoding_the_question_once_gives_the_log_probabilities_of_encoding_it_each_time(model):
    batch = a_dialogue_batch(model, 5, task=1)
    torch.testing.assert_close(scores(model, batch), plain(model, batch), rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_groups_of_one_candidate_give_the_same_as_all_together(model, monkeypatch):
    batch = a_dialogue_batch(model, 3)
    together = scores(model, batch)
    monkeypatch.setattr(generation, "_GROUP_BYTES", 1)
    torch.testing.assert_close(scores(model, batch), together)


@torch.no_grad()
def test_prompts_are_before_every_candidate(model):
    batch = a_dialogue_batch(model, 4, task=1)
    prompts = prompts_of(model, 4)
    found = scores(model, batch, prompts)
    torch.testing.assert_close(found, plain(model, batch, prompts), rtol=1e-4, atol=1e-3)
    assert not torch.allclose(found, scores(model, batch))


class Gated(nn.Module):
    """Adds a sample's gate to the output of a layer."""

    def __init__(self, inner, gates):
        super().__init__()
        self.inner = inner
        self.gates = gates

    def forward(self, x):
        gate = self.gates["g"]
        assert len(gate) == len(x)
        return self.inner(x) * (1 + gate.sum(1))[:, None, None]


@torch.no_grad()
def test_gates_go_with_their_sample_to_every_candidate(monkeypatch):
    model = sharpened(a_llava(seed=3, num_layers=2))
    layer = model.lm.model.language_model.layers[0].self_attn
    layer.v_proj = Gated(layer.v_proj, model.gates)
    batch = a_dialogue_batch(model, 4)
    prompts = prompts_of(model, 4, {"g": torch.tensor([[0.0, 0], [1, 0], [0, 3], [-1, 5]])})
    expected = plain(model, batch, prompts)
    torch.testing.assert_close(scores(model, batch, prompts), expected, rtol=1e-4, atol=1e-3)
    monkeypatch.setattr(generation, "_GROUP_BYTES", 1)
    torch.testing.assert_close(scores(model, batch, prompts), expected, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_one_token_candidates_need_no_second_pass(model, monkeypatch):
    batch = a_dialogue_batch(model, 3)
    questions, images = model._questions(batch), model.image_inputs.forward_kwargs(model.lm, batch)
    firsts = [torch.tensor([5]), torch.tensor([9])]
    calls = []
    hook = model.lm.model.register_forward_hook(lambda *given: calls.append(1))
    found = candidate_log_probs(model, questions, images, NO_PROMPTS, firsts)
    hook.remove()
    assert len(calls) == 1
    longer = [torch.tensor([5, 1]), torch.tensor([9])]
    mixed = candidate_log_probs(model, questions, images, NO_PROMPTS, longer)
    torch.testing.assert_close(mixed[:, 1], found[:, 1])
    assert (mixed[:, 0] < found[:, 0]).all()


@torch.no_grad()
def test_refine_sees_the_sample_of_every_score(model):
    batch = a_dialogue_batch(model, 3)
    seen = []

    def transform_output(output):
        seen.append(output.sample_index)
        shift = torch.zeros_like(output.logits)
        shift[:, 7] = 3.0 * output.sample_index
        return replace(output, logits=output.logits + shift)

    found = scores(model, batch, transform_output=transform_output)
    assert sorted(set(torch.cat(seen).tolist())) == [0, 1, 2]
    torch.testing.assert_close(found[0], scores(model, batch)[0])
    assert not torch.isclose(found[2], scores(model, batch)[2]).all()


def test_the_most_probable_candidate_is_the_answer(model):
    batch = a_dialogue_batch(model, 6, task=1)
    prompts = prompts_of(model, 6)
    letters = list("RBGYabcdefg")
    best = plain(model, batch, prompts, letters).argmax(1).tolist()
    assert len(set(best)) > 1
    predicted = model.generate(batch, prompts, candidates=letters)
    assert predicted == [letters[index] for index in best]


def test_without_candidates_answers_are_generated(model):
    batch = a_dialogue_batch(model, 2)
    predicted = model.generate(batch, candidates=[], max_new_tokens=3)
    assert predicted == model.generate(batch, max_new_tokens=3)
