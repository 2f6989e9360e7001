"""Questions of one image: read together, and with features of batches before."""

import copy
import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

from mmcl.core import Conversation, Prompts, Task, Turn, begin_task
from mmcl.data.batches.collate import Example, collate
from mmcl.models import ImageTextToText
from mmcl.models.hf_vlm.decoding import greedy_decoding
from mmcl.models.hf_vlm.decoding.image_cache import ImageCache, with_projected
from mmcl.models.hf_vlm.decoding.shared_prefix import share_prefix
from mmcl.strategies import LoRA
from tests.models import hf_reference
from tests.models.small_families import write_family
from tests.models.test_candidate_scoring import TEXTS, plain, sharpened
from tests.models.test_generation import always
from tests.models.test_greedy_decoding import by_generate
from tests.toys.toy_llava import a_llava

PLACEHOLDER = 9
QUESTIONS = ("what is it?", "what color is the small one on the left?", "is it red?", "why?")


@pytest.fixture
def model():
    return sharpened(a_llava(seed=3, num_layers=2))


def asked(model, pairs, mark="<image>\n{}"):
    """A batch of (images, question) pairs; images are numbers, or tuples of numbers."""
    transform, examples = model.transform(True), []
    for number, (shown, question) in enumerate(pairs):
        numbers = shown if isinstance(shown, tuple) else (shown,)
        pixels = tuple(hf_reference.an_image(each, model.image_inputs.size) for each in numbers)
        marks = mark.format(QUESTIONS[question])
        text = marks.replace("<image>\n", "<image>\n" * len(numbers))
        dialogue = Conversation((Turn("user", text), Turn("assistant", "red")), ("red",))
        made = transform(pixels if len(pixels) > 1 else pixels[0], dialogue, 0)
        example = Example(made, -100, 0, number, str(number), reference=dialogue.reference)
        examples.append(example)
    return collate(examples)


def lengths(model):
    """Shapes (samples, tokens) of the passes through the language model."""
    seen = []
    model.lm.model.language_model.register_forward_pre_hook(
        lambda module, args, given: seen.append(tuple(given["inputs_embeds"].shape[:2])),
        with_kwargs=True,
    )
    return seen


def encoded(model):
    """Numbers of images of the passes through the tower, the proof of its layers aside."""
    seen = []
    model.image_inputs.forward_kwargs(model.lm, hf_reference.a_batch(model, (7,)))
    model.lm.model.vision_tower.register_forward_pre_hook(
        lambda module, given: seen.append(len(given[0]))
    )
    return seen


PAIRS = [(0, 0), (1, 1), (0, 2), (1, 3), (0, 1), (2, 0)]


def test_answers_are_those_of_generate_and_the_image_is_read_once(model):
    batch = asked(model, PAIRS)
    expected = by_generate(model, batch)
    assert len(set(expected)) > 1
    assert model.generate(batch, max_new_tokens=8) == expected  # with the proof
    seen = lengths(model)
    assert model.generate(batch, max_new_tokens=8) == expected
    (groups, prefix), (samples, rest) = seen[:2]
    assert (groups, samples) == (3, 6)
    assert prefix + rest == max(len(text) for text in model._questions(batch))
    # System, image and the begin of the question are read once.
    assert prefix > model.image_placeholders.count("<image>")


def test_transforms_of_scores_see_every_sample(model):
    batch = asked(model, PAIRS)
    ends = always(model.end_token_ids[0], column=3)
    answers = model.generate(batch, transform_output=ends, max_new_tokens=9)
    assert answers == by_generate(
        model, batch, transform_output=always(model.end_token_ids[0], column=3), count=9
    )
    assert ends.steps[0].sample_index.tolist() == list(range(6))


def test_candidates_have_the_scores_of_single_questions(model):
    batch = asked(model, PAIRS)
    seen = lengths(model)
    found = model.generate(batch, candidates=TEXTS)
    assert (3, 6) in [(first[0], second[0]) for first, second in zip(seen, seen[1:], strict=False)]
    expected = plain(model, batch)
    assert found == [TEXTS[index] for index in expected.argmax(1).tolist()]
    questions, keys = model._questions(batch), None
    with torch.no_grad():
        images = model.image_inputs.forward_kwargs(model.lm, batch)
        images, keys = model.image_cache.encode(model, images, batch, Prompts())
        from mmcl.models.hf_vlm.decoding.generation import candidate_log_probs

        tokens = [model.chat_tokenizer.answer_tokens(text) for text in TEXTS]
        scores = candidate_log_probs(model, questions, images, Prompts(), tokens, None, keys)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_samples_with_two_images_share_if_both_are_the_same(model):
    batch = asked(model, [((0, 1), 0), ((0, 1), 1), ((1, 0), 2), ((0, 1), 3)])
    expected = by_generate(model, batch)
    assert model.generate(batch, max_new_tokens=8) == expected
    seen = lengths(model)
    assert model.generate(batch, max_new_tokens=8) == expected
    assert [shape[0] for shape in seen[:2]] == [2, 4]


