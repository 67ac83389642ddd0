"""LiMAML (arXiv 2403.00803): what every user shares is learned so that a few gradient steps on one user's events fit that user.

    theta_u = theta - sum over K steps of rate * grad L_support(u)      the meta block, adapted to user u (inner loop)
    vector of u = output of the meta block with theta_u                 all that is stored, and all that the ranker reads
    theta, rates <- descent on the sum over users of L_query(u)         first order: the inner gradients count as constants (outer loop)

The global block is the ranker: frozen, and run once a user, for the vector joins behind its blocks (`Ligr.fuse`), so the
inner loop sees their hidden states and the point head alone. The block reads nothing of a request, or its output would depend on it.
Before: a trained ranker. After: `meta_embeddings.py` (the refresh job), `personal.py` (what it is worth).
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import hashlib
import json
import os
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from tqdm import tqdm

from slatewise.inference.arrays import FIRST_ITEM, UNKNOWN_ITEM
from slatewise_train.data import Sequences, from_table
from slatewise_train.rankers.ligr import Ligr
from slatewise_train.train import Data, Slates, load_trainer, make_batch, read_slates

META_BLOCK = "meta_block.npz"  # in the training's folder, then in the bundle
CHECKPOINT = "meta.pt"
BATCH_USERS = 64  # adapted at once
POOL = 4096  # items that the negatives of a batch of users are drawn from
Parameters = dict[str, Tensor]  # of a meta block, or with a leading axis those of many


@dataclass(frozen=True)
class MetaConfig:
    """How a user is learned, and how learning that is learned."""

    code: int = 32  # width of the meta block
    steps: int = 3  # of the inner loop
    support: int = 20  # newest events that a user is adapted on
    query: int = 10  # events after them, that the outer loop learns from
    negatives: int = 24  # an event: half uniform, half from the exit `dot`
    shortest: int = 5  # events before the query
    epochs: int = 4
    batch_users: int = 32
    learning_rate: float = 0.01
    seed: int = 0


class MetaBlock(nn.Module):
    """A code through two layers: (M,). Un-adapted it is `default`, whatever else is learned: the last layer starts at zero."""

    def __init__(self, code: int, default: Tensor) -> None:
        super().__init__()
        self.code = nn.Parameter(torch.randn(code))
        self.inner = nn.Linear(code, code)
        self.out = nn.Linear(code, len(default))
        nn.init.zeros_(self.out.weight)
        self.out.requires_grad_(False).bias.copy_(
            default.detach()
        )  # where the inner loop starts; the outer loop leaves it

    def forward(self) -> Tensor:
        return self.out(torch.tanh(self.inner(self.code)))


@dataclass(frozen=True)
class Tasks:
    """What the ranker makes of P events of each of U users, all but the vector: column 0 of C candidates is the event that came."""

    base: Tensor  # (U, P, C, d) hidden states of the candidates without a vector
    dot: Tensor  # (U, P, C, heads) logits of the exit `dot`
    offset: Tensor  # (U, P, C) of the softmax: minus the log of the rate at which a negative was drawn, -inf where it is the event itself
    labels: Tensor  # (U, P, heads) NaN where not known
    real: Tensor  # (U, P) float32, 1 for events that exist

    def columns(self, first: int, last: int) -> Tasks:
        return Tasks(*(getattr(self, f.name)[:, first:last] for f in dataclasses.fields(self)))

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f.name) for f in dataclasses.fields(self))


def point_with(ranker: Ligr, vectors: Tensor, base: Tensor, dot: Tensor) -> Tensor:
    """Logits (..., P, C, heads) of the exit `point` with vectors (..., M); base and dot as in `Tasks`."""
    return dot + ranker.point_logits(base + ranker.meta_shift(vectors)[..., None, None, :])


def event_losses(
    ranker: Ligr, kinds: list[str], vector: Tensor, base: Tensor, dot: Tensor, offset: Tensor, labels: Tensor
) -> Tensor:
    """(..., P) of the exit `point`: vector (..., M), the rest as in `Tasks`. A head of kind `next` is a softmax over the candidates."""
    logits = point_with(ranker, vector, base, dot)
    losses = torch.zeros_like(base[..., 0, 0])
    for head, kind in enumerate(kinds):
        if kind == "next":
            losses = losses - F.log_softmax(logits[..., head] + offset, dim=-1)[..., 0]
        else:
            target = labels[..., head]
            loss = F.binary_cross_entropy_with_logits(logits[..., 0, head], target.nan_to_num(), reduction="none")
            losses = losses + loss.where(~target.isnan(), 0.0)
    return losses


class MetaLearner(nn.Module):
    """A meta block and how long its inner steps are: all that the refresh job needs beside the ranker."""

    def __init__(self, config: MetaConfig, default: Tensor) -> None:
        super().__init__()
        torch.manual_seed(config.seed)
        self.config = config
        self.block = MetaBlock(config.code, default)
        # learned too, a step and a tensor (Meta-SGD, arXiv 1707.09835; MAML++, arXiv 1810.09502); an underscore, for a name may hold no dot
        self.log_rates = nn.ParameterDict(
            {name.replace(".", "_"): torch.full((config.steps,), -2.0) for name, _ in self.block.named_parameters()}
        )

    def support_loss(self, ranker: Ligr, kinds: list[str], parameters: Parameters, *task: Tensor) -> Tensor:
        """Of one user: the sum over the events, so that a step is as long as the evidence, over the most events there can be."""
        *inputs, real = task
        vector = functional_call(self.block, parameters, ())
        return (event_losses(ranker, kinds, vector, *inputs) * real).sum() / self.config.support

    def adapt(self, ranker: Ligr, kinds: list[str], support: Tasks) -> Parameters:
        """The meta block of each user after the inner steps, all users at once."""
        gradient = vmap(grad(lambda parameters, *task: self.support_loss(ranker, kinds, parameters, *task)))
        adapted = {name: p.expand(len(support.base), *p.shape) for name, p in self.block.named_parameters()}
        for step in range(self.config.steps):
            slopes = gradient({name: p.detach() for name, p in adapted.items()}, *support.tensors())
            adapted = {
                name: p - self.log_rates[name.replace(".", "_")][step].exp() * slopes[name]
                for name, p in adapted.items()
            }
        return adapted

    def outputs(self, adapted: Parameters) -> Tensor:
        """(U, M)"""
        return vmap(lambda parameters: functional_call(self.block, parameters, ()))(adapted)

    def vectors(self, ranker: Ligr, kinds: list[str], support: Tasks) -> Tensor:
        """(U, M)"""
        return self.outputs(self.adapt(ranker, kinds, support))


@torch.no_grad()
def make_tasks(
    ranker: Ligr,
    table: Tensor,
    numeric: Tensor,
    sequences: Sequences,
    cases: list[tuple[int, int]],
    longest: int,
    support: int,
    query: int,
    negatives: int,
) -> Tasks:
    """`support` events before and `query` from each case on, (user, events that have happened): event by event, what came and what did not.

    The history of an event is all before it, in a window of at most `longest`. numeric: (items, F), what a request would bring; for
    the support they are missing, for the refresh job has no request.
    """
    windows = [(user, max(0, now - longest + query), now + query) for user, now in cases]
    batch = make_batch(sequences, windows)
    firsts, nows = (
        torch.tensor(column)
        for column in zip(*((first, now) for (_, first, _), (_, now) in zip(windows, cases, strict=True)), strict=True)
    )
    state, users = ranker.encode(ranker.tokens(F.embedding(batch.items, table), batch.actions, batch.gaps))
    read = (nows - firsts)[:, None] + torch.arange(-support, query)  # (U, P) events of the window that have happened
    u, p = read.shape
    rows = torch.arange(u)[:, None]
    column = read.clamp(min=0)
    target = batch.items[rows, column + 1]
    real = (read >= 0) & (target != UNKNOWN_ITEM)
    pool = (
        torch.arange(FIRST_ITEM, len(table))
        if len(table) - FIRST_ITEM <= POOL
        else torch.randint(FIRST_ITEM, len(table), (POOL,))
    )
    share = torch.softmax(users[rows, column] @ F.embedding(pool, table).T, dim=-1)
    share = 0.5 * share + 0.5 / len(pool)
    drawn = torch.multinomial(share.flatten(0, 1), negatives, replacement=True).view(u, p, negatives)
    log_rate = torch.log(negatives * share.gather(2, drawn))
    candidates = torch.cat([target[..., None], pool[drawn]], dim=2)
    labels = batch.labels[rows, column + 1]
    late = torch.cat(
        [torch.full((u, support, negatives + 1, numeric.shape[1]), torch.nan), numeric[candidates[:, support:]]], dim=1
    )
    slates = Slates(
        column, candidates, late, batch.contexts[rows, column], real[..., None], labels[:, :, None], log_rate
    )
    dot, _, base = read_slates(
        ranker, slates, state, users, F.embedding(candidates, table), torch.zeros(u, p, ranker.config.meta_size)
    )
    same = candidates[..., 1:] == target[..., None]
    offset = torch.cat([torch.zeros(u, p, 1), (-log_rate).masked_fill(same, -torch.inf)], dim=2)
    return Tasks(base.view(u, p, *base.shape[1:]), dot.view(u, p, *dot.shape[1:]), offset, labels, real.float())


class MetaTrainer:
    """The outer loop over the training users of a ranker: learner, optimizer and epoch are all that a checkpoint holds."""

    def __init__(self, ranker: Ligr, data: Data, config: MetaConfig) -> None:
        self.ranker = copy.deepcopy(ranker).eval().requires_grad_(False)
        self.data = data
        self.config = config
        self.kinds = [head.kind for head in data.config.heads]
        self.numeric = torch.from_numpy(data.catalogue.numeric)
        self.lengths = data.split.train_lengths
        self.users = np.flatnonzero(self.lengths >= config.shortest + config.query)
        if not len(self.users):
            raise ValueError(f"no user has {config.shortest + config.query} training events ([meta] shortest + query)")
        self.learner = MetaLearner(config, ranker.default_meta)
        self.optimizer = torch.optim.Adam(
            [p for p in self.learner.parameters() if p.requires_grad], lr=config.learning_rate
        )
        self.epoch = 0

    def cases(self, rng: np.random.Generator) -> list[list[tuple[int, int]]]:
        """Each training user once, at a length drawn evenly by its logarithm: short histories count as much as long ones. Batches of like length."""
        longest = self.lengths[self.users] - self.config.query
        nows = (
            np.exp(rng.uniform(np.log(self.config.shortest), np.log(longest + 1)))
            .astype(np.int64)
            .clip(self.config.shortest, longest)
        )
        order = np.argsort(nows * rng.uniform(0.9, 1.1, len(nows)))
        batches = [order[k : k + self.config.batch_users] for k in range(0, len(order), self.config.batch_users)]
        return [[(int(self.users[k]), int(nows[k])) for k in batches[b]] for b in rng.permutation(len(batches))]

    def query_loss(self, cases: list[tuple[int, int]], table: Tensor) -> Tensor:
        c = self.config
        tasks = make_tasks(
            self.ranker,
            table,
            self.numeric,
            self.data.sequences,
            cases,
            self.data.config.history_length,
            c.support,
            c.query,
            c.negatives,
        )
        vectors = self.learner.vectors(self.ranker, self.kinds, tasks.columns(0, c.support))
        *inputs, real = tasks.columns(c.support, c.support + c.query).tensors()
        return (event_losses(self.ranker, self.kinds, vectors, *inputs) * real).sum() / real.sum()

    def run_epoch(self) -> float:
        """One pass over the users; the mean query loss after adaptation."""
        rng = np.random.default_rng([self.config.seed, self.epoch])
        table = self.ranker.item_table()
        total = 0.0
        torch.manual_seed(self.config.seed * 1_000_003 + self.epoch)
        batches = self.cases(rng)
        for k, cases in enumerate(tqdm(batches, desc=f"meta epoch {self.epoch + 1}", leave=False, mininterval=2)):
            progress = (self.epoch + k / len(batches)) / self.config.epochs
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.learning_rate * (1 - progress)
            loss = self.query_loss(cases, table)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
            self.optimizer.step()
            total += loss.item()
        self.epoch += 1
        return total / len(batches)

    def identity(self) -> str:
        """A digest of what a checkpoint must share with whoever goes on from it."""
        digest = hashlib.sha256(repr((self.config, self.users.tolist(), self.lengths.tolist())).encode())
        for tensor in self.ranker.state_dict().values():
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "learner": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "identity": self.identity(),
        }
        torch.save(state, folder / f"{CHECKPOINT}.part")
        os.replace(folder / f"{CHECKPOINT}.part", folder / CHECKPOINT)

    def train(self, folder: Path) -> MetaLearner:
        """To the last epoch, from the checkpoint in `folder` where there is one; a row an epoch in meta_log.csv."""
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = folder / CHECKPOINT
        log = folder / "meta_log.csv"
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True)
            if state["identity"] != self.identity():
                raise ValueError(f"{checkpoint} belongs to another ranker, other users or another [meta]: remove it")
            self.learner.load_state_dict(state["learner"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.epoch = state["epoch"]
        while self.epoch < self.config.epochs:
            begin = time.perf_counter()
            row = [self.epoch, round(self.run_epoch(), 4), round(time.perf_counter() - begin, 1)]
            self.save(folder)
            with log.open("a", newline="") as file:
                csv.writer(file).writerow(row)
            print(f"meta epoch {row[0] + 1}: query loss {row[1]}, {row[2]} s", flush=True)
        return self.learner


def user_vectors(
    learner: MetaLearner, ranker: Ligr, kinds: list[str], sequences: Sequences, longest: int
) -> np.ndarray:
    """(U, M) float32: each user's vector after all of their events, `default` where the ranker knows none of these. Drawn alike every time."""
    torch.manual_seed(learner.config.seed)
    sequences = known_events(sequences)
    table = ranker.item_table().detach()
    config = learner.config
    numeric = torch.full((len(table), ranker.config.numeric), torch.nan)
    lengths = np.diff(sequences.offsets)
    result = learner.block().detach().repeat(len(lengths), 1).numpy()
    users = np.flatnonzero(lengths)
    users = users[np.argsort(lengths[users], kind="stable")]  # batches of like length
    for first in range(0, len(users), BATCH_USERS):
        rows = users[first : first + BATCH_USERS]
        cases = [(int(user), int(lengths[user])) for user in rows]
        tasks = make_tasks(ranker, table, numeric, sequences, cases, longest, config.support, 0, config.negatives)
        result[rows] = learner.vectors(ranker, kinds, tasks).detach().numpy()
    return result


