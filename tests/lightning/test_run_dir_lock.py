"""A run directory: its lock, its notes of inputs, the messages of a run that ends early."""

import errno
import fcntl
import os
import tempfile
from pathlib import Path

import pytest
from pytorch_lightning.utilities.exceptions import SIGTERMException

from mmcl.core.atomic_write import WriteError, write_atomic
from mmcl.lightning.run_dir import INPUTS, LOCK, RunDirectory, RunState, lock_run_dir
from mmcl.lightning.run_errors import Terminated, translate_errors


def in_child(work):
    """Call something in a forked process; return the sentence of what it raises."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
        except Exception as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as output:
        return output.read().decode()


def hold(folder):
    with lock_run_dir(folder):
        pass


def test_a_second_process_is_refused_with_the_holder(tmp_path):
    run = tmp_path / "runs" / "a"
    with lock_run_dir(run):
        output = in_child(lambda: hold(run))
    assert output.startswith(f"{run} is used by process {os.getpid()} on ")
    assert output.endswith(": wait until that ends, or give this run another --run_name")
    assert in_child(lambda: hold(run)) == ""


def test_a_holder_without_a_note_is_another_process(tmp_path):
    with lock_run_dir(tmp_path):
        in_child(lambda: (tmp_path / LOCK).write_text("[1"))
        output = in_child(lambda: hold(tmp_path))
    assert f"{tmp_path} is used by another process: wait" in output


def test_a_file_system_that_cannot_lock_keeps_nobody_out(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with lock_run_dir(tmp_path):
        assert in_child(lambda: hold(tmp_path)) == ""


def test_half_written_files_of_killed_processes_are_removed_and_no_others(tmp_path):
    kept = [tmp_path / "run.json", tmp_path / ".hidden.tmp", tmp_path / "a.1.abcdef.tmp"]
    left = [tmp_path / f".run.json.{number}.0a1b2c.tmp" for number in (1, 77)]
    left.append(tmp_path / "checkpoints" / ".last.ckpt.12.ffffff.tmp")
    (tmp_path / "checkpoints").mkdir()
    for file in (*kept, *left):
        file.write_text("")
    with lock_run_dir(tmp_path):
        assert [file for file in left if file.exists()] == []
    assert all(file.exists() for file in kept)


def test_the_names_of_half_written_files_are_those_that_are_removed(tmp_path):
    def dies(temporary):
        temporary.write_text("half")
        os.rename(temporary, temporary.with_name(f"{temporary.name}.kept"))
        raise KeyError

    with pytest.raises(KeyError):
        write_atomic(tmp_path / "a", dies)
    [kept] = tmp_path.iterdir()
    kept.rename(kept.with_suffix(""))
    hold(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [LOCK]


@pytest.mark.parametrize(
    ("inside", "what"), [("", "folder"), ("checkpoints", "folder"), (LOCK, "file")]
)
def test_what_is_closed_to_the_user_is_named(inside, what):
    def hold_as_somebody():
        if os.geteuid() == 0:  # who may write where nobody may
            os.seteuid(65534)
        hold(run)

    with tempfile.TemporaryDirectory() as open_to_all:
        run = Path(open_to_all) / "run"
        (run / "checkpoints").mkdir(parents=True)
        (run / LOCK).touch()
        for place in (run.parent, run, run / "checkpoints", run / LOCK):
            place.chmod(0o777)
        (run / inside).chmod(0o444 if inside == LOCK else 0o555)
        output = in_child(hold_as_somebody)
    assert output == (
        f"the run's {what} {run / inside} cannot be written to (Permission denied): "
        "nothing was started; change that, or give --output_dir another folder"
    )


def test_a_folder_is_locked_once_however_often_it_is_entered(tmp_path):
    folder = RunDirectory(tmp_path / "a")
    with folder.lock():
        with folder.lock():
            pass
        assert in_child(lambda: hold(folder.path)) != ""
    assert in_child(lambda: hold(folder.path)) == ""


def test_ranks_that_write_nothing_hold_nothing(tmp_path):
    with RunDirectory(tmp_path / "a", writes=False).lock():
        assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("state", "where"),
    [
        (RunState(0, 0, ["1f a"], 0), "from the beginning"),
        (RunState(0, 0, ["1f a"], 0, "last.ckpt", 7), "in task 0 ('a') at step 7"),
        (RunState(1, 1, ["1f a"], 0), "after task 0 ('a')"),
        (RunState(1, 1, ["1f a", "2f b c"], 0, "last.ckpt", 2), "in task 1 ('b c') at step 2"),
    ],
)
def test_a_state_names_where_a_run_resumes(state, where):
    assert state.resume_point() == where


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"tasks": []}',
        '{"tasks": {"a": {}}}',
        '{"tasks": {"a": {"facts": "x", "train": {}}}}',
        '{"tasks": {"a": {"facts": "x", "test": [{}]}}}',
        '{"settings": 3}',
        "{",
    ],
)
def test_damaged_notes_of_inputs_are_refused_with_what_to_do(tmp_path, text):
    (tmp_path / INPUTS).write_text(text)
    with pytest.raises(ValueError, match=r"inputs\.json (is damaged: restore it, or|is not)"):
        RunDirectory(tmp_path).inputs()


def configured(weights, rate=0.1):
    """A configuration whose chain of strategies names a file."""
    members = [{"class_path": "EWC"}, {"class_path": "Own", "init_args": {"weights": weights}}]
    chain = {"class_path": "Chain", "init_args": {"strategies": members}}
    return {"model": {"strategy": chain, "learning_rate": rate}, "data": {"stream": "a.yaml"}}


def test_a_path_in_the_settings_may_change_if_its_content_did_not(tmp_path):
    for name, content in (("old", "same"), ("new", "same"), ("other", "else")):
        (tmp_path / name).write_text(content)
    run = tmp_path / "run"
    RunDirectory(run).check_config(configured(str(tmp_path / "old")))
    before = (run / "config.yaml").read_bytes()
    (run / "run.json").write_text("{}")
    (tmp_path / "old").unlink()
    key = "model.strategy.init_args.strategies.1.init_args.weights"
    for changed, differs in (
        (configured(str(tmp_path / "other")), key),
        (configured(str(tmp_path / "absent")), key),
        (configured(str(tmp_path / "new"), 0.2), "model.learning_rate"),
    ):
        with pytest.raises(ValueError, match=f"another configuration: {differs} is .* there"):
            RunDirectory(run).check_config(changed)
    folder = RunDirectory(run)
    folder.check_config(configured(str(tmp_path / "new")))
    assert (run / "config.yaml").read_bytes() == before
    folder.save_moved_paths()
    assert str(tmp_path / "new") in (run / "config.yaml").read_text()
    RunDirectory(run).check_config(configured(str(tmp_path / "new")))


def ended_by(error):
    with translate_errors(lambda: "after task 0 ('a')"):
        raise error


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (WriteError("x cannot be written: make room", errno.ENOSPC), "x cannot be written"),
        (OSError(errno.ENOSPC, "No space left", "spool"), "spool cannot be written .No space left"),
        (OSError(errno.EROFS, "Read-only"), "a file cannot be written .Read-only"),
    ],
)
def test_a_full_disk_is_reported_with_where_the_run_resumes(error, sentence):
    message = rf"{sentence}.*: make room\. Then the same command resumes after task 0 \('a'\)"
    with pytest.raises(WriteError, match=message) as caught:
        ended_by(error)
    assert caught.value.errno == error.errno


def test_signals_differ_from_a_good_end():
    with pytest.raises(Terminated, match="ended by SIGTERM: the same command resumes after task"):
        ended_by(SIGTERMException())
    interrupted = SystemExit(1)
    interrupted.__context__ = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        ended_by(interrupted)


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "gone", "shard"), RuntimeError("odd"), SystemExit(2)]
)
def test_other_ends_are_left_as_they_are(error):
    with pytest.raises(type(error)) as caught:
        ended_by(error)
    assert caught.value is error
