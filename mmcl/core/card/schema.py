"""Stream-card schema: pydantic models whose validators note every error and read on.

A wrong value is noted in ``CardErrors`` and replaced by the default of its key, so the rest of the
card is still read. The same models give the JSON schema for editors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from reprlib import Repr
from typing import Annotated, Any, ClassVar, Literal, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from mmcl.core.card.shard_names import MAX_SHARDS, find_shards

MAX_ERRORS = 100
"""Errors of a card that are written out; the others are counted."""
MAX_NAME = 80
"""Characters of a name that are shown in an error."""
MAX_QUOTED = 200
"""Characters of a quoted value, at most."""

RENAMED_KEYS: dict[str, str] = {
    "decode": "decoding", "kind": "task_type", "licence": "license", "mix": "mixture",
    "probes": "eval_only", "share": "replay_ratio", "text": "text_field",
}  # fmt: skip
"""Old key -> new key: the old one is an error that names the new one."""
RENAMED_VALUES: dict[str, dict[str, str]] = {
    "task_type": {
        "answer": "instruction", "caption": "captioning", "classify": "classification",
        "edit": "editing", "picture": "image", "prefer": "preference", "retrieve": "retrieval",
    },
}  # fmt: skip
"""Key -> {old value: new value}: the old one is an error that names the new one."""

_SHORT = Repr()
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong, _SHORT.maxlevel = 120, 120, 60, 3
_MAX_ERRORS_OF_KEY = 5
_CONTROLS = r"\x00-\x08\x0b-\x1f\x7f-\x9f"
_EXPECTED = {
    "string_type": "text: put names like 'yes' or '3' in quotes",
    "string_unicode": "text without control characters",
    "string_pattern_mismatch": "text, not blank, without control characters (names: on one line)",
    "int_type": "a whole number, 0 or more",
    "greater_than_equal": "a whole number, 0 or more",
    "float_type": "more than 0 and less than 1",
    "greater_than": "more than 0 and less than 1",
    "less_than": "more than 0 and less than 1",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "too_short": "at least one",
}
"""Type of a pydantic error -> what was expected."""


@dataclass
class CardErrors:
    """Errors of one card, one sentence each in ``found``; ``where`` is the entry in hand.

    Relative shard names start in ``folder``.
    """

    scorers: Sequence[str] = ()
    folder: Path = Path()
    where: str = "the card"
    found: list[str] = field(default_factory=list)
    num_shards: int = 0

    def add(self, sentence: str) -> None:
        """Note an error of the entry that is read now."""
        self.found.append(f"{self.where} {sentence}")

    @contextmanager
    def at(self, where: str, name: Any = None) -> Iterator[None]:
        """Name the entry whose errors are noted inside the block."""
        before = self.where
        self.where = f"{where} ({_quoted(name)})" if isinstance(name, str) else where
        try:
            yield
        finally:
            self.where = before


def repr_short(value: Any, limit: int = MAX_QUOTED) -> str:
    """Return the ``repr`` of a value on one line, at most ``limit`` characters and an ellipsis.

    Long texts and numbers, large and nested collections are abbreviated before they are written
    out, so the time is bounded as well.
    """
    text = _SHORT.repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def escape_unprintable(text: str) -> str:
    """Return a text on one line: control characters, line breaks, lone surrogates are escaped."""
    if text.isprintable():
        return text
    return "".join(mark if mark.isprintable() else repr(mark)[1:-1] for mark in text)


def nearest(name: Any, known: Iterable[str]) -> str:
    """Return a hint that names the known name nearest to a wrong one, or all known names."""
    near = get_close_matches(str(name)[:MAX_NAME], known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"


def _quoted(name: str) -> str:
    return repr_short(name[:MAX_NAME])


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _shard_names(names: tuple[str, ...], info: Any) -> tuple[str, ...]:
    if not names:
        raise ValueError("an empty list, expected one shard name or more")
    found: list[str] = []
    for name in names:
        most = MAX_SHARDS - info.context.num_shards - len(found)
        found += find_shards(name, info.context.folder, most)
    info.context.num_shards += len(found)
    return _without_repeats(tuple(found))


def _without_repeats(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        raise ValueError(f"{repr_short(twice)} twice: list each once")
    return names


def _with_one_gap(templates: tuple[str, ...]) -> tuple[str, ...]:
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"template {repr_short(template)}, expected exactly one {{}}")
    return templates or ("{}",)


Text = Annotated[str, Field(pattern=rf"^[^{_CONTROLS}]*[^{_CONTROLS}\s][^{_CONTROLS}]*$")]
Name = Annotated[str, Field(pattern=rf"^[^{_CONTROLS}\t\n]*[^{_CONTROLS}\s][^{_CONTROLS}\t\n]*$")]
Member = Annotated[str, Field(pattern=rf"^[^{_CONTROLS}\t\n/]*$")]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Names = Annotated[tuple[Text, ...], BeforeValidator(_as_tuple), AfterValidator(_without_repeats)]
Templates = Annotated[Names, AfterValidator(_with_one_gap)]
Shards = Annotated[
    tuple[Name, ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else _as_tuple(value)),
    AfterValidator(_shard_names),
    WithJsonSchema({"type": ["string", "array"], "items": {"type": "string"}, "minItems": 1}),
]
_OR_FILE = WithJsonSchema({"type": ["object", "string"]})  # a file: see shard_lists.py
TaskType = Literal[
    "captioning", "classification", "retrieval", "instruction", "preference", "editing"
]
Stage = Literal["cpt", "dap", "cft"]
Shift = Literal["temporal", "content", "language"]
Knowledge = Literal["invariant", "updated", "new"]
Ability = Literal["general", "instruction", "safety"]
Scenario = Literal["task", "class", "domain"]
Decoding = Literal["generate", "candidates"]
KeyUntil = Literal["first_dot", "last_dot"]
SourceType = Literal["image", "classification", "captioning", "retrieval", "instruction"]


class _Entry(BaseModel):
    """A mapping of the card; whatever it holds, validation gives an entry and notes the errors."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        json_schema_extra=lambda schema, entry: schema.update(required=list(entry.required)),
    )
    required: ClassVar[tuple[str, ...]] = ()
    ignored: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _keep_known_keys(cls, raw: Any, info: Any) -> dict[str, Any]:
        if not isinstance(raw, Mapping):
            keys = ", ".join(cls.required)
            info.context.add(f"is {repr_short(raw)}, expected a mapping with the keys {keys}")
            raw = {}
        given: dict[str, Any] = dict.fromkeys(cls.required)
        for key, value in raw.items():
            new = RENAMED_KEYS.get(key, key)
            if new != key:
                info.context.add(f"has the key '{key}', which is called '{new}' now: rename it")
            if new not in cls.model_fields:
                hint = nearest(key, sorted(cls.model_fields))
                info.context.add(f"has the unknown key {repr_short(key)}: {hint}")
            elif new not in cls.ignored:
                given[new] = value
        return given

    @field_validator("*", mode="wrap")
    @classmethod
    def _note_errors(cls, value: Any, validate: ValidatorFunctionWrapHandler, info: Any) -> Any:
        key, errors = str(info.field_name), info.context
        entry = cls.model_fields[key]
        # An empty `description:` is no error, an empty `size:` or `task_type:` is one.
        is_count_or_choice = entry.annotation is int or get_origin(entry.annotation) is Literal
        if value is None and not is_count_or_choice and key not in cls.required:
            return entry.default
        renamed = RENAMED_VALUES.get(key, {})
        if isinstance(value, str) and value in renamed:
            errors.add(f"has {key} '{value}', which is called '{renamed[value]}' now: rename it")
            value = renamed[value]
        try:
            return validate(value)
        except ValidationError as error:
            details = error.errors(include_url=False)
        for detail in details[:_MAX_ERRORS_OF_KEY]:
            errors.add(_sentence(key, entry.description, detail))
        if not (isinstance(value, dict) and isinstance(entry.default, dict)):
            return entry.default
        wrong = {detail["loc"][0] for detail in details if detail["loc"]}
        return {name: one for name, one in value.items() if name not in wrong and type(name) is str}


