"""Loss on a task against loops over its samples."""

import math

import pytest
import torch
import yaml

from mmcl.diagnostics.task_loss import ProbeData, finite_or_none, mean_or_none, measure_task
from tests.diagnostics.diagnosed import clip_module, llava_module, probes_of, small_data


def test_the_loss_is_the_mean_over_samples_whatever_the_batches(tmp_path):
    data = small_data(tmp_path)
    module = clip_module(tmp_path)
    found = measure_task(module, probes_of(data), 2, 1, with_score=True)
    losses, right = [], 0
    for batch in probes_of(data).batches(module.model, 1):
        with torch.no_grad():
            logits = module.model(batch).logits
        for row, label in zip(logits.tolist(), batch.labels.tolist(), strict=True):
            total = math.log(sum(math.exp(score) for score in row))
            losses.append(total - row[label])
            right += max(range(len(row)), key=row.__getitem__) == label
    assert len(losses) == 5  # in batches of 4: 3 and 2
    assert found.loss == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert found.score == right / 5


def test_only_the_own_classes_compete_in_a_task_incremental_stream(tmp_path):
    data = small_data(tmp_path)
    card = tmp_path / "stream" / "small.yaml"
    card.write_text(yaml.safe_dump(yaml.safe_load(card.read_text()) | {"scenario": "task"}))
    data = type(data)(str(card), eval_batch_size=4)
    data.setup()
    module = clip_module(tmp_path)
    found = measure_task(module, probes_of(data), 2, 1)
    losses = []
    for batch in probes_of(data).batches(module.model, 1):
        with torch.no_grad():
            logits = module.model(batch).logits[:, 2:]
        for row, label in zip(logits.tolist(), batch.labels.tolist(), strict=True):
            losses.append(math.log(sum(math.exp(s) for s in row)) - row[label - 2])
    assert found.loss == pytest.approx(sum(losses) / 5, rel=1e-5)


def test_the_loss_of_answers_is_the_mean_over_tokens(tmp_path):
    data = small_data(tmp_path, kind="instruction")
    module = llava_module(tmp_path)
    found = measure_task(module, probes_of(data), 1, 0)
    total, count = 0.0, 0
    for batch in probes_of(data).batches(module.model, 0):
        for index in range(len(batch)):
            with torch.no_grad():
                output = module.model(batch.take(torch.tensor([index])))
            scores = output.logits.double().log_softmax(1)
            targets = output.target_ids.tolist()
            total -= sum(float(scores[n, token]) for n, token in enumerate(targets))
            count += len(targets)
    assert found.loss == pytest.approx(total / count, rel=1e-4)
    assert found.score is None


def test_a_limit_gives_the_same_samples_every_time_and_to_every_occurrence(tmp_path):
    data = small_data(tmp_path, repeats=2)
    probes, model = probes_of(data, samples=3), clip_module(tmp_path).model
    keys = [[k for batch in probes.batches(model, n) for k in batch.keys] for n in (0, 0, 2)]
    assert len(keys[0]) == 3
    assert keys[0] == keys[1] == keys[2]
    tasks = {int(n) for batch in probes.batches(model, 2) for n in batch.task_ids}
    assert tasks == {2}


def test_no_samples_are_refused(tmp_path):
    with pytest.raises(ValueError, match="samples is 0: give 1 or more"):
        ProbeData(small_data(tmp_path), samples=0)


def test_means_of_undefined_values_are_undefined():
    assert mean_or_none([1.0, 3.0]) == 2.0
    assert mean_or_none([1.0, None]) is None
    assert mean_or_none([]) is None
    assert [finite_or_none(v) for v in (1.0, math.nan, -math.inf, None)] == [1.0, None, None, None]
