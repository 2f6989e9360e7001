"""A small random LLaVA with LoRA, and dialogues for it: the problem of ``llava_step``."""

import copy
import json
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from mmcl.core import IGNORE_INDEX, Batch, Task
from mmcl.models import TinyLlava

ROWS, PICTURE, TEXT, ANSWER, RATE = 16, 64, 40, 8, 1e-3
TOWER = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": 64, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32,
    },
    "text_cfg": {
        "context_length": 8, "vocab_size": 64, "width": 64, "heads": 2, "layers": 1,
    },
}  # fmt: skip
TASKS = [
    Task(index, f"task {index}", task_type="instruction", scorer="exact") for index in range(2)
]


def small_llava(folder, vocabulary, seed=0):
    """Make a LLaVA of 64 picture tokens, 6 layers of width 256 and the given vocabulary."""
    file = Path(folder) / "mmcl-benchmark-tower.json"
    file.write_text(json.dumps(TOWER))
    sizes = {"hidden_size": 256, "num_layers": 6, "num_heads": 4, "mlp_dim": 688}
    model = TinyLlava(str(file), None, **sizes, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.lm.resize_token_embeddings(vocabulary)
    model.lm.set_attn_implementation("sdpa")  # the default of transformers and of ImageTextToText
    # Untied, as in LLaVA-1.5.
    model.lm.lm_head.weight = nn.Parameter(model.lm.lm_head.weight.detach().clone())
    return model


def dialogues(model, vocabulary, count=8):
    """Return batches of one picture, about 40 words and an answer of 1 to 8 words a row."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        lengths = torch.randint(TEXT - 8, TEXT + 9, (ROWS,), generator=draw)
        said = torch.randint(1, ANSWER + 1, (ROWS,), generator=draw)
        width = 1 + PICTURE + int((lengths + said).max())
        tokens = torch.randint(10, vocabulary, (ROWS, width), generator=draw)
        tokens[:, 0], tokens[:, 1 : 1 + PICTURE] = 1, model.image_inputs.image_token_id
        place = torch.arange(width)
        end = 1 + PICTURE + lengths + said
        mask = place < end[:, None]
        labels = tokens.masked_fill(~mask | (place < (end - said)[:, None]), IGNORE_INDEX)
        images = torch.randint(256, (ROWS, 3, 64, 64), generator=draw, dtype=torch.uint8)
        task = torch.ones(ROWS, dtype=torch.int64)
        made.append(Batch(images, labels, task, input_ids=tokens * mask, attention_mask=mask))
    return made


def native(model, batch):
    """Return what transformers takes of a batch; pictures are normalised beforehand."""
    return {
        "input_ids": batch.input_ids.masked_fill(~batch.attention_mask, model.pad_token_id),
        "attention_mask": batch.attention_mask.long(),
        "labels": batch.labels,
        **model.image_inputs.forward_kwargs(model.lm, batch),
    }


class Rival:
    """transformers' ``Trainer`` on peft's LoRA.

    Args:
        model: of mmcl, without adapters; its transformers model is copied.
        batches: that the loader will give.
        names: of the layers that are adapted, in ``model``.
        rank: of the adapters.
        folder: scratch.
    """

    def __init__(self, model, batches, names, rank, folder):
        from peft import LoraConfig, get_peft_model

        self.ready = {id(batch): native(model, batch) for batch in batches}
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=[n.removeprefix("lm.") for n in names]
        )
        self.peft = get_peft_model(copy.deepcopy(model.lm), config)
        self.folder, self.losses = str(folder), []

    def start_from(self, model):
        """Take the adapters of mmcl's model."""
        own = dict(self.peft.named_parameters())
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                own["base_model.model." + name.removeprefix("lm.")].data.copy_(parameter.detach())

    def __call__(self, loader):
        """Train on a loader."""
        arm = self

        class Loop(Trainer):
            def get_train_dataloader(self):
                return _Ready(loader, arm.ready)

            def compute_loss(self, *given, **named):
                loss = super().compute_loss(*given, **named)
                arm.losses.append(loss.detach())
                return loss

        settings = TrainingArguments(
            self.folder, num_train_epochs=1, max_steps=len(loader), learning_rate=RATE,
            lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=0.0, use_cpu=True,
            report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
            adam_beta1=0.9, adam_beta2=0.98, remove_unused_columns=False,
        )  # fmt: skip
        Loop(self.peft, settings).train()


class _Ready:
    """Gives prepared inputs in the place of batches."""

    def __init__(self, loader, ready):
        self.loader, self.ready = loader, ready

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:
            yield dict(self.ready[id(batch)])


def bytes_kept(forward):
    """Return the bytes that a forward pass keeps for its backward pass, weights left out."""
    seen = {}

    def note(tensor):
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = forward()
    kept = sum(seen.values())
    loss.backward()
    return kept
