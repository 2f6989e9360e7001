import copy

import pytest
import torch

from mmcl.core import NO_PROMPTS, Prompts
from mmcl.models import ImageTextToText
from tests.models import native_chats as native
from tests.models.small_chats import FAMILIES, write_model

ROWS = (0, 1, 2)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp(family), family)


@pytest.fixture(scope="module")
def model(family, folder):
    return load(family, folder)


def load(family, folder, **changes):
    size = {"size": 16} if family == "qwen2_5_vl" else {}
    return ImageTextToText(str(folder), **{**size, **changes})


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("hidden", [(), (1,)])
def test_tokens_are_those_of_the_models_own_processor(family, model, turns, hidden):
    batch = native.a_batch(model, ROWS, turns, hidden)
    inputs = native.native_inputs(model, family, ROWS, turns, hidden)
    assert torch.equal(batch.mask.long(), inputs["attention_mask"])
    assert torch.equal(model._tokens(batch), inputs["input_ids"])
    labels = native.native_labels(model, family, ROWS, inputs, turns, hidden)
    assert torch.equal(batch.labels, labels)


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("hidden", [(), (1,), ROWS])
def test_the_loss_is_the_models_own_with_a_padding_mask(family, model, turns, hidden):
    batch = native.a_batch(model, ROWS, turns, hidden)
    inputs = native.native_inputs(model, family, ROWS, turns, hidden)
    labels = native.native_labels(model, family, ROWS, inputs, turns, hidden)
    with torch.no_grad():
        expected = model.lm(**inputs, labels=labels)
        output = model(batch)
    torch.testing.assert_close(model.loss(output, batch), expected.loss, rtol=1e-5, atol=1e-5)
    rows, places = torch.nonzero(labels[:, 1:] != -100, as_tuple=True)
    torch.testing.assert_close(output.logits, expected.logits[rows, places], rtol=1e-4, atol=1e-4)
    assert torch.equal(output.rows, rows)
    assert torch.equal(output.targets, labels[rows, places + 1])


@pytest.mark.parametrize("hidden", [(), (1,), ROWS])
def test_answers_are_those_of_generate(family, model, hidden):
    said = model.answer(native.a_batch(model, ROWS, hidden=hidden), max_new_tokens=8)
    assert said == native.native_answers(model, family, ROWS, hidden=hidden)
    assert len(set(said)) > 1


def test_a_batch_of_rows_is_as_many_batches_of_one(model):
    batch = native.a_batch(model, ROWS, hidden=(1,))
    with torch.no_grad():
        together = model(batch)
    alone = [model(one).logits for one in native.one_by_one(batch)]
    torch.testing.assert_close(together.logits, torch.cat(alone), rtol=1e-4, atol=1e-4)
    said = [model.answer(one, max_new_tokens=6)[0] for one in native.one_by_one(batch)]
    assert model.answer(batch, max_new_tokens=6) == said
    shown = [model.embed(one, "image") for one in native.one_by_one(batch)]
    torch.testing.assert_close(model.embed(batch, "image"), torch.cat(shown))


def prompts_of(model, rows=3, count=2, seed=5):
    g = torch.Generator().manual_seed(seed)
    return Prompts({("text", 0): torch.randn(rows, count, model.widths["text"], generator=g)})


def embedded(model, batch, prompts, row):
    """Embeddings of one row with pictures and prompts in them, made by hand."""
    one = native.one_by_one(batch)[row]
    words = model.lm.get_input_embeddings()(one.tokens)
    inputs = model.pixels.inputs(model.lm, one)
    if inputs:
        seen = model.lm.model.get_image_features(**inputs).pooler_output
        seen = torch.cat(list(seen)) if not torch.is_tensor(seen) else seen.flatten(0, 1)
        words[one.tokens == model.pixels.token] = seen
    begins = model.entrance.begins
    own = prompts.tokens["text", 0][row : row + 1]
    return torch.cat([words[:, :begins], own, words[:, begins:]], 1), one, inputs


def positions(model, one, inputs, count):
    """Of a model that counts in three dimensions; others count by themselves."""
    if not hasattr(model.lm.model, "get_rope_index"):
        return {}
    blank = torch.full((1, count), model.pad)
    tokens = torch.cat([blank, one.tokens], 1)
    made = model.lm.model.get_rope_index(
        tokens, (tokens == model.pixels.token).long(), inputs.get("image_grid_thw")
    )
    return {"position_ids": made[0]}


