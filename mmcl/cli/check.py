"""``mmcl check --config X``: dry run that prints estimates of time and memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mmcl.cli.train import with_progress
from mmcl.data.validate.sample_counts import COUNTED, SplitCount
from mmcl.evaluation import AccuracyMatrix
from mmcl.evaluation.gates import expect_known
from mmcl.export.start_weights import prepare_start
from mmcl.lightning.config.cli import ContinualCLI
from mmcl.lightning.continual_run import SCORES, ContinualRun, first_process
from mmcl.lightning.datamodule import ContinualDataModule
from mmcl.lightning.dry_run import ROWS, DryRunReport, dry_run
from mmcl.lightning.run_dir import RunDirectory
from mmcl.lightning.stages.lineage import START
from mmcl.lightning.summarize import model_name, name_of
from mmcl.models.hf_vlm.decoding.image_cache import MAX_CACHE_BYTES
from mmcl.models.hf_vlm.memory_estimate import MemoryEstimate, Workload, estimate_memory
from mmcl.report.formatting import size

DESCRIPTION = (
    "Dry run: load model and data, verify every shard, count the tokens of samples, evaluate 32 "
    "samples of every task, train for two steps, the first on the longest samples, and print "
    "estimates of time and memory. What would end the run is an error. Nothing is written. "
    f"--counted N counts N samples of every split (default {COUNTED}, 0 = all)."
)
_NAMED = 20
"""Bad samples that are printed; the others are counted."""
_BAR = 24
"""Width of the longest bar of a histogram in characters."""


def main(argv: Sequence[str]) -> int:
    """Check a configuration with a dry run, and print the estimates."""
    argv, counted = _take_counted(argv)
    cli = ContinualCLI(argv, program="mmcl check", description=DESCRIPTION)
    RunDirectory(cli.folder, writes=False).check_config(cli.plain())
    _expect_writable(cli.folder)

    def make_data() -> ContinualDataModule:
        return with_progress(cli.make_data())

    # Refuses settings that do not go together, and builds the loggers.
    run = ContinualRun(
        cli.make_module, cli.make_trainer, make_data(), cli.folder, gates=cli.make_gates(),
        budget=cli.make_budget(), keep_best=cli.config["keep_best"], loggers=cli.make_loggers(),
    )  # fmt: skip
    with _start_weights(cli):
        report = dry_run(cli.make_module, cli.make_trainer, make_data, counted)
    expect_known(run.gates, AccuracyMatrix.for_stream(report.stream, SCORES))
    if first_process():
        config = cli.plain()["model"]
        names = f"{model_name(config['model'])}, {name_of(config['strategy'])}"
        console = Console(highlight=False, markup=False)
        console.print(_tasks_table(report))
        for table in _token_tables(report.counts):
            console.print(table)
        console.print(_costs_table(report, names))
        bad = [error for count in report.counts for error in count.errors]
        _print_some(console, "cannot be read", [*bad, *report.errors])
        notes = [note for count in report.counts for note in count.notes]
        _print_some(console, "learned in part", notes)
        console.print(f"the configuration works; nothing was written to {cli.folder}")
    return 0


@contextmanager
def _start_weights(cli: ContinualCLI) -> Iterator[None]:
    """Context in which the weights that a run starts from are in a temporary folder."""
    if not cli.start_from or (cli.folder / START).is_file():
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        cli.run_folder = Path(folder)
        prepare_start(cli.run_folder, cli.start_from, is_first=True)
        yield


def _print_some(console: Console, what: str, lines: Sequence[str]) -> None:
    known = list(dict.fromkeys(lines))
    for line in known[:_NAMED]:
        console.print(f"{what}: {line}")
    if len(known) > _NAMED:
        console.print(f"{what}: {len(known) - _NAMED} more")


def _take_counted(argv: Sequence[str]) -> tuple[list[str], int | None]:
    """Return the options without ``--counted N``, and N; None = all samples."""
    words = [part for word in argv for part in _divided(word)]
    if "--counted" not in words:
        return list(argv), COUNTED
    place = words.index("--counted")
    stated = words[place + 1] if place + 1 < len(words) else ""
    if not stated.isdecimal():
        raise ValueError(f"--counted is {stated!r}, expected a number of samples, 0 = all")
    return words[:place] + words[place + 2 :], int(stated) or None


def _divided(word: str) -> list[str]:
    return word.split("=", 1) if word.startswith("--counted=") else [word]


def _expect_writable(folder: Path) -> None:
    """Check that the run directory can be made, or an OSError."""
    first = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not first.is_dir() or not os.access(first, os.W_OK):
        raise OSError(
            f"the run directory {folder} cannot be made: {first} is no folder that can be written "
            "to; change that, or give --output_dir another folder"
        )


def _tasks_table(report: DryRunReport) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("task", "type"):
        table.add_column(title)
    for title in ("training", "test", "steps", f"score of {ROWS} samples"):
        table.add_column(title, justify="right")
    for index, task in enumerate(report.stream.all_tasks):
        score = report.scores[index]
        table.add_row(
            task.name,
            "eval-only" if task.is_eval_only else task.task_type,
            "-" if task.is_eval_only else f"{task.size:,}",
            f"{task.test_size:,}",
            "-" if task.is_eval_only else f"{report.steps[index]:,}",
            "-" if score is None else f"{100 * score:.0f} %",
        )
    return table


def _token_tables(counts: Sequence[SplitCount]) -> list[Table]:
    """Return a table of the tokens of every split, and a histogram of them all."""
    counted = [count for count in counts if count.lengths]
    if not counted:
        return []
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("tokens", "split"):
        table.add_column(title)
    for title in ("counted", "mean", "longest", "too long", "bad"):
        table.add_column(title, justify="right")
    for count in counted:
        part = f"{count.counted:,}" if count.counted == count.size else "a part: "
        part += "" if count.counted == count.size else f"{count.counted:,} of {count.size:,}"
        mean = sum(length for length, _ in count.lengths) / len(count.lengths)
        table.add_row(
            count.task.name, count.split, part, f"{mean:.0f}", f"{count.longest:,}",
            f"{count.too_long:,}", f"{len(count.errors):,}",
        )  # fmt: skip
    first = counted[0]
    whole = SplitCount(first.task, first.split, 0, 0, None, first.limit)
    whole.lengths = [one for count in counted for one in count.lengths]
    bars = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    ranges = whole.histogram()
    most = max(number for _, number in ranges)
    for edge, number in ranges:
        bars.add_row(f"up to {edge:,} tokens", f"{number:,}", "#" * -(-number * _BAR // most))
    bars.add_row("limit", f"{whole.limit:,}" if whole.limit else "none", "max_length of the model")
    return [table, bars]


def _costs_table(report: DryRunReport, names: str) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    tasks = len(report.stream)
    parts = (
        f"training {duration(report.train_seconds)}, end of tasks {duration(report.pass_seconds)}, "
        f"evaluation {duration(report.test_seconds)}"
    )
    device = f"{report.device}, 1 process" if report.world == 1 else f"{report.world} processes"
    samples = report.remembered_rows
    seen = f"the first {samples} samples" if samples else "two steps"
    rows = {
        "stream": f"{report.stream.name}, {report.stream.scenario}-incremental, {tasks} tasks",
        "model, strategy": names,
        "parameters": f"{report.parameters:,}; {report.learning:,} trainable, with the strategy's",
        **_parts(report),
        "device": device,
        "a step": f"{1000 * report.step_seconds:.1f} ms",
        "the run": f"about {duration(report.seconds)}: {parts}",
        "memory": _memory(report),
        **_estimated_memory(report),
        "checkpoints": f"{tasks} x {size(report.task_bytes)}, and {size(report.last_bytes)} "
        "mid-task",
        "strategy state": f"{size(report.remembered_bytes)} after {seen}",
    }
    for title, text in rows.items():
        table.add_row(title, text)
    return table


def _parts(report: DryRunReport) -> dict[str, str]:
    rows = {
        f"  {name}": f"{total:,}; {trainable:,} trainable"
        for name, (total, trainable) in report.parts.items()
        if total
    }
    return rows if len(rows) > 1 else {}


def _estimated_memory(report: DryRunReport) -> dict[str, str]:
    """Return the memory that formulas give for the longest batch of a generative model."""
    module, lengths = report.module, [count.longest for count in report.counts]
    model = getattr(module, "model", None)
    limit = getattr(getattr(model, "chat_tokenizer", None), "max_length", None)
    if model is None or limit is None or not max(lengths, default=0):
        return {}
    try:
        estimate = estimate_memory(model, module.strategy, _workload(report, limit))
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        # A formula knows fewer models than a run does.
        return {"memory by formula": f"not known: {' '.join(str(error).split())[:120]}"}
    return {"memory by formula": _in_parts(estimate)}


def _workload(report: DryRunReport, limit: int) -> Workload:
    module, tests = report.module, [c for c in report.counts if c.split == "test"]
    tokens = min(limit, max(count.longest for count in report.counts))
    new = max((count.task.max_new_tokens for count in tests), default=64)
    precision = str(module.trainer.precision) if module._trainer is not None else "32-true"
    autocast = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    return Workload(
        report.micro_batch_size, tokens, eval_batch_size=report.eval_batch_size or None,
        max_new_tokens=new, autocast=autocast,
    )  # fmt: skip


def _in_parts(estimate: MemoryEstimate) -> str:
    parts = ("weights", "gradients", "optimizer", "activations", "scores")
    named = ", ".join(f"{name} {size(getattr(estimate, name))}" for name in parts)
    kept = ""
    if estimate.merged_weights:
        kept = f"; {size(estimate.merged_weights)} of merged layers stay in the host's memory"
    return (
        f"{size(estimate.training)} in a step on the longest samples ({named}); "
        f"{size(estimate.generation)} in evaluation (cache {size(estimate.kv_cache)}{kept}), and "
        f"up to {size(MAX_CACHE_BYTES)} of image features that are kept for further questions"
    )


def _memory(report: DryRunReport) -> str:
    peak = f"{size(report.peak_memory_bytes)} peak so far"
    if report.test_bytes:
        peak += f"; about {size(report.test_bytes)} to generate a batch of {report.eval_batch_size}"
    return peak


def duration(seconds: float) -> str:
    """Format an estimated time, rounded: "0.4 s", "12 s", "3 min", "2.5 h"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
