"""No key, password or user id in what a server writes, whatever is asked of it and whatever breaks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import redis

from tests.conftest import DEMO
from tests.support.network import free_port
from tests.support.redis_server import redis_command

SECRETS = {
    "SLATEWISE_API_KEYS": "key-of-the-shop-1",
    "SLATEWISE_METRICS_KEY": "key-of-prometheus-2",
    "SLATEWISE_CAPTURE_KEY": "key-of-the-capture-3",
}
FILE_KEY, WRONG_KEY, PASSWORD, NEW_PASSWORD = "key-in-the-file-4", "key-that-is-wrong-5", "password-6", "password-7"
USER = "user-id-8-ü"


def ask_all(client: httpx.Client, example: dict[str, Any]) -> None:
    """Requests of every kind, right and wrong, each with the user id in all places that hold one."""
    mine = example | {"user": USER}
    header = {"X-User-ID": USER.encode()}
    bodies: list[Any] = [
        mine,
        mine | {"exit": "none"},
        mine | {"ranker": USER},
        mine | {USER: 1},
        mine | {"history": {"item_ids": [USER], "timestamps": [USER]}},
        mine | {"deadline_ms": 0.001, "allow_degraded": False},
        mine | {"id": USER},
        [USER],
        USER,
    ]
    for path in ("/rerank", "/score", "/encode", "/events", "/v1/rerank", "/v2/rerank", "/personalize-ranking"):
        for body in bodies:
            client.post(path, json=body, headers=header)
        client.post(path, content=f'{{"user": "{USER}'.encode(), headers=header)
        client.post(path, content=USER.encode() * 100_000, headers=header)
        client.post(path, json=mine, headers={"X-User-ID": b"another" + USER.encode()})
    event = {"user": USER, "item_id": USER, "action": USER}
    client.post("/events", json={"events": [event, event | {"timestamp": -1}]})
    client.post("/events", json=event)
    client.post("/rank/x", json={"event": "ranking", "user": USER, "items": [{"id": USER}]})
    client.post("/v2/models/movielens/infer", json={"id": USER, "inputs": [{"name": "user", "data": [USER]}]})
    client.delete(f"/users/{USER}")
    for path in (f"/models/{USER}", f"/{USER}", f"/metrics?user={USER}", f"/models?key={FILE_KEY}"):
        client.get(path)
    for key in (WRONG_KEY, f"{WRONG_KEY} user-id-8"):
        for path in ("/rerank", "/events", "/metrics"):
            client.post(path, json=mine, headers={"Authorization": f"Bearer {key}"})
    signed = f"AWS4-HMAC-SHA256 Credential={WRONG_KEY}/20260101/x/personalize/aws4_request, Signature={FILE_KEY}"
    client.post("/personalize-ranking", json={"userId": USER, "inputList": ["1"]}, headers={"Authorization": signed})


def test_logs_hold_no_secret_and_no_user_id(tmp_path: Path) -> None:
    """Every request is logged as slow; Redis loses its password, then dies; then the file of keys breaks."""
    redis_port, port = free_port(), free_port()
    command = redis_command(tmp_path, redis_port, "--requirepass", PASSWORD)
    store = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    keys = tmp_path / "keys"
    keys.write_text(f"{FILE_KEY}\n")
    settings = SECRETS | {
        "SLATEWISE_API_KEYS_FILE": str(keys),
        "SLATEWISE_REDIS_URL": f"redis://:{PASSWORD}@127.0.0.1:{redis_port}/0",
        "SLATEWISE_PORT": str(port),
        "SLATEWISE_VARIANTS": "fp32",
        "SLATEWISE_SLOW_MS": "0.001",
        "SLATEWISE_CAPTURE_FILE": str(tmp_path / "capture"),
        "SLATEWISE_CAPTURE_SHARE": "1",
        "SLATEWISE_ENCODE_ON_EVENTS": "true",
        "SLATEWISE_DRAIN_SECONDS": "0",
        "PYTHONUNBUFFERED": "1",
    }
    log = (tmp_path / "log").open("wb")
    server = subprocess.Popen(
        [sys.executable, "-m", "slatewise", "serve"], env=os.environ | settings, stdout=log, stderr=subprocess.STDOUT
    )
    try:
        example = json.loads(max((DEMO / "movielens").glob("[0-9]*/manifest.json")).read_text())["example"]
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}",
            headers={"Authorization": f"Bearer {FILE_KEY}"},
            trust_env=False,
            timeout=30,
        ) as client:
            wait_until_ready(client, server)
            ask_all(client, example)
            with redis.Redis(port=redis_port, password=PASSWORD) as admin:
                admin.config_set("requirepass", NEW_PASSWORD)
                admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            ask_all(client, example)
            store.kill()
            keys.write_bytes(b"\xff" + FILE_KEY.encode())
            ask_all(client, example)
            with socket.create_connection(("127.0.0.1", port)) as junk:
                junk.sendall(f"{USER} {FILE_KEY}\r\n\r\n".encode())
            wait_for_line(tmp_path / "log", "api_keys: the new files are not used")
            server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    finally:
        for process in (server, store):
            process.kill()
            process.wait()
        log.close()
    written = (tmp_path / "log").read_text() + (tmp_path / "capture").read_text()
    assert "reasons=slow" in written and "redis" in written
    known = (*SECRETS.values(), FILE_KEY, WRONG_KEY, PASSWORD, NEW_PASSWORD, "user-id-8")
    assert {secret: context(written, secret) for secret in known if secret in written} == {}


def context(text: str, part: str) -> str:
    return text[max(0, text.index(part) - 300) : text.index(part) + 100]


def wait_until_ready(client: httpx.Client, server: subprocess.Popen[bytes]) -> None:
    give_up = time.monotonic() + 60
    while True:
        assert time.monotonic() < give_up and server.poll() is None
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.05)


def wait_for_line(path: Path, text: str) -> None:
    give_up = time.monotonic() + 30
    while text not in path.read_text():
        assert time.monotonic() < give_up
        time.sleep(0.05)
