"""Inputs, labels and answers by transformers alone: the reference of generative tests."""

import torch

from mmcl.core import Batch, Conversation, Turn
from mmcl.data.batches.collate import Example, collate

WORDS = ("red", "a long blue one", "x", "two cats", "green")
# Options for images that have the model's size already, as a user would pass them by hand.
NO_RESIZE = {
    "llava": {"do_resize": False, "do_center_crop": False},
    "llava_onevision": {},
    "qwen2_5_vl": {"do_resize": False},
    "smolvlm": {"do_resize": False, "do_image_splitting": False},
    "internvl": {"do_resize": False, "crop_to_patches": False},
}


def an_image(sample, size=16):
    """Image of noise."""
    g = torch.Generator().manual_seed(100 + sample)
    return torch.randint(0, 256, (3, size, size), generator=g, dtype=torch.uint8)


def a_dialogue(sample, turns=1, has_image=True):
    """Question and answer of a sample, each of another length."""
    messages = []
    for turn in range(turns):
        mark = "<image>\n" if has_image and turn == 0 else ""
        messages.append(Turn("user", f"{mark}what is it" + ", really" * (sample % 3) + "?"))
        messages.append(Turn("assistant", WORDS[(sample + turn) % len(WORDS)]))
    return Conversation(tuple(messages), (messages[-1].text,))


def a_batch(model, samples=(0, 1, 2), turns=1, hidden=()):
    """A batch as the loader makes it; samples in ``hidden`` have no image."""
    transform = model.transform(True)
    processed = []
    for sample in samples:
        dialogue = a_dialogue(sample, turns, sample not in hidden)
        pixels = None if sample in hidden else an_image(sample, model.image_inputs.size)
        one = transform(pixels, dialogue, 0)
        processed.append(Example(one, -100, 0, sample, str(sample), reference=dialogue.reference))
    return collate(processed)


def hf_text(model, architecture, dialogue, has_image, for_generation):
    """A dialogue in the model's own template, up to its end token or up to the last answer."""
    turns = dialogue.turns[:-1] if for_generation else dialogue.turns
    messages = []
    for index, turn in enumerate(turns):
        content = [{"type": "text", "text": turn.text.replace("<image>\n", "")}]
        if has_image and index == 0:
            content.insert(0, {"type": "image"})
        role = "assistant" if index % 2 else "user"
        messages.append({"role": role, "content": content})
    text = model.processor.apply_chat_template(
        messages, add_generation_prompt=for_generation, tokenize=False
    )
    if architecture == "llava":  # its template writes no end token, with which it was trained
        for turn in turns[1::2]:
            text = text.replace(f"ASSISTANT: {turn.text} ", f"ASSISTANT: {turn.text}</s>")
        return text
    return text if for_generation else text.removesuffix("\n")


def hf_inputs(model, architecture, samples, turns=1, hidden=(), for_generation=False, side="right"):
    """Inputs of the model's forward pass as its processor makes them."""
    texts, images = [], []
    for sample in samples:
        has_image = sample not in hidden
        texts.append(
            hf_text(
                model, architecture, a_dialogue(sample, turns, has_image), has_image, for_generation
            )
        )
        images.append([an_image(sample, model.image_inputs.size)] if has_image else [])
    flat = [image for own in images for image in own]
    wanted = images if architecture in ("smolvlm", "internvl") else flat
    if architecture == "internvl":
        wanted = flat
    given = {"images": wanted} if flat else {}
    return dict(
        model.processor(
            text=texts, return_tensors="pt", padding=True, padding_side=side, **given,
            **(NO_RESIZE[architecture] if flat else {}),
        )
    )  # fmt: skip


def hf_labels(model, architecture, samples, inputs, turns=1, hidden=()):
    """Token targets: every answer with its end, -100 elsewhere."""
    labels = torch.full_like(inputs["input_ids"], -100)
    for index, sample in enumerate(samples):
        whole = a_dialogue(sample, turns, sample not in hidden)
        for turn in range(1, turns + 1):
            part = Conversation(whole.turns[: 2 * turn], whole.answers)
            spans = []
            for for_generation in (True, False):
                text = hf_text(model, architecture, part, sample not in hidden, for_generation)
                text = text.replace(model.processor.image_token, model.image_placeholders)
                spans.append(len(model.processor.tokenizer(text)["input_ids"]))
            labels[index, spans[0] : spans[1]] = inputs["input_ids"][index, spans[0] : spans[1]]
    return labels


def hf_answers(model, architecture, samples, new=8, hidden=()):
    """Answers of ``generate`` to all samples together."""
    inputs = hf_inputs(
        model, architecture, samples, hidden=hidden, for_generation=True, side="left"
    )
    sequences = model.lm.generate(**inputs, do_sample=False, max_new_tokens=new)
    sequences = sequences[:, inputs["input_ids"].shape[1] :]
    texts = model.processor.tokenizer.batch_decode(sequences, skip_special_tokens=True)
    return [text.strip() for text in texts]


def one_by_one(batch):
    """The samples of a batch as batches of one."""
    return [trimmed(batch.take(torch.tensor([sample]))) for sample in range(len(batch))]


def trimmed(batch):
    """A batch without columns that are padding in every sample."""
    longest = int(batch.attention_mask.sum(1).max())
    return Batch(
        batch.images, batch.labels[:, :longest], batch.task_ids, batch.image_owner,
        batch.input_ids[:, :longest], batch.attention_mask[:, :longest],
        references=batch.references,
    )  # fmt: skip
