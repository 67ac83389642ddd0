"""Meta-learn user vectors for a trained ranker (LiMAML, arXiv 2403.00803): slatewise limaml models/movielens.toml

A meta block is a small network without inputs. Its output is one vector, the meta-embedding of a user. Meta-learning
finds initial parameters theta of the block. From theta, a few gradient steps on a user's events adapt the block to
that user:

    theta_u = theta - sum over K steps of rate * gradient of L_support(u)        inner loop
    meta-embedding of u = output of the block with theta_u                       is stored, and read by the ranker
    theta and rates descend on the mean of L_query over users                    outer loop

This is first-order MAML: the outer loop treats the inner gradients as constants. The ranker, LiMAML's global block, is
frozen. Its blocks run once per user, because the meta-embedding joins after its blocks (`RankerModel.fuse`); the
inner loop needs only the hidden states of the blocks and the point head. The meta block does not read the request, so
its output can be stored.

You can stop the command at any time; the same command continues after the last whole epoch. It writes
`meta_block.npz`.

Called by: the command line, `refresh.py`, `personalization.py`, `export.py`, `demo/content.py`. Calls: `tasks.py`,
`checkpoint.py`; `loading.py` for the ranker.
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import json
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from tqdm import tqdm

from slatewise.inference.arrays import UNKNOWN_ITEM
from slatewise_train import checkpoint
from slatewise_train.config import MetaConfig
from slatewise_train.data import Data, Sequences
from slatewise_train.loading import load_trainer
from slatewise_train.meta.personal_weights import learn_precision, personal_weights
from slatewise_train.meta.tasks import MetaCase, RankerTables, Tasks, event_losses, make_tasks
from slatewise_train.rankers.base import RankerModel

META_BLOCK = "meta_block.npz"  # in the folder of the training, and in the bundle
CHECKPOINT = "meta.pt"
BATCH_USERS = 64  # adapted together
Parameters = dict[str, Tensor]  # of one meta block, or with a leading axis of U meta blocks


class MetaBlock(nn.Module):
    """A learned code, passed through two layers: (M,). Before adaptation the output is the default vector.

    default: (M,). The last layer starts with zero weights and the default vector as its bias. The inner loop changes
    both; the outer loop does not.
    """

    def __init__(self, code: int, default: Tensor) -> None:
        super().__init__()
        self.code = nn.Parameter(torch.randn(code))
        self.inner = nn.Linear(code, code)
        self.out = nn.Linear(code, len(default))
        nn.init.zeros_(self.out.weight)
        self.out.requires_grad_(False).bias.copy_(default.detach())

    def forward(self) -> Tensor:
        vector: Tensor = self.out(torch.tanh(self.inner(self.code)))
        return vector


class MetaLearner(nn.Module):
    """A meta block and the step sizes of the inner loop. With the ranker, this is enough to adapt users.

    The step sizes are learned too, one for each step and tensor (Meta-SGD, arXiv 1707.09835; MAML++, arXiv 1810.09502).
    default: (M,) the vector of a user without events.
    """

    def __init__(self, config: MetaConfig, default: Tensor) -> None:
        super().__init__()
        torch.manual_seed(config.seed)
        self.config = config
        self.block = MetaBlock(config.code, default)
        names = [rate_name(name) for name, _ in self.block.named_parameters()]
        self.log_rates = nn.ParameterDict({name: torch.full((config.steps,), -2.0) for name in names})
        self.precision: Tensor | None = None  # (L, D) of `personal_weights.py`; None: users have no weights

    def support_loss(self, ranker: RankerModel, kinds: list[str], parameters: Parameters, *task: Tensor) -> Tensor:
        """Return the loss of one user: the sum over the events, divided by the largest possible number of events.

        The length of a step therefore grows with the number of events: a user with few events is adapted less.
        """
        *inputs, real = task
        vector = functional_call(self.block, parameters, ())
        return (event_losses(ranker, kinds, vector, *inputs) * real).sum() / self.config.support

    def adapt(self, ranker: RankerModel, kinds: list[str], support: Tasks) -> Parameters:
        """Run the inner loop for all users of the support at once. Returns the adapted parameters of the meta block."""
        gradient = vmap(grad(lambda parameters, *task: self.support_loss(ranker, kinds, parameters, *task)))
        adapted = {name: p.expand(len(support.base), *p.shape) for name, p in self.block.named_parameters()}
        for step in range(self.config.steps):
            slopes = gradient({name: p.detach() for name, p in adapted.items()}, *support.tensors())
            adapted = {
                name: p - self.log_rates[rate_name(name)][step].exp() * slopes[name] for name, p in adapted.items()
            }
        return adapted

    def outputs(self, adapted: Parameters) -> Tensor:
        """Return the meta-embeddings (U, M) of adapted parameters."""
        vectors: Tensor = vmap(lambda parameters: functional_call(self.block, parameters, ()))(adapted)
        return vectors

    def vectors(self, ranker: RankerModel, kinds: list[str], support: Tasks) -> Tensor:
        """Adapt to the support and return the users' meta-embeddings (U, M)."""
        return self.outputs(self.adapt(ranker, kinds, support))


