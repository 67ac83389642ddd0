"""Floating-point operations (FLOPs) of a request and of a training, computed from the config of a LiGR.

A product of matrices (n, k) and (k, m) has 2 n k m FLOPs. Attention of n tokens to T positions has 2 n T (query width +
width): causal attention counts all positions, as the engine computes them and masks some. Norms, softmax, activations,
gates' sigmoids and additions are left out, as in `torch.utils.flop_counter`. For width d, one token in one block has

    keys, values   2 d (key width + value width)
    the rest       2 d (query width + d), 4 d^2 of the two gates, 4 d hidden of the feed-forward layer

Called by: `study.py`.
"""

from __future__ import annotations

import numpy as np

from slatewise.inference.arrays import CONTEXT_SIZE
from slatewise_train.rankers.ligr import LigrConfig

CANDIDATES = 500  # of the request


def keys_values(config: LigrConfig) -> int:
    """FLOPs of the key and the value of one token in one block."""
    return 2 * config.width * (config.key_width + config.value_width)


def update(config: LigrConfig, gates: bool, positions: int) -> int:
    """FLOPs of the rest of a block for one token that attends to so many positions."""
    d = config.width
    hidden = config.feed_forward * d
    rank = config.feed_forward_rank
    feed_forward = 2 * (d * rank + rank * hidden) if rank else 2 * d * hidden
    dense = d * (config.query_width + d) + 2 * d * d * gates + feed_forward
    return 2 * dense + 2 * positions * (config.query_width + d)


def request_flops(config: LigrConfig, gates: bool, events: int, candidates: int = CANDIDATES) -> dict[str, int]:
    """Return the FLOPs of a request without a cached history: `encode`, and by exit those of the whole request.

    As in the served graphs, only the newest event passes the rest of the last block, and the part of the late fusion
    that is the request's is computed once. The start token counts as an event.
    """
    d = config.width
    tokens = events + 1
    encode = config.blocks * tokens * keys_values(config) + update(config, gates, tokens)
    encode += (config.blocks - 1) * tokens * update(config, gates, tokens)
    dot = encode + 2 * candidates * d
    blocks = config.blocks - config.first_decoder_block
    point = dot + candidates * blocks * update(config, gates, tokens)
    point += 2 * d * (candidates * 2 * config.numeric + config.meta_size + CONTEXT_SIZE)  # late fusion
    point += 2 * candidates * (d * 2 * d + 2 * d * config.heads)  # the head of the exit
    return {"encode": encode, "dot": dot, "point": point}


def epoch_flops(config: LigrConfig, gates: bool, train_lengths: np.ndarray, longest: int, negatives: int) -> float:
    """Return the FLOPs of an epoch that trains the exit `dot`: three times those of its forward passes.

    train_lengths: (U,) training events of each user, cut into windows of at most `longest` events as `batches.py` does;
    padding is left out. negatives: of the sampled softmax.
    """
    events = np.minimum(train_lengths, longest)
    windows = -(-train_lengths // longest)
    tokens = events + 1
    each = config.blocks * (keys_values(config) + update(config, gates, 0)) + 2 * negatives * config.width
    pairs = config.blocks * (update(config, gates, 1) - update(config, gates, 0))
    return 3.0 * float((windows * (tokens * each + tokens**2 * pairs)).sum())
