"""The precision of ``end_task``: that of the steps in bfloat16, float32 where nothing is scaled."""

import warnings
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from mmcl.core import Strategy, begin_task, end_task, step
from mmcl.core.step import StepModule
from mmcl.lightning import StrategyCallback
from mmcl.lightning.strategy_callback import end_task_precision
from mmcl.models.hf_vlm.trainer_callback import HFTrainerCallback
from mmcl.strategies import NCM
from tests.toys.toy_clip import StandIn, a_task, task_batches


class Recorder(Strategy):
    """Records the precision of steps and of the task's end."""

    def __init__(self):
        super().__init__()
        self.steps, self.ends = set(), []

    def transform_output(self, model, batch, output):
        self.steps.add((torch.is_autocast_enabled("cpu"), output.logits.dtype))
        return output

    def end_task(self, model, task, batches):
        cached = torch.is_autocast_cache_enabled()
        self.ends = [(torch.is_autocast_enabled("cpu"), model(b).logits.dtype) for b in batches]
        assert not (self.ends[0][0] and cached)  # a strategy may write new weights in between


class Module(pl.LightningModule):
    def __init__(self, strategy):
        super().__init__()
        self.model, self.strategy = StandIn(), strategy
        strategy.attach(self.model)

    def training_step(self, batch, _):
        done = step(self.model, self.strategy, batch)
        return {"loss": done.loss, "step": done}

    def configure_optimizers(self):
        learning = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(learning, lr=0.05) if learning else None


def fit(module, precision):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*this fit will run with no optimizer.*")
        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, precision=precision,
            callbacks=[StrategyCallback(a_task())],
        )  # fmt: skip
        trainer.fit(module.train(), DataLoader(task_batches(0), batch_size=None))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_task_ends_in_the_precision_of_its_steps(precision):
    module = Module(Recorder())
    fit(module, precision)
    assert len(module.strategy.steps) == 1
    assert set(module.strategy.ends) == module.strategy.steps
    assert module.strategy.ends[0][0] == (precision == "bf16-mixed")


def test_class_means_are_of_the_features_that_are_compared_with_them():
    module, model, strategy = Module(NCM()), StandIn(), NCM()
    fit(module, "bf16-mixed")
    strategy.attach(model)
    with torch.autocast("cpu", torch.bfloat16):
        begin_task(model, strategy, a_task())
        end_task(model, strategy, a_task(), task_batches(0))
    found = module.strategy.means.get("sums")
    assert found.dtype == torch.float64
    assert torch.equal(found, strategy.means.get("sums"))


def test_float16_ends_in_float32_because_nothing_scales_a_loss_there():
    with end_task_precision(SimpleNamespace(precision="16-mixed"), "cpu"):
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("bf16", [False, True])
def test_transformers_trainer_ends_a_task_in_its_own_precision(bf16):
    module = StepModule(StandIn(), Recorder())
    module.strategy.attach(module.model)
    callback = HFTrainerCallback(module, a_task(), task_batches(0))
    callback.on_train_end(SimpleNamespace(bf16=bf16), None, None)
    assert module.strategy.ends[0] == (bf16, torch.bfloat16 if bf16 else torch.float32)
