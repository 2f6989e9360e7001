"""Continual learning in a plain PyTorch loop: replay and distillation on the tiny CLIP.

Two tasks of two color classes each; every task is evaluated after every task, and a run that was
stopped between two tasks resumes with the same command.

    python examples/bare_loop.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.data import DataLoader

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


def learn(model: mmcl.OpenCLIP, strategy: mmcl.Strategy, index: int, file: Path) -> None:
    """Train one task, or load it if it was trained before."""
    if file.is_file():
        state = torch.load(file, weights_only=True)
        mmcl.begin_tasks(model, strategy, state["strategy"])
        model.load_state_dict(state["model"])
        strategy.load_state_dict(state["strategy"])
        return
    task = mmcl.Task(index, f"colors {index}")
    mmcl.begin_task(model, strategy, task)
    earlier = [squares(old, seed=old) for old in range(index)]
    loader = mmcl.replay_loader(squares(index, seed=index), strategy, 8, earlier=earlier)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(2):
        for batch in loader:
            done = mmcl.step(model, strategy, batch)
            done.loss.backward()
            strategy.project_gradients(model)
            optimizer.step()
            optimizer.zero_grad()
            strategy.after_step(model, done.batch, done.output)
    mmcl.end_task(model, strategy, task, loader.task_pass())
    torch.save({"model": model.state_dict(), "strategy": strategy.state_dict()}, file)


def main(folder: Path) -> None:
    """Learn two tasks, and print the accuracy matrix."""
    torch.manual_seed(0)
    model = mmcl.OpenCLIP("tiny", pretrained="built-in")
    model.set_classes(list(COLORS), ["a photo of a {} square."])
    replay = mmcl.strategies.ExperienceReplay(buffer_size=16, replay_ratio=0.25)
    strategy = mmcl.Chain([replay, mmcl.strategies.LwF()])
    strategy.attach(model)
    matrix = mmcl.AccuracyMatrix("colors", "class", [Column("red, green"), Column("blue, gray")])
    for index in range(2):
        learn(model, strategy, index, folder / f"task_{index}.pt")
        for column in range(2):
            test = DataLoader(squares(column, 9), batch_size=16, collate_fn=mmcl.collate_images)
            matrix.set(index + 1, column, mmcl.evaluate(model, strategy, test))
    print("accuracy of each task:", *(f"{value:.2f}" for value in matrix.values[2]))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else temporary))
