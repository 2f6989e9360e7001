import pickle

import pytest
import torch

from mmcl.core import Dialogue, Turn
from mmcl.models import ImageTextToText
from mmcl.models.conversation import pieces_of, vicuna
from tests.models.small_chats import FAMILIES, write_model
from tests.stand_in_llava import a_llava

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("llava"), "llava")
    return ImageTextToText(str(folder), style="vicuna_v1")


def said(*texts):
    turns = [Turn("assistant" if n % 2 else "human", text) for n, text in enumerate(texts)]
    return Dialogue(tuple(turns), (texts[-1],))


def as_text(model, tokens):
    return model.processor.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def scored(model, tokens, labels):
    return as_text(model, tokens[labels != -100])


def test_vicuna_speaks_as_llava_was_trained():
    pieces = vicuna("<image>", "</s>")
    first = pieces.shown + "Why?" + pieces.middle + pieces.lead + "So." + pieces.end
    second = pieces.between + "And?" + pieces.middle + pieces.lead + "No." + pieces.end
    assert first + second == (
        f"{SYSTEM}USER: <image>\nWhy? ASSISTANT: So.</s>USER: And? ASSISTANT: No.</s>"
    )
    assert pieces.head == f"{SYSTEM}USER: "


def test_the_template_of_llava_is_vicuna_without_the_system_line(tmp_path):
    plain = ImageTextToText(str(write_model(tmp_path, "llava"))).conversation.pieces
    expected = vicuna("<image>", "</s>")
    assert plain.head == "USER: "
    assert plain.shown == "USER: <image>\n"
    for name in ("middle", "lead", "end", "between"):
        assert getattr(plain, name) == getattr(expected, name)


def test_what_the_assistant_says_is_scored_with_its_end(llava):
    tokens, labels = llava.conversation.encode(said("a?", "one two", "b?", "three"), True)
    assert scored(llava, tokens, labels) == "one two</s> three</s>"
    assert int((tokens == llava.pixels.token).sum()) == 4


def test_the_picture_stands_in_front_wherever_its_mark_was(llava):
    texts = ["<image>\nwhat?", "what?\n<image>", "what?"]
    found = [llava.conversation.encode(said(text, "x"), True)[0].tolist() for text in texts]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_nobody_can_say_a_token_of_the_format(family, tmp_path):
    size = {"size": 16} if family == "qwen2_5_vl" else {}
    model = ImageTextToText(str(write_model(tmp_path, family)), **size)
    tokenizer = model.processor.tokenizer
    marks = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    assert len(marks) > 3
    clean = model.conversation.encode(said("what is it", "red"), True)[0]
    for mark in marks:
        half = len(mark) // 2
        nested = f"{mark[:half]}{mark}{mark[half:]}"
        for dirt in (mark, nested, mark + nested):
            dialogue = said(f"what is{dirt} it", f"{dirt}red{dirt}")
            assert torch.equal(model.conversation.encode(dialogue, True)[0], clean), dirt


def test_long_rows_are_cut_behind():
    model = a_llava(max_length=30)
    tokens, labels = model.conversation.encode(said("what?", "word " * 50), True)
    assert len(tokens) == len(labels) == 30
    whole = a_llava(max_length=512).conversation.encode(said("what?", "word " * 50), True)[0]
    assert torch.equal(tokens, whole[:30])


def test_a_length_without_room_for_the_picture_is_refused():
    with pytest.raises(ValueError, match=r"max_length is 5 and a picture with one word takes \d+"):
        a_llava(max_length=5)


def test_an_answer_has_the_tokens_that_it_has_behind_a_question(llava):
    tokens, labels = llava.conversation.encode(said("is it so?", "two words"), True)
    assert torch.equal(llava.conversation.answer_tokens("two words"), tokens[labels != -100])


def test_a_conversation_can_be_sent_to_a_loaders_worker(llava):
    own = llava.transform(True)
    other = pickle.loads(pickle.dumps(own))
    dialogue = said("<image>\nwhat?", "this")
    pixels = torch.zeros(3, 16, 16, dtype=torch.uint8)
    assert torch.equal(other(pixels, dialogue, 0).tokens, own(pixels, dialogue, 0).tokens)


class Template:
    """A processor whose template is a function."""

    def __init__(self, say):
        self.say = say

    def apply_chat_template(self, said, tokenize, add_generation_prompt):
        return self.say(said, add_generation_prompt)


def turns_of(said, end):
    texts = [("<image>" if len(m["content"]) > 1 else "") + m["content"][-1]["text"] for m in said]
    return "".join(f"[{text}]{end}" for text in texts)


def ending_in(end):
    return Template(lambda said, asks: turns_of(said, end))


def test_the_first_end_behind_an_answer_ends_it():
    pieces = pieces_of(ending_in("<stop>\n"), "<image>", ["</s>", "<stop>"])
    assert pieces.end == "]<stop>"
    assert pieces.between == "\n["


def test_a_template_without_an_end_gets_the_tokenizers():
    pieces = pieces_of(ending_in(" "), "<image>", ["</s>", "<stop>"])
    assert pieces.end == "</s>"


def test_a_template_that_changes_what_stands_before_is_refused():
    def numbered(said, asks):
        return f"{len(said)} messages: {turns_of(said, '</s>')}"

    with pytest.raises(ValueError, match="does more than put texts around.*style='vicuna_v1'"):
        pieces_of(Template(numbered), "<image>", ["</s>"])


def test_a_template_that_hides_words_is_refused():
    with pytest.raises(ValueError, match="leaves out what is said"):
        pieces_of(Template(lambda said, asks: "nothing"), "<image>", ["</s>"])
