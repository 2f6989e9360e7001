"""Shards behind s3://, gs://, hf:// and the like, through fsspec or a command."""

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

from mmcl.data.faults import BadShard
from mmcl.data.remote.download import Download, PassingFault, told

FILE_SYSTEMS = frozenset(
    {"s3", "s3a", "gs", "gcs", "hf", "abfs", "az", "oss", "oci", "hdfs", "ftp", "sftp", "ssh"}
)
_CURL = ("curl", "--globoff", "--connect-timeout", "30", "-f", "-s", "-L")
COMMANDS = {
    "gs": ("gsutil", "cat"), "ais": ("ais", "get"), "ftps": _CURL, "sftp": _CURL, "scp": _CURL,
}  # fmt: skip
"""Scheme -> command that writes a shard to its output, for what no file system opens here."""
_BLOCK = 1 << 23
_MARKS = (
    "ETag", "etag", "md5Hash", "content_md5", "generation", "VersionId", "blob_id",
    "LastModified", "last_modified", "updated", "mtime", "modify", "created",
)  # fmt: skip
_LASTING = ("Credential", "OfflineMode")


@contextlib.contextmanager
def open_cloud(address: str, start: int, version: str, seconds: float) -> Iterator[Download]:
    """Open a shard by the file system of its scheme, or by a command if that is not installed.

    Args:
        address: of one of the schemes above, or a ``pipe:`` that is allowed.
        start: byte to go on from, 0 = from the beginning.
        version: of the content that the first ``start`` bytes came from.
        seconds: to wait for the next block (8 MiB of a file system, 64 KiB of a command); a
            ``pipe:`` may take as long as it likes.

    Raises:
        PassingFault: if it fails in a way that may pass.
        BadShard: if there is no such shard, or nothing that opens it.
    """
    scheme = address.partition(":")[0].lower()
    reason = ""
    if scheme in FILE_SYSTEMS:
        try:
            fsspec.get_filesystem_class(scheme)
        except (ImportError, ValueError) as error:
            reason = str(error)
        else:
            with _open_file(address, start, version, seconds) as download:
                yield download
            return
    if scheme not in COMMANDS and scheme != "pipe":
        raise BadShard(f"could not be fetched, nothing here opens {scheme}:// ({reason})")
    with _open_command(address, reason, seconds) as download:
        yield download


@contextlib.contextmanager
def _open_file(address: str, start: int, version: str, seconds: float) -> Iterator[Download]:
    # fsspec takes 'a::b' for a file inside another, wherever that other one lies.
    if "::" in address:
        raise BadShard("has '::' in its address: name one shard on one server")
    with _in_time(_read_file(address, start, version), seconds) as items:
        try:
            total, begin, now = next(items)
        except TimeoutError:
            raise PassingFault(f"no answer within {seconds:g} s") from None
        yield Download(items, total, begin, now)


def _read_file(address: str, start: int, version: str) -> Generator[Any, None, None]:
    """Give (bytes of the shard, first byte that comes, version), then pieces."""
    try:
        system, path = url_to_fs(address)
        total, now = _look(system, path)
        begin = start if now and now == version else 0
        yield total, begin, now
        with system.open(path, "rb", block_size=_BLOCK) as file:
            file.seek(begin)
            while piece := file.read(_BLOCK):
                yield piece
        # Every block is asked for on its own, so they could be of two contents.
        if _look(system, path)[1] != now:
            raise PassingFault("it changed while it was fetched", starts_over=True)
    except FileNotFoundError:
        raise BadShard(
            "is not at its address: correct the address, or fetch it yourself and name the file"
        ) from None
    except ImportError as error:
        raise BadShard(f"could not be fetched: {' '.join(str(error).split())}") from None
    except (PassingFault, BadShard):
        raise
    # Each file system has errors of its own.
    except Exception as error:
        if isinstance(error, PermissionError) or any(w in type(error).__name__ for w in _LASTING):
            raise BadShard(
                f"is not given to us by its server ({told(error)}): log in with the server's own "
                "tool, or fetch the shard yourself and name the file"
            ) from None
        raise PassingFault(told(error)) from None


def _look(system: Any, path: str) -> tuple[int | None, str]:
    """Return the bytes of a file and what tells its contents apart."""
    system.invalidate_cache()
    details = system.info(path)
    marks = "|".join(f"{mark}={details[mark]}" for mark in _MARKS if details.get(mark))
    return details.get("size"), marks


@contextlib.contextmanager
def _open_command(address: str, reason: str, seconds: float) -> Iterator[Download]:
    scheme, _, shell = address.partition(":")
    is_own = scheme == "pipe"
    command = shell if is_own else [*COMMANDS[scheme.lower()], address]
    if scheme.lower() == "ais":
        command = [*command, "-"]
    try:
        # In a session of its own it asks no person for a password, and is stopped as a whole.
        process = subprocess.Popen(
            command,
            shell=is_own,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=None if is_own else subprocess.DEVNULL,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise BadShard(
            f"could not be fetched, there is no command '{error.filename}' here: install it, or "
            f"fetch the shard yourself and name the file. {reason}".rstrip()
        ) from None
    with _in_time(_read_command(process, is_own), None if is_own else seconds) as pieces:
        try:
            yield Download(pieces, None)
        finally:
            if process.returncode is None:
                _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def _read_command(process: subprocess.Popen[bytes], is_own: bool) -> Generator[bytes, None, None]:
    output = cast(IO[bytes], process.stdout)
    with process:
        while piece := output.read(1 << 16):
            yield piece
    if process.returncode and is_own:
        raise BadShard(
            f"could not be fetched, the command ended with status {process.returncode}: try it "
            "in a shell"
        )
    if process.returncode:
        raise PassingFault(f"the fetching command ended with status {process.returncode}")


@contextlib.contextmanager
def _in_time(
    items: Generator[Any, None, None], seconds: float | None
) -> Iterator[Generator[Any, None, None]]:
    """Draw from a generator in another thread, so that one which hangs can be given up.

    What is given raises TimeoutError if an item takes longer than ``seconds``.
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