def rate_name(parameter: str) -> str:
    """Return the step sizes' name for a parameter: names in a ParameterDict must not have dots."""
    return parameter.replace(".", "_")


class MetaTrainer:
    """Runs the outer loop over the training users of a ranker. A checkpoint has learner, optimizer and epoch.

    Raises ValueError if no user has enough events.
    """

    def __init__(self, ranker: RankerModel, data: Data, config: MetaConfig) -> None:
        self.ranker = copy.deepcopy(ranker).eval().requires_grad_(False)
        self.data = data
        self.config = config
        self.kinds = [head.kind for head in data.config.heads]
        self.numeric = torch.from_numpy(data.catalogue.numeric)
        self.lengths = data.split.train_lengths
        self.users = np.flatnonzero(self.lengths >= config.shortest + config.query)
        if not len(self.users):
            raise ValueError(
                f"no user has {config.shortest + config.query} training events (shortest + query in [meta]): the "
                f"longest history has {self.lengths.max(initial=0)}; write smaller values, or export without this step"
            )
        self.learner = MetaLearner(config, ranker.default_meta)
        self.optimizer = torch.optim.Adam(
            [p for p in self.learner.parameters() if p.requires_grad], lr=config.learning_rate
        )
        self.epoch = 0

    def cases(self, rng: np.random.Generator) -> list[list[MetaCase]]:
        """Return each training user once, in batches of similar length.

        The number of events is drawn uniformly on a logarithmic scale, so short histories count as much as long ones.
        """
        longest = self.lengths[self.users] - self.config.query
        nows = (
            np.exp(rng.uniform(np.log(self.config.shortest), np.log(longest + 1)))
            .astype(np.int64)
            .clip(self.config.shortest, longest)
        )
        order = np.argsort(nows * rng.uniform(0.9, 1.1, len(nows)))
        batches = [order[k : k + self.config.batch_users] for k in range(0, len(order), self.config.batch_users)]
        return [[(int(self.users[k]), int(nows[k])) for k in batches[b]] for b in rng.permutation(len(batches))]

    def query_loss(self, cases: list[MetaCase], tables: RankerTables) -> Tensor:
        """Return the mean loss of the query events after adaptation to the support."""
        c = self.config
        tasks = make_tasks(tables, self.data.sequences, cases, self.data.config.history_length, c)
        vectors = self.learner.vectors(self.ranker, self.kinds, tasks.columns(0, c.support))
        *inputs, real = tasks.columns(c.support, c.support + c.query).tensors()
        return (event_losses(self.ranker, self.kinds, vectors, *inputs) * real).sum() / real.sum()

    def run_epoch(self) -> float:
        """Train for one pass over the users and return the mean query loss."""
        rng = np.random.default_rng([self.config.seed, self.epoch])
        tables = RankerTables(self.ranker, self.ranker.item_table(), self.numeric)
        total = 0.0
        torch.manual_seed(self.config.seed * 1_000_003 + self.epoch)
        batches = self.cases(rng)
        for k, cases in enumerate(tqdm(batches, desc=f"meta epoch {self.epoch + 1}", leave=False, mininterval=2)):
            progress = (self.epoch + k / len(batches)) / self.config.epochs
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.learning_rate * (1 - progress)
            loss = self.query_loss(cases, tables)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
            self.optimizer.step()
            total += loss.item()
        self.epoch += 1
        return total / len(batches)

    def identity(self) -> str:
        """Return a digest of the config, the users and the ranker's weights."""
        values = (self.config, self.users.tolist(), self.lengths.tolist())
        return checkpoint.identity(values, self.ranker.state_dict().values())

    def parts(self) -> dict[str, checkpoint.Stateful]:
        """Return the parts of a checkpoint, without the epoch."""
        return {"learner": self.learner, "optimizer": self.optimizer}

    def save(self, folder: Path) -> None:
        checkpoint.save(folder / CHECKPOINT, self.identity(), self.parts(), epoch=self.epoch)

    def train(self, folder: Path) -> MetaLearner:
        """Learn up to the last epoch, from the checkpoint in the folder if there is one.

        Appends a row for each epoch to meta_log.csv: epoch, loss, seconds. Raises ValueError if the checkpoint belongs
        to another ranker, other users or another config.
        """
        folder.mkdir(parents=True, exist_ok=True)
        mismatch = "another ranker, other users or another [meta]"
        progress = checkpoint.resume(folder / CHECKPOINT, self.identity(), self.parts(), mismatch)
        self.epoch = progress.get("epoch", self.epoch)
        while self.epoch < self.config.epochs:
            begin = time.perf_counter()
            row = [self.epoch, round(self.run_epoch(), 4), round(time.perf_counter() - begin, 1)]
            self.save(folder)
            with (folder / "meta_log.csv").open("a", newline="") as file:
                csv.writer(file).writerow(row)
            print(f"meta epoch {row[0] + 1}: query loss {row[1]}, {row[2]} s", flush=True)
        return self.learner


