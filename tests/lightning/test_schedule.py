import math
from math import cos, pi

import pytest
import pytorch_lightning as pl
import torch
from transformers import get_scheduler

from mmcl.lightning import ContinualDataModule, ContinualModule
from mmcl.lightning.optimization.lr_schedules import LRSchedule
from mmcl.models import OpenCLIP
from tests.lightning.small_runs import SmallRuns, small_model


def lr_factor(step, steps, warmup, kind):
    return LRSchedule(kind, warmup).factor(step, steps)


def test_the_rate_rises_over_the_warmup():
    assert [lr_factor(s, 10, 4, "constant") for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(
    ("share", "steps", "warmup"), [(0.03, 625, 19), (0.03, 10, 1), (0.5, 7, 4)]
)
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_warmup_below_one_is_a_share_of_the_steps_rounded_up(share, steps, warmup, schedule):
    factors = [lr_factor(step, steps, share, schedule) for step in range(steps)]
    assert factors == [lr_factor(step, steps, warmup, schedule) for step in range(steps)]
    assert factors.index(1.0) == warmup - 1
    # transformers' warm-up of the same ratio ends at the same step, and starts at 0.
    trained = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(
        "constant_with_warmup", trained, num_warmup_steps=math.ceil(share * steps)
    )
    for _ in range(warmup):
        trained.step()
        theirs.step()
    assert theirs.get_last_lr() == [1.0]


@pytest.mark.parametrize("wrong", [-1, 1.5, -0.1])
def test_a_warmup_that_is_neither_steps_nor_a_share_is_refused(wrong):
    with pytest.raises(ValueError, match=f"warmup_steps is {wrong}: give a number of steps"):
        LRSchedule("constant", wrong)


def test_the_cosine_would_be_zero_one_step_after_the_last():
    assert lr_factor(3, 4, 0, "cosine") == pytest.approx(0.5 * (1 - 0.5**0.5))  # cos(3 pi / 4)
    assert lr_factor(4, 4, 0, "cosine") == 0.0


def test_the_cosine_starts_at_one_and_ends_near_zero():
    factors = [lr_factor(s, 100, 10, "cosine") for s in range(10, 100)]
    assert factors[0] == 1.0
    assert factors[45] == pytest.approx(0.5)
    assert factors[-1] < 0.001
    assert factors == sorted(factors, reverse=True)


@pytest.mark.parametrize(("steps", "warmup"), [(100, 10), (7, 0), (3, 2)])
def test_the_cosines_last_value_is_the_documented_one_and_open_clips(steps, warmup):
    n = steps - warmup
    last = (1 + cos(pi * (n - 1) / n)) / 2
    assert lr_factor(steps - 1, steps, warmup, "cosine") == pytest.approx(last)
    assert lr_factor(steps, steps, warmup, "cosine") == pytest.approx(0, abs=1e-12)
    # open_clip_train.scheduler.cosine_lr, written out
    for step in range(warmup, steps):
        e, es = step - warmup, steps - warmup
        assert lr_factor(step, steps, warmup, "cosine") == pytest.approx(
            0.5 * (1 + cos(pi * e / es))
        )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec")
@pytest.mark.parametrize(
    ("warmup", "schedule"), [(2, "cosine"), (3, "constant"), (0.5, "constant")]
)
def test_a_fit_of_lightning_alone_obeys_the_schedule(tmp_path, warmup, schedule):
    rates = []

    class Note(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    data = ContinualDataModule(str(SmallRuns(tmp_path).card), global_batch_size=8)
    model = OpenCLIP(small_model(tmp_path))
    module = ContinualModule(model, learning_rate=0.01, warmup_steps=warmup, lr_schedule=schedule)
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Note()],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    steps = trainer.global_step
    assert steps > 4
    assert rates == pytest.approx(
        [0.01 * lr_factor(step, steps, warmup, schedule) for step in range(steps)]
    )
