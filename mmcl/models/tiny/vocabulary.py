"""The byte-pair vocabulary of the tiny CLIP: learned on a word list, written as open_clip reads it.

Byte-pair encoding: Sennrich et al. 2016, arXiv:1508.07909. The file form is the one of
``open_clip.tokenizer.SimpleTokenizer``: a heading line, then one merge a line, gzipped.
Ids are 512 bytes (inside a word, then at its end), the merges, start of text, end of text.
"""

import gzip
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from open_clip.tokenizer import bytes_to_unicode

from mmcl.core.atomic import write_atomic
from mmcl.models.tiny.words import CAPTIONS, COMMON, NAMES

MERGES = 640
HEADING = "#version: 0.2 mmcl tiny"
WEIGHTS = {CAPTIONS: 40, NAMES: 4, COMMON: 2}

Symbols = tuple[str, ...]
Pair = tuple[str, str]


def count_words() -> dict[str, int]:
    """Weigh the built-in word list.

    Returns:
        word -> weight: caption words count most, then class names, then common English.
    """
    counts: Counter[str] = Counter()
    for text, weight in WEIGHTS.items():
        for word in set(text.split()):
            counts[word] += weight
    return dict(sorted(counts.items()))


def split_word(word: str) -> Symbols:
    """Split a word into the byte symbols that encoding starts from, the last one marked."""
    table = bytes_to_unicode()
    symbols = [table[byte] for byte in word.encode("utf-8")]
    return (*symbols[:-1], symbols[-1] + "</w>")


def merge_pair(symbols: Symbols, pair: Pair) -> Symbols:
    """Join every occurrence of ``pair``, from left to right."""
    merged: list[str] = []
    position = 0
    while position < len(symbols):
        if symbols[position : position + 2] == pair:
            merged.append(pair[0] + pair[1])
            position += 2
        else:
            merged.append(symbols[position])
            position += 1
    return tuple(merged)


def learn_merges(words: Mapping[str, int], merges: int) -> list[Pair]:
    """Learn byte-pair merges, most frequent pair first; equal counts go in alphabetical order.

    Args:
        words: weight of every word, 1 or more.
        merges: merges to learn.

    Returns:
        ``merges`` pairs in the order in which encoding applies them.

    Raises:
        ValueError: if the words are used up before ``merges`` pairs are found.
    """
    splits = {word: split_word(word) for word in words}
    known: set[str] = set()
    learned: list[Pair] = []
    while len(learned) < merges:
        counts: Counter[Pair] = Counter()
        for word, symbols in splits.items():
            for pair in zip(symbols, symbols[1:], strict=False):
                counts[pair] += words[word]
        # Two merges that spell the same string would share one id in open_clip's table and
        # leave a hole below it, so that the end token lies beyond its `vocab_size`.
        usable = [pair for pair in counts if pair[0] + pair[1] not in known]
        if not usable:
            raise ValueError(
                f"the words give {len(learned)} merges, merges is {merges}: "
                f"pass more words or ask for at most {len(learned)} merges"
            )
        best = min(usable, key=lambda pair: (-counts[pair], pair))
        known.add(best[0] + best[1])
        learned.append(best)
        splits = {word: merge_pair(symbols, best) for word, symbols in splits.items()}
    return learned


def write_vocabulary(path: Path, merges: int = MERGES) -> int:
    """Write the tiny vocabulary to ``path`` (``bpe.txt.gz``), the same bytes every time.

    Returns:
        The number of token ids: 512 + ``merges`` + 2.
    """
    lines = [HEADING, *(" ".join(pair) for pair in learn_merges(count_words(), merges))]
    # No newline at the end: open_clip would read the empty line as one more merge.
    write_atomic(path, gzip.compress("\n".join(lines).encode("utf-8"), mtime=0))
    return 2 * 256 + merges + 2
