"""What model and pretrained name is found, or the sentence says what is missing."""

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from mmcl.export import write_clip
from mmcl.models import OpenCLIP
from mmcl.models.open_clip.pretrained_facts import preprocess_of, uses_quick_gelu
from tests.models.small_clip import SMALL, write_small
from tests.models.test_clip_loading import same_weights
from tests.models.test_transformers_clip import clip_model, expect_same_embeddings, token_ids


@pytest.fixture
def native():
    torch.manual_seed(3)
    return open_clip.model.CLIP(**SMALL)


def state_of(model):
    return {name: value.detach().contiguous() for name, value in model.state_dict().items()}


def open_clip_folder(folder, native, weights="open_clip_model.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": SMALL, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save = save_file if weights.endswith(".safetensors") else torch.save
    save(state_of(native), folder / weights)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub; returns the snapshot folder of a repository."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def snapshot(name):
        folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        commit = "0" * 40
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(commit)
        found = folder / "snapshots" / commit
        found.mkdir(parents=True)
        return found

    return snapshot


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_a_folder_of_open_clip_is_loaded_with_its_own_weights(tmp_path, native, prefix):
    folder = open_clip_folder(tmp_path / "m", native)
    model = OpenCLIP(f"{prefix}{folder}")
    assert same_weights(model, native)
    assert model._mean.flatten().tolist() == pytest.approx([25.5, 51.0, 76.5])


def test_a_folder_holds_weights_under_any_name_and_form(tmp_path, native):
    folder = open_clip_folder(tmp_path / "m", native, "tuned.ckpt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state_of(native).items()}},
               folder / "tuned.ckpt")  # fmt: skip
    assert same_weights(OpenCLIP(str(folder)), native)


def test_pretrained_takes_the_place_of_a_folders_weights(tmp_path, native):
    folder = open_clip_folder(tmp_path / "m", native)
    other = open_clip.model.CLIP(**SMALL)
    torch.save(other.state_dict(), tmp_path / "tuned.pt")
    assert same_weights(OpenCLIP(str(folder), pretrained=str(tmp_path / "tuned.pt")), other)
    twin = open_clip_folder(tmp_path / "twin", other)
    for given in (str(twin), f"local-dir:{twin}"):
        assert same_weights(OpenCLIP(str(folder), pretrained=given), other)


def test_a_folder_without_weights_is_not_silently_random(tmp_path, native):
    folder = open_clip_folder(tmp_path / "m", native)
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"folder .*m has no weights.*open_clip_model"):
        OpenCLIP(str(folder))


def test_a_tag_with_a_folder_is_refused(tmp_path, native):
    folder = open_clip_folder(tmp_path / "m", native)
    with pytest.raises(ValueError, match=r"pretrained is 'openai' and the model is the folder"):
        OpenCLIP(str(folder), pretrained="openai")


def test_the_home_directory_is_expanded(tmp_path, native, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    open_clip_folder(tmp_path / "m", native)
    write_small(tmp_path)
    assert same_weights(OpenCLIP("~/m"), native)
    assert same_weights(OpenCLIP("local-dir:~/m"), native)
    weights = "~/m/open_clip_model.safetensors"
    assert same_weights(OpenCLIP("~/small-clip.json", pretrained=weights), native)
    assert same_weights(OpenCLIP("~/small-clip.json", pretrained="~/m"), native)


@pytest.mark.parametrize("name", ["owner/clip", "hf-hub:owner/clip"])
def test_a_repository_of_transformers_is_loaded_from_the_cache(cache, name):
    model = clip_model()
    model.save_pretrained(cache("owner/clip"))
    loaded = OpenCLIP(name).eval()
    expect_same_embeddings(loaded, model, token_ids(model, 49407))


@pytest.mark.parametrize("name", ["owner/clip", "hf-hub:owner/clip"])
def test_a_repository_of_open_clip_is_loaded_from_the_cache(cache, native, name):
    open_clip_folder(cache("owner/clip"), native)
    model = OpenCLIP(name)
    assert same_weights(model, native)
    assert model._mean.flatten().tolist() == pytest.approx([25.5, 51.0, 76.5])


@pytest.mark.parametrize("given", ["owner/clip", "hf-hub:owner/clip"])
def test_weights_of_a_repository_are_loaded_into_an_architecture(cache, native, tmp_path, given):
    open_clip_folder(cache("owner/clip"), native)
    assert same_weights(OpenCLIP(str(write_small(tmp_path)), pretrained=given), native)


def test_a_repository_in_shards_is_loaded_from_the_cache(cache):
    model = clip_model()
    model.save_pretrained(cache("owner/clip"), max_shard_size="100KB")
    loaded = OpenCLIP("owner/clip").eval()
    expect_same_embeddings(loaded, model, token_ids(model, 49407))


@pytest.mark.parametrize("name", ["owner/none", "hf-hub:owner/none"])
def test_a_repository_out_of_reach_is_one_sentence(cache, name):
    with pytest.raises(
        RuntimeError, match=r"cannot get owner/none from the hub.*local f"
    ) as caught:
        OpenCLIP(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "model",
    ["C:\\models\\clip", "C:/models/clip", "models\\clip", "./clip", "/no/clip", "~/no/clip",
     "a/b/c", "clips/", "local-dir:/no/clip", "../ViT-B-32"],
)  # fmt: skip
def test_a_path_that_does_not_exist_is_named(model):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        OpenCLIP(model)


@pytest.mark.parametrize(
    "pretrained",
    ["C:\\w.pt", "C:/w/epoch_1", "weights\\w", "./w", "/no/w", "~/no/w", "a/b/c", "w/", "w.ckpt",
     "local-dir:/no/w", "w.bin"],
)  # fmt: skip
def test_weights_that_do_not_exist_are_named(pretrained):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        OpenCLIP("ViT-B-32", pretrained=pretrained)


def test_openais_own_names_are_those_of_open_clip():
    with pytest.raises(
        ValueError, match=r"ViT-B-32 has no weights 'opanai': did you mean 'openai'"
    ):
        OpenCLIP("ViT-B/32", pretrained="opanai")


def test_a_folder_named_as_a_tag_does_not_hide_the_tag(tmp_path, monkeypatch):
    (tmp_path / "openai").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="cannot get ViT-B-32 with weights 'openai'"):
        OpenCLIP("ViT-B-32", pretrained="openai")
    with pytest.raises(FileNotFoundError, match="the folder openai has no weights"):
        OpenCLIP("ViT-B-32", pretrained="./openai")


