"""``mmcl export <run> <target>``: the learned model in a form that other libraries load."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from mmcl.commands import native
from mmcl.commands.sequence import run_folder
from mmcl.commands.words import CommandParser, UnknownWords
from mmcl.core import Strategy, write_atomic
from mmcl.data.source import sha256_of
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
    if given.target.exists():
        raise UnknownWords(f"{given.target} exists: give a new name, or remove this one")
    cli = ContinualCLI(["--config", str(folder / "config.yaml"), *rest], program="mmcl export")
    run = SequenceRun(cli.make_module, cli.make_trainer, cli.make_data(), folder, seed=cli.seed)
    module = run.module_after(_tasks(given.after, run))
    module.eval()
    form = given.form or native.form_of(module)
    write = {
        "open_clip": _write_clip,
        "transformers": native.write_model,
        "peft": native.write_adapter,
    }[form]
    print(write(module, given.target, half=given.half))
    return 0


def _tasks(wanted: int | None, run: SequenceRun) -> int | None:
    state = run.folder.state()
    done = 0 if state is None else state.done
    if wanted is not None and not 0 <= wanted <= done:
        raise UnknownWords(
            f"--after is {wanted}, and the run has learned {done} tasks: give 0 to {done}"
        )
    return wanted


def _write_clip(module: ContinualModule, file: Path, *, half: bool) -> str:
    clip = getattr(module.model, "clip", None)
    if clip is None:
        raise TypeError(
            f"{type(module.model).__name__} has no open_clip model to export: use --as transformers"
        )
    if file.suffix != ".safetensors":
        raise UnknownWords(
            f"{file} does not end in .safetensors, by which open_clip knows such files: rename it"
        )
    beyond = [member for member in native.members_of(module.strategy) if _is_beyond(member)]
    if beyond:
        names = ", ".join(type(member).__name__ for member in beyond)
        warnings.warn(
            f"{names} answers with more than the CLIP's weights (prompts or another head), which "
            "are not in this file",
            stacklevel=2,
        )
    state = {name: value.detach().contiguous() for name, value in clip.state_dict().items()}
    if half:
        state = {name: value.half() for name, value in state.items()}
    write_atomic(file, lambda path: save_file(state, path))
    return f"{file}: {file.stat().st_size} bytes, sha256 {sha256_of(file)}"


def _is_beyond(strategy: Strategy) -> bool:
    return strategy.uses("prompts") or strategy.uses("refine")
