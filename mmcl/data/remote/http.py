"""Remote shards over http(s), by urllib: fsspec cannot resume (If-Range) or refuse a redirect."""

from __future__ import annotations

import base64
import contextlib
import re
import socket
import ssl
import time
from collections.abc import Iterator
from email.message import Message
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse, InvalidURL
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from mmcl.data.errors import BadShard
from mmcl.data.remote.download import PIECE, Download, TransientError

WEB = frozenset({"http", "https"})
_PASSING = frozenset({408, 425, 429, *range(500, 600)})
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")


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
        while piece := answer.read1(PIECE):
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
