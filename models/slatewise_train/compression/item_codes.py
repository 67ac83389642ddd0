"""Item tables in packed codes, an eighth of float32's bytes, and their training.

The exit `dot` and its order depend on products u . e with the vectors u of users. An error x of an item changes them by
x' C x on average, with C the mean of u u'. So items are written in coordinates in which this error is a plain sum of
squares and which are not correlated: the principal components of C^(1/2) (e - mean). This is transform coding
(Goyal, IEEE Signal Processing Magazine 2001). Each coordinate has as many bits as lower the error most, within the
bytes of an item. Candidates and events also pass through the blocks, which read other directions. So C is mixed with a
share of the identity.

The codes nearest to the trained rows lose 5 % of NDCG@10 at the exit `set` of the demo. So `LearnedCodes` trains them
together with the blocks: the forward pass rounds, and the gradient passes as if it did not (straight-through, Bengio et
al., arXiv 1308.3432).

Called by: `bases.py`. The server reads the table with `inference/item_table.py`. Calls: torch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from slatewise.inference.item_table import MOST_BITS, packed_record

SHARE = 1 / 8  # of float32's bytes, the whole file
HEADER = 512  # bytes of an .npy file, at most
LEAST_BITS = 2  # a number, on average: a table of few items is larger than the share
IDENTITY = 0.1  # share of the identity in the metric
SAMPLE = 2**14  # rows that the ranges are fitted to, at most
CLIPS = np.linspace(0.3, 1.0, 15)  # shares of the range that codes may cover
BLOCK = 2**14  # rows that are packed at once
RATE = 0.5  # steps of a code, for each unit of its parameter: at the rate of the blocks, codes jump back and forth


class Steps(NamedTuple):
    """Uniform codes of one coordinate."""

    error: float  # sum of squares
    low: float  # the value of code 0
    step: float


def bytes_of_item(rows: int, width: int) -> int:
    """Return the bytes of an item's codes, so that the file has at most SHARE of the bytes of float32 rows."""
    overhead = HEADER + packed_record(0, width, 1).itemsize
    return max(int((SHARE * 4 * rows * width - overhead) // rows), -(-LEAST_BITS * width // 8))


def metric_roots(users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return C^(1/2) and C^(-1/2), (d, d) each, for user vectors (n, d), n may be 0."""
    second = users.T.astype(np.float64) @ users
    scale = np.trace(second) / len(second)
    values, directions = np.linalg.eigh(second / (scale or 1.0) + IDENTITY * np.eye(len(second)))
    roots = np.sqrt(values)
    return (directions * roots) @ directions.T, (directions / roots) @ directions.T


def fit_steps(values: np.ndarray) -> list[Steps]:
    """Return the codes of 0 to MOST_BITS bits with the least error on values (n,), of mean 0."""
    found = [Steps(float((values**2).sum()), 0.0, 1.0)]
    largest = max(float(np.abs(values).max(initial=0.0)), 1e-6)
    for bits in range(1, MOST_BITS + 1):
        tried = []
        for clip in CLIPS * largest:
            step = 2 * clip / 2**bits
            low = step / 2 - clip
            codes = np.clip(np.rint((values - low) / step), 0, 2**bits - 1)
            tried.append(Steps(float(((codes * step + low - values) ** 2).sum()), low, step))
        found.append(min(tried))
    return found


def allot(steps: list[list[Steps]], total: int) -> np.ndarray:
    """Return the bits of each coordinate: one after the other to the coordinate whose error it lowers most."""
    bits = np.zeros(len(steps), np.int64)
    for _ in range(min(total, MOST_BITS * len(steps))):
        gains = [
            -1.0 if have == MOST_BITS else one[have].error - one[have + 1].error
            for one, have in zip(steps, bits.tolist(), strict=True)
        ]
        bits[int(np.argmax(gains))] += 1
    return bits


def code_items(items: np.ndarray, users: np.ndarray) -> np.ndarray:
    """Quantize items (rows, d) float32 to the nearest codes: one record () of `packed_record`.

    users: (n, d) vectors of users, for the metric. Raises ValueError when a number is too large for float16.
    """
    if not np.abs(items).max(initial=0.0) < np.finfo(np.float16).max:
        raise ValueError("tables4 is not possible: an item's numbers are beyond float16")
    rows, width = items.shape
    record = np.zeros((), packed_record(rows, width, bytes_of_item(rows, width)))
    root, inverse = metric_roots(users)
    mean = items.mean(axis=0, dtype=np.float64)
    chosen = np.sort(np.random.default_rng(0).permutation(rows)[:SAMPLE])
    sample = (items[chosen] - mean) @ root
    directions = np.linalg.eigh(sample.T @ sample)[1][:, ::-1]
    tried = [fit_steps(column) for column in (sample @ directions).T]
    bits = allot(tried, 8 * record["codes"].shape[1])
    steps = [one[count] for one, count in zip(tried, bits, strict=True)]
    basis = directions.T @ inverse
    record["bits"] = bits
    record["steps"] = np.array([one.step for one in steps])[:, None] * basis
    record["base"] = mean + np.array([one.low for one in steps]) @ basis
    for first in range(0, rows, BLOCK):
        some = slice(first, first + BLOCK)
        record["codes"][some] = pack(places_of(items[some], record), record)
    return record


def places_of(items: np.ndarray, record: np.ndarray) -> np.ndarray:
    """Return where items (n, d) lie among the codes of a record, without rounding: (n, d) float64."""
    steps = record["steps"].astype(np.float64)
    found: np.ndarray = np.linalg.lstsq(steps.T, (items - record["base"].astype(np.float64)).T)[0].T  # steps may be 0
    return found


def pack(places: np.ndarray, record: np.ndarray) -> np.ndarray:
    """Return the codes nearest to places (n, d) with the bits of a record, packed: (n, size) uint8."""
    codes = np.clip(np.rint(places), 0, 2.0 ** record["bits"] - 1).astype(np.uint8)
    every = np.unpackbits(codes[..., None], axis=2)  # (n, d, 8), the highest bit first
    packed = np.packbits(every[:, np.arange(MOST_BITS) >= MOST_BITS - record["bits"][:, None]], axis=1)
    return np.pad(packed, ((0, 0), (0, record["codes"].shape[1] - packed.shape[1])))


class LearnedCodes(nn.Module):
    """An item table of codes that are trained, and rounded in the forward pass. Coordinates and bits stay."""

    def __init__(self, items: np.ndarray, users: np.ndarray) -> None:
        """items: (rows, d) float32, at whose nearest codes the training begins; users: see `code_items`."""
        super().__init__()
        self.start = code_items(items, users)
        self.largest = torch.from_numpy(2.0 ** self.start["bits"] - 1).float()
        # Buffers are a part of the state: a checkpoint belongs to these coordinates.
        self.places = nn.Buffer(torch.from_numpy(places_of(items, self.start).astype(np.float32)))
        self.steps = nn.Buffer(torch.from_numpy(self.start["steps"].astype(np.float32)))
        self.base = nn.Buffer(torch.from_numpy(self.start["base"].copy()))
        self.change = nn.Parameter(torch.zeros(items.shape))

    def forward(self) -> Tensor:
        """Return the vectors that the codes stand for: (rows, d)."""
        places = (self.places + RATE * self.change).clamp(min=0).minimum(self.largest)
        codes = places + (places.round() - places).detach()
        return self.base + codes @ self.steps

    def record(self) -> np.ndarray:
        """Return the table of `packed_record`."""
        record = self.start.copy()
        record["codes"] = pack((self.places + RATE * self.change).detach().numpy(), record)
        return record
