"""What ExperienceReplay keeps under each policy, against loops and cases solved by hand."""

import copy
import io
import os
from collections import Counter
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from mmcl.core import UNSCORED, Chain, Reference, begin_task, end_task
from mmcl.core.randomness import mix, ranks_of
from mmcl.memory import herding, k_centre
from mmcl.strategies.experience_replay import ExperienceReplay
from mmcl.strategies.finetune import Finetune
from tests.stand_in import StandIn, a_batch, a_task, task_batches
from tests.stand_in_llava import a_llava, an_answer_task, dialogue_batches
from tests.strategies.bare_loop import whole

ORDERED = ["herding", "k_centre", "loss", "uncertainty"]


def recalled(strategy):
    recall = strategy.recall()
    return list(zip(recall.task.tolist(), recall.sample.tolist(), strict=True))


def after(strategy, tasks, batches=task_batches, model=None, make=a_task):
    model = model or StandIn()
    for index in range(tasks):
        begin_task(model, strategy, make(index))
        end_task(model, strategy, make(index), batches(index))
    return strategy


def in_hash_order(batch, task, seed=0):
    return batch.take(ranks_of(seed, task, batch.sample).argsort())


def kept_of(strategy, task):
    return set(strategy.memory.sample[strategy.memory.task == task].tolist())


def test_herding_keeps_what_icarl_keeps_of_every_class_and_shrinks_to_its_beginning():
    model, strategy = StandIn(), ExperienceReplay(samples=12, policy="herding")
    strategy = after(strategy, 3, model=model)
    for task in range(3):
        rows = in_hash_order(whole(task), task)
        expected = set()
        for label in rows.labels.unique():
            own = rows.take(torch.nonzero(rows.labels == label).flatten())
            first = herding(model.embed(own, "image"), 2)
            expected |= set(own.sample[first].tolist())
        assert kept_of(strategy, task) == expected


def test_k_centre_keeps_what_covers_each_task_and_shrinks_to_its_beginning():
    model = StandIn()
    strategy = after(ExperienceReplay(samples=12, policy="k_centre"), 3, model=model)
    for task in range(3):
        rows = in_hash_order(whole(task), task)
        first = k_centre(model.embed(rows, "image"), 4, seed=mix(0, task))
        assert kept_of(strategy, task) == set(rows.sample[first].tolist())


@pytest.mark.parametrize("scores", ["high", "low"])
def test_loss_keeps_the_hardest_or_the_easiest_of_every_class(scores):
    model = StandIn()
    made = ExperienceReplay(samples=8, policy="loss", scores=scores)
    strategy = after(made, 1, model=model)
    rows = whole(0)
    losses = cross_entropy(model(rows).logits, rows.labels, reduction="none")
    for label in (0, 1):
        own = torch.nonzero(rows.labels == label).flatten()
        order = own[losses[own].argsort(descending=scores == "high")]
        assert kept_of(strategy, 0) & set(own.tolist()) == set(order[:4].tolist())


def test_uncertainty_is_spread_over_all_heights_unless_told_otherwise():
    model = StandIn()
    rows = whole(0)
    chances = model(rows).logits.softmax(1)
    entropy = -(chances * chances.log()).sum(1)
    spread = after(ExperienceReplay(samples=8, policy="uncertainty"), 1, model=model)
    unsure = ExperienceReplay(samples=8, policy="uncertainty", scores="high")
    unsure = after(unsure, 1, model=model)
    for label in (0, 1):
        own = torch.nonzero(rows.labels == label).flatten()
        by_height = own[entropy[own].argsort()].tolist()
        # Of 12 in 16 places of reversed bits: 0, 8, 4, (12,) 2.
        assert kept_of(spread, 0) & set(own.tolist()) == {by_height[n] for n in (0, 8, 4, 2)}
        assert kept_of(unsure, 0) & set(own.tolist()) == set(by_height[-4:])


@torch.no_grad()
def test_the_loss_of_an_answer_is_the_mean_over_its_words():
    model = a_llava()
    made = ExperienceReplay(samples=5, policy="loss")
    strategy = after(made, 1, partial(dialogue_batches, model), model, an_answer_task)
    losses = {}
    for batch in dialogue_batches(model, 0):
        for row in range(len(batch)):
            alone = batch.take(torch.tensor([row]))
            losses[int(alone.sample)] = float(model.loss(model(alone), alone))
    hardest = sorted(losses, key=losses.get, reverse=True)
    assert kept_of(strategy, 0) == set(hardest[:5])


