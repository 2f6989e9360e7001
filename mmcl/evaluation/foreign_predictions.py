"""Predictions of other programs, read with their right answers.

* samples that lm-eval and lmms-eval log (``target``, ``resps``, ``filtered_resps``), of any layout;
* tables with a prediction and a right answer in every row: VLMEvalKit (xlsx, tsv), LLaMA-Factory
  (``predict``, ``label``), ms-swift (``response``, ``labels``) and the like;
* predictions alone, joined with a file of right answers: LLaVA's ``answers.jsonl``
  (``question_id``, ``text``), VQAv2's results (``question_id``, ``answer``), GQA's
  (``questionId``, ``prediction``).
  That file is LLaVA's test file, VQAv2's annotations, TextVQA's (matched by image and question),
  GQA's, ScienceQA's or POPE's, or any list of objects with an id and a right answer.
"""

from __future__ import annotations

import re
import string
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmcl.evaluation import strict_json
from mmcl.evaluation.predictions import Prediction
from mmcl.evaluation.record_fields import (
    ANNOTATOR_KEYS,
    RIGHT_KEYS,
    flat,
    image_group,
    list_of_text,
    plain_value,
    prediction_text,
    question_text,
    record_options,
    right_answers,
    sample_name,
    with_options,
)
from mmcl.evaluation.record_files import (
    ID_KEYS,
    Record,
    UnknownLayout,
    name_keys,
    read_records,
)

PREDICTION_KEYS = (
    "prediction", "predict", "predicted_answer", "pred_answer", "pred", "model_answer",
    "model_prediction", "model_output", "response", "generated_text", "output", "hypothesis",
)  # fmt: skip
"""Keys of a prediction, the first that a record has counts; then ``text``, ``caption``, ``answer``
where these are no question, reference or right answer."""
_SAMPLES_FILE = re.compile(r"(?:.*_)?samples_(.+?)(?:_\d{4}-\d\d-\d\dT[\d.:-]+)?")
_Lookup = dict[tuple[str, ...], int]
_OCR_QUESTION = re.compile(r"question: (.*?) short answer:", re.DOTALL)


@dataclass(frozen=True)
class ForeignPredictions:
    """Predictions of another program with their right answers.

    Args:
        task: name of the task, from the file's.
        answers: one for every question that counts, in its order; empty text if missing.
        groups: "category/image" of each, () if they are not all known; see ``Scorer.score``.
        missing: questions without a prediction.
        repeated: questions with several predictions, of which the first counts.
        unknown: predictions for questions that the right answers lack; they do not count.
        several: samples with several responses, of which the first counts.
        differing: questions that do not occur in the prompt of the prediction with their id.
    """

    task: str
    answers: list[Prediction]
    groups: tuple[str, ...] = ()
    missing: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    several: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Question:
    """Question of a file of right answers; ``bare_question`` is that without its options."""

    name: str
    bare_question: str
    question: str
    right: tuple[str, ...]
    group: str
    image: str
    split: str

    def answered(self, text: str, prompt: str | None) -> Prediction:
        """Prediction of this question, with the prompt that holds it in place of it."""
        question = self.question if prompt is None else prompt
        right = self.right
        return Prediction(self.name, right[0], text, False, question=question, references=right)


@dataclass(frozen=True)
class _Given:
    """Prediction whose question has to be found."""

    name: str
    prompt: str
    image: str
    text: str


def is_own_format(path: Path) -> bool:
    """Return whether a file is one of mmcl's, which ``read_predictions`` reads; an empty one is."""
    if path.suffix.lower() not in (".jsonl", ".json"):
        return False
    first = next((line for line in strict_json.read_text(path).split("\n") if line.strip()), "")
    try:
        raw = (
            strict_json.parse(first, str(path), has_nan=True)
            if first
            else {"key": "", "target": ""}
        )
    except ValueError:
        return False
    return isinstance(raw, dict) and "key" in raw and ("target" in raw or "truth" in raw)


