import io
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from mmcl.core import IGNORE_INDEX, Chain, begin_task, step
from mmcl.core.seeding import generator, hash_priorities
from mmcl.strategies.dark_replay import DarkReplay
from mmcl.strategies.finetune import Finetune
from tests.toys.toy_clip import StandIn, a_batch, a_task


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Growing(StandIn):
    """Answers only for the first ``known`` classes."""

    known = 6

    def forward(self, batch, prompts=None):
        output = super().forward(batch)
        return replace(output, logits=output.logits[:, : self.known])


def one_step(model, strategy, batch):
    done = step(model, strategy, batch)
    model.zero_grad()
    done.loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.05 * parameter.grad
    strategy.after_step(model, done.batch, done.output)
    return done


def started(model=None, **arguments):
    model, strategy = model or StandIn(), DarkReplay(**arguments)
    strategy.attach(model)
    begin_task(model, strategy, a_task(0))
    return model, strategy


def test_the_first_step_is_plain_and_fills_the_buffer():
    model, strategy = started()
    assert strategy.inactive_parts() == ("memory is empty",)
    done = one_step(model, strategy, a_batch(8))
    assert set(done.terms) == {"task"}
    assert len(done.batch) == 8
    assert strategy.buffer_sizes() == {"memory": 8}


def loop_terms(model, columns, first, second, alpha, beta):
    """Equation 6 of the paper, one remembered row after the other."""
    squares, entropies = [], []
    for place in first.tolist():
        row = a_batch(1)
        logits = model(replace(row, images=columns["images"][place][None])).logits[0]
        known = int(columns["known"][place])
        squares += list((logits[:known] - columns["logits"][place][:known]) ** 2)
    for place in second.tolist():
        row = a_batch(1)
        logits = model(replace(row, images=columns["images"][place][None])).logits
        entropies.append(functional.cross_entropy(logits, columns["labels"][place][None]))
    return alpha * sum(squares) / len(squares), beta * sum(entropies) / len(entropies)


def test_the_loss_is_that_of_a_loop():
    model, strategy = started(buffer_size=20, alpha=0.7, beta=0.4, seed=5)
    for start in (0, 8, 16):
        one_step(model, strategy, a_batch(8, seed=start, start=start))
    new = a_batch(8, task=1)
    done = step(model, strategy, new)
    columns = strategy.memory.columns
    first = torch.randperm(20, generator=generator(5, 24, 0))[:8]
    second = torch.randperm(20, generator=generator(5, 24, 1))[:8]
    assert first.tolist() != second.tolist()
    dark, labelled = loop_terms(model, columns, first, second, 0.7, 0.4)
    plain = model.loss(model(new), new)
    torch.testing.assert_close(done.terms["task"], plain)
    torch.testing.assert_close(done.terms["dark_logits"], dark)
    torch.testing.assert_close(done.terms["dark_labels"], labelled)
    torch.testing.assert_close(done.loss, plain + dark + labelled)


def test_scores_of_classes_unknown_at_insertion_are_not_compared():
    model = Growing()
    model.known = 2
    model, strategy = started(model, buffer_size=50)
    one_step(model, strategy, a_batch(8))
    model.known = 4
    one_step(model, strategy, a_batch(8, task=1))
    columns = strategy.memory.columns
    assert columns["logits"].shape[1] == 4
    assert sorted(columns["known"].tolist()) == [2] * 8 + [4] * 8
    first = torch.randperm(16, generator=generator(0, 16, 0))[:10]
    second = torch.randperm(16, generator=generator(0, 16, 1))[:10]
    done = step(model, strategy, a_batch(10, task=1))
    dark, labelled = loop_terms(model, columns, first, second, 0.3, 0.5)
    torch.testing.assert_close(done.terms["dark_logits"], dark)
    torch.testing.assert_close(done.terms["dark_labels"], labelled)


