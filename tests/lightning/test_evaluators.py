from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mmcl.core import Output, Strategy, Task, TaskStream
from mmcl.evaluation.evaluators import EvalSpec, Evaluator
from mmcl.lightning.datamodule import ContinualDataModule
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
