import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mmcl.models import ImageTextToText, precision
from mmcl.models.precision import weight_options
from tests.models.small_chats import write_model


def test_a_name_with_a_typo_says_what_a_name_may_be():
    with pytest.raises(FileNotFoundError, match=r"there is no folder llava-1\.5-7b: give a local"):
        ImageTextToText("llava-1.5-7b")


def test_a_folder_that_is_missing_is_named():
    with pytest.raises(FileNotFoundError, match=r"there is no folder \./models/llava"):
        ImageTextToText("./models/llava")


def test_a_name_that_the_hub_cannot_give_says_what_works_without_a_network():
    with pytest.raises(RuntimeError, match=r"cannot get llava-hf/no-such-7b .*local folder"):
        ImageTextToText("llava-hf/no-such-7b")


def test_a_folder_without_a_configuration_says_what_it_must_hold(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json: give one that save_pretr"):
        ImageTextToText(str(tmp_path))


def test_a_folder_without_weights_says_what_it_must_hold(tmp_path):
    folder = write_model(tmp_path, "llava")
    (folder / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match=r"cannot load .*must hold config\.json, weights"):
        ImageTextToText(str(folder))
    ImageTextToText(str(folder), pretrained=False)


def test_a_folder_without_a_tokenizer_says_what_it_must_hold(tmp_path):
    folder = write_model(tmp_path, "llava")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises((RuntimeError, ValueError), match=r"tokenizer\.json"):
        ImageTextToText(str(folder))


def test_a_language_model_is_refused_by_its_kind(tmp_path):
    folder = write_model(tmp_path, "llava")
    small = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1,
    )  # fmt: skip
    LlamaForCausalLM(small).save_pretrained(folder)
    with pytest.raises(RuntimeError, match=r"is a Llama, which takes no pictures.*llava"):
        ImageTextToText(str(folder))


def test_a_slow_tokenizer_is_refused(tmp_path, monkeypatch):
    folder = write_model(tmp_path, "llava")
    from transformers import PreTrainedTokenizerFast

    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", property(lambda self: False))
    with pytest.raises(ValueError, match=r"a slow one, .*give a folder with tokenizer\.json"):
        ImageTextToText(str(folder))


def test_without_a_token_that_ends_an_answer_there_is_no_model(tmp_path):
    folder = write_model(tmp_path, "llava")
    for name, key in (
        ("tokenizer_config.json", "eos_token"),
        ("generation_config.json", "eos_token_id"),
    ):
        facts = json.loads((folder / name).read_text())
        facts.pop(key)
        (folder / name).write_text(json.dumps(facts))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = None
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="names a token that ends an answer: set eos_token"):
        ImageTextToText(str(folder))


def test_both_ends_are_known_where_two_are_stated(tmp_path):
    folder = write_model(tmp_path, "qwen2_5_vl")
    facts = json.loads((folder / "generation_config.json").read_text())
    facts["eos_token_id"] = [7, 1]
    (folder / "generation_config.json").write_text(json.dumps(facts))
    assert ImageTextToText(str(folder), size=16).ends == [1, 7]


@pytest.mark.parametrize("name", ["8bit", "4bit"])
def test_quantised_weights_need_a_gpu(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=f"'{name}' and this machine has no GPU.*use 'bf16'"):
        weight_options(name, True)


@pytest.mark.parametrize("name", ["8bit", "4bit"])
def test_quantised_weights_need_bitsandbytes(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(precision, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(RuntimeError, match="bitsandbytes is not installed: pip install bitsandb"):
        weight_options(name, True)


@pytest.mark.parametrize("name", ["8bit", "4bit"])
def test_quantised_weights_go_to_the_processs_gpu_and_leave_the_rest_alone(name, monkeypatch):
    made = {}

    def config(**options):
        made.update(options)
        return made

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(precision, "is_bitsandbytes_available", lambda: True)
    monkeypatch.setattr(precision, "BitsAndBytesConfig", config)
    monkeypatch.setenv("LOCAL_RANK", "3")
    options = weight_options(name, True)
    assert options["device_map"] == {"": 3}
    assert options["dtype"] == torch.bfloat16
    whole = options["quantization_config"]["llm_int8_skip_modules"]
    assert {"lm_head", "model.vision_tower", "model.multi_modal_projector"} <= set(whole)
    assert "model.visual.merger" in whole
    assert made[f"load_in_{name}"]


def test_random_weights_cannot_be_quantised():
    with pytest.raises(ValueError, match="pretrained is false: random weights cannot be quant"):
        weight_options("4bit", False)


def test_an_unknown_precision_is_named():
    with pytest.raises(ValueError, match="base_precision is 'fp16', expected 'fp32', 'bf16'"):
        weight_options("fp16", True)


@pytest.mark.parametrize(
    ("family", "size", "said"),
    [
        ("llava", 24, "made for pictures of 16: leave size out"),
        ("qwen2_5_vl", 20, "expected a multiple of 8"),
    ],
)
def test_a_size_that_the_model_cannot_take_is_refused(family, size, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        ImageTextToText(str(write_model(tmp_path, family)), size=size)


@pytest.mark.parametrize(("name", "value"), [("style", "chatml"), ("fit", "zoom")])
def test_unknown_words_are_answered_with_the_known(name, value, tmp_path):
    folder = str(write_model(tmp_path, "llava"))
    with pytest.raises(ValueError, match=f"{name} is '{value}', expected"):
        ImageTextToText(folder, **{name: value}).transform(True)


def test_loading_draws_no_bars_and_says_nothing(tmp_path, capfd):
    folder = write_model(tmp_path, "llava")
    capfd.readouterr()
    ImageTextToText(str(folder))
    assert capfd.readouterr() == ("", "")


def test_whole_numbers_of_bits_are_types_of_torch():
    assert weight_options("bf16", True)["dtype"] == torch.bfloat16
    assert weight_options("fp32", False)["dtype"] == torch.float32
