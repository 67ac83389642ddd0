"""The space of a hyper-parameter search: its keys, the values that candidates draw, and the plan of its rungs.

Called by: `search.py`, `search_state.py`, `train_command.py`. Calls: `config.py`, `config_values.py`,
`rankers/families.py`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from slatewise_train.config import Config, ModelConfig, TrainConfig
from slatewise_train.config_values import as_toml, checked_table
from slatewise_train.rankers import families

SECONDS = {"s": 1, "m": 60, "h": 3600}
KEPT = 3  # one of so many candidates stays after a rung
CHANGED = 1 / 3  # chance that a candidate changes a key. The defaults are good: a change of every key is mostly worse
COST = 1.3  # mean time of a random candidate's epoch, as a multiple of the defaults'
SHARES = (27, 9, 3, 1)  # of the epochs, for the rungs: one over this
MOST_CANDIDATES = 300


def scaled(most: float) -> Callable[[np.random.Generator, float], float]:
    """Return a draw between the default divided by `most` and times `most`, even on the logarithmic scale."""
    return lambda rng, value: float(f"{value * most ** rng.uniform(-1, 1):.3g}")


def multiplied(*factors: float) -> Callable[[np.random.Generator, int], int]:
    """Return a draw of one of the factors, which multiplies the default."""
    return lambda rng, value: int(value * rng.choice(factors))


def one_of(*values: Any) -> Callable[[np.random.Generator, Any], Any]:
    """Return a draw of one of the values."""
    return lambda rng, _: values[rng.integers(len(values))]


# How a candidate changes a key: (random numbers, default) -> value. The size of the batch is not searched: candidates
# compare at equal epochs, and a smaller batch has more steps in them, for more time.
SPACE: dict[str, Callable[[np.random.Generator, Any], Any]] = {
    "model.width": multiplied(0.5, 2),
    "model.blocks": one_of(1, 2, 3),
    "model.feed_forward": one_of(1, 2, 4),
    "model.dropout": lambda rng, value: round(min(0.8, max(0.0, value + rng.uniform(-0.2, 0.2))), 2),
    "train.learning_rate": scaled(3),
    "train.negatives": multiplied(0.25, 0.5, 2, 4),
    "train.weight_decay": lambda rng, _: float(f"{10 ** rng.uniform(-4, -1):.2g}"),
    "train.id_dropout": one_of(0.0, 0.02, 0.05, 0.1, 0.2),
    "train.embedding_std": scaled(3),
}

Values = dict[str, Any]  # TABLE.KEY -> value, as in `Config.stated`


def seconds_of(text: str) -> float:
    """Return the seconds of a duration such as 90s, 30m or 2h. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if found and float(found[1]):
        return float(found[1]) * SECONDS[found[2]]
    if re.fullmatch(r"\d+(?:\.\d+)?", text.strip()) and float(text):
        raise ValueError(f"--search {text}: a duration needs a unit: {text}s, {text}m or {text}h")
    raise ValueError(f"--search {text}: must be a duration above 0, such as 90s, 30m or 2h")


# Values of a candidate


def value_of(config: Config, key: str) -> Any:
    """Return the value of a key TABLE.KEY; `None` if the ranker's family has no such key."""
    table, name = key.split(".")
    if table == "train":
        return getattr(config.train, name)
    sizes = {size.name: size.default for size in dataclasses.fields(families.find(config.model.family).config)}
    return config.model.shape.get(name, sizes[name]) if name in sizes else None


def with_values(config: Config, values: Values) -> Config:
    """Return the config with other values of `[model]` and `[train]`. Raises ValueError for impossible ones."""
    tables: dict[str, Values] = {"model": {}, "train": {}}
    for key, value in values.items():
        table, name = key.split(".")
        tables[table][name] = value
    model = ModelConfig(config.model.family, config.model.shape | tables["model"])
    model.sized(items=3, actions=1, fields={}, numeric=0, heads=1)
    train = dataclasses.replace(config.train, **checked_table(TrainConfig, tables["train"], "train", ()))
    return dataclasses.replace(config, model=model, train=train)


def fits(config: Config, values: Values) -> bool:
    """Return whether the family accepts the values beside the stated ones."""
    try:
        with_values(config, values)
    except ValueError:
        return False
    return True


def draw(config: Config, count: int) -> list[Values]:
    """Return the changed values of `count` candidates, the defaults first; fewer if there are not so many.

    A longer list begins with the shorter one. Raises ValueError if the TOML states every key of the search.
    """
    free = [key for key in SPACE if key not in config.stated and value_of(config, key) is not None]
    if not free:
        raise ValueError(
            f"--search has nothing to search, because the TOML states {', '.join(SPACE)}: remove one of these "
            "lines, or leave out --search"
        )
    drawn: list[Values] = [{}]
    rng = np.random.default_rng([config.train.seed, len(SPACE)])
    for _ in range(20 * count):
        if len(drawn) == count:
            break
        keys = [key for key in free if rng.random() < CHANGED]
        values = {key: SPACE[key](rng, value_of(config, key)) for key in keys}
        values = {key: value for key, value in values.items() if value != value_of(config, key)}
        if values not in drawn and fits(config, values):
            drawn.append(values)
    return drawn


def as_lines(values: Values) -> str:
    """Return values as lines of a TOML."""
    lines = []
    for table in ("model", "train"):
        own = [
            f"{key.split('.')[1]} = {as_toml(value)}" for key, value in values.items() if key.startswith(f"{table}.")
        ]
        lines += [f"[{table}]", *own] if own else []
    return "\n".join(lines)


def described(values: Values) -> str:
    return ", ".join(f"{key.split('.')[1]} = {as_toml(value)}" for key, value in values.items()) or "the defaults"


# The plan: rungs and the number of candidates


def rungs_of(epochs: int, every: int) -> list[int]:
    """Return the epochs of the rungs. epochs: those before the last ones; every: epochs between validations."""
    return sorted({min(epochs, math.ceil(math.ceil(epochs / share) / every) * every) for share in SHARES})


def stays(others: int, rung: int) -> int:
    """Return the number of candidates without the defaults that a rung trains."""
    return math.ceil(others / KEPT**rung)


def plan(rungs: list[int], affordable: float) -> tuple[int, list[int]]:
    """Choose some of the rungs, and return the likely number of candidates without the defaults with them.

    The last rung should compare at least two candidates with the defaults. If the time is too short for that, the plan
    has fewer rungs: the last ones, which cost most, are left out. affordable: the time in epochs of the defaults.
    """
    for end in range(len(rungs), 0, -1):
        for first in (0, 1) if end > 2 else (0,):
            some = rungs[first:end]
            others = 0
            while others < MOST_CANDIDATES and cost(others + 1, some) <= affordable:
                others += 1
            if others >= 2 * KEPT ** (len(some) - 1) or end == 1:
                return others, some
    raise AssertionError("a plan of one rung always fits")


def cost(others: int, rungs: list[int], price: float = COST) -> float:
    """Return the time of a plan in epochs of the defaults, which are trained to the end.

    price: the mean time of another candidate's epoch.
    """
    steps = np.diff([0, *rungs])
    return rungs[-1] + price * sum(stays(others, rung) * int(step) for rung, step in enumerate(steps))
