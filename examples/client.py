"""Asks a server with the package's client: python examples/client.py [URL]

Ranks a few films for a user, with a deadline, and shows how to read a degraded answer and an error. examples/rerank.sh
needs no package.
"""

import sys

from slatewise import Client, SlatewiseError


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else None  # default: SLATEWISE_URL, or else http://127.0.0.1:8000
    with Client(url, timeout=5.0) as client:
        client.wait_until_ready()
        names = [model["name"] for model in client.models()]
        ranker = "movielens" if "movielens" in names else names[0]  # a server with several rankers needs a name
        ranking = client.rerank(
            ranker=ranker,
            user="small:99",
            history=[("318", "love"), ("500", "like"), ("337", "like")],  # oldest first
            candidates=["595", "589", "1", "2028"],  # in the order of your first stage
            deadline_ms=200,
        )
        titles = client.titles(ranker, ranking.item_ids)
        for row in ranking:
            score = "unranked" if row.score is None else f"{row.score:.3f}"  # no score if no model was run
            print(row.item_id, score, titles.get(row.item_id, ""))
        if ranking.degraded:
            print("degraded:", ", ".join(ranking.degraded), "- answered by", ranking.exit)
        try:
            client.rerank(ranker=ranker, candidates=[])
        except SlatewiseError as error:
            print(f"refused: {error.status}: {error.detail}")


if __name__ == "__main__":
    main()
