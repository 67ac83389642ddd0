"""All settings, read once in `main.py` from `SLATEWISE_*`; from there on they are plain arguments."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from slatewise.store.client import SCHEMES


class Settings(BaseSettings):
    """Each field is the variable `SLATEWISE_<NAME>`; units are in the names."""

    model_config = SettingsConfigDict(env_prefix="SLATEWISE_", frozen=True, extra="ignore", hide_input_in_errors=True)

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65_535, description="Port to listen on.")
    bundles: Path = Field(
        Path("models/bundles"), description="Root folder of the bundles: `<root>/<ranker>/<version>/`."
    )
    variants: str = Field("", description="Comma-separated variants to load, of each ranker those it has; empty: all.")
    redis_url: SecretStr = Field(
        SecretStr(""), description="Store of the meta-embeddings; empty: the ones in the bundle (the embedded store)."
    )
    redis_timeout_ms: float = Field(
        10.0, gt=0, description="Longest wait for a meta-embedding; after it, the default vector."
    )
    embedding_cache_s: float = Field(
        60.0,
        ge=0,
        allow_inf_nan=False,
        description="How long a user's meta-embedding is kept in process; 0: not at all.",
    )
    embedding_cache_users: int = Field(100_000, ge=1, description="Most users whose meta-embedding is kept in process.")
    embedding_max_age_s: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="Age above which a meta-embedding is served as `stale`; 0: never."
    )
    api_keys: SecretStr = Field(
        SecretStr(""), description="Comma-separated keys for `Authorization: Bearer`; empty: no key is asked for."
    )
    threads: int = Field(
        0, ge=0, description="Threads that run the model; 0: as many as the cgroup's CPU quota allows."
    )
    history_cache_mb: float = Field(
        256.0, ge=0, allow_inf_nan=False, description="Bound of the kept history state, in MiB; 0 keeps none."
    )
    history_cache_dtype: Literal["float32", "int8"] = Field(
        "float32",
        description="How histories are kept; `int8` takes about a quarter of the bytes, its bound is in a variant's `invariance`.",
    )
    deadline_ms: float = Field(0.0, ge=0, description="Deadline of requests that bring none; 0: none.")
    max_candidates: int = Field(4096, ge=1, description="Most candidates of one request.")
    max_history: int = Field(
        4096, ge=1, description="Most history events of one request; the ranker reads the newest `history_used`."
    )
    max_body_bytes: int = Field(1_000_000, ge=1, description="Longest request body, also after it is inflated.")
    body_timeout_s: float = Field(10.0, gt=0, description="Longest wait for a request body.")
    drain_seconds: float = Field(
        2.0, ge=0, le=3_600, description="After SIGTERM, how long to serve on while /readyz already says no."
    )
    slow_ms: float = Field(
        250.0,
        ge=0,
        allow_inf_nan=False,
        description="Requests that take as long are logged as `slow`, with their stages; 0: none.",
    )
    capture_file: str = Field(
        "",
        description="File that a sample of the requests is written to, in the format of `warmup.jsonl`; empty: none is.",
    )
    capture_share: float = Field(
        0.01,
        gt=0,
        le=1,
        description="Share of the users whose requests are written, and of the requests without a user.",
    )
    capture_key: SecretStr = Field(
        SecretStr(""), description="Key of the hash that stands for a user's id in that file; needed with it."
    )
    capture_mb: float = Field(
        100.0, gt=0, allow_inf_nan=False, description="Bound of that file and the one before it (`<name>.1`), in MiB."
    )
    max_in_flight: int = Field(
        256, ge=1, description="Requests in flight, above which new ones are refused before their body is read (429)."
    )
    max_outstanding_tokens: int = Field(
        50_000,
        ge=1,
        description="Events and candidates at work, above which answers are the input order (or 503); above half of it the exit gives way.",
    )

    @field_validator("redis_url")
    @classmethod
    def known_scheme(cls, url: SecretStr) -> SecretStr:
        if url.get_secret_value() and not url.get_secret_value().startswith(SCHEMES):
            raise ValueError(f"must start with {', '.join(SCHEMES)}")
        return url

    @model_validator(mode="after")
    def capture_has_a_key(self) -> Self:
        if self.capture_file and not self.capture_key.get_secret_value():
            raise ValueError("capture_file needs a capture_key")
        return self

    def keys(self) -> tuple[str, ...]:
        return listed(self.api_keys.get_secret_value())

    def chosen_variants(self) -> tuple[str, ...]:
        return listed(self.variants)


def listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
