"""Frozen means frozen: running statistics stand still and dropout is off, whatever the mode."""

import copy

import torch
from torch import nn
from torch.nn import functional

from mmcl.core import Output, Task, begin_task, end_task, forward, step
from mmcl.lightning import ContinualModule
from mmcl.models import OpenCLIP
from mmcl.models.fingerprint import fingerprint_of
from mmcl.models.hf_vlm.loading import enable_gradient_checkpointing
from mmcl.strategies import L2P, NCM, Finetune
from tests.models.small_resnet import NAMES, a_resnet_clip, photos, statistics
from tests.toys.toy_llava import a_dialogue_batch, a_llava, an_answer_task

TASK = Task(0, "birds", classes=NAMES, class_ids=(0, 1))


def trained(model, strategy=None, steps=5, optimizer=None):
    """Steps of a user's own loop, which calls ``model.train()`` after the task began."""
    strategy = Finetune() if strategy is None else strategy
    if strategy.current_task is None:
        begin_task(model, strategy, TASK)
    model.train()
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.SGD(learning, lr=1e-2)
    for _ in range(steps):
        step(model, strategy, photos()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_a_frozen_resnet_gives_the_same_embeddings_after_training(tmp_path):
    model = a_resnet_clip(tmp_path, freeze=["image"])
    before, kept = model.embed(photos(), "image"), statistics(model)
    mark, text = model.fingerprint(), model.clip.text_projection.detach().clone()
    assert len(kept) > 20
    trained(model)
    assert not torch.equal(model.clip.text_projection, text)
    assert torch.equal(model.embed(photos(), "image"), before)
    for name, value in statistics(model).items():
        assert torch.equal(value, kept[name]), name
    assert model.fingerprint() == mark


def test_nearest_class_means_of_a_resnet_are_those_of_its_features_in_evaluation(tmp_path):
    model, strategy = a_resnet_clip(tmp_path), NCM()
    plain = copy.deepcopy(model.clip).eval()
    for parameter in plain.parameters():
        parameter.requires_grad_(False)
    strategy.attach(model)
    begin_task(model, strategy, TASK)
    batches = [photos(6, seed) for seed in range(3)]
    model.train()
    end_task(model, strategy, TASK, batches)
    sums = torch.zeros(2, 32, dtype=torch.float64)
    for batch in batches:
        for image, label in zip(batch.images, batch.labels, strict=True):
            pixels = (image.float() - model._mean) / model._std
            feature = plain.encode_image(pixels[None])[0].double()
            sums[label] += feature / feature.norm()
    torch.testing.assert_close(strategy.means.get("sums"), sums, rtol=1e-5, atol=1e-5)
    unseen = photos(20, seed=9)
    assert forward(model, strategy, unseen).logits.argmax(1).equal(unseen.labels)


def test_a_trainable_resnet_embeds_in_evaluation_mode_and_keeps_its_own(tmp_path):
    model = a_resnet_clip(tmp_path)
    trained(model, steps=2)
    kept, modes = statistics(model), [module.training for module in model.modules()]
    assert all(modes)
    embedded, encoded = model.embed(photos(), "image"), model.encode_image(photos())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, kept[name]) for name, value in statistics(model).items())
    model.eval()
    output = model(photos())
    torch.testing.assert_close(embedded, output.image)
    torch.testing.assert_close(functional.normalize(encoded[:, 0], dim=-1), output.image)


def test_only_a_batchnorm_with_frozen_parameters_stands_still(tmp_path):
    model = a_resnet_clip(tmp_path)
    model.clip.visual.bn1.requires_grad_(False)
    kept = statistics(model.clip.visual)
    trained(model, steps=3)
    moved = {
        name.rpartition(".")[0]
        for name, value in statistics(model.clip.visual).items()
        if not torch.equal(value, kept[name])
    }
    assert moved == {name.rpartition(".")[0] for name in kept} - {"bn1"}


