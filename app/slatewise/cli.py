"""The command `slatewise`: imports the module of a subcommand and runs its `main`.

Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted, 141 nobody reads
the output. A failure prints one line on standard error:
`run_main` alone turns the expected errors of a command into that line and the exit code.
Only the module of the subcommand is imported, so that `slatewise serve` needs no torch and `slatewise train` needs no
web server. Called by: __main__.py and the installed script. Calls: the modules in `COMMANDS`, and `logs.py`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from slatewise import VERSION
from slatewise.logs import report

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
NO_READER = 141  # 128 + SIGPIPE: `slatewise validate my.toml | head`
EXPECTED_BY_NAME = {  # a command does not load the libraries of the others
    "polars.exceptions.PolarsError",
    "redis.exceptions.RedisError",
    "slatewise.client.errors.SlatewiseError",
    "slatewise.client.libraries.MissingLibrary",
    "slatewise.store.writer.StoreError",
}


@dataclass(frozen=True)
class Command:
    module: str
    help: str
    extra: str  # of the package that the command needs: pip install 'slatewise[extra]'


COMMANDS = {
    "serve": Command("slatewise.main", "serve rankers over HTTP", "serve"),
    "rank": Command("slatewise.commands.rank", "rank a few items for a user, by a server or a bundle", "serve"),
    "batch": Command("slatewise.commands.batch", "rank a Parquet table of requests, by a bundle or a server", "serve"),
    "doctor": Command("slatewise.commands.doctor", "check machine, settings, bundles, Redis and port", "serve"),
    "push": Command("slatewise.store.push", "write a bundle's meta-embeddings, or your own, to Redis", "serve"),
    "store": Command("slatewise.store.admin", "status, roll-back, delete-user, merge, sweep of a Redis store", "serve"),
    "check-bundle": Command("slatewise.bundle.check", "load bundles and print what the server would serve", "serve"),
    "sign": Command("slatewise.bundle.sign", "make a key, or sign bundles with it", "signing"),
    "init": Command("slatewise_train.new_toml", "write a TOML for your tables from what they contain", "train"),
    "validate": Command("slatewise_train.check_data", "describe your tables, and refuse what training would", "train"),
    "train": Command("slatewise_train.train_command", "train a ranker on your events", "train"),
    "update": Command("slatewise_train.update_command", "train the newest version on new events only", "train"),
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
    command = COMMANDS[name]
    if name == "serve":
        leave_on_signals()

    def run(arguments: Sequence[str]) -> Any:
        return importlib.import_module(command.module).main(arguments)

    try:
        return run_main(f"slatewise {name}", run, arguments[1:])
    except ModuleNotFoundError as error:
        if str(error.name).startswith(("slatewise.", "slatewise_train.")):
            raise
        remedy = f"pip install 'slatewise[{command.extra}]' (in a clone: pip install '.[{command.extra}]')"
        reason = f"the package {error.name} is missing; run: {remedy}"
        print(f"slatewise {name}: error: {reason}", file=sys.stderr)
        return 1


def leave_on_signals() -> None:
    """End quietly on a signal while libraries and bundles load, which takes seconds. The server sets its own handlers.

    The first process of a container has no default handlers: it would not hear a SIGTERM. SIGINT too: a
    KeyboardInterrupt inside code that a library compiles from text ends Python with the signal, also if it is caught.
    """
    for number, code in ((signal.SIGINT, INTERRUPTED), (signal.SIGTERM, 0), (signal.SIGHUP, 0)):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, partial(leave, code))


def leave(code: int, *_: object) -> None:
    sys.exit(code)


def run_main(program: str, function: Callable[[Sequence[str]], int | None], arguments: Sequence[str]) -> int:
    """The exit code of a command's `main`. An expected error becomes one line on standard error, and exit code 1."""
    try:
        code = function(arguments) or 0
        if sys.stdout is not None:  # closed at the start
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and is_output_closed():
            return NO_READER
        if not is_expected(error):
            raise
        for fault in getattr(error, "faults", None) or [error]:  # SettingsError and Invalid have several
            report(f"{program}: error: {' '.join(str(fault).split()) or type(error).__name__}")
        return 1


def is_output_closed() -> bool:
    """Whether nobody reads the standard output any more. If so, drop the rest: Python flushes at its end."""
    try:
        descriptor = sys.stdout.fileno()
    except OSError:  # a stream in memory
        return False
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return True


def is_expected(error: Exception) -> bool:
    """Whether the message explains the failure to the user: wrong input, a file or connection, the state of a store."""
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    return isinstance(error, (OSError, ValueError)) or not names.isdisjoint(EXPECTED_BY_NAME)
