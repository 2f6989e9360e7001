"""A small random open_clip architecture for tests that do not need the built-in weights."""

import json

SMALL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 16,
        "heads": 2,
        "layers": 2,
    },
}


def write_small(folder, name="small-clip"):
    """Write the architecture as ``<name>.json`` and return its path."""
    file = folder / f"{name}.json"
    file.write_text(json.dumps(SMALL))
    return file
