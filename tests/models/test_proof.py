"""A model is compared with transformers when it is loaded, and refused where it differs."""

import pytest
import torch

from mmcl.models import ImageTextToText
from mmcl.models.hf_vlm import architectures, proof
from mmcl.models.hf_vlm.image_inputs import ImageInputs
from mmcl.models.hf_vlm.native_inputs import NativeProcessor
from tests.models.small_families import write_family


@pytest.fixture
def folder(request, tmp_path):
    write_family(tmp_path, getattr(request, "param", "gemma3"))
    return str(tmp_path)


@pytest.mark.parametrize("folder", ["gemma3", "paligemma"], indirect=True)
def test_a_model_that_lacks_an_argument_of_its_forward_is_refused_with_both_losses(
    folder, monkeypatch
):
    monkeypatch.setattr(ImageInputs, "token_type_ids", lambda *args: {})
    losses = r"loss of [\d.]+ in transformers and [\d.]+ in mmcl"
    with pytest.raises(ValueError, match=losses):
        ImageTextToText(folder)
    monkeypatch.undo()
    ImageTextToText(folder)


@pytest.mark.parametrize("folder", ["paligemma2"], indirect=True)
def test_a_cap_of_word_scores_that_is_left_out_is_noticed(folder, monkeypatch):
    monkeypatch.setattr(architectures, "_UNCAPPED", ("paligemma",))
    with pytest.raises(ValueError, match=r"loss of [\d.]+ in transformers and [\d.]+ in mmcl"):
        ImageTextToText(folder)


@pytest.mark.parametrize("folder", ["qwen3_vl", "smolvlm", "llava_next"], indirect=True)
def test_a_type_without_an_entry_is_taken_where_it_is_equal(folder, monkeypatch):
    known = ImageTextToText(folder).lm.config.model_type
    others = {name: one for name, one in architectures.ARCHITECTURES.items() if name != known}
    monkeypatch.setattr(architectures, "ARCHITECTURES", others)
    assert ImageTextToText(folder).lm.config.model_type == known


def test_the_limit_of_lengths_is_not_that_of_the_test_sample(folder):
    model = ImageTextToText(folder, max_length=40)
    assert model.chat_tokenizer.max_length == 40


@pytest.mark.parametrize("folder", ["llava", "smolvlm"], indirect=True)
def test_other_tokens_are_refused_with_the_place(folder, monkeypatch):
    plain = NativeProcessor.__call__

    def doubled(self, images):
        inputs, texts = plain(self, images)
        return inputs, [text + "<image>" for text in texts]

    monkeypatch.setattr(NativeProcessor, "__call__", doubled)
    with pytest.raises(
        ValueError, match=r"has (\d+) tokens in transformers and \d+ in mmcl .* token"
    ):
        ImageTextToText(folder)


@pytest.mark.parametrize("folder", ["llava"], indirect=True)
@pytest.mark.parametrize("mode", ["native", "square"])
def test_pixels_of_another_normalization_are_refused(folder, monkeypatch, mode):
    name = "join_inputs" if mode == "native" else "expect_levels"
    module = "mmcl.models.hf_vlm.image_inputs"
    plain = getattr(__import__(module, fromlist=[name]), name)

    def changed(*given):
        found = plain(*given)
        if mode == "square":
            given[0].zero_()
            return found
        return {**found, "pixel_values": found["pixel_values"] * 0}

    monkeypatch.setattr(f"{module}.{name}", changed)
    with pytest.raises(ValueError, match="has a loss of"):
        ImageTextToText(folder, image_inputs=mode)


@pytest.mark.parametrize("folder", ["llava", "qwen3_vl"], indirect=True)
def test_of_a_large_model_the_first_layers_stand_for_all(folder, monkeypatch):
    monkeypatch.setattr(proof, "_LARGE", 0)
    monkeypatch.setattr(proof, "_LAYERS", 1)
    ran = []
    whole = ImageTextToText.forward

    def forward(self, batch, *args):
        ran.append(len(self.blocks()))
        return whole(self, batch, *args)

    monkeypatch.setattr(ImageTextToText, "forward", forward)
    model = ImageTextToText(folder)
    assert ran == [1]
    assert len(model.blocks()) == model.lm.config.get_text_config().num_hidden_layers > 1
    monkeypatch.undo()
    other = ImageTextToText(folder)
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


def test_inputs_of_both_modes_at_once_are_refused(tmp_path):
    for wrong in ({"size": 16}, {"image_aspect_ratio": "crop"}):
        with pytest.raises(ValueError, match="is for 'square'"):
            ImageTextToText("tiny-llava", image_inputs="native", **wrong)
    with pytest.raises(ValueError, match="image_inputs is 'tiles'"):
        ImageTextToText("tiny-llava", image_inputs="tiles")
