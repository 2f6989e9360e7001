"""A disk without room, or one that takes no file: nothing is lost, and a sentence says what to do.

The kernel refuses for real: by the largest file that a process may write, and by a small tmpfs
where the tests may mount one.
"""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial

import pytest

from mmcl.evaluation import RunSummary
from tests.behaviour.kill_runs import KILLED, note_steps, noted
from tests.lightning.small_runs import SmallRuns

pytestmark = pytest.mark.slow
SIZES = (16, 14)
FEATURES = {
    "class_path": "mmcl.strategies.FeatureReplay",
    "init_args": {"buffer_size": 4, "storage": "disk"},
}


@pytest.fixture(scope="module")
def two_tasks(tmp_path_factory):
    """Runs of two tasks, one of which was left alone."""
    runs = SmallRuns(tmp_path_factory.mktemp("runs"), SIZES)
    runs.finish("alone", "ExperienceReplay")
    return runs


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """Runs of a model that answers and keeps features on the disk, one of which was left alone."""
    runs = SmallRuns(tmp_path_factory.mktemp("answered"), SIZES, kind="instruction")
    runs.finish("alone", FEATURES)
    return runs


def refuse(pattern, first):
    """Leave this process no room for files of a name, from the first-th time on."""
    import mmcl.core.atomic_write
    import mmcl.lightning.continual_run  # noqa: F401  # so that it is loaded and patched

    own, met = mmcl.core.atomic_write.write_atomic, [0]
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def write_atomic(path, data, **named):
        met[0] += re.fullmatch(pattern, path.name) is not None
        if met[0] < first or not re.fullmatch(pattern, path.name):
            return own(path, data, **named)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            return own(path, data, **named)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    for module in list(sys.modules.values()):
        if vars(module).get("write_atomic") is own:
            module.write_atomic = write_atomic


def left_over(folder):
    """Temporary files under a folder."""
    return [file for file in folder.rglob(".*") if file.name.endswith(".tmp")]


def expect_refusal(runs, name, strategy, file, count, resumes):
    status, output = runs.start(name, strategy, before=[partial(refuse, file, count)])
    assert status == 1, output
    assert re.search(
        f"error: {re.escape(str(runs.path(name)))}/\\S*{file} cannot be written", output
    )
    assert "it is larger than a file may be there" in output
    assert "Traceback" not in output
    assert f"the same command resumes {resumes}" in output or not resumes
    assert left_over(runs.path(name)) == []
    runs.finish(name, strategy)
    assert runs.differences(name, "alone") == []


IN_FIRST, AFTER_FIRST = "in task 0 ('task-a') at step 2", "after task 0 ('task-a')"


@pytest.mark.parametrize(
    ("file", "count", "resumes"),
    [
        ("config.yaml", 1, ""),
        ("matrix.json", 1, "from the beginning"),
        ("matrix.json", 2, AFTER_FIRST),
        ("run.json", 1, "from the beginning"),
        (r"task_000\.tar", 1, IN_FIRST),
        (r"task_000\.json", 1, IN_FIRST),
        (r"task_00\.ckpt", 1, IN_FIRST),
        ("ledger.json", 1, IN_FIRST),
        ("run.json", 3, IN_FIRST),
        ("run.json", 4, AFTER_FIRST),
        ("col_01.jsonl", 2, AFTER_FIRST),
        (r"sample_.*\.png", 2, ""),
        ("summary.json", 1, ""),
        ("samples.json", 1, ""),
    ],
)
def test_a_file_that_finds_no_room_ends_the_run_with_a_sentence(two_tasks, file, count, resumes):
    expect_refusal(two_tasks, f"{file}{count}", "ExperienceReplay", file, count, resumes)


@pytest.mark.parametrize(
    ("file", "count", "resumes"),
    [
        (r"rows_000_\w+\.bin", 1, IN_FIRST),
        ("lenient.json", 1, "from the beginning"),
        ("col_00.jsonl", 2, AFTER_FIRST),
        (r"task_01\.ckpt", 1, "in task 1 ('task-b') at step 2"),
    ],
)
def test_features_and_answers_that_find_no_room_end_the_run(answered, file, count, resumes):
    name = re.sub(r"\W", "", file)
    expect_refusal(answered, name, FEATURES, file, count, resumes)


