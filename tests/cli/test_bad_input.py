"""Bad input gets an error message: what is wrong, what was got, what to do; no stack trace."""

import io
import json

import pytest
import torch
from PIL import Image

import mmcl.cli
from tests.data.small_stream import labelled, picture, write_tar


def refused(given, *wanted):
    """The command failed, with an error message that has all ``wanted`` texts, and no trace."""
    status, out, err = given
    assert status != 0
    assert err.startswith("error: ")
    assert "Traceback" not in out + err
    for part in wanted:
        assert part in err
    return True


def broken_jpeg():
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(file, "JPEG")
    return file.getvalue()[:200]


def with_member(count, name, place, member, content):
    """Good samples, but one member of one of them is another (None: it is not there)."""
    members = labelled(count, name=name)
    stem = f"{name}{place:03d}"
    changed = [(m, c) for m, c in members if m != f"{stem}.{member}"]
    extra = [] if content is None else [(f"{stem}.{member}", content)]
    index = next(i for i, (m, _) in enumerate(changed) if m.startswith(stem))
    return changed[:index] + extra + changed[index:]


def test_a_missing_card(desk):
    output = desk.run("--data.stream", "nowhere/card.yaml")
    assert refused(output, "there is no stream card nowhere/card.yaml", "mmcl data build")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is not there")
def test_a_device_that_is_not_there(desk):
    desk.stream()
    output = desk.run("--trainer.accelerator", "gpu")
    assert refused(output, "Lightning refuses these trainer settings", "trainer.accelerator")


def test_all_errors_of_a_card_are_reported_at_once(desk):
    def spoil(card):
        card["scenarioo"] = card.pop("scenario")
        card["tasks"][0]["trian"] = card["tasks"][0].pop("train")
        card["tasks"][1]["classes"] = ["c2", "nothing"]
        card["tasks"][2]["size"] = -1

    desk.rewrite_card(spoil)
    output = desk.run()
    assert refused(
        output,
        "unknown key 'scenarioo': did you mean 'scenario'?",
        "unknown key 'trian': did you mean 'train'?",
        "classes ['nothing']",
        "size -1",
    )
    assert output[2].count("\n  - ") >= 5


def test_a_missing_shard(desk):
    (desk.folder / "stream" / "b-train.tar").unlink()
    (desk.folder / "stream" / "c-test.tar").unlink()
    assert refused(desk.run(), "2 errors", "b-train.tar", "c-test.tar")


def test_an_empty_shard(desk):
    write_tar(desk.folder / "stream" / "a-train.tar", [])
    assert refused(desk.run(), "a-train.tar", "holds no samples")


def test_a_shard_of_no_bytes(desk):
    (desk.folder / "stream" / "a-train.tar").write_bytes(b"")
    assert refused(desk.run(), "a-train.tar")


def test_a_truncated_tar(desk):
    file = desk.folder / "stream" / "b-test.tar"
    file.write_bytes(file.read_bytes()[:-11_000])
    assert refused(desk.run(), "b-test.tar")


def test_a_broken_jpeg_over_the_allowed_share_ends_the_run_with_its_name(desk):
    members = [("bad.jpg", broken_jpeg()), ("bad.cls", b"0"), *labelled(15, name="atrain")]
    desk.stream(a_train=members)
    assert refused(desk.run(), "bad in a-train.tar", "data.max_bad_fraction=0.01 of 16")


def test_a_broken_jpeg_in_a_test_part_ends_the_run_with_its_name(desk):
    members = [("bad.jpg", broken_jpeg()), ("bad.cls", b"0"), *labelled(4, name="atest")]
    desk.stream(a_test=members)
    assert refused(desk.run(), "test samples of 'task-a'", "bad in a-test.tar")


def test_under_the_allowed_share_the_run_continues_and_names_what_it_skipped(desk):
    bad = [("bad.jpg", broken_jpeg()), ("bad.cls", b"0")]
    desk.stream(
        a_train=[*bad, *labelled(15, name="atrain")], b_test=[*bad, *labelled(5, (2, 3), name="bt")]
    )
    assert desk.run("--data.max_bad_fraction", "0.2")[0] == 0
    errors = json.loads((desk.results / "summary.json").read_text())["errors"]
    assert len(errors) == 2
    assert "bad in a-train.tar" in " ".join(errors)
    assert "bad in b-test.tar" in " ".join(errors)


def test_a_missing_label(desk):
    desk.stream(a_train=with_member(16, "atrain", 3, "cls", None))
    assert refused(desk.run(), "atrain003 in a-train.tar", "it has no label (.cls)")


def test_a_label_outside_the_classes(desk):
    desk.stream(a_train=with_member(16, "atrain", 3, "cls", b"17"))
    assert refused(desk.run(), "atrain003", "its label is 17", "classes 0 to 5")


def test_a_label_of_another_task(desk):
    desk.stream(a_train=with_member(16, "atrain", 3, "cls", b"5"))
    assert refused(desk.run(), "atrain003", "not a class of task 'task-a'")


