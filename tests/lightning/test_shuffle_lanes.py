import warnings
from types import SimpleNamespace

import pytest
import torch

from mmcl.core import ReplayPlan
from mmcl.lightning.datamodule import ContinualDataModule
from mmcl.models import OpenCLIP
from mmcl.strategies import Finetune
from tests.data.small_stream import write_stream
from tests.lightning.small_runs import small_model


@pytest.fixture
def module_of(tmp_path):
    """Make the datamodule of a stream that shuffles as remote ones do, on four devices."""
    write_stream(tmp_path, sizes=(20, 17))
    model = OpenCLIP(small_model(tmp_path))

    def make(lanes, nodes=2, is_remote=True, replay_plan=None):
        card = str(tmp_path / "small.yaml")
        data = ContinualDataModule(card, global_batch_size=8, shuffle_lanes=lanes, task_index=1)
        data.prepared.reader(1, "train").in_windows = is_remote
        strategy = Finetune()
        strategy.replay_plan = lambda: replay_plan
        data.trainer = SimpleNamespace(
            num_nodes=nodes, world_size=4, global_rank=1, accumulate_grad_batches=1,
            limit_train_batches=1.0, overfit_batches=0,
            lightning_module=SimpleNamespace(model=model, strategy=strategy),
        )  # fmt: skip
        return data

    return make


def joint(share=None):
    return ReplayPlan(torch.zeros(3, dtype=torch.int64), torch.arange(3), share)


@pytest.mark.parametrize(
    ("lanes", "replay_plan", "words"),
    [
        (None, None, "data.shuffle_lanes is not set: start a run with 4, or another multiple"),
        (6, None, "data.shuffle_lanes is 6, no multiple of 4 devices"),
        (4, joint(), "old samples are shuffled among new ones"),
    ],
)
def test_nodes_that_fetch_the_same_shards_are_warned_of(module_of, lanes, replay_plan, words):
    with pytest.warns(UserWarning, match=f"fetch the same shards of task 'task-b', {words}"):
        module_of(lanes, replay_plan=replay_plan).train_dataloader()


@pytest.mark.parametrize(
    ("lanes", "settings"),
    [
        (4, {}), (8, {}), (1, {}), (None, {"nodes": 1}), (None, {"is_remote": False}),
        (4, {"replay_plan": joint(0.25)}),
    ],
)  # fmt: skip
def test_nothing_is_warned_of_where_no_shard_is_fetched_twice(module_of, lanes, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module_of(lanes, **settings).train_dataloader()


def test_lanes_change_the_order_of_remote_shards_alone(module_of):
    def keys(*arguments, **settings):
        return [batch.keys for batch in module_of(*arguments, **settings).train_dataloader()]

    assert keys(4) != keys(1) == keys(None, nodes=1)
    with pytest.warns(UserWarning, match="data.shuffle_lanes is 4 and has no effect"):
        assert keys(4, is_remote=False) == keys(None, is_remote=False)


def test_a_rank_evaluates_a_range_of_samples_where_lanes_are_set(module_of):
    def ids(*arguments, **settings):
        loader = module_of(*arguments, **settings).task_pass()
        return torch.cat([batch.sample_ids for batch in loader]).tolist()

    assert ids(4) == [4, 5, 6, 7]  # of 17, on rank 1 of 4
    assert ids(1) == ids(4, is_remote=False) == [1, 5, 9, 13]


@pytest.mark.parametrize("lanes", [0, -1, 9])
def test_a_number_of_lanes_that_no_batch_can_have_is_refused(lanes):
    with pytest.raises(ValueError, match=rf"data.shuffle_lanes is {lanes}, expected 1 to data"):
        ContinualDataModule(shuffle_lanes=lanes, global_batch_size=8)


def test_a_checkpoint_of_another_number_of_lanes_is_refused(module_of):
    place = {"task": 1, "epoch": 0, "batches": 2, "parts": 1}
    for lanes, stored in ((4, {"lanes": 4}), (None, {"lanes": 1}), (1, {}), (None, {})):
        data = module_of(lanes)
        data.load_state_dict({**place, **stored})
        assert data._next_position() == (0, 2)
    with pytest.raises(ValueError, match=r"shuffle_lanes is 4 and the .* with 1, .*_lanes=1$"):
        module_of(4).load_state_dict(place)
