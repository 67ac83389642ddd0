"""API keys, from the settings and from a file that may change while the server runs. Only their SHA-256 are kept.

Called by: `app.py` makes them, `auth.py` asks, `reread.py` reads the file again. Calls: `callers.py`, `settings.py`.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from pathlib import Path

from slatewise import metrics
from slatewise.http.callers import NO_LIMITS, Caller, Limits, read_limits
from slatewise.settings import Settings, listed, variable

DIGEST = "sha256:"
HEXADECIMAL = re.compile(r"[0-9a-fA-F]{64}")
MOST_BYTES = 1 << 20  # of a file of keys


class KeysError(ValueError):
    """Keys cannot be used. The message holds none of them."""


class Keys:
    """The valid keys: those in `listed`, and those in the file at `path`, which `read` reads again."""

    def __init__(
        self, listed: Iterable[str] = (), path: str = "", setting: str = "api_keys", default: Limits = NO_LIMITS
    ) -> None:
        """`setting` names the source of `listed` in a fault. `default` is for keys without limits. Raises KeysError."""
        try:
            self.listed = tuple(map(digest_of, listed))
        except KeysError as error:
            raise KeysError(f"{variable(setting)}: {error}") from None
        self.path = path
        self.default = default
        self.callers: dict[bytes, Caller] = {}  # by digest
        self.read()

    def __len__(self) -> int:
        """Return the number of keys. Without a key, none is needed."""
        return len(self.callers)

    def read(self) -> None:
        """Take the keys of the file. Raises KeysError, and then keeps those of before.

        A key that stays keeps the counts of its requests.
        """
        limits = dict.fromkeys(self.listed, self.default)
        if self.path:
            try:
                limits |= read_file(Path(self.path), self.default)
            except KeysError as error:
                raise KeysError(f"{variable('api_keys_file')}: {error}") from None
        callers = {digest: self.callers.get(digest) or Caller(each) for digest, each in limits.items()}
        for digest, caller in callers.items():
            caller.limits = limits[digest]
            metrics.show_key(caller.limits.name)
        self.callers = callers

    def find(self, given: bytes) -> Caller | None:
        """Return the caller whose key this is, or `None`. Compares with all keys, in constant time."""
        callers = self.callers  # another thread may replace them
        digest = hashlib.sha256(given).digest()
        matches = [hmac.compare_digest(digest, known) for known in callers]
        return callers[digest] if given and any(matches) else None


def open_keys(settings: Settings) -> tuple[Keys, Keys]:
    """Return the API keys, and the key of /metrics. Raises KeysError."""
    of_metrics = listed(settings.metrics_key.get_secret_value())
    keys = Keys(settings.keys(), settings.api_keys_file, default=default_limits(settings))
    return keys, Keys(of_metrics, setting="metrics_key")


def default_limits(settings: Settings) -> Limits:
    """Return the limits of a key whose line states none."""
    return Limits(settings.key_max_in_flight, settings.key_max_rate, settings.most_important_priority)


def read_file(path: Path, default: Limits) -> dict[bytes, Limits]:
    """Read a key, and the limits behind it, from each line that is neither empty nor begins with `#`.

    Returns the limits by digest. Raises KeysError.
    """
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
    found: dict[bytes, Limits] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        key, *words = line.split()
        try:
            digest = digest_of(key)
            limits = read_limits(words, default)
            if found.setdefault(digest, limits) != limits:
                raise KeysError("an earlier line has the same key with other limits")
        except ValueError as error:
            raise KeysError(f"{path}, line {number}: {error}") from None
    if not found:
        raise KeysError(f"{path} contains no key")
    return found


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
