"""A row is answered alike alone, in company, in any place and in another process."""

from collections import Counter

import pytest
import torch

from mmcl.core import Batch
from mmcl.models import OpenCLIP
from tests.behaviour.kill_runs import in_process
from tests.lightning.generation_fixtures import learn_and_answer, load_and_answer
from tests.lightning.small_runs import SIZES, SmallRuns, all_strategies, small_model

TEXT_PROMPTS = {
    "class_path": "mmcl.strategies.L2P",
    "init_args": {"modality": "text", "pool_size": 4, "prompt_length": 2, "top_k": 2},
}


def near(left, right):
    """Equal where infinite, elsewhere to a 100,000th of the largest score."""
    is_finite = torch.isfinite(left)
    assert torch.equal(left[~is_finite], right[~is_finite])
    largest = float(left[is_finite].abs().max())
    torch.testing.assert_close(left[is_finite], right[is_finite], rtol=0, atol=1e-5 * largest)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [*all_strategies(), TEXT_PROMPTS], ids=str)
def test_answers_hang_on_the_row_and_the_checkpoint_alone(tmp_path, strategy):
    runs = SmallRuns(tmp_path)
    words = runs.words("run", strategy)
    assert in_process(learn_and_answer, words, tmp_path / "first.pt") == 0
    assert in_process(load_and_answer, words, tmp_path / "second.pt") == 0
    first, second = (torch.load(tmp_path / f"{n}.pt") for n in ("first", "second"))
    assert first["together"].shape == (18, 6)
    near(first["together"], first["alone"])
    near(first["together"][first["order"]], first["permuted"])
    for name in ("together", "alone", "permuted"):
        assert torch.equal(first[name], second[name])
    expect_every_sample_once(first["visits"])


def expect_every_sample_once(visits):
    """Every new sample of a task comes once in an epoch, whatever is recalled beside it."""
    if len(visits) == 3:
        return  # closed form: a task is one idle step and one exact pass
    for task, size in enumerate(SIZES):
        for epoch in (0, 1):
            own = [batch for batch in visits if batch[:2] == (task, epoch)]
            keys = Counter(key for batch in own for key in batch[2])
            assert len(keys) == size
            assert set(keys.values()) == {1}


@pytest.mark.slow
def test_recalled_rows_are_there_when_every_new_one_comes_once(runs):
    words = runs.words("run", "ExperienceReplay")
    file = runs.folder / "answers.pt"
    assert in_process(learn_and_answer, words, file) == 0
    visits = torch.load(file)["visits"]
    expect_every_sample_once(visits)
    assert all(rows == len(new) for task, _, new, rows in visits if task == 0)
    assert all(rows == len(new) + 4 for task, _, new, rows in visits if task > 0)


def test_class_texts_are_embedded_again_after_a_fused_optimizer_stepped(tmp_path):
    # Such an optimizer does not count up the version of the weights that it changes.
    model = OpenCLIP(small_model(tmp_path))
    names, templates = ("cat", "dog"), ("a {}",)
    model.set_classes(names, templates)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 16, 16), generator=draw, dtype=torch.uint8)
    batch = Batch(images, torch.tensor([0, 1]), torch.zeros(2, dtype=torch.int64))
    with torch.no_grad():
        model(batch)
    model.loss(model(batch), batch).backward()
    optimizer.step()
    with torch.no_grad():
        found = model(batch).text
    model.set_classes((), ())
    model.set_classes(names, templates)
    with torch.no_grad():
        assert torch.equal(found, model(batch).text)
