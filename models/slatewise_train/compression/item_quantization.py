"""The item table in fewer bytes, and what that costs: python -m slatewise_train.compression.item_quantization models/bundles/movielens/4 models/movielens.toml

    middle_max     int8 codes about each row's middle (LiRank, arXiv 2402.06859): what a bundle stores
    min_max        uint8 codes above each row's least value: what it is held against
    afm_items      the first principal components of the rows, the mean beside them (AFM, arXiv 2405.18146)

Before: a bundle's `items.npy`. After: `compress.py` writes `items8.npy`; `app/slatewise/inference/item_table.py` takes rows of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from slatewise.inference.item_table import Int8Items, record
from slatewise_train.config import read_config
from slatewise_train.data import load_data


def middle_max(items: np.ndarray) -> np.ndarray:
    """items (rows, d) float32 -> (rows,) of `record(d)`. Codes are made with the scale and middle as they are stored."""
    records = np.zeros(len(items), record(items.shape[1]))
    least = items.min(axis=1).astype(np.float64)
    largest = items.max(axis=1).astype(np.float64)
    if not np.abs(items).max(initial=0.0) < np.finfo(np.float16).max / 2:
        raise ValueError("an item's numbers are beyond float16: tables8 has no codes for them")
    records["middle"] = (128 * largest + 127 * least) / 255
    records["scale"] = np.maximum((largest - least) / 255, np.finfo(np.float16).smallest_subnormal)
    scale, middle = (records[name].astype(np.float64)[:, None] for name in ("scale", "middle"))
    records["codes"] = np.clip(np.rint((items - middle) / scale), -128, 127)
    return records


def min_max(items: np.ndarray) -> np.ndarray:
    """The rows as they come back from as many bytes: uint8 codes, the least value and the scale in float16."""
    least = items.min(axis=1, keepdims=True).astype(np.float16).astype(np.float64)
    scale = (items.max(axis=1, keepdims=True) - least) / 255
    scale = np.maximum(scale, np.finfo(np.float16).smallest_subnormal).astype(np.float16).astype(np.float64)
    return (least + scale * np.clip(np.rint((items - least) / scale), 0, 255)).astype(np.float32)


def afm_items(items: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows, rank), (rank, d), (d,): items are near rows @ directions + mean, and no others of this rank are nearer."""
    mean = items.mean(axis=0)
    _, _, directions = np.linalg.svd(items - mean, full_matrices=False)
    return (items - mean) @ directions[:rank].T, directions[:rank], mean


def table_formats(items: np.ndarray) -> dict[str, tuple[int, Any]]:
    """Bytes of the table, and the table as an engine takes it."""
    rows, d = items.shape
    found: dict[str, tuple[int, Any]] = {"float32": (items.nbytes, items)}
    records = middle_max(items)
    found["int8, middle-max"] = (records.nbytes, Int8Items(records))
    found["int8, min-max"] = (rows * (d + 4), min_max(items))
    for rank in (d * 3 // 4, d // 2, d // 4):
        low, directions, mean = afm_items(items, rank)
        found[f"AFM, rank {rank}"] = (low.nbytes + directions.nbytes + mean.nbytes, low @ directions + mean)
    return found


def main() -> None:
    from slatewise_train.compress import Source
    from slatewise_train.evaluation.offline import difference

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("toml", type=Path, help="of its training")
    parser.add_argument("--users", type=int, help="of leave-one-out; default: all")
    args = parser.parse_args()
    config = read_config(args.toml)
    source = Source(args.bundle, load_data(config.data, config.tables), most_users=args.users)
    print(
        "| item table | KB | relative error | NDCG@10 minus float32's, leave-one-out | of the held-out slates |\n"
        + "| --- " * 5
        + "|"
    )
    for name, (size, table) in table_formats(source.items).items():
        error = np.linalg.norm(table.take(np.arange(len(table)), axis=0) - source.items) / np.linalg.norm(source.items)
        less = difference(
            source.run_cases(source.engine(args.bundle / "variants/fp32", table)),
            source.outcome,
            source.manifest.default_exit,
        )
        cells = (
            f"{v[0]:+.4f} ({v[1]:+.4f} to {v[2]:+.4f})" if v else ""
            for v in map(less.get, ("leave_one_out_ndcg10", "slate_ndcg10"))
        )
        print(f"| {name} | {size / 1024:.0f} | {error:.4f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
