"""The scaling study: FLOPs against torch's counter, kept rows, slopes, tables, and a tiny study that is stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from loadtest.training.scaling import __main__ as command
from loadtest.training.scaling.flops import epoch_flops, request_flops
from loadtest.training.scaling.report import comparisons_table, runs_table, slope, slopes_table, write_report
from loadtest.training.scaling.runs import Row, Run, add_row, plan, read_rows
from loadtest.training.scaling.study import RESULTS, Study, load_study, run_study
from loadtest.training.scaling.ungated import remove_gates
from slatewise.inference.arrays import CONTEXT_SIZE
from slatewise_train import train as training
from slatewise_train.config import read_config
from slatewise_train.demo.movielens import read_movielens
from slatewise_train.devices import find_device
from slatewise_train.loading import load_for_training
from slatewise_train.rankers import families
from slatewise_train.rankers.ligr import Block, Ligr

torch.set_num_threads(1)

TESTS = Path(__file__).parents[1]
SIZES = {"items": 30, "actions": 3, "fields": {}, "numeric": 3, "heads": 2, "meta_size": 5, "set_blocks": 0}
RUNS = [Run(8, 2, 32, 1), Run(8, 2, 32, 1, gates=False, features=False)]


def served_request(model: Ligr, events: int, candidates: int) -> Iterator[str]:
    """Compute a request as the served graphs do. Yields the name of each part after its products."""
    d, config = model.config.width, model.config
    x = torch.randn(1, events + 1, d)
    positions = torch.arange(events + 1)
    state = []
    *blocks, last = model.blocks
    for block in blocks:
        x, keys_values = block.attend_to_itself(x, positions, None, causal=True)
        state.append(keys_values)
    normed = last.attention_norm(x)
    key, value = (last.split(layer(normed), last.key_heads) for layer in (last.key, last.value))
    state.append((key, value))
    user = last(x[:, -1:], key, value, positions[-1:], None)
    yield "encode"
    vectors = torch.randn(1, candidates, d)
    torch.matmul(vectors, user.transpose(1, 2))
    yield "dot"
    weight = model.fusion.weight
    F.linear(torch.randn(candidates, 2 * config.numeric), weight[:, : 2 * config.numeric])
    F.linear(torch.randn(1, config.meta_size + CONTEXT_SIZE), weight[:, 2 * config.numeric :])
    model.point_logits(model.hidden(vectors, state, positions[-1:] + 1, None, torch.zeros(1, candidates, d)))
    yield "point"


@pytest.mark.parametrize("gates", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize(
    "shape",
    [
        {"width": 8, "blocks": 1},
        {"width": 16, "blocks": 3, "decoder_blocks": 1, "attention_heads": 4, "key_heads": 2, "feed_forward": 2},
        {"width": 16, "blocks": 2, "attention_heads": 2, "key_size": 4, "feed_forward_rank": 3},
    ],
    ids=["one block", "grouped heads", "low rank"],
)
def test_request_flops_equal_those_that_torch_counts(shape: dict[str, int], gates: bool) -> None:
    model = families.build("ligr", SIZES | shape).eval()
    assert isinstance(model, Ligr)
    if not gates:
        remove_gates(model)
    expected = request_flops(model.config, gates, events=11, candidates=7)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        found = {name: counter.get_total_flops() for name in served_request(model, 11, 7)}
    assert found == expected


def test_epoch_flops_equal_a_count_by_hand() -> None:
    """One block of width 2 without heads: keys and values 16, query and output 16, gates 16, feed-forward layer 64."""
    config = families.build("ligr", SIZES | {"width": 2, "blocks": 1}).config
    each, pairs, softmax = 16 + 16 + 16 + 64, 2 * (2 + 2), 2 * 10 * 2
    windows = [4, 4, 3]  # events: 7 events of the first user make two windows of four
    forward = sum((n + 1) * (each + softmax) + (n + 1) ** 2 * pairs for n in windows)
    assert epoch_flops(config, True, np.array([7, 3, 0]), 4, negatives=10) == 3 * forward  # type: ignore[arg-type]


def test_block_without_gates_equals_one_with_open_gates() -> None:
    model = families.build("ligr", SIZES | {"width": 8, "blocks": 1}).eval()
    assert isinstance(model, Ligr)
    gated = model.blocks[0]
    assert isinstance(gated, Block)
    for gate in (gated.attention_gate, gated.feed_forward_gate):
        torch.nn.init.zeros_(gate.weight)
        torch.nn.init.constant_(gate.bias, 100.0)  # a sigmoid of 1
    x = torch.randn(2, 5, 8)
    expected, _ = gated.attend_to_itself(x, torch.arange(5), None, causal=True)
    remove_gates(model)
    ungated = model.blocks[0]
    assert isinstance(ungated, Block) and ungated is not gated
    found, _ = ungated.attend_to_itself(x, torch.arange(5), None, causal=True)
    torch.testing.assert_close(found, expected)


def test_plan_has_each_run_once() -> None:
    runs = plan((64, 2), [(32, 1), (64, 2), (64, 8), (128, 4)], [64, 256], first_seed=3)
    assert len(set(runs)) == len(runs) == 4 * 2 * 2 + 2 + 2  # gated and all features are among the sizes
    assert len({run.name for run in runs}) == len(runs)
    assert {run for run in runs if not run.gates} == {Run(64, 8, 256, seed, gates=False) for seed in (3, 4)}
    assert {run for run in runs if not run.features} == {Run(64, 2, 256, seed, features=False) for seed in (3, 4)}
    assert len(plan((16, 2), [(32, 1)], [64], first_seed=0)) == 2 + 4 + 4


def test_unfinished_last_row_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    add_row(path, {"run": "a"})
    with path.open("a") as file:
        file.write('{"run": "b", "nd')
    assert read_rows(path) == [{"run": "a"}]
    add_row(path, {"run": "c"})
    assert [row["run"] for row in read_rows(path)] == ["a", "c"]


def made_up(run: Run, flops: float, ndcg: float, ranks: list[int]) -> Row:
    return asdict(run) | {
        "run": run.name,
        "epochs": 3,
        "parameters": 1_000,
        "flops": {"encode": 1.0, "dot": flops, "point": 10 * flops},
        "ndcg10": {"dot": ndcg, "point": 0.2},
        "ranks": {"dot": ranks, "point": ranks},
        "seconds": 1_800,
        "device": "a machine",
    }


@pytest.fixture
def rows() -> list[Row]:
    """NDCG@10 of `dot` rises by 0.01 for each decade, and that of `point` does not."""
    grid = [
        made_up(Run(8 * 2**k, 8, history, seed), 10.0 ** (6 + k), 0.1 + 0.01 * k, [0, 99])
        for k in range(4)
        for history in (64, 256)
        for seed in (1, 2)
    ]
    bare = [made_up(Run(8, 8, 256, seed, gates=False), 8e5, 0.09, [1, 99]) for seed in (1, 2)]
    return [*grid, *bare]


def test_slope_of_a_line_is_that_of_the_line(rows: list[Row]) -> None:
    lines = slopes_table(rows)
    assert lines[2] == "| dot | 64 | 8 | +0.0100 (+0.0100 to +0.0100) | above 0 |"
    assert lines[4].startswith("| dot | all | 16 | +0.0100")
    assert lines[5] == "| point | 64 | 8 | +0.0000 (+0.0000 to +0.0000) | holds 0 |"
    assert slope(np.array([1e6, 1e7]), np.array([0.1, 0.2])) is None


def test_slope_of_noise_has_an_interval_with_zero() -> None:
    rng = np.random.default_rng(0)
    flops = np.repeat(10.0 ** np.arange(6, 10), 2)
    found = slope(flops, 0.1 + 0.01 * rng.normal(size=8))
    assert found is not None and found[1] < 0 < found[2]
    found = slope(flops, 0.01 * np.log10(flops) + 0.0001 * rng.normal(size=8))
    assert found is not None and 0.0097 < found[1] < 0.01 < found[2] < 0.0103


def test_tables_have_means_of_seeds_and_paired_differences(rows: list[Row]) -> None:
    rows[2]["ndcg10"]["dot"] = 0.12  # width 8, history 256, seed 1
    table = "\n".join(runs_table(rows))
    assert (
        "| 8 x 8 | 256 | yes | yes | 1,000 | 1.0 | 10.0 | 0.1100 (0.1200, 0.1000) | 0.2000 (0.2000, 0.2000) |" in table
    )
    assert "| 8 x 8 | 256 | no | yes | 1,000 | 0.8 | 8.0 | 0.0900 (0.0900, 0.0900) |" in table
    lines = comparisons_table(rows)
    assert len(lines) == 2 + 2, "no run is without features"
    gain = (1 - 1 / np.log2(3)) / 2  # ranks 0 and 1 of the first user, both behind the tenth for the second
    assert lines[2].startswith(f"| gated - ungated, 8 blocks | dot | {gain:+.4f} (+0.0000 to {2 * gain:+.4f}) |")
    assert lines[2].endswith("| +0.0300, +0.0100 | 1.25 |")


def test_report_of_few_rows_says_that_slopes_are_missing(rows: list[Row], tmp_path: Path) -> None:
    write_report(rows[-1:], tmp_path)
    assert not list(tmp_path.iterdir())
    write_report(rows[:1], tmp_path)
    assert "not measured: fewer than 3 sizes" in (tmp_path / "results.md").read_text()
    write_report(rows, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert text.startswith("18 runs of 3 epochs, 2 validation users, full catalogue; a machine; 9.0 hours.")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def toml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tests' tiny ranker, with tables beside its TOML."""
    folder = tmp_path_factory.mktemp("tables")
    text = (TESTS / "tiny.toml").read_text()
    for name, table in zip(
        ("events", "items"), read_movielens("ml-latest-small", TESTS / "data" / "ml-latest-small"), strict=True
    ):
        table.write_parquet(folder / f"{name}.parquet")
        text = text.replace(f'"{name}.parquet"', json.dumps(str(folder / f"{name}.parquet")))
    (folder / "tiny.toml").write_text(text)
    return folder / "tiny.toml"


