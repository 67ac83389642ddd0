"""`slatewise doctor`: one line for each check, the exit code, and no secret."""

from __future__ import annotations

import json
import resource
import shutil
import socket
from pathlib import Path

import pytest

from slatewise.commands import doctor
from slatewise.commands.doctor import Line, main
from tests.conftest import DEMO
from tests.support.network import free_port

CHECKS = ["slatewise", "packages", "telemetry", "cpu", "quota", "settings", "memory", "descriptors"]
CHECKS += ["keys", "tls", "bundle", "redis", "port"]


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.upper().startswith("SLATEWISE_")]:
        monkeypatch.delenv(name)


def examine(**flags: str) -> dict[str, Line]:
    return {line.check: line for line in doctor.examine({"port": "0"} | flags)}


def test_good_machine_has_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--port", str(free_port())]) == 0
    shown = capsys.readouterr()
    assert [line.split()[1] for line in shown.out.splitlines()] == CHECKS and shown.err == ""
    assert {line.split()[0] for line in shown.out.splitlines()} <= {"ok", "warn"}


def test_json_has_the_same_checks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "--port", "0"]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert [line["check"] for line in lines] == CHECKS
    assert all(line.keys() == {"check", "state", "text"} for line in lines)


def test_failure_is_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--bundles", "missing", "--port", "0"]) == 1
    shown = capsys.readouterr()
    assert "fail  bundle" in shown.out and "missing: no bundle" in shown.out
    assert shown.err == f"slatewise doctor: 1 of {len(CHECKS)} checks failed: bundle\n"


def test_broken_file_of_a_bundle_is_named(tmp_path: Path) -> None:
    newest = max((DEMO / "movielens").glob("[0-9]*"))
    shutil.copytree(newest, tmp_path / "movielens" / newest.name)
    assert examine(bundles=str(tmp_path))["bundle"].state == "ok"
    (tmp_path / "movielens" / newest.name / "variants" / "int8" / "dot.onnx").write_bytes(b"")
    line = examine(bundles=str(tmp_path))["bundle"]
    assert line.state == "fail" and "variants/int8/dot.onnx" in line.text


def test_redis_is_asked(redis_port: int) -> None:
    line = examine(redis_url=f"redis://127.0.0.1:{redis_port}/0")["redis"]
    assert line == Line("redis", "ok", f"127.0.0.1:{redis_port} answers PING")


@pytest.mark.parametrize(
    "url",
    [
        "redis://me:s3cret@127.0.0.1:1/0",
        "redis://me:s3cret@127.0.0.1:none/0",
        "redis+sentinel://me:s3cret@127.0.0.1:1/service",
        "unix://me:s3cret@/nowhere.sock",
        "s3cret",
    ],
)
def test_no_secret_is_shown(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLATEWISE_API_KEYS", "s3cret,other")
    monkeypatch.setenv("SLATEWISE_API_KEY", "s3cret")
    lines = examine(redis_url=url)
    assert "fail" in (lines["redis"].state, lines["settings"].state)
    assert "s3cret" not in repr(lines)


def test_silent_redis_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "REDIS_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        line = examine(redis_url=f"redis://127.0.0.1:{listener.getsockname()[1]}/0")["redis"]
    assert line.state == "fail" and "0.2 s" in line.text


def test_port_in_use_fails_and_another_slatewise_warns(demo_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        listener.settimeout(0)
        line = examine(port=str(port))["port"]
        assert line.state == "fail" and "another process" in line.text
    line = examine(port=demo_url.rpartition(":")[2])["port"]
    assert line.state == "warn" and "Slatewise server" in line.text and "--port" in line.text
    assert examine(host="192.0.2.1")["port"].state == "fail"


def test_wrong_settings_are_lines() -> None:
    lines = [line for line in doctor.examine({"threads": "-1", "port": "x"}) if line.check == "settings"]
    assert [line.state for line in lines] == ["fail", "fail"]


def test_wrong_variable_does_not_hide_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    port = str(free_port())
    monkeypatch.setenv("SLATEWISE_THREADS", "many")
    monkeypatch.setenv("SLATEWISE_HISTORY_CACHE_MB", "1e9")
    lines = examine(port=port, bundles="missing")
    assert lines["settings"].state == "fail" and "SLATEWISE_THREADS" in lines["settings"].text
    assert lines["port"] == Line("port", "ok", f"127.0.0.1, port {port} is free")
    assert lines["memory"].state == "warn" and "missing" in lines["bundle"].text
    monkeypatch.setenv("SLATEWISE_TREADS", "1")  # no setting
    assert port in examine(port=port)["port"].text


def test_few_descriptors_and_a_large_cache_are_warnings() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 400), hard))
    try:
        assert examine()["descriptors"].state == "warn"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert examine(history_cache_mb="1e9")["memory"].state == "warn"


def test_telemetry_and_old_processors_are_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    assert doctor.telemetry().state == "warn"
    (tmp_path / "cpuinfo").write_text("model name : Old\nflags : sse2\n")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert doctor.cpu(tmp_path / "cpuinfo").state == "warn"
    (tmp_path / "cpuinfo").write_text("model name : New\nflags : sse2 avx2 fma\n")
    assert doctor.cpu(tmp_path / "cpuinfo") == Line("cpu", "ok", doctor.cpu(tmp_path / "cpuinfo").text)
    assert "avx2, fma" in doctor.cpu(tmp_path / "cpuinfo").text


def test_missing_package_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", (("numpy", "base"), ("no-such-package", "serve"), ("nor-this", "train")))
    line = doctor.packages()
    remedy = "pip install 'slatewise[serve]' (in a clone: pip install '.[serve]')"
    assert line.state == "fail" and line.text.endswith(f"missing: no-such-package; run: {remedy}")
