import errno
import os
import threading
from pathlib import Path

import pytest

from mmcl.core import write_atomic
from mmcl.core.atomic_write import WriteError


def full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "a.txt"
    write_atomic(file, "old")

    def breaks(path):
        path.write_text("half")
        raise OSError("disk is full")

    with pytest.raises(OSError, match="disk is full"):
        write_atomic(file, breaks)
    assert file.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_missing_folders_are_made(tmp_path):
    write_atomic(tmp_path / "a" / "b", b"\x00")
    assert (tmp_path / "a" / "b").read_bytes() == b"\x00"


def test_a_full_disk_is_reported_with_the_bytes_that_are_needed(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    write_atomic(file, "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError) as caught:
        write_atomic(file, bytes(2_500_000))
    assert caught.value.errno == errno.ENOSPC
    message = str(caught.value)
    assert message.startswith(
        f"{file} cannot be written, for its disk is full (2.5 MB are needed, "
    )
    assert message.endswith(" are free): make room; the previous file is unchanged")
    assert file.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_full_disk_that_hides_behind_another_error_is_found(tmp_path):
    def breaks(path):
        try:
            full()
        finally:
            raise RuntimeError("unexpected pos 640 vs 598")

    with pytest.raises(WriteError, match=r"its disk is full \(1\.2 GB are needed, "):
        write_atomic(tmp_path / "a", breaks, needs=1_200_000_000)
    with pytest.raises(WriteError, match=r"its disk is full \([\d.]+ .B are free\)"):
        write_atomic(tmp_path / "a", breaks)


def test_a_path_through_a_file_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a", tmp_path / "file" / "a" / "b"):
        with pytest.raises(WriteError, match="a part of the path is a file: change that"):
            write_atomic(path, "new")


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(errno.ECONNRESET, "reset"),
        PermissionError(errno.EACCES, "denied", "/elsewhere/source"),
        RuntimeError("nothing to do with a disk"),
    ],
    ids=["network", "source", "other"],
)
def test_what_a_function_meets_elsewhere_is_left_as_it_is(tmp_path, error):
    def breaks(path):
        raise error

    with pytest.raises(type(error)) as caught:
        write_atomic(tmp_path / "a", breaks)
    assert caught.value is error


def test_a_file_is_on_the_disk_before_its_name_is_and_the_name_before_all_else(
    tmp_path, monkeypatch
):
    events = []
    flush, rename = os.fsync, Path.replace

    def noted_flush(handle):
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        flush(handle)

    def noted_rename(temporary, target):
        events.append("name")
        return rename(temporary, target)

    monkeypatch.setattr(os, "fsync", noted_flush)
    monkeypatch.setattr(Path, "replace", noted_rename)
    write_atomic(tmp_path / "a", "new")
    assert [event for event in events if event != "folder"] == ["file", "name"]
    if os.path.isdir("/proc/self/fd"):
        assert events == ["file", "name", "folder"]


def test_writers_of_one_file_in_one_process_do_not_meet(tmp_path):
    together = threading.Barrier(2)

    def write(path):
        together.wait(timeout=10)
        path.write_text("whole")
        together.wait(timeout=10)

    writers = [
        threading.Thread(target=write_atomic, args=(tmp_path / "a", write)) for _ in range(2)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "whole"


def test_a_file_has_the_permissions_of_any_new_file_whoever_writes_it(tmp_path):
    (tmp_path / "other").touch()

    def private(path):
        path.write_bytes(b"x")
        path.chmod(0o600)

    for data in (b"x", private):
        write_atomic(tmp_path / "file", data)
        assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode
