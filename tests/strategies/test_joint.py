import io

import torch

from mmcl.core import begin_task, end_task, trainable
from mmcl.strategies.finetune import Finetune
from mmcl.strategies.joint import Joint
from tests.stand_in import StandIn, a_batch, a_task, task_batches


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def recalled(strategy):
    recall = strategy.recall()
    return list(zip(recall.task.tolist(), recall.sample.tolist(), strict=True))


def weights(model):
    return {name: p.detach().clone() for name, p in trainable(model).items()}


def shaken(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5


def test_finetune_remembers_nothing():
    strategy, model = Finetune(), StandIn()
    begin_task(model, strategy, a_task())
    end_task(model, strategy, a_task(), task_batches())
    assert strategy.recall() is None
    assert strategy.bytes_remembered() == 0
    assert strategy.idle() == ()


def test_every_old_sample_is_recalled_once_without_a_share():
    strategy, model = Joint(), StandIn()
    assert strategy.recall() is None
    end_task(model, strategy, a_task(0, size=5), [])
    end_task(model, strategy, a_task(1, size=3), [])
    assert recalled(strategy) == [(0, n) for n in range(5)] + [(1, n) for n in range(3)]
    assert strategy.recall().share is None


def test_without_a_card_the_pass_is_counted():
    strategy = Joint()
    end_task(StandIn(), strategy, a_task(size=0), [a_batch(8), a_batch(3, start=8)])
    assert recalled(strategy) == [(0, n) for n in range(11)]


def test_a_task_ended_again_after_a_resume_is_recalled_once():
    strategy = Joint()
    end_task(StandIn(), strategy, a_task(size=4), [])
    end_task(StandIn(), strategy, a_task(size=4), [])
    assert len(strategy.recall()) == 4


def test_restart_goes_back_to_the_first_weights_at_every_task():
    model, strategy = StandIn(), Joint(restart=True)
    first = weights(model)
    for index in range(3):
        begin_task(model, strategy, a_task(index))
        for name, weight in weights(model).items():
            assert torch.equal(weight, first[name])
        shaken(model)


def test_without_restart_weights_go_on():
    model, strategy = StandIn(), Joint()
    begin_task(model, strategy, a_task(0))
    shaken(model)
    before = weights(model)
    begin_task(model, strategy, a_task(1))
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


def test_restart_leaves_frozen_and_grown_weights_alone():
    model, strategy = StandIn(), Joint(restart=True)
    begin_task(model, strategy, a_task(0))
    shaken(model)
    model.freeze("image")
    model.names = torch.nn.Embedding(9, 16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    begin_task(model, strategy, a_task(1))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_checkpoint_goes_on_as_the_original():
    model, original = StandIn(), Joint(restart=True)
    begin_task(model, original, a_task(0))
    end_task(model, original, a_task(0, size=6), [])
    first = weights(model)
    shaken(model)
    fresh = Joint(restart=True)
    fresh.load_state_dict(through_a_file(original.state_dict()))
    assert recalled(fresh) == recalled(original)
    assert fresh.holdings() == {"memory": 6}
    begin_task(model, fresh, a_task(1))
    assert all(torch.equal(weight, first[name]) for name, weight in weights(model).items())
