"""A strategy of your own: an L2 penalty towards the weights of the last task.

The hooks and their order are in CONTRIBUTING.md.

    python examples/own_strategy.py
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

import mmcl
from mmcl.core import VLM, Output, trainable_parameters


class L2Anchor(mmcl.Strategy):
    """L2 penalty on the distance of the weights from those at the end of the last task.

    **Remembers** one copy of the trainable weights. **Asks of the model** nothing.
    """

    def __init__(self, l2_weight: float = 1.0) -> None:
        super().__init__()
        self.l2_weight = l2_weight
        self.anchors = nn.ParameterDict()

    def penalty(self, model: VLM, batch: mmcl.Batch, output: Output) -> Mapping[str, Tensor]:
        """Return the penalty; none in the first task."""
        if not self.anchors:
            return {}
        weights = trainable_parameters(model).items()
        moved = [(w - self.anchors[n.replace(".", "/")]).square().sum() for n, w in weights]
        return {"l2_anchor": self.l2_weight * torch.stack(moved).sum()}

    def end_task(self, model: VLM, task: mmcl.Task, batches: Iterable[mmcl.Batch]) -> None:
        """Copy the weights."""
        for name, weight in trainable_parameters(model).items():
            self.anchors[name.replace(".", "/")] = nn.Parameter(weight.detach().clone(), False)


if __name__ == "__main__":
    torch.manual_seed(0)
    model, strategy = mmcl.OpenCLIP("tiny", pretrained="built-in"), L2Anchor()
    model.set_classes(["dark", "bright"], ["a {} image."])
    strategy.attach(model)
    dark = 0.5 * torch.rand(4, 3, model.size, model.size)
    batch = mmcl.Batch.from_images(torch.cat([dark, dark + 0.5]), [0] * 4 + [1] * 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for index in range(2):
        task = mmcl.Task(index, f"task {index}")
        mmcl.begin_task(model, strategy, task)
        for _ in range(3):
            done = mmcl.step(model, strategy, batch)
            done.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        mmcl.end_task(model, strategy, task, [batch])
    print("loss terms of the last step:", ", ".join(done.terms))
