"""Data loading: stream card and shards in, batches out.

``open_stream`` opens the shards of a stream and checks them, ``train_loader`` gives the batches of
a task with replayed samples and mixed-in sources, ``eval_loader`` visits each sample once and in
order, and ``check_stream`` validates a stream without training. A batch is a function of (seed,
task, epoch, step), so a run resumes exactly with any number of processes.
"""

from mmcl.data.batches.dataset_collate import (
    ImageCaptionCollate,
    ImageLabelCollate,
    collate_captions,
    collate_images,
)
from mmcl.data.batches.eval_loader import EvalLoader, eval_loader
from mmcl.data.batches.replay_loader import ReplayLoader, TaskPass, replay_loader
from mmcl.data.batches.train_loader import train_loader
from mmcl.data.decode import MAX_PIXELS, decode_image
from mmcl.data.shards.open_stream import OpenStream, open_stream
from mmcl.data.shards.reader import Reader, SampleReader
from mmcl.data.shards.replay_copies import ReplayCopyReader, prune_replay_copies, save_replay_copies
from mmcl.data.stored_sample import BadSample, Sample
from mmcl.data.validate.results import StreamFindings
from mmcl.data.validate.validate import check_stream

__all__ = [
    "MAX_PIXELS",
    "BadSample",
    "ReplayCopyReader",
    "ReplayLoader",
    "EvalLoader",
    "ImageCaptionCollate",
    "ImageLabelCollate",
    "OpenStream",
    "Reader",
    "Sample",
    "SampleReader",
    "StreamFindings",
    "TaskPass",
    "check_stream",
    "collate_captions",
    "collate_images",
    "decode_image",
    "save_replay_copies",
    "open_stream",
    "prune_replay_copies",
    "replay_loader",
    "eval_loader",
    "train_loader",
]
