from dataclasses import replace

import pytest
import torch

from mmcl.core.seeding import hash_priorities
from mmcl.memory.stored_features import DriftMonitor
from tests.toys.toy_clip import a_batch, task_batches

CPU = torch.device("cpu")


def encode(images):
    """One token for each colour."""
    return images.float().flatten(2)


def pack(features):
    return {"rounded": (features / 10).round()}


def unpack(columns):
    return 10 * columns["rounded"]


def committed(count=5, batches=None, task=0):
    monitor = DriftMonitor(count, seed=3)
    for _ in monitor.sample_from(task_batches(task) if batches is None else batches, task):
        pass
    monitor.commit(CPU, encode, pack)
    return monitor


def all_images(task=0):
    return torch.cat([batch.images for batch in task_batches(task)])


@pytest.mark.parametrize("rows", [1, 5, 24])
def test_images_are_the_samples_of_smallest_hash_however_they_come(rows):
    joined = task_batches(0)[0].join(task_batches(0)[1]).join(task_batches(0)[2])
    monitor = committed(7, [joined.take(piece) for piece in torch.arange(24).split(rows)])
    chosen = hash_priorities(monitor.seed, 0, torch.arange(24)).argsort()[:7]
    assert torch.equal(monitor.held.get("images"), all_images()[chosen])


def test_nothing_is_far_when_nothing_changed():
    monitor = committed()
    monitor.measure(CPU, encode, unpack)
    assert monitor.last_measurement["images"] == 5
    assert monitor.last_measurement["relative_l2"] == 0
    assert monitor.last_measurement["cosine"] == pytest.approx(1)
    exact = monitor.held.get("exact").double()
    off = 10 * (exact / 10).round() - exact
    assert monitor.last_measurement["stored_relative_l2"] == pytest.approx(
        float(off.norm() / exact.norm())
    )
    assert 0.99 < monitor.last_measurement["stored_cosine"] < 1


def test_distance_and_cosine_of_a_case_solved_by_hand():
    monitor = committed()
    with pytest.warns(UserWarning, match="5 images of the first task .* distance of 0.5 from"):
        monitor.measure(CPU, lambda images: 1.5 * encode(images), unpack)
    assert monitor.last_measurement["relative_l2"] == pytest.approx(0.5)
    assert monitor.last_measurement["cosine"] == pytest.approx(1)
    with pytest.warns(UserWarning, match=r"have drifted: .* rounding explains 0.02; load the"):
        monitor.measure(CPU, lambda images: -encode(images), unpack)
    assert monitor.last_measurement["relative_l2"] == pytest.approx(2)
    assert monitor.last_measurement["cosine"] == pytest.approx(-1)


def test_what_arithmetic_explains_is_no_drift():
    monitor = committed()
    monitor.measure(CPU, lambda images: (encode(images) * 0.37).bfloat16() / 0.37, unpack)
    assert 0 < monitor.last_measurement["relative_l2"] < 0.004


def test_features_that_are_no_numbers_are_drift():
    monitor = committed()
    with pytest.warns(UserWarning, match="relative distance of nan"):
        monitor.measure(CPU, lambda images: torch.nan * encode(images), unpack)


def test_sixteen_tokens_of_many_are_compared():
    monitor = DriftMonitor(4, seed=0)
    for _ in monitor.sample_from([a_batch(8)], 0):
        pass
    monitor.commit(CPU, lambda images: images.float().flatten(1)[:, :, None], pack)
    assert monitor.held.get("exact").shape == (4, 16, 1)
    places = torch.arange(16) * 12
    expected = monitor.held.get("images").flatten(1)[:, places].float()
    assert torch.equal(monitor.held.get("exact")[..., 0], expected)


def test_only_samples_with_an_image_are_monitored():
    batch = a_batch(6)
    bare = replace(batch, images=batch.images[:2], image_owner=torch.tensor([1, 4]))
    monitor = committed(6, [replace(batch, images=None), bare])
    assert len(monitor) == 2
    images = {image.sum().item() for image in batch.images[:2]}
    assert {image.sum().item() for image in monitor.held.get("images")} == images


def test_images_stay_those_of_the_first_task_with_any():
    monitor = committed(5, [replace(a_batch(6), images=None)])
    assert len(monitor) == 0
    monitor.measure(CPU, encode, unpack)
    assert monitor.last_measurement == {}
    held = []
    for task in (1, 2):
        for _ in monitor.sample_from(task_batches(task), task):
            pass
        monitor.commit(CPU, encode, pack)
        held.append(monitor.held.get("images"))
    assert len(held[0]) == 5
    assert torch.equal(*held)


def test_no_images_are_wanted_with_a_count_of_0():
    monitor = committed(0)
    monitor.measure(CPU, encode, unpack)
    assert len(monitor) == 0
    with pytest.raises(ValueError, match="drift_images is -1: give a number of images"):
        DriftMonitor(-1, seed=0)
