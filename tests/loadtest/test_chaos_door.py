"""The chaos of the door: its mutants are the same in each run, and its hostile bodies are within the limit of bytes."""

from __future__ import annotations

import random

from loadtest.chaos.mutants import mutant
from loadtest.server.hostile_bodies import MEGABYTE, bodies


def test_mutants_of_one_seed_are_equal_and_differ_among_each_other() -> None:
    first, second = ([mutant(numbers) for _ in range(200)] for numbers in (random.Random(0), random.Random(0)))
    assert first == second
    assert len(set(first)) > 190


def test_hostile_bodies_are_within_the_limit_of_bytes() -> None:
    found = list(bodies("movielens"))
    assert len(found) > 500
    assert all(0 < len(body.content) <= MEGABYTE for body in found)
    assert len({body.path for body in found}) == 11
