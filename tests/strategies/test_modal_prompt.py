"""ModalPrompt: prompts of several tasks in front of a row, picked by image and question."""

from dataclasses import replace

import pytest
import torch

from mmcl.core import begin_task, forward, step, trainable_parameters
from mmcl.strategies import ModalPrompt
from tests.strategies.generative_fixtures import (
    TASKS,
    attached,
    keeps_its_promises,
    mixed,
    scores,
    steps_of,
    taught,
)
from tests.toys.toy_llava import WIDTH, a_dialogue_batch, a_llava, dialogue_batches


def make(**how):
    return lambda: ModalPrompt(**{"prompt_length": 2, **how})


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def prototype(strategy, task):
    """Mean of the transformed tokens, token by token."""
    first, _, second = strategy.transforms[task]
    rows = []
    for token in strategy.tokens[task]:
        hidden = first.weight @ token + first.bias
        rows.append(second.weight @ (hidden * torch.sigmoid(hidden)) + second.bias)
    return (sum(rows) / len(rows)).detach()


def guidance(model, strategy, batch):
    """0.5 of image and 0.5 of question, as (row, task) in loops."""
    found = []
    for row in range(len(batch)):
        own = batch.take(torch.tensor([row]))
        image, text = (model.embed(own, modality)[0] for modality in ("image", "text"))
        tasks = [prototype(strategy, task) for task in range(len(strategy.tokens))]
        found.append([0.5 * cosine(image, p) + 0.5 * cosine(text, p) for p in tasks])
    return found


def lined_up(strategy, tasks):
    return torch.cat([strategy.tokens[task] for task in tasks])


@pytest.mark.parametrize("how", [{}, {"top_k": 1, "transfer": 1}, {"top_k": 9, "transfer": 9}])
def test_what_every_strategy_of_this_track_promises(how):
    keeps_its_promises(make(**how))


@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_in_evaluation_the_best_prompts_stand_in_front_best_next_to_the_text(top_k):
    model, strategy = taught(*attached(make(top_k=top_k)), TASKS)
    batch = mixed(model)
    tokens = strategy.prompts(model, batch).tokens["text", 0]
    assert tokens.shape == (8, 2 * min(top_k, 3), WIDTH)
    for row, found in enumerate(guidance(model, strategy, batch)):
        best = sorted(range(3), key=lambda task: found[task])[-top_k:]
        assert torch.equal(tokens[row], lined_up(strategy, best))


@pytest.mark.parametrize(("transfer", "tasks"), [(1, 3), (2, 3), (3, 3), (3, 1), (3, 2)])
def test_in_training_the_current_prompt_stands_behind_the_best_past_ones(transfer, tasks):
    model, strategy = attached(make(transfer=transfer))
    taught(model, strategy, TASKS[: tasks - 1])
    begin_task(model, strategy, TASKS[tasks - 1])
    batch = mixed(model)
    tokens = strategy.train().prompts(model, batch).tokens["text", 0]
    for row, found in enumerate(guidance(model, strategy, batch)):
        order = sorted(range(tasks - 1), key=lambda task: found[task])
        past = order[max(0, len(order) - (transfer - 1)) :]
        assert torch.equal(tokens[row], lined_up(strategy, [*past, tasks - 1]))


def test_samples_of_one_batch_have_different_prompts():
    model, strategy = taught(*attached(make(top_k=1)), TASKS)
    batch = a_dialogue_batch(model, 4, 0)
    with torch.no_grad():
        seen = model.embed(batch, "image") + model.embed(batch, "text")
        strategy.prototypes = lambda: seen[:3]
    choice = strategy.prompts(model, batch).aux["modal_prompt_choice"]
    assert choice[:3].flatten().tolist() == [0, 1, 2]


def test_the_term_pulls_the_current_prototype_to_images_and_questions():
    model, strategy = taught(*attached(make(align_weight=0.3)), TASKS[:1])
    begin_task(model, strategy, TASKS[1])
    batch = mixed(model)
    done = step(model, strategy.train(), batch)
    own, total = prototype(strategy, 1), 0.0
    tokens = [sum(label != -100 for label in row) for row in batch.labels.tolist()]
    assert len(set(tokens)) > 1
    for row in range(8):
        image, text = (model.embed(batch, modality)[row] for modality in ("image", "text"))
        total += tokens[row] * ((1 - cosine(image, own)) + (1 - cosine(text, own)))
    expected = 0.3 * total / sum(tokens)
    assert float(done.terms["modal_prompt"].detach()) == pytest.approx(expected, 1e-5)


def test_stored_samples_do_not_pull():
    model, strategy = taught(*attached(make()), TASKS[:1])
    begin_task(model, strategy, TASKS[1])
    new, old = a_dialogue_batch(model, 4, 1), a_dialogue_batch(model, 4, 0)
    old = replace(old, is_replay=torch.ones(4, dtype=torch.bool))
    strategy.train()
    pull, diluted, nothing = (
        float(step(model, strategy, batch).terms["modal_prompt"].detach())
        for batch in (new, new.join(old), old)
    )
    own, others = (int((batch.labels != -100).sum()) for batch in (new, old))
    assert diluted == pytest.approx(pull * own / (own + others), 1e-5)
    assert nothing == 0


def test_only_the_current_tasks_prompts_and_transform_learn():
    model, strategy = attached(make())
    assert trainable_parameters(model) == {}
    for task in TASKS:
        begin_task(model, strategy, task)
        learning = {name for name, p in strategy.named_parameters() if p.requires_grad}
        assert {name.split(".")[1] for name in learning} == {str(task.index)}
        step(model, strategy.train(), a_dialogue_batch(model, task=task.index)).loss.backward()
        assert all(p.grad.any() for p in strategy.parameters() if p.requires_grad)


def test_before_the_first_task_the_model_answers_as_it_is():
    model, strategy = attached(make())
    batch = mixed(model)
    assert torch.equal(scores(model, strategy, batch), model(batch).logits)


def test_prototypes_learn_to_tell_tasks_apart():
    model, strategy = attached(make(top_k=1))
    for task in TASKS:
        begin_task(model, strategy, task)
        steps_of(model, strategy, dialogue_batches(model, task.index) * 5, 0.2)
    for task in range(3):
        batch = a_dialogue_batch(model, 4, task, seed=5)
        choice = strategy.eval().prompts(model, batch).aux["modal_prompt_choice"]
        assert choice.flatten().tolist() == [task] * 4


def test_prompts_start_at_words_where_the_model_shows_them():
    model = a_llava()
    model.words = model.lm.get_input_embeddings().weight
    strategy = ModalPrompt(prompt_length=3)
    strategy.attach(model)
    for token in strategy.tokens[0]:
        assert bool((model.words == token).all(1).any())


def test_images_and_questions_in_different_spaces_ask_for_a_guide():
    model, strategy = attached(make())
    begin_task(model, strategy, TASKS[0])
    embed = model.embed
    model.embed = lambda batch, modality: embed(batch, modality)[
        :, : 9 if modality == "text" else 16
    ]
    with pytest.raises(
        ValueError,
        match="question embeddings 9 and prototypes 16: give the model a routing encoder",
    ):
        forward(model, strategy, mixed(model))
