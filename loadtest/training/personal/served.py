"""What does a stored meta-embedding change in the answers? python -m loadtest.training.personal.served TOML BUNDLE

Measured on the held-out slates of the ranker's training, with the probabilities of the exported graphs. Prints a table
in Markdown.

The meta-embedding is made as `slatewise refresh` makes it, from the newest 5, 20, 50 or all events before the slate.
The request has the same events as its history, or none.

Called by: the command line. Its numbers appear in docs/meta_embeddings.md. Calls: `slatewise_train`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from loadtest.markdown import table
from loadtest.training.personal.movielens import LEAST, MOST
from slatewise.bundle.features import make_history
from slatewise.bundle.manifest import bundle_folder, read_manifest
from slatewise.cli import run_main
from slatewise.inference.engine import Engine
from slatewise.process import cpu_name
from slatewise_train.config import read_config
from slatewise_train.data import Data, Sequences
from slatewise_train.evaluation.cases import Case, candidates_of, score_exits, slate_cases, state_of
from slatewise_train.evaluation.metrics import interval, ndcg
from slatewise_train.loading import load_for_training
from slatewise_train.meta.limaml import META_BLOCK, load_learner, user_vectors
from slatewise_train.rankers.weights import load_model

EVENTS = (5, 20, 50, None)  # newest events of a user; None: all


@dataclass(frozen=True)
class Row:
    """One line of the table. Differences are from the default meta-embedding, with intervals over users."""

    events: str
    history: str
    exit: str
    default: float  # NDCG@10 of the label with the default meta-embedding
    gain: list[float]
    log_loss: list[float]


def newest(data: Data, users: np.ndarray, ends: np.ndarray, count: int | None) -> Sequences:
    """Return the newest `count` events of users before their first `ends` events are over."""
    s = data.sequences
    firsts = np.zeros_like(ends) if count is None else np.maximum(0, ends - count)
    lengths = ends - firsts
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = np.arange(offsets[-1]) + np.repeat(s.offsets[users] + firsts - offsets[:-1], lengths)
    columns = (column[rows] for column in (s.items, s.actions, s.timestamps, s.labels))
    return Sequences([s.users[user] for user in users], offsets, *columns)


def requests(data: Data, cut: Sequences, cases: list[Case], with_history: bool) -> list[Case]:
    """Return the cases with the events of `cut` as their histories, or with none."""
    found = []
    for k, case in enumerate(cases):
        last = int(cut.offsets[k + 1])
        first = max(int(cut.offsets[k]), last - data.config.history_length) if with_history else last
        rows = slice(first, last)
        found.append(replace(case, history=make_history(cut.items[rows], cut.actions[rows], cut.timestamps[rows])))
    return found


def compare(engine: Engine, data: Data, cases: Sequence[Case], pairs: np.ndarray, head: int) -> dict[str, np.ndarray]:
    """Return NDCG@10 and log loss of a head by exit: (cases, 2, 2), the metrics along the last axis.

    pairs: (cases, 2, M), the default meta-embedding and the user's own.
    """
    found: dict[str, list[list[tuple[float, float]]]] = {}
    for case, pair in zip(tqdm(cases), pairs, strict=True):
        state, candidates = state_of(engine, case), candidates_of(engine, data, case.upcoming, case.time)
        labels = case.labels[:, head]
        scores = [score_exits(engine, candidates, meta, state) for meta in pair]
        for exit in list(scores[0])[1:]:
            rows = []
            for one in scores:
                chance = np.clip(one[exit][:, head], LEAST, MOST)
                loss = float(-np.log(np.where(labels == 1, chance, 1 - chance)).mean())
                rows.append((ndcg(one[exit][:, head], labels), loss))
            found.setdefault(exit, []).append(rows)
    return {exit: np.array(rows) for exit, rows in found.items()}


def measure_served(folder: Path, data: Data, variant: str = "fp32") -> list[Row]:
    """Return the lines of the table for a bundle with a meta block, and with a head of kind `label`."""
    manifest = read_manifest(folder)
    model = load_model(folder, manifest).requires_grad_(False)
    learner, kinds = load_learner(folder / META_BLOCK)
    engine = Engine(folder / "variants" / variant, np.load(folder / "items.npy"), manifest.exits)
    cases = slate_cases(data, data.split.slate_users)
    users = np.array([case.user for case in cases])
    rows = []
    for count in EVENTS:
        cut = newest(data, users, data.split.train_lengths[users], count)
        vectors = user_vectors(learner, model, kinds, cut, data.config.history_length)
        default = np.broadcast_to(model.default_vector().numpy(), vectors.shape)
        pairs = np.stack([default, vectors], axis=1)
        for history in ("the same events", "none"):
            sent = requests(data, cut, cases, history != "none")
            for exit, values in compare(engine, data, sent, pairs, kinds.index("label")).items():
                gain, loss = (values[:, 1] - values[:, 0]).T
                before = float(np.nanmean(values[:, 0, 0]))
                rows.append(
                    Row(str(count or "all"), history, exit, before, interval(gain[~np.isnan(gain)]), interval(loss))
                )
    return rows


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.training.personal.served",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("toml", type=Path, help="of the ranker's training")
    parser.add_argument("bundle", type=Path, help="<root>/<ranker>, or one version of it")
    parser.add_argument("--variant", default="fp32", help="whose graphs are measured; default: %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    data, _ = load_for_training(read_config(args.toml))
    rows = measure_served(bundle_folder(args.bundle), data, args.variant)
    print(f"{args.variant}; {cpu_name()}; differences from the default meta-embedding\n")
    header = ["newest events", "history in the request", "exit", "NDCG@10 without", "NDCG@10", "log loss"]

    def told(values: list[float]) -> str:
        return "{:+.4f} ({:+.4f} to {:+.4f})".format(*values)

    cells = [[r.events, r.history, r.exit, f"{r.default:.4f}", told(r.gain), told(r.log_loss)] for r in rows]
    print(table(header, cells))


if __name__ == "__main__":
    sys.exit(run_main("python -m loadtest.training.personal.served", main, sys.argv[1:]))
