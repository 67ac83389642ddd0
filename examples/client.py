"""A client with the standard library only: python examples/client.py [URL]

Ranks a few films for a user, with a deadline, and shows how to read a degraded answer and an error.
"""

import json
import sys
import urllib.error
import urllib.request
from typing import Any


def rerank(url: str, body: dict[str, Any], key: str | None = None) -> dict[str, Any]:
    """The answer of POST /rerank. Raises ValueError with the server's reason when the request is refused."""
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{url}/rerank", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        problem = json.load(error)  # RFC 9457
        raise ValueError(f"{error.code}: {problem['detail']}") from None


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    candidates = ["595", "589", "1", "2028"]  # in the order of your first stage
    body = {
        "user": "small:99",
        "history": {"item_ids": ["318", "500", "337"], "actions": ["love", "like", "like"]},
        "candidates": {"item_ids": candidates},
        "deadline_ms": 200,
    }
    answer = rerank(url, body)
    scores = answer["results"]["scores"] or [None] * len(candidates)  # null when the model was not run
    for item, score in zip(answer["results"]["item_ids"], scores, strict=True):
        print(item, "unranked" if score is None else f"{score:.3f}")
    if answer["degraded"]:
        print("degraded:", ", ".join(answer["degraded"]), "- answered by", answer["exit"])
    try:
        rerank(url, {"candidates": {"item_ids": []}})
    except ValueError as error:
        print("refused:", error)


if __name__ == "__main__":
    main()
