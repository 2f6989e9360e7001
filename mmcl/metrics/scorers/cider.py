"""CIDEr-D and ROUGE-L, which no library computes without Java.

CIDEr-D: Vedantam et al. 2015, arXiv:1411.5726, as the COCO caption evaluation computes it: counts
of 1- to 4-grams, clipped by the reference's, weighted by how few rows have them in a reference, and
a Gaussian penalty (sigma 6 words) for another length. ROUGE-L: Lin 2004, with COCO's beta 1.2.
Both here are given words, not text; COCO's tokeniser (in Java) differs from ours in contractions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

Words = tuple[str, ...]
Gram = tuple[str, ...]

ORDERS = 4
SIGMA = 6.0
BETA = 1.2


class Cider:
    """CIDEr-D against the references of a test set.

    Args:
        references: for each row, each reference as words. With one row alone every n-gram is in
            every row and would weigh nothing; there all weigh the same.
    """

    def __init__(self, references: Sequence[Sequence[Words]]) -> None:
        rows_with: Counter[Gram] = Counter()
        for right in references:
            rows_with.update({gram for text in right for gram in _grams(text)})
        self._rows_with = rows_with
        self._rows = len(references)
        self._references = [[self._weigh(text) for text in right] for right in references]

    def score(self, row: int, said: Words) -> float:
        """Score one answer against its row's references, 0 to 10."""
        mine = self._weigh(said)
        values = []
        for theirs in self._references[row]:
            penalty = math.exp(-((len(said) - theirs[2]) ** 2) / (2 * SIGMA**2))
            values.append(
                penalty * math.fsum(map(_likeness, mine[0], theirs[0], mine[1], theirs[1]))
            )
        return 10.0 * math.fsum(values) / (ORDERS * len(values))

    def _weigh(self, text: Words) -> tuple[list[dict[Gram, float]], list[float], int]:
        """Give the weighted counts of each order, their lengths as vectors, and the words."""
        vectors: list[dict[Gram, float]] = [{} for _ in range(ORDERS)]
        for gram, count in _grams(text).items():
            vectors[len(gram) - 1][gram] = count * self._rarity(gram)
        norms = [math.sqrt(math.fsum(value**2 for value in each.values())) for each in vectors]
        return vectors, norms, len(text)

    def _rarity(self, gram: Gram) -> float:
        if self._rows == 1:
            return 1.0
        return math.log(self._rows) - math.log(max(1, self._rows_with[gram]))


def rouge_l(said: Words, references: Sequence[Words]) -> float:
    """Longest common subsequence as an F score, 0 to 1, best precision and best recall of all.

    Args:
        said: the answer's words.
        references: each reference's words.
    """
    shared = [common_length(said, right) for right in references]
    if not said or not any(shared):
        return 0.0
    precision = max(shared) / len(said)
    recall = max(n / len(right) for n, right in zip(shared, references, strict=True) if right)
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def common_length(one: Words, other: Words) -> int:
    """Length of the longest common subsequence."""
    before = [0] * (len(other) + 1)
    for word in one:
        row = [0]
        for place, match in enumerate(other):
            row.append(before[place] + 1 if word == match else max(row[place], before[place + 1]))
        before = row
    return before[-1]


def _likeness(
    mine: dict[Gram, float], theirs: dict[Gram, float], my_norm: float, their_norm: float
) -> float:
    if not my_norm or not their_norm:
        return 0.0
    shared = (
        min(value, theirs[gram]) * theirs[gram] for gram, value in mine.items() if gram in theirs
    )
    return math.fsum(shared) / (my_norm * their_norm)


def _grams(text: Words) -> Counter[Gram]:
    return Counter(
        text[start : start + order]
        for order in range(1, ORDERS + 1)
        for start in range(len(text) - order + 1)
    )