def test_information_keeps_every_different_question_before_any_twice():
    def asked(batch):
        words = ["what is it", "what", "what colour is the small bird", "what is it"]
        texts = [words[int(sample) % 4] for sample in batch.sample]
        return replace(batch, references=tuple(Reference(text, ("a",)) for text in texts))

    batches = [asked(batch) for batch in task_batches(0)]
    strategy = ExperienceReplay(samples=3, policy="information")
    end_task(StandIn(), strategy, a_task(), batches)
    assert sorted(sample % 4 if sample % 4 < 3 else 0 for sample in kept_of(strategy, 0)) == [
        0,
        1,
        2,
    ]
    one = ExperienceReplay(samples=1, policy="information")
    end_task(StandIn(), one, a_task(), batches)
    assert {sample % 4 for sample in kept_of(one, 0)} == {2}


@pytest.mark.parametrize("policy", ORDERED)
def test_a_pool_is_the_smallest_hashes_of_the_task(policy):
    seen = []

    class Watched(StandIn):
        def _pool(self, batch, *prompts):
            seen.append(batch.sample)
            return super()._pool(batch, *prompts)

    strategy = ExperienceReplay(samples=24, policy=policy, pool=9, seed=3)
    after(strategy, 1, model=Watched())
    candidates = set(ranks_of(3, 0, torch.arange(24)).argsort()[:9].tolist())
    assert kept_of(strategy, 0) == candidates
    assert candidates <= set(torch.cat(seen).tolist())
    assert len(torch.cat(seen)) < 24


@pytest.mark.parametrize("policy", ["balanced", "information", *ORDERED])
@pytest.mark.parametrize("allocation", ["flat", "equal_tasks"])
def test_the_choice_does_not_hang_on_batches(policy, allocation):
    def told(batch):
        texts = [f"word{int(sample) % 5} common" for sample in batch.sample]
        return replace(batch, references=tuple(Reference(text, ("a",)) for text in texts))

    def again(rows):
        options = {"samples": 10, "policy": policy, "allocation": allocation, "seed": 1}
        parts = torch.arange(24).split(rows)

        def batches(task):
            return [told(whole(task)).take(part) for part in parts]

        return recalled(after(ExperienceReplay(**options), 3, batches))

    assert again(24) == again(5) == again(7)


@pytest.mark.parametrize("policy", ["reservoir", "balanced", *ORDERED])
def test_a_budget_of_bytes_is_never_exceeded_and_well_used(policy):
    def sized(task):
        return [
            replace(batch, bytes=1000 + 137 * (batch.sample % 7)) for batch in task_batches(task)
        ]

    strategy = ExperienceReplay(samples=0, memory_bytes=12_000, policy=policy)
    for task in range(3):
        end_task(StandIn(), strategy, a_task(task), sized(task))
        held = strategy.memory
        assert torch.equal(held.bytes, 1000 + 137 * (held.sample % 7))
        assert 12_000 - 1822 < int(held.bytes.sum()) <= 12_000
    assert set(held.task.tolist()) == {0, 1, 2}


def test_a_budget_of_bytes_wants_to_know_sizes():
    strategy = ExperienceReplay(memory_bytes=1000)
    with pytest.raises(ValueError, match="the size of some samples is not known"):
        end_task(StandIn(), strategy, a_task(), task_batches())


def test_equal_tasks_gives_a_small_task_the_room_of_a_large_one():
    flat, equal = (ExperienceReplay(samples=40, allocation=a) for a in ("flat", "equal_tasks"))
    for strategy in (flat, equal):
        for task, size in enumerate((30, 3000)):
            end_task(StandIn(), strategy, a_task(task, size=size), ())
    assert Counter(equal.memory.task.tolist()) == {0: 20, 1: 20}
    assert Counter(flat.memory.task.tolist())[0] < 5


@pytest.mark.parametrize("policy", ["loss", "uncertainty"])
def test_scores_of_captions_are_refused_with_what_suits_them(policy):
    caption = replace(a_batch(4), labels=torch.full((4,), UNSCORED))
    with pytest.raises(ValueError, match="choose 'reservoir', 'herding', 'k_centre' or 'inf"):
        end_task(StandIn(), ExperienceReplay(policy=policy), a_task(), [caption])
    for other in ("herding", "k_centre"):
        strategy = ExperienceReplay(samples=2, policy=other)
        end_task(StandIn(), strategy, a_task(), [caption])
        assert len(strategy.recall()) == 2


