"""Fit calibrations: strictly increasing maps of logits, one per variant, exit and head.

The method follows the isotonic layer of LiRank (arXiv 2402.06859). Calibrations are fitted on uncalibrated graphs and
written into the final graphs. They are also stored as JSON beside the graphs.

Called by: `export.py`, `bundle_writer.py`, `compression/`. Calls: `offline.py` for the validation users' slates.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from slatewise.inference.arrays import FIRST_ITEM
from slatewise.inference.engine import Engine
from slatewise_train.data import Data
from slatewise_train.evaluation.cases import candidates_of, slate_cases
from slatewise_train.rankers.base import EXITS, Calibration, Calibrations

LEAST_SLOPE = 1e-3
MOST_SLOPE = 2.0  # steeper maps could send two different logits to a probability of exactly 1
MOST_BIAS = 10.0
NEGATIVES = 99  # random items per positive, for heads of kind `next`
LEAST_EXAMPLES = 50  # of either label


def fit_calibration(logits: np.ndarray, labels: np.ndarray, knots: int = 6, steps: int = 300) -> Calibration:
    """Fit the piecewise linear map with the lowest cross-entropy: slopes from 1e-3 to 2, linear outside the knots.

    logits, labels: (E,), labels 0 or 1. The knots are quantiles of the logits. A small penalty on the difference of
    neighbouring slopes makes the map of a small sample nearly straight. Returns the identity when there are fewer than
    50 examples of label 0 or of label 1.
    """
    labels = labels.astype(np.float64)
    if min(labels.sum(), (1 - labels).sum()) < LEAST_EXAMPLES:
        return Calibration.identity()
    positions = np.unique(np.quantile(logits, np.linspace(0.05, 0.95, knots)))
    x = torch.tensor(logits, dtype=torch.float64)
    y = torch.tensor(labels)
    at = torch.tensor(positions)
    raw = torch.zeros(len(positions) + 1, dtype=torch.float64, requires_grad=True)  # slopes of about 1
    raw_bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    over = (x[:, None] - at).clamp(min=0)

    def pieces() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        slopes = LEAST_SLOPE + (MOST_SLOPE - LEAST_SLOPE) * torch.sigmoid(raw)
        bias = MOST_BIAS * torch.tanh(raw_bias)
        return slopes, bias, bias + slopes[0] * x + over @ slopes.diff()

    optimizer = torch.optim.LBFGS([raw, raw_bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        slopes, _, mapped = pieces()
        loss = F.binary_cross_entropy_with_logits(mapped, y) + 1e-3 * slopes.log().diff().square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    slopes, bias, _ = pieces()
    found = slopes.detach().numpy()
    return Calibration(float(found[0]), float(bias.detach()), positions, np.diff(found))


def fit_calibrations(engine: Engine, data: Data, meta: np.ndarray) -> Calibrations:
    """Fit a calibration for every exit and head, on the validation users' held-out slates.

    engine: has uncalibrated graphs; meta: (M,). A head of kind `label` is fitted on the rated items of the slate. A
    head of kind `next` is fitted on slates of the next item and 99 items that the user never met, so it gives the
    probability of the next item in such a slate. Returns identities when there are no validation users.
    """
    rng = np.random.default_rng(0)
    heads = data.config.heads
    logits: dict[str, list[list[np.ndarray]]] = {exit: [[] for _ in heads] for exit in EXITS if exit in engine.sessions}
    labels: list[list[np.ndarray]] = [[] for _ in heads]
    for case in tqdm(slate_cases(data, data.split.validation_users), desc="calibration", mininterval=2):
        unseen = np.setdiff1d(np.arange(FIRST_ITEM, len(engine.items)), np.concatenate([case.seen, case.upcoming]))
        among = np.concatenate([case.upcoming[:1], rng.choice(unseen, min(NEGATIVES, len(unseen)), replace=False)])
        for rows, kind, target in (
            (case.upcoming, "label", case.labels),
            (among, "next", np.eye(len(among), 1).repeat(len(heads), axis=1)),
        ):
            candidates = candidates_of(engine, data, rows, case.time)
            scores = {exit: engine.score(case.history, candidates, meta, exit) for exit in logits}
            for k, head in enumerate(heads):
                if head.kind == kind:
                    known = ~np.isnan(target[:, k])
                    labels[k].append(target[known, k])
                    for exit, p in scores.items():
                        logits[exit][k].append(np.log(p[known, k]) - np.log1p(-p[known, k]))
    if not labels[0]:
        return {exit: [Calibration.identity() for _ in heads] for exit in logits}
    joined = [np.concatenate(column) for column in labels]
    return {
        exit: [fit_calibration(np.concatenate(columns[k]), joined[k]) for k in range(len(heads))]
        for exit, columns in logits.items()
    }


def write_calibrations(path: Path, calibrations: Calibrations) -> None:
    """Write JSON: exit -> one object per head with `slope`, `bias`, `knots` and `bends`.

    Reading returns every float64 exactly.
    """
    content = {
        exit: [{"slope": c.slope, "bias": c.bias, "knots": c.knots.tolist(), "bends": c.bends.tolist()} for c in column]
        for exit, column in calibrations.items()
    }
    path.write_text(json.dumps(content, separators=(",", ":"), allow_nan=False))


def read_calibrations(path: Path) -> Calibrations:
    """Read the file of `write_calibrations`. Raises OSError, or ValueError or KeyError for other content."""
    return {
        exit: [
            Calibration(float(c["slope"]), float(c["bias"]), np.array(c["knots"], float), np.array(c["bends"], float))
            for c in column
        ]
        for exit, column in json.loads(path.read_text()).items()
    }
