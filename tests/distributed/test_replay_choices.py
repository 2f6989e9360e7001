"""What is chosen for replay in a run, by one process and by two."""

import pytest
import torch

from tests.distributed.ranks import seen
from tests.distributed.test_two_processes import PLAIN, both, global_batches
from tests.lightning.small_runs import same

pytestmark = pytest.mark.slow
CHOICES = [
    ("classify", {"samples": 12, "policy": "herding", "keep": "copies"}),
    ("classify", {"samples": 0, "memory_bytes": 6000, "policy": "balanced"}),
    ("caption", {"samples": 12, "policy": "k_centre", "allocation": "equal_tasks"}),
    ("answer", {"samples": 0, "memory_bytes": 6000, "policy": "loss", "scores": "low"}),
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
            assert torch.equal(alone["task"], together["task"])
            assert torch.equal(alone["sample"], together["sample"])
    last = memory_of(one["states"][-1])
    assert len(last["task"]) > 2
    limit = options.get("memory_bytes")
    assert limit is None or 0 < int(last["bytes"].sum()) <= limit
    assert same(one["batches"], global_batches(tmp_path / "two"))


def memory_of(state):
    (found,) = (value for name, value in state.items() if name.endswith("memory._extra_state"))
    return found