def _sentence(key: str, meaning: str | None, detail: Any) -> str:
    """Return what is wrong with a value, what was got, and what was expected."""
    path = key + "".join(f"[{repr_short(step)}]" for step in detail["loc"] if step != "[key]")
    context = detail.get("ctx", {})
    if detail["type"] == "value_error":
        return f"has {path}: {context['error']}"
    expected = _EXPECTED.get(detail["type"], detail["msg"])
    if detail["type"] == "literal_error":
        expected = f"one of {context['expected'].replace(' or ', ', ')}".replace("'", "")
    value = detail["input"]
    quoted = repr_short(list(value) if isinstance(value, tuple) else value)
    got = f"no '{key}'" if value is None and not detail["loc"] else f"{path} {quoted}"
    return f"has {got}, expected {expected} ({meaning})"


class _Described(_Entry):
    description: Text = Field("", description="for people")
    classes: Names = Field((), description="names of the classes")
    templates: Templates = Field(("{}",), description="prompts, each with one {} for the name")
    image_field: Member = Field("", description="member with the image, default: the only one")
    text_field: Text = Field("txt", description="member of a sample that holds its text")
    label_field: Text = Field("cls", description="member of a sample that holds its class")
    key_until: KeyUntil = Field("first_dot", description="where the keys of samples end")
    ignore_members: Names = Field((), description="members of samples that are of no use")


