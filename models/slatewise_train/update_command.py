"""Update a ranker with new events: slatewise update my.toml --from bundles/shop --events events/ --out bundles

The command loads the newest version of the bundle, trains a few passes over the new events and some old ones near its
weights, and publishes the next version. This takes a small part of the time of a training. docs/training.md describes
it.

EVENTS are tables of every kind that training reads, the files of SLATEWISE_EVENTS_DIR included. The events of [data] in
the TOML remain the older part of the users' histories. New is an event after the newest one that the version was
trained on (`--since` states another time). The last event of each user is not learned from: with it, the update is
compared with its parent. An update that is worse is not published.

A stopped command publishes nothing, and can be repeated. Two at a time are refused.

Called by: the command line. Calls: `incremental/`, `data.py`, `export.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch

from slatewise.bundle.manifest import Manifest, bundle_folder, read_manifest, versions
from slatewise_train import checkpoint
from slatewise_train.config import Config, read_config
from slatewise_train.data import Data, load_data
from slatewise_train.defaults import choose_training
from slatewise_train.evaluation.sampling import SAMPLED_USERS
from slatewise_train.export import ExportOptions, check_default_exit, export, trained_until
from slatewise_train.incremental.grow import check_columns, grown_model, vocabulary_of
from slatewise_train.incremental.parent import Parent
from slatewise_train.incremental.update import UpdateConfig, update
from slatewise_train.meta.limaml import META_BLOCK, MetaLearner, load_learner
from slatewise_train.rankers.base import RankerModel
from slatewise_train.tables.new_events import read_new_events
from slatewise_train.train import Trainer

HELD_OUT = 0.2  # of the new events, from the newest, in a split by time


def time_of(folder: Path) -> float | None:
    """Return the time of the newest event that a bundle was trained on, or None for an older bundle."""
    path = folder / "report.json"
    found = json.loads(path.read_text()).get("trained_until") if path.exists() else None
    return None if found is None else float(found)


def first_new(folder: Path, new: pl.DataFrame | None, stated: float | None) -> float:
    """Return the time after which events are new. Raises ValueError if nothing tells it."""
    known = time_of(folder) if stated is None else stated
    if known is None and new is not None and len(new):
        known = float(np.nextafter(new["timestamp"].min(), -np.inf))  # type: ignore[arg-type]
    if known is None:
        raise ValueError(
            f"{folder} does not say until when it was trained: name new events with --events, or a time with --since"
        )
    return known


def load(config: Config, folder: Path, new: pl.DataFrame | None, time: float) -> tuple[Data, Config]:
    """Read the tables with the vocabulary of a bundle. Returns data and config as `load_for_training` does.

    time: after which events are new. A split by time holds out the newest of them instead.
    """
    manifest = read_manifest(folder)
    check_columns(manifest, config.data)
    stated = config.stated | {"split.history_length"}
    own = dataclasses.replace(config.data, history_length=manifest.limits.history_used)
    if config.tables.time_unit == "row":
        raise ValueError('an update needs times; [data] time_unit = "row" says that there are none')
    if own.kind == "time" and new is not None:
        times = new.filter(pl.col("timestamp") > time)["timestamp"]
        if len(times):
            own = dataclasses.replace(own, test_from=float(times.quantile(1 - HELD_OUT) or 0.0))
    data = load_data(own, config.tables, stated, known=vocabulary_of(folder, manifest), new=new)
    config = choose_training(
        dataclasses.replace(config, data=data.config),
        data.split.train_lengths,
        len(data.catalogue.vocabulary.items),
        data.exposures is not None,
    )
    return data, config


def old_events(data: Data, time: float) -> np.ndarray:
    """Return the number of each user's events until a time: (U,)."""
    s = data.sequences
    users = np.repeat(np.arange(len(s)), np.diff(s.offsets))
    return np.bincount(users[s.timestamps <= time], minlength=len(s))


def new_cases(data: Data, old: np.ndarray) -> Data:
    """Return the data with the held-out events of users only whose held-out event is new. old: as `old_events`."""
    split = data.split
    lengths = np.diff(data.sequences.offsets)
    return dataclasses.replace(
        data,
        split=dataclasses.replace(
            split,
            test_lengths=np.where(split.test_lengths >= old, split.test_lengths, 0),
            slate_users=split.slate_users[lengths[split.slate_users] > old[split.slate_users]],
        ),
    )


def kept_space(manifest: Manifest, learner: MetaLearner | None, old: torch.Tensor, model: RankerModel) -> str | None:
    """Return the space of the parent if a meta-embedding does in the update what it did there.

    old: `meta_effect` of the parent.
    """
    return manifest.space if learner is not None and torch.equal(old, meta_effect(model)) else None


