"""How much ranked lists change between two versions (FINEST, arXiv 2402.03481).

    overlap              the share of the ten best that both versions have
    rank-biased overlap  the same at every depth, with a weight that falls with the depth (Webber et al., TOIS 28, 2010)

Called by: `parent.py`, `loadtest/training/incremental`. Calls: `evaluation/held_out.py`, the ranker.
"""

from __future__ import annotations

import numpy as np
import torch

from slatewise.inference.arrays import FIRST_ITEM
from slatewise_train.batches import make_batch, served_window_start
from slatewise_train.data import Data
from slatewise_train.evaluation.held_out import chunks
from slatewise_train.evaluation.metrics import DEPTH, top_rows
from slatewise_train.rankers.base import RankerModel

PERSISTENCE = 0.9  # of rank-biased overlap: the reader goes on to the next rank with this probability


def overlap(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the share of each list's items that the other list has too: (n, K) item rows twice -> (n,)."""
    return (one[:, :, None] == other[:, None, :]).any(2).mean(1)


def rank_biased_overlap(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return rank-biased overlap of lists of equal length (n, K) -> (n,), cut at K and scaled to 1 for equal lists."""
    depths = np.arange(1, one.shape[1] + 1)
    same = one[:, :, None] == other[:, None, :]
    agreement = np.stack([same[:, :k, :k].sum((1, 2)) / k for k in depths], axis=1)  # (n, K)
    weights = PERSISTENCE ** (depths - 1)
    return agreement @ weights / weights.sum()


@torch.no_grad()
def top_lists(model: RankerModel, data: Data, users: np.ndarray, lengths: np.ndarray, head: int) -> np.ndarray:
    """Return the ten best items (n, 10) by the exit `dot` after each user's first `lengths` events, without these."""
    model.eval()
    table = model.item_table()
    firsts = [served_window_start(length, data.config.history_length) for length in lengths.tolist()]
    windows = list(zip(users.tolist(), firsts, lengths.tolist(), strict=True))
    best = np.zeros((len(windows), DEPTH), np.int64)
    for rows in chunks(windows, len(table)):
        batch = make_batch(data.sequences, [windows[row] for row in rows])
        _, encoded = model.encode(model.tokens(table[batch.items], batch.actions, batch.gaps))
        now = encoded[torch.arange(len(rows)), batch.lengths]
        scores = (now @ (table * model.dot_scale[head]).T).numpy()
        scores[:, :FIRST_ITEM] = -np.inf
        for k, (user, _, last) in enumerate(windows[row] for row in rows):
            scores[k, data.sequences.items[data.sequences.offsets[user] :][:last]] = -np.inf
        best[rows] = top_rows(scores, DEPTH)
    return best
