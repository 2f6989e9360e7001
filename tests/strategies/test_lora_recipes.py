"""The usual LoRA recipes against peft itself: starts, towers, modules in full, tokens, exports.

The reference is a model of transformers with peft's own layers, put in place of ours.
"""

import copy
import json
import warnings
from functools import cache

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from transformers.models.smolvlm import processing_smolvlm

from mmcl.core import begin_task, trainable_parameters
from mmcl.export import default_format, write_adapter, write_model
from mmcl.lightning.module import ContinualModule
from mmcl.models import ImageTextToText
from mmcl.strategies import Finetune, LoRA, discover
from tests.models.hf_reference import a_batch
from tests.models.small_vlms import write_model as write_vlm
from tests.toys.toy_llava import an_answer_task

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unable to fetch remote file:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]
LM = r".*(language_model|text_model)\..*\.(q_proj|down_proj)"
# Settings of peft.LoraConfig, beside r=4 and lora_alpha=8.
STARTS = {
    "list": {"target_modules": ["q_proj", "v_proj"]},
    "regex": {"target_modules": LM, "r": 3, "lora_alpha": 5},
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": LM, "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"v_proj": 3},
    },
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "modules": {"target_modules": LM, "modules_to_save": ["lm_head", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "tokens": {"target_modules": LM, "trainable_token_indices": [3, 5, 9]},
}
FAMILIES = ("llava", "tied", "qwen2_5_vl", "smolvlm")
OTHERS = ("qwen2_5_vl", "smolvlm")


def cases(*names, slow=()):
    """Pairs of a family and a kind; those of the last list are tested with the slow ones."""
    return [*names, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in slow)]


