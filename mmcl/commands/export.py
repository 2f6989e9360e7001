"""``mmcl export <run> <target>``: the learned model in a form that other libraries load."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from mmcl.commands import native
from mmcl.commands.sequence import run_folder
from mmcl.commands.words import CommandParser
from mmcl.core import write_atomic
from mmcl.lightning.cli import ContinualCLI
from mmcl.lightning.module import ContinualModule
from mmcl.lightning.sequence import SequenceRun

_FORMS = ("open_clip", "transformers", "peft")


def main(argv: Sequence[str]) -> int:
    """Write the model of a run, after its last task or an earlier one, for another library."""
    parser = CommandParser(prog="mmcl export", description=main.__doc__)
    parser.add_argument("run", help="folder of a run, or its name under runs/")
    parser.add_argument("target", type=Path, help="a new folder, or for open_clip a .safetensors")
    parser.add_argument(
        "--as", dest="form", choices=_FORMS,
        help="open_clip: one file; transformers: a whole model folder, adapters merged; peft: a "
        "folder with the adapter alone; default: what fits the model",
    )  # fmt: skip
    parser.add_argument("--after", type=int, help="tasks learned; default: all that the run has")
    parser.add_argument("--half", action="store_true", help="in float16")
    given, rest = parser.parse_known_args(argv)
    folder = run_folder(given.run)
    cli = ContinualCLI(["--config", str(folder / "config.yaml"), *rest], program="mmcl export")
    run = SequenceRun(cli.make_module, cli.make_trainer, cli.make_data(), folder, seed=cli.seed)
    module = run.module_after(given.after)
    module.eval()
    form = given.form or native.form_of(module)
    if form == "open_clip":
        _open_clip(module, given.target, given.half)
    elif form == "transformers":
        print(native.write_model(module, given.target, half=given.half))
    else:
        print(native.write_adapter(module, given.target, half=given.half))
    return 0


def _open_clip(module: ContinualModule, file: Path, half: bool) -> None:
    clip = getattr(module.model, "clip", None)
    if clip is None:
        raise TypeError(
            f"{type(module.model).__name__} has no open_clip model to export: use --as transformers"
        )
    state = {name: value.detach().contiguous() for name, value in clip.state_dict().items()}
    if half:
        state = {name: value.half() for name, value in state.items()}
    write_atomic(file, lambda path: save_file(state, path))
    mark = hashlib.sha256(file.read_bytes()).hexdigest()
    print(f"{file}: {file.stat().st_size} bytes, sha256 {mark}")
