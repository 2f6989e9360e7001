"""Runs over remote shards that are read in lanes, by one and two processes."""

import pytest
import yaml

from tests.behaviour.kill_runs import KILLED
from tests.data.small_stream import labelled, write_tar
from tests.distributed.ranks import on_ranks, seen
from tests.distributed.test_two_processes import CLOSED_FORM, PLAIN, far, global_batches
from tests.lightning.small_runs import SmallRuns, same
from tests.toys.http_server import serving

pytestmark = pytest.mark.slow
LANES = {"data__shuffle_lanes": 2, "data__shuffle_window": 2}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Runs over a stream of two tasks of four remote shards each."""
    monkeypatch.setenv("no_proxy", "*")
    runs = SmallRuns(tmp_path, sizes=(20, 17))
    card = yaml.safe_load(runs.card.read_text())
    folder, counts = runs.card.parent, {}
    with serving() as site:

        def put(file):
            return site.put(f"/{file.name}", file.read_bytes())

        for number, (task, sizes) in enumerate(
            zip(card["tasks"], ((5, 5, 5, 5), (5, 2, 6, 4)), strict=True)
        ):
            task["test"], task["train"] = put(folder / task["test"]), []
            for part, size in enumerate(sizes):
                members = labelled(size, (2 * number, 2 * number + 1), name=f"{number}{part}-")
                url = put(write_tar(folder / f"{number}-{part}.tar", members))
                task["train"].append(url)
                counts[url] = size
        runs.card.write_text(yaml.safe_dump({**card, "counts": counts}))
        yield runs


def options(runs, cache, **more):
    return {**LANES, **more, "data__cache_dir": str(runs.folder / cache)}


@pytest.mark.parametrize("strategy", ["ExperienceReplay", "DarkReplay", "EWC", "NCM"])
def test_two_processes_read_the_batches_of_one(runs, tmp_path, strategy):
    plain = {} if strategy in CLOSED_FORM else PLAIN
    for name, world in (("one", 1), ("two", 2)):
        words = runs.words(name, strategy, **plain, **options(runs, name))
        status = on_ranks(words, tmp_path / name, world=world)
        assert status == [0] * world, (tmp_path / name / "output_0").read_text()
    one, two = seen(tmp_path / "one"), seen(tmp_path / "two")
    assert same(one["batches"], global_batches(tmp_path / "two"))
    assert far(two["states"][-1], one["states"][-1], tolerance=1e-3) == []
    assert runs.matrix("one").values == runs.matrix("two").values


@pytest.mark.parametrize("strategy", ["ExperienceReplay", "EWC"])
def test_a_run_in_lanes_that_is_killed_resumes_to_the_same_end(runs, tmp_path, strategy):
    settings = options(runs, "cache")
    assert on_ranks(runs.words("alone", strategy, **settings), tmp_path / "seen") == [0, 0]
    words = runs.words("killed", strategy, **settings)
    for moment in (("step", 3), ("write", 2), ("ended", 1), ("step", 5), ("score", 2)):
        assert on_ranks(words, tmp_path / "seen", kill=moment)[0] == KILLED
    assert on_ranks(words, tmp_path / "seen") == [0, 0]
    assert runs.differences("killed", "alone") == []


def test_a_run_in_lanes_may_resume_with_another_number_of_devices(runs, tmp_path):
    words = runs.words("run", "ExperienceReplay", **PLAIN, **options(runs, "cache"))
    assert on_ranks(words, tmp_path / "two", kill=("step", 7))[0] == KILLED
    assert on_ranks(words, tmp_path / "one", world=1) == [0]
    runs.finish("alone", "ExperienceReplay", **PLAIN, **options(runs, "cache"))
    assert far(runs.kept("run"), runs.kept("alone"), tolerance=1e-3) == []


def test_a_run_keeps_its_number_of_lanes(runs):
    runs.finish("run", **options(runs, "cache"))
    status, output = runs.start("run", **options(runs, "cache", data__shuffle_lanes=4))
    assert status != 0
    assert "data.shuffle_lanes is 2 there and 4 here" in output
