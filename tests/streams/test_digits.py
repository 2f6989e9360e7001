import hashlib
import io
import sys
import tarfile

import numpy as np
import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from mmcl.core.task import TaskStream
from mmcl.streams.digits import CLASSES, LOOKS, build, build_domains, split_indices
from mmcl.streams.registry import STREAMS


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return build(tmp_path_factory.mktemp("digits"))


def read_samples(shard):
    samples = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return samples


def test_a_package_that_is_missing_is_named_with_the_extra_that_installs_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "mmcl.streams.digits")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match=r"needs the package 'sklearn.*\[streams\]"):
        STREAMS["digits"].builder()


def test_the_card_reads_as_five_tasks_of_two_new_classes(digits):
    stream = TaskStream.read(digits)
    assert (stream.name, stream.scenario, len(stream)) == ("digits", "class", 5)
    assert [task.classes for task in stream] == [CLASSES[n : n + 2] for n in range(0, 10, 2)]
    assert sum(task.size + task.test_size for task in stream) == 1797


def test_counts_and_hashes_on_the_card_are_true_and_no_scan_is_in_two_shards(digits):
    card = yaml.safe_load(digits.read_text(encoding="utf-8"))
    keys = set()
    for task in card["tasks"]:
        for part, size in (("train", "size"), ("test", "test_size")):
            samples = read_samples(digits.parent / task[part][0])
            assert len(samples) == task[size]
            assert {CLASSES[int(sample["cls"])] for sample in samples.values()} == {
                *task["classes"]
            }
            assert not keys & samples.keys()
            keys |= samples.keys()
    assert len(keys) == 1797
    for shard, sha256 in card["hashes"].items():
        assert hashlib.sha256((digits.parent / shard).read_bytes()).hexdigest() == sha256


def test_the_seventeen_grey_levels_of_a_scan_come_back(digits):
    scans = load_digits()
    for key, sample in read_samples(digits.parent / "six-seven-test.tar").items():
        number = int(key.removeprefix("digits-"))
        grey = np.asarray(Image.open(io.BytesIO(sample["png"])), dtype=float)
        np.testing.assert_array_equal(np.rint(grey * 16 / 255), scans.images[number])
        assert int(sample["cls"]) == scans.target[number]


def test_a_quarter_of_every_class_is_test_and_another_seed_takes_another_quarter():
    labels = [0] * 40 + [1] * 20
    split = split_indices(labels, seed=0)
    assert sorted(split["train"] + split["test"]) == list(range(60))
    assert [labels[n] for n in split["test"]] == [0] * 10 + [1] * 5
    assert split_indices(labels, seed=0) == split
    assert split_indices(labels, seed=1)["test"] != split["test"]


def test_classes_in_a_seeded_order_are_the_same_scans_in_other_tasks(digits, tmp_path):
    card = build(tmp_path, class_order_seed=1993, first_task_classes=4, classes_per_task=4)
    stream = TaskStream.read(card)
    order = [CLASSES[n] for n in np.random.RandomState(1993).permutation(10)]
    assert [list(task.classes) for task in stream] == [order[:4], order[4:8], order[8:]]
    assert stream.classes_seen(2) == tuple(order)
    usual = TaskStream.read(digits)
    for part in ("train", "test"):
        scans = {}
        for task in usual:
            scans |= read_samples(usual.shard(getattr(task, part)[0]))
        found = {}
        for task in stream:
            own = read_samples(stream.shard(getattr(task, part)[0]))
            # The columns of a run count classes in the order in which they are learned.
            for sample in own.values():
                label = int(sample["cls"])
                assert task.label_to_class[label] == order.index(CLASSES[label])
            found |= own
        assert found == scans
    with pytest.raises(ValueError, match="first_task_classes is 10, and there are 10 classes"):
        build(tmp_path, first_task_classes=10)


def test_a_second_build_gives_the_same_bytes(digits, tmp_path):
    build(tmp_path)
    for path in digits.parent.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_looks_differ_by_far_from_each_other_and_nothing_is_drawn_twice():
    scan = Image.fromarray((load_digits().images[8] * 255 / 16).astype(np.uint8))
    drawn = {
        name: np.asarray(look(scan, np.random.default_rng(0)), dtype=float)
        for name, look in LOOKS.items()
    }
    assert len(drawn) == 5
    for name, image in drawn.items():
        assert image.shape == (32, 32, 3)
        for other in drawn.keys() - {name}:
            assert np.abs(image - drawn[other]).mean() > 20, (name, other)
    for name in ("noisy", "striped"):
        again = np.asarray(LOOKS[name](scan, np.random.default_rng(1)), dtype=float)
        assert np.abs(again - drawn[name]).mean() > 5


@pytest.mark.slow
def test_every_domain_holds_every_scan_and_a_lost_shard_comes_back_the_same(tmp_path):
    card = build_domains(tmp_path)
    stream = TaskStream.read(card)
    assert stream.scenario == "domain"
    assert [task.name for task in stream] == list(LOOKS)
    assert stream.classes_seen(4) == CLASSES
    numbers = set()
    for task in stream:
        train = read_samples(stream.shard(task.train[0]))
        test = read_samples(stream.shard(task.test[0]))
        assert (len(train), len(test)) == (task.size, task.test_size) == (1347, 450)
        numbers.add(frozenset(key.rpartition("-")[2] for key in test))
        assert not numbers & {frozenset(key.rpartition("-")[2] for key in train)}
    assert len(numbers) == 1
    for lost in (tmp_path / "noisy-test.tar", tmp_path / "striped-test.tar"):
        whole = lost.read_bytes()
        lost.unlink()
        assert build_domains(tmp_path) == card
        assert lost.read_bytes() == whole
