"""``mmcl export <run> <file>``: the learned model as a checkpoint that open_clip loads itself."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from mmcl.commands.sequence import run_folder
from mmcl.commands.words import CommandParser
from mmcl.core import write_atomic
from mmcl.lightning.cli import ContinualCLI
from mmcl.lightning.sequence import SequenceRun


def main(argv: Sequence[str]) -> int:
    """Write the model of a run as safetensors, after its last task or an earlier one."""
    parser = CommandParser(prog="mmcl export", description=main.__doc__)
    parser.add_argument("run", help="folder of a run, or its name under runs/")
    parser.add_argument("file", type=Path, help="where to write, ending in .safetensors")
    parser.add_argument("--after", type=int, help="tasks learned; default: all that the run has")
    parser.add_argument("--half", action="store_true", help="in float16")
    given, rest = parser.parse_known_args(argv)
    folder = run_folder(given.run)
    cli = ContinualCLI(["--config", str(folder / "config.yaml"), *rest], program="mmcl export")
    run = SequenceRun(cli.make_module, cli.make_trainer, cli.make_data(), folder, seed=cli.seed)
    module = run.module_after(given.after)
    clip = getattr(module.model, "clip", None)
    if clip is None:
        raise TypeError(f"{type(module.model).__name__} has no open_clip model to export")
    state = {name: value.detach().contiguous() for name, value in clip.state_dict().items()}
    if given.half:
        state = {name: value.half() for name, value in state.items()}
    write_atomic(given.file, lambda path: save_file(state, path))
    mark = hashlib.sha256(given.file.read_bytes()).hexdigest()
    print(f"{given.file}: {given.file.stat().st_size} bytes, sha256 {mark}")
    return 0
