"""Chat templates: the fixed texts around the texts and images of a conversation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from itertools import count
from os.path import commonprefix
from typing import Any, Literal

from transformers.utils.chat_template_utils import render_jinja_template

from mmcl.core import BadSample

ConvTemplate = Literal["model", "vicuna_v1"]
SLOT = "\0"
"""Position of a text in a ``Shape``."""
Part = str | None
"""Text of a message, with ``SLOT`` in place of its words; None is an image."""
Shape = tuple[tuple[str, tuple[Part, ...]], ...]
"""Shape of a conversation: the role and the parts of each message."""

_WORDS = re.compile(r"Qqz(\d{4})zqQ")
_OTHER_TEMPLATE = "give conv_template='vicuna_v1', or a template that does no more"
VICUNA = """\
{% if messages[0]['role'] == 'system' %}
{{ messages[0]['content'][0]['text'] + ' ' }}
{%- else %}
{{ 'A chat between a curious user and an artificial intelligence assistant. ' }}
{{- "The assistant gives helpful, detailed, and polite answers to the user's questions. " }}
{%- endif %}
{%- for message in messages if message['role'] != 'system' %}
{{- 'USER: ' if message['role'] == 'user' else ' ASSISTANT: ' }}
{%- for part in message['content'] if part['type'] == 'image' %}{{ image_token + '\n' }}{% endfor %}
{%- for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}
{{- end_token if message['role'] == 'assistant' else '' }}
{%- endfor %}
{{- ' ASSISTANT:' if add_generation_prompt else '' }}"""
"""Template of LLaVA-1.5 ("vicuna_v1"), also for models without a chat template."""
PALIGEMMA = """\
{%- for message in messages if message['role'] == 'user' %}
{%- if not loop.first %}{{ raise_exception('PaliGemma answers one question') }}{% endif %}
{%- set images = message['content'] | selectattr('type', 'equalto', 'image') | list %}
{%- set images = namespace(left=images | length) %}
{{- '' if images.left else bos_token }}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}
{%- set images.left = images.left - 1 %}
{{- image_token if images.left else image_token + bos_token }}
{%- else %}
{{- part['text'] }}
{%- endif %}
{%- endfor %}
{{- '\n' }}
{%- endfor %}
{%- for message in messages if message['role'] == 'assistant' %}
{{- message['content'][0]['text'] + end_token }}
{%- endfor %}"""
"""Format of PaliGemma's processor, which has no chat template: the begin token follows images."""


@dataclass(frozen=True)
class Segment:
    """Segment of a conversation in a template's format.

    Attributes:
        text: fixed text of the template; None = the next text of the conversation.
        is_answer: whether it is in the loss: an answer or its end.
    """

    text: str | None
    is_answer: bool


