"""ContinualModule: the LightningModule of a model and a strategy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from mmcl.core import Batch, StepOutput, Strategy, forward, generate, loss_weight, step
from mmcl.core.card import Stage
from mmcl.core.model import without_adapters
from mmcl.core.step import check_trainable
from mmcl.evaluation.evaluators import (
    EvalSpec,
    Evaluator,
    GenerationEvaluator,
    ValidationLoss,
    make_evaluator,
)
from mmcl.lightning.checkpoints.checkpoint_io import check_shardable
from mmcl.lightning.checkpoints.checkpoint_state import REPLICATED, check_state, split_checkpoint
from mmcl.lightning.optimization.lr_schedules import LRSchedule, Schedule
from mmcl.lightning.optimization.optimizers import ParamGroup, build_optimizer, parse_param_groups
from mmcl.lightning.optimization.stage_settings import (
    StageSettings,
    TrainingSettings,
    all_stages_trainable,
    freeze_for_stage,
    resolve_stages,
)
from mmcl.lightning.stages.lineage import load_start
from mmcl.lightning.strategy_callback import StrategyCallback
from mmcl.strategies.finetune import Finetune

_SHARDED_VALIDATION = (
    "weights are sharded, and devices would wait for each other if one has fewer samples to "
    "validate: set data.validation_share or trainer.limit_val_batches to 0, and use test"
)


class ContinualModule(pl.LightningModule):
    """LightningModule that trains a VLM with a continual-learning strategy.

    Args:
        model: a VLM, for example ``mmcl.models.OpenCLIP``.
        strategy: a Strategy or a Chain of them; None = fine-tuning.
        learning_rate: AdamW's learning rate after the warm-up, the same for every task.
        weight_decay: AdamW's weight decay, of parameters with two or more dimensions other than
            prompts and keys.
        betas: AdamW's betas.
        warmup_steps: optimizer steps of linear warm-up in every task; below 1 a share of them.
        lr_schedule: learning-rate schedule over each task, "constant", "cosine" or "rewarm_cosine",
            or over all tasks, "infinite" or "meta"; see ``LRSchedule``, also for the next four.
        min_lr_ratio: last learning rate divided by ``learning_rate``.
        constant_lr_ratio: constant rate of "infinite" divided by ``learning_rate``.
        cooldown_steps: steps of "infinite" from ``learning_rate`` to the constant rate.
        anneal_steps: steps of the annealed branch of every task of "infinite".
        param_groups: part of the model ("image", "text", "projector", "adapter", "prompt", "head"
            ...) or name of parameters with wildcards -> its learning rate, or a ``ParamGroup``; the
            first match counts.
        optimizer: another optimizer as a function of named parameter groups; replaces AdamW and its
            three arguments.
        lr_scheduler: scheduler of torch as a function of the optimizer, stepped at every optimizer
            step and new in every task; instead of ``warmup_steps`` and ``lr_schedule``.
        stages: stage of a task, "cpt", "dap" or "cft" -> settings in place of these, and the parts
            of the model that are trained in it, see ``StageSettings``.
        start_weights: file with other weights of the model, loaded before the strategy is attached;
            ``start_from`` of a run sets it.
        seed: mixed into the seeds of the strategy.

    Raises:
        ValueError: if ``lr_scheduler`` is given beside ``warmup_steps`` or ``lr_schedule``, or a
            value of ``param_groups`` is out of range.
    """

    model: Any
    strict_loading = False  # checkpoints have no frozen weights; on_load_checkpoint checks
    in_continual_run = False
    last_step: StepOutput | None = None
    fsdp: Any = None
    mesh: Any = None  # device mesh of the first sharding
    _validation_loss: ValidationLoss | None = None

    def __init__(
        self,
        model: nn.Module,
        strategy: Strategy | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.98),
        warmup_steps: int | float = 0,
        lr_schedule: Schedule = "constant",
        min_lr_ratio: float | None = None,
        constant_lr_ratio: float | None = None,
        cooldown_steps: int | float | None = None,
        anneal_steps: int | float | None = None,
        param_groups: Mapping[str, ParamGroup | float] | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        stages: Mapping[Stage, StageSettings] | None = None,
        start_weights: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.strategy = Finetune() if strategy is None else strategy
        schedule = LRSchedule(
            lr_schedule, warmup_steps, min_lr_ratio, constant_lr_ratio, cooldown_steps, anneal_steps
        )
        if lr_scheduler is not None and schedule.is_active:
            raise ValueError(
                f"lr_scheduler is given beside warmup_steps {warmup_steps} and lr_schedule "
                f"'{lr_schedule}', which also set the learning rate: leave these two out"
            )
        self.settings = self.own_settings = TrainingSettings(
            learning_rate, weight_decay, betas, schedule, parse_param_groups(param_groups)
        )
        self._make_optimizer, self._make_scheduler = optimizer, lr_scheduler
        self.stages = resolve_stages(self.own_settings, stages, optimizer, lr_scheduler)
        self.start_weights = load_start(model, start_weights)
        self._base_names = frozenset(name for name, _ in model.named_parameters())
        _mix_seed(self.strategy, seed)
        self.strategy.attach(self.model)
        self.frozen = {f"model.{n}" for n, p in model.named_parameters() if not p.requires_grad}
        self._stage_names = self._expect_stages_trainable()
        self.has_trainable = any(p.requires_grad for p in self.parameters())
        # Lightning's DDP refuses a module without trainable parameters.
        self.dummy_parameter = None if self.has_trainable else nn.Parameter(torch.zeros(()))
        self.scorers: list[Evaluator] = []
        self.validation: dict[str, float] = {}  # metrics of the last validation
        self._merged = ExitStack()

    def _expect_stages_trainable(self) -> frozenset[str]:
        """Return the names of the model's own parameters that may be trained, in any stage."""
        names = frozenset(
            bare
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and (bare := without_adapters(name)) in self._base_names
        )
        for stage, settings in self.stages.items():
            freeze_for_stage(self.model, names, settings.trainable, stage)
        if self.stages:
            freeze_for_stage(self.model, names, None, "")
        return names

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; two plain ones without torch's search for parameters in them.

        Lightning sets the name of the running hook forty times a step: 55 us in torch, 4 us here.
        """
        if name in ("_current_fx_name", "last_step"):
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one step, weighted so that ranks and micro-batches average exactly."""
        if self.dummy_parameter is not None and not self.has_trainable:
            return self.dummy_parameter * 0
        done = self.last_step = step(self.model, self.strategy, batch)
        weight = loss_weight(done.batch)  # the batch may contain replay samples
        return done.loss if weight == 1.0 else done.loss * weight

    def settings_of(self, stage: str) -> TrainingSettings:
        """Return the settings of the tasks of a stage."""
        return self.stages.get(stage, self.own_settings)

    def begin_stage(self, stage: str) -> None:
        """Take the settings of a stage, and freeze what it does not train; before each task."""
        self.settings = self.settings_of(stage)
        if self.stages:
            freeze_for_stage(self.model, self._stage_names, self.settings.trainable, stage)

    def update_trainable(self) -> None:
        """Update whether anything is trainable; a new task may have added parameters.

        Raises:
            RuntimeError: if nothing is, and the strategy cannot learn without.
        """
        self.has_trainable = any(
            p.requires_grad for p in self.parameters() if p is not self.dummy_parameter
        )
        if not self.has_trainable:
            check_trainable(self.model, self.strategy)
        if self.dummy_parameter is not None:
            self.dummy_parameter.requires_grad_(not self.has_trainable)

    def configure_model(self) -> None:
        """Shard the weights for a fit with Lightning's ModelParallelStrategy."""
        if self.trainer.state.fn != "fit" or not self.has_trainable or self.fsdp is not None:
            return
        check_shardable(self.trainer, self.strategy)
        if not isinstance(self.trainer.strategy, ModelParallelStrategy):
            return
        try:
            from mmcl.lightning.fsdp import FSDPWrapper, fsdp_mesh
        except ImportError as error:
            raise ImportError(
                f"torch {torch.__version__} cannot shard weights: install torch 2.6 or later, "
                "or use strategy ddp"
            ) from error
        if self._has_validation_part() and self.trainer.limit_val_batches:
            raise ValueError(_SHARDED_VALIDATION)
        if self.mesh is None:
            self.mesh = self.trainer.strategy.device_mesh
        self.fsdp = FSDPWrapper(self, fsdp_mesh(self.mesh), self.fingerprint())

    def unshard_weights(self) -> None:
        """Unshard the weights on every device, after the last step of a task."""
        # Not called `unshard`: torch's FSDPModule, which this class becomes, has that method.
        if self.fsdp is not None:
            self.fsdp.unshard()
            self.fsdp = None

    def configure_optimizers(self) -> Any:
        """Build a new optimizer over all trainable parameters, and its scheduler if there is one.

        Raises:
            ValueError: if an entry of ``param_groups`` has no effect, or the scheduler needs a
                metric.
        """
        make = self._adamw if self._make_optimizer is None else self._make_optimizer
        optimizer = build_optimizer(self, make, self.settings.param_groups, self._base_names)
        # Some schedulers set the first rate themselves, so they come before `initial_lr` is set.
        make_scheduler = self._make_scheduler or self._own_scheduler()
        scheduler = None if make_scheduler is None else make_scheduler(optimizer)
        for group in optimizer.param_groups:
            # A sharded checkpoint restores only keys that exist before it is loaded.
            group.setdefault("initial_lr", group["lr"])
        if scheduler is None:
            return optimizer
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ValueError(
                "lr_scheduler is ReduceLROnPlateau, which needs a metric, and a step has none: use "
                "one that counts steps, such as torch.optim.lr_scheduler.CosineAnnealingLR"
            )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _own_scheduler(self) -> Callable[[Optimizer], LRScheduler] | None:
        """Return the scheduler of ``lr_schedule`` outside of ``mmcl train``.

        There TaskCallback sets the rate.
        """
        schedule = self.settings.schedule
        if self.in_continual_run or not schedule.is_active or self._trainer is None:
            return None
        if schedule.spans_tasks:
            raise ValueError(
                f"lr_schedule is '{schedule.kind}', which spans the tasks of a stream, and this "
                "fit is of one task: train with mmcl train, or use lr_schedule rewarm_cosine"
            )
        steps = self.trainer.estimated_stepping_batches if schedule.needs_steps else 0
        if math.isinf(steps):
            raise ValueError(
                f"lr_schedule is '{schedule.kind}', warmup_steps {schedule.warmup_steps} and the "
                "Trainer has no last step: set max_epochs or max_steps, or use lr_schedule "
                "'constant' and a number of warmup_steps"
            )
        return lambda optimizer: LambdaLR(optimizer, lambda n: schedule.factor(n, int(steps)))

    def _adamw(self, groups: Any) -> Optimizer:
        # Lightning refuses to clip in mixed precision if the optimizer is fused, in bf16 too.
        trainer = self._trainer
        clips = trainer is not None and bool(trainer.gradient_clip_val)
        fused = not (clips and "mixed" in str(getattr(trainer, "precision", "")))
        return torch.optim.AdamW(
            groups,
            lr=self.settings.learning_rate,
            betas=self.settings.betas,
            weight_decay=self.settings.weight_decay,
            fused=fused,
        )

    def configure_callbacks(self) -> list[pl.Callback]:
        """Return the strategy callback, unless ``mmcl train`` brings its own."""
        return [] if self.in_continual_run else [StrategyCallback()]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop frozen weights from a checkpoint, and add their fingerprint."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if k not in self.frozen}
        checkpoint["fingerprint"] = self.fingerprint()
        if "optimizer_states" in checkpoint:
            split_checkpoint(checkpoint, self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check a checkpoint for the same base model and trainable weights, and merge its parts."""
        check_state(self, checkpoint)
        replicated: dict[str, Any] = checkpoint.pop(REPLICATED, {})
        if "state_dict" in checkpoint:
            checkpoint["state_dict"] = {**checkpoint["state_dict"], **replicated}
        elif replicated:  # sharded weights are loaded by Lightning
            self.load_state_dict(replicated, strict=False)

    def fingerprint(self) -> str:
        """Return the fingerprint of the frozen weights, "" for a model without."""
        if self.fsdp is not None:
            return str(self.fsdp.fingerprint)
        fingerprint = getattr(self.model, "fingerprint", None)
        if fingerprint is None or not self.frozen:
            return ""
        # What a stage freezes is in the checkpoints: only what no stage trains is the base.
        with all_stages_trainable(self.model, self._stage_names):
            return str(fingerprint())

    def trainable_state_dict(self) -> dict[str, Any]:
        """Return the state dict of a checkpoint: everything except the frozen weights."""
        state = self.state_dict() if self.fsdp is None else self.fsdp.state()
        return {k: v for k, v in state.items() if k not in self.frozen}

    def score(self, columns: list[EvalSpec]) -> None:
        """Create the evaluators of the next test run, one for every test loader."""
        self.scorers = [make_evaluator(column) for column in columns]

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the evaluator of one test or validation loader."""
        scorer = self.scorers[dataloader_idx]
        if batch_idx == 0:
            scorer.reset(self.model)
        scorer.update(self.model, self.strategy, batch)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the evaluator of a validation loader, and the loss on a validation part."""
        self.test_step(batch, batch_idx, dataloader_idx)
        if self._validation_loss is not None:
            if batch_idx == 0:  # the evaluator's classes are the same, but not their tasks
                self._data().set_model_classes(self.model)
            self._validation_loss.update(self.model, self.strategy, batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[tuple[str, str]]:
        """Return the key and the predicted class name, or answer, of every sample."""
        if batch.is_generative:
            answers = generate(self.model, self.strategy, batch)
            return list(zip(batch.keys, answers, strict=True))
        stream = self._data().stream
        names = stream.display_names(stream.classes_seen(self._data().task_index))
        if batch_idx == 0:
            self._data().set_model_classes(self.model)
        predicted = forward(self.model, self.strategy, batch).logits.argmax(1).tolist()
        return [(key, names[index]) for key, index in zip(batch.keys, predicted, strict=True)]

    def on_test_epoch_start(self) -> None:
        """Create the default evaluators outside of ``mmcl train``, and merge adapters."""
        if not self.in_continual_run:
            self.score(self._data().default_columns(self.trainer.state.fn))
        if any(isinstance(scorer, GenerationEvaluator) for scorer in self.scorers):
            # Merged adapters generate faster; the exit restores the weights.
            self._merged.enter_context(self.strategy.merged_adapters(self.model))

    def on_validation_epoch_start(self) -> None:
        """Create the evaluators of the selected task; sharded weights are refused."""
        if self.fsdp is not None:
            raise ValueError(_SHARDED_VALIDATION)
        if self._has_validation_part():
            self.score(self._data().default_columns("validate"))
            self._validation_loss = ValidationLoss(self.device)
        self.on_test_epoch_start()

    def on_test_epoch_end(self) -> None:
        """Compute and log the metrics."""
        self._merged.close()
        for scorer in self.scorers:
            scorer.compute()
        if not self.in_continual_run:
            metrics = {f"{s.column.score}/{s.column.task.name}": s.value for s in self.scorers}
            known = {name: value for name, value in metrics.items() if value is not None}
            self.log_dict(known, rank_zero_only=True, add_dataloader_idx=False)

    def on_validation_epoch_end(self) -> None:
        """Compute and log the metrics, and give the model its training classes again."""
        if self._validation_loss is None:
            self.on_test_epoch_end()
        else:
            self._merged.close()
            self.scorers[0].compute()
            names = self._data().validation_metrics
            values = (self._validation_loss.compute(), float(self.scorers[0].value or 0.0))
            self.validation, self._validation_loss = dict(zip(names, values, strict=True)), None
            # A run's callback passes them to its loggers, with the steps of all tasks.
            logger = False if self.in_continual_run else None
            self.log_dict(self.validation, sync_dist=True, logger=logger)
        if self.trainer.training or self.trainer.state.fn == "fit":
            self._data().set_model_classes(self.model)

    def on_fit_start(self) -> None:
        """Let a task that is resumed take its last step after its Timer ran out.

        Lightning would end the fit without ``on_train_end``, where the strategy ends the task.
        """
        self.trainer.should_stop = False

    def _has_validation_part(self) -> bool:
        return bool(getattr(self._data(), "validation_share", 0))

    def _data(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]


def _mix_seed(strategy: Strategy, seed: int) -> None:
    """Mix the seed of a run into the seeds of a strategy and its parts."""
    for part in strategy.modules():
        own = getattr(part, "seed", None)
        if seed and isinstance(own, int):
            vars(part)["seed"] = own + 1_000_003 * seed
