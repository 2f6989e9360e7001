"""``mmcl export``: what is written is loaded by the library it is for, and predicts the same."""

import json
import os
import signal
import warnings
from pathlib import Path

import open_clip
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmcl.core import Chain, begin_task, end_task, forward
from mmcl.export import default_format, formats, write_adapter, write_clip, write_model
from mmcl.lightning.module import ContinualModule
from mmcl.models import ImageTextToText, OpenCLIP
from mmcl.strategies import LoRA, discover
from tests.behaviour.kill_runs import in_process
from tests.cli.cli_fixtures import write_chat
from tests.lightning.small_runs import arguments_of
from tests.toys.toy_llava import a_dialogue_batch, an_answer_task, dialogue_batches

STACKED = {
    "LoRA": {"rank": 2},
    "LoRA with a projector": {"rank": 2, "train_projector": True},
    "LoRA of half the layers": {"rank": 2, "target_modules": "attention", "alpha": 3},
    "LoRA with DoRA": {"rank": 2, "options": {"use_dora": True}},
    "OLoRA": {"rank": 2},
    "OLoRA with a projector": {"rank": 2, "alpha": 3, "train_projector": True},
    "OLoRA without its past": {"rank": 2, "past_in_forward": False},
    "RegLoRA": {"rank": 2},
}


def trained(chat, strategy, tasks=2, **model):
    """A module after some tasks that changed every trainable weight."""
    module = ContinualModule(ImageTextToText(str(chat), max_length=64, **model), strategy)
    for index in range(tasks):
        begin_task(module.model, module.strategy, an_answer_task(index))
        draw = torch.Generator().manual_seed(index)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter += 0.2 * torch.randn(parameter.shape, generator=draw)
        batches = dialogue_batches(module.model, index, 8)
        end_task(module.model, module.strategy, an_answer_task(index), batches)
    return module.eval()


def make(name, **arguments):
    return discover()[name.partition(" ")[0]](**arguments)


@pytest.fixture
def chat(tmp_path):
    return write_chat(tmp_path / "chat")


@torch.no_grad()
def own_scores(module, batch):
    return forward(module.model, module.strategy, batch).logits


@torch.no_grad()
def hf_scores(lm, folder, batch):
    """Scores of the words of the answers, by transformers alone."""
    if batch.images is None:
        images = {
            name: torch.cat([one[name] for one in batch.image_inputs])
            for name in batch.image_inputs[0]
        }
    else:
        images = AutoProcessor.from_pretrained(folder).image_processor(
            images=list(batch.images), return_tensors="pt", do_resize=False, do_center_crop=False
        )
    tokens = batch.input_ids.masked_fill(~batch.attention_mask, 0)
    mask = batch.attention_mask.long()
    every = lm(input_ids=tokens, attention_mask=mask, **images).logits
    found = []
    for row in range(len(batch)):
        for place in range(1, tokens.shape[1]):
            if batch.labels[row, place] != -100:
                found.append(every[row, place - 1])
    return torch.stack(found)


