"""CIDEr-D and ROUGE-L of tokenized texts; no library computes the pair without Java.

CIDEr-D: Vedantam et al. 2015, arXiv:1411.5726, as the COCO caption evaluation computes it: counts
of 1- to 4-grams, clipped by the reference's, weighted by inverse document frequency over the
samples' references, and a Gaussian penalty (sigma 6 words) for another length. ROUGE-L: Lin 2004,
with COCO's beta 1.2. Both take words, not text; COCO's tokenizer (in Java) differs from ours in
contractions.
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
        references: words of each reference of each sample. With a single sample every n-gram would
            have weight 0; there all have weight 1.
    """

    def __init__(self, references: Sequence[Sequence[Words]]) -> None:
        document_frequency: Counter[Gram] = Counter()
        for right in references:
            document_frequency.update({gram for text in right for gram in _grams(text)})
        self._document_frequency = document_frequency
        self._samples = len(references)
        self._references = [[self._weigh(text) for text in right] for right in references]

    def score(self, index: int, prediction: Words) -> float:
        """CIDEr-D of one prediction against the references of sample ``index``, 0 to 10."""
        mine = self._weigh(prediction)
        values = []
        for theirs in self._references[index]:
            penalty = math.exp(-((len(prediction) - theirs[2]) ** 2) / (2 * SIGMA**2))
            similarities = map(_clipped_cosine, mine[0], theirs[0], mine[1], theirs[1])
            values.append(penalty * math.fsum(similarities))
        return 10.0 * math.fsum(values) / (ORDERS * len(values))

    def _weigh(self, text: Words) -> tuple[list[dict[Gram, float]], list[float], int]:
        """Return the tf-idf vector of each order, their norms, and the number of words."""
        vectors: list[dict[Gram, float]] = [{} for _ in range(ORDERS)]
        for gram, count in _grams(text).items():
            vectors[len(gram) - 1][gram] = count * self._idf(gram)
        norms = [math.sqrt(math.fsum(value**2 for value in each.values())) for each in vectors]
        return vectors, norms, len(text)

    def _idf(self, gram: Gram) -> float:
        if self._samples == 1:
            return 1.0
        return math.log(self._samples) - math.log(max(1, self._document_frequency[gram]))


def rouge_l(prediction: Words, references: Sequence[Words]) -> float:
    """ROUGE-L: F score of the longest common subsequence, best precision and best recall, 0 to 1.

    Args:
        prediction: its words.
        references: each reference's words.
    """
    shared = [common_length(prediction, right) for right in references]
    if not prediction or not any(shared):
        return 0.0
    precision = max(shared) / len(prediction)
    recall = max(n / len(right) for n, right in zip(shared, references, strict=True) if right)
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def common_length(one: Words, other: Words) -> int:
    """Length of the longest common subsequence."""
    before = [0] * (len(other) + 1)
    for word in one:
        lengths = [0]
        for n, match in enumerate(other):
            lengths.append(before[n] + 1 if word == match else max(lengths[n], before[n + 1]))
        before = lengths
    return before[-1]


def _clipped_cosine(
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
