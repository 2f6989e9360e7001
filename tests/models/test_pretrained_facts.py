"""Activation and preprocessing are those that the weights were trained with, as open_clip says."""

import json
import warnings

import open_clip
import pytest
import torch
from open_clip import factory, pretrained
from open_clip.transformer import QuickGELU
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel

from mmcl.core import Batch
from mmcl.export import write_clip
from mmcl.lightning.module import ContinualModule
from mmcl.models import OpenCLIP
from mmcl.models.open_clip.pretrained_facts import preprocess_of
from tests.models.small_clip import SMALL, write_small
from tests.models.test_clip_transform import AVERAGE, LARGEST

ROBERTA = ("roberta-ViT-B-32", "laion2b_s12b_b32k")
"""The one tag that does not repeat the QuickGELU of its architecture."""


class Hollow(nn.Module):
    """What is asked of a model that open_clip creates, without its towers."""

    def __init__(self, vision_cfg, quick_gelu=False, init_logit_bias=None, **_):
        super().__init__()
        self.visual = nn.Module()
        size = vision_cfg.get("image_size", 224)
        self.visual.image_size = tuple(size) if isinstance(size, list) else (size, size)
        self.act = QuickGELU() if quick_gelu else nn.GELU()
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.logit_bias = None if init_logit_bias is None else nn.Parameter(torch.zeros(()))


@pytest.fixture
def hollow(monkeypatch):
    """Every name and tag of open_clip is created, without weights and without network."""
    for name in ("CLIP", "CustomTextCLIP", "CoCa"):
        monkeypatch.setattr(factory, name, Hollow)
    monkeypatch.setattr(factory, "download_pretrained", lambda *_, **__: "weights.bin")
    monkeypatch.setattr(factory, "load_checkpoint", lambda *_, **__: None)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda *_, **__: open_clip.tokenize)

    def no_network(*_):
        raise OSError

    monkeypatch.setattr("socket.getaddrinfo", no_network)  # at once


def an_image(height, width):
    """An image with edges, gradients and a little noise."""
    down, right = torch.meshgrid(
        torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij"
    )
    layers = [255 * right, 255 * (down * 9 % 1 > 0.5), 127 + 120 * torch.sin(40 * down * right)]
    noise = torch.randint(0, 12, (3, height, width), generator=torch.Generator().manual_seed(5))
    return (torch.stack(layers) + noise).clamp(0, 255).to(torch.uint8)


IMAGES = (an_image(240, 331), an_image(401, 222))


