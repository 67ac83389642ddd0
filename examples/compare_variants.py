"""Compares the variants of a ranker on its own example: python examples/compare_variants.py [URL]

Prints for each variant its exit, the best item, and the largest difference of a score from fp32. Needs httpx.
"""

import sys

import httpx


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    with httpx.Client(base_url=url) as client:
        model = client.get("/models").raise_for_status().json()["models"][0]
        example = client.get(f"/models/{model['name']}").raise_for_status().json()["example"]
        exact = client.post("/score", json={**example, "variant": "fp32"}).raise_for_status().json()["results"]
        for variant in model["variants"]:
            answer = client.post("/score", json={**example, "variant": variant}).raise_for_status().json()
            scores = answer["results"]["scores"]
            best = answer["results"]["item_ids"][scores.index(max(scores))]
            difference = max(abs(a - b) for a, b in zip(scores, exact["scores"], strict=True))
            print(f"{variant:15} exit {answer['exit']}, best item {best}, largest difference {difference:.4f}")


if __name__ == "__main__":
    main()
