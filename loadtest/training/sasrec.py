"""Training steps against a plain SASRec loop of the same shape: python -m loadtest.training.sasrec [--shape dense]

The plain loop is SASRec (Kang and McAuley, ICDM 2018) as one writes it in torch: item and position embeddings, causal
attention, feed-forward layers, a softmax over the next item and shared uniform negatives, Adam. It reads the same
batches as the trainer of this package, from tensors that were padded before the clock starts. Both have the same width,
blocks, heads, hidden units, negatives, dropout and threads. The trainer trains the exit `dot`: its loss, gates, gaps,
actions, id dropout, clipping and the making of its batches count.

The steps are interleaved. The command prints the median milliseconds of a step, the events per second, and the median
ratio of a step of the trainer and its neighbour of the plain loop. The events are made up.

Called by: the command line. Its numbers appear in docs/training.md.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loadtest.markdown import table
from slatewise.cli import run_main
from slatewise.inference.arrays import FIRST_ITEM
from slatewise.process import cpu_name
from slatewise_train.batches import Batch, epoch_windows, make_batch
from slatewise_train.config import DataConfig, Head, ModelConfig, TrainConfig
from slatewise_train.data import Catalogue, Data, Sequences, TrainingVocabulary
from slatewise_train.devices import find_device
from slatewise_train.epochs import gradient_step
from slatewise_train.split import split_sequences
from slatewise_train.train import Trainer

START = 1_600_000_000.0  # unix seconds


@dataclass(frozen=True)
class Shape:
    """The size of the table, and of both models."""

    users: int
    items: int
    median_length: float  # of a history; lengths are log-normal
    longest: int  # events of a window
    batch_events: int
    negatives: int
    width: int = 64
    blocks: int = 2
    attention_heads: int = 1
    feed_forward: int = 4
    dropout: float = 0.2


SHAPES = {
    "sparse": Shape(22_000, 12_000, median_length=6, longest=64, batch_events=4096, negatives=256),
    "dense": Shape(6_000, 3_700, median_length=96, longest=256, batch_events=8192, negatives=512),
    "wide": Shape(50_000, 100_000, median_length=10, longest=64, batch_events=8192, negatives=512, blocks=1),
}


class PlainBlock(nn.Module):
    """Causal self-attention and a feed-forward layer, normalised before each."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d = shape.width
        self.heads = shape.attention_heads
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(2))
        self.query_key_value = nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, d)
        self.feed_forward = nn.Sequential(
            nn.Linear(d, shape.feed_forward * d), nn.GELU(), nn.Linear(shape.feed_forward * d, d)
        )
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, d) -> (B, T, d)."""
        parts = self.query_key_value(self.norms[0](x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dropout(self.out(read.transpose(1, 2).flatten(2)))
        fed: Tensor = self.feed_forward(self.norms[1](x))
        return x + self.dropout(fed)


class PlainSasRec(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.negatives = shape.negatives
        self.item = nn.Embedding(shape.items + FIRST_ITEM, shape.width, padding_idx=0)
        self.position = nn.Embedding(shape.longest + 1, shape.width)
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = nn.ModuleList(PlainBlock(shape) for _ in range(shape.blocks))
        self.norm = nn.LayerNorm(shape.width)

    def loss(self, items: Tensor) -> Tensor:
        """Return the loss of every next event: items (B, T + 1), 0 for padding."""
        x = self.item(items[:, :-1]) + self.position(torch.arange(items.shape[1] - 1, device=items.device))
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        real = items[:, 1:] > 0
        users = self.norm(x)[real]
        target = items[:, 1:][real]
        negatives = torch.randint(FIRST_ITEM, self.item.num_embeddings, (self.negatives,), device=items.device)
        positive = (users * self.item(target)).sum(-1, keepdim=True)
        others = (users @ self.item(negatives).T).masked_fill(target[:, None] == negatives, -torch.inf)
        logits = torch.cat([positive, others], dim=1)
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=items.device))


def make_data(shape: Shape) -> Data:
    """Make up a table: log-normal lengths, items by a power law, events minutes to days apart."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(rng.lognormal(np.log(shape.median_length), 0.9, shape.users).astype(np.int64), 5)
    events = int(lengths.sum())
    items = FIRST_ITEM + (shape.items * rng.random(events) ** 2).astype(np.int64)
    times = START + np.cumsum(rng.lognormal(8, 3, events))
    config = DataConfig("made up", (Head("next", "next"),), history_length=shape.longest, slate_size=1)
    vocabulary = TrainingVocabulary([str(k) for k in range(shape.items)], [], {})
    catalogue = Catalogue(vocabulary, {}, np.zeros((shape.items + FIRST_ITEM, 0), np.float32))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    labels = np.ones((events, 1), np.float32)
    names = [str(user) for user in range(shape.users)]
    sequences = Sequences(names, offsets, items, np.zeros(events, np.int64), times, labels)
    return Data(config, catalogue, sequences, split_sequences(sequences, config), {})


