"""Similarity of the layers of two checkpoints: features and attention maps against references."""

import pytest
import torch

from mmcl.diagnostics.representations import (
    compare_representations,
    find_blocks,
    record_layers,
    use_eager_attention,
)
from mmcl.ops.similarity import linear_cka
from tests.diagnostics.diagnosed import clip_module, llava_module, probes_of, small_data


def first_batch(module, data, number=0):
    spec = data.column(len(data.stream), number)
    if hasattr(module.model, "set_classes"):
        module.model.set_classes(spec.names, spec.task.templates)
    return next(iter(probes_of(data).batches(module.model, number)))


def test_blocks_are_named_by_tower(tmp_path):
    small_data(tmp_path)
    clip = find_blocks(clip_module(tmp_path).model)
    assert [(layer.tower, layer.number) for layer in clip] == [("image", 0), ("text", 0)]
    llava = find_blocks(llava_module(tmp_path).model)
    towers = [layer.tower for layer in llava]
    assert towers.count("image") == 2
    assert towers.count("text") == 1


def test_attention_of_open_clip_is_the_softmax_of_queries_and_keys(tmp_path):
    data = small_data(tmp_path)
    module = clip_module(tmp_path)
    given = []
    block = next(iter(find_blocks(module.model).values()))
    handle = block.attn.register_forward_pre_hook(lambda m, args: given.append(args))
    record = record_layers(module, first_batch(module, data))
    handle.remove()
    layer = next(iter(record.attention))
    weights = record.attention[layer][0][0]
    x, attn = given[0][0], block.attn
    query, key, _ = torch.nn.functional.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(
        3, dim=-1
    )
    width = x.shape[-1] // attn.num_heads
    for sample in range(len(x)):
        for head in range(attn.num_heads):
            own = slice(head * width, (head + 1) * width)
            scores = query[sample, :, own] @ key[sample, :, own].T / width**0.5
            torch.testing.assert_close(weights[sample, head], scores.softmax(-1))


def test_equal_checkpoints_are_equal_in_every_layer(tmp_path):
    data = small_data(tmp_path)
    modules = (clip_module(tmp_path), clip_module(tmp_path))
    found, heads = compare_representations(("a", "b"), modules, probes_of(data), [0, 1])
    for panel in found.panels:
        for series in panel.series:
            assert all(v == pytest.approx(1.0) for v in series.values if v is not None)
    assert {layer.tower for layer in heads} == {"image", "text"}
    assert all(len(values) == 2 for values in heads.values())
    embeddings = {metric.name: metric.value for metric in found.metrics}
    assert embeddings["CKA of the image embedding"] == pytest.approx(1.0)


def test_the_cka_of_a_layer_is_that_of_its_token_means(tmp_path):
    data = small_data(tmp_path)
    modules = (clip_module(tmp_path), clip_module(tmp_path, seed=1))
    means = []
    for module in modules:
        block = next(iter(find_blocks(module.model).values()))
        seen = []
        handle = block.register_forward_hook(lambda m, given, output, s=seen: s.append(output))
        for number in (0, 1):
            for batch in probes_of(data).batches(module.model, number):
                with torch.no_grad():
                    module.model.encode_image(batch)
        handle.remove()
        means.append(torch.cat([tokens.mean(1) for tokens in seen]))
    found, _ = compare_representations(("a", "b"), modules, probes_of(data), [0, 1])
    expected = float(linear_cka(*means, unbiased=True))
    assert found.panels[0].series[0].name == "image"
    assert found.panels[0].series[0].values[0] == pytest.approx(expected, abs=1e-5)


def test_text_features_are_means_over_real_tokens(tmp_path):
    data = small_data(tmp_path, kind="captioning")
    module = clip_module(tmp_path)
    batch = first_batch(module, data)
    block = list(find_blocks(module.model).values())[1]
    seen = []
    handle = block.register_forward_hook(lambda m, given, output: seen.append(output))
    record = record_layers(module, batch)
    handle.remove()
    layer = next(layer for layer in record.features if layer.tower == "text" and layer.number == 0)
    found = torch.cat(record.features[layer])
    for index, length in enumerate(batch.attention_mask.sum(1).tolist()):
        torch.testing.assert_close(found[index], seen[0][index, :length].mean(0))


def test_a_generative_model_has_features_and_heads_of_both_towers(tmp_path):
    data = small_data(tmp_path, kind="instruction")
    modules = (llava_module(tmp_path), llava_module(tmp_path))
    found, heads = compare_representations(("a", "b"), modules, probes_of(data), [0])
    assert [series.name for series in found.panels[0].series] == ["image", "text"]
    text = next(values for layer, values in heads.items() if layer.tower == "text")
    assert text == pytest.approx([1.0] * len(text))


def test_features_alone_can_be_compared(tmp_path):
    data = small_data(tmp_path)
    modules = (clip_module(tmp_path), clip_module(tmp_path))
    found, heads = compare_representations(
        ("a", "b"), modules, probes_of(data), [0], with_attention=False
    )
    assert heads == {}
    assert len(found.panels) == 1
    assert found.notes == []


def test_layers_with_a_reason_instead_of_a_value_are_named(tmp_path):
    data = small_data(tmp_path)
    modules = (clip_module(tmp_path), clip_module(tmp_path))
    found, _ = compare_representations(("a", "b"), modules, probes_of(data, samples=3), [0])
    assert found.panels[0].series[0].values[0] is None
    reasons = {metric.name: metric.reason for metric in found.metrics}
    assert reasons["CKA of image layer 0"] == "there are 3 samples: give 4 or more"


def test_a_model_that_cannot_return_its_attention_says_why():
    class Refuses:
        class lm:  # noqa: N801
            @staticmethod
            def set_attn_implementation(kind):
                raise ValueError(f"no {kind} here")

    assert use_eager_attention(Refuses()) == "no eager here"
    assert use_eager_attention(object()) == ""
