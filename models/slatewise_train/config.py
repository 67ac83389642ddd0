"""Read the TOML of a ranker: one dataclass for each table.

An unknown name in a table is an error. A misspelt name therefore cannot leave a default in place unnoticed.

Called by: every command of this package. Calls: `rankers/families.py`, for the config of the family in `[model]`.
"""

from __future__ import annotations

import tomllib
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from slatewise_train.rankers import families
from slatewise_train.rankers.base import RankerConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Head:
    """One output of the ranker, table `[heads.NAME]`.

    kind: "next" predicts whether the candidate is the user's next item; "label" predicts the column label_NAME of the
    events.
    """

    name: str
    kind: str  # "next" or "label"
    weight: float  # the score is the weighted sum of the heads' probabilities


@dataclass(frozen=True)
class DataConfig:
    """The ranker's name, and the tables `[items]`, `[heads.NAME]` and `[split]`: how to read and split the data."""

    name: str
    heads: tuple[Head, ...]
    # [items]: columns of the item table
    title: str = "title"
    categorical: tuple[str, ...] = ()
    numeric: tuple[str, ...] = ()
    # [split]
    history_length: int = 256  # the most events that the ranker reads
    kind: str = "leave-one-out"  # or "time"
    test_from: float = 0.0  # unix seconds, for the kind "time"
    slate_size: int = 20  # a slate is this many consecutive events of a user
    slate_users: int = 0  # users whose last slate is held out from training
    validation_users: int = 0  # other users whose last slate is held out, to validate and to calibrate
    held_out_users: int = 0  # other users whose events are all held out, for `meta/personalization.py`
    max_bad_share: float = 0.01  # reading fails if a larger share of the rows is unusable
    seed: int = 0


@dataclass(frozen=True)
class TablesConfig:
    """Table `[data]`: paths of Parquet or CSV files."""

    events: str
    items: str
    trained_on: str = ""  # a description of the data, for the manifest


@dataclass(frozen=True)
class ModelConfig:
    """Table `[model]`: a family of rankers, and the sizes of its config that do not follow from the data."""

    family: str = families.DEFAULT_FAMILY
    shape: dict[str, Any] = field(default_factory=dict)

    def sized(self, *, items: int, actions: int, fields: dict[str, int], numeric: int, heads: int) -> RankerConfig:
        """Build the family's config. Raises ValueError for unknown names and for sizes that do not fit each other."""
        kind = families.find(self.family).config
        sizes = {"items": items, "actions": actions, "fields": fields, "numeric": numeric, "heads": heads}
        return from_table(kind, self.shape, "model", **sizes)


@dataclass(frozen=True)
class TrainConfig:
    """Table `[train]`."""

    epochs: int = 60
    cascade_epochs: int = 20  # the last epochs, which train the exits `point` and `set` too
    batch_events: int = 8192  # in a batch, padding included
    learning_rate: float = 0.001
    weight_decay: float = 0.0
    warmup_steps: int = 200
    negatives: int = 512  # for the exit `dot`: uniform, shared by all positions of a batch
    cascade_windows: int = 64  # sequences of a batch that train the other exits; candidates cost more than events
    cascade_positions: int = 4  # in each of these sequences
    cascade_negatives: int = 44  # at each position: half uniform, half by the softmax of the exit `dot`
    id_dropout: float = 0.02  # share of items that are replaced by the unknown item, which trains its row
    bfloat16: bool = False  # matrix products in bfloat16: a quarter faster on processors that have them
    validate_every: int = 5  # epochs
    seed: int = 0


@dataclass(frozen=True)
class MetaConfig:
    """Table `[meta]`: the inner and the outer loop of `meta/limaml.py`."""

    code: int = 32  # width of the meta block
    steps: int = 3  # of the inner loop
    support: int = 20  # newest events, which a user is adapted on
    query: int = 10  # events after the support, which the outer loop learns from
    negatives: int = 24  # for each event: half uniform, half by the softmax of the exit `dot`
    shortest: int = 5  # least number of events before the query
    epochs: int = 4
    batch_users: int = 32
    learning_rate: float = 0.01
    seed: int = 0


