"""The settings of the server. Each comes from its flag, its `SLATEWISE_*` variable or its default, in this order.

Called by: main.py, http/app.py; store/client.py and bundle/check.py take constants and the default folder.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from slatewise.environment import PREFIX, is_link_address
from slatewise.logs import Format, Level
from slatewise.schemas import MOST_ENTRIES
from slatewise.security_settings import SecuritySettings

PACKAGE = Path(__file__).parent
REDIS_SCHEMES = (
    "redis://",
    "rediss://",
    "unix://",
    "redis+sentinel://",
    "rediss+sentinel://",
    "redis+cluster://",
    "rediss+cluster://",
)

# Scheme, host (a name, or an IPv6 address in brackets) and port of a web page. Extensions and apps have own schemes.
ORIGIN = re.compile(
    r"(?!http://.*:80$|https://.*:443$)[a-z][a-z0-9+.-]*://"
    r"([a-z0-9_]([a-z0-9._-]*[a-z0-9_])?|\[[0-9a-f:.]+\])(:[1-9]\d{0,4})?"
)


class SettingsError(ValueError):
    """Settings are invalid. The message has one line for each of the `faults`."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


def default_bundles() -> Path:
    """Return `models/bundles` of the source checkout if the package runs from one, else the bundles in the package."""
    checkout = PACKAGE.parents[1] / "models" / "bundles"
    return checkout if checkout.is_dir() else PACKAGE / "bundles"


