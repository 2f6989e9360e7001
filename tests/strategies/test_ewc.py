from dataclasses import replace

import pytest
import torch
from torch import nn

from mmcl.core import Batch, Chain, Output, begin_task, end_task, step, trainable_parameters
from mmcl.core.seeding import generator, hash_priorities
from mmcl.strategies import ewc
from mmcl.strategies.ewc import EWC
from mmcl.strategies.lora import LoRA
from mmcl.strategies.o_lora import OLoRA
from tests.strategies.plain_loop import learn
from tests.toys.toy_clip import StandIn, a_task, task_batches
from tests.toys.toy_llava import a_dialogue_batch, a_llava, an_answer_task


class Logistic(nn.Module):
    """Softmax regression on 12 pixels: its Fisher is known in closed form."""

    def __init__(self, classes=3):
        super().__init__()
        self.head = nn.Linear(12, classes, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(0.5))
        with torch.no_grad():
            self.head.weight.copy_(torch.linspace(-1, 1, 12 * classes).view(classes, 12))

    def forward(self, batch, prompts=None):
        pixels = batch.images.flatten(1).float() / 255
        return Output(self.logit_scale.exp() * self.head(pixels))

    def loss(self, output, batch):
        return nn.functional.cross_entropy(output.logits, batch.labels)


class Pairs(nn.Module):
    """Scores images against the texts of the batch: (B, B)."""

    def __init__(self):
        super().__init__()
        self.image = nn.Linear(12, 4)
        self.text = nn.Embedding(9, 4)

    def forward(self, batch, prompts=None):
        image = self.image(batch.images.flatten(1).float() / 255)
        text = self.text(batch.input_ids).mean(1)
        return Output(3 * image @ text.T, image, text)


def rows(count=10, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 2, 2), generator=g, dtype=torch.uint8)
    labels = torch.randint(0, classes, (count,), generator=g)
    return Batch(
        images, labels, torch.zeros(count, dtype=torch.int64), sample_ids=torch.arange(count)
    )


def task_of(batch, index=0):
    return a_task(index, classes=3, size=len(batch))


def closed_form(model, batch, label_of=None):
    """Mean over samples of ((p - e_y) x^T)^2, in plain loops."""
    weight = model.head.weight.detach().double() * model.logit_scale.detach().double().exp()
    total = torch.zeros_like(weight)
    for row in range(len(batch)):
        pixels = batch.images[row].flatten().double() / 255
        slope = (weight @ pixels).softmax(0)
        slope[int(batch.labels[row])] -= 1
        total += (torch.outer(slope, pixels) * float(model.logit_scale.detach().exp())) ** 2
    return total / len(batch)


def test_the_fisher_of_softmax_regression_is_the_closed_form():
    model, batch = Logistic(), rows()
    strategy = EWC()
    strategy.end_task(model, task_of(batch), [batch])
    found = strategy.importance.get("head.weight")
    torch.testing.assert_close(found.double(), closed_form(model, batch), rtol=1e-5, atol=1e-9)


def test_the_fisher_does_not_depend_on_how_samples_are_batched():
    model, batch = Logistic(), rows()
    one, many = EWC(fisher_samples=6), EWC(fisher_samples=6)
    one.end_task(model, task_of(batch), [batch])
    shuffled = batch.take(torch.randperm(10, generator=torch.Generator().manual_seed(0)))
    many.end_task(model, task_of(batch), [shuffled.take(row[None]) for row in torch.arange(10)])
    torch.testing.assert_close(
        one.importance.get("head.weight"), many.importance.get("head.weight"), rtol=1e-6, atol=0
    )


def test_samples_takes_exactly_that_many_samples():
    model, batch = Logistic(), rows()
    strategy = EWC(fisher_samples=4)
    hashes = hash_priorities(0, 0, torch.arange(10)).tolist()
    chosen = torch.tensor(sorted(range(10), key=lambda sample: hashes[sample])[:4])
    strategy.end_task(model, task_of(batch), [batch])
    expected = closed_form(model, batch.take(chosen))
    found = strategy.importance.get("head.weight").double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


def test_the_models_own_labels_give_the_mean_over_its_answers():
    model, batch = Logistic(), rows(1)
    with torch.no_grad():
        model.head.weight.mul_(0.1)
    many = batch.take(torch.zeros(3000, dtype=torch.int64))
    many = Batch(many.images, many.labels, many.task_ids, sample_ids=torch.arange(3000))
    strategy = EWC(fisher="model")
    strategy.end_task(model, task_of(many), [many])
    answer = model(batch).logits[0].softmax(0)
    expected = sum(
        float(answer[label].detach())
        * closed_form(model, Batch(batch.images, torch.tensor([label]), batch.task_ids))
        for label in range(3)
    )
    found = strategy.importance.get("head.weight").double()
    torch.testing.assert_close(found, expected, rtol=0.1, atol=1e-3)