def plain(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


def tuned(chat, folder):
    """The plain model with an adapter, loaded by peft."""
    with warnings.catch_warnings():
        # peft calls transformers by a name that the newest has replaced.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing")
        return PeftModel.from_pretrained(plain(chat), folder).eval()


def alike(one, other, share=1e-4):
    return float((one - other).abs().max()) <= share * float(other.abs().max())


@pytest.mark.parametrize("name", STACKED)
def test_peft_loads_an_adapter_on_the_plain_model_and_predicts_the_same(name, chat, tmp_path):
    module = trained(chat, make(name, **STACKED[name]))
    batch = a_dialogue_batch(module.model)
    write_adapter(module, tmp_path / "adapter", half=False)
    own = own_scores(module, batch)
    assert alike(hf_scores(tuned(chat, tmp_path / "adapter"), chat, batch), own)
    assert not alike(hf_scores(plain(chat), chat, batch), own, 0.05)


@pytest.mark.parametrize("name", [*STACKED, "OSF", "Finetune"])
def test_transformers_loads_the_whole_model_and_predicts_the_same(name, chat, tmp_path):
    module = trained(chat, make(name, **STACKED.get(name, {})))
    batch = a_dialogue_batch(module.model)
    own = own_scores(module, batch)
    write_model(module, tmp_path / "whole", half=False)
    assert alike(hf_scores(plain(tmp_path / "whole"), tmp_path / "whole", batch), own)
    assert torch.equal(own_scores(module, batch), own)
    assert module.model.lm.get_input_embeddings() is module.model.lm.model.get_input_embeddings()


def test_an_adapter_in_a_chain_is_found(chat, tmp_path):
    parts = [
        LoRA(rank=2),
        make("EWC", ewc_lambda=1.0, fisher_samples=4),
        make("ExperienceReplay", buffer_size=4),
    ]
    module = trained(chat, Chain(parts))
    batch = a_dialogue_batch(module.model)
    assert default_format(module) == "peft"
    write_adapter(module, tmp_path / "adapter", half=False)
    own = own_scores(module, batch)
    assert alike(hf_scores(tuned(chat, tmp_path / "adapter"), chat, batch), own)


def test_two_exports_of_one_model_are_the_same_bytes(chat, tmp_path):
    module = trained(chat, LoRA(rank=2))
    for write, files in (
        (write_adapter, ("adapter_model.safetensors", "adapter_config.json")),
        (write_model, ("model.safetensors", "config.json", "tokenizer.json")),
    ):
        folders = [tmp_path / f"{write.__name__}_{number}" for number in range(2)]
        for folder in folders:
            write(module, folder, half=False)
        for name in files:
            assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_half_precision_halves_the_files_and_still_predicts_the_same(chat, tmp_path):
    module = trained(chat, LoRA(rank=2))
    batch = a_dialogue_batch(module.model)
    own = own_scores(module, batch)
    write_adapter(module, tmp_path / "adapter", half=True)
    write_model(module, tmp_path / "whole", half=True)
    kept = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float16}
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["dtype"] == "float16"
    assert alike(hf_scores(tuned(chat, tmp_path / "adapter"), chat, batch), own, 0.01)
    loaded = plain(tmp_path / "whole").float()
    assert alike(hf_scores(loaded, chat, batch), own, 0.01)
    # The trained weights keep their full precision.
    assert torch.equal(own_scores(module, batch), own)


def test_a_model_in_bfloat16_is_exported_as_it_is(chat, tmp_path):
    module = trained(chat, LoRA(rank=2), dtype="bfloat16")
    write_model(module, tmp_path / "whole", half=False)
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["dtype"] == "bfloat16"
    assert next(plain(tmp_path / "whole").parameters()).dtype == torch.bfloat16


def test_the_whole_model_begins_a_next_run(chat, tmp_path):
    module = trained(chat, LoRA(rank=2))
    write_model(module, tmp_path / "whole", half=False)
    again = ImageTextToText(str(tmp_path / "whole"), max_length=64)
    assert again.fingerprint() == ImageTextToText(str(chat), max_length=64).fingerprint()
    batch = a_dialogue_batch(module.model)
    with module.strategy.merged_adapters(module.model):
        answers = module.model.generate(batch, max_new_tokens=4)
    assert again.generate(batch, max_new_tokens=4) == answers
    assert len(set(answers)) > 1


ROUTED = "routes every sample or token to experts"
BEYOND = {
    "CLMoE": ROUTED,
    "HiDe": ROUTED,
    "LoRARouter": ROUTED,
    "MoELoRA": ROUTED,
    "ModalPrompt": "puts prompts of each sample into the model",
}


@pytest.mark.parametrize("name", BEYOND)
@pytest.mark.parametrize("write", [write_adapter, write_model])
def test_what_is_beyond_weights_is_refused_and_nothing_is_left(name, write, chat, tmp_path):
    module = trained(chat, make(name, **arguments_of(name, "answer")))
    with pytest.raises(ValueError, match=f"{name} {BEYOND[name]}.*run it with mmcl"):
        write(module, tmp_path / "out", half=False)
    assert [path.name for path in tmp_path.iterdir()] == ["chat"]


