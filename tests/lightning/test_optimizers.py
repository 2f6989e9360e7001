"""Parameter groups of the optimizer: parts, rates, weight decay, schedulers."""

import copy
from collections import Counter
from dataclasses import replace

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LinearLR, ReduceLROnPlateau

from mmcl.core import Strategy, Task, begin_task
from mmcl.lightning.config.cli import ContinualCLI
from mmcl.lightning.module import ContinualModule
from mmcl.lightning.optimization.optimizers import ParamGroup
from mmcl.models import OpenCLIP
from mmcl.strategies import L2P, Chain, CLMoE, LoRA, ModalPrompt
from tests.behaviour.kill_runs import KILLED
from tests.lightning.small_runs import SmallRuns
from tests.models.small_clip import write_small
from tests.toys.toy_clip import StandIn
from tests.toys.toy_llava import a_llava


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return OpenCLIP(str(write_small(tmp_path_factory.mktemp("clip"))), train_logit_scale=True)


def a_module(model, strategy=None, **settings):
    module = ContinualModule(copy.deepcopy(model), strategy, **settings)
    begin_task(module.model, module.strategy, Task(0, "first"))
    return module


def groups_of(module):
    """Name -> its group, and parameter name -> the name of its group."""
    made = module.configure_optimizers()
    optimizer = made if isinstance(made, Optimizer) else made["optimizer"]
    names = {id(p): name for name, p in module.named_parameters()}
    members = {
        names[id(p)]: group["name"] for group in optimizer.param_groups for p in group["params"]
    }
    count = Counter(id(p) for group in optimizer.param_groups for p in group["params"])
    trainable = [name for name, p in module.named_parameters() if p.requires_grad]
    assert set(members) == set(trainable)
    assert set(count.values()) == {1}
    return {group["name"]: group for group in optimizer.param_groups}, members


def with_gradients(module, seed=0):
    """Give every trainable parameter a gradient."""
    draw = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=draw)


def test_without_settings_the_weights_are_those_of_one_flat_adamw_bit_for_bit(clip):
    ours, plain = a_module(clip, learning_rate=1e-2), a_module(clip)
    optimizer = ours.configure_optimizers()
    flat = torch.optim.AdamW(plain.parameters(), 1e-2, (0.9, 0.98), weight_decay=0.0, fused=True)
    for seed in range(3):
        with_gradients(ours, seed)
        with_gradients(plain, seed)
        optimizer.step()
        flat.step()
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


def test_weights_decay_but_biases_norms_and_the_logit_scale_do_not(clip):
    groups, members = groups_of(a_module(clip, weight_decay=0.1))
    assert list(groups) == ["default", "default/no_decay"]
    assert [group["weight_decay"] for group in groups.values()] == [0.1, 0.0]
    for name, group in members.items():
        is_vector = name.endswith(("bias", "class_embedding", "logit_scale")) or ".ln_" in name
        assert group == ("default/no_decay" if is_vector else "default"), name


def test_pools_and_keys_do_not_decay(clip):
    _, members = groups_of(a_module(clip, L2P(pool_size=4, top_k=2, freeze=()), weight_decay=0.1))
    for name in ("strategy.pool", "strategy.keys"):
        assert members[name] == "default/no_decay"


def test_prompts_do_not_decay_but_the_layer_behind_them_does():
    module = a_module(a_llava(), ModalPrompt(prompt_length=2), weight_decay=0.1)
    _, members = groups_of(module)
    assert members["strategy.tokens.0"] == "default/no_decay"
    assert members["strategy.transforms.0.0.weight"] == "default"
    assert members["strategy.transforms.0.0.bias"] == "default/no_decay"


def test_an_entry_for_prompts_can_give_them_weight_decay():
    own = {"prompt": ParamGroup(weight_decay=0.01)}
    groups, members = groups_of(a_module(a_llava(), ModalPrompt(prompt_length=2), param_groups=own))
    assert groups[members["strategy.tokens.0"]]["weight_decay"] == 0.01


def test_adapters_and_projector_have_their_own_rates_and_adapters_decay():
    own = {"projector": 2e-5, "adapter": ParamGroup(weight_decay=0.05)}
    strategy = LoRA(rank=2, train_projector=True)
    module = a_module(a_llava(), strategy, learning_rate=2e-4, param_groups=own)
    groups, members = groups_of(module)
    projector = {id(p) for p in module.model.tower("projector")}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        group = groups[members[name]]
        if id(parameter) in projector:
            assert group["lr"] == 2e-5
        else:
            assert "lora_" in name
            assert (group["lr"], group["weight_decay"]) == (2e-4, 0.05)


