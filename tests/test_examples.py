"""Each example runs as a user would run it, in a process of its own, and prints its result."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LAST_LINES = {
    "bare_loop": r"accuracy of each task: [01]\.\d\d [01]\.\d\d",
    "lightning_module": r"memory: \{.*\}",
    "llava_lora_replay": r"replay buffer: \{.*: 8\}",
    "own_data": r"tasks: .+ and .+; .+ and .+",
    "own_model": r"loss terms: task \d+\.\d{3}, ewc \d+\.\d{3}",
    "own_strategy": r"loss terms of the last step: task, l2_anchor",
}


def test_every_example_is_known_and_has_fewer_than_60_lines():
    assert [file.stem for file in EXAMPLES] == sorted(LAST_LINES)
    for file in EXAMPLES:
        assert len(file.read_text().splitlines()) < 60, file.name


@pytest.mark.slow
@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_runs_and_prints_its_result(file, tmp_path):
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [sys.executable, str(file)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    last = done.stdout.strip().splitlines()[-1]
    assert re.fullmatch(LAST_LINES[file.stem], last), last
    assert not list(tmp_path.iterdir())