class _Inherited(_Described):
    task_type: TaskType = Field("classification", description="what the samples are")
    stage: Stage = Field("cft", description="pre-training, domain adaptation or fine-tuning")
    epochs: Count = Field(0, description="passes over a task, 0 = as the trainer says")
    scorer: Text = Field("exact", description="scorer of answers; task_type instruction")
    decoding: Decoding = Field(
        "generate", description="free answers, or the likeliest of the classes"
    )
    max_new_tokens: Count = Field(64, description="tokens of an answer, at most")
    replay_ratio: Fraction | None = Field(
        None, description="fraction of every batch that is replayed"
    )
    mixture: dict[Text, Fraction] = Field(
        {}, description="name of a source: its fraction of a batch"
    )


class TaskEntry(_Inherited):
    """A task as the card states it; see ``mmcl.core.Task`` for the meaning of each field."""

    required: ClassVar[tuple[str, ...]] = ("name", "train", "test")

    name: Name = Field("", description="name of the task")
    train: Shards = Field((), description="training shards, {000..099} = a hundred names")
    test: Shards = Field((), description="test shards")
    size: Count = Field(0, description="training samples, 0 = not known")
    test_size: Count = Field(0, description="test samples, 0 = not known")
    labels: Any = Field(None, description="not read")


class EvalOnlyEntry(TaskEntry):
    """An eval-only task, whose training keys are not read."""

    required = ("name", "test")
    ignored = ("train", "size", "replay_ratio", "mixture")

    knowledge: Knowledge | None = Field(None, description="facts that it asks for, for FUAR")
    ability: Ability | None = Field(None, description="what it probes, for vertical forgetting")


class _Origin(_Entry):
    license: Text = Field("", description="license of the data")
    source: Text = Field("", description="where the data come from")
    citation: Text = Field("", description="whom to cite")


class SourceEntry(_Described, _Origin):
    """A general or reference set that tasks mix in; see ``mmcl.core.task.DataSource``."""

    required = ("shards",)

    task_type: SourceType = Field("image", description="what its samples are")
    shards: Shards = Field((), description="shards, {000..099} = a hundred names")
    size: Count = Field(0, description="samples, 0 = not known")
    scored: bool | None = Field(None, description="in the task loss; never for task_type image")

    @property
    def in_loss(self) -> bool:
        """Whether its samples are in the task loss."""
        return self.task_type != "image" if self.scored is None else self.scored


class Card(_Inherited, _Origin):
    """A stream card whose every field was checked."""

    required = ("name", "scenario", "tasks")

    name: Name = Field("", description="name of the stream")
    scenario: Scenario = Field("task", description="what the model may know at test")
    shift: Shift | None = Field(None, description="what changes from task to task")
    sources: dict[Name, SourceEntry] = Field({}, description="sets that tasks mix in, by name")
    tasks: tuple[TaskEntry, ...] = Field((), min_length=1, description="in training order")
    eval_only: tuple[EvalOnlyEntry, ...] = Field((), description="test-only tasks")
    class_names: dict[Text, Text] = Field({}, description="class: its name in prompts")
    hashes: Annotated[dict[Name, Text], _OR_FILE] = Field({}, description="shard name: sha256")
    counts: Annotated[dict[Name, Count], _OR_FILE] = Field({}, description="shard name: samples")
    notes: Any = Field(None, description="for people, not read")

    @field_validator("sources", mode="before")
    @classmethod
    def _read_sources(cls, raw: Any, info: Any) -> Any:
        found = {}
        for name, entry in raw.items() if isinstance(raw, dict) else ():
            with info.context.at(f"source {_quoted(str(name))}"):
                found[name] = SourceEntry.model_validate(entry, context=info.context)
        return found if isinstance(raw, dict) else raw

    @field_validator("tasks", "eval_only", mode="before")
    @classmethod
    def _read_tasks(cls, raw: Any, info: Any) -> Any:
        if not isinstance(raw, list):
            return raw
        is_task = info.field_name == "tasks"
        form, word = (TaskEntry, "task") if is_task else (EvalOnlyEntry, "eval-only task")
        stated = {key: info.data[key] for key in _Inherited.model_fields if key in info.data}
        del stated["description"], stated["classes"]
        found = []
        for n, entry in enumerate(raw):
            own = {**stated, **entry} if isinstance(entry, dict) else entry
            with info.context.at(f"{word} {n}", own.get("name") if isinstance(own, dict) else None):
                found.append(form.model_validate(own, context=info.context))
        return tuple(found)