def test_a_router_of_experts_is_a_part():
    module = a_module(a_llava(), CLMoE(2, 2, top_k=1), param_groups={"router": 0.5, "adapter": 0.1})
    groups, members = groups_of(module)
    assert groups[members.pop("strategy.router")]["lr"] == 0.5
    assert {groups[group]["lr"] for group in members.values()} == {0.1}


def test_the_first_match_counts_and_the_rest_has_the_modules_rate(clip):
    own = {"*.visual.proj": 0.5, "image": ParamGroup(lr_scale=0.1), "clip.ln_final.*": 0.25}
    groups, members = groups_of(a_module(clip, param_groups=own, learning_rate=0.01))
    for name, group in members.items():
        rate = 0.001 if ".visual." in name else 0.01
        rate = 0.5 if name.endswith("visual.proj") else 0.25 if "ln_final" in name else rate
        assert groups[group]["lr"] == pytest.approx(rate), name


def test_three_steps_are_those_of_groups_built_by_hand(clip):
    own = {"image": ParamGroup(1e-3, weight_decay=0.2), "text": ParamGroup(lr_scale=0.5)}
    ours = a_module(clip, param_groups=own, learning_rate=1e-2, weight_decay=0.1)
    plain, optimizer, by_hand = a_module(clip), ours.configure_optimizers(), []
    for name, p in plain.named_parameters():
        tower = "image" if ".visual." in name else None if "logit" in name else "text"
        rate = {"image": 1e-3, "text": 5e-3, None: 1e-2}[tower]
        decay = {"image": 0.2, "text": 0.1, None: 0.0}[tower] if p.ndim > 1 else 0.0
        by_hand.append({"params": [p], "lr": rate, "weight_decay": decay})
    reference = torch.optim.AdamW(by_hand, betas=(0.9, 0.98), fused=True)
    for seed in range(3):
        with_gradients(ours, seed)
        with_gradients(plain, seed)
        optimizer.step()
        reference.step()
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def test_layer_decay_scales_the_rates_of_open_clips_towers_by_depth(clip):
    own = {"image": ParamGroup(layer_decay=0.5), "text": ParamGroup(layer_decay=0.5)}
    groups, members = groups_of(a_module(clip, param_groups=own, learning_rate=1.0))
    expected = {  # two blocks: 0 embeddings, 1 and 2 blocks, 3 what follows
        "conv1": 0, "class_embedding": 0, "visual.positional_embedding": 0, "ln_pre": 0,
        "visual.transformer.resblocks.0": 1, "visual.transformer.resblocks.1": 2, "ln_post": 3,
        "visual.proj": 3, "token_embedding": 0, "clip.positional_embedding": 0,
        "clip.transformer.resblocks.0": 1, "clip.transformer.resblocks.1": 2, "ln_final": 3,
        "text_projection": 3, "logit_scale": 3,
    }  # fmt: skip
    for name, group in members.items():
        (depth,) = [depth for words, depth in expected.items() if words in name]
        assert groups[group]["lr"] == pytest.approx(0.5 ** (3 - depth)), name


class TimmTower(StandIn):
    """A toy with a ViT of timm beside it, whose towers it names."""

    def __init__(self):
        super().__init__()
        size = {"embed_dim": 8, "depth": 3, "num_heads": 2, "img_size": 32, "num_classes": 4}
        self.vit = timm.create_model("vit_tiny_patch16_224", **size)

    def parts(self):
        head = list(self.vit.head.parameters())
        image = [p for p in self.vit.parameters() if all(p is not q for q in head)]
        return {"image": image, "head": head}


def test_layer_decay_is_timms():
    model = TimmTower()
    own = {"image": ParamGroup(layer_decay=0.75)}
    groups, members = groups_of(a_module(model, param_groups=own, learning_rate=1.0))
    reference = {
        id(p): group["lr_scale"]
        for group in param_groups_layer_decay(model.vit, layer_decay=0.75)
        for p in group["params"]
    }
    for name, p in model.vit.named_parameters():
        scale = groups[members[f"model.vit.{name}"]]["lr"]
        # timm counts the last norm to the last block, BEiT to the head.
        expected = 1.0 if name.startswith("norm.") else reference[id(p)]
        assert scale == pytest.approx(expected), name