@dataclass(frozen=True)
class ChatTemplate:
    """Chat template of a model; hashable, and can be pickled.

    Attributes:
        source: in Jinja, as transformers renders it.
        image_token: text that the template writes for an image.
        ends: texts of the tokens that end a generation. Where the template puts none after an
            answer, as LLaVA-1.5's, the first is added: else a model would never learn to stop.
        variables: names and values that the template reads, such as "bos_token".
        takes_parts: False where contents are plain texts with image tokens in them, not lists of
            parts.
        encodes_answers_apart: whether an answer is tokenized as a text of its own, as PaliGemma's.
    """

    source: str
    image_token: str
    ends: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()
    takes_parts: bool = True
    encodes_answers_apart: bool = False

    @classmethod
    def of(
        cls, processor: Any, ends: Sequence[str], conv_template: ConvTemplate = "model",
        image_token: str | None = None,
    ) -> ChatTemplate:  # fmt: skip
        """Return the chat template of a processor of transformers.

        Args:
            processor: with a tokenizer.
            ends: see ``ChatTemplate.ends``.
            conv_template: "model" = its own, or that of LLaVA-1.5 if it has none; "vicuna_v1" =
                that of LLaVA-1.5.
            image_token: text that stands for an image; None = the processor's.

        Raises:
            ValueError: if ``conv_template`` is unknown, or the template cannot be used.
        """
        if conv_template not in ("model", "vicuna_v1"):
            raise ValueError(f"conv_template is {conv_template!r}, expected 'model' or 'vicuna_v1'")
        own = template_source(processor) if conv_template == "model" else None
        if own is None:
            is_paligemma = type(processor).__name__.startswith("PaliGemma")
            own = PALIGEMMA if conv_template == "model" and is_paligemma else VICUNA
        image_token = str(processor.image_token) if image_token is None else image_token
        known = processor.tokenizer.special_tokens_map.items()
        variables = {name: value for name, value in known if isinstance(value, str)}
        variables |= {"image_token": image_token, "end_token": ends[0]}
        template = cls(
            own, image_token, tuple(ends), tuple(variables.items()),
            encodes_answers_apart=own == PALIGEMMA,
        )  # fmt: skip
        if not template._can_use_parts():
            template = replace(template, takes_parts=False)
        template.segments(_shape("user", "assistant"))
        return template

    def segments(self, shape: Shape) -> tuple[Segment, ...]:
        """Return the segments of a conversation up to the end of its last answer, in order.

        The texts between are the template's own, for images ``image_token``.

        Args:
            shape: an optional message of the system, then user and assistant in turn.

        Raises:
            BadSample: if the template has no place for a text or an image of this shape, or its
                prompt to an answer differs from the one that generation starts from.
        """
        return _segments(self, shape)

    @property
    def puts_images_first(self) -> bool:
        """Whether an image goes in front of its question wherever it stands, as in LLaVA."""
        return _puts_images_first(self)

    @property
    def fixed_texts(self) -> str:
        """All fixed texts around a system turn, if there can be one, and two questions."""
        with_image: Shape = (("user", (None, SLOT)), ("assistant", (SLOT,)))
        texts = []
        for shape in (with_image + with_image, _shape("system") + with_image, with_image):
            try:
                texts += [segment.text or "" for segment in self.segments(shape)]
            except BadSample:
                continue
        return SLOT.join(texts)

    def render(self, shape: Shape, *, prompt: bool = False, system_parts: bool = True) -> str:
        """Render a conversation of numbered words.

        Args:
            shape: of the conversation.
            prompt: add what generation starts from.
            system_parts: whether the content of a system message is a list of parts.
        """
        messages = [
            {"role": role, "content": self._content(parts, role != "system" or system_parts)}
            for role, parts in _numbered(shape)
        ]
        rendered, _ = render_jinja_template(
            conversations=[messages], chat_template=self.source, add_generation_prompt=prompt,
            **dict(self.variables),
        )  # fmt: skip
        return str(rendered[0])

    def _content(self, parts: Sequence[Part], in_parts: bool) -> Any:
        if self.takes_parts and in_parts:
            return [
                {"type": "image"} if part is None else {"type": "text", "text": part}
                for part in parts
            ]
        return "".join(self.image_token if part is None else part for part in parts)

    def _can_use_parts(self) -> bool:
        """Return whether contents in parts are rendered, and not printed as a list of Python."""
        shape = _shape("user", "assistant")
        try:
            return "'type':" not in self.render(shape)
        except Exception:  # a template may raise anything
            return False


def template_source(processor: Any) -> str | None:
    """Return the chat template of a processor or of its tokenizer, None if neither has one."""
    for owner in (processor, processor.tokenizer):
        found = getattr(owner, "chat_template", None)
        if isinstance(found, dict):
            found = found.get("default")
        if found:
            return str(found)
    return None


def _shape(*roles: str) -> Shape:
    return tuple((role, (SLOT,)) for role in roles)


def _numbered(shape: Shape) -> Iterator[tuple[str, list[Part]]]:
    """Yield role and parts of each message, with a numbered word in each slot."""
    numbers = count()
    for role, parts in shape:
        filled: list[Part] = []
        for part in parts:
            texts = ("" if part is None else part).split(SLOT)
            text = texts[0] + "".join(f"Qqz{next(numbers):04d}zqQ{text}" for text in texts[1:])
            filled.append(None if part is None else text)
        yield role, filled


@lru_cache(maxsize=4096)
def _segments(template: ChatTemplate, shape: Shape) -> tuple[Segment, ...]:
    system_parts, fixed = _rendered(template, shape)
    images = sum(part is None for _, parts in shape for part in parts)
    written = sum(text.count(template.image_token) for text in fixed)
    if written != images:
        raise BadSample(
            f"the model's chat template writes {written} image tokens ('{template.image_token}') "
            f"for {images} images: {_OTHER_TEMPLATE}"
        )
    rendered = template.render(shape[:-1], prompt=True, system_parts=system_parts)
    prompt = _texts(rendered, len(_slots(shape[:-1])))
    start = prompt[-1]
    if prompt[:-1] != fixed[: len(prompt) - 1] or not fixed[len(prompt) - 1].startswith(start):
        raise BadSample(
            "the model's chat template does more than put texts around questions and answers: "
            f"before the last answer it writes {fixed[len(prompt) - 1][-60:]!r}, and generation "
            f"starts from {start[-60:]!r}; {_OTHER_TEMPLATE}"
        )
    return tuple(_split_answers(template, _slots(shape), fixed, start))


