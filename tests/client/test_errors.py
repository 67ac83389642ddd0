"""The client's errors: one for each of the server, found by slug or by status, and safe to print and to pickle."""

from __future__ import annotations

import json
import pickle

import pytest

from slatewise import errors as server
from slatewise.client import errors
from slatewise.http.problems import problem


def kinds(base: type[server.RankingError]) -> list[type[server.RankingError]]:
    """The errors of `errors.py`. A dialect of another server may have some of its own, in that server's shape."""
    own = [kind for kind in base.__subclasses__() if kind.__module__ == server.__name__]
    return [base, *(found for kind in own for found in kinds(kind))]


@pytest.mark.parametrize("kind", kinds(server.RankingError))
def test_each_error_of_the_server_has_one_here(kind: type[server.RankingError]) -> None:
    sent = problem(kind("a reason", (server.Fault("/a", "wrong"),)), "r1")
    error = errors.from_problem(sent.status_code, json.loads(bytes(sent.body)), 1.0)
    name = "ServerFault" if kind is server.RankingError else kind.__name__
    assert type(error).__name__ == name
    assert (error.status, error.slug, error.detail, error.request_id) == (kind.status, kind("").slug, "a reason", "r1")
    assert error.faults == (errors.Fault("/a", "wrong"),)
    assert error.retry_after == 1.0
    assert type(error).status == kind.status, "the class has the status too"
    assert str(error) == "a reason (request r1)"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, errors.Unauthorized),
        (404, errors.NotFound),
        (413, errors.TooLarge),
        (418, errors.SlatewiseError),
        (429, errors.Overloaded),
        (502, errors.ServerFault),
        (503, errors.NotReady),
        (504, errors.ServerFault),
    ],
)
def test_unknown_slug_is_judged_by_its_status(status: int, kind: type[errors.SlatewiseError]) -> None:
    error = errors.from_problem(status, {"type": "urn:other:problem:new"})
    assert type(error) is kind
    assert (error.status, error.slug) == (status, "new")


def test_members_of_other_types_are_taken() -> None:
    error = errors.from_problem(500, {"type": 7, "detail": None, "title": "T", "errors": "none", "request_id": 3})
    assert (error.detail, error.faults, error.request_id) == ("T", (), "3")
    assert errors.from_problem(422, {"errors": ["x", {"pointer": 1}]}).faults == (errors.Fault("1", ""),)


@pytest.mark.parametrize("kind", [*errors.OF_THE_SERVER, errors.ConnectionFailed, errors.TimedOut])
def test_errors_cross_processes(kind: type[errors.SlatewiseError]) -> None:
    error = kind("a reason", [errors.Fault("/a", "b")], request_id="r", retry_after=2.0)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind and str(copy) == str(error)
    assert (copy.faults, copy.retry_after, copy.status) == (error.faults, 2.0, kind.status)


def test_errors_are_also_the_usual_ones() -> None:
    assert issubclass(errors.Invalid, ValueError)
    assert issubclass(errors.ConnectionFailed, ConnectionError)
    assert issubclass(errors.TimedOut, TimeoutError)
