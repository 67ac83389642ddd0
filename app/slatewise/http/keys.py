"""API keys, from the settings and from a file that may change while the server runs. Only their SHA-256 are kept.

Called by: `app.py` makes them, `auth.py` asks, `reread.py` reads the file again. Calls: `settings.py`.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from pathlib import Path

from slatewise.settings import Settings, listed, variable

DIGEST = "sha256:"
HEXADECIMAL = re.compile(r"[0-9a-fA-F]{64}")
MOST_BYTES = 1 << 20  # of a file of keys


class KeysError(ValueError):
    """Keys cannot be used. The message holds none of them."""


class Keys:
    """The valid keys: those in `listed`, and those in the file at `path`, which `read` reads again."""

    def __init__(self, listed: Iterable[str] = (), path: str = "", setting: str = "api_keys") -> None:
        """`setting` names the source of `listed` in a fault. Raises KeysError."""
        try:
            self.listed = tuple(map(digest_of, listed))
        except KeysError as error:
            raise KeysError(f"{variable(setting)}: {error}") from None
        self.path = path
        self.digests = self.listed
        self.read()

    def __bool__(self) -> bool:
        """Whether keys are needed at all."""
        return bool(self.digests)

    def read(self) -> None:
        """Take the keys of the file. Raises KeysError, and then keeps those of before."""
        if self.path:
            try:
                self.digests = (*self.listed, *read_digests(Path(self.path)))
            except KeysError as error:
                raise KeysError(f"{variable('api_keys_file')}: {error}") from None

    def accept(self, given: bytes) -> bool:
        """Whether this is a valid key. Compares with all keys, in constant time."""
        digest = hashlib.sha256(given).digest()
        matches = [hmac.compare_digest(digest, known) for known in self.digests]
        return bool(given) and any(matches)


def open_keys(settings: Settings) -> tuple[Keys, Keys]:
    """Return the API keys, and the key of /metrics. Raises KeysError."""
    of_metrics = listed(settings.metrics_key.get_secret_value())
    return Keys(settings.keys(), settings.api_keys_file), Keys(of_metrics, setting="metrics_key")


def read_digests(path: Path) -> list[bytes]:
    """Read a key from each line that is neither empty nor begins with `#`. Raises KeysError."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise KeysError(f"{path}: {error.strerror}") from None
    if len(content) > MOST_BYTES:
        raise KeysError(f"{path} is longer than {MOST_BYTES} bytes")
    try:
        lines = content.decode().splitlines()
    except UnicodeDecodeError:
        raise KeysError(f"{path} is not UTF-8") from None
    digests = []
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        try:
            digests.append(digest_of(line))
        except KeysError as error:
            raise KeysError(f"{path}, line {number}: {error}") from None
    if not digests:
        raise KeysError(f"{path} contains no key")
    return digests


def digest_of(key: str) -> bytes:
    """Return the SHA-256 of a key, which may be given as `sha256:` and 64 hexadecimal digits. Raises KeysError."""
    if not key.startswith(DIGEST):
        if not key.isprintable() or any(map(str.isspace, key)):
            raise KeysError("a key has no spaces and no control characters")
        return hashlib.sha256(key.encode()).digest()
    digits = key.removeprefix(DIGEST)
    if not HEXADECIMAL.fullmatch(digits):
        raise KeysError(f"{DIGEST} must be followed by 64 hexadecimal digits")
    return bytes.fromhex(digits)
