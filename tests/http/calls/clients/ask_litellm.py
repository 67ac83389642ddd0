"""Child process of `test_clients.py`: asks with LiteLLM and rerankers, and prints what they returned or raised."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import litellm
from rerankers import Reranker

from examples import run_examples

litellm.suppress_debug_info = True
given = json.load(sys.stdin)
films, url = given["films"], given["url"]
BASES = {
    "cohere": f"{url}/v2/rerank",
    "jina_ai": url,
    "hosted_vllm": f"{url}/v2/rerank",
    "huggingface": f"{url}/tei",
    "infinity": f"{url}/v1",
}
PATHS = {"cohere": "/v1/rerank", "jina": "/v1/rerank", "text-embeddings-inference": "/tei/rerank"}


def ask(provider: str, **changes: Any) -> list[str]:
    call = {"query": given["user"], "documents": films, "api_key": given["key"], "api_base": BASES[provider]}
    answer = litellm.rerank(model=f"{provider}/{given['model']}", max_retries=0, **(call | changes))
    return [films[result["index"]] for result in answer.results]


def attempt(call: Callable[[], list[str]]) -> list[Any]:
    try:
        return call()
    except litellm.exceptions.APIError as error:
        return [type(error).__name__, error.status_code]
    except Exception as error:
        return [type(error).__name__, getattr(error, "status_code", None)]


def ranked(provider: str) -> list[str]:
    where = {"api_key": given["key"], "url": url + PATHS[provider]}
    ranker = Reranker(given["model"], model_type=provider, verbose=0, **where)
    return [result.document.text for result in ranker.rank(query=given["user"], docs=films).results]


found: dict[str, Any] = {provider: attempt(partial(ask, provider)) for provider in BASES}
found["history"] = attempt(lambda: ask("cohere", query=given["history"]))
found["key"] = attempt(lambda: ask("cohere", api_key="wrong"))
found["empty"] = attempt(lambda: ask("cohere", documents=[]))
found["many"] = attempt(lambda: ask("cohere", documents=["1"] * 5000))
found["busy"] = attempt(lambda: ask("cohere", api_base=f"{given['busy']}/v2/rerank"))
found["deadline"] = attempt(lambda: ask("cohere", query=given["late"]))
found["rerankers"] = {provider: ranked(provider) for provider in PATHS}
found["examples"] = run_examples(given["examples"])
print(json.dumps(found))
