"""Train a ranker. A training can be stopped at any time, and continues after its last whole epoch.

Every epoch trains the exit `dot` at all positions by sampled softmax. The last `cascade_epochs` train the exits `point`
and `set` too, at a few positions of each sequence. There are two slates at each position: the user's next items, for
heads of kind `label`, and the next item among negatives, for heads of kind `next`.

Called by: `train_command.py`, `loading.py`, `search.py`, `export.py`, `compression/`, `meta/personalization.py`,
`demo/simulated/`. Calls: `devices.py`, `epochs.py`, `batches.py`, `losses.py`, `new_model.py`, `shown.py`, `slates.py`,
`progress.py`, `evaluation/held_out.py`, `checkpoint.py`, `time_left.py`, `training_log.py`.
"""

from __future__ import annotations

import dataclasses
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from slatewise.inference.arrays import FIRST_ITEM, UNKNOWN_ITEM
from slatewise_train import checkpoint
from slatewise_train.batches import Batch, epoch_windows, make_batch
from slatewise_train.config import ModelConfig, TrainConfig
from slatewise_train.data import Data, training_events
from slatewise_train.devices import choose_bfloat16, describe, moved, wait
from slatewise_train.epochs import one_epoch
from slatewise_train.evaluation.held_out import validate
from slatewise_train.losses import label_loss, log_likelihood, sampling_offset, shared_softmax
from slatewise_train.new_model import build_model, scale_embeddings
from slatewise_train.progress import Progress
from slatewise_train.rankers.base import EncodedHistory, RankerModel
from slatewise_train.shown import LIST_LOSSES, list_loss, shown_losses
from slatewise_train.slates import Slates, draw_slates, read_slates
from slatewise_train.time_left import TimeLeft, time_ratio
from slatewise_train.training_log import LOG, Row, described, rows_up_to, write_log

CHECKPOINT = "checkpoint.pt"
CPU = torch.device("cpu")


