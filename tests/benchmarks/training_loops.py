"""The same training three times: as mmcl's sequence runs it, as bare Lightning, as a plain loop."""

import copy
from pathlib import Path

import pytorch_lightning as pl

from mmcl.core import TaskStream
from mmcl.lightning.config.cli import quiet
from mmcl.lightning.config.trainer_settings import TRAINER_DEFAULTS
from mmcl.lightning.continual_run import ContinualRun
from mmcl.lightning.module import ContinualModule
from mmcl.lightning.run_dir import RunState


class Loader:
    """A list of batches that Lightning does not take for a list of loaders."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


class InMemory(pl.LightningDataModule):
    """Ready batches where ``ContinualDataModule`` reads shards.

    Args:
        stream: the tasks.
        ending: batches of the pass at the end of every task.
    """

    max_bad_fraction, validation_share, validation_metrics = 0.01, 0.0, ()

    def __init__(self, stream, ending):
        super().__init__()
        self.stream = self.declared_stream = stream
        self.ending = ending
        self.loader, self.task = [], 0

    def set_task(self, task):
        self.task = task

    def count_global_batches(self, trainer):
        pass

    def set_model_classes(self, model):
        if hasattr(model, "set_classes"):
            names = self.stream.classes_seen(self.task)
            model.set_classes(names, self.stream[self.task].templates, [0] * len(names))

    def train_dataloader(self):
        return self.loader

    def val_dataloader(self):
        return self.loader  # never read; but Lightning asks at every step whether it is there

    def task_pass(self):
        return self.ending

    def save_replay_copies(self, replay_plan, task):
        pass


def make_trainer(**settings):
    """Build the Trainer of a run without a logger, which is the command's default."""
    own = {"accelerator": "cpu", "devices": 1, "logger": False, "max_epochs": 1}
    return pl.Trainer(**{**TRAINER_DEFAULTS, **own, **settings})


class Sequence:
    """A run that stands before its second task.

    Args:
        module: new.
        tasks: two.
        first: batches of the first task, which is learned here, untimed.
        folder: scratch.
        callbacks: more of them, to look on.
    """

    def __init__(self, module, tasks, first, folder, callbacks=()):
        quiet()
        self.module = module
        module.in_continual_run = True
        self.data = InMemory(TaskStream("benchmark", "class", tasks), first[:1])
        self.run = ContinualRun(
            lambda: module,
            lambda **given: make_trainer(
                **{**given, "callbacks": [*given["callbacks"], *callbacks]}
            ),
            self.data,
            Path(folder),
            checkpoint_every_n_steps=0,
        )
        self.state = RunState(finished_tasks=0, task=0, tasks=[], seed=0)
        self._learn(0, Loader(first))

    def __call__(self, loader):
        """Learn the second task exactly as a run does."""
        self._learn(1, loader)

    def twin(self):
        """Copy the model as the second task finds it."""
        model = copy.deepcopy(self.module.model)
        self.data.set_task(1)
        self.data.set_model_classes(model)
        return model

    def _learn(self, task, loader):
        self.data.loader = loader
        self.run._train_task(self.module, self.state, task)


class Bare(pl.LightningModule):
    """The least that Lightning needs.

    Args:
        model: to train.
        loss: (model, batch) -> scalar.
        optimizer: parameters -> optimiser.
    """

    def __init__(self, model, loss, optimizer):
        super().__init__()
        self.model, self.loss, self.optimizer = model, loss, optimizer

    def training_step(self, batch, batch_idx):
        return self.loss(self.model, batch)

    def configure_optimizers(self):
        return self.optimizer(self.model.parameters())

    def __call__(self, loader):
        """Train on a loader."""
        trainer = pl.Trainer(barebones=True, accelerator="cpu", devices=1, max_epochs=1)
        trainer.fit(self.train(), loader)


class Plain:
    """A loop in torch; arguments as of ``Bare``."""

    def __init__(self, model, loss, optimizer):
        self.model, self.loss, self.optimizer = model, loss, optimizer

    def __call__(self, loader):
        """Train on a loader."""
        self.model.train()
        optimizer = self.optimizer(self.model.parameters())
        for batch in loader:
            loss = self.loss(self.model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def continual(model, strategy, optimizer):
    """Make mmcl's module; its optimizer has the same single group as that of the other loops."""

    def flat(groups):
        return optimizer([p for group in groups for p in group["params"]])

    return ContinualModule(model, strategy, optimizer=flat)


def largest_difference(models):
    """Return the largest difference of a weight between models that learned the same."""
    first, *others = [[p.detach() for p in model.parameters()] for model in models]
    return max(
        float((a - b).abs().max()) for other in others for a, b in zip(first, other, strict=True)
    )