def test_a_model_without_an_adapter_has_nothing_for_peft(chat, tmp_path):
    module = trained(chat, make("Finetune"))
    with pytest.raises(ValueError, match="Finetune has no adapter here.*use --as transformers"):
        write_adapter(module, tmp_path / "out", half=False)


def test_a_plain_model_that_predicts_something_else_is_not_written(chat, tmp_path, monkeypatch):
    module = trained(chat, LoRA(rank=2))
    monkeypatch.setattr(LoRA, "merged_adapters", lambda self, model: torch.no_grad())
    with pytest.raises(ValueError, match=r"scores differ by .* LoRA does more than change weights"):
        write_model(module, tmp_path / "out", half=False)
    assert not (tmp_path / "out").exists()


def test_an_error_while_writing_leaves_nothing_behind(chat, tmp_path, monkeypatch):
    module = trained(chat, LoRA(rank=2))

    def fail(lm, processor, folder):
        (folder / "config.json").write_text("{")
        raise OSError("the disk is full")

    monkeypatch.setattr(formats, "save_pretrained", fail)
    with pytest.raises(OSError, match="full"):
        write_model(module, tmp_path / "out", half=False)
    assert [path.name for path in tmp_path.iterdir()] == ["chat"]


def export_and_die(chat, out):
    """Kill this process when the weights are written and the processor is not."""
    module = trained(Path(chat), LoRA(rank=2))
    module.model.processor.save_pretrained = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
    write_model(module, Path(out), half=False)


@pytest.mark.slow
def test_a_killed_export_leaves_nothing_under_its_name(chat, tmp_path):
    out = tmp_path / "out"
    assert in_process(export_and_die, str(chat), str(out)) == -signal.SIGKILL
    assert not out.exists()
    write_model(trained(chat, LoRA(rank=2)), out, half=False)
    assert (out / "model.safetensors").is_file()


def test_open_clip_loads_a_learned_clip_itself(learned):
    status, out, err = learned.give("export", "small_run", "clip.safetensors", "--after_task", "2")
    assert (status, err) == (0, "")
    assert out.startswith("clip.safetensors: ")
    open_clip.add_model_config(Path("small.json"))
    theirs = open_clip.create_model("small")
    open_clip.load_checkpoint(theirs, "clip.safetensors")
    kept = torch.load(learned.results / "checkpoints" / "task_01.ckpt", weights_only=True)
    own = {name.removeprefix("model.clip."): value for name, value in kept["state_dict"].items()}
    state = theirs.state_dict()
    shared = own.keys() & state.keys()
    assert len(shared) > 20
    assert all(torch.equal(own[name], state[name]) for name in shared)


def weights_after(desk, task):
    """The CLIP's trained weights in a task checkpoint."""
    file = desk.results / "checkpoints" / f"task_{task:02d}.ckpt"
    state = torch.load(file, weights_only=True)["state_dict"]
    return {name.removeprefix("model.clip."): value for name, value in state.items()}


@pytest.mark.parametrize("half", [False, True])
def test_a_folder_is_loaded_by_open_clip_alone_and_begins_a_next_run(learned, half):
    words = ["--half"] if half else []
    assert learned.give("export", "small_run", "exported", *words)[0] == 0
    for name in ("small.json", "runs"):  # what the folder must not need
        (learned.folder / name).rename(learned.folder / f"moved {name}")
    theirs = open_clip.create_model("local-dir:exported")
    (learned.folder / "moved runs").rename(learned.folder / "runs")
    own, state = weights_after(learned, 2), theirs.state_dict()
    shared = own.keys() & state.keys()
    assert len(shared) > 20
    bound = {"atol": 1e-3, "rtol": 1e-3} if half else {"atol": 0, "rtol": 0}
    for name in shared:
        torch.testing.assert_close(state[name], own[name], **bound)
    ours = OpenCLIP("exported")
    assert all(torch.equal(value, state[name]) for name, value in ours.clip.state_dict().items())
    text = ["a photo of a c1", "c2"]
    vocabulary = str(learned.folder / "exported" / "bpe.txt.gz")
    tokenizer = open_clip.get_tokenizer("local-dir:exported", bpe_path=vocabulary)
    assert torch.equal(ours.tokenizer(text), tokenizer(text))
    assert torch.equal(ours.tokenizer(text), OpenCLIP("moved small.json").tokenizer(text))


