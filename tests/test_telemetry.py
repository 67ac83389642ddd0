"""The server talks to its clients and its Redis, and to nothing else; it writes nothing into the home folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Starts a server, asks it one request and stops it. All in one process tree, so that one tracer or namespace holds it.
DRIVER = """
import json, re, subprocess, sys, time, urllib.request
server = subprocess.Popen(
    [sys.executable, "-m", "slatewise", "serve", "--port", "0", "--variants", "fp32"], stderr=subprocess.PIPE, text=True
)
for line in server.stderr:
    sys.stderr.write(line)
    if found := re.search(r"listening on (http://127\\.0\\.0\\.1:\\d+)", line):
        break
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
example = json.load(opener.open(found[1] + "/models/movielens"))["example"]
body = json.dumps(example).encode()
headers = {"Content-Type": "application/json"}
assert json.load(opener.open(urllib.request.Request(found[1] + "/score", body, headers)))
time.sleep(1)  # telemetry is sent from a thread of its own
server.terminate()
server.communicate()
sys.exit(server.returncode)
"""


def works(*command: str) -> bool:
    return bool(shutil.which(command[0])) and subprocess.run(command, capture_output=True).returncode == 0


def run_driver(prefix: list[str], home: Path) -> None:
    paths = os.pathsep.join([str(ROOT / "app"), str(ROOT / "models")])
    home.mkdir()
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [*prefix, sys.executable, "-c", DRIVER]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "telemetry" not in done.stderr.lower()
    assert not list(home.rglob("*"))


@pytest.mark.skipif(not works("strace", "true"), reason="needs strace (apt-get install strace), allowed to trace")
def test_server_connects_to_loopback_only(tmp_path: Path) -> None:
    """Neither name look-ups nor connections to other hosts, also not for a moment."""
    trace = tmp_path / "trace"
    run_driver(
        ["strace", "-f", "-q", "-e", "trace=connect,sendto,sendmsg,sendmmsg", "-o", str(trace)], tmp_path / "home"
    )
    addresses = re.findall(r"sa_family=AF_(?!UNIX|UNSPEC)\w+.*", trace.read_text())
    assert [line for line in addresses if "127.0.0.1" in line], "the driver's own requests"
    assert [line for line in addresses if "127.0.0.1" not in line] == []
    assert not re.search(r'sun_path="[^"]*(nscd|resolve)', trace.read_text()), "a name look-up through a local daemon"


@pytest.mark.skipif(not works("unshare", "-rn", "ip", "link"), reason="needs user and network namespaces, and ip")
def test_server_serves_without_a_network(tmp_path: Path) -> None:
    """In an empty network namespace, which has nothing but loopback."""
    loopback = 'ip link set lo up && exec "$@"'
    run_driver(["unshare", "-rn", "sh", "-c", loopback, "sh"], tmp_path / "home")


@pytest.mark.parametrize("package", ["slatewise", "slatewise_train"])
def test_import_turns_telemetry_off(package: str) -> None:
    """Of ONNX Runtime, which reads the variable when it is imported itself."""
    code = f"import sys, os, {package}; print(os.environ['ORT_DISABLE_TELEMETRY'], 'onnxruntime' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "1 False\n"


@pytest.mark.parametrize("name", ["Makefile", "Dockerfile"])
def test_entry_points_turn_telemetry_off(name: str) -> None:
    assert re.search(r"ORT_DISABLE_TELEMETRY ?:?= ?1", (ROOT / name).read_text())
