"""ContinualModule: a model and a strategy as one LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from mmcl.core import UNSCORED, Batch, Step, Strategy, answer, run, step
from mmcl.core.distributed import rank_and_world, sum_over_ranks
from mmcl.lightning.answering import AnswerScorer, scorer_of
from mmcl.lightning.hooks import StrategyHooks
from mmcl.lightning.schedule import Schedule
from mmcl.lightning.scoring import Column, ColumnScorer
from mmcl.lightning.sharing import expect_shareable
from mmcl.lightning.splitting import merged, names_in, split
from mmcl.strategies.finetune import Finetune


class ContinualModule(pl.LightningModule):
    """Train a VLM with a continual-learning strategy.

    Args:
        model: a VLM, for example ``mmcl.models.OpenCLIP``.
        strategy: a Strategy or a Chain of them; None = plain fine-tuning.
        learning_rate: of AdamW, reached after the warm-up, the same for every task.
        weight_decay: of AdamW, on weights of two or more dimensions.
        betas: of AdamW.
        warmup: optimiser steps of linear rise in every task.
        schedule: "constant" or "cosine" over each task.
        optimizer: another optimiser as a function of the parameters; the four numbers above other
            than warmup and schedule are then not used.
        seed: mixed into the seeds of the strategy's draws.
    """

    model: Any
    strict_loading = False  # frozen weights are not in our checkpoints; on_load_checkpoint checks

    def __init__(
        self,
        model: nn.Module,
        strategy: Strategy | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.98),
        warmup: int = 0,
        schedule: Schedule = "constant",
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.strategy = Finetune() if strategy is None else strategy
        self.learning_rate, self.weight_decay, self.betas = learning_rate, weight_decay, betas
        self.warmup, self.schedule = warmup, schedule
        self._make_optimizer = optimizer
        _reseed(self.strategy, seed)
        self.strategy.attach(self.model)
        self.frozen = {f"model.{n}" for n, p in model.named_parameters() if not p.requires_grad}
        self.learns = any(p.requires_grad for p in self.parameters())
        # Lightning's DDP refuses a module without a parameter that learns.
        self.anchor = None if self.learns else nn.Parameter(torch.zeros(()))
        self.in_sequence = False
        self.scorers: list[ColumnScorer] = []
        self.shards: Any = None
        self.mesh: Any = None  # that weights were shared out over
        self.done: Step | None = None
        self._folds = ExitStack()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; two plain ones without torch's search for weights in them.

        Lightning notes the running hook forty times a step: 55 us by torch's way, 4 by this.
        """
        if name in ("_current_fx_name", "done"):
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one step, weighted so that ranks and parts average exactly."""
        if self.anchor is not None and not self.learns:
            return self.anchor * 0
        done = self.done = step(self.model, self.strategy, batch)
        weight = loss_weight(done.batch)  # replay may have joined rows
        return done.loss if weight == 1.0 else done.loss * weight

    def look_what_learns(self) -> None:
        """Note whether anything learns in the task just begun, which may have brought weights."""
        self.learns = any(p.requires_grad for p in self.parameters() if p is not self.anchor)
        if self.anchor is not None:
            self.anchor.requires_grad_(not self.learns)

    def configure_model(self) -> None:
        """Share the weights out for a fit with Lightning's ModelParallelStrategy."""
        if self.trainer.state.fn != "fit" or not self.learns or self.shards is not None:
            return
        expect_shareable(self.trainer, self.strategy)
        if not isinstance(self.trainer.strategy, ModelParallelStrategy):
            return
        try:
            from mmcl.lightning.sharding import Shards, devices_of
        except ImportError as error:
            raise ImportError(
                f"torch {torch.__version__} cannot share weights out: install torch 2.6 or later, "
                "or use strategy ddp"
            ) from error
        if self.mesh is None:
            self.mesh = self.trainer.strategy.device_mesh
        self.shards = Shards(self, devices_of(self.mesh), self.fingerprint())

    def gather_weights(self) -> None:
        """Make the weights whole again on every device, after the last step of a task."""
        if self.shards is not None:
            self.shards.gather()
            self.shards = None

    def configure_optimizers(self) -> Optimizer:
        """Build a new optimiser over everything that learns now."""
        optimizer = self._optimizer()
        for group in optimizer.param_groups:
            # A checkpoint in shards gives back only what is there before it is loaded.
            group.setdefault("initial_lr", group["lr"])
        return optimizer

    def _optimizer(self) -> Optimizer:
        named = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        if self._make_optimizer is not None:
            return self._make_optimizer([p for _, p in named])
        # Norms, biases, scales and prompts are not pulled to zero, as open_clip does.
        decayed = [p for _, p in named if p.ndim >= 2]
        plain = [p for _, p in named if p.ndim < 2]
        groups = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        # Lightning refuses to clip in mixed precision if the optimiser is fused, in bf16 too.
        trainer = self._trainer
        clips = trainer is not None and bool(trainer.gradient_clip_val)
        fused = not (clips and "mixed" in str(getattr(trainer, "precision", "")))
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas, fused=fused)

    def configure_callbacks(self) -> list[pl.Callback]:
        """Add the strategy's hooks where Lightning runs alone; the sequence brings its own."""
        return [] if self.in_sequence else [StrategyHooks()]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave frozen weights out and note what they were."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if k not in self.frozen}
        checkpoint["fingerprint"] = self.fingerprint()
        if "optimizer_states" in checkpoint:
            split(checkpoint, self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another base model or another set of trainable weights."""
        check_state(self, checkpoint)
        beside = merged(checkpoint)
        if beside:
            self.load_state_dict(beside, strict=False)

    def fingerprint(self) -> str:
        """Return the hash of what is frozen, "" for a model that has none."""
        if self.shards is not None:
            return str(self.shards.mark)
        mark = getattr(self.model, "fingerprint", None)
        return str(mark()) if mark is not None and self.frozen else ""

    def kept_state(self) -> dict[str, Any]:
        """Return the state that a checkpoint holds: all but the frozen weights."""
        state = self.state_dict() if self.shards is None else self.shards.state()
        return {k: v for k, v in state.items() if k not in self.frozen}

    def score(self, columns: list[Column]) -> None:
        """Choose what the next test run scores, one column for every test loader."""
        self.scorers = [scorer_of(column) for column in columns]

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score a batch of one column."""
        self._score(batch, batch_idx, dataloader_idx)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score a batch of one column."""
        self._score(batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[tuple[str, str]]:
        """Return key and best class name, or answer, of every row."""
        if batch.is_answered:
            said = answer(self.model, self.strategy, batch)
            return list(zip(batch.keys, said, strict=True))
        names: list[str] = list(self._data().stream.classes_until(self._data().task))
        if batch_idx == 0:
            self._data().show_classes(self.model)
        best = run(self.model, self.strategy, batch).logits.argmax(1).tolist()
        return [(key, names[place]) for key, place in zip(batch.keys, best, strict=True)]

    def on_test_epoch_start(self) -> None:
        """Score the columns of the datamodule where nobody chose any."""
        self._default_columns()

    def on_validation_epoch_start(self) -> None:
        """Score the columns of the datamodule where nobody chose any."""
        if self.shards is not None:
            raise ValueError(
                "weights are shared out over devices, which would wait for each other where one "
                "has fewer rows to validate: set trainer.limit_val_batches to 0, and use test"
            )
        self._default_columns()

    def on_test_epoch_end(self) -> None:
        """Finish and log the columns."""
        self._finish()

    def on_validation_epoch_end(self) -> None:
        """Finish and log the columns."""
        self._finish()
        if self.trainer.training or self.trainer.state.fn == "fit":
            self._data().show_classes(self.model)

    def _score(self, batch: Batch, batch_idx: int, column: int) -> None:
        scorer = self.scorers[column]
        if batch_idx == 0:
            scorer.begin(self.model)
        scorer.add(self.model, self.strategy, batch)

    def _default_columns(self) -> None:
        if not self.in_sequence:
            self.score(self._data().default_columns(self.trainer.state.fn))
        if any(isinstance(scorer, AnswerScorer) for scorer in self.scorers):
            # Merged adapters generate faster; on leaving, weights are as they were.
            self._folds.enter_context(self.strategy.folded(self.model))

    def _finish(self) -> None:
        self._folds.close()
        for scorer in self.scorers:
            scorer.finish()
        if not self.in_sequence:
            names = {f"{s.column.score}/{s.column.task.name}": s.value for s in self.scorers}
            known = {name: value for name, value in names.items() if value is not None}
            self.log_dict(known, rank_zero_only=True, add_dataloader_idx=False)

    def _data(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]


def loss_weight(batch: Batch) -> float:
    """Return the factor of a batch's loss that makes the mean over ranks the global one.

    A loss over classes is a mean over rows, whose numbers the loader knows. A loss over answers is
    a mean over scored tokens: over ranks their numbers are summed here; accumulated parts of a
    batch still count by their rows.
    """
    if not batch.is_answered or rank_and_world()[1] == 1:
        return batch.weight
    own = torch.stack([(batch.labels != UNSCORED).sum(), torch.tensor(len(batch)).to(batch.labels)])
    tokens, rows = sum_over_ranks(own.double()).tolist()
    mine, count = own.tolist()
    factor: float = (mine / count) * (rows / max(1.0, tokens))
    return batch.weight * factor


def check_state(module: ContinualModule, checkpoint: dict[str, Any]) -> None:
    """Check that a checkpoint belongs to this model and strategy.

    Raises:
        ValueError: naming the first keys that differ, or the fingerprints.
    """
    want, got = set(module.kept_state()), set(names_in(checkpoint))
    for keys, what in ((want - got, "lacks"), (got - want, "has unknown")):
        if keys:
            named = ", ".join(sorted(keys)[:3])
            raise ValueError(
                f"the checkpoint {what} {len(keys)} weights ({named} ...): it was written by "
                "another model, strategy or set of trainable weights; use the run's own config"
            )
    mark = module.fingerprint()
    if checkpoint.get("fingerprint", mark) != mark:
        raise ValueError(
            f"the checkpoint was trained on frozen weights {checkpoint['fingerprint'][:12]}, and "
            f"this model has {mark[:12]}: load the same pretrained weights and settings"
        )


def _reseed(strategy: Strategy, seed: int) -> None:
    for part in strategy.modules():
        own = getattr(part, "seed", None)
        if seed and isinstance(own, int):
            vars(part)["seed"] = own + 1_000_003 * seed
