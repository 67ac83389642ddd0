#!/bin/sh
# Sends the demo ranker's own example to a running server: examples/rerank.sh [URL]
# Prints the ranked ids, best first. Needs curl and python3.
set -eu
url=${1:-http://127.0.0.1:8000}

curl -sS --fail-with-body "$url/models/movielens" |
    python3 -c 'import json, sys; json.dump(json.load(sys.stdin)["example"], sys.stdout)' |
    curl -sS --fail-with-body "$url/rerank" -H 'Content-Type: application/json' --data-binary @- |
    python3 -c 'import json, sys; print(*json.load(sys.stdin)["results"]["item_ids"], sep="\n")'