def read_foreign(path: Path, truth: Path | None, annotators: bool) -> list[ForeignPredictions]:
    """Read a file of predictions of another program.

    Args:
        path: file of predictions.
        truth: file of right answers, None where the predictions hold them.
        annotators: whether the scorer wants all annotators' answers (``vqa``, ``textvqa``) rather
            than the one that was agreed on, where a record has both.

    Returns:
        one set of predictions; several for lm-eval's logs with several filters.

    Raises:
        FileNotFoundError: if a file is missing.
        UnknownLayout: if there are no predictions, ``truth`` is missing or superfluous.
        ValueError: naming the line or entry, if one cannot be read.
    """
    records = read_records(path)
    if not records:
        raise UnknownLayout(f"{path} holds no records: give a file of predictions")
    first = records[0][1]
    if is_logged := "filtered_resps" in first or ("resps" in first and "doc_id" in first):
        has_right = True
    else:
        key = _prediction_key(first, path)
        has_right = any(name in first and name != key for name in RIGHT_KEYS)
    if has_right and truth is not None:
        raise UnknownLayout(
            f"--truth is {truth}, but {path} holds the right answers: leave --truth out"
        )
    if is_logged:
        return _logged(path, records, annotators)
    if has_right:
        return [_table(path, records, key, annotators)]
    if truth is None or not truth.is_file():
        what = "there is no --truth" if truth is None else f"{truth} is not a file"
        raise UnknownLayout(
            f"{path} holds predictions (keys {name_keys(first)}) without right answers, and "
            f"{what}: give --truth test.json"
        )
    return [_joined(path, records, key, truth, annotators)]


def _prediction_key(first: Mapping[str, Any], path: Path) -> str:
    for key in PREDICTION_KEYS:
        if key in first:
            return key
    if "annotation" in first and "answer" in first:  # InternVL
        return "answer"
    has_right = any(key in first for key in RIGHT_KEYS)
    # A question file of LLaVA has its question in "text", and POPE's a label beside it.
    is_answer = any(key in first for key in ("prompt", "answer_id", "model_id"))
    if "text" in first and (is_answer or not has_right):
        return "text"
    if "caption" in first and "image_id" in first and not has_right:
        return "caption"
    is_question = any(key in first for key in ("text", "question", "conversations", "messages"))
    if "answer" in first and not is_question and any(key in first for key in ID_KEYS):
        return "answer"
    raise UnknownLayout(
        f"{path} holds objects with the keys {name_keys(first)}, and none of them is known as a "
        f"prediction: expected resps (lm-eval), text (LLaVA) or one of {', '.join(PREDICTION_KEYS)}"
    )


def _table(path: Path, records: Sequence[Record], key: str, annotators: bool) -> ForeignPredictions:
    """Read records that hold the right answer beside the prediction; each is a sample."""
    answers, groups = [], []
    for number, (where, raw) in enumerate(records, 1):
        name = sample_name(raw, where) if any(k in raw for k in ID_KEYS) else str(number)
        rest = {name: value for name, value in raw.items() if name != key}
        right = right_answers(rest, where, annotators)
        text = prediction_text(raw.get(key, ""), where, key)
        bare_question = with_options(question_text(rest), rest)
        answers.append(
            Prediction(name, right[0], text, False, question=bare_question, references=right)
        )
        groups.append(image_group(raw, name))
    return ForeignPredictions(path.stem, answers, _all(groups))


def _logged(path: Path, records: Sequence[Record], annotators: bool) -> list[ForeignPredictions]:
    """Read the samples that lm-eval or lmms-eval logged, one set for every filter."""
    sets: dict[str, ForeignPredictions] = {}
    named = _SAMPLES_FILE.fullmatch(path.stem)
    task = named[1] if named is not None else path.stem
    filters = {str(raw.get("filter", "")) for _, raw in records}
    groups: defaultdict[str, list[str]] = defaultdict(list)
    seen: defaultdict[str, set[str]] = defaultdict(set)
    for number, (where, raw) in enumerate(records, 1):
        kept = str(raw.get("filter", ""))
        title = f"{task} ({kept})" if len(filters) > 1 else task
        found = sets.setdefault(kept, ForeignPredictions(title, []))
        name = sample_name(raw, where) if "doc_id" in raw else str(number)
        if name in seen[kept]:
            found.repeated.append(name)
            continue
        seen[kept].add(name)
        answer, is_several = _logged_sample(name, raw, where, annotators)
        found.answers.append(answer)
        found.several.extend([name] if is_several else [])
        groups[kept].append(image_group(_doc(raw), str(_doc(raw).get("question_id", ""))))
    return [replace(each, groups=_all(groups[kept])) for kept, each in sets.items()]


