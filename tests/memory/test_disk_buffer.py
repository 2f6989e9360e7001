"""Files of rows on disks that are full, read-only, missing or not shared."""

import errno
import os
import resource
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mmcl.core import Batch
from mmcl.core.atomic_write import WriteError
from mmcl.memory import MmapStore, TensorBuffer, disk_buffer
from mmcl.memory.disk_buffer import fill_disk_buffer

CPU = torch.device("cpu")


def rows_of(first, count=6, width=50):
    return (torch.arange(first, first + count)[:, None] + torch.arange(width)).to(torch.uint8)


def committed(folder, groups=1):
    """Files of some groups; row i of group g counts up from 10 g + i."""
    made = MmapStore()
    made.directory = folder
    for group in range(groups):
        with made.spool() as own:
            numbers = own.add(rows_of(10 * group))
            made.commit(own, group, numbers, CPU)
    return made


@contextmanager
def full_after(size):
    """A disk on which no file can grow beyond a size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_rows_come_back_from_several_files_in_the_requested_order(tmp_path):
    made = committed(tmp_path, groups=2)
    groups, numbers = torch.tensor([1, 0, 1, 0]), torch.tensor([5, 2, 0, 2])
    pairs = zip(groups.tolist(), numbers.tolist(), strict=True)
    expected = torch.stack([rows_of(10 * group)[number] for group, number in pairs])
    assert torch.equal(made.get(groups, numbers), expected)


def test_chosen_rows_are_written_in_pieces_in_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_buffer, "_CHUNK_BYTES", 120)
    made = MmapStore()
    made.directory = tmp_path
    chosen = torch.tensor([17, 3, 4, 4, 11])
    with made.spool() as own:
        numbers = torch.cat([own.add(rows_of(0, 7)), own.add(rows_of(7, 12))])
        made.commit(own, 0, numbers[chosen], CPU)
    taken = made.get(torch.zeros(5, dtype=torch.int64), torch.arange(5))
    assert taken[:, 0].tolist() == chosen.tolist()


def test_a_disk_that_is_full_while_spooling_leaves_what_was_there(tmp_path):
    made = committed(tmp_path)
    before, state = names(tmp_path), made.get_extra_state()
    with made.spool() as own, full_after(420):
        own.add(rows_of(50))
        with pytest.raises(WriteError, match="cannot be written to .*: free space") as caught:
            own.add(rows_of(60))
    assert caught.value.errno == errno.EFBIG
    assert names(tmp_path) == before
    assert made.get_extra_state() == state
    assert torch.equal(made.get(torch.zeros(6, dtype=torch.int64), torch.arange(6)), rows_of(0))


def test_a_disk_that_is_full_while_settling_leaves_what_was_there(tmp_path):
    made = committed(tmp_path)
    before, state = names(tmp_path), made.get_extra_state()
    with made.spool() as own:
        numbers = own.add(rows_of(50))
        with (
            full_after(120),
            pytest.raises(WriteError, match="rows_001_.* cannot be written, for"),
        ):
            made.commit(own, 1, numbers, CPU)
        assert made.get_extra_state() == state
        made.commit(own, 1, numbers, CPU)  # somebody made room
    assert len(names(tmp_path)) == len(before) + 1
    assert torch.equal(made.get(torch.ones(6, dtype=torch.int64), torch.arange(6)), rows_of(50))


def test_a_write_of_a_part_is_gone_on_with(tmp_path):
    class Slow:
        def __init__(self, file):
            self.file, self.name = file, file.name

        def write(self, data):
            return self.file.write(data[:7])

        def fileno(self):
            return self.file.fileno()

    made = MmapStore()
    made.directory = tmp_path
    with made.spool() as own:
        own._file = Slow(own._file)
        made.commit(own, 0, own.add(rows_of(0)), CPU)
    assert torch.equal(made.get(torch.zeros(6, dtype=torch.int64), torch.arange(6)), rows_of(0))


def a_batch(rows=6):
    labels = torch.arange(rows)
    return Batch(None, labels, torch.zeros_like(labels), sample_ids=labels)


def columns(batch):
    return {"labels": batch.labels, "large": batch.labels[:, None].repeat(1, 9).float()}


def test_a_table_is_as_it_was_if_its_file_cannot_be_written(tmp_path):
    made, rows = MmapStore(), TensorBuffer(4)
    made.directory = tmp_path
    fill_disk_buffer(made, rows, [a_batch()], 0, columns, ["large"], CPU)
    before = rows.columns
    with full_after(50), pytest.raises(WriteError, match="cannot be written"):
        fill_disk_buffer(made, rows, [a_batch()], 1, columns, ["large"], CPU)
    assert all(torch.equal(rows.columns[name], before[name]) for name in before)
    fill_disk_buffer(made, rows, [a_batch()], 1, columns, ["large"], CPU)
    held = rows.columns
    taken = made.get(held["file"], held["file_row"]).view(torch.float32)
    assert torch.equal(taken, columns(a_batch())["large"][held["labels"]])


def test_a_folder_that_takes_no_file_is_named_at_once(tmp_path):
    (tmp_path / "file").write_text("in the way")
    made = MmapStore()
    made.directory = tmp_path / "file" / "features"
    with pytest.raises(WriteError, match="cannot be written, for a part of the path is a file"):
        made.expect_writable()
    with pytest.raises(WriteError, match="cannot be written to .*features .*: free space or give"):
        made.spool().__enter__()


def test_a_read_only_folder_is_named_at_once(tmp_path, monkeypatch):
    made = committed(tmp_path)

    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    made.expect_writable()
    assert not any(name.startswith(".") for name in names(tmp_path))
    monkeypatch.setattr(Path, "write_bytes", refuse)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(WriteError, match="cannot be written, for its disk is read-only"):
        made.expect_writable()
    with pytest.raises(WriteError, match="Read-only"):
        made.spool().__enter__()


def test_a_folder_that_went_away_is_named(tmp_path):
    made = committed(tmp_path / "features")
    for path in (tmp_path / "features").iterdir():
        path.unlink()
    (tmp_path / "features").rmdir()
    with pytest.raises(FileNotFoundError, match="stored rows are missing: there is no"):
        made.get(torch.tensor([0]), torch.tensor([0]))


def test_a_spool_that_rank_0_does_not_see_is_an_error_and_no_garbage(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_buffer, "_POLL_SECONDS", 0)
    made = MmapStore()
    made.directory = tmp_path
    with made.spool() as own:
        numbers = own.add(rows_of(0))
        (tmp_path / ".spool_0").unlink()
        with pytest.raises(
            WriteError, match="rank 0 does not see the 6 rows of rank 0 in .*: give a"
        ):
            made.commit(own, 0, numbers, CPU)
    assert names(tmp_path) == []


def test_what_killed_runs_left_is_removed(tmp_path):
    for name in (".spool_3", ".rows_000_x.bin.7.tmp", ".writable_1_5"):
        (tmp_path / name).write_text("half")
    committed(tmp_path)
    assert [name[:5] for name in names(tmp_path)] == ["rows_"]


def test_rows_of_another_length_are_refused(tmp_path):
    made = committed(tmp_path)
    with (
        made.spool() as own,
        pytest.raises(ValueError, match="a row takes 40 bytes and those held"),
    ):
        own.add(rows_of(0, width=40))


def _on_rank(rank, world, folder, error):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/door", rank=rank, world_size=world
    )
    disk_buffer._POLL_SECONDS = 0
    made = MmapStore()
    made.directory = folder / ("features" if error != "not shared" else f"features_{rank}")
    message = "done"
    try:
        with made.spool() as own, full_after(170 if (rank, error) == (1, "full") else 1 << 30):
            own.add(rows_of(0, 3 + rank))
            made.commit(own, 0, torch.tensor([3, 0, 1]), CPU)
        taken = made.get(torch.zeros(3, dtype=torch.int64), torch.arange(3))
        assert taken[:, 0].tolist() == [1, 0, 0]
    except OSError as error:
        message = str(error)
    (folder / f"message_{rank}").write_text(message)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "message"),
    [("none", "done"), ("full", "File too large"), ("not shared", "the 4 rows of rank 1 in")],
)
def test_all_ranks_raise_what_one_of_them_meets(tmp_path, error, message):
    fork = get_context("fork")
    ranks = [fork.Process(target=_on_rank, args=(rank, 2, tmp_path, error)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    for rank in range(2):
        assert message in (tmp_path / f"message_{rank}").read_text()
    left = [path.name for path in tmp_path.glob("features*/*")]
    assert [name[:5] for name in left] == (["rows_"] if error == "none" else [])
