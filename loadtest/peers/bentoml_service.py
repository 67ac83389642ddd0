"""The same model as a BentoML service, without its adaptive batching.

    bentoml serve loadtest.peers.bentoml_service:Rerank

Called by: `contenders.py`. Calls: `ranker.py`.
"""

from __future__ import annotations

import os
from typing import Any

import bentoml

from loadtest.peers.ranker import Ranker

# Several requests share the session, as in the other peers. The default of BentoML is one thread a worker.
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
