"""The command `slatewise`: imports the module of a subcommand and runs its `main`.

Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted. A failure prints one line on standard error.
Only the module of the subcommand is imported, so that `slatewise serve` needs no torch and `slatewise train` needs no
web server. Called by: __main__.py and the installed script. Calls: the modules in `COMMANDS`.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from slatewise import VERSION

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


@dataclass(frozen=True)
class Command:
    module: str
    help: str
    extra: str  # of the package that the command needs: pip install 'slatewise[extra]'


COMMANDS = {
    "serve": Command("slatewise.main", "serve rankers over HTTP", "serve"),
    "push": Command("slatewise.store.push", "write a bundle's meta-embeddings, or your own, to Redis", "serve"),
    "store": Command("slatewise.store.admin", "status, roll-back, delete-user, merge, sweep of a Redis store", "serve"),
    "check-bundle": Command("slatewise.bundle.check", "load bundles and print what the server would serve", "serve"),
    "train": Command("slatewise_train.train", "train a ranker on your events", "train"),
    "limaml": Command("slatewise_train.meta.limaml", "meta-learn user vectors for a trained ranker", "train"),
    "refresh": Command("slatewise_train.meta.refresh", "adapt user vectors to new events and publish them", "train"),
    "export": Command("slatewise_train.export", "export a trained ranker to a bundle", "train"),
    "compress": Command("slatewise_train.compress", "add smaller variants to a bundle, each measured", "train"),
}


def make_parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:<13} {command.help}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="slatewise",
        usage="slatewise COMMAND [options]",
        description="Slatewise ranks candidates for a user.",
        epilog=f"commands:\n{listing}\n\n`slatewise COMMAND --help` describes a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"slatewise {VERSION}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = make_parser().parse_args(arguments[:1]).command
    try:
        return run(name, arguments[1:])
    except KeyboardInterrupt:
        return INTERRUPTED


def run(name: str, arguments: list[str]) -> int:
    command = COMMANDS[name]
    try:
        function: Callable[..., Any] = importlib.import_module(command.module).main
        sys.argv = [f"slatewise {name}", *arguments]  # argparse takes the name of the program from here
        code = function(arguments) if inspect.signature(function).parameters else function()
        return int(code or 0)
    except ModuleNotFoundError as error:
        if str(error.name).startswith(("slatewise.", "slatewise_train.")):
            raise
        reason = f"the package {error.name} is missing; run: pip install 'slatewise[{command.extra}]'"
    except OSError as error:  # a file, folder or connection; the message names it
        reason = str(error)
    print(f"slatewise {name}: error: {reason}", file=sys.stderr)
    return 1
