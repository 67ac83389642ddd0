"""docker-compose.yml and the Dockerfile: valid by the Compose specification and the real tool, and restricted."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from compose_spec import PyCompose
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from slatewise import VERSION
from slatewise.settings import Settings
from tests.support.network import free_port
from tests.support.redis_binary import redis_binary

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text()
VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")
COMPOSE: dict[str, Any] = yaml.safe_load(VARIABLE.sub(r"\2", TEXT))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
REFRESH_TEXT = (ROOT / "deploy" / "compose" / "refresh.yaml").read_text()
REFRESH: dict[str, Any] = yaml.safe_load(VARIABLE.sub(r"\2", REFRESH_TEXT))
UPDATE_TEXT = (ROOT / "deploy" / "compose" / "update.yaml").read_text()
UPDATE: dict[str, Any] = yaml.safe_load(VARIABLE.sub(r"\2", UPDATE_TEXT))
DOCKERFILE = (ROOT / "Dockerfile").read_text()
HAPROXY = (ROOT / "deploy" / "haproxy" / "haproxy.cfg").read_text()
OURS = {"slatewise", "slatewise-2", "push", "load"}
OF_THE_CONTAINER = {"host", "port", "bundles"}  # settings that the image and the compose file determine
EXAMPLE = (ROOT / ".env.example").read_text()


def test_compose_file_follows_the_specification() -> None:
    known = yaml.safe_dump(COMPOSE).replace("on-failure:10", "on-failure")  # this reader lacks the number of tries
    compose = PyCompose.from_yaml(known)
    compose.validate()
    assert set(compose.service_names()) == SERVICES.keys()


@pytest.fixture(scope="module")
def tool() -> list[str]:
    """The command of Compose: the plugin of Docker, or the older docker-compose."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) and subprocess.run([*command, "version"], capture_output=True).returncode == 0:
            return command
    pytest.skip("needs `docker compose` or docker-compose (apt-get install docker-compose)")