CASES = cases(
    *(("llava", kind) for kind in STARTS), ("tied", "modules"), ("qwen2_5_vl", "all-linear"),
    ("smolvlm", "all-linear"),
    slow=[("tied", "head"), ("tied", "embeddings"), ("tied", "tokens")]
    + [(family, kind) for family in OTHERS for kind in STARTS if kind != "all-linear"],
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _spelt_numbers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processing_smolvlm, "num2words", str)
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder of each family; "tied" is LLaVA with one weight for word embeddings and head."""
    root = tmp_path_factory.mktemp("vlms")
    made = {name: write_vlm(root / name, name.replace("tied", "llava")) for name in FAMILIES}
    tied = hf.LlavaForConditionalGeneration.from_pretrained(made["tied"])
    for config in (tied.config, tied.config.text_config):
        config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(made["tied"])
    return made


@cache
def _loaded(folder):
    return ImageTextToText(str(folder), size=16, freeze=())


def ours(folder, freeze=("image",)):
    model = copy.deepcopy(_loaded(folder))
    model.freeze(*freeze)
    return model


def native(folder):
    return copy.deepcopy(_native(folder))


@cache
def _native(folder):
    return hf.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def scores(model, lm=None):
    """Scores of the answers of some dialogues, with another model of transformers in it."""
    own = model.lm
    model.lm = own if lm is None else lm
    model.locate_parameters()
    found = model.eval()(a_batch(model)).logits
    model.lm = own
    model.locate_parameters()
    return found


def is_near(one, other, share=1e-4):
    return float((one - other).abs().max()) <= share * float(other.abs().max())


def made_by_peft(base, **settings):
    """A model with peft's layers and weights that say something."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **settings})
    torch.manual_seed(1)
    model = peft.get_peft_model(native(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def written(base, folder, **settings):
    """An adapter that peft wrote, and peft's own scores."""
    made = made_by_peft(base, **settings)
    made.save_pretrained(folder)
    return scores(ours(base), made.base_model.model)


def started(base, folder, mode="continue", **how):
    model, strategy = ours(base), LoRA(adapter=str(folder), adapter_mode=mode, **how)
    strategy.attach(model)
    return model, strategy


@pytest.mark.parametrize("mode", ["continue", "merge"])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_start_from_an_adapter_predicts_as_peft_does(family, kind, mode, folders, tmp_path):
    base = folders[family]
    expected = written(base, tmp_path, **STARTS[kind])
    assert not is_near(scores(ours(base)), expected, 0.05)
    model, strategy = started(base, tmp_path, mode)
    assert is_near(scores(model), expected)
    with strategy.merged_adapters(model):
        assert is_near(scores(model), expected)
    assert is_near(scores(model), expected)


@pytest.mark.parametrize("kind", STARTS)
def test_what_trains_on_is_what_peft_trains(kind, folders, tmp_path):
    written(folders["llava"], tmp_path, **STARTS[kind])
    theirs = peft.PeftModel.from_pretrained(
        native(folders["llava"]), tmp_path, is_trainable=True
    ).base_model.model
    model, _ = started(folders["llava"], tmp_path)
    for found, wanted in zip(sizes(model.lm), sizes(theirs), strict=True):
        assert found == wanted


def sizes(lm):
    trained = [(n, p) for n, p in lm.named_parameters() if p.requires_grad]
    names = [n.replace(".modules_to_save.default.", ".") for n, _ in trained]
    return sorted((name, tuple(p.shape)) for name, (_, p) in zip(names, trained, strict=True))


def test_after_a_merge_a_new_adapter_of_its_own_form_begins(folders, tmp_path):
    expected = written(folders["llava"], tmp_path, **STARTS["dora"])
    count = len(ours(folders["llava"]).target_linears("attention"))
    model, _ = started(folders["llava"], tmp_path, "merge", rank=2, target_modules="attention")
    names = list(trainable_parameters(model))
    assert len(names) == 2 * count
    assert {model.get_parameter(n).shape[0] for n in names if "lora_A" in n} == {2}
    assert is_near(scores(model), expected)


RENAMED = {
    "transformers 4": {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "lm_head": "language_model.lm_head",
    },
    "LLaVA": {
        "model.language_model.": "model.",
        "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
        "model.multi_modal_projector.linear_1": "model.mm_projector.0",
        "model.multi_modal_projector.linear_2": "model.mm_projector.2",
    },
}


def renamed(state, spelling):
    """Weights by their names in another code."""
    found = {}
    for name, tensor in state.items():
        inner = name.removeprefix("base_model.model.")
        for new, old in RENAMED[spelling].items():
            if inner.startswith(new):
                inner = old + inner.removeprefix(new)
                break
        found[f"base_model.model.{inner}"] = tensor
    return found


@pytest.mark.parametrize("spelling", RENAMED)
def test_names_of_other_versions_are_found(spelling, folders, tmp_path):
    saved = {"modules_to_save": ["lm_head"]}
    expected = written(folders["llava"], tmp_path, target_modules="all-linear", **saved)
    file = tmp_path / "adapter_model.safetensors"
    save_file(renamed(load_file(file), spelling), file)
    assert is_near(scores(started(folders["llava"], tmp_path)[0]), expected)


def test_what_llavas_scripts_train_beside_an_adapter_is_read_and_trains_on(folders, tmp_path):
    base = folders["llava"]
    saved = {"modules_to_save": ["multi_modal_projector"]}
    expected = written(base, tmp_path, target_modules=LM, **saved)
    file = tmp_path / "adapter_model.safetensors"
    state = renamed(load_file(file), "LLaVA")
    beside = {name: state.pop(name) for name in list(state) if "mm_projector" in name}
    assert len(beside) == 4
    file.unlink()
    torch.save(state, tmp_path / "adapter_model.bin")
    torch.save(beside, tmp_path / "non_lora_trainables.bin")
    change(tmp_path, modules_to_save=None)
    model, _ = started(base, tmp_path)
    assert is_near(scores(model), expected)
    assert all(parameter.requires_grad for parameter in model.tower("projector"))
    assert is_near(scores(started(base, tmp_path, "merge")[0]), expected)


def change(folder, **settings):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3': only 'LORA'"),
        ({"bias": "lora_only"}, "bias is 'lora_only'.*not supported here"),
        ({"lora_bias": True}, "lora_bias is True.*not supported here"),
        ({"target_parameters": ["experts.w"]}, r"target_parameters is \['experts.w'\]"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens is \[1\]"),
        ({"a_new_setting": 3}, "a_new_setting is 3"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'.*rewrites the weights"),
        ({"r": 8}, r"lora_[AB] of .* is \(.*\), expected .*r and rank_pattern are others"),
        ({"r": 0}, "r is 0 in .*expected 1 or more"),
        ({"use_dora": True}, "lora_magnitude_vector of .* is missing"),
    ],
)
@pytest.mark.parametrize("mode", ["continue", "merge"])
def test_an_adapter_that_is_not_understood_is_refused_by_name(
    settings, message, mode, folders, tmp_path
):
    written(folders["llava"], tmp_path, **STARTS["regex"])
    change(tmp_path, **settings)
    with pytest.raises(ValueError, match=message):
        started(folders["llava"], tmp_path, mode)


def test_an_adapter_of_another_model_is_refused_by_the_layer(folders, tmp_path):
    written(folders["llava"], tmp_path, **STARTS["list"])
    with pytest.raises(ValueError, match="weights for 'model.language_model.*of another model"):
        started(folders["smolvlm"], tmp_path)


def test_another_base_is_warned_of(folders, tmp_path):
    written(folders["llava"], tmp_path, **STARTS["regex"])
    change(tmp_path, base_model_name_or_path="somebody/llava-13b")
    with pytest.warns(UserWarning, match="trained on somebody/llava-13b and the model is"):
        started(folders["llava"], tmp_path)


def test_a_pickle_in_an_adapter_runs_nothing(folders, tmp_path):
    written(folders["llava"], tmp_path, **STARTS["regex"])
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({"x": Planted(tmp_path / "ran")}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="adapter_model.bin cannot be read"):
        started(folders["llava"], tmp_path)
    assert not (tmp_path / "ran").exists()


class Planted:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (self.file.touch, ())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "adapter_config.json",
            "which has no adapter_config.json: give the folder that peft wrote",
        ),
        ("adapter_model.safetensors", "has no adapter_model.safetensors or adapter_model.bin"),
    ],
)
def test_a_folder_without_its_files_is_refused(name, message, folders, tmp_path):
    written(folders["llava"], tmp_path, **STARTS["regex"])
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        started(folders["llava"], tmp_path)


