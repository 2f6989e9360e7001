"""The small LLaVA of ``mmcl.testing`` and its dialogues: the model of generative tests."""

import json
import tempfile
from functools import cache
from pathlib import Path

from mmcl.testing import stand_ins

SIDE, WIDTH, COLORS = stand_ins.IMAGE_SIZE, stand_ins.WIDTH, stand_ins.COLORS
a_llava, an_answer_task = stand_ins.small_llava, stand_ins.answer_task
a_dialogue, a_dialogue_batch = stand_ins.answer_conversation, stand_ins.answer_batch
dialogue_batches = stand_ins.answer_batches


@cache
def architecture():
    """Path of a tower's architecture: images of 16 x 16, 4 patches, 2 layers."""
    file = Path(tempfile.mkdtemp()) / "stand_in.json"
    file.write_text(json.dumps(stand_ins.tower_architecture()))
    return str(file)