def test_an_image_behind_the_question_is_read_for_each(model):
    batch = asked(model, [(0, 0), (0, 1), (0, 3)], mark="{} <image>\n")
    expected = by_generate(model, batch)
    assert model.generate(batch, max_new_tokens=8) == expected
    seen = lengths(model)
    assert model.generate(batch, max_new_tokens=8) == expected
    assert seen[0][0] == 3
    assert seen[1][1] == 1


def test_prompts_of_a_strategy_are_read_with_each_question(model):
    batch = asked(model, PAIRS)
    g = torch.Generator().manual_seed(0)
    prompts = Prompts({("text", 0): torch.randn(6, 2, 16, generator=g)})
    assert model.generate(batch, prompts, max_new_tokens=6) == by_generate(
        model, batch, prompts, count=6
    )
    assert not any("shared prefix" in kind for kind in model.decoder._proven)


def test_where_sharing_is_not_equal_each_question_is_read_whole(model, monkeypatch, caplog):
    batch = asked(model, PAIRS)
    expected = by_generate(model, batch)
    share = share_prefix

    def wrong(*given):
        found = share(*given)
        return None if found is None else replace(found, groups=found.groups.roll(1))

    monkeypatch.setattr("mmcl.models.hf_vlm.decoding.generation.share_prefix", wrong)
    with caplog.at_level(logging.INFO, logger=greedy_decoding.__name__):
        assert model.generate(batch, max_new_tokens=8) == expected
        assert model.generate(batch, candidates=TEXTS) == [
            TEXTS[index] for index in plain(model, batch).argmax(1).tolist()
        ]
    assert "questions of one image are read one by one: scores differ by up to" in caplog.text
    assert "answers are generated by mmcl's loop" in caplog.text


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl", "smolvlm", "qwen2_vl"])
def test_families_answer_as_generate_does(family, tmp_path):
    model = ImageTextToText(str(write_family(tmp_path, family)))
    batch = asked_natively(model, [(0, 0), (1, 2), (0, 2), (0, 3)])
    for _ in range(2):
        assert model.generate(batch, max_new_tokens=6) == by_generate(model, batch, count=6)
    is_shared = any("shared prefix" in kind for kind in model.decoder._proven)
    assert is_shared == (family in ("llava", "internvl"))


def asked_natively(model, pairs):
    transform, examples = model.transform(True), []
    for number, (shown, question) in enumerate(pairs):
        text = f"<image>\n{QUESTIONS[question]}"
        dialogue = Conversation((Turn("user", text), Turn("assistant", "red")), ("red",))
        made = transform(hf_reference.an_image(shown, 16), dialogue, 0)
        examples.append(Example(made, -100, 0, number, str(number), reference=dialogue.reference))
    return collate(examples)


def test_a_prefix_by_hand():
    tokens = torch.tensor([
        [1, PLACEHOLDER, PLACEHOLDER, 5, 6, 7],
        [1, PLACEHOLDER, PLACEHOLDER, 5, 8, 0],
        [1, PLACEHOLDER, PLACEHOLDER, 4, 6, 7],
        [1, PLACEHOLDER, PLACEHOLDER, 5, 6, 6],
    ])  # fmt: skip
    mask = tokens != 0
    images = [torch.full((2, 3), float(number)) for number in range(4)]
    inputs = with_projected(images)
    found = share_prefix(tokens, mask, inputs, [b"a", b"a", b"b", b"a"], PLACEHOLDER)
    # The first, second and last share 1, the image and 5.
    assert found.tokens.tolist() == [
        [1, PLACEHOLDER, PLACEHOLDER, 5],
        [1, PLACEHOLDER, PLACEHOLDER, 4],
    ]
    assert found.groups.tolist() == [0, 0, 1, 0]
    chosen = found.inputs["mm_encoder_outputs"]["image"].pooler_output
    assert [int(image[0, 0]) for image in chosen] == [0, 2]
    others = share_prefix(tokens, mask, inputs, [b"a", b"b", b"c", b"d"], PLACEHOLDER)
    assert others is None
    assert share_prefix(tokens, mask, with_projected(images[:3]), [b"a"] * 3, PLACEHOLDER) is None
    assert share_prefix(tokens, mask, {}, [], PLACEHOLDER) is None


