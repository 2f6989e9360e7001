import pytest
import torch
from torch import nn
from torch.nn import functional

from mmcl.core import NO_PROMPTS, Chain, Output, begin_task, forward, step, trainable_parameters
from mmcl.strategies.l2p import L2P
from tests.strategies.plain_loop import learn, lesson, whole
from tests.toys.toy_clip import StandIn, a_batch, a_task
from tests.toys.toy_llava import a_dialogue_batch, a_llava, an_answer_task


def attached(model=None, **arguments):
    model = StandIn() if model is None else model
    strategy = L2P(**arguments)
    strategy.attach(model)
    return model, strategy


class TwoTowers(StandIn):
    """A stand-in whose class texts take prompts, each row's own: the prompts' mean is added."""

    def __init__(self):
        super().__init__()
        self.prompt_dims = {"image": 16, "text": 16}

    def forward(self, batch, prompts=NO_PROMPTS):
        output = super().forward(batch, prompts)
        added = prompts.tokens.get(("text", 0))
        if added is None:
            return output
        text = functional.normalize(self.names.weight[None] + added.mean(1, keepdim=True), dim=-1)
        logits = 10 * torch.einsum("bd,bcd->bc", output.image, text)
        return Output(logits, output.image, None, prompts)


def test_every_sample_gets_the_prompts_of_its_own_nearest_keys():
    model, strategy = attached(pool_size=6, prompt_length=2, top_k=3)
    batch = whole(0).join(whole(1))
    prompts = strategy.prompts(model, batch)
    query = model.embed(batch, "image")
    tokens = prompts.tokens["image", 0]
    assert tokens.shape == (48, 6, 16)
    for row in range(48):
        similarity = [
            float(functional.cosine_similarity(query[row], key, dim=0))
            for key in strategy.keys.detach()
        ]
        chosen = sorted(range(6), key=lambda entry: -similarity[entry])[:3]
        expected = torch.cat([strategy.pool[entry] for entry in chosen])
        assert prompts.aux["match"][row].tolist() == chosen
        assert torch.equal(tokens[row], expected)


def test_samples_choose_alone_and_never_by_majority():
    model, strategy = attached(pool_size=6, top_k=1)
    batch = whole(0)
    with torch.no_grad():
        strategy.keys[0] = model.embed(batch, "image")[5]
        strategy.keys[1:] = model.embed(batch, "image")[:5]
    match = strategy.prompts(model, batch.take(torch.tensor([0, 0, 0, 5]))).aux["match"]
    assert match.flatten().tolist() == [1, 1, 1, 0]


def test_the_pull_subtracts_the_similarity_of_chosen_keys():
    model, strategy = attached(pull_weight=0.3, top_k=2)
    begin_task(model, strategy, a_task())
    done = step(model, strategy, a_batch())
    similarity = done.output.prompts.aux["similarity"].detach()
    total = sum(float(value) for row in similarity for value in row)
    assert float(done.terms["pull"].detach()) == pytest.approx(-0.3 * total / 8, rel=1e-5)


def test_only_the_pool_learns_and_only_chosen_keys_are_pulled():
    model, strategy = attached(pool_size=40, top_k=1)
    assert trainable_parameters(model) == {}
    begin_task(model, strategy, a_task())
    done = step(model, strategy, a_batch())
    done.loss.backward()
    chosen = set(done.output.prompts.aux["match"].flatten().tolist())
    for entry in range(40):
        assert bool(strategy.keys.grad[entry].any()) == (entry in chosen)
        assert bool(strategy.pool.grad[entry].any()) == (entry in chosen)


def test_towers_that_are_not_named_continue_learning():
    model, _ = attached(freeze=("image",))
    assert set(trainable_parameters(model)) == {"names.weight"}


def test_the_first_pool_is_a_function_of_the_seed_and_uniform():
    _, first = attached(seed=3, pool_size=200)
    _, second = attached(seed=3, pool_size=200)
    _, third = attached(seed=4, pool_size=200)
    assert torch.equal(first.pool, second.pool)
    assert torch.equal(first.keys, second.keys)
    assert not torch.equal(first.pool, third.pool)
    assert -1 <= float(first.pool.detach().min()) < -0.99
    assert 0.99 < float(first.pool.detach().max()) <= 1
    assert abs(float(first.pool.detach().mean())) < 0.02


