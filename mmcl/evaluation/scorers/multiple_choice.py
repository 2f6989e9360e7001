"""Multiple choice: options listed in a question, and the scorer ``option`` by letter or text.

Options are lines such as "A. teal", "(B) gold" or "C: red" of the question, or "(A) teal (B) gold"
within a line, lettered from A without a gap.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from mmcl.evaluation.scorers.scorer import PerSampleScorer, References, SampleScore
from mmcl.evaluation.scorers.text_normalization import has_words, option_letter, plain, words

_LETTER = re.compile(r"\W*([A-Za-z])\W*")
_LETTER_AND_TEXT = re.compile(r"\s*(?:\(([A-Za-z])\)|([A-Z])[.):])\s*(\S.*)", re.DOTALL)
_LINE = re.compile(
    r"^[ \t]*(?:\(([A-Z])\)|\[([A-Z])\]|([A-Z])[.):])[ \t]*(\S.*?)[ \t]*$", re.MULTILINE
)
_WITHIN = re.compile(r"\(([A-Z])\)\s*([^()\n]*)")
_IN_FRONT = re.compile(r"([A-Z])(?:\.(?:\s.*)?)?", re.DOTALL)
_IN_A_SENTENCE = re.compile(r"\b[Tt]he answer is ([A-Z])\b")


def score_option(answer: str, references: References, question: str) -> SampleScore:
    """Compare the option of a multiple choice; ScienceQA's rule.

    A reference is a letter, a letter with its text ("B. gold"), or the text of an option that the
    question lists. Strict, as LLaVA's scorer reads it: the letter alone (here also with a full
    stop), the letter and ". " in front of a text, or "The answer is B", once; a copy of the
    reference too. Lenient: any sentence that chooses one letter, else one that contains the text of
    exactly one option, as VLMEvalKit infers it (here as whole words). A prediction without either
    is wrong; no letter is drawn at random.

    Raises:
        ValueError: if a reference is neither.
    """
    options = listed_options(question)
    wanted = {_wanted(right, options) for right in references}
    texts = {**options, **{letter: text for letter, text in wanted if text}}
    letters = {letter for letter, _ in wanted}
    in_front = _IN_FRONT.fullmatch(answer.strip())
    found = [in_front[1]] if in_front is not None else _IN_A_SENTENCE.findall(answer)
    # "b" is not the requested form of "B", but case is no part of a text.
    is_copy = answer.strip() in references or any(
        plain(answer) == plain(right) for right in references if len(right.strip()) > 1
    )
    strict = is_copy or (len(found) == 1 and found[0] in letters)
    return SampleScore(float(strict), float(chosen_option(answer, texts) in letters))


def chosen_option(answer: str, options: Mapping[str, str]) -> str | None:
    """Letter of the option that a prediction chooses, by its letter or else by its text.

    Args:
        answer: the prediction.
        options: letter -> text, as far as known; a letter beyond them is none.

    Returns:
        the letter in upper case, None if there is none or more than one.
    """
    letter = option_letter(answer)
    if letter is not None and (letter in options or len(options) < 2):
        return letter
    predicted = words(answer)
    found = {key: words(text) for key, text in options.items()}
    found = {key: text for key, text in found.items() if text and has_words(predicted, text)}
    # "light blue" also contains "blue".
    longest = {
        key
        for key, text in found.items()
        if not any(text != other and has_words(other, text) for other in found.values())
    }
    return longest.pop() if len(longest) == 1 else None


@lru_cache(maxsize=4096)
def listed_options(question: str) -> Mapping[str, str]:
    """Return the options that a question lists, letter -> text from A on; {} if fewer than two."""
    lines = [(a or b or c, text) for a, b, c, text in _LINE.findall(question)]
    for found in (lines, _WITHIN.findall(question)):
        options: dict[str, str] = {}
        for letter, text in found:
            if letter == "A":  # examples in front of a question list theirs, too
                options = {}
            if letter == chr(ord("A") + len(options)):
                options[letter] = text.strip(" \t\r,;")
        if len(options) > 1 and not _WITHIN.search(options["A"]):
            return options
    return {}


def _wanted(reference: str, options: Mapping[str, str]) -> tuple[str, str]:
    """Letter of a reference and the text that it states, "" without one."""
    if (alone := _LETTER.fullmatch(reference)) is not None:
        return alone[1].upper(), ""
    of_text = [key for key, text in options.items() if plain(text) == plain(reference)]
    if len(of_text) == 1:
        return of_text[0], options[of_text[0]]
    both = _LETTER_AND_TEXT.fullmatch(reference)
    if both is not None:
        return (both[1] or both[2]).upper(), both[3].strip()
    listed = ", ".join(f"{key}. {text}" for key, text in options.items()) or "no options"
    raise ValueError(
        f"the scorer option got the reference {reference!r}: give one letter, a letter and its "
        f"text, or the text of an option (the question lists {listed[:200]}); or score with exact"
    )


OPTION = PerSampleScorer("option", "option/2", score_option, reads_question=True)