def test_prompts_stand_behind_the_begin_token_in_training(model):
    batch, prompts = native.a_batch(model, ROWS, hidden=(1,)), prompts_of(model)
    with torch.no_grad():
        output = model(batch, prompts)
        for row in range(3):
            words, one, inputs = embedded(model, batch, prompts, row)
            where = positions(model, one, inputs, 2)
            hidden = model.lm.model(inputs_embeds=words, use_cache=False, **where)[0]
            logits = model.lm.get_output_embeddings()(hidden)[0]
            places = torch.nonzero(one.labels[0] != -100)[:, 0] + 2 - 1
            torch.testing.assert_close(
                output.logits[output.rows == row], logits[places], rtol=1e-4, atol=1e-4
            )
    assert model.entrance.begins == (model.processor.tokenizer.bos_token_id is not None)


def test_prompts_learn(model):
    batch, prompts = native.a_batch(model, ROWS), prompts_of(model)
    prompts.tokens["text", 0].requires_grad_()
    model.loss(model(batch, prompts), batch).backward()
    assert (prompts.tokens["text", 0].grad.abs().sum((1, 2)) > 0).all()
    model.zero_grad(set_to_none=True)


def test_prompts_enter_generation_and_candidates(model):
    batch, prompts = native.a_batch(model, ROWS, hidden=(1,)), prompts_of(model)
    said = model.answer(batch, prompts, max_new_tokens=5)
    expected, likely = [], []
    for row in range(3):
        words, one, inputs = embedded(model, batch, prompts, row)
        start = int(torch.nonzero(one.labels[0] != -100)[0, 0])
        expected.append(by_hand(model, words[:, : start + 2], one, inputs, 5))
        likely.append([scored(model, one, text, prompts, row) for text in native.WORDS])
    assert said == expected
    assert said != model.answer(batch, max_new_tokens=5)
    best = [native.WORDS[max(range(5), key=own.__getitem__)] for own in likely]
    assert model.answer(batch, prompts, candidates=native.WORDS) == best


def by_hand(model, words, one, inputs, new):
    """Greedy words, the whole row read again for each."""
    said = []
    for _ in range(new):
        tokens = one.tokens[:, : words.shape[1] - 2 - len(said)]
        where = positions(model, type(one)(None, one.labels, one.task, tokens=tokens), inputs, 2)
        if where and said:
            ids = where["position_ids"]
            more = ids.max() + 1 + torch.arange(len(said)).expand(3, 1, -1)
            where = {"position_ids": torch.cat([ids, more], 2)}
        hidden = model.lm.model(inputs_embeds=words, use_cache=False, **where)[0][:, -1]
        best = int(model.lm.get_output_embeddings()(hidden).argmax())
        if best in model.ends:
            break
        said.append(best)
        words = torch.cat([words, model.lm.get_input_embeddings()(torch.tensor([[best]]))], 1)
    return model.processor.tokenizer.decode(said, skip_special_tokens=True).strip()


def scored(model, one, text, prompts=NO_PROMPTS, row=0):
    """Log likelihood of an answer, through the training pass on a row that has it as its answer."""
    start = int(torch.nonzero(one.labels[0] != -100)[0, 0])
    said = model.conversation.answer_tokens(text)[None]
    tokens = torch.cat([one.tokens[:, :start], said], 1)
    labels = torch.cat([torch.full((1, start), -100), said], 1)
    own = {place: given[row : row + 1] for place, given in prompts.tokens.items()}
    asked = type(one)(one.images, labels, one.task, one.owner, tokens, torch.ones_like(tokens) > 0)
    with torch.no_grad():
        output = model(asked, Prompts(own))
    return -float(model.loss(output, asked)) * said.shape[1]


def test_candidates_are_scored_as_if_each_were_the_answer(model, monkeypatch):
    batch = native.a_batch(model, ROWS, hidden=(1,))
    ones = native.one_by_one(batch)
    expected = torch.tensor([[scored(model, one, text) for text in native.WORDS] for one in ones])
    rows = model._questions(batch)
    known = [model.conversation.answer_tokens(text) for text in native.WORDS]
    pictures = model.pixels.inputs(model.lm, batch)
    from mmcl.models import candidates

    with torch.no_grad():
        together = candidates.likelihoods(model, rows, pictures, NO_PROMPTS, known)
        monkeypatch.setattr(candidates, "_BYTES", 1)
        in_groups = candidates.likelihoods(model, rows, pictures, NO_PROMPTS, known)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(in_groups, together, rtol=1e-4, atol=1e-4)


