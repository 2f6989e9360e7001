"""Reference of the families: transformers' own chat template, processor, forward and generate."""

import warnings

import torch

from mmcl.core import Conversation, Turn

WITHOUT_CHAT = ("paligemma", "paligemma2")
"""Families that take one question with images and one answer, not a chat."""


def an_image(sample, size):
    """Image of noise of a size (height, width)."""
    g = torch.Generator().manual_seed(100 + sample)
    return torch.randint(0, 256, (3, *size), generator=g, dtype=torch.uint8)


def dialogue(*texts):
    """A conversation whose turns have these texts, the user's first."""
    turns = tuple(Turn("assistant" if n % 2 else "user", text) for n, text in enumerate(texts))
    return Conversation(turns, (texts[-1],))


# Each sample: a conversation, and the images that stand where its marks are.
SAMPLES = {
    "one": (dialogue("<image>what is it?", "a red one"), (an_image(0, (20, 36)),)),
    "two": (
        dialogue("<image><image>which is older?", "two"),
        (an_image(1, (16, 16)), an_image(2, (44, 20))),
    ),
    "middle": (dialogue("is <image> a cat, really?", "yes"), (an_image(3, (30, 18)),)),
    "between": (
        dialogue("is <image> like <image> or not", "no"),
        (an_image(4, (24, 24)), an_image(5, (18, 40))),
    ),
    "turns": (
        dialogue("<image>hue?", "red", "and of <image>now?", "a long blue one"),
        (an_image(6, (16, 48)), an_image(7, (17, 16))),
    ),
    "system": (
        Conversation((Turn("system", "be brief"), *dialogue("<image>hue?", "blue").turns), ()),
        (an_image(8, (12, 60)),),
    ),
    "text": (dialogue("one and two?", "three"), ()),
}


def parts(text):
    """Content of a user's message: texts, and images where the marks stand."""
    found = []
    for index, piece in enumerate(text.split("<image>")):
        found += [{"type": "image"}] if index else []
        found += [{"type": "text", "text": piece}] if piece else []
    return found


def rendered(processor, conversation, for_generation):
    """A conversation in the model's template, up to its last end token or its last question."""
    turns = conversation.turns[:-1] if for_generation else conversation.turns
    messages = [
        {
            "role": turn.role,
            "content": parts(turn.text)
            if turn.role == "user"
            else [{"type": "text", "text": turn.text}],
        }
        for turn in turns
    ]
    text = processor.apply_chat_template(
        messages, add_generation_prompt=for_generation, tokenize=False
    )
    if type(processor).__name__ == "LlavaProcessor":
        # LLaVA-1.5's template writes no end token, with which it was trained.
        for turn in turns:
            text = text.replace(f"ASSISTANT: {turn.text} ", f"ASSISTANT: {turn.text}</s>")
        return text
    return text if for_generation else text.rstrip()


def processed(processor, conversations, images, for_generation=False, side="right"):
    """Inputs of the forward pass of conversations with their images."""
    flat = [image for own in images for image in own]
    nested = {"images": [list(own) for own in images]} if flat else {}
    options = {"return_tensors": "pt", "padding": True, "padding_side": side}
    if type(processor).__name__ == "PaliGemmaProcessor":
        # Images, question and answer; without a chat.
        prompts = [conversation.turns[0].text for conversation in conversations]
        suffixes = [conversation.turns[1].text for conversation in conversations]
        suffix = {} if for_generation else {"suffix": suffixes}
        with warnings.catch_warnings():  # it copies a tensor in a way that numpy 2 deprecates
            warnings.simplefilter("ignore", DeprecationWarning)
            return dict(processor(text=prompts, **nested, **suffix, **options))
    texts = [rendered(processor, one, for_generation) for one in conversations]
    begin = processor.tokenizer.bos_token
    adds_begin = not (begin and texts[0].startswith(begin))
    return dict(processor(text=texts, **nested, add_special_tokens=adds_begin, **options))


def labels_of(processor, conversations, images, inputs):
    """Targets (B, L): answers with their end tokens, -100 elsewhere, by lengths of prefixes."""
    if "labels" in inputs:  # PaliGemma's own
        return inputs["labels"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, (conversation, own) in enumerate(zip(conversations, images, strict=True)):
        has_system = conversation.turns[0].role == "system"
        for last in range(2 + has_system, len(conversation.turns) + 1, 2):
            part = Conversation(conversation.turns[:last], conversation.answers)
            shown = sum(turn.text.count("<image>") for turn in part.turns)
            start, end = (
                processed(processor, [part], [own[:shown]], for_generation)["input_ids"].shape[1]
                for for_generation in (True, False)
            )
            if type(processor).__name__ == "LlavaOnevisionProcessor" and shown < len(own):
                # Beside others an image has fewer tokens than alone, here all the same number.
                alone = processed(processor, [part], [own[:shown]])["input_ids"]
                whole = int((inputs["input_ids"][row] == processor.image_token_id).sum())
                shift = whole * shown // len(own) - int((alone == processor.image_token_id).sum())
                start, end = start + shift, end + shift
            labels[row, start:end] = inputs["input_ids"][row, start:end]
    return labels


def reference(lm, processor, names, samples=SAMPLES):
    """Inputs, loss, logits of scored positions and their targets, of samples as one batch."""
    conversations, images = zip(*(samples[name] for name in names), strict=True)
    inputs = processed(processor, conversations, images)
    labels = labels_of(processor, conversations, images, inputs)
    inputs["labels"] = labels
    with torch.no_grad():
        out = lm(**inputs)
    rows, steps = torch.nonzero(labels[:, 1:] != -100, as_tuple=True)
    return inputs, out.loss, out.logits[rows, steps], labels[rows, steps + 1]


def answers(lm, processor, names, new=8):
    """Answers of ``generate`` to samples as one batch."""
    conversations, images = zip(*(SAMPLES[name] for name in names), strict=True)
    inputs = processed(processor, conversations, images, for_generation=True, side="left")
    inputs.pop("labels", None)
    with torch.no_grad():
        tokens = lm.generate(**inputs, do_sample=False, max_new_tokens=new)
    tokenizer = processor.tokenizer
    # Boxes are special tokens in Qwen's vocabulary, and part of an answer.
    added = tokenizer.added_tokens_decoder.items()
    dropped = {n for n, token in added if token.special and "box" not in token.content}
    new_tokens = tokens[:, inputs["input_ids"].shape[1] :].tolist()
    return [tokenizer.decode([n for n in own if n not in dropped]).strip() for own in new_tokens]
