"""A model of your own: a torch module with __call__(batch, prompts), loss and named_parameters.

A prompt-free linear classifier of mean colors, trained on two tasks with EWC.

    python examples/own_model.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

import mmcl
from mmcl.core import IGNORE_INDEX, NO_PROMPTS, Output, Prompts


class ColorModel(nn.Module):
    """Classifier of the mean color of an image; the three members that mmcl needs."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3, classes)

    def forward(self, batch: mmcl.Batch, prompts: Prompts = NO_PROMPTS) -> Output:
        """Class scores (B, C) of the images of a batch."""
        return Output(self.head(batch.images.float().div(255).mean((2, 3))))

    def loss(self, output: Output, batch: mmcl.Batch) -> Tensor:
        """Task loss: the mean over the samples that are in the loss."""
        return functional.cross_entropy(output.logits, batch.labels, ignore_index=IGNORE_INDEX)


def batches(task: int) -> list[mmcl.Batch]:
    """Eight batches of the two colors of a task: channel 2 * task + class mod 3 is bright."""
    labels = torch.arange(16) % 2 + 2 * task
    images = torch.rand(8, 16, 3, 8, 8) * 0.3
    images[:, torch.arange(16), labels % 3] += 0.6
    return [mmcl.Batch.from_images(each, labels, task=task) for each in images]


if __name__ == "__main__":
    torch.manual_seed(0)
    model = ColorModel(classes=4)
    strategy = mmcl.strategies.EWC(ewc_lambda=10.0)
    strategy.attach(model)
    for index in range(2):
        task, loader = mmcl.Task(index, f"colors {index}", size=128), batches(index)
        mmcl.begin_task(model, strategy, task)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for batch in loader * 3:
            done = mmcl.step(model, strategy, batch)
            optimizer.zero_grad()
            done.loss.backward()
            optimizer.step()
            strategy.after_step(model, done.batch, done.output)
        mmcl.end_task(model, strategy, task, loader)
    print("loss terms:", ", ".join(f"{name} {value:.3f}" for name, value in done.terms.items()))
