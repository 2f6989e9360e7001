"""``mmcl registry``, ``mmcl upgrade`` and ``mmcl recycle``: bases, adapters, and the next base."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from mmcl.cli.parser import CommandParser, UsageError
from mmcl.registry.closed_form import recycle_head
from mmcl.registry.records import AdapterRecord, BaseRecord, Registry
from mmcl.registry.recycle import RecycleOptions, Recycling, Scores
from mmcl.registry.recycle_report import HEADER, percent, table_rows, write_recycle_report
from mmcl.registry.register import describe_adapter, describe_base
from mmcl.registry.sources import Adapter, find_adapter
from mmcl.registry.upgrade import check_fit, direct_scores
from mmcl.report.tables import render

DOES_NOT_FIT = 5
"""Exit status of ``mmcl upgrade check`` for an adapter that does not fit."""


def registry(argv: Sequence[str]) -> int:
    """Register base models and adapters, and list or show them."""
    parser = CommandParser(prog="mmcl registry", description=registry.__doc__)
    actions = parser.add_subparsers(dest="action", required=True, parser_class=CommandParser)
    add = actions.add_parser("add", help="add a base model or an adapter")
    add.add_argument("what", choices=("base", "adapter"))
    add.add_argument(
        "source", help="base: RUN@task, folder, name or MODEL:PRETRAINED; adapter: RUN@task or a "
        "peft folder",
    )  # fmt: skip
    add.add_argument("--id", required=True, help="name of the record, unique in the registry")
    add.add_argument("--parent", default="", help="id of the base that this one comes from")
    add.add_argument(
        "--stage", default="", choices=("", "cpt", "dap", "cft"), help="stage of its last training"
    )
    add.add_argument("--from", dest="old_base", help="base of a peft folder (as the folder says)")
    listed = actions.add_parser("list", help="list the bases, as a tree, and their adapters")
    shown = actions.add_parser("show", help="show one record")
    shown.add_argument("id")
    for action in (add, listed, shown):
        _add_registry(action)
    given = parser.parse_args(argv)
    records = Registry(given.registry)
    if given.action == "add":
        return _add(given, records)
    if given.action == "show":
        return _show(given.id, records)
    print(_listing(records))
    return 0


def upgrade(argv: Sequence[str]) -> int:
    """Check whether an adapter fits the next base model, and what it scores there as it is.

    Exit status 0: it fits; 5: it does not.
    """
    parser = CommandParser(prog="mmcl upgrade", description=upgrade.__doc__)
    actions = parser.add_subparsers(dest="action", required=True, parser_class=CommandParser)
    check = actions.add_parser("check", description=upgrade.__doc__, help="check an adapter")
    _add_adapter(check)
    check.add_argument("--test_samples", type=int, default=1000, help="at most (%(default)s)")
    given, rest = check_arguments(parser, argv)
    records = Registry(given.registry)
    adapter = find_adapter(given.adapter, records, given.old_base)
    with TemporaryDirectory() as folder:
        checks = check_fit(adapter, given.to, records, Path(folder))
        for line in checks:
            print(f"{'ok' if line.fits else 'differs':8} {line.what}: {line.detail}")
        fits = all(line.fits for line in checks)
        if given.data is None:
            print("scores: not measured, because there is no --data")
        elif not fits:
            print("scores: not measured, because the adapter does not fit")
        else:
            options = RecycleOptions(
                given.adapter, given.to, "direct", given.data, given.task, given.data_dir,
                test_samples=given.test_samples,
            )  # fmt: skip
            scores = direct_scores(adapter, options, records, Path(folder) / "recycling", rest)
            _print_scores(scores)
    print("the adapter fits" if fits else "the adapter does not fit")
    return 0 if fits else DOES_NOT_FIT


def check_arguments(
    parser: CommandParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Parse arguments; what is not known has to be a setting of a run, ``--group.name value``."""
    given, rest = parser.parse_known_args(argv)
    for word in rest:
        if word.startswith("--") and "." not in word.partition("=")[0]:
            parser.error(f"unrecognized arguments: {word}")
    return given, rest


