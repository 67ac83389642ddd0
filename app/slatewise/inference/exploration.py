"""Draws for exploration by Thompson sampling: the weights of the last layer of `point`, from their posterior.

The last layer is a Bayesian linear head (LiRank, arXiv 2402.06859): its weights have a Gaussian posterior around the
trained ones. A draw moves the logit of a candidate by `features . draw`, and all candidates of a request see the same
draw. Training fits the posterior (`slatewise_train/evaluation/exploration.py`).

Called by: `engine.py`, and training and load tests, which sample with the same code. Calls: numpy.
"""

from __future__ import annotations

import hashlib

import numpy as np

from slatewise.inference.arrays import Float32


def draw(factors: Float32, seed: str, scale: float = 1.0) -> Float32:
    """Return a draw of the weights minus the trained ones, for each head: (heads, D), with D features and the bias.

    factors: (heads, D, D), whose products F F^T are the covariances. scale: multiplies the standard deviations.
    The same seed gives the same numbers on every machine: the stream of RandomState never changes (NEP 19), unlike
    that of numpy's newer generators.
    """
    words = np.frombuffer(hashlib.sha256(seed.encode()).digest(), "<u4")
    normal = np.random.RandomState(words).standard_normal(factors.shape[:2])
    moved = factors @ (scale * normal)[..., None]  # float64
    return moved[..., 0].astype(np.float32)
