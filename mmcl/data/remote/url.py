"""Address of a remote shard: redacted for messages, and the file name of its cached copy.

A file of its own: what is secret in an address is decided here alone, and tested alone.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import PurePosixPath
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

_SIGNING = re.compile(r"^x-(amz|goog)-", re.IGNORECASE)
"""Parameters of a signed address; they expire after hours and select no content."""
_SECRET = re.compile(r"token|secret|sign|passw|credential|auth|key|policy|^sig$", re.IGNORECASE)


def redact_url(address: str) -> str:
    """Redact the secrets of an address, so that it can be shown and still identifies the content.

    User and password and the parameters of a signature are left out; the value of a parameter
    that sounds secret, and the whole command of a ``pipe:``, is replaced by hex of its sha256.
    """
    if address.startswith("pipe:"):
        return f"pipe:~{_hex(address, 16)}"
    parts = urlsplit(address)
    query = [
        (name, f"~{_hex(value, 8)}" if _SECRET.search(name) else value)
        for name, value in parse_qsl(parts.query, keep_blank_values=True)
        if not _SIGNING.match(name)
    ]
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, urlencode(query), parts.fragment))


def cached_name(address: str, sha256: str) -> str:
    """Return the file name of a shard's cached copy: ``<16 hex>-<last part of the address>``.

    Args:
        address: of the shard.
        sha256: of its content as the card has it, "" = unknown; another content is another file.
    """
    if address.startswith("pipe:"):
        # The file name in a command may be followed by options with a password.
        last = re.split(r"[\s?&|;'\"]", address.rpartition("/")[2])[0]
    else:
        last = PurePosixPath(unquote(urlsplit(address).path)).name
    name = re.sub(r"[^\w.-]", "_", last, flags=re.ASCII)[-80:] or "shard"
    stated = f"\n{sha256}" if sha256 else ""
    return f"{_hex(redact_url(address) + stated, 16)}-{name}"


def _hex(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:digits]
