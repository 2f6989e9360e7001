"""What is chosen for replay in a run, by one process and by two."""

import pytest
import torch

from tests.distributed.ranks import seen
from tests.distributed.test_two_processes import PLAIN, both, global_batches
from tests.lightning.small_runs import same

pytestmark = pytest.mark.slow
CHOICES = [
    ("classification", {"buffer_size": 12, "selection": "herding", "storage": "copy"}),
    ("classification", {"buffer_size": 0, "buffer_bytes": 6000, "selection": "class_balanced"}),
    ("captioning", {"buffer_size": 12, "selection": "k_center", "allocation": "task_balanced"}),
    (
        "instruction",
        {"buffer_size": 0, "buffer_bytes": 6000, "selection": "loss", "score_order": "low"},
    ),
]


@pytest.mark.parametrize(("kind", "options"), CHOICES, ids=lambda value: str(value)[:60])
def test_two_processes_remember_the_samples_that_one_remembers(tmp_path, kind, options):
    strategy = {"class_path": "mmcl.strategies.ExperienceReplay", "init_args": options}
    both(tmp_path, strategy, kind, **PLAIN)
    one = seen(tmp_path / "one")
    for rank in (0, 1):
        two = seen(tmp_path / "two", rank)
        for first, second in zip(one["states"], two["states"], strict=True):
            alone, together = memory_of(first), memory_of(second)
            assert torch.equal(alone["task_ids"], together["task_ids"])
            assert torch.equal(alone["sample_ids"], together["sample_ids"])
    last = memory_of(one["states"][-1])
    assert len(last["task_ids"]) > 2
    limit = options.get("buffer_bytes")
    assert limit is None or 0 < int(last["num_bytes"].sum()) <= limit
    assert same(one["batches"], global_batches(tmp_path / "two"))


def memory_of(state):
    (found,) = (value for name, value in state.items() if name.endswith("memory._extra_state"))
    return found