def expect_open_clips_preprocessing(model, theirs):
    for pixels in IMAGES:
        ours = model.transform(False)(pixels, None, 0).image[None]
        normalized = model._pixels(Batch.from_images(ours))[0]
        wanted = theirs(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
        assert normalized.shape == wanted.shape
        levels = (normalized - wanted).abs() * model._std  # of 255
        assert levels.max() <= LARGEST + 1e-2
        assert levels.mean() <= AVERAGE


def test_every_tag_of_open_clip_has_open_clips_preprocessing(hollow):
    compared = set()
    for name, tag in open_clip.list_pretrained():
        model = OpenCLIP(name, pretrained=tag)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the activation
            _, _, theirs = open_clip.create_model_and_transforms(name, pretrained=tag)
        # 200 tags share 25 pairs of configurations, each compared once on pixels.
        own = model.transform(False)
        key = (model.size, own.interpolation, own.resize_mode, own.fill_color, str(theirs))
        key += (tuple(model._mean.flatten().tolist()), tuple(model._std.flatten().tolist()))
        if key not in compared:
            expect_open_clips_preprocessing(model, theirs)
            compared.add(key)
    assert 20 <= len(compared) < 60


def test_every_tag_of_open_clip_has_the_activation_that_it_was_trained_with(hollow):
    for name, tag in open_clip.list_pretrained():
        trained_with = bool(pretrained.get_pretrained_cfg(name, tag).get("quick_gelu"))
        model = OpenCLIP(name, pretrained=tag)
        is_quick = isinstance(model.clip.act, QuickGELU)
        assert is_quick == (trained_with or (name, tag) == ROBERTA), (name, tag)


def test_a_name_of_quickgelu_with_a_tag_that_has_none_gets_the_tags_activation(hollow):
    for name, tag in open_clip.list_pretrained():
        quick = f"{name}-quickgelu"
        if quick not in open_clip.list_models():
            continue
        trained_with = bool(pretrained.get_pretrained_cfg(name, tag).get("quick_gelu"))
        model = OpenCLIP(quick, pretrained=tag)
        assert isinstance(model.clip.act, QuickGELU) == trained_with, (quick, tag)


@pytest.mark.parametrize(("tag", "quick_gelu"), [("openai", False), ("laion2b_s34b_b79k", True)])
def test_an_activation_that_contradicts_the_tag_is_refused(hollow, tag, quick_gelu):
    with pytest.raises(
        ValueError, match=rf"quick_gelu is {quick_gelu} .*'{tag}'.*leave quick_gelu"
    ):
        OpenCLIP("ViT-B-32", pretrained=tag, quick_gelu=quick_gelu)
    OpenCLIP("ViT-B-32", pretrained=tag, quick_gelu=not quick_gelu)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ViT-B-16-SigLIP", ("squash", "bicubic", 0.5)),
        ("ViT-bigG-14-CLIPA", ("squash", "bilinear", 0.485)),
        ("MobileCLIP-B", ("shortest", "bilinear", 0.0)),
        ("ViT-B-32-256", ("shortest", "bicubic", 0.48145466)),
    ],
)
def test_a_file_gets_the_preprocessing_on_which_all_tags_of_its_name_agree(
    hollow, monkeypatch, tmp_path, name, expected
):
    file = tmp_path / "weights.safetensors"
    file.touch()
    monkeypatch.setattr("mmcl.models.open_clip.loading.load_weights", lambda *_: None)
    found = preprocess_of(OpenCLIP(name, pretrained=str(file)).clip)
    assert (found.resize_mode, found.interpolation, found.mean[0]) == expected


def test_a_file_of_a_name_whose_tags_differ_warns_of_what_it_does_not_tell(
    hollow, monkeypatch, tmp_path
):
    file = str(tmp_path / "weights.pt")
    torch.save({}, file)
    monkeypatch.setattr("mmcl.models.open_clip.loading.load_weights", lambda *_: None)
    with pytest.warns(UserWarning, match=r"weights\.pt does not tell .*quick_gelu \(now false\)"):
        model = OpenCLIP("ViT-B-32", pretrained=file)
    assert not isinstance(model.clip.act, QuickGELU)
    with pytest.warns(UserWarning, match=r"preprocess\.mean"):  # one tag of it has 0.5
        OpenCLIP("ViT-L-14", pretrained=file, quick_gelu=False)
    OpenCLIP("ViT-L-14", pretrained=file, quick_gelu=True)  # and none of those of QuickGELU
    for quick in (False, True):
        model = OpenCLIP("ViT-B-32", pretrained=file, quick_gelu=quick)
        assert isinstance(model.clip.act, QuickGELU) == quick
    OpenCLIP("ViT-L-14", pretrained=file, quick_gelu=False, preprocess={})


GIVEN = {
    "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "interpolation": "bilinear",
    "resize_mode": "longest", "fill_color": 7,
}  # fmt: skip


@pytest.mark.parametrize("name", ["tiny", "small.json", "folder"])
def test_preprocessing_that_the_user_gives_is_obeyed(tmp_path, name):
    if name == "small.json":
        name = str(write_small(tmp_path))
    elif name == "folder":
        write_clip(
            ContinualModule(OpenCLIP(str(write_small(tmp_path)))), tmp_path / "f", half=False
        )
        name = str(tmp_path / "f")
    model = OpenCLIP(name, preprocess=GIVEN)
    theirs = open_clip.image_transform(
        model.size, False, mean=tuple(GIVEN["mean"]), std=tuple(GIVEN["std"]),
        resize_mode="longest", interpolation="bilinear", fill_color=7,
    )  # fmt: skip
    expect_open_clips_preprocessing(model, theirs)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": 224}, r"'size', expected mean, std.*size is that of the architecture"),
        ({"resize_mode": "crop"}, "resize_mode 'crop': choose shortest, longest, squash"),
        ({"interpolation": "nearest"}, "interpolation 'nearest': choose bicubic"),
        ({"mean": [0.5, 0.5]}, r"mean \[0\.5, 0\.5\]: give three numbers"),
        ({"std": [0.5, 0.5, 0]}, "std .*: give three positive numbers"),
        ({"fill_color": 256}, "fill_color 256: give a level from 0 to 255"),
    ],
)
def test_preprocessing_that_no_one_knows_is_refused_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        OpenCLIP("tiny", preprocess=given)


