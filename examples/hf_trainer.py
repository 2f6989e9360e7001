"""Continual learning in Hugging Face's Trainer, by a callback.

Two tasks of two color classes each, with experience replay on the built-in tiny CLIP.

    python examples/hf_trainer.py
"""

import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import mmcl
from mmcl.evaluation import Column

COLORS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (40, 40, 220), "gray": (128,) * 3}


def squares(task: int, seed: int) -> list[tuple[torch.Tensor, int]]:
    """Dataset of 32 noisy squares of the two colors of a task: (image, class index)."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(32) % 2 + 2 * task
    colors = torch.tensor(list(COLORS.values())).view(-1, 3, 1, 1).float()
    images = colors[labels] + 20 * torch.randn(32, 3, 64, 64, generator=draw)
    return list(zip(images.clamp(0, 255).to(torch.uint8), labels.tolist(), strict=True))


class Inputs:
    """Loader of the Trainer's inputs: the batches of a loader under their name."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, mmcl.Batch]]:
        return ({"batch": batch} for batch in self.loader)


class ReplayTrainer(Trainer):
    """Trainer whose training loader is the one that it is given for a dataset."""

    def get_train_dataloader(self) -> Inputs:
        """Return the loader with replay."""
        return Inputs(self.train_dataset)


if __name__ == "__main__":
    torch.manual_seed(0)
    model = mmcl.OpenCLIP("tiny", pretrained="built-in")
    model.set_classes(list(COLORS), ["a photo of a {} square."])
    strategy = mmcl.strategies.ExperienceReplay(buffer_size=16, replay_ratio=0.25)
    strategy.attach(model)
    matrix = mmcl.AccuracyMatrix("colors", "class", [Column("red, green"), Column("blue, gray")])
    for index in range(2):
        earlier = [squares(old, seed=old) for old in range(index)]
        loader = mmcl.replay_loader(squares(index, index), strategy, 8, earlier=earlier)
        module, task = mmcl.StepModule(model, strategy), mmcl.Task(index, f"colors {index}")
        callback = mmcl.HFTrainerCallback(module, task, loader.task_pass())
        with tempfile.TemporaryDirectory() as folder:
            settings = TrainingArguments(
                folder, num_train_epochs=2, learning_rate=1e-4, save_strategy="no",
                report_to="none", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
            )  # fmt: skip
            ReplayTrainer(module, settings, train_dataset=loader, callbacks=[callback]).train()
        for column in range(2):
            test = DataLoader(squares(column, 9), batch_size=16, collate_fn=mmcl.collate_images)
            matrix.set(index + 1, column, mmcl.evaluate(model, strategy, test))
    print("accuracy of each task:", *(f"{value:.2f}" for value in matrix.values[2]))