def test_trainable_statistics_move_as_in_a_bare_loop(tmp_path):
    model = a_resnet_clip(tmp_path)
    bare = copy.deepcopy(model).clip.train()
    trained(model, steps=3)
    optimizer = torch.optim.SGD([p for p in bare.parameters() if p.requires_grad], lr=1e-2)
    tokens = model._class_tokens
    for _ in range(3):
        pixels = (photos().images.float() - model._mean) / model._std
        image = functional.normalize(bare.encode_image(pixels), dim=-1)
        padded = functional.pad(tokens, (0, 16 - tokens.shape[1]))
        text = functional.normalize(bare.encode_text(padded), dim=-1)
        logits = bare.logit_scale.exp() * image @ text.T
        functional.cross_entropy(logits, photos().labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = statistics(bare)
    for name, value in statistics(model.clip).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_running_statistics_of_frozen_modules_are_in_the_fingerprint(tmp_path):
    frozen, free = (a_resnet_clip(tmp_path, freeze=some) for some in (["image"], ["text"]))
    marks = frozen.fingerprint(), free.fingerprint()
    for model in (frozen, free):
        model.clip.visual.bn1.running_mean += 1
    assert frozen.fingerprint() != marks[0]
    assert free.fingerprint() == marks[1]


def test_without_running_statistics_the_fingerprint_is_of_the_weights_alone():
    model = OpenCLIP("tiny", "built-in", freeze=["image"])
    named = [*model.clip.named_parameters(), ("mean", model._mean), ("std", model._std)]
    frozen = [(name, tensor) for name, tensor in named if not tensor.requires_grad]
    assert model.fingerprint() == fingerprint_of(f"{model.size}", frozen)


def test_moved_statistics_are_in_the_checkpoint_so_that_training_resumes_to_the_bit(tmp_path):
    def module():
        return ContinualModule(a_resnet_clip(tmp_path))

    whole, killed, resumed = module(), module(), module()
    trained(whole.model, whole.strategy, 6)
    optimizer = trained(killed.model, killed.strategy, 3)
    state = copy.deepcopy((killed.trainable_state_dict(), optimizer.state_dict()))
    begin_task(resumed.model, resumed.strategy, TASK)
    learning = [p for p in resumed.model.parameters() if p.requires_grad]
    again = torch.optim.SGD(learning, lr=1e-2)
    resumed.load_state_dict(state[0], strict=False)
    again.load_state_dict(state[1])
    trained(resumed.model, resumed.strategy, 3, again)
    expected = whole.state_dict()
    assert any("running_var" in name for name in state[0])
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, expected[name]), name


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


def test_the_frozen_modules_of_a_generative_model_are_in_evaluation_mode_in_training():
    model = a_llava(routing_encoder=OpenCLIP("tiny", "built-in")).train()
    found = modes(model)
    assert found["lm.model.language_model"]
    assert found["lm.model.multi_modal_projector"]
    frozen = [name for name in found if name.startswith(("lm.model.vision", "routing_encoder"))]
    assert len(frozen) > 40
    assert not any(found[name] for name in frozen)
    model.freeze("text")
    assert not any(on for name, on in modes(model).items() if "language_model" in name)
    assert not any(modes(model.eval()).values())


def test_a_frozen_generative_model_embeds_alike_in_both_modes():
    model = a_llava()
    model.lm.model.vision_tower.requires_grad_(True)
    batch = a_dialogue_batch(model, 3)
    before = model.eval().embed(batch, "image"), model.encode_image(batch)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(_expect_evaluation)
    assert torch.equal(model.embed(batch, "image"), before[0])
    assert torch.equal(model.encode_image(batch), before[1])
    assert model.lm.model.vision_tower.training


def _expect_evaluation(module, inputs, output):
    assert not module.training


def test_gradient_checkpointing_works_in_a_frozen_language_model():
    model, strategy = a_llava(), L2P("text", 2, 1, 1)
    enable_gradient_checkpointing(model.lm, model.gates)
    strategy.attach(model)
    begin_task(model, strategy, an_answer_task())
    model.train()
    layer, passes = model.lm.model.language_model.layers[0], []
    layer.self_attn.register_forward_hook(lambda module, *_: passes.append(module.training))
    step(model, strategy, a_dialogue_batch(model, 3)).loss.backward()
    assert passes == [False, False]  # the second pass is the backward pass's


class Foreign(nn.Module):
    """A user's own module, which imports nothing of mmcl."""

    def __init__(self):
        super().__init__()
        self.tower = nn.Sequential(
            nn.Flatten(), nn.Linear(3072, 4), nn.BatchNorm1d(4), nn.Dropout()
        )
        self.drop, self.head = nn.Dropout(), nn.Linear(4, 2)

    def forward(self, batch, prompts=None):
        self.seen = self.tower(batch.images.float() / 255)
        return Output(self.head(self.drop(self.seen)))

    def loss(self, output, batch):
        return functional.cross_entropy(output.logits, batch.labels)


def test_a_step_keeps_the_frozen_part_of_a_foreign_model_in_evaluation_mode():
    model = Foreign()
    model.tower.requires_grad_(False)
    kept, expected = statistics(model), model.eval().tower(photos().images.float() / 255)
    trained(model, steps=3)
    assert torch.equal(model.seen, expected)
    assert all(torch.equal(value, kept[name]) for name, value in statistics(model).items())
    assert model.drop.training
    assert not any(module.training for module in model.tower.modules())


def test_the_trainable_part_of_a_foreign_model_is_left_as_it_is():
    model = Foreign()
    model.tower[1].requires_grad_(False)
    kept = statistics(model)
    trained(model, steps=1)
    assert not torch.equal(model.tower[2].running_mean, kept["tower.2.running_mean"])
    assert [module.training for module in model.tower] == [True, False, True, True]
