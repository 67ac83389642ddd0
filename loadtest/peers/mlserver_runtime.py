"""The same model as an MLServer runtime; the body is one JSON string in a V2 inference request.

    mlserver start loadtest/peers/mlserver

It follows "Serving a custom model with JSON serialization" of MLServer's documentation.
Called by: `contenders.py`, which also wraps the bodies. Calls: `ranker.py`.
"""

from __future__ import annotations

import asyncio
import json

from mlserver import MLModel
from mlserver.codecs import StringCodec
from mlserver.types import InferenceRequest, InferenceResponse

from loadtest.peers.ranker import Ranker


class RerankRuntime(MLModel):
    async def load(self) -> bool:
        self.ranker = Ranker.from_environment()
        return True

    def answer(self, body: str) -> str:
        return json.dumps(self.ranker.rank(json.loads(body)))

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Ranks in a thread, so the event loop stays free and requests run concurrently."""
        (body,) = StringCodec.decode_input(payload.inputs[0])
        answer = await asyncio.to_thread(self.answer, body)
        return InferenceResponse(model_name=self.name, outputs=[StringCodec.encode_output("answer", [answer])])
