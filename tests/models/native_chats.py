"""What transformers itself does with dialogues: the reference of generative tests."""

import torch

from mmcl.core import Batch, Dialogue, Turn
from mmcl.data.row import MadeRow, collate

WORDS = ("red", "a long blue one", "x", "two cats", "green")
# Options for pictures that have the model's size already, as a user would pass them by hand.
AS_THEY_ARE = {
    "llava": {"do_resize": False, "do_center_crop": False},
    "llava_onevision": {},
    "qwen2_5_vl": {"do_resize": False},
    "smolvlm": {"do_resize": False, "do_image_splitting": False},
    "internvl": {"do_resize": False, "crop_to_patches": False},
}


def a_picture(row, size=16):
    """A picture of noise."""
    g = torch.Generator().manual_seed(100 + row)
    return torch.randint(0, 256, (3, size, size), generator=g, dtype=torch.uint8)


def a_dialogue(row, turns=1, shows=True):
    """Question and answer of a row, of a length of its own."""
    said = []
    for turn in range(turns):
        mark = "<image>\n" if shows and turn == 0 else ""
        said.append(Turn("human", f"{mark}what is it" + ", really" * (row % 3) + "?"))
        said.append(Turn("assistant", WORDS[(row + turn) % len(WORDS)]))
    return Dialogue(tuple(said), (said[-1].text,))


def a_batch(model, rows=(0, 1, 2), turns=1, hidden=()):
    """A batch as the loader makes it; rows in ``hidden`` have no picture."""
    transform = model.transform(True)
    made = []
    for row in rows:
        dialogue = a_dialogue(row, turns, row not in hidden)
        pixels = None if row in hidden else a_picture(row, model.pixels.size)
        one = transform(pixels, dialogue, 0)
        made.append(MadeRow(one, -100, 0, row, str(row), reference=dialogue.reference))
    return collate(made)


def native_text(model, family, dialogue, shows, asks):
    """A dialogue in the model's own template, up to its end token or up to the last answer."""
    turns = dialogue.turns[:-1] if asks else dialogue.turns
    said = []
    for place, turn in enumerate(turns):
        content = [{"type": "text", "text": turn.text.replace("<image>\n", "")}]
        if shows and place == 0:
            content.insert(0, {"type": "image"})
        role = "assistant" if place % 2 else "user"
        said.append({"role": role, "content": content})
    text = model.processor.apply_chat_template(said, add_generation_prompt=asks, tokenize=False)
    if family == "llava":  # its template writes no end token, with which it was trained
        for turn in turns[1::2]:
            text = text.replace(f"ASSISTANT: {turn.text} ", f"ASSISTANT: {turn.text}</s>")
        return text
    return text if asks else text.removesuffix("\n")


def native_inputs(model, family, rows, turns=1, hidden=(), asks=False, side="right"):
    """Inputs of the model's forward pass as its processor makes them."""
    texts, pictures = [], []
    for row in rows:
        shows = row not in hidden
        texts.append(native_text(model, family, a_dialogue(row, turns, shows), shows, asks))
        pictures.append([a_picture(row, model.pixels.size)] if shows else [])
    flat = [picture for own in pictures for picture in own]
    wanted = pictures if family in ("smolvlm", "internvl") else flat
    if family == "internvl":
        wanted = flat
    given = {"images": wanted} if flat else {}
    return dict(
        model.processor(
            text=texts, return_tensors="pt", padding=True, padding_side=side, **given,
            **(AS_THEY_ARE[family] if flat else {}),
        )
    )  # fmt: skip


def native_labels(model, family, rows, inputs, turns=1, hidden=()):
    """Token targets: what is said in every answer and its end, -100 elsewhere."""
    labels = torch.full_like(inputs["input_ids"], -100)
    for place, row in enumerate(rows):
        whole = a_dialogue(row, turns, row not in hidden)
        for turn in range(1, turns + 1):
            part = Dialogue(whole.turns[: 2 * turn], whole.answers)
            spans = []
            for asks in (True, False):
                text = native_text(model, family, part, row not in hidden, asks)
                text = text.replace(model.conversation.picture, model.conversation.expanded)
                spans.append(len(model.processor.tokenizer(text)["input_ids"]))
            labels[place, spans[0] : spans[1]] = inputs["input_ids"][place, spans[0] : spans[1]]
    return labels


def native_answers(model, family, rows, new=8, hidden=()):
    """What ``generate`` says, the rows together."""
    inputs = native_inputs(model, family, rows, hidden=hidden, asks=True, side="left")
    said = model.lm.generate(**inputs, do_sample=False, max_new_tokens=new)
    said = said[:, inputs["input_ids"].shape[1] :]
    texts = model.processor.tokenizer.batch_decode(said, skip_special_tokens=True)
    return [text.strip() for text in texts]


def one_by_one(batch):
    """The rows of a batch as batches of one."""
    return [trimmed(batch.take(torch.tensor([row]))) for row in range(len(batch))]


def trimmed(batch):
    """A batch without columns that are padding in every row."""
    longest = int(batch.mask.sum(1).max())
    return Batch(
        batch.images, batch.labels[:, :longest], batch.task, batch.owner, batch.tokens[:, :longest],
        batch.mask[:, :longest], references=batch.references,
    )  # fmt: skip
