"""OpenCLIP: contrastive dual encoders of open_clip behind the VLM protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmcl.core import (
    NO_PROMPTS,
    Batch,
    Modality,
    Output,
    Prompts,
    Transform,
)
from mmcl.core.batch import text_ids
from mmcl.core.image_values import expect_levels
from mmcl.core.model import PromptPosition, eval_mode, set_frozen_to_eval
from mmcl.core.padding import pad_id_of, real_tokens
from mmcl.models.fingerprint import fingerprint_of, frozen_buffers
from mmcl.models.open_clip.clip_losses import class_loss, clip_loss, siglip_loss
from mmcl.models.open_clip.clip_transform import ClipTransform
from mmcl.models.open_clip.loading import load_clip
from mmcl.models.open_clip.pretrained_facts import description, preprocess_of
from mmcl.models.open_clip.towers import (
    image_embedding,
    pad_texts,
    padded_length,
    similarity,
    text_embedding,
    token_dims,
)

_MAX_SCALE = 100.0


class OpenCLIP(nn.Module):
    """CLIP that classifies by cosine similarity to class texts, or matches images and captions.

    Args:
        model: "tiny" (ships with mmcl), an open_clip architecture such as "ViT-B-16", a local
            folder of open_clip or of transformers' CLIPModel or SiglipModel, "hf-hub:owner/name"
            of either form, or a ``.json`` architecture file.
        pretrained: "built-in" (tiny only), a tag such as "openai", a checkpoint file or folder,
            "hf-hub:owner/name", or None for the weights of a folder or repository, else random
            ones. docs/model.md lists the forms.
        freeze: towers that are not trained, any of "image" and "text".
        train_logit_scale: train the logit scale (it is kept at most 100) or, of a model with a
            sigmoid loss (SigLIP), scale and bias.
        logit_scope: the class texts that a training sample is compared with: "seen" (all classes
            met so far) or "task" (those first met in the sample's own task).
        label_smoothing: of the class loss, 0 to 1.
        random_crop_scale: smallest area fraction of a random training crop; None = no augmentation.
        horizontal_flip: mirror half of the training images.
        seed: of random weights.
        quick_gelu: whether the weights were trained with QuickGELU, as OpenAI's were; None = as a
            tag of open_clip says, else as the name ("ViT-B-32-quickgelu") or the folder says. A
            local file does not tell.
        preprocess: preprocessing that the weights were trained with, where a local file does not
            tell: any of ``mean`` and ``std`` (three numbers, of levels from 0 to 1),
            ``interpolation`` (bicubic, bilinear, random), ``resize_mode`` (shortest, longest,
            squash) and ``fill_color`` (0 to 255). None = as the tag or the folder says; of a file,
            that on which all tags of the architecture agree.
    """

    _mean: Tensor
    _std: Tensor
    _class_tokens: Tensor
    _class_task: Tensor

    def __init__(
        self,
        model: str = "tiny",
        pretrained: str | None = None,
        freeze: Sequence[Modality] = (),
        train_logit_scale: bool = False,
        logit_scope: Literal["seen", "task"] = "seen",
        label_smoothing: float = 0.0,
        random_crop_scale: float | None = 0.9,
        horizontal_flip: bool = False,
        seed: int = 0,
        quick_gelu: bool | None = None,
        preprocess: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.name = model
        self.clip: Any
        self.clip, self._tokenizer = load_clip(model, pretrained, seed, quick_gelu, preprocess)
        self._preprocess = preprocess_of(self.clip)
        self.size: int | tuple[int, int] = self._preprocess.size
        for name in ("mean", "std"):
            levels = torch.tensor(getattr(self._preprocess, name)) * 255
            self.register_buffer(f"_{name}", levels.view(3, 1, 1), persistent=False)
        self._text_length = padded_length(self.clip, self._tokenizer)
        self.logit_scope, self.label_smoothing = logit_scope, label_smoothing
        self.random_crop_scale, self.horizontal_flip = random_crop_scale, horizontal_flip
        self.prompt_dims = token_dims(self.clip)
        self.clip.logit_scale.requires_grad_(train_logit_scale)
        if self._bias is not None:
            self._bias.requires_grad_(train_logit_scale)
        self.freeze(*freeze)
        self.register_buffer(
            "_class_tokens", torch.zeros(0, 1, dtype=torch.int64), persistent=False
        )
        self.register_buffer("_class_task", torch.zeros(0, dtype=torch.int64), persistent=False)
        self._classes: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
        self._text_cache: dict[tuple[str, str], Tensor] = {}
        self._class_cache: tuple[Any, list[nn.Parameter], Tensor] | None = None
        self._forwards_with_grad = 0

    def train(self, mode: bool = True) -> OpenCLIP:
        """Set training or evaluation mode; what is frozen is always in evaluation mode."""
        super().train(mode)
        if mode:
            set_frozen_to_eval(self)
        return self

    @property
    def tokenizer(self) -> Callable[[list[str]], Tensor]:
        """Tokenizer of captions: B texts -> (B, L) int64 token ids, padded with ``pad_id``.

        Raises:
            TypeError: if the model has none.
        """
        if self._tokenizer is None:
            raise TypeError(
                f"the model '{self.name}' has no tokenizer, so it takes images only: choose an "
                "open_clip model with a text tower"
            )
        return self._tokenizer

    @property
    def pad_id(self) -> int:
        """Token that the tokenizer pads with: 0 for CLIP's own, 1 for those of XLM-R or SigLIP.

        Another token 0 is a token like any other.
        """
        return pad_id_of(self._tokenizer)

    # Evaluation runs in inference mode, whose tensors a later training step could not use.
    @torch.inference_mode(False)
    def set_classes(
        self, names: Sequence[str], templates: Sequence[str], tasks: Sequence[int] = ()
    ) -> None:
        """Set the classes that images are compared with.

        Args:
            names: class names in column order.
            templates: each with one ``{}``; a class is the mean of its texts' unit embeddings.
            tasks: the task each class was first met in, for ``logit_scope="task"``.
        """
        classes = (tuple(names), tuple(templates))
        device = self._class_task.device
        self._class_task = torch.tensor(list(tasks), dtype=torch.int64, device=device)
        if classes == self._classes:
            return
        texts = [self._text(template, name) for name in names for template in templates]
        longest = self._text_length or max((len(text) for text in texts), default=1)
        padded = [
            functional.pad(text, (0, longest - len(text)), value=self.pad_id) for text in texts
        ]
        stacked = torch.stack(padded) if padded else torch.zeros(0, 1, dtype=torch.int64)
        self._class_tokens = stacked.to(device)
        self._classes, self._class_cache = classes, None

    @property
    def classes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names and templates of the classes, as ``set_classes`` took them; both may be empty."""
        return self._classes

    def forward(self, batch: Batch, prompts: Prompts = NO_PROMPTS) -> Output:
        """Return the scores of a batch, scaled cosine similarities of images and texts, plus bias.

        Samples with captions are compared with all captions of the batch, logits (B, B); samples
        without are compared with the class texts, logits (B, C).
        """
        self._forwards_with_grad += torch.is_grad_enabled()
        image = self._image(batch, prompts)
        if batch.input_ids is not None:
            text = self._unit(text_embedding(self.clip, self._texts(batch), prompts.tokens))
        elif any(tower == "text" for tower, _ in prompts.tokens):
            return self._with_text_prompts(image, prompts)
        else:
            text = self._class_embeddings()
        return Output(self._scores(image, text), image, text, prompts)

    def loss(self, output: Output, batch: Batch) -> Tensor:
        """Return cross entropy over class texts, or the loss of pairs of images and captions.

        That is symmetric InfoNCE, or the sigmoid loss of a model with a logit bias (SigLIP).
        """
        if batch.input_ids is not None:
            if output.image is None or output.text is None:
                raise ValueError(
                    "the caption loss needs output.image and output.text, got None: pass the "
                    "output of model(batch) for a batch with captions"
                )
            pairs = (output.image, output.text, self._scale())
            same: dict[str, Any] = {
                "text_ids": text_ids(batch.input_ids, self._mask(batch)),
                "image_ids": batch.image_ids, "in_loss": batch.in_loss,
            }  # fmt: skip
            if self._bias is not None:
                return siglip_loss(*pairs, self._bias, **same)
            return clip_loss(*pairs, **same)
        logits = output.logits
        if self.logit_scope == "task" and len(self._class_task) == logits.shape[1]:
            # Samples of another source have no task (-1) and are compared with all classes.
            own = batch.task_ids[:, None]
            foreign = (self._class_task[None] != own) & (own >= 0)
            logits = logits.masked_fill(foreign, float("-inf"))
        return class_loss(logits, batch.labels, self.label_smoothing)

    @cached_property
    def embed_dim(self) -> int:
        """Embedding dim E of both towers."""
        declared = getattr(self.clip.visual, "output_dim", None)
        if declared is None:  # timm towers have no output_dim
            sides = (self.size, self.size) if isinstance(self.size, int) else self.size
            blank = torch.zeros(1, 3, *sides, device=self._mean.device)
            with torch.inference_mode(), eval_mode(self.clip.visual):
                return int(image_embedding(self.clip, blank, {}).shape[1])
        return int(declared)

    @torch.no_grad()
    def embed(self, batch: Batch, modality: Modality) -> Tensor:
        """Return (B, E) unit embeddings, without prompts and in evaluation mode.

        Args:
            batch: B images or captions.
            modality: which of the two.
        """
        if modality == "image":
            with eval_mode(self.clip.visual):
                return self._image(batch, NO_PROMPTS)
        if batch.input_ids is None:
            raise ValueError("the batch has no captions to embed: use modality='image'")
        with eval_mode(self.clip):
            return self._unit(text_embedding(self.clip, self._texts(batch), {}))

    @torch.no_grad()
    def encode_image(self, batch: Batch) -> Tensor:
        """Return (B, 1, E) pooled output of the image tower, or the batch's stored features.

        The tower is in evaluation mode.
        """
        if batch.features is not None:
            return batch.features
        with eval_mode(self.clip.visual):
            return image_embedding(self.clip, self._pixels(batch), {})[:, None]

    def freeze(self, *towers: Modality) -> None:
        """Freeze whole towers, in evaluation mode; logit scale and bias belong to neither."""
        for tower in towers:
            for parameter in self.tower(tower):
                parameter.requires_grad_(False)
        set_frozen_to_eval(self)

    def tower(self, modality: Modality) -> Iterable[nn.Parameter]:
        """Iterate over the parameters of one tower."""
        for name, parameter in self.clip.named_parameters():
            belongs = "image" if name.startswith("visual.") else "text"
            if belongs == modality and not name.startswith("logit_"):
                yield parameter

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters of "image" and "text", the two towers."""
        return {"image": list(self.tower("image")), "text": list(self.tower("text"))}

    def is_frozen(self, modality: Modality) -> bool:
        """Return whether a tower has no trainable parameter."""
        return not any(parameter.requires_grad for parameter in self.tower(modality))

    def fingerprint(self) -> str:
        """Return the sha256 of frozen weights and buffers, activation and preprocessing."""
        tensors = [*self.clip.named_parameters(), ("mean", self._mean), ("std", self._std)]
        frozen = [(name, tensor) for name, tensor in tensors if not tensor.requires_grad]
        return fingerprint_of(description(self.clip), [*frozen, *frozen_buffers(self.clip).items()])

    def transform(self, train: bool) -> Transform:
        """Return the preprocessing of a sample, with augmentation in training."""
        own = self._preprocess
        return ClipTransform(
            self.size, self._tokenizer, self.random_crop_scale if train else None,
            self.horizontal_flip and train, own.interpolation, own.resize_mode, own.fill_color,
            self.pad_id,
        )  # fmt: skip

    def generate(self, batch: Batch, prompts: Prompts = NO_PROMPTS) -> list[str]:
        """Return the name of the most similar class for every sample."""
        names = self._classes[0]
        return [names[best] for best in self(batch, prompts).logits.argmax(1).tolist()]

    def _text(self, template: str, name: str) -> Tensor:
        key = (template, name)
        if key not in self._text_cache:
            padded = self._tokenizer([template.format(name)])
            self._text_cache[key] = padded[0, : int(real_tokens(padded, self.pad_id).sum())]
        return self._text_cache[key]

    def _texts(self, batch: Batch) -> Tensor:
        """Return the texts of a batch, padded as the text tower takes them."""
        tokens, mask = cast(Tensor, batch.input_ids), self._mask(batch)
        return pad_texts(tokens, mask, self.pad_id, self._text_length)

    def _mask(self, batch: Batch) -> Tensor:
        if batch.attention_mask is not None:
            return batch.attention_mask
        return real_tokens(cast(Tensor, batch.input_ids), self.pad_id)

    def _pixels(self, batch: Batch) -> Tensor:
        if batch.images is None:
            raise ValueError("the batch has neither images nor features: give one of them")
        expect_levels(batch.images, self.size)
        pixels: Tensor = (batch.images.to(self._mean.dtype) - self._mean) / self._std
        return pixels

    def _image(self, batch: Batch, prompts: Prompts) -> Tensor:
        if batch.features is not None:
            if any(tower == "image" for tower, _ in prompts.tokens):
                raise ValueError(
                    "image prompts cannot enter stored features, which skip the image tower: use "
                    "prompts on the text tower, or raw replay"
                )
            wide = torch.promote_types(self._mean.dtype, torch.float32)
            return self._unit(batch.features.to(wide).mean(1))
        if batch.image_owner is not None and len(batch.image_owner) != len(batch):
            raise ValueError(
                f"the batch has {len(batch.image_owner)} images for {len(batch)} samples: a CLIP "
                "takes one image per sample"
            )
        return self._unit(image_embedding(self.clip, self._pixels(batch), prompts.tokens))

    def _class_embeddings(self) -> Tensor:
        parameters = list(self.tower("text"))
        is_trainable = any(parameter.requires_grad for parameter in parameters)
        if is_trainable and torch.is_grad_enabled():
            return self._embed_classes({})
        # A fused optimizer changes weights without raising their version, so trainable weights are
        # embedded again after every forward pass with gradients. The cache holds the weights, or
        # others could be allocated at the same address.
        weights = [(p.data_ptr(), p._version) for p in parameters]
        device = self._class_tokens.device.type
        precision = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        key = (self._forwards_with_grad if is_trainable else 0, precision, weights)
        cache = self._class_cache
        if cache is None or cache[0] != key or list(map(id, cache[1])) != list(map(id, parameters)):
            # Tensors made in inference mode could not be used by a later training step.
            with torch.inference_mode(False), torch.no_grad():
                self._class_cache = cache = (key, parameters, self._embed_classes({}))
        return cache[2]

    def _embed_classes(self, prompts: dict[PromptPosition, Tensor]) -> Tensor:
        names, templates = self._classes
        if not names:
            raise RuntimeError(
                "the model has no classes: call model.set_classes(names, templates) first"
            )
        text = self._unit(text_embedding(self.clip, self._class_tokens, prompts))
        return self._unit(text.view(len(names), len(templates), -1).mean(1))

    def _with_text_prompts(self, image: Tensor, prompts: Prompts) -> Output:
        """Compare every image with class texts (B, C, E) that carry its own prompts."""
        names, templates = self._classes
        texts, samples = self._class_tokens, image.shape[0]
        own = {at: t for at, t in prompts.tokens.items() if at[0] == "text"}
        repeated = {at: t.repeat_interleave(len(texts), 0) for at, t in own.items()}
        unit = self._unit(text_embedding(self.clip, texts.repeat(samples, 1), repeated))
        text = self._unit(unit.view(samples, len(names), len(templates), -1).mean(2))
        return Output(self._scores(image, text), image, None, prompts)

    @property
    def _bias(self) -> nn.Parameter | None:
        return getattr(self.clip, "logit_bias", None)

    def _scale(self) -> Tensor:
        scale: Tensor = self.clip.logit_scale.exp()
        # SigLIP's weights have scales beyond the bound that CLIP's paper sets for a softmax.
        return scale if self._bias is not None else scale.clamp(max=_MAX_SCALE)

    def _scores(self, image: Tensor, text: Tensor) -> Tensor:
        scores = similarity(self._scale(), image, text)
        return scores if self._bias is None else scores + self._bias

    @staticmethod
    def _unit(embedding: Tensor) -> Tensor:
        # A half-precision embedding has its rounding; its unit vector gets no second one.
        wide = torch.promote_types(embedding.dtype, torch.float32)
        return functional.normalize(embedding.to(wide), dim=-1)
