"""Remote shards in object stores (s3://, hf:// and others) by fsspec, or from a shell command."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NothingYet
from typing import IO, Any, cast

import fsspec
from fsspec.core import url_to_fs

from mmcl.data.errors import BadShard
from mmcl.data.remote.download import Download, TransientError, redact

FILE_SYSTEMS = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub",
    "abfs": "adlfs", "az": "adlfs", "oss": "ossfs", "oci": "ocifs", "hdfs": "pyarrow",
    "ftp": "fsspec", "sftp": "paramiko", "ssh": "paramiko",
}  # fmt: skip
"""Scheme -> package that fsspec needs to open it."""
_BLOCK = 1 << 23
_MARKS = (
    "ETag", "etag", "md5Hash", "content_md5", "generation", "VersionId", "blob_id",
    "LastModified", "last_modified", "updated", "mtime", "modify", "created",
)  # fmt: skip
_LASTING = ("Credential", "OfflineMode")


@contextlib.contextmanager
def open_cloud(address: str, start: int, version: str, seconds: float) -> Iterator[Download]:
    """Open a remote shard by the fsspec file system of its scheme, or run its ``pipe:`` command.

    Args:
        address: of one of the schemes above, or a ``pipe:`` that the user allows.
        start: byte to resume from, 0 = the beginning.
        version: of the content that the first ``start`` bytes came from.
        seconds: to wait for the next block of 8 MiB; a ``pipe:`` has no timeout.

    Raises:
        TransientError: if it fails in a way that may pass.
        BadShard: if there is no such shard, the package that opens it is not installed, or the
            command fails.
    """
    scheme = address.partition(":")[0].lower()
    if scheme == "pipe":
        with _open_command(address.partition(":")[2]) as download:
            yield download
        return
    try:
        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:
        raise BadShard(
            f"could not be fetched, fsspec cannot open {scheme}:// ({_one_line(error)}): "
            f"pip install {FILE_SYSTEMS[scheme]}, or fetch it yourself and name the file"
        ) from None
    # fsspec takes 'a::b' for a file inside another, wherever that other one is.
    if "::" in address:
        raise BadShard("has '::' in its address: name one shard on one server")
    with _in_time(_read_file(address, start, version), seconds) as items:
        try:
            total, begin, now = next(items)
        except TimeoutError:
            raise TransientError(f"no answer within {seconds:g} s") from None
        yield Download(items, total, begin, now)


def _read_file(address: str, start: int, version: str) -> Generator[Any, None, None]:
    """Yield (bytes of the shard, first byte that comes, version), then chunks of content."""
    try:
        system, path = url_to_fs(address)
        total, now = _look(system, path)
        begin = start if now and now == version else 0
        yield total, begin, now
        with system.open(path, "rb", block_size=_BLOCK) as file:
            file.seek(begin)
            while piece := file.read(_BLOCK):
                yield piece
        # Each block is a request of its own, so they could be of two contents.
        if _look(system, path)[1] != now:
            raise TransientError("it changed while it was fetched", starts_over=True)
    except FileNotFoundError:
        raise BadShard(
            "is not at its address: correct the address, or fetch it yourself and name the file"
        ) from None
    except ImportError as error:
        raise BadShard(f"could not be fetched: {_one_line(error)}") from None
    except (TransientError, BadShard):
        raise
    # Each file system has errors of its own.
    except Exception as error:
        if isinstance(error, PermissionError) or any(w in type(error).__name__ for w in _LASTING):
            raise BadShard(
                f"is refused by its server ({redact(error)}): log in with the server's own "
                "tool, or fetch the shard yourself and name the file"
            ) from None
        raise TransientError(redact(error)) from None


def _look(system: Any, path: str) -> tuple[int | None, str]:
    """Return the size of a file in bytes and its version marks, "" if the store has none."""
    system.invalidate_cache()
    details = system.info(path)
    marks = "|".join(f"{mark}={details[mark]}" for mark in _MARKS if details.get(mark))
    return details.get("size"), marks


@contextlib.contextmanager
def _open_command(command: str) -> Iterator[Download]:
    """Run the shell command of a ``pipe:``, whose output is the shard."""
    try:
        # In a session of its own it cannot prompt for a password, and is killed with its children.
        process = subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        raise BadShard(
            f"could not be fetched, its command cannot be started ({error}): try it in a shell"
        ) from None
    with _in_time(_read_command(process), None) as pieces:
        try:
            yield Download(pieces, None)
        finally:
            if process.returncode is None:
                _stop(process)


def _read_command(process: subprocess.Popen[bytes]) -> Generator[bytes, None, None]:
    """Yield the output of a command in chunks of at most 64 KiB."""
    output = cast(IO[bytes], process.stdout)
    with process:
        while piece := output.read(1 << 16):
            yield piece
    if process.returncode:
        raise BadShard(
            f"could not be fetched, the command ended with status {process.returncode}: try it "
            "in a shell"
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Kill a command and its children."""
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


@contextlib.contextmanager
def _in_time(
    items: Generator[Any, None, None], seconds: float | None
) -> Iterator[Generator[Any, None, None]]:
    """Run a generator in another thread, so that one that hangs can be abandoned.

    The yielded generator raises TimeoutError if an item takes longer than ``seconds``;
    None = no timeout.
    """
    reader = ThreadPoolExecutor(1)
    end = object()

    def drawn() -> Generator[Any, None, None]:
        while True:
            try:
                item = reader.submit(next, items, end).result(seconds)
            except NothingYet:
                raise TimeoutError from None
            if item is end:
                return
            yield item

    try:
        yield drawn()
    finally:
        reader.submit(items.close)
        reader.shutdown(wait=False)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