def make_trainer(shape: Shape, data: Data, bfloat16: bool) -> Trainer:
    names = ("width", "blocks", "attention_heads", "feed_forward", "dropout")
    model = ModelConfig(shape={name: getattr(shape, name) for name in names} | {"set_blocks": 0})
    config = TrainConfig(batch_events=shape.batch_events, negatives=shape.negatives, bfloat16=bfloat16)
    return Trainer(data, model, config, find_device("auto"))


def trainer_step(trainer: Trainer, windows: np.ndarray) -> None:
    """One step of `epochs.one_epoch`."""
    gradient_step(trainer.optimizer, list(trainer.model.parameters()), trainer.step_loss(windows, cascade=False))


def plain_step(model: PlainSasRec, optimizer: torch.optim.Optimizer, items: Tensor, bfloat16: bool) -> None:
    with torch.autocast(items.device.type, torch.bfloat16, enabled=bfloat16):
        loss = model.loss(items)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def endless_batches(data: Data, batch_events: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    while True:
        yield from epoch_windows(data.split.train_lengths, data.config.history_length, batch_events, rng)


def seconds(step: Callable[[], None]) -> float:
    begin = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(shape: Shape, steps: int, bfloat16: bool) -> tuple[list[float], list[float], list[int]]:
    """Return the seconds of steps of the trainer and of the plain loop, and the events of each step."""
    data = make_data(shape)
    trainer = make_trainer(shape, data, bfloat16)
    trainer.model.train()
    device = trainer.model.get_parameter("item.weight").device
    torch.manual_seed(0)
    plain = PlainSasRec(shape).to(device).train()
    optimizer = torch.optim.Adam(plain.parameters(), fused=True)
    ours: list[float] = []
    theirs: list[float] = []
    events: list[int] = []
    for k, windows in enumerate(itertools.islice(endless_batches(data, shape.batch_events), steps + 3)):
        batch: Batch = make_batch(data.sequences, windows)
        items = batch.items.to(device)
        pair = [
            lambda windows=windows: trainer_step(trainer, windows),
            lambda items=items: plain_step(plain, optimizer, items, bfloat16),
        ]
        order = (0, 1) if k % 2 else (1, 0)
        found = {side: seconds(pair[side]) for side in order}
        if k >= 3:  # the first steps fill the allocator's pools
            ours.append(found[0])
            theirs.append(found[1])
            events.append(int(batch.lengths.sum()))
    return ours, theirs, events


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), action="append", help="default: all")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--bfloat16", action="store_true")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rows = []
    for name in args.shape or SHAPES:
        ours, theirs, events = measure(SHAPES[name], args.steps, args.bfloat16)
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        sides = [
            (1000 * statistics.median(side), statistics.median(events) / statistics.median(side))
            for side in (ours, theirs)
        ]
        cells = [text for ms, rate in sides for text in (f"{ms:.1f}", f"{rate:,.0f}")]
        rows.append((name, *cells, f"{ratio:.2f}"))
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu_name()}, {args.threads} threads"
    print(f"{where}, {'bfloat16' if args.bfloat16 else 'float32'}, medians of {args.steps} interleaved steps\n")
    print(table(("shape", "ours, ms", "events/s", "plain, ms", "events/s", "ours / plain"), rows))


if __name__ == "__main__":
    sys.exit(run_main("python -m loadtest.training.sasrec", main, sys.argv[1:]))
