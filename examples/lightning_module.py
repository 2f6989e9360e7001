"""Continual learning in a LightningModule of your own, which inherits nothing of mmcl.

Two tasks of two color classes each, with experience replay and EWC on the built-in tiny CLIP: every
task is evaluated after every task, and a run that was stopped resumes with the same command.

    python examples/lightning_module.py [FOLDER [DEVICES]]
"""

import sys
import tempfile
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data import DataLoader

import mmcl
from mmcl.evaluation import Column, compute_all_metrics

show = rank_zero_only(print)
COLORS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (40, 40, 220), "gray": (128,) * 3}


def squares(task: int, seed: int) -> list[tuple[torch.Tensor, int]]:
    """Dataset of 32 noisy squares of the two colors of a task: (image, class index)."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(32) % 2 + 2 * task
    colors = torch.tensor(list(COLORS.values())).view(-1, 3, 1, 1).float()
    images = colors[labels] + 20 * torch.randn(32, 3, 64, 64, generator=draw)
    return list(zip(images.clamp(0, 255).to(torch.uint8), labels.tolist(), strict=True))


class MyModule(pl.LightningModule):
    """LightningModule that trains a CLIP with a chain of two strategies."""

    def __init__(self) -> None:
        super().__init__()
        self.model = mmcl.OpenCLIP("tiny", pretrained="built-in")
        self.model.set_classes(list(COLORS), ["a photo of a {} square."])
        replay = mmcl.strategies.ExperienceReplay(buffer_size=16, replay_ratio=0.25)
        self.strategy = mmcl.Chain([replay, mmcl.strategies.EWC(ewc_lambda=100.0)])
        self.strategy.attach(self.model)

    def training_step(self, batch: mmcl.Batch, batch_idx: int) -> dict:
        """Return the loss, and the step that StrategyCallback passes to the strategy."""
        done = mmcl.step(self.model, self.strategy, batch)
        return {"loss": done.loss * mmcl.core.loss_weight(done.batch), "step": done}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build a new optimizer for every task."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)


def learn(module: MyModule, index: int, folder: Path, devices: int) -> None:
    """Train one task with a Trainer of its own, or load it if it was trained before."""
    finished, half = folder / f"task_{index}.pt", folder / f"task_{index}_half.ckpt"
    if finished.is_file():
        state = torch.load(finished, weights_only=True)
        mmcl.begin_tasks(module.model, module.strategy, state)
        module.load_state_dict(state)
        return
    loader = mmcl.replay_loader(
        squares(index, seed=index), module.strategy, batch_size=8,
        earlier=[squares(old, seed=old) for old in range(index)],
        collate_fn=mmcl.ImageLabelCollate(module.model.transform(True)),
        eval_collate_fn=mmcl.ImageLabelCollate(module.model.transform(False)),
    )  # fmt: skip
    saving = ModelCheckpoint(folder, half.stem, every_n_train_steps=2, enable_version_counter=False)
    trainer = pl.Trainer(
        max_epochs=2, accelerator="auto", devices=devices, logger=False, enable_model_summary=False,
        enable_progress_bar=False, callbacks=[mmcl.StrategyCallback(), saving],
    )  # fmt: skip
    trainer.fit(module, loader, ckpt_path=half if half.is_file() else None, weights_only=True)
    if trainer.is_global_zero:
        torch.save(module.state_dict(), finished)


def main(folder: Path, devices: int) -> None:
    """Learn two tasks, and print the accuracy matrix and its metrics."""
    module = MyModule()
    matrix = mmcl.AccuracyMatrix("colors", "class", [Column("red, green"), Column("blue, gray")])
    for index in range(2):
        learn(module, index, folder, devices)
        for column in range(2):
            collate = mmcl.ImageLabelCollate(module.model.transform(False))
            test = DataLoader(squares(column, seed=9), batch_size=16, collate_fn=collate)
            score = mmcl.evaluate(module.model, module.strategy, test)
            matrix.set(index + 1, column, score)
        show(f"after task {index}:", *(f"{value:.2f}" for value in matrix.values[index + 1]))
    show({m.name: round(m.value, 3) for m in compute_all_metrics(matrix) if m.value is not None})


if __name__ == "__main__":
    torch.manual_seed(0)
    given = sys.argv[1:]
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(given[0] if given else temporary), int(given[1]) if len(given) > 1 else 1)
