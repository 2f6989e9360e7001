"""Shards behind s3://, gs://, hf:// and the like, through fsspec or webdataset's commands."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NothingYet
from typing import Any

import fsspec
from fsspec.core import url_to_fs
from webdataset.gopen import gopen

from mmcl.data.download import Download, PassingFault, told
from mmcl.data.faults import BadShard

FILE_SYSTEMS = frozenset(
    {"s3", "s3a", "gs", "gcs", "hf", "abfs", "az", "oss", "oci", "hdfs", "ftp", "sftp", "ssh"}
)
COMMANDS = frozenset({"gs", "htgs", "ais", "ftps", "sftp", "scp"})
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
        seconds: to wait for the next byte; a ``pipe:`` may take as long as it likes.

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


def _read_file(address: str, start: int, version: str) -> Iterator[Any]:
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
    try:
        pipe = gopen(address, "rb")
    except FileNotFoundError as error:
        raise BadShard(
            f"could not be fetched, there is no command '{error.filename}' here: install it, or "
            f"fetch the shard yourself and name the file. {reason}".rstrip()
        ) from None
    is_own = address.startswith("pipe:")
    try:
        with _in_time(_read_command(pipe, is_own), None if is_own else seconds) as pieces:
            yield Download(pieces, None)
    finally:
        if pipe.proc.poll() is None:
            pipe.proc.kill()
        with contextlib.suppress(OSError):
            pipe.close()


def _read_command(pipe: Any, is_own: bool) -> Iterator[bytes]:
    try:
        while piece := pipe.read(1 << 16):
            yield piece
        # Only at its end a command tells whether it failed.
        pipe.close()
    except OSError as error:
        # The error quotes the whole command, with whatever is secret in it.
        status = re.search(r"exit (-?\d+)", str(error))
        what = f"status {status[1]}" if status else type(error).__name__
        if is_own:
            raise BadShard(
                f"could not be fetched, the command ended with {what}: try it in a shell"
            ) from None
        raise PassingFault(f"the fetching command ended with {what}") from None


@contextlib.contextmanager
def _in_time(items: Iterator[Any], seconds: float | None) -> Iterator[Iterator[Any]]:
    """Draw from an iterator in another thread, so that one which hangs can be given up.

    What is given raises TimeoutError if an item takes longer than ``seconds``.
    """
    reader = ThreadPoolExecutor(1)
    end = object()

    def drawn() -> Iterator[Any]:
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
        reader.shutdown(wait=False)