def test_samples_just_stored_are_at_distance_zero():
    model, strategy = started()
    done = step(model, strategy, a_batch(8))
    strategy.after_step(model, done.batch, done.output)
    again = step(model, strategy, a_batch(8, seed=1))
    assert float(again.terms["dark_logits"].detach()) == pytest.approx(0, abs=1e-9)


def test_the_buffer_is_a_sample_of_the_new_samples_only():
    model, strategy = started(buffer_size=10, seed=1)
    images = []
    for start in range(0, 40, 8):
        batch = a_batch(8, seed=start, start=start)
        images.append(batch.images)
        one_step(model, strategy, batch)
    hashes = hash_priorities(1, 0, torch.arange(40)).tolist()
    chosen = sorted(range(40), key=lambda visit: hashes[visit])[:10]
    assert torch.equal(strategy.memory.columns["images"], torch.cat(images)[chosen])


def test_samples_that_the_loader_replayed_are_not_stored_again():
    model, strategy = started()
    replayed = torch.tensor([False, True] * 4)
    one_step(model, strategy, replace(a_batch(8), is_replay=replayed))
    assert torch.equal(
        strategy.memory.columns["images"].sort(0).values, a_batch(8).images[::2].sort(0).values
    )


class Appender(Finetune):
    """Joins a copy of the batch's first rows, as another member of a chain may."""

    def extend_batch(self, model, batch):
        copy = a_batch(3)
        marks = torch.ones(3, dtype=torch.bool)
        return batch.join(replace(copy, labels=torch.full((3,), IGNORE_INDEX), is_replay=marks))


def test_samples_appended_by_other_members_do_not_move_the_terms():
    alone_model, alone = started()
    one_step(alone_model, alone, a_batch(8))
    expected = step(alone_model, alone, a_batch(8, task=1)).terms
    model = StandIn()
    chain = Chain([DarkReplay(), Appender()])
    begin_task(model, chain, a_task(0))
    one_step(model, chain, a_batch(8))
    terms = step(model, chain, a_batch(8, task=1)).terms
    for name in ("task", "dark_logits", "dark_labels"):
        torch.testing.assert_close(terms[name], expected[name])
    assert chain.buffer_sizes() == {"DarkReplay.memory": 8}


def test_ratio_sets_the_samples_of_a_draw_up_to_the_memory():
    model, strategy = started(buffer_size=6, draws_per_sample=0.5)
    one_step(model, strategy, a_batch(8))
    assert len(strategy.extend_batch(model, a_batch(8))) == 8 + 2 * 4
    assert len(strategy.extend_batch(model, a_batch(30))) == 30 + 2 * 6


def test_without_beta_it_is_plain_der_with_one_draw():
    model, strategy = started(beta=0.0)
    one_step(model, strategy, a_batch(8))
    done = step(model, strategy, a_batch(8))
    assert set(done.terms) == {"task", "dark_logits"}
    assert len(done.batch) == 16


def test_a_checkpoint_resumes_as_the_original():
    model, original = started(buffer_size=12)
    for start in (0, 8, 16):
        one_step(model, original, a_batch(8, seed=start))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    fresh_model, fresh = started(buffer_size=12)
    fresh_model.load_state_dict(weights)
    fresh.load_state_dict(through_a_file(original.state_dict()))
    for start in (24, 32):
        first = one_step(model, original, a_batch(8, seed=start))
        second = one_step(fresh_model, fresh, a_batch(8, seed=start))
        assert torch.equal(first.loss, second.loss)
        assert torch.equal(first.batch.images, second.batch.images)
    for name, column in original.memory.columns.items():
        assert torch.equal(fresh.memory.columns[name], column)


def test_captions_and_features_are_refused_at_the_first_batch():
    model, strategy = started()
    caption = replace(a_batch(4), input_ids=torch.zeros(4, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="for captions"):
        step(model, strategy, caption)
    features = replace(a_batch(4), images=None, features=torch.zeros(4, 1, 16))
    with pytest.raises(ValueError, match="DarkReplay was given features"):
        step(model, strategy, features)
