"""ImageTextToText: generative VLMs of transformers (LLaVA and others) behind the VLM protocol."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmcl.core import IGNORE_INDEX, NO_PROMPTS, Batch, Modality, Output, Prompts, Transform
from mmcl.core.model import eval_mode, module_stacks, set_frozen_to_eval
from mmcl.models.fingerprint import Fingerprint, frozen_base_parameters, frozen_buffers
from mmcl.models.hf_vlm.architectures import (
    ModuleGroup,
    TargetModules,
    architecture_of,
    find_linears,
    output_logits,
    parameter_locations,
    parameters_of,
    touch_parameters,
)
from mmcl.models.hf_vlm.chat_template import ChatTemplate, ConvTemplate
from mmcl.models.hf_vlm.chat_tokenizer import TooLong
from mmcl.models.hf_vlm.decoding.generation import (
    candidate_log_probs,
    expect_tokens,
    generate_with_strategy,
    prompt_lengths,
)
from mmcl.models.hf_vlm.decoding.greedy_decoding import GreedyDecoder, OutputTransform
from mmcl.models.hf_vlm.decoding.image_cache import ImageCache
from mmcl.models.hf_vlm.image_inputs import (
    ImageAspectRatio,
    ImageInputs,
    ImageMode,
    LlavaTransform,
    takes_native_inputs,
)
from mmcl.models.hf_vlm.last_block import LastBlock
from mmcl.models.hf_vlm.loading import (
    DType,
    LoadedVLM,
    Quantization,
    enable_gradient_checkpointing,
    eos_token_ids,
    expect_image_fits,
    image_placeholders,
    load_vlm,
    make_chat_tokenizer,
    pin_template_date,
)
from mmcl.models.hf_vlm.native_inputs import NativeTransform
from mmcl.models.hf_vlm.prompts_and_gates import ExpertGates, SoftPromptInserter
from mmcl.models.hf_vlm.proof import prove
from mmcl.models.hf_vlm.routing_encoder import embed_with_encoder, pool_images


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
        image_inputs: "native" takes what the model's own processor makes of each image: any size,
            tiles, as many tokens as it needs. "square" resizes every image to one square. None =
            "square" for "tiny-llava" and where one of the next two is given, else "native".
        image_aspect_ratio: how an image becomes square: "pad", "crop" or "stretch", in training and
            evaluation; None = "pad".
        size: side of the square; None = as in the model's configuration.
        max_length: largest number of tokens of a sample.
        too_long: what happens in training to longer samples: "drop" counts, names and leaves them
            out as samples that cannot be read, "cut" learns their first tokens, without the end of
            the answer, and counts them in the summary. Images and questions have to fit.
        template_date: day such as "2026-12-01" that a chat template with a date writes; None = the
            day of the run's first start, which its directory, checkpoints and exports keep.
        gradient_checkpointing: compute layers twice to save memory.
        master_weights: keep what trains in full in float32 where ``dtype`` is narrower, and round
            it where it is used; False trains it in ``dtype``, which loses small updates.
        seed: of random weights.
    """

    template_date: str | None = None

    def __init__(
        self,
        model: str = "tiny-llava",
        pretrained: bool = True,
        dtype: DType | None = None,
        quantization: Quantization | None = None,
        freeze: Sequence[ModuleGroup] = ("image",),
        routing_encoder: nn.Module | None = None,
        conv_template: ConvTemplate = "model",
        image_inputs: ImageMode | None = None,
        image_aspect_ratio: ImageAspectRatio | None = None,
        size: int | None = None,
        max_length: int = 2048,
        too_long: TooLong = "drop",
        template_date: str | None = None,
        gradient_checkpointing: bool = False,
        master_weights: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.master_weights = master_weights
        loaded = load_vlm(model, pretrained, seed, dtype=dtype, quantization=quantization)
        self.template_date = pin_template_date(loaded.processor, conv_template, template_date)
        is_native = takes_native_inputs(model, image_inputs, image_aspect_ratio, size)
        self._set_up(
            loaded, routing_encoder, conv_template, max_length, image_aspect_ratio or "pad", size,
            too_long, is_native=is_native,
        )  # fmt: skip
        if model != "tiny-llava":
            prove(self)
        self.freeze(*freeze)
        if gradient_checkpointing:
            enable_gradient_checkpointing(self.lm, self.gates)

    def _set_up(
        self, loaded: LoadedVLM, routing_encoder: nn.Module | None, conv_template: ConvTemplate,
        max_length: int, image_aspect_ratio: ImageAspectRatio, size: int | None = None,
        too_long: TooLong = "drop", *, is_native: bool = False,
    ) -> None:  # fmt: skip
        self.lm, self.processor = loaded.lm, loaded.processor
        self.architecture = architecture_of(self.lm)
        self.image_aspect_ratio: ImageAspectRatio = image_aspect_ratio
        self.image_inputs = ImageInputs(
            self.lm, self.processor, self.architecture, size, is_native=is_native
        )
        self.chat_tokenizer = make_chat_tokenizer(loaded, conv_template, max_length, too_long)
        if not is_native:
            self.image_placeholders = image_placeholders(loaded, self.image_inputs.size)
            expect_image_fits(self.chat_tokenizer, self.image_placeholders)
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
        self.image_cache = ImageCache(self.lm, self.architecture)
        self._base_names = frozenset(name for name, _ in self.named_parameters())
        self._base_buffers = frozenset(name for name, _ in self.named_buffers())
        self._fingerprint = Fingerprint()
        self.locate_parameters()

    def locate_parameters(self) -> None:
        """Locate the parameters of tower and projector again, after adapters were injected there.

        Once, because walking through a tower takes as long as a layer of a small model.
        """
        self._tower = parameter_locations(self.lm, self.tower("image"))
        self._projector = parameter_locations(self.lm, self.tower("projector"))
        blocks = self.blocks()
        self.last_block = LastBlock(self.lm.model, blocks[-1] if blocks else None)
        # transformers 5 renames this argument, and warns of the old name.
        arguments = inspect.signature(self.lm.model.forward).parameters
        self.decoder = GreedyDecoder("cache" if "cache" in arguments else "past_key_values")

    def set_template_date(self, day: str) -> None:
        """Set the day that the chat template writes.

        Raises:
            ValueError: if the template writes no date.
        """
        self.template_date = pin_template_date(self.processor, "model", day)
        template = ChatTemplate.of(self.processor, self.chat_tokenizer.template.ends)
        self.chat_tokenizer = replace(self.chat_tokenizer, template=template)
        self._candidate_tokens.clear()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.template_date is not None:
            day = torch.tensor(list(self.template_date.encode()))
            destination[f"{prefix}template_date"] = day

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        stored = state_dict.pop(f"{prefix}template_date", None)
        super()._load_from_state_dict(state_dict, prefix, *args)
        day = None if stored is None else bytes(stored.tolist()).decode()
        if day is not None and day != self.template_date:
            warnings.warn(
                f"the chat template now writes the date {day}, to which this checkpoint pinned it",
                stacklevel=2,
            )
            self.set_template_date(day)

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
        if torch.is_grad_enabled():
            self.image_cache.clear()
        images = self.image_inputs.forward_kwargs(self.lm, batch)
        prompt_length = self.soft_prompts.length(prompts)
        inputs = self.soft_prompts.insert_placeholders(tokens, prompt_length)
        samples, index = torch.nonzero(labels[:, 1:] != IGNORE_INDEX, as_tuple=True)
        shifted = index + prompt_length * (index >= self.soft_prompts.offset)
        # Right padding under causal attention changes no real position, so there is no mask.
        with self.entering(prompts, inputs, None):
            types = self.image_inputs.token_type_ids(inputs, self._in_answer(batch, inputs))
            given = {"input_ids": inputs, "use_cache": False, **images, **types}
            in_loss, _ = self.last_block.hidden_states(given, samples, shifted)
        logits = output_logits(self.lm, in_loss)
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
            images, keys = self.image_cache.encode(self, images, batch, prompts)
            given = (self, questions, images, prompts)
            if not candidates:
                return generate_with_strategy(*given, max_new_tokens, transform_output, keys)
            tokens = [self._tokens_of(text).to(batch.labels.device) for text in candidates]
            scores = candidate_log_probs(*given, tokens, transform_output, keys)
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
        if batch.image_inputs:
            raise ValueError(
                "stored features replace one image of one size per sample, and these images have "
                "the sizes of the model's own processor: give the model image_inputs='square', or "
                "use raw replay (ExperienceReplay)"
            )
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
        """Return the preprocessing of a sample; only what is too long for training differs."""
        if self.image_inputs.is_native:
            encoder: Any = self.routing_encoder
            routing = None if encoder is None else encoder.transform(False)
            return NativeTransform(self.chat_tokenizer, self.image_inputs.native, routing, train)
        red, green, blue = (int(value) for value in self.image_inputs.mean)
        size, fill = self.image_inputs.size, (red, green, blue)
        return LlavaTransform(
            self.chat_tokenizer, self.image_placeholders, size, self.image_aspect_ratio, fill, train
        )

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
        words, used = self._word_embeddings(), self.image_inputs.used_layers
        with self.soft_prompts.inject_prompts(words, prompts, tokens, mask), used.only(self.lm):
            yield

    def _mean_features(self, batch: Batch) -> Tensor:
        """Return (B, D) unit means of projector inputs, zero for samples without an image."""
        if batch.features is not None:
            return functional.normalize(batch.features.float().mean(1), dim=-1)
        if not batch.has_images:
            return torch.zeros(len(batch), self.embed_dim, device=batch.labels.device)
        return pool_images(self.image_inputs.mean_features(self.lm, batch), batch)

    def _in_answer(self, batch: Batch, inputs: Tensor) -> Tensor | None:
        """Return (B, L) bool, True from each sample's first answer on, if the model needs it."""
        if not self.architecture.has_prefix_attention:
            return None
        added = inputs.shape[1] - batch.labels.shape[1]
        in_answer = functional.pad(batch.labels != IGNORE_INDEX, (added, 0))
        return in_answer.cumsum(1) > 0

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
