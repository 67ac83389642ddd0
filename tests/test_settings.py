"""Settings: documented, read from SLATEWISE_*, and silent about secrets."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from slatewise.settings import Settings

README = Path(__file__).parent.parent / "README.md"
SECRET = "s3cr3t-of-mine"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("SLATEWISE_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_says_what_it_is(name: str) -> None:
    description = Settings.model_fields[name].description
    assert description
    assert description[0].isupper()
    assert description.endswith(".")


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_in_the_readmes_table(name: str) -> None:
    assert re.search(rf"^\|.*\bSLATEWISE_{name.upper()}\b", README.read_text(), re.MULTILINE), (
        f"README.md has no row for SLATEWISE_{name.upper()}"
    )


def test_the_readme_names_no_setting_that_does_not_exist() -> None:
    named = set(re.findall(r"\bSLATEWISE_([A-Z_]*[A-Z])\b", README.read_text()))
    assert named <= {name.upper() for name in Settings.model_fields}


def test_every_setting_has_a_default_that_is_valid() -> None:
    defaults = Settings()
    assert Settings.model_validate(defaults.model_dump()) == defaults
    assert (defaults.history_cache_mb, defaults.max_body_bytes, defaults.deadline_ms) == (256, 1_000_000, 0)
    assert defaults.history_cache_dtype == "float32"
    assert (defaults.redis_url.get_secret_value(), defaults.keys()) == ("", ())


ENVIRONMENT: dict[str, tuple[str, Any]] = {
    "host": ("::1", "::1"),
    "port": ("0", 0),
    "bundles": ("/srv/bundles", Path("/srv/bundles")),
    "redis_timeout_ms": ("2.5", 2.5),
    "embedding_cache_s": ("1.5", 1.5),
    "embedding_cache_users": ("5", 5),
    "embedding_max_age_s": ("6.5", 6.5),
    "threads": ("3", 3),
    "history_cache_mb": ("0.5", 0.5),
    "history_cache_dtype": ("int8", "int8"),
    "deadline_ms": ("50", 50.0),
    "max_candidates": ("7", 7),
    "max_history": ("8", 8),
    "max_body_bytes": ("9", 9),
    "body_timeout_s": ("1.5", 1.5),
    "max_in_flight": ("10", 10),
    "max_outstanding_tokens": ("11", 11),
}


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_the_environment_sets_it_under_its_prefix_only(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    text, value = ENVIRONMENT[name]
    default = getattr(Settings(), name)
    assert value != default
    monkeypatch.setenv(name.upper(), text)
    assert getattr(Settings(), name) == default
    monkeypatch.setenv(f"SLATEWISE_{name.upper()}", text)
    assert getattr(Settings(), name) == value


def test_the_environment_sets_the_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLATEWISE_REDIS_URL", f"rediss://:{SECRET}@store:6379/1")
    monkeypatch.setenv("SLATEWISE_API_KEYS", f" a, {SECRET} ,,b,")
    assert Settings().redis_url.get_secret_value() == f"rediss://:{SECRET}@store:6379/1"
    assert Settings().keys() == ("a", SECRET, "b")


@pytest.mark.parametrize("keys", ["", " ", ",", " , "])
def test_keys_that_are_blank_are_no_keys(keys: str) -> None:
    assert Settings(api_keys=keys).keys() == ()


WRONG = [
    ("port", "-1"), ("port", "65536"), ("port", "http"), ("threads", "-1"), ("redis_timeout_ms", "0"), ("history_cache_mb", "-1"), ("deadline_ms", "-1"),
    ("max_candidates", "0"), ("max_history", "0"), ("max_body_bytes", "0"), ("body_timeout_s", "0"), ("max_in_flight", "0"), ("max_outstanding_tokens", "0"),
    ("redis_timeout_ms", "nan"), ("body_timeout_s", "nan"), ("deadline_ms", "nan"), ("history_cache_mb", "nan"), ("history_cache_mb", "inf"),
    ("embedding_cache_s", "-1"), ("embedding_cache_s", "inf"), ("embedding_cache_users", "0"), ("embedding_max_age_s", "-1"), ("embedding_max_age_s", "nan"),
    ("history_cache_dtype", "float16"), ("history_cache_dtype", "INT8"), ("history_cache_dtype", ""),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text"), WRONG)
def test_a_value_out_of_its_range_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    monkeypatch.setenv(f"SLATEWISE_{name.upper()}", text)
    with pytest.raises(ValidationError, match=name):
        Settings()


@pytest.mark.parametrize(
    "url",
    [
        "redis://h:1/0",
        "rediss://h:1/0",
        "unix:///run/redis.sock",
        "redis+sentinel://h:1,i:2/s/0",
        "rediss+cluster://:p@h:1,i:2",
        "",
    ],
)
def test_a_redis_url_of_a_known_scheme_is_taken(url: str) -> None:
    assert Settings(redis_url=url).redis_url.get_secret_value() == url


@pytest.mark.parametrize("url", ["h:6379", "http://h:6379", "redis:/h", "//h", " redis://h", "postgres://h"])
def test_another_redis_url_is_refused(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("SLATEWISE_REDIS_URL", url)
    with pytest.raises(ValidationError, match=r"must start with redis://"):
        Settings()


def test_no_secret_shows_in_print(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(redis_url=f"redis://:{SECRET}@h/0", api_keys=SECRET)
    assert SECRET not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"


def test_no_secret_shows_in_the_refusal_of_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes to the log of whoever mistyped it."""
    monkeypatch.setenv("SLATEWISE_REDIS_URL", f"reds://:{SECRET}@h/0")
    with pytest.raises(ValidationError) as refused:
        Settings()
    assert SECRET not in str(refused.value)


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        Settings().port = 1