def load_block(folder: Path, config: Config) -> MetaLearner | None:
    """Load the meta block of a bundle, if it has one. Raises ValueError if it belongs to heads of other kinds."""
    if not (folder / META_BLOCK).exists():
        return None
    learner, kinds = load_learner(folder / META_BLOCK)
    own = [head.kind for head in config.data.heads]
    if kinds != own:
        raise ValueError(f"{folder} has heads of the kinds {', '.join(kinds)}, the TOML {', '.join(own)}: train anew")
    return learner


@torch.no_grad()
def meta_effect(model: RankerModel) -> torch.Tensor:
    """Return what a meta-embedding does: the shift by each of its numbers, and the default, (M, d + 1)."""
    return torch.cat([model.meta_shift(torch.eye(model.meta_size)), model.default_meta[:, None]], dim=1)


def run(
    config: Config, folder: Path, new: pl.DataFrame | None, stated: float | None, settings: UpdateConfig
) -> tuple[Trainer, MetaLearner | None, Config, Parent] | None:
    """Train the update of a bundle; None without new events to learn from."""
    manifest = read_manifest(folder)
    check_default_exit(config, manifest.exits)
    time = first_new(folder, new, stated)
    data, config = load(config, folder, new, time)
    model = grown_model(folder, manifest, data.catalogue)
    old = old_events(data, time)
    # The parent has not learned from the last event of a user either, if it held that one out.
    since = np.maximum(old - 1, 0) if data.config.kind == "leave-one-out" else old
    count = int(np.maximum(data.split.train_lengths - since, 0).sum())
    fresh = int((np.diff(data.sequences.offsets) - old).sum())
    if not count or not fresh:
        return None
    learner = load_block(folder, config)
    items = model.item_table().detach().numpy().copy()
    effect = meta_effect(model)
    trainer = Trainer(data, model, config.train)
    loss = update(trainer, since, settings)
    trainer.progress.joined = 0  # all exits were trained
    print(f"trained on {count:,} events of {fresh:,} new ones, loss {loss:.4f}", flush=True)
    space = kept_space(manifest, learner, effect, model)
    return (
        trainer,
        learner,
        config,
        Parent(folder, manifest, items, new_cases(data, old), count, trained_until(data), space),
    )


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="slatewise update", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = UpdateConfig()
    parser.add_argument("toml", type=Path, help="of the ranker's training")
    parser.add_argument(
        "--from", dest="parent", type=Path, required=True, metavar="BUNDLE", help="root/NAME or a version of it"
    )
    parser.add_argument("--events", type=Path, nargs="+", default=[], help="files, folders or patterns of new events")
    parser.add_argument("--out", type=Path, help="root folder of the bundles; default: that of --from")
    parser.add_argument("--since", type=float, metavar="TIME", help="unix seconds after which events are new")
    parser.add_argument("--passes", type=int, default=default.passes, help="over the new events; default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate, help="default: %(default)s")
    parser.add_argument(
        "--penalty", type=float, default=default.penalty, help="to the old weights; default: %(default)s"
    )
    parser.add_argument("--importance", choices=("fisher", "identity"), default=default.importance, help="of a weight")
    parser.add_argument(
        "--replay", type=float, default=default.replay, help="old events in a pass, for each that is read for new ones"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: as many as PyTorch chooses")
    parser.add_argument("--all-users", action="store_true", help=f"evaluate all users; default: {SAMPLED_USERS:,}")
    parser.add_argument("--force", action="store_true", help="publish an update that is worse than its parent")
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(max(1, args.threads))
    config = read_config(args.toml)
    folder = bundle_folder(args.parent)
    root = args.out or folder.parent.parent
    target = root / config.data.name
    target.mkdir(parents=True, exist_ok=True)
    settings = UpdateConfig(args.passes, args.learning_rate, args.penalty, args.importance, args.replay)
    with checkpoint.alone(target):
        with contextlib.redirect_stdout(sys.stderr):
            new = read_new_events([str(path) for path in args.events], config.tables) if args.events else None
            found = run(config, folder, new, args.since, settings)
        if found is None:
            print(f"no new events to learn from: {folder} stays the newest version")
            return
        trainer, learner, config, parent = found
        version = max([*versions(target), parent.manifest.version]) + 1
        options = ExportOptions(None if args.all_users else SAMPLED_USERS, args.force, parent=parent)
        print(export(trainer, learner, config, root, version, options))
