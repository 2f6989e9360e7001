"""The vocabulary of the tiny LLaVA: its word lists and the ``tokenizer.json`` made of them.

``python -m tests.vocabularies.llava_vocabulary`` writes ``mmcl/models/tiny_llava/tokenizer.json``
again, the same bytes every time. The tokenizer is a byte-level BPE as GPT-2's, so nothing is
unknown. Every listed word is one token, and every digit is one of its own. The words are those of
the generated scenes (``mmcl data build scenes``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from open_clip.tokenizer import bytes_to_unicode

import mmcl.models.tiny_llava
from mmcl.core import write_atomic
from tests.vocabularies.bpe import learn_merges, split_word

FILE = Path(mmcl.models.tiny_llava.__file__).parent / "tokenizer.json"
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


def spellings() -> list[str]:
    """Return the texts of one token each: words after a space; openings also without one."""
    openings = OPENINGS.split()
    after_a_space = sorted({*WORDS.split(), *openings, *SPEAKERS})
    return [*openings, *SPEAKERS, *(f" {word}" for word in after_a_space)]


def tokenizer_json() -> dict[str, Any]:
    """Return the tokenizer's JSON as Hugging Face's ``tokenizers`` reads it.

    Ids are the special tokens, the 256 bytes, then the merges in the order of training.
    """
    merges = learn_merges({split_word(text): 1 for text in spellings()})
    letters = sorted(bytes_to_unicode().values())
    texts = dict.fromkeys([*SPECIALS, *letters, *("".join(pair) for pair in merges)])
    vocabulary = {text: token_id for token_id, text in enumerate(texts)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True,
    }  # fmt: skip
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text_a = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token_id, "content": text, **flags, "special": True}
            for token_id, text in enumerate(SPECIALS)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, text_a],
            "pair": [begin, text_a, {"Sequence": {"id": "B", "type_id": 0}}],
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
    """Write ``tokenizer.json``.

    Returns:
        The number of tokens.
    """
    content = tokenizer_json()
    text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    write_atomic(file, text)
    return len(content["model"]["vocab"])


if __name__ == "__main__":
    write_tokenizer(FILE)