@dataclass(frozen=True)
class PersonalizationConfig:
    """Table `[personalization]`: the experiment of `meta/personalization.py`."""

    held_out_users: int = 1800
    epochs: int = 24  # of the ranker that is trained without them
    cascade_epochs: int = 8


@dataclass(frozen=True)
class ExportConfig:
    """Table `[export]`."""

    default_exit: str | None = None  # None: the exit with the best held-out results


@dataclass(frozen=True)
class DemoConfig:
    """Table `[demo]`: the data that a bundle shows instead of its training data."""

    events: str
    items: str
    user_prefix: str = ""


@dataclass(frozen=True)
class Config:
    """All tables of a TOML."""

    data: DataConfig
    tables: TablesConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = TrainConfig()
    meta: MetaConfig = MetaConfig()
    personalization: PersonalizationConfig = PersonalizationConfig()
    export: ExportConfig = ExportConfig()
    demo: DemoConfig | None = None


def from_table(kind: type[T], table: dict[str, Any], where: str, /, **given: Any) -> T:
    """Build a dataclass from a table of the TOML and other values. Raises ValueError for unknown or missing names."""
    declared = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]  # T is a dataclass
    known = declared.keys() - given.keys()
    if unknown := table.keys() - known:
        raise ValueError(f"[{where}] has unknown {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    required = {name for name in known if declared[name].default is MISSING}
    if missing := required - table.keys():
        raise ValueError(f"[{where}] lacks {', '.join(sorted(missing))}")
    return kind(**given, **table)


def read_config(path: Path) -> Config:
    """Read a TOML. Raises OSError for an unreadable file and ValueError for a TOML that is not a valid config."""
    toml = tomllib.loads(path.read_text())
    shape = dict(toml.get("model", {}))
    config = Config(
        data=read_data_config(toml),
        tables=from_table(TablesConfig, toml.get("data", {}), "data"),
        model=ModelConfig(shape.pop("family", families.DEFAULT_FAMILY), shape),
        train=from_table(TrainConfig, toml.get("train", {}), "train"),
        meta=from_table(MetaConfig, toml.get("meta", {}), "meta"),
        personalization=from_table(PersonalizationConfig, toml.get("personalization", {}), "personalization"),
        export=from_table(ExportConfig, toml.get("export", {}), "export"),
        demo=from_table(DemoConfig, toml["demo"], "demo") if "demo" in toml else None,
    )
    known = {"name", "data", "items", "heads", "split", *(f.name for f in fields(Config))} - {"tables"}
    if unknown := toml.keys() - known:
        raise ValueError(f"unknown tables {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    return config


def read_data_config(toml: dict[str, Any]) -> DataConfig:
    """Read the part of the TOML that `data.py` needs. Raises ValueError for a TOML that is not a valid config."""
    if missing := {"name", "heads"} - toml.keys():
        raise ValueError(f"the TOML lacks {' and '.join(sorted(missing))}")
    heads = []
    for name, table in toml["heads"].items():
        head = from_table(Head, table, f"heads.{name}", name=name)
        if head.kind not in ("next", "label"):
            raise ValueError(f"[heads.{name}] kind must be 'next' or 'label', not {head.kind!r}")
        heads.append(Head(name, head.kind, float(head.weight)))
    items = toml.get("items", {})
    if unknown := items.keys() - {"title", "categorical", "numeric"}:
        raise ValueError(f"[items] has unknown {', '.join(sorted(unknown))}; known: categorical, numeric, title")
    config = from_table(
        DataConfig,
        toml.get("split", {}),
        "split",
        name=toml["name"],
        heads=tuple(heads),
        title=items.get("title", DataConfig.title),
        categorical=tuple(items.get("categorical", ())),
        numeric=tuple(items.get("numeric", ())),
    )
    if config.kind not in ("leave-one-out", "time"):
        raise ValueError(f"[split] kind must be 'leave-one-out' or 'time', not {config.kind!r}")
    return config
