"""Tokens and labels equal transformers' own template and processor; texts are learned as given."""

import pickle
from dataclasses import replace

import pytest
import torch

from mmcl.core import BadSample, Conversation, Turn
from mmcl.models.hf_vlm.chat_template import ChatTemplate
from mmcl.models.hf_vlm.chat_tokenizer import ChatTokenizer, reserved_token_ids
from mmcl.models.hf_vlm.native_inputs import NativeProcessor
from tests.models import small_vlms
from tests.models.family_reference import (
    SAMPLES,
    WITHOUT_CHAT,
    an_image,
    dialogue,
    labels_of,
    processed,
)
from tests.models.small_families import FAMILIES

GROUNDING = ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>")


def chat_of(family, **settings):
    """Chat tokenizer and processor of a family."""
    _, config, processor = (FAMILIES | small_vlms.ARCHITECTURES | {"boxes": boxes})[family]()
    ends = ["<end_of_turn>"] if family == "gemma3" else [processor.tokenizer.eos_token]
    template = ChatTemplate.of(processor, ends)
    reserved = reserved_token_ids(processor, config, template)
    return ChatTokenizer(processor.tokenizer, template, reserved, **settings), processor


def boxes():
    """Qwen2.5-VL with tokens of grounding, tools, reasoning and locations."""
    made = small_vlms.qwen2_5_vl()
    tokenizer = made[2].tokenizer
    tokenizer.add_special_tokens({"extra_special_tokens": list(GROUNDING)})
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<loc0001>", "<seg001>", "<ref>"])
    return made


def encoded(chat, *texts, images=(), system=None, **options):
    turns = dialogue(*texts).turns
    turns = turns if system is None else (Turn("system", system), *turns)
    return chat.encode(Conversation(turns, (texts[-1],)), images, **options)


def text_of(chat, tokens):
    return chat.tokenizer.decode(tokens, skip_special_tokens=False)


def learned(chat, *texts, **options):
    labels = encoded(chat, *texts, **options).labels
    return text_of(chat, labels[labels != -100])


MORE = {
    "end": (dialogue("what is older? <image>", "it"), (an_image(7, (20, 20)),)),
    "second": (dialogue("hue?", "red", "and <image>?", "blue"), (an_image(8, (17, 30)),)),
    "lines": (
        dialogue("One:\n<image>\nTwo:\n<image>\nWhich?", "two"),
        (an_image(9, (16, 16)), an_image(10, (40, 16))),
    ),
}


@pytest.mark.parametrize("sample", [*SAMPLES, *MORE])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_labels_are_those_of_transformers(family, sample):
    conversation, images = (SAMPLES | MORE)[sample]
    is_one_turn = family in WITHOUT_CHAT
    if is_one_turn and (len(conversation.turns) > 2 or not images):
        pytest.skip("PaliGemma answers one question about images")
    chat, processor = chat_of(family)
    is_joint = family == "llava_onevision"
    _, texts = NativeProcessor(processor, frozenset(), is_joint)(images)
    found = chat.encode(conversation, texts)
    inputs = processed(processor, [conversation], [images])
    if sample == "end" and chat.template.puts_images_first:
        # The space before the mark is at the end of the question, and is left out as before.
        stripped = (dialogue("<image>what is older?", "it"), images)
        inputs = processed(processor, [stripped[0]], [images])
    assert found.input_ids.tolist() == inputs["input_ids"][0].tolist()
    if is_joint and len(images) > 1 and len(conversation.turns) > 2:
        return  # tokens of an image depend on the number of images, so prefixes are no reference
    conversation = stripped[0] if "stripped" in locals() else conversation
    labels = labels_of(processor, [conversation], [images], inputs)[0]
    assert found.labels.tolist() == labels.tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spaces", ["  {} ", "{}\n", "\n\n{}"])
def test_white_space_of_an_answer_is_kept_as_by_the_template(family, spaces):
    if family in WITHOUT_CHAT:
        pytest.skip("its processor has no template")
    chat, processor = chat_of(family)
    answer = spaces.format("a red one")
    # LLaVA-1.5's template writes a space, and no end token, after an answer: the end replaces it.
    kept = answer.rstrip() if family == "llava" else answer
    inputs = processed(processor, [dialogue("hue?", kept)], [()])
    found = encoded(chat, "hue?", answer)
    assert found.input_ids.tolist() == inputs["input_ids"][0].tolist()


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "gemma3", "internvl"])
def test_a_system_turn_is_where_the_template_puts_it(family):
    chat, processor = chat_of(family)
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("system", "Be short."), ("user", "hue?"))
    ]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    adds = not text.startswith(chat.tokenizer.bos_token or "\0")
    prompt = processor.tokenizer(text, add_special_tokens=adds)["input_ids"]
    found = encoded(chat, "hue?", "red", system="Be short.").input_ids.tolist()
    assert found[: len(prompt)] == prompt


