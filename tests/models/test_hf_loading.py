import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mmcl.models import ImageTextToText
from mmcl.models.hf_vlm import loading
from mmcl.models.hf_vlm.loading import weight_options
from tests.models.small_vlms import write_model


def test_a_name_with_a_typo_lists_what_a_name_can_be():
    with pytest.raises(FileNotFoundError, match=r"there is no folder llava-1\.5-7b: give a local"):
        ImageTextToText("llava-1.5-7b")


def test_a_folder_that_is_missing_is_named():
    with pytest.raises(FileNotFoundError, match=r"there is no folder \./models/llava"):
        ImageTextToText("./models/llava")


def test_a_name_that_the_hub_cannot_give_names_what_works_without_a_network():
    with pytest.raises(RuntimeError, match=r"cannot get llava-hf/no-such-7b .*local folder"):
        ImageTextToText("llava-hf/no-such-7b")


def test_a_folder_without_a_configuration_lists_what_it_must_hold(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json: give one that save_pretr"):
        ImageTextToText(str(tmp_path))


def test_a_folder_without_weights_lists_what_it_must_hold(tmp_path):
    folder = write_model(tmp_path, "llava")
    (folder / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match=r"cannot load .*must hold config\.json, weights"):
        ImageTextToText(str(folder))
    ImageTextToText(str(folder), pretrained=False)


def test_a_folder_without_a_tokenizer_lists_what_it_must_hold(tmp_path):
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
    with pytest.raises(RuntimeError, match=r"is a Llama, which takes no images.*llava"):
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


def test_both_end_tokens_are_known_where_two_are_declared(tmp_path):
    folder = write_model(tmp_path, "qwen2_5_vl")
    facts = json.loads((folder / "generation_config.json").read_text())
    facts["eos_token_id"] = [7, 1]
    (folder / "generation_config.json").write_text(json.dumps(facts))
    assert ImageTextToText(str(folder), size=16).end_token_ids == [1, 7]


@pytest.mark.parametrize("name", ["8bit", "4bit"])
def test_quantized_weights_need_a_gpu(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        RuntimeError, match=f"'{name}' and this machine has no GPU.*use dtype 'bfloat16'"
    ):
        weight_options(None, name, True)


@pytest.mark.parametrize("name", ["8bit", "4bit"])
def test_quantized_weights_need_bitsandbytes(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(loading, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(RuntimeError, match="bitsandbytes is not installed: pip install 'mmcl"):
        weight_options(None, name, True)


@pytest.mark.parametrize("name", ["8bit", "4bit"])
def test_quantized_weights_go_to_the_processs_gpu_and_leave_the_rest_alone(name, monkeypatch):
    made = {}

    def config(**options):
        made.update(options)
        return made

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(loading, "is_bitsandbytes_available", lambda: True)
    monkeypatch.setattr(loading, "BitsAndBytesConfig", config)
    monkeypatch.setenv("LOCAL_RANK", "3")
    options = weight_options(None, name, True)
    assert options["device_map"] == {"": 3}
    assert options["dtype"] == torch.bfloat16
    whole = options["quantization_config"]["llm_int8_skip_modules"]
    assert {"lm_head", "model.vision_tower", "model.multi_modal_projector"} <= set(whole)
    assert "model.visual.merger" in whole
    assert made[f"load_in_{name}"]
    assert weight_options("float16", name, True)["dtype"] == torch.float16


def test_random_weights_cannot_be_quantized():
    with pytest.raises(ValueError, match="pretrained is false: random weights cannot be quant"):
        weight_options(None, "4bit", False)


def test_an_unknown_dtype_is_named():
    with pytest.raises(ValueError, match="dtype is 'fp16', expected 'float32', 'bfloat16' or"):
        weight_options("fp16", None, True)


def test_an_unknown_quantization_is_named():
    with pytest.raises(ValueError, match="quantization is '2bit', expected '8bit', '4bit' or null"):
        weight_options(None, "2bit", True)


@pytest.mark.parametrize(
    ("architecture", "size", "message"),
    [
        ("llava", 24, "takes images of size 16 only: leave size out"),
        ("qwen2_5_vl", 20, "expected a multiple of 8"),
    ],
)
def test_a_size_that_the_model_cannot_take_is_refused(architecture, size, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ImageTextToText(str(write_model(tmp_path, architecture)), size=size)


@pytest.mark.parametrize(
    ("name", "value"), [("conv_template", "chatml"), ("image_aspect_ratio", "zoom")]
)
def test_unknown_options_are_answered_with_the_known(name, value, tmp_path):
    folder = str(write_model(tmp_path, "llava"))
    with pytest.raises(ValueError, match=f"{name} is '{value}', expected"):
        ImageTextToText(folder, **{name: value}).transform(True)


def test_loading_prints_nothing(tmp_path, capfd):
    folder = write_model(tmp_path, "llava")
    capfd.readouterr()
    ImageTextToText(str(folder))
    assert capfd.readouterr() == ("", "")


def test_a_dtype_is_that_of_torch_and_float32_unless_given():
    assert weight_options("bfloat16", None, True)["dtype"] == torch.bfloat16
    assert weight_options("float16", None, True)["dtype"] == torch.float16
    assert weight_options(None, None, False)["dtype"] == torch.float32
