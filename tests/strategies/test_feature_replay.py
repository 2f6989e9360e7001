import io
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from mmcl.core import IGNORE_INDEX, Chain, begin_task, end_task, step, trainable_parameters
from mmcl.core.seeding import generator, hash_priorities
from mmcl.strategies.feature_replay import FeatureReplay
from tests.toys.toy_clip import StandIn, a_batch, a_task, task_batches


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def attached(**arguments):
    model, strategy = StandIn(), FeatureReplay(**arguments)
    strategy.attach(model)
    begin_task(model, strategy, a_task(0))
    return model, strategy


def trained(**arguments):
    model, strategy = attached(**arguments)
    end_task(model, strategy, a_task(0), task_batches(0))
    begin_task(model, strategy, a_task(1))
    return model, strategy


def test_attach_freezes_the_image_tower_only():
    model, _ = attached()
    assert list(trainable_parameters(model)) == ["names.weight"]


def test_features_give_the_loss_and_gradient_of_images():
    model, strategy = attached()
    plain = model.loss(model(a_batch()), a_batch())
    (expected,) = torch.autograd.grad(plain, [model.names.weight])
    done = step(model, strategy, a_batch())
    done.loss.backward()
    assert done.batch.images is None
    torch.testing.assert_close(done.loss, plain)
    torch.testing.assert_close(model.names.weight.grad, expected)


def test_stored_samples_are_those_of_smallest_hash_within_half_precision():
    model, strategy = trained(buffer_size=7, seed=2)
    hashes = hash_priorities(2, 0, torch.arange(24)).tolist()
    chosen = sorted(range(24), key=lambda sample: hashes[sample])[:7]
    images = [batch.take(torch.tensor([row])) for batch in task_batches(0) for row in range(8)]
    columns = strategy.memory.columns
    assert columns["features"].dtype == torch.float16
    for place, sample in enumerate(chosen):
        expected = model.encode_image(images[sample])[0]
        torch.testing.assert_close(columns["features"][place].float(), expected, atol=2e-3, rtol=0)
        assert int(columns["labels"][place]) == int(images[sample].labels)


@pytest.mark.parametrize(("share", "joined"), [(0.5, 8), (0.2, 2), (0.9, 72), (0.01, 1)])
def test_the_share_is_exact_and_joined_samples_stand_behind(share, joined):
    model, strategy = trained(buffer_size=10, replay_ratio=share)
    batch = strategy.extend_batch(model, a_batch(8, task=1))
    assert len(batch) == 8 + joined
    assert batch.is_replay.tolist() == [False] * 8 + [True] * joined
    assert batch.task_ids.tolist() == [1] * 8 + [0] * joined
    assert batch.keys[:8] == a_batch(8, task=1).keys
    assert len(batch.keys) == len(batch)
    assert batch.loss_weight == pytest.approx(1.0)


def test_the_loss_is_that_of_a_loop_over_new_and_drawn_samples():
    model, strategy = trained(buffer_size=10, seed=4)
    new = a_batch(8, task=1)
    done = step(model, strategy, new)
    columns = strategy.memory.columns
    order = torch.randperm(10, generator=generator(4, 0))[:8]
    names = functional.normalize(model.names.weight, dim=-1)
    losses = []
    for row in range(8):
        features = model.encode_image(new.take(torch.tensor([row])))[0].mean(0)
        losses.append(
            -(10 * functional.normalize(features, dim=0) @ names.T).log_softmax(0)[new.labels[row]]
        )
    for place in order.tolist():
        features = columns["features"][place].float().mean(0)
        label = columns["labels"][place]
        losses.append(-(10 * functional.normalize(features, dim=0) @ names.T).log_softmax(0)[label])
    torch.testing.assert_close(done.loss, sum(losses) / 16)


def test_draws_change_with_every_step_and_not_within_one():
    model, strategy = trained(buffer_size=20)
    draws = []
    for _ in range(3):
        batch = strategy.extend_batch(model, a_batch(4, task=1))
        again = strategy.extend_batch(model, a_batch(4, task=1))
        assert torch.equal(batch.features, again.features)
        draws.append(batch.features[4:])
        strategy.after_step(model, batch, model(batch))
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])


def test_a_checkpoint_resumes_as_the_original():
    model, original = trained(buffer_size=9)
    done = step(model, original, a_batch(8, task=1))
    original.after_step(model, done.batch, done.output)
    fresh = FeatureReplay(buffer_size=9)
    fresh.attach(model)
    begin_task(model, fresh, a_task(1))
    fresh.load_state_dict(through_a_file(original.state_dict()))
    for strategy in (original, fresh):
        end_task(model, strategy, a_task(1), task_batches(1))
    first, second = (s.extend_batch(model, a_batch(4, task=2)) for s in (original, fresh))
    assert torch.equal(first.features, second.features)
    assert torch.equal(first.labels, second.labels)


def test_features_of_another_encoder_are_refused():
    _, strategy = trained()
    state = through_a_file(strategy.state_dict())

    class Other(StandIn):
        def fingerprint(self):
            return "another"

    fresh = FeatureReplay()
    fresh.attach(Other())
    with pytest.raises(ValueError, match="made by encoder 'stand-in' and this model is 'another'"):
        fresh.load_state_dict(state)


def test_captions_are_stored_with_their_tokens():
    def captions(length, seed):
        tokens = torch.full((4, length), seed)
        return replace(
            a_batch(4, start=4 * seed), input_ids=tokens, labels=torch.full((4,), IGNORE_INDEX)
        )

    model, strategy = attached(buffer_size=8)
    end_task(model, strategy, a_task(0), [captions(3, 1), captions(5, 2)])
    batch = strategy.extend_batch(model, captions(2, 3))
    assert batch.input_ids.shape == (8, 5)
    for tokens, mask in zip(batch.input_ids[4:], batch.attention_mask[4:], strict=True):
        length = {1: 3, 2: 5}[int(tokens[0])]
        assert mask.tolist() == [True] * length + [False] * (5 - length)


def test_an_empty_store_is_reported():
    _, strategy = attached()
    assert strategy.inactive_parts() == ("memory is empty",)
    assert trained()[1].inactive_parts() == ()


def test_two_stores_in_a_chain_both_join():
    model = StandIn()
    chain = Chain([FeatureReplay(seed=0), FeatureReplay(seed=1, replay_ratio=0.2)])
    chain.attach(model)
    begin_task(model, chain, a_task(0))
    end_task(model, chain, a_task(0), iter(task_batches(0)))
    assert len(chain.extend_batch(model, a_batch(8, task=1))) == 20
