"""The narrow pass beside the whole one, in the model that both are parts of."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmcl.core import begin_task
from mmcl.core.step import step
from mmcl.models.hf_vlm.last_block import LastBlock
from mmcl.strategies import LoRA
from tests.models import hf_reference
from tests.models.test_candidate_scoring import sharpened
from tests.toys.toy_llava import a_dialogue_batch, a_llava


@pytest.fixture
def model():
    return sharpened(a_llava(seed=3, num_layers=2))


@pytest.fixture
def lengths(monkeypatch):
    """Number of positions that the MLP of the last block computed in each pass."""
    seen = []

    def watch(model):
        mlp = model.blocks()[-1].mlp
        plain = type(mlp).forward
        monkeypatch.setattr(
            type(mlp),
            "forward",
            lambda self, x: (self is mlp and seen.append(x.shape[1])) or plain(self, x),
        )
        return seen

    return watch


def whole(model):
    """A copy that computes all positions of the last block."""
    twin = copy.deepcopy(model)
    twin.last_block._is_narrow = lambda *given: False
    return twin


def slopes(model, batch):
    model.zero_grad()
    output = model(batch)
    model.loss(output, batch).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach(), found


def test_scores_and_gradients_are_those_of_the_whole_block(model, lengths):
    model.freeze()
    model.lm.requires_grad_(True)
    twin, batch = whole(model), a_dialogue_batch(model, 3)
    seen = lengths(model)
    found, expected = slopes(model, batch), slopes(twin, batch)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    scale = max(float(slope.abs().max()) for slope in expected[1].values())
    for name, slope in expected[1].items():
        torch.testing.assert_close(
            found[1][name] / scale, slope / scale, rtol=1e-4, atol=1e-6, msg=name
        )
    most = int((batch.labels != -100).sum(1).max())
    # The proof's two passes, whole and narrow, then the narrow one.
    assert seen == [batch.input_ids.shape[1], most, most]


def test_a_step_with_adapters_has_the_loss_of_the_whole_block(model):
    strategy = LoRA(rank=2)
    strategy.attach(model)
    task = a_task()
    begin_task(model, strategy, task)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    twin = whole(model)
    batch = a_dialogue_batch(model, 3)
    torch.testing.assert_close(
        step(model, strategy, batch).loss, step(twin, strategy, batch).loss, rtol=1e-5, atol=1e-6
    )


def test_the_first_step_counts_as_many_operations_as_the_second(model):
    model.freeze("image")
    batch, found = a_dialogue_batch(model, 3), []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            model.loss(model(batch), batch).backward()
        found.append(counter.get_total_flops())
    assert model.last_block._proven
    assert found[0] == found[1] > 0


def a_task():
    from mmcl.core import Task

    return Task(0, "task", task_type="instruction", scorer="exact")


def test_positions_may_be_any_and_of_different_number(model):
    batch = a_dialogue_batch(model, 3)
    tokens = model._padded_tokens(batch)
    inputs = {
        "input_ids": tokens, "use_cache": False,
        **model.image_inputs.forward_kwargs(model.lm, batch),
    }  # fmt: skip
    samples, positions = torch.tensor([0, 0, 2]), torch.tensor([5, 2, 7])
    with torch.no_grad():
        found, _ = model.last_block.hidden_states(inputs, samples, positions)
        expected = model.lm.model(**inputs).last_hidden_state[samples, positions]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_without_a_position_there_is_no_hidden_state(model):
    batch = a_dialogue_batch(model, 2)
    inputs = {"input_ids": model._padded_tokens(batch)[:, :1], "use_cache": False}
    none = torch.zeros(0, dtype=torch.int64)
    assert model.last_block.hidden_states(inputs, none, none)[0].shape[0] == 0


def test_answers_longer_than_half_of_the_sample_are_computed_whole(model, lengths):
    batch = a_dialogue_batch(model, 2)
    seen = lengths(model)
    batch.labels[:] = batch.input_ids
    model(batch)
    assert seen == [batch.input_ids.shape[1]]


def test_a_hook_in_the_block_sees_all_positions(model):
    seen = []
    layer = model.blocks()[-1].mlp.down_proj
    layer.register_forward_hook(lambda module, given, out: seen.append(given[0].shape[1]))
    batch = a_dialogue_batch(model, 2)
    model(batch)
    assert seen == [batch.input_ids.shape[1]]


def test_a_checkpointed_block_is_computed_whole(model, lengths):
    model.lm.gradient_checkpointing_enable({"use_reentrant": False}) if not hasattr(
        model.lm, "activation_checkpointing_enable"
    ) else model.lm.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    model.lm.requires_grad_(True)
    for block in model.blocks():
        block.train()
    batch = a_dialogue_batch(model, 2)
    seen = lengths(model)
    model(batch)
    assert seen == [batch.input_ids.shape[1]]


class Shifted(torch.nn.Module):
    """A decoder that adds to each position what stands before it: more than a last block."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, **inputs):
        out = self.decoder(**inputs)
        out.last_hidden_state = out.last_hidden_state + out.last_hidden_state.roll(1, 1)
        return out


def test_a_decoder_that_does_more_behind_its_last_block_is_computed_whole(model):
    decoder = Shifted(model.lm.model)
    last_block = LastBlock(decoder, model.blocks()[-1])
    batch = a_dialogue_batch(model, 2)
    inputs = {
        "input_ids": model._padded_tokens(batch), "use_cache": False,
        **model.image_inputs.forward_kwargs(model.lm, batch),
    }  # fmt: skip
    samples, positions = torch.tensor([0, 1]), torch.tensor([9, 9])
    with torch.no_grad():
        found, _ = last_block.hidden_states(inputs, samples, positions)
        expected = decoder(**inputs).last_hidden_state[samples, positions]
    torch.testing.assert_close(found, expected)
    assert list(last_block._proven.values()) == [False]


def test_the_proof_draws_no_random_number_and_leaves_modes_alone(model):
    model.train()
    model.lm.requires_grad_(True)
    for module in model.lm.model.language_model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.lm.model.language_model.train()
    batch = a_dialogue_batch(model, 2)
    losses = []
    for _ in range(2):  # with the proof and without
        torch.manual_seed(0)
        losses.append(model.loss(model(batch), batch).detach())
    assert torch.equal(*losses)
    assert model.blocks()[-1].training


def test_batches_of_one_have_the_scores_of_the_batch(model):
    batch = hf_reference.a_batch(model, (0, 1, 2), turns=2)
    with torch.no_grad():
        together = model(batch).logits
        alone = [model(one).logits for one in hf_reference.one_by_one(batch)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
