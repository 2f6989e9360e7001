"""Progress of Lightning's loops in a checkpoint, set to that of an uninterrupted run.

A file of its own because it is the only place that depends on the keys of Lightning's loop state.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl


def set_loop_progress(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Write the progress after the last finished batch into a checkpoint with loop state.

    A run resumed at the end of an epoch counts that epoch as not started (Lightning 2.6), and a
    checkpoint of its next epoch cannot be resumed: batches would be trained on twice.
    """
    if "loops" not in checkpoint:
        return
    loops = checkpoint["loops"]["fit_loop"]
    # As after the last finished batch of this fit, in on_train_batch_end.
    total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    done = int(total.processed)
    an_epoch = int(trainer.num_training_batches)
    epochs = (done - 1) // an_epoch
    in_epoch = done - epochs * an_epoch
    progress = loops["epoch_loop.batch_progress"]
    for name, count in (("total", done), ("current", in_epoch)):
        progress[name].update(ready=count, started=count, processed=count, completed=count - 1)
    progress["is_last_batch"] = in_epoch == an_epoch
    for counts in loops["epoch_progress"].values():
        counts.update(ready=epochs + 1, started=epochs + 1, processed=epochs, completed=epochs)
    accumulation = trainer.accumulate_grad_batches
    optimizers = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    for counts in optimizers.values():
        counts["current"].update(dict.fromkeys(counts["current"], in_epoch // accumulation))
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = done // accumulation - 1


def rescale_loop_progress(checkpoint: dict[str, Any], then: int, now: int) -> None:
    """Count the finished steps of a checkpoint in other micro-batches.

    Args:
        checkpoint: changed.
        then: micro-batches of an optimizer step when it was written.
        now: micro-batches of an optimizer step now.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for name in ("total", "current") if then != now else ():
        done = progress[name]["processed"] // then * now
        progress[name].update(ready=done, started=done, processed=done, completed=done - 1)
