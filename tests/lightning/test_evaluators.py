import csv
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import mmcl
from mmcl.core import Output, Strategy, Task, TaskStream
from mmcl.data import eval_loader
from mmcl.data.convert.convert import convert, open_input
from mmcl.data.convert.record import ConvertOptions
from mmcl.evaluation.evaluators import EvalSpec, Evaluator
from mmcl.lightning.datamodule import ContinualDataModule
from mmcl.models import OpenCLIP
from tests.toys.toy_clip import StandIn, a_batch, a_task


def stream(scenario):
    probe = Task(3, "probe", classes=("x", "y"), class_ids=(0, 1), is_eval_only=True)
    return TaskStream("s", scenario, [a_task(0), a_task(1), a_task(2)], [probe])


def data_of(scenario):
    data = ContinualDataModule()
    data._prepared = SimpleNamespace(stream=stream(scenario))
    return data


def names_of(cell):
    return [name.removeprefix("class ") for name in cell.names]


def test_a_class_incremental_cell_knows_no_task_later_than_its_row_and_column():
    data = data_of("class")
    assert names_of(data.column(0, 0)) == ["0", "1"]
    assert names_of(data.column(0, 2)) == ["0", "1", "2", "3", "4", "5"]
    assert names_of(data.column(2, 0)) == ["0", "1", "2", "3"]
    assert names_of(data.column(3, 1)) == ["0", "1", "2", "3", "4", "5"]
    assert data.column(2, 0).allowed is None
    assert not data.column(2, 0).knows_task


def test_a_task_incremental_cell_lets_only_its_own_classes_win():
    cell = data_of("task").column(3, 1)
    assert cell.allowed == (2, 3)
    assert cell.knows_task


def test_a_probe_has_its_own_classes():
    assert data_of("class").column(2, 3).names == ("x", "y")


class Negated(Strategy):
    """Records the task ids, and negates all logits."""

    def prompts(self, model, batch):
        self.task_ids = batch.task_ids.tolist()
        return super().prompts(model, batch)

    def transform_output(self, model, batch, output):
        return Output(-output.logits, output.image, output.text, output.prompts)


def scored(column, strategy, batches):
    model, scorer = StandIn(), Evaluator(column)
    scorer.reset(model)
    for batch in batches:
        scorer.update(model, strategy, batch)
    scorer.compute()
    return model, scorer


@pytest.mark.parametrize(("knows_task", "task_ids"), [(False, [-1] * 4), (True, [1] * 4)])
def test_the_strategy_sees_task_ids_only_if_the_scenario_reveals_them(knows_task, task_ids):
    strategy = Negated()
    scored(EvalSpec(a_task(1), ("a",) * 6, knows_task=knows_task), strategy, [a_batch(4, task=1)])
    assert strategy.task_ids == task_ids


def test_the_score_is_the_accuracy_of_the_refined_output():
    batches = [a_batch(8, task=1, start=8), a_batch(8, task=1)]
    model, scorer = scored(EvalSpec(a_task(1), ("a",) * 6), Negated(), batches)
    right = [(-model(b).logits).argmax(1) == b.labels for b in batches]
    assert scorer.value == pytest.approx(torch.cat(right).double().mean().item())
    assert scorer.predictions["sample"].tolist() == list(range(16))


def test_only_allowed_columns_win():
    column = EvalSpec(a_task(1), ("a",) * 6, allowed=(2, 3))
    _, scorer = scored(column, Strategy(), [a_batch(16, task=1)])
    assert set(scorer.predictions["answer"].tolist()) <= {2, 3}


def test_heads_of_the_stream_do_not_touch_a_probe():
    probe = Task(3, "probe", classes=("x", "y"), class_ids=(0, 1), is_eval_only=True)
    model, scorer = scored(EvalSpec(probe, ("x", "y")), Negated(), [a_batch(8)])
    assert scorer.predictions["answer"].tolist() == model(a_batch(8)).logits.argmax(1).tolist()


