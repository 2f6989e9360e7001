"""``mmcl export <run> <target>``: write the trained model in a format of another library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmcl.cli.parser import CommandParser, UsageError
from mmcl.cli.train import run_folder
from mmcl.export import FORMATS, default_format
from mmcl.lightning.cli import ContinualCLI
from mmcl.lightning.continual_run import ContinualRun


def main(argv: Sequence[str]) -> int:
    """Write the model of a run, after its last task or an earlier one, for another library."""
    parser = CommandParser(prog="mmcl export", description=main.__doc__)
    parser.add_argument("run", help="run directory, or a run's name under runs/")
    parser.add_argument(
        "target", type=Path, help="new folder, or for open_clip a new .safetensors file"
    )
    parser.add_argument(
        "--as", dest="form", choices=tuple(FORMATS),
        help="open_clip: one file; transformers: folder of the full model, adapters merged; peft: "
        "folder of the adapter alone (what fits the model)",
    )  # fmt: skip
    parser.add_argument("--after", type=int, help="number of trained tasks (all)")
    parser.add_argument("--half", action="store_true", help="save in float16")
    given, rest = parser.parse_known_args(argv)
    folder = run_folder(given.run)
    if given.target.exists():
        raise UsageError(f"{given.target} exists: give a new name, or remove this one")
    cli = ContinualCLI(["--config", str(folder / "config.yaml"), *rest], program="mmcl export")
    run = ContinualRun(cli.make_module, cli.make_trainer, cli.make_data(), folder, seed=cli.seed)
    module = run.load_after(_tasks(given.after, run))
    module.eval()
    form = given.form or default_format(module)
    if form == "open_clip" and given.target.suffix != ".safetensors":
        raise UsageError(
            f"{given.target} does not end in .safetensors, by which open_clip knows such files: "
            "rename it"
        )
    print(FORMATS[form](module, given.target, half=given.half))
    return 0


def _tasks(wanted: int | None, run: ContinualRun) -> int | None:
    state = run.folder.state()
    done = 0 if state is None else state.finished_tasks
    if wanted is not None and not 0 <= wanted <= done:
        raise UsageError(
            f"--after is {wanted}, and the run has trained {done} tasks: give 0 to {done}"
        )
    return wanted
