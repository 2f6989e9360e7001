"""Every strategy in a user's own LightningModule, and in a plain loop."""

import warnings

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from mmcl.core import Strategy, begin_task, end_task, forward, step
from mmcl.lightning import StrategyCallback
from mmcl.strategies import discover
from tests.strategies.plain_loop import batches_of, loader, whole
from tests.toys.toy_clip import StandIn, a_task, task_batches
from tests.toys.toy_llava import a_llava, an_answer_task

KNOWN = discover()
ARGUMENTS = {
    "Chain": lambda: {
        "strategies": [KNOWN["EWC"](ewc_lambda=10.0), KNOWN["DarkReplay"](buffer_size=12)]
    },
    "EWC": lambda: {"ewc_lambda": 10.0},
    "RanPAC": lambda: {"projection_dim": 40},
}
TASKS = [a_task(index) for index in range(2)]
QUESTIONS = [an_answer_task(index) for index in range(2)]
NEED_ANSWERS = {"CLMoE", "HiDe", "LoRARouter", "ModalPrompt"}
RATE = 0.05


class Foreign(pl.LightningModule):
    """A user's own module: it only calls ``step`` of mmcl."""

    def __init__(self, strategy, model=None):
        super().__init__()
        self.model = StandIn() if model is None else model
        self.strategy = strategy
        self.strategy.attach(self.model)
        self.steps = 0

    def training_step(self, batch, _):
        done = step(self.model, self.strategy, batch)
        self.log_dict(done.terms, batch_size=len(batch))
        self.steps += 1
        return {"loss": done.loss, "step": done}

    def configure_optimizers(self):
        learning = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(learning, lr=RATE) if learning else None


def make(name):
    small = {"rank": 4} if name in NEED_ANSWERS - {"ModalPrompt"} else {}
    return KNOWN[name](**{**ARGUMENTS.get(name, dict)(), **small})


def a_model(name):
    return a_llava() if name in NEED_ANSWERS else StandIn()


def tasks_of(name):
    return QUESTIONS if name in NEED_ANSWERS else TASKS


def identity(batch):
    return batch


def data(batches):
    return DataLoader(batches, batch_size=None, collate_fn=identity)


def fit(module, batches, hooks):
    """One task with a fresh Trainer, as a user writes it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
        warnings.filterwarnings("ignore", ".*this fit will run with no optimizer.*")
        warnings.filterwarnings("ignore", ".*LeafSpec.*")
        warnings.filterwarnings("ignore", ".*has an inactive part.*")
        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=hooks,
        )  # fmt: skip
        trainer.fit(module, data(batches))


def learn_by_hand(model, strategy, tasks):
    """The bare loop of the README."""
    for task in tasks:
        begin_task(model, strategy, task)
        learning = [p for p in (*model.parameters(), *strategy.parameters()) if p.requires_grad]
        optimizer = torch.optim.SGD(learning, lr=RATE) if learning else None
        model.train(), strategy.train()
        for batch in loader(task.index, strategy.replay_plan(), model):
            done = step(model, strategy, batch)
            if optimizer is not None:
                done.loss.backward()
                strategy.project_gradients(model)
                optimizer.step()
                optimizer.zero_grad()
            strategy.after_step(model, done.batch, done.output)
        end_task(model, strategy, task, batches_of(model)(task.index))


@torch.no_grad()
def answers(model, strategy):
    rows = whole(0, model).join(whole(1, model))
    return forward(model.eval(), strategy.eval(), rows).logits


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_a_foreign_module_learns_two_tasks_as_the_bare_loop_does(name):
    module = Foreign(make(name), a_model(name))
    for task in tasks_of(name):
        module.train()
        batches = loader(task.index, module.strategy.replay_plan(), module.model)
        fit(module, batches, [StrategyCallback(task, batches_of(module.model)(task.index))])
    model, strategy = a_model(name), make(name)
    strategy.attach(model)
    learn_by_hand(model, strategy, tasks_of(name))
    assert module.strategy.current_task == strategy.current_task == tasks_of(name)[1]
    torch.testing.assert_close(answers(module.model, module.strategy), answers(model, strategy))


@pytest.mark.filterwarnings("ignore:.* in eval mode at the start")  # the callback hides it
@pytest.mark.parametrize("name", sorted(KNOWN))
def test_a_forgotten_callback_is_caught_on_the_first_step_by_name(name):
    module = Foreign(make(name), a_model(name)).train()
    with pytest.raises(RuntimeError, match=r"callbacks=\[StrategyCallback\(\)\]"):
        fit(module, batches_of(module.model)(0), [])
    assert module.steps == 0


def test_unnamed_tasks_are_counted():
    module = Foreign(make("EWC"))
    for _ in TASKS:
        fit(module, task_batches(0), [StrategyCallback()])
    assert module.strategy.current_task.index == 1


def test_a_step_that_is_not_returned_is_an_error():
    class Silent(Foreign):
        def training_step(self, batch, number):
            return super().training_step(batch, number)["loss"]

    with pytest.raises(RuntimeError, match="return {'loss': done.loss, 'step': done}"):
        fit(Silent(make("DarkReplay")), task_batches(0), [StrategyCallback()])


def test_a_module_without_a_strategy_is_an_error():
    class Bare(Foreign):
        def __init__(self):
            super().__init__(make("Finetune"))
            del self.strategy

    with pytest.raises(TypeError, match="set self.strategy"):
        fit(Bare(), task_batches(0), [StrategyCallback()])


def test_the_hooks_are_called_in_the_order_of_the_plan():
    called = []

    class Recorder(Strategy):
        pass

    for hook in ("begin_task", "extend_batch", "prompts", "transform_output", "objective",
                 "penalty", "project_gradients", "after_step", "end_task"):  # fmt: skip
        inherited = getattr(Strategy, hook)

        def record(self, *given, hook=hook, inherited=inherited):
            called.append(hook)
            return inherited(self, *given)

        setattr(Recorder, hook, record)
    fit(Foreign(Recorder()), task_batches(0)[:1], [StrategyCallback(TASKS[0])])
    assert called == [
        "begin_task", "extend_batch", "prompts", "transform_output", "objective", "penalty",
        "project_gradients", "after_step", "end_task",
    ]  # fmt: skip


def test_gradients_are_final_when_they_are_projected():
    norms = []

    class Looker(Strategy):
        def project_gradients(self, model):
            norms.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters()])))

    module = Foreign(Looker())
    batch = task_batches(0)[0]
    fit(module, [batch], [StrategyCallback(TASKS[0])])
    model = StandIn()
    model.loss(model(batch), batch).backward()
    by_hand = float(nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    assert norms == [pytest.approx(by_hand, rel=1e-5)]
