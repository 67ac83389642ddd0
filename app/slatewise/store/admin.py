"""Administration of the meta-embeddings in Redis: status, roll-back, delete-user, merge, sweep.

The output is one line of JSON. Neither torch nor polars is imported.
Called by: cli.py for `slatewise store`. Calls: `generations.py`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from slatewise.bundle.manifest import bundle_folder, read_manifest
from slatewise.store.adapted_items import read_items, roll_back_items
from slatewise.store.client import connect
from slatewise.store.command_line import add_redis_url
from slatewise.store.generations import Generations

Command = Callable[[Generations, argparse.Namespace], dict[str, Any]]

COMMANDS: dict[str, tuple[str, Command]] = {
    "status": ("show the live generations, and the one being written", lambda store, _: store.status()),
    "roll-back": ("remove the newest generation from the live ones", lambda store, _: {"live": store.roll_back()}),
    "delete-user": (
        "delete all vectors of a user, also from replicas' caches",
        lambda store, args: {"deleted": store.delete_user(args.user)},
    ),
    "merge": ("copy all live generations into one full generation", lambda store, _: {"live": store.merge()}),
    "sweep": (
        "remove the stored fields of generations that are no longer live",
        lambda store, _: {"fields_removed": store.sweep()},
    ),
}
ITEM_COMMANDS = {
    "items": "show the new items that have vectors",
    "roll-back-items": "return to the vectors of new items before the newest ones",
}


def run_on_items(command: str, bundle: Path, redis_url: str) -> dict[str, Any]:
    """Run a command of ITEM_COMMANDS for the version of a bundle."""
    manifest = read_manifest(bundle_folder(bundle))
    place = manifest.ranker, manifest.version
    with connect(redis_url) as client:
        if command == "roll-back-items":
            return {"changed": roll_back_items(client, *place)}
        found = read_items(client, *place, manifest.width)
    if found is None:
        return {"items": 0}
    return {"items": len(found.ids), "events": int(found.events.sum()), "created_at": found.created_at}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="slatewise store",
        description="Administer the vectors in Redis. Replicas follow within two seconds.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in ({name: text for name, (text, _) in COMMANDS.items()} | ITEM_COMMANDS).items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.add_argument(
            "bundle",
            type=Path,
            nargs="?",
            help="a bundle <root>/<ranker>/<version>, or a ranker's newest bundle <root>/<ranker>",
        )
        if name in ITEM_COMMANDS:
            add_redis_url(command)
            command.set_defaults(usage_error=command.error)
            continue
        if name == "delete-user":
            command.add_argument("user", help="the user's id")
        command.add_argument("--ranker", metavar="NAME", help="instead of a bundle, with --space")
        command.add_argument("--space", metavar="SPACE", help="space of the meta-embeddings, as the manifest names it")
        add_redis_url(command)
        command.set_defaults(usage_error=command.error)
    return parser


def target(args: argparse.Namespace) -> tuple[str, str]:
    """Return the (ranker, space) that the arguments name. Raises OSError or ValueError if the bundle is unreadable."""
    if args.bundle is not None:
        manifest = read_manifest(bundle_folder(args.bundle))
        return manifest.ranker, manifest.space
    return args.ranker, args.space


def main(argv: Sequence[str]) -> None:
    """Run the command. Raises StoreError, exceptions of redis-py, OSError or ValueError."""
    args = make_parser().parse_args(argv)
    if args.command in ITEM_COMMANDS:
        if args.bundle is None:
            args.usage_error("give a bundle: the vectors belong to one version of a ranker")
        print(json.dumps(run_on_items(args.command, args.bundle, args.redis_url)))
        return
    named = [name for name in ("ranker", "space") if getattr(args, name) is not None]
    if len(named) != (0 if args.bundle else 2):
        args.usage_error("give a bundle, or both --ranker and --space")
    _, command = COMMANDS[args.command]
    ranker, space = target(args)
    with connect(args.redis_url) as client:
        result = command(Generations(client, ranker, space), args)
    print(json.dumps(result))