def test_a_file_has_its_architecture_beside_it(learned):
    assert learned.give("export", "small_run", "clip.safetensors")[0] == 0
    assert json.loads(Path("clip.json").read_text()) == json.loads(Path("small.json").read_text())
    (learned.folder / "clip.safetensors").unlink()
    status, _, err = learned.give("export", "small_run", "clip.safetensors")
    assert status == 1
    assert "clip.json exists: give a new name" in err
    assert not Path("clip.safetensors").exists()


def test_the_tiny_clip_is_exported_with_its_vocabulary(tmp_path):
    model = OpenCLIP("tiny", "built-in")
    write_clip(ContinualModule(model), tmp_path / "out", half=False)
    again = OpenCLIP(str(tmp_path / "out"))
    assert again.fingerprint() == model.fingerprint()
    assert torch.equal(again.tokenizer(["a red bird"]), model.tokenizer(["a red bird"]))


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_exported_files_have_the_permissions_of_other_files(learned, umask):
    before = os.umask(umask)
    try:
        for target in ("folder", "file.safetensors"):
            assert learned.give("export", "small_run", target)[0] == 0
    finally:
        os.umask(before)
    files = [*Path("folder").iterdir(), *Path().glob("file.*")]
    assert len(files) == 7
    assert {oct(file.stat().st_mode & 0o777) for file in files} == {oct(0o666 & ~umask)}
    assert Path("folder").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("write", [write_adapter, write_model])
def test_files_for_transformers_have_the_permissions_of_other_files(write, chat, tmp_path):
    write(trained(chat, LoRA(rank=2)), tmp_path / "out", half=False)
    (tmp_path / "other").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "other").stat().st_mode}


@pytest.mark.filterwarnings("default:RanPAC")
def test_a_head_beside_a_clip_is_not_in_its_file_with_a_warning(desk):
    desk.configure("RanPAC")
    assert desk.run()[0] == 0
    status, _, err = desk.give("export", "small_run", "clip.safetensors")
    assert status == 0
    assert "warning: RanPAC predicts with more than the CLIP's weights" in err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["clip.bin"], "clip.bin does not end in .safetensors"),
        (["stream"], "stream exists: give a new name"),
        (
            ["a.safetensors", "--after_task", "4"],
            "--after_task is 4, and the run has trained 3 tasks",
        ),
        (["a.safetensors", "--after", "2"], "the option --after is called --after_task now"),
        (["out", "--as", "transformers"], "has no model of transformers to export"),
        (["out", "--as", "peft"], "has no model of transformers to export"),
        (["out", "--as", "onnx"], "invalid choice: 'onnx'"),
    ],
)
def test_what_cannot_be_exported_is_named(learned, words, sentence):
    status, _, err = learned.give("export", "small_run", *words)
    assert status != 0
    assert sentence in err
    assert err.count("\n") == 1
    assert not (learned.folder / "out").exists()
    assert not list(learned.folder.glob("*.safetensors"))


def test_a_run_of_a_model_that_answers_is_exported_as_its_adapter_or_whole(answered):
    batch = a_dialogue_batch(ImageTextToText("chat", max_length=64))
    for form, target in (("peft", "adapter"), ("transformers", "whole")):
        words = ["--as", form] if form == "transformers" else []
        status, out, err = answered.give("export", "small_run", target, *words)
        assert (status, err) == (0, "")
        assert out.startswith(f"{target}: a {form}")
    first = hf_scores(tuned("chat", "adapter"), "chat", batch)
    assert alike(hf_scores(plain("whole"), "whole", batch), first)
    words = ["--as", "transformers", "--after_task", "0"]
    assert answered.give("export", "small_run", "early", *words)[0] == 0
    assert torch.equal(
        hf_scores(plain("early"), "early", batch), hf_scores(plain("chat"), "chat", batch)
    )
