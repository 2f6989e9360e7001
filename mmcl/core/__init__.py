"""Interfaces of mmcl: batch, task, stream, model, strategy, and ``step``, in which they meet."""

from mmcl.core.atomic_write import write_atomic
from mmcl.core.batch import IGNORE_INDEX, Batch, GlobalBatch
from mmcl.core.chain import Chain
from mmcl.core.model import (
    NO_PROMPTS,
    VLM,
    Modality,
    Output,
    Prompts,
    expect_shape,
    is_generative_model,
    require,
    require_classes,
)
from mmcl.core.sample import (
    IMAGE_TOKEN,
    BadSample,
    Conversation,
    Pixels,
    ProcessedSample,
    Reference,
    Transform,
    Turn,
    each_image,
)
from mmcl.core.step import (
    StepModule,
    StepOutput,
    begin_task,
    begin_tasks,
    end_task,
    forward,
    generate,
    loss_weight,
    step,
    subset_weight,
)
from mmcl.core.strategy import ReplayPlan, Strategy, device_of, trainable_parameters
from mmcl.core.task import DataSource, Task, TaskStream

__all__ = [
    "IGNORE_INDEX", "IMAGE_TOKEN", "NO_PROMPTS", "VLM", "BadSample", "Batch", "Chain",
    "Conversation", "DataSource", "GlobalBatch", "Modality", "Output", "Pixels", "ProcessedSample",
    "Prompts", "Reference", "ReplayPlan", "StepModule", "StepOutput", "Strategy", "Task",
    "TaskStream", "Transform", "Turn", "begin_task", "begin_tasks", "device_of", "each_image",
    "end_task", "expect_shape", "forward", "generate", "is_generative_model", "loss_weight",
    "require", "require_classes", "step", "subset_weight", "trainable_parameters", "write_atomic",
]  # fmt: skip
