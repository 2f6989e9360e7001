from dataclasses import replace

import pytest
import torch

from mmcl.core.randomness import ranks_of
from mmcl.memory.drift import Probes
from tests.stand_in import a_batch, task_batches

CPU = torch.device("cpu")


def encode(images):
    """One token for each colour."""
    return images.float().flatten(2)


def pack(features):
    return {"rounded": (features / 10).round()}


def unpack(columns):
    return 10 * columns["rounded"]


def settled(count=5, batches=None, task=0):
    probes = Probes(count, seed=3)
    for _ in probes.watched(task_batches(task) if batches is None else batches, task):
        pass
    probes.settle(CPU, encode, pack)
    return probes


def all_pictures(task=0):
    return torch.cat([batch.images for batch in task_batches(task)])


@pytest.mark.parametrize("rows", [1, 5, 24])
def test_probes_are_the_samples_of_smallest_hash_however_they_come(rows):
    joined = task_batches(0)[0].join(task_batches(0)[1]).join(task_batches(0)[2])
    probes = settled(7, [joined.take(piece) for piece in torch.arange(24).split(rows)])
    chosen = ranks_of(probes.seed, 0, torch.arange(24)).argsort()[:7]
    assert torch.equal(probes.held.get("images"), all_pictures()[chosen])


def test_nothing_is_far_when_nothing_changed():
    probes = settled()
    probes.look(CPU, encode, unpack)
    assert probes.seen["probes"] == 5
    assert probes.seen["relative_l2"] == 0
    assert probes.seen["cosine"] == pytest.approx(1)
    exact = probes.held.get("exact").double()
    off = 10 * (exact / 10).round() - exact
    assert probes.seen["stored_relative_l2"] == pytest.approx(float(off.norm() / exact.norm()))
    assert 0.99 < probes.seen["stored_cosine"] < 1


def test_distance_and_cosine_of_a_case_solved_by_hand():
    probes = settled()
    with pytest.warns(UserWarning, match="5 pictures of the first task .* distance of 0.5 from"):
        probes.look(CPU, lambda images: 1.5 * encode(images), unpack)
    assert probes.seen["relative_l2"] == pytest.approx(0.5)
    assert probes.seen["cosine"] == pytest.approx(1)
    with pytest.warns(UserWarning, match=r"have drifted: .* rounding explains 0.02; load the"):
        probes.look(CPU, lambda images: -encode(images), unpack)
    assert probes.seen["relative_l2"] == pytest.approx(2)
    assert probes.seen["cosine"] == pytest.approx(-1)


def test_what_arithmetic_explains_is_no_drift():
    probes = settled()
    probes.look(CPU, lambda images: (encode(images) * 0.37).bfloat16() / 0.37, unpack)
    assert 0 < probes.seen["relative_l2"] < 0.004


def test_features_that_are_no_numbers_are_drift():
    probes = settled()
    with pytest.warns(UserWarning, match="relative distance of nan"):
        probes.look(CPU, lambda images: torch.nan * encode(images), unpack)


def test_sixteen_tokens_of_many_are_compared():
    probes = Probes(4, seed=0)
    for _ in probes.watched([a_batch(8)], 0):
        pass
    probes.settle(CPU, lambda images: images.float().flatten(1)[:, :, None], pack)
    assert probes.held.get("exact").shape == (4, 16, 1)
    places = torch.arange(16) * 12
    expected = probes.held.get("images").flatten(1)[:, places].float()
    assert torch.equal(probes.held.get("exact")[..., 0], expected)


def test_only_rows_with_a_picture_are_probes():
    batch = a_batch(6)
    bare = replace(batch, images=batch.images[:2], owner=torch.tensor([1, 4]))
    probes = settled(6, [replace(batch, images=None), bare])
    assert len(probes) == 2
    pictures = {picture.sum().item() for picture in batch.images[:2]}
    assert {picture.sum().item() for picture in probes.held.get("images")} == pictures


def test_probes_stay_those_of_the_first_task_with_pictures():
    probes = settled(5, [replace(a_batch(6), images=None)])
    assert len(probes) == 0
    probes.look(CPU, encode, unpack)
    assert probes.seen == {}
    held = []
    for task in (1, 2):
        for _ in probes.watched(task_batches(task), task):
            pass
        probes.settle(CPU, encode, pack)
        held.append(probes.held.get("images"))
    assert len(held[0]) == 5
    assert torch.equal(*held)


def test_no_probes_are_wanted_with_a_count_of_0():
    probes = settled(0)
    probes.look(CPU, encode, unpack)
    assert len(probes) == 0
    with pytest.raises(ValueError, match="drift_probes is -1: give a number of pictures"):
        Probes(-1, seed=0)