def test_a_mid_task_checkpoint_that_finds_no_room_is_warned_of_and_the_run_proceeds(two_tasks):
    runs = two_tasks
    status, output = runs.start(
        "unsaved", "ExperienceReplay", before=[partial(refuse, "last.ckpt", 2)]
    )
    assert status == 0, output
    assert "step 2 of task 0" not in output
    assert output.count("of task 1 is not saved:") == 3
    warned = output[output.index("warning: step 2 of task 1 is not saved:") :]
    assert f"{runs.path('unsaved')}/checkpoints/last.ckpt cannot be written" in warned
    assert "The run continues; if it stopped now, it would resume after task 0 ('task-a')" in warned
    assert "task 'task-b': 3 of its mid-task checkpoints could not be written" in output
    assert runs.differences("unsaved", "alone") == []
    warnings = RunSummary.read(runs.path("unsaved") / "summary.json").warnings
    assert any("could not be written" in sentence for sentence in warnings)


def test_a_run_killed_with_unsaved_steps_resumes_from_the_last_saved_one(two_tasks):
    runs, steps = two_tasks, two_tasks.folder / "steps"
    runs.finish("steps", "ExperienceReplay", before=[partial(note_steps, steps)])
    alone, again = noted(steps), two_tasks.folder / "again"
    before = [partial(note_steps, again), partial(refuse, "last.ckpt", 3)]
    assert runs.start("killed", "ExperienceReplay", ("step", 10), before)[0] == KILLED
    output = runs.finish("killed", "ExperienceReplay", before=before[:1])
    assert "resuming in task 1 ('task-b') at step 2" in output
    assert noted(again) == alone
    assert runs.differences("killed", "alone") == []


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a disk of so many kilobytes, or changes it."""
    place, options = tmp_path / "disk", []

    def mount(text):
        what = ["tmpfs"] if not options else []
        words = ["mount", *(["-t", "tmpfs"] if what else []), "-o", text, *what, str(place)]
        if os.geteuid() or shutil.which("mount") is None:
            pytest.skip("only root can mount a disk")
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr}")
        options.append(text)
        return place

    place.mkdir()
    yield mount
    if options:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_fills_up_ends_the_run_and_with_room_it_ends_the_same(two_tasks, small_disk):
    runs, alone = two_tasks, two_tasks.path("alone")
    sizes = {file.name: file.stat().st_size for file in alone.rglob("*.ckpt")}
    # The copies of samples have room, and the checkpoint beside them has not.
    place = small_disk(f"size={sizes['task_00.ckpt'] + 8192}")
    (runs.folder / "runs" / "full").symlink_to(place)
    status, output = runs.start("full", "ExperienceReplay")
    assert status == 1
    assert "warning: step 2 of task 0 is not saved:" in output
    assert re.search(
        r"error: \S+/checkpoints/task_00\.ckpt cannot be written, for its disk is full "
        r"\(\S+ kB are needed, \S+ kB are free\): make room\. "
        r"Then the same command resumes from the beginning",
        output,
    ), output
    assert "Traceback" not in output
    assert left_over(place) == []
    small_disk("remount,size=8m")
    runs.finish("full", "ExperienceReplay")
    assert runs.differences("full", "alone") == []


def test_a_read_only_disk_is_named_before_anything_begins(two_tasks, small_disk):
    place = small_disk("size=8m")
    (two_tasks.folder / "runs" / "closed").symlink_to(place)
    assert two_tasks.start("closed", "ExperienceReplay", ("step", 3))[0] == KILLED
    small_disk("remount,ro")
    status, output = two_tasks.start("closed", "ExperienceReplay")
    assert status == 1
    assert (
        "/runs/closed cannot be written to (Read-only file system): nothing was started" in output
    )
    assert "resuming" not in output
    small_disk("remount,rw")
    two_tasks.finish("closed", "ExperienceReplay")
    assert two_tasks.differences("closed", "alone") == []


def test_a_folder_that_cannot_be_made_is_named_before_anything_begins(two_tasks):
    file = two_tasks.folder / "file"
    file.write_text("")
    status, output = two_tasks.start("nowhere", "ExperienceReplay", output_dir=str(file))
    assert status == 1
    expected = f"error: the run's folder {file / 'nowhere'} cannot be written to (Not a directory)"
    assert (
        f"{expected}: nothing was started; change that, or give --output_dir another folder"
        in output
    )
    assert "Traceback" not in output