@pytest.mark.parametrize("profiles", [[], ["load"], ["scale"], ["load", "scale"]])
def test_compose_tool_accepts_the_file(tool: list[str], profiles: list[str]) -> None:
    flags = [flag for profile in profiles for flag in ("--profile", profile)]
    found = subprocess.run([*tool, *flags, "config"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    shown = yaml.safe_load(found.stdout)["services"]
    assert [open_port(port) for port in shown["slatewise"]["ports"]] == ["127.0.0.1:8000:8000/tcp"]


@pytest.mark.parametrize("name", ["refresh", "update"])
def test_compose_tool_accepts_the_file_of_a_job(tool: list[str], name: str) -> None:
    files = ["-f", "docker-compose.yml", "-f", f"deploy/compose/{name}.yaml"]
    found = subprocess.run([*tool, *files, "config"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    assert name in yaml.safe_load(found.stdout)["services"]


def open_port(shown: str | dict[str, Any]) -> str:
    """A port in the short form, which docker-compose shows; `docker compose` shows the long form."""
    if isinstance(shown, str):
        return shown
    return "{host_ip}:{published}:{target}/{protocol}".format_map(shown)


def test_setting_in_env_file_reaches_each_replica(tool: list[str], tmp_path: Path) -> None:
    (tmp_path / "docker-compose.yml").write_text(TEXT)
    (tmp_path / ".env").write_text("SLATEWISE_THREADS=3\n")
    command = [*tool, "--profile", "scale", "config"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    services = yaml.safe_load(found.stdout)["services"]
    for name in ("slatewise", "slatewise-2"):
        assert services[name]["environment"]["SLATEWISE_THREADS"] == "3"
        assert services[name]["environment"].get("SLATEWISE_SLOW_MS") is None  # the server's own default


def test_every_setting_passes_from_the_environment() -> None:
    names = {f"SLATEWISE_{name.upper()}" for name in Settings.model_fields if name not in OF_THE_CONTAINER}
    for replica in ("slatewise", "slatewise-2"):
        passed = {name for name in SERVICES[replica]["environment"] if not name.startswith("OTEL_")}
        assert (names - passed, passed - names) == (set(), set())


def test_example_environment_names_every_setting() -> None:
    for name, default in re.findall(r"^#(SLATEWISE_\w+)=(.*)$", EXAMPLE, re.MULTILINE):
        field = name.removeprefix("SLATEWISE_").lower()
        assert Settings.model_validate({field: default}) == Settings()
    named = set(re.findall(r"^#?((?:SLATEWISE|OTEL)_\w+)=", EXAMPLE, re.MULTILINE))
    passed = SERVICES["slatewise"]["environment"].keys()
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" in passed
    assert named == passed | {"SLATEWISE_PORT"}  # the port on the host


def test_example_environment_has_every_variable_and_default() -> None:
    lines = [line for line in EXAMPLE.splitlines() if line and not line.startswith("#")]
    used = dict(VARIABLE.findall(REFRESH_TEXT)) | dict(VARIABLE.findall(UPDATE_TEXT)) | dict(VARIABLE.findall(TEXT))
    settings = {f"SLATEWISE_{name.upper()}" for name in Settings.model_fields} - dict(VARIABLE.findall(TEXT)).keys()
    assert dict(line.split("=", 1) for line in lines) == {k: v for k, v in used.items() if k not in settings}
    for text in (TEXT, REFRESH_TEXT, UPDATE_TEXT):
        assert not re.search(r"(?<!\$)\$(?!\$|\{\w+:-)", text), "every variable has a default"


@pytest.mark.parametrize("name", SERVICES)
def test_service_has_no_privileges(name: str) -> None:
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


@pytest.mark.parametrize("name", sorted(SERVICES.keys() - OURS))
def test_image_is_pinned_to_a_version(name: str) -> None:
    assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+(-[a-z]+)?", SERVICES[name]["image"])


def test_own_image_is_built_once_and_runs_as_numeric_user() -> None:
    """Kubernetes' runAsNonRoot cannot verify the name of a user."""
    assert {SERVICES[name]["image"] for name in OURS} == {f"slatewise:{VERSION}"}
    server, refresh = stage("server"), stage("refresh")
    for text in (server, refresh):
        assert re.search(r"^USER [1-9]\d*$", text, re.MULTILINE)
        assert "ORT_DISABLE_TELEMETRY=1" in text
    assert re.search(r'^HEALTHCHECK .*"-I", "-S", "health_check.py"', server, re.MULTILINE)
    assert b"GET /readyz" in (ROOT / "deploy" / "health_check.py").read_bytes()


def stage(name: str) -> str:
    """The lines of a stage of the Dockerfile; "" is the last one, which is the default."""
    (found,) = (text for text in re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:] if names_stage(text) == name)
    return found


def names_stage(text: str) -> str:
    return text.splitlines()[0].partition(" AS ")[2]


def test_server_image_preloads_the_allocator_that_it_copies() -> None:
    server = stage("server")
    (folder,) = re.findall(r"^COPY --from=allocator /tmp/libjemalloc.so.2 (\S+)$", server, re.MULTILINE)
    assert f"LD_PRELOAD={folder}libjemalloc.so.2" in server
    assert "apt-get install --yes --no-install-recommends libjemalloc2" in stage("allocator")


@pytest.mark.parametrize("name", ["build", "build-refresh"])
def test_images_do_not_depend_on_the_umask(name: str) -> None:
    assert "RUN chmod -R a+rX /srv" in stage(name)


@pytest.mark.parametrize("name", ["slatewise", "slatewise-2", "push", "load"])
def test_bundles_are_mounted_and_not_baked(name: str) -> None:
    assert SERVICES[name]["build"]["target"] == "server"
    assert "./models/bundles:/srv/models/bundles:ro" in SERVICES[name]["volumes"]


def test_push_keeps_vectors_that_a_refresh_published() -> None:
    assert "--if-empty" in SERVICES["push"]["command"]
    assert SERVICES["push"]["restart"].startswith("on-failure:"), "Redis may be away for a while"


def test_health_checks_use_no_proxy() -> None:
    """Docker passes the variables of a proxy to every container. wget obeys them."""
    asked = {name for name, each in SERVICES.items() if "wget" in each.get("healthcheck", {}).get("test", [])}
    assert asked == {"prometheus", "grafana", "haproxy"}
    assert all(SERVICES[name]["environment"]["http_proxy"] == "" for name in asked)


def test_only_services_without_a_profile_start_by_default() -> None:
    assert {name for name, each in SERVICES.items() if "profiles" not in each} == {
        *("slatewise", "push", "redis", "prometheus")
    }


def test_haproxy_checks_replicas_and_repeats_no_writes() -> None:
    assert "option httpchk GET /readyz" in HAPROXY and "default-server check" in HAPROXY
    assert "acl writes path_beg /events /feedback" in HAPROXY and "disable-l7-retry if writes" in HAPROXY
    assert SERVICES["haproxy"]["stop_signal"] == "SIGUSR1"
    assert SERVICES["haproxy"]["environment"]["BALANCE"] == "hdr(X-Balance-Key)"


def test_refresh_reads_the_volume_that_replicas_write() -> None:
    services = REFRESH["services"]
    for name in ("slatewise", "slatewise-2"):
        assert services[name]["volumes"] == ["events:/events"]
        assert services[name]["environment"]["SLATEWISE_EVENTS_DIR"] == "/events"
        assert services[name]["build"]["args"] == {"PACKAGES": "polars"}
    refresh = services["refresh"]
    assert "events:/events:ro" in refresh["volumes"] and refresh["build"]["target"] == "refresh"
    assert refresh["read_only"] and refresh["cap_drop"] == ["ALL"] and refresh["mem_limit"]
    assert "chown 10001 /events" in stage("server"), "a new volume takes this owner"


def test_update_publishes_where_replicas_poll_for_a_canary() -> None:
    services = UPDATE["services"]
    update = services["update"]
    assert update["build"]["target"] == "refresh", "the image with torch"
    assert update["read_only"] and update["cap_drop"] == ["ALL"] and update["mem_limit"]
    assert {"./models/bundles:/srv/models/bundles", "events:/events:ro"} <= set(update["volumes"])
    for name in ("slatewise", "slatewise-2"):
        environment = services[name]["environment"]
        own = {k.removeprefix("SLATEWISE_").lower(): v for k, v in environment.items()}
        settings = Settings(**own)
        assert (settings.reload, settings.reload_canary, settings.reload_canary_s) == ("poll", 0.1, 3600)
        assert services[name]["volumes"] == ["events:/events"]


def test_docker_ignore_lets_every_copied_file_through() -> None:
    allowed = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    copied = re.findall(r"^COPY (?!--from)(\S+)", DOCKERFILE, re.MULTILINE)
    assert sorted(allowed) == sorted(set(copied))
    assert all((ROOT / path).exists() for path in copied)


@pytest.mark.parametrize("name", SERVICES)
def test_lasting_service_is_checked_and_restarted(name: str) -> None:
    service = SERVICES[name]
    if service["restart"] != "unless-stopped":
        assert service["healthcheck"] == {"disable": True}
    else:
        assert name in OURS or "test" in service["healthcheck"]


@pytest.mark.parametrize("name", SERVICES)
def test_mounted_folder_exists(name: str) -> None:
    for volume in SERVICES[name].get("volumes", []):
        source = volume.split(":")[0]
        assert (ROOT / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]


def test_replicas_differ_only_in_the_open_port() -> None:
    first = {key: value for key, value in SERVICES["slatewise"].items() if key != "ports"}
    assert first == {key: value for key, value in SERVICES["slatewise-2"].items() if key != "profiles"}
    assert first["cpus"] == 2 and first["mem_limit"] == "1g"


def test_redis_does_not_evict_and_its_memory_suffices() -> None:
    command = " ".join(SERVICES["redis"]["command"])
    assert "--maxmemory-policy noeviction" in command
    assert int(re.findall(r"--maxmemory (\d+)mb", command)[0]) < int(SERVICES["redis"]["mem_limit"].removesuffix("m"))


def test_redis_keeps_its_data_when_it_is_killed(tmp_path: Path) -> None:
    """Stored histories live there. The real server, with the command of the compose file."""
    service = SERVICES["redis"]
    _, *options = service["command"]
    assert service["volumes"] == ["redis:/data"] and "redis" in COMPOSE["volumes"] and "tmpfs" not in service
    folder = options.index("/data")
    options[folder] = str(tmp_path)
    for expected in (None, b"kept"):
        port = free_port()
        command = [redis_binary(), *options, "--port", str(port), "--bind", "127.0.0.1"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            with redis.Redis(port=port, retry=Retry(ConstantBackoff(0.02), 500)) as client:
                assert client.get("history") == expected
                client.set("history", "kept")
                assert client.config_get("appendfsync") == {"appendfsync": "everysec"}
                wait_until_written(client)
        finally:
            process.kill()
            process.wait()


def wait_until_written(client: redis.Redis) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        info = client.info("persistence")
        if not info["aof_rewrite_in_progress"] and info["aof_buffer_length"] == 0:
            return
        time.sleep(0.02)
    raise AssertionError("the append-only file was not written")


def test_dockerfile_takes_packages_beyond_the_lock() -> None:
    """And the documents name the argument as it is."""
    assert re.search(r'^ARG PACKAGES=""$', DOCKERFILE, re.MULTILINE)
    assert re.search(r"^RUN .*--python /venv/bin/python install \$PACKAGES$", DOCKERFILE, re.MULTILINE)
    for text in (EXAMPLE, (ROOT / "docs/events.md").read_text(), (ROOT / "docs/kubernetes.md").read_text()):
        assert "--build-arg PACKAGES=polars" in text


def test_server_stage_has_no_model() -> None:
    """Only the last stage, which is the default, adds the demo."""
    assert "/demo" not in stage("server")
    assert stage("").splitlines() == ["server", "COPY --from=build /demo /srv/models/bundles"]


@pytest.mark.skipif(not shutil.which("haproxy"), reason="needs haproxy (apt-get install haproxy)")
def test_haproxy_accepts_its_configuration() -> None:
    environment = {
        "LISTEN": "127.0.0.1:1",
        "METRICS": "127.0.0.1:4",
        "BALANCE": SERVICES["haproxy"]["environment"]["BALANCE"],
        "REPLICA_1": "127.0.0.1:2",
        "REPLICA_2": "127.0.0.1:3",
    }
    assert environment.keys() | {"http_proxy"} == SERVICES["haproxy"]["environment"].keys()
    found = subprocess.run(
        ["haproxy", "-c", "-f", "deploy/haproxy/haproxy.cfg"],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert found.returncode == 0, found.stderr
