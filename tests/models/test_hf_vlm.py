import copy

import pytest
import torch

from mmcl.core import NO_PROMPTS, Prompts
from mmcl.models import ImageTextToText
from tests.models import hf_reference
from tests.models.small_vlms import ARCHITECTURES, write_model

ROWS = (0, 1, 2)


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def folder(architecture, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp(architecture), architecture)


@pytest.fixture(scope="module")
def model(architecture, folder):
    return load(architecture, folder)


def load(architecture, folder, **changes):
    size = {"size": 16} if architecture == "qwen2_5_vl" else {}
    return ImageTextToText(str(folder), image_inputs="square", **{**size, **changes})


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("hidden", [(), (1,)])
def test_tokens_are_those_of_the_models_own_processor(architecture, model, turns, hidden):
    batch = hf_reference.a_batch(model, ROWS, turns, hidden)
    inputs = hf_reference.hf_inputs(model, architecture, ROWS, turns, hidden)
    assert torch.equal(batch.attention_mask.long(), inputs["attention_mask"])
    assert torch.equal(model._padded_tokens(batch), inputs["input_ids"])
    labels = hf_reference.hf_labels(model, architecture, ROWS, inputs, turns, hidden)
    assert torch.equal(batch.labels, labels)


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("hidden", [(), (1,), ROWS])
def test_the_loss_is_the_models_own_with_a_padding_mask(architecture, model, turns, hidden):
    batch = hf_reference.a_batch(model, ROWS, turns, hidden)
    inputs = hf_reference.hf_inputs(model, architecture, ROWS, turns, hidden)
    labels = hf_reference.hf_labels(model, architecture, ROWS, inputs, turns, hidden)
    with torch.no_grad():
        expected = model.lm(**inputs, labels=labels)
        output = model(batch)
    torch.testing.assert_close(model.loss(output, batch), expected.loss, rtol=1e-5, atol=1e-5)
    rows, index = torch.nonzero(labels[:, 1:] != -100, as_tuple=True)
    torch.testing.assert_close(output.logits, expected.logits[rows, index], rtol=1e-4, atol=1e-4)
    assert torch.equal(output.sample_index, rows)
    assert torch.equal(output.target_ids, labels[rows, index + 1])


@pytest.mark.parametrize("hidden", [(), (1,), ROWS])
def test_answers_are_those_of_generate(architecture, model, hidden):
    answers = model.generate(hf_reference.a_batch(model, ROWS, hidden=hidden), max_new_tokens=8)
    assert answers == hf_reference.hf_answers(model, architecture, ROWS, hidden=hidden)
    assert len(set(answers)) > 1


def test_a_batch_gives_the_same_as_batches_of_one(model):
    batch = hf_reference.a_batch(model, ROWS, hidden=(1,))
    with torch.no_grad():
        together = model(batch)
    alone = [model(one).logits for one in hf_reference.one_by_one(batch)]
    torch.testing.assert_close(together.logits, torch.cat(alone), rtol=1e-4, atol=1e-4)
    answers = [model.generate(one, max_new_tokens=6)[0] for one in hf_reference.one_by_one(batch)]
    assert model.generate(batch, max_new_tokens=6) == answers
    shown = [model.embed(one, "image") for one in hf_reference.one_by_one(batch)]
    torch.testing.assert_close(model.embed(batch, "image"), torch.cat(shown))


def prompts_of(model, rows=3, count=2, seed=5):
    g = torch.Generator().manual_seed(seed)
    return Prompts({("text", 0): torch.randn(rows, count, model.prompt_dims["text"], generator=g)})


def embedded(model, batch, prompts, row):
    """Embeddings of one sample with images and prompts in them, built by hand."""
    one = hf_reference.one_by_one(batch)[row]
    words = model.lm.get_input_embeddings()(one.input_ids)
    inputs = model.image_inputs.forward_kwargs(model.lm, one)
    if inputs:
        features = model.lm.model.get_image_features(**inputs).pooler_output
        features = (
            torch.cat(list(features)) if not torch.is_tensor(features) else features.flatten(0, 1)
        )
        words[one.input_ids == model.image_inputs.image_token_id] = features
    begins = model.soft_prompts.offset
    own = prompts.tokens["text", 0][row : row + 1]
    return torch.cat([words[:, :begins], own, words[:, begins:]], 1), one, inputs


def positions(model, one, inputs, count):
    """Positions of a model that counts in three dimensions; others compute them."""
    if not hasattr(model.lm.model, "get_rope_index"):
        return {}
    blank = torch.full((1, count), model.pad_token_id)
    tokens = torch.cat([blank, one.input_ids], 1)
    made = model.lm.model.get_rope_index(
        tokens, (tokens == model.image_inputs.image_token_id).long(), inputs.get("image_grid_thw")
    )
    return {"position_ids": made[0]}