def test_the_built_in_weights_have_facts_of_their_own():
    for given in ({"quick_gelu": True}, {"preprocess": {"mean": [0, 0, 0]}}):
        with pytest.raises(ValueError, match="leave quick_gelu and preprocess out"):
            OpenCLIP("tiny", "built-in", **given)
    assert OpenCLIP("tiny", quick_gelu=True).fingerprint() != OpenCLIP("tiny").fingerprint()


def write_folder(folder, **preprocess_cfg):
    folder.mkdir()
    config = {"model_cfg": SMALL, "preprocess_cfg": preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    native = open_clip.model.CLIP(**SMALL)
    state = {name: value.contiguous() for name, value in native.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return str(folder)


FACTS = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "resize_mode": "squash"}


@pytest.mark.parametrize(
    "facts",
    [
        {}, FACTS, {"resize_mode": "longest", "fill_color": 9}, {"mean": None, "std": None},
        {"interpolation": "random"}, {"size": [224, 224]}, {"mean": 0.5, "std": 0.5},
    ],
)  # fmt: skip
def test_a_folders_preprocessing_is_open_clips_own(tmp_path, facts):
    folder = write_folder(tmp_path / "model", **facts)
    _, _, theirs = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    expect_open_clips_preprocessing(OpenCLIP(folder), theirs)


def test_a_folder_with_an_unknown_fact_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="resize_mode 'pad': choose"):
        OpenCLIP(write_folder(tmp_path / "model", resize_mode="pad"))


def test_images_that_are_not_square_are_trained_and_evaluated(tmp_path):
    config = {**SMALL, "vision_cfg": {**SMALL["vision_cfg"], "image_size": [32, 64]}}
    (tmp_path / "wide.json").write_text(json.dumps(config))
    model = OpenCLIP(str(tmp_path / "wide.json"))
    assert model.size == (32, 64)
    _, _, theirs = open_clip.create_model_and_transforms("wide")
    expect_open_clips_preprocessing(model, theirs)
    model.set_classes(["a", "b"], ["{}"])
    for train in (False, True):
        image = model.transform(train)(IMAGES[1], None, 0).image[None]
        assert model(Batch.from_images(image, [1])).logits.shape == (1, 2)
    with pytest.raises(ValueError, match="64 x 32, this model takes 32 x 64"):
        model(Batch.from_images(torch.zeros(1, 3, 64, 32, dtype=torch.uint8)))


@pytest.fixture
def small_tag(monkeypatch, tmp_path):
    """A small architecture whose tag was trained with QuickGELU, and SigLIP's preprocessing."""
    torch.manual_seed(4)
    native = open_clip.model.CLIP(**SMALL, quick_gelu=True).eval()
    file = tmp_path / "weights.safetensors"
    save_file({name: value.contiguous() for name, value in native.state_dict().items()}, file)
    monkeypatch.setitem(factory._MODEL_CONFIGS, "ViT-Small", SMALL)
    tag = {"file": str(file), "quick_gelu": True, **FACTS}
    monkeypatch.setitem(pretrained._PRETRAINED, "ViT-Small", {"openai": tag})
    return native, file


@pytest.mark.parametrize("given", ["folder", "file"])
def test_weights_of_a_folder_bring_the_facts_that_it_states(small_tag, tmp_path, given):
    native, _ = small_tag
    model = OpenCLIP("ViT-Small", pretrained="openai")
    folder = tmp_path / "exported"
    write_clip(ContinualModule(model), folder, half=False)
    weights = folder if given == "folder" else folder / "open_clip_model.safetensors"
    # the architecture by another way, which states nothing
    again = OpenCLIP(str(write_small(tmp_path)), pretrained=str(weights))
    assert again.fingerprint() == model.fingerprint()
    batch = Batch.from_images(IMAGES[0][None, :, :32, :32])
    with torch.no_grad():
        wanted = native.encode_image(again._pixels(batch), normalize=True)
    torch.testing.assert_close(again.eval().embed(batch, "image"), wanted)
    with pytest.raises(ValueError, match="quick_gelu is False and the weights .* with QuickGELU"):
        OpenCLIP(str(write_small(tmp_path)), pretrained=str(weights), quick_gelu=False)
    told = OpenCLIP(str(write_small(tmp_path)), str(weights), preprocess={"mean": [0.1, 0.2, 0.3]})
    assert preprocess_of(told.clip).mean == (0.1, 0.2, 0.3)
    assert preprocess_of(told.clip).resize_mode == "squash"


