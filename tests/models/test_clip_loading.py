import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from mmcl.core import Batch
from mmcl.models import OpenCLIP
from tests.models.small_clip import SMALL, write_small


@pytest.fixture
def made(tmp_path):
    """A random model of the small architecture, its config file and its state."""
    torch.manual_seed(3)
    native = open_clip.model.CLIP(**SMALL)
    return native, write_small(tmp_path), native.state_dict()


def same_weights(model, native):
    own = dict(model.clip.state_dict())
    return all(torch.equal(own[name], value) for name, value in native.state_dict().items())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_checkpoint_file_in_a_real_format_is_loaded(made, tmp_path, suffix):
    native, config, state = made
    file = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, file)
    else:
        # as open_clip's training writes it: wrapped, from a DistributedDataParallel model
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, file)
    assert same_weights(OpenCLIP(str(config), pretrained=str(file)), native)


def test_a_folder_in_the_form_of_the_hub_is_loaded(made, tmp_path):
    native, _, state = made
    folder = tmp_path / "model"
    folder.mkdir()
    mean = [0.5, 0.4, 0.3]
    settings = {"model_cfg": SMALL, "preprocess_cfg": {"mean": mean, "std": [0.2, 0.2, 0.2]}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "open_clip_model.safetensors")
    model = OpenCLIP(str(folder))
    assert same_weights(model, native)
    torch.testing.assert_close(model._mean.flatten(), torch.tensor(mean) * 255)


def test_random_weights_are_a_function_of_the_seed(tmp_path):
    config = str(write_small(tmp_path))
    one, two = OpenCLIP(config, seed=1), OpenCLIP(config, seed=1)
    assert same_weights(one, two.clip)
    assert not same_weights(one, OpenCLIP(config, seed=2).clip)


def test_a_hub_out_of_reach_is_one_sentence_that_names_the_local_file(caplog, capfd):
    with pytest.raises(RuntimeError, match=r"pass a local file as pretrained=") as caught:
        OpenCLIP("ViT-B-32", pretrained="openai")
    assert "\n" not in str(caught.value)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_an_unknown_architecture_is_named():
    with pytest.raises(ValueError, match="no architecture .ViT-Q-99"):
        OpenCLIP("ViT-Q-99")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors"):
        OpenCLIP("tiny", pretrained=str(tmp_path / "nowhere.safetensors"))


def test_a_pickle_that_is_no_checkpoint_is_refused_and_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    file = tmp_path / "evil.pt"
    torch.save({"state_dict": Attack()}, file)
    with pytest.raises(RuntimeError, match="does not load"):
        OpenCLIP("tiny", pretrained=str(file))
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_architecture_are_refused(made, tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file({k: v.contiguous() for k, v in made[2].items()}, file)
    with pytest.raises(RuntimeError, match="does not load into this architecture"):
        OpenCLIP("tiny", pretrained=str(file))


def test_built_in_weights_belong_to_the_tiny_model():
    with pytest.raises(ValueError, match="only 'tiny' ships"):
        OpenCLIP("ViT-B-32", pretrained="built-in")


def test_timm_towers_work_without_prompts(tmp_path):
    vision = {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear"}
    vision["image_size"] = 32
    config = {**SMALL, "vision_cfg": vision}
    file = tmp_path / "timm-clip.json"
    file.write_text(json.dumps(config))
    model = OpenCLIP(str(file)).eval()
    assert "image" not in model.prompt_dims
    model.set_classes(["a", "b"], ["{}"])
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    batch = Batch(images, torch.tensor([0, 1]), torch.zeros(2))
    assert model(batch).logits.shape == (2, 2)
    assert model.embed_dim == 24