def recycle(argv: Sequence[str]) -> int:
    """Move an adapter to the next base model: as it is, as start, as teacher, or both.

    Qin et al. 2023, arXiv:2305.08702. Settings of the runs, such as --trainer.accelerator, are
    those of mmcl train. The same command resumes a stopped recycling.
    """
    parser = CommandParser(prog="mmcl recycle", description=recycle.__doc__)
    _add_adapter(parser)
    default = {name: field.default for name, field in RecycleOptions.__dataclass_fields__.items()}
    parser.add_argument(
        "--mode", required=True, choices=("direct", "init", "distill", "both"),
        help="direct: no training; init: train from direct; distill: train the base with the old "
        "model as teacher; both: init and distill",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder of the result")
    for name, text in _OPTIONS.items():
        kind = float if name in _FLOATS else int
        shown = f"{text} ({'%(default)s' if default[name] is not None else 'as the run, or 1e-4'})"
        parser.add_argument(f"--{name}", type=kind, default=default[name], help=shown)
    parser.add_argument(
        "--against", choices=("scratch", "nothing"), default="scratch",
        help="also train the next base alone, at equal FLOPs (%(default)s)",
    )  # fmt: skip
    given, rest = check_arguments(parser, argv)
    records = Registry(given.registry)
    adapter = find_adapter(given.adapter, records, given.old_base)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if adapter.kind == "head":
        return _recycle_head(given, adapter, records, rest, console)
    options = RecycleOptions(
        given.adapter, given.to, given.mode, given.data or "", given.task, given.data_dir,
        **{name: getattr(given, name) for name in _OPTIONS},
        against_scratch=given.against == "scratch",
    )  # fmt: skip
    recycling = Recycling(adapter, options, records, given.out, rest, console.print)
    result = recycling.run()
    written = write_recycle_report(result, given.out)
    print(_table(HEADER, table_rows(result)))
    moved = "adapter" if adapter.kind == "lora" else "model"
    print(f"{moved} for direct use: {recycling.moved}")
    if result.recycled is not None:
        print(f"recycled run: {given.out / 'run'}")
    print(f"results: {', '.join(str(file) for file in written)}")
    return 0


_OPTIONS = {
    "samples": "labeled training samples, equally many of each class",
    "test_samples": "test samples, at most",
    "steps": "optimizer steps",
    "evaluate_every": "steps between two evaluations",
    "batch_size": "samples of a step",
    "learning_rate": "learning rate",
    "alpha": "weight of the distillation, 0 to 1",
    "temperature": "temperature of the distillation",
    "hidden_weight": "weight of the error of image embeddings, 0 = none",
    "seed": "seed of samples and runs",
}
_FLOATS = ("learning_rate", "alpha", "temperature", "hidden_weight")


def _add_registry(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--registry", type=Path, default=Path("registry"), help="folder (%(default)s)"
    )


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", help="id of the registry, RUN@task, or a peft folder")
    parser.add_argument(
        "--to", required=True, metavar="BASE",
        help="next base: id of the registry, RUN@task, folder, file, name or MODEL:PRETRAINED",
    )  # fmt: skip
    parser.add_argument("--from", dest="old_base", help="base of a peft folder (as it says)")
    parser.add_argument("--data", metavar="CARD", help="card, or name of a stream")
    parser.add_argument("--task", default="", help="task of the card (the adapter's)")
    parser.add_argument("--data_dir", default="data", help="folder of built streams (%(default)s)")
    _add_registry(parser)


def _add(given: argparse.Namespace, records: Registry) -> int:
    if given.what == "base":
        if given.old_base is not None:
            raise UsageError("--from is of adapters: leave it out, or use --parent")
        with TemporaryDirectory() as folder:
            base = describe_base(
                given.source, records, Path(folder),
                name=given.id, parent=given.parent, stage=given.stage,
            )  # fmt: skip
        print(f"base '{base.id}', fingerprint {base.fingerprint[:12]}: {records.add(base)}")
        return 0
    for name in ("parent", "stage"):
        if getattr(given, name):
            raise UsageError(f"--{name} is of bases: leave it out")
    adapter = describe_adapter(given.source, records, name=given.id, old_base=given.old_base)
    file = records.add(adapter)
    print(f"adapter '{adapter.id}' ({adapter.kind}), base {adapter.base[:12]}: {file}")
    if records.base_of(adapter) is None:
        print(
            f"its base {adapter.base[:12]} is not registered in {given.registry}: add it with mmcl "
            "registry add base"
        )
    return 0


def _show(name: str, records: Registry) -> int:
    record = records.find(name)
    if record is None:
        ids = [base.id for base in records.bases()] + [one.id for one in records.adapters()]
        known = ", ".join(ids) or "none"
        raise ValueError(f"there is no record '{name}' in {records.folder} (records: {known})")
    for key, value in asdict(record).items():
        rows = value.items() if isinstance(value, dict) else [("", value)]
        for inner, one in rows:
            text = ", ".join(map(str, one)) if isinstance(one, list | tuple) else str(one)
            print(f"{key}{'.' if inner else ''}{inner}: {text or '-'}")
    if isinstance(record, AdapterRecord):
        base = records.base_of(record)
        print(f"registered base: {'none' if base is None else base.id}")
    return 0


def _listing(records: Registry) -> str:
    header = ("base", "fingerprint", "stage", "evaluation", "source")
    rows = [
        (f"{'  ' * depth}{base.id}", base.fingerprint[:12], base.stage or "-", _scores(base),
         base.source)
        for depth, base in records.tree()
    ]  # fmt: skip
    own = ("adapter", "kind", "base", "rank", "task", "evaluation", "source")
    bases = {base.fingerprint: base.id for base in records.bases()}
    adapters = [
        (a.id, a.kind, bases.get(a.base, f"{a.base[:12]} (not registered)"), str(a.rank or "-"),
         a.task or "-", _scores(a), a.source)
        for a in records.adapters()
    ]  # fmt: skip
    if not rows and not adapters:
        return f"{records.folder} has no records: add one with mmcl registry add"
    parts = [_table(h, r) for h, r in ((header, rows), (own, adapters)) if r]
    return "\n".join(parts)


def _scores(record: BaseRecord | AdapterRecord) -> str:
    return ", ".join(f"{name} {100 * v:.1f}" for name, v in record.evaluation.items()) or "-"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    table = Table(box=None, pad_edge=False)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console()
    return render([table], max(console.width, 100), False).rstrip("\n")


def _print_scores(scores: Scores) -> None:
    print(f"scores, %: old base and adapter {percent(scores.old)}, next base alone "
          f"{percent(scores.bare)}, next base and adapter {percent(scores.direct)}")  # fmt: skip


def _recycle_head(
    given: argparse.Namespace, adapter: Adapter, records: Registry, rest: Sequence[str],
    console: Console,
) -> int:  # fmt: skip
    head = recycle_head(
        adapter, given.to, records, given.out, mode=given.mode, stream=given.data or "",
        data_dir=given.data_dir, changes=rest, log=console.print,
    )  # fmt: skip
    print(_table(("state", *head.tasks), [(name, *map(percent, row)) for name, row in head.rows]))
    print(f"recycled run: {given.out / 'run'}")
    return 0
