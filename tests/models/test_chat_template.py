import pytest

from mmcl.core import BadSample
from mmcl.models.hf_vlm.chat_template import (
    SLOT,
    VICUNA,
    ChatTemplate,
    pin_date,
    pinned_date,
    reads_date,
)
from tests.models.small_families import FAMILIES

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
ONE = (("user", (SLOT,)), ("assistant", (SLOT,)))


def written(template, *texts, shape=ONE):
    """A conversation in a template's format, with «» around what is in the loss."""
    words, found = iter(texts), ""
    for segment in template.segments(shape):
        text = next(words) if segment.text is None else segment.text
        found += f"«{text}»" if segment.is_answer else text
    return found.replace("»«", "")


def template_of(source, *ends, image_token="[img]"):
    return ChatTemplate(source, image_token, ends or ("</s>",))


def each(content, end="</s>"):
    """A template that writes every message in brackets."""
    return (
        "{% for message in messages %}[{% for part in message['content'] %}"
        + content
        + "{% endfor %}]"
        + end
        + "{% endfor %}{% if add_generation_prompt %}[{% endif %}"
    )


TEXTS = each("{{ part['text'] if part['type'] == 'text' else '[img]' }}")


def test_vicuna_is_the_template_of_llavas_training():
    template = ChatTemplate(VICUNA, "<image>", ("</s>",), (("image_token", "<image>"), END))
    shape = (("user", (None, SLOT)), ("assistant", (SLOT,))) + ONE
    text = written(template, "Why?", "So.", "And?", "No.", shape=shape)
    assert text == (
        f"{SYSTEM}USER: <image>\nWhy? ASSISTANT:« So.</s>»USER: And? ASSISTANT:« No.</s>»"
    )
    told = written(template, "Be short.", "Why?", "So.", shape=(("system", (SLOT,)), *ONE))
    assert told == "Be short. USER: Why? ASSISTANT:« So.</s>»"


END = ("end_token", "</s>")


def test_the_template_of_llava_is_vicuna_without_the_system_line():
    processor = FAMILIES["llava"]()[2]
    own = ChatTemplate.of(processor, ["</s>"])
    vicuna = ChatTemplate.of(processor, ["</s>"], "vicuna_v1")
    for shape in (ONE, ONE + ONE, (("user", (None, SLOT)), ("assistant", (SLOT,)))):
        texts = ["q", "a"] * (len(shape) // 2)
        assert SYSTEM + written(own, *texts, shape=shape) == written(vicuna, *texts, shape=shape)


def test_the_first_end_token_after_an_answer_ends_it():
    template = template_of(each("{{ part['text'] }}", "<stop>\n</s>"), "</s>", "<stop>")
    assert written(template, "q", "a", "r", "b", shape=ONE + ONE) == (
        "[q]<stop>\n</s>[«a]<stop>»\n</s>[r]<stop>\n</s>[«b]<stop>»"
    )


def test_a_template_without_an_end_gets_the_tokenizers():
    template = template_of(each("{{ part['text'] }}", " "))
    assert written(template, "q", "a", "r", "b", shape=ONE + ONE) == "[q] [«a</s>»] [r] [«b</s>»"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ messages | length }} messages: " + TEXTS, "does more than put texts around"),
        ("nothing", "leaves out or moves a text"),
        (each("{{ part['text'] }}{{ part['text'] }}"), "leaves out or moves a text"),
        ("{{ raise_exception('never') }}", r"refuses it \(never\)"),
        (TEXTS.replace("[{% endif", "(thinking) {% endif"), "generation starts from"),
    ],
)
def test_a_template_that_does_more_than_put_texts_in_places_is_refused(source, words):
    with pytest.raises(BadSample, match=words):
        template_of(source).segments(ONE)


def test_a_template_without_a_place_for_images_is_refused():
    with pytest.raises(BadSample, match=r"writes 0 image tokens \('\[img\]'\) for 1 images"):
        template_of(each("{{ part['text'] }}")).segments((("user", (None, SLOT)), ONE[1]))


SYSTEM_SHAPE = (("system", (SLOT,)), *ONE)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("", "leaves out or moves a text"),
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
    ],
)
def test_a_system_turn_without_a_place_is_refused(place, words):
    source = (
        "{% for message in messages if message['role'] == 'system' %}" + place + "{% endfor %}"
        "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + TEXTS
    )
    template = template_of(source)
    with pytest.raises(BadSample, match=f"its system turn has no place .*{words}.*first question"):
        template.segments(SYSTEM_SHAPE)
    assert written(template, "q", "a") == "[q]</s>[«a]</s>»"


