"""Strategies with an error that only shows as nothing happening."""

import torch

from mmcl.core import Strategy


class DetachedPenalty(Strategy):
    """Its penalty has a value and no gradient."""

    def penalty(self, model, batch, output):
        return {"held": 0.1 * output.logits.detach().square().mean()}


class ZeroPenalty(Strategy):
    """Its penalty is connected and always 0."""

    def penalty(self, model, batch, output):
        return {"pull": 0.0 * output.logits.square().mean()}


class EmptyStore(Strategy):
    """Its store is never filled."""

    def __init__(self):
        super().__init__()
        self.register_buffer("rows", torch.zeros(0, 3))

    def buffer_sizes(self):
        return {"rows": len(self.rows)}


class Healthy(Strategy):
    """Its penalty is 0 on all steps but one, and its store is filled at the end of the task."""

    def __init__(self):
        super().__init__()
        self.steps = 0
        self.rows = 0

    def penalty(self, model, batch, output):
        self.steps += 1
        return {"once": (self.steps % 3 == 0) * output.logits.square().mean()}

    def end_task(self, model, task, batches):
        self.rows += sum(len(batch) for batch in batches)

    def buffer_sizes(self):
        return {"rows": self.rows}

    def get_extra_state(self):
        return {"steps": self.steps, "rows": self.rows}

    def set_extra_state(self, state):
        self.steps, self.rows = state["steps"], state["rows"]


class AliveOnce(Strategy):
    """Its penalty is different from 0 in the third step of every task."""

    def __init__(self):
        super().__init__()
        self.steps = 0

    def begin_task(self, model, task):
        self.steps = 0

    def penalty(self, model, batch, output):
        return {"once": (self.steps == 2) * output.logits.square().mean()}

    def after_step(self, model, batch, output):
        self.steps += 1

    def get_extra_state(self):
        return {"steps": self.steps}

    def set_extra_state(self, state):
        self.steps = state["steps"]
