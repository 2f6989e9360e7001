"""What ExperienceReplay keeps under each selection, against loops and cases solved by hand."""

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

from mmcl.core import IGNORE_INDEX, Chain, Reference, begin_task, end_task
from mmcl.core.seeding import hash_priorities, hash_seed
from mmcl.memory.selection import herding, k_center_greedy
from mmcl.strategies.experience_replay import ExperienceReplay
from mmcl.strategies.finetune import Finetune
from tests.strategies.plain_loop import whole
from tests.toys.toy_clip import StandIn, a_batch, a_task, task_batches
from tests.toys.toy_llava import a_llava, an_answer_task, dialogue_batches

ORDERED = ["herding", "k_center", "loss", "uncertainty"]


def replayed(strategy):
    replay_plan = strategy.replay_plan()
    return list(zip(replay_plan.task_ids.tolist(), replay_plan.sample_ids.tolist(), strict=True))


def after(strategy, tasks, batches=task_batches, model=None, make=a_task):
    model = model or StandIn()
    for index in range(tasks):
        begin_task(model, strategy, make(index))
        end_task(model, strategy, make(index), batches(index))
    return strategy


def in_hash_order(batch, task, seed=0):
    return batch.take(hash_priorities(seed, task, batch.sample_ids).argsort())


def kept_of(strategy, task):
    return set(strategy.memory.sample_ids[strategy.memory.task_ids == task].tolist())


def test_herding_keeps_what_icarl_keeps_of_every_class_and_shrinks_to_its_beginning():
    model, strategy = StandIn(), ExperienceReplay(buffer_size=12, selection="herding")
    strategy = after(strategy, 3, model=model)
    for task in range(3):
        rows = in_hash_order(whole(task), task)
        expected = set()
        for label in rows.labels.unique():
            own = rows.take(torch.nonzero(rows.labels == label).flatten())
            first = herding(model.embed(own, "image"), 2)
            expected |= set(own.sample_ids[first].tolist())
        assert kept_of(strategy, task) == expected


def test_k_center_keeps_what_covers_each_task_and_shrinks_to_its_beginning():
    model = StandIn()
    strategy = after(ExperienceReplay(buffer_size=12, selection="k_center"), 3, model=model)
    for task in range(3):
        rows = in_hash_order(whole(task), task)
        first = k_center_greedy(model.embed(rows, "image"), 4, seed=hash_seed(0, task))
        assert kept_of(strategy, task) == set(rows.sample_ids[first].tolist())


@pytest.mark.parametrize("scores", ["high", "low"])
def test_loss_keeps_the_hardest_or_the_easiest_of_every_class(scores):
    model = StandIn()
    made = ExperienceReplay(buffer_size=8, selection="loss", score_order=scores)
    strategy = after(made, 1, model=model)
    rows = whole(0)
    losses = cross_entropy(model(rows).logits, rows.labels, reduction="none")
    for label in (0, 1):
        own = torch.nonzero(rows.labels == label).flatten()
        order = own[losses[own].argsort(descending=scores == "high")]
        assert kept_of(strategy, 0) & set(own.tolist()) == set(order[:4].tolist())


def test_uncertainty_is_spread_over_all_heights_by_default():
    model = StandIn()
    rows = whole(0)
    chances = model(rows).logits.softmax(1)
    entropy = -(chances * chances.log()).sum(1)
    spread = after(ExperienceReplay(buffer_size=8, selection="uncertainty"), 1, model=model)
    unsure = ExperienceReplay(buffer_size=8, selection="uncertainty", score_order="high")
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
    made = ExperienceReplay(buffer_size=5, selection="loss")
    strategy = after(made, 1, partial(dialogue_batches, model), model, an_answer_task)
    losses = {}
    for batch in dialogue_batches(model, 0):
        for row in range(len(batch)):
            alone = batch.take(torch.tensor([row]))
            losses[int(alone.sample_ids)] = float(model.loss(model(alone), alone))
    hardest = sorted(losses, key=losses.get, reverse=True)
    assert kept_of(strategy, 0) == set(hardest[:5])


