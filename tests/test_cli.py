"""The command `slatewise`, run as a process: help, exit codes, one line for each failure, and how it stops."""

from __future__ import annotations

import os
import pkgutil
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from slatewise import VERSION
from slatewise.bundle.manifest import bundle_folder
from slatewise.cli import COMMANDS, EXPECTED_BY_NAME, run_main
from slatewise.settings import Settings

ROOT = Path(__file__).parent.parent
BUNDLE = bundle_folder(ROOT / "models" / "bundles" / "movielens")
SLATEWISE = (sys.executable, "-m", "slatewise")
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without settings, and these variables."""
    paths = os.pathsep.join([str(ROOT / "app"), str(ROOT / "models")])
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("SLATEWISE_")}
    return kept | {"PYTHONPATH": paths} | variables


def run(*arguments: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SLATEWISE, *arguments], env=environment(**variables), cwd=cwd, capture_output=True, text=True, timeout=60
    )


@contextmanager
def serve(*flags: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A server on the demo bundle and a free port, still loading when the context is entered."""
    command = [*SLATEWISE, "serve", "--port", "0", "--variants", "fp32", *flags]
    process = subprocess.Popen(command, env=environment(**variables), stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """Standard error up to the end of the line that contains `text`."""
    assert process.stderr
    lines = []
    for line in process.stderr:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"no {text!r} in: {''.join(lines)}")


def get(process: subprocess.Popen[str], path: str, log: str) -> int:
    """Status of a GET, asked at the address in the log."""
    found = re.search(r"listening on (http://127\.0\.0\.1:\d+)", log)
    assert found and process.poll() is None
    try:
        return int(DIRECT.open(found[1] + path, timeout=10).status)
    except urllib.error.HTTPError as error:
        return error.code


