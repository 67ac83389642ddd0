"""Read the TOML of a ranker: one dataclass for each table.

An unknown table or key is an error. A misspelt name therefore cannot leave a default in place unnoticed. Types and
ranges are checked before any table of events is read.

Called by: every command of this package. Calls: `config_values.py`; `rankers/families.py`, for the config of the
family in `[model]`.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from slatewise.pruning import Prune
from slatewise.schemas import MAX_ID, MOST_ENTRIES
from slatewise_train.config_values import as_toml, checked_table, choice, from_table, moment, nearest, number
from slatewise_train.rankers import families
from slatewise_train.rankers.base import EXITS, RankerConfig

NAME = re.compile(r"\w[\w.-]{0,99}")  # of a ranker: it becomes a folder and a part of URLs
EVENT_COLUMNS = ("user_id", "item_id", "timestamp", "action", "slate_id", "position")
TIME_UNITS = ("s", "ms", "us", "ns", "iso", "row")
MANY = 1_000_000_000


@dataclass(frozen=True)
class Head:
    """One output of the ranker, table `[heads.NAME]`.

    kind: "next" predicts whether the candidate is the user's next item; "label" predicts the column label_NAME of the
    events.
    """

    name: str
    kind: str = choice(MISSING, "next", "label")
    weight: float = number(1.0, least=0, most=1e6)  # the score is the weighted mean of the heads' probabilities


@dataclass(frozen=True)
class DataConfig:
    """The ranker's name, and the tables `[items]`, `[heads.NAME]` and `[split]`: how to read and split the data."""

    name: str
    heads: tuple[Head, ...]
    # [items]: columns of the item table
    title: str = "title"
    categorical: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    numeric: tuple[str, ...] = ()
    # [split]
    history_length: int = number(256, least=1, most=100_000)  # the most events that the ranker reads
    kind: str = choice("leave-one-out", "leave-one-out", "time")
    test_from: float = moment(0.0)  # unix seconds, for the kind "time"
    slate_size: int = number(20, least=1, most=1_000)  # a slate is this many consecutive events of a user
    slate_users: int = number(0, least=0, most=MANY)  # users whose last slate is held out from training
    # other users whose last slate is held out, to validate and to calibrate
    validation_users: int = number(0, least=0, most=MANY)
    # other users whose events are all held out, for `meta/personalization.py`
    held_out_users: int = number(0, least=0, most=MANY)
    max_bad_share: float = number(0.01, least=0, most=1)  # reading fails if a larger share of the rows is unusable
    seed: int = number(0, least=0, most=2**32 - 1)


@dataclass(frozen=True)
class TablesConfig:
    """Tables `[data]` and `[columns]`: the files, and the meaning of their columns."""

    events: str
    items: str | None = None  # None: the items are those of the events
    trained_on: str = ""  # a description of the data, for the manifest
    separator: str | None = None  # of CSV files; None: found from the suffix and the header
    time_unit: str | None = choice(None, *TIME_UNITS)  # of numbers; None: seconds. "row": the order of the rows
    history_actions: tuple[str, ...] = ()  # actions that make history; `*`: all. () is not stated
    columns: dict[str, str] = field(default_factory=dict)  # name of this package -> name in the files


@dataclass(frozen=True)
class ModelConfig:
    """Table `[model]`: a family of rankers, and the sizes of its config that do not follow from the data."""

    family: str = families.DEFAULT_FAMILY
    shape: dict[str, Any] = field(default_factory=dict)

    def sized(self, *, items: int, actions: int, fields: dict[str, int], numeric: int, heads: int) -> RankerConfig:
        """Build the family's config. Raises ValueError for unknown names and for sizes that do not fit each other."""
        kind = families.find(self.family).config
        sizes = {"items": items, "actions": actions, "fields": fields, "numeric": numeric, "heads": heads}
        sizes["personal_heads"] = ()
        return from_table(kind, self.shape, "model", **sizes)


