"""Every strategy where nothing else is ours: in a foreign LightningModule, and in a bare loop."""

import warnings

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from mmcl.core import Strategy, begin_task, end_task, run, step
from mmcl.lightning import StrategyHooks
from mmcl.strategies import discover
from tests.stand_in import StandIn, a_task, task_batches
from tests.stand_in_llava import a_llava, an_answer_task
from tests.strategies.bare_loop import batches_of, loader, whole

KNOWN = discover()
ARGUMENTS = {
    "Chain": lambda: {"strategies": [KNOWN["EWC"](weight=10.0), KNOWN["DarkReplay"](samples=12)]},
    "EWC": lambda: {"weight": 10.0},
    "RanPAC": lambda: {"width": 40},
}
TASKS = [a_task(index) for index in range(2)]
QUESTIONS = [an_answer_task(index) for index in range(2)]
NEED_ANSWERS = {"CLMoE", "HiDe", "LoRARouter", "ModalPrompt"}
RATE = 0.05


class Foreign(pl.LightningModule):
    """A user's own module: it calls ``step`` and has nothing else of mmcl."""

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


def as_it_is(batch):
    return batch


def data(batches):
    return DataLoader(batches, batch_size=None, collate_fn=as_it_is)


def fit(module, batches, hooks):
    """One task with a fresh Trainer, as a user writes it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
        warnings.filterwarnings("ignore", ".*this fit will run with no optimizer.*")
        warnings.filterwarnings("ignore", ".*LeafSpec.*")
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
        for batch in loader(task.index, strategy.recall(), model):
            done = step(model, strategy, batch)
            if optimizer is not None:
                done.loss.backward()
                strategy.project(model)
                optimizer.step()
                optimizer.zero_grad()
            strategy.observe(model, done.batch, done.output)
        end_task(model, strategy, task, batches_of(model)(task.index))


@torch.no_grad()
def answers(model, strategy):
    rows = whole(0, model).join(whole(1, model))
    return run(model.eval(), strategy.eval(), rows).logits


class Passing(StrategyHooks):
    """A loader that recalls would show old rows in the pass: give the task's own data."""

    def _pass(self, trainer):
        return batches_of(trainer.lightning_module.model)(self.task.index)


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_a_foreign_module_learns_two_tasks_as_the_bare_loop_does(name):
    module = Foreign(make(name), a_model(name))
    for task in tasks_of(name):
        module.train()
        batches = loader(task.index, module.strategy.recall(), module.model)
        fit(module, batches, [Passing(task)])
    model, strategy = a_model(name), make(name)
    strategy.attach(model)
    learn_by_hand(model, strategy, tasks_of(name))
    assert module.strategy.current == strategy.current == tasks_of(name)[1]
    torch.testing.assert_close(answers(module.model, module.strategy), answers(model, strategy))


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_a_forgotten_callback_is_caught_on_the_first_step_by_name(name):
    module = Foreign(make(name), a_model(name)).train()
    with pytest.raises(RuntimeError, match=r"callbacks=\[StrategyHooks\(\)\]"):
        fit(module, batches_of(module.model)(0), [])
    assert module.steps == 0


def test_tasks_that_nobody_names_are_counted():
    module = Foreign(make("EWC"))
    for _ in TASKS:
        fit(module, task_batches(0), [StrategyHooks()])
    assert module.strategy.current.index == 1


def test_a_step_that_is_not_returned_is_asked_for():
    class Silent(Foreign):
        def training_step(self, batch, number):
            return super().training_step(batch, number)["loss"]

    with pytest.raises(RuntimeError, match="return {'loss': done.loss, 'step': done}"):
        fit(Silent(make("DarkReplay")), task_batches(0), [StrategyHooks()])


def test_a_module_without_a_strategy_is_told_what_to_set():
    class Bare(Foreign):
        def __init__(self):
            super().__init__(make("Finetune"))
            del self.strategy

    with pytest.raises(TypeError, match="set self.strategy"):
        fit(Bare(), task_batches(0), [StrategyHooks()])


def test_the_hooks_are_called_in_the_order_of_the_plan():
    called = []

    class Recorder(Strategy):
        pass

    for hook in ("begin_task", "replay", "prompts", "refine", "objective", "penalty", "project",
                 "observe", "end_task"):  # fmt: skip
        inherited = getattr(Strategy, hook)

        def record(self, *given, hook=hook, inherited=inherited):
            called.append(hook)
            return inherited(self, *given)

        setattr(Recorder, hook, record)
    fit(Foreign(Recorder()), task_batches(0)[:1], [StrategyHooks(TASKS[0])])
    assert called == [
        "begin_task", "replay", "prompts", "refine", "objective", "penalty", "project", "observe",
        "end_task",
    ]  # fmt: skip


def test_gradients_are_final_when_they_are_projected():
    norms = []

    class Looker(Strategy):
        def project(self, model):
            norms.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters()])))

    module = Foreign(Looker())
    batch = task_batches(0)[0]
    fit(module, [batch], [StrategyHooks(TASKS[0])])
    model = StandIn()
    model.loss(model(batch), batch).backward()
    by_hand = float(nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    assert norms == [pytest.approx(by_hand, rel=1e-5)]
