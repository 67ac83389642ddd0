"""The examples of clients run against a real server."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The demo, served by a process of its own."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLATEWISE_")}
    environment |= {
        "PYTHONPATH": f"{ROOT / 'app'}:{ROOT / 'models'}",
        "SLATEWISE_PORT": str(port),
        "SLATEWISE_BUNDLES": str(ROOT / "models" / "bundles"),
    }
    server = subprocess.Popen([sys.executable, "-m", "slatewise", "serve"], env=environment, stdout=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, "the server ended"
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def run(*command: str | Path) -> list[str]:
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return result.stdout.splitlines()


def test_shell_example_prints_every_candidate(url: str) -> None:
    ranked = run(EXAMPLES / "rerank.sh", url)
    assert len(ranked) == 24 and all(item.isdigit() for item in ranked)


def test_client_example_ranks_and_shows_an_error(url: str) -> None:
    *ranked, refused = run(sys.executable, EXAMPLES / "client.py", url)
    assert sorted(line.split()[0] for line in ranked[:4]) == ["1", "2028", "589", "595"]
    assert refused.startswith("refused: 422: /candidates/item_ids")


def test_variant_example_compares_with_fp32(url: str) -> None:
    lines = run(sys.executable, EXAMPLES / "compare_variants.py", url)
    assert lines[0].startswith("fp32 ") and lines[0].endswith("largest difference 0.0000")
    assert len(lines) >= 2
