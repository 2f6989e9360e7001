"""LoRA through peft: the same numbers, exact merging, and a folder that peft reads."""

import copy
import json

import peft
import pytest
import torch
from peft.tuners.lora import Linear as PeftLinear
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mmcl.core import Chain, trainable_parameters
from mmcl.layers.peft_lora import FusedLoraLinear
from mmcl.strategies import EWC, ExperienceReplay, LoRA, LwF
from mmcl.strategies.lora import peft_state
from tests.strategies.plain_loop import learn, lesson, whole
from tests.toys.toy_clip import StandIn, a_task

ENDS = {"attention": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj")}


def native():
    """A small language model as transformers makes it, with a layer that stands for a projector."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.connector = nn.Linear(3, 16)
    model.newline = nn.Parameter(torch.ones(16))  # belongs to no tower
    return model


class Speaker(nn.Module):
    """What a strategy sees of a generative adapter."""

    def __init__(self):
        super().__init__()
        self.lm = native()
        self.gates = {}

    def target_linears(self, which="all"):
        ends = ENDS.get(which, ENDS["attention"] + ENDS["mlp"])
        return {
            name: module
            for name, module in self.named_modules()
            if isinstance(module, nn.Linear) and name.endswith(ends)
        }

    def freeze(self, *parts):
        own = {"text": [self.lm.model, self.lm.lm_head], "projector": [self.lm.connector]}
        for part in parts:
            for module in own.get(part, ()):
                module.requires_grad_(False)

    def forward(self, tokens):
        return self.lm(tokens).logits + self.lm.connector.weight.sum()


def tokens():
    return torch.arange(12).view(2, 6)


def attached(fill=True, **how):
    """A model with an adapter that says something."""
    model, strategy = Speaker(), LoRA(rank=4, **how)
    strategy.attach(model)
    if fill:
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3, generator=generator)
    return model, strategy


def layers_of(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PeftLinear)}


def answer_and_slopes(model):
    model.zero_grad()
    answer = model(tokens())
    answer.square().mean().backward()
    return answer, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_a_new_adapter_changes_no_answer_and_is_all_that_learns():
    plain = Speaker()
    model, _ = attached(fill=False)
    assert torch.equal(model(tokens()), plain(tokens()))
    assert all("lora_" in name for name in trainable_parameters(model))
    assert len(trainable_parameters(model)) == 2 * len(plain.target_linears())


@pytest.mark.parametrize("layers", ["attention", "mlp"])
def test_layers_choose_what_is_adapted(layers):
    model, _ = attached(target_modules=layers)
    assert list(layers_of(model)) == list(Speaker().target_linears(layers))


def test_the_projector_learns_if_it_may():
    model, _ = attached(train_projector=True)
    assert [n for n in trainable_parameters(model) if "lora_" not in n] == [
        "lm.connector.weight",
        "lm.connector.bias",
    ]


def test_answers_and_gradients_are_pefts_own():
    model, _ = attached()
    ours = answer_and_slopes(model)
    for layer in layers_of(model).values():
        assert type(layer) is FusedLoraLinear
        layer.__class__ = PeftLinear
    torch.testing.assert_close(ours, answer_and_slopes(model), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "how",
    [{"dropout": 0.3}, {"options": {"use_dora": True}}, {"options": {"use_rslora": True}}],
    ids=["dropout", "dora", "rslora"],
)
@pytest.mark.parametrize("training", [True, False])
def test_what_is_not_plain_is_pefts_own(how, training):
    model, _ = attached(**how)
    model.train(training)
    torch.manual_seed(3)
    ours = model(tokens())
    for layer in layers_of(model).values():
        layer.__class__ = PeftLinear
    torch.manual_seed(3)
    torch.testing.assert_close(ours, model(tokens()), rtol=1e-5, atol=1e-5)


def test_a_disabled_adapter_leaves_the_base():
    model, _ = attached()
    for layer in layers_of(model).values():
        layer.enable_adapters(False)
    assert torch.equal(model(tokens()), Speaker()(tokens()))


def test_the_start_is_a_function_of_the_seed_and_disturbs_nobody():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    states = []
    for seed in (0, 0, 1):
        state = torch.random.get_rng_state()
        model = Speaker()
        torch.random.set_rng_state(state)
        LoRA(rank=4, seed=seed).attach(model)
        states.append(torch.cat([p.flatten() for p in trainable_parameters(model).values()]))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_adapters_of_a_half_precision_model_learn_in_float32():
    model = Speaker().bfloat16()
    LoRA(rank=4).attach(model)
    assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float32}
    answer, slopes = answer_and_slopes(model)
    assert answer.dtype == torch.bfloat16
    assert all(slope.dtype == torch.float32 for slope in slopes.values())


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": False}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_answers_alike_and_gives_back_the_very_bits(options, dtype):
    model, strategy = attached(options=options)
    for layer in layers_of(model).values():
        layer.base_layer.to(dtype)
    model.lm.to(dtype) if dtype == torch.bfloat16 else None
    model.eval()
    before, answer = copy.deepcopy(model.state_dict()), model(tokens())
    with torch.inference_mode(), strategy.merged_adapters(model):
        assert all(layer.merged for layer in layers_of(model).values())
        gap = (model(tokens()) - answer).float().norm() / answer.detach().float().norm()
        assert float(gap) < (1e-4 if dtype == torch.float32 else 0.05)
    assert not any(layer.merged for layer in layers_of(model).values())
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(model(tokens()), answer)
    model(tokens()).float().sum().backward()


def test_an_error_while_merged_brings_the_weights_back():
    model, strategy = attached()
    answer = model(tokens())
    with pytest.raises(KeyError), strategy.merged_adapters(model):
        raise KeyError
    assert torch.equal(model(tokens()), answer)


# peft 0.21 asks transformers 5 by an old name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("how", [{}, {"options": {"use_dora": True}}, {"train_projector": True}])
def test_peft_reads_the_exported_folder_into_the_native_model(how, tmp_path):
    model, strategy = attached(**how)
    if "train_projector" in how:
        nn.init.ones_(model.lm.connector.weight)
    state = {f"base_model.model.{name}": t for name, t in peft_state(model).items()}
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(strategy.peft_config(model)))
    loaded = peft.PeftModel.from_pretrained(native(), tmp_path)
    assert torch.equal(loaded.base_model.model.connector.weight, model.lm.connector.weight)
    torch.testing.assert_close(
        loaded(tokens()).logits, model.eval().lm(tokens()).logits, rtol=1e-5, atol=1e-5
    )


def test_the_exported_names_are_those_of_the_native_model():
    model, strategy = attached(target_modules="attention")
    names = {name.removeprefix("lm.") for name in Speaker().target_linears("attention")}
    assert set(peft_state(model)) == {f"{n}.lora_{side}.weight" for n in names for side in "AB"}
    config = strategy.peft_config(model)
    assert config["target_modules"] == sorted(names)
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)


def test_the_next_task_begins_with_the_answers_of_the_last_to_the_bit():
    model, strategy = StandIn(), LoRA(rank=2)
    strategy.attach(model)
    learn(model, strategy, [a_task(0)])
    before = model(whole(1)).logits
    strategy.begin_task(model, a_task(1))
    assert torch.equal(model(whole(1)).logits, before)


@pytest.mark.parametrize(
    "other",
    [lambda: EWC(ewc_lambda=10.0), LwF, lambda: ExperienceReplay(6)],
    ids=["EWC", "LwF", "ExperienceReplay"],
)
def test_with_another_strategy_only_the_adapter_learns(other):
    model = StandIn()
    chain = Chain([LoRA(rank=2), other()])
    chain.attach(model)
    before = copy.deepcopy(model.state_dict())
    terms = set()
    for task in (a_task(0), a_task(1)):
        for done in lesson(model, chain, task):
            terms |= set(done.terms)
    moved = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert moved == {"patch.lora_A.default.weight", "patch.lora_B.default.weight"}
    if not isinstance(chain.members[1], ExperienceReplay):
        assert len(terms) == 2


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"options": {"r": 8, "alpha": 2}}, "options has alpha, r, which"),
        ({"options": {"init_lora_weights": "pissa"}}, "rewrites the frozen weights"),
        ({"target_modules": "none"}, r"model\.target_linears\('none'\) is empty"),
    ],
)
def test_what_cannot_be_is_refused(how, message):
    model = Speaker()
    everything = model.target_linears
    model.target_linears = lambda which: {} if which == "none" else everything(which)
    with pytest.raises(ValueError, match=message):
        LoRA(**how).attach(model)


class TwoTowers(torch.nn.Module):
    """A dual encoder whose text tower is named as the language model of a generative one."""

    def __init__(self):
        super().__init__()
        self.image, self.lm = torch.nn.Linear(4, 3), torch.nn.Linear(2, 3)

    def freeze(self, *towers):
        self.requires_grad_(False)

    def target_linears(self, target_modules):
        return {"all": {"image": self.image, "lm": self.lm}}[target_modules]


def test_target_layers_of_both_towers_are_adapted_and_exported_by_their_names_in_the_model():
    model, strategy = TwoTowers(), LoRA(rank=2, alpha=3)
    weight, x = model.image.weight.detach().clone(), torch.randn(5, 4)
    bias = model.image.bias.detach().clone()
    strategy.attach(model)
    model.image.lora_B.default.weight.data.normal_()
    A, B = model.image.lora_A.default.weight, model.image.lora_B.default.weight
    torch.testing.assert_close(model.image(x), x @ (weight + 3 / 2 * B @ A).T + bias)
    names = {f"{tower}.lora_{matrix}.weight" for tower in ("image", "lm") for matrix in "AB"}
    assert set(peft_state(model)) == names
    assert strategy.peft_config(model)["target_modules"] == ["image", "lm"]


def test_a_projector_that_is_not_there_cannot_be_trained():
    with pytest.raises(ValueError, match=r"train_projector is True.* TwoTowers .*leave"):
        LoRA(rank=2, train_projector=True).attach(TwoTowers().requires_grad_(False))
