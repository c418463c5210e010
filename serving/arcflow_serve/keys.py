"""API keys: read from a file or the environment, and compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence
from pathlib import Path

from arcflow_runtime.errors import RequestError
from arcflow_serve.errors import UNAUTHORIZED, ServiceError

#: Keys separated by commas, for a service whose keys come from its environment.
VARIABLE = "ARCFLOW_API_KEYS"
MIN_CHARACTERS = 16


def read_keys(path: Path | None) -> tuple[str, ...]:
    """The keys of a file, one a line, without blank lines and comments (#); and those of `ARCFLOW_API_KEYS`.

    Raises:
        RequestError: the file has no key, or a key is short or not printable ASCII without spaces.
        OSError: the file cannot be read.
    """
    keys: list[str] = []
    if path is not None:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise RequestError(f"{path} must have at least one API key, one a line; got none")
        keys += found
    keys += [k.strip() for k in os.environ.get(VARIABLE, "").split(",") if k.strip()]
    for i, key in enumerate(keys):
        if len(key) < MIN_CHARACTERS or not all("!" <= c <= "~" for c in key):
            # The key itself must not appear in a log.
            raise RequestError(
                f"API key {i + 1} must have at least {MIN_CHARACTERS} printable characters without spaces; "
                "make one with: openssl rand -hex 24"
            )
    return tuple(dict.fromkeys(keys))


class Keys:
    """The keys of a service."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def client(self, authorization: str | None) -> str | None:
        """Name the client of a request by its key; None if the service has no keys.

        Every key is compared, each in constant time, so the answer's time tells nothing about the keys.

        Raises:
            ServiceError: the header is missing or has another key.
        """
        if not self._digests:
            return None
        scheme, _, given = (authorization or "").partition(" ")
        digest = _digest(given.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != "bearer" or True not in matches:
            found = "another one" if given else "none"
            raise ServiceError(
                UNAUTHORIZED,
                "invalid_api_key",
                f"this service needs one of its API keys as 'Authorization: Bearer KEY', got {found}",
            )
        return f"key {matches.index(True) + 1}"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