def test_the_scale_of_the_cosine_moves_freely_by_default():
    model, batch = Logistic(), rows()
    free, held = EWC(), EWC(exclude=())
    for strategy in (free, held):
        strategy.end_task(model, task_of(batch), [batch])
    assert list(free.importance.tensors) == ["head.weight"]
    assert set(held.importance.tensors) == {"head.weight", "logit_scale"}


def test_the_penalty_is_half_the_weighted_squared_distance():
    model, batch = Logistic(), rows()
    strategy = EWC(ewc_lambda=7.0)
    begin_task(model, strategy, task_of(batch))
    assert set(step(model, strategy, batch).terms) == {"task"}
    end_task(model, strategy, task_of(batch), [batch])
    old = model.head.weight.detach().clone()
    with torch.no_grad():
        model.head.weight.add_(0.3)
    fisher = strategy.importance.get("head.weight")
    expected = 0.0
    for f, now, before in zip(
        fisher.flatten().tolist(),
        model.head.weight.flatten().tolist(),
        old.flatten().tolist(),
        strict=True,
    ):
        expected += 7.0 * 0.5 * f * (now - before) ** 2
    term = step(model, strategy, batch).terms["ewc"]
    assert float(term.detach()) == pytest.approx(expected, rel=1e-5)


def test_an_older_fisher_decays_and_the_anchor_moves():
    model, batch, later = Logistic(), rows(), rows(seed=1)
    strategy = EWC(decay=0.25)
    strategy.end_task(model, task_of(batch), [batch])
    first = closed_form(model, batch)
    with torch.no_grad():
        model.head.weight.mul_(0.5)
    strategy.end_task(model, task_of(later, 1), [later])
    found = strategy.importance.get("head.weight").double()
    torch.testing.assert_close(
        found, 0.25 * first + closed_form(model, later), rtol=1e-5, atol=1e-9
    )
    assert torch.equal(strategy.anchors.get("head.weight"), model.head.weight)


def captions(count, seed=0):
    batch = rows(count, seed=seed)
    tokens = torch.randint(0, 9, (count, 2), generator=torch.Generator().manual_seed(seed))
    return replace(batch, labels=torch.full((count,), -100), input_ids=tokens)


def over_groups(model, batch, groups, drawn=None):
    """Mean of the squared gradients of every sample's log p in its group, in plain loops.

    ``drawn`` is called with a sample and its (text, image) logits and returns the matched two.
    """
    total, count = torch.zeros_like(model.image.weight, dtype=torch.float64), 0
    for group in groups:
        for place, sample in enumerate(group):
            scores = model(batch.take(torch.tensor(group))).logits
            row, column = scores[place], scores[:, place]
            text, image = (place, place) if drawn is None else drawn(sample, row, column)
            likelihood = (row.softmax(0)[text].log() + column.softmax(0)[image].log()) / 2
            (slope,) = torch.autograd.grad(likelihood, [model.image.weight])
            total, count = total + slope.double() ** 2, count + 1
    return total / count


def fisher_of(strategy, model, batches, size):
    strategy.end_task(model, a_task(0, classes=3, size=size), batches)
    return strategy.importance.get("image.weight").double()


def near(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("size", [1, 3, 4, 7, 19])
def test_a_caption_is_scored_in_its_group_both_ways_whatever_the_batches(size):
    model, batch = Pairs(), captions(19)
    found = fisher_of(
        EWC(group=4), model, [batch.take(r) for r in torch.arange(19).split(size)], 19
    )
    groups = [list(range(start, min(start + 4, 19))) for start in range(0, 19, 4)]
    near(found, over_groups(model, batch, groups))


def test_captions_may_come_in_any_order_and_without_ids():
    model, batch = Pairs(), captions(12)
    expected = over_groups(model, batch, [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]])
    shuffled = batch.take(torch.randperm(12, generator=torch.Generator().manual_seed(1)))
    for whole in (shuffled, replace(batch, sample_ids=None)):
        near(
            fisher_of(
                EWC(group=5),
                model,
                [whole.take(torch.arange(7)), whole.take(torch.arange(7, 12))],
                12,
            ),
            expected,
        )


def test_a_caption_alone_in_the_last_group_is_left_out():
    model, batch = Pairs(), captions(9)
    found = fisher_of(EWC(group=4), model, [batch], 9)
    near(found, over_groups(model, batch, [[0, 1, 2, 3], [4, 5, 6, 7]]))
    with pytest.raises(RuntimeError, match="two or more captions"):
        fisher_of(EWC(), model, [batch.take(torch.tensor([0]))], 1)


