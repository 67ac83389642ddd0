"""Choose the users of an evaluation, and run its cases on all CPUs.

Called by: the modules of this folder that run cases, and the commands that evaluate. Calls: `data.py`, tqdm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from slatewise.process import cpu_quota
from slatewise_train.data import Data

SAMPLED_USERS = 2_000  # of each table, unless all users are asked for
SEED = 0  # of that sample

T = TypeVar("T")
R = TypeVar("R")


def sample_users(users: np.ndarray, most: int | None = SAMPLED_USERS) -> np.ndarray:
    """Return at most `most` users, drawn with SEED, in ascending order. `None`: all users."""
    if most is None or len(users) <= most:
        return users
    return np.sort(np.random.default_rng(SEED).choice(users, most, replace=False))


def held_out_users(data: Data) -> np.ndarray:
    """Return the users whose event right after the training events validates a ranker, a sample of `next_users`."""
    users = data.split.next_users
    return sample_users(users[data.split.train_lengths[users] > 0])


def in_parallel(function: Callable[[T], R], inputs: Sequence[T], desc: str = "") -> list[R]:
    """Call a function on all inputs, in one thread per CPU, and return the results in the order of the inputs.

    Graphs run without the interpreter lock and with one thread each, so results do not depend on the number of CPUs.
    The progress bar stands from the start; without `desc` there is no bar. An error of a call is raised, and the calls
    after it are cancelled.
    """
    pool = ThreadPoolExecutor(cpu_quota())
    try:
        found = pool.map(function, inputs)
        return list(tqdm(found, total=len(inputs), desc=desc, mininterval=1, disable=not desc))
    finally:
        pool.shutdown(cancel_futures=True)