def test_a_system_turn_goes_where_the_template_takes_a_plain_text():
    source = (
        "{% if messages[0]['role'] == 'system' %}({{ messages[0]['content'].upper and "
        "messages[0]['content'] }}){% set messages = messages[1:] %}{% endif %}" + TEXTS
    )
    assert written(template_of(source), "s", "q", "a", shape=SYSTEM_SHAPE) == "(s)[q]</s>[«a]</s>»"


def test_a_default_system_prompt_stays_where_a_sample_has_none():
    processor = FAMILIES["qwen2_5_vl"]()[2]
    template = ChatTemplate.of(processor, ["<|im_end|>"])
    default = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert written(template, "q", "a").startswith(default)
    own = written(template, "Be short.", "q", "a", shape=SYSTEM_SHAPE)
    assert own.startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nq")


def test_a_template_of_plain_texts_gets_image_tokens_in_them():
    source = TEXTS.replace("{% for part in message['content'] %}", "{{ message['content'] }}")
    source = source.replace(
        "{{ part['text'] if part['type'] == 'text' else '[img]' }}{% endfor %}", ""
    )

    class Processor:
        chat_template, image_token = {"default": source}, "[img]"

        class tokenizer:
            special_tokens_map = {"eos_token": "</s>", "extra": ["a list"]}

    template = ChatTemplate.of(Processor, ["</s>"])
    shape = (("user", (SLOT, None, SLOT)), ("assistant", (SLOT,)))
    assert written(template, "q", "r", "a", shape=shape) == "[q[img]r]</s>[«a]</s>»"


def test_reasoning_is_divided_by_the_template():
    """As Qwen3-VL-Thinking: the prompt opens reasoning, and earlier reasoning is left out."""
    source = (
        "{% for message in messages %}{% set text = message['content'][0]['text'] %}"
        "{% if message['role'] == 'user' %}<u>{{ text }}</u>{% else %}<a>"
        "{% if loop.last %}<think>{{ '\n' }}{% if '</think>' in text %}"
        "{{ text.split('</think>')[0].split('<think>')[-1].strip() }}{% endif %}"
        "{{ '\n</think>\n\n' }}{% endif %}"
        "{{ text.split('</think>')[-1].lstrip() }}</a>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<a><think>{{ '\n' }}{% endif %}"
    )
    template = template_of(source, "</a>")
    assert written(template, "q", "a").endswith("<a><think>\n«\n</think>\n\na</a>»")
    tagged = (ONE[0], ("assistant", (f"<think>\n{SLOT}\n</think>\n\n{SLOT}",)))
    text = written(template, "q", "so", "a", shape=tagged)
    assert text.endswith("<a><think>\n«so\n</think>\n\na</a>»")
    with pytest.raises(BadSample, match="leaves out or moves a text"):
        template.segments(tagged + ONE)


DATED = "Today: {{ strftime_now('%d %b %Y') }} {{ strftime_now(\"%A\") }}\n" + TEXTS


def test_a_pinned_template_writes_the_dates_of_its_day():
    assert reads_date(DATED)
    pinned = pin_date(DATED, "2026-12-01")
    assert not reads_date(pinned)
    assert pinned_date(pinned) == "2026-12-01"
    assert pinned_date(DATED) is None
    assert written(template_of(pinned), "q", "a").startswith("Today: 01 Dec 2026 Tuesday\n[q]")
    again = pin_date(pinned, "2024-02-29")
    assert again == pin_date(DATED, "2024-02-29")
    assert written(template_of(again), "q", "a").startswith("Today: 29 Feb 2024 Thursday\n[q]")


@pytest.mark.parametrize("start", ["\n\n", "  {% if true %}x{% endif %}\n", "{# #}", "{{- ' y' }}"])
def test_pinning_changes_nothing_but_dates(start):
    source = start + TEXTS + "{% set day = strftime_now('%Y') %}"
    plain = written(template_of(start + TEXTS), "q", "a")
    assert written(template_of(pin_date(source, "2026-12-01")), "q", "a") == plain


def test_a_date_that_cannot_be_pinned_is_refused():
    with pytest.raises(ValueError, match="a format that it computes"):
        pin_date("{{ strftime_now(format) }}", "2026-12-01")
    with pytest.raises(ValueError, match="template_date is 'today', expected a day such as"):
        pin_date(DATED, "today")
