"""TLS by configuration: versions, certificates of clients, rotation without a restart, slow handshakes."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import trustme

from slatewise import Client
from slatewise.bundle.loader import load_rankers
from slatewise.bundle.ranker import Ranker
from slatewise.flags import read_settings
from slatewise.http import reread, server
from slatewise.http.reread import Watched
from slatewise.http.tls import ReloadedContext, TlsError, TlsFiles
from slatewise.main import build_app
from slatewise.settings import Settings, SettingsError
from tests.conftest import DEMO
from tests.support.own_server import OwnServer

ROOT = Path(__file__).parents[2]


@dataclass
class Authority:
    """An authority in a folder, with the files of a server: `write` issues new ones."""

    folder: Path
    ca: trustme.CA

    @property
    def files(self) -> TlsFiles:
        return TlsFiles(str(self.folder / "tls.crt"), str(self.folder / "tls.key"))

    def write(self) -> None:
        issued = self.ca.issue_cert("127.0.0.1", "localhost")
        issued.private_key_pem.write_to_path(self.folder / "tls.key")
        (self.folder / "tls.crt").write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        self.ca.cert_pem.write_to_path(self.folder / "ca.crt")

    def client(self, issuer: trustme.CA | None = None) -> ssl.SSLContext:
        """A client that trusts this authority, with a certificate of `issuer`."""
        context = ssl.create_default_context(cadata=self.ca.cert_pem.bytes().decode())
        if issuer is not None:
            issuer.issue_cert("client").configure_cert(context)
        return context


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority(tmp_path, trustme.CA())
    made.write()
    return made


@pytest.fixture(scope="module")
def rankers() -> dict[str, Ranker]:
    return load_rankers(DEMO, ("fp32",))


@pytest.fixture
def start(rankers: dict[str, Ranker]) -> Iterator[Callable[[TlsFiles], OwnServer]]:
    servers: list[OwnServer] = []

    def open_server(files: TlsFiles) -> OwnServer:
        app = build_app(Settings(bundles=DEMO, threads=1), dict(rankers))
        context = ReloadedContext.open(files)
        app.state.followed.append(Watched("tls", files.paths, context.read, context.seen))
        servers.append(OwnServer(app, tls=context))
        return servers[-1]

    yield open_server
    for each in servers:
        each.stop()


Start = Callable[[TlsFiles], OwnServer]


def alive(url: str, context: ssl.SSLContext) -> bool:
    return httpx.get(f"{url}/livez", verify=context, trust_env=False, timeout=20).status_code == 200


def test_server_speaks_tls_and_nothing_else(authority: Authority, start: Start) -> None:
    running = start(authority.files)
    assert alive(running.url, authority.client())
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{running.url.replace('https', 'http')}/livez", trust_env=False, timeout=20)
    with pytest.raises(httpx.ConnectError, match=r"(?i)certificate"):
        alive(running.url, ssl.create_default_context())


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
@pytest.mark.parametrize(
    ("least", "offered", "works"), [("1.2", "1.1", False), ("1.2", "1.2", True), ("1.3", "1.2", False)]
)
def test_older_versions_of_tls_are_refused(
    authority: Authority, start: Start, least: str, offered: str, works: bool
) -> None:
    files = TlsFiles(authority.files.certificate, authority.files.key, "", least)
    running = start(files)
    context = authority.client()
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = getattr(ssl.TLSVersion, f"TLSv{offered.replace('.', '_')}")
    if works:
        assert alive(running.url, context)
    else:
        with pytest.raises(httpx.ConnectError):
            alive(running.url, context)


def test_mutual_tls_lets_in_clients_of_the_authority(authority: Authority, start: Start) -> None:
    clients = trustme.CA()
    clients.cert_pem.write_to_path(authority.folder / "clients.crt")
    files = TlsFiles(authority.files.certificate, authority.files.key, str(authority.folder / "clients.crt"))
    running = start(files)
    assert alive(running.url, authority.client(clients))
    for stranger in (None, trustme.CA()):
        with pytest.raises(httpx.TransportError):
            alive(running.url, authority.client(stranger))


def test_certificate_is_replaced_without_a_restart(
    authority: Authority, start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Open connections go on; a broken file keeps the certificate; a new authority replaces the old one."""
    monkeypatch.setattr(reread, "LOOK_SECONDS", 0.05)
    running = start(authority.files)
    new = Authority(authority.folder, trustme.CA())
    with httpx.Client(base_url=running.url, verify=authority.client(), trust_env=False, timeout=20) as kept:
        assert kept.get("/livez").status_code == 200
        Path(authority.files.certificate).write_text("broken")
        wait_until(lambda: "the old ones stay in use" in caplog.text)
        assert alive(running.url, authority.client())
        new.write()
        wait_until(lambda: succeeds(running.url, new.client()))
        assert not succeeds(running.url, authority.client())
        assert kept.get("/livez").status_code == 200
    assert "PRIVATE" not in caplog.text


def wait_until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.05)


def succeeds(url: str, context: ssl.SSLContext) -> bool:
    try:
        return alive(url, context)
    except httpx.TransportError:
        return False


def test_client_that_never_shakes_hands_is_closed(
    authority: Authority, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HANDSHAKE_TIMEOUT_S", 0.5)
    running = start(authority.files)
    silent = [socket.create_connection(("127.0.0.1", running.port), timeout=20) for _ in range(50)]
    silent[0].sendall(b"\x16\x03\x01")  # the begin of a hello
    assert alive(running.url, authority.client())
    for connection in silent:
        with connection:
            assert connection.recv(100) == b""
    assert alive(running.url, authority.client())


@pytest.mark.parametrize("broken", ["tls.crt", "tls.key", "ca.crt", "other key", "missing"])
def test_files_that_cannot_be_used_are_refused(authority: Authority, broken: str) -> None:
    files = TlsFiles(authority.files.certificate, authority.files.key, str(authority.folder / "ca.crt"))
    ReloadedContext.open(files)
    if broken == "other key":
        trustme.CA().issue_cert("x").private_key_pem.write_to_path(authority.folder / "tls.key")
    elif broken == "missing":
        (authority.folder / "tls.key").unlink()
    else:
        (authority.folder / broken).write_text("x")
    with pytest.raises(TlsError, match=r"^SLATEWISE_TLS_.*cannot be used: "):
        ReloadedContext.open(files)


@pytest.mark.parametrize(
    "flags", [{"tls_certificate": "a"}, {"tls_key": "a"}, {"tls_client_ca": "a"}, {"tls_least_version": "1.1"}]
)
def test_incomplete_settings_of_tls_are_refused(flags: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match=r"(--tls-|SLATEWISE_TLS_)"):
        read_settings(flags)


def test_client_and_health_check_speak_tls(authority: Authority, start: Start) -> None:
    """The health check shows the certificate of the server, for servers that ask for one."""
    files = TlsFiles(authority.files.certificate, authority.files.key, str(authority.folder / "ca.crt"))
    running = start(files)
    with Client(running.url, verify=authority.client(authority.ca), timeout=20) as client:
        assert client.models()[0]["name"] == "movielens"
    command = [sys.executable, "-I", "-S", str(ROOT / "deploy" / "health_check.py")]
    variables = {"SLATEWISE_PORT": str(running.port)}
    for more, code in (
        ({"SLATEWISE_TLS_CERTIFICATE": files.certificate, "SLATEWISE_TLS_KEY": files.key}, 0),
        ({}, 1),
    ):
        done = subprocess.run(command, env=variables | more, stderr=subprocess.DEVNULL, timeout=30)
        assert done.returncode == code