def test_a_damaged_file_is_refused(folders, tmp_path):
    written(folders["llava"], tmp_path, **STARTS["regex"])
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match="adapter_model.safetensors cannot be read"):
        started(folders["llava"], tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json is not JSON"):
        started(folders["llava"], tmp_path)


def test_an_adapter_as_a_model_says_what_to_do(folders, tmp_path):
    written(folders["llava"], tmp_path, **STARTS["regex"])
    message = rf"holds a peft adapter of base '{folders['llava']}'.*LoRA\(adapter='{tmp_path}'\)"
    with pytest.raises(ValueError, match=message):
        ImageTextToText(str(tmp_path))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"rank": 8}, "rank is 8 and .* has 4: leave rank out"),
        ({"alpha": 1}, "alpha is 1 and .* has 8"),
        ({"target_modules": "all"}, "has its own layers, options and tokens"),
        ({"target_towers": ["image"]}, "has its own layers, options and tokens"),
        ({"options": {"use_dora": True}}, "has its own layers, options and tokens"),
        ({"trainable_token_indices": [1]}, "has its own layers, options and tokens"),
    ],
)
def test_settings_that_are_the_adapters_own_are_refused(how, message, folders, tmp_path):
    written(folders["llava"], tmp_path, **STARTS["list"])
    with pytest.raises(ValueError, match=message):
        started(folders["llava"], tmp_path, **how)


