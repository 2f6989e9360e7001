"""FeatureReplay with product-quantised rows, and its look at whether features still hold."""

import io
from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist

from mmcl.core import Chain, begin_task, end_task, step
from mmcl.strategies.feature_replay import FeatureReplay
from tests.toys.toy_clip import StandIn, a_batch, a_task, task_batches
from tests.toys.toy_llava import a_dialogue_batch, a_llava, an_answer_task, dialogue_batches


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def packed(**arguments):
    return FeatureReplay(**{"buffer_size": 12, "compression": "pq", "subvectors": 8, **arguments})


def learned(tasks=1, model=None, storage_dir=None, **arguments):
    """A strategy that has seen the exact pass of some tasks and begun the next."""
    model, strategy = model or a_llava(), packed(**arguments)
    strategy.attach(model)
    begin_task(model, strategy, an_answer_task(0))
    if storage_dir is not None:
        strategy.set_memory_dir(storage_dir)
    for task in range(tasks):
        end_task(model, strategy, an_answer_task(task), dialogue_batches(model, task))
        begin_task(model, strategy, an_answer_task(task + 1))
    return model, strategy


def relative(left, right):
    return float((left - right).norm() / left.norm())


def test_codes_give_features_near_those_of_the_images():
    model, strategy = learned()
    columns = strategy.memory.columns
    assert columns["codes"].shape == (12, 4, 8)
    assert columns["codes"].dtype == torch.uint8
    assert columns["scale"].shape == (12, 4)
    _, exact = learned(model=model, compression="float16")
    batch = a_dialogue_batch(model, rows=4, task=1)
    left, right = (s.extend_batch(model, batch).features[4:] for s in (exact, strategy))
    assert 0 < relative(left, right) < 0.2


def test_codes_on_disk_are_those_in_memory(tmp_path):
    model, in_memory = learned(tasks=2)
    _, on_disk = learned(tasks=2, storage="disk", storage_dir=tmp_path)
    batch = a_dialogue_batch(model, rows=4, task=2)
    left, right = (strategy.extend_batch(model, batch) for strategy in (in_memory, on_disk))
    for name in ("features", "labels", "input_ids", "task_ids", "attention_mask"):
        assert torch.equal(getattr(left, name), getattr(right, name))
    assert on_disk.files.row_bytes == 4 * 8 + 4 * 2


def test_later_tasks_use_the_codebook_of_the_first():
    model, strategy = learned()
    before, held = strategy.codebook.centroids.clone(), strategy.memory.columns
    end_task(model, strategy, an_answer_task(1), dialogue_batches(model, 1))
    assert torch.equal(strategy.codebook.centroids, before)
    after = strategy.memory.columns
    old = {bytes(codes.numpy()) for codes in held["codes"]}
    pairs = zip(after["codes"], after["task_ids"], strict=True)
    kept = {bytes(codes.numpy()) for codes, task in pairs if task == 0}
    assert kept
    assert kept <= old


def test_a_checkpoint_has_the_codebook_and_resumes_as_the_original():
    model, original = learned()
    done = step(model, original, a_dialogue_batch(model, task=1))
    original.after_step(model, done.batch, done.output)
    fresh = packed()
    fresh.attach(model)
    begin_task(model, fresh, an_answer_task(1))
    fresh.load_state_dict(through_a_file(original.state_dict()))
    for strategy in (original, fresh):
        end_task(model, strategy, an_answer_task(1), dialogue_batches(model, 1))
    batch = a_dialogue_batch(model, rows=4, task=2)
    assert torch.equal(
        original.extend_batch(model, batch).features, fresh.extend_batch(model, batch).features
    )
    states = [strategy.state_dict() for strategy in (original, fresh)]
    assert torch.equal(*(s["codebook.held._extra_state"]["tensors"]["centroids"] for s in states))


def test_a_budget_in_bytes_holds_samples_and_codebook():
    budget = 60 * 1024
    model, strategy = learned(tasks=2, buffer_size=0, buffer_bytes=budget)
    # 48 vectors of the first task, two of each row, are as many centroids.
    codebook = strategy.codebook.centroids.numel() * 4
    assert codebook == 48 * 16 * 4
    assert strategy.memory.capacity_bytes == budget - codebook
    assert 0 < len(strategy.memory) * strategy.memory.row_bytes <= budget - codebook
    _, tight = learned(model=model, tasks=2, buffer_size=0, buffer_bytes=18_000)
    row = strategy.memory.row_bytes
    assert len(tight.memory) == (18_000 - codebook) // row < len(strategy.memory)


def test_what_is_counted_is_what_a_checkpoint_holds():
    _, monitored = learned()
    _, without = learned(drift_images=0)
    counted = without.state_bytes()
    codebook = without.codebook.centroids.numel() * 4
    rows = len(without.memory) * without.memory.row_bytes
    assert rows + codebook <= counted < rows + codebook + 300
    stored = monitored.drift_monitor.held.tensors
    assert {name: tensor.shape[0] for name, tensor in stored.items()} == {
        "images": 24, "exact": 24, "stored.codes": 24, "stored.scale": 24,
    }  # fmt: skip
    taken = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert monitored.state_bytes() - counted == taken


