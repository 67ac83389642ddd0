"""The contract of MLPerf's DLRMv3 on a CPU: python -m loadtest.server.contract --rates 20,25,30

Requests with 2,048 candidates arrive at a fixed mean rate (Poisson). At most one in a hundred may take longer than 80
ms, and the quality must be at least 99 % of the fp32 reference's. So no cheaper exit may answer (`allow_degraded:
false`), and a refused request counts as late. Every user is new and has 256 events: nothing is cached. The model is
Slatewise's, not DLRMv3's, which needs 260 GFLOP for a candidate. The load generator shares the cores with the server;
the column of other work has it too.

The last line is the largest rate that held, in the order of the rates.

Called by: the command line, after `make reference-bundle`. Its numbers appear in docs/performance.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from loadtest.chaos.bench import QUIET, SETTINGS
from loadtest.chaos.flood import Answer, Flood, percentile, send
from loadtest.client import closed_loop, post
from loadtest.markdown import table
from loadtest.server_process import SERVE, ServerProcess, exit_on_sigterm, machine_cpu_seconds
from loadtest.workload import Shape, Workload
from slatewise.process import cpu_name
from slatewise_train.demo.reference import NAME, VERSION, publish_uncalibrated, reference_content
from slatewise_train.rankers import families

SHAPE = Shape(256, 2_048)
DIFFERENT = 100  # requests
P99_MS = 80.0
TITLES = ("requests/s", "sent", "p50 ms", "p99 ms", "late", "of them refused", "server, cores", "others, cores", "held")


def measure(server: ServerProcess, requests: list[bytes], exit: str, rate: float, seconds: float) -> tuple[str, ...]:
    """Return the row of one rate."""
    before, all_before = server.cpu_seconds(), machine_cpu_seconds()
    answers, _ = send(server.port, Flood([requests], [(rate, seconds)]))
    spent, by_all = server.cpu_seconds() - before, machine_cpu_seconds() - all_before
    milliseconds = [latency_of(answer, exit) for answer in answers]
    p99 = percentile(milliseconds, 0.99)
    late = sum(each > P99_MS for each in milliseconds)
    return (
        f"{rate:g}",
        f"{len(answers)}",
        f"{percentile(milliseconds, 0.5):.1f}",
        f"{p99:.1f}",
        f"{late / len(answers):.2%}",
        f"{milliseconds.count(float('inf'))}",
        f"{spent / seconds:.2f}",
        f"{(by_all - spent) / seconds:.2f}",
        "yes" if p99 <= P99_MS else "no",
    )


def latency_of(answer: Answer, exit: str) -> float:
    """Return the milliseconds until an answer of this exit; infinite for any other answer."""
    return 1e3 * answer.latency if answer.status == 200 and answer.exit == exit else float("inf")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", required=True, help="requests a second, comma-separated")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each rate (default: %(default)s)")
    parser.add_argument("--bundles", type=Path, default=Path("build/bundles"))
    parser.add_argument("--ranker", default="reference")
    parser.add_argument("--variant", default="auto")
    parser.add_argument("--decoder-blocks", type=int, help="the reference ranker with so many blocks for candidates")
    parser.add_argument("--exit", default="point", choices=("dot", "point", "set"))
    args = parser.parse_args()
    exit_on_sigterm()
    with ExitStack() as stack:
        if args.decoder_blocks:
            args.ranker, args.bundles = NAME, Path(stack.enter_context(tempfile.TemporaryDirectory()))
            content = reference_content()
            model = families.shrink(content.model, {"decoder_blocks": args.decoder_blocks})
            publish_uncalibrated(dataclasses.replace(content, model=model), args.bundles / NAME, VERSION)
        return measure_all(args)


def measure_all(args: argparse.Namespace) -> int:
    """Measure each rate. Returns 1 if none held."""
    workload = Workload(args.bundles, args.ranker)
    members = {"ranker": args.ranker, "variant": args.variant, "exit": args.exit, "allow_degraded": False}
    requests = [post("/rerank", body) for body in workload.distinct(SHAPE, DIFFERENT, **members)]
    rows = []
    with ServerProcess(SETTINGS | {"BUNDLES": str(args.bundles)}, command=(*QUIET, *SERVE)) as server:
        closed_loop(server.port, requests, 2)  # warm
        for rate in map(float, args.rates.split(",")):
            rows.append(measure(server, requests, args.exit, rate, args.seconds))
            print(*rows[-1], file=sys.stderr, flush=True)
    blocks = f", {args.decoder_blocks} blocks for candidates" if args.decoder_blocks else ""
    print(f"{cpu_name()}; {args.ranker}{blocks}, variant {args.variant}, exit {args.exit}; {args.seconds:g} s a rate\n")
    print(table(TITLES, rows))
    held = [rate for rate, *_, verdict in rows if verdict == "yes"]
    print(f"\nlargest rate that held: {held[-1] if held else 'none'}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
