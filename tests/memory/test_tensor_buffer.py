import io

import pytest
import torch

from mmcl.core.seeding import generator, hash_priorities
from mmcl.memory import TensorBuffer


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def some(visits, width=4):
    """Rows that tell which visit they are."""
    visits = torch.as_tensor(visits)
    pixels = (visits[:, None, None] + torch.zeros(1, 2, 2)).to(torch.uint8)
    logits = visits[:, None].float() + torch.arange(width) / 10
    return {"images": pixels, "labels": visits.clone(), "logits": logits}


def labels(rows):
    return rows.columns["labels"].tolist()


def smallest(visits, capacity, seed=0, group=0):
    hashes = hash_priorities(seed, group, torch.as_tensor(visits)).tolist()
    return [visit for _, visit in sorted(zip(hashes, visits, strict=True))[:capacity]]


@pytest.mark.parametrize("batch", [1, 3, 8, 50])
def test_the_table_is_a_sample_of_all_visits_however_they_come(batch):
    rows = TensorBuffer(6, seed=3)
    for piece in torch.arange(50).split(batch):
        rows.add(some(piece), piece)
    assert labels(rows) == smallest(range(50), 6, seed=3)
    expected = some(labels(rows))
    for name, column in rows.columns.items():
        assert torch.equal(column, expected[name])


def test_every_visit_stays_equally_often():
    counts = torch.zeros(20)
    for seed in range(900):
        rows = TensorBuffer(4, seed=seed)
        for piece in torch.arange(20).split(5):
            rows.add({"labels": piece}, piece)
        counts[rows.columns["labels"]] += 1
    expected, spread = 900 * 4 / 20, (900 * 0.2 * 0.8) ** 0.5
    assert float((counts - expected).abs().max()) < 4 * spread


def test_accepts_foretells_what_insert_keeps():
    rows = TensorBuffer(5, seed=1)
    for piece in torch.arange(40).split(8):
        expected = set(piece[rows.would_keep(piece)].tolist())
        rows.add(some(piece), piece)
        assert expected == set(labels(rows)) & set(piece.tolist())


def test_balanced_groups_share_the_table_and_a_small_one_leaves_its_rest():
    rows = TensorBuffer(12, balanced=True)
    for group, size in enumerate((30, 2, 30)):
        rows.add({"labels": torch.full((size,), group)}, torch.arange(size), group)
    assert sorted(labels(rows)) == [0] * 5 + [1] * 2 + [2] * 5


def test_bytes_are_counted_exactly_and_never_exceeded():
    row_bytes = 4 + 8 + 4 * 4 + 16
    rows = TensorBuffer(capacity_bytes=7 * row_bytes + 5)
    for piece in torch.arange(30).split(4):
        rows.add(some(piece), piece)
        assert len(rows) * rows.row_bytes == len(rows) * row_bytes <= 7 * row_bytes + 5
    assert labels(rows) == smallest(range(30), 7)
    state = rows.get_extra_state()
    tensors = [*state["columns"].values(), state["priorities"], state["groups"]]
    assert sum(t.numel() * t.element_size() for t in tensors) == len(rows) * row_bytes
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in tensors)


def test_both_limits_hold_together():
    rows = TensorBuffer(3, capacity_bytes=1 << 20)
    rows.add(some(range(9)), torch.arange(9))
    assert len(rows) == 3


def test_wider_rows_widen_the_table_with_zeros():
    rows = TensorBuffer(8, padded_columns=("logits",))
    rows.add(some([0, 1], width=2), torch.arange(2))
    rows.add(some([2, 3], width=5), torch.arange(2, 4))
    rows.add(some([4], width=3), torch.tensor([4]))
    for label, logits in zip(labels(rows), rows.columns["logits"], strict=True):
        width = {0: 2, 1: 2, 2: 5, 3: 5, 4: 3}[label]
        assert torch.equal(logits[:width], some([label], width)["logits"][0])
        assert not logits[width:].any()


def test_a_padded_column_may_say_what_stands_behind_shorter_rows():
    rows = TensorBuffer(8, padded_columns={"logits": -7})
    rows.add(some([0], width=2), torch.tensor([0]))
    rows.add(some([1], width=4), torch.tensor([1]))
    rows.add(some([2], width=3), torch.tensor([2]))
    for label, logits in zip(labels(rows), rows.columns["logits"], strict=True):
        assert logits[{0: 2, 1: 4, 2: 3}[label] :].tolist() == [-7.0] * {0: 2, 1: 0, 2: 1}[label]
    assert rows.empty_copy().padded_columns == {"logits": -7}


def test_a_padded_column_of_single_numbers_stays_one():
    rows = TensorBuffer(8, padded_columns=("labels",))
    rows.add(some([0, 1, 2]), torch.arange(3))
    rows.add(some([3, 4, 5, 6]), torch.arange(3, 7))
    assert sorted(labels(rows)) == list(range(7))
    wide = {**some([7]), "labels": torch.zeros(1, 3, dtype=torch.int64)}
    with pytest.raises(ValueError, match="rows of column 'labels' are"):
        rows.add(wide, torch.tensor([7]))


