"""Start a server, ask it the demo's example request, compare the scores with the bundle's, stop it.

    python .ci/first_request.py MANIFEST COMMAND...

Called by: .ci/install-check, with the command that starts a server on a free port. Standard library only, because it
also runs with the Python of a serving environment.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
VARIANT = "fp32"  # its scores differ least between processors


def ask(url: str, body: dict[str, Any]) -> list[float]:
    """Scores of the request's candidates, in input order."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/score", json.dumps(body).encode(), headers)
    scores: list[float] = json.load(DIRECT.open(request, timeout=60))["results"]["scores"]
    return scores


def main() -> None:
    manifest = json.loads(Path(sys.argv[1]).read_text())
    begin = time.monotonic()
    log = ""
    with subprocess.Popen(sys.argv[2:], stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr
            for line in server.stderr:
                log += line
                if found := re.search(r"listening on (http://\S+)", line):
                    break
            else:
                sys.exit(f"the server did not start:\n{log}")
            scores = ask(found[1], manifest["example"] | {"variant": VARIANT})
            seconds = time.monotonic() - begin
        finally:
            server.terminate()
    if server.returncode:
        sys.exit(f"the server stopped with exit code {server.returncode}")
    expected = manifest["variants"][VARIANT]
    weights = sum(manifest["heads"].values())  # the golden scores are sums, and an answer has means
    difference = max(abs(a - b / weights) for a, b in zip(scores, expected["golden_scores"], strict=True))
    bound = expected.get("golden_bound") or expected["bound"]
    print(f"    first answer after {seconds:.1f} s; largest difference of a score {difference:.1e}, bound {bound:.0e}")
    if not difference <= bound:
        sys.exit("the scores are not the expected ones")


if __name__ == "__main__":
    main()
