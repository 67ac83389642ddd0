"""docker-compose.yml: valid by the Compose specification and by the real tool where there is one, and restricted as it should be."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text()
VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")
COMPOSE: dict[str, Any] = yaml.safe_load(VARIABLE.sub(r"\2", TEXT))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {"slatewise", "slatewise-2", "push", "load"}


def test_it_keeps_to_the_specification() -> None:
    compose = PyCompose.from_yaml(yaml.safe_dump(COMPOSE))
    compose.validate()
    assert set(compose.service_names()) == SERVICES.keys()


@pytest.mark.skipif(not shutil.which("docker-compose"), reason="needs docker-compose (apt-get install docker-compose)")
@pytest.mark.parametrize("profiles", [[], ["load"], ["scale"], ["load", "scale"]])
def test_the_real_tool_takes_it(profiles: list[str]) -> None:
    flags = [flag for profile in profiles for flag in ("--profile", profile)]
    found = subprocess.run(["docker-compose", *flags, "config"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    shown = yaml.safe_load(found.stdout)["services"]
    assert shown["slatewise"]["ports"] == ["127.0.0.1:8000:8000/tcp"]


def test_the_example_environment_has_every_variable_with_its_default() -> None:
    lines = [line for line in (ROOT / ".env.example").read_text().splitlines() if line and not line.startswith("#")]
    assert dict(line.split("=", 1) for line in lines) == dict(VARIABLE.findall(TEXT))
    assert not re.search(r"\$(?!\{\w+:-)", TEXT), "every variable has a default"


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_can_do_no_more_than_it_must(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "mem_limit" in service
    assert "privileged" not in service
    assert all(volume.endswith(":ro") for volume in service.get("volumes", []) if volume.startswith("."))


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_open_on_loopback_only(name: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[name].get("ports", []))


@pytest.mark.parametrize("name", SERVICES.keys() - OURS)
def test_an_image_is_pinned_to_a_version(name: str) -> None:
    assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+(-[a-z]+)?", SERVICES[name]["image"])


def test_our_image_is_built_once_and_runs_as_nobody_in_particular() -> None:
    assert {SERVICES[name]["image"] for name in OURS} == {
        f"slatewise:{yaml.safe_load(re.findall(r'version = (.*)', (ROOT / 'pyproject.toml').read_text())[0])}"
    }
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert re.search(r"^USER (?!root)\w+$", dockerfile, re.MULTILINE)
    assert re.search(r"^HEALTHCHECK .*/readyz", dockerfile, re.MULTILINE)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_that_runs_on_is_checked_and_restarted(name: str) -> None:
    service = SERVICES[name]
    if service["restart"] == "no":
        assert service["healthcheck"] == {"disable": True}
    else:
        assert service["restart"] == "unless-stopped"
        assert name in (*OURS, "haproxy") or "test" in service["healthcheck"]


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_mounted_is_there(name: str) -> None:
    for volume in SERVICES[name].get("volumes", []):
        source = volume.split(":")[0]
        assert (ROOT / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]


def test_replicas_differ_in_nothing_but_the_open_port() -> None:
    first = {key: value for key, value in SERVICES["slatewise"].items() if key != "ports"}
    assert first == {key: value for key, value in SERVICES["slatewise-2"].items() if key != "profiles"}
    assert first["cpus"] == 2 and first["mem_limit"] == "1g"


def test_redis_neither_evicts_nor_pretends_to_persist() -> None:
    command = " ".join(SERVICES["redis"]["command"])
    assert "--maxmemory-policy noeviction" in command
    assert "--save  --appendonly no" in command
    assert int(re.findall(r"--maxmemory (\d+)mb", command)[0]) < int(SERVICES["redis"]["mem_limit"].removesuffix("m"))


@pytest.mark.skipif(not shutil.which("haproxy"), reason="needs haproxy (apt-get install haproxy)")
def test_haproxy_takes_its_configuration() -> None:
    environment = {
        "LISTEN": "127.0.0.1:1",
        "BALANCE": SERVICES["haproxy"]["environment"]["BALANCE"],
        "REPLICA_1": "127.0.0.1:2",
        "REPLICA_2": "127.0.0.1:3",
    }
    assert environment.keys() == SERVICES["haproxy"]["environment"].keys()
    found = subprocess.run(
        ["haproxy", "-c", "-f", "deploy/haproxy/haproxy.cfg"],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert found.returncode == 0, found.stderr