def test_a_model_that_does_not_embed_is_refused_at_once():
    class Mute(torch.nn.Module):
        pass

    for options in ({"policy": "herding"}, {"policy": "k_centre"}, {"allocation": "inscl"}):
        with pytest.raises(TypeError, match="ExperienceReplay needs model.embed"):
            ExperienceReplay(**options).attach(Mute())
    ExperienceReplay().attach(Mute())


@pytest.mark.parametrize("policy", ORDERED)
def test_an_empty_pass_leaves_an_empty_memory_which_is_reported(policy):
    strategy = ExperienceReplay(policy=policy)
    end_task(StandIn(), strategy, a_task(), [])
    assert strategy.recall() is None
    assert strategy.idle() == ("memory is empty",)


def test_ordered_samples_without_numbers_are_named_by_their_place():
    batches = [replace(batch, sample=None) for batch in task_batches()]
    numbered = after(ExperienceReplay(samples=6, policy="herding"), 1)
    placed = ExperienceReplay(samples=6, policy="herding")
    end_task(StandIn(), placed, a_task(), batches)
    assert recalled(placed) == recalled(numbered)


def test_a_policy_leaves_model_and_mode_as_they_were():
    model = StandIn().train()
    before = copy.deepcopy(model.state_dict())
    after(ExperienceReplay(policy="uncertainty"), 1, model=model)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("policy", ORDERED)
def test_a_checkpoint_goes_on_as_the_original(policy):
    options = {"samples": 9, "policy": policy, "allocation": "equal_tasks"}
    original, fresh = after(ExperienceReplay(**options), 2), ExperienceReplay(**options)
    fresh.load_state_dict(through_a_file(original.state_dict()))
    assert recalled(fresh) == recalled(original)
    for strategy in (original, fresh):
        end_task(StandIn(), strategy, a_task(2), task_batches(2))
    assert recalled(fresh) == recalled(original)


class Told:
    """A model that embeds a question as a direction: one number of degrees in its text."""

    def embed(self, batch, modality):
        assert modality == "text"
        angles = torch.tensor([float(r.question) for r in batch.references]).deg2rad()
        return torch.stack([angles.cos(), angles.sin()], 1)

    def modules(self):
        return []

    def named_parameters(self):
        return []


def degrees(task, *angles, rows=12):
    asked = tuple(Reference(str(angles[row % len(angles)]), ("a",)) for row in range(rows))
    return [replace(a_batch(rows, task), references=asked)]


def test_inscl_recalls_more_of_the_tasks_that_ask_other_things():
    strategy = ExperienceReplay(samples=20, allocation="inscl")
    # 1 - cos: the third task lies 1 from the first and 0.5 from the second.
    for index, angle in enumerate((0, 30, 90)):
        task = a_task(index, size=12)
        begin_task(Told(), strategy, task)
        strategy.preview(Told(), task, degrees(index, angle))
        if index < 2:
            end_task(Told(), strategy, task, ())
    recall = strategy.recall()
    counts = Counter(recall.task.tolist())
    assert (counts[0], counts[1]) == (13, 7)
    assert recall.share == 0.5
    first = Counter(recall.sample[recall.task == 0].tolist())
    assert sorted(first.values()) == [1] * 7 + [2] * 3
    lowest = set(strategy.memory.order[strategy.memory.task == 1].sort().values[:7].tolist())
    came = recall.sample[recall.task == 1].tolist()
    is_there = torch.isin(strategy.memory.sample, torch.tensor(came)) & (strategy.memory.task == 1)
    assert set(strategy.memory.order[is_there].tolist()) == lowest


def test_inscl_compares_whole_distributions_of_questions():
    strategy = ExperienceReplay(samples=12, allocation="inscl")
    for index, angles in enumerate(((0, 90), (0, 90), (0, 0, 90))):
        begin_task(Told(), strategy, a_task(index, size=12))
        strategy.preview(Told(), a_task(index, size=12), degrees(index, *angles))
    known = strategy.instructions
    assert known.distances(1)[0] == pytest.approx(0.0, abs=1e-6)
    # Of six rows asking 90 degrees two have to turn to 0: a sixth of all, at cost 1.
    assert known.distances(2)[1] == pytest.approx(1 / 6, abs=1e-6)


