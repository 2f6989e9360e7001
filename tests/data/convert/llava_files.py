"""Small instruction files and pictures in the layouts of LLaVA and of the public sets."""

import io
import json

import numpy as np
from PIL import Image

SIZE = (10, 8)


def jpeg(number=0, kind="JPEG"):
    """The bytes of a picture of noise, its own for every number."""
    noise = np.random.default_rng(number).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


def put(path, content):
    """Write bytes, text or JSON, with the folders it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        path.write_text(text, encoding="utf-8")
    return path


def asked(number, image=None, question="What is this?", answer=None, **more):
    """A record of the training layout."""
    mark = "" if image is None else "<image>\n"
    record = {
        "id": f"id/{number}",
        "conversations": [
            {"from": "human", "value": f"{mark}{question}"},
            {"from": "gpt", "value": f"thing {number}" if answer is None else answer},
        ],
        **more,
    }
    return record if image is None else {**record, "image": image}


def quizzed(number, image, question="What is this?", **more):
    """A record of the test layout."""
    named = {"question_id": f"q{number}", "image": image, "text": question}
    return {**named, "answer": f"thing {number}", **more}


def train_set(folder, count=5, per_picture=1):
    """Write ``count`` training records and their pictures; return file and image folder."""
    images = folder / "pictures"
    records = []
    for number in range(count):
        name = f"sub/{number // per_picture}.jpg"
        put(images / name, jpeg(number // per_picture))
        records.append(asked(number, name))
    return put(folder / "train.json", records), images


def samples_of(prepared, column, part):
    """Give (key, picture bytes or None, content of the .json member) of every sample."""
    reader = prepared.reader(column, part)
    for number in range(len(reader)):
        sample = reader.read(number)
        pictures = [
            sample.members[kind] for kind in ("jpg", "png", "webp") if kind in sample.members
        ]
        yield sample.key, (pictures or [None])[0], json.loads(sample.members["json"])