def test_prompts_are_after_the_begin_token_in_training(model):
    batch, prompts = hf_reference.a_batch(model, ROWS, hidden=(1,)), prompts_of(model)
    with torch.no_grad():
        output = model(batch, prompts)
        for row in range(3):
            words, one, inputs = embedded(model, batch, prompts, row)
            where = positions(model, one, inputs, 2)
            hidden = model.lm.model(inputs_embeds=words, use_cache=False, **where)[0]
            logits = model.lm.get_output_embeddings()(hidden)[0]
            index = torch.nonzero(one.labels[0] != -100)[:, 0] + 2 - 1
            torch.testing.assert_close(
                output.logits[output.sample_index == row], logits[index], rtol=1e-4, atol=1e-4
            )
    assert model.soft_prompts.offset == (model.processor.tokenizer.bos_token_id is not None)


def test_prompts_get_gradients(model):
    batch, prompts = hf_reference.a_batch(model, ROWS), prompts_of(model)
    prompts.tokens["text", 0].requires_grad_()
    model.loss(model(batch, prompts), batch).backward()
    assert (prompts.tokens["text", 0].grad.abs().sum((1, 2)) > 0).all()
    model.zero_grad(set_to_none=True)


def test_prompts_enter_generation_and_candidates(model):
    batch, prompts = hf_reference.a_batch(model, ROWS, hidden=(1,)), prompts_of(model)
    answers = model.generate(batch, prompts, max_new_tokens=5)
    expected, log_probs = [], []
    for row in range(3):
        words, one, inputs = embedded(model, batch, prompts, row)
        start = int(torch.nonzero(one.labels[0] != -100)[0, 0])
        expected.append(by_hand(model, words[:, : start + 2], one, inputs, 5))
        log_probs.append([scored(model, one, text, prompts, row) for text in hf_reference.WORDS])
    assert answers == expected
    assert answers != model.generate(batch, max_new_tokens=5)
    best = [hf_reference.WORDS[max(range(5), key=own.__getitem__)] for own in log_probs]
    assert model.generate(batch, prompts, candidates=hf_reference.WORDS) == best


def by_hand(model, words, one, inputs, new):
    """Greedy tokens, with the whole sequence computed again for each."""
    generated = []
    for _ in range(new):
        tokens = one.input_ids[:, : words.shape[1] - 2 - len(generated)]
        sample = type(one)(None, one.labels, one.task_ids, input_ids=tokens)
        where = positions(model, sample, inputs, 2)
        if where and generated:
            ids = where["position_ids"]
            more = ids.max() + 1 + torch.arange(len(generated)).expand(3, 1, -1)
            where = {"position_ids": torch.cat([ids, more], 2)}
        hidden = model.lm.model(inputs_embeds=words, use_cache=False, **where)[0][:, -1]
        best = int(model.lm.get_output_embeddings()(hidden).argmax())
        if best in model.end_token_ids:
            break
        generated.append(best)
        words = torch.cat([words, model.lm.get_input_embeddings()(torch.tensor([[best]]))], 1)
    return model.processor.tokenizer.decode(generated, skip_special_tokens=True).strip()


def scored(model, one, text, prompts=NO_PROMPTS, row=0):
    """Log probability of an answer, through the training pass on a sample with that answer."""
    start = int(torch.nonzero(one.labels[0] != -100)[0, 0])
    answer = model.chat_tokenizer.answer_tokens(text)[None]
    tokens = torch.cat([one.input_ids[:, :start], answer], 1)
    labels = torch.cat([torch.full((1, start), -100), answer], 1)
    own = {position: t[row : row + 1] for position, t in prompts.tokens.items()}
    sample = type(one)(
        one.images, labels, one.task_ids, one.image_owner, tokens, torch.ones_like(tokens) > 0
    )
    with torch.no_grad():
        output = model(sample, Prompts(own))
    return -float(model.loss(output, sample)) * answer.shape[1]


def test_candidates_are_scored_as_if_each_were_the_answer(model, monkeypatch):
    batch = hf_reference.a_batch(model, ROWS, hidden=(1,))
    ones = hf_reference.one_by_one(batch)
    expected = torch.tensor(
        [[scored(model, one, text) for text in hf_reference.WORDS] for one in ones]
    )
    rows = model._questions(batch)
    known = [model.chat_tokenizer.answer_tokens(text) for text in hf_reference.WORDS]
    images = model.image_inputs.forward_kwargs(model.lm, batch)
    from mmcl.models.hf_vlm.decoding import generation

    with torch.no_grad():
        together = generation.candidate_log_probs(model, rows, images, NO_PROMPTS, known)
        monkeypatch.setattr(generation, "_GROUP_BYTES", 1)
        in_groups = generation.candidate_log_probs(model, rows, images, NO_PROMPTS, known)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(in_groups, together, rtol=1e-4, atol=1e-4)


