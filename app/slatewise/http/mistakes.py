"""Names the likely mistake in a wrong body of /rerank and /score: times in milliseconds, rows instead of columns, a
misspelt member, the body of another ranking API. In events, histories and foreign calls: a time in another unit.

Runs only after Pydantic has refused a body. The texts name members and paths, and never repeat a value.

Called by: `rank.py`, `events.py` and `calls/`. Calls: `problems.py`, and `schemas.py` for the members that exist.
"""

from __future__ import annotations

import difflib
import re
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from slatewise.errors import Invalid, NotJson, RankingError, pointer
from slatewise.http.problems import TOO_MANY_FAULTS, faults_of, member_path
from slatewise.pruning import Prune
from slatewise.schemas import LAST_TIME, Candidates, History, RankRequest

# Another ranking API is recognised by these members at the top of a body without candidates.
ANOTHER_API: dict[frozenset[str], tuple[str, str]] = {
    frozenset(("query", "documents")): ("Cohere's and Jina's rerank", "/v2/rerank"),
    frozenset(("query", "texts")): ("TEI's rerank", "/tei/rerank"),
    frozenset(("inputList",)): ("AWS GetPersonalizedRanking", "/personalize-ranking"),
    frozenset(("inputs",)): ("the Open Inference Protocol", "/v2/models/{ranker}/infer"),
    frozenset(("items",)): ("Metarank", "/rank/{ranker}"),  # if the items are objects
}

KNOWN: dict[tuple[int | str, ...], list[str]] = {  # the members of each object, by its path
    (): list(RankRequest.model_fields),
    ("history",): list(History.model_fields),
    ("candidates",): list(Candidates.model_fields),
    ("prune",): list(Prune.model_fields),
}
# The names that other APIs have for our members: in lower case, without separators.
OTHER_NAMES = {
    "user": "userid uid customerid visitorid",
    "ranker": "model modelname modelid rankername",
    "top_n": "topk k n limit size numresults",
    "request_time": "timestamp time now datetime",
    "head_weights": "weights",
    "deadline_ms": "timeout timeoutms deadline",
    "id": "requestid",
    "candidates.item_ids": "items documents texts ids candidateids inputlist",
    "candidates.item_ids (to rank) or history.item_ids (past events)": "itemids itemid",
    "candidates.features": "features",
    "candidates.fields": "fields metadata",
    "history.item_ids": "events interactions clicks",
    "history.actions": "actions eventtypes",
    "history.timestamps": "timestamps",
    "history.offset": "offset",
}
OTHER_COLUMN_NAMES = {
    "item_ids": "items ids id item itemid documents",
    "actions": "action types eventtypes",
    "timestamps": "timestamp times time ts datetimes",
    "features": "numeric numericfeatures",
    "fields": "metadata categorical",
}
COLUMNS = {
    "candidates": 'must be an object of columns: {"item_ids": [...]}',
    "history": 'must be an object of columns: {"item_ids": [...], "timestamps": [...]}',
    "prune": 'must be an object of numbers, {"point": 500, "set": 100}, or false',
}
UNITS = {  # powers of ten between which the times of 1973 to 2286 lie
    "milliseconds: divide them by 1,000": (10**11, 10**13),
    "microseconds: divide them by 1,000,000": (10**14, 10**16),
    "nanoseconds: divide them by 1,000,000,000": (10**17, 10**19),
}
BROKEN_JSON = {  # how the body begins
    rb"\s*$": "the body is empty",
    rb"\x1f\x8b": "it looks like gzip, which needs the header Content-Encoding: gzip",
    rb"\xef\xbb\xbf|\xff\xfe|\xfe\xff": "it begins with a byte order mark; send UTF-8 without one",
    rb"[\w.%+-]+=": "it looks like a form; send one JSON object",
    rb"\s*[{\[]\s*'": "it looks like Python's str(); JSON has double quotes, as json.dumps writes them",
}


def wrong_request(error: ValidationError, body: bytes) -> RankingError:
    """Convert Pydantic's error for a RankRequest to Invalid or NotJson. Each fault says what is likely meant."""
    if error.error_count() > TOO_MANY_FAULTS:
        return Invalid.at("", f"more than {TOO_MANY_FAULTS} faults")
    found = error.errors(include_url=False, include_context=False)
    if found[0]["type"] == "json_invalid":
        hint = next((hint for start, hint in BROKEN_JSON.items() if re.match(start, body)), None)
        return NotJson(found[0]["msg"] + (f"; {hint}" if hint else ""))
    return another_api(found) or faults_of(found, describe)


