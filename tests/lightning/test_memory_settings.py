"""Settings of memory may change when a run resumes; running out of memory names them."""

import errno
import json

import pytest
import torch
import yaml

from mmcl.cli import main
from mmcl.core import Task
from mmcl.evaluation.cost import Ledger
from mmcl.lightning.resume import note_changes
from mmcl.lightning.run_dir import RunDirectory, RunState
from mmcl.lightning.run_errors import is_out_of_memory, translate_errors
from mmcl.lightning.task_callback import TaskCallback
from tests.lightning.small_runs import SmallRuns

GPU = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.6 GiB"
CPU = "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"


def configured(parts=1, micro=None, precision="32-true", checkpointing=False, **changes):
    """A configuration of a run."""
    arguments = {"gradient_checkpointing": checkpointing, "dtype": changes.get("dtype")}
    return {
        "seed_everything": changes.get("seed", 0),
        "model": {"model": {"init_args": arguments}, "learning_rate": changes.get("rate", 0.1)},
        "data": {"global_batch_size": changes.get("batch", 8), "micro_batch_size": micro},
        "trainer": {"accumulate_grad_batches": parts, "precision": precision},
    }


def started(tmp_path):
    """The directory of a run that was started."""
    folder = RunDirectory(tmp_path / "run")
    folder.check_config(configured())
    (folder.path / "run.json").write_text("{}")
    return RunDirectory(tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"parts": 2}, "trainer.accumulate_grad_batches was changed from 1 to 2"),
        ({"micro": 4}, "data.micro_batch_size was changed from None to 4"),
        (
            {"precision": "bf16-mixed"},
            "trainer.precision was changed from '32-true' to 'bf16-mixed'",
        ),
        (
            {"checkpointing": True},
            "model.model.init_args.gradient_checkpointing was changed from False to True",
        ),
    ],
)
def test_a_setting_of_memory_may_change_and_is_noted(tmp_path, changes, sentence):
    folder = started(tmp_path)
    folder.check_config(configured(**changes))
    assert folder.changes == [sentence]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"batch": 4}, "data.global_batch_size"),
        ({"rate": 0.2}, "model.learning_rate"),
        ({"seed": 1}, "seed_everything"),
        ({"dtype": "bfloat16"}, "model.model.init_args.dtype"),
        ({"batch": 4, "parts": 2}, "data.global_batch_size"),
    ],
)
def test_a_setting_of_the_result_may_not(tmp_path, changes, key):
    with pytest.raises(ValueError, match=f"another configuration: {key} is .* there and"):
        started(tmp_path).check_config(configured(**changes))


class OutOfMemory:
    """An error of torch's allocator in a chosen step of a run."""

    def __init__(self, monkeypatch, error=None):
        self.at, self.error = None, error or torch.cuda.OutOfMemoryError(GPU)
        self.parts, start = [], TaskCallback.on_train_batch_start

        def fail(hooks, trainer, module, batch, batch_idx):
            self.parts.append(trainer.accumulate_grad_batches)
            if hooks.step == self.at:
                raise self.error
            start(hooks, trainer, module, batch, batch_idx)

        monkeypatch.setattr(TaskCallback, "on_train_batch_start", fail)


def weights_of(runs, name):
    found = runs.kept(name).items()
    return {key: value.double() for key, value in found if isinstance(value, torch.Tensor)}


