"""Rank the validation users' held-out event in the whole catalogue, many users at a time.

Called by: `train.py`. Calls: `batches.py`, `devices.py`, `evaluation/metrics.py`, and the ranker.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from slatewise.inference.arrays import FIRST_ITEM
from slatewise_train.batches import Window, make_batch, served_window_start
from slatewise_train.data import Data
from slatewise_train.devices import moved
from slatewise_train.evaluation.metrics import gains, hits
from slatewise_train.rankers.base import RankerModel

MOST_LOGITS = 4_000_000  # users times items of one chunk: 16 MB
MOST_EVENTS = 16_384  # of one chunk, padding included
RERANKED = 512  # items that the exit `point` orders: the best ones of the exit `dot`
MOST_CANDIDATES = 16_384  # of one call of the blocks


@torch.no_grad()
def validate(model: RankerModel, data: Data, head: int, exits: tuple[str, ...]) -> dict[str, float]:
    """Return HR@10 and NDCG@10 of the held-out event of `Split.next_users`, in the whole catalogue.

    exits: `dot`, or `dot` and `point`; head: a head of kind `next`. Other items of the user's training events are not
    ranked. The exit `point` orders the 512 best items of `dot`; a held-out item behind them counts as a miss. The
    result is empty without such users.
    """
    users = data.split.next_users
    if not len(users):
        return {}
    model.eval()
    table = model.item_table()
    ranks: dict[str, list[np.ndarray]] = {name: [] for name in exits}
    for windows in chunks(data, users, len(table)):
        for name, found in held_out_ranks(model, data, table, windows, head, exits).items():
            ranks[name].append(found)
    result = {}
    for name, columns in ranks.items():
        joined = np.concatenate(columns)
        result[f"{name}_hr10"] = float(hits(joined).mean())
        result[f"{name}_ndcg10"] = float(gains(joined).mean())
    return result


def chunks(data: Data, users: np.ndarray, items: int) -> Iterator[list[Window]]:
    """Yield the windows that a request after the training events would read, those of similar length together."""
    lengths = data.split.train_lengths[users]
    chunk: list[Window] = []
    for k in np.argsort(lengths, kind="stable"):
        length = int(lengths[k])
        window = (int(users[k]), served_window_start(length, data.config.history_length), length)
        width = window[2] - window[1] + 1  # the longest of the chunk
        if chunk and max((len(chunk) + 1) * items / MOST_LOGITS, (len(chunk) + 1) * width / MOST_EVENTS) > 1:
            yield chunk
            chunk = []
        chunk.append(window)
    yield chunk


def held_out_ranks(
    model: RankerModel, data: Data, table: Tensor, windows: list[Window], head: int, exits: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """Return the rank (B,) of the event after each window, from 0, by exit.

    table: (items, d). Ranks behind the 512 items that `point` orders are those of `dot`.
    """
    sequences = data.sequences
    device = table.device
    batch = moved(make_batch(sequences, windows), device)
    rows = torch.arange(len(windows), device=device)
    history, encoded = model.encode(model.tokens(table[batch.items], batch.actions, batch.gaps))
    users = encoded[rows, batch.lengths]  # (B, d)
    target = torch.from_numpy(sequences.items[[sequences.offsets[user] + last for user, _, last in windows]]).to(device)
    seen = [sequences.items[sequences.offsets[user] :][:last] for user, _, last in windows]
    owner = torch.from_numpy(np.repeat(np.arange(len(windows)), [len(items) for items in seen])).to(device)
    # (B, items): dot products in the order of the head's logits
    scores = (users @ table.T) * model.dot_scale[head].sign()
    mine = scores[rows, target].clone()
    scores[:, :FIRST_ITEM] = -torch.inf
    scores[owner, torch.from_numpy(np.concatenate(seen)).to(device)] = -torch.inf
    scores[rows, target] = mine
    dot_ranks = (scores > mine[:, None]).sum(1)
    ranks = {"dot": dot_ranks.cpu().numpy()}
    if "point" not in exits:
        return ranks
    best = scores.topk(min(RERANKED, len(table) - FIRST_ITEM), dim=1)
    point = torch.empty_like(best.values)
    some = max(1, MOST_CANDIDATES // best.values.shape[1])
    for part in rows.split(some):
        vectors = table[best.indices[part]]  # (b, N, d)
        numeric = torch.from_numpy(data.catalogue.numeric)[best.indices[part].cpu()].to(device)
        context = batch.contexts[part, batch.lengths[part]][:, None]
        fused = model.fuse(numeric, model.default_meta, context)
        mask = (torch.arange(encoded.shape[1], device=device) <= batch.lengths[part, None])[:, None, None]
        positions = (batch.lengths[part, None] + 1).expand(-1, vectors.shape[1])
        state = [(key[part], value[part]) for key, value in history]
        hidden = model.hidden(vectors, state, positions, mask, fused)
        logits = model.dot_logits(users[part, None], vectors) + model.point_logits(hidden)
        point[part] = logits[..., head]
    found = best.indices == target[:, None]
    point = point.masked_fill(best.values == -torch.inf, -torch.inf)
    mine = point.masked_fill(~found, -torch.inf).amax(1, keepdim=True)
    ranks["point"] = torch.where(found.any(1), (point > mine).sum(1), dot_ranks).cpu().numpy()
    return ranks
