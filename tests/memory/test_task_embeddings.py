import io
from dataclasses import replace

import pytest
import torch

from mmcl.core import Reference
from mmcl.memory.task_embeddings import MOST_TAGS, InstructionEmbeddings, tags_of
from tests.toys.toy_clip import a_batch, a_task
from tests.toys.toy_llava import a_llava, an_answer_task, dialogue_batches


def asking(*questions):
    references = tuple(Reference(question, ("yes",)) for question in questions)
    return replace(a_batch(len(questions)), references=references)


def test_tags_are_the_different_words_of_a_question():
    tags = tags_of(asking("Is it red, is it?", "is IT red", "What?"))
    assert tags.shape == (3, MOST_TAGS)
    assert torch.equal(tags[0], tags[1])
    assert [int((row >= 0).sum()) for row in tags] == [3, 3, 1]
    assert not set(tags[0].tolist()) & set(tags[2].tolist()) - {-1}


def test_tags_are_the_same_in_every_process():
    # BLAKE2b of "what" in eight bytes, without the last bit.
    assert int(tags_of(asking("What?"))[0, 0]) == 4676437462331832783


def test_tags_of_a_caption_are_its_different_tokens():
    tokens = torch.tensor([[5, 9, 5, 0], [7, 0, 0, 0]])
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    tags = tags_of(replace(a_batch(2), input_ids=tokens, attention_mask=mask))
    assert [[tag for tag in row if tag >= 0] for row in tags.tolist()] == [[5, 9], [7]]


def test_a_long_text_has_as_many_tags_as_fit():
    tags = tags_of(asking(" ".join(f"word{n}" for n in range(MOST_TAGS + 9))))
    assert int((tags >= 0).sum()) == MOST_TAGS


def test_samples_with_classes_alone_have_no_instructions():
    with pytest.raises(ValueError, match="neither question nor caption"):
        tags_of(a_batch(2))
    with pytest.raises(ValueError, match="samples of task 'task 0' have neither"):
        InstructionEmbeddings().fit(a_llava(), a_task(), [a_batch(2)], by=None)


def test_a_few_texts_of_each_task_are_embedded_and_counted():
    model, known = a_llava(), InstructionEmbeddings(count=10, seed=1)
    for task in range(2):
        known.fit(model, an_answer_task(task), dialogue_batches(model, task), by=None)
        points, counts = known.get(task)
        # All rows of such a task ask the same.
        assert points.shape == (1, model.embed_dim)
        assert counts.tolist() == [10]
        torch.testing.assert_close(points.norm(dim=1), torch.ones(1).double())
        expected = model.embed(dialogue_batches(model, task)[0], "text")[:1].double()
        torch.testing.assert_close(points, expected, rtol=0, atol=1e-3)
    assert known.has(1)
    assert not known.has(2)


def test_what_is_known_outlives_a_checkpoint():
    model, known = a_llava(), InstructionEmbeddings(count=4)
    known.fit(model, an_answer_task(1), dialogue_batches(model, 1), by=None)
    known.put_distances(1, {0: 0.25})
    file = io.BytesIO()
    torch.save(known.state_dict(), file)
    file.seek(0)
    fresh = InstructionEmbeddings(count=4)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert fresh.distances(1) == {0: 0.25}
    assert fresh.distances(7) == {}
    torch.testing.assert_close(fresh.get(1), known.get(1), rtol=0, atol=0)


def test_a_preview_without_samples_is_refused():
    with pytest.raises(ValueError, match="preview was given no samples of task 'task 0'"):
        InstructionEmbeddings().fit(a_llava(), an_answer_task(), [], by=None)
