"""Lessons for the generative stand-in: a few steps over dialogues, files, and fresh processes."""

import copy
import io

import torch

from mmcl.core import begin_task, end_task, forward, generate, step, trainable_parameters
from mmcl.layers import MultiLoRALinear, find_layers
from mmcl.strategies import LoRA
from tests.strategies.plain_loop import learn, whole
from tests.toys.toy_clip import StandIn, a_task
from tests.toys.toy_llava import a_dialogue_batch, a_llava, an_answer_task, dialogue_batches

TASKS = [an_answer_task(index) for index in range(3)]


def attached(make, **model):
    """A stand-in and a strategy made by ``make``, attached."""
    llava, strategy = a_llava(**model), make()
    strategy.attach(llava)
    return llava, strategy


def steps_of(model, strategy, batches, rate=0.5):
    """Step through batches with plain gradient descent; the task has begun."""
    model.train()
    strategy.train()
    learning = [
        *trainable_parameters(model).values(),
        *(p for p in strategy.parameters() if p.requires_grad),
    ]
    optimizer = torch.optim.SGD(learning, lr=rate)
    for batch in batches:
        done = step(model, strategy, batch)
        optimizer.zero_grad()
        done.loss.backward()
        strategy.project_gradients(model)
        optimizer.step()
        strategy.after_step(model, done.batch, done.output)


def taught(model, strategy, tasks, rate=0.5):
    """Learn tasks one after another."""
    for task in tasks:
        begin_task(model, strategy, task)
        batches = dialogue_batches(model, task.index)
        steps_of(model, strategy, batches, rate)
        end_task(model, strategy, task, batches)
    return model.eval(), strategy.eval()


def state_of(model, strategy):
    """What a checkpoint holds, through a file."""
    state = {"model": model.state_dict(), "strategy": strategy.state_dict()}
    file = io.BytesIO()
    torch.save(copy.deepcopy(state), file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def restored(make, state, tasks):
    """A fresh model and strategy that begin the tasks and take a checkpoint's state."""
    model, strategy = attached(make)
    for task in tasks:
        begin_task(model, strategy, task)
    model.load_state_dict(state["model"])
    strategy.load_state_dict(state["strategy"])
    return model.eval(), strategy.eval()


@torch.no_grad()
def scores(model, strategy, batch):
    """The scored positions' logits, at test."""
    return forward(model.eval(), strategy.eval(), batch).logits


def mixed(model, rows=4):
    """Rows of the first two tasks."""
    return a_dialogue_batch(model, rows, 0).join(a_dialogue_batch(model, rows, 1))


def keeps_its_promises(make, rate=0.5):
    """Checks that every method of this track passes, whatever it does inside.

    A checkpoint answers and goes on as what it was written by, after a task and in the midst of
    one; a row is answered alike alone and in company; merged weights answer as unmerged ones and
    leave no trace.
    """
    model, strategy = taught(*attached(make), TASKS[:2], rate)
    copied = restored(make, state_of(model, strategy), TASKS[:2])
    batch = mixed(model)
    assert torch.equal(scores(model, strategy, batch), scores(*copied, batch))
    assert generate(model, strategy, batch) == generate(*copied, batch)
    _answers_alone(model, strategy, batch)
    _folds(model, strategy, batch)

    begin_task(model, strategy, TASKS[2])
    lessons = dialogue_batches(model, 2)
    steps_of(model, strategy, lessons[:2], rate)
    copied = restored(make, state_of(model, strategy), TASKS)
    for pair in ((model, strategy), copied):
        steps_of(*pair, lessons[2:], rate)
        end_task(*pair, TASKS[2], lessons)
    torch.testing.assert_close(
        state_of(model, strategy), state_of(*copied), rtol=0, atol=0, equal_nan=True
    )


def _answers_alone(model, strategy, batch):
    together = scores(model, strategy, batch)
    alone = [batch.take(torch.tensor([row])) for row in range(len(batch))]
    torch.testing.assert_close(
        torch.cat([scores(model, strategy, row) for row in alone]), together, rtol=0, atol=1e-5
    )
    generated = generate(model, strategy, batch, max_new_tokens=4)
    assert generated == [generate(model, strategy, row, max_new_tokens=4)[0] for row in alone]


def _folds(model, strategy, batch):
    before, plain = copy.deepcopy(model.state_dict()), scores(model, strategy, batch)
    with torch.inference_mode(), strategy.merged_adapters(model):
        torch.testing.assert_close(scores(model, strategy, batch), plain, rtol=1e-4, atol=1e-4)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(scores(model, strategy, batch), plain)


def second_step(make, **how):
    """A model and a strategy in the second task, and its first step."""
    model, strategy = taught(*attached(make(**how)), TASKS[:1])
    begin_task(model, strategy, TASKS[1])
    return model, strategy, step(model, strategy, a_dialogue_batch(model, task=1))


def trains_as_lora(strategy, A_of, tasks=1):
    """Check that a strategy trains as plain LoRA from the same start A (3, d_in)."""
    ours, theirs = (StandIn(), strategy), (StandIn(), LoRA(rank=3))
    ours[1].attach(ours[0])
    theirs[1].attach(theirs[0])
    with torch.no_grad():
        theirs[0].patch.lora_A["default"].weight.copy_(A_of(ours[0].patch))
    for pair in (ours, theirs):
        learn(*pair, [a_task(index) for index in range(tasks)])
    torch.testing.assert_close(ours[0](whole(0)).logits, theirs[0](whole(0)).logits)


def trains_only_the_newest_adapter(make):
    """Check that adapters come with the tasks, and that no gradient reaches the older ones."""
    model, strategy = attached(make())
    for task in TASKS:
        begin_task(model, strategy, task)
        layers = find_layers(model, MultiLoRALinear).values()
        assert {len(layer.adapters) for layer in layers} == {task.index + 1}
        assert {name.split(".adapters.")[1][0] for name in trainable_parameters(model)} == {
            str(task.index)
        }
    model, _, done = second_step(make)
    done.loss.backward()
    for layer in find_layers(model, MultiLoRALinear).values():
        assert layer.adapters[0].lora_A.grad is None
        assert layer.adapters[0].lora_B.grad is None
        assert layer.adapters[1].lora_B.grad.any()