@pytest.mark.parametrize("size", [20, 0], ids=["size known", "size unknown"])
def test_groups_are_made_of_the_chosen_captions(size):
    model, batch = Pairs(), captions(20)
    hashes = hash_priorities(3, 0, torch.arange(20)).tolist()
    chosen = sorted(sorted(range(20), key=lambda sample: hashes[sample])[:7])
    expected = over_groups(model, batch, [chosen[:3], chosen[3:6]])
    batches = [batch.take(part) for part in torch.arange(20).split(6)]
    near(fisher_of(EWC(fisher_samples=7, group=3, seed=3), model, batches, size), expected)


def test_the_models_own_captions_are_drawn_in_both_directions_for_every_sample():
    model, batch = Pairs(), captions(8)
    answers = []

    def drawn(sample, row, column):
        draw = generator(5, 0, sample)
        both = torch.stack([row, column]).detach().softmax(1).double()
        answers.append(torch.multinomial(both, 1, generator=draw).flatten().tolist())
        return answers[-1]

    expected = over_groups(model, batch, [[0, 1, 2, 3], [4, 5, 6, 7]], drawn)
    found = fisher_of(EWC(fisher="model", group=4, seed=5), model, [batch], 8)
    near(found, expected)
    assert any(text != place % 4 for place, (text, _) in enumerate(answers))
    assert any(text != image for text, image in answers)


def test_labels_of_samples_without_ids_are_drawn_by_their_place_in_the_pass():
    model, batch = Logistic(), rows(9)
    without = replace(batch, sample_ids=None)
    found = []
    for batches in ([batch], [without.take(part) for part in torch.arange(9).split(2)]):
        strategy = EWC(fisher="model", fisher_samples=6)
        strategy.end_task(model, task_of(batch), batches)
        found.append(strategy.importance.get("head.weight"))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)


def test_the_samples_of_a_task_are_chosen_once(monkeypatch):
    calls, choose = [], ewc.smallest_priorities_in_range
    monkeypatch.setattr(
        ewc, "smallest_priorities_in_range", lambda *args: calls.append(args) or choose(*args)
    )
    batch = rows()
    EWC(fisher_samples=4).end_task(
        Logistic(), task_of(batch), [batch.take(row) for row in torch.arange(10)[:, None]]
    )
    assert calls == [(10, 4, 0, 0)]


def test_a_choice_without_a_size_needs_data_that_can_be_read_twice():
    batch = rows()
    with pytest.raises(ValueError, match="fisher_samples is 4, task 'task 0' states no size"):
        EWC(fisher_samples=4).end_task(Logistic(), a_task(0, size=0), iter([batch]))


def test_samples_without_a_label_do_not_count():
    model, batch = Logistic(), rows()
    labels = batch.labels.clone()
    labels[5:] = -100
    strategy = EWC()
    masked = Batch(batch.images, labels, batch.task_ids, sample_ids=batch.sample_ids)
    strategy.end_task(model, task_of(batch), [masked])
    expected = closed_form(model, batch.take(torch.arange(5)))
    found = strategy.importance.get("head.weight").double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


