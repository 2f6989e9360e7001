"""Entries of the families: module groups, targets of adapters and word scores."""

import pytest
import torch
import transformers as hf
from transformers.quantizers.quantizers_utils import should_convert_module

from mmcl.models.hf_vlm import architectures, loading
from mmcl.models.hf_vlm.architectures import (
    ARCHITECTURES,
    architecture_of,
    find_linears,
    output_logits,
    parameters_of,
)
from tests.models.family_reference import reference
from tests.models.small_families import FAMILIES, random_family

SIAMESE = {"paligemma2": "paligemma", "pixtral": "llava"}
"""Families that share another's ``model_type``."""


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def lm(family):
    kind, config, _ = FAMILIES[family]()
    torch.manual_seed(0)
    return kind(config).eval()


def test_every_family_has_an_entry_of_its_own(family, lm):
    assert lm.config.model_type == SIAMESE.get(family, family)
    assert lm.config.model_type in ARCHITECTURES


def test_groups_are_the_whole_model_and_disjoint(lm):
    architecture = architecture_of(lm)
    groups = [parameters_of(lm, architecture, name) for name in ("image", "projector", "text")]
    found = [id(parameter) for group in groups for parameter in group]
    assert all(groups)
    assert len(found) == len(set(found))
    assert set(found) == {id(parameter) for parameter in lm.parameters()}


def test_what_ends_in_word_features_is_the_projector(family, lm):
    architecture = architecture_of(lm)
    names = {id(parameter): name for name, parameter in lm.named_parameters()}
    group = {names[id(p)] for p in parameters_of(lm, architecture, "projector")}
    tops = {name.removeprefix("model.").split(".")[0] for name in group}
    expected = {
        "llava_next": {"multi_modal_projector", "image_newline"},
        "llava_onevision": {"multi_modal_projector", "image_newline"},
        "qwen2_vl": {"visual"}, "qwen2_5_vl": {"visual"}, "qwen3_vl": {"visual"},
        "smolvlm": {"connector"}, "idefics3": {"connector"},
    }  # fmt: skip
    assert tops == expected.get(family, {"multi_modal_projector"})
    inner = {name.removeprefix("model.visual.").split(".")[0] for name in group}
    if family == "qwen3_vl":
        assert inner == {"merger", "deepstack_merger_list"}
    elif family.startswith("qwen"):
        assert inner == {"merger"}


def test_targets_are_the_linear_layers_of_every_block_of_the_language_model(family, lm):
    architecture = architecture_of(lm)
    prefix = f"model.{architecture.language}."
    blocks = lm.model.get_submodule(architecture.language).layers
    attention = {f"self_attn.{name}_proj" for name in "qkvo"}
    mlp = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    expected = [(attention, mlp, set())] * len(blocks)
    if family == "lfm2_vl":
        mlp = {f"feed_forward.w{number}" for number in (1, 2, 3)}
        attention = {"self_attn.out_proj", *(f"self_attn.{name}_proj" for name in "qkv")}
        expected = [(set(), mlp, {"conv.in_proj", "conv.out_proj"}), (attention, mlp, set())]
    for index, which in enumerate(("attention", "mlp", "all")):
        found = find_linears(lm, prefix, which)
        wanted = {
            f"{prefix}layers.{number}.{name}"
            for number, sets in enumerate(expected)
            for name in (sets[index] if which != "all" else set().union(*sets))
        }
        assert set(found) == wanted
        assert all(lm.get_submodule(name) is layer for name, layer in found.items())


def test_quantization_takes_the_linear_layers_of_the_language_model_alone(lm, monkeypatch):
    monkeypatch.setattr(loading, "is_bitsandbytes_available", lambda: True)
    monkeypatch.setattr(loading, "BitsAndBytesConfig", lambda **options: options)
    skipped = loading._quantization_config("4bit", torch.bfloat16)["llm_int8_skip_modules"]
    linear = {n for n, module in lm.named_modules() if isinstance(module, torch.nn.Linear)}
    quantized = {name for name in linear if should_convert_module(name, skipped)}
    language = f"model.{architecture_of(lm).language}."
    assert quantized == {name for name in linear if name.startswith(language)} != set()


def test_word_scores_are_those_of_the_models_own_forward(family):
    lm, processor = random_family(family)
    inputs, _, expected, _ = reference(lm, processor, ["one", "two"])
    labels = inputs.pop("labels")
    rows, steps = torch.nonzero(labels[:, 1:] != -100, as_tuple=True)
    with torch.no_grad():
        hidden = lm.model(**inputs)[0]
    torch.testing.assert_close(output_logits(lm, hidden[rows, steps]), expected)


def test_a_cap_that_gemma_3_states_is_not_applied_as_in_its_forward():
    lm, _ = random_family("gemma3")
    lm.config.text_config.final_logit_softcapping = 0.5
    hidden = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(output_logits(lm, hidden), lm.get_output_embeddings()(hidden))


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl", "smolvlm"])
def test_a_type_without_an_entry_gets_names_that_fit_its_modules(family, monkeypatch):
    kind, config, _ = FAMILIES[family]()
    lm = kind(config)
    known = architecture_of(lm)
    rest = {name: one for name, one in ARCHITECTURES.items() if name != config.model_type}
    monkeypatch.setattr(architectures, "ARCHITECTURES", rest)
    found = architecture_of(lm)
    assert (found.projector, found.tower, found.language) == (
        known.projector, known.tower, known.language,
    )  # fmt: skip


def test_a_model_of_unknown_modules_is_refused_with_the_types_that_are_known():
    small = hf.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1,
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"of type 'llama' has no vision tower.* use one of type llava, "
    ):
        architecture_of(hf.LlamaForCausalLM(small))