def _logged_sample(
    name: str, raw: Mapping[str, Any], where: str, annotators: bool
) -> tuple[Prediction, bool]:
    """Read one logged sample; the flag says whether it has several responses."""
    doc = _doc(raw)
    responses = raw.get("filtered_resps")
    if responses in (None, []):
        responses = raw.get("resps")
    target: Any = raw.get("target")
    if isinstance(target, str) and target.strip().startswith("["):
        target = list_of_text(target)  # newer logs hold the text of a list
    likelihoods = _likelihoods(responses)
    choices = _choices(raw, doc)
    if likelihoods:
        if len(choices) != len(likelihoods):
            choices = [str(n) for n in range(len(likelihoods))]
        best = max(range(len(likelihoods)), key=likelihoods.__getitem__)
        texts = [choices[best]]
        if str(target).isdecimal() and int(str(target)) < len(choices):
            target = choices[int(str(target))]
    else:
        texts = _texts(responses)
        if isinstance(target, int) and not isinstance(target, bool) and target < len(choices):
            target = string.ascii_uppercase[target]
    people = [doc[key] for key in ANNOTATOR_KEYS if annotators and isinstance(doc.get(key), list)]
    own = {"answer": people[0] if people else target}
    if own["answer"] in (None, "", []):
        own = {key: doc[key] for key in RIGHT_KEYS if key in doc}
    right = right_answers(own, where, annotators)
    bare_question = with_options(question_text(doc), doc)
    text = texts[0] if texts else ""
    answer = Prediction(name, right[0], text, False, question=bare_question, references=right)
    return answer, len(texts) > 1


def _all(groups: Sequence[str]) -> tuple[str, ...]:
    return tuple(groups) if all(groups) else ()