def test_information_keeps_every_different_question_before_any_twice():
    def with_questions(batch):
        words = ["what is it", "what", "what colour is the small bird", "what is it"]
        texts = [words[int(sample) % 4] for sample in batch.sample_ids]
        return replace(batch, references=tuple(Reference(text, ("a",)) for text in texts))

    batches = [with_questions(batch) for batch in task_batches(0)]
    strategy = ExperienceReplay(buffer_size=3, selection="information")
    end_task(StandIn(), strategy, a_task(), batches)
    assert sorted(sample % 4 if sample % 4 < 3 else 0 for sample in kept_of(strategy, 0)) == [
        0,
        1,
        2,
    ]
    one = ExperienceReplay(buffer_size=1, selection="information")
    end_task(StandIn(), one, a_task(), batches)
    assert {sample % 4 for sample in kept_of(one, 0)} == {2}


@pytest.mark.parametrize("selection", ORDERED)
def test_a_pool_is_the_smallest_hashes_of_the_task(selection):
    seen = []

    class Watched(StandIn):
        def _pool(self, batch, *prompts):
            seen.append(batch.sample_ids)
            return super()._pool(batch, *prompts)

    strategy = ExperienceReplay(buffer_size=24, selection=selection, candidate_pool_size=9, seed=3)
    after(strategy, 1, model=Watched())
    candidates = set(hash_priorities(3, 0, torch.arange(24)).argsort()[:9].tolist())
    assert kept_of(strategy, 0) == candidates
    assert candidates <= set(torch.cat(seen).tolist())
    assert len(torch.cat(seen)) < 24


@pytest.mark.parametrize("selection", ["class_balanced", "information", *ORDERED])
@pytest.mark.parametrize("allocation", ["none", "task_balanced"])
def test_the_choice_does_not_hang_on_batches(selection, allocation):
    def with_questions(batch):
        texts = [f"word{int(sample) % 5} common" for sample in batch.sample_ids]
        return replace(batch, references=tuple(Reference(text, ("a",)) for text in texts))

    def again(rows):
        options = {"buffer_size": 10, "selection": selection, "allocation": allocation, "seed": 1}
        parts = torch.arange(24).split(rows)

        def batches(task):
            return [with_questions(whole(task)).take(part) for part in parts]

        return replayed(after(ExperienceReplay(**options), 3, batches))

    assert again(24) == again(5) == again(7)


@pytest.mark.parametrize("selection", ["reservoir", "class_balanced", *ORDERED])
def test_a_budget_of_bytes_is_never_exceeded_and_well_used(selection):
    def sized(task):
        return [
            replace(batch, num_bytes=1000 + 137 * (batch.sample_ids % 7))
            for batch in task_batches(task)
        ]

    strategy = ExperienceReplay(buffer_size=0, buffer_bytes=12_000, selection=selection)
    for task in range(3):
        end_task(StandIn(), strategy, a_task(task), sized(task))
        held = strategy.memory
        assert torch.equal(held.num_bytes, 1000 + 137 * (held.sample_ids % 7))
        assert 12_000 - 1822 < int(held.num_bytes.sum()) <= 12_000
    assert set(held.task_ids.tolist()) == {0, 1, 2}


def test_a_budget_of_bytes_wants_to_know_sizes():
    strategy = ExperienceReplay(buffer_bytes=1000)
    with pytest.raises(ValueError, match="the size of some samples is not known"):
        end_task(StandIn(), strategy, a_task(), task_batches())


def test_equal_tasks_gives_a_small_task_the_room_of_a_large_one():
    flat, equal = (
        ExperienceReplay(buffer_size=40, allocation=a) for a in ("none", "task_balanced")
    )
    for strategy in (flat, equal):
        for task, size in enumerate((30, 3000)):
            end_task(StandIn(), strategy, a_task(task, size=size), ())
    assert Counter(equal.memory.task_ids.tolist()) == {0: 20, 1: 20}
    assert Counter(flat.memory.task_ids.tolist())[0] < 5


