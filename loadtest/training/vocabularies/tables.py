"""Id tables with fewer numbers than one row an item, which are trained in that form.

- `QuotientRemainder`: row k is the product of row k // m of one table and row k % m of another (QR hashing: Shi et al.,
  arXiv 1909.02107; LiRank, arXiv 2402.06859).
- `Clusters`: items of one cluster share a row. The clusters are those of Louvain on the graph of users and items
  (GraphHash, arXiv 2412.17245), or random ones of the same number.
- `Factored`: the product of a thin table and a matrix.

Only the study trains them, so they are no option of `[model]`. The fields of an item are added to its row as always.

Called by: `study.py`. Calls: torch, networkx.
"""

from __future__ import annotations

import networkx
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slatewise.inference.arrays import FIRST_ITEM


def sub_rows(rows: np.ndarray, remainders: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the two tables of QR hashing: (n,) each. No two rows share both."""
    return rows // remainders, rows % remainders


class QuotientRemainder(nn.Module):
    """A (rows, d) table from two of (quotients, d) and (remainders, d)."""

    def __init__(self, rows: int, width: int, remainders: int, std: float) -> None:
        super().__init__()
        quotients, places = sub_rows(np.arange(rows), remainders)
        self.register_buffer("quotients", torch.from_numpy(quotients), persistent=False)
        self.register_buffer("remainders", torch.from_numpy(places), persistent=False)
        self.quotient = nn.Parameter(torch.randn(int(quotients[-1]) + 1, width))
        self.remainder = nn.Parameter(std * torch.randn(remainders, width))

    @property
    def weight(self) -> Tensor:
        quotients = F.embedding(self.get_buffer("quotients"), self.quotient)
        return quotients * F.embedding(self.get_buffer("remainders"), self.remainder)


class Clusters(nn.Module):
    """A (rows, d) table in which the rows of one cluster are the same. clusters: (rows,) from 0 on."""

    def __init__(self, clusters: np.ndarray, width: int, std: float) -> None:
        super().__init__()
        self.register_buffer("clusters", torch.from_numpy(clusters), persistent=False)
        self.vectors = nn.Parameter(std * torch.randn(int(clusters.max()) + 1, width))

    @property
    def weight(self) -> Tensor:
        return F.embedding(self.get_buffer("clusters"), self.vectors)


class Factored(nn.Module):
    """A (rows, d) table that is the product of (rows, rank) and (rank, d)."""

    def __init__(self, rows: int, width: int, rank: int, std: float) -> None:
        super().__init__()
        self.thin = nn.Parameter(std * torch.randn(rows, rank))
        self.wide = nn.Parameter(torch.randn(rank, width) / rank**0.5)

    @property
    def weight(self) -> Tensor:
        return self.thin @ self.wide


def parameter_bytes(table: nn.Module) -> int:
    """Return the bytes of a table's numbers in float32."""
    return sum(4 * part.numel() for part in table.parameters())


def graph_clusters(users: np.ndarray, items: np.ndarray, rows: int, resolution: float) -> np.ndarray:
    """Return the cluster of each item row by Louvain on the graph of users and items: (rows,) from 0 on.

    users, items: (E,) of the edges; item rows. The items without an edge share a cluster. The rows before FIRST_ITEM
    have one each.
    """
    graph = networkx.Graph()
    graph.add_edges_from(zip((-1 - users).tolist(), items.tolist(), strict=True))
    communities = networkx.community.louvain_communities(graph, weight=None, resolution=resolution, seed=0)
    found = np.full(rows, len(communities))
    found[:FIRST_ITEM] = len(communities) + 1 + np.arange(FIRST_ITEM)
    for number, members in enumerate(communities):
        found[[node for node in members if node >= FIRST_ITEM]] = number
    return np.unique(found, return_inverse=True)[1]


def random_clusters(rows: int, count: int) -> np.ndarray:
    """Return random clusters of the rows, each with at least one: (rows,) from 0 to count - 1."""
    clusters = np.concatenate([np.arange(count), np.random.default_rng(0).integers(0, count, rows - count)])
    return np.random.default_rng(1).permutation(clusters)
