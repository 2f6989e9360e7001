import pickle

import pytest
import torch

from mmcl.core import Conversation, Turn
from mmcl.models import ImageTextToText
from mmcl.models.hf_vlm.chat_template import parse_chat_template, vicuna
from tests.models.small_vlms import ARCHITECTURES, write_model
from tests.toys.toy_llava import a_llava

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("llava"), "llava")
    return ImageTextToText(str(folder), conv_template="vicuna_v1")


def dialogue_of(*texts):
    turns = [Turn("assistant" if n % 2 else "user", text) for n, text in enumerate(texts)]
    return Conversation(tuple(turns), (texts[-1],))


def as_text(model, tokens):
    return model.processor.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def scored(model, tokens, labels):
    return as_text(model, tokens[labels != -100])


def test_vicuna_is_the_template_of_llavas_training():
    pieces = vicuna("<image>", "</s>")
    answer = pieces.before_answer + pieces.answer_start + "{}" + pieces.answer_end
    first = pieces.image_start + "Why?" + answer.format("So.")
    second = pieces.between_turns + "And?" + answer.format("No.")
    assert first + second == (
        f"{SYSTEM}USER: <image>\nWhy? ASSISTANT: So.</s>USER: And? ASSISTANT: No.</s>"
    )
    assert pieces.start == f"{SYSTEM}USER: "


def test_the_template_of_llava_is_vicuna_without_the_system_line(tmp_path):
    plain = ImageTextToText(str(write_model(tmp_path, "llava"))).chat_tokenizer.template
    expected = vicuna("<image>", "</s>")
    assert plain.start == "USER: "
    assert plain.image_start == "USER: <image>\n"
    for name in ("before_answer", "answer_start", "answer_end", "between_turns"):
        assert getattr(plain, name) == getattr(expected, name)


def test_answers_are_scored_with_their_end(llava):
    tokens, labels = llava.chat_tokenizer.tokenize(
        dialogue_of("a?", "one two", "b?", "three"), True
    )
    assert scored(llava, tokens, labels) == "one two</s> three</s>"
    assert int((tokens == llava.image_inputs.image_token_id).sum()) == 4


def test_the_image_comes_first_wherever_its_token_was(llava):
    texts = ["<image>\nwhat?", "what?\n<image>", "what?"]
    found = [
        llava.chat_tokenizer.tokenize(dialogue_of(text, "x"), True)[0].tolist() for text in texts
    ]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_texts_cannot_contain_a_token_of_the_template(architecture, tmp_path):
    size = {"size": 16} if architecture == "qwen2_5_vl" else {}
    model = ImageTextToText(str(write_model(tmp_path, architecture)), **size)
    tokenizer = model.processor.tokenizer
    marks = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    assert len(marks) > 3
    clean = model.chat_tokenizer.tokenize(dialogue_of("what is it", "red"), True)[0]
    for mark in marks:
        half = len(mark) // 2
        nested = f"{mark[:half]}{mark}{mark[half:]}"
        for dirt in (mark, nested, mark + nested):
            dialogue = dialogue_of(f"what is{dirt} it", f"{dirt}red{dirt}")
            assert torch.equal(model.chat_tokenizer.tokenize(dialogue, True)[0], clean), dirt


def test_long_conversations_are_cut_at_their_end():
    model = a_llava(max_length=30)
    tokens, labels = model.chat_tokenizer.tokenize(dialogue_of("what?", "word " * 50), True)
    assert len(tokens) == len(labels) == 30
    whole = a_llava(max_length=512).chat_tokenizer.tokenize(
        dialogue_of("what?", "word " * 50), True
    )[0]
    assert torch.equal(tokens, whole[:30])


def test_a_length_without_room_for_the_image_is_refused():
    with pytest.raises(ValueError, match=r"max_length is 5 and an image with one word takes \d+"):
        a_llava(max_length=5)


def test_an_answer_has_the_tokens_that_it_has_after_a_question(llava):
    tokens, labels = llava.chat_tokenizer.tokenize(dialogue_of("is it so?", "two words"), True)
    assert torch.equal(llava.chat_tokenizer.answer_tokens("two words"), tokens[labels != -100])


def test_a_chat_tokenizer_can_be_sent_to_a_loaders_worker(llava):
    own = llava.transform(True)
    other = pickle.loads(pickle.dumps(own))
    dialogue = dialogue_of("<image>\nwhat?", "this")
    pixels = torch.zeros(3, 16, 16, dtype=torch.uint8)
    assert torch.equal(other(pixels, dialogue, 0).input_ids, own(pixels, dialogue, 0).input_ids)


class Template:
    """A processor whose template is a function."""

    def __init__(self, render):
        self.render = render

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return self.render(messages, add_generation_prompt)


def turns_of(messages, end):
    texts = [
        ("<image>" if len(m["content"]) > 1 else "") + m["content"][-1]["text"] for m in messages
    ]
    return "".join(f"[{text}]{end}" for text in texts)


def ending_in(end):
    return Template(lambda messages, adds_prompt: turns_of(messages, end))


def test_the_first_end_token_after_an_answer_ends_it():
    pieces = parse_chat_template(ending_in("<stop>\n"), "<image>", ["</s>", "<stop>"])
    assert pieces.answer_end == "]<stop>"
    assert pieces.between_turns == "\n["


def test_a_template_without_an_end_gets_the_tokenizers():
    pieces = parse_chat_template(ending_in(" "), "<image>", ["</s>", "<stop>"])
    assert pieces.answer_end == "</s>"


def test_a_template_that_changes_earlier_text_is_refused():
    def numbered(messages, adds_prompt):
        return f"{len(messages)} messages: {turns_of(messages, '</s>')}"

    with pytest.raises(
        ValueError, match="does more than put texts around.*conv_template='vicuna_v1'"
    ):
        parse_chat_template(Template(numbered), "<image>", ["</s>"])


def test_a_template_that_hides_questions_is_refused():
    with pytest.raises(ValueError, match="leaves out a question or an answer"):
        parse_chat_template(Template(lambda messages, adds_prompt: "nothing"), "<image>", ["</s>"])
