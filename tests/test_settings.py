"""Settings: documented, read from flags and SLATEWISE_* variables, and secrets never shown."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from slatewise import settings as module
from slatewise.environment import unknown_variables
from slatewise.flags import read_settings
from slatewise.settings import Settings, SettingsError, default_bundles, variable

ROOT = Path(__file__).parent.parent
DOCUMENTS = "\n".join(path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))))
SECRET = "s3cr3t-of-mine"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("SLATEWISE_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_has_a_description(name: str) -> None:
    description = Settings.model_fields[name].description
    assert description
    assert description[0].isupper()
    assert description.endswith(".")


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_in_a_documented_table(name: str) -> None:
    assert re.search(rf"^\|.*\bSLATEWISE_{name.upper()}\b", DOCUMENTS, re.MULTILINE), (
        f"no table in README.md or docs/ has a row for SLATEWISE_{name.upper()}"
    )


def test_documents_name_no_unknown_setting() -> None:
    named = set(re.findall(r"\bSLATEWISE_([A-Z_]*[A-Z])\b", DOCUMENTS))
    assert named <= {name.upper() for name in Settings.model_fields} | {"URL", "API_KEY"}  # of the client


def test_every_default_is_valid() -> None:
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
    "max_queue_ms": ("11", 11.0),
}


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_variable_sets_a_setting_under_its_prefix_only(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    text, value = ENVIRONMENT[name]
    default = getattr(Settings(), name)
    assert value != default
    monkeypatch.setenv(name.upper(), text)
    assert getattr(Settings(), name) == default
    monkeypatch.setenv(f"SLATEWISE_{name.upper()}", text)
    assert getattr(Settings(), name) == value


def test_variables_set_the_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLATEWISE_REDIS_URL", f"rediss://:{SECRET}@store:6379/1")
    monkeypatch.setenv("SLATEWISE_API_KEYS", f" a, {SECRET} ,,b,")
    assert Settings().redis_url.get_secret_value() == f"rediss://:{SECRET}@store:6379/1"
    assert Settings().keys() == ("a", SECRET, "b")


def test_empty_api_keys_are_no_keys() -> None:
    assert Settings(api_keys="").keys() == ()


@pytest.mark.parametrize("keys", [" ", ",", " , "])
def test_api_keys_without_a_key_are_refused(monkeypatch: pytest.MonkeyPatch, keys: str) -> None:
    """Otherwise a mistake in the variable opens the server to everybody."""
    monkeypatch.setenv("SLATEWISE_API_KEYS", keys)
    with pytest.raises(ValidationError, match=r"api_keys\n.*contains no key"):
        Settings()


WRONG = [
    ("port", "-1"),
    ("port", "65536"),
    ("port", "http"),
    ("threads", "-1"),
    ("redis_timeout_ms", "0"),
    ("history_cache_mb", "-1"),
    ("deadline_ms", "-1"),
    ("max_candidates", "0"),
    ("max_history", "0"),
    ("max_body_bytes", "0"),
    ("body_timeout_s", "0"),
    ("max_in_flight", "0"),
    ("max_queue_ms", "0"),
    ("redis_timeout_ms", "nan"),
    ("body_timeout_s", "nan"),
    ("deadline_ms", "nan"),
    ("history_cache_mb", "nan"),
    ("history_cache_mb", "inf"),
    ("embedding_cache_s", "-1"),
    ("embedding_cache_s", "inf"),
    ("embedding_cache_users", "0"),
    ("embedding_max_age_s", "-1"),
    ("embedding_max_age_s", "nan"),
    ("history_cache_dtype", "float16"),
    ("history_cache_dtype", "INT8"),
    ("history_cache_dtype", ""),
]


@pytest.mark.parametrize(("name", "text"), WRONG)
def test_value_out_of_range_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
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
def test_redis_url_of_known_scheme_is_accepted(url: str) -> None:
    assert Settings(redis_url=url).redis_url.get_secret_value() == url


@pytest.mark.parametrize("url", ["h:6379", "http://h:6379", "redis:/h", "//h", " redis://h", "postgres://h"])
def test_redis_url_of_unknown_scheme_is_refused(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("SLATEWISE_REDIS_URL", url)
    with pytest.raises(ValidationError, match=r"must start with redis://"):
        Settings()


def test_secrets_are_hidden_when_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(redis_url=f"redis://:{SECRET}@h/0", api_keys=SECRET)
    assert SECRET not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"


def test_secrets_are_hidden_in_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal is printed to the log."""
    monkeypatch.setenv("SLATEWISE_REDIS_URL", f"reds://:{SECRET}@h/0")
    with pytest.raises(ValidationError) as refused:
        Settings()
    assert SECRET not in str(refused.value)
    with pytest.raises(SettingsError) as explained:
        read_settings({})
    assert SECRET not in str(explained.value)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Settings().port = 1


