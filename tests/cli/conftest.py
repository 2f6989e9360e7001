"""A desk to give commands at: an empty folder, a small stream, a random CLIP of 25,000 weights."""

import shutil

import pytest
import yaml

from mmcl.cli import main, train
from tests.cli.cli_fixtures import settings, write_chat, write_quiz
from tests.data.small_stream import write_stream
from tests.lightning.small_runs import small_model, strategy_of

SIZES = (16, 12, 12)


class Desk:
    """Gives commands in a folder of its own and captures their output."""

    def __init__(self, folder, capsys):
        self.folder, self.capsys = folder, capsys
        self.card = folder / "stream" / "small.yaml"
        self.config = folder / "small_run.yaml"

    def stream(self, sizes=SIZES, **changes):
        """Write a stream of noise; ``changes`` replaces the members of shards."""
        (self.folder / "stream").mkdir(exist_ok=True)
        write_stream(self.folder / "stream", sizes, **changes)

    def rewrite_card(self, change):
        """Change the card by a function of its content."""
        content = yaml.safe_load(self.card.read_text())
        change(content)
        self.card.write_text(yaml.safe_dump(content, sort_keys=False))

    def configure(self, strategy="Finetune", change=lambda config: None):
        """Write the configuration of a run over one epoch of every task."""
        small_model(self.folder)
        config = {
            "seed_everything": 0,
            "model": {
                "model": {
                    "class_path": "mmcl.models.OpenCLIP",
                    "init_args": {"model": "small.json"},
                },
                "strategy": strategy_of(strategy),
            },
            "data": {"stream": "stream/small.yaml", "global_batch_size": 8},
            "trainer": {"max_epochs": 1, "accelerator": "cpu"},
        }
        change(config)
        self.config.write_text(yaml.safe_dump(config))

    def ask(self, strategy="LoRA", change=lambda config: None):
        """Take a model that answers, and a stream of questions, in place of a CLIP and classes."""
        self.card = write_quiz(self.folder / "stream")
        write_chat(self.folder / "chat")
        config = settings(strategy_of(strategy, "instruction"))
        change(config)
        self.config.write_text(yaml.safe_dump(config))

    def give(self, *words):
        """Give a command; return its exit status and both outputs."""
        self.capsys.readouterr()
        status = main([str(word) for word in words])
        output = self.capsys.readouterr()
        return status, output.out, output.err

    def run(self, *words, command=()):
        """Give a command with the configuration of this desk."""
        return self.give(*command, "--config", self.config, *words)

    @property
    def results(self):
        """The folder of the run."""
        return self.folder / "runs" / self.config.stem


@pytest.fixture
def desk(tmp_path, capsys, monkeypatch):
    """A desk with a good stream and a good configuration, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    # Drawing the page takes longer than the run; one test lets it be drawn.
    monkeypatch.setattr(train, "write_report", lambda folder: folder / "report.html")
    desk = Desk(tmp_path, capsys)
    desk.stream()
    desk.configure()
    return desk


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a desk at which a run was finished; to be copied."""
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def learned(desk, finished):
    """A desk with a finished run."""
    if not (finished / "runs").exists():
        assert desk.run()[0] == 0
        shutil.copytree(desk.folder / "runs", finished / "runs")
    else:
        shutil.copytree(finished / "runs", desk.folder / "runs")
    return desk


@pytest.fixture(scope="session")
def finished_answers(tmp_path_factory):
    """The folder of a desk at which a run of a model that answers was finished."""
    return tmp_path_factory.mktemp("answers")


@pytest.fixture
def asking(desk):
    """A desk with a model that answers and a stream of questions."""
    desk.ask()
    return desk


@pytest.fixture
def answered(asking, finished_answers):
    """A desk with a finished run of a model that answers."""
    if not (finished_answers / "runs").exists():
        assert asking.run()[0] == 0
        shutil.copytree(asking.folder / "runs", finished_answers / "runs")
    else:
        shutil.copytree(finished_answers / "runs", asking.folder / "runs")
    return asking
