"""LoRA and experience replay on a LLaVA: two kinds of questions, one after the other.

The tiny LLaVA ships with mmcl; any LLaVA of transformers takes its place, see docs/scaling.md.

    python examples/llava_lora_replay.py
"""

import json
import tempfile
from pathlib import Path

import pytorch_lightning as pl
from PIL import Image

import mmcl
from mmcl.cli import main

COLORS = ("red", "green", "blue", "black")
HALVES = ("left", "right")


def write_stream(folder: Path) -> Path:
    """Write LLaVA-style JSON of each question, convert it in place, and return the card."""
    for task, half in enumerate(HALVES):
        records = []
        for number in range(16):
            pair = COLORS[number % 4], COLORS[number // 4]
            image = Image.new("RGB", (64, 64), pair[0])
            image.paste(Image.new("RGB", (32, 64), pair[1]), (32, 0))
            name = f"{task}-{number}.png"
            image.save(folder / name)
            turns = [("human", f"<image>\nWhat color is the {half} half?"), ("gpt", pair[task])]
            turns = [{"from": role, "value": text} for role, text in turns]
            records.append({"id": name, "image": name, "conversations": turns})
        for split, some in (("train", records[:12]), ("test", records[12:])):
            (folder / f"{task}-{split}.json").write_text(json.dumps(some))
        files = [str(folder / f"{task}-train.json"), "--test", str(folder / f"{task}-test.json")]
        names = ["--name", "halves", "--task", half, "--out", str(folder)]
        append = ["--append"] if task else []
        assert main(["data", "convert", *files, *names, "--in_place", *append]) == 0
    return folder / "halves.yaml"


if __name__ == "__main__":
    pl.seed_everything(0)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    replay = mmcl.strategies.ExperienceReplay(buffer_size=8, replay_ratio=0.25)
    strategy = mmcl.Chain([mmcl.strategies.LoRA(rank=4), replay])
    with tempfile.TemporaryDirectory() as folder:
        card = write_stream(Path(folder))
        data = mmcl.ContinualDataModule(str(card), global_batch_size=8)
        module = mmcl.ContinualModule(mmcl.ImageTextToText("tiny-llava"), strategy, 2e-3)
        for index in range(len(HALVES)):
            data.set_task(index)
            callback = mmcl.StrategyCallback()
            trainer = pl.Trainer(accelerator="cpu", max_epochs=2, callbacks=[callback], **quiet)
            trainer.fit(module, datamodule=data)
        print("replay buffer:", dict(strategy.buffer_sizes()))