def test_choices_are_counted_in_training_only_and_afresh_in_each_task():
    model, strategy = attached()
    learn(model, strategy, [a_task(0)])
    assert int(strategy.usage.sum()) == 24 * 5
    before = strategy.usage.clone()
    forward(model, strategy, whole(0))
    assert torch.equal(strategy.usage, before)
    counted = torch.zeros(10, dtype=torch.int64)
    for done in lesson(model, strategy, a_task(1)):
        for entry in done.output.prompts.aux["match"].flatten().tolist():
            counted[entry] += 1
    assert torch.equal(strategy.usage, counted)


def test_entries_that_no_sample_chose_are_named():
    model, strategy = attached(pool_size=3, top_k=1)
    strategy.usage = torch.tensor([0, 4, 0])
    assert strategy.inactive_parts() == ("pool entries 0, 2 of 3 were never chosen",)
    strategy.usage = torch.tensor([1, 4, 2])
    assert strategy.inactive_parts() == ()


def test_text_prompts_are_chosen_by_the_image():
    model, strategy = attached(TwoTowers(), modality="text", top_k=2)
    batch = whole(0)
    begin_task(model, strategy, a_task())
    done = step(model, strategy, batch)
    assert set(done.output.prompts.tokens) == {("text", 0)}
    assert set(done.terms) == {"task", "text_pull"}
    alone = forward(model, strategy, batch.take(torch.tensor([7]))).logits
    torch.testing.assert_close(done.output.logits[7:8], alone, rtol=1e-5, atol=1e-5)


def test_a_chain_prompts_both_towers_from_two_pools():
    model = TwoTowers()
    chain = Chain([L2P(), L2P(modality="text")])
    chain.attach(model)
    learn(model, chain, [a_task(0), a_task(1)])
    image, text = chain.members
    assert int(image.usage.sum()) == int(text.usage.sum()) == 24 * 5
    assert not torch.equal(image.keys, text.keys)


class WithWidth(StandIn):
    """An embedding wider than the tokens, as in most CLIPs."""

    embed_dim = 20

    def embed(self, batch, modality):
        return functional.pad(super().embed(batch, modality), (0, 4), value=0.1)


def test_keys_are_as_wide_as_the_embedding():
    model, strategy = attached(WithWidth())
    assert strategy.keys.shape == (10, 20)
    assert strategy.prompts(model, a_batch()).tokens["image", 0].shape == (8, 25, 16)
    _, narrow = attached(WithWidth(), key_dim=7)
    with pytest.raises(ValueError, match="query has dim 20 but keys have 7"):
        narrow.prompts(model, a_batch())


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 2)


def test_what_is_missing_is_named():
    with pytest.raises(TypeError, match=r"L2P needs model\.embed.*prompt_dims.*freeze"):
        L2P().attach(Bare())
    with pytest.raises(ValueError, match=r"prompts enter DualEncoder only at \['image'\]"):
        L2P(modality="text").attach(StandIn())
    with pytest.raises(RuntimeError, match=r"call strategy\.attach\(model\) once"):
        L2P().prompts(StandIn(), a_batch())


def test_prompts_of_text_enter_a_model_that_answers_and_nothing_else_learns():
    model, strategy = attached(a_llava(), modality="text", pool_size=4, prompt_length=2, top_k=2)
    assert list(trainable_parameters(model)) == []
    assert strategy.keys.shape == (4, 16)
    assert strategy.pool.shape == (4, 2, 16)
    batch = a_dialogue_batch(model)
    begin_task(model, strategy, an_answer_task(0))
    done = step(model, strategy, batch)
    done.loss.backward()
    assert bool(strategy.pool.grad.any())
    assert not torch.allclose(done.output.logits, model(batch).logits)
    with pytest.raises(ValueError, match=r"modality is 'image', but prompts enter .* \['text'\]"):
        attached(a_llava())


def test_keys_are_as_wide_as_the_guide_sees():
    routing_encoder = StandIn()
    routing_encoder.size, routing_encoder.embed_dim = 8, 16
    model, strategy = attached(a_llava(routing_encoder=routing_encoder), modality="text", top_k=1)
    batch = a_dialogue_batch(model)
    assert strategy.keys.shape[1] == model.embed(batch, "image").shape[1]
    assert forward(model, strategy, batch).prompts.tokens["text", 0].shape == (8, 5, 16)
    learned, _ = attached(a_llava(), modality="text", freeze=("image", "text"))
    assert all("projector" in name for name in trainable_parameters(learned))