def test_help_lists_every_command() -> None:
    result = run("--help")
    assert result.returncode == 0
    assert all(re.search(rf"^  {name} +\S", result.stdout, re.MULTILINE) for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_names_the_command(name: str) -> None:
    result = run(name, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: slatewise {name} ")


def test_help_of_serve_describes_every_setting() -> None:
    shown = " ".join(run("serve", "--help").stdout.split())
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')} VALUE" in shown
        assert f"[SLATEWISE_{name.upper()}" in shown


def test_version_is_the_packages() -> None:
    assert run("--version").stdout == f"slatewise {VERSION}\n"


@pytest.mark.parametrize("arguments", [(), ("srve",), ("serve", "--prot", "1"), ("serve", "8000"), ("push",)])
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("usage: slatewise")
    assert "Traceback" not in result.stderr


FAILURES = [
    ({"SLATEWISE_PORT": "http"}, (), r"SLATEWISE_PORT: .*integer.*Port to listen on"),
    ({}, ("--port", "70000"), r"--port: .*65535"),
    ({"SLATEWISE_THREADS": "2"}, ("--threads", "-1"), r"--threads: "),
    ({"SLATEWISE_BUNDELS": "x"}, (), r"SLATEWISE_BUNDELS .*SLATEWISE_BUNDLES"),
    ({"SLATEWISE_API_KEY": "x"}, (), r"SLATEWISE_API_KEY .*SLATEWISE_API_KEYS"),
    ({"SLATEWISE_API_KEY": "x", "SLATEWISE_API_KEYS": ","}, (), r"SLATEWISE_API_KEYS: .*no key"),
    ({"SLATEWISE_API_KEYS": ","}, (), r"SLATEWISE_API_KEYS: .*no key"),
    ({"SLATEWISE_CAPTURE_FILE": "f"}, (), r"SLATEWISE_CAPTURE_KEY: "),
    ({}, ("--redis-url", "http://h"), r"--redis-url: must start with redis://"),
    ({}, ("--bundles", "/nowhere"), r"/nowhere: .*SLATEWISE_BUNDLES \(--bundles\)"),
    ({}, ("--variants", "fp8"), r"fp8.* it has fp32"),
    ({}, ("--host", "192.0.2.1"), r"192\.0\.2\.1.*SLATEWISE_HOST \(--host\)"),
]


@pytest.mark.parametrize(("variables", "flags", "message"), FAILURES)
def test_serve_failure_is_one_line(variables: dict[str, str], flags: tuple[str, ...], message: str) -> None:
    result = run("serve", *flags, **variables)
    assert result.returncode == 1
    *logged, line = result.stderr.splitlines()
    assert re.match(f"slatewise serve: error: .*{message}", line), result.stderr
    assert not [other for other in logged if "slatewise serve" in other or "listening" in other]
    assert "Traceback" not in result.stderr


UNREACHABLE = ("--redis-url", "redis://127.0.0.1:1/0")
FAILURES_OF_COMMANDS = {
    "serve": ("--bundles", "missing"),
    "rank": ("u", "1", "--url", "http://127.0.0.1:1"),
    "batch": ("missing.parquet", "out.parquet", "--bundle", str(BUNDLE)),
    "push": (str(BUNDLE), *UNREACHABLE),
    "store": ("status", str(BUNDLE), *UNREACHABLE),
    "check-bundle": ("missing",),
    "sign": ("missing.pem",),
    "init": ("missing.csv",),
    "validate": ("missing.toml",),
    "train": ("missing.toml",),
    "limaml": ("missing.toml",),
    "refresh": (str(BUNDLE), "missing.parquet", *UNREACHABLE),
    "export": ("missing.toml",),
    "compress": ("missing",),
    "update": ("missing.toml", "--from", "missing"),
}


@pytest.mark.parametrize("name", FAILURES_OF_COMMANDS)
def test_failure_of_a_command_is_one_line(name: str, tmp_path: Path) -> None:
    result = run(name, *FAILURES_OF_COMMANDS[name], cwd=tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    assert re.fullmatch(rf"slatewise {name}: error: .*(missing|127\.0\.0\.1:1).*\n", result.stderr)


def test_only_doctor_reports_its_failures_itself() -> None:
    assert COMMANDS.keys() - FAILURES_OF_COMMANDS.keys() == {"doctor"}
    result = run("doctor", "--bundles", "missing", "--port", "0")
    assert result.returncode == 1 and "fail  bundle" in result.stdout
    assert re.fullmatch(r"slatewise doctor: 1 of \d+ checks failed: bundle\n", result.stderr)


def test_faults_of_a_request_are_one_line_each() -> None:
    result = run("rank", "u", "1", "--bundle", str(BUNDLE), "--top", "0", "--exit", "none")
    assert result.returncode == 1
    assert re.findall(r"^slatewise rank: error: (/\w+): ", result.stderr, re.MULTILINE) == ["/exit", "/top_n"]


def test_failure_of_an_offline_tool_is_one_line(tmp_path: Path) -> None:
    tool = "slatewise_train.meta.personalization"
    command = [sys.executable, "-m", tool, "missing.toml"]
    result = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert re.fullmatch(rf"python -m {tool}: error: .*missing\.toml.*\n", result.stderr)


@pytest.mark.parametrize("name", sorted(EXPECTED_BY_NAME))
def test_error_listed_by_name_is_reported_in_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    class Special(pkgutil.resolve_name(name)):  # type: ignore[misc]
        pass

    def fail(_: object) -> None:
        raise Special("first\n second")

    assert run_main("slatewise x", fail, []) == 1
    assert capsys.readouterr().err == "slatewise x: error: first second\n"


def test_unexpected_error_keeps_its_traceback() -> None:
    with pytest.raises(KeyError):
        run_main("slatewise x", lambda _: {}["a key"], [])


def test_taken_port_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = run("serve", "--port", str(port))
    assert result.returncode == 1
    assert re.fullmatch(
        rf"slatewise serve: error: .*port {port}: .* in use.*SLATEWISE_PORT \(--port\)\n", result.stderr
    )


def test_several_faults_are_one_line_each() -> None:
    result = run("serve", "--threads", "-1", SLATEWISE_MAX_HISTORY="0")
    assert result.returncode == 1
    assert re.findall(r"error: (\S+):", result.stderr) == ["--threads", "SLATEWISE_MAX_HISTORY"]


def test_missing_package_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from slatewise.cli import main; sys.exit(main(['train', 'x.toml']))"
    )
    result = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    remedy = "pip install 'slatewise[train]' (in a clone: pip install '.[train]')"
    assert result.stderr == f"slatewise train: error: the package torch is missing; run: {remedy}\n"


def test_check_bundle_prints_variants_and_refusals(tmp_path: Path) -> None:
    result = run("check-bundle", str(BUNDLE))
    assert result.returncode == 0
    assert re.fullmatch(rf"movielens version {BUNDLE.name} serves the variants .*\(default\).*\n", result.stdout)
    broken = tmp_path / "movielens" / BUNDLE.name
    for path in (path for path in BUNDLE.rglob("*") if path.is_file()):
        (broken / path.relative_to(BUNDLE)).parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes()
        (broken / path.relative_to(BUNDLE)).write_bytes(content[:-1] if path.match("int8/dot.onnx") else content)
    result = run("check-bundle", str(tmp_path))
    assert result.returncode == 0
    assert re.search(r"variant int8 is not served: .*int8/dot\.onnx", result.stdout)
    (broken / "items.npy").write_bytes(b"")
    for path in (broken, tmp_path):
        result = run("check-bundle", str(path))
        assert result.returncode == 1
        assert "items.npy" in result.stdout + result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_flag_takes_precedence_over_variable() -> None:
    with serve(SLATEWISE_PORT="1", SLATEWISE_VARIANTS="int8") as process:
        log = read_until(process, "listening on")
        assert "variants fp32" in log
        assert get(process, "/readyz", log) == 200


def test_kubernetes_service_links_are_ignored() -> None:
    links = {
        "SLATEWISE_PORT": "tcp://10.0.0.1:8000",
        "SLATEWISE_SERVICE_HOST": "10.0.0.1",
        "SLATEWISE_SERVICE_PORT": "8000",
        "SLATEWISE_PORT_8000_TCP_ADDR": "10.0.0.1",
        "SLATEWISE_REDIS_PORT": "tcp://10.0.0.2:6379",
    }
    with serve(**links) as process:
        assert "SLATEWISE_PORT is the address of a Kubernetes Service" in read_until(process, "listening on")


def test_ctrl_c_ends_quietly_with_130() -> None:
    with serve() as process:
        read_until(process, "listening on")
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[1] == ""
        assert process.returncode == 130


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGHUP, 0)])
def test_signal_before_listening_ends_quietly(number: int, code: int) -> None:
    with serve() as process:
        read_until(process, "serving movielens")  # loaded, but not yet listening
        process.send_signal(number)
        rest = process.communicate(timeout=30)[1]
        assert process.returncode == code
        assert "Traceback" not in rest and "Warning" not in rest