@dataclass(frozen=True)
class TrainConfig:
    """Table `[train]`."""

    epochs: int = number(60, least=1, most=100_000)  # at most
    # the last epochs, which train the exits `point` and `set` too
    cascade_epochs: int = number(20, least=0, most=100_000)
    # validations without a better NDCG@10 after which the last epochs begin; 0: all epochs, and the last weights
    patience: int = number(0, least=0, most=10_000)
    batch_events: int = number(8192, least=1, most=MANY)  # in a batch, padding included
    learning_rate: float = number(0.001, least=1e-8, most=1)
    weight_decay: float = number(0.0, least=0, most=10)
    warmup: float = number(0.05, least=0, most=0.5)  # share of the run in which the learning rate rises
    warmup_steps: int | None = number(None, least=0, most=MANY)  # the same in steps; it replaces the share
    embedding_std: float | None = number(None, least=1e-6, most=10)  # of new embeddings; None: 1 / sqrt(width)
    negatives: int = number(512, least=1, most=1_000_000)  # for the exit `dot`: uniform, shared by a batch
    # sequences of a batch that train the other exits; candidates cost more than events
    cascade_windows: int = number(64, least=1, most=1_000_000)
    cascade_positions: int = number(4, least=1, most=10_000)  # in each of these sequences
    # positions of the cascade: every event of a history equally likely, every doubling of its length, or half of each
    cascade_draw: str = choice("uniform", "uniform", "log", "mixed")
    # at each position: half uniform, half by the softmax of the exit `dot`
    cascade_negatives: int = number(44, least=1, most=100_000)
    # of slates with labels, for the exits `point` and `set`: a list-wise loss beside the binary cross-entropy
    slate_loss: str = choice("bce", "bce", "softmax", "neural_ndcg", "lambda")
    position_bias: bool = False  # a learned logit for each position of a shown slate, left out of the export
    # a chosen item at position r of a shown slate counts r ** power times; 0: once
    propensity_power: float = number(0.0, least=0, most=4)
    # share of items that are replaced by the unknown item, which trains its row
    id_dropout: float = number(0.02, least=0, most=0.9)
    bfloat16: bool | str = choice("auto", "auto", True, False)  # matrix products in bfloat16, see `devices.py`
    validate_every: int = number(5, least=1, most=100_000)  # epochs
    seed: int = number(0, least=0, most=2**32 - 1)


@dataclass(frozen=True)
class MetaConfig:
    """Table `[meta]`: the inner and the outer loop of `meta/limaml.py`."""

    code: int = number(32, least=1, most=4096)  # width of the meta block
    steps: int = number(3, least=1, most=1_000)  # of the inner loop
    support: int = number(20, least=1, most=100_000)  # newest events, which a user is adapted on
    query: int = number(10, least=1, most=100_000)  # events after the support, which the outer loop learns from
    # for each event: half uniform, half by the softmax of the exit `dot`
    negatives: int = number(24, least=1, most=100_000)
    shortest: int = number(5, least=1, most=100_000)  # least number of events before the query
    examples: int = number(50, least=1, most=100_000)  # newest events, which a user's own weights are fitted to
    epochs: int = number(4, least=1, most=100_000)
    batch_users: int = number(32, least=1, most=1_000_000)
    learning_rate: float = number(0.01, least=1e-8, most=1)
    seed: int = number(0, least=0, most=2**32 - 1)


@dataclass(frozen=True)
class PersonalizationConfig:
    """Table `[personalization]`: the experiment of `meta/personalization.py`."""

    held_out_users: int = number(1800, least=1, most=MANY)
    epochs: int = number(24, least=1, most=100_000)  # of the ranker that is trained without them
    cascade_epochs: int = number(8, least=0, most=100_000)


