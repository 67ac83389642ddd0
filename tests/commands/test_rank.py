"""`slatewise rank`: asks a server or a bundle, and prints a table with titles, or JSON."""

from __future__ import annotations

import json

import pytest

from slatewise.client.errors import ConnectionFailed, Invalid
from slatewise.client.results import Ranking
from slatewise.commands.rank import events, main, reasons, table
from tests.client.test_results import RESPONSE, without_scores
from tests.support.network import free_port

ITEMS = ["595", "589", "2028"]


def test_bundle_prints_titles_in_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["small:99", *ITEMS, "--bundle", "movielens", "--variant", "fp32", "--history", "318=love,500"])
    head, *rows, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["rank", "item", "title", "score", "watch", "like"]
    assert [row.split()[0] for row in rows] == ["1", "2", "3"] and {row.split()[1] for row in rows} == {*ITEMS}
    assert any("Terminator 2: Judgment Day (1991)" in row for row in rows)
    assert len({len(row) for row in (head, *rows)}) == 1, "the columns are aligned"
    assert last.startswith("3 candidates by movielens version")


def test_explanations_name_events_and_neighbours(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["small:99", *ITEMS, "--bundle", "movielens", "--history", "318=love,500"]
    main([*arguments, "--explain"])
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("Terminator 2: Judgment Day (1991):") == 1
    named = [line.split(maxsplit=2) for line in lines if line.startswith("  ") and line.lstrip()[0] in "+-"]
    assert {kind for _, kind, _ in named} == {"event", "neighbour"}
    assert {title for _, kind, title in named if kind == "event"} <= {
        "Shawshank Redemption, The (1994)",
        "Mrs. Doubtfire (1993)",
    }
    main([*arguments, "--explain", "--exit", "dot"])
    assert "neighbour " not in capsys.readouterr().out
    main(arguments)
    assert "event" not in capsys.readouterr().out


def test_answer_without_explanations_says_so() -> None:
    assert reasons(Ranking.from_response(RESPONSE), ["b", "a"], {}) == [
        "no explanations: the server was too busy, or no model ranked the request"
    ]


def test_server_gives_the_same_order(demo_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    orders = []
    for source in (["--url", demo_url, "--ranker", "movielens"], ["--bundle", "movielens"]):
        main(["small:99", *ITEMS, "--json", "--variant", "fp32", *source])
        orders.append(json.loads(capsys.readouterr().out)["results"]["item_ids"])
    assert orders[0] == orders[1] and sorted(orders[0]) == sorted(ITEMS)


def test_server_without_titles_prints_the_rest(demo_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["-", *ITEMS, "--url", demo_url, "--exit", "dot", "--top", "1"])
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 3 and "exit dot" in shown[-1]


def test_unknown_items_and_events_are_told(demo_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    for source in (["--url", demo_url, "--ranker", "movielens"], ["--bundle", "movielens"]):
        main(["-", "w", "x", "y", "z", "--history", "318,no,nor", *source])
        note = "slatewise rank: 4 of 4 candidates and 2 of 3 events are unknown to movielens\n"
        assert capsys.readouterr().err == note
        main(["-", "595", "x", "--top", "1", *source])
        assert capsys.readouterr().err == "slatewise rank: 1 of 2 candidates are unknown to movielens\n"
        main(["-", *ITEMS, "--history", "318", *source])
        assert capsys.readouterr().err == ""


def test_errors_are_raised_for_the_command_line(demo_url: str) -> None:
    with pytest.raises(Invalid):
        main(["u", "1", "--url", demo_url, "--top", "0"])
    with pytest.raises(ConnectionFailed):
        main(["u", "1", "--url", f"http://127.0.0.1:{free_port()}"])


def test_history_text_becomes_rows() -> None:
    assert events("318=love,500,,a=b=c") == [("318", "love"), ("500", None), ("a", "b=c")]


def test_table_is_aligned_with_wide_and_long_titles() -> None:
    ranking = Ranking.from_response(RESPONSE)
    lines = table(ranking, {"b": "千と千尋の神隠し", "a": "x" * 99}).splitlines()
    assert [line.index("0.") for line in lines[2:]] == [lines[2].index("0.")]
    assert "x" * 45 + "..." in lines[2] and lines[1].index("0.") == lines[2].index("0.") - 8
    assert table(Ranking.from_response(without_scores(1)), {}).splitlines()[1].split() == ["1", "i0"]
