"""Download of a remote shard: by http(s), by fsspec (s3://, hf:// and others), or from a command.

http(s) goes through urllib, because fsspec cannot resume there (If-Range) or refuse a redirect.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NothingYet
from dataclasses import dataclass
from email.message import Message
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse, InvalidURL
from typing import IO, Any, cast
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import fsspec
from fsspec.core import url_to_fs

from mmcl.data.stored_sample import BadShard, one_line

WEB = frozenset({"http", "https"})
_PASSING = frozenset({408, 425, 429, *range(500, 600)})
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")
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


@dataclass(frozen=True)
class Download:
    """Bytes of a remote shard as they arrive.

    Attributes:
        pieces: chunks of the content from byte ``start``; raises TransientError, TimeoutError or
            OSError where the transfer breaks off, and may also just end too early.
        total: bytes of the whole shard, None if unknown.
        start: first byte of the first chunk; 0, or where an interrupted transfer is resumed.
        version: differs between two contents of one address, "" = unknown.
    """

    pieces: Iterator[bytes]
    total: int | None
    start: int = 0
    version: str = ""


class TransientError(Exception):
    """Transient error: an attempt failed and a retry may succeed; its text is the reason.

    Args:
        reason: what happened, without the address.
        wait_seconds: that the server requests before the next attempt, 0 = none.
        starts_over: the bytes received so far are useless.
    """

    def __init__(self, reason: str, wait_seconds: float = 0.0, starts_over: bool = False) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds
        self.starts_over = starts_over


def redact(error: BaseException) -> str:
    """Return the text of another library's error with everything secret redacted."""
    text = " ".join(str(error).split())
    text = re.sub(r"(\w+://)[^\s/@]+@", r"\1", text)
    text = re.sub(r"(\w+://[^\s?]*)\?\S+", r"\1?...", text)
    text = re.sub(r"(?i)(bearer|basic|authorization|token|secret|key)(\W+)\S{8,}", r"\1\2...", text)
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


@contextlib.contextmanager
def open_web(address: str, start: int, version: str, seconds: float) -> Iterator[Download]:
    """Request a shard from a server; proxies are taken from the environment.

    Args:
        address: http(s), may hold ``user:password@``.
        start: byte to resume from, 0 = the beginning.
        version: of the content that the first ``start`` bytes came from; if the server has
            another one by now, it sends that from the beginning.
        seconds: timeout of the connection, and of every read.

    Raises:
        TransientError: if there is no answer, or one that a retry may change.
        BadShard: if the server has no such shard or refuses it.
    """
    request = _request(address, start, version)
    try:
        answer = build_opener(_Redirects).open(request, timeout=seconds)
    except BadShard:
        raise
    except HTTPError as error:
        with error:
            raise _refusal(error.code, error.headers) from None
    except URLError as error:
        raise _unreached(error.reason, seconds) from None
    except (OSError, HTTPException, ValueError) as error:
        raise _unreached(error, seconds) from None
    with answer:
        yield _download(answer, start, version)


class _Redirects(HTTPRedirectHandler):
    """Redirect handler that never leaves http(s) and never goes from https to http."""

    http_error_308 = HTTPRedirectHandler.http_error_302  # Python 3.10 does not follow it.

    def redirect_request(
        self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Request | None:
        scheme = urlsplit(newurl).scheme.lower()
        if scheme not in WEB or (req.type == "https" and scheme == "http"):
            raise BadShard(
                f"could not be fetched, its server redirects from {req.type} to {scheme}: name the "
                "new address, or fetch it yourself and name the file"
            )
        new = super().redirect_request(req, fp, 307 if code == 308 else code, msg, headers, newurl)
        # A password is for its own host.
        own = req.unredirected_hdrs.get("Authorization")
        if new is not None and own and (new.type, new.host) == (req.type, req.host):
            new.add_unredirected_header("Authorization", own)
        return new


def _request(address: str, start: int, version: str) -> Request:
    parts = urlsplit(address)
    user, _, host = parts.netloc.rpartition("@")
    path, query = (quote(text, safe="%/:=&?~+!$,;'@()*[]|") for text in (parts.path, parts.query))
    request = Request(urlunsplit((parts.scheme, host, path, query, "")))
    request.add_header("User-Agent", "mmcl")
    request.add_header("Accept-Encoding", "identity")
    if user:
        encoded = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {encoded}")
    if start and version:
        request.add_header("Range", f"bytes={start}-")
        request.add_header("If-Range", version)
    return request


def _download(answer: HTTPResponse, start: int, version: str) -> Download:
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        raise BadShard(
            "could not be fetched, its server sends it compressed "
            f"({answer.headers['Content-Encoding']}): store it there without Content-Encoding"
        )
    tag = answer.headers.get("ETag", "")
    # Weak tags may be equal for contents that differ in bytes.
    new = tag if tag.startswith('"') else ""
    if answer.status == 200:
        return Download(_pieces(answer), answer.length, 0, new)
    found = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
    if answer.status != 206 or not start:
        raise _refusal(answer.status, answer.headers)
    if found is None or int(found[1]) != start or new not in ("", version):
        raise TransientError("its server sent another range than requested", starts_over=True)
    return Download(_pieces(answer), int(found[2]), start, version)


def _pieces(answer: HTTPResponse) -> Iterator[bytes]:
    try:
        while piece := answer.read1(1 << 20):
            yield piece
    except HTTPException as error:
        raise ConnectionError(type(error).__name__) from None


def _refusal(status: int, headers: Message) -> Exception:
    if status in _PASSING:
        return TransientError(f"status {status}", _stated_wait(headers.get("Retry-After", "")))
    if status == 416:
        return TransientError("status 416", starts_over=True)
    if status in (404, 410):
        return BadShard(
            f"is not at its address (status {status}): correct the address, or fetch it yourself "
            "and name the file"
        )
    if status in (401, 403, 407):
        return BadShard(
            f"is refused by its server (status {status}): the address needs a login or its "
            "signature has expired; sign it again, or fetch the shard yourself and name the file"
        )
    return BadShard(
        f"could not be fetched, its server answers with status {status}: correct the address, or "
        "fetch it yourself and name the file"
    )


def _unreached(error: object, seconds: float) -> Exception:
    if isinstance(error, ssl.SSLCertVerificationError):
        return BadShard(
            f"could not be fetched, its server has a certificate that is not trusted "
            f"({error.verify_message}): correct the address or the certificates of this machine"
        )
    if isinstance(error, str | InvalidURL | ValueError):
        return BadShard("could not be fetched, its address makes no sense: correct it")
    if isinstance(error, TimeoutError):
        return TransientError(f"no answer within {seconds:g} s")
    if isinstance(error, socket.gaierror):
        return TransientError("the name of its server is not known")
    if isinstance(error, OSError) and error.strerror:
        return TransientError(error.strerror.lower())
    return TransientError(f"no answer ({type(error).__name__})")


def _stated_wait(text: str) -> float:
    """Return the seconds of a Retry-After header: a number, or until a date."""
    if text.strip().isdecimal():
        return float(text)
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0


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
            f"could not be fetched, fsspec cannot open {scheme}:// ({one_line(error)}): "
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
        raise BadShard(f"could not be fetched: {one_line(error)}") from None
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
