"""What the serving half must never contain, and what its containers must always have (docs/security.md)."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml
from starlette.testclient import TestClient

from slatewise.bundle.loader import load_rankers
from slatewise.main import build_app
from slatewise.settings import Settings
from tests.conftest import DEMO

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "app").rglob("*.py"))
RUN_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch", "code", "runpy"}
CALLS_THAT_RUN = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "app")))
def test_serving_half_runs_no_code_from_data(path: Path) -> None:
    """No pickle in any form, no arrays of objects, no text that is run."""
    tree = ast.parse(path.read_text())
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in CALLS_THAT_RUN, f"line {node.lineno}: {name}"
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert given.get("allow_pickle", "False") == "False", f"line {node.lineno}"
            assert given.get("shell", "False") == "False", f"line {node.lineno}"
            if ast.unparse(node.func) in ("np.load", "numpy.load"):
                assert given.get("allow_pickle") == "False", (
                    f"line {node.lineno}: numpy.load without allow_pickle=False"
                )
    assert not imported & RUN_CODE


def test_keys_are_compared_by_their_digests_only() -> None:
    """No `==` and no `in` between a given and a known key: each takes longer the more of a key is right."""
    for path in (ROOT / "app/slatewise/http").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and "key" in path.stem + ast.unparse(node.left).lower():
                sides = " ".join(map(ast.unparse, [node.left, *node.comparators]))
                assert "digests" not in sides and "known" not in sides, f"{path.name}, line {node.lineno}: {sides}"
    assert "hmac.compare_digest" in (ROOT / "app/slatewise/http/keys.py").read_text()


def test_calls_that_change_versions_are_off_by_default() -> None:
    with TestClient(build_app(Settings(threads=1), load_rankers(DEMO, ("fp32",)))) as client:
        for path in ("/admin", "/admin/", "/admin/rankers", "/admin/rankers/movielens/load"):
            assert client.get(path).status_code == client.post(path, json={}).status_code == 404
        assert "/admin" not in client.get("/openapi.json").text
        assert client.get("/models").status_code == 200


def test_image_runs_as_a_user_without_rights() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    server = lines[next(index for index, line in enumerate(lines) if line.endswith(" AS server")) :]
    user = next(line for line in server if line.startswith("USER "))
    assert int(user.split()[1]) > 0
    after = server[server.index(user) :]
    assert not [line for line in after if line.startswith(("RUN ", "USER root", "USER 0"))]


def test_containers_have_a_read_only_root() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    for name in ("slatewise", "slatewise-2", "push"):
        service: dict[str, Any] = compose["services"][name]
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
    rendered = helm_python.Chart.load(ROOT / "deploy" / "chart").render({}, name="slatewise")
    pod = yaml.safe_load(rendered["slatewise/templates/deployment.yaml"])["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["automountServiceAccountToken"] is False
    (container,) = pod["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


TLS = {"secretName": "slatewise-tls"}


@pytest.mark.parametrize("clients", [False, True])
def test_chart_serves_tls_and_probes_it(clients: bool) -> None:
    values = {
        "tls": TLS | {"clientCertificates": clients},
        "settings": {"drain_seconds": 3.5, "grace_seconds": 12},
        "secrets": {"metrics_key": {"name": "keys", "key": "metrics"}},
        "monitoring": {"serviceMonitor": True},
    }
    rendered = helm_python.Chart.load(ROOT / "deploy" / "chart").render(values, name="slatewise")
    pod = yaml.safe_load(rendered["slatewise/templates/deployment.yaml"])["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["terminationGracePeriodSeconds"] == 8 + 12 + 4
    assert {"name": "tls", "mountPath": "/tls", "readOnly": True} in container["volumeMounts"]
    assert {"name": "tls", "secret": TLS} in pod["volumes"]
    check = ["python", "-I", "-S", "health_check.py"]
    for probe, path in (("startupProbe", "/readyz"), ("readinessProbe", "/readyz"), ("livenessProbe", "/livez")):
        if clients:
            assert container[probe]["exec"]["command"] == check + ["/livez"] * (path == "/livez")
        else:
            assert container[probe]["httpGet"] == {"path": path, "port": "http", "scheme": "HTTPS"}
    data = yaml.safe_load(rendered["slatewise/templates/settings.yaml"])["data"]
    assert data["SLATEWISE_TLS_CERTIFICATE"] == "/tls/tls.crt" and data["SLATEWISE_TLS_KEY"] == "/tls/tls.key"
    assert data.get("SLATEWISE_TLS_CLIENT_CA") == ("/tls/ca.crt" if clients else None)
    (endpoint,) = yaml.safe_load(rendered["slatewise/templates/monitoring.yaml"])["spec"]["endpoints"]
    assert endpoint["scheme"] == "https" and ("cert" in endpoint["tlsConfig"]) is clients
    assert endpoint["authorization"] == {"credentials": {"name": "keys", "key": "metrics"}}
    with pytest.raises(Exception, match=r"tls\.clientCertificates needs tls\.secretName"):
        helm_python.Chart.load(ROOT / "deploy" / "chart").render({"tls": {"clientCertificates": True}}, name="x")


def test_compose_overlay_adds_tls_alone() -> None:
    overlay = yaml.safe_load((ROOT / "deploy" / "compose.tls.yml").read_text())["services"]
    assert overlay["slatewise"]["environment"].keys() == {"SLATEWISE_TLS_CERTIFICATE", "SLATEWISE_TLS_KEY"}
    plain, secure = (
        yaml.safe_load((ROOT / "deploy/prometheus" / name).read_text())
        for name in ("prometheus.yml", "prometheus.tls.yml")
    )
    job = secure["scrape_configs"][0]
    assert (job.pop("scheme"), job.pop("tls_config")) == ("https", {"insecure_skip_verify": True})
    assert secure == plain