# LoRA here, and the same in peft; the last three words are what peft takes beside.
TRAINED = {
    "plain": ({}, {"target_modules": LM}),
    "dora": ({"options": {"use_dora": True}}, {"target_modules": LM, "use_dora": True}),
    "rslora": ({"options": {"use_rslora": True}}, {"target_modules": LM, "use_rslora": True}),
    "patterns": (
        {"options": {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3}}},
        {"target_modules": LM, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    ),
    "tower and projector": (
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear"},
    ),
    "list": ({"target_modules": ["q_proj", "fc1"]}, {"target_modules": ["q_proj", "fc1"]}),
    "modules": (
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": LM, "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "projector": (
        {"train_projector": True},
        {"target_modules": LM, "modules_to_save": ["multi_modal_projector"]},
    ),
    "tokens": (
        {"trainable_token_indices": [10, 20, 30]},
        {"target_modules": LM, "trainable_token_indices": [10, 20, 30]},
    ),
}


def pair(base, kind):
    """The same model with LoRA here and in peft, from one start."""
    mine, settings = TRAINED[kind]
    model = ours(base)
    strategy = LoRA(4, 8, **{"target_modules": LM, **mine})
    strategy.attach(model)
    theirs = peft.get_peft_model(native(base), peft.LoraConfig(r=4, lora_alpha=8, **settings))
    theirs = theirs.base_model.model
    state = dict(theirs.named_parameters())
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.lm.named_parameters():
            if parameter.requires_grad and "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
                state[name].copy_(parameter)
    return model, strategy, theirs


@pytest.mark.parametrize(("family", "kind"), [("llava", kind) for kind in TRAINED] + [
    ("tied", "modules"), ("tied", "tokens"), ("smolvlm", "dora"), ("qwen2_5_vl", "tokens"),
    ("qwen2_5_vl", "tower and projector"),
])  # fmt: skip
def test_three_steps_are_pefts_own(family, kind, folders):
    model, strategy, theirs = pair(folders[family], kind)
    batch, other = a_batch(model), ours(folders[family])
    other.lm = theirs
    other.locate_parameters()
    assert sizes(model.lm) == sizes(theirs)
    for one in (model, other):
        one.train()
        learning = [p for p in one.lm.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(learning, lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            one.loss(one(batch), batch).backward()
            optimizer.step()
    first, second = (
        {n.replace(".modules_to_save.default.", "."): p for n, p in lm.named_parameters()
         if p.requires_grad} for lm in (model.lm, theirs)
    )  # fmt: skip
    assert first.keys() == second.keys()
    for name, parameter in first.items():
        torch.testing.assert_close(parameter, second[name], rtol=1e-3, atol=2e-5)
    assert is_near(scores(model), scores(other))
    with strategy.merged_adapters(model):
        assert is_near(scores(model), scores(other))


def trained(base, how, **model):
    """A module whose trainable weights all moved."""
    module = ContinualModule(ours(base, **model), LoRA(2, **how))
    begin_task(module.model, module.strategy, an_answer_task(0))
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=draw)
    return module.eval()


EXPORTED = {
    "plain": {},
    "towers": {"target_towers": ["image", "projector", "text"]},
    "projector in full": {"train_projector": True},
    "head": {"modules_to_save": ["lm_head"]},
    "head and embeddings": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "head adapted": {"target_modules": ["q_proj", "lm_head"]},
    "one layer in full": {"modules_to_save": ["layers.1"], "target_modules": ["q_proj"]},
    "tokens": {"trainable_token_indices": [4, 7]},
    "dora": {"options": {"use_dora": True}},
    "patterns": {"options": {"use_rslora": True, "rank_pattern": {"q_proj": 3}}},
}
EXPORTS = cases(
    ("llava", "towers"), ("llava", "projector in full"), ("llava", "head"), ("llava", "plain"),
    ("llava", "tokens"), ("tied", "head"), ("qwen2_5_vl", "towers"),
    ("smolvlm", "projector in full"),
    slow=[("llava", kind) for kind in list(EXPORTED)[4:] if kind != "tokens"]
    + [("tied", kind) for kind in ("head and embeddings", "head adapted", "tokens")]
    + [("qwen2_5_vl", "projector in full"), ("smolvlm", "towers")],
)  # fmt: skip


@pytest.mark.parametrize(("family", "kind"), EXPORTS)
def test_exports_predict_the_same_in_peft_and_transformers(family, kind, folders, tmp_path):
    module = trained(folders[family], EXPORTED[kind])
    own, blank = scores(module.model), ours(folders[family])
    assert default_format(module) == "peft"
    write_adapter(module, tmp_path / "adapter", half=False)
    for loaded in (
        peft.PeftModel.from_pretrained(native(folders[family]), tmp_path / "adapter"),
        peft.AutoPeftModel.from_pretrained(tmp_path / "adapter"),
    ):
        assert is_near(scores(blank, loaded.base_model.model), own)
    write_model(module, tmp_path / "whole", half=False)
    assert is_near(scores(blank, native(tmp_path / "whole")), own)
    # What was exported is a start again.
    assert is_near(scores(started(folders[family], tmp_path / "adapter")[0]), own)


FULL = {
    "projector and tower": (["text"], ["image", "projector"]),
    "language model beside an adapted tower": (["image"], ["text"]),
}


@pytest.mark.parametrize(
    ("family", "kind"),
    cases(
        ("llava", "projector and tower"), ("tied", "language model beside an adapted tower"),
        slow=[(family, kind) for family in OTHERS for kind in FULL],
    ),
)  # fmt: skip
def test_towers_in_full_are_exported(kind, family, folders, tmp_path):
    frozen, towers = FULL[kind]
    adapted = {"target_towers": ["image"]} if "text" in towers else {}
    module = trained(folders[family], {"train_towers": towers, **adapted}, freeze=frozen)
    for tower in ("image", "projector", "text"):
        full = all(p.requires_grad for p in module.model.tower(tower))
        assert full == (tower in towers)
    own, blank = scores(module.model), ours(folders[family])
    write_adapter(module, tmp_path / "adapter", half=False)
    loaded = peft.PeftModel.from_pretrained(native(folders[family]), tmp_path / "adapter")
    assert is_near(scores(blank, loaded.base_model.model), own)
    write_model(module, tmp_path / "whole", half=False)
    assert is_near(scores(blank, native(tmp_path / "whole")), own)


def test_an_adapter_on_merged_weights_is_exported_whole(folders, tmp_path):
    written(folders["llava"], tmp_path / "start", **STARTS["list"])
    how = {"adapter": str(tmp_path / "start"), "adapter_mode": "merge"}
    module = trained(folders["llava"], how)
    assert default_format(module) == "transformers"
    with pytest.raises(ValueError, match=r"merged .*start into the model.*--as transformers"):
        write_adapter(module, tmp_path / "adapter", half=False)
    write_model(module, tmp_path / "whole", half=False)
    own = scores(module.model)
    assert is_near(scores(ours(folders["llava"]), native(tmp_path / "whole")), own)


def test_projector_and_tower_have_learning_rates_of_their_own(folders):
    model = ours(folders["llava"], freeze=["text"])
    strategy = LoRA(2, train_towers=["image", "projector"])
    rates = {"projector": 2e-5, "image": 2e-6}
    module = ContinualModule(model, strategy, learning_rate=2e-4, param_groups=rates)
    optimizer = module.configure_optimizers()
    found = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for tower, rate in {**rates, "adapter": 2e-4}.items():
        own = [p for n, p in model.named_parameters() if "lora_" in n]
        own = own if tower == "adapter" else model.tower(tower)
        assert {found[id(p)] for p in own} == {rate}


# Every class that adapts linear layers, found by its argument.
ADAPTERS = sorted(
    name for name, kind in discover().items()
    if "target_modules" in kind.__init__.__annotations__
)  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("frozen", [[], ["text"], ["image", "text"], ["projector"]])
def test_what_freeze_leaves_trainable_is_refused_by_an_adapter_that_freezes_it(
    name, frozen, folders
):
    model = ours(folders["llava"], freeze=frozen)
    with pytest.raises(ValueError, match=rf"freeze of the model leaves .* and {name} freezes it"):
        discover()[name]().attach(model)


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize(
    "frozen", [["image"], ["image", "projector"], ["image", "text", "projector"]]
)
def test_other_values_of_freeze_are_obeyed_by_adapters(name, frozen, folders):
    model = ours(folders["llava"], freeze=frozen)
    discover()[name]().attach(model)
    assert all("vision" not in name for name in trainable_parameters(model))


@pytest.mark.parametrize("frozen", [[], ["image"], ["text"], ["image", "projector"]])
def test_full_fine_tuning_trains_what_is_not_frozen(frozen, folders):
    model = ours(folders["llava"], freeze=frozen)
    Finetune().attach(model)
    for tower in ("image", "projector", "text"):
        learns = all(p.requires_grad for p in model.tower(tower))
        assert learns == (tower not in frozen)


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name != "LoRA"])
def test_layers_outside_of_the_language_model_are_for_lora_alone(name, folders):
    strategy = discover()[name](target_modules=["v_proj", "fc1"])
    with pytest.raises(ValueError, match=r"'fc1', which matches no .* among model.target_linears"):
        strategy.attach(ours(folders["llava"]))
    model = ours(folders["llava"])
    discover()[name](target_modules=r".*layers\.1\..*\.v_proj").attach(model)
    adapted = {n.partition(".v_proj")[0] for n in trainable_parameters(model) if ".v_proj" in n}
    assert adapted == {"lm.model.language_model.layers.1.self_attn"}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"target_modules": "q_proj"}, r"given in a list, \['q_proj'\]"),
        ({"target_modules": ["q_prj"]}, "'q_prj', which matches no linear layer: near.*q_proj"),
        ({"target_modules": ["embed_tokens"]}, "matches Embedding, no linear layer"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_towers": ["vision"]}, "no part 'vision': choose of image, projector, text"),
        ({"target_towers": []}, "target_towers is"),
        ({"target_towers": ["projector"], "train_projector": True}, "adapted or trained in full"),
        ({"train_towers": ["image"]}, "'image' out of the model's own freeze"),
        ({"modules_to_save": ["nohead"]}, "no module 'nohead': near names are lm_head"),
        ({"modules_to_save": ["language_model"]}, "holds all target layers"),
        ({"options": {"bias": "all"}}, "options has bias 'all', which LoRA does not obey"),
        ({"options": {"target_parameters": ["x"]}}, "target_parameters .* does not obey"),
        ({"options": {"lora_bias": True}}, "has no bias that it could be merged into"),
        ({"options": {"layers_to_transform": [9]}}, "leave no target layer"),
        ({"trainable_token_indices": [1, 1]}, "give different rows from 0 to"),
        ({"trainable_token_indices": [10**6]}, "give different rows from 0 to"),
        ({"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}, "train in full"),
        ({"adapter": "nowhere"}, "adapter is nowhere, and there is no such folder"),
        ({"adapter_mode": "add"}, "adapter_mode is 'add', expected 'continue' or 'merge'"),
    ],
)
def test_what_lora_cannot_do_is_refused_by_name(how, message, folders):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        LoRA(2, **how).attach(ours(folders["llava"]))


def test_layers_are_chosen_as_in_peft(folders):
    base = folders["llava"]
    for settings in (
        {"target_modules": ["q_proj", "layers.0.mlp.fc1"]},
        {"target_modules": r".*vision_tower.*\.(q|v)_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "exclude_modules": r".*vision_tower.*"},
    ):
        theirs = peft.get_peft_model(native(base), peft.LoraConfig(r=2, **settings))
        wanted = {n for n, p in theirs.base_model.model.named_parameters() if p.requires_grad}
        words = settings.pop("target_modules")
        model = ours(base)
        LoRA(2, target_modules=words, options=settings).attach(model)
        assert {n for n, p in model.lm.named_parameters() if p.requires_grad} == wanted


def test_towers_name_the_layers_that_are_adapted(folders):
    for family in ("llava", "qwen2_5_vl", "smolvlm"):
        for towers in (["image"], ["projector"], ["image", "text"], ["text"]):
            model = ours(folders[family])
            own = {t: {id(p) for p in model.tower(t)} for t in ("image", "projector", "text")}
            LoRA(2, target_towers=towers).attach(model)
            linears = {
                t: sum(isinstance(m, torch.nn.Linear) and id(m.weight) in ids
                       for n, m in model.lm.named_modules() if n.endswith("base_layer"))
                for t, ids in own.items()
            }  # fmt: skip
            assert {t for t, count in linears.items() if count} == set(towers)
            assert all("lora_" in name for name in trainable_parameters(model))


def test_every_adapter_of_a_tower_gets_a_gradient_also_from_text_alone(folders):
    model = ours(folders["llava"])
    LoRA(2, target_towers=["image", "projector", "text"]).attach(model)
    for hidden in ((), (0, 1, 2)):
        batch = a_batch(model, hidden=hidden)
        model.zero_grad()
        model.train()
        model.loss(model(batch), batch).backward()
        missing = [n for n, p in trainable_parameters(model).items() if p.grad is None]
        assert missing == []


def test_the_start_of_a_run_is_silent(folders, tmp_path):
    written(folders["llava"], tmp_path, **STARTS["list"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mode in ("continue", "merge"):
            started(folders["llava"], tmp_path, mode)


def test_master_weights_are_exported_in_the_models_own_dtype(folders, tmp_path):
    model = ImageTextToText(folders["llava"], dtype="bfloat16")
    module = ContinualModule(model, LoRA(2, train_projector=True)).eval()
    begin_task(module.model, module.strategy, an_answer_task(0))
    projector = dict(module.model.lm.model.multi_modal_projector.named_parameters())
    assert {p.dtype for p in projector.values()} == {torch.float32}
    write_model(module, tmp_path / "whole", half=False)
    write_adapter(module, tmp_path / "adapter", half=False)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in whole.values()} == {torch.bfloat16}
    for name, parameter in projector.items():
        for state in (whole, adapter):
            own = [v for key, v in state.items() if key.endswith(f"multi_modal_projector.{name}")]
            assert torch.equal(own[0], parameter.detach().bfloat16()), name