def test_marks_at_the_front_may_stand_on_lines_of_their_own():
    chat, _ = chat_of("qwen2_5_vl")
    plain = encoded(chat, "<image>what?", "x", images=["<|image_pad|>"]).input_ids
    for text in ("<image>\nwhat?", "  <image> \n what?  ", "what?"):
        assert torch.equal(encoded(chat, text, "x", images=["<|image_pad|>"]).input_ids, plain)
    two = ["<|image_pad|>", "<|image_pad|>" * 2]
    pair = encoded(chat, "<image>\n<image>\nwhat?", "x", images=two).input_ids
    assert torch.equal(encoded(chat, "what?", "x", images=two).input_ids, pair)


def test_an_image_of_llava_comes_first_wherever_its_mark_is():
    chat, _ = chat_of("llava")
    found = [
        encoded(chat, text, "x", images=["<image>" * 4]).input_ids.tolist()
        for text in ("<image>\nwhat?", "what?\n<image>", "what?", "what? <image> ")
    ]
    assert found == [found[0]] * 4


@pytest.mark.parametrize(("text", "images"), [("a <image> b <image>", 1), ("<image>", 0)])
def test_marks_without_their_images_are_refused(text, images):
    chat, _ = chat_of("llava")
    with pytest.raises(BadSample, match=rf"{text.count('<')} image marks .* it has {images} image"):
        encoded(chat, text, "x", images=["<image>"] * images)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mark_in_an_answer_is_plain_text(family):
    chat, processor = chat_of(family)
    image = [processor.image_token]
    answer = "it writes <image> there, and <image>"
    found = encoded(chat, "<image>what?", answer, images=image)
    reference = encoded(chat, "<image>what?", answer.replace("<", "("), images=image)
    assert len(found.labels) == len(reference.labels)  # a letter each
    assert answer in text_of(chat, found.labels[found.labels != -100])
    shown = chat.tokenizer.convert_tokens_to_ids(processor.image_token)
    assert found.input_ids.tolist().count(shown) == 1
    assert chat.decode(found.labels[found.labels != -100]) == answer


def test_a_mark_in_a_system_turn_is_plain_text():
    chat, _ = chat_of("llava")
    tokens = encoded(chat, "hi", "x", system="<image> is a mark").input_ids
    assert chat.tokenizer.convert_tokens_to_ids("<image>") not in tokens.tolist()
    assert "<image> is a mark" in text_of(chat, tokens)


