"""Train a ranker: python -m slatewise_train.train models/movielens.toml

Stop it when you like (Ctrl-C, a reboot): the same command goes on after the last whole epoch. Under `build/train/NAME/`
it keeps `checkpoint.pt`, a row an epoch in `log.csv` and the curves in `log.png`.
Before: the tables of `data.py`. After: `export.py`.

Every epoch the exit `dot` learns at all positions by sampled softmax; in the last `ladder_epochs` so do the exits
`point` and `set`, at a few positions a sequence: each of these gives two slates, the user's next items (labels), and
the next item among negatives (heads of kind `next`).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from slatewise.bundle.features import request_context, window_start
from slatewise.inference.arrays import CONTEXT_SIZE, FIRST_ITEM, START_ITEM, UNKNOWN_ITEM
from slatewise_train.data import (
    Catalogue,
    DataConfig,
    Sequences,
    Split,
    build_catalogue,
    build_sequences,
    clean_events,
    clean_items,
    count_popularity,
    from_table,
    read_config,
    read_table,
    split_sequences,
)
from slatewise_train.evaluation.report import plot_training
from slatewise_train.rankers.ligr import Ligr, LigrConfig


@dataclass(frozen=True)
class TrainConfig:
    epochs: int = 60
    ladder_epochs: int = 20
    batch_events: int = 8192  # padded events in a batch
    learning_rate: float = 0.001
    weight_decay: float = 0.0
    warmup_steps: int = 200
    negatives: int = 512  # of the exit `dot`, uniform, shared by a batch
    ladder_windows: int = 64  # of a batch, drawn anew each time: candidates cost more than events
    ladder_positions: int = 4  # a window
    ladder_negatives: int = 44  # a position: half uniform, half from the exit `dot` itself
    id_dropout: float = 0.02  # share of items whose id is hidden, so that the unknown item's row learns
    bfloat16: bool = False  # matrix products in bfloat16: a quarter faster where the processor has them
    validate_every: int = 5
    seed: int = 0


@dataclass(frozen=True)
class Data:
    """What training and evaluation read."""

    config: DataConfig
    catalogue: Catalogue
    sequences: Sequences
    split: Split
    bad_rows: dict[str, int]


def load_data(config: DataConfig, toml: dict) -> Data:
    events, bad_rows = clean_events(read_table(Path(toml["data"]["events"])), config.max_bad_share)
    items, bad_items = clean_items(read_table(Path(toml["data"]["items"])), config)
    bad_rows |= bad_items
    if bad_rows:
        print(f"unusable, left out: {bad_rows}")
    catalogue = build_catalogue(items, events, config)
    sequences = build_sequences(events, catalogue.vocabulary, config)
    split = split_sequences(sequences, config)
    if not split.train_lengths.any():
        raise ValueError("no event is left to train on: every user needs one more than what the split holds out")
    count_popularity(catalogue, sequences, split, config)
    return Data(config, catalogue, sequences, split, bad_rows)


def build_model(catalogue: Catalogue, config: DataConfig, shape: dict) -> Ligr:
    """A `Ligr` for a catalogue; `shape` is the TOML's table `[model]`."""
    seen = catalogue.numeric[FIRST_ITEM:]
    known = np.ma.masked_invalid(seen)
    mean, std = (
        np.ma.filled(moment, 0.0) for moment in (known.mean(axis=0), known.std(axis=0))
    )  # a column that is always missing: 0
    return Ligr(
        from_table(
            LigrConfig,
            shape,
            "model",
            items=len(catalogue.vocabulary.items) + FIRST_ITEM,
            actions=len(catalogue.vocabulary.actions) + 1,
            fields={name: len(values) + 1 for name, values in catalogue.vocabulary.fields.items()},
            numeric=len(config.numeric),
            heads=len(config.heads),
        ),
        {name: torch.from_numpy(values) for name, values in catalogue.field_values.items()},
        torch.tensor(mean, dtype=torch.float32),
        torch.tensor(np.maximum(std, 1e-3), dtype=torch.float32),
    )


