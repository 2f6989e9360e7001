from dataclasses import replace

import pytest
import torch

from mmcl.core import Batch, Prompts
from mmcl.core.gates import KeptGates
from mmcl.models import ImageTextToText
from mmcl.models.generation import left_padded, prompt_lengths
from tests.models import native_chats as native
from tests.models.small_chats import write_model
from tests.models.test_candidates import Gated, sharpened
from tests.stand_in import a_batch as a_clip_batch
from tests.stand_in_llava import a_dialogue_batch, a_llava


@pytest.fixture(scope="module")
def model():
    return sharpened(a_llava(seed=3, layers=2))


def always(token, column=None):
    """A ``refine`` that makes one token the likeliest from some step on."""
    steps = []

    def refine(output):
        steps.append(output)
        logits = output.logits.clone()
        if column is None or len(steps) > column:
            logits[:, token] = logits.max() + 1
        return replace(output, logits=logits)

    refine.steps = steps
    return refine


def test_refine_changes_every_next_word(model):
    batch = a_dialogue_batch(model, 2)
    token = model.conversation.answer_tokens("red")[0].item()
    word = model.processor.tokenizer.decode([token] * 4).strip()
    refine = always(token)
    assert model.answer(batch, refine=refine, max_new_tokens=4) == [word, word]
    assert [step.rows.tolist() for step in refine.steps] == [[0, 1]] * 4


def test_the_end_token_stops_an_answer(model):
    batch = a_dialogue_batch(model, 2)
    refine = always(model.ends[0], column=2)
    said = model.answer(batch, refine=refine, max_new_tokens=50)
    assert len(refine.steps) == 3
    assert said == model.answer(batch, max_new_tokens=2)


def test_refine_is_told_the_prompts(model):
    batch = a_dialogue_batch(model, 2)
    prompts = Prompts({("text", 0): torch.zeros(2, 1, model.widths["text"])})
    refine = always(3)
    model.answer(batch, prompts, refine=refine, max_new_tokens=1)
    model.answer(batch, prompts, refine=refine, candidates=["red", "blue"])
    assert all(step.prompts is prompts for step in refine.steps)


def test_the_models_own_ways_of_generating_do_not_count(model):
    batch = a_dialogue_batch(model, 3)
    plain = model.answer(batch, max_new_tokens=10)
    settings = model.lm.generation_config
    settings.repetition_penalty, settings.do_sample, settings.top_k = 50.0, True, 3
    settings.no_repeat_ngram_size = 1
    try:
        assert model.answer(batch, max_new_tokens=10) == plain
    finally:
        settings.repetition_penalty, settings.do_sample, settings.top_k = 1.0, False, 50
        settings.no_repeat_ngram_size = 0


def test_what_stands_behind_the_last_question_is_not_looked_at(model):
    batch = a_dialogue_batch(model, 3)
    others = batch.tokens.masked_fill(batch.labels != -100, 4)
    blind = replace(batch, tokens=others)
    assert model.answer(blind, max_new_tokens=5) == model.answer(batch, max_new_tokens=5)


def test_nothing_is_dropped_in_answers_while_the_model_trains():
    model = sharpened(a_llava(seed=3))
    for layer in model.lm.model.language_model.layers:
        layer.mlp.down_proj = torch.nn.Sequential(layer.mlp.down_proj, torch.nn.Dropout(0.5))
    batch = a_dialogue_batch(model, 4)
    still = model.answer(batch, max_new_tokens=6)
    model.train()
    model.lm.model.vision_tower.eval()
    assert model.answer(batch, max_new_tokens=6) == still
    assert model.training
    assert not model.lm.model.vision_tower.training


def test_prompts_at_the_image_tower_are_refused(model):
    prompts = Prompts({("image", 0): torch.zeros(2, 1, 16)})
    for ask in (model, model.answer):
        with pytest.raises(ValueError, match=r"prompts enter at \('image', 0\), .*modality='text'"):
            ask(a_dialogue_batch(model, 2), prompts)


