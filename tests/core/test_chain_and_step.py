import pytest
import torch

from mmcl.core import Chain, Output, Prompts, Recall, Strategy, begin_task, run, step
from tests.stand_in import StandIn, a_batch, a_task


class Adds(Strategy):
    def __init__(self, name, value=1.0):
        super().__init__()
        self.name, self.value = name, value

    def penalty(self, model, batch, output):
        return {self.name: model.names.weight.sum() * 0 + self.value}


class Doubles(Strategy):
    def refine(self, model, batch, output):
        return Output(2 * output.logits, output.image, output.text, output.prompts)


class Plus(Strategy):
    def refine(self, model, batch, output):
        return Output(output.logits + 1, output.image, output.text, output.prompts)


class Prompted(Strategy):
    def prompts(self, model, batch):
        return Prompts({("image", 0): torch.zeros(len(batch), 1, 16)})


class Recalls(Strategy):
    def recall(self):
        return Recall(torch.zeros(1), torch.zeros(1), 0.5)


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


def test_refine_runs_in_list_order():
    model, batch = StandIn(), a_batch()
    plain = model(batch).logits
    torch.testing.assert_close(run(model, Chain([Doubles(), Plus()]), batch).logits, 2 * plain + 1)
    torch.testing.assert_close(run(model, Chain([Plus(), Doubles()]), batch).logits, 2 * plain + 2)


def test_an_objective_stands_in_for_the_task_loss():
    strategy = Objects()
    model, batch = begun(strategy), a_batch()
    torch.testing.assert_close(step(model, strategy, batch).loss, model(batch).logits.mean())


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ([Adds("x"), Adds("x")], r"Adds and Adds both add a term 'x'"),
        ([Objects(), Objects()], r"both replace the objective"),
        ([Prompted(), Prompted()], r"prompt the same place \('image', 0\)"),
    ],
)
def test_a_clash_names_both_members(members, sentence):
    chain = Chain(members)
    model = begun(chain)
    with pytest.raises(ValueError, match=sentence):
        step(model, chain, a_batch())


def test_two_recalls_clash():
    with pytest.raises(ValueError, match="Recalls and Recalls both recall old samples"):
        Chain([Recalls(), Recalls()]).recall()


def test_a_step_before_begin_task_names_what_was_forgotten():
    with pytest.raises(RuntimeError, match=r"callbacks=\[StrategyHooks\(\)\]"):
        step(StandIn(), Adds("x"), a_batch())


def test_a_term_may_not_be_called_task():
    strategy = Adds("task")
    model = begun(strategy)
    with pytest.raises(ValueError, match="named 'task'"):
        step(model, strategy, a_batch())


def test_a_chain_knows_which_hooks_its_members_use():
    chain = Chain([Adds("x"), Doubles()])
    assert chain.uses("penalty")
    assert chain.uses("refine")
    assert not chain.uses("project")


def test_a_share_must_leave_room_for_new_rows():
    with pytest.raises(ValueError, match=r"share is 1\.0"):
        Recall(torch.zeros(1), torch.zeros(1), 1.0)