@dataclass(frozen=True)
class Batch:
    """Right-padded windows; column 0 is the start token."""

    users: Tensor  # (B,) int64
    lengths: Tensor  # (B,) int64, events without the start token
    items: Tensor  # (B, T + 1) int64
    actions: Tensor  # (B, T + 1) int64
    gaps: Tensor  # (B, T + 1) int64
    labels: Tensor  # (B, T + 1, heads) float32, NaN where unknown or padding
    contexts: Tensor  # (B, T + 1, 4) float32, of a request right after this event

    def take(self, rows: Tensor) -> Batch:
        return Batch(*(getattr(self, f.name)[rows] for f in dataclasses.fields(self)))


def make_batch(sequences: Sequences, windows: list[tuple[int, int, int]]) -> Batch:
    """Windows are (user, first event, one past the last)."""
    longest = max(last - first for _, first, last in windows)
    shape = (len(windows), longest + 1)
    items = np.zeros(shape, np.int64)
    actions = np.zeros(shape, np.int64)
    gaps = np.zeros(shape, np.int64)
    labels = np.full((*shape, sequences.labels.shape[1]), np.nan, np.float32)
    contexts = np.zeros((*shape, CONTEXT_SIZE), np.float32)
    items[:, 0] = START_ITEM
    for row, (user, first, last) in enumerate(windows):
        n = last - first
        items[row, 1 : n + 1], actions[row, 1 : n + 1], gaps[row, 1 : n + 1], labels[row, 1 : n + 1] = sequences.of(
            user, first, last
        )
        times = sequences.timestamps[sequences.offsets[user] + first : sequences.offsets[user] + last]
        contexts[row, 1 : n + 1] = request_context(times).T
        contexts[row, 0] = contexts[row, min(1, n)]
    lengths = np.array([last - first for _, first, last in windows], np.int64)
    users = np.array([user for user, _, _ in windows], np.int64)
    return Batch(*map(torch.from_numpy, (users, lengths, items, actions, gaps, labels, contexts)))


def epoch_windows(
    train_lengths: np.ndarray, longest: int, batch_events: int, rng: np.random.Generator
) -> Iterator[list[tuple[int, int, int]]]:
    """Each user's training events in windows of at most `longest`, at a random phase; batches of windows of like length."""
    windows = []
    for user in np.flatnonzero(train_lengths > 0):
        n = int(train_lengths[user])
        pieces = math.ceil(n / longest)
        for _ in range(pieces):
            first = int(rng.integers(0, n - longest + 1)) if n > longest else 0
            windows.append((int(user), first, min(first + longest, n)))
    lengths = np.array([last - first for _, first, last in windows]) * rng.uniform(0.9, 1.1, len(windows))
    batches: list[list[tuple[int, int, int]]] = [[]]
    width = 0
    for k in np.argsort(lengths):
        size = windows[k][2] - windows[k][1] + 1
        width = max(width, size)
        if width * (len(batches[-1]) + 1) > batch_events and batches[-1]:
            batches.append([])
            width = size
        batches[-1].append(windows[k])
    batches = [batch for batch in batches if batch]
    for k in rng.permutation(len(batches)):
        yield batches[k]


@dataclass(frozen=True)
class Slates:
    """What the exits `point` and `set` learn from: at S positions of each of B sequences C candidates, the next slate and then negatives."""

    read: Tensor  # (B, S) int64, events that have happened; the next one exists
    candidates: Tensor  # (B, S, C) int64
    numeric: Tensor  # (B, S, C, F) float32, NaN is missing
    context: Tensor  # (B, S, 4) float32
    exists: Tensor  # (B, S, slate) bool, which of the next slate are real
    labels: Tensor  # (B, S, slate, heads) float32, NaN where not known
    log_rate: Tensor  # (B, S, C - slate) float32, at which each negative is drawn


