"""Convert MovieLens 1M or latest-small to the tables that training reads. Use it as an example for your own data.

    python -m slatewise_train.demo.movielens ml-1m --source FILE-OR-FOLDER --out build/data/ml-1m

Without `--source` the zip is downloaded from GroupLens and its digest is checked.

Called by: `make train`, `make compress`, `simulated/`. `data.py` reads the tables.
"""

import argparse
import hashlib
import io
import sys
import urllib.request
import zipfile
from collections.abc import Sequence
from pathlib import Path

import polars as pl
from tqdm import tqdm

from slatewise.cli import run_main

URLS = {
    "ml-1m": "https://files.grouplens.org/datasets/movielens/ml-1m.zip",
    "ml-latest-small": "https://files.grouplens.org/datasets/movielens/ml-latest-small.zip",
}
SHA256 = {
    "ml-1m": {"e477d87b0f641550cc939ac4357e327cda06c211ccd83ac260e41783de8b0864"},
    "ml-latest-small": {"cdd02753020f68a411738469885cfaefff738c02cc22a11497f98f22faa0f4a2"},
}
NO_GENRE = "(no genres listed)"


def download(name: str, target: Path) -> Path:
    """Download the zip of a data set to `target` and return it. Raises ValueError for an unexpected SHA-256."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    with urllib.request.urlopen(URLS[name], timeout=60) as answer, part.open("wb") as file:
        total = int(answer.headers.get("Content-Length") or 0) or None
        with tqdm(total=total, unit="B", unit_scale=True, desc=f"download {name}") as bar:
            while block := answer.read(1 << 16):
                file.write(block)
                bar.update(len(block))
    digest = hashlib.sha256(part.read_bytes()).hexdigest()
    if digest not in SHA256[name]:
        part.unlink()
        raise ValueError(f"{URLS[name]}: sha256 is {digest}, expected one of {sorted(SHA256[name])}")
    part.rename(target)
    return target


def read_member(source: Path, name: str) -> bytes:
    """Read one file in a zip or an unpacked folder. Raises FileNotFoundError when there is no such file."""
    if source.is_dir():
        found = sorted(source.rglob(name))
        if not found:
            raise FileNotFoundError(f"{source}: no {name} in it")
        return found[0].read_bytes()
    with zipfile.ZipFile(source) as archive:
        for member in archive.namelist():
            if Path(member).name == name:
                return archive.read(member)
    raise FileNotFoundError(f"{source}: no {name} in it")


def read_double_colon(text: bytes, columns: list[str]) -> pl.DataFrame:
    """Read a table of MovieLens 1M, which separates columns by `::`. All columns are strings."""
    lines = text.decode("latin-1").replace("\t", " ").replace("::", "\t")
    return pl.read_csv(
        io.StringIO(lines),
        separator="\t",
        has_header=False,
        new_columns=columns,
        quote_char=None,
        infer_schema_length=0,
    )


def add_actions(ratings: pl.DataFrame) -> pl.DataFrame:
    """Build events from ratings.

    The number of stars becomes the action (hate, dislike, view, like or love) and the label of the head `like` (1 for 4
    stars or more).
    """
    stars = pl.col("rating").cast(pl.Float64, strict=False)
    action = (
        pl.when(stars >= 4.5)
        .then(pl.lit("love"))
        .when(stars >= 4)
        .then(pl.lit("like"))
        .when(stars >= 3)
        .then(pl.lit("view"))
    )
    action = action.when(stars >= 2).then(pl.lit("dislike")).when(stars.is_not_null()).then(pl.lit("hate"))
    return ratings.select(
        "user_id", "item_id", "timestamp", action.alias("action"), (stars >= 4).cast(pl.Int8).alias("label_like")
    )


def add_fields(movies: pl.DataFrame) -> pl.DataFrame:
    """Add year and decade, extracted from the title, and spell the genres alike in both data sets."""
    genres = pl.col("genres").str.replace("Children's", "Children", literal=True)
    year = pl.col("title").str.extract(r"\((\d{4})\)\s*$").cast(pl.Int32, strict=False)
    decade = (year // 10 * 10).cast(pl.String) + "s"
    return movies.with_columns(
        pl.when(genres == NO_GENRE).then(None).otherwise(genres).alias("genres"),
        decade.alias("decade"),
        year.alias("year"),
    )


def read_movielens(name: str, source: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Read (events, items) of MovieLens 1M or latest-small from its zip or folder.

    Raises ValueError for another name.
    """
    if name == "ml-1m":
        ratings = read_double_colon(read_member(source, "ratings.dat"), ["user_id", "item_id", "rating", "timestamp"])
        movies = read_double_colon(read_member(source, "movies.dat"), ["item_id", "title", "genres"])
    elif name == "ml-latest-small":
        ratings = pl.read_csv(read_member(source, "ratings.csv"), infer_schema_length=0).rename(
            {"userId": "user_id", "movieId": "item_id"}
        )
        movies = pl.read_csv(read_member(source, "movies.csv"), infer_schema_length=0).rename({"movieId": "item_id"})
    else:
        raise ValueError(f"MovieLens {name!r} is not known; known: {', '.join(URLS)}")
    events = add_actions(ratings)
    return events, add_fields(movies)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(URLS))
    parser.add_argument("--source", type=Path, help="the zip or the unpacked folder; default: download it")
    out = "folder for events.parquet and items.parquet; default: build/data/NAME"
    parser.add_argument("--out", type=Path, help=out)
    args = parser.parse_args(argv)
    out = args.out or Path("build/data") / args.name
    source = args.source or download(args.name, out / f"{args.name}.zip")
    events, items = read_movielens(args.name, source)
    out.mkdir(parents=True, exist_ok=True)
    for table, name in ((items, "items.parquet"), (events, "events.parquet")):  # make checks for the events, so last
        table.write_parquet(out / f"{name}.part")
        (out / f"{name}.part").rename(out / name)
    print(f"{out}: {len(events)} events of {events['user_id'].n_unique()} users, {len(items)} items")


if __name__ == "__main__":
    sys.exit(run_main("python -m slatewise_train.demo.movielens", main, sys.argv[1:]))