@pytest.mark.parametrize("selection", ["loss", "uncertainty"])
def test_scores_of_captions_are_refused_with_what_suits_them(selection):
    caption = replace(a_batch(4), labels=torch.full((4,), IGNORE_INDEX))
    with pytest.raises(ValueError, match="choose 'reservoir', 'herding', 'k_center' or 'inf"):
        end_task(StandIn(), ExperienceReplay(selection=selection), a_task(), [caption])
    for other in ("herding", "k_center"):
        strategy = ExperienceReplay(buffer_size=2, selection=other)
        end_task(StandIn(), strategy, a_task(), [caption])
        assert len(strategy.replay_plan()) == 2


def test_a_model_that_does_not_embed_is_refused_at_once():
    class Mute(torch.nn.Module):
        pass

    for options in ({"selection": "herding"}, {"selection": "k_center"}, {"allocation": "inscl"}):
        with pytest.raises(TypeError, match="ExperienceReplay needs model.embed"):
            ExperienceReplay(**options).attach(Mute())
    ExperienceReplay().attach(Mute())


@pytest.mark.parametrize("selection", ORDERED)
def test_an_empty_pass_leaves_an_empty_memory_which_is_reported(selection):
    strategy = ExperienceReplay(selection=selection)
    end_task(StandIn(), strategy, a_task(), [])
    assert strategy.replay_plan() is None
    assert strategy.inactive_parts() == ("memory is empty",)


def test_ordered_samples_without_numbers_are_named_by_their_place():
    batches = [replace(batch, sample_ids=None) for batch in task_batches()]
    numbered = after(ExperienceReplay(buffer_size=6, selection="herding"), 1)
    placed = ExperienceReplay(buffer_size=6, selection="herding")
    end_task(StandIn(), placed, a_task(), batches)
    assert replayed(placed) == replayed(numbered)


def test_a_selection_leaves_model_and_mode_as_they_were():
    model = StandIn().train()
    before = copy.deepcopy(model.state_dict())
    after(ExperienceReplay(selection="uncertainty"), 1, model=model)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("selection", ORDERED)
def test_a_checkpoint_resumes_as_the_original(selection):
    options = {"buffer_size": 9, "selection": selection, "allocation": "task_balanced"}
    original, fresh = after(ExperienceReplay(**options), 2), ExperienceReplay(**options)
    fresh.load_state_dict(through_a_file(original.state_dict()))
    assert replayed(fresh) == replayed(original)
    for strategy in (original, fresh):
        end_task(StandIn(), strategy, a_task(2), task_batches(2))
    assert replayed(fresh) == replayed(original)


class AngleModel:
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
    references = tuple(Reference(str(angles[row % len(angles)]), ("a",)) for row in range(rows))
    return [replace(a_batch(rows, task), references=references)]


def test_inscl_replays_more_of_the_tasks_that_ask_other_things():
    strategy = ExperienceReplay(buffer_size=20, allocation="inscl")
    # 1 - cos: the third task lies 1 from the first and 0.5 from the second.
    for index, angle in enumerate((0, 30, 90)):
        task = a_task(index, size=12)
        begin_task(AngleModel(), strategy, task)
        strategy.preview(AngleModel(), task, degrees(index, angle))
        if index < 2:
            end_task(AngleModel(), strategy, task, ())
    replay_plan = strategy.replay_plan()
    counts = Counter(replay_plan.task_ids.tolist())
    assert (counts[0], counts[1]) == (13, 7)
    assert replay_plan.replay_ratio == 0.5
    first = Counter(replay_plan.sample_ids[replay_plan.task_ids == 0].tolist())
    assert sorted(first.values()) == [1] * 7 + [2] * 3
    smallest_priorities = set(
        strategy.memory.priority[strategy.memory.task_ids == 1].sort().values[:7].tolist()
    )
    came = replay_plan.sample_ids[replay_plan.task_ids == 1].tolist()
    is_there = torch.isin(strategy.memory.sample_ids, torch.tensor(came)) & (
        strategy.memory.task_ids == 1
    )
    assert set(strategy.memory.priority[is_there].tolist()) == smallest_priorities


def test_inscl_compares_whole_distributions_of_questions():
    strategy = ExperienceReplay(buffer_size=12, allocation="inscl")
    for index, angles in enumerate(((0, 90), (0, 90), (0, 0, 90))):
        begin_task(AngleModel(), strategy, a_task(index, size=12))
        strategy.preview(AngleModel(), a_task(index, size=12), degrees(index, *angles))
    known = strategy.instructions
    assert known.distances(1)[0] == pytest.approx(0.0, abs=1e-6)
    # Of six rows asking 90 degrees two have to turn to 0: a sixth of all, at cost 1.
    assert known.distances(2)[1] == pytest.approx(1 / 6, abs=1e-6)


