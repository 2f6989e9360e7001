"""What strategies compute of samples is that of one process, on uneven ranks and in micro-batches.

Every rank is a forked process that reads its stride; the reference is one process that has it all.
"""

import copy
import os
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import get_context
from torch.nn import functional

from mmcl.core import (
    Batch,
    Chain,
    GlobalBatch,
    Output,
    begin_task,
    end_task,
    forward,
    loss_weight,
    step,
    trainable_parameters,
)
from mmcl.core.batch import text_ids
from mmcl.models.open_clip.clip_losses import clip_loss
from mmcl.strategies import AGEM, EWC, L2P, DarkReplay, FeatureReplay, LoRA, LwF
from tests.distributed.ranks import on_ranks as command_on_ranks
from tests.distributed.ranks import seen
from tests.lightning.small_runs import SmallRuns, strategy_of
from tests.strategies.plain_loop import learn
from tests.toys.toy_clip import StandIn, a_batch, a_task, task_batches
from tests.toys.toy_llava import a_dialogue_batch, a_llava, an_answer_task


class Pairs(nn.Module):
    """Matches images of 2 x 2 with texts, by the loss of a CLIP."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.image, self.text = nn.Linear(12, 4), nn.Embedding(9, 4)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=draw))

    def forward(self, batch, prompts=None):
        image = functional.normalize(self.image(batch.images.flatten(1).float() / 255), dim=1)
        text = functional.normalize(self.text(batch.input_ids).sum(1), dim=1)
        return Output(5 * image @ text.T, image, text)

    def loss(self, output, batch):
        scale = torch.tensor(5.0)
        return clip_loss(
            output.image, output.text, scale, image_ids=batch.image_ids,
            text_ids=text_ids(batch.input_ids, batch.attention_mask), in_loss=batch.in_loss,
        )  # fmt: skip


def captions(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 2, 2), generator=draw, dtype=torch.uint8)
    tokens = torch.randint(1, 9, (count, 3), generator=draw)
    labels, tasks = torch.full((count,), -100), torch.zeros(count, dtype=torch.int64)
    return Batch(images, labels, tasks, input_ids=tokens, sample_ids=torch.arange(count))


def replayed(batch):
    return replace(batch, is_replay=torch.ones(len(batch), dtype=torch.bool))


def cut(whole, part, parts, world=1, rank=0):
    """The share of a global batch that a rank has in a micro-batch, as the loader states it."""
    own = whole.take(torch.arange(part * world + rank, len(whole), world * parts))
    new = len(whole) if whole.is_replay is None else int((~whole.is_replay).sum())
    sizes = GlobalBatch(len(whole), new, 0, whole.num_in_loss, part, parts)
    weight = own.num_in_loss * world * parts / whole.num_in_loss
    return replace(own, loss_weight=weight, global_batch=sizes)


def weights_of(model, strategy):
    trained = [*trainable_parameters(model).values(), *strategy.parameters()]
    return [parameter for parameter in trained if parameter.requires_grad]


def gradient(model, strategy, whole, parts=1, world=1, rank=0):
    """The gradient of a step over the global batch, averaged over ranks and micro-batches."""
    total = [torch.zeros_like(weight) for weight in weights_of(model, strategy)]
    for part in range(parts):
        done = step(model, strategy, cut(whole, part, parts, world, rank))
        loss = done.loss * loss_weight(done.batch)
        found = torch.autograd.grad(loss, weights_of(model, strategy), allow_unused=True)
        total = [t if g is None else t + g / parts for t, g in zip(total, found, strict=True)]
        strategy.after_step(model, done.batch, done.output)
    if world > 1:
        for tensor in total:
            dist.all_reduce(tensor)
    return torch.cat([tensor.flatten() for tensor in total]) / world


def on_ranks(work, folder, world=2):
    """What ``work(rank, world)`` returns on every rank."""
    fork = get_context("fork")
    ranks = [fork.Process(target=_on_rank, args=(work, r, world, folder)) for r in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def _on_rank(work, rank, world, folder):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    where = f"file://{folder}/door"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world)
    torch.save(work(rank, world), folder / f"{rank}.pt")
    dist.destroy_process_group()


def fisher(rank=0, world=1, size=4, count=21, **arguments):
    """The Fisher of a pass over captions in batches of a size."""
    model, strategy, batch = Pairs(), EWC(group=4, **arguments), captions(count)
    places = torch.arange(rank, count, world).split(size)
    batches = [batch.take(own) for own in places if len(own)]
    strategy.end_task(model, a_task(size=count), batches)
    return strategy.importance.tensors


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{}, {"fisher_samples": 10}, {"fisher": "model"}], ids=str)
@pytest.mark.parametrize("world", [2, 3])
def test_the_fisher_of_captions_is_that_of_one_process(tmp_path, world, arguments):
    found = on_ranks(lambda rank, world: fisher(rank, world, 3, **arguments), tmp_path, world)
    expected = fisher(size=21, **arguments)
    for own in found:
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.slow
def test_a_rank_without_captions_is_refused_on_all(tmp_path):
    def work(rank, world):
        with pytest.raises(ValueError, match="some rank has none: use fewer devices"):
            fisher(rank, world, count=1)

    on_ranks(work, tmp_path)


def reference_gradient(rank=0, world=1, samples=5):
    model, strategy = Pairs(), AGEM(buffer_size=8, reference_batch_size=samples)
    own = captions(8).take(torch.arange(rank, 8, world))
    end_task(model, strategy, a_task(size=8), [own])
    return torch.cat([g.flatten() for g in strategy._reference(model, list(model.parameters()))])


@pytest.mark.slow
@pytest.mark.parametrize("samples", [1, 3, 5, 8])
def test_the_reference_gradient_of_captions_is_that_of_one_process(tmp_path, samples):
    found = on_ranks(lambda rank, world: reference_gradient(rank, world, samples), tmp_path)
    expected = reference_gradient(samples=samples)
    assert float(expected.norm()) > 1e-3 or samples == 1
    for own in found:
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-6)


def beside_replay(kind):
    return copy.deepcopy(_beside_replay(kind))


@cache
def _beside_replay(kind):
    """A model that distils from itself of a task ago, and a global batch with replayed samples."""
    if kind == "classes":
        model, strategy = learn(StandIn(), LwF(alpha=3.0), [a_task(0)])
        whole = a_batch(7, task=1).join(replayed(a_batch(4)))
        begin_task(model, strategy, a_task(1))
    else:
        model, strategy = a_llava(), Chain([LoRA(rank=2), LwF(alpha=3.0)])
        strategy.attach(model)
        learn(model, strategy, [an_answer_task(0)])
        whole = a_dialogue_batch(model, 7, task=1).join(replayed(a_dialogue_batch(model, 4)))
        begin_task(model, strategy, an_answer_task(1))
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator()))
    return model, strategy, whole


def near(found, expected, tolerance=1e-5):
    assert float(expected.norm()) > 0
    assert float((found - expected).norm() / expected.norm()) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "parts", "kind"),
    [(2, 1, "classes"), (3, 1, "classes"), (2, 2, "classes"), (2, 1, "answers"), (3, 1, "answers")],
)
def test_distillation_beside_replay_is_that_of_one_process(tmp_path, world, parts, kind):
    trained = beside_replay(kind)
    found = on_ranks(
        lambda rank, world: gradient(*copy.deepcopy(trained), parts, world, rank), tmp_path, world
    )
    expected = gradient(*trained)
    for own in found:
        near(own, expected)


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_distillation_beside_replay_is_that_of_one_micro_batch(parts):
    model, strategy, whole = beside_replay("classes")
    near(gradient(model, strategy, whole, parts), gradient(model, strategy, whole))


def test_distilled_answers_of_micro_batches_count_by_their_samples():
    model, strategy, whole = beside_replay("answers")
    lwf, terms = strategy.members[1], []
    for part in range(3):
        own = cut(whole, part, 3)
        new = own.take((~own.is_replay).nonzero().flatten())
        output = forward(model, strategy, own)
        term = lwf.penalty(model, own, output)["lwf"] * own.loss_weight / 3
        alone = lwf.penalty(model, replace(new, global_batch=None), forward(model, strategy, new))
        torch.testing.assert_close(term, alone["lwf"] * len(new) / 7)
        terms.append(term)


@pytest.mark.parametrize(("world", "parts"), [(1, 3), (2, 1), (2, 2)])
@pytest.mark.slow
def test_the_replay_ratio_of_features_holds_for_the_global_batch(tmp_path, world, parts):
    model, strategy = StandIn(), FeatureReplay(buffer_size=9, replay_ratio=0.1)
    strategy.attach(model)
    begin_task(model, strategy, a_task(0))
    end_task(model, strategy, a_task(0), task_batches(0))
    begin_task(model, strategy, a_task(1))
    whole = a_batch(18, task=1)

    def work(rank, world):
        pair = copy.deepcopy((model, strategy))
        counts = [
            int(pair[1].extend_batch(pair[0], cut(whole, part, parts, world, rank)).is_replay.sum())
            for part in range(parts)
        ]
        return {"counts": counts, "gradient": gradient(*pair, whole, parts, world, rank)}

    found = on_ranks(work, tmp_path, world) if world > 1 else [work(0, 1)]
    assert sum(sum(own["counts"]) for own in found) == 2
    for own in found:
        near(own["gradient"], gradient(*copy.deepcopy((model, strategy)), whole))


@pytest.mark.slow
def test_the_key_term_of_prompts_is_that_of_one_process_beside_samples_out_of_the_loss(tmp_path):
    model, strategy = StandIn(), L2P(pull_weight=5.0)
    strategy.attach(model)
    begin_task(model, strategy, a_task(0))
    whole, in_loss = a_batch(9), torch.arange(9) < 6
    whole = replace(whole, in_loss=in_loss, labels=whole.labels.masked_fill(~in_loss, -100))
    found = on_ranks(lambda rank, world: gradient(model, strategy, whole, 1, world, rank), tmp_path)
    expected = gradient(model, strategy, whole)
    for own in found:
        near(own, expected)


def dark_terms(rank=0, world=1, parts=1):
    """Penalties of a global batch of 9 and how many samples were drawn, all of one image."""
    model, strategy = StandIn(), DarkReplay(buffer_size=20, draws_per_sample=0.5)
    begin_task(model, strategy, a_task(0))
    one = a_batch(1)
    many = one.take(torch.zeros(12, dtype=torch.int64))
    strategy.memory.add(
        {
            "images": many.images, "labels": many.labels, "task_ids": many.task_ids,
            "logits": torch.ones(12, 6), "known": torch.full((12,), 6),
        },
        torch.arange(12),
    )  # fmt: skip
    drawn, sums = 0, {}
    for part in range(parts):
        batch = cut(a_batch(9, task=1), part, parts, world, rank)
        joined = strategy.extend_batch(model, batch)
        terms = strategy.penalty(model, joined, forward(model, strategy, joined))
        drawn += len(joined) - len(batch)
        for name, term in terms.items():
            sums[name] = sums.get(name, 0) + term.detach() * batch.loss_weight / (world * parts)
    return {"drawn": drawn, **sums}


@pytest.mark.parametrize("parts", [2, 3, 9])
def test_the_draws_of_dark_replay_are_a_share_of_the_global_batch(parts):
    found, expected = dark_terms(parts=parts), dark_terms()
    assert found.pop("drawn") == expected.pop("drawn") == 8
    assert set(found) == {"dark_logits", "dark_labels"}
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_the_draws_of_dark_replay_are_a_share_of_the_global_batch_on_ranks_as_well(tmp_path):
    found = on_ranks(lambda rank, world: dark_terms(rank, world, 2), tmp_path)
    expected = dark_terms()
    for name, value in expected.items():
        torch.testing.assert_close(sum(own.get(name, 0) for own in found), value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "members", [["ExperienceReplay", "LwF"], ["FeatureReplay", "LwF"]], ids=str
)
def test_a_run_in_micro_batches_on_two_processes_ends_as_one_does(tmp_path, members):
    chain = {
        "class_path": "mmcl.core.Chain",
        "init_args": {"strategies": [strategy_of(name) for name in members]},
    }
    options = {"model__optimizer": "torch.optim.SGD", "model__optimizer.lr": 0.1}
    runs = SmallRuns(tmp_path, sizes=(20, 17))
    for name, world, micro in (("one", 1, 8), ("two", 2, 2)):
        words = runs.words(name, chain, data__micro_batch_size=micro, **options)
        folder = tmp_path / name
        assert command_on_ranks(words, folder, world=world) == [0] * world, (
            folder / "output_0"
        ).read_text()
    one, two = (seen(tmp_path / name)["states"][-1] for name in ("one", "two"))
    for name in (n for n in one if n.startswith("model.")):
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5)


def test_unscored_draws_are_not_counted_by_the_weights_of_a_loss():
    dark = DarkReplay(buffer_size=9, alpha=0.0, beta=0.0)
    model, chain = StandIn(), Chain([dark, FeatureReplay(buffer_size=9, replay_ratio=0.3)])
    chain.attach(model)
    begin_task(model, chain, a_task(0))
    dark.after_step(model, a_batch(), forward(model, chain, a_batch()))
    end_task(model, chain, a_task(0), task_batches(0))
    begin_task(model, chain, a_task(1))
    expected = gradient(*copy.deepcopy((model, chain)), a_batch(9, task=1))
    near(gradient(*copy.deepcopy((model, chain)), a_batch(9, task=1), 3), expected)
    batch = chain.extend_batch(model, cut(a_batch(9, task=1), 0, 1))
    assert batch.loss_weight == 1
    joined = int(batch.in_loss[9:].sum())
    assert joined == round(0.3 / 0.7 * (len(batch) - joined))