def test_prompts_for_other_rows_or_widths_are_refused(model):
    batch = a_dialogue_batch(model, 2)
    for shape in ((3, 1, 16), (2, 1, 8)):
        with pytest.raises(ValueError, match=r"expected \(2, P, 16\): give every row its own"):
            model(batch, Prompts({("text", 0): torch.zeros(shape)}))


def test_rows_of_a_classifying_task_are_refused(model):
    with pytest.raises(ValueError, match="takes tasks of kind 'answer'; use OpenCLIP"):
        model(a_clip_batch(0))
    pixels = torch.zeros(3, 16, 16, dtype=torch.uint8)
    with pytest.raises(TypeError, match="takes dialogues and got str: use it on tasks of kind"):
        model.transform(True)(pixels, "a caption", 0)


def test_the_prompt_of_a_row_ends_where_its_last_answer_begins():
    labels = torch.tensor([[-100, 5, -100, 6, 7, -100], [-100] * 6, [-100, -100, 8, 8, 8, 8]])
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0], [1] * 6]).bool()
    batch = Batch(None, labels, torch.zeros(3).long(), tokens=labels.clamp(min=0), mask=mask)
    assert prompt_lengths(batch).tolist() == [3, 3, 2]


def test_rows_are_padded_in_front():
    tokens, mask = left_padded([torch.tensor([1, 2, 3]), torch.tensor([4])], 9)
    assert tokens.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]


def test_gates_of_the_first_run_are_read_in_the_second():
    gates = {"a": torch.ones(1)}
    first, second = KeptGates(gates)()
    with first:
        assert gates["a"] == 1
    gates["a"], gates["b"] = torch.zeros(1), torch.ones(1)
    with second:
        assert list(gates) == ["a"]
        assert gates["a"] == 1
    assert list(gates) == ["a", "b"]
    assert gates["a"] == 0


def test_the_fingerprint_changes_with_frozen_weights_and_with_the_preprocessing():
    model = a_llava()
    first = model.fingerprint()
    assert model.fingerprint() == first == a_llava().fingerprint()
    assert a_llava(fit="crop").fingerprint() != first
    weight = next(iter(model.tower("image")))
    with torch.no_grad():
        weight.add_(1)
        changed = model.fingerprint()
        weight.sub_(1)
    assert changed != first
    model.pixels.mean[0] += 1
    assert model.fingerprint() not in (first, changed)
    learns = next(iter(model.tower("projector")))
    before = model.fingerprint()
    with torch.no_grad():
        learns.add_(1)
    assert model.fingerprint() == before


def test_casting_the_model_leaves_colours_as_they_are():
    model = a_llava()
    batch = a_dialogue_batch(model, 2)
    sharp = model.pixels.inputs(model.lm, batch)["pixel_values"]
    fill = model.transform(True).fill
    model.bfloat16()
    seen = model.pixels.inputs(model.lm, batch)["pixel_values"]
    assert torch.equal(seen, sharp.bfloat16())
    assert model.transform(True).fill == fill == (122, 116, 104)


def test_layers_computed_twice_read_the_gates_of_their_own_pass(tmp_path):
    folder = str(write_model(tmp_path, "llava"))
    gradients = []
    for twice in (False, True):
        model = ImageTextToText(folder, gradient_checkpointing=twice).train()
        layer = model.lm.model.language_model.layers[0].self_attn
        layer.v_proj = Gated(layer.v_proj, model.gates)
        batch = native.a_batch(model)
        own, other = (Prompts(gates={"g": torch.full((3, 1), scale)}) for scale in (1.0, -3.0))
        loss = model.loss(model(batch, own), batch)
        with torch.no_grad():
            model(batch, other)  # as a teacher would, before the backward pass
        loss.backward()
        gradients.append(layer.v_proj.inner.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
