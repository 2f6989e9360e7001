"""CLIP-style models of open_clip behind the VLM protocol."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmcl.core import NO_PROMPTS, Batch, Modality, Output, Prompts, Transform
from mmcl.core.output import Place
from mmcl.models.contrastive import caption_loss, class_loss
from mmcl.models.fingerprint import fingerprint_of
from mmcl.models.loading import load_clip, picture_settings
from mmcl.models.pictures import ClipTransform
from mmcl.models.towers import cut, image_embedding, text_embedding, widths

_MAX_SCALE = 100.0


class _Same:
    """Equal only to what holds the very same object."""

    def __init__(self, held: object) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.held is other.held

    def __hash__(self) -> int:
        return id(self.held)


class OpenCLIP(nn.Module):
    """A dual encoder: classifies by likeness to class texts, or matches pictures and captions.

    Args:
        model: "tiny" (ships with mmcl), an open_clip architecture such as "ViT-B-16", a local
            folder, or a ``.json`` architecture file.
        pretrained: "built-in" (tiny only), a tag such as "openai", a local checkpoint file, or
            None for random weights.
        frozen: towers that do not learn, any of "image" and "text".
        train_scale: let the factor of the cosine learn (it is kept at most 100).
        loss_over: which class texts a training row competes with: "seen" (all classes met so far)
            or "task" (those first met in the row's own task).
        label_smoothing: of the class loss, 0 to 1.
        crop: smallest area share of a training crop; None = no augmentation.
        flip: mirror half of the training pictures.
        seed: of random weights.
    """

    _mean: Tensor
    _std: Tensor
    _class_tokens: Tensor
    _class_task: Tensor

    def __init__(
        self,
        model: str = "tiny",
        pretrained: str | None = None,
        frozen: Sequence[Modality] = (),
        train_scale: bool = False,
        loss_over: Literal["seen", "task"] = "seen",
        label_smoothing: float = 0.0,
        crop: float | None = 0.9,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.name = model
        self.clip: Any
        self.clip, self._tokenizer = load_clip(model, pretrained, seed)
        self.size, mean, std = picture_settings(self.clip)
        self.register_buffer("_mean", (mean * 255).view(3, 1, 1), persistent=False)
        self.register_buffer("_std", (std * 255).view(3, 1, 1), persistent=False)
        self.loss_over, self.label_smoothing = loss_over, label_smoothing
        self.crop, self.flip = crop, flip
        self.widths = widths(self.clip)
        self.clip.logit_scale.requires_grad_(train_scale)
        self.freeze(*frozen)
        self.register_buffer(
            "_class_tokens", torch.zeros(0, 1, dtype=torch.int64), persistent=False
        )
        self.register_buffer("_class_task", torch.zeros(0, dtype=torch.int64), persistent=False)
        self._classes: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
        self._known: dict[tuple[str, str], Tensor] = {}
        self._cached: tuple[Any, Tensor] | None = None
        self._forwards_with_grad = 0

    # Scoring runs in inference mode, whose tensors a later training step could not use.
    @torch.inference_mode(False)
    def set_classes(
        self, names: Sequence[str], templates: Sequence[str], tasks: Sequence[int] = ()
    ) -> None:
        """Choose the classes that pictures are compared with.

        Args:
            names: class names in column order.
            templates: each with one ``{}``; a class is the mean of its texts' unit embeddings.
            tasks: the task each class was first met in, for ``loss_over="task"``.
        """
        wanted = (tuple(names), tuple(templates))
        device = self._class_task.device
        self._class_task = torch.tensor(list(tasks), dtype=torch.int64, device=device)
        if wanted == self._classes:
            return
        texts = [self._text(template, name) for name in names for template in templates]
        longest = max((len(text) for text in texts), default=1)
        padded = [functional.pad(text, (0, longest - len(text))) for text in texts]
        stacked = torch.stack(padded) if padded else torch.zeros(0, 1, dtype=torch.int64)
        self._class_tokens = stacked.to(device)
        self._classes, self._cached = wanted, None

    def forward(self, batch: Batch, prompts: Prompts = NO_PROMPTS) -> Output:
        """Score a batch.

        Rows with texts of their own (captions) are compared with each other's texts, (B, B);
        rows without are compared with the class texts, (B, C).
        """
        self._forwards_with_grad += torch.is_grad_enabled()
        image = self._image(batch, prompts)
        if batch.tokens is not None:
            text = self._unit(text_embedding(self.clip, cut(batch.tokens), prompts.tokens))
        elif any(place[0] == "text" for place in prompts.tokens):
            return self._with_text_prompts(image, prompts)
        else:
            text = self._class_embeddings()
        return Output(self._scale() * image @ text.T, image, text, prompts)

    def loss(self, output: Output, batch: Batch) -> Tensor:
        """Return cross entropy over class texts, or symmetric InfoNCE for rows with captions."""
        if batch.tokens is not None:
            if output.image is None or output.text is None:
                raise ValueError("a caption loss needs output.image and output.text, got None")
            pairs = (output.image, output.text, batch.tokens)
            return caption_loss(*pairs, self._scale(), batch.scored)
        logits = output.logits
        if self.loss_over == "task" and len(self._class_task) == logits.shape[1]:
            # Rows of no task, from another source, are compared with all classes.
            foreign = (self._class_task[None] != batch.task[:, None]) & (batch.task[:, None] >= 0)
            logits = logits.masked_fill(foreign, float("-inf"))
        return class_loss(logits, batch.labels, self.label_smoothing)

    @cached_property
    def embed_width(self) -> int:
        """E, the width of both towers' embeddings."""
        stated = getattr(self.clip.visual, "output_dim", None)
        if stated is None:  # timm towers do not say
            blank = torch.zeros(1, 3, self.size, self.size, device=self._mean.device)
            with torch.inference_mode():
                return int(image_embedding(self.clip, blank, {}).shape[1])
        return int(stated)

    @torch.no_grad()
    def embed(self, batch: Batch, modality: Modality) -> Tensor:
        """Return (B, E) unit embeddings without prompts: of pictures, or of the rows' own texts."""
        if modality == "image":
            return self._image(batch, NO_PROMPTS)
        if batch.tokens is None:
            raise ValueError("these rows have no text of their own: use modality='image'")
        return self._unit(text_embedding(self.clip, cut(batch.tokens), {}))

    @torch.no_grad()
    def encode(self, batch: Batch) -> Tensor:
        """Return (B, 1, E) pooled output of the image tower, or the features that stand in."""
        if batch.features is not None:
            return batch.features
        return image_embedding(self.clip, self._pixels(batch), {})[:, None]

    def freeze(self, *towers: Modality) -> None:
        """Stop whole towers from learning; the factor of the cosine belongs to neither."""
        for tower in towers:
            for parameter in self.tower(tower):
                parameter.requires_grad_(False)

    def tower(self, modality: Modality) -> Iterable[nn.Parameter]:
        """Iterate over the parameters of one tower."""
        for name, parameter in self.clip.named_parameters():
            belongs = "image" if name.startswith("visual.") else "text"
            if belongs == modality and not name.startswith("logit_"):
                yield parameter

    def is_frozen(self, modality: Modality) -> bool:
        """Tell whether nothing in a tower learns."""
        return not any(parameter.requires_grad for parameter in self.tower(modality))

    def fingerprint(self) -> str:
        """Return the sha256 of frozen weights, their types and the preprocessing."""
        state = [*self.clip.named_parameters(), ("mean", self._mean), ("std", self._std)]
        frozen = [(name, tensor) for name, tensor in state if not tensor.requires_grad]
        return fingerprint_of(f"{self.size}", frozen)

    def transform(self, train: bool) -> Transform:
        """Return what this model does to a sample, with augmentation in training."""
        crop = self.crop if train else None
        return ClipTransform(self.size, self._tokenizer, crop, self.flip and train)

    def answer(self, batch: Batch, prompts: Prompts = NO_PROMPTS) -> list[str]:
        """Return the best class name for every row."""
        names = self._classes[0]
        return [names[best] for best in self(batch, prompts).logits.argmax(1).tolist()]

    def _text(self, template: str, name: str) -> Tensor:
        found = self._known.get((template, name))
        if found is None:
            tokens = self._tokenizer([template.format(name)])[0]
            found = self._known[template, name] = tokens[: int((tokens != 0).sum())]
        return found

    def _pixels(self, batch: Batch) -> Tensor:
        if batch.images is None:
            raise ValueError("rows have neither images nor features: give one of them")
        pixels: Tensor = (batch.images.to(self._mean.dtype) - self._mean) / self._std
        return pixels

    def _image(self, batch: Batch, prompts: Prompts) -> Tensor:
        if batch.features is not None:
            if any(place[0] == "image" for place in prompts.tokens):
                raise ValueError(
                    "image prompts cannot enter stored features, which skip the image tower: use "
                    "prompts on the text tower, or raw replay"
                )
            return self._unit(batch.features.to(self._mean.dtype).mean(1))
        if batch.owner is not None and len(batch.owner) != len(batch):
            raise ValueError(
                f"{len(batch.owner)} pictures for {len(batch)} rows: a CLIP takes one picture a row"
            )
        return self._unit(image_embedding(self.clip, self._pixels(batch), prompts.tokens))

    def _class_embeddings(self) -> Tensor:
        parameters = list(self.tower("text"))
        learns = any(parameter.requires_grad for parameter in parameters)
        if learns and torch.is_grad_enabled():
            return self._embed_classes({})
        # A fused optimiser changes weights without counting their version up, so what may have been
        # trained since is asked anew. Weights are held, lest others come to lie in their place.
        weights = [(_Same(p), p.data_ptr(), p._version) for p in parameters]
        key = (self._forwards_with_grad if learns else 0, weights)
        if self._cached is None or self._cached[0] != key:
            # Tensors made in inference mode could not be used by a later training step.
            with torch.inference_mode(False), torch.no_grad():
                self._cached = (key, self._embed_classes({}))
        return self._cached[1]

    def _embed_classes(self, prompts: dict[Place, Tensor]) -> Tensor:
        names, templates = self._classes
        if not names:
            raise RuntimeError(
                "the model knows no classes: call model.set_classes(names, templates) first"
            )
        text = self._unit(text_embedding(self.clip, self._class_tokens, prompts))
        return self._unit(text.view(len(names), len(templates), -1).mean(1))

    def _with_text_prompts(self, image: Tensor, prompts: Prompts) -> Output:
        """Compare every row with class texts that carry the row's own prompts, (B, C, E)."""
        names, templates = self._classes
        tokens = {place: t for place, t in prompts.tokens.items() if place[0] == "text"}
        texts, rows = self._class_tokens, image.shape[0]
        spread = {place: t.repeat_interleave(len(texts), 0) for place, t in tokens.items()}
        unit = self._unit(text_embedding(self.clip, texts.repeat(rows, 1), spread))
        text = self._unit(unit.view(rows, len(names), len(templates), -1).mean(2))
        logits = self._scale() * torch.einsum("be,bce->bc", image, text)
        return Output(logits, image, None, prompts)

    def _scale(self) -> Tensor:
        scale: Tensor = self.clip.logit_scale.exp().clamp(max=_MAX_SCALE)
        return scale

    @staticmethod
    def _unit(embedding: Tensor) -> Tensor:
        return functional.normalize(embedding, dim=-1)
