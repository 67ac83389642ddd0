"""Write what is generated from the chart and the settings: python deploy/kubernetes/render.py

    deploy/chart/values.schema.json    the members `settings` and `secrets`, from slatewise/settings.py
    deploy/kubernetes/*.yaml           plain manifests, for clusters without Helm

Run it after a change of the chart, of a setting or of the version. tests/deploy/test_chart.py compares the files.

Called by: the command line and that test. Calls: helm-python-sdk, which needs neither Helm nor a cluster.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import helm_python

from slatewise.settings import Settings

HERE = Path(__file__).parent
CHART = HERE.parent / "chart"
SCHEMA = CHART / "values.schema.json"
OF_THE_CHART = {"host", "port", "bundles"}  # settings that the chart determines
HEADER = "# Rendered from deploy/chart by deploy/kubernetes/render.py. Do not edit.\n"
OF_HELM = ("app.kubernetes.io/managed-by:", "helm.sh/chart:")  # labels that kubectl users do not need
# file -> values, and the templates that it consists of
FILES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "slatewise.yaml": ({}, ("serviceaccount", "settings", "deployment", "service", "pdb")),
    "autoscaling.yaml": ({"autoscaling": {"enabled": True}}, ("autoscaling",)),
    "monitoring.yaml": ({"monitoring": {"serviceMonitor": True, "prometheusRule": True}}, ("monitoring",)),
}


def schema() -> str:
    """Return the schema of the values, with the present settings."""
    content: dict[str, Any] = json.loads(SCHEMA.read_text())
    settings: dict[str, Any] = {}
    secrets: dict[str, Any] = {}
    reference = {
        "type": "object",
        "additionalProperties": False,
        "required": ["name", "key"],
        "properties": {name: {"type": "string", "minLength": 1} for name in ("name", "key")},
    }
    described = Settings.model_json_schema()
    for name, field in described["properties"].items():
        if field.get("format") == "password":
            secrets[name] = reference | {"description": field["description"]}
        elif name not in OF_THE_CHART:
            settings[name] = {k: v for k, v in field.items() if k not in ("default", "title", "format")}
    for member, known in (("settings", settings), ("secrets", secrets)):
        content["properties"][member] = {"type": "object", "additionalProperties": False, "properties": known}
    if definitions := described.get("$defs"):
        content["$defs"] = definitions
    return json.dumps(content, indent=2) + "\n"


def manifests() -> dict[str, str]:
    """Return the plain manifests by file name. Run it after the schema is written."""
    chart = helm_python.Chart.load(CHART)
    files = {}
    for name, (values, templates) in FILES.items():
        rendered = chart.render(values, name="slatewise")
        parts = [rendered[f"slatewise/templates/{template}.yaml"].strip("\n") for template in templates]
        text = "\n---\n".join(part.removeprefix("---\n") for part in parts)
        files[name] = HEADER + "".join(
            f"{line.rstrip()}\n" for line in text.splitlines() if not line.strip().startswith(OF_HELM)
        )
    return files


def main() -> None:
    SCHEMA.write_text(schema())
    for name, text in manifests().items():
        (HERE / name).write_text(text)


if __name__ == "__main__":
    main()
