"""Item tables in packed codes, an eighth of float32's bytes, and their training.

Each column has uniform codes. Together the columns of an item have `bytes_of_item` bytes, and a column has the more
bits the more they lower the squared error. The codes nearest to the trained rows lose too much of the ranking. So
`LearnedCodes` trains them with the blocks: the forward pass rounds, and the gradient passes as if it did not
(straight-through, Bengio et al., arXiv 1308.3432).

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
SAMPLE = 2**14  # rows that the ranges are fitted to, at most
CLIPS = np.linspace(0.3, 1.0, 15)  # shares of the range that codes may cover
BLOCK = 2**14  # rows that are packed at once
RATE = 0.15  # of the rows' learning rate, as a share of that of the blocks: at 1, codes jump back and forth


class Steps(NamedTuple):
    """Uniform codes of one column."""

    error: float  # sum of squares
    low: float  # the value of code 0
    step: float


def bytes_of_item(rows: int, width: int) -> int:
    """Return the bytes of an item's codes, so that the file has at most SHARE of the bytes of float32 rows."""
    overhead = HEADER + packed_record(0, width, 1).itemsize
    return max(int((SHARE * 4 * rows * width - overhead) // rows), -(-LEAST_BITS * width // 8))


def coded(values: np.ndarray, low: float, step: float, bits: int) -> np.ndarray:
    """Return the nearest codes (n,) of values (n,)."""
    return np.clip(np.rint((values - low) / (step or 1.0)), 0, 2**bits - 1)


def fit_steps(values: np.ndarray) -> list[Steps]:
    """Return the codes of 0 to MOST_BITS bits with the least error on values (n,)."""
    middle = float(values.mean())
    found = [Steps(float(((values - middle) ** 2).sum()), middle, 0.0)]
    largest = max(float(np.abs(values - middle).max()), 1e-6)
    for bits in range(1, MOST_BITS + 1):
        tried = []
        for clip in CLIPS * largest:
            step = float(np.float32(2 * clip / 2**bits))
            low = float(np.float32(middle + step / 2 - clip))
            error = ((coded(values, low, step, bits) * step + low - values) ** 2).sum()
            tried.append(Steps(float(error), low, step))
        found.append(min(tried))
    return found


def allot(steps: list[list[Steps]], total: int) -> np.ndarray:
    """Return the bits of each column: one after the other to the column whose error it lowers most."""
    bits = np.zeros(len(steps), np.int64)
    for _ in range(min(total, MOST_BITS * len(steps))):
        gains = [
            -1.0 if have == MOST_BITS else one[have].error - one[have + 1].error
            for one, have in zip(steps, bits.tolist(), strict=True)
        ]
        bits[int(np.argmax(gains))] += 1
    return bits


def code_items(items: np.ndarray) -> np.ndarray:
    """Quantize items (rows, d) float32 to the nearest codes: one record () of `packed_record`."""
    rows, width = items.shape
    size = bytes_of_item(rows, width)
    record = np.zeros((), packed_record(rows, width, size))
    chosen = np.sort(np.random.default_rng(0).permutation(rows)[:SAMPLE])
    steps = [fit_steps(column) for column in items[chosen].astype(np.float64).T]
    bits = allot(steps, 8 * size)
    record["bits"] = bits
    record["low"] = [one[count].low for one, count in zip(steps, bits, strict=True)]
    record["step"] = [one[count].step for one, count in zip(steps, bits, strict=True)]
    pack(items, record)
    return record


def pack(items: np.ndarray, record: np.ndarray) -> None:
    """Write the codes of items (rows, d) into a record with their ranges and bits."""
    for first in range(0, len(items), BLOCK):
        columns = []
        for column, low, step, bits in zip(
            items[first : first + BLOCK].T, record["low"], record["step"], record["bits"].tolist(), strict=True
        ):
            codes = coded(column.astype(np.float64), float(low), float(step), bits).astype(np.uint8)
            columns.append(np.unpackbits(codes[:, None], axis=1)[:, MOST_BITS - bits :])
        packed = np.packbits(np.concatenate(columns, axis=1), axis=1)
        record["codes"][first : first + BLOCK, : packed.shape[1]] = packed
    record["codes"][:, -(-int(record["bits"].sum()) // 8) :] = 0


class LearnedCodes(nn.Module):
    """An item table of codes with trained rows, which are rounded in the forward pass. Ranges and bits stay."""

    def __init__(self, items: np.ndarray) -> None:
        """items: (rows, d) float32, at whose nearest codes the training begins."""
        super().__init__()
        self.ranges = code_items(items)
        self.items = torch.from_numpy(items)
        self.change = nn.Parameter(torch.zeros(items.shape))

    def rows(self) -> Tensor:
        """Return the rows before they are rounded: (rows, d)."""
        return self.items + RATE * self.change

    def forward(self) -> Tensor:
        """Return the vectors that the codes stand for: (rows, d)."""
        low, step = (torch.from_numpy(self.ranges[name].copy()) for name in ("low", "step"))
        largest = torch.from_numpy(2.0 ** self.ranges["bits"] - 1).float()
        places = ((self.rows() - low) / step.where(step > 0, 1.0)).clamp(min=0).minimum(largest)
        rounded = places + (places.round() - places).detach()
        return rounded * step + low

    def record(self) -> np.ndarray:
        """Return the table of `packed_record`."""
        record = self.ranges.copy()
        pack(self.rows().detach().numpy(), record)
        return record
