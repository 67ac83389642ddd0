"""Read events that came after those of a TOML, and join both tables.

Called by: `data.py`, `update_command.py`. Calls: `events.py`, `files.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from slatewise_train.config import TablesConfig
from slatewise_train.tables.events import IDS, PLAIN, Source, clean, clean_events
from slatewise_train.tables.files import find_files, names_of, together


def read_new_events(places: Sequence[str], tables: TablesConfig) -> pl.DataFrame:
    """Read clean events that came after those of a TOML, ids as text.

    Files that a server wrote (`SLATEWISE_EVENTS_DIR`) have the names of the contract and seconds, whatever the TOML
    says; other files are read as those of the TOML. Raises OSError or ValueError for files that are no such tables.
    """
    files = together(file for place in places for file in find_files(place, tables.separator))
    served = {"user_id", "item_id", "timestamp", "request_id"}
    frames = []
    for by_server in (True, False):
        some = [file for file in files if (served <= set(names_of(file))) == by_server]
        if some:
            sources = [Source(file.scan(), str(file), file) for file in some]
            frames.append(as_text(clean(sources, 1.0, PLAIN if by_server else tables)[0]))
    return pl.concat(frames, how="diagonal")


def join_events(events: pl.DataFrame, new: pl.DataFrame) -> pl.DataFrame:
    """Return clean events of two tables as one clean table. A row that both have is kept once."""
    return clean_events(pl.concat([as_text(events), as_text(new)], how="diagonal"), 1.0)[0]


def as_text(events: pl.DataFrame) -> pl.DataFrame:
    return events.with_columns(pl.col(name).cast(pl.String) for name in IDS if name in events.columns)
