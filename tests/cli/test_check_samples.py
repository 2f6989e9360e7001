"""What passes ``mmcl check`` is not refused by the run for a reason that check could see."""

import pytest
import yaml

from mmcl.data.validate.sample_counts import SplitCount
from mmcl.models import ImageTextToText
from tests.cli.test_check import line
from tests.data.small_stream import coloured, dialogue, write_tar

WORDS = "word " * 200


def with_text(question="<image>\nWhich?", answer="red", every=1, part="a-train", count=8, image=1):
    """Members of a shard, ``every`` n-th of which is another question and answer."""
    members = coloured(count, 0, part)
    kept = []
    for number in range(count):
        png, json = members[2 * number : 2 * number + 2]
        if number % every:
            kept += [png, json]
            continue
        kept += [png] * image + [(json[0], dialogue(question, answer))]
    return members if not every else kept


def shard(part, **changes):
    """A change of the desk: another shard of its stream."""

    def change(desk, config):
        write_tar(desk.folder / "stream" / f"{part}.tar", with_text(part=part, **changes))

    return change


def setting(path, value):
    """A change of the desk: another setting."""

    def change(desk, config):
        *names, last = path.split(".")
        for name in names:
            config = config.setdefault(name, {})
        config[last] = value

    return change


def model(**arguments):
    """A change of the desk: other arguments of the model."""
    return lambda desk, config: config["model"]["model"]["init_args"].update(arguments)


def fill_output_dir(desk, config):
    (desk.folder / "full").write_text("a file")
    config["output_dir"] = "full"


def mute(desk, config):
    def generate(*args, **kwargs):
        raise RuntimeError("this model cannot answer")

    desk.patch.setattr(ImageTextToText, "generate", generate)


REFUSED = {
    "long answers of the first task": (shard("a-train", answer=WORDS),),
    "long answers of every second sample": (shard("b-train", answer=WORDS, every=2),),
    "long questions of the last task": (shard("c-train", question=WORDS),),
    "long questions of a test split": (shard("b-test", question=WORDS, count=4),),
    "a limit that is too low for the answers": (model(max_length=14),),
    "long questions although long answers are cut": (
        shard("a-train", question=WORDS), model(too_long="cut"),
    ),
    "marks without images": (shard("c-train", question="<image> and <image>?"),),
    "images that are missing": (shard("b-train", image=0),),
    "an end token in answers": (shard("c-train", answer="red</s>"),),
    "an end token in a question of a test": (
        shard("c-test", question="</s> which?", count=4, every=4),
    ),
    "a fraction that allows fewer": (
        shard("a-train", answer=WORDS, every=4), setting("data.max_bad_fraction", 0.2),
    ),
    "no validation part for the best weights": (setting("keep_best", "loss"),),
    "a schedule without an end": (
        setting("model.lr_schedule", "cosine"), setting("trainer.max_epochs", -1),
    ),
    "an output directory that is a file": (fill_output_dir,),
    "batches that are too small to accumulate": (
        setting("data.global_batch_size", 2), setting("trainer.accumulate_grad_batches", 4),
    ),
    "a model that gives no answer": (mute,),
}  # fmt: skip
ACCEPTED = {
    "long answers that are cut": (shard("b-train", answer=WORDS), model(too_long="cut")),
    "long answers of a test, which are only compared": (
        shard("b-test", answer=WORDS, count=4),
    ),
    "a fraction that allows more": (
        shard("a-train", answer=WORDS, every=4), setting("data.max_bad_fraction", 0.3),
    ),
    "samples of text alone": (shard("a-train", question="Which?", image=0, every=2),),
}  # fmt: skip


@pytest.fixture
def prepared(asking, monkeypatch):
    """A desk that takes changes of its stream and of its configuration."""
    asking.patch = monkeypatch

    def prepare(changes):
        config = yaml.safe_load(asking.config.read_text())
        for change in changes:
            change(asking, config)
        asking.config.write_text(yaml.safe_dump(config))
        return asking

    return prepare


@pytest.mark.parametrize("case", REFUSED)
def test_check_refuses_what_the_run_would_refuse(prepared, case):
    status, out, err = prepared(REFUSED[case]).run(command=["check"])
    assert status != 0
    assert err.startswith("error: ")
    assert "the configuration works" not in out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:task 'ask-b'. 8 samples were learned in part")