@pytest.fixture(scope="module")
def study(toml: Path) -> Study:
    data, config = load_for_training(read_config(toml))
    return load_study(config, data, 3, find_device("cpu"))


@pytest.fixture(scope="module")
def through(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("through")
    assert [row["run"] for row in run_study(study, RUNS, folder)] == [run.name for run in RUNS]
    return folder


def kept(folder: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read_rows(folder / RESULTS)]


def test_tiny_study_keeps_rows_of_both_runs(study: Study, through: Path) -> None:
    gated, bare = kept(through)
    assert study.config.train.cascade_epochs == 2, "5 of 14 epochs, rounded up"
    assert gated["epochs"] == bare["epochs"] == 3
    assert gated["flops"] == request_flops(study.build(RUNS[0]).config, True, 32)
    assert bare["flops"]["encode"] < gated["flops"]["encode"] and bare["parameters"] < gated["parameters"]
    for row in (gated, bare):
        assert all(0 <= row["ndcg10"][exit] <= 1 and len(row["ranks"][exit]) == 15 for exit in ("dot", "point"))
    assert not study.build(RUNS[1]).config.fields and study.build(RUNS[1]).config.numeric == 0
    assert study.data[False].sequences.users == study.data[True].sequences.users
    assert (study.data[False].split.next_users == study.data[True].split.next_users).all()
    assert {"results.md", "scaling.png"} <= {path.name for path in through.iterdir()}


def test_stopped_study_resumes_in_the_middle_of_a_run(
    study: Study, through: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_epoch = training.train_epoch

    def stop_in(run: str, epoch: int) -> None:
        def stopping(trainer: training.Trainer, folder: Path) -> None:
            if folder.name == run and trainer.epoch + 1 == epoch:
                raise KeyboardInterrupt
            train_epoch(trainer, folder)

        monkeypatch.setattr(training, "train_epoch", stopping)

    for run, finished in ((RUNS[0], 0), (RUNS[1], 1)):
        stop_in(run.name, 3)
        with pytest.raises(KeyboardInterrupt):
            run_study(study, RUNS, tmp_path)
        assert len(kept(tmp_path)) == finished
    monkeypatch.undo()
    capsys.readouterr()
    run_study(study, RUNS, tmp_path)
    assert kept(tmp_path) == kept(through)
    printed = capsys.readouterr().out
    assert "2 runs, 1 of them finished" in printed and "continuing after epoch 2 of 3" in printed
    assert f"an epoch of {RUNS[1].name} took" in printed and "1 runs of 3 epochs take about" in printed


def test_folder_of_other_settings_is_refused(study: Study, through: Path) -> None:
    other = replace(study, config=replace(study.config, train=replace(study.config.train, learning_rate=0.5)))
    with pytest.raises(ValueError, match="other tables, epochs or settings"):
        run_study(other, RUNS, through)


def test_command_runs_the_plan(
    toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "plan", lambda base, sizes, histories, seed: [Run(*sizes[0], histories[0], seed)])
    command.main(
        [str(toml), "--out", str(tmp_path), "--sizes", "8x1", "--epochs", "1", "--threads", "1", "--device", "cpu"]
    )
    assert "| 8 x 1 | 32 | yes | yes |" in capsys.readouterr().out, "a quarter of 128 events"
    assert [row["epochs"] for row in read_rows(tmp_path / RESULTS)] == [1]
    for bad in (["--sizes", "8"], ["--histories", "0"], ["--epochs", "0"]):
        with pytest.raises(SystemExit):
            command.main([str(toml), *bad])