def test_a_held_model_moves_less_where_it_matters():
    moved = {}
    for weight in (0.0, 50.0):
        model, strategy = learn(StandIn(), EWC(ewc_lambda=weight), [a_task(0)])
        begin_task(model, strategy, a_task(1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        for batch in 8 * task_batches(1):
            optimizer.zero_grad()
            step(model, strategy, batch).loss.backward()
            optimizer.step()
        moved[weight] = sum(
            float((fisher * (parameter.detach() - strategy.anchors.get(name)) ** 2).sum())
            for (name, fisher), parameter in zip(
                strategy.importance.tensors.items(), model.parameters(), strict=True
            )
        )
    assert moved[50.0] < 0.3 * moved[0.0]


def test_the_fisher_leaves_modes_and_gradients_as_they_were():
    model = StandIn().train()
    model.mix.norm1.eval()
    EWC().end_task(model, a_task(), task_batches())
    assert model.mix.training
    assert not model.mix.norm1.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_task_without_samples_is_an_error_that_says_what_to_give():
    with pytest.raises(RuntimeError, match="EWC saw no scored samples of task 'task 0'"):
        EWC().end_task(Logistic(), a_task(), [])


def likelihood_of(model, row, sampled=None):
    """Sum of log p of the scored tokens of one row, by transformers' own forward pass."""
    length = int(row.attention_mask.sum())
    tokens, labels = row.input_ids[:, :length], row.labels[0, :length]
    logits = model.lm(
        input_ids=tokens,
        pixel_values=model.image_inputs.forward_kwargs(model.lm, row)["pixel_values"],
    ).logits[0]
    scored = [place for place in range(1, length) if int(labels[place]) != -100]
    sampled = [int(labels[place]) for place in scored] if sampled is None else sampled
    return sum(
        logits[place - 1].log_softmax(0)[word] for place, word in zip(scored, sampled, strict=True)
    )


def by_hand(model, batch, sampled=None):
    """Mean over rows of the squared gradient of each row's log p, by name of what learns."""
    weights = trainable_parameters(model)
    totals = {name: torch.zeros_like(weight).double() for name, weight in weights.items()}
    for row in range(len(batch)):
        one = batch.take(torch.tensor([row]))
        likelihood = likelihood_of(model, one, None if sampled is None else sampled[row])
        slopes = torch.autograd.grad(likelihood, list(weights.values()), allow_unused=True)
        for name, slope in zip(weights, slopes, strict=True):
            if slope is not None:
                totals[name] += slope.double() ** 2
    return {name: total / len(batch) for name, total in totals.items()}


def expect_fisher(strategy, expected):
    assert set(strategy.importance.tensors) == set(expected)
    for name, value in expected.items():
        found = strategy.importance.get(name).double()
        torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-6 * float(value.max()) + 1e-12)


def test_the_fisher_of_an_answer_is_that_of_the_sum_over_its_scored_tokens():
    model = a_llava()
    batch = a_dialogue_batch(model, rows=6, task=1)
    strategy = EWC()
    strategy.end_task(model, an_answer_task(1, size=6), [batch])
    expect_fisher(strategy, by_hand(model, batch))


def test_under_an_adapter_only_what_learns_counts():
    model = a_llava()
    LoRA(rank=2).attach(model)
    for name, parameter in trainable_parameters(model).items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    batch = a_dialogue_batch(model, rows=4)
    strategy = EWC()
    strategy.end_task(model, an_answer_task(0, size=4), [batch])
    assert all("lora_" in name for name in strategy.importance.tensors)
    expect_fisher(strategy, by_hand(model, batch))


def test_the_models_own_words_are_drawn_at_every_scored_token_behind_the_right_ones():
    model = a_llava()
    batch = a_dialogue_batch(model, rows=3, task=1)
    strategy = EWC(fisher="model", seed=5)
    strategy.end_task(model, an_answer_task(1, size=3), [batch])
    sampled = []
    for row in range(3):
        logits = model(batch.take(torch.tensor([row]))).logits.detach()
        drawn = generator(5, 1, row)
        answer = logits.softmax(1).double()
        sampled.append(torch.multinomial(answer, 1, generator=drawn).flatten().tolist())
    right = [batch.labels[row][batch.labels[row] != -100].tolist() for row in range(3)]
    assert sampled != right
    expect_fisher(strategy, by_hand(model, batch, sampled))


def test_the_fisher_of_answers_does_not_depend_on_how_samples_are_batched():
    model = a_llava()
    short, long = a_dialogue_batch(model, rows=4), a_dialogue_batch(model, rows=4, task=1)
    one, many = EWC(), EWC()
    one.end_task(model, an_answer_task(0, size=8), [short.join(long)])
    rows = [batch.take(torch.tensor([row])) for batch in (long, short) for row in range(4)]
    many.end_task(model, an_answer_task(0, size=8), rows)
    for name, value in one.importance.tensors.items():
        torch.testing.assert_close(value, many.importance.get(name), rtol=1e-5, atol=1e-12)


def test_a_fisher_of_adapters_that_are_not_trained_any_more_is_reported():
    found = {}
    for make in (LoRA, OLoRA):
        model, chain = a_llava(), Chain([make(rank=2), EWC(fisher_samples=2)])
        chain.attach(model)
        for task in (an_answer_task(0, 4), an_answer_task(1, 4)):
            begin_task(model, chain, task)
            end_task(model, chain, task, [a_dialogue_batch(model, rows=4, task=task.index)])
        found[make] = chain.inactive_parts()
    assert found[LoRA] == ()
    assert found[OLoRA] == ("EWC: no weight with a Fisher was trained, so there was no penalty",)


def test_samples_whose_answer_is_not_scored_do_not_count():
    model = a_llava()
    batch = a_dialogue_batch(model, rows=4)
    labels = batch.labels.clone()
    labels[2:] = -100
    strategy = EWC()
    strategy.end_task(model, an_answer_task(0, size=4), [replace(batch, labels=labels)])
    expect_fisher(strategy, by_hand(model, batch.take(torch.arange(2))))
