"""Run directory: its state, its configuration, and the lock that admits one process at a time."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mmcl.core import write_atomic
from mmcl.core.card.card_reader import parse_yaml
from mmcl.data.shards.shard_content import SPLITS, path_digest
from mmcl.evaluation import strict_json
from mmcl.lightning.config.config_errors import renamed_key

try:
    import fcntl
except ImportError:  # Windows: a second process is not noticed there.
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
INPUTS = "inputs.json"
"""File with what is known of the content of a run's shards and of the files in its settings."""
_TEST_BYTES = 4096
_TAKEN = (errno.EACCES, errno.EAGAIN)
# The temporary names of `write_atomic`.
_TEMPORARY = re.compile(r"\..+\.\d+\.[0-9a-f]{6}\.tmp")
# Settings that may change when a run resumes: where and how fast, not what is computed.
RESUMABLE_KEYS = (
    "config", "run_name", "output_dir", "data.stream", "trainer.accelerator", "trainer.devices",
    "trainer.num_nodes", "trainer.strategy", "trainer.logger", "trainer.callbacks",
    "trainer.profiler", "trainer.log_every_n_steps", "trainer.default_root_dir", "data.data_dir",
    "data.num_workers", "data.eval_batch_size", "data.verify_hashes", "data.max_bad_fraction",
    "data.cache_dir", "data.cache_limit", "checkpoint_every_n_steps", "trainer.enable_progress_bar",
    "budget.buffer_bytes", "gates",
    "data.repeats",  # more repeats append tasks; fewer than trained are refused as missing tasks
)  # fmt: skip
# Settings of memory and speed that leave the global batch and the parameters as they are: free too,
# but other bits are computed with them, so a change is noted in the summary.
# A larger budget of the stream lets a run go further, which is noted too.
MEMORY_KEYS = (
    "data.micro_batch_size", "trainer.accumulate_grad_batches", "trainer.precision",
    "budget.stream.",
)  # fmt: skip
_CHECKPOINTING = ".gradient_checkpointing"
_STORED_AGAIN = ("data.stream", "data.data_dir", "data.repeats")
"""Settings whose new value is stored once the data is known to be that of the run."""


@dataclass
class RunState:
    """State of a run, stored in ``run.json``.

    Attributes:
        finished_tasks: number of finished tasks, whose checkpoints are written.
        task: index of the task in training, equal to ``finished_tasks``.
        tasks: one fingerprint for each task that was started, which ends with its name.
        seed: seed of the run.
        last_checkpoint: mid-task checkpoint to resume from, relative to the run directory, or None.
        step: optimizer step of ``last_checkpoint`` in its task.
        seconds: wall time of earlier processes.
        warnings: warnings for the summary.
        steps: optimizer steps of the finished tasks.
        errors: bad samples found so far.
        branch_step: steps of the task in training after which its annealed branch began, 0 = it
            did not.
        accepted_tasks: number of first tasks whose gates were kept, or that were accepted by hand.
        may_change: whether the settings may differ on the next start, as after a rollback.
        span_last: last task that the schedule of the task in training was planned for, -1 = none.
    """

    finished_tasks: int
    task: int
    tasks: list[str]
    seed: int
    last_checkpoint: str | None = None
    step: int = 0
    seconds: float = 0.0
    steps: int = 0
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    branch_step: int = 0
    span_last: int = -1
    accepted_tasks: int = 0
    may_change: bool = False

    def resume_point(self) -> str:
        """Return where the run resumes, as the words after "resumes"."""
        names = [each.partition(" ")[2] for each in self.tasks]
        if self.last_checkpoint is not None:
            name = names[self.finished_tasks]
            if self.branch_step:
                past = self.step - self.branch_step
                return f"in the branch of task {self.finished_tasks} ('{name}') at its step {past}"
            return f"in task {self.finished_tasks} ('{name}') at step {self.step}"
        if self.finished_tasks:
            return f"after task {self.finished_tasks - 1} ('{names[self.finished_tasks - 1]}')"
        return "from the beginning"