def test_inscl_names_all_that_is_stored_when_a_task_has_ended():
    strategy = ExperienceReplay(buffer_size=20, allocation="inscl")
    for index, angle in enumerate((0, 30, 90)):
        task = a_task(index, size=12)
        begin_task(AngleModel(), strategy, task)
        strategy.preview(AngleModel(), task, degrees(index, angle))
        end_task(AngleModel(), strategy, task, ())
    assert len(replayed(strategy)) == len(set(replayed(strategy))) == 20


def test_inscl_without_a_preview_says_so():
    strategy = after(ExperienceReplay(allocation="inscl"), 2)
    begin_task(StandIn(), strategy, a_task(2))
    assert len(replayed(strategy)) == 48
    assert any("preview was not called" in part for part in strategy.inactive_parts())


def test_a_preview_is_read_once_and_only_where_it_is_needed():
    def untouched():
        raise AssertionError("the preview was read")
        yield

    ExperienceReplay().preview(AngleModel(), a_task(), untouched())
    strategy = ExperienceReplay(allocation="inscl")
    strategy.preview(AngleModel(), a_task(), degrees(0, 45))
    fresh = ExperienceReplay(allocation="inscl")
    fresh.load_state_dict(through_a_file(strategy.state_dict()))
    fresh.preview(AngleModel(), a_task(), untouched())


def test_a_checkpoint_of_inscl_replays_what_the_original_replays():
    def begun(strategy, index, angle):
        begin_task(AngleModel(), strategy, a_task(index, size=12))
        strategy.preview(AngleModel(), a_task(index, size=12), degrees(index, angle))

    original, fresh = (ExperienceReplay(buffer_size=15, allocation="inscl") for _ in range(2))
    for index, angle in enumerate((0, 10, 120)):
        begun(original, index, angle)
        end_task(AngleModel(), original, a_task(index, size=12), ())
    begun(original, 3, 60)
    for index in range(4):
        begin_task(AngleModel(), fresh, a_task(index, size=12))
    fresh.load_state_dict(through_a_file(original.state_dict()))
    assert replayed(fresh) == replayed(original)


def test_selections_stand_in_a_chain():
    chain = Chain([ExperienceReplay(buffer_size=6, selection="herding"), Finetune()])
    chain.attach(StandIn())
    after(chain, 2)
    assert len(chain.replay_plan()) == 6


def _on_rank(rank, world, folder):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/door", rank=rank, world_size=world
    )
    torch.save(_all_choices(rank, world), folder / f"{rank}.pt")
    dist.destroy_process_group()


def _all_choices(rank=0, world=1):
    """What each selection holds after two tasks of which each rank reads its stride."""
    held = {}
    for selection in ("reservoir", "class_balanced", "information", *ORDERED):
        for bounds in ({"buffer_size": 10}, {"buffer_size": 0, "buffer_bytes": 9000}):
            strategy = ExperienceReplay(selection=selection, candidate_pool_size=17, **bounds)
            model = StandIn()
            for task in range(2):
                rows = whole(task)
                references = tuple(
                    Reference(f"word{n % 5} of {n % 3}", ("a",)) for n in range(len(rows))
                )
                rows = replace(rows, references=references, num_bytes=800 + 13 * rows.sample_ids)
                own = rows.take(torch.arange(rank, len(rows), world))
                parts = [own.take(part) for part in torch.arange(len(own)).split(5)]
                end_task(model, strategy, a_task(task, size=0), parts)
            held[f"{selection} {bounds}"] = torch.tensor(replayed(strategy))
    known = ExperienceReplay(allocation="inscl", instructions=7)
    for task, angles in enumerate(((0, 5, 10, 15, 20), (90, 40, 80))):
        rows = degrees(task, *angles)[0]
        own = rows.take(torch.arange(rank, len(rows), world))
        known.preview(AngleModel(), a_task(task), [own])
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
