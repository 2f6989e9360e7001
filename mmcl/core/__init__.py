"""Interfaces of mmcl: batch, task, stream, model, strategy, and ``step``, in which they meet."""

from mmcl.core.atomic_write import write_atomic
from mmcl.core.batch import IGNORE_INDEX, Batch
from mmcl.core.chain import Chain
from mmcl.core.model import VLM, expect_shape, is_generative_model, require, require_classes
from mmcl.core.output import NO_PROMPTS, Modality, Output, Prompts
from mmcl.core.sample import IMAGE_TOKEN, Conversation, ProcessedSample, Reference, Transform, Turn
from mmcl.core.step import StepOutput, begin_task, end_task, forward, generate, step
from mmcl.core.strategy import ReplayPlan, Strategy, device_of, trainable_parameters
from mmcl.core.task import DataSource, Task, TaskStream

__all__ = [
    "NO_PROMPTS",
    "IMAGE_TOKEN",
    "IGNORE_INDEX",
    "VLM",
    "Batch",
    "Chain",
    "Conversation",
    "Modality",
    "Output",
    "Prompts",
    "ReplayPlan",
    "Reference",
    "ProcessedSample",
    "DataSource",
    "StepOutput",
    "Strategy",
    "Task",
    "TaskStream",
    "Transform",
    "Turn",
    "generate",
    "is_generative_model",
    "begin_task",
    "device_of",
    "end_task",
    "expect_shape",
    "require",
    "require_classes",
    "forward",
    "step",
    "trainable_parameters",
    "write_atomic",
]
