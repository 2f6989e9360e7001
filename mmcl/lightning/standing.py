"""Where Lightning's loops stand, as a function of the batches done."""

from __future__ import annotations

from typing import Any


def stand_at(loops: dict[str, Any], *, done: int, an_epoch: int, accumulation: int) -> None:
    """Write a checkpoint's loop progress as a run that never stopped would have written it.

    A run that was resumed at the end of an epoch counts that epoch as not begun (Lightning 2.6),
    and a checkpoint of its next epoch cannot be resumed: batches would be learned twice.

    Args:
        loops: ``checkpoint["loops"]["fit_loop"]``, of a checkpoint written in
            ``on_train_batch_end``; changed.
        done: batches of this fit, the present one included.
        an_epoch: batches of an epoch.
        accumulation: batches of an optimiser step.
    """
    epochs = (done - 1) // an_epoch
    here = done - epochs * an_epoch
    progress = loops["epoch_loop.batch_progress"]
    for name, count in (("total", done), ("current", here)):
        progress[name].update(ready=count, started=count, processed=count, completed=count - 1)
    progress["is_last_batch"] = here == an_epoch
    for part in loops["epoch_progress"].values():
        part.update(ready=epochs + 1, started=epochs + 1, processed=epochs, completed=epochs)
    steps = here // accumulation
    for counts in loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"].values():
        counts["current"].update({name: steps for name in counts["current"]})
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = done // accumulation - 1