def known_events(sequences: Sequences) -> Sequences:
    """The same users without the events whose item the ranker does not know."""
    keep = sequences.items != UNKNOWN_ITEM
    offsets = np.concatenate([[0], np.cumsum(keep)])[sequences.offsets]
    return Sequences(
        sequences.users,
        offsets,
        sequences.items[keep],
        sequences.actions[keep],
        sequences.timestamps[keep],
        sequences.labels[keep],
    )


def save_learner(path: Path, learner: MetaLearner, kinds: list[str]) -> None:
    """What adapts a user, beside the ranker: arrays and their description, no pickle."""
    arrays = {name: tensor.numpy() for name, tensor in learner.state_dict().items()}
    np.savez(path, about=np.array(json.dumps({"config": dataclasses.asdict(learner.config), "kinds": kinds})), **arrays)


def load_learner(path: Path) -> tuple[MetaLearner, list[str]]:
    """The learner, and the kinds of the ranker's heads. Raises OSError or ValueError where the file is no such thing."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            about = json.loads(str(arrays["about"]))
            learner = MetaLearner(MetaConfig(**about["config"]), torch.from_numpy(arrays["block.out.bias"]))
            learner.load_state_dict({name: torch.from_numpy(arrays[name]) for name in learner.state_dict()})
    except (zipfile.BadZipFile, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} is no meta block: {error}") from error
    return learner.requires_grad_(False), about["kinds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("toml", type=Path)
    parser.add_argument("--folder", type=Path, help="of the training; default: build/train/NAME")
    args = parser.parse_args()
    try:
        trainer, toml, folder = load_trainer(args.toml, args.folder)
        meta = MetaTrainer(trainer.model, trainer.data, from_table(MetaConfig, toml.get("meta", {}), "meta"))
        save_learner(folder / META_BLOCK, meta.train(folder), meta.kinds)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