def _doc(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    doc = raw.get("doc")
    return doc if isinstance(doc, dict) else {}


def _texts(value: Any) -> list[str]:
    """Texts of a response, which is a text or lists of them, one in the other."""
    if isinstance(value, list):
        return [text for each in value for text in _texts(each)]
    return [] if value is None or isinstance(value, (dict, bool)) else [plain_value(value)]


def _likelihoods(value: Any) -> list[float]:
    """Log-likelihoods of the choices, whose responses are pairs of one and whether it is greedy."""
    if not isinstance(value, list) or not value:
        return []
    found = []
    for each in value:
        while isinstance(each, list) and len(each) == 1:
            each = each[0]
        is_pair = isinstance(each, list) and len(each) == 2 and str(each[1]) in ("True", "False")
        if not is_pair:
            return []
        try:
            found.append(float(each[0]))
        except (TypeError, ValueError):  # minus infinity is no JSON
            found.append(float("-inf"))
    return found


def _choices(raw: Mapping[str, Any], doc: Mapping[str, Any]) -> list[str]:
    listed = list(record_options(doc).values())
    if listed:
        return listed
    arguments = raw.get("arguments")
    calls = list(arguments.values()) if isinstance(arguments, dict) else arguments
    found = []
    for call in calls if isinstance(calls, list) else []:
        parts = list(call.values()) if isinstance(call, dict) else call
        if not isinstance(parts, list) or len(parts) < 2 or not isinstance(parts[1], str):
            return []
        found.append(parts[1].strip())
    return found if len(set(found)) == len(found) else []


def _joined(
    path: Path, records: Sequence[Record], key: str, truth: Path, annotators: bool
) -> ForeignPredictions:
    """Join predictions with a file of right answers, all of whose questions count."""
    questions = _questions(truth, annotators)
    predictions = [
        _Given(
            sample_name(raw, where),
            str(raw.get("prompt", raw.get("question", ""))),
            str(raw.get("image_id", raw.get("image", ""))),
            prediction_text(raw.get(key), where, key),
        )
        for where, raw in records
    ]
    matches = [
        [_match(table, each) for each in predictions] for table in _lookups(questions, truth)
    ]
    chosen = max(matches, key=lambda found: sum(place is not None for place in found))
    splits = {questions[place].split for place in chosen if place is not None}
    counted = [n for n, each in enumerate(questions) if not splits or each.split in splits]
    texts: dict[int, str] = {}
    prompts: dict[int, str] = {}
    repeated, unknown, differing = [], [], []
    for place, given in zip(chosen, predictions, strict=True):
        if place is None:
            unknown.append(given.name)
            continue
        if place in texts:
            repeated.append(questions[place].name)
        bare_question, prompt = flat(questions[place].bare_question), flat(given.prompt)
        if prompt and bare_question and bare_question not in prompt and prompt not in bare_question:
            differing.append(questions[place].name)
        texts.setdefault(place, given.text)
        if bare_question in prompt and questions[place].question == questions[place].bare_question:
            prompts.setdefault(place, given.prompt)  # which may list options
    answers = [questions[n].answered(texts.get(n, ""), prompts.get(n)) for n in counted]
    return ForeignPredictions(
        path.stem,
        answers,
        _all([questions[n].group for n in counted]),
        missing=[questions[n].name for n in counted if n not in texts],
        repeated=list(dict.fromkeys(repeated)),
        unknown=unknown,
        differing=differing,
    )


def _lookups(questions: Sequence[_Question], truth: Path) -> Iterator[_Lookup]:
    """Ways to find the question of a prediction: by its id, with its text, by its image and text.

    Raises:
        ValueError: if questions of one id have one text.
    """
    by_id: _Lookup = {(each.name,): n for n, each in enumerate(questions)}
    by_both: _Lookup = {
        (each.name, flat(each.bare_question)): n for n, each in enumerate(questions)
    }
    if len(by_both) < len(questions):
        names = [each.name for each in questions]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{truth} repeats question {twice!r}: give every question its own id")
    if len(by_id) == len(questions):
        yield by_id
    yield by_both
    yield {
        (each.image, flat(each.bare_question)): n for n, each in enumerate(questions) if each.image
    }


def _match(table: _Lookup, prediction: _Given) -> int | None:
    """Number of a prediction's question in a table of ``_lookups``, None if it has none."""
    whole = flat(prediction.prompt)
    parts = [whole, *map(flat, prediction.prompt.split("\n")), *_OCR_QUESTION.findall(whole)]
    for name in dict.fromkeys((prediction.name, prediction.image)):
        for key in ((name,), *((name, part) for part in parts)):
            if key in table:
                return table[key]
    return None


def _questions(path: Path, annotators: bool) -> list[_Question]:
    """Read a file of right answers; captions of one image are alternatives."""
    questions: list[_Question] = []
    captions: dict[str, list[str]] = {}
    for where, raw in read_records(path):
        name = sample_name(raw, where)
        if "caption" in raw and "image_id" in raw:
            captions.setdefault(str(raw["image_id"]), []).append(plain_value(raw["caption"]))
            continue
        bare_question, right = question_text(raw), right_answers(raw, where, annotators)
        image = str(raw.get("image_id", raw.get("image", "")))
        group, split = image_group(raw, name), str(raw.get("split", ""))
        question = with_options(bare_question, raw)
        questions.append(_Question(name, bare_question, question, right, group, image, split))
    for name, texts in captions.items():
        questions.append(_Question(name, "", "", tuple(texts), "", name, ""))
    if not questions:
        raise ValueError(f"{path} holds no question: give the test file of these predictions")
    return questions
