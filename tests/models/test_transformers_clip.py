"""CLIPModel and SiglipModel of transformers become models of open_clip with the same embeddings."""

import json

import open_clip
import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from mmcl.core import Batch, Prompts
from mmcl.export import write_clip
from mmcl.models import OpenCLIP
from mmcl.models.open_clip.transformers_models import preprocess_settings

pytestmark = pytest.mark.filterwarnings("ignore:.*vocabulary:UserWarning")
TOWER = {"hidden_size": 64, "intermediate_size": 150, "num_hidden_layers": 2}
TOWER |= {"num_attention_heads": 4}
VISION = {**TOWER, "image_size": 32, "patch_size": 16}


def perturbed(model):
    """The model with random biases and norms too, which are constant at the start."""
    torch.manual_seed(5)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def clip_model(text=(), vision=(), **rest):
    texts = {**TOWER, "vocab_size": 49408, **dict(text)}
    config = CLIPConfig(
        text_config=texts, vision_config={**VISION, **dict(vision)}, projection_dim=32, **rest
    )
    return perturbed(CLIPModel(config))


def siglip_model(text=(), vision=()):
    texts = {**TOWER, "vocab_size": 90, "bos_token_id": 1, "eos_token_id": 1, **dict(text)}
    texts |= {"max_position_embeddings": 16}
    config = SiglipConfig(text_config=texts, vision_config={**VISION, **dict(vision)})
    return perturbed(SiglipModel(config))


def saved(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def embeddings(model, pixels, ids):
    """Image and text embeddings of transformers' own model."""
    with torch.no_grad():
        image = model.get_image_features(pixel_values=pixels)
        text = model.get_text_features(input_ids=ids)
    return [getattr(each, "pooler_output", each) for each in (image, text)]


def token_ids(model, end):
    """Random texts of several lengths, padded with 0 behind their end."""
    length = model.config.text_config.max_position_embeddings
    ids = torch.randint(2, 50, (4, length), generator=torch.Generator().manual_seed(2))
    for row in range(4):
        ids[row, 3 + row] = end
        ids[row, 4 + row :] = 0
    return ids


def expect_same_embeddings(loaded, model, ids):
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    image, text = embeddings(model, pixels, ids)
    with torch.no_grad():
        torch.testing.assert_close(loaded.clip.encode_image(pixels), image, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(loaded.clip.encode_text(ids), text, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded.clip.logit_scale, model.logit_scale.reshape(()))


@pytest.mark.parametrize(
    ("text", "vision", "end"),
    [
        ({}, {}, 49407),
        ({"eos_token_id": 2}, {}, 49407),  # as configurations before 2023 have it
        ({"hidden_act": "gelu"}, {"hidden_act": "gelu"}, 49407),
        ({"layer_norm_eps": 1e-3}, {"layer_norm_eps": 1e-2}, 49407),
        ({"hidden_act": "gelu_new"}, {"hidden_act": "gelu_pytorch_tanh"}, 49407),
        ({"vocab_size": 60, "eos_token_id": 7, "bos_token_id": 1}, {}, 7),  # not the largest token
        ({"intermediate_size": 77, "max_position_embeddings": 20}, {"patch_size": 8}, 49407),
    ],
)
def test_a_clip_model_has_the_embeddings_of_transformers(tmp_path, text, vision, end):
    model = clip_model(text, vision)
    loaded = OpenCLIP(str(saved(model, tmp_path / "clip"))).eval()
    expect_same_embeddings(loaded, model, token_ids(model, end))


@pytest.mark.parametrize("act", ["gelu_pytorch_tanh", "gelu"])
def test_a_siglip_model_has_the_embeddings_of_transformers(tmp_path, act):
    model = siglip_model({"hidden_act": act}, {"hidden_act": act})
    loaded = OpenCLIP(str(saved(model, tmp_path / "siglip"))).eval()
    expect_same_embeddings(loaded, model, token_ids(model, 1))
    torch.testing.assert_close(loaded.clip.logit_bias, model.logit_bias.reshape(()))
    assert loaded.clip.logit_bias is not None


@pytest.mark.parametrize("form", ["shards", "bin", "wrapped", "half"])
def test_a_folder_of_transformers_in_any_form_of_file_is_loaded(tmp_path, form):
    model, folder = clip_model(), tmp_path / "clip"
    saved(model.half() if form == "half" else model, folder, max_shard_size="100KB")
    if form != "shards":
        for file in folder.glob("model*"):
            file.unlink()
        state = model.state_dict()
        if form == "wrapped":  # a Trainer's model that was compiled
            state = {f"_orig_mod.{name}": value for name, value in state.items()}
        torch.save(state, folder / "pytorch_model.bin")
    else:
        assert len(list(folder.glob("model-*.safetensors"))) > 1
    loaded = OpenCLIP(str(folder)).eval()
    expect_same_embeddings(loaded, model.float(), token_ids(model, 49407))


def test_a_file_of_transformers_loads_into_an_architecture_of_open_clip(tmp_path):
    model = clip_model()
    folder = saved(model, tmp_path / "clip")
    architecture = {
        "embed_dim": 32, "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 16,
                       "patch_size": 16, "mlp_ratio": 150.5 / 64},
        "text_cfg": {"width": 64, "heads": 4, "layers": 2, "mlp_ratio": 150.5 / 64},
    }  # fmt: skip
    (tmp_path / "mine.json").write_text(json.dumps(architecture))
    loaded = OpenCLIP(str(tmp_path / "mine.json"), pretrained=str(folder)).eval()
    expect_same_embeddings(loaded, model, token_ids(model, 49407))


def test_other_weights_for_a_folder_of_transformers_are_those_given(tmp_path):
    folder = saved(clip_model(), tmp_path / "clip")
    other = clip_model()
    other.logit_scale.data += 1
    torch.save({"state_dict": other.state_dict()}, tmp_path / "tuned.pt")
    loaded = OpenCLIP(str(folder), pretrained=str(tmp_path / "tuned.pt")).eval()
    expect_same_embeddings(loaded, other, token_ids(other, 49407))


def test_prompts_enter_both_towers_of_a_clip_model(tmp_path):
    loaded = OpenCLIP(str(saved(clip_model(), tmp_path / "clip"))).eval()
    assert loaded.prompt_dims == {"image": 64, "text": 64}
    batch = Batch.from_images(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))
    loaded.set_classes(["owl", "jay"], ["a photo of a {}."])
    plain = loaded(batch).logits
    prompts = Prompts(tokens={("image", 0): torch.randn(2, 1, 64)})
    assert not torch.allclose(loaded(batch, prompts).logits, plain)


