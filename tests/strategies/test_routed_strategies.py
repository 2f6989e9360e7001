"""What strategies that route by embeddings share: guides, candidates, ranks."""

import os
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import get_context

from mmcl.core import end_task, generate, trainable_parameters
from mmcl.models import OpenCLIP
from mmcl.strategies import CLMoE, HiDe, LoRARouter, ModalPrompt
from tests.strategies.generative_fixtures import TASKS, attached, mixed, scores, taught
from tests.toys.toy_llava import COLORS, a_llava, dialogue_batches

MAKERS = {
    "LoRARouter": lambda: LoRARouter(rank=2),
    "ridge": lambda: LoRARouter(rank=2, router="ridge"),
    "k-means": lambda: LoRARouter(rank=2, prototypes=2, samples=10),
    "HiDe": lambda: HiDe(rank=2),
    "CLMoE": lambda: CLMoE(rank=2),
    "ModalPrompt": lambda: ModalPrompt(prompt_length=2),
}


@cache
def a_guide():
    return OpenCLIP("tiny", "built-in").eval()


@pytest.fixture(params=sorted(MAKERS))
def make(request):
    return MAKERS[request.param]


def one_by_one(batch):
    return [batch.take(torch.tensor([row])) for row in range(len(batch))]


def test_with_a_guide_samples_are_answered_alike_alone_and_in_any_place(make):
    model, strategy = taught(*attached(make, routing_encoder=a_guide()), TASKS[:2])
    batch = mixed(model)
    together = scores(model, strategy, batch)
    alone = torch.cat([scores(model, strategy, row) for row in one_by_one(batch)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    order = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])
    generated = generate(model, strategy, batch, max_new_tokens=4)
    moved = generate(model, strategy, batch.take(order), max_new_tokens=4)
    assert moved == [generated[row] for row in order]


@pytest.mark.parametrize("name", ["HiDe", "LoRARouter"])
def test_before_the_first_task_the_model_answers_as_it_is(name):
    model, strategy = attached(MAKERS[name])
    batch = mixed(model)
    assert torch.equal(scores(model, strategy, batch), a_llava()(batch).logits)
    assert trainable_parameters(model)


@pytest.mark.parametrize("name", ["HiDe", "LoRARouter"])
def test_prototypes_do_not_depend_on_how_a_pass_is_cut_into_batches(name):
    model, first = attached(MAKERS[name])
    second = MAKERS[name]()
    end_task(model, first, TASKS[0], dialogue_batches(model, 0))
    cut = [b.take(rows) for b in dialogue_batches(model, 0) for rows in torch.arange(8).split(3)]
    end_task(model, second, TASKS[0], cut)
    assert first.means.counts.tolist() == second.means.counts.tolist() == [24]
    torch.testing.assert_close(first.means.sums, second.means.sums)


def test_candidates_win_alike_alone_and_together(make):
    model, strategy = taught(*attached(make), TASKS[:2])
    batch = mixed(model)
    generated = generate(model, strategy, batch, candidates=COLORS)
    assert generated == [
        generate(model, strategy, row, candidates=COLORS)[0] for row in one_by_one(batch)
    ]


def _on_rank(rank, world, name, folder):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/door", rank=rank, world_size=world
    )
    torch.save(_statistics(name, rank, world), folder / f"{rank}.pt")
    dist.destroy_process_group()


def _statistics(name, rank=0, world=1):
    """What the passes over two tasks leave, with each rank reading its stride."""
    model, strategy = attached(MAKERS[name])
    for task in TASKS[:2]:
        whole = dialogue_batches(model, task.index, rows=24)[0]
        own = whole.take(torch.arange(rank, 24, world))
        end_task(
            model, strategy, task, [own.take(rows) for rows in torch.arange(len(own)).split(5)]
        )
    return {
        f"{part}.{key}": value
        for part, module in strategy.named_children()
        for key, value in getattr(module, "table", module).get_extra_state()["tensors"].items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ridge", "k-means", "HiDe", "CLMoE"])
def test_two_processes_take_the_statistics_of_one(name, tmp_path):
    fork = get_context("fork")
    ranks = [fork.Process(target=_on_rank, args=(rank, 2, name, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, _statistics(name))
