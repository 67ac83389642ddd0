"""The same model as a LitServe API: HTTP in one process, the model in others.

    python -m loadtest.peers.litserve_server

Called by: `contenders.py`, with PEER_PORT and PEER_WORKERS. Calls: `ranker.py`.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import litserve

from loadtest.peers.ranker import Ranker


class RerankApi(litserve.LitAPI):
    """Asynchronous, so a worker runs several requests concurrently; a synchronous one runs them one at a time."""

    def setup(self, device: str) -> None:
        self.ranker = Ranker.from_environment()

    async def predict(self, request: dict[str, Any]) -> dict[str, Any]:
        return await asyncio.to_thread(self.ranker.rank, request)


def main() -> None:
    api = RerankApi(api_path="/rerank", enable_async=True)
    server = litserve.LitServer(
        api, accelerator="cpu", workers_per_device=int(os.environ["PEER_WORKERS"]), fast_queue=True
    )
    server.run(host="127.0.0.1", port=int(os.environ["PEER_PORT"]), log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
