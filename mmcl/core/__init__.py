"""The words everybody uses: batch, task, model, strategy, and the function where they meet."""

from mmcl.core.atomic import write_atomic
from mmcl.core.batch import UNSCORED, Batch
from mmcl.core.chain import Chain
from mmcl.core.model import VLM, answers_in_words, expect_shape, require, require_classes
from mmcl.core.output import NO_PROMPTS, Modality, Output, Prompts
from mmcl.core.recall import Recall
from mmcl.core.sample import PICTURE, Dialogue, Reference, Row, Transform, Turn
from mmcl.core.step import Step, answer, begin_task, end_task, run, step
from mmcl.core.strategy import Strategy, device_of, trainable
from mmcl.core.task import Source, Task, TaskStream

__all__ = [
    "NO_PROMPTS",
    "PICTURE",
    "UNSCORED",
    "VLM",
    "Batch",
    "Chain",
    "Dialogue",
    "Modality",
    "Output",
    "Prompts",
    "Recall",
    "Reference",
    "Row",
    "Source",
    "Step",
    "Strategy",
    "Task",
    "TaskStream",
    "Transform",
    "Turn",
    "answer",
    "answers_in_words",
    "begin_task",
    "device_of",
    "end_task",
    "expect_shape",
    "require",
    "require_classes",
    "run",
    "step",
    "trainable",
    "write_atomic",
]
