"""The bare training loop of ``mmcl.testing``, by the names that tests use."""

from mmcl.testing import training_loop

batches_of, whole = training_loop.batches_of, training_loop.whole_task
replayed_samples, loader = training_loop.replayed_samples, training_loop.mixed_batches
lesson, learn = training_loop.training_steps, training_loop.train_tasks