def test_a_missing_caption(desk):
    desk.stream(task_type="captioning", a_train=with_member(16, "atrain", 3, "txt", None))
    assert refused(desk.run(), "atrain003 in a-train.tar", "it has no caption (.txt)")


def test_a_duplicate_key(desk):
    twice = [("atrain003.png", picture(3)), ("atrain003.cls", b"1")]
    desk.stream(a_train=[*labelled(16, name="atrain"), ("x.png", picture(9)), ("x.cls", b"0"),
                         *twice])  # fmt: skip
    assert refused(desk.run(), "key 'atrain003' comes twice")


def test_zero_test_samples(desk):
    write_tar(desk.folder / "stream" / "c-test.tar", [])
    assert refused(desk.run(), "c-test.tar", "holds no samples")


def test_a_test_part_without_a_readable_sample(desk):
    bad = [(f"{n}.{e}", c) for n in range(3) for e, c in (("jpg", broken_jpeg()), ("cls", b"0"))]
    desk.stream(a_test=bad)
    assert refused(
        desk.run("--data.max_bad_fraction", "1"), "no sample of the test split of 'task-a'"
    )


def plain(config):
    config["model"]["model"] = {"class_path": "tests.cli.plain_model.PlainModel"}


@pytest.mark.parametrize(
    ("strategy", "missing"),
    [("NCM", "model.embed(batch, modality) -> (B, D)"), ("L2P", "PlainModel has none")],
)
def test_a_strategy_that_asks_what_the_model_has_not(desk, strategy, missing):
    desk.configure(strategy, plain)
    assert refused(desk.run(), f"{strategy} needs model.", missing)


def test_debug_shows_the_trace(desk):
    status, _, err = desk.run("--data.stream", "nowhere.yaml", "--debug")
    assert status == 1
    assert "Traceback" in err
    assert "there is no stream card nowhere.yaml" in err


def test_check_finds_the_same_errors(desk):
    (desk.folder / "stream" / "b-train.tar").unlink()
    assert refused(desk.run(command=["check"]), "b-train.tar")
    assert not (desk.folder / "runs").exists()


# What a beginner types.


def test_a_misspelt_strategy_is_answered_with_the_known_ones(desk):
    output = desk.run("--model.strategy", "EWCC")
    assert refused(output, "there is no strategy EWCC: did you mean EWC?", "Finetune", "RanPAC")
    assert len(output[2].splitlines()) == 1


def test_misspelt_settings_are_answered_all_at_once_with_the_nearest(desk):
    def misspell(config):
        config["data"]["globel_batch"] = 8
        config["modle"] = {}
        config["model"]["model"]["init_args"]["modell"] = "tiny"

    desk.configure(change=misspell)
    assert refused(
        desk.run(),
        "3 errors",
        "'data.globel_batch': did you mean 'data.global_batch_size'?",
        "'modle': did you mean 'model'?",
        "OpenCLIP has no argument 'modell': did you mean 'model'?",
    )


@pytest.mark.parametrize("command", ["train", "check", "fit", "predict"])
def test_a_misspelt_option_is_answered_with_the_nearest(desk, command):
    output = desk.run("--data.streem", "digits", command=[command])
    assert refused(output, "there is no option --data.streem: did you mean 'data.stream'?")


def test_a_configuration_that_is_not_there(desk):
    output = desk.give("--config", "configs/quikstart.yaml")
    assert refused(output, "there is no configuration configs/quikstart.yaml")


def test_a_word_where_a_number_is_wanted(desk):
    output = desk.run("--data.global_batch_size", "many")
    assert refused(output, "data.global_batch_size is 'many', expected int")


def test_an_unknown_command(desk):
    assert refused(desk.give("evalute", "x"), "there is no command 'evalute'", "evaluate")


def test_a_stream_that_nobody_can_build(desk):
    assert refused(desk.run("--data.stream", "digitz"), "no stream 'digitz'", "digits")


def test_words_that_a_small_command_does_not_know(desk):
    assert refused(desk.give("compare"), "runs")
    assert refused(desk.give("report", "nowhere"), "there is no run nowhere")
    assert refused(desk.give("data", "list", "--all"), "--all")


@pytest.mark.parametrize(
    ("parents", "output"),
    [((7, 7), "rank 1: error: there is no stream card"), ((7, 1), "")],
)
def test_another_rank_speaks_only_when_rank_0_lives_on(desk, monkeypatch, parents, output):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(mmcl.cli, "_SECONDS_TO_WAIT_FOR_RANK_0", 0.0)
    lives = iter(parents)
    monkeypatch.setattr(mmcl.cli.os, "getppid", lambda: next(lives))
    status, out, err = desk.run("--data.stream", "nowhere.yaml")
    assert (status, out) == (1, "")
    assert err.startswith(output)
    assert bool(err) == bool(output)
