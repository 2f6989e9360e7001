import pytest
import torch

from mmcl.core import (
    Chain,
    Output,
    Prompts,
    ReplayPlan,
    Strategy,
    begin_task,
    forward,
    require,
    step,
)
from mmcl.strategies import EWC, Finetune, RanPAC
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


class FreezesImage(Strategy):
    def attach(self, model):
        require(model, "freeze", by=self).freeze("image")


class FreezesText(Strategy):
    def attach(self, model):
        require(model, "freeze", "embed", by=self).freeze("text")


def test_a_loss_without_gradient_says_what_is_frozen_and_by_whom():
    model, chain = StandIn(), Chain([FreezesImage(), Chain([FreezesText(), EWC()])])
    model.patch.bias.requires_grad_(False)
    chain.attach(model)
    begin_task(model, chain, a_task())
    with pytest.raises(
        RuntimeError,
        match=r"FreezesImage and FreezesText and EWC and the model have no trainable parameter: "
        r"FreezesImage froze patch \(1\), mix \(12\); FreezesText froze names.weight \(1\); "
        r"patch.bias \(1\) was frozen before\. Leave a part",
    ):
        step(model, chain, a_batch())
    with torch.no_grad():  # a forward pass for its terms needs no gradient
        assert not step(model, chain, a_batch()).loss.requires_grad


def test_a_loss_that_no_trainable_parameter_takes_part_in_names_those():
    class Cut(StandIn):
        def loss(self, output, batch):
            return super().loss(output, batch).detach()

    model, strategy = Cut(), Finetune()
    begin_task(model, strategy, a_task())
    with pytest.raises(
        RuntimeError, match=r"no trainable parameter \(patch \(2\), .* train\): nothing is frozen"
    ):
        step(model, strategy, a_batch())


def test_a_strategy_that_learns_without_gradient_needs_nothing_trainable():
    model, strategy = StandIn(), Chain([RanPAC(projection_dim=8), EWC()])
    strategy.attach(model)
    begin_task(model, strategy, a_task())
    assert not step(model, strategy, a_batch()).loss.requires_grad


def test_all_members_that_a_chain_asks_for_are_named_at_once():
    chain = Chain([FreezesImage(), Chain([FreezesText(), EWC()])])
    with pytest.raises(
        TypeError,
        match=r"FreezesImage needs model\.freeze\(\*towers\), FreezesText needs "
        r"model\.freeze\(\*towers\) and model\.embed\(batch, modality\) -> \(B, D\), and Linear "
        r"has none: .* add the methods, as in docs/model\.md",
    ):
        chain.attach(torch.nn.Linear(2, 2))


def test_a_model_without_the_members_of_a_step_is_refused_before_the_step():
    model, strategy = torch.nn.Module(), EWC()
    begin_task(model, strategy, a_task())
    with pytest.raises(
        TypeError,
        match=r"a training step needs model\.forward\(batch, prompts\) -> Output and "
        r"model\.loss\(output, batch\) -> scalar, and Module has none",
    ):
        step(model, strategy, a_batch())


def test_an_output_without_its_prompts_is_refused():
    class Forgets(StandIn):
        def forward(self, batch, prompts):
            return Output(super().forward(batch, prompts).logits)

    with pytest.raises(ValueError, match=r"Forgets .* without the prompts of Prompted: return Out"):
        forward(Forgets(), Prompted(), a_batch())
