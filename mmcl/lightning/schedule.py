"""The learning rate as a function of the step, so that nothing has to be remembered of it."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "cosine"]


def rate_factor(step: int, steps: int, warmup: int, schedule: Schedule) -> float:
    """Return what the base learning rate is multiplied with.

    Args:
        step: optimiser steps done in this task, from 0.
        steps: optimiser steps of the whole task.
        warmup: steps of linear rise from 1/warmup to 1.
        schedule: "constant", or "cosine" down to 0 at the last step.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    share = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