@dataclass(frozen=True)
class ExportConfig:
    """Table `[export]`."""

    default_exit: str | None = choice(None, *EXITS)  # None: the exit with the best held-out results
    # candidates that the exits of a request with `top_n` score, see `slatewise/pruning.py`; None: all
    prune_point: int | None = number(None, least=10, most=MOST_ENTRIES)
    prune_set: int | None = number(None, least=10, most=MOST_ENTRIES)
    explore: bool = False  # also export what requests with `explore` need
    fit_fields: bool = False  # fit the field vectors to unknown items, see `meta/fit_fields.py`

    def __post_init__(self) -> None:
        if self.prune_point is not None and self.prune_set is not None and self.prune_set > self.prune_point:
            raise ValueError(f"[export] prune_set = {self.prune_set}: must be at most prune_point, {self.prune_point}")

    @property
    def prune(self) -> Prune | None:
        if self.prune_point is None and self.prune_set is None:
            return None
        return Prune(point=self.prune_point, set=self.prune_set)


@dataclass(frozen=True)
class DemoConfig:
    """Table `[demo]`: the data that a bundle shows instead of its training data."""

    events: str
    items: str | None = None  # None: the titles are those of [data]
    user_prefix: str = ""


@dataclass(frozen=True)
class Config:
    """All tables of a TOML.

    `stated` has the keys that the TOML gives, as TABLE.KEY: "train.epochs", "model.width", "split.history_length". The
    other values are defaults that may be replaced by values which fit the tables.
    """

    data: DataConfig
    tables: TablesConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = TrainConfig()
    meta: MetaConfig = MetaConfig()
    personalization: PersonalizationConfig = PersonalizationConfig()
    export: ExportConfig = ExportConfig()
    demo: DemoConfig | None = None
    stated: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ItemColumns:
    """Table `[items]`."""

    title: str = "title"
    categorical: tuple[str, ...] = ()
    text: tuple[str, ...] = ()  # columns whose words are values, such as the title
    numeric: tuple[str, ...] = ()


# The tables of a TOML; `heads` and `columns` have names of their own as keys.
TABLES: dict[str, Any] = {
    "data": TablesConfig,
    "columns": None,
    "items": ItemColumns,
    "heads": None,
    "split": DataConfig,
    "model": None,
    "train": TrainConfig,
    "meta": MetaConfig,
    "personalization": PersonalizationConfig,
    "export": ExportConfig,
    "demo": DemoConfig,
}


def read_config(path: Path) -> Config:
    """Read a TOML in UTF-8. Raises OSError for an unreadable file, and ValueError for an invalid config.

    The message of a ValueError has one line: file, table and key, the value found, and the values or names that are
    possible.
    """
    return parse_config(path.read_bytes(), path)


def parse_config(content: bytes, path: Path) -> Config:
    """Read the content of a TOML as `read_config` does. path: for messages."""
    try:
        toml = tomllib.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not a TOML file: {error}") from None
    try:
        return config_of(toml)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def config_of(toml: dict[str, Any]) -> Config:
    """Check a TOML that has been parsed. Raises ValueError."""
    for name in toml.keys() - TABLES.keys() - {"name"}:
        homes = [table for table, kind in TABLES.items() if kind and name in {f.name for f in fields(kind)}]
        if homes:
            raise ValueError(f"{name} = {as_toml(toml[name])}: the key {name} belongs to [{homes[0]}]")
        raise ValueError(f"unknown table or key {name}; {nearest(name, TABLES.keys() | {'name'})}")
    for name in TABLES.keys() & toml.keys():
        if not isinstance(toml[name], dict):
            raise ValueError(f"{name} = {as_toml(toml[name])}: must be a table [{name}]")
    if "data" not in toml:
        raise ValueError('the table [data] is missing; it names the events: events = "events.parquet"')
    return Config(
        data=read_data_config(toml),
        tables=read_tables_config(toml),
        model=read_model_config(toml),
        train=from_table(TrainConfig, toml.get("train", {}), "train"),
        meta=from_table(MetaConfig, toml.get("meta", {}), "meta"),
        personalization=from_table(PersonalizationConfig, toml.get("personalization", {}), "personalization"),
        export=from_table(ExportConfig, toml.get("export", {}), "export"),
        demo=from_table(DemoConfig, toml["demo"], "demo") if "demo" in toml else None,
        stated=frozenset(f"{name}.{key}" for name in TABLES.keys() & toml.keys() for key in toml[name]),
    )


