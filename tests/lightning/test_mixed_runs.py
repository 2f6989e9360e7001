"""Runs whose card mixes in other sources, states the share, and groups rows of like length."""

import json

import pytest

from tests.behaviour.kill_runs import KILLED
from tests.data.small_stream import labelled, picture, write_tar
from tests.lightning.small_runs import SmallRuns

pytestmark = pytest.mark.slow
CHAIN = {
    "class_path": "mmcl.core.Chain",
    "init_args": {
        "strategies": [
            {"class_path": "mmcl.strategies.ExperienceReplay", "init_args": {"buffer_size": 12}},
            {
                "class_path": "mmcl.strategies.LwF",
                "init_args": {"distill_on": "sources", "teacher": "base"},
            },
        ]
    },
}


def mixed_runs(folder, kind="classification", source="task_type: image", **options):
    runs = SmallRuns(folder, sizes=(20, 17), kind=kind, **options)
    write_tar(runs.card.parent / "general.tar", labelled(9, name="general"))
    mixed = (
        f"sources: {{general: {{{source}, shards: general.tar}}}}\nmixture: {{general: 0.25}}\n"
        f"replay_ratio: 0.125\n"
    )
    runs.card.write_text(mixed + runs.card.read_text())
    return runs


@pytest.mark.parametrize(
    "options",
    [{}, {"data__micro_batch_size": 4}, {"data__num_workers": 2}],
    ids=["whole", "parts", "workers"],
)
def test_a_killed_run_over_sources_resumes_exactly(tmp_path, options):
    runs = mixed_runs(tmp_path)
    runs.finish("alone", CHAIN, **options)
    for moment in (("step", 3), ("step", 8)):
        status, output = runs.start("killed", CHAIN, kill=moment, **options)
        assert status == KILLED, output
    runs.finish("killed", CHAIN, **options)
    assert runs.differences("killed", "alone") == []


def test_captions_of_like_length_come_together_and_a_killed_run_resumes_exactly(tmp_path):
    runs = mixed_runs(tmp_path, kind="captioning", source="task_type: captioning, scored: false")
    options = {"data__group_by_length": 3}
    runs.finish("alone", "ExperienceReplay", **options)
    status, output = runs.start("killed", "ExperienceReplay", kill=("step", 4), **options)
    assert status == KILLED, output
    runs.finish("killed", "ExperienceReplay", **options)
    assert runs.differences("killed", "alone") == []


@pytest.mark.parametrize("storage", ["reference", "copy"])
def test_a_killed_run_over_images_of_several_captions_resumes_exactly(tmp_path, storage):
    runs = SmallRuns(tmp_path, sizes=(20, 17), kind="captioning")
    runs.card.write_text("text_field: json.texts\n" + runs.card.read_text())
    for shard in runs.card.parent.glob("*.tar"):
        members = []
        for number in range(int(shard.stem[0] == "a") * 3 + 17 if "train" in shard.stem else 5):
            texts = [f"{shard.stem} {number} {way}" for way in "abc"[: 1 + number % 3]]
            members += [
                # Every second image is in two samples.
                (f"{shard.stem}{number}.png", picture(number - number % 4 // 3)),
                (f"{shard.stem}{number}.json", json.dumps({"texts": texts}).encode()),
            ]
        write_tar(shard, members)
    replay = {
        "class_path": "mmcl.strategies.ExperienceReplay",
        "init_args": {"buffer_size": 12, "storage": storage},
    }
    options = {"data__num_workers": 1, "trainer__max_epochs": 2}
    runs.finish("alone", replay, **options)
    status, output = runs.start("killed", replay, kill=("step", 7), **options)
    assert status == KILLED, output
    runs.finish("killed", replay, **options)
    assert runs.differences("killed", "alone") == []
    recalls = json.loads((runs.path("alone") / "retrieval.json").read_text())
    assert {each["texts"] for each in recalls} == {9}
    assert {each["images"] for each in recalls} == {4}


def test_the_ledger_counts_rows_of_sources_and_the_share_of_the_card(tmp_path):
    runs = mixed_runs(tmp_path)
    runs.finish("alone", CHAIN)
    tasks = json.loads((runs.path("alone") / "ledger.json").read_text())["tasks"]
    # 8 rows a batch: 2 of the source, from the second task on 1 recalled, the rest new.
    assert [task["samples_new"] for task in tasks] == [2 * 20, 2 * 17]
    assert [task["samples_replayed"] for task in tasks] == [2 * 4 * 2, 2 * 4 * 3]
