"""TLS: the certificate and key of the server, and the authorities whose clients are let in (mutual TLS).

Called by: `main.py` makes the context, `server.py` listens with it, `reread.py` reads the files again. Calls: ssl.
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slatewise.http.reread import look

HANDSHAKE_TIMEOUT_S = 5.0  # a client that does not complete the handshake is closed then
VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


@dataclass(frozen=True)
class TlsFiles:
    """Paths of PEM files. certificate: with its chain. client_ca: empty: any client."""

    certificate: str
    key: str
    client_ca: str = ""
    least_version: str = "1.2"

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.certificate, self.key, self.client_ca)))


class TlsError(ValueError):
    """The files cannot be used; the message names the setting and holds nothing of them."""


class ReloadedContext(ssl.SSLContext):
    """Wraps each new connection by the context of the files that were read last. Others go on with theirs.

    To load a new chain into a context in use would leave the old one beside it, and old authorities trusted.
    """

    files: TlsFiles
    seen: tuple[object, ...]  # the look at the files before the first reading
    current: ssl.SSLContext

    @classmethod
    def open(cls, files: TlsFiles) -> ReloadedContext:
        """Read the files. Raises TlsError."""
        self = cls(ssl.PROTOCOL_TLS_SERVER)
        self.files = files
        self.seen = look(files.paths)
        self.read()
        return self

    def read(self) -> None:
        """Read the files again. Raises TlsError, and then keeps those that it has."""
        self.current = make_context(self.files)

    def wrap_bio(self, *given: Any, **named: Any) -> ssl.SSLObject:
        """Begin a connection: the event loop calls this for each."""
        return self.current.wrap_bio(*given, **named)


def make_context(files: TlsFiles) -> ssl.SSLContext:
    """Return a context with Python's defaults for servers. Raises TlsError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = VERSIONS[files.least_version]
    context.set_alpn_protocols(["http/1.1"])
    try:
        # An empty password: OpenSSL would ask for one at the terminal.
        context.load_cert_chain(files.certificate, files.key, password="")
    except (OSError, ValueError) as error:
        raise TlsError(fault("SLATEWISE_TLS_CERTIFICATE and SLATEWISE_TLS_KEY", files.paths[:2], error)) from None
    if files.client_ca:
        try:
            context.load_verify_locations(files.client_ca)
        except (OSError, ValueError) as error:
            raise TlsError(fault("SLATEWISE_TLS_CLIENT_CA", [files.client_ca], error)) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def fault(settings: str, paths: Sequence[str], error: Exception) -> str:
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
    return f"{settings}: {' and '.join(paths)} cannot be used: {reason}"