def test_addresses_are_refused_with_the_way():
    with pytest.raises(ValueError, match="model is the address https.*download it"):
        OpenCLIP("https://huggingface.co/openai/clip-vit-base-patch32")
    with pytest.raises(ValueError, match="pretrained is the address https.*give the file"):
        OpenCLIP("ViT-B-32", pretrained="https://a.b/ViT-B-32.pt")


def test_a_file_of_weights_as_model_names_its_architecture(tmp_path, native):
    torch.save(native.state_dict(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt: give it as pretrained, and the arch.* as model"):
        OpenCLIP(str(tmp_path / "w.pt"))


def test_a_folder_of_weights_alone_is_no_model(tmp_path, native):
    torch.save(native.state_dict(), tmp_path / "w.pt")
    with pytest.raises(FileNotFoundError, match=r"neither open_clip_config\.json nor config\.json"):
        OpenCLIP(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is no JSON"),
        (json.dumps({"embed_dim": 8}), "has no vision_cfg, text_cfg"),
        (json.dumps({"model_cfg": SMALL}), r"configuration of a model folder: give the folder"),
        (json.dumps({"model_type": "clip"}), r"configuration of a model folder: give the folder"),
        ("[]", "has no embed_dim"),
    ],
)
def test_an_architecture_file_that_is_none_says_why(tmp_path, content, reason):
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(ValueError, match=reason):
        OpenCLIP(str(tmp_path / "mine.json"))


def test_a_damaged_config_of_a_folder_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no JSON"):
        OpenCLIP(str(tmp_path))


def test_an_exported_model_has_the_bias_that_came_with_its_weights(tmp_path, native, monkeypatch):
    monkeypatch.setattr("mmcl.export.formats.strategies_of", lambda _: [])
    bias = torch.tensor(-7.0)
    torch.save({**native.state_dict(), "logit_bias": bias}, tmp_path / "w.pt")
    model = OpenCLIP(str(write_small(tmp_path)), pretrained=str(tmp_path / "w.pt"))
    module = type("Module", (), {"model": model, "strategy": None})()
    write_clip(module, tmp_path / "out", half=False)
    exported = open_clip.create_model(f"local-dir:{tmp_path / 'out'}")
    assert exported.logit_bias.item() == -7
    assert same_weights(OpenCLIP(str(tmp_path / "out")), exported)


def test_weights_of_a_folder_bring_their_facts_to_an_architecture(tmp_path, native):
    folder = open_clip_folder(tmp_path / "m", native)
    config = {"model_cfg": {**SMALL, "quick_gelu": True}}
    config["preprocess_cfg"] = {"mean": [0.1, 0.2, 0.3], "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = OpenCLIP(str(write_small(tmp_path)), pretrained=str(folder))
    assert uses_quick_gelu(model.clip)
    found = preprocess_of(model.clip)
    assert (found.resize_mode, found.mean) == ("squash", (0.1, 0.2, 0.3))
    given = {"resize_mode": "longest"}
    model = OpenCLIP(str(write_small(tmp_path)), pretrained=str(folder), preprocess=given)
    found = preprocess_of(model.clip)
    assert (found.resize_mode, found.mean) == ("longest", (0.1, 0.2, 0.3))


def test_an_activation_that_weights_of_a_folder_contradict_is_the_users_choice(tmp_path, native):
    folder = open_clip_folder(tmp_path / "m", native)
    model = OpenCLIP(str(write_small(tmp_path)), pretrained=str(folder), quick_gelu=True)
    assert uses_quick_gelu(model.clip)


def test_a_folder_can_be_moved(tmp_path, native):
    folder = open_clip_folder(tmp_path / "m", native)
    shutil.move(folder, tmp_path / "elsewhere")
    assert same_weights(OpenCLIP(str(Path(tmp_path) / "elsewhere")), native)


def test_an_unknown_name_is_answered_by_the_nearest():
    with pytest.raises(ValueError, match=r"no architecture 'ViT-B-33': did you mean 'ViT-B-32'"):
        OpenCLIP("ViT-B-33")
    with pytest.raises(ValueError, match=r"no weights 'open_ai': did you mean 'openai'\?"):
        OpenCLIP("ViT-B-32", "open_ai")