class RunDirectory:
    """Run directory: state, configuration, checkpoints and lock of one run.

    Args:
        path: path of the directory.
        writes: False on ranks other than 0, which write nothing.

    Attributes:
        changes: settings that differ from those of the last start and are to be noted, a sentence
            each: those of memory, and any after a rollback.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self._is_held = False
        self._moved_config: str | None = None
        self.changes: list[str] = []

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run directory, see ``lock_run_dir``; a nested call does nothing.

        Raises:
            OSError: if the directory cannot be written to.
            RuntimeError: if another process holds the lock.
        """
        if self._is_held or not self.writes:
            yield
            return
        with lock_run_dir(self.path):
            self._is_held = True
            try:
                yield
            finally:
                self._is_held = False

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def task_checkpoint(self, tasks: int) -> Path:
        """Return the path of the checkpoint after ``tasks`` tasks."""
        return self.checkpoints / f"task_{tasks - 1:02d}.ckpt"

    def constant_checkpoint(self, tasks: int) -> Path:
        """Return the path of the checkpoint after ``tasks`` tasks without the last branch."""
        return self.checkpoints / f"constant_{tasks - 1:02d}.ckpt"

    def resume_point(self) -> str:
        """Return where the same command would resume, as the words after "resumes"."""
        return (self.state() or RunState(0, 0, [], 0)).resume_point()

    def state(self) -> RunState | None:
        """Read the run state from ``run.json``; None if no run was started.

        Raises:
            ValueError: if the file is not a run state.
        """
        file = self.path / "run.json"
        if not file.is_file():
            return None
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
            if renamed := strict_json.renamed_keys(raw, RunState.__dataclass_fields__):
                raise ValueError("; ".join(renamed))
            state = RunState(**raw)
            _check_state(state)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not a run state ({error}): move it away") from None
        return state

    def save(self, state: RunState) -> None:
        """Write the run state to ``run.json``, on rank 0."""
        self.write("run.json", json.dumps(asdict(state), indent=1) + "\n")

    def write(self, name: str, text: str) -> None:
        """Write a text file into the run directory, on rank 0."""
        if self.writes:
            write_atomic(self.path / name, text)

    def inputs(self) -> dict[str, Any]:
        """Read ``inputs.json``; empty mappings for a run that has none.

        Returns:
            "settings": dotted key -> digest of the file or folder of that setting; "tasks": task or
            eval-only task -> its facts and the contents of its shards.

        Raises:
            ValueError: if the file is damaged.
        """
        found: dict[str, Any] = {"settings": {}, "tasks": {}}
        if (self.path / INPUTS).is_file():
            raw = strict_json.read(self.path / INPUTS)
            if not isinstance(raw, dict) or not _are_inputs({**found, **raw}):
                raise ValueError(
                    f"{self.path / INPUTS} is damaged: restore it, or remove it to resume without "
                    "a comparison of data"
                )
            found |= raw
        return found

    def save_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Write ``inputs.json`` if it changed."""
        if inputs != self.inputs():
            self.write(INPUTS, json.dumps(inputs, indent=1) + "\n")

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Store the run's configuration, or check that it equals the stored one.

        A run directory without results accepts any configuration, and so does one after a rollback.
        A path may change if the file or folder there has the same content. ``changes`` gets the
        changed settings that are to be noted.

        Raises:
            ValueError: naming the renamed keys of an old run, or up to five settings that differ.
        """
        file = self.path / "config.yaml"
        has_results = any((self.path / name).exists() for name in ("run.json", "matrix.json"))
        plain = json.loads(json.dumps(config, default=str))
        new, inputs = flat(plain), self.inputs()
        if file.is_file() and has_results:
            self._compare(file, plain, inputs["settings"])
        elif has_results:
            raise ValueError(
                f"{self.path} holds a run without its config.yaml: use another --run_name"
            )
        else:
            inputs = {"settings": {}, "tasks": {}}
            self.write("config.yaml", yaml.safe_dump(plain, sort_keys=False))
        digests = {key: _digest(value) for key, value in new.items() if not _is_free(key)}
        known = {key: digest for key, digest in digests.items() if digest}
        self.save_inputs({**inputs, "settings": known | inputs["settings"]})

    def _compare(self, file: Path, plain: Mapping[str, Any], digests: Mapping[str, Any]) -> None:
        """Compare a configuration with the stored one, see ``check_config``."""
        new = flat(plain)
        stored = flat(_config(file))
        if old := [f"'{k}' is called '{n}' now" for k in stored if (n := renamed_key(k, new))]:
            raise ValueError(
                f"{file} has keys of an earlier version: {'; '.join(old)}. Give this run "
                "another --run_name, or remove the directory"
            )
        differs = {k for k in stored.keys() | new.keys() if stored.get(k) != new.get(k)}
        moved = {k for k in differs if digests.get(k) and digests[k] == _digest(new.get(k))}
        # A setting that is newer than the run, and off: the run was made without it.
        newer = {key for key in differs if key not in stored and not new[key]}
        changed = sorted(key for key in differs - moved - newer if not _is_free(key))
        if changed and not self._may_change():
            named = "; ".join(
                f"{k} is {stored.get(k)!r} there and {new.get(k)!r} here" for k in changed[:5]
            )
            raise ValueError(
                f"{self.path} holds a run with another configuration: {named}. Give this run "
                "another --run_name, or remove the directory"
            )
        self.changes = [
            f"{key} was changed from {stored.get(key)!r} to {new.get(key)!r}"
            for key in sorted({*filter(_is_of_memory, differs), *changed})
        ]
        if moved or self.changes or differs & set(_STORED_AGAIN):
            self._moved_config = yaml.safe_dump(plain, sort_keys=False)

    def _may_change(self) -> bool:
        try:
            state = self.state()
        except ValueError:  # of a damaged file, which is refused where it is needed
            return False
        return state is not None and state.may_change

    def save_moved_paths(self) -> None:
        """Write the configuration again if its paths changed; its data was checked before.

        Not while ``changes`` has to be noted: a run killed before that would not find them again.
        """
        if self._moved_config is not None and not self.changes:
            self.write("config.yaml", self._moved_config)


