"""The measurement of a LLaVA-7B runs on a small one, and its memory table is that of the page."""

from pathlib import Path

import pytest
import torch

from mmcl.models import ImageTextToText
from mmcl.models.hf_vlm.loading import save_pretrained
from mmcl.models.hf_vlm.memory_estimate import Workload, estimate_memory
from tests.benchmarks.llava_7b import (
    GIB,
    METHODS,
    Memory,
    RandomLlava,
    attached,
    main,
    matrix_rate,
    memory_row,
    random_batch,
)

PAGE = Path(__file__).parent.parent.parent / "docs" / "recipes.md"


def test_it_runs_on_a_cpu_in_two_dtypes(capsys):
    main(["--shape", "small", "--device", "cpu", "--steps", "2", "--batch_size", "2"])
    out = capsys.readouterr().out
    for name in ("bfloat16", "float32"):
        row = next(each for each in out.splitlines() if each.startswith(f"{name}: "))
        first, last = (float(word) for word in row.rpartition("loss ")[2].split(" to "))
        assert last < first < 6  # ln 128 and a little
    assert "8-bit and 4-bit weights need a GPU: not measured" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do():
    with pytest.raises(SystemExit, match="needs a GPU and torch finds none: run it on a machine"):
        main([])


def test_seven_billion_weights_are_refused_on_a_cpu():
    with pytest.raises(SystemExit, match="give --shape small"):
        main(["--device", "cpu"])


def test_the_matrix_rate_is_operations_a_second():
    assert 1e6 < matrix_rate("cpu", torch.float32, 64) < 1e14


def test_the_random_model_is_saved_and_loaded_as_a_pretrained_one(tmp_path):
    torch.manual_seed(0)
    model = RandomLlava("small", "cpu", torch.float32)
    model.lm.generation_config.eos_token_id = model.processor.tokenizer.eos_token_id
    save_pretrained(model.lm, model.processor, tmp_path)
    loaded = ImageTextToText(str(tmp_path), conv_template="vicuna_v1", image_inputs="square")
    batch = random_batch(model, 2)
    torch.testing.assert_close(loaded(batch).logits, model(batch).logits)


def test_the_memory_of_a_batch_is_linear_in_its_samples():
    method = METHODS[0]
    model, strategy, prompts = attached(method, "small")
    one, many = (
        estimate_memory(model, strategy, Workload(n, 132, 16), prompts) for n in (1, 5)
    )  # fmt: skip
    assert Memory(one, 0).training(5) == pytest.approx(many.training, rel=0.01)
    assert Memory(one, 0).generation(5) == many.generation
    assert Memory(one, 0).batches(1) == "64 / 64"
    assert Memory(one, GIB).batches(1) == "- / -"


@pytest.mark.slow
def test_the_row_of_lora_on_the_page_is_what_is_estimated():
    row = memory_row(METHODS[0])
    assert "| " + " | ".join(row) + " |" in PAGE.read_text()
    model, _, _ = attached(METHODS[0])
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # r (d_in + d_out) of q, k, v, o, gate, up and down in 32 layers; the projector's two layers.
    adapters = 16 * 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert learning == adapters + 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert row[1] == f"{learning / 1e6:.1f}"
