"""MovieLens as tables of the data contract, from zip or folder, and the checked download."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import polars as pl
import pytest

from slatewise_train.demo import movielens
from slatewise_train.demo.movielens import download, read_member, read_movielens

FOLDER = Path(__file__).parents[1] / "data" / "ml-latest-small"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "source.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name in ("ratings.csv", "movies.csv"):
            file.write(FOLDER / name, f"ml-latest-small/{name}")
    return path


@pytest.fixture
def ml_1m(tmp_path: Path) -> Path:
    folder = tmp_path / "ml-1m"
    folder.mkdir()
    (folder / "ratings.dat").write_bytes(b"1::1193::5::978300760\n1::661::3::978302109\n2::1193::1::978298413\n")
    titles = [
        "661::Les Mis\xe9rables (1995)::Drama|Musical",
        '1193::Babe: A "Pig" (1989)::Animation|Children\'s|Comedy',
        "7::No Year\tHere::Drama",
    ]
    (folder / "movies.dat").write_bytes("\n".join(titles).encode("latin-1") + b"\n")
    return folder


def test_read_folder_and_zip_give_the_same_tables(archive: Path) -> None:
    for one, other in zip(
        read_movielens("ml-latest-small", FOLDER), read_movielens("ml-latest-small", archive), strict=True
    ):
        assert one.equals(other, null_equal=True)
        assert len(one) > 1000


def test_ratings_become_events_with_action_and_label() -> None:
    ratings = pl.read_csv(FOLDER / "ratings.csv")
    events, _ = read_movielens("ml-latest-small", FOLDER)
    assert events["item_id"].to_list() == ratings["movieId"].cast(pl.String).to_list()
    assert events["user_id"].to_list() == ratings["userId"].cast(pl.String).to_list()
    assert events["timestamp"].cast(pl.Int64).to_list() == ratings["timestamp"].to_list()
    names = [(4.5, "love"), (4.0, "like"), (3.0, "view"), (2.0, "dislike"), (0.0, "hate")]
    expected = [next(name for least, name in names if stars >= least) for stars in ratings["rating"]]
    assert events["action"].to_list() == expected
    assert set(expected) == {name for _, name in names}, "the data has them all"
    assert events["label_like"].to_list() == [int(stars >= 4) for stars in ratings["rating"]]


def test_items_have_year_decade_and_no_empty_genre() -> None:
    _, items = read_movielens("ml-latest-small", FOLDER)
    toy = items.row(by_predicate=pl.col("item_id") == "1", named=True)
    assert (toy["title"], toy["year"], toy["decade"]) == ("Toy Story (1995)", 1995, "1990s")
    assert toy["genres"].split("|") == ["Adventure", "Animation", "Children", "Comedy", "Fantasy"]
    assert not items["genres"].str.contains("no genres").any()


def test_read_movielens_1m_decodes_accented_characters(ml_1m: Path) -> None:
    events, items = read_movielens("ml-1m", ml_1m)
    assert events.rows() == [
        ("1", "1193", "978300760", "love", 1),
        ("1", "661", "978302109", "view", 0),
        ("2", "1193", "978298413", "hate", 0),
    ]
    assert items["item_id"].to_list() == ["661", "1193", "7"]
    assert items["title"].to_list() == ["Les Misérables (1995)", 'Babe: A "Pig" (1989)', "No Year Here"]
    assert items["genres"].to_list() == ["Drama|Musical", "Animation|Children|Comedy", "Drama"]
    assert items["year"].to_list() == [1995, 1989, None]
    assert items["decade"].to_list() == ["1990s", "1980s", None]


def test_read_names_an_unknown_data_set_or_missing_file(tmp_path: Path, archive: Path) -> None:
    with pytest.raises(ValueError, match="'ml-9k' is not known"):
        read_movielens("ml-9k", FOLDER)
    for source in (tmp_path, archive):
        with pytest.raises(FileNotFoundError, match=r"no links\.csv"):
            read_member(source, "links.csv")


def serve_file(monkeypatch: pytest.MonkeyPatch, path: Path, digest: str) -> None:
    monkeypatch.setitem(movielens.URLS, "ml-latest-small", path.as_uri())
    monkeypatch.setitem(movielens.SHA256, "ml-latest-small", {digest})


def test_download_with_the_known_digest_is_stored(
    tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_file(monkeypatch, archive, hashlib.sha256(archive.read_bytes()).hexdigest())
    target = tmp_path / "new" / "ml.zip"
    assert download("ml-latest-small", target) == target
    assert target.read_bytes() == archive.read_bytes()
    assert list(target.parent.iterdir()) == [target]


def test_download_with_another_digest_is_removed(
    tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_file(monkeypatch, archive, "0" * 64)
    with pytest.raises(ValueError, match="sha256 is"):
        download("ml-latest-small", tmp_path / "new" / "ml.zip")
    assert list((tmp_path / "new").iterdir()) == []


def test_command_writes_both_tables(tmp_path: Path, ml_1m: Path) -> None:
    out = tmp_path / "out"
    movielens.main(["ml-1m", "--source", str(ml_1m), "--out", str(out)])
    assert len(pl.read_parquet(out / "events.parquet")) == 3
    assert len(pl.read_parquet(out / "items.parquet")) == 3
