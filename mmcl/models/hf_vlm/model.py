"""ImageTextToText: generative VLMs of transformers (LLaVA and others) behind the VLM protocol."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from mmcl.core import IGNORE_INDEX, NO_PROMPTS, Batch, Modality, Output, Prompts, Transform
from mmcl.core.model import eval_mode, module_stacks, set_frozen_to_eval
from mmcl.models.fingerprint import Fingerprint, frozen_base_parameters, frozen_buffers
from mmcl.models.hf_vlm.architectures import (
    ModuleGroup,
    TargetModules,
    architecture_of,
    find_linears,
    parameter_locations,
    parameters_of,
    touch_parameters,
)
from mmcl.models.hf_vlm.generation import (
    OutputTransform,
    candidate_log_probs,
    expect_tokens,
    generate_with_strategy,
    prompt_lengths,
)
from mmcl.models.hf_vlm.image_inputs import ImageAspectRatio, ImageInputs, LlavaTransform
from mmcl.models.hf_vlm.loading import (
    ConvTemplate,
    DType,
    LoadedVLM,
    Quantization,
    enable_gradient_checkpointing,
    eos_token_ids,
    load_vlm,
    make_chat_tokenizer,
)
from mmcl.models.hf_vlm.prompts_and_gates import ExpertGates, SoftPromptInserter


@torch.no_grad()
def embed_with_encoder(routing_encoder: Any, batch: Batch, modality: Modality) -> Tensor:
    """Return (B, E) unit embeddings of images or questions by the routing encoder.

    The encoder is a dual one such as ``OpenCLIP``; images are squares of any size, and "text" is
    the last question of each sample, from its reference.

    Raises:
        ValueError: if samples have stored features instead of images, or no references.
    """
    if modality == "text":
        return _embed_questions(routing_encoder, batch)
    if batch.features is not None:
        raise ValueError(
            "routing_encoder needs images and these samples have stored features instead: route "
            "without FeatureReplay, or leave routing_encoder out"
        )
    if batch.images is None or not len(batch.images):
        device = batch.labels.device
        return torch.zeros(len(batch), int(routing_encoder.embed_dim), device=device)
    images = _resized(batch.images, routing_encoder.size)
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    return pool_images(routing_encoder.embed(Batch(images, labels, labels), "image"), batch)


def pool_images(images: Tensor, batch: Batch) -> Tensor:
    """Pool the embeddings (M, E) of images to unit embeddings (B, E) of their samples.

    A sample without images has the zero vector, one with several the mean of theirs.
    """
    if batch.image_owner is not None:
        sums = images.new_zeros(len(batch), images.shape[1])
        images = sums.index_add(0, batch.image_owner, images)
    return functional.normalize(images, dim=-1)


def _embed_questions(routing_encoder: Any, batch: Batch) -> Tensor:
    if len(batch.references) != len(batch):
        raise ValueError(
            f"the batch has {len(batch.references)} references for {len(batch)} samples: a routing "
            "encoder embeds the questions in batch.references, so give one per sample"
        )
    transform = routing_encoder.transform(False)
    texts = [transform(None, reference.question, 0).input_ids for reference in batch.references]
    lengths = torch.tensor([len(text) for text in texts])
    tokens = pad_sequence(texts, batch_first=True)
    mask = torch.arange(tokens.shape[1])[None] < lengths[:, None]
    tokens, mask = tokens.to(batch.labels.device), mask.to(batch.labels.device)
    questions = replace(
        batch, images=None, image_owner=None, features=None, input_ids=tokens,
        attention_mask=mask, labels=batch.task_ids,
    )  # fmt: skip
    embedded: Tensor = routing_encoder.embed(questions, "text")
    return embedded


def _resized(images: Tensor, size: int | tuple[int, int]) -> Tensor:
    sides = (size, size) if isinstance(size, int) else size
    if images.shape[-2:] == sides:
        return images
    # torch resizes uint8 on the CPU only.
    resized = functional.interpolate(images.float(), sides, mode="bicubic", antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


class ImageTextToText(nn.Module):
    """Generative VLM: a vision tower, a projector and a language model that answers questions.

    In training only the positions in the loss go through the language head, and right padding needs
    no mask under causal attention; neither changes a number.

    Args:
        model: "tiny-llava" (ships with mmcl), a local folder as transformers writes them, or a name
            on the hub such as "llava-hf/llava-1.5-7b-hf".
        pretrained: False takes the configuration and random weights from ``seed``.
        dtype: of the weights that are not quantized: "float32", "bfloat16" or "float16"; None =
            "float32", or "bfloat16" beside quantized weights.
        quantization: "8bit" or "4bit" quantizes the language model (on a GPU, by bitsandbytes),
            which can then only be adapted; None = not quantized.
        freeze: module groups that are not trained, of "image" (vision tower), "projector" and
            "text" (language model).
        routing_encoder: a CLIP such as ``OpenCLIP`` whose embeddings route and compare samples,
            always frozen; None = pooled features of the model's own towers.
        conv_template: "model" takes the model's chat template, "vicuna_v1" that of LLaVA-1.5.
        image_aspect_ratio: how an image becomes square: "pad", "crop" or "stretch", in training and
            evaluation.
        size: side of the square; None = as in the model's configuration.
        max_length: largest number of tokens of a sample.
        gradient_checkpointing: compute layers twice to save memory.
        seed: of random weights.
    """

    def __init__(
        self,
        model: str = "tiny-llava",
        pretrained: bool = True,
        dtype: DType | None = None,
        quantization: Quantization | None = None,
        freeze: Sequence[ModuleGroup] = ("image",),
        routing_encoder: nn.Module | None = None,
        conv_template: ConvTemplate = "model",
        image_aspect_ratio: ImageAspectRatio = "pad",
        size: int | None = None,
        max_length: int = 2048,
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        loaded = load_vlm(model, pretrained, seed, dtype=dtype, quantization=quantization)
        self._set_up(loaded, routing_encoder, conv_template, image_aspect_ratio, size, max_length)
        self.freeze(*freeze)
        if gradient_checkpointing:
            enable_gradient_checkpointing(self.lm, self.gates)

    def _set_up(
        self, loaded: LoadedVLM, routing_encoder: nn.Module | None, conv_template: ConvTemplate,
        image_aspect_ratio: ImageAspectRatio, size: int | None, max_length: int,
    ) -> None:  # fmt: skip
        self.lm, self.processor = loaded.lm, loaded.processor
        self.architecture = architecture_of(self.lm)
        self.image_aspect_ratio: ImageAspectRatio = image_aspect_ratio
        self.image_inputs = ImageInputs(self.lm, self.processor, self.architecture, size)
        size = self.image_inputs.size
        self.chat_tokenizer = make_chat_tokenizer(loaded, size, conv_template, max_length)
        self.end_token_ids = eos_token_ids(loaded)
        tokenizer = self.processor.tokenizer
        pad = tokenizer.pad_token_id
        self.pad_token_id = self.end_token_ids[0] if pad is None else int(pad)
        has_begin_token = self.chat_tokenizer.first_token == tokenizer.bos_token_id
        self.soft_prompts = SoftPromptInserter(int(has_begin_token), self.pad_token_id)
        self.prompt_dims: Mapping[Modality, int] = {"text": self._word_embeddings().embedding_dim}
        self.gates: dict[str, Tensor] = ExpertGates()
        self.routing_encoder = routing_encoder
        if routing_encoder is not None:
            routing_encoder.requires_grad_(False)
        self._candidate_tokens: dict[str, Tensor] = {}
        self._base_names = frozenset(name for name, _ in self.named_parameters())
        self._base_buffers = frozenset(name for name, _ in self.named_buffers())
        self._fingerprint = Fingerprint()
        # Located once: walking through a tower takes as long as a layer of a small model.
        self._tower = parameter_locations(self.lm, self.tower("image"))
        self._projector = parameter_locations(self.lm, self.tower("projector"))

    def train(self, mode: bool = True) -> ImageTextToText:
        """Set training or evaluation mode; what is frozen is always in evaluation mode."""
        super().train(mode)
        if mode:
            set_frozen_to_eval(self)
        return self

    def forward(self, batch: Batch, prompts: Prompts = NO_PROMPTS) -> Output:
        """Return the token scores (S, V) of the positions in the loss, with their targets.

        Raises:
            ValueError: if the batch has no tokens, or class labels.
        """
        tokens, labels = self._padded_tokens(batch), batch.labels
        if not batch.is_generative:
            raise ValueError(
                f"labels are {tuple(labels.shape)}, expected (B, L): a generative model trains on "
                "tasks of task_type 'instruction'"
            )
        images = self.image_inputs.forward_kwargs(self.lm, batch)
        prompt_length = self.soft_prompts.length(prompts)
        inputs = self.soft_prompts.insert_placeholders(tokens, prompt_length)
        # Right padding under causal attention changes no real position, so there is no mask.
        with self.entering(prompts, inputs, None):
            types = self.image_inputs.token_type_ids(inputs)
            out = self.lm.model(input_ids=inputs, use_cache=False, **images, **types)
        samples, index = torch.nonzero(labels[:, 1:] != IGNORE_INDEX, as_tuple=True)
        shifted = index + prompt_length * (index >= self.soft_prompts.offset)
        hidden = out.last_hidden_state.flatten(0, 1)
        in_loss = hidden.index_select(0, samples * inputs.shape[1] + shifted)
        logits = self.lm.get_output_embeddings()(in_loss)
        logits = touch_parameters(logits, self._tower, () if images else self._projector)
        return Output(logits, None, None, prompts, samples, labels[samples, index + 1])

    def loss(self, output: Output, batch: Batch) -> Tensor:
        """Return cross entropy, mean over the tokens in the loss, as in transformers."""
        if output.target_ids is None:
            raise ValueError(
                "output has no target_ids: pass the output of model(batch) for a batch with answers"
            )
        logits = output.logits.float()
        if not len(logits):
            return logits.sum()  # zero, with a graph
        return functional.cross_entropy(logits, output.target_ids)

    @torch.no_grad()
    def generate(
        self, batch: Batch, prompts: Prompts = NO_PROMPTS, *,
        transform_output: OutputTransform | None = None,
        candidates: Sequence[str] = (), max_new_tokens: int = 64,
    ) -> list[str]:  # fmt: skip
        """Generate an answer for every sample, or choose the most probable candidate.

        Args:
            batch: (B, L) tokens with a mask; those from the last answer on are ignored.
            prompts: as in ``forward``.
            transform_output: changes the (B, V) scores of every next token, or None.
            candidates: if given, the answer is the most probable of these texts.
            max_new_tokens: largest number of tokens of an answer.

        Returns:
            B texts without end tokens.
        """
        questions = self._questions(batch)
        images = self.image_inputs.forward_kwargs(self.lm, batch)
        with eval_mode(self):
            if not candidates:
                return generate_with_strategy(
                    self, questions, images, prompts, max_new_tokens, transform_output
                )
            tokens = [self._tokens_of(text).to(batch.labels.device) for text in candidates]
            scores = candidate_log_probs(self, questions, images, prompts, tokens, transform_output)
        # Of equal ones the first.
        return [candidates[index] for index in scores.argmax(1).tolist()]

    @torch.no_grad()
    def embed(self, batch: Batch, modality: Modality) -> Tensor:
        """Return (B, E) unit embeddings of images or questions, without prompts, in eval mode.

        They come from the routing encoder if there is one, else they are means of the vision
        tower's features or of the word embeddings. A sample without an image has the zero vector.
        """
        if self.routing_encoder is not None:
            with eval_mode(self.routing_encoder):
                return embed_with_encoder(self.routing_encoder, batch, modality)
        if modality == "image":
            return self._mean_features(batch)
        words = self._word_embeddings()
        texts = [text[text != self.image_inputs.image_token_id] for text in self._questions(batch)]
        means = [words(text).float().mean(0) for text in texts]
        return functional.normalize(torch.stack(means), dim=-1)

    @cached_property
    def embed_dim(self) -> int:
        """Embedding dim E of images."""
        if self.routing_encoder is not None:
            return int(self.routing_encoder.embed_dim)  # type: ignore[arg-type]
        return int(self.image_inputs.blank_features(self.lm).shape[-1])

    @torch.no_grad()
    def encode_image(self, batch: Batch) -> Tensor:
        """Return (B, N, D) projector inputs, or the batch's stored features.

        Raises:
            ValueError: if features cannot replace images in this type of model, or some sample has
                not exactly one image.
        """
        if batch.features is not None:
            return batch.features
        self.image_inputs.expect_feature_input(self.lm.config.model_type)
        images = 0 if batch.images is None else len(batch.images)
        if images != len(batch):
            raise ValueError(
                f"{len(batch)} samples have {images} images, but stored features replace one image "
                "per sample: encode the samples that have one, or use raw replay "
                "(ExperienceReplay)"
            )
        return self.image_inputs.features(self.lm, batch)

    def target_linears(self, which: TargetModules = "all") -> dict[str, nn.Linear]:
        """Return the language model's linear layers by name, without the head.

        Args:
            which: "all", "attention" (q, k, v, o) or "mlp" (gate, up, down).
        """
        return find_linears(self, f"lm.model.{self.architecture.language}.", which)

    def freeze(self, *groups: ModuleGroup) -> None:
        """Freeze module groups, in evaluation mode: "image", "projector" or "text"."""
        for group in groups:
            for parameter in self.tower(group):
                parameter.requires_grad_(False)
        set_frozen_to_eval(self)

    def tower(self, group: ModuleGroup) -> Iterable[nn.Parameter]:
        """Return the parameters of one module group, see ``parameters_of``."""
        return parameters_of(self.lm, self.architecture, group)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters of every module group by its name."""
        return {group: list(self.tower(group)) for group in get_args(ModuleGroup)}

    def is_frozen(self, group: ModuleGroup) -> bool:
        """Return whether a module group has no trainable parameter."""
        return not any(parameter.requires_grad for parameter in self.tower(group))

    def blocks(self) -> list[nn.Module]:
        """Return the layers of the language model, which every step runs, with images or not."""
        language = self.lm.model.get_submodule(self.architecture.language)
        return [layer for stack in module_stacks(language) for layer in stack]

    def fingerprint(self) -> str:
        """Return the sha256 of frozen weights and buffers, their types and the preprocessing."""
        buffers = {n: b for n, b in frozen_buffers(self).items() if n in self._base_buffers}
        frozen = {**frozen_base_parameters(self, self._base_names), **buffers}
        settings = f"{self.image_inputs.description} {self.image_aspect_ratio}"
        return self._fingerprint.of(settings, frozen.items())

    def transform(self, train: bool) -> Transform:
        """Return the preprocessing of a sample, the same in training and evaluation."""
        red, green, blue = (int(value) for value in self.image_inputs.mean)
        size, fill = self.image_inputs.size, (red, green, blue)
        return LlavaTransform(self.chat_tokenizer, size, self.image_aspect_ratio, fill)

    def with_placeholders(self, texts: Sequence[Tensor], prompts: Prompts) -> list[Tensor]:
        """Return token sequences with placeholders for the prompts after the begin token."""
        length = self.soft_prompts.length(prompts)
        return [self.soft_prompts.insert_placeholders(text[None], length)[0] for text in texts]

    @contextmanager
    def entering(self, prompts: Prompts, tokens: Tensor, mask: Tensor | None) -> Iterator[None]:
        """Apply prompts and gates in the forward passes of this context.

        Prompts replace the embeddings of their placeholders. Expert layers read the gates, which
        stay until the next pass. Tokens and mask as in ``SoftPromptInserter.inject_prompts``.
        """
        self.gates.clear()
        self.gates.update(prompts.gates)
        with self.soft_prompts.inject_prompts(self._word_embeddings(), prompts, tokens, mask):
            yield

    def _mean_features(self, batch: Batch) -> Tensor:
        """Return (B, D) unit means of projector inputs, zero for samples without an image."""
        if batch.features is not None:
            return functional.normalize(batch.features.float().mean(1), dim=-1)
        if batch.images is None or not len(batch.images):
            return torch.zeros(len(batch), self.embed_dim, device=batch.labels.device)
        return pool_images(self.image_inputs.features(self.lm, batch).float().mean(1), batch)

    def _padded_tokens(self, batch: Batch) -> Tensor:
        tokens, mask = expect_tokens(batch)
        return tokens.masked_fill(~mask, self.pad_token_id)

    def _questions(self, batch: Batch) -> list[Tensor]:
        """Return the tokens (L_b,) of each sample up to its last answer."""
        tokens = self._padded_tokens(batch)
        lengths = prompt_lengths(batch).tolist()
        return [text[:length] for text, length in zip(tokens, lengths, strict=True)]

    def _tokens_of(self, candidate: str) -> Tensor:
        if candidate not in self._candidate_tokens:
            self._candidate_tokens[candidate] = self.chat_tokenizer.answer_tokens(candidate)
        return self._candidate_tokens[candidate]

    def _word_embeddings(self) -> Any:
        return self.lm.get_input_embeddings()
