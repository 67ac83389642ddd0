"""Open the bundle to compress: its model, calibrations and engine, and sample requests.

Half of the samples give the ranges of int8 inputs. The other half measures the agreement of a variant with fp32.

Called by: `bases.py`, `variants.py`, `compress.py`. Calls: `rankers/weights.py`, `evaluation/`, `train.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slatewise.bundle.features import request_context
from slatewise.bundle.manifest import POSTERIOR, read_manifest
from slatewise.inference.arrays import FIRST_ITEM, Candidates, Float64, History
from slatewise.inference.engine import HISTORY_CHUNK, Engine
from slatewise.inference.item_table import ItemTable
from slatewise_train.batches import Batch, epoch_windows, make_batch
from slatewise_train.bundle_writer import CALIBRATION
from slatewise_train.compression.low_rank import LayerStatistics, collect_statistics
from slatewise_train.config import TrainConfig
from slatewise_train.data import Data
from slatewise_train.evaluation import parity
from slatewise_train.evaluation.calibration import read_calibrations
from slatewise_train.evaluation.cases import slate_cases
from slatewise_train.evaluation.offline import Outcome, run_cases
from slatewise_train.rankers.base import RankerModel
from slatewise_train.rankers.weights import load_model
from slatewise_train.train import Trainer

SAMPLES = 120  # requests; half of them give the ranges of int8 inputs, the others the agreement with fp32
SLATE = 200  # candidates of a sample
VECTOR_BATCHES = 8  # training batches that vectors of users are taken from
STATISTICS_BATCHES = 40  # training batches that the statistics of the layers are collected on


@dataclass(frozen=True)
class Sample:
    """A request, as arrays."""

    history: History
    rows: np.ndarray  # (N,) item rows of its candidates
    numeric: np.ndarray  # (N, F)
    context: np.ndarray  # (1, 4)
    meta: np.ndarray  # (M,)

    def candidates(self, items: ItemTable) -> Candidates:
        return Candidates(items.take(self.rows, axis=0), self.numeric, self.context)

    def score(self, engine: Engine, exit: str) -> Float64:
        """Return (N, heads) probabilities."""
        return engine.score(self.history, self.candidates(engine.items), self.meta, exit)


class Source:
    """A bundle of format 2, and the data on which the quality of its variants is measured.

    data: `None` to measure size and latency only; then models are not trained and quality is unknown. most_users: the
    most users of each table, the same for every variant; `None`: all users. Raises ManifestError for a bundle of format
    1, and ValueError for data that the bundle was not trained on.
    """

    def __init__(
        self, folder: Path, data: Data | None, train: TrainConfig | None = None, most_users: int | None = None
    ) -> None:
        self.folder = folder
        self.data = data
        self.train = train or TrainConfig()
        self.most_users = most_users
        self.manifest = read_manifest(folder)
        self.items = np.load(folder / "items.npy")
        if data is not None and len(self.items) != len(data.catalogue.numeric):
            raise ValueError(
                f"{folder} has {len(self.items)} rows of items, the data {len(data.catalogue.numeric)}: "
                "other data than it was trained on"
            )
        self.model = load_model(folder, self.manifest)
        self.calibrations = read_calibrations(folder / "variants/fp32" / CALIBRATION)
        self.meta = self.model.default_vector().numpy()
        vectors = folder / "meta_embeddings.npy"
        self.vectors = np.load(vectors) if vectors.exists() else np.zeros((0, len(self.meta)), np.float32)
        posterior = folder / "variants/fp32" / POSTERIOR
        self.posterior = np.load(posterior) if posterior.exists() else None
        self.fp32 = self.engine(folder / "variants/fp32")
        self.samples = list(self.draw_samples())

    def engine(self, folder: Path, items: ItemTable | None = None) -> Engine:
        """Build the engine of a variant's folder. items: the variant's item table, by default the float32 table."""
        return Engine(folder, self.items if items is None else items, self.manifest.exits)

    def draw_samples(self) -> Iterator[Sample]:
        """Yield requests of the validation users among random items, or random requests if there are no such users.

        The meta-embeddings are the default and those of the bundle's users, in turn.
        """
        draw = parity.Requests(self.fp32, self.manifest, 0)
        metas = itertools.cycle([self.meta, *self.vectors[:SAMPLES]])
        if self.data is not None and len(self.data.split.validation_users):
            for case in slate_cases(self.data, self.data.split.validation_users)[:SAMPLES]:
                among = draw.rng.integers(FIRST_ITEM, len(self.items), max(1, SLATE - len(case.upcoming)))
                rows = np.concatenate([case.upcoming, among])
                numeric = self.data.catalogue.numeric[rows]
                yield Sample(case.history, rows, numeric, request_context(case.time)[None], next(metas))
            return
        for length in draw.rng.integers(1, self.manifest.limits.history_used, SAMPLES // 3):
            history = draw.history(min(int(length), 2 * HISTORY_CHUNK))
            rows = draw.rng.integers(FIRST_ITEM, len(self.items), SLATE)
            late = draw.candidates(SLATE)
            yield Sample(history, rows, late.numeric, late.context, next(metas))

    def user_vectors(self) -> np.ndarray:
        """Return vectors of users, which the exit `dot` multiplies with those of items: (n, d).

        They are those after each event of some training batches, or without data those of the samples.
        """
        if self.data is None:
            return np.concatenate([self.fp32.extend(self.fp32.start, sample.history).user for sample in self.samples])
        return user_vectors(self.model, self.training_batches(VECTOR_BATCHES))

    def run_cases(self, engine: Engine) -> Outcome | None:
        """Run an engine on the held-out cases and return its outcome, or `None` without data."""
        if self.data is None:
            return None
        return run_cases(engine, self.data, self.meta, self.most_users, baselines=False)

    @cached_property
    def outcome(self) -> Outcome | None:
        """The outcome of fp32 on the held-out cases, or `None` without data."""
        return self.run_cases(self.fp32)

    def trainer(self) -> Trainer:
        """Build a trainer of the bundle's model. Needs data."""
        assert self.data is not None
        return Trainer(self.data, self.model, self.train)

    @cached_property
    def statistics(self) -> dict[str, LayerStatistics]:
        """Statistics of the model's dense layers, by name."""
        return collect_statistics(self.model, self.losses)

    def training_batches(self, count: int) -> Iterator[Batch]:
        """Return the first batches of an epoch. Needs data."""
        assert self.data is not None
        self.model.eval()
        return first_batches(self.data, self.manifest.limits.history_used, self.train.batch_events, count)

    def losses(self) -> Iterator[Tensor]:
        """Yield losses for the Fisher information.

        With data it is the training loss, without data the mean square of the logits of the samples.
        """
        torch.manual_seed(0)
        if self.data is not None:
            trainer = self.trainer()
            for batch in self.training_batches(STATISTICS_BATCHES):
                yield trainer.loss(batch, cascade=True)
            return
        for sample in self.samples:
            candidates = sample.candidates(self.items)
            found = parity.logits_of(self.model, self.items, sample.history, candidates, sample.meta)
            yield sum((value.square().mean() for value in found.values()), torch.zeros(()))


def first_batches(data: Data, history: int, events: int, count: int) -> Iterator[Batch]:
    """Yield the first batches of an epoch. history: the longest window; events: of a batch."""
    windows = epoch_windows(data.split.train_lengths, history, events, np.random.default_rng(0))
    for some in itertools.islice(windows, count):
        yield make_batch(data.sequences, some)


@torch.no_grad()
def user_vectors(model: RankerModel, batches: Iterable[Batch]) -> np.ndarray:
    """Return the vectors of users after each event of the batches, which the exit `dot` multiplies: (n, d)."""
    table = model.item_table()
    found = []
    for batch in batches:
        users = model.encode(model.tokens(table[batch.items], batch.actions, batch.gaps))[1]
        found.append(users[torch.arange(users.shape[1]) <= batch.lengths[:, None]])
    return torch.cat(found).numpy()
