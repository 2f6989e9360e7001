"""The small dual encoder of ``mmcl.testing``: the model of most tests."""

from mmcl.testing import stand_ins

WIDTH, TOKENS = stand_ins.WIDTH, stand_ins.TOKENS
StandIn = stand_ins.DualEncoder
a_task, a_batch = stand_ins.class_task, stand_ins.class_batch
task_batches = stand_ins.class_batches