def health_check(port: str) -> int:
    """Exit code of the image's health check."""
    command = [sys.executable, "-I", "-S", str(ROOT / "deploy" / "health_check.py")]
    variables = {"SLATEWISE_PORT": port, "http_proxy": "http://127.0.0.1:9"}
    return subprocess.run(command, env=environment(**variables), stderr=subprocess.DEVNULL, timeout=30).returncode


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_drain_serves_on_while_not_ready(number: int) -> None:
    with serve("--drain-seconds", "1") as process:
        log = read_until(process, "listening on")
        port = log.rstrip().rpartition(":")[2]
        assert get(process, "/readyz", log) == 200
        assert health_check(port) == 0
        process.send_signal(number)
        while get(process, "/readyz", log) == 200:
            pass
        assert get(process, "/readyz", log) == 503
        assert health_check(port) == 1
        assert get(process, "/models", log) == 200
        rest = process.communicate(timeout=30)[1]
        assert process.returncode == 0
        assert "Traceback" not in rest
        assert health_check(port) == 1


@pytest.mark.parametrize("command", [("rank", "u", "1", "2", "--bundle", str(BUNDLE)), ("doctor", "--port", "0")])
def test_output_that_nobody_reads_ends_quietly(command: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*SLATEWISE, *command], env=environment(), stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60
        )
    finally:
        os.close(writer)
    assert done.returncode == 141
    assert "Broken pipe" not in done.stderr and "Traceback" not in done.stderr and "Exception" not in done.stderr
