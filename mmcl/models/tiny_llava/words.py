"""The words of the tiny LLaVA, and the byte-pair tokenizer that is made of them.

Byte-pair encoding: Sennrich et al. 2016, arXiv:1508.07909, on bytes as in GPT-2, so that nothing is
unknown. Every listed word becomes one token, every figure stays one of its own. The words are
those of the generated scenes (``mmcl data build scenes``); the file is the same every time.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from open_clip.tokenizer import bytes_to_unicode

from mmcl.core import write_atomic

SPECIALS = ("<pad>", "<s>", "</s>", "<image>")
SPEAKERS = ("USER", "ASSISTANT")
OPENINGS = """
Answer Can Count Describe Did From Give How In Is Name Read Tell What Where Which
"""
WORDS = """
A B C D a above all an and are arrow as at below big bigger bird black blue boat bottom box caption
car cat circle circles colour corner count cross crosses cup do does dotted draw eight eleven equal
equally everything face fifteen figure figures find first fish five flower form four fourteen
from green has have heart hearts here hexagon house in is it key large larger last left letter long
many me middle moon more nine no nothing number of on one or orange part pattern picture pink place
plain plate purple reach reaches red right ring scene see sentence seven shape six sixteen size
small snail somebody space square squares star stars striped take ten than the there thing things
thirteen this three to top tree triangle triangles twelve two we what where which white with word
words written yellow yes you
"""

Symbols = tuple[str, ...]


def spellings() -> list[str]:
    """List what becomes one token: words behind a space; openings also at the start of a line."""
    openings = OPENINGS.split()
    behind_a_space = sorted({*WORDS.split(), *openings, *SPEAKERS})
    return [*openings, *SPEAKERS, *(f" {word}" for word in behind_a_space)]


def learn_merges(texts: Sequence[str]) -> list[tuple[str, str]]:
    """Learn byte pairs until every text is one token, the most frequent pair first.

    Pairs of equal count go in alphabetical order, so the result depends on nothing else.
    """
    table = bytes_to_unicode()
    splits: list[Symbols] = [tuple(table[byte] for byte in text.encode()) for text in texts]
    merges: list[tuple[str, str]] = []
    while any(len(symbols) > 1 for symbols in splits):
        counts = Counter(
            pair for symbols in splits for pair in zip(symbols, symbols[1:], strict=False)
        )
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        splits = [_merged(symbols, best) for symbols in splits]
    return merges


def _merged(symbols: Symbols, pair: tuple[str, str]) -> Symbols:
    """Join every occurrence of ``pair``, from left to right."""
    done: list[str] = []
    place = 0
    while place < len(symbols):
        is_pair = symbols[place : place + 2] == pair
        done.append("".join(pair) if is_pair else symbols[place])
        place += 1 + is_pair
    return tuple(done)


def tokenizer_json() -> dict[str, Any]:
    """Describe the tokenizer as Hugging Face's ``tokenizers`` reads it.

    Ids are the special tokens, the 256 bytes, then the merges in the order of learning.
    """
    merges = learn_merges(spellings())
    letters = sorted(bytes_to_unicode().values())
    texts = dict.fromkeys([*SPECIALS, *letters, *("".join(pair) for pair in merges)])
    vocabulary = {text: number for number, text in enumerate(texts)}
    marks = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True,
    }  # fmt: skip
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    said = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": text, **marks, "special": True}
            for number, text in enumerate(SPECIALS)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, said],
            "pair": [begin, said, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [list(pair) for pair in merges],
        },
    }  # fmt: skip


def write_tokenizer(file: Path) -> int:
    """Write ``tokenizer.json``, the same bytes every time.

    Returns:
        The number of tokens.
    """
    made = tokenizer_json()
    text = json.dumps(made, ensure_ascii=False, indent=1) + "\n"
    write_atomic(file, text)
    return len(made["model"]["vocab"])