def test_a_folder_of_transformers_states_its_facts_and_the_users_preprocessing_is_obeyed(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "projection_dim": 24}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": 49408},
        vision_config={**sizes, "image_size": 32, "patch_size": 16}, projection_dim=24,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(tmp_path / "hf")
    model = OpenCLIP(str(tmp_path / "hf"))
    assert any(isinstance(module, QuickGELU) for module in model.clip.modules())
    told = OpenCLIP(str(tmp_path / "hf"), preprocess={"resize_mode": "squash"})
    assert told.transform(False).resize_mode == "squash"
    assert told.transform(False).interpolation == model.transform(False).interpolation
    with pytest.raises(ValueError, match="quick_gelu is False"):
        OpenCLIP(str(tmp_path / "hf"), quick_gelu=False)


def test_weights_of_a_tag_give_the_embeddings_that_they_were_trained_for(small_tag, tmp_path):
    native, file = small_tag
    model = OpenCLIP("ViT-Small", pretrained="openai").eval()
    batch = Batch.from_images(torch.stack([IMAGES[0][:, :32, :32], IMAGES[0][:, 40:72, 50:82]]))
    with torch.no_grad():
        wanted = native.encode_image(model._pixels(batch), normalize=True)
        torch.testing.assert_close(model.embed(batch, "image"), wanted)
        # the file alone does not tell: the user does
        told = OpenCLIP("ViT-Small", str(file), quick_gelu=True, preprocess={}).eval()
        torch.testing.assert_close(told.embed(batch, "image"), wanted)
        other = OpenCLIP("ViT-Small", str(file), quick_gelu=False, preprocess={}).eval()
        assert (other.embed(batch, "image") - wanted).abs().max() > 1e-4
    assert told.fingerprint() != other.fingerprint()


def test_an_exported_folder_has_the_facts_of_the_weights(small_tag, tmp_path):
    model = OpenCLIP("ViT-Small", pretrained="openai")
    write_clip(ContinualModule(model), tmp_path / "out", half=False)
    again = OpenCLIP(str(tmp_path / "out"))
    assert again.fingerprint() == model.fingerprint()
    clip, _, theirs = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    assert any(isinstance(module, QuickGELU) for module in clip.modules())
    expect_open_clips_preprocessing(again, theirs)
    assert again.transform(False).resize_mode == "squash"


def test_an_exported_file_says_which_facts_it_does_not_hold(small_tag, tmp_path):
    report = write_clip(
        ContinualModule(OpenCLIP("ViT-Small", "openai")), tmp_path / "out.safetensors", half=False
    )
    assert f"preprocess={FACTS}" in report
    assert json.loads((tmp_path / "out.json").read_text())["quick_gelu"] is True
    plain = OpenCLIP(str(write_small(tmp_path)))
    assert "preprocess" not in write_clip(
        ContinualModule(plain), tmp_path / "plain.safetensors", half=False
    )


def test_an_activation_without_effect_is_refused(tmp_path):
    class Foreign(Hollow):
        def __init__(self, quick_gelu=False, **options):
            super().__init__(quick_gelu=False, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "CLIP", Foreign)
        with pytest.raises(ValueError, match="quick_gelu is True and has no effect"):
            OpenCLIP(str(write_small(tmp_path)), quick_gelu=True)


@pytest.mark.parametrize(
    "change",
    [{"resize_mode": "squash"}, {"interpolation": "bilinear"}, {"fill_color": 3}, {"mean": 0.5}],
)
def test_the_fingerprint_is_of_the_preprocessing_too(tmp_path, change):
    config = str(write_small(tmp_path))
    assert OpenCLIP(config, preprocess=change).fingerprint() != OpenCLIP(config).fingerprint()
