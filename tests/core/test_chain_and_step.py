import pytest
import torch

from mmcl.core import Chain, Output, Prompts, ReplayPlan, Strategy, begin_task, forward, step
from tests.toys.toy_clip import StandIn, a_batch, a_task


class Adds(Strategy):
    def __init__(self, name, value=1.0):
        super().__init__()
        self.name, self.value = name, value

    def penalty(self, model, batch, output):
        return {self.name: model.names.weight.sum() * 0 + self.value}


class Doubles(Strategy):
    def transform_output(self, model, batch, output):
        return Output(2 * output.logits, output.image, output.text, output.prompts)


class Plus(Strategy):
    def transform_output(self, model, batch, output):
        return Output(output.logits + 1, output.image, output.text, output.prompts)


class Prompted(Strategy):
    def prompts(self, model, batch):
        return Prompts({("image", 0): torch.zeros(len(batch), 1, 16)})


class Recalls(Strategy):
    def replay_plan(self):
        return ReplayPlan(torch.zeros(1), torch.zeros(1), 0.5)


class Objects(Strategy):
    def objective(self, model, batch, output):
        return output.logits.mean()


def begun(strategy):
    model = StandIn()
    begin_task(model, strategy, a_task())
    return model


def test_the_loss_is_the_sum_of_the_named_terms():
    chain = Chain([Adds("one", 1.0), Adds("two", 2.0)])
    model, batch = begun(chain), a_batch()
    done = step(model, chain, batch)
    assert set(done.terms) == {"task", "one", "two"}
    torch.testing.assert_close(done.loss, model.loss(model(batch), batch) + 3)


def test_outputs_are_transformed_in_list_order():
    model, batch = StandIn(), a_batch()
    plain = model(batch).logits
    torch.testing.assert_close(
        forward(model, Chain([Doubles(), Plus()]), batch).logits, 2 * plain + 1
    )
    torch.testing.assert_close(
        forward(model, Chain([Plus(), Doubles()]), batch).logits, 2 * plain + 2
    )


def test_an_objective_replaces_the_task_loss():
    strategy = Objects()
    model, batch = begun(strategy), a_batch()
    torch.testing.assert_close(step(model, strategy, batch).loss, model(batch).logits.mean())


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ([Adds("x"), Adds("x")], r"Adds and Adds both add a term 'x'"),
        ([Objects(), Objects()], r"both replace the objective"),
        ([Prompted(), Prompted()], r"have a prompt for \('image', 0\)"),
    ],
)
def test_a_clash_names_both_members(members, sentence):
    chain = Chain(members)
    model = begun(chain)
    with pytest.raises(ValueError, match=sentence):
        step(model, chain, a_batch())


def test_two_replay_plans_clash():
    with pytest.raises(
        ValueError, match="Recalls and Recalls both have a plan of samples to mix in"
    ):
        Chain([Recalls(), Recalls()]).replay_plan()


def test_a_step_before_begin_task_names_what_was_forgotten():
    with pytest.raises(RuntimeError, match=r"callbacks=\[StrategyCallback\(\)\]"):
        step(StandIn(), Adds("x"), a_batch())


def test_a_term_may_not_be_called_task():
    strategy = Adds("task")
    model = begun(strategy)
    with pytest.raises(ValueError, match="named 'task'"):
        step(model, strategy, a_batch())


def test_a_chain_overrides_the_hooks_of_its_members():
    chain = Chain([Adds("x"), Doubles()])
    assert chain.overrides("penalty")
    assert chain.overrides("transform_output")
    assert not chain.overrides("project_gradients")


def test_a_replay_ratio_must_leave_room_for_new_samples():
    with pytest.raises(ValueError, match=r"replay_ratio is 1\.0"):
        ReplayPlan(torch.zeros(1), torch.zeros(1), 1.0)