def test_inscl_names_all_that_is_remembered_when_a_task_has_ended():
    strategy = ExperienceReplay(samples=20, allocation="inscl")
    for index, angle in enumerate((0, 30, 90)):
        task = a_task(index, size=12)
        begin_task(Told(), strategy, task)
        strategy.preview(Told(), task, degrees(index, angle))
        end_task(Told(), strategy, task, ())
    assert len(recalled(strategy)) == len(set(recalled(strategy))) == 20


def test_inscl_without_a_preview_says_so():
    strategy = after(ExperienceReplay(allocation="inscl"), 2)
    begin_task(StandIn(), strategy, a_task(2))
    assert len(recalled(strategy)) == 48
    assert any("preview was not called" in part for part in strategy.idle())


def test_a_preview_is_read_once_and_only_where_it_is_needed():
    def untouched():
        raise AssertionError("the preview was read")
        yield

    ExperienceReplay().preview(Told(), a_task(), untouched())
    strategy = ExperienceReplay(allocation="inscl")
    strategy.preview(Told(), a_task(), degrees(0, 45))
    fresh = ExperienceReplay(allocation="inscl")
    fresh.load_state_dict(through_a_file(strategy.state_dict()))
    fresh.preview(Told(), a_task(), untouched())


def test_a_checkpoint_of_inscl_recalls_what_the_original_recalls():
    def begun(strategy, index, angle):
        begin_task(Told(), strategy, a_task(index, size=12))
        strategy.preview(Told(), a_task(index, size=12), degrees(index, angle))

    original, fresh = (ExperienceReplay(samples=15, allocation="inscl") for _ in range(2))
    for index, angle in enumerate((0, 10, 120)):
        begun(original, index, angle)
        end_task(Told(), original, a_task(index, size=12), ())
    begun(original, 3, 60)
    for index in range(4):
        begin_task(Told(), fresh, a_task(index, size=12))
    fresh.load_state_dict(through_a_file(original.state_dict()))
    assert recalled(fresh) == recalled(original)


def test_policies_stand_in_a_chain():
    chain = Chain([ExperienceReplay(samples=6, policy="herding"), Finetune()])
    chain.attach(StandIn())
    after(chain, 2)
    assert len(chain.recall()) == 6


def _on_rank(rank, world, folder):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/door", rank=rank, world_size=world
    )
    torch.save(_all_choices(rank, world), folder / f"{rank}.pt")
    dist.destroy_process_group()


def _all_choices(rank=0, world=1):
    """What each policy holds after two tasks of which each rank reads its stride."""
    held = {}
    for policy in ("reservoir", "balanced", "information", *ORDERED):
        for bounds in ({"samples": 10}, {"samples": 0, "memory_bytes": 9000}):
            strategy = ExperienceReplay(policy=policy, pool=17, **bounds)
            model = StandIn()
            for task in range(2):
                rows = whole(task)
                asked = tuple(
                    Reference(f"word{n % 5} of {n % 3}", ("a",)) for n in range(len(rows))
                )
                rows = replace(rows, references=asked, bytes=800 + 13 * rows.sample)
                own = rows.take(torch.arange(rank, len(rows), world))
                parts = [own.take(part) for part in torch.arange(len(own)).split(5)]
                end_task(model, strategy, a_task(task, size=0), parts)
            held[f"{policy} {bounds}"] = torch.tensor(recalled(strategy))
    known = ExperienceReplay(allocation="inscl", instructions=7)
    for task, angles in enumerate(((0, 5, 10, 15, 20), (90, 40, 80))):
        rows = degrees(task, *angles)[0]
        own = rows.take(torch.arange(rank, len(rows), world))
        known.preview(Told(), a_task(task), [own])
    held["inscl"] = torch.tensor(known.instructions.distances(1)[0])
    return held


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_choose_what_one_chooses(tmp_path, world):
    fork = get_context("fork")
    ranks = [fork.Process(target=_on_rank, args=(r, world, tmp_path)) for r in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    alone = _all_choices()
    for rank in range(world):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found.keys() == alone.keys()
        wrong = [name for name in alone if not torch.equal(alone[name], found[name])]
        assert wrong == []