def wrong_times(error: ValidationError) -> RankingError:
    """Convert Pydantic's error for events, a history or a foreign call to Invalid or NotJson. A wrong time names the
    likely unit.
    """
    if error.error_count() > TOO_MANY_FAULTS:
        return Invalid.at("", f"more than {TOO_MANY_FAULTS} faults")
    found = error.errors(include_url=False, include_context=False)
    if found[0]["type"] == "json_invalid":
        return NotJson(found[0]["msg"])
    return faults_of(found, describe_time)


def describe_time(found: ErrorDetails) -> str:
    path = member_path(found["loc"])
    is_time = path[-1:] in (["timestamp"], ["sentAt"], ["request_time"]) or path[:2] == ["history", "timestamps"]
    return (wrong_time(found) if is_time else None) or found["msg"]


def another_api(found: list[ErrorDetails]) -> Invalid | None:
    """Return the error that names the path of another API, if the body is one of that API."""
    if not any(fault["type"] == "missing" and fault["loc"] == ("candidates",) for fault in found):
        return None
    unknown = {fault["loc"][0]: fault["input"] for fault in found if fault["type"] == "extra_forbidden"}
    for members, (api, path) in ANOTHER_API.items():
        if members <= unknown.keys() and ("items" not in members or holds_objects(unknown["items"])):
            first = next(name for name in unknown if name in members)
            return Invalid.at(pointer(first), f"this looks like a body of {api}: send it to POST {path}")
    return None


def holds_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def describe(found: ErrorDetails) -> str:
    """Return the text of one fault."""
    kind = found["type"]
    value = found["input"]
    path = member_path(found["loc"])
    if kind == "extra_forbidden":
        return unknown_member(found["loc"])
    if kind == "missing":
        return 'is missing: {"item_ids": [...]}, the items to rank' if path == ["candidates"] else "is missing"
    if kind == "model_type" or (kind == "dict_type" and isinstance(value, list)):
        return not_an_object(path, value)
    if path[:2] == ["history", "timestamps"] or path == ["request_time"]:
        return wrong_time(found) or found["msg"]
    if kind == "finite_number":
        return "must be a finite number" + ("; a missing value is null" if isinstance(path[-1], int) else "")
    if kind == "list_type" and len(path) > 1 and not isinstance(path[-1], int):
        return "must be a list with one entry for each item or event"
    is_id = path == ["user"] or (path[1:2] == ["item_ids"] and len(path) == 3)
    if is_id and kind in ("string_type", "int_type") and not isinstance(value, str):
        return not_an_id(value)
    return found["msg"]


def unknown_member(location: tuple[int | str, ...]) -> str:
    """Suggest the member that is meant by one that does not exist."""
    known = KNOWN.get(location[:-1], [])
    name = str(location[-1])[:100].lower()
    plain = re.sub(r"[\W_]", "", name)
    others = OTHER_NAMES if len(location) == 1 else {member: OTHER_COLUMN_NAMES.get(member, "") for member in known}
    meant = next((member for member, names in others.items() if plain in names.split()), None)
    meant = meant or next(iter(difflib.get_close_matches(name, known, 1)), None)
    return f"unknown member; did you mean {meant}?" if meant else f"unknown member; known: {', '.join(known)}"


def not_an_object(path: list[int | str], value: Any) -> str:
    if not path:
        return (
            "the body must be one JSON object, not a text that holds JSON: it was encoded twice"
            if isinstance(value, str)
            else 'the body must be one JSON object: {"candidates": {"item_ids": [...]}}'
        )
    return COLUMNS.get(str(path[0]), "must be an object") if len(path) == 1 else "must be an object of columns by name"


def wrong_time(found: ErrorDetails) -> str | None:
    """Describe a time that is not in unix seconds."""
    value = found["input"]
    if isinstance(value, str):
        hints = {r"\d+(\.\d*)?$": "; remove the quotes", r"\d{4}-\d\d": "; convert this ISO 8601 text"}
        hint = next((hint for start, hint in hints.items() if re.match(start, value[:100])), ", not text")
        return f"unix seconds are wanted, a number such as 1700000000{hint}"
    if found["type"] == "less_than_equal":
        unit = next((text for text, (least, most) in UNITS.items() if least <= value < most), None)
        return "unix seconds are wanted" + (f"; these look like {unit}" if unit else f", at most {LAST_TIME}")
    if found["type"] == "finite_number":
        return "must be finite; a missing time is null"
    return None


def not_an_id(value: Any) -> str:
    hint = ""
    if isinstance(value, float):
        hint = ", not a number with a point: pandas makes those of integers beside missing values"
    elif isinstance(value, dict):
        hint = ", not an object"
    elif value is None:
        hint = ", not null"
    return f"an id must be text or an integer{hint}"
