"""Continual learning in a plain PyTorch loop: learning without forgetting on the tiny CLIP.

python examples/bare_loop.py
"""

import torch

import mmcl

NAMES = ["red", "green", "blue", "gray"]
COLORS = torch.tensor([[220, 30, 30], [30, 180, 30], [40, 40, 220], [128, 128, 128]])


def batches(model: mmcl.OpenCLIP, task: int, seed: int) -> list[mmcl.Batch]:
    """Four batches of 8 noisy squares of the two colors of a task."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(8) % 2 + 2 * task
    shape = (8, 3, model.size, model.size)
    made = []
    for _ in range(4):
        noise = 20 * torch.randn(shape, generator=generator)
        images = (COLORS[labels].view(8, 3, 1, 1) + noise).clamp(0, 255).to(torch.uint8)
        made.append(mmcl.Batch.from_images(images, labels, task=task))
    return made


def accuracy(model: mmcl.OpenCLIP, task: int) -> float:
    """Fraction of a task's test images whose most similar class is the right one."""
    with torch.no_grad():
        right = [model(b).logits.argmax(1) == b.labels for b in batches(model, task, seed=9)]
    return float(torch.cat(right).float().mean())


if __name__ == "__main__":
    torch.manual_seed(0)
    model = mmcl.OpenCLIP("tiny", pretrained="built-in")
    strategy = mmcl.strategies.LwF()
    strategy.attach(model)
    for index in range(2):
        loader = batches(model, index, seed=index)
        model.set_classes(NAMES[: 2 * (index + 1)], ["a photo of a {} square."])
        task = mmcl.Task(index, f"colors {index}", size=32)
        mmcl.begin_task(model, strategy, task)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        for batch in loader * 3:
            done = mmcl.step(model, strategy, batch)
            done.loss.backward()
            strategy.project_gradients(model)
            optimizer.step()
            optimizer.zero_grad()
            strategy.after_step(model, done.batch, done.output)
        mmcl.end_task(model, strategy, task, loader)
    print("accuracy of each task:", *(f"{accuracy(model, task):.2f}" for task in range(2)))
