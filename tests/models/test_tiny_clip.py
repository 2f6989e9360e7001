"""The shipped tiny CLIP: vocabulary, architecture, weights, and zero-shot accuracy on scans."""

import hashlib
import json

import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file

from mmcl.models.open_clip.loading import TINY
from tests.benchmarks.zero_shot import scans, zero_shot
from tests.vocabularies.clip_vocabulary import CAPTIONS


@pytest.fixture
def tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer(str(TINY / "bpe.txt.gz"), context_length=32)


def test_the_model_card_names_the_weights_by_hash():
    mark = hashlib.sha256((TINY / "tiny-clip.safetensors").read_bytes()).hexdigest()
    assert mark in (TINY / "README.md").read_text()


def test_the_shipped_vocabulary_has_no_holes_and_the_end_token_is_last(tokenizer):
    assert tokenizer.vocab_size == 512 + 640 + 2
    assert tokenizer.eot_token_id == tokenizer.vocab_size - 1
    assert sorted(tokenizer.encoder.values()) == list(range(tokenizer.vocab_size))


def test_every_word_of_the_captions_is_one_token(tokenizer):
    assert [word for word in set(CAPTIONS.split()) if len(tokenizer.encode(word)) != 1] == []


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
    config = json.loads((TINY / "tiny-clip.json").read_text())
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
    path = TINY / "tiny-clip.safetensors"
    assert path.stat().st_size <= 4_000_000
    model = open_clip.model.CLIP(**json.loads((TINY / "tiny-clip.json").read_text()))
    model.load_state_dict(load_file(path), strict=True)
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


@pytest.mark.slow
def test_handwritten_digits_are_classified_zero_shot():
    assert zero_shot(*scans()) > 0.5  # chance is 0.1
