import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import time

import pytest

from mmcl.data.shards.stream_writer import (
    ShardPlan,
    build_stream,
    card_task,
    card_text,
    write_shard,
)
from mmcl.streams.digits import build as build_digits


def some_samples(start, count):
    for number in range(start, start + count):
        yield {"__key__": f"toy-{number}", "png": bytes([number]) * 3000, "cls": "1", "txt": "ü"}


def build_toy(folder, seed=0, progress=None):
    plans = [
        ShardPlan(f"toy-{n}.tar", 4, lambda n=n: some_samples(4 * n + 100 * seed, 4))
        for n in range(3)
    ]

    def card_texts(hashes):
        card = {"name": "toy", "tasks": [card_task("a", plans[:2], plans[2:])], "hashes": hashes}
        return {"toy.yaml": card_text({**card, "hashes": dict(hashes)}, ["toys"])}

    return build_stream(
        folder, "toy", plans, ["toy.yaml"], card_texts, recipe={"seed": seed}, progress=progress
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_shard_tells_nothing_of_when_and_by_whom_it_was_written(tmp_path):
    count, sha256 = write_shard(tmp_path / "a.tar", some_samples(0, 2))
    assert count == 2
    assert sha256 == hashlib.sha256((tmp_path / "a.tar").read_bytes()).hexdigest()
    with tarfile.open(tmp_path / "a.tar") as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == [
        "toy-0.cls", "toy-0.png", "toy-0.txt", "toy-1.cls", "toy-1.png", "toy-1.txt",
    ]  # fmt: skip
    for member in members:
        assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
        assert (member.uname, member.gname) == ("", "")


@pytest.mark.parametrize(
    ("keys", "said"), [(["a", "a"], "'a' is twice in x.tar"), (["a.b"], "'a.b' of x.tar contains")]
)
def test_a_key_that_would_be_misread_is_refused_and_leaves_no_file(tmp_path, keys, said):
    with pytest.raises(ValueError, match=said):
        write_shard(tmp_path / "x.tar", [{"__key__": key, "txt": "t"} for key in keys])
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_gives_fewer_samples_than_it_said_is_named(tmp_path):
    plan = ShardPlan("few.tar", 5, lambda: some_samples(0, 4))
    with pytest.raises(RuntimeError, match="few.tar got 4 samples and its plan says 5"):
        build_stream(tmp_path, "toy", [plan], [], lambda _: {}, recipe={})


def test_a_finished_build_makes_nothing_again_and_keeps_an_edited_card(tmp_path):
    card = build_toy(tmp_path)[0]
    card.write_text(card.read_text() + "# mine\n")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    seen = []
    build_toy(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert seen == [(4, 12), (8, 12), (12, 12)]


def test_a_damaged_shard_of_the_right_length_is_made_again(tmp_path):
    build_toy(tmp_path)
    whole = contents(tmp_path)
    damaged = bytearray(whole["toy-1.tar"])
    damaged[600] ^= 1
    (tmp_path / "toy-1.tar").write_bytes(damaged)
    build_toy(tmp_path)
    assert contents(tmp_path) == whole


def test_another_seed_makes_the_folder_anew(tmp_path):
    build_toy(tmp_path / "again", seed=0)
    build_toy(tmp_path / "again", seed=1)
    build_toy(tmp_path / "fresh", seed=1)
    assert contents(tmp_path / "again") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("record", ["{", "[]", '{"recipe": {}, "cards": 1, "shards": {}}'])
def test_a_record_that_is_not_one_is_made_again(tmp_path, record):
    build_toy(tmp_path)
    whole = contents(tmp_path)
    (tmp_path / "toy.build.json").write_text(record)
    build_toy(tmp_path)
    assert contents(tmp_path) == whole


def test_a_record_cannot_have_files_elsewhere_removed(tmp_path):
    (tmp_path / "mine.yaml").write_text("mine")
    folder = tmp_path / "toy"
    build_toy(folder)
    names = {"../mine.yaml": "", str(tmp_path / "mine.yaml"): "", "..": "", "": ""}
    record = {"recipe": "other", "cards": list(names), "shards": names}
    (folder / "toy.build.json").write_text(json.dumps(record))
    build_toy(folder)
    assert (tmp_path / "mine.yaml").read_text() == "mine"


@pytest.mark.slow
def test_a_build_killed_after_any_sample_and_started_again_ends_the_same(tmp_path):
    build_toy(tmp_path / "whole")
    # Children are forked from one process of its own: importing webdataset for each takes seconds.
    program = textwrap.dedent(
        f"""
        import os, signal, sys
        from pathlib import Path
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_stream_writer import build_toy

        def stop_at(last):
            def progress(done, total):
                if done == last:
                    os.kill(os.getpid(), signal.SIGKILL)
            return progress

        for last in range(1, 13):
            child = os.fork()
            if child == 0:
                build_toy(Path({str(tmp_path)!r}) / str(last), progress=stop_at(last))
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        """
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    for last in range(1, 13):
        folder = tmp_path / str(last)
        assert not (folder / "toy.yaml").exists()
        build_toy(folder)
        assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_real_build_killed_at_a_moment_nobody_chose_ends_the_same(tmp_path):
    folder = tmp_path / "killed"
    program = f"from pathlib import Path; build_digits(Path({str(folder)!r}))"
    program = f"from mmcl.streams.digits import build as build_digits; {program}"
    for shards in (1, 3):
        with subprocess.Popen([sys.executable, "-c", program]) as child:
            while child.poll() is None and len(list(folder.glob("*.tar"))) < shards:
                time.sleep(0.001)
            child.kill()
        # On a busy machine the build may end before this process gets to kill it.
        assert child.returncode == (0 if (folder / "digits.yaml").exists() else -signal.SIGKILL)
    build_digits(folder)
    build_digits(tmp_path / "whole")
    assert contents(folder) == contents(tmp_path / "whole")
