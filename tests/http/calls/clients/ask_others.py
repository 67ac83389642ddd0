"""Child process of `test_clients.py`: asks with langchain-cohere, boto3 and tritonclient, and prints the results."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import boto3
import numpy as np
import tritonclient.http as triton
from botocore.config import Config
from botocore.exceptions import ClientError
from langchain_cohere import CohereRerank
from langchain_core.documents import Document
from tritonclient.utils import InferenceServerException

from examples import run_examples

given = json.load(sys.stdin)
films, url, key, model = given["films"], given["url"], given["key"], given["model"]
NO_RETRIES = Config(retries={"total_max_attempts": 1}, proxies={})
ARN = "arn:aws:personalize:us-east-1:000000000000:campaign/"


def attempt(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except ClientError as error:
        response = error.response
        return [type(error).__name__, response["Error"]["Code"], response["ResponseMetadata"]["HTTPStatusCode"]]
    except InferenceServerException as error:
        return [type(error).__name__, error.status(), error.message()]


def lang() -> dict[str, Any]:
    reranker = CohereRerank(model=model, cohere_api_key=key, base_url=url, top_n=len(films))
    objects = [{"id": film} for film in films]
    by_page = reranker.compress_documents([Document(page_content=film) for film in films], given["user"])
    return {
        "objects": [films[r["index"]] for r in reranker.rerank(objects, given["user"], rank_fields=["id"])],
        "texts": [films[r["index"]] for r in reranker.rerank(films, given["history"])],
        "pages": [document.page_content for document in by_page],
    }


def personalize(where: str = url, access_key: str = key) -> Any:
    secrets = {"aws_access_key_id": access_key, "aws_secret_access_key": "not checked"}
    return boto3.client(
        "personalize-runtime", endpoint_url=where, region_name="us-east-1", config=NO_RETRIES, **secrets
    )


def items(client: Any, ranker: str = model, ids: list[str] = films) -> list[str]:
    answer = client.get_personalized_ranking(campaignArn=ARN + ranker, userId=given["user"], inputList=ids)
    assert isinstance(answer["recommendationId"], str)
    return [item["itemId"] for item in answer["personalizedRanking"]]


def aws() -> dict[str, Any]:
    return {
        "plain": items(personalize()),
        "many": len(items(personalize(), ids=["1"] * 1000)),
        "too many": attempt(lambda: items(personalize(), ids=["1"] * 5000)),
        "empty": attempt(lambda: items(personalize(), ids=[])),
        "model": attempt(lambda: items(personalize(), ranker="none")),
        "key": attempt(lambda: items(personalize(access_key="wrong"))),
        "busy": attempt(lambda: items(personalize(given["busy"]))),
    }


def tensors(binary: bool, ids: list[Any] = films, **more: Any) -> list[Any]:
    found = []
    for name, column in ({"user": [given["user"]], "candidates.item_ids": ids} | more).items():
        array = np.array(column, dtype=np.float64 if isinstance(column[0], float) else object)
        tensor = triton.InferInput(name, [len(column)], "FP64" if isinstance(column[0], float) else "BYTES")
        found.append(tensor.set_data_from_numpy(array, binary_data=binary))
    return found


def sorted_films(answer: Any) -> list[str]:
    return [films[i] for i in np.argsort(-answer.as_numpy("scores"), kind="stable")]


def oip() -> dict[str, Any]:
    client = triton.InferenceServerClient(url.removeprefix("http://"))
    headers = {"Authorization": f"Bearer {key}"}
    busy = triton.InferenceServerClient(given["busy"].removeprefix("http://"))
    past = json.loads(given["history"])
    history = {f"history.{name}": column for name, column in past["history"].items()}
    history["request_time"] = [float(past["request_time"])]

    def infer(inputs: list[Any], **options: Any) -> Any:
        return client.infer(model, inputs, headers=dict(headers), **options)  # it writes into the headers

    wanted = [triton.InferRequestedOutput(name, binary_data=name == "scores") for name in ("scores", "heads.like")]
    mixed = infer(tensors(True), outputs=wanted, request_id="r1")
    packed = {"request_compression_algorithm": "gzip", "response_compression_algorithm": "gzip"}
    metadata = client.get_model_metadata(model, headers=headers)
    version = metadata["versions"][0]
    return {
        "health": [client.is_server_live(), client.is_server_ready()],
        "ready": [
            client.is_model_ready(model, headers=headers),
            client.is_model_ready(model, version, headers=headers),
            client.is_model_ready(model, "99", headers=headers),
            client.is_model_ready("none", headers=headers),
        ],
        "server": client.get_server_metadata(headers=headers),
        "model": metadata,
        "version": client.get_model_metadata(model, version, headers=headers) == metadata,
        "binary": sorted_films(infer(tensors(True))),
        "json": sorted_films(infer(tensors(False), outputs=[triton.InferRequestedOutput("scores", binary_data=False)])),
        "by version": sorted_films(infer(tensors(True), model_version=version)),
        "history": sorted_films(infer(tensors(True, **history))),
        "history json": sorted_films(infer(tensors(False, **history))),
        "packed": sorted_films(infer(tensors(True), **packed)),
        "mixed": [sorted_films(mixed), mixed.get_response()["id"], mixed.as_numpy("heads.like").shape],
        "unknown version": attempt(lambda: infer(tensors(True), model_version="99")),
        "empty": attempt(lambda: infer(tensors(True, ids=[""]))),
        "type": attempt(lambda: infer(tensors(True, ids=[1.5]))),
        "many": attempt(lambda: infer(tensors(True, ids=["1"] * 5000))),
        "input": attempt(lambda: infer(tensors(True, text=["a"]))),
        "deadline": attempt(
            lambda: infer(tensors(True), timeout=1, parameters={"allow_degraded": False}),
        ),
        "key": attempt(lambda: client.infer(model, tensors(True))),
        "busy": attempt(lambda: busy.infer(model, tensors(True), headers=dict(headers))),
    }


examples = run_examples(given["examples"])
print(json.dumps({"langchain": lang(), "aws": aws(), "oip": oip(), "examples": examples}))