def assert_close(one, other):
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:trainer.accumulate_grad_batches is")
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"trainer__accumulate_grad_batches": 2},
            "accumulate_grad_batches was changed from 1 to 2",
        ),
        ({"data__micro_batch_size": 3}, "data.micro_batch_size was changed from None to 3"),
    ],
)
def test_a_run_out_of_memory_resumes_with_more_accumulation_and_ends_alike(
    tmp_path, monkeypatch, capsys, change, sentence
):
    runs = SmallRuns(tmp_path, sizes=(20, 17))
    # Adam would enlarge the rounding of gradients that are nearly 0.
    sgd = {"model__optimizer": "torch.optim.SGD", "model__optimizer.lr": 0.1}
    runs.finish("alone", "ExperienceReplay", **sgd)
    memory = OutOfMemory(monkeypatch)
    memory.at = 5
    assert main(runs.words("run", "ExperienceReplay", **sgd)) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: out of memory ({GPU.partition('. T')[0]}")
    assert "--data.micro_batch_size 4, --trainer.precision bf16-mixed. The same command" in error
    assert error.rstrip().endswith("resumes in task 0 ('task-a') at step 4")
    memory.at = None
    memory.parts.clear()
    assert main(runs.words("run", "ExperienceReplay", **sgd, **change)) == 0
    parts = 2 if "trainer__accumulate_grad_batches" in change else 3
    # 4 steps of the first task were kept.
    steps = sum(cost.steps for cost in Ledger.read(runs.path("run") / "ledger.json"))
    assert len(memory.parts) == parts * (steps - 4)
    assert set(memory.parts) == {parts}
    summary = json.loads((runs.path("run") / "summary.json").read_text())
    noted = [each for each in summary["warnings"] if sentence in each]
    assert noted
    assert noted[0].endswith("and the run resumed in task 0 ('task-a') at step 4")
    assert_close(weights_of(runs, "run"), weights_of(runs, "alone"))
    # The same command again changes and notes nothing.
    assert main(runs.words("run", "ExperienceReplay", **sgd, **change)) == 0
    again = json.loads((runs.path("run") / "summary.json").read_text())
    assert again["warnings"] == summary["warnings"]


@pytest.mark.slow
def test_a_change_is_noted_once_however_often_the_run_stops(tmp_path, monkeypatch, capsys):
    runs = SmallRuns(tmp_path, sizes=(20,))
    memory = OutOfMemory(monkeypatch, RuntimeError(CPU))
    change = {"trainer__precision": "bf16-mixed"}
    for step, options in ((0, {}), (3, change), (5, change)):
        memory.at = step
        assert main(runs.words("run", **options)) == 1
    memory.at = None
    # The precision of the first start is a change too, back again.
    assert main(runs.words("run")) == 0
    capsys.readouterr()
    found = json.loads((runs.path("run") / "summary.json").read_text())["warnings"]
    assert [each for each in found if "precision" in each] == [
        "trainer.precision was changed from None to 'bf16-mixed', and the run resumed from the "
        "beginning",
        "trainer.precision was changed from 'bf16-mixed' to None, and the run resumed in task 0 "
        "('task-a') at step 4",
    ]
    config = yaml.safe_load((runs.path("run") / "config.yaml").read_text())
    assert config["trainer"]["precision"] is None


@pytest.mark.parametrize(("task_type", "is_told"), [("captioning", True), ("instruction", False)])
@pytest.mark.parametrize("changes", [{"parts": 2}, {"micro": 4}, {"precision": "bf16-mixed"}])
def test_a_contrastive_loss_over_smaller_parts_is_told(tmp_path, changes, task_type, is_told):
    folder = started(tmp_path)
    folder.check_config(configured(**changes))
    state = RunState(0, 0, ["1f a"], 0, "last.ckpt", 7)
    note_changes(folder, state, [Task(0, "a", task_type=task_type)])
    told = [each for each in state.warnings if "contrastive loss compares" in each]
    assert bool(told) == (is_told and "precision" not in changes)
    assert state.warnings[0].endswith("and the run resumed in task 0 ('a') at step 7")
    assert RunDirectory(folder.path).state().warnings == state.warnings


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (torch.cuda.OutOfMemoryError(GPU), True),
        (RuntimeError(CPU), True),
        (RuntimeError("CUDA error: out of memory\nmore"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (RuntimeError("shape mismatch"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_is_exhausted(error, is_it):
    assert is_out_of_memory(error) == is_it
    if is_it:
        match = (
            r"^out of memory \(.+\)\. .*: --x 2\. The same command .* resumes from the beginning$"
        )
        with (
            pytest.raises(RuntimeError, match=match),
            translate_errors(lambda: "from the beginning", lambda: "--x 2"),
        ):
            raise error
