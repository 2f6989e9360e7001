"""Any file of weights is read as tensors, and nothing in it runs."""

import argparse
import collections
import io
import json
import os
import pathlib
import pickle
import random
import zipfile

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from mmcl.models import OpenCLIP
from mmcl.models.open_clip.checkpoint_files import activation_in_file, read_checkpoint
from tests.models.small_clip import SMALL, write_small
from tests.models.test_clip_loading import same_weights

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")


@pytest.fixture
def small(tmp_path):
    """A random model of the small architecture and its config file."""
    torch.manual_seed(3)
    return open_clip.model.CLIP(**SMALL), str(write_small(tmp_path))


class Archive(torch.nn.Module):
    """The members that OpenAI's archives have."""

    def __init__(self, clip, activation=torch.nn.Identity()):  # noqa: B008
        super().__init__()
        for name in ("visual", "transformer", "token_embedding", "ln_final"):
            setattr(self, name, getattr(clip, name))
        for name in ("positional_embedding", "text_projection", "logit_scale"):
            setattr(self, name, getattr(clip, name))
        for name, value in (("input_resolution", 32), ("context_length", 77)):
            self.register_buffer(name, torch.tensor(value))
        self.register_buffer("vocab_size", torch.tensor(49408))
        self.activation = activation

    def forward(self, x):
        return self.activation(self.ln_final(x))


def write_archive(clip, file, activation=None):
    module = Archive(clip, activation or torch.nn.Identity()).eval()
    torch.jit.save(torch.jit.trace(module, torch.zeros(1, 4, 16)), file)
    return file


@pytest.mark.parametrize("half", [False, True])
def test_an_archive_of_openai_is_read_without_torchscript(small, tmp_path, monkeypatch, half):
    native, config = small
    module = Archive(native).eval()
    if half:  # as OpenAI's are
        native.load_state_dict({k: v.half().float() for k, v in native.state_dict().items()})
    traced = torch.jit.trace(module, torch.zeros(1, 4, 16))
    file = tmp_path / "ViT.pt"
    torch.jit.save(traced.half() if half else traced, file)
    monkeypatch.setattr(torch.jit, "load", None)
    model = OpenCLIP(config, pretrained=str(file))
    assert same_weights(model, native)
    assert all(p.dtype == torch.float32 for p in model.clip.parameters())


def test_code_of_a_torchscript_archive_does_not_run(small, tmp_path):
    native, config = small
    good = write_archive(native, tmp_path / "good.pt")
    evil = tmp_path / "evil.pt"
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(evil, "w") as target:
        for record in source.infolist():
            content = source.read(record)
            if record.filename.endswith(".py"):
                content = b"this is no code: torch.jit.load would fail here"
            target.writestr(record.filename, content)
    with pytest.raises(RuntimeError):
        torch.jit.load(str(evil))
    assert same_weights(OpenCLIP(config, pretrained=str(evil)), native)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (open_clip.transformer.QuickGELU(), True),
        (torch.nn.GELU(), False),
        (None, True),  # OpenAI's form without the blocks' code
    ],
)
def test_an_archive_tells_its_activation(small, tmp_path, activation, expected):
    file = write_archive(small[0], tmp_path / "ViT.pt", activation)
    assert activation_in_file(file) is expected
    model = OpenCLIP(small[1], pretrained=str(file))
    kinds = {type(block.mlp.gelu).__name__ for block in model.clip.transformer.resblocks}
    assert kinds == {"QuickGELU" if expected else "GELU"}


def test_a_plain_file_does_not_tell_its_activation(small, tmp_path):
    torch.save(small[0].state_dict(), tmp_path / "w.pt")
    assert activation_in_file(tmp_path / "w.pt") is None


def training_state(weights):
    """What training scripts save beside weights."""
    return {
        "epoch": np.int64(3),
        "best_acc": np.float64(0.5),
        "best_loss": np.float32(0.25),
        "args": argparse.Namespace(lr=1e-3, folder=pathlib.Path("logs")),
        "numpy_rng": np.random.RandomState(0).get_state(),
        "python_rng": random.Random(0).getstate(),
        "history": collections.defaultdict(list, {"loss": [1.0, np.float32(2.0)]}),
        "dtype": np.dtype("float32"),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2, 2)}}, "param_groups": [{"lr": 1}]},
        "scaler": {"scale": 65536.0},
        "state_dict": weights,
    }


@pytest.mark.parametrize("new_form", [True, False])
def test_numpy_scalars_arguments_and_optimizers_beside_weights_are_no_obstacle(
    small, tmp_path, new_form
):
    native, config = small
    file = tmp_path / "epoch_3.pt"
    content = training_state(native.state_dict())
    torch.save(content, file, _use_new_zipfile_serialization=new_form)
    assert same_weights(OpenCLIP(config, pretrained=str(file)), native)


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("new_form", [True, False])
@pytest.mark.parametrize("place", ["args", "state_dict", "model"])
def test_a_class_that_would_run_is_refused_by_its_name(small, tmp_path, new_form, place):
    marker = tmp_path / "ran"
    content = {"state_dict": small[0].state_dict(), place: Attack(marker)}
    torch.save(content, tmp_path / "evil.pt", _use_new_zipfile_serialization=new_form)
    with pytest.raises(RuntimeError, match=r"posix\.system.*never run.*state_dict.*safetensors"):
        OpenCLIP(small[1], pretrained=str(tmp_path / "evil.pt"))
    assert not marker.exists()


def test_a_bare_pickle_is_refused_and_not_run(small, tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Attack(marker)))
    with pytest.raises(RuntimeError, match=r"evil\.pkl"):
        OpenCLIP(small[1], pretrained=str(tmp_path / "evil.pkl"))
    assert not marker.exists()