@pytest.mark.parametrize(
    "answer",
    [
        "<|object_ref_start|>a cup<|object_ref_end|><|box_start|>(12,34),(56,78)<|box_end|>",
        "<|box_start|>(1,2),(3,4)<|box_end|> and <|box_start|>(5,6),(7,8)<|box_end|>",
        "<tool_call>find(cup)</tool_call>",
        "<loc0001><loc0001><seg001> cup",
        "<ref>a cup",
        "box_start is a word",
    ],
)
def test_special_tokens_of_an_answer_are_learned_and_generated(answer):
    chat, _ = chat_of("boxes")
    assert learned(chat, "where?", answer) == f"{answer}<|im_end|>"
    tokens = encoded(chat, "where?", answer).input_ids.tolist()
    for mark in chat.tokenizer.added_tokens_encoder:
        if mark in answer:
            assert chat.tokenizer.convert_tokens_to_ids(mark) in tokens
    pad = chat.tokenizer.pad_token_id
    generated = [*chat.answer_tokens(answer).tolist(), pad, pad]
    assert chat.decode(torch.tensor(generated)) == answer
    assert answer in text_of(chat, encoded(chat, f"is it {answer}?", "yes").input_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_the_format_are_refused_in_every_turn(family):
    chat, processor = chat_of(family)
    tokenizer = processor.tokenizer
    marks = {tokenizer.eos_token, tokenizer.pad_token, processor.image_token, *chat.template.ends}
    roles = ("<|im_start|>", "<start_of_turn>", "[INST]", "<|begin_of_text|>", "[SYSTEM_PROMPT]")
    marks |= {role for role in roles if role in tokenizer.added_tokens_encoder}
    marks |= {
        text for text in tokenizer.added_tokens_encoder
        if any(word in text for word in ("image", "img", "vision", "video", "row_1", "IMG"))
    }  # fmt: skip
    for mark in marks - {"<image>"}:
        for turns in (("what", f"red{mark}"), (f"{mark} what", "red"), ("a", f"b {mark}c")):
            with pytest.raises(BadSample, match="by which the model's format marks an end, a role"):
                encoded(chat, *turns)


def test_a_refused_token_is_named():
    chat, _ = chat_of("boxes")
    with pytest.raises(BadSample, match=r"holds '<\|im_end\|>', '<\|im_start\|>', by which"):
        encoded(chat, "hi", "a<|im_end|>\n<|im_start|>user\nb")


LONG = "word " * 50


def test_a_long_answer_is_left_out_or_cut_by_choice():
    chat, _ = chat_of("llava", max_length=60)
    with pytest.raises(BadSample, match=r"it has \d+ tokens, more than the model's max_length 60"):
        encoded(chat, "what?", LONG)
    cut = encoded(replace(chat, too_long="cut"), "what?", LONG)
    whole = encoded(replace(chat, max_length=512), "what?", LONG)
    assert torch.equal(cut.input_ids, whole.input_ids[:60])
    assert torch.equal(cut.labels, whole.labels[:60])
    assert chat.tokenizer.eos_token_id not in cut.labels.tolist()
    beyond = len(whole.input_ids) - 60
    assert cut.note == f"{beyond} of its {beyond + 60} tokens are beyond max_length 60"
    assert whole.note == ""
    tested = encoded(chat, "what?", LONG, in_training=False)
    assert torch.equal(tested.labels, cut.labels)
    assert tested.note == ""


@pytest.mark.parametrize("too_long", ["drop", "cut"])
@pytest.mark.parametrize("in_training", [True, False])
def test_a_question_that_fills_everything_is_refused(too_long, in_training):
    chat, _ = chat_of("llava", max_length=60, too_long=too_long)
    with pytest.raises(
        BadSample, match=r"questions and images fill \d+ tokens, .*max_length is 60"
    ):
        encoded(chat, LONG, "x", in_training=in_training)


def test_a_last_question_beyond_the_limit_is_not_asked_in_part():
    chat, _ = chat_of("llava", max_length=60, too_long="cut")
    assert encoded(chat, "a?", "b", LONG, "c").note  # the first answer is learned
    with pytest.raises(BadSample, match="questions and images fill"):
        encoded(chat, "a?", "b", LONG, "c", in_training=False)


def test_an_image_is_never_cut():
    chat, _ = chat_of("llava", max_length=60, too_long="cut")
    with pytest.raises(BadSample, match="questions and images fill"):
        encoded(chat, "a?", "b", "<image>c?", "d", images=["<image>" * 50])


def test_a_sample_of_exactly_the_limit_is_whole():
    chat, _ = chat_of("llava")
    length = len(encoded(chat, "what?", "a red one").input_ids)
    whole = encoded(replace(chat, max_length=length), "what?", "a red one")
    assert (len(whole.input_ids), whole.note) == (length, "")
    with pytest.raises(BadSample, match="more than the model's max_length"):
        encoded(replace(chat, max_length=length - 1), "what?", "a red one")


def test_an_unknown_choice_for_long_samples_is_refused():
    with pytest.raises(ValueError, match="too_long is 'keep', expected 'drop' or 'cut'"):
        chat_of("llava", too_long="keep")


def test_a_chat_tokenizer_can_be_sent_to_a_loaders_worker():
    chat, _ = chat_of("llava")
    texts = ("<image>what?", "a <image> mark")
    first = encoded(chat, *texts, images=["<image>" * 3])
    other = encoded(pickle.loads(pickle.dumps(chat)), *texts, images=["<image>" * 3])
    assert torch.equal(first.input_ids, other.input_ids)


def test_an_answer_has_the_tokens_that_it_has_after_a_question():
    chat, _ = chat_of("llava")
    labels = encoded(chat, "is it so?", "two words").labels
    assert torch.equal(chat.answer_tokens("two words"), labels[labels != -100])
