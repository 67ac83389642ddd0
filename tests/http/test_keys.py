"""Keys: from settings and from a file that changes, as they are or as digests; the key of /metrics."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from slatewise import main
from slatewise.bundle.loader import load_rankers
from slatewise.bundle.ranker import Ranker
from slatewise.flags import read_settings
from slatewise.http import auth, keys, reread
from slatewise.http.keys import Keys, KeysError
from slatewise.main import build_app
from slatewise.settings import Settings, SettingsError
from tests.conftest import DEMO


@pytest.fixture(scope="module")
def ranker() -> Ranker:
    """That of the demo: nothing here depends on what it ranks."""
    return load_rankers(DEMO, ("fp32",))["movielens"]


def digest(key: str) -> str:
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


@pytest.mark.parametrize("listed", [["first", "second"], [digest("first"), digest("second")]])
def test_keys_and_digests_accept_the_same(listed: list[str]) -> None:
    known = Keys(listed)
    assert known and known.find(b"first") and known.find(b"second")
    for wrong in (b"", b"firs", b"first ", b"First", digest("first").encode(), hashlib.sha256(b"first").digest()):
        assert known.find(wrong) is None


def test_no_keys_accept_nothing() -> None:
    assert not Keys() and Keys().find(b"") is None and Keys().find(b"a") is None


@pytest.mark.parametrize(
    "content",
    [b"", b"\n \n", b"# only a comment\n", b"\xff\xfe", b"two words", b"a\tb", b"sha256:123", b"sha256:", b"k\x00ey"],
)
def test_file_without_usable_keys_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(KeysError, match=r"^SLATEWISE_API_KEYS_FILE: ") as refused:
        Keys([], str(path))
    assert "words" not in str(refused.value) and "123" not in str(refused.value)


@pytest.mark.parametrize("name", ["missing", "."])
def test_server_without_its_file_of_keys_does_not_start(tmp_path: Path, name: str) -> None:
    with pytest.raises(KeysError, match="SLATEWISE_API_KEYS_FILE"):
        main.serve(Settings(bundles=tmp_path, api_keys_file=str(tmp_path / name)))


@pytest.mark.parametrize("name", ["SLATEWISE_API_KEYS_FIL", "SLATEWISE_API_KEY_FILE", "SLATEWISE_APIKEYS_FILE"])
def test_misspelt_file_of_keys_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "/keys")
    with pytest.raises(SettingsError, match="did you mean SLATEWISE_API_KEYS"):
        read_settings({})


def test_key_of_the_client_may_stand_beside_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLATEWISE_API_KEY", "k")
    with pytest.raises(SettingsError):
        read_settings({})
    monkeypatch.setenv("SLATEWISE_API_KEYS_FILE", "/keys")
    assert read_settings({}).api_keys_file == "/keys"


def wait_until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def test_keys_rotate_without_a_restart(
    ranker: Ranker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Both old and new key work in between; a broken or missing file keeps the keys, and says so."""
    monkeypatch.setattr(reread, "LOOK_SECONDS", 0.05)
    path = tmp_path / "keys"
    path.write_text("# shop\nold-key\n")
    app = build_app(Settings(api_keys="fixed-key", api_keys_file=str(path), threads=1), {ranker.name: ranker})
    with TestClient(app) as client:

        def works(key: str) -> bool:
            return client.get("/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200

        def metric(text: str) -> bool:
            return text in client.get("/metrics").text

        assert works("old-key") and works("fixed-key") and not works("new-key")
        path.write_text(f"old-key\n{digest('new-key')}\n")
        wait_until(lambda: works("new-key"))
        assert works("old-key") and works("fixed-key")
        for break_it in (lambda: path.write_text(""), lambda: path.write_bytes(b"\xff"), path.unlink):
            before = len(caplog.messages)
            break_it()
            wait_until(lambda before=before: len(caplog.messages) > before)  # type: ignore[misc]
            assert "the old ones stay in use" in caplog.messages[-1]
            assert metric('slatewise_files_stale{kind="api_keys"} 1.0')
            assert works("new-key") and works("old-key") and not works("")
        fresh = tmp_path / "fresh"
        fresh.write_text("new-key\n")
        path.symlink_to(fresh)  # as Kubernetes replaces the files of a Secret
        wait_until(lambda: not works("old-key"))
        assert works("new-key") and works("fixed-key")
        assert metric('slatewise_files_stale{kind="api_keys"} 0.0')
    assert not any(key in caplog.text for key in ("old-key", "new-key", "fixed-key"))


@pytest.mark.parametrize("api_keys", ["", "key"])
def test_metrics_need_their_own_key_if_one_is_set(ranker: Ranker, api_keys: str) -> None:
    settings = Settings(api_keys=api_keys, metrics_key=digest("scrape"), threads=1)
    with TestClient(build_app(settings, {ranker.name: ranker})) as client:

        def status(path: str, key: str) -> int:
            return client.get(path, headers={"Authorization": f"Bearer {key}"}).status_code

        assert client.get("/metrics").status_code == status("/metrics", "key") == status("/metrics", "") == 401
        assert status("/metrics", "scrape") == 200
        assert status("/models", "scrape") == (401 if api_keys else 200), "the key opens nothing else"
        assert client.get("/livez").status_code == client.get("/readyz").status_code == 200


def test_fault_of_a_key_names_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLATEWISE_API_KEYS", "SLATEWISE_METRICS_KEY"):
        with monkeypatch.context() as changed, pytest.raises(KeysError, match=rf"^{name}: sha256: must be"):
            changed.setenv(name, "sha256:12")
            main.serve(read_settings({}))


@pytest.mark.parametrize("value", [",", " ", "a,b"])
def test_metrics_key_that_is_no_key_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("SLATEWISE_METRICS_KEY", value)
    with pytest.raises(SettingsError, match="must be one key"):
        read_settings({})


def test_every_known_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests of one length, all of them, also after a match."""
    compared: list[tuple[bytes, bytes]] = []

    def compare(given: bytes, known: bytes) -> bool:
        compared.append((given, known))
        return given == known

    known = Keys(["a", "b" * 200, digest("c")])
    monkeypatch.setattr(keys.hmac, "compare_digest", compare)
    assert known.find(b"a")
    assert len(compared) == 3 and {len(part) for pair in compared for part in pair} == {32}
    source = Path(keys.__file__).read_text() + Path(auth.__file__).read_text()
    assert " == known" not in source and "in callers]" in source
