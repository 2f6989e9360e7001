"""Continual learning in a LightningModule of your own, which inherits nothing of mmcl.

Two tasks of two color classes each, dark experience replay and EWC on the built-in tiny CLIP.

    python examples/lightning_module.py
"""

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

import mmcl

COLORS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (40, 40, 220), "gray": (128,) * 3}


class MyModule(pl.LightningModule):
    """LightningModule that trains a CLIP with a chain of two strategies."""

    def __init__(self) -> None:
        super().__init__()
        self.model = mmcl.OpenCLIP("tiny", pretrained="built-in")
        self.model.set_classes(list(COLORS), ["a photo of a {} square."])
        replay = mmcl.strategies.DarkReplay(buffer_size=20)
        self.strategy = mmcl.Chain([replay, mmcl.strategies.EWC(ewc_lambda=100.0)])
        self.strategy.attach(self.model)

    def training_step(self, batch: mmcl.Batch, batch_idx: int) -> dict:
        """Return the loss, and the step that StrategyCallback passes to the strategy."""
        done = mmcl.step(self.model, self.strategy, batch)
        return {"loss": done.loss, "step": done}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build a new optimizer for every task."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)


def task_loader(model: mmcl.OpenCLIP, task: int) -> DataLoader:
    """Loader of 32 noisy squares of the two colors of a task."""
    labels = torch.arange(32) % 2 + 2 * task
    colors = torch.tensor(list(COLORS.values())).view(-1, 3, 1, 1).float()
    images = (colors[labels] + 20 * torch.randn(32, 3, 32, 32)).clamp(0, 255).to(torch.uint8)
    collate = mmcl.ImageLabelCollate(model.transform(True), task=task)
    return DataLoader(list(zip(images, labels, strict=True)), batch_size=8, collate_fn=collate)


if __name__ == "__main__":
    torch.manual_seed(0)
    module = MyModule()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    for index in range(2):
        trainer = pl.Trainer(
            max_epochs=2, accelerator="cpu", callbacks=[mmcl.StrategyCallback()], **quiet
        )
        trainer.fit(module, task_loader(module.model, index))
    print("memory:", dict(module.strategy.buffer_sizes()))