def test_one_question_is_never_the_whole_prefix():
    tokens = torch.tensor([[1, PLACEHOLDER, 5], [1, PLACEHOLDER, 5]])
    images = with_projected([torch.zeros(1, 2)] * 2)
    found = share_prefix(tokens, tokens > 0, images, [b"a", b"a"], PLACEHOLDER)
    assert found.tokens.tolist() == [[1, PLACEHOLDER]]


def test_an_image_of_the_batch_before_is_not_encoded_again(model):
    seen = encoded(model)
    first, second = asked(model, [(0, 0), (1, 1)]), asked(model, [(1, 2), (2, 3), (0, 1)])
    answers = model.generate(first, max_new_tokens=4), model.generate(second, max_new_tokens=4)
    assert seen == [2, 1]
    assert answers == (by_generate(model, first, count=4), by_generate(model, second, count=4))


@pytest.mark.parametrize("way", ["data", "in place", "fused", "loaded"])
@pytest.mark.parametrize("part", ["vision_tower.encoder.layers.0.mlp.fc1", "multi_modal_projector"])
def test_features_of_other_weights_are_not_used(model, way, part):
    batch = asked(model, [(0, 0), (1, 1)])
    model.generate(batch, max_new_tokens=4)
    module = model.lm.model.get_submodule(part)
    weight = next(p for p in module.parameters() if p.ndim > 1)
    if way == "data":
        weight.data = weight.data.clone().mul_(-1.5)
    elif way == "in place":
        with torch.no_grad():
            weight[0, 0] += 1e-3
    elif way == "fused":
        weight.grad = torch.ones_like(weight)
        torch.optim.AdamW([weight], lr=0.5, fused=True).step()
    else:
        state = {name: value + 0.5 for name, value in module.state_dict().items()}
        module.load_state_dict(state)
    fresh = copy.deepcopy(model)
    fresh.image_cache.clear()
    seen = encoded(model)
    assert model.generate(batch, max_new_tokens=4) == fresh.generate(batch, max_new_tokens=4)
    assert seen == [2]


def test_a_training_step_drops_the_features(model):
    batch = asked(model, [(0, 0), (1, 1)])
    model.generate(batch, max_new_tokens=2)
    with torch.no_grad():
        model(batch)
    assert len(model.image_cache._features) == 2
    model(batch)
    assert len(model.image_cache._features) == 0


def test_only_the_last_images_are_kept(model):
    batch = asked(model, [(0, 0), (1, 1), (2, 2)])
    model.generate(batch, max_new_tokens=1)
    size = model.image_cache._bytes // 3
    cache = model.image_cache = ImageCache(model.lm, model.architecture, 2 * size)
    seen = encoded(model)
    for image in (0, 1, 2, 1, 0):
        model.generate(asked(model, [(image, 0)]), max_new_tokens=1)
    assert seen == [1, 1, 1, 1]
    assert cache._bytes == 2 * size
    assert sum(feature.untyped_storage().nbytes() for feature in cache._features.values()) == (
        2 * size
    )


def test_images_with_adapters_on_their_way_are_kept_within_a_batch(model):
    linear = model.lm.model.multi_modal_projector.linear_1

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.scale = linear, 1.0

        def forward(self, inputs):
            return self.base(inputs) * self.scale

    model.lm.model.multi_modal_projector.linear_1 = adapted = Adapted()
    batch = asked(model, [(0, 0), (1, 1), (0, 2)])
    model.generate(batch, max_new_tokens=4)
    seen = encoded(model)
    adapted.scale = -2.0  # no weight changes, as when another adapter is chosen
    fresh = copy.deepcopy(model)
    assert model.generate(batch, max_new_tokens=4) == fresh.generate(batch, max_new_tokens=4)
    assert seen == [2, 2]  # of this model and of its copy
    gates = Prompts(gates={"a": torch.ones(3, 1)})
    model.generate(batch, gates, max_new_tokens=1)
    assert seen[-1] == 3


def test_merged_adapters_of_the_language_model_share_questions(model):
    strategy = LoRA(rank=2)
    strategy.attach(model)
    task = Task(0, "task", task_type="instruction", scorer="exact")
    begin_task(model, strategy, task)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    batch = asked(model, PAIRS)
    expected = by_generate(model, batch)
    seen = encoded(model)
    with strategy.merged_adapters(model):
        assert model.generate(batch, max_new_tokens=8) == expected
    assert model.generate(batch, max_new_tokens=8) == expected
    assert seen == [3]