def read_data_config(toml: dict[str, Any]) -> DataConfig:
    """Read the part of the TOML that `data.py` needs. Raises ValueError for a TOML that is not a valid config."""
    name = toml.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(
            ("the key name is missing" if name is None else f"name = {as_toml(name)}")
            + ': the ranker needs a name of letters, digits and _ . - such as name = "shop", at most 100 characters, '
            "the first of them a letter or a digit"
        )
    heads = tuple(
        from_table(Head, table, f"heads.{head}", name=head) for head, table in toml.get("heads", {}).items()
    ) or (Head("next", "next"),)
    for head in heads:
        if not 0 < len(head.name) <= MAX_ID:
            raise ValueError(f"[heads.{as_toml(head.name)}] has no name of 1 to {MAX_ID} characters")
    if not any(head.weight for head in heads):
        raise ValueError("[heads] all weights are 0; one of them must be larger")
    items = from_table(ItemColumns, toml.get("items", {}), "items")
    split = toml.get("split", {})
    config = from_table(DataConfig, split, "split", name=name, heads=heads, **vars(items))
    for key in ("categorical", "text", "numeric"):
        columns = getattr(items, key)
        if twice := {column for column in columns if columns.count(column) > 1}:
            raise ValueError(f"[items] {key} names {min(twice)} more than once")
        if too_long := [column for column in columns if not 0 < len(column) <= MAX_ID]:
            raise ValueError(f"[items] {key} = {as_toml(too_long)}: a name has 1 to {MAX_ID} characters")
    if both := set(items.categorical) & set(items.text):
        raise ValueError(
            f"[items] {min(both)} is in categorical and in text; its words are values, or the whole cell is"
        )
    if config.kind == "time" and "test_from" not in split:
        raise ValueError('[split] kind = "time" needs test_from, for example test_from = 2026-01-31')
    if config.kind != "time" and "test_from" in split:
        raise ValueError('[split] test_from is used with kind = "time" alone; add that line or remove test_from')
    return config


def read_tables_config(toml: dict[str, Any]) -> TablesConfig:
    """Read `[data]` and `[columns]`. Raises ValueError."""
    columns = toml.get("columns", {})
    known = {*EVENT_COLUMNS, *(f"label_{head}" for head in toml.get("heads", {}))}
    for name, column in columns.items():
        if name not in known:
            raise ValueError(f"[columns] has unknown {name}; {nearest(name, known)}")
        if not isinstance(column, str):
            raise ValueError(f"[columns] {name} = {as_toml(column)}: must be text in quotes, a column of your tables")
    config = from_table(TablesConfig, toml["data"], "data", columns=dict(columns))
    for key in ("events", "items"):
        if getattr(config, key) == "":
            raise ValueError(f'[data] {key} = "": must name a file')
    if config.separator is not None and (len(config.separator) != 1 or config.separator in '"\r\n\x00'):
        raise ValueError(f'[data] separator = {as_toml(config.separator)}: must be one character, "\\t" for a tab')
    if config.separator is not None and not config.separator.isascii():
        raise ValueError(f"[data] separator = {as_toml(config.separator)}: must be an ASCII character")
    return config


def read_model_config(toml: dict[str, Any]) -> ModelConfig:
    """Read `[model]`. Raises ValueError for an unknown family, and for unknown names and sizes of the family."""
    shape = dict(toml.get("model", {}))
    family = shape.pop("family", families.DEFAULT_FAMILY)
    if not isinstance(family, str):
        raise ValueError(f"[model] family = {as_toml(family)}: must be text in quotes")
    model = ModelConfig(family, shape)
    checked_table(families.find(family).config, shape, "model", {"items", "actions", "fields", "numeric", "heads"})
    if shape.keys() & {"width", "decoder_blocks"}:  # a width that is chosen later fits the other sizes
        model.sized(items=3, actions=1, fields={}, numeric=0, heads=1)
    return model