def _are_inputs(raw: Mapping[str, Any]) -> bool:
    settings, tasks = raw["settings"], raw["tasks"]
    if not isinstance(settings, dict) or not isinstance(tasks, dict):
        return False
    if not all(isinstance(t, dict) and isinstance(t.get("facts"), str) for t in tasks.values()):
        return False
    splits = [task[split] for task in tasks.values() for split in SPLITS if split in task]
    if not all(isinstance(split, list) for split in splits):
        return False
    shards = [shard for split in splits for shard in split]
    return all(isinstance(shard, dict) and "name" in shard for shard in shards)


def _is_free(key: str) -> bool:
    """Return whether a setting may change when a run resumes."""
    free = tuple(f"{name}." for name in RESUMABLE_KEYS)
    return f"{key}.".startswith(free) or key.endswith(".storage_dir") or _is_of_memory(key)


def _is_of_memory(key: str) -> bool:
    """Return whether a setting is one of memory, whose change is noted."""
    is_checkpointing = key.startswith("model.model.") and key.endswith(_CHECKPOINTING)
    return key.startswith(MEMORY_KEYS) or is_checkpointing


def _digest(value: Any) -> str:
    """Return the digest of the file or folder that a setting names, "" if it names none."""
    return path_digest(Path(value)) if isinstance(value, str) and value else ""


def _check_state(state: RunState) -> None:
    counts = (
        state.finished_tasks, state.task, state.step, state.steps, state.branch_step,
        state.span_last + 1, state.accepted_tasks,
    )  # fmt: skip
    is_good = all(type(count) is int and count >= 0 for count in counts)
    is_good = is_good and isinstance(state.last_checkpoint, str | None)
    is_good = is_good and isinstance(state.may_change, bool)
    for listed in (state.tasks, state.warnings, state.errors):
        is_good = is_good and isinstance(listed, list) and all(isinstance(t, str) for t in listed)
    if not is_good or len(state.tasks) < state.finished_tasks:
        raise ValueError("a field has the wrong type")
    last = Path(state.last_checkpoint or "")
    if last.is_absolute() or ".." in last.parts:
        raise ValueError("its checkpoint is outside of the run directory")


def _config(file: Path) -> Any:
    try:
        return parse_yaml(file.read_text(encoding="utf-8")) or {}
    except ValueError as error:
        raise ValueError(
            f"{file} is not a run configuration ({error}): restore it, or use another --run_name"
        ) from None


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings, and lists of them, as one mapping with dotted keys."""
    if isinstance(config, list) and any(isinstance(entry, Mapping) for entry in config):
        config = dict(enumerate(config))
    if not isinstance(config, Mapping):
        return {prefix: config}
    values: dict[str, Any] = {}
    for key, value in config.items():
        values |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return values


@contextmanager
def lock_run_dir(folder: Path) -> Iterator[None]:
    """Create and lock a run directory, and remove half-written files of killed processes.

    The lock of a killed process is released by the system. Not ``filelock``: that uses flock, which
    forked loader workers inherit and keep after the run was killed. If a network file system
    refuses to lock, no process is kept out; if it can, processes of other machines are too.

    Raises:
        OSError: if the directory cannot be created or written to.
        RuntimeError: if another process holds the lock.
    """
    handle = _open_lock(folder)
    try:
        _lock(handle, folder)
        _remove_temporary_files(folder)
        yield
    finally:
        os.close(handle)


def _open_lock(folder: Path) -> int:
    """Open the lock file of a run directory, after a test write into it and its subfolders."""
    path = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in (folder, *(entry for entry in folder.iterdir() if entry.is_dir())):
            with tempfile.TemporaryFile(dir=path) as file:
                file.write(bytes(_TEST_BYTES))
        path = folder / LOCK
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        kind = "file" if path.name == LOCK else "folder"
        raise OSError(
            f"the run's {kind} {path} cannot be written to ({error.strerror}): nothing was "
            "started; change that, or give --output_dir another folder"
        ) from error


def _lock(handle: int, folder: Path) -> None:
    if fcntl is None:
        return
    try:
        # Not flock: the loader's workers would inherit that, and outlive a killed run.
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _TAKEN:
            return
        raise RuntimeError(
            f"{folder} is used by {_holder(handle)}: wait until that ends, or give this "
            "run another --run_name"
        ) from None
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    note = {"process": os.getpid(), "host": socket.gethostname(), "since": since}
    with contextlib.suppress(OSError):  # without room for the note the lock still holds
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{json.dumps(note)}\n".encode(), 0)


def _holder(handle: int) -> str:
    try:
        note = json.loads(os.pread(handle, 4096, 0))
        return f"process {note['process']} on {note['host']} since {note['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _remove_temporary_files(folder: Path) -> None:
    """Remove half-written files of killed processes; the holder of the lock is the only writer."""
    for file in folder.rglob(".*.tmp"):
        if _TEMPORARY.fullmatch(file.name) and file.is_file():
            with contextlib.suppress(OSError):
                file.unlink()
