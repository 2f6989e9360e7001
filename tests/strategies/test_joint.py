import io

import torch

from mmcl.core import begin_task, end_task, trainable_parameters
from mmcl.strategies.finetune import Finetune
from mmcl.strategies.joint import Joint
from tests.toys.toy_clip import StandIn, a_batch, a_task, task_batches


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def replayed(strategy):
    replay_plan = strategy.replay_plan()
    return list(zip(replay_plan.task_ids.tolist(), replay_plan.sample_ids.tolist(), strict=True))


def weights(model):
    return {name: p.detach().clone() for name, p in trainable_parameters(model).items()}


def shaken(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5


def test_finetune_stores_nothing():
    strategy, model = Finetune(), StandIn()
    begin_task(model, strategy, a_task())
    end_task(model, strategy, a_task(), task_batches())
    assert strategy.replay_plan() is None
    assert strategy.state_bytes() == 0
    assert strategy.inactive_parts() == ()


def test_every_old_sample_is_replayed_once_without_a_share():
    strategy, model = Joint(), StandIn()
    assert strategy.replay_plan() is None
    end_task(model, strategy, a_task(0, size=5), [])
    end_task(model, strategy, a_task(1, size=3), [])
    assert replayed(strategy) == [(0, n) for n in range(5)] + [(1, n) for n in range(3)]
    assert strategy.replay_plan().replay_ratio is None


def test_without_a_card_the_pass_is_counted():
    strategy = Joint()
    end_task(StandIn(), strategy, a_task(size=0), [a_batch(8), a_batch(3, start=8)])
    assert replayed(strategy) == [(0, n) for n in range(11)]


def test_a_task_ended_again_after_a_resume_is_replayed_once():
    strategy = Joint()
    end_task(StandIn(), strategy, a_task(size=4), [])
    end_task(StandIn(), strategy, a_task(size=4), [])
    assert len(strategy.replay_plan()) == 4


def test_restart_goes_back_to_the_first_weights_at_every_task():
    model, strategy = StandIn(), Joint(restart=True)
    first = weights(model)
    for index in range(3):
        begin_task(model, strategy, a_task(index))
        for name, weight in weights(model).items():
            assert torch.equal(weight, first[name])
        shaken(model)


def test_without_restart_weights_continue():
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


def test_a_checkpoint_resumes_as_the_original():
    model, original = StandIn(), Joint(restart=True)
    begin_task(model, original, a_task(0))
    end_task(model, original, a_task(0, size=6), [])
    first = weights(model)
    shaken(model)
    fresh = Joint(restart=True)
    fresh.load_state_dict(through_a_file(original.state_dict()))
    assert replayed(fresh) == replayed(original)
    assert fresh.buffer_sizes() == {"memory": 6}
    begin_task(model, fresh, a_task(1))
    assert all(torch.equal(weight, first[name]) for name, weight in weights(model).items())
