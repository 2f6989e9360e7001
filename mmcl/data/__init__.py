"""From tar to Batch."""

from mmcl.data.checks.checking import check_stream
from mmcl.data.checks.findings import StreamFindings
from mmcl.data.decode import MAX_PIXELS, decode_image
from mmcl.data.faults import BadSample
from mmcl.data.loader import train_loader
from mmcl.data.passes import Pass, pass_loader, test_loader
from mmcl.data.prepare import PreparedStream, prepare
from mmcl.data.reader import Reader, SampleReader
from mmcl.data.shard import Sample
from mmcl.data.shards.keep import CopiesReader, keep_copies, prune_copies

__all__ = [
    "MAX_PIXELS",
    "BadSample",
    "CopiesReader",
    "Pass",
    "PreparedStream",
    "Reader",
    "Sample",
    "SampleReader",
    "StreamFindings",
    "check_stream",
    "decode_image",
    "keep_copies",
    "pass_loader",
    "prepare",
    "prune_copies",
    "test_loader",
    "train_loader",
]
