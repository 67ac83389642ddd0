"""Fit calibrations: strictly increasing maps of logits, one per variant, exit and head.

The method follows the isotonic layer of LiRank (arXiv 2402.06859). Calibrations are fitted on uncalibrated graphs and
written into the final graphs. They are also stored as JSON beside the graphs.

Called by: `export.py`, `bundle_writer.py`, `compression/`, `offline.py`, `exploration.py`. Calls: `cases.py`
for the validation users' slates, `sampling.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from slatewise.inference.arrays import FIRST_ITEM
from slatewise.inference.engine import Engine
from slatewise_train.config import Head
from slatewise_train.data import Data
from slatewise_train.evaluation.cases import Case, candidates_of, exits_of, score_exits, slate_cases, state_of
from slatewise_train.evaluation.sampling import in_parallel, sample_users
from slatewise_train.rankers.base import Calibration, Calibrations

LEAST_SLOPE = 1e-3
MOST_SLOPE = 2.0  # steeper maps could send two different logits to a probability of exactly 1
MOST_BIAS = 10.0
NEGATIVES = 99  # random items per positive, for heads of kind `next`
LEAST_EXAMPLES = 50  # of either label
LEAST_PROBABILITY = 1e-300  # a diverged ranker has probabilities of exactly 0 and 1, whose logits are infinite


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


def calibration_slates(data: Data, items: int) -> list[tuple[Case, np.ndarray]]:
    """Return the validation users' held-out slates, and for heads of kind `next` the item rows of another slate.

    That slate has the next item, if there is one, and 99 items that the user never met. items: rows of the item table.
    """
    rng = np.random.default_rng(0)
    first_next = next((k for k, head in enumerate(data.config.heads) if head.kind == "next"), None)
    slates: list[tuple[Case, np.ndarray]] = []
    for case in slate_cases(data, sample_users(data.split.validation_users)):
        if len(case.upcoming):
            # Of a slate that was shown, the next item is the first that was chosen; there may be none.
            chosen = case.upcoming if first_next is None else case.upcoming[case.labels[:, first_next] == 1]
            unmet = np.ones(items, bool)
            unmet[:FIRST_ITEM] = unmet[case.seen] = unmet[case.upcoming] = False
            unseen = np.flatnonzero(unmet)
            drawn = rng.choice(unseen, min(NEGATIVES, len(unseen)), replace=False)
            slates.append((case, np.concatenate([chosen[:1], drawn])))
    return slates


def target_of(head: Head, k: int, case: Case, among: np.ndarray) -> np.ndarray:
    """Return the labels of head k on its rows of a slate, NaN if not known: (n,). among: of `calibration_slates`."""
    return case.labels[:, k] if head.kind == "label" else np.isin(among, case.upcoming).astype(float)


def fit_calibrations(engine: Engine, data: Data, meta: np.ndarray) -> Calibrations:
    """Fit a calibration for every exit and head, on the validation users' held-out slates.

    engine: has uncalibrated graphs; meta: (M,). A head of kind `label` is fitted on the rated items of the slate. A
    head of kind `next` is fitted on slates of the next item and 99 items that the user never met, so it gives the
    probability of the next item in such a slate. Returns identities when there are no validation users.
    """
    heads = data.config.heads
    exits = exits_of(engine)
    slates = calibration_slates(data, len(engine.items))

    def examples(slate: tuple[Case, np.ndarray]) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Return the labels (n,) of each head and its logits (n,) by exit."""
        case, among = slate
        state = state_of(engine, case)
        found = {}
        for kind, rows in (("label", case.upcoming), ("next", among)):
            if any(head.kind == kind for head in heads):
                found[kind] = score_exits(engine, candidates_of(engine, data, rows, case.time), meta, state)
        result = []
        for k, head in enumerate(heads):
            target = target_of(head, k, case, among)
            known = ~np.isnan(target)
            p = {exit: scores[known, k].clip(LEAST_PROBABILITY, 1 - 1e-15) for exit, scores in found[head.kind].items()}
            result.append((target[known], {exit: np.log(value) - np.log1p(-value) for exit, value in p.items()}))
        return result

    scored = in_parallel(examples, slates, "calibration")
    if not scored:
        return {exit: [Calibration.identity() for _ in heads] for exit in exits}
    labels = [np.concatenate([found[k][0] for found in scored]) for k in range(len(heads))]
    return {
        exit: [
            fit_calibration(np.concatenate([found[k][1][exit] for found in scored]), labels[k])
            for k in range(len(heads))
        ]
        for exit in tqdm(exits, desc="calibration, fit", mininterval=1)
    }


def uncalibrated_heads(calibrations: Calibrations, heads: Sequence[str]) -> dict[str, str]:
    """Return the reason for each head whose labels did not suffice, by name."""
    first = next(iter(calibrations.values()))
    return {
        name: f"calibration of `{name}`: fewer than {LEAST_EXAMPLES} labels of 0 or of 1 in the validation slates"
        for name, calibration in zip(heads, first, strict=True)
        if not len(calibration.knots)
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