def test_a_column_is_written_over_in_the_order_of_hash():
    rows = TensorBuffer(6)
    for visit in range(30):
        rows.add(some([visit]), torch.tensor([visit]))
    held = labels(rows)
    rows.set_column("labels", torch.tensor(held) + 100)
    assert labels(rows) == [label + 100 for label in held]
    rows.add(some([]), torch.zeros(0, dtype=torch.int64))
    assert labels(rows) == [label + 100 for label in held]


def test_rows_that_grow_under_a_byte_limit_make_others_leave():
    rows = TensorBuffer(capacity_bytes=10 * (4 + 8 + 8 + 16), padded_columns=("logits",))
    rows.add(some(range(40), width=2), torch.arange(40))
    assert len(rows) == 10
    rows.add(some(range(40, 44), width=20), torch.arange(40, 44))
    fitting = 10 * 36 // (4 + 8 + 80 + 16)
    assert labels(rows) == smallest(range(44), fitting)
    assert len(rows) * rows.row_bytes <= 360
    expected = [some([label], 2)["logits"][0] for label in labels(rows) if label < 40]
    held = [
        row[:2] for row, own in zip(rows.columns["logits"], labels(rows), strict=True) if own < 40
    ]
    assert torch.equal(torch.stack(held), torch.stack(expected))


def test_a_draw_repeats_no_row_before_all_were_drawn():
    rows = TensorBuffer(6)
    rows.add(some(range(6)), torch.arange(6))
    assert sorted(rows.get(rows.sample_indices(6, generator(1)))["labels"].tolist()) == list(
        range(6)
    )
    counts = rows.get(rows.sample_indices(15, generator(2)))["labels"].bincount()
    assert sorted(counts.tolist()) == [2, 2, 2, 3, 3, 3]
    assert len(rows.sample_indices(0, generator(3))) == 0
    assert len(TensorBuffer(3).sample_indices(5, generator(3))) == 0


def test_a_draw_depends_on_what_is_held_and_not_on_where_it_sits():
    one, many = TensorBuffer(6), TensorBuffer(6)
    one.add(some(range(40)), torch.arange(40))
    for visit in reversed(range(40)):
        many.add(some([visit]), torch.tensor([visit]))
    first, second = (rows.get(rows.sample_indices(4, generator(7))) for rows in (one, many))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_resumes_as_the_original():
    original = TensorBuffer(6, padded_columns=("logits",))
    original.add(some(range(20)), torch.arange(20))
    fresh = TensorBuffer(6, padded_columns=("logits",))
    fresh.load_state_dict(through_a_file(original.state_dict()))
    for rows in (original, fresh):
        rows.add(some(range(20, 33), width=6), torch.arange(20, 33))
    for name, column in original.columns.items():
        assert torch.equal(fresh.columns[name], column)


def test_a_state_taken_earlier_does_not_change_with_the_table():
    rows = TensorBuffer(4)
    rows.add(some(range(4)), torch.arange(4))
    before = rows.get_extra_state()["columns"]["labels"]
    kept = before.clone()
    rows.add(some(range(4, 200)), torch.arange(4, 200))
    assert torch.equal(before, kept)


def test_the_table_stays_on_the_cpu_with_its_dtypes():
    rows = TensorBuffer(4)
    rows.add(some(range(4)), torch.arange(4))
    rows.half().to("meta")
    assert rows.columns["logits"].dtype == torch.float32
    assert rows.columns["logits"].device.type == "cpu"


def test_rows_of_another_encoder_are_refused_on_loading_and_on_binding():
    rows = TensorBuffer(4)
    rows.bind_encoder("one")
    rows.add(some(range(4)), torch.arange(4))
    state = through_a_file(rows.state_dict())
    other = TensorBuffer(4)
    other.bind_encoder("two")
    with pytest.raises(ValueError, match="made by encoder 'one' and this model is 'two'"):
        other.load_state_dict(state)
    unbound = TensorBuffer(4)
    unbound.load_state_dict(state)
    unbound.bind_encoder("one")
    with pytest.raises(ValueError, match="made by encoder 'one' and this model is 'two'"):
        unbound.bind_encoder("two")


def test_wrong_arguments_say_what_to_do():
    with pytest.raises(ValueError, match="give at least one of them, above 0"):
        TensorBuffer()
    rows = TensorBuffer(4)
    rows.add(some(range(2)), torch.arange(2))
    with pytest.raises(ValueError, match="use one buffer for each kind of row"):
        rows.add({"labels": torch.arange(2)}, torch.arange(2))
    with pytest.raises(ValueError, match="column 'images' has 3 rows for 2 sample_ids"):
        rows.add(some(range(3)), torch.arange(2))
    with pytest.raises(ValueError, match=r"rows of column 'logits' are \(5,\) torch.float32"):
        rows.add(some(range(2), width=5), torch.arange(2))
    with pytest.raises(ValueError, match="one row takes 44 bytes and capacity_bytes is 20"):
        TensorBuffer(capacity_bytes=20).add(some(range(1)), torch.arange(1))
