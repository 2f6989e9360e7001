"""Models in bfloat16 whose parts train in full: the same scores, and updates that last."""

import pytest
import torch

from mmcl.core import Task, begin_task, step
from mmcl.core.master_weights import compute_dtype
from mmcl.models import ImageTextToText
from mmcl.models.hf_vlm.memory_estimate import Workload, estimate_memory
from mmcl.strategies import Finetune, LoRA
from tests.models.family_reference import WITHOUT_CHAT
from tests.models.small_families import FAMILIES, write_family
from tests.models.test_families import a_batch

TASK = Task(0, "answers", task_type="instruction")
RATE = 1e-4


def loaded(folder, family="llava", **how):
    write_family(folder, family)
    return ImageTextToText(str(folder), dtype="bfloat16", **how)


def small_update(model):
    """Move every trained weight by a ten-thousandth, as a step of a small rate does."""
    moved = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().double() for name, p in moved.items()}
    with torch.no_grad():
        for parameter in moved.values():
            parameter *= 1 + RATE
    return moved, before


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_scores_and_answers_are_those_of_the_rounded_weights(family, tmp_path):
    model = loaded(tmp_path, family, freeze=[])
    names = ["one", "two"] if family in WITHOUT_CHAT else ["text", "one", "two"]
    batch = a_batch(model, names)
    with torch.no_grad():
        scores, answers = model(batch).logits, model.generate(batch, max_new_tokens=4)
    strategy = Finetune()
    strategy.attach(model)
    begin_task(model, strategy, TASK)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert compute_dtype(model.lm) == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(model(batch).logits, scores)
    assert model.generate(batch, max_new_tokens=4) == answers
    done = step(model, strategy, batch)
    done.loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("how", [{"train_projector": True}, {"modules_to_save": ["lm_head"]},
                                 {"train_towers": ["image"]}])  # fmt: skip
def test_small_updates_beside_an_adapter_are_not_lost(how, tmp_path):
    freeze = ["projector", "text"] if "train_towers" in how else ["image"]
    model, strategy = loaded(tmp_path, freeze=freeze), LoRA(rank=2, **how)
    strategy.attach(model)
    begin_task(model, strategy, TASK)
    moved, before = small_update(model)
    assert {p.dtype for p in moved.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    for name, parameter in moved.items():
        torch.testing.assert_close(
            parameter.double(), before[name] * (1 + RATE), rtol=1e-6, atol=1e-12
        )


def test_without_master_weights_the_parts_stay_narrow(tmp_path):
    model, strategy = loaded(tmp_path, master_weights=False), Finetune()
    strategy.attach(model)
    begin_task(model, strategy, TASK)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_the_estimate_counts_them(tmp_path):
    counted = {}
    for is_on in (True, False):
        model = loaded(tmp_path / str(is_on), master_weights=is_on)
        strategy = LoRA(rank=2, train_projector=True)
        strategy.attach(model)
        begin_task(model, strategy, TASK)
        counted[is_on] = estimate_memory(model, strategy, Workload(2, 40))
        own = sum(p.numel() for p in model.tower("projector"))
    wide, narrow = counted[True], counted[False]
    assert wide.weights - narrow.weights == 2 * own
    assert wide.gradients - narrow.gradients == 2 * own
    assert wide.optimizer - narrow.optimizer == 4 * own
    assert wide.kv_cache == narrow.kv_cache


def test_checkpointed_layers_compute_with_the_same_weights(tmp_path):
    gradients = []
    for is_on in (False, True):
        model = loaded(tmp_path / str(is_on), freeze=[], gradient_checkpointing=is_on)
        strategy = Finetune()
        strategy.attach(model)
        begin_task(model, strategy, TASK)
        model.train()
        step(model, strategy, a_batch(model, ["one", "two"])).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        # Without checkpoints the last block is computed at fewer positions, which rounds otherwise.
        distance = (gradient - gradients[1][name]).norm()
        assert distance <= 0.05 * gradient.norm() + 1e-3, name
