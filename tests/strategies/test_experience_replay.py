import io
from collections import Counter
from dataclasses import replace

import pytest
import torch

from mmcl.core import UNSCORED, begin_task, end_task
from mmcl.core.randomness import ranks_of
from mmcl.strategies.experience_replay import ExperienceReplay
from tests.stand_in import StandIn, a_batch, a_task, task_batches


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def recalled(strategy):
    recall = strategy.recall()
    return list(zip(recall.task.tolist(), recall.sample.tolist(), strict=True))


def after(strategy, tasks, size=24):
    model = StandIn()
    for index in range(tasks):
        begin_task(model, strategy, a_task(index, size=size))
        end_task(model, strategy, a_task(index, size=size), task_batches(index, size))
    return strategy


def test_nothing_is_recalled_before_a_task_ended_and_that_is_reported():
    strategy = ExperienceReplay()
    assert strategy.recall() is None
    assert strategy.idle() == ("memory is empty",)


def test_recall_names_the_smallest_hashes_and_the_share():
    strategy = after(ExperienceReplay(samples=10, share=0.25, keep="copies", seed=3), tasks=3)
    hashes = [
        (rank, task, sample)
        for task in range(3)
        for sample, rank in enumerate(ranks_of(3, task, torch.arange(24)).tolist())
    ]
    assert recalled(strategy) == sorted((t, s) for _, t, s in sorted(hashes)[:10])
    assert strategy.recall().share == 0.25
    assert strategy.recall().keep == "copies"
    assert strategy.idle() == ()


def test_a_reservoir_with_a_card_does_not_read_the_pass():
    def untouched():
        raise AssertionError("the pass was read")
        yield

    strategy = ExperienceReplay(samples=5)
    end_task(StandIn(), strategy, a_task(size=9), untouched())
    assert len(strategy.recall()) == 5


def test_without_a_card_samples_are_named_by_the_batches():
    strategy = ExperienceReplay(samples=100)
    end_task(StandIn(), strategy, a_task(size=0), [a_batch(4, start=30), a_batch(4, start=50)])
    assert recalled(strategy) == [(0, n) for n in (30, 31, 32, 33, 50, 51, 52, 53)]


def test_without_card_and_numbers_samples_are_named_by_their_place():
    strategy = ExperienceReplay(samples=100)
    batches = [replace(a_batch(4), sample=None), replace(a_batch(3), sample=None)]
    end_task(StandIn(), strategy, a_task(size=0), batches)
    assert recalled(strategy) == [(0, n) for n in range(7)]


def test_balanced_remembers_equally_many_of_every_class():
    strategy = after(ExperienceReplay(samples=12, policy="balanced"), tasks=3)
    classes = Counter(strategy.memory.labels.tolist())
    assert classes == dict.fromkeys(range(6), 2)
    for task, label in zip(strategy.memory.task, strategy.memory.labels, strict=True):
        assert int(label) // 2 == int(task)


def test_a_checkpoint_goes_on_as_the_original():
    for policy in ("reservoir", "balanced"):
        original = after(ExperienceReplay(samples=9, policy=policy), tasks=2)
        fresh = ExperienceReplay(samples=9, policy=policy)
        fresh.load_state_dict(through_a_file(original.state_dict()))
        assert recalled(fresh) == recalled(original)
        for strategy in (original, fresh):
            end_task(StandIn(), strategy, a_task(2), task_batches(2))
        assert recalled(fresh) == recalled(original)


def test_wrong_arguments_say_what_to_do():
    with pytest.raises(ValueError, match="memory_bytes 0: remember at least 1, or use Finetune"):
        ExperienceReplay(samples=0)
    with pytest.raises(ValueError, match="memory_bytes -5: remember at least 1"):
        ExperienceReplay(memory_bytes=-5)
    with pytest.raises(ValueError, match="policy is 'ring': choose one of reservoir, balanced, h"):
        ExperienceReplay(policy="ring")
    with pytest.raises(ValueError, match="allocation is 'most': choose one of flat, equal_tasks"):
        ExperienceReplay(allocation="most")
    with pytest.raises(ValueError, match="scores is 'low' and policy 'herding'"):
        ExperienceReplay(policy="herding", scores="low")
    with pytest.raises(ValueError, match="pool is 0, expected 1 or more"):
        ExperienceReplay(policy="loss", pool=0)
    with pytest.raises(ValueError, match="share is 1.0, expected more than 0 and less than 1"):
        ExperienceReplay(share=1.0)
    with pytest.raises(ValueError, match="keep is 'none': choose 'references' or 'copies'; with"):
        ExperienceReplay(keep="none")


def test_balanced_refuses_samples_without_a_class():
    strategy = ExperienceReplay(policy="balanced")
    batch = replace(a_batch(4), labels=torch.full((4,), UNSCORED))
    with pytest.raises(ValueError, match="choose policy='reservoir' for captions"):
        end_task(StandIn(), strategy, a_task(), [batch])