class Settings(SecuritySettings, BaseSettings):
    """Each field has the variable `SLATEWISE_<NAME>` and the flag `--<name>`. Units are in the names."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore", hide_input_in_errors=True)

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 listens on every interface.")
    port: int = Field(8000, ge=0, le=65_535, description="Port to listen on; 0: any free port.")
    bundles: Path = Field(
        default_factory=default_bundles,
        description="Root folder of the bundles, `<root>/<ranker>/<version>/`; by default the checkout's "
        "`models/bundles`, or the demo inside an installed package.",
    )
    reload: Literal["poll", "admin", "off"] = Field(
        "admin",
        description="How versions change while the server runs. `poll`: it looks for new version folders and switches "
        "to complete ones; `admin`: by calls of `/admin`, which need `admin_key`; `off`: not at all.",
    )
    reload_s: float = Field(
        10.0, gt=0, allow_inf_nan=False, description="Seconds between two looks for new version folders."
    )
    reload_canary: float = Field(
        0.0,
        ge=0,
        le=0.5,
        description="With `reload` = `poll`: the share of the users whom a newer version answers first, as a canary "
        "with the stop rule; 0: it answers all users at once.",
    )
    reload_canary_s: float = Field(
        3600.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds after which a canary of `reload_canary` that was not stopped answers all users; "
        "0: never by itself, a call of `/admin` promotes it.",
    )
    admin_key: SecretStr = Field(
        SecretStr(""),
        description="Key of the calls of `/admin`, at least 16 characters; empty: they are 404. Set it as a variable.",
    )
    space_coverage: float = Field(
        0.9,
        ge=0,
        le=1,
        description="Least users of a new space of meta-embeddings over those of the old one, to serve it.",
    )
    variants: str = Field("", description="Variants to load, separated by commas; empty: all variants of each ranker.")
    redis_url: SecretStr = Field(
        SecretStr(""), description="Redis that stores the meta-embeddings; empty: use the vectors inside the bundle."
    )
    redis_timeout_ms: float = Field(
        10.0, gt=0, description="Timeout of a meta-embedding look-up; after it, the default vector is used."
    )
    embedding_cache_s: float = Field(
        60.0, ge=0, allow_inf_nan=False, description="Time to live of a cached meta-embedding; 0: no cache."
    )
    embedding_cache_users: int = Field(100_000, ge=1, description="Maximum number of cached meta-embeddings.")
    embedding_max_age_s: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="Age above which a meta-embedding is reported as `stale`; 0: never."
    )
    api_keys: SecretStr = Field(
        SecretStr(""),
        description="Keys for `Authorization: Bearer`, separated by commas; empty: no authentication. Set it as a "
        "variable: flags show in the process list.",
    )
    open_pages: bool = Field(
        True,
        description="Whether the pages and `/openapi.json` are open when keys are set; they show no data until a key "
        "is entered. `false`: they need a key, which a browser does not send.",
    )
    cors_origins: str = Field(
        "",
        description="Origins whose web pages may call the server, separated by commas, for example "
        "`https://shop.example`; `*`: all; empty: none.",
    )
    threads: int = Field(
        0, ge=0, description="Threads that run the model; 0: the number of CPUs in the cgroup's quota."
    )
    history_cache_mb: float = Field(
        256.0,
        ge=0,
        allow_inf_nan=False,
        description="Size limit of the cache of encoded histories, in MiB; 0: no cache.",
    )
    history_cache_dtype: Literal["float32", "int8"] = Field(
        "float32",
        description="Number format of cached histories. `int8` takes about a quarter of the memory; the manifest "
        "states its largest score difference (`invariance`).",
    )
    deadline_ms: float = Field(0.0, ge=0, description="Deadline of requests that name no deadline; 0: no deadline.")
    max_candidates: int = Field(4096, ge=1, le=MOST_ENTRIES, description="Maximum number of candidates in a request.")
    max_history: int = Field(
        4096,
        ge=1,
        le=MOST_ENTRIES,
        description="Maximum number of history events in a request; the ranker reads the newest of them.",
    )
    stored_history_events: int = Field(
        512,
        ge=1,
        le=100_000,
        description="Maximum number of events in the stored history of a user; the oldest are trimmed.",
    )
    stored_history_days: float = Field(
        90.0,
        ge=0,
        le=36_500,
        description="Days after the last event at which a stored history is deleted; 0: never.",
    )
    stored_histories_mb: float = Field(
        64.0,
        gt=0,
        allow_inf_nan=False,
        description="Size limit of the stored histories in this process, in MiB, without `redis_url`.",
    )
    max_events: int = Field(1_000, ge=1, description="Maximum number of events in a request.")
    max_events_waiting: int = Field(
        10_000, ge=1, description="Events that wait to be written; above it, new ones get 429."
    )
    encode_on_events: bool = Field(
        False, description="Whether the events of a user start the encoding of the stored history for the next ranking."
    )
    events_dir: str = Field(
        "", description="Folder that new events are appended to as Parquet files, for training; empty: off."
    )
    events_file_s: float = Field(
        300.0, ge=1, allow_inf_nan=False, description="Age of events, in seconds, at which they become a file."
    )
    events_dir_mb: float = Field(
        10_000.0,
        gt=0,
        allow_inf_nan=False,
        description="Size limit of the files in the events folder, in MiB; the oldest are removed.",
    )
    max_body_bytes: int = Field(
        1_000_000, ge=1, description="Maximum size of a request body, before and after decompression."
    )
    body_timeout_s: float = Field(10.0, gt=0, description="Timeout of reading a request body.")
    max_values: int = Field(
        50_000,
        ge=1,
        description="Maximum number of values in a JSON body, enough for 11 columns of 4096 candidates; of lists and "
        "objects, a quarter. 10,000 values take about a millisecond, in which no other request is read.",
    )
    max_connections: int = Field(
        4_096,
        ge=1,
        description="Maximum number of open connections, fewer if the descriptors (`ulimit -n`) are fewer. Above it, "
        "those that wait for a request are closed, of the address that has most of them.",
    )
    max_connections_per_address: int = Field(
        0,
        ge=0,
        description="Maximum number of open connections of one client address; 0: no limit, because behind a balancer "
        "all clients have one address.",
    )
    max_header_bytes: int = Field(
        32_768, ge=256, description="Maximum size of the request line and headers; above it, the answer is 431."
    )
    header_timeout_s: float = Field(
        10.0,
        gt=0,
        allow_inf_nan=False,
        description="Timeout of the headers of a request, and of a new connection that sends none.",
    )
    keep_alive_s: float = Field(
        620.0,
        gt=0,
        allow_inf_nan=False,
        description="Time after which a connection without a request is closed. It must be longer than that of the "
        "balancer in front: 60 s at AWS and nginx, 600 s at Google.",
    )
    write_timeout_s: float = Field(
        30.0, gt=0, allow_inf_nan=False, description="Timeout of a client to take an answer."
    )
    drain_seconds: float = Field(
        2.0, ge=0, le=3_600, description="Time to keep serving after SIGTERM or SIGHUP while /readyz answers 503."
    )
    grace_seconds: float = Field(
        30.0,
        ge=0,
        le=3_600,
        description="Time for requests in flight to end after the drain; then they get 503.",
    )
    slow_ms: float = Field(
        250.0,
        ge=0,
        allow_inf_nan=False,
        description="Requests that take at least this long are logged as `slow`, with their stages; 0: no such log.",
    )
    log_format: Format = Field(
        "text", description="Format of the log on standard error: `text`, or `json` with one object per line."
    )
    log_level: Level = Field(
        "info", description="Lowest level of the log: `debug`, which logs every ranking, `info`, `warning` or `error`."
    )
    capture_file: str = Field(
        "", description="File that a sample of the requests is written to, in the format of `warmup.jsonl`; empty: off."
    )
    capture_share: float = Field(
        0.01, gt=0, le=1, description="Share of users whose requests are captured, and of requests without a user."
    )
    capture_key: SecretStr = Field(
        SecretStr(""),
        validate_default=True,
        description="Key of the hash that replaces user ids in the capture file; required by `capture_file`.",
    )
    capture_mb: float = Field(
        100.0, gt=0, allow_inf_nan=False, description="Size limit of the capture file and of its predecessor, in MiB."
    )
    page: bool = Field(True, description="Serve the page at `/`, with which a person tries the rankers; false: 404.")
    max_in_flight: int = Field(
        256,
        ge=1,
        description="Requests in flight whose bodies have arrived; above it, new ones get 429 before they are parsed.",
    )
    max_queue_ms: float = Field(
        90.0,
        gt=0,
        allow_inf_nan=False,
        description="Longest predicted wait of a request for others, in ms. From 80 percent of it on, cheaper exits "
        "answer; above it, answers keep the input order, or are 503.",
    )

    @field_validator("port", mode="before")
    @classmethod
    def ignore_service_link(cls, port: Any) -> Any:
        """Ignore an address such as tcp://10.0.0.1:8000, which a Kubernetes Service named "slatewise" sets."""
        return 8000 if is_link_address(port) else port

    @field_validator("redis_url")
    @classmethod
    def scheme_is_known(cls, url: SecretStr) -> SecretStr:
        if url.get_secret_value() and not url.get_secret_value().startswith(REDIS_SCHEMES):
            raise ValueError(f"must start with {', '.join(REDIS_SCHEMES)}")
        return url

    @field_validator("api_keys")
    @classmethod
    def some_key_is_listed(cls, keys: SecretStr) -> SecretStr:
        if keys.get_secret_value() and not listed(keys.get_secret_value()):
            raise ValueError("is set but contains no key; name a key, or unset it to serve without authentication")
        return keys

    @field_validator("admin_key")
    @classmethod
    def admin_key_is_not_guessed(cls, key: SecretStr) -> SecretStr:
        if key.get_secret_value() and len(key.get_secret_value()) < 16:
            raise ValueError("has less than 16 characters")
        return key

    @field_validator("cors_origins")
    @classmethod
    def origins_are_as_browsers_send_them(cls, origins: str) -> str:
        """Refuse what no browser sends in the header Origin, because it would match nothing."""
        if not all(origin == "*" or ORIGIN.fullmatch(origin) for origin in listed(origins)):
            raise ValueError(
                "must be * or a list of origins as browsers send them: scheme, host and port in lower case, without a "
                "path, a slash at the end or the default port of http and https"
            )
        if "*" in listed(origins) and len(listed(origins)) > 1:
            raise ValueError("* allows all origins: list it alone")
        return origins

    @field_validator("events_dir")
    @classmethod
    def parquet_can_be_written(cls, folder: str) -> str:
        if folder and importlib.util.find_spec("polars") is None:
            raise ValueError("needs a package for Parquet: pip install 'slatewise[parquet]'")
        return folder

    @field_validator("capture_key")
    @classmethod
    def capture_file_has_a_key(cls, key: SecretStr, info: ValidationInfo) -> SecretStr:
        if info.data.get("capture_file") and not key.get_secret_value():
            raise ValueError("must be set when capture_file is")
        return key

    def versions_may_change(self) -> bool:
        return self.reload == "poll" or bool(self.reload == "admin" and self.admin_key.get_secret_value())

    def origins(self) -> tuple[str, ...]:
        return listed(self.cors_origins)

    def keys(self) -> tuple[str, ...]:
        return listed(self.api_keys.get_secret_value())

    def chosen_variants(self) -> tuple[str, ...]:
        return listed(self.variants)


def listed(text: str) -> tuple[str, ...]:
    """Split a comma-separated text into its non-empty parts."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def variable(name: str) -> str:
    return PREFIX + name.upper()
