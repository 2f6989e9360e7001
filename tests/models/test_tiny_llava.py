"""The shipped tiny LLaVA: folder, tokenizer and weights, and that its answers need the image."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import mmcl.models.tiny_llava
from mmcl.core import Conversation, Turn
from mmcl.data.batches.collate import Example, collate
from mmcl.models import ImageTextToText, TinyLlava
from tests.benchmarks.tiny_llava import answers, questions, share_right
from tests.vocabularies.llava_vocabulary import spellings
from tests.vocabularies.scene_words import FIGURES, SIGNS, scene_words

FOLDER = Path(mmcl.models.tiny_llava.__file__).parent
WEIGHTS = FOLDER / "model.safetensors"


@pytest.fixture(scope="module")
def ours():
    return ImageTextToText("tiny-llava").eval()


@pytest.fixture(scope="module")
def theirs():
    return AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def samples():
    return questions(rows=12, seed=5)


def test_the_folder_is_small_enough_to_ship():
    assert sum(file.stat().st_size for file in FOLDER.glob("*.*")) <= 6_000_000


def test_the_model_card_names_the_weights_by_hash():
    mark = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    assert mark in (FOLDER / "README.md").read_text()


def test_the_model_computes_in_single_precision_though_the_file_is_in_half(ours):
    assert {p.dtype for p in ours.parameters()} == {torch.float32}


def test_mmcl_and_transformers_give_the_same_logits(ours, theirs, samples):
    pixels, dialogue = samples["color"][0]
    row = ours.transform(False)(pixels, dialogue, 0)
    batch = collate([Example(row, -100, 0, 0, "", False, dialogue.reference)])
    with torch.no_grad():
        mine = ours(batch).logits
    messages = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": _question(dialogue)}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": dialogue.answers[0]}]},
    ]
    processor = AutoProcessor.from_pretrained(FOLDER)
    text = processor.apply_chat_template(messages, tokenize=False)
    inputs = processor(images=[pixels], text=[text], return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == row.input_ids.tolist()
    with torch.no_grad():
        whole = theirs(**inputs).logits[0]
    scored = torch.nonzero(row.labels[1:] != -100).flatten()
    torch.testing.assert_close(mine, whole[scored], atol=1e-4, rtol=1e-4)


def _question(dialogue: Conversation) -> str:
    return dialogue.turns[0].text.removeprefix("<image>\n")


def test_every_word_of_the_scenes_is_one_token(ours):
    tokenizer = ours.processor.tokenizer
    words = scene_words() - {*FIGURES, *SIGNS}
    split = [w for w in words if len(tokenizer.tokenize(f" {w}")) != 1]
    assert split == []
    assert {f" {word}" for word in words} <= set(spellings())


def test_digits_are_single_tokens_and_nothing_is_unknown(ours):
    tokenizer = ours.processor.tokenizer
    assert tokenizer.tokenize("473") == ["4", "7", "3"]
    for text in ("the number is 473.", "größe, 大 and \N{CAT FACE}!", "[0.1, 0.25]"):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(tokens) == text


def test_a_later_stage_starts_from_the_weights_of_an_earlier_one(tmp_path):
    small = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 32}
    first = TinyLlava(**small, seed=1)
    first.save(tmp_path / "stage")
    second = TinyLlava(**small, seed=2, start=str(tmp_path / "stage"))
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], tensor, atol=0, rtol=0)


def test_a_stage_of_another_size_is_refused(tmp_path):
    stage = tmp_path / "stage"
    TinyLlava(hidden_size=16, num_layers=1, num_heads=2, mlp_dim=32).save(stage)
    with pytest.raises(ValueError, match="are of another model"):
        TinyLlava(hidden_size=32, num_layers=1, num_heads=2, mlp_dim=32, start=str(stage))


def test_a_missing_stage_is_named():
    with pytest.raises(FileNotFoundError, match="there is no config.json in it"):
        TinyLlava(start="nowhere/export")


def test_the_file_is_in_half_precision():
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert "float32" not in {config[part].get("dtype") for part in ("text_config", "vision_config")}


def test_answers_on_colors_and_positions_need_the_image(ours, samples):
    for kind in ("color", "place"):
        rows = samples[kind]
        others = [(rows[number - 1][0], dialogue) for number, (_, dialogue) in enumerate(rows)]
        assert share_right(ours, rows) >= 0.4
        assert share_right(ours, others) < share_right(ours, rows)


def test_other_images_give_other_answers(ours, samples):
    turns = (Turn("user", "<image>\nDescribe the picture."), Turn("assistant", "?"))
    images = [(one, Conversation(turns, ("?",))) for one, _ in samples["color"]]
    assert len(set(answers(ours, images))) > len(images) / 2
