"""Rank events in the whole catalogue by the torch model, many users at a time, and validate a training with them.

The curves of a training, the levels of the baselines beside them and the verdict at its end rank the same events: the
first held-out event of each of `held_out_users`. All of them leave out the same items, see `interactions.hidden_rows`.

Called by: `train.py`, `search.py`, `trained.py`. Calls: `batches.py`, `devices.py`, `interactions.py`, `metrics.py`,
`sampling.py`, tqdm, and the ranker.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from slatewise.inference.arrays import FIRST_ITEM
from slatewise_train.batches import Batch, Window, make_batch, served_window_start
from slatewise_train.data import Data
from slatewise_train.devices import moved
from slatewise_train.evaluation.interactions import hidden_rows
from slatewise_train.evaluation.metrics import gains, hits, ranks_of
from slatewise_train.evaluation.sampling import held_out_users
from slatewise_train.rankers.base import EncodedHistory, RankerModel

MOST_SCORES = 4_000_000  # users times items of one chunk: 16 MB
MOST_EVENTS = 16_384  # of one chunk, padding included
RERANKED = 512  # items that the exit `point` orders: the best ones of the exit `dot`
MOST_CANDIDATES = 16_384  # of one call of the blocks


def validate(model: RankerModel, data: Data, head: int, exits: tuple[str, ...]) -> dict[str, float]:
    """Return HR@10 and NDCG@10 of the first held-out event of `held_out_users`; empty without such users.

    exits, head: see `held_out_ranks`. The names are those of the log: `dot_hr10`, `dot_ndcg10` and so on.
    """
    users = held_out_users(data)
    if not len(users):
        return {}
    result = {}
    for exit, ranks in held_out_ranks(model, data, users, data.split.train_lengths[users], head, exits).items():
        result[f"{exit}_hr10"] = float(hits(ranks).mean())
        result[f"{exit}_ndcg10"] = float(gains(ranks).mean())
    return result


def held_out_gains(model: RankerModel, data: Data, head: int) -> np.ndarray:
    """Return NDCG@10 of the exit `dot` for each of `held_out_users`: (n,). head: see `held_out_ranks`."""
    users = held_out_users(data)
    return gains(held_out_ranks(model, data, users, data.split.train_lengths[users], head)["dot"])


@torch.no_grad()
def held_out_ranks(
    model: RankerModel, data: Data, users: np.ndarray, lengths: np.ndarray, head: int, exits: tuple[str, ...] = ("dot",)
) -> dict[str, np.ndarray]:
    """Return the rank of each user's event after the first `lengths` events, among all items: (n,) int64 by exit.

    users, lengths: (n,). head: the output to rank by. exits: `dot`, or `dot` and `point`. The exit `point` orders the
    512 best items of `dot`, and an event behind them keeps its rank by `dot`. Ties are ranked as in `metrics.ranks_of`.
    """
    model.eval()
    table = model.item_table()
    ranks = {exit: np.zeros(len(users), np.int64) for exit in exits}
    firsts = [served_window_start(length, data.config.history_length) for length in lengths.tolist()]
    windows = list(zip(users.tolist(), firsts, lengths.tolist(), strict=True))
    for rows in tqdm(list(chunks(windows, len(table))), desc="validation", leave=False, mininterval=1):
        for exit, found in chunk_ranks(model, data, table, [windows[row] for row in rows], head, exits).items():
            ranks[exit][rows] = found
    return ranks


def chunks(windows: list[Window], items: int) -> Iterator[np.ndarray]:
    """Yield the places of windows of similar length, at most MOST_EVENTS events and MOST_SCORES scores at a time."""
    widths = np.array([last - first + 1 for _, first, last in windows], np.int64)
    chunk: list[int] = []
    for k in np.argsort(widths, kind="stable").tolist():  # the last one of a chunk is the longest
        count = len(chunk) + 1
        if chunk and (count * items > MOST_SCORES or count * widths[k] > MOST_EVENTS):
            yield np.array(chunk)
            chunk = []
        chunk.append(k)
    if chunk:
        yield np.array(chunk)


def chunk_ranks(
    model: RankerModel, data: Data, table: Tensor, windows: list[Window], head: int, exits: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """Return `held_out_ranks` of the event after each window: (B,) by exit. table: (items, d)."""
    batch = moved(make_batch(data.sequences, windows), table.device)
    rows = torch.arange(len(windows), device=table.device)
    history, encoded = model.encode(model.tokens(table[batch.items], batch.actions, batch.gaps))
    users = encoded[rows, batch.lengths]  # (B, d) after the last event
    scores = (users @ (table * model.dot_scale[head]).T).cpu().numpy()  # (B, items); a bias would change no order
    scores[:, :FIRST_ITEM] = -np.inf
    targets = np.zeros(len(windows), np.int64)
    for row, (user, _, last) in enumerate(windows):
        items = data.sequences.items[data.sequences.offsets[user] :][: last + 1]
        targets[row] = items[-1]
        scores[row, hidden_rows(items[:-1], items[-1])] = -np.inf
    ranks = {"dot": ranks_of(scores, targets)}
    if "point" in exits:
        best = torch.from_numpy(scores).topk(min(RERANKED, len(table) - FIRST_ITEM), dim=1).indices
        best = best.sort(dim=1).values  # ties are in the order of the catalogue
        point = point_scores(model, data, table, batch, (history, users), best)[..., head].cpu().numpy()
        point[np.take_along_axis(scores, best.numpy(), axis=1) == -np.inf] = -np.inf
        found = best.numpy() == targets[:, None]
        ranks["point"] = np.where(found.any(axis=1), ranks_of(point, found.argmax(axis=1)), ranks["dot"])
    return ranks


def point_scores(
    model: RankerModel, data: Data, table: Tensor, batch: Batch, encoded: tuple[EncodedHistory, Tensor], items: Tensor
) -> Tensor:
    """Return the logits (B, N, heads) of the exit `point` for item rows (B, N), after all events of each window.

    encoded: the history of the batch, and the user vectors (B, d) after its last events.
    """
    history, users = encoded
    parts = []
    device = table.device
    places = torch.arange(batch.items.shape[1], device=device)
    for part in torch.arange(len(items)).split(max(1, MOST_CANDIDATES // items.shape[1])):
        numeric = torch.from_numpy(data.catalogue.numeric)[items[part]].to(device)
        vectors = table[items[part].to(device)]  # (b, N, d)
        part = part.to(device)
        lengths = batch.lengths[part, None]
        context = batch.contexts[part[:, None], lengths]  # (b, 1, 4)
        fused = model.fuse(numeric, model.default_meta, context)
        mask = (places <= lengths)[:, None, None]  # (b, 1, 1, T + 1)
        positions = (lengths + 1).expand(-1, items.shape[1])
        state = [(key[part], value[part]) for key, value in history]
        hidden = model.hidden(vectors, state, positions, mask, fused)
        parts.append(model.point(model.dot_logits(users[part, None], vectors), hidden))
    return torch.cat(parts)
