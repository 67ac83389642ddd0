"""A simulated world: users with known tastes choose items from slates by known probabilities.

Items are films of MovieLens latest-small, with their titles and genres. All else is drawn from a seed:

- A user's utility of a film adds a taste for its genres, a product of latent vectors, and the film's quality.
- Neighbours: a film loses utility for each film of the slate that shares genres with it, in proportion to how much
  the user likes that film. Genres differ in this substitution, and some have none of it.
- Fatigue: a film loses utility if it shares genres with the user's last choices.
- Each film of a slate is chosen with probability sigmoid(utility), independently of the others, if the user examines
  it. An older ranker puts the films in order, and position r is examined with probability 1 / r ** position_power.

The probability of a choice after examination is the relevance. It is known exactly, so `oracle.py` knows the best
order.

Called by: `oracle.py`, `tables.py`, `experiment.py`. Calls: numpy, polars.

Letters in shapes: U users, I items, G genres, T slates of a user, C items of a slate, n rows of any kind.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

GENRES = 8  # the most frequent ones; a slate of 20 films would have too few of the others to replace each other
RECENT = 5  # choices that cause fatigue
TASTE = 0.7  # standard deviation of the utility of one genre
QUALITY = 1.0  # that of a film's quality
RATE = 0.2  # mean relevance in slates, which the intercept is fitted to
OLD_RANKER_NOISE = 0.5  # standard deviation, where the older ranker's scores have 1
CHUNK = 4_096  # slates at a time: the pairs of a slate take memory


@dataclass(frozen=True)
class WorldConfig:
    """Sizes and switches. A switch at 0 is off, and changes neither users, nor items, nor their tastes."""

    users: int = 6_000
    items: int = 400
    slate_size: int = 20
    slates: int = 12  # of each user; the last one is for the evaluation
    organic: int = 30  # choices of each user before the first slate, in no slate
    factors: int = 4  # numbers of a latent vector
    neighbours: float = 2.0  # strength of substitution
    fatigue: float = 1.0
    position_power: float = 0.0  # position r is examined with probability 1 / r ** position_power
    old_ranker: float = -0.7  # correlation of the older ranker's scores with the films' quality
    seed: int = 0


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def pick_items(ratings: pl.DataFrame, movies: pl.DataFrame, count: int) -> pl.DataFrame:
    """Return the films with the most ratings, with those of their genres that are among the most frequent.

    Films without such a genre are left out. Raises ValueError if fewer than `count` are left.
    """
    rated = ratings.group_by("item_id").agg(pl.len().alias("ratings"))
    films = movies.join(rated, on="item_id").with_columns(pl.col("genres").str.split("|"))
    frequent = films.explode("genres").drop_nulls("genres").group_by("genres").len().sort("len", "genres")["genres"]
    kept = pl.element().filter(pl.element().is_in(frequent.tail(GENRES).to_list()))
    films = films.with_columns(pl.col("genres").list.eval(kept).list.join("|")).filter(pl.col("genres") != "")
    if len(films) < count:
        raise ValueError(f"{count} items were asked for, and MovieLens latest-small has {len(films)} with a genre")
    return films.sort(["ratings", "item_id"], descending=[True, False]).head(count).drop("ratings")


class World:
    """The users and items of a world, and the relevance of items in slates.

    films: the table of `pick_items`.
    """

    def __init__(self, config: WorldConfig, films: pl.DataFrame) -> None:
        self.config = config
        self.films = films
        lists = films["genres"].str.split("|").to_list()
        self.genre_names = sorted({name for names in lists for name in names})
        self.genres = np.array([[name in names for name in self.genre_names] for names in lists])  # (I, G) bool
        rng = np.random.default_rng([config.seed, 0])
        g, i, u, k = len(self.genre_names), len(films), config.users, config.factors
        has = self.genres.astype(np.float32)
        count = has.sum(axis=1)
        union = count[:, None] + count - has @ has.T
        self.similarity = has @ has.T / union  # (I, I) Jaccard
        # A rule that spreads all genres alike cannot know which genres replace each other: half of them do.
        self.substitution = rng.permutation(np.arange(g) % 2 * 2.0).astype(np.float32)  # (G,)
        self.replaces = (has * self.substitution) @ has.T / union  # (I, I)
        np.fill_diagonal(self.replaces, 0.0)
        by_genre = rng.normal(size=(u, g)) @ (has / np.sqrt(count)[:, None]).T  # (U, I)
        by_factor = rng.normal(size=(u, k)) @ rng.normal(size=(k, i)) / np.sqrt(k)
        quality = rng.normal(size=i)
        utility = TASTE * by_genre + 0.3 * by_factor + QUALITY * quality
        self.utility = utility.astype(np.float32)  # (U, I), without a slate
        # The older ranker is wrong in the same way for all users: it puts good films last.
        old = config.old_ranker
        self.old_scores = old * quality + np.sqrt(1 - old**2) * rng.normal(size=i)
        self.intercept = 0.0
        self.intercept = self.fit_intercept(np.random.default_rng([config.seed, 1]))

    def fit_intercept(self, rng: np.random.Generator) -> float:
        """Return the intercept at which the mean relevance of random slates is `RATE`, by bisection."""
        users = np.arange(min(self.config.users, 500))
        recent = rng.integers(0, len(self.films), (len(users), RECENT))
        utility = self.utility_in_slate(users, self.draw_slates(users, None, rng), recent)
        low, high = -20.0, 20.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if sigmoid(utility + middle).mean() < RATE else (low, middle)
        return low

    def draw_slates(self, users: np.ndarray, taken: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
        """Draw a slate for each user (n,) as a first stage does: (n, C) items, without order.

        A slate prefers films that the user likes and films of two random genres, its theme. taken (n, I) bool: films
        that are left out.
        """
        n = len(users)
        themes = rng.integers(0, len(self.genre_names), (n, 2))
        themed = self.genres.T[themes].sum(axis=1)  # (n, I)
        score = 0.5 * self.utility[users] + 2.0 * themed
        score = score + rng.gumbel(size=score.shape)  # the largest are then a sample without replacement
        if taken is not None:
            score[taken] = -np.inf
        return np.argpartition(-score, self.config.slate_size, axis=1)[:, : self.config.slate_size]

    def utility_in_slate(self, users: np.ndarray, slates: np.ndarray, recent: np.ndarray) -> np.ndarray:
        """Return the utility of each item in its slate: (n, C), before the intercept.

        users: (n,); slates: (n, C) items; recent: (n, RECENT) items of the last choices.
        """
        alone = self.utility[users[:, None], slates]
        result = alone.astype(np.float64)
        for first in range(0, len(users), CHUNK):
            rows = slice(first, first + CHUNK)
            slate = slates[rows]
            if self.config.neighbours:
                liked = sigmoid(alone[rows])[:, None, :]
                lost = (self.replaces[slate[:, :, None], slate[:, None, :]] * liked).sum(axis=2)
                result[rows] -= self.config.neighbours * lost
            if self.config.fatigue:
                tired = self.similarity[slate[:, :, None], recent[rows][:, None, :]].mean(axis=2)
                result[rows] -= self.config.fatigue * tired
        return result

    def relevance(self, users: np.ndarray, slates: np.ndarray, recent: np.ndarray) -> np.ndarray:
        """Return the probability that an examined item is chosen: (n, C). Arguments: see `utility_in_slate`."""
        return sigmoid(self.utility_in_slate(users, slates, recent) + self.intercept)


@dataclass(frozen=True)
class Log:
    """The events of a world. Slate t of a user comes after the choices of its slates before t."""

    organic: np.ndarray  # (U, organic) items chosen before the first slate, oldest first
    slates: np.ndarray  # (U, T, C) items in order of position
    recent: np.ndarray  # (U, T, RECENT) items of the last choices before the slate
    relevance: np.ndarray  # (U, T, C)
    chosen: np.ndarray  # (U, T, C) bool


def simulate(world: World) -> Log:
    """Let the users choose from all of their slates, one slate of every user at a time."""
    config = world.config
    u, c = config.users, config.slate_size
    rng = np.random.default_rng([config.seed, 2])
    users = np.arange(u)
    first = world.utility + rng.gumbel(size=world.utility.shape)
    organic = np.argsort(-first, axis=1)[:, : config.organic]
    taken = np.zeros(world.utility.shape, bool)
    np.put_along_axis(taken, organic, True, axis=1)
    newest = organic[:, -RECENT:]
    examined = 1.0 / np.arange(1, c + 1) ** config.position_power  # (C,)
    steps = []
    for _ in range(config.slates):
        slates = world.draw_slates(users, taken, rng)
        shown = world.old_scores[slates] + OLD_RANKER_NOISE * rng.normal(size=(u, c))
        slates = np.take_along_axis(slates, np.argsort(-shown, axis=1), axis=1)
        relevance = world.relevance(users, slates, newest)
        chosen = rng.random((u, c)) < relevance * examined
        steps.append((slates, newest, relevance, chosen))
        rows, places = chosen.nonzero()
        taken[rows, slates[rows, places]] = True
        newest = last_choices(newest, slates, chosen)
    return Log(organic, *(np.stack(arrays, axis=1) for arrays in zip(*steps, strict=True)))


def last_choices(before: np.ndarray, slates: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return the last RECENT choices after a slate: before (n, RECENT), slates and chosen (n, C) -> (n, RECENT).

    The choices of one slate are in order of position.
    """
    width = before.shape[1]
    items = np.concatenate([before, slates], axis=1)
    happened = np.concatenate([np.ones(before.shape, bool), chosen], axis=1)
    order = np.argsort(happened, axis=1, kind="stable")[:, -width:]  # those that happened are last, in their order
    return np.take_along_axis(items, order, axis=1)
