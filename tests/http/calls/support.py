"""The served demo, the native order to compare with, and child processes that hold the libraries of clients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

CLIENTS = Path(__file__).parent / "clients"
DOCUMENT = Path(__file__).parents[3] / "docs" / "calls.md"
COHERE_7 = Path(sys.prefix) / "cohere7"  # `cohere` 7 cannot lie beside `cohere` 5, which langchain-cohere needs
MODEL = "movielens"
KEY = "KEY"
USER = "small:99"
# At every time of day and week, the scores of these differ by at least 0.014, and the history changes the order.
FILMS = ["2081", "1198", "434", "150", "500", "589"]
PAST: dict[str, Any] = {
    "user": USER,
    "history": {"item_ids": ["1200", "1214", "1240", "541"], "actions": ["love", "love", "love", "love"]},
    "request_time": 829828006,
}
QUIET = {  # these libraries would fetch files
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "AWS_EC2_METADATA_DISABLED": "true",
    "HF_HUB_OFFLINE": "1",
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}


def native_order(client: httpx.Client, **members: Any) -> list[str]:
    answer = client.post("/rerank", json={"user": USER, "candidates": {"item_ids": FILMS}} | members)
    assert answer.status_code == 200, answer.text
    order: list[str] = answer.json()["results"]["item_ids"]
    return order


class Child:
    """A process that runs a file of `clients/`, which reads JSON and prints one line of JSON at its end."""

    def __init__(self, name: str, given: dict[str, Any], first_on_path: Path | None = None) -> None:
        environment = os.environ | QUIET
        if first_on_path is not None:
            environment["PYTHONPATH"] = str(first_on_path)
        self.process = subprocess.Popen(
            [sys.executable, str(CLIENTS / name)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(given))
        self.process.stdin.close()
        self.process.stdin = None

    def result(self) -> Any:
        try:
            output, errors = self.process.communicate(timeout=120)
        finally:
            self.process.kill()
        assert self.process.returncode == 0, errors[-3000:]
        return json.loads(output.splitlines()[-1])