@pytest.mark.parametrize("case", [*REFUSED, *ACCEPTED])
def test_check_and_the_run_agree(prepared, case):
    desk = prepared((REFUSED | ACCEPTED)[case])
    checked, out, err = desk.run(command=["check"])
    trained = desk.run()[0]
    assert bool(checked) == bool(trained) == (case in REFUSED), err
    assert ("the configuration works" in out) == (not checked)


def test_samples_are_counted_by_the_models_own_tokens(prepared):
    desk = prepared((shard("b-train", answer=WORDS), model(too_long="cut")))
    status, out, _ = desk.run(command=["check"])
    assert status == 0
    counts = [row.split() for row in out.splitlines() if row.startswith("ask-")]
    rows = {(row[0], row[1]): row[2:] for row in counts if row[1] in ("train", "test")}
    assert [rows["ask-b", "train"][index] for index in (0, 3, 4)] == ["8", "8", "0"]
    assert int(rows["ask-b", "train"][2]) > 200
    assert [rows["ask-a", "train"][index] for index in (0, 3, 4)] == ["8", "0", "0"]
    assert line(out, "limit").startswith("64")
    assert out.count("learned in part: btrain") == 0  # keys are those of the shard
    assert out.count("learned in part: ") == 8
    assert line(out, "  text").endswith("trainable")
    assert "in a step on the longest samples (weights " in line(out, "memory by formula")


def test_a_part_of_the_samples_is_named_as_a_part(prepared):
    desk = prepared(())
    status, out, _ = desk.run("--counted", "3", command=["check"])
    assert status == 0
    assert "a part: 3 of 8" in out
    status, _, err = desk.run("--counted", "few", command=["check"])
    assert status == 1
    assert "--counted is 'few', expected a number of samples, 0 = all" in err


@pytest.mark.filterwarnings("ignore:task 'ask-b'. 2 samples were learned in part")
def test_the_summary_counts_and_names_answers_that_were_cut(prepared):
    desk = prepared((shard("b-train", answer=WORDS, every=4), model(too_long="cut")))
    assert desk.run()[0] == 0
    warnings = yaml.safe_load((desk.results / "summary.json").read_text())["warnings"]
    (cut,) = [text for text in warnings if "learned in part" in text]
    assert cut.startswith("task 'ask-b': 2 samples were learned in part, without the end of the")
    assert "b-train000: " in cut
    assert "tokens are beyond max_length 64" in cut


def test_long_answers_are_counted_and_named_where_they_are_left_out(prepared):
    desk = prepared(
        (shard("b-train", answer=WORDS, every=4), setting("data.max_bad_fraction", 0.5))
    )
    assert desk.run()[0] == 0
    errors = yaml.safe_load((desk.results / "summary.json").read_text())["errors"]
    assert len(errors) == 2
    assert all("b-train" in e and "more than the model's max_length 64" in e for e in errors)


def count_of(size, counted, errors):
    names = [f"e{number}" for number in range(errors)]
    task = type("Named", (), {"name": "t"})
    return SplitCount(task, "train", size, counted, None, errors=names)


@pytest.mark.parametrize(
    ("count", "fraction", "visited", "ends"),
    [
        (count_of(100, 100, 1), 0.01, 100, False),
        (count_of(100, 100, 2), 0.01, 100, True),
        (count_of(100, 100, 2), 0.01, 40, False),  # the run sees less than half of them
        (count_of(1000, 10, 1), 0.01, 1000, False),  # one of a part is no sign
        (count_of(1000, 10, 2), 0.01, 1000, True),
        (count_of(3, 3, 1), 0.01, 3, True),
        (count_of(1, 1, 1), 1.0, 1, False),
    ],
)
def test_a_run_ends_if_it_meets_more_bad_samples_than_it_may(count, fraction, visited, ends):
    assert bool(count.refusal(fraction, visited)) == ends


def test_a_histogram_counts_every_sample_once():
    count = count_of(4, 4, 0)
    count.lengths = [(1, 0), (10, 1), (11, 2), (80, 3)]
    ranges = count.histogram()
    assert ranges[0] == (10, 2)
    assert ranges[1] == (20, 1)
    assert ranges[-1] == (80, 1)
    assert sum(number for _, number in ranges) == 4
