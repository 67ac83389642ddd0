"""The Helm chart and the plain manifests: rendered by Helm's own library, validated by the schemas of Kubernetes."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml
from prometheus_client import REGISTRY
from pydantic import SecretStr

from slatewise import VERSION, metrics
from slatewise.settings import PREFIX, Settings, variable

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "chart"
KUBERNETES = ROOT / "deploy" / "kubernetes"
UNKNOWN_KINDS = {"ServiceMonitor", "PrometheusRule", "ScaledObject", "HTTPRoute", "BackendTrafficPolicy"}
DEFAULT_KINDS = {"ServiceAccount", "ConfigMap", "Deployment", "Service", "PodDisruptionBudget"}
VERSIONS = ("1.35", kubernetes_validate.latest_version())

spec = importlib.util.spec_from_file_location("render", KUBERNETES / "render.py")
assert spec is not None and spec.loader is not None
render_script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(render_script)

Manifest = dict[str, Any]
SECRET = {"name": "slatewise", "key": "a"}
VOLUME = {"name": "data", "persistentVolumeClaim": {"claimName": "data", "readOnly": True}}
MOUNT = {"name": "data", "mountPath": "/data", "readOnly": True}
ALL: dict[str, Any] = {
    "image": {"repository": "registry.example.com/ranker", "tag": "7", "pullSecrets": ["registry"]},
    "settings": {"deadline_ms": 50, "capture_file": "/data/requests.jsonl", "drain_seconds": 4.5},
    "secrets": {"redis_url": SECRET, "api_keys": SECRET, "capture_key": SECRET},
    "bundles": {
        "volume": {"emptyDir": {"sizeLimit": "2Gi"}},
        "initContainers": [
            {
                "name": "fetch",
                "image": "registry.example.com/bundles:7",
                "command": ["cp", "-r", "/bundle/.", "/bundles"],
                "volumeMounts": [{"name": "tmp", "mountPath": "/scratch"}],
            }
        ],
    },
    "extraEnv": [{"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://collector:4318"}],
    "extraVolumes": [VOLUME],
    "extraVolumeMounts": [MOUNT],
    "podAnnotations": {"example.com/team": "ranking"},
    "podLabels": {"team": "ranking"},
    "nodeSelector": {"pool": "cpu"},
    "tolerations": [{"key": "pool", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}},
    "priorityClassName": "high",
    "serviceAccount": {"annotations": {"a": "b"}},
    "service": {"annotations": {"a": "b"}},
    "autoscaling": {"enabled": True},
    "ingress": {
        "enabled": True,
        "hosts": ["rank.example.com"],
        "tls": [{"hosts": ["rank.example.com"], "secretName": "tls"}],
        "annotations": {"a": "b"},
    },
    "gateway": {"enabled": True, "parentRefs": [{"name": "public"}], "hostnames": ["rank.example.com"]},
    "networkPolicy": {
        "enabled": True,
        "from": [{"namespaceSelector": {"matchLabels": {"team": "shop"}}}],
        "egress": [{"ports": [{"port": 6379, "protocol": "TCP"}, {"port": 53, "protocol": "UDP"}]}],
    },
    "monitoring": {
        "serviceMonitor": True,
        "prometheusRule": True,
        "rulesConfigMap": True,
        "dashboards": True,
        "labels": {"release": "prometheus"},
    },
    "refresh": {"enabled": True, "image": "train:1", "args": ["--full"], "volumes": [VOLUME], "volumeMounts": [MOUNT]},
    "update": {"enabled": True, "image": "train:1", "args": ["--force"], "volumes": [VOLUME], "volumeMounts": [MOUNT]},
}
KEDA = {"keda": {"enabled": True, "prometheus": "http://prometheus:9090"}}


def render(values: dict[str, Any] | None = None, name: str = "slatewise") -> dict[str, Manifest]:
    """The manifests by kind; CronJobs, and ConfigMaps of rules and dashboards, by kind and name."""
    rendered = helm_python.Chart.load(CHART).render(values or {}, name=name, namespace="shop")
    found: dict[str, Manifest] = {}
    for path, text in rendered.items():
        for manifest in () if path.endswith(".txt") else yaml.safe_load_all(text):
            if manifest is not None:
                kind, full_name = manifest["kind"], manifest["metadata"]["name"]
                found[f"{kind} {full_name}" if re.search("-(rules|dashboard|refresh|update)", full_name) else kind] = (
                    manifest
                )
    return found


def validate(manifest: Manifest) -> None:
    for version in VERSIONS:
        kubernetes_validate.validate(manifest, version, strict=True)


def container(manifests: dict[str, Manifest]) -> Manifest:
    found: Manifest = manifests["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    return found


@pytest.mark.parametrize("values", [{}, ALL, KEDA], ids=["default", "all", "keda"])
def test_lint_has_no_message(values: dict[str, Any]) -> None:
    report = helm_python.lint(CHART, values, strict=True)
    assert report == {"total_charts_linted": 1, "messages": [], "errors": []}


def test_default_manifests_are_valid() -> None:
    manifests = render()
    assert manifests.keys() == DEFAULT_KINDS
    for manifest in manifests.values():
        validate(manifest)


@pytest.mark.parametrize("more", [{}, KEDA | {"autoscaling": {"enabled": False}}], ids=["hpa", "keda"])
def test_manifests_with_all_features_are_valid(more: dict[str, Any]) -> None:
    manifests = render(ALL | more, name="a" * 53)
    kinds = {name.split()[0] for name in manifests}
    scaler = "ScaledObject" if more else "HorizontalPodAutoscaler"
    others = {"CronJob", "Ingress", "NetworkPolicy", scaler}
    assert kinds == DEFAULT_KINDS | others | (UNKNOWN_KINDS - {"ScaledObject"})
    for manifest in manifests.values():
        assert len(manifest["metadata"]["name"]) <= 63
        if manifest["kind"] not in UNKNOWN_KINDS:
            validate(manifest)


def test_validation_refuses_a_typo() -> None:
    manifest = render()["Deployment"]
    port = manifest["spec"]["template"]["spec"]["containers"][0]["ports"][0]
    port["containerPortt"] = port.pop("containerPort")
    with pytest.raises(kubernetes_validate.ValidationError, match="containerPort"):
        validate(manifest)


def test_plain_manifests_and_schema_are_those_of_the_chart() -> None:
    """If this fails, run deploy/kubernetes/render.py."""
    assert render_script.SCHEMA.read_text() == render_script.schema()
    written = {path.name: path.read_text() for path in KUBERNETES.glob("*.yaml")}
    assert written == render_script.manifests()
    for text in written.values():
        for manifest in yaml.safe_load_all(text):
            if manifest["kind"] not in UNKNOWN_KINDS:
                validate(manifest)


def test_every_setting_reaches_the_server() -> None:
    """Each setting by its name, either as a value or as a secret. No other variable is set."""
    secret = {n for n, f in Settings.model_fields.items() if f.annotation is SecretStr}
    defaults = Settings.model_construct().model_dump()
    plain = {n: v for n, v in defaults.items() if n not in secret | render_script.OF_THE_CHART}
    plain["max_body_bytes"] = 12_345_678  # Helm reads it as a float
    manifests = render({"settings": plain, "secrets": dict.fromkeys(secret, SECRET)})
    data = manifests["ConfigMap"]["data"]
    variables = data.keys() | {entry["name"] for entry in container(manifests)["env"]}
    assert variables == {variable(name) for name in Settings.model_fields} - {variable("bundles")}
    assert all(isinstance(value, str) for value in data.values())
    read = Settings(**{name.removeprefix(PREFIX).lower(): value for name, value in data.items()})
    assert {name: getattr(read, name) for name in plain} == plain


def test_every_variable_in_the_chart_is_a_setting() -> None:
    known = {variable(name) for name in Settings.model_fields}
    named = set()
    for path in [*CHART.rglob("*.yaml"), *CHART.rglob("*.t*"), *KUBERNETES.glob("*.yaml")]:
        named |= set(re.findall(rf"{PREFIX}[A-Z_]+", path.read_text()))
    assert f"{PREFIX}BUNDLES" in named
    assert named - {PREFIX} <= known


def test_metrics_in_the_chart_exist() -> None:
    assert metrics.QUEUE
    known = {sample.name for family in REGISTRY.collect() for sample in family.samples}
    query = render(KEDA)["ScaledObject"]["spec"]["triggers"][0]["metadata"]["query"]
    named = re.findall(r"slatewise_\w+", query)
    assert named == ["slatewise_queue_seconds", "slatewise_queue_limit_seconds"]
    assert set(named) <= known
    assert 'namespace="shop"' in query


def test_rules_and_dashboards_are_the_files_themselves() -> None:
    manifests = render(ALL)
    rules = (ROOT / "deploy/prometheus/rules.yml").read_text()
    maps = [m for m in manifests.values() if m["kind"] == "ConfigMap"]
    data = {name: text for m in maps for name, text in m["data"].items() if not name.startswith(PREFIX)}
    boards = {f"slatewise-{path.name}": path for path in (ROOT / "deploy/grafana/dashboards").glob("*.json")}
    assert data.keys() == {"rules.yml", *boards}
    assert yaml.safe_load(data["rules.yml"]) == yaml.safe_load(rules) == manifests["PrometheusRule"]["spec"]
    for name, path in boards.items():
        assert json.loads(data[name]) == json.loads(path.read_text())


def test_pod_is_restricted() -> None:
    manifests = render()
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    user = re.search(r"^USER (\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert user is not None and pod["securityContext"]["runAsUser"] == int(user[1])
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    server = container(manifests)
    assert server["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert server["resources"]["requests"] == server["resources"]["limits"]
    assert server["image"] == f"slatewise:{VERSION}"


@pytest.mark.parametrize(("drain", "grace"), [(None, 40), (4.5, 43), (60, 98)])
def test_grace_period_covers_the_drain(drain: float | None, grace: int) -> None:
    settings = {} if drain is None else {"drain_seconds": drain}
    pod = render({"settings": settings})["Deployment"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == grace


def test_changed_setting_restarts_the_pods() -> None:
    one, other = (
        render({"settings": {"slow_ms": ms}})["Deployment"]["spec"]["template"]["metadata"]["annotations"]
        for ms in (1, 2)
    )
    assert one != other


def test_stickiness_hashes_the_user() -> None:
    manifests = render(ALL)
    annotations = manifests["Ingress"]["metadata"]["annotations"]
    assert annotations["nginx.ingress.kubernetes.io/upstream-hash-by"] == "$http_x_user_id"
    balancer = manifests["BackendTrafficPolicy"]["spec"]["loadBalancer"]
    assert balancer["consistentHash"] == {"type": "Header", "header": {"name": "X-User-ID"}}
    off = render(ALL | {"ingress": ALL["ingress"] | {"stickiness": False}})
    assert off["Ingress"]["metadata"]["annotations"] == {"a": "b"}


def test_bundles_of_a_volume_are_served() -> None:
    manifests = render(ALL)
    assert manifests["ConfigMap"]["data"]["SLATEWISE_BUNDLES"] == "/bundles"
    assert {"name": "bundles", "mountPath": "/bundles", "readOnly": True} in container(manifests)["volumeMounts"]
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    assert pod["initContainers"][0]["volumeMounts"][0] == {"name": "bundles", "mountPath": "/bundles"}
    assert pod["initContainers"][0]["securityContext"]["readOnlyRootFilesystem"]
    assert {"name": "bundles", "emptyDir": {"sizeLimit": "2Gi"}} in pod["volumes"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replica": 3}, "replica"),
        ({"replicas": 0}, "replicas"),
        ({"settings": {"dead_line_ms": 5}}, "dead_line_ms"),
        ({"settings": {"deadline_ms": -1}}, "deadline_ms"),
        ({"settings": {"port": 9000}}, "port"),
        ({"settings": {"api_keys": "k"}}, "api_keys"),
        ({"secrets": {"api_keys": "k"}}, "api_keys"),
        ({"secrets": {"threads": SECRET}}, "threads"),
        ({"resources": {"cpu": "two", "memory": "1Gi"}}, "cpu"),
        ({"image": {"tagg": "1"}}, "tagg"),
        ({"autoscaling": {"enabled": True}} | KEDA, "exclude each other"),
        ({"keda": {"enabled": True}}, "keda.prometheus"),
        ({"replicas": 1}, "pdb.minAvailable"),
        ({"autoscaling": {"enabled": True, "minReplicas": 5, "maxReplicas": 3}}, "minReplicas"),
        ({"ingress": {"enabled": True}}, "ingress.hosts"),
        ({"gateway": {"enabled": True}}, "gateway.parentRefs"),
        ({"refresh": {"enabled": True}}, "refresh.image"),
        ({"refresh": {"enabled": True, "image": "a"}}, "secrets.redis_url"),
        ({"update": {"enabled": True}}, "update.image"),
        ({"update": {"enabled": True, "image": "a"}}, "bundles.volume"),
        ({"update": {"interval": 5}}, "interval"),
        ({"settings": {"capture_file": "/x"}}, "capture_key"),
        ({"bundles": {"initContainers": [{"name": "a", "image": "b"}]}}, "bundles.volume"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(helm_python.HelmError, match=re.escape(message)):
        render(values)


UPDATE = {"update": ALL["update"], "bundles": {"volume": {"persistentVolumeClaim": {"claimName": "bundles"}}}}


def test_update_runs_in_the_folder_of_its_training() -> None:
    job = render(UPDATE)["CronJob slatewise-update"]["spec"]
    pod = job["jobTemplate"]["spec"]["template"]["spec"]
    (update,) = pod["containers"]
    command = "python -m slatewise update /training/my-ranker.toml --from /bundles/my-ranker --events /events --force"
    assert [*update["command"], *update["args"]] == command.split()
    assert (job["schedule"], job["concurrencyPolicy"], update["workingDir"]) == ("30 3 * * *", "Forbid", "/training")
    assert update["securityContext"]["readOnlyRootFilesystem"] and MOUNT in update["volumeMounts"]
    assert VOLUME in pod["volumes"]
    assert "CronJob slatewise-update" not in render(), "off by default"


def test_notes_say_how_servers_take_an_update() -> None:
    assert "settings.reload is not poll" in notes_of(UPDATE)
    assert "settings.reload is not poll" not in notes_of(UPDATE | {"settings": {"reload": "poll"}})


def test_a_single_replica_needs_no_budget() -> None:
    manifests = render({"replicas": 1, "pdb": {"enabled": False}})
    assert "PodDisruptionBudget" not in manifests and manifests["Deployment"]["spec"]["replicas"] == 1


def test_notes_warn_of_missing_keys() -> None:
    chart = helm_python.Chart.load(CHART)
    notes = chart.render({}, name="slatewise").get("slatewise/templates/NOTES.txt", "")
    assert "no authentication" in notes
    assert "no authentication" not in chart.render(ALL, name="slatewise")["slatewise/templates/NOTES.txt"]


def notes_of(values: dict[str, Any]) -> str:
    return helm_python.Chart.load(CHART).render(values, name="slatewise").get("slatewise/templates/NOTES.txt", "")


SINGLE = {"replicas": 1, "pdb": {"enabled": False}}
WITH_REDIS = {"secrets": {"redis_url": SECRET}}


@pytest.mark.parametrize(
    ("values", "warned"),
    [
        ({}, True),
        (SINGLE, False),
        (SINGLE | {"autoscaling": {"enabled": True}}, True),
        (SINGLE | KEDA, True),
        (WITH_REDIS, False),
        (WITH_REDIS | KEDA, False),
    ],
)
def test_notes_warn_of_events_kept_by_one_pod(values: dict[str, Any], warned: bool) -> None:
    assert ("kept by one pod only" in notes_of(values)) is warned


@pytest.mark.parametrize("entrance", ["ingress", "gateway"])
def test_notes_warn_of_an_entrance_without_keys(entrance: str) -> None:
    values = {entrance: ALL[entrance]}
    assert f"reaches the {entrance} can send events (POST /events)" in notes_of(values)
    assert "WARNING: everybody" not in notes_of(values | {"secrets": {"api_keys": SECRET}})
    assert "WARNING: everybody" not in notes_of({})


def test_bundles_variable_of_an_image_stands() -> None:
    """The variable of the Dockerfile in the document, which the chart does not replace unless there is a volume."""
    document = (ROOT / "docs" / "kubernetes.md").read_text()
    copied, served = re.findall(r"^  COPY my-bundles (\S+)$|^  ENV SLATEWISE_BUNDLES=(\S+)$", document, re.MULTILINE)
    assert copied[0] == served[1] and not copied[0].startswith("/srv/models/bundles")
    manifests = render({"image": {"repository": "registry.example.com/my-ranker"}})
    assert "SLATEWISE_BUNDLES" not in manifests["ConfigMap"]["data"]
    assert "env" not in container(manifests)


def test_chart_has_the_version_of_the_package() -> None:
    metadata = helm_python.Chart.load(CHART).metadata
    assert metadata["version"] == metadata["appVersion"] == VERSION