def test_a_torchscript_archive_with_an_attack_in_its_pickle_is_refused(small, tmp_path):
    marker = tmp_path / "ran"
    good = write_archive(small[0], tmp_path / "good.pt")
    evil = tmp_path / "evil.pt"
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(evil, "w") as target:
        for record in source.infolist():
            is_pickle = record.filename.endswith("data.pkl")
            attack = pickle.dumps(Attack(marker), protocol=2)
            target.writestr(record.filename, attack if is_pickle else source.read(record))
    with pytest.raises(RuntimeError, match=r"posix\.system"):
        OpenCLIP(small[1], pretrained=str(evil))
    assert not marker.exists()


def test_a_whole_pickled_model_names_its_class(small, tmp_path):
    torch.save(small[0], tmp_path / "model.pt")
    with pytest.raises(RuntimeError, match=r"open_clip\.model\.CLIP.*save its state_dict alone"):
        OpenCLIP(small[1], pretrained=str(tmp_path / "model.pt"))


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    file = tmp_path / "bomb.pt"
    torch.save({"weight": torch.zeros(4)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as source,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for record in source.infolist():
            is_data = record.filename.endswith("data/0")
            target.writestr(record.filename, bytes(50_000_000) if is_data else source.read(record))
    with pytest.raises(ValueError, match="compressed or overlap"):
        read_checkpoint(file)


def test_nested_lists_with_exponentially_many_paths_are_looked_through_once(tmp_path):
    nested = [torch.ones(1)]
    for _ in range(60):
        nested = [nested, nested]
    torch.save({"state_dict": nested}, tmp_path / "deep.pt")
    assert len(read_checkpoint(tmp_path / "deep.pt")) == 1


@pytest.mark.parametrize("form", [".safetensors", ".bin"])
def test_a_checkpoint_in_several_files_is_read_by_its_index(small, tmp_path, form):
    native, config = small
    folder = tmp_path / "sharded"
    folder.mkdir()
    names = list(native.state_dict())
    parts = {f"part-{i}{form}": names[i::2] for i in range(2)}
    for file, keys in parts.items():
        state = {key: native.state_dict()[key].contiguous() for key in keys}
        save = save_file if form == ".safetensors" else torch.save
        save(state, folder / file)
    stem = "model.safetensors" if form == ".safetensors" else "pytorch_model.bin"
    index = folder / f"{stem}.index.json"
    index.write_text(json.dumps({"weight_map": {k: f for f, ks in parts.items() for k in ks}}))
    assert same_weights(OpenCLIP(config, pretrained=str(folder)), native)
    assert same_weights(OpenCLIP(config, pretrained=str(index)), native)
    (folder / f"part-1{form}").unlink()
    with pytest.raises(FileNotFoundError, match=rf"names 2 files and 1 are missing \(part-1{form}"):
        read_checkpoint(index)


def test_an_index_cannot_name_files_elsewhere(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(ValueError, match="not a file beside it"):
        read_checkpoint(index)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>Sign in</html>", "web page"),
        (b"\x1f\x8b\x08rest", "compressed archive"),
        (b"PK\x03\x04 and no end", "cut off"),
        (b"\x89HDF\r\n\x1a\n", "Keras"),
        (b"0" * 257 + b"ustar" + b"0" * 250, "tar archive"),
        (b"something else entirely", "damaged or no checkpoint"),
    ],
)
def test_a_file_that_is_no_checkpoint_says_what_it_is(tmp_path, content, reason):
    (tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(RuntimeError, match=rf"weights\.pt.*{reason}"):
        OpenCLIP("tiny", pretrained=str(tmp_path / "weights.pt"))


def test_a_cut_off_safetensors_file_is_named(tmp_path):
    save_file({"a": torch.zeros(1000)}, tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    for length in (4, 60, 2000):
        (tmp_path / "w.safetensors").write_bytes(whole[:length])
        with pytest.raises(RuntimeError, match=r"w\.safetensors"):
            OpenCLIP("tiny", pretrained=str(tmp_path / "w.safetensors"))


def test_a_zip_of_other_things_names_them(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.writestr("weights/model.safetensors", b"x")
    with pytest.raises(RuntimeError, match=r"holds weights/model\.safetensors"):
        OpenCLIP("tiny", pretrained=str(tmp_path / "w.zip"))


def test_a_suffix_does_not_decide_the_form(small, tmp_path):
    native, config = small
    state = {name: value.contiguous() for name, value in native.state_dict().items()}
    save_file(state, tmp_path / "one.pt")
    torch.save(state, tmp_path / "two.ckpt")
    torch.save(state, tmp_path / "three")
    for name in ("one.pt", "two.ckpt", "three"):
        assert same_weights(OpenCLIP(config, pretrained=str(tmp_path / name)), native)


def test_a_folder_with_several_checkpoints_names_them(small, tmp_path):
    for epoch in (1, 2):
        torch.save(small[0].state_dict(), tmp_path / f"epoch_{epoch}.pt")
    with pytest.raises(ValueError, match=r"2 files of weights \(epoch_1\.pt, epoch_2\.pt\)"):
        OpenCLIP(small[1], pretrained=str(tmp_path))


def test_a_file_like_object_of_torch_stays_in_memory(tmp_path):
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(3)}, buffer)
    (tmp_path / "w.pt").write_bytes(buffer.getvalue())
    (only,) = read_checkpoint(tmp_path / "w.pt")
    assert (only.container, only.key, only.tensor.tolist()) == ("", "a", [0, 1, 2])