class Trainer:
    """Trains a ranker. A checkpoint has model, meta-embeddings of the training users, optimizer and progress.

    The id row of an item without training events is that of the unknown item, and no loss has it as a negative. Its
    vector therefore follows from its fields alone.

    model: the config of a new ranker, or a ranker to continue with; device: of model, batches and losses. Letters in
    shapes are those of `batches.py`.
    """

    def __init__(
        self, data: Data, model: ModelConfig | RankerModel, config: TrainConfig, device: torch.device = CPU
    ) -> None:
        torch.manual_seed(config.seed)
        self.data = data
        self.config = config
        self.device = device
        self.model = model if isinstance(model, RankerModel) else build_model(data.catalogue, data.config, model)
        self.meta = torch.nn.Embedding(len(data.sequences), self.model.meta_size)
        torch.nn.init.normal_(self.meta.weight, std=0.01)
        if config.embedding_std is not None and not isinstance(model, RankerModel):
            scale_embeddings(self.model, config.embedding_std)
        self.shown = shown_losses(data, config)
        for part in (self.model, self.meta, *([] if self.shown is None else [self.shown])):
            part.to(device)  # random numbers of a new model are those of a CPU
        self.bfloat16, self.precision = choose_bfloat16(config.bfloat16, device, self.model.config.width)
        shown = [] if self.shown is None else self.shown.parameters()
        self.optimizer = torch.optim.AdamW(
            [*self.model.parameters(), *self.meta.parameters(), *shown],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=(0.9, 0.98),
            fused=True,
        )
        self.numeric = torch.from_numpy(data.catalogue.numeric).to(device)  # (items, F)
        self.next_heads = [k for k, head in enumerate(data.config.heads) if head.kind == "next"]
        self.label_heads = [k for k, head in enumerate(data.config.heads) if head.kind == "label"]
        known = np.unique(training_events(data.sequences, data.split)[1])
        if self.shown:  # an item that was shown and never chosen is learned from, as a negative
            known = np.union1d(known, self.shown.trained_items())
        self.trained = torch.from_numpy(known[known >= FIRST_ITEM]).to(device)  # item rows, ascending
        rows = torch.arange(FIRST_ITEM, len(data.catalogue.numeric), device=device)
        self.untrained = rows[torch.isin(rows, self.trained, invert=True)]
        weights = {name: part for name, part in self.parts().items() if name != "optimizer"}
        self.progress = Progress(config, weights, bool(self.label_heads))
        self.rows: list[Row] = []  # of the log
        self.time_left: TimeLeft | None = None

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return self.progress.epoch

    def id_dropout(self, items: Tensor, table: Tensor, cold_item_vectors: Tensor) -> Tensor:
        """Look up item rows (...) -> vectors (..., d). A random share of the items gets the vector of an unknown id."""
        hidden = (torch.rand(items.shape, device=self.device) < self.config.id_dropout) & (items >= FIRST_ITEM)
        if not self.model.config.fields:  # then all unknown items have the vector of row 0
            return F.embedding(items.masked_fill(hidden, UNKNOWN_ITEM), table)
        return F.embedding(items + hidden * len(table), torch.cat([table, cold_item_vectors]))

    def draw_uniform(self) -> Tensor:
        """Draw the negatives of the exit `dot`: (negatives,) rows of the catalogue."""
        return self.trained[torch.randint(len(self.trained), (self.config.negatives,), device=self.device)]

    def dot_loss(self, batch: Batch, users: Tensor, table: Tensor, negatives: Tensor) -> Tensor:
        """Return the loss of the exit `dot` at all positions from `batch.since` on.

        users: (B, T, d) user vectors, before each event; table: (n, d); negatives: (negatives,) rows of the table.
        """
        t = users.shape[1]
        place = torch.arange(t, device=self.device)
        learned = (place < batch.lengths[:, None]) & (place >= batch.since[:, None])
        rows = learned.flatten().nonzero()[:, 0]
        u = users.flatten(0, 1).index_select(0, rows)  # (P, d); position t predicts event t + 1
        target = batch.items[:, 1 : t + 1].flatten()[rows]  # (P,)
        labels = batch.labels[:, 1 : t + 1].flatten(0, 1)[rows]  # (P, heads)
        positive = (u * F.embedding(target, table)).sum(-1)  # (P,)
        sampled = F.embedding(negatives, table)  # (negatives, d)
        loss = u.new_zeros((), dtype=torch.float32)
        for k in self.next_heads:
            scale = self.model.dot_scale[k]
            loss = loss + shared_softmax(u * scale, positive * scale, sampled, target, negatives)
        if self.next_heads:  # these heads train the vectors; a label head then trains scale and bias alone
            positive = positive.detach()
        for k in self.label_heads if self.shown is None else ():  # shown slates have the labels
            logits = positive * self.model.dot_scale[k] + self.model.dot_bias[k]
            loss = loss + label_loss(logits, labels[:, k])
        return loss

    def draw_slates(self, batch: Batch, users: Tensor, table: Tensor) -> Slates:
        """Call `slates.draw_slates` with this training's data and config."""
        return draw_slates(batch, users, table, self.numeric, self.data.config.slate_size, self.config, self.trained)

    def cascade_loss(
        self, batch: Batch, history: EncodedHistory, users: Tensor, table: Tensor, cold_item_vectors: Tensor
    ) -> Tensor:
        """Return the loss of the exits `point` and `set` at S positions of each sequence.

        history and users (B, T, d): the encoded sequences; table and cold_item_vectors: (items, d).
        """
        model = self.model
        slates = self.draw_slates(batch, users, table)
        b, s, c = slates.candidates.shape
        slate = slates.exists.shape[2]
        meta = self.meta(batch.users)[:, None].expand(b, s, -1)
        meta = torch.where(torch.rand(b, s, 1, device=self.device) < 0.5, meta, model.default_meta)
        vectors = self.id_dropout(slates.candidates, table, cold_item_vectors)
        dot, hidden = read_slates(model, slates, history, users, vectors, meta)
        point = model.point(dot.detach(), hidden)  # (B * S, C, heads); the exit `dot` has a loss of its own
        # the exits' logits of the slate, and of the next item with the negatives
        exits_rated, exits_among = [point[:, :slate]], [torch.cat([point[:, :1], point[:, slate:]], dim=1)]
        if "set" in model.exits:
            among = torch.cat([hidden[:, :1], hidden[:, slate:]], dim=1)
            of_slate = model.set_logits(hidden[:, :slate], slates.exists.view(b * s, 1, 1, slate))
            exits_rated.append(point[:, :slate] + of_slate)
            # a second concatenation: one tensor for both uses would change the order in which gradients are summed
            exits_among.append(torch.cat([point[:, :1], point[:, slate:]], dim=1) + model.set_logits(among))
        same = (slates.candidates[..., slate:] == slates.candidates[..., :1]).view(b * s, c - slate)
        offset = sampling_offset(slates.log_rate.view(b * s, c - slate), same)
        labels = slates.labels.view(b * s, slate, -1)
        loss = dot.new_zeros((), dtype=torch.float32)
        for logits in exits_among:
            for h in self.next_heads:
                loss = loss - log_likelihood(logits[..., h], offset).mean()
        for logits in (*exits_rated, *(logits[:, :1] for logits in exits_among[1:])):
            for h in self.label_heads if self.shown is None else ():
                loss = loss + label_loss(logits[..., h], labels[:, : logits.shape[1], h])
        if self.shown is None and self.config.slate_loss in LIST_LOSSES:
            for logits in exits_rated:
                for h in self.label_heads:
                    ones = torch.ones_like(labels[..., h])
                    loss = loss + list_loss(self.config.slate_loss, logits[..., h], labels[..., h], ones)
        return loss

    def loss(self, batch: Batch, cascade: bool) -> Tensor:
        """Return the loss of the exit `dot`, or with `cascade` the loss of all exits. batch: on the CPU."""
        on_cpu, batch = batch, moved(batch, self.device)
        negatives = self.draw_uniform()
        if cascade or self.shown is not None:
            table = self.model.item_table()
            cold_item_vectors = self.model.cold_item_vectors(table)
        else:  # the batch has few items of a large catalogue: count the rows anew, the first two are the same
            items = batch.items.flatten()
            both = torch.cat([torch.full_like(items[:1], UNKNOWN_ITEM), items, negatives])
            rows, places = both.unique(return_inverse=True)
            batch = dataclasses.replace(batch, items=places[1 : len(items) + 1].view_as(batch.items))
            negatives = places[len(items) + 1 :]
            table, cold_item_vectors = self.model.item_vectors(rows)
        before = (slice(None), slice(-1))  # the last event of a window is only predicted
        vectors = self.id_dropout(batch.items[before], table, cold_item_vectors)
        history, users = self.model.encode(self.model.tokens(vectors, batch.actions[before], batch.gaps[before]))
        loss = self.dot_loss(batch, users, table, negatives)
        drawn = None if self.shown is None else self.shown.draw(on_cpu)  # it reads numpy tables
        shown = None if drawn is None else moved(drawn, self.device)
        if self.shown is not None and shown is not None:
            loss = loss + self.shown.dot_loss(self.model, batch, shown, users, table)
        if cascade:
            rows = torch.randperm(len(batch.users), device=self.device)[: self.config.cascade_windows]
            some = [(key[rows], value[rows]) for key, value in history]
            part = batch.take(rows)
            if self.next_heads or self.shown is None:
                loss = loss + self.cascade_loss(part, some, users[rows], table, cold_item_vectors)
            if self.shown is not None and shown is not None and (kept := shown.of(rows)) is not None:
                candidates = self.id_dropout(kept.slates.candidates, table, cold_item_vectors)
                meta = self.meta(part.users[kept.rows])[:, None]
                loss = loss + self.shown.cascade_loss(self.model, kept, some, users[rows], candidates, meta)
        return loss

    def step_loss(self, windows: np.ndarray, cascade: bool) -> Tensor:
        """Return the `loss` of a batch of windows (B, 3 or 4), in the chosen precision."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            return self.loss(make_batch(self.data.sequences, windows), cascade)

    def run_epoch(self, cascade: bool) -> float:
        """Train for one pass over the training events and return the mean loss."""
        self.model.train()
        parameters = list(self.model.parameters())

        def rate(step: int, steps: int) -> float:
            if self.time_left is not None:
                self.time_left.step(step / steps)
            return self.progress.rate(step, steps)

        loss = partial(self.step_loss, cascade=cascade)
        mean = one_epoch(self.config, self.data, self.epoch + 1, self.optimizer, parameters, rate, loss)
        self.reset_untrained()
        self.progress.epoch += 1
        return mean

    @torch.no_grad()
    def reset_untrained(self) -> None:
        """Give items without a training event the row of the unknown item."""
        ids = self.model.get_parameter("item.weight")
        ids[self.untrained] = ids[UNKNOWN_ITEM].clone()

    def validate(self, exits: tuple[str, ...]) -> dict[str, float]:
        """Call `held_out.validate` with the first head of kind `next`; empty without such a head."""
        return validate(self.model, self.data, self.next_heads[0], exits) if self.next_heads else {}

    def identity(self) -> str:
        """Return a digest of the vocabulary, the split, the heads and the shape of the model."""
        data = self.data
        return checkpoint.identity(
            (
                data.catalogue.vocabulary,
                data.config.heads,
                data.sequences.users,
                data.split.train_lengths.tolist(),
                self.model.config,
            )
        )

    def parts(self) -> dict[str, checkpoint.Stateful]:
        """Return the parts of a checkpoint, without the epoch."""
        parts: dict[str, checkpoint.Stateful] = {"model": self.model, "meta": self.meta, "optimizer": self.optimizer}
        return parts if self.shown is None else parts | {"shown": self.shown}

    def save(self, path: Path) -> None:
        """Write a checkpoint, with the rows of the log."""
        checkpoint.save(path, self.identity(), self.parts(), rows=self.rows, **self.progress.state())

    def load(self, path: Path) -> None:
        """Restore a checkpoint: the last weights of a training that continues, the best ones of a finished training.

        Raises OSError for an unreadable file, and ValueError for other data, another split or another `[model]`.
        """
        state = checkpoint.load(path, self.identity(), self.parts(), "other data, another split or another [model]")
        self.progress.load(state)
        self.rows = list(state.get("rows", []))  # a checkpoint of an older version has none
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.config.weight_decay

    def cascade_cost(self) -> float:
        """Return how many times as long as another step one with `cascade` takes. Weights and random numbers stay."""
        config, data = self.config, self.data
        rng = np.random.default_rng(config.seed)
        lengths = data.split.train_lengths
        windows = next(epoch_windows(lengths, data.config.history_length, config.batch_events, rng))

        def step(cascade: bool) -> None:
            loss = self.step_loss(windows, cascade)
            if loss.requires_grad:  # that of a batch without slates may have no gradient
                loss.backward()
            self.optimizer.zero_grad()
            wait(self.device)

        self.model.train()
        with torch.random.fork_rng([] if self.device.type == "cpu" else [torch.cuda.current_device()]):
            return time_ratio(step)


def train(
    data: Data, model: ModelConfig | RankerModel, config: TrainConfig, folder: Path, device: torch.device = CPU
) -> Trainer:
    """Train up to the last epoch, starting from the checkpoint in the folder if there is one.

    The trainer has the best weights if the config has `patience`, otherwise the last ones. Its model is on the CPU.
    Raises ValueError if another process trains in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with checkpoint.alone(folder):
        trainer = Trainer(data, model, config, device)
        kind = "bfloat16" if trainer.bfloat16 else "float32"
        print(f"training on {describe(device)}, matrix products in {kind} ({trainer.precision})", flush=True)
        if (folder / CHECKPOINT).exists():
            trainer.load(folder / CHECKPOINT)
            print(f"{folder / CHECKPOINT}: {trainer.progress.resumed()}", flush=True)
            trainer.rows = rows_up_to(folder / LOG, trainer.epoch, trainer.rows)
            write_log(folder / LOG, trainer.rows)
        trainer.progress.join()
        trainer.time_left = TimeLeft(trainer.progress, trainer.cascade_cost)
        try:
            while not trainer.progress.finished:
                train_epoch(trainer, folder)
        except KeyboardInterrupt:
            print(f"stopped after epoch {trainer.epoch}: the same command continues", flush=True)
            raise
    trainer.progress.restore_best()
    if kept := trainer.progress.kept():
        print(kept, flush=True)
    trainer.model.cpu()
    return trainer


def train_epoch(trainer: Trainer, folder: Path) -> None:
    """Train and validate for one epoch, write checkpoint and log, and print the log's row."""
    begin = time.perf_counter()
    progress = trainer.progress
    cascade = progress.joined is not None
    loss = trainer.run_epoch(cascade)
    row: dict[str, float | str] = {"epoch": trainer.epoch, "seconds": round(time.perf_counter() - begin, 1)}
    row["loss"] = round(loss, 4)
    if trainer.epoch % trainer.config.validate_every == 0 or progress.finished:
        found = trainer.validate(("dot", "point") if cascade else ("dot",))
        row |= {k: round(v, 4) for k, v in found.items()}
        if found:
            progress.compare(found["point_ndcg10" if cascade else "dot_ndcg10"])
    progress.join()
    trainer.rows.append(row)
    trainer.save(folder / CHECKPOINT)
    write_log(folder / LOG, trainer.rows)
    left = ""
    if trainer.time_left is not None:
        trainer.time_left.end_epoch(cascade)
        left = trainer.time_left.text()
    print(described(row, left), flush=True)
