"""The log of refused, degraded and slow requests, and the capture: their lines, and the writer that never blocks."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY
from pydantic import ValidationError

from loadtest import replay
from slatewise.http.capture import Capture, appending, capture_line, pseudonym
from slatewise.http.line_writer import WAITING, LineWriter
from slatewise.metrics import STAGES
from slatewise.schemas import RankRequest
from slatewise.settings import Settings
from tests.conftest import DEMO
from tests.support.application import serve

USER = "somebody@example.org"
KEY = "key-of-the-capture"
API_KEY = "key-of-a-client"
BODY: dict[str, Any] = {
    "user": USER,
    "history": {"item_ids": ["1", "2"]},
    "candidates": {"item_ids": ["3", "4", "no-such-item"]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("capture")


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx.Client]:
    settings = Settings(
        bundles=DEMO,
        variants="fp32",
        slow_ms=0,
        log_format="json",
        api_keys=API_KEY,
        capture_file=str(folder / "requests.jsonl"),
        capture_share=1,
        capture_key=KEY,
    )
    with serve(settings) as client:
        client.headers["Authorization"] = f"Bearer {API_KEY}"
        yield client


def lines_of(kind: str, result: str = "written") -> float:
    return REGISTRY.get_sample_value("slatewise_lines_total", {"kind": kind, "result": result}) or 0.0


def logged(
    capsys: pytest.CaptureFixture[str], ask: Callable[[], httpx.Response]
) -> tuple[httpx.Response, list[dict[str, Any]]]:
    """The response and the log lines of a request. A refused request follows, whose line marks the end."""
    capsys.readouterr()
    response = ask()
    headers = {"Authorization": f"Bearer {API_KEY}", "Content-Type": "application/json", "X-Request-ID": "the-last"}
    httpx.post(response.request.url.copy_with(path="/score"), headers=headers, content=b"!", trust_env=False)
    give_up = time.monotonic() + 10
    text = ""
    while '"the-last"' not in text:
        assert time.monotonic() < give_up
        text += capsys.readouterr().err
        time.sleep(0.01)
    return response, [json.loads(line) for line in text.splitlines()][:-1]


def test_ordinary_request_is_not_logged(client: httpx.Client, capsys: pytest.CaptureFixture[str]) -> None:
    response, lines = logged(capsys, lambda: client.post("/rerank", json=BODY))
    assert response.status_code == 200
    assert lines == []


def test_refused_request_is_logged_with_id_and_reason(client: httpx.Client, capsys: pytest.CaptureFixture[str]) -> None:
    response, lines = logged(capsys, lambda: client.post("/rerank", json=BODY | {"id": "r-1", "ranker": "other"}))
    assert response.status_code == 404
    (line,) = lines
    assert (line["id"], line["code"], line["reasons"], line["endpoint"]) == ("r-1", "404", ["not-found"], "/rerank")
    assert line["stages_ms"].keys() == {"parse", "queue"}


def test_request_that_is_not_json_is_logged_with_the_header_id(
    client: httpx.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    _, (line,) = logged(
        capsys,
        lambda: client.post(
            "/score", content=b"{", headers={"Content-Type": "application/json", "X-Request-ID": "r-2"}
        ),
    )
    assert (line["id"], line["code"], line["reasons"], line["ranker"]) == ("r-2", "400", ["not-json"], "")


def test_degraded_request_is_logged_with_reasons_and_stages(
    client: httpx.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    response, (line,) = logged(capsys, lambda: client.post("/rerank", json=BODY | {"id": "r-3", "deadline_ms": 0.001}))
    assert response.json()["degraded"] == line["reasons"] == ["deadline"]
    assert (line["code"], line["ranker"], line["exit"], line["candidates"]) == ("200", "movielens", "input_order", 3)
    assert line["stages_ms"].keys() <= set(STAGES)
    assert sum(line["stages_ms"].values()) == pytest.approx(line["total_ms"], abs=1.0)


def test_slow_request_is_logged_with_its_stages(capsys: pytest.CaptureFixture[str]) -> None:
    with serve(Settings(bundles=DEMO, variants="fp32", slow_ms=0.01, log_format="json")) as client:
        _, (line,) = logged(capsys, lambda: client.post("/rerank", json=BODY))
    assert line["reasons"] == ["slow"] and line["variant"] == "fp32" and line["history_cache"] == "miss"
    assert {"parse", "features", "encode", "score", "serialize"} <= line["stages_ms"].keys()


def test_log_lines_contain_neither_user_ids_nor_keys(
    client: httpx.Client, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for change in ({"deadline_ms": 0.001}, {"ranker": "other"}, {"candidates": {"item_ids": []}}, {"exit": USER}):
        _, lines = logged(
            capsys, lambda change=change: client.post("/rerank", json=BODY | change, headers={"X-User-ID": USER})
        )
        assert lines
        assert not any(secret in json.dumps(lines) for secret in (USER, KEY, API_KEY))
    captured = (folder / "requests.jsonl").read_text()
    assert not any(secret in captured for secret in (USER, KEY, API_KEY))


def test_captured_request_ranks_the_same_when_sent_again(client: httpx.Client, folder: Path) -> None:
    before = lines_of("capture")
    path = folder / "requests.jsonl"
    sent = BODY | {"id": "r-4", "request_time": 978_300_000, "candidates": {"item_ids": ["3", "4"]}}
    scores = client.post("/score", json=sent).json()["results"]["scores"]
    give_up = time.monotonic() + 10
    while lines_of("capture") == before and time.monotonic() < give_up:
        time.sleep(0.01)
    line = path.read_text().splitlines()[-1]
    parsed = RankRequest.model_validate_json(line)
    assert parsed.user == pseudonym(USER, KEY.encode()) and parsed.id is None
    assert client.post("/score", content=line, headers={"Content-Type": "application/json"}).json()["results"][
        "scores"
    ] == pytest.approx(scores, abs=1e-5)
    assert path.stat().st_mode & 0o077 == 0, "histories are private"


def test_capture_line_keeps_all_inputs_and_sets_the_time() -> None:
    request = RankRequest.model_validate(
        BODY | {"id": "r", "candidates": {"item_ids": ["1", "2"], "features": {"popularity": [0.5, None]}}, "top_n": 1}
    )
    line = json.loads(capture_line(request, 978_300_000.0, b"k"))
    assert line == {
        "user": pseudonym(USER, b"k"),
        "history": {"item_ids": ["1", "2"]},
        "candidates": {"item_ids": ["1", "2"], "features": {"popularity": [0.5, None]}},
        "request_time": 978_300_000.0,
        "top_n": 1,
    }


def test_capture_samples_whole_users_at_the_given_share() -> None:
    capture = Capture(None, 0.1, b"k")  # type: ignore[arg-type]
    sampled = [capture.samples(f"u{k}") for k in range(5_000)]
    assert sampled == [capture.samples(f"u{k}") for k in range(5_000)]
    assert 400 < sum(sampled) < 600
    assert 400 < sum(capture.samples(None) for _ in range(5_000)) < 600
    assert pseudonym("u", b"k") != pseudonym("u", b"other key") and len(pseudonym("u", b"k")) == 32


def test_capture_needs_a_key_and_a_share_within_0_and_1() -> None:
    with pytest.raises(ValidationError, match="capture_key"):
        Settings(capture_file="requests.jsonl")
    for share in (0.0, 1.1):
        with pytest.raises(ValidationError, match="capture_share"):
            Settings(capture_share=share)


def test_capture_file_stays_below_its_limit_with_newest_lines(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    write = appending(path, 1_000)
    for k in range(500):
        write(f"{k:08d}\n")
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 1_000
    kept = "".join(file.read_text() for file in (path.with_name("requests.jsonl.1"), path)).split()
    assert kept == [f"{k:08d}" for k in range(500 - len(kept), 500)] and len(kept) > 50


def test_stalled_reader_delays_no_request_and_drops_are_counted() -> None:
    free = threading.Event()
    begun = threading.Event()

    def stuck(_: str) -> None:
        begun.set()
        free.wait(30)

    dropped = lines_of("log", "dropped")
    written = lines_of("log")
    lines = LineWriter("log", stuck)
    begin = time.perf_counter()
    lines.put(lambda: "first")
    assert begun.wait(10)
    for _ in range(WAITING + 50):
        lines.put(lambda: "more")
    assert time.perf_counter() - begin < 5
    assert lines_of("log", "dropped") - dropped == 50
    free.set()
    lines.close()
    assert lines_of("log") - written == WAITING + 1


def test_full_disk_drops_the_line_and_tries_the_next_one() -> None:
    seen = []

    def write(text: str) -> None:
        seen.append(text)
        if len(seen) == 1:
            raise OSError("no space left on device")

    dropped = lines_of("capture", "dropped")
    lines = LineWriter("capture", write)
    lines.put(lambda: "one")
    lines.put(lambda: "two")
    lines.close()
    assert seen == ["one\n", "two\n"] and lines_of("capture", "dropped") - dropped == 1


def test_replay_of_one_bundle_on_two_servers_has_no_difference(client: httpx.Client, tmp_path: Path) -> None:
    with serve(Settings(bundles=DEMO, variants="fp32")) as other:
        path = tmp_path / "capture.jsonl"
        requests = [
            BODY | {"candidates": {"item_ids": [str(k) for k in range(1, n)]}, "request_time": 978_300_000}
            for n in (2, 15, 30)
        ]
        path.write_text("".join(json.dumps(request | {"deadline_ms": 1}) + "\n" for request in requests))
        with pytest.raises(ValueError, match="not every request was answered"):
            replay.replay(
                replay.read(path), [client.base_url.port or 0, other.base_url.port or 0]
            )  # the first server requires a key
        result = replay.replay(replay.read(path), [other.base_url.port or 0] * 2)
    assert [server["statuses"] for server in result["servers"]] == [{200: 3}] * 2
    found = result["difference"]
    assert (
        found["answers"],
        found["candidates"],
        found["kendall_tau"],
        found["top_10_overlap"],
        found["same_first"],
    ) == (3, 44, 1.0, 1.0, 1.0)
    assert found["largest_difference"] <= 1e-5 and found["other_exit"] == 0


def test_compare_of_swapped_scores_measures_the_difference() -> None:
    def answer(scores: list[float]) -> bytes:
        return json.dumps(
            {"ranker": "r", "version": 1, "variant": "v", "exit": "set", "results": {"scores": scores}}
        ).encode()

    found = replay.compare([answer([0.3, 0.2, 0.1])], [answer([0.2, 0.3, 0.1])])
    assert found["largest_difference"] == pytest.approx(0.1)
    assert (
        found["kendall_tau"] == pytest.approx(1 / 3, abs=1e-5)
        and found["same_first"] == 0
        and found["top_10_overlap"] == 1
    )