def test_flag_takes_precedence_over_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLATEWISE_PORT", "1")
    monkeypatch.setenv("SLATEWISE_THREADS", "2")
    settings = read_settings({"port": "3"})
    assert (settings.port, settings.threads, settings.max_history) == (3, 2, 4096)


def test_refusal_names_flag_or_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLATEWISE_THREADS", "-1")
    with pytest.raises(SettingsError) as refused:
        read_settings({"max_body_bytes": "0"})
    assert [line.split(":")[0] for line in str(refused.value).splitlines()] == ["SLATEWISE_THREADS", "--max-body-bytes"]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("SLATEWISE_BUNDELS", "SLATEWISE_BUNDLES"),
        ("SLATEWISE_API_KEY", "SLATEWISE_API_KEYS"),
        ("slatewise_thread", "SLATEWISE_THREADS"),
        ("SLATEWISE_REDIS", "SLATEWISE_REDIS_URL"),
        ("SLATEWISE_", "SLATEWISE_"),
    ],
)
def test_unknown_variable_is_refused_with_the_nearest(monkeypatch: pytest.MonkeyPatch, name: str, nearest: str) -> None:
    monkeypatch.setenv(name, "x")
    with pytest.raises(SettingsError, match=rf"^{name} is not a setting; did you mean {nearest}"):
        read_settings({})


def test_known_variables_are_not_unknown() -> None:
    known = {f"SLATEWISE_{name}".upper(): "1" for name in Settings.model_fields}
    assert unknown_variables(known | {"slatewise_port": "1", "PATH": "x", "MY_SLATEWISE_X": "y"}, NAMES) == []


NAMES = [variable(name) for name in Settings.model_fields]
SERVICE_LINKS = {
    "SLATEWISE_PORT": "tcp://10.0.0.1:8000",
    "SLATEWISE_SERVICE_HOST": "10.0.0.1",
    "SLATEWISE_SERVICE_PORT": "8000",
    "SLATEWISE_SERVICE_PORT_HTTP": "8000",
    "SLATEWISE_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "SLATEWISE_PORT_8000_TCP_PROTO": "tcp",
    "SLATEWISE_PORT_8000_TCP_PORT": "8000",
    "SLATEWISE_PORT_8000_TCP_ADDR": "10.0.0.1",
    "SLATEWISE_PORT_53_UDP_ADDR": "10.0.0.1",
    "SLATEWISE_REDIS_SERVICE_HOST": "10.0.0.2",  # of a Service named slatewise-redis
    "SLATEWISE_REDIS_PORT": "tcp://10.0.0.2:6379",
    "SLATEWISE_REDIS_PORT_6379_TCP_ADDR": "10.0.0.2",
}


def test_kubernetes_service_links_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SERVICE_LINKS.items():
        monkeypatch.setenv(name, value)
    assert read_settings({}).port == 8000
    assert read_settings({"port": "9000"}).port == 9000


def test_variable_like_a_service_link_is_refused() -> None:
    assert len(unknown_variables({"SLATEWISE_REDIS_PORT": "6379"}, NAMES)) == 1
    assert len(unknown_variables({"SLATEWISE_PORT_HTTP": "8000"}, NAMES)) == 1


def test_default_bundles_are_the_checkouts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Wherever the command is run."""
    monkeypatch.chdir(tmp_path)
    assert default_bundles() == ROOT / "models" / "bundles" == Settings().bundles


def test_default_bundles_of_an_installed_package_are_inside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "PACKAGE", tmp_path / "lib" / "site-packages" / "slatewise")
    assert default_bundles() == tmp_path / "lib" / "site-packages" / "slatewise" / "bundles"
