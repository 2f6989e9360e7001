"""Each example runs as a user would run it, in a process of its own, and prints its result."""

import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from tests.behaviour.kill_runs import in_process

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LAST_LINES = {
    "bare_loop": r"accuracy of each task: [01]\.\d\d [01]\.\d\d",
    "hf_trainer": r"accuracy of each task: [01]\.\d\d [01]\.\d\d",
    "lightning_module": r"\{'average accuracy': [01]\.\d+, .*\}",
    "llava_lora_replay": r"replay buffer: \{.*: 8\}",
    "own_data": r"tasks: .+ and .+; .+ and .+",
    "own_model": r"loss terms: task \d+\.\d{3}, ewc \d+\.\d{3}",
    "own_strategy": r"loss terms of the last step: task, l2_anchor",
}


def test_every_example_is_known_and_has_fewer_than_100_lines():
    assert [file.stem for file in EXAMPLES] == sorted(LAST_LINES)
    for file in EXAMPLES:
        assert len(file.read_text().splitlines()) < 100, file.name


def run_as_script(file, folder, output):
    """Run a file as ``python FILE`` does in a folder, its output into a file."""
    torch.set_num_threads(1)
    # A process of a fork server would start a server of its own for its loader's workers.
    multiprocessing.set_start_method("fork", force=True)
    os.chdir(folder)
    with output.open("w") as text, redirect_stdout(text), redirect_stderr(text):
        try:
            runpy.run_path(str(file), run_name="__main__")
        except BaseException:
            traceback.print_exc()
            sys.exit(1)


@pytest.mark.slow
@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_runs_and_prints_its_result(file, tmp_path):
    (tmp_path / "empty").mkdir()
    output = tmp_path / "output"
    assert in_process(run_as_script, file, tmp_path / "empty", output) == 0, output.read_text()
    last = output.read_text().strip().splitlines()[-1]
    assert re.fullmatch(LAST_LINES[file.stem], last), last
    assert not list((tmp_path / "empty").iterdir())


@pytest.mark.slow
def test_the_lightning_example_runs_on_two_processes_and_resumes(tmp_path):
    words = [sys.executable, str(ROOT / "examples" / "lightning_module.py"), str(tmp_path), "2"]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    outputs = []
    for _ in range(2):
        done = subprocess.run(words, capture_output=True, text=True, env=settings, check=False)
        assert done.returncode == 0, done.stderr
        outputs.append([line for line in done.stdout.splitlines() if line.startswith("after")])
        (tmp_path / "task_1.pt").unlink()  # the second command trains the last task again
    assert sorted(set(outputs[0])) == sorted(set(outputs[1]))
    assert len(set(outputs[0])) == 2
