"""Find the columns of a table by the names that the TOML gives them, and say which are missing.

Called by: `events.py`, `items.py`, `new_toml.py`. Calls: `config_values.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from slatewise_train.config_values import as_toml

# Names that other tools give the columns, in lower case and without `_`, the most specific first.
COMMON = {
    "user_id": (
        "userid",
        "user",
        "customerid",
        "customer",
        "visitorid",
        "memberid",
        "sessionid",
        "reviewerid",
        "uid",
        "client",
        "clientid",
        "buyer",
        "buyerid",
        "account",
        "accountid",
        "member",
        "reader",
        "listener",
        "viewer",
        "person",
        "personid",
    ),
    "item_id": (
        "itemid",
        "item",
        "productid",
        "product",
        "movieid",
        "articleid",
        "contentid",
        "sku",
        "asin",
        "iid",
        "article",
        "movie",
        "book",
        "bookid",
        "isbn",
        "song",
        "songid",
        "track",
        "trackid",
        "video",
        "videoid",
        "game",
        "gameid",
        "newsid",
        "businessid",
        "parentasin",
    ),
    "timestamp": ("timestamp", "time", "datetime", "date", "eventtime", "createdat", "unixreviewtime", "ts", "day"),
    "action": ("action", "event", "eventtype", "actiontype", "behavior", "behaviour", "type"),
    "slate_id": ("slateid", "slate", "impressionid", "requestid", "listid"),
    "position": ("position", "rank", "slot"),
}
SHOWN = 20  # names of columns that a message lists
LONGEST = 60  # characters of a name in a message


def plain(name: str) -> str:
    """Return a name in lower case, letters and digits alone."""
    return "".join(c for c in name.lower() if c.isalnum())


def guess(wanted: str, found: Sequence[str]) -> str | None:
    """Return the column that most probably is `wanted`, or None."""
    by_plain = {plain(name): name for name in reversed(found)}
    for name in (plain(wanted), *COMMON.get(wanted, ())):
        if name in by_plain:
            return by_plain[name]
    return None


def locate(found: Sequence[str], named: Mapping[str, str], wanted: Iterable[str], place: str) -> dict[str, str]:
    """Return the column of the file for each wanted name that the file has.

    named: names that the TOML gives in [columns]. Raises ValueError if a column of [columns] is not in the file.
    """
    columns = {}
    for name in wanted:
        if name in named:
            if named[name] not in found:
                column = " ".join(named[name].split())[:LONGEST]
                raise ValueError(f"{place}: no column {column}, which [columns] gives for {name}; {listed(found)}")
            columns[name] = named[name]
        elif name in found:
            columns[name] = name
    return columns


def require(columns: Mapping[str, str], wanted: Sequence[str], found: Sequence[str], place: str) -> None:
    """Raise ValueError with the columns of the file and a line for the TOML, if a wanted column is missing."""
    missing = [name for name in wanted if name not in columns]
    if not missing:
        return
    fault = f"{place}: no column {', '.join(missing)}; {listed(found)}"
    if len(found) == 1:
        raise ValueError(f'{fault}; if they stand in one, set separator in [data], for example separator = "\\t"')
    if any(name.replace(".", "").replace("-", "").isdigit() for name in found):
        raise ValueError(f"{fault}; the first line must have the names of the columns")
    free = [name for name in found if name not in columns.values()]
    yours = guess(missing[0], free) or (free[0] if free else "your_column")
    raise ValueError(f"{fault}; name yours in the table [columns], for example {missing[0]} = {as_toml(yours)}")


def listed(names: Sequence[str]) -> str:
    """Return the columns of a file as the part of a message."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"found: {', '.join(map(as_shown, names[:SHOWN]))}{more}"


def as_shown(name: str) -> str:
    """Return a name in quotes, shortened to one line."""
    return repr(name if len(name) <= LONGEST else name[: LONGEST - 3] + "...")
