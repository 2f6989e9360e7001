"""The tiny CLIP's vocabulary: what is learned, and how open_clip reads it."""

import gzip
import json
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

import mmcl.models.tiny
from mmcl.models.tiny.vocabulary import (
    HEADING,
    MERGES,
    count_words,
    learn_merges,
    merge_pair,
    split_word,
    write_vocabulary,
)

FOLDER = Path(mmcl.models.tiny.__file__).parent


@pytest.fixture
def tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer(str(FOLDER / "bpe.txt.gz"), context_length=32)


def test_the_most_frequent_pair_is_merged_first():
    # "low" 5 times and "lot" 2 times: l-o 7, o-w 5, o-t 2; after the merge lo-w 5, lo-t 2.
    assert learn_merges({"low": 5, "lot": 2}, 3) == [("l", "o"), ("lo", "w</w>"), ("lo", "t</w>")]


def test_equal_counts_go_in_alphabetical_order():
    assert learn_merges({"cd": 1, "ab": 1}, 2) == [("a", "b</w>"), ("c", "d</w>")]


def test_a_pair_is_joined_from_left_to_right():
    assert merge_pair(("a", "a", "a", "b"), ("a", "a")) == ("aa", "a", "b")


def test_a_word_outside_ascii_is_split_into_bytes():
    assert len(split_word("ü")) == len("ü".encode())
    assert split_word("ab") == ("a", "b</w>")


def test_no_two_merges_spell_the_same_string():
    merges = learn_merges(count_words(), 120)
    assert len({first + second for first, second in merges}) == 120


def test_words_that_are_used_up_name_the_largest_number_of_merges():
    with pytest.raises(ValueError, match=r"give 2 merges, merges is 9.*at most 2"):
        learn_merges({"abc": 1}, 9)


def test_the_same_words_are_written_as_the_same_bytes(tmp_path):
    sizes = [write_vocabulary(tmp_path / name, merges=30) for name in ("one", "two")]
    assert sizes == [544, 544]
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.slow
def test_the_shipped_vocabulary_is_the_one_that_is_learned(tmp_path):
    write_vocabulary(tmp_path / "bpe.txt.gz")
    learned, shipped = (
        gzip.decompress((folder / "bpe.txt.gz").read_bytes()) for folder in (tmp_path, FOLDER)
    )
    assert learned == shipped
    assert shipped.startswith(HEADING.encode())


def test_the_shipped_vocabulary_has_no_holes_and_the_end_token_is_last(tokenizer):
    assert tokenizer.vocab_size == 512 + MERGES + 2
    assert tokenizer.eot_token_id == tokenizer.vocab_size - 1
    assert sorted(tokenizer.encoder.values()) == list(range(tokenizer.vocab_size))


def test_a_caption_of_the_glyphs_stream_is_one_token_a_word(tokenizer):
    assert len(tokenizer.encode("a photo of the digit three.")) == 7
    assert len(tokenizer.encode("a red striped circle on a blue background")) == 8


def test_any_text_comes_back_from_its_tokens(tokenizer):
    text = "grünes gesicht 笑 x9!"
    assert tokenizer.decode(tokenizer.encode(text)).split() == [
        "grünes",
        "gesicht",
        "笑",
        "x",
        "9",
        "!",
    ]


def test_the_shipped_architecture_builds_and_pools_at_the_end_token(tokenizer):
    config = json.loads((FOLDER / "tiny-clip.json").read_text())
    assert config["text_cfg"]["vocab_size"] == tokenizer.vocab_size
    assert config["text_cfg"]["context_length"] == tokenizer.context_length
    model = open_clip.model.CLIP(**config).eval()
    tokens = tokenizer(["the letter q"])
    longer = tokens.clone()
    longer[0, -1] = 7  # beyond the end token, so the causal tower must not see it
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(tokens), model.encode_text(longer))
        assert model.encode_image(torch.zeros(2, 3, 64, 64)).shape == (2, 128)


def test_the_shipped_weights_fit_the_architecture_and_four_megabytes():
    safetensors = pytest.importorskip("safetensors.torch")
    path = FOLDER / "tiny-clip.safetensors"
    assert path.stat().st_size <= 4_000_000
    model = open_clip.model.CLIP(**json.loads((FOLDER / "tiny-clip.json").read_text()))
    model.load_state_dict(safetensors.load_file(path), strict=True)
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
