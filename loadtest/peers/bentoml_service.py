"""The same ranker as a BentoML service, without its adaptive batching.

    bentoml serve loadtest.peers.bentoml_service:Rerank

Before: `ranker.py`. After: `contenders.py` starts it.
"""

from __future__ import annotations

import os
from typing import Any

import bentoml

from loadtest.peers.ranker import Ranker

# The session may run for several requests at once, as in the other peers; BentoML's own default is one thread a worker.
THREADS_A_WORKER = 4


@bentoml.service(
    workers=int(os.environ["PEER_WORKERS"]), threads=THREADS_A_WORKER, logging={"access": {"enabled": False}}
)
class Rerank:
    def __init__(self) -> None:
        self.ranker = Ranker.from_environment()

    @bentoml.api(route="/rerank")
    def rerank(self, request: dict[str, Any], /) -> dict[str, Any]:
        return self.ranker.rank(request)
