"""A vector per user for the store: learned on the user's events with the ranker frozen.

Plain gradient descent on one vector a user, from the default vector; the meta-learned way replaces it.
Before: `train.py`. After: `export.py` puts the vectors into the bundle.
"""

import numpy as np
import torch
from tqdm import tqdm

from app.features import UNKNOWN_ITEM
from models.data import Sequences, Split
from models.ligr import Ligr
from models.train import Data, TrainConfig, Trainer, epoch_windows, make_batch


def known_events(sequences: Sequences) -> Sequences:
    """The same users without the events whose item the ranker does not know."""
    keep = sequences.items != UNKNOWN_ITEM
    offsets = np.concatenate([[0], np.cumsum(keep)])[sequences.offsets]
    return Sequences(sequences.users, offsets, sequences.items[keep], sequences.actions[keep], sequences.timestamps[keep], sequences.labels[keep])


def fit_meta_embeddings(model: Ligr, data: Data, sequences: Sequences, epochs: int = 4) -> np.ndarray:
    """(users, M) float32 vectors for the users of `sequences`, from all of their events."""
    sequences = known_events(sequences)
    lengths, nobody = np.diff(sequences.offsets), np.zeros(0, np.int64)
    split = Split(lengths, np.zeros_like(lengths), nobody, nobody)
    trainer = Trainer(Data(data.config, data.catalogue, sequences, split, {}), {}, TrainConfig(id_dropout=0.0), model=model)
    with torch.no_grad():
        trainer.meta.weight.copy_(model.default_meta.expand_as(trainer.meta.weight))
    frozen = [p for p in model.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    model.eval()
    optimizer = torch.optim.Adam(trainer.meta.parameters(), lr=0.03)
    for epoch in tqdm(range(epochs), desc="users' vectors", mininterval=2):
        torch.manual_seed(epoch)
        for windows in epoch_windows(split.train_lengths, data.config.history_length, 8192, np.random.default_rng(epoch)):
            batch, table = make_batch(sequences, windows), model.item_table()
            state, users = model.encode(model.tokens(table[batch.items], batch.actions, batch.gaps))
            loss = trainer.ladder_loss(batch, state, users, table, table)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for parameter in frozen:
        parameter.requires_grad_(True)
    return trainer.meta.weight.detach().numpy().astype(np.float32)
