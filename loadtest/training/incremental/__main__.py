"""Does a daily update keep up with a full retraining? python -m loadtest.training.incremental models/movielens.toml

A ranker is trained on all events before the first day. Then, for each day of a week, five rankers learn from what is
known at the end of that day, and rank the next day's events:

    stale       the ranker of the start, unchanged
    plain       yesterday's `plain`, fine-tuned on the day's events alone: no penalty, no old events
    free        yesterday's `free`, updated as `penalised` is, without the penalty
    penalised   yesterday's `penalised`, updated as `slatewise update` does (`slatewise_train/incremental`)
    full        trained again from random weights on all events until then

`plain` has the learning rate that suits it best. The first day does not count in the comparison, and one more day
follows the last: of the week that is reported, `--tune` chose settings on that day. Other settings were chosen on an
earlier week (`--first`). A case is an event of the next day: the user's history is all that came before it, and the
candidates are all items that the user has not met, ranked by the exit `dot`. At most 100 events of a user count, drawn
once. The rankers are small, and train this exit only, so that the study ends on a CPU.

Stop the command at any time: the same command continues after the last ranker, and within a full retraining after the
last epoch. `results.jsonl` gets a line for each ranker and day, `results.md` and `incremental.png` are made at the end.
`--tune` compares settings on the first day instead.

Called by: the command line. Its numbers appear in docs/training.md. Calls: `study.py`, `report.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from loadtest.training.incremental.report import write_report
from loadtest.training.incremental.study import ARMS, Study
from slatewise.cli import run_main
from slatewise_train.config import read_config
from slatewise_train.incremental.update import UpdateConfig


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.training.incremental",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("toml", type=Path, help="config of the ranker: models/movielens.toml")
    parser.add_argument("--out", type=Path, default=Path("build/incremental"), help="default: %(default)s")
    parser.add_argument(
        "--first", default="2000-11-25", help="the day that is not counted, in UTC; default: %(default)s"
    )
    parser.add_argument("--days", type=int, default=8, help="with that one; default: %(default)s")
    parser.add_argument("--epochs", type=int, default=6, help="of a full training; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads; default: %(default)s")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="rankers; default: all")
    parser.add_argument("--tune", action="store_true", help="compare settings of the update on the first day")
    default = UpdateConfig()
    parser.add_argument("--passes", type=int, default=default.passes, help="default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate, help="default: %(default)s")
    parser.add_argument("--penalty", type=float, default=default.penalty, help="default: %(default)s")
    parser.add_argument("--importance", choices=("fisher", "identity"), default=default.importance)
    parser.add_argument("--replay", type=float, default=default.replay, help="default: %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    update = UpdateConfig(args.passes, args.learning_rate, args.penalty, args.importance, args.replay)
    study = Study(read_config(args.toml), args.out, args.first, args.epochs, update)
    if args.tune:
        study.tune()
        return
    study.run(args.days, args.arms)
    write_report(args.out, study.rows(), {day: study.cases(day)[0] for day in range(1, args.days + 1)})


if __name__ == "__main__":
    sys.exit(run_main("python -m loadtest.training.incremental", main, sys.argv[1:]))
