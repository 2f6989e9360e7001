from dataclasses import replace

import pytest
import torch

from mmcl.core import Batch, Prompts
from mmcl.models import ImageTextToText
from mmcl.models.hf_vlm.decoding.generation import left_pad, prompt_lengths
from mmcl.models.hf_vlm.prompts_and_gates import GateReplayContext
from tests.models import hf_reference
from tests.models.small_vlms import write_model
from tests.models.test_candidate_scoring import Gated, sharpened
from tests.toys.toy_clip import a_batch as a_clip_batch
from tests.toys.toy_llava import a_dialogue_batch, a_llava


@pytest.fixture(scope="module")
def model():
    return sharpened(a_llava(seed=3, num_layers=2))


def always(token, column=None):
    """A ``transform_output`` that makes one token the most probable from some step on."""
    steps = []

    def transform_output(output):
        steps.append(output)
        logits = output.logits.clone()
        if column is None or len(steps) > column:
            logits[:, token] = logits.max() + 1
        return replace(output, logits=logits)

    transform_output.steps = steps
    return transform_output


def test_refine_changes_every_next_word(model):
    batch = a_dialogue_batch(model, 2)
    token = model.chat_tokenizer.answer_tokens("red")[0].item()
    word = model.processor.tokenizer.decode([token] * 4).strip()
    transform_output = always(token)
    assert model.generate(batch, transform_output=transform_output, max_new_tokens=4) == [
        word,
        word,
    ]
    assert [step.sample_index.tolist() for step in transform_output.steps] == [[0, 1]] * 4


def test_the_end_token_stops_an_answer(model):
    batch = a_dialogue_batch(model, 2)
    transform_output = always(model.end_token_ids[0], column=2)
    answers = model.generate(batch, transform_output=transform_output, max_new_tokens=50)
    assert len(transform_output.steps) == 3
    assert answers == model.generate(batch, max_new_tokens=2)


def test_refine_gets_the_prompts(model):
    batch = a_dialogue_batch(model, 2)
    prompts = Prompts({("text", 0): torch.zeros(2, 1, model.prompt_dims["text"])})
    transform_output = always(3)
    model.generate(batch, prompts, transform_output=transform_output, max_new_tokens=1)
    model.generate(batch, prompts, transform_output=transform_output, candidates=["red", "blue"])
    assert all(step.prompts is prompts for step in transform_output.steps)


def test_the_models_own_generation_settings_are_ignored(model):
    batch = a_dialogue_batch(model, 3)
    plain = model.generate(batch, max_new_tokens=10)
    settings = model.lm.generation_config
    settings.repetition_penalty, settings.do_sample, settings.top_k = 50.0, True, 3
    settings.no_repeat_ngram_size = 1
    try:
        assert model.generate(batch, max_new_tokens=10) == plain
    finally:
        settings.repetition_penalty, settings.do_sample, settings.top_k = 1.0, False, 50
        settings.no_repeat_ngram_size = 0


def test_tokens_after_the_last_question_are_ignored(model):
    batch = a_dialogue_batch(model, 3)
    others = batch.input_ids.masked_fill(batch.labels != -100, 4)
    blind = replace(batch, input_ids=others)
    assert model.generate(blind, max_new_tokens=5) == model.generate(batch, max_new_tokens=5)


def test_generation_uses_no_dropout_in_training_mode():
    model = sharpened(a_llava(seed=3))
    for layer in model.lm.model.language_model.layers:
        layer.mlp.down_proj = torch.nn.Sequential(layer.mlp.down_proj, torch.nn.Dropout(0.5))
    batch = a_dialogue_batch(model, 4)
    still = model.generate(batch, max_new_tokens=6)
    model.train()
    model.lm.model.vision_tower.eval()
    assert model.generate(batch, max_new_tokens=6) == still
    assert model.training
    assert not model.lm.model.vision_tower.training


def test_prompts_at_the_image_tower_are_refused(model):
    prompts = Prompts({("image", 0): torch.zeros(2, 1, 16)})
    for ask in (model, model.generate):
        with pytest.raises(ValueError, match=r"prompts enter at \('image', 0\), .*modality='text'"):
            ask(a_dialogue_batch(model, 2), prompts)


def test_prompts_for_other_samples_or_dims_are_refused(model):
    batch = a_dialogue_batch(model, 2)
    for shape in ((3, 1, 16), (2, 1, 8)):
        with pytest.raises(ValueError, match=r"expected \(2, P, 16\): give every sample its own"):
            model(batch, Prompts({("text", 0): torch.zeros(shape)}))


def test_samples_of_a_classification_task_are_refused(model):
    with pytest.raises(ValueError, match="takes tasks of task_type 'instruction'; use OpenCLIP"):
        model(a_clip_batch(0))
    pixels = torch.zeros(3, 16, 16, dtype=torch.uint8)
    with pytest.raises(
        TypeError, match="takes conversations and got str: use it on tasks of task_type"
    ):
        model.transform(True)(pixels, "a caption", 0)


def test_the_prompt_of_a_sample_ends_where_its_last_answer_begins():
    labels = torch.tensor([[-100, 5, -100, 6, 7, -100], [-100] * 6, [-100, -100, 8, 8, 8, 8]])
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0], [1] * 6]).bool()
    batch = Batch(
        None, labels, torch.zeros(3).long(), input_ids=labels.clamp(min=0), attention_mask=mask
    )
    assert prompt_lengths(batch).tolist() == [3, 3, 2]


def test_questions_are_padded_on_the_left():
    tokens, mask = left_pad([torch.tensor([1, 2, 3]), torch.tensor([4])], 9)
    assert tokens.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]


def test_gates_of_the_first_pass_are_read_in_the_second():
    gates = {"a": torch.ones(1)}
    first, second = GateReplayContext(gates)()
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
    assert a_llava(image_aspect_ratio="crop").fingerprint() != first
    weight = next(iter(model.tower("image")))
    with torch.no_grad():
        weight.add_(1)
        changed = model.fingerprint()
        weight.sub_(1)
    assert changed != first
    model.image_inputs.mean[0] += 1
    assert model.fingerprint() not in (first, changed)
    learns = next(iter(model.tower("projector")))
    before = model.fingerprint()
    with torch.no_grad():
        learns.add_(1)
    assert model.fingerprint() == before


def test_casting_the_model_leaves_normalized_colors_as_they_are():
    model = a_llava()
    batch = a_dialogue_batch(model, 2)
    sharp = model.image_inputs.forward_kwargs(model.lm, batch)["pixel_values"]
    fill = model.transform(True).fill
    model.bfloat16()
    seen = model.image_inputs.forward_kwargs(model.lm, batch)["pixel_values"]
    assert torch.equal(seen, sharp.bfloat16())
    assert model.transform(True).fill == fill == (122, 116, 104)


def test_checkpointed_layers_read_the_gates_of_their_own_pass(tmp_path):
    folder = str(write_model(tmp_path, "llava"))
    gradients = []
    for twice in (False, True):
        model = ImageTextToText(folder, gradient_checkpointing=twice).train()
        layer = model.lm.model.language_model.layers[0].self_attn
        layer.v_proj = Gated(layer.v_proj, model.gates)
        batch = hf_reference.a_batch(model)
        own, other = (Prompts(gates={"g": torch.full((3, 1), scale)}) for scale in (1.0, -3.0))
        loss = model.loss(model(batch, own), batch)
        with torch.no_grad():
            model(batch, other)  # as a teacher would, before the backward pass
        loss.backward()
        gradients.append(layer.v_proj.inner.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
