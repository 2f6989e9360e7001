"""Scorers of short answers: exact, contains, fraction, option.

Every one is the mean of its rows. A row's references are alternatives: the best one counts.
"""

from __future__ import annotations

import re

from mmcl.metrics.scorers.scored import Judged, References, RowScorer
from mmcl.metrics.scorers.words import occurs, option_letter, plain, words

_OPTION = re.compile(r"\W*([A-Za-z])\W*")
_IN_FRONT = re.compile(r"([A-Z])(?:\.(?:\s.*)?)?", re.DOTALL)
_IN_A_SENTENCE = re.compile(r"\b[Tt]he answer is ([A-Z])\b")


def judge_exact(answer: str, references: References) -> Judged:
    """Compare without case, surrounding white space and one final full stop.

    The rule of UCIT (ImageNet-R, ArxivQA, IconQA, CLEVR-Math) and of MLLM-DCL (finance). CoIN's
    scorer for ImageNet takes a substring in either direction, so that an empty answer is right;
    this one does not. Lenient: the right answer occurs as whole words, or as the letter chosen.
    """
    said = plain(answer)
    strict = any(said == plain(right) for right in references)
    return Judged(float(strict), float(any(occurs(right, answer) for right in references)))


def judge_contains(answer: str, references: References) -> Judged:
    """Look for the right answer in what was said; MLLM-DCL's rule for medicine.

    Strict: as whole words, so that "no" is not found in "normal". Lenient: as a substring without
    case, which is what the released code counts.
    """
    strict = any(_stands(right, answer) for right in references)
    said = plain(answer)
    return Judged(float(strict), float(any(plain(right) in said for right in references)))


def judge_fraction(answer: str, references: References) -> Judged:
    """Share of a right list, separated by commas, that a list given has; MLLM-DCL's rule for maps.

    As in the released code an item too many costs nothing; the extra ``jaccard`` (items in both /
    items in either) shows it. Lenient: share of the right items that occur as whole words.
    """
    said = _items(answer)
    rows = []
    for right in references:
        wanted = _items(right)
        shared = len(wanted & said)
        found = sum(_stands(item, answer) for item in wanted)
        extras = {"jaccard": shared / len(wanted | said)}
        rows.append(Judged(shared / len(wanted), found / len(wanted), extras))
    return max(rows, key=lambda row: (row.strict, row.lenient, row.extras["jaccard"]))


def judge_option(answer: str, references: References) -> Judged:
    """Read the letter of a multiple choice; ScienceQA's rule.

    Strict, as LLaVA's scorer reads it: the letter alone (here also with a full stop), the letter
    and ". " in front of a text, or "The answer is B", once. Lenient: any sentence that chooses one
    letter. An answer without a letter is wrong, never drawn at random.

    Raises:
        ValueError: if a reference is not a letter.
    """
    wanted = [_option(right) for right in references]
    in_front = _IN_FRONT.fullmatch(answer.strip())
    said = [in_front[1]] if in_front is not None else _IN_A_SENTENCE.findall(answer)
    strict = len(said) == 1 and said[0] in wanted
    return Judged(float(strict), float(option_letter(answer) in wanted))


EXACT = RowScorer("exact", "exact/1", judge_exact)
CONTAINS = RowScorer("contains", "contains/1", judge_contains)
FRACTION = RowScorer("fraction", "fraction/1", judge_fraction, ("jaccard",))
OPTION = RowScorer("option", "option/1", judge_option)


def _stands(right: str, answer: str) -> bool:
    """Say whether words stand in an answer, or equal it where punctuation leaves no words."""
    wanted, said = words(right), words(answer)
    if not wanted:
        return plain(right) == plain(answer)
    return any(said[at : at + len(wanted)] == wanted for at in range(len(said)))


def _items(text: str) -> set[str]:
    return {item for item in (plain(part) for part in text.split(",")) if item} or {plain(text)}


def _option(reference: str) -> str:
    found = _OPTION.fullmatch(reference)
    if found is None:
        raise ValueError(
            f"the scorer option got the reference {reference!r}: give one letter, "
            "or score with exact"
        )
    return found[1].upper()