def test_adapters_have_the_depth_of_their_block():
    module = a_module(
        a_llava(), LoRA(rank=2), param_groups={"adapter": ParamGroup(layer_decay=0.5)}
    )
    module.settings = replace(module.settings, learning_rate=1.0)
    groups, _ = groups_of(module)
    assert {name: group["lr"] for name, group in groups.items()} == {"adapter/layer_01": 0.5}


@pytest.mark.parametrize(
    ("own", "sentence"),
    [
        ({"imagee": 0.1}, r"'imagee', which matches none of the \d+ train.*near names are image"),
        ({"image": 0.1, "clip.visual.*": 0.1},
         r"'clip\.visual\.\*', which matches none of the parameters that the entries before"),
        ({"adapter": 0.1}, r"'adapter'.*Trainable parts: image \(\d+\), text \(\d+\)"),
        ({"*.bias": ParamGroup(weight_decay=0.1)}, r"'\*\.bias' weight_decay 0\.1, and its \d+ p"),
        ({"*logit_scale": ParamGroup(layer_decay=0.5)}, r"layer_decay 0\.5, and none of its 1 p"),
    ],
)  # fmt: skip
def test_an_entry_without_effect_is_refused_by_name(clip, own, sentence):
    with pytest.raises(ValueError, match=sentence):
        a_module(clip, param_groups=own).configure_optimizers()


def test_an_entry_for_frozen_parameters_says_so(clip):
    module = a_module(clip, L2P(pool_size=4, top_k=2), param_groups={"image": 0.1})
    with pytest.raises(ValueError, match=r"its \d+ parameters are frozen.*parts: prompt \(2\)"):
        module.configure_optimizers()


def test_a_model_without_parts_is_told_of_the_method():
    with pytest.raises(ValueError, match=r"DualEncoder has no method parts\(\) that names"):
        a_module(StandIn(), param_groups={"image": 0.1}).configure_optimizers()


@pytest.mark.parametrize(
    ("own", "sentence"),
    [
        ({"learning_rate": -1.0}, "learning_rate is -1.0 in param_groups: give 0 or more"),
        ({"learning_rate": 1.0, "lr_scale": 0.1}, "for the same parameters: give one of them"),
        ({"layer_decay": 0.0}, "layer_decay is 0.0 in param_groups, expected above 0"),
        ({"layer_decay": 1.5}, "layer_decay is 1.5 in param_groups, expected above 0"),
    ],
)
def test_settings_out_of_range_are_refused(own, sentence):
    with pytest.raises(ValueError, match=sentence):
        ParamGroup(**own)


class Head(Strategy):
    """A strategy with a layer of its own."""

    def attach(self, model):
        self.layer = nn.Linear(2, 2)


def test_a_strategys_own_layer_is_a_head_also_in_a_chain(clip):
    strategy = Chain([Head(), L2P(pool_size=4, top_k=2)])
    groups, members = groups_of(a_module(clip, strategy, param_groups={"head": 0.5}))
    assert groups[members["strategy.members.0.layer.weight"]]["lr"] == 0.5
    assert members["strategy.members.1.pool"] == "default/no_decay"


def make_sgd(params, momentum: float = 0.5) -> Optimizer:
    """An optimizer as a configuration names it."""
    assert "default" in {group["name"] for group in params}
    return SGD(params, lr=0.1, momentum=momentum)


def flattening(groups):
    return SGD([p for group in groups for p in group["params"]], lr=0.1)


def test_an_optimizer_of_ones_own_gets_the_named_groups(clip):
    own = {"image": ParamGroup(lr_scale=0.5)}
    module = a_module(clip, optimizer=make_sgd, param_groups=own)
    groups, members = groups_of(module)
    rates = {groups[members[name]]["lr"] for name in members if ".visual." in name}
    assert rates == {0.05}
    assert groups["default"]["lr"] == 0.1
    assert groups["default"]["momentum"] == 0.5


