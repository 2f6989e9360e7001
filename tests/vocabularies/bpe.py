"""The byte-pair encoding trainer of the two shipped vocabularies.

Sennrich et al. 2016, arXiv:1508.07909. Pairs of equal count are merged in alphabetical order, so
training gives the shipped bytes again; the trainer of Hugging Face's ``tokenizers`` merges them in
the order of token ids and gives other files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from open_clip.tokenizer import bytes_to_unicode

Symbols = tuple[str, ...]
Pair = tuple[str, str]


def split_word(word: str, end: str = "") -> Symbols:
    """Split a word into its byte symbols; ``end`` marks the last one."""
    table = bytes_to_unicode()
    symbols = [table[byte] for byte in word.encode()]
    return (*symbols[:-1], symbols[-1] + end)


def merge_pair(symbols: Symbols, pair: Pair) -> Symbols:
    """Join every occurrence of ``pair``, from left to right."""
    merged: list[str] = []
    index = 0
    while index < len(symbols):
        is_pair = symbols[index : index + 2] == pair
        merged.append("".join(pair) if is_pair else symbols[index])
        index += 1 + is_pair
    return tuple(merged)


def learn_merges(weights: Mapping[Symbols, int], count: int | None = None) -> list[Pair]:
    """Learn byte-pair merges, the most frequent pair first.

    Args:
        weights: weight of every split word, 1 or more.
        count: merges to learn; None = until no pair is left.

    Returns:
        Pairs in the order in which encoding applies them.

    Raises:
        ValueError: if no pair is left before ``count`` merges are learned.
    """
    splits = [(symbols, weight) for symbols, weight in weights.items()]
    merges: dict[str, Pair] = {}
    while count is None or len(merges) < count:
        pairs: Counter[Pair] = Counter()
        for symbols, weight in splits:
            for pair in zip(symbols, symbols[1:], strict=False):
                pairs[pair] += weight
        # Two merges that spell the same string would share one id in open_clip's table and
        # leave a hole below it, so that the end token lies beyond its `vocab_size`.
        usable = [pair for pair in pairs if "".join(pair) not in merges]
        if not usable and count is None:
            break
        if not usable:
            raise ValueError(
                f"the words give {len(merges)} merges, count is {count}: "
                f"pass more words or ask for at most {len(merges)} merges"
            )
        best = min(usable, key=lambda pair: (-pairs[pair], pair))
        merges["".join(best)] = best
        splits = [(merge_pair(symbols, best), weight) for symbols, weight in splits]
    return list(merges.values())