def test_scores_of_classes_equal_transformers_own(tmp_path):
    model, folder = clip_model(), tmp_path / "clip"
    saved(model, folder)
    loaded = OpenCLIP(str(folder)).eval()
    loaded.set_classes(["owl", "jay"], ["a photo of a {}."])
    levels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        scores = loaded(Batch.from_images(levels, torch.zeros(3, dtype=torch.int64))).logits
        processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
        pixels = processor(list(levels), return_tensors="pt")["pixel_values"]
        ids = open_clip.SimpleTokenizer()(["a photo of a owl.", "a photo of a jay."])
        expected = model(input_ids=ids, pixel_values=pixels).logits_per_image
    torch.testing.assert_close(scores, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("clip", {}),
        ("clip", {"resample": 2, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}),
        ("clip", {"do_rescale": False, "image_mean": [100, 110, 120], "image_std": [50, 60, 70]}),
        ("clip", {"do_normalize": False}),
        ("clip", {"rescale_factor": 1 / 127.5}),
        ("siglip", {}),
        ("siglip", {"resample": 2}),
    ],
)
def test_pixels_equal_those_of_the_folders_processor(tmp_path, kind, settings):
    is_clip = kind == "clip"
    folder = saved(clip_model() if is_clip else siglip_model(), tmp_path / kind)
    if is_clip:
        sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        processor = CLIPImageProcessor(**sizes, **settings)
    else:
        processor = SiglipImageProcessor(size={"height": 32, "width": 32}, **settings)
    processor.save_pretrained(folder)
    model = OpenCLIP(str(folder))
    # A smooth image: interpolation differs by rounding to levels of 255.
    ramp = torch.linspace(0, 255, 80)
    image = torch.stack([ramp[:, None].expand(80, 80), ramp[None].expand(80, 80)] * 2)[:3].byte()
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    ours = model.transform(False)(image, None, 0).image
    ours = (ours - model._mean) / model._std
    levels = (ours - theirs).abs() * model._std
    assert levels.max() <= 2
    assert levels.mean() <= 0.5


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"do_resize": False}, "do_resize false"),
        ({"do_center_crop": False}, "a center crop of that size"),
        ({"size": {"shortest_edge": 40}}, r"size \{'shortest_edge': 40\} with crop \(32, 32\)"),
        ({"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}},
         r"images of \(64, 64\).*\(32, 32\), the size of the model"),
        ({"resample": 0}, r"resample 0.*2 \(bilinear\) or 3"),
    ],
)  # fmt: skip
def test_preprocessing_that_open_clip_has_not_is_refused_by_name(tmp_path, settings, reason):
    folder = saved(clip_model(), tmp_path / "clip")
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    content = {**sizes, "image_processor_type": "CLIPImageProcessor", **settings}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=reason):
        preprocess_settings(folder)


def test_a_processor_within_a_processor_config_is_read(tmp_path):
    folder = saved(clip_model(), tmp_path / "clip")
    content = {"image_processor": {"image_mean": [0.1, 0.2, 0.3]}}
    (folder / "processor_config.json").write_text(json.dumps(content))
    assert preprocess_settings(folder)["mean"] == pytest.approx((0.1, 0.2, 0.3))