def test_an_optimizer_that_drops_the_groups_is_refused_only_where_they_are_set(clip):
    module = a_module(clip, optimizer=flattening)
    (group,) = module.configure_optimizers().param_groups
    assert group["name"] == "group_0"
    module = a_module(clip, optimizer=flattening, param_groups={"image": 0.1})
    with pytest.raises(ValueError, match="returned 1 groups that are not the 4 of param_groups"):
        module.configure_optimizers()


OPTIMIZERS = {
    "function": ("tests.lightning.test_optimizers.make_sgd", (0.1, 0.5)),
    "class": ({"class_path": "torch.optim.SGD", "init_args": {"lr": 0.2, "momentum": 0.9}},
              (0.2, 0.9)),
}  # fmt: skip


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_configuration_names_a_function_or_a_class(tmp_path, kind):
    import yaml

    chosen, (rate, momentum) = OPTIMIZERS[kind]
    words = SmallRuns(tmp_path).words("run")
    overlay = tmp_path / "overlay.yaml"
    own = {"image": {"lr_scale": 0.5, "layer_decay": 1.0}, "*.ln_final.*": 2.0e-5}
    overlay.write_text(yaml.safe_dump({"model": {"optimizer": chosen, "param_groups": own}}))
    cli = ContinualCLI([*words, f"--config={overlay}"])
    assert cli.plain()["model"]["param_groups"]["*.ln_final.*"] == 2e-5
    groups, members = groups_of(cli.make_module())
    assert groups["default"]["lr"] == rate
    assert groups["default"]["momentum"] == momentum
    assert groups[members["model.clip.visual.proj"]]["lr"] == rate / 2
    assert groups[members["model.clip.ln_final.weight"]]["lr"] == 2e-5


def test_a_scheduler_beside_a_schedule_is_refused_by_name(clip):
    for changes in ({"warmup_steps": 3}, {"lr_schedule": "cosine"}):
        with pytest.raises(ValueError, match="lr_scheduler is given beside warmup_steps"):
            ContinualModule(copy.deepcopy(clip), lr_scheduler=LinearLR, **changes)


def test_a_scheduler_that_needs_a_metric_is_refused_by_name(clip):
    module = a_module(clip, lr_scheduler=ReduceLROnPlateau)
    with pytest.raises(ValueError, match="ReduceLROnPlateau, which needs a metric"):
        module.configure_optimizers()


SCHEDULER = {
    "model__warmup_steps": 0,
    "model__lr_schedule": "constant",
    "model__lr_scheduler": "torch.optim.lr_scheduler.CyclicLR",
    "model__lr_scheduler.base_lr": 1e-4,
    "model__lr_scheduler.max_lr": 1e-2,
    "model__lr_scheduler.step_size_up": 3,
    "model__lr_scheduler.cycle_momentum": "false",
    "model__param_groups": '{"image": {"weight_decay": 0.1, "layer_decay": 0.7}, "*ln_*": 1e-5}',
    "trainer__logger": "true",
    "trainer__log_every_n_steps": 1,
}


@pytest.mark.slow
def test_a_scheduler_steps_with_the_optimizer_and_resumes_exactly(tmp_path):
    import csv

    runs = SmallRuns(tmp_path, (17, 16))
    runs.finish("alone", **SCHEDULER)
    with (runs.path("alone") / "logs" / "metrics.csv").open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["train/loss"]]
    assert len(lines) == 10
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    expected = []
    for step in range(10):
        if step in (0, 6):  # a new one in every task
            scheduler = torch.optim.lr_scheduler.CyclicLR(
                optimizer, 1e-4, 1e-2, 3, cycle_momentum=False
            )
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert [float(line["learning_rate/default"]) for line in lines] == pytest.approx(expected)
    for moment in (("step", 4), ("step", 5)):
        assert runs.start("killed", kill=moment, **SCHEDULER)[0] == KILLED
    runs.finish("killed", **SCHEDULER)
    assert runs.differences("killed", "alone") == []


@pytest.mark.slow
def test_parameter_groups_resume_exactly(tmp_path):
    runs = SmallRuns(tmp_path)
    groups = {k: v for k, v in SCHEDULER.items() if k.endswith(("groups", "logger"))}
    for name, kill in (("alone", None), ("killed", ("step", 4)), ("killed", ("step", 7))):
        runs.start(name, "L2P", kill, **groups, **{"model__strategy.freeze": "[]"})
    runs.finish("killed", "L2P", **groups, **{"model__strategy.freeze": "[]"})
    assert runs.differences("killed", "alone") == []