def _slots(shape: Shape) -> list[str]:
    """Return the role of each text."""
    texts = [(role, part or "") for role, parts in shape for part in parts]
    return [role for role, text in texts for _ in range(text.count(SLOT))]


def _split_answers(
    template: ChatTemplate, slots: Sequence[str], fixed: Sequence[str], start: str
) -> Iterator[Segment]:
    """Yield the segments of a conversation, given its fixed texts and the start of an answer."""
    for index, (role, after) in enumerate(zip(["", *slots], [*slots, ""], strict=True)):
        text = fixed[index]
        ends_answer = role == "assistant" != after
        if ends_answer:
            # The first end token after an answer ends it.
            found = sorted((text.find(end), end) for end in template.ends if end in text)
            end = found[0][1] if found else template.ends[0]
            ending, _, text = text.partition(end) if found else ("", "", text.lstrip())
            yield Segment(ending + end, True)
        if not after:
            return
        if after == "assistant" != role:
            header = commonprefix([text, start])
            yield Segment(header, False)
            text = text[len(header) :]
        yield Segment(text, after == "assistant")
        yield Segment(None, after == "assistant")


def _rendered(template: ChatTemplate, shape: Shape) -> tuple[bool, list[str]]:
    """Render a shape; return whether a system message has parts, and the texts around the words."""
    words = len(_slots(shape))
    has_system = shape[0][0] == "system"
    errors: list[BadSample] = []
    for system_parts in (True, False) if has_system else (True,):
        try:
            return system_parts, _texts(template.render(shape, system_parts=system_parts), words)
        except BadSample as error:
            errors.append(error)
        except Exception as error:  # a template may raise anything
            reason = " ".join(str(error).split())[:120]
            errors.append(BadSample(f"the model's chat template refuses it ({reason})"))
    if has_system and _takes(template, shape[1:]):
        raise BadSample(
            f"its system turn has no place in the model's chat template ({errors[0]}): put it in "
            "front of the first question, or give conv_template='vicuna_v1'"
        )
    raise errors[0]


def _takes(template: ChatTemplate, shape: Shape) -> bool:
    try:
        _rendered(template, shape)
    except BadSample:
        return False
    return True


def _texts(rendered: str, words: int) -> list[str]:
    """Return the ``words`` + 1 texts around numbered words."""
    pieces = _WORDS.split(rendered)
    if pieces[1::2] != [f"{number:04d}" for number in range(words)] or "'type':" in rendered:
        raise BadSample(
            "the model's chat template leaves out or moves a text: give conv_template='vicuna_v1', "
            "or a template that keeps them in order"
        )
    return pieces[::2]


@lru_cache(maxsize=64)
def _puts_images_first(template: ChatTemplate) -> bool:
    shape: Shape = (("user", (SLOT, None, SLOT)), ("assistant", (SLOT,)))
    try:
        segments = template.segments(shape)
    except BadSample:
        return False
    return template.image_token in (segments[0].text or "")


_PINNED = re.compile(r"\{#- mmcl: dates are those of (\S+) -#\}.*?\{%- endmacro %\}\n", re.DOTALL)
_FORMAT = re.compile(r"""strftime_now\(\s*(?:'([^']*)'|"([^"]*)")\s*\)""")


def reads_date(source: str) -> bool:
    """Return whether a chat template writes today's date, so that two days differ."""
    return pinned_date(source) is None and "strftime_now" in source


def pinned_date(source: str) -> str | None:
    """Return the date to which ``pin_date`` pinned a chat template, None if it is not pinned."""
    found = _PINNED.match(source)
    return None if found is None else found[1]


def pin_date(source: str, day: str) -> str:
    """Return a chat template that writes the dates of one day, wherever it is rendered.

    transformers gives templates ``strftime_now``; a macro of that name is put in front.

    Args:
        source: a template that reads the date, pinned or not.
        day: in ISO format, such as "2026-12-01".

    Raises:
        ValueError: if the day is no date, or a format is computed by the template.
    """
    try:
        moment = datetime.fromisoformat(day)
    except ValueError:
        raise ValueError(f"template_date is {day!r}, expected a day such as '2026-12-01'") from None
    source = _PINNED.sub("", source)
    formats = [single or double for single, double in _FORMAT.findall(source)]
    if len(formats) != len(re.findall(r"strftime_now\(", source)):
        raise ValueError(
            "the model's chat template reads the date in a format that it computes, so the date "
            "cannot be pinned: give a template with plain formats, as strftime_now('%d %b %Y')"
        )
    texts = {form: moment.strftime(form) for form in formats}
    return (
        f"{{#- mmcl: dates are those of {day} -#}}{{%- macro strftime_now(format) -%}}"
        f"{{{{- {texts!r}[format] -}}}}{{%- endmacro %}}\n{source}"
    )
