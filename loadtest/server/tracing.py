"""CPU time of spans: python -m loadtest.server.tracing [--before FOLDER]

Servers of the demo, each with one way of tracing, get the same small request in turn, one at a time. `--before` names
another checkout, for example of the commit before tracing; its server is measured beside the others. The spans go to
a receiver in this process, whose CPU time is not counted. Prints Markdown.

Called by: the command line. Its numbers appear in docs/tracing.md. Calls: `server_process.py`, `client.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from contextlib import ExitStack
from itertools import repeat
from pathlib import Path
from statistics import median

from loadtest.client import closed_loop, post
from loadtest.markdown import table
from loadtest.server_process import ServerProcess, exit_on_sigterm
from slatewise.process import cpu_name
from tests.support.otlp_receiver import receive_otlp

CALLER = "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0{flags}\r\n"


def cpu_seconds(server: ServerProcess) -> float:
    """CPU time of the server's process in nanoseconds' steps, by the clock that clock_getcpuclockid(3) returns."""
    return time.clock_gettime((~server.process.pid << 3) | 2)


def main() -> None:
    exit_on_sigterm()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout, to measure beside this one")
    parser.add_argument("--requests", type=int, default=300, help="of each server in a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    with ExitStack() as stack:
        receiver = stack.enter_context(receive_otlp())
        plain = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
        export = plain | {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, "NO_PROXY": "127.0.0.1"}
        tenth = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.1"}
        ways = {
            "no variables": (plain, None),
            "no variables, caller samples": (plain, 1),
            "all spans": (export, None),
            "a tenth of the traces": (export | tenth, None),
            "caller does not sample": (export, 0),
        }
        if args.before:
            paths = os.pathsep.join(str(args.before.resolve() / name) for name in ("app", "models"))
            ways = {"before": (plain | {"PYTHONPATH": paths}, None), **ways}
        settings = {"VARIANTS": "fp32", "THREADS": "1"}
        servers = {
            name: stack.enter_context(ServerProcess(settings, environment=environment))
            for name, (environment, _) in ways.items()
        }
        example = next(iter(servers.values())).get("/models/movielens")[1]["example"]
        request = post("/rerank", json.dumps(example).encode())
        spent: dict[str, list[float]] = {name: [] for name in ways}
        for k in range(args.rounds + 1):
            for name, server in servers.items():
                flags = ways[name][1]
                line = b"" if flags is None else CALLER.format(flags=flags).encode()
                before = cpu_seconds(server)
                head, _, body = request.partition(b"\r\n\r\n")
                outcome = closed_loop(server.port, repeat(head + b"\r\n" + line + b"\r\n" + body, args.requests), 1)
                assert outcome.statuses == {200: args.requests}, outcome.statuses
                if k:  # the first round warms up
                    spent[name].append((cpu_seconds(server) - before) / args.requests * 1e3)
    first = median(spent[next(iter(ways))])
    rows = [
        (name, f"{median(each):.3f}", f"{(median(each) - first) * 1e3:+.0f}", f"{max(each) - min(each):.3f}")
        for name, each in spent.items()
    ]
    print(cpu_name(), f"{len(receiver.spans)} spans received", "", sep="\n")
    print(table(("server", "CPU ms a request (median)", "difference, us", "range over rounds, ms"), rows))


if __name__ == "__main__":
    main()