def test_parts_are_the_whole_model_and_share_nothing(model):
    parts = [list(model.tower(part)) for part in ("image", "projector", "text")]
    found = [id(parameter) for part in parts for parameter in part]
    assert all(parts)
    assert len(found) == len(set(found))
    assert set(found) == {id(parameter) for parameter in model.parameters()}


def test_a_frozen_part_learns_nothing_and_the_others_do(family, folder):
    for part in ("image", "projector", "text"):
        model = load(family, folder, frozen=[part])
        batch = native.a_batch(model, ROWS)
        model.loss(model(batch), batch).backward()
        assert model.is_frozen(part)
        for other in {"image", "projector", "text"} - {part}:
            assert any(p.grad is not None and p.grad.any() for p in model.tower(other))
        assert all(p.grad is None for p in model.tower(part))


@pytest.mark.parametrize("hidden", [(), ROWS])
def test_every_learning_weight_has_a_gradient_with_and_without_pictures(family, folder, hidden):
    model = load(family, folder, frozen=[])
    batch = native.a_batch(model, ROWS, hidden=hidden)
    model.loss(model(batch), batch).backward()
    assert all(p.grad is not None for p in model.parameters())
    shown = [p.grad for part in ("image", "projector") for p in model.tower(part)]
    assert any(gradient.any() for gradient in shown) == (not hidden)


def test_linears_are_those_of_the_language_model(family, model):
    language = {"smolvlm": "text_model"}.get(family, "language_model")
    per_layer = {
        "attention": [f"self_attn.{name}_proj" for name in "qkvo"],
        "mlp": [f"mlp.{name}_proj" for name in ("gate", "up", "down")],
    }
    for which, ends in {**per_layer, "all": sum(per_layer.values(), [])}.items():
        wanted = {f"lm.model.{language}.layers.{n}.{end}" for n in range(2) for end in ends}
        assert set(model.linears(which)) == wanted
    assert all(model.get_submodule(name) is layer for name, layer in model.linears().items())


def test_stored_features_stand_in_for_pictures_or_are_refused(family, model):
    batch = native.a_batch(model, ROWS)
    if family in ("qwen2_5_vl", "llava_onevision"):
        with pytest.raises(ValueError, match=f"cannot enter a model of type '{family}'"):
            model.encode(batch)
        return
    features = model.encode(batch)
    assert features.shape[0] == 3
    stored = type(batch)(
        None, batch.labels, batch.task, tokens=batch.tokens, mask=batch.mask, features=features
    )
    assert model.encode(stored) is features
    torch.testing.assert_close(model(stored).logits, model(batch).logits)
    assert model.answer(stored, max_new_tokens=6) == model.answer(batch, max_new_tokens=6)
    words = list(native.WORDS)
    assert model.answer(stored, candidates=words) == model.answer(batch, candidates=words)
    torch.testing.assert_close(model.embed(stored, "image"), model.embed(batch, "image"))
    with pytest.raises(ValueError, match="3 rows have 2 pictures: features stand in for one"):
        model.encode(native.a_batch(model, ROWS, hidden=(1,)))


def test_a_copy_answers_the_same_and_shares_no_weights(model):
    other = copy.deepcopy(model)
    batch = native.a_batch(model, ROWS)
    torch.testing.assert_close(other(batch).logits, model(batch).logits)
    assert other.answer(batch, max_new_tokens=4) == model.answer(batch, max_new_tokens=4)
    mine, theirs = ({p.data_ptr() for p in m.parameters()} for m in (model, other))
    assert not mine & theirs


def test_half_precision_trains_and_answers(family, folder):
    model = load(family, folder, base_precision="bf16")
    batch = native.a_batch(model, ROWS, hidden=(1,))
    prompts = prompts_of(model)
    loss = model.loss(model(batch, prompts), batch)
    loss.backward()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert loss.dtype == torch.float32
    assert len(model.answer(batch, prompts, max_new_tokens=3)) == 3
    assert len(model.answer(batch, prompts, candidates=["red", "x"])) == 3


def test_layers_that_are_computed_twice_give_the_same_gradients(family, folder):
    gradients = []
    for twice in (False, True):
        model = load(family, folder, frozen=[], gradient_checkpointing=twice).train()
        batch = native.a_batch(model, ROWS, hidden=(1,))
        model.loss(model(batch), batch).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_random_weights_come_from_the_seed(family, folder):
    first, same, other = (load(family, folder, pretrained=False, seed=s) for s in (1, 1, 2))
    assert first.fingerprint() == same.fingerprint() != other.fingerprint()
