import pytest

from mmcl.core import write_atomic


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