def test_module_groups_are_the_whole_model_and_disjoint(model):
    parts = [list(model.tower(part)) for part in ("image", "projector", "text")]
    found = [id(parameter) for part in parts for parameter in part]
    assert all(parts)
    assert len(found) == len(set(found))
    assert set(found) == {id(parameter) for parameter in model.parameters()}


def test_a_frozen_group_gets_no_gradient_and_the_others_do(architecture, folder):
    for part in ("image", "projector", "text"):
        model = load(architecture, folder, freeze=[part])
        batch = hf_reference.a_batch(model, ROWS)
        model.loss(model(batch), batch).backward()
        assert model.is_frozen(part)
        for other in {"image", "projector", "text"} - {part}:
            assert any(p.grad is not None and p.grad.any() for p in model.tower(other))
        assert all(p.grad is None for p in model.tower(part))


@pytest.mark.parametrize("hidden", [(), ROWS])
def test_every_trainable_weight_has_a_gradient_with_and_without_images(
    architecture, folder, hidden
):
    model = load(architecture, folder, freeze=[])
    batch = hf_reference.a_batch(model, ROWS, hidden=hidden)
    model.loss(model(batch), batch).backward()
    assert all(p.grad is not None for p in model.parameters())
    shown = [p.grad for part in ("image", "projector") for p in model.tower(part)]
    assert any(gradient.any() for gradient in shown) == (not hidden)


def test_linears_are_those_of_the_language_model(architecture, model):
    language = {"smolvlm": "text_model"}.get(architecture, "language_model")
    per_layer = {
        "attention": [f"self_attn.{name}_proj" for name in "qkvo"],
        "mlp": [f"mlp.{name}_proj" for name in ("gate", "up", "down")],
    }
    for which, ends in {**per_layer, "all": sum(per_layer.values(), [])}.items():
        wanted = {f"lm.model.{language}.layers.{n}.{end}" for n in range(2) for end in ends}
        assert set(model.target_linears(which)) == wanted
    assert all(model.get_submodule(name) is layer for name, layer in model.target_linears().items())


def test_stored_features_replace_images_or_are_refused(architecture, model):
    batch = hf_reference.a_batch(model, ROWS)
    if architecture in ("qwen2_5_vl", "llava_onevision"):
        with pytest.raises(ValueError, match=f"cannot enter a model of type '{architecture}'"):
            model.encode_image(batch)
        return
    features = model.encode_image(batch)
    assert features.shape[0] == 3
    stored = type(batch)(
        None,
        batch.labels,
        batch.task_ids,
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        features=features,
    )
    assert model.encode_image(stored) is features
    torch.testing.assert_close(model(stored).logits, model(batch).logits)
    assert model.generate(stored, max_new_tokens=6) == model.generate(batch, max_new_tokens=6)
    words = list(hf_reference.WORDS)
    assert model.generate(stored, candidates=words) == model.generate(batch, candidates=words)
    torch.testing.assert_close(model.embed(stored, "image"), model.embed(batch, "image"))
    with pytest.raises(ValueError, match="3 samples have 2 images, but stored features"):
        model.encode_image(hf_reference.a_batch(model, ROWS, hidden=(1,)))


def test_a_copy_answers_the_same_and_shares_no_weights(model):
    other = copy.deepcopy(model)
    batch = hf_reference.a_batch(model, ROWS)
    torch.testing.assert_close(other(batch).logits, model(batch).logits)
    assert other.generate(batch, max_new_tokens=4) == model.generate(batch, max_new_tokens=4)
    mine, theirs = ({p.data_ptr() for p in m.parameters()} for m in (model, other))
    assert not mine & theirs


def test_half_precision_trains_and_answers(architecture, folder):
    model = load(architecture, folder, dtype="bfloat16")
    batch = hf_reference.a_batch(model, ROWS, hidden=(1,))
    prompts = prompts_of(model)
    loss = model.loss(model(batch, prompts), batch)
    loss.backward()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert loss.dtype == torch.float32
    assert len(model.generate(batch, prompts, max_new_tokens=3)) == 3
    assert len(model.generate(batch, prompts, candidates=["red", "x"])) == 3


def test_checkpointed_layers_give_the_same_gradients(architecture, folder):
    gradients = []
    for twice in (False, True):
        model = load(architecture, folder, freeze=[], gradient_checkpointing=twice).train()
        batch = hf_reference.a_batch(model, ROWS, hidden=(1,))
        model.loss(model(batch), batch).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_random_weights_come_from_the_seed(architecture, folder):
    first, same, other = (load(architecture, folder, pretrained=False, seed=s) for s in (1, 1, 2))
    assert first.fingerprint() == same.fingerprint() != other.fingerprint()