def test_a_column_without_a_readable_sample_says_so():
    with pytest.raises(ValueError, match="no test sample of 'task 1'"):
        scored(EvalSpec(a_task(1), ("a",)), Strategy(), [])


def test_samples_without_ids_are_numbered_by_the_pass():
    model, evaluator = StandIn(), Evaluator(data_of("class").column(1, 0))
    batches = [a_batch(rows, seed=rows) for rows in (3, 5)]
    truth = torch.cat([model(batch).logits.argmax(1) for batch in batches])
    for _ in range(2):  # a second pass counts from 0 again
        evaluator.reset(model)
        for batch in batches:
            evaluator.update(model, Strategy(), replace(batch, sample_ids=None))
        evaluator.compute()
        assert evaluator.predictions["sample"].tolist() == list(range(8))
        assert torch.equal(evaluator.predictions["answer"], truth)


class KnowsColors(torch.nn.Module):
    """Both towers give the mean color of a sample's image; captions differ by a hair."""

    def forward(self, batch, prompts=None):
        image = torch.nn.functional.normalize(batch.images.float().mean((2, 3)) - 127, dim=1)
        draw = torch.Generator().manual_seed(len(batch))
        text = image + 1e-3 * torch.randn(image.shape, generator=draw)
        return Output(image @ text.T, image, text)


def color_stream(folder, with_lists):
    """Six images of one color each with five captions, as a csv of pairs or with lists."""
    draw = np.random.default_rng(0)
    rows = []
    for number in range(12):
        color = np.tile(draw.integers(0, 255, 3, dtype=np.uint8), (64, 64, 1))
        Image.fromarray(color).save(folder / f"{number}.png")
        split = "test" if number >= 6 else "train"
        texts = [f"image {number}, in way {way}" for way in "abcde"]
        texts = [json.dumps(texts)] if with_lists else texts
        rows += [(f"{number}.png", text, split) for text in texts]
    with (folder / "c.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "captions", "split"), *rows])
    convert(open_input(folder / "c.csv"), None, folder / "s", ConvertOptions("c"))
    return ContinualDataModule(str(folder / "s" / "c.yaml"))


@pytest.mark.parametrize("with_lists", [False, True])
@pytest.mark.parametrize("batch", [4, 64])
def test_a_perfect_model_of_five_captions_an_image_scores_1(tmp_path, batch, with_lists):
    data = color_stream(tmp_path, with_lists)
    task = data.prepared.stream[0]
    assert task.test_size == (6 if with_lists else 30)
    model, evaluator = KnowsColors(), Evaluator(EvalSpec(task, ()))
    transform = OpenCLIP("tiny", "built-in").transform(False)
    evaluator.reset(model)
    for each in eval_loader(data.prepared, 0, transform, batch=batch):
        evaluator.update(model, Strategy(), each)
    evaluator.compute()
    assert evaluator.value == 1.0
    found = evaluator.retrieval
    assert (found.images, found.texts) == (6, 30)
    assert found.text_to_image == {1: 1.0, 5: 1.0, 10: 1.0}


def test_pairs_of_a_users_own_dataset_are_evaluated_by_image():
    """One item for every caption, and one item with all captions of an image."""
    draw = torch.Generator().manual_seed(0)
    colors = torch.randint(0, 256, (6, 3, 1, 1), generator=draw, dtype=torch.uint8)
    images = [color.expand(3, 20, 20) for color in colors]
    transform = OpenCLIP("tiny", "built-in").transform(False)
    texts = [[f"image {n} {way}" for way in "abcde"] for n in range(6)]
    apart = [(image, text) for image, own in zip(images, texts, strict=True) for text in own]
    together = list(zip(images, texts, strict=True))
    for items, collate in (
        (apart, mmcl.ImageCaptionCollate(transform)),
        (together, mmcl.ImageCaptionCollate(transform, all_captions=True)),
    ):
        loader = DataLoader(items, batch_size=4, collate_fn=collate)
        assert mmcl.evaluate(KnowsColors(), Strategy(), loader) == 1.0
