from types import SimpleNamespace

import pytest
import torch

from mmcl.core import Output, Strategy, Task, TaskStream
from mmcl.lightning.data import ContinualData
from mmcl.lightning.scoring import Column, ColumnScorer
from tests.stand_in import StandIn, a_batch, a_task


def stream(scenario):
    probe = Task(3, "probe", classes=("x", "y"), labels=(0, 1), is_probe=True)
    return TaskStream("s", scenario, [a_task(0), a_task(1), a_task(2)], [probe])


def data_of(scenario):
    data = ContinualData()
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
    assert not data.column(2, 0).tells_task


def test_a_task_incremental_cell_lets_only_its_own_classes_win():
    cell = data_of("task").column(3, 1)
    assert cell.allowed == (2, 3)
    assert cell.tells_task


def test_a_probe_is_asked_for_its_own_classes():
    assert data_of("class").column(2, 3).names == ("x", "y")


class Watches(Strategy):
    """Keeps what it is told, and turns every answer around."""

    def prompts(self, model, batch):
        self.told = batch.task.tolist()
        return super().prompts(model, batch)

    def refine(self, model, batch, output):
        return Output(-output.logits, output.image, output.text, output.prompts)


def scored(column, strategy, batches):
    model, scorer = StandIn(), ColumnScorer(column)
    scorer.begin(model)
    for batch in batches:
        scorer.add(model, strategy, batch)
    scorer.finish()
    return model, scorer


@pytest.mark.parametrize(("tells", "told"), [(False, [-1] * 4), (True, [1] * 4)])
def test_the_strategy_is_told_the_task_only_where_the_scenario_says_so(tells, told):
    strategy = Watches()
    scored(Column(a_task(1), ("a",) * 6, tells_task=tells), strategy, [a_batch(4, task=1)])
    assert strategy.told == told


def test_the_score_is_the_share_of_right_answers_of_the_refined_output():
    batches = [a_batch(8, task=1, start=8), a_batch(8, task=1)]
    model, scorer = scored(Column(a_task(1), ("a",) * 6), Watches(), batches)
    right = [(-model(b).logits).argmax(1) == b.labels for b in batches]
    assert scorer.value == pytest.approx(torch.cat(right).double().mean().item())
    assert scorer.said["sample"].tolist() == list(range(16))


def test_only_allowed_columns_win():
    column = Column(a_task(1), ("a",) * 6, allowed=(2, 3))
    _, scorer = scored(column, Strategy(), [a_batch(16, task=1)])
    assert set(scorer.said["answer"].tolist()) <= {2, 3}


def test_heads_of_the_stream_do_not_touch_a_probe():
    probe = Task(3, "probe", classes=("x", "y"), labels=(0, 1), is_probe=True)
    model, scorer = scored(Column(probe, ("x", "y")), Watches(), [a_batch(8)])
    assert scorer.said["answer"].tolist() == model(a_batch(8)).logits.argmax(1).tolist()


def test_a_column_without_a_readable_sample_says_so():
    with pytest.raises(ValueError, match="no test sample of 'task 1'"):
        scored(Column(a_task(1), ("a",)), Strategy(), [])