def test_a_width_that_cannot_be_cut_and_a_small_budget_fail_at_the_first_step():
    model, strategy = learned(tasks=0, subvectors=5)
    with pytest.raises(ValueError, match="subvectors is 5 and features have dim 16: choose"):
        step(model, strategy, a_dialogue_batch(model))
    model, strategy = learned(tasks=0, buffer_size=0, buffer_bytes=9000)
    with pytest.raises(ValueError, match="buffer_bytes is 9000 and the codebook alone takes 16384"):
        step(model, strategy, a_dialogue_batch(model))


def test_a_first_task_that_is_read_only_once_is_refused():
    model, strategy = learned(tasks=0)
    with pytest.raises(ValueError, match="first task can be read only once: give end_task a list"):
        end_task(model, strategy, an_answer_task(0), iter(dialogue_batches(model)))


def test_two_packed_stores_stand_in_a_chain():
    model = a_llava()
    chain = Chain([packed(seed=0), packed(seed=1, compression="int8")])
    chain.attach(model)
    begin_task(model, chain, an_answer_task(0))
    end_task(model, chain, an_answer_task(0), dialogue_batches(model))
    assert len(chain.extend_batch(model, a_dialogue_batch(model, task=1)).labels) == 32


@pytest.mark.parametrize("store", ["float16", "int8", "pq"])
def test_drift_is_that_of_rounding_while_the_tower_stays(store):
    model, strategy = learned(tasks=2, compression=store)
    drift = strategy.drift
    assert drift["images"] == 24
    assert drift["relative_l2"] < 1e-6
    assert drift["cosine"] == pytest.approx(1)
    worst = {"float16": 1e-3, "int8": 0.01, "pq": 0.2}[store]
    assert 0 < drift["stored_relative_l2"] < worst
    assert drift["stored_cosine"] > 1 - worst


def test_a_tower_that_moved_is_named_at_the_end_of_the_task():
    model, strategy = StandIn(), packed(compression="int8")
    strategy.attach(model)
    begin_task(model, strategy, a_task(0))
    end_task(model, strategy, a_task(0), task_batches(0))
    then = torch.cat([model.encode_image(batch) for batch in task_batches(0)])
    with torch.no_grad():
        model.patch.weight += 0.05 * torch.randn(16, 48, generator=torch.Generator().manual_seed(0))
    now = torch.cat([model.encode_image(batch) for batch in task_batches(0)])
    with pytest.warns(UserWarning, match="have drifted: 24 images of the first task are now at"):
        end_task(model, strategy, a_task(1), task_batches(1))
    assert strategy.drift["relative_l2"] == pytest.approx(relative(then, now), rel=1e-3)


def test_after_a_checkpoint_was_loaded_the_first_step_looks_once():
    model, strategy = StandIn(), packed(drift_images=5)
    strategy.attach(model)
    begin_task(model, strategy, a_task(0))
    end_task(model, strategy, a_task(0), task_batches(0))
    fresh = packed(drift_images=5)
    fresh.attach(model)
    fresh.load_state_dict(through_a_file(strategy.state_dict()))
    begin_task(model, fresh, a_task(1))
    assert fresh.drift == {}
    with torch.no_grad():
        model.patch.weight *= 3
    done = step(model, fresh, a_batch(8, task=1))
    with pytest.warns(UserWarning, match="have drifted: 5 images"):
        fresh.after_step(model, done.batch, done.output)
    assert fresh.drift["images"] == 5
    done = step(model, fresh, a_batch(8, task=1))
    fresh.after_step(model, done.batch, done.output)


def test_without_monitored_images_nothing_is_looked_at():
    _, strategy = learned(drift_images=0)
    assert strategy.drift == {}


def _on_rank(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/door", rank=rank, world_size=world
    )
    torch.save(_state(folder / "disk", rank, world), folder / f"{rank}.pt")
    dist.destroy_process_group()


def _state(folder, rank=0, world=1):
    """What two tasks leave, with each rank reading its stride."""
    model, states = a_llava(), {}
    for place in ("memory", "disk"):
        strategy = packed(storage=place, buffer_size=10, drift_images=6)
        strategy.attach(model)
        strategy.set_memory_dir(folder)
        for task in range(2):
            begin_task(model, strategy, an_answer_task(task))
            [whole] = dialogue_batches(model, task, rows=24)
            own = whole.take(torch.arange(rank, 24, world))
            batches = [own.take(rows) for rows in torch.arange(len(own)).split(5)]
            end_task(model, strategy, an_answer_task(task), batches)
        columns = strategy.memory.columns
        if strategy.files is not None:
            columns = {"rows": strategy.files.get(columns["file"], columns["file_row"])}
        states[place] = {
            **{name: columns[name] for name in ("codes", "scale", "rows") if name in columns},
            "centroids": strategy.codebook.centroids,
            "images": strategy.drift_monitor.held.get("images"),
            "exact": strategy.drift_monitor.held.get("exact"),
        }
    return states


@pytest.mark.slow
def test_two_processes_have_one_codebook_and_one_memory(tmp_path):
    fork = get_context("fork")
    ranks = [fork.Process(target=_on_rank, args=(rank, 2, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = _state(tmp_path / "alone")
    for place, held in first.items():
        torch.testing.assert_close(held, second[place], rtol=0, atol=0)
        torch.testing.assert_close(held["centroids"], alone[place]["centroids"])
        assert torch.equal(held["images"], alone[place]["images"])
        codes = "rows" if place == "disk" else "codes"
        is_same = held[codes] == alone[place][codes]
        assert float(is_same.float().mean()) > 0.98  # ties may be rounded otherwise