def learn(ranker: RankerModel, data: Data, config: MetaConfig, folder: Path) -> MetaLearner:
    """Learn what all users share: the precision of their weights, or the meta block where such weights do not help.

    folder: of the meta block's checkpoint. Raises ValueError as `MetaTrainer` does.
    """
    meta = MetaTrainer(ranker, data, config)
    if heads := label_heads(meta.kinds):
        own = meta.ranker.with_personal_heads(heads).requires_grad_(False)
        meta.learner.precision = learn_precision(RankerTables(own, own.item_table(), meta.numeric), data, config)
    return meta.train(folder) if meta.learner.precision is None else meta.learner


def label_heads(kinds: Sequence[str]) -> tuple[int, ...]:
    return tuple(k for k, kind in enumerate(kinds) if kind == "label")


def user_vectors(
    learner: MetaLearner, ranker: RankerModel, kinds: list[str], sequences: Sequences, longest: int
) -> np.ndarray:
    """Return meta-embeddings (U, M) float32 of users, after all of their events.

    ranker: the one of a bundle, which has `personal_heads` if the learner has a precision. Users without an event of an
    item that the ranker knows get the default vector. Every call draws the same negatives.
    """
    torch.manual_seed(learner.config.seed)
    sequences = known_events(sequences)
    config = dataclasses.replace(learner.config, query=0)
    items = ranker.item_table().detach()
    tables = RankerTables(ranker, items, torch.full((len(items), len(ranker.numeric_mean)), torch.nan))
    if learner.precision is not None:
        return personal_weights(tables, learner.precision, sequences, longest, config.examples)
    lengths = np.diff(sequences.offsets)
    result: np.ndarray = learner.block().detach().repeat(len(lengths), 1).numpy()
    users = np.flatnonzero(lengths)
    users = users[np.argsort(lengths[users], kind="stable")]  # batches of similar length
    for first in range(0, len(users), BATCH_USERS):
        rows = users[first : first + BATCH_USERS]
        cases = [(int(user), int(lengths[user])) for user in rows]
        tasks = make_tasks(tables, sequences, cases, longest, config)
        result[rows] = learner.vectors(ranker, kinds, tasks).detach().numpy()
    return result


def known_events(sequences: Sequences) -> Sequences:
    """Return the same users without the events of unknown items."""
    keep = sequences.items != UNKNOWN_ITEM
    offsets = np.concatenate([[0], np.cumsum(keep)])[sequences.offsets]
    columns = (sequences.items, sequences.actions, sequences.timestamps, sequences.labels)
    return Sequences(sequences.users, offsets, *(column[keep] for column in columns))


def save_learner(path: Path, learner: MetaLearner, kinds: list[str]) -> None:
    """Write the arrays of a learner, its config and the kinds of the ranker's heads. No pickle."""
    arrays = {name: tensor.numpy() for name, tensor in learner.state_dict().items()}
    if learner.precision is not None:
        arrays["precision"] = learner.precision.numpy()
    about = np.array(json.dumps({"config": dataclasses.asdict(learner.config), "kinds": kinds}))
    np.savez(path, about=about, **arrays)


def load_learner(path: Path) -> tuple[MetaLearner, list[str]]:
    """Load a learner and the kinds of the ranker's heads.

    Raises OSError for an unreadable file, and ValueError for a file that is not a meta block.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            about = json.loads(str(arrays["about"]))
            learner = MetaLearner(MetaConfig(**about["config"]), torch.from_numpy(arrays["block.out.bias"]))
            learner.load_state_dict({name: torch.from_numpy(arrays[name]) for name in learner.state_dict()})
            if "precision" in arrays:
                learner.precision = torch.from_numpy(arrays["precision"])
    except (zipfile.BadZipFile, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} is no meta block: {error}") from error
    return learner.requires_grad_(False), about["kinds"]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="slatewise limaml",
        description="Meta-learn user vectors for a trained ranker, so that a bundle can adapt users to their events. "
        "You can stop it at any time; the same command continues after the last whole epoch.",
    )
    parser.add_argument("toml", type=Path, help="config of the ranker, as for `slatewise train`")
    parser.add_argument("--folder", type=Path, help="of the training; default: build/train/NAME")
    args = parser.parse_args(argv)
    trainer, config, folder = load_trainer(args.toml, args.folder)
    learner = learn(trainer.model, trainer.data, config.meta, folder)
    save_learner(folder / META_BLOCK, learner, [head.kind for head in config.data.heads])
