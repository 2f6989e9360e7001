"""RecycleDistillation teaches a new base model what an old base with its adapter answers.

Paper: Qin et al. 2023, arXiv:2305.08702. Their distillation-based recyclable tuning.
Code followed: none; written from the equations.
Differs: the divergence is a mean over samples (or scored tokens), not over classes as well, so its
weight does not depend on the number of classes; hidden states are the pooled image embeddings.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmcl.core import VLM, Batch, Output, Strategy, device_of, subset_weight
from mmcl.core.model import eval_mode
from mmcl.core.sample import Conversation, ProcessedSample, Turn
from mmcl.ops.regularization import contrastive_kd_loss, kd_loss

_PROBE = "Name the 3 red squares, please."


class RecycleDistillation(Strategy):
    """Distillation from the old base model with its adapter, on few labeled samples.

    ``(1 - alpha) * CE + alpha * T^2 * KL(teacher || student) + hidden_weight / 2 * MSE`` of the
    pooled image embeddings. The divergence is over class scores, over the (B, B) similarities of
    captions (mean of both directions), or over the vocabulary at the scored tokens of answers. The
    teacher is frozen, in evaluation mode, and sees the student's own batches.

    Args:
        teacher: model that is distilled from; None = a copy of the model as it was attached.
        alpha: weight of the divergence, 0 to 1; the paper searches 0.7 and 0.9.
        temperature: T, softens both distributions; the paper searches 5, 10 and 20.
        hidden_weight: weight of the mean squared error of the image embeddings; 0 = none.

    **Remembers** the sha256 of the teacher's weights, with which a resume compares them. The
    weights themselves are those that the configuration names.

    **Asks of the model** to be a torch module that reads images and texts as the teacher does, and
    embeddings in its output where the weight of their error is above 0.
    """

    def __init__(
        self,
        teacher: nn.Module | None = None,
        alpha: float = 0.9,
        temperature: float = 10.0,
        hidden_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1 or temperature <= 0 or hidden_weight < 0:
            raise ValueError(
                f"alpha is {alpha}, temperature {temperature} and hidden_weight {hidden_weight}: "
                "give an alpha of 0 to 1, a temperature above 0 and a hidden_weight of 0 or more"
            )
        self.alpha, self.temperature, self.hidden_weight = alpha, temperature, hidden_weight
        # In a tuple, so that it is no submodule: it is not trained, and not in checkpoints.
        self._teacher: tuple[nn.Module, ...] = () if teacher is None else (_frozen(teacher),)
        self._hash = ""

    def attach(self, model: VLM) -> None:
        """Check that teacher and student read a sample alike; without a teacher copy the model.

        Raises:
            ValueError: if their tokens or image inputs differ.
        """
        if not self._teacher:
            self._teacher = (_frozen(copy.deepcopy(cast(nn.Module, model))),)
        self._hash = _hash_of(self._teacher[0])
        own, its = _probe(model), _probe(self._teacher[0])
        if own is not None and its is not None and (part := _difference(own, its)):
            raise ValueError(
                f"teacher and student make other {part} of one sample, so the teacher's scores "
                "would not be of the student's tokens or images: distill between models of one "
                "tokenizer and processor, or recycle with --mode init or direct"
            )

    def objective(self, model: VLM, batch: Batch, output: Output) -> Tensor:
        """Return the labels' part of the loss, ``(1 - alpha) * CE``."""
        return (1 - self.alpha) * model.loss(output, batch)

    def penalty(self, model: VLM, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        """Return the divergence as "distillation", and "hidden" if its weight is above 0."""
        count = len(batch) if output.sample_index is None else len(output.logits)
        sizes = batch.global_batch
        total = None if sizes is None else sizes.samples
        weight = subset_weight(batch, count, len(batch), total)
        if not count:
            return {}
        target = self._target(model, batch)
        loss = kd_loss if batch.is_generative or batch.input_ids is None else contrastive_kd_loss
        divergence = loss(target.logits.float(), output.logits.float(), self.temperature)
        terms = {"distillation": self.alpha * weight * divergence}
        if self.hidden_weight:
            if output.image is None or target.image is None:
                raise ValueError(
                    f"hidden_weight is {self.hidden_weight}, and {type(model).__name__} returns no "
                    "image embeddings: set hidden_weight to 0"
                )
            error = functional.mse_loss(output.image, target.image.to(output.image.dtype))
            terms["hidden"] = 0.5 * self.hidden_weight * weight * error
        return terms

    def get_extra_state(self) -> dict[str, Any]:
        """Return the sha256 of the teacher's weights."""
        return {"teacher": self._hash}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Compare the teacher with that of a checkpoint.

        Raises:
            RuntimeError: if it has other weights.
        """
        if self._hash and state["teacher"] not in ("", self._hash):
            raise RuntimeError(
                f"the checkpoint was distilled from a teacher {state['teacher'][:12]}, and this "
                f"one is {self._hash[:12]}: give the same teacher's weights"
            )

    @torch.no_grad()
    def _target(self, model: VLM, batch: Batch) -> Output:
        """Return the teacher's output for a batch, with the student's classes."""
        teacher, device = cast(Any, self._teacher[0]), device_of(model)
        if device_of(teacher) != device:
            teacher.to(device)
        if (classes := getattr(model, "classes", None)) and hasattr(teacher, "set_classes"):
            teacher.set_classes(*classes)
        with eval_mode(teacher):
            output: Output = teacher(batch)
        return output


def _frozen(teacher: nn.Module) -> nn.Module:
    return teacher.requires_grad_(False).eval()


def _hash_of(module: nn.Module) -> str:
    """Return the sha256 of a module's weights by name."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, Tensor):
            plain = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
            digest.update(plain.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _probe(model: Any) -> ProcessedSample | None:
    """Return what a model's transform makes of one image and text; None without a transform."""
    if not callable(getattr(model, "transform", None)):
        return None
    pixels = torch.arange(3 * 40 * 40).remainder(251).view(3, 40, 40).to(torch.uint8)
    turns = (Turn("user", f"<image>\n{_PROBE}"), Turn("assistant", "A square."))
    is_chat = hasattr(model, "chat_tokenizer")
    text = Conversation(turns, ("A square.",)) if is_chat else _PROBE
    found: ProcessedSample = model.transform(False)(pixels, text, 0)
    return found


def _difference(own: ProcessedSample, its: ProcessedSample) -> str:
    """Return in which part two samples differ, "" if in none."""
    for part in ("input_ids", "labels"):
        if not _same(getattr(own, part), getattr(its, part)):
            return "tokens"
    images = (own.image, *(v for one in own.image_inputs for _, v in sorted(one.items())))
    others = (its.image, *(v for one in its.image_inputs for _, v in sorted(one.items())))
    alike = len(images) == len(others) and all(map(_same, images, others))
    return "" if alike else "image inputs"


def _same(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    return left.shape == right.shape and torch.equal(left, right)