def read_slates(
    model: Ligr, slates: Slates, state: list[tuple[Tensor, Tensor]], users: Tensor, vectors: Tensor, meta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the exit `dot` and what `point` adds to them (B * S, C, heads), hidden (B * S, C, d).

    state and users (B, T + 1, d) of the sequences, vectors (B, S, C, d) of the candidates, meta (B, S, M).
    """
    b, s, c = slates.candidates.shape
    fused = model.fuse(slates.numeric, meta[:, :, None], slates.context[:, :, None])
    positions = (slates.read + 1).repeat_interleave(c, dim=1)  # (B, S * C)
    mask = torch.arange(users.shape[1]) <= slates.read.repeat_interleave(c, dim=1)[..., None]  # (B, S * C, T + 1)
    hidden = model.hidden(vectors.flatten(1, 2), state, positions, mask[:, None], fused.flatten(1, 2)).view(
        b * s, c, -1
    )
    now = users[torch.arange(b)[:, None], slates.read].view(b * s, 1, -1)
    return model.dot_logits(now, vectors.view(b * s, c, -1)), model.point_logits(hidden), hidden


class Schedule(Protocol):
    epochs: int
    batch_events: int
    learning_rate: float
    warmup_steps: int
    seed: int


def learning_rate(config: Schedule, progress: float, step: int) -> float:
    """Linear warm-up, then a half cosine down to nothing over all epochs; progress from 0 to 1."""
    return config.learning_rate * min(1.0, (step + 1) / config.warmup_steps) * 0.5 * (1 + math.cos(math.pi * progress))


def one_epoch(
    config: Schedule,
    data: Data,
    epoch: int,
    optimizer: torch.optim.Optimizer,
    clipped: list[torch.nn.Parameter],
    loss: Callable[[list[tuple[int, int, int]]], Tensor],
) -> float:
    """The `epoch`-th pass over the training events, counted from 1; the mean loss of its batches of windows."""
    rng = np.random.default_rng([config.seed, epoch - 1])
    torch.manual_seed(config.seed * 1_000_003 + epoch - 1)
    batches = list(epoch_windows(data.split.train_lengths, data.config.history_length, config.batch_events, rng))
    total = 0.0
    for k, windows in enumerate(tqdm(batches, desc=f"epoch {epoch}", leave=False, mininterval=2)):
        progress = (epoch - 1 + k / len(batches)) / config.epochs
        step = (epoch - 1) * len(batches) + k
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, progress, step)
        found = loss(windows)
        optimizer.zero_grad()
        found.backward()
        torch.nn.utils.clip_grad_norm_(clipped, 1.0)
        optimizer.step()
        total += found.item()
    return total / len(batches)


class Trainer:
    """Model, the users' meta vectors, optimizer and epoch: all that a checkpoint holds."""

    def __init__(self, data: Data, shape: dict, config: TrainConfig, model: Ligr | None = None) -> None:
        torch.manual_seed(config.seed)
        self.data = data
        self.config = config
        self.model = build_model(data.catalogue, data.config, shape) if model is None else model
        self.meta = torch.nn.Embedding(len(data.sequences), self.model.config.meta_size)
        torch.nn.init.normal_(self.meta.weight, std=0.01)
        self.optimizer = torch.optim.AdamW(
            [*self.model.parameters(), *self.meta.parameters()],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=(0.9, 0.98),
            fused=True,
        )
        self.numeric = torch.from_numpy(data.catalogue.numeric)  # (items, F)
        self.next_heads = [k for k, head in enumerate(data.config.heads) if head.kind == "next"]
        self.label_heads = [k for k, head in enumerate(data.config.heads) if head.kind == "label"]
        self.epoch = 0

    def id_dropout(self, items: Tensor, table: Tensor, cold_item_vectors: Tensor) -> Tensor:
        """Item rows to vectors, a few of them without their id."""
        hidden = (torch.rand(items.shape) < self.config.id_dropout) & (items >= FIRST_ITEM)
        return torch.where(hidden.unsqueeze(-1), F.embedding(items, cold_item_vectors), F.embedding(items, table))

    def dot_loss(self, batch: Batch, users: Tensor, table: Tensor) -> Tensor:
        """All positions of a batch at once; users: (B, T + 1, d) user vectors."""
        real = (
            torch.arange(1, batch.items.shape[1]) <= batch.lengths[:, None]
        )  # (B, T): position t predicts event t + 1
        rows = real.flatten().nonzero()[:, 0]  # P positions
        u = users[:, :-1].flatten(0, 1).index_select(0, rows)
        target = batch.items[:, 1:][real]
        labels = batch.labels[:, 1:][real]
        negatives = torch.randint(FIRST_ITEM, len(table), (self.config.negatives,))
        positive = (u * F.embedding(target, table)).sum(-1)  # (P,)
        sampled = F.embedding(negatives, table)
        same = target[:, None] == negatives  # (P, negatives)
        loss = torch.zeros(())
        for k in self.next_heads:
            a = self.model.dot_scale[k]
            others = ((u * a) @ sampled.T).masked_fill(same, -torch.inf)
            loss = loss + F.softplus(torch.logsumexp(others, dim=1) - positive * a).mean()
        if self.next_heads:  # a label's exit `dot` then fits scale and bias alone, and leaves the vectors to `next`
            positive = positive.detach()
        for k in self.label_heads:
            known = ~labels[:, k].isnan()
            loss = loss + F.binary_cross_entropy_with_logits(
                (positive * self.model.dot_scale[k] + self.model.dot_bias[k])[known], labels[known, k]
            )
        return loss

    def draw_slates(self, batch: Batch, users: Tensor, table: Tensor) -> Slates:
        """Half of the negatives uniform, half from the exit `dot` of these user vectors (B, T + 1, d)."""
        config = self.config
        b = len(batch.users)
        s = config.ladder_positions
        slate = self.data.config.slate_size
        k = config.ladder_negatives
        rows = torch.arange(b)[:, None]
        read = (torch.rand(b, s) * batch.lengths[:, None]).long()
        with torch.no_grad():
            share = torch.softmax(users[rows, read] @ table[FIRST_ITEM:].T, dim=-1)
            share = 0.5 * share + 0.5 / share.shape[-1]
            drawn = torch.multinomial(share.flatten(0, 1), k, replacement=True).view(b, s, k)
            log_rate = torch.log(k * share.gather(2, drawn))
        ahead = read[..., None] + 1 + torch.arange(slate)  # (B, S, slate) columns of the next events
        exists = ahead <= batch.lengths[:, None, None]
        ahead = ahead.clamp(max=batch.items.shape[1] - 1)
        upcoming = batch.items[rows[..., None], ahead].masked_fill(~exists, UNKNOWN_ITEM)
        labels = batch.labels[rows[..., None], ahead].masked_fill(~exists[..., None], torch.nan)
        candidates = torch.cat([upcoming, drawn + FIRST_ITEM], dim=2)
        numeric = self.numeric[candidates].masked_fill(torch.rand(b, s, 1, 1) < 0.3, torch.nan)
        return Slates(read, candidates, numeric, batch.contexts[rows, read], exists, labels, log_rate)

    def ladder_loss(
        self, batch: Batch, state: list[tuple[Tensor, Tensor]], users: Tensor, table: Tensor, cold_item_vectors: Tensor
    ) -> Tensor:
        """Exits `point` and `set` at S positions of each sequence."""
        model = self.model
        slates = self.draw_slates(batch, users, table)
        b, s, c = slates.candidates.shape
        slate = slates.exists.shape[2]
        meta = self.meta(batch.users)[:, None].expand(b, s, -1)
        meta = torch.where(torch.rand(b, s, 1) < 0.5, meta, model.default_meta)
        dot, added, hidden = read_slates(
            model, slates, state, users, self.id_dropout(slates.candidates, table, cold_item_vectors), meta
        )
        point = dot.detach() + added  # (B * S, C, heads); the exit `dot` has its own loss
        rated = hidden[:, :slate]
        among = torch.cat([hidden[:, :1], hidden[:, slate:]], dim=1)
        readable = slates.exists.view(b * s, 1, 1, slate)
        set_rated = point[:, :slate] + model.set_logits(rated, readable)
        set_among = torch.cat([point[:, :1], point[:, slate:]], dim=1) + model.set_logits(among)
        same = (slates.candidates[..., slate:] == slates.candidates[..., :1]).view(b * s, c - slate)
        log_rate = slates.log_rate.view(b * s, c - slate)
        labels = slates.labels.view(b * s, slate, -1)
        loss = torch.zeros(())
        for logits in (torch.cat([point[:, :1], point[:, slate:]], dim=1), set_among):
            for h in self.next_heads:  # softmax over the catalogue, estimated from the sample
                others = (logits[:, 1:, h] - log_rate).masked_fill(same, -torch.inf)
                loss = loss - F.log_softmax(torch.cat([logits[:, :1, h], others], dim=1), dim=1)[:, 0].mean()
        for logits in (point[:, :slate], set_rated, set_among[:, :1]):
            for h in self.label_heads:
                target = labels[:, : logits.shape[1], h]
                known = ~target.isnan()
                if known.any():
                    loss = loss + F.binary_cross_entropy_with_logits(logits[..., h][known], target[known])
        return loss

    def loss(self, batch: Batch, ladder: bool) -> Tensor:
        """Of the exit `dot`, and with `ladder` of all exits."""
        table = self.model.item_table()
        cold_item_vectors = self.model.cold_item_vectors(table)
        state, users = self.model.encode(
            self.model.tokens(self.id_dropout(batch.items, table, cold_item_vectors), batch.actions, batch.gaps)
        )
        loss = self.dot_loss(batch, users, table)
        if ladder:
            rows = torch.randperm(len(batch.users))[: self.config.ladder_windows]
            loss = loss + self.ladder_loss(
                batch.take(rows),
                [(key[rows], value[rows]) for key, value in state],
                users[rows],
                table,
                cold_item_vectors,
            )
        return loss

    def run_epoch(self, ladder: bool) -> float:
        """One pass over the training events; the mean loss."""
        self.model.train()

        def loss(windows: list[tuple[int, int, int]]) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.config.bfloat16):
                return self.loss(make_batch(self.data.sequences, windows), ladder)

        mean = one_epoch(self.config, self.data, self.epoch + 1, self.optimizer, list(self.model.parameters()), loss)
        self.epoch += 1
        return mean

    @torch.no_grad()
    def validate(self, exits: tuple[str, ...]) -> dict[str, float]:
        """HR@10 and NDCG@10 of the next held-out event of the validation users, full catalogue, in torch."""
        if not self.next_heads or not len(self.data.split.validation_users):
            return {}
        self.model.eval()
        table = self.model.item_table()
        ranks: dict[str, list[int]] = {name: [] for name in exits}
        for user in self.data.split.validation_users:
            length = int(self.data.split.train_lengths[user])
            first = window_start(0, length, self.data.config.history_length)
            batch = make_batch(self.data.sequences, [(int(user), first, length)])
            target = int(self.data.sequences.items[self.data.sequences.offsets[user] + length])
            seen = self.data.sequences.items[self.data.sequences.offsets[user] :][:length]
            state, users = self.model.encode(self.model.tokens(table[batch.items], batch.actions, batch.gaps))
            now = users[:, -1:]
            logits = self.model.dot_logits(now, table[None, FIRST_ITEM:])
            for name in exits:
                if name == "point":
                    fused = self.model.fuse(
                        self.numeric[None, FIRST_ITEM:], self.model.default_meta, batch.contexts[:, -1:]
                    )
                    position = torch.tensor([batch.items.shape[1]])
                    logits = logits + self.model.point_logits(
                        self.model.hidden(table[None, FIRST_ITEM:], state, position, None, fused)
                    )
                scores = logits[0, :, self.next_heads[0]].clone()
                mine = scores[target - FIRST_ITEM].clone()
                scores[torch.from_numpy(seen[seen != target]) - FIRST_ITEM] = -torch.inf
                ranks[name].append(int((scores > mine).sum()))
        result = {}
        for name, found in ranks.items():
            rank = np.array(found)
            result[f"{name}_hr10"] = float((rank < 10).mean())
            result[f"{name}_ndcg10"] = float(np.where(rank < 10, 1 / np.log2(rank + 2), 0).mean())
        return result

    def identity(self) -> str:
        """A digest of what a checkpoint must share with whoever goes on from it: vocabulary, split, heads and shape."""
        data = self.data
        parts = (
            data.catalogue.vocabulary,
            data.config.heads,
            data.sequences.users,
            data.split.train_lengths.tolist(),
            self.model.config,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def save(self, path: Path) -> None:
        state = {
            "identity": self.identity(),
            "model": self.model.state_dict(),
            "meta": self.meta.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
        }
        torch.save(state, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)

    def load(self, path: Path) -> None:
        """Raises ValueError where the checkpoint belongs to other data, another split or another shape of ranker."""
        state = torch.load(path, weights_only=True)
        if state["identity"] != self.identity():
            raise ValueError(
                f"{path} was trained on other data, another split or another [model]: remove it or name another --folder"
            )
        self.model.load_state_dict(state["model"])
        self.meta.load_state_dict(state["meta"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch = state["epoch"]


def load_trainer(toml_path: Path, folder: Path | None) -> tuple[Trainer, dict, Path]:
    """A training that has ended, its TOML and its folder, build/train/NAME if none is given. Raises ValueError where it has not, or is another's."""
    config, toml = read_config(toml_path)
    folder = folder or Path("build/train") / config.name
    trainer = Trainer(
        load_data(config, toml), toml.get("model", {}), from_table(TrainConfig, toml.get("train", {}), "train")
    )
    trainer.load(folder / "checkpoint.pt")
    if trainer.epoch < trainer.config.epochs:
        raise ValueError(
            f"trained for {trainer.epoch} of {trainer.config.epochs} epochs: `python -m slatewise_train.train {toml_path}` goes on"
        )
    return trainer, toml, folder


LOG_COLUMNS = ["epoch", "seconds", "loss", "dot_hr10", "dot_ndcg10", "point_hr10", "point_ndcg10"]


def train(data: Data, shape: dict, config: TrainConfig, folder: Path) -> Trainer:
    """Train to the last epoch, from the checkpoint in `folder` where there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(data, shape, config)
    checkpoint = folder / "checkpoint.pt"
    log = folder / "log.csv"
    if checkpoint.exists():
        trainer.load(checkpoint)
        print(f"{checkpoint}: going on after epoch {trainer.epoch} of {config.epochs}")
    while trainer.epoch < config.epochs:
        begin = time.perf_counter()
        ladder = trainer.epoch >= config.epochs - config.ladder_epochs
        loss = trainer.run_epoch(ladder)
        row = {"epoch": trainer.epoch, "seconds": round(time.perf_counter() - begin, 1), "loss": round(loss, 4)}
        if trainer.epoch % config.validate_every == 0 or trainer.epoch == config.epochs:
            row |= {k: round(v, 4) for k, v in trainer.validate(("dot", "point") if ladder else ("dot",)).items()}
        trainer.save(checkpoint)
        new = not log.exists()
        with log.open("a", newline="") as file:
            writer = csv.DictWriter(file, LOG_COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(row, flush=True)
        plot_training(log)
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("toml", type=Path)
    parser.add_argument("--folder", type=Path, help="default: build/train/NAME")
    args = parser.parse_args()
    try:
        data_config, toml = read_config(args.toml)
        config = from_table(TrainConfig, toml.get("train", {}), "train")
        data = load_data(data_config, toml)
        print(
            f"{len(data.sequences)} users, {len(data.sequences.items)} events, {len(data.catalogue.vocabulary.items)} items"
        )
        train(data, toml.get("model", {}), config, args.folder or Path("build/train") / data_config.name)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