def test_clips_vocabulary_without_tokenizer_files_is_clips_bpe(tmp_path):
    loaded = OpenCLIP(str(saved(clip_model(), tmp_path / "clip")))
    text = ["A photo of an owl!", "two  jays"]
    assert torch.equal(loaded.tokenizer(text), open_clip.SimpleTokenizer()(text))


def own_vocabulary(folder):
    """A tokenizer of 40 tokens, saved as transformers' CLIPTokenizer is."""
    letters = list("abcdefghijklmnopqrstuvwxyz")
    tokens = ["<pad>", *letters, *(f"{each}</w>" for each in letters[:8])]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer({token: index for index, token in enumerate(tokens)}, [])
    tokenizer.save_pretrained(folder)
    return tokenizer, len(tokens)


def test_the_folders_own_tokenizer_is_used_and_finds_the_end(tmp_path):
    folder = tmp_path / "clip"
    tokenizer, size = own_vocabulary(folder)
    ends = {"eos_token_id": size - 1, "bos_token_id": size - 2, "max_position_embeddings": 12}
    model = clip_model({"vocab_size": size, **ends})
    saved(model, folder)
    loaded = OpenCLIP(str(folder)).eval()
    texts = ["ab cab", "d"]
    ids = tokenizer(texts, padding="max_length", max_length=12, return_tensors="pt").input_ids
    _, expected = embeddings(model, torch.zeros(1, 3, 32, 32), ids)
    unit = loaded.embed(Batch.from_texts(texts, tokenizer=loaded.tokenizer), "text")
    torch.testing.assert_close(unit, torch.nn.functional.normalize(expected, dim=-1))


def test_a_vocabulary_without_files_is_an_error_where_a_text_is_needed(tmp_path):
    loaded = OpenCLIP(str(saved(siglip_model(), tmp_path / "siglip")))
    with pytest.raises(FileNotFoundError, match=r"siglip has no tokenizer.*save_pretrained"):
        loaded.set_classes(["owl"], ["{}"])


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("chinese_clip", "Chinese-CLIP in transformers itself"),
        ("altclip", "xlm-roberta-base-ViT-B-32"),
        ("siglip2", "fixed resolution"),
        ("clip_vision_model", "has no text tower"),
        ("llava", "ImageTextToText"),
    ],
)
def test_another_model_of_transformers_is_refused_by_its_type(tmp_path, kind, way):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ValueError, match=rf"type '{kind}', and OpenCLIP loads 'clip'.*{way}"):
        OpenCLIP(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "vision", "reason"),
    [
        ({"hidden_act": "relu"}, {"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"hidden_act": "gelu"}, {}, "hidden_act quick_gelu and gelu"),
        ({}, {"num_channels": 1}, "num_channels 1"),
    ],
)
def test_a_configuration_that_open_clip_has_not_is_refused(tmp_path, text, vision, reason):
    folder = saved(clip_model(text, vision), tmp_path / "clip")
    with pytest.raises(ValueError, match=rf"{reason}, which open_clip cannot express"):
        OpenCLIP(str(folder))


def module_of(model):
    return type("Module", (), {"model": model, "strategy": None})()


@pytest.mark.parametrize("own_tokenizer", [False, True])
def test_an_export_of_a_clip_model_is_loaded_by_open_clip(tmp_path, monkeypatch, own_tokenizer):
    monkeypatch.setattr("mmcl.export.formats.strategies_of", lambda _: [])
    folder, text = tmp_path / "clip", {}
    if own_tokenizer:
        _, size = own_vocabulary(folder)
        text = {"vocab_size": size, "eos_token_id": size - 1, "bos_token_id": size - 2}
    saved(clip_model(text), folder)
    loaded = OpenCLIP(str(folder)).eval()
    write_clip(module_of(loaded), tmp_path / "out", half=False)
    native, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")
    pixels = torch.randn(2, 3, 32, 32)
    ids = tokenizer(["ab", "cab"])
    native.eval()
    with torch.no_grad():
        assert torch.equal(native.encode_image(pixels), loaded.clip.encode_image(pixels))
        assert torch.equal(native.encode_text(ids), loaded.clip.encode_text(ids))
    assert torch.equal(ids, loaded.tokenizer(["ab", "cab"]))


def test_an_export_of_a_siglip_that_open_clip_has_no_name_for_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mmcl.export.formats.strategies_of", lambda _: [])
    loaded = OpenCLIP(str(saved(siglip_model(), tmp_path / "siglip")))
    with pytest.raises(ValueError, match="could not load an export: start from open_clip's own"):
        write_clip(module_of(loaded), tmp_path / "out", half=False)
    assert not (tmp_path / "out").exists()
