"""Each file of deploy/, checked by a program for its format."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.programs import DEPLOY, HERE, NODE_MODULES, program, run, unpack_kubectl

pytestmark = pytest.mark.external

PROMETHEUS = DEPLOY / "prometheus"
HABITS = (
    *("no-build-and-image", "service-keys-order"),
    *("services-alphabetical-order", "top-level-properties-order"),
)
"""Disabled rules of dclint: about order, and against a name for a built image."""

WORST_EXPOSURE = 1.2
"""systemd's exposure score: 0 for a unit without privileges, 10 for one with all."""

CRDS = {"ServiceMonitor", "PrometheusRule"}


def test_rules_and_configuration_are_prometheus() -> None:
    assert "SUCCESS: 19 rules found" in run("promtool", "check", "rules", PROMETHEUS / "rules.yml")
    checked = run("promtool", "check", "config", PROMETHEUS / "prometheus.yml")
    assert "is valid prometheus config file syntax" in checked


def test_each_alert_fires_when_it_should() -> None:
    cases = HERE / "rules.test.yaml"
    assert "SUCCESS" in run("promtool", "test", "rules", cases)
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    tests = yaml.safe_load(cases.read_text())["tests"]
    fired = {
        case["alertname"]
        for test in tests
        for case in test["alert_rule_test"]
        if case.get("exp_alerts")
    }
    assert fired == alerts


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_compose_reads_its_file(profile: str) -> None:
    file = DEPLOY / "compose.yaml"
    run("docker-compose", "-f", file, "--profile", profile, "config", "-q")
    shown = run("docker-compose", "-f", file, "--profile", profile, "config", "--format", "json")
    services = json.loads(shown)["services"]
    other = {"cpu": "latentd-gpu", "gpu": "latentd"}[profile]
    assert services.keys() == {"latentd", "latentd-gpu", "prometheus", "grafana"} - {other}


def test_compose_has_only_keys_that_there_are() -> None:
    disabled = [each for habit in HABITS for each in ("--disable-rule", habit)]
    run("dclint", DEPLOY / "compose.yaml", "--max-warnings", "0", *disabled)


@pytest.fixture(scope="module")
def kubectl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_kubectl(tmp_path_factory.mktemp("kubectl")) / "kubectl"


@pytest.mark.parametrize("folder", ["base", "overlays/nvidia", "overlays/prometheus-operator"])
def test_kubernetes_accepts_what_is_rendered(kubectl: Path, tmp_path: Path, folder: str) -> None:
    text = run(str(kubectl), "kustomize", DEPLOY / "kubernetes" / folder)
    rendered = tmp_path / "rendered.yaml"
    rendered.write_text(text)
    shown = run("kubernetes-validate", "--strict", rendered).splitlines()
    resources = {each["kind"]: each for each in yaml.safe_load_all(text)}
    known = {
        *("ConfigMap", "NetworkPolicy", "PodDisruptionBudget"),
        *("Secret", "Service", "StatefulSet"),
    }
    assert known <= resources.keys() <= known | CRDS
    assert len([line for line in shown if "passed for resource" in line]) == len(known)
    check_selectors(resources)
    crds = {kind: resources[kind] for kind in CRDS & resources.keys()}
    assert (len(crds) == 2) is (folder == "overlays/prometheus-operator")
    check_crds(crds, tmp_path)


def check_selectors(resources: dict[str, Any]) -> None:
    """All selectors match the server's pods, and no others."""
    specs = {kind: resource["spec"] for kind, resource in resources.items() if "spec" in resource}
    labels = specs["StatefulSet"]["template"]["metadata"]["labels"]
    assert labels == {"app.kubernetes.io/name": "latentd"} == specs["Service"]["selector"]
    assert labels == specs["StatefulSet"]["selector"]["matchLabels"]
    assert labels == specs["PodDisruptionBudget"]["selector"]["matchLabels"]
    assert labels == specs["NetworkPolicy"]["podSelector"]["matchLabels"]
    if "ServiceMonitor" in specs:
        monitored = specs["ServiceMonitor"]["selector"]["matchLabels"]
        assert monitored == resources["Service"]["metadata"]["labels"]
        ports = {port["name"] for port in specs["Service"]["ports"]}
        assert {endpoint["port"] for endpoint in specs["ServiceMonitor"]["endpoints"]} <= ports


def check_crds(crds: dict[str, Any], folder: Path) -> None:
    """Checked against the operator's schemas and types generated from them, which reject unknown
    keys."""
    place = "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1"
    lines = []
    for kind, resource in crds.items():
        lines += [
            f'import {{ {kind}, I{kind} }} from "{place}/{kind}";',
            f"const checked{kind}: I{kind} = {json.dumps(resource)};",
            f"new {kind}(checked{kind}).validate();",
        ]
    compiled = check_types(folder, "crds", "\n".join(lines))
    run("node", compiled)


def check_types(folder: Path, name: str, source: str) -> Path:
    """JavaScript of a TypeScript module. Raises AssertionError for type errors."""
    modules = folder / "node_modules"
    if not modules.exists():
        modules.symlink_to(NODE_MODULES)
    (folder / "package.json").write_text('{"type": "module"}')
    (folder / f"{name}.ts").write_text(source)
    run(
        *("tsc", "--strict", "--skipLibCheck", "--target", "es2022", "--module", "nodenext"),
        *("--outDir", folder / "compiled", "--rootDir", folder, folder / f"{name}.ts"),
    )
    (folder / "compiled" / "package.json").write_text('{"type": "module"}')
    return folder / "compiled" / f"{name}.js"


def test_the_dashboard_has_grafanas_types(tmp_path: Path) -> None:
    types = (HERE / "dashboard.ts").read_text()
    dashboard = (DEPLOY / "grafana" / "latentd.json").read_text()
    check_types(tmp_path, "dashboard", f"{types}\nexport const dashboard: Checked = {dashboard};")
    wrong = dashboard.replace('"fillOpacity"', '"fillOpaqueness"', 1)
    with pytest.raises(AssertionError, match="'\"fillOpaqueness\"' does not exist in type"):
        check_types(tmp_path, "wrong", f"{types}\nexport const dashboard: Checked = {wrong};")


def test_systemd_accepts_the_unit_and_finds_it_confined(tmp_path: Path) -> None:
    unit = DEPLOY / "systemd" / "latentd.service"
    here = tmp_path / "latentd.service"  # the same, for a program that this machine has
    here.write_text(unit.read_text().replace("/opt/latentd/bin/latentd", program("latentd")))
    assert run("systemd-analyze", "verify", here) == ""
    shown = run(
        *("systemd-analyze", "security", "--offline=true", "--no-pager"),
        *(f"--threshold={round(10 * WORST_EXPOSURE)}", here),
    )
    assert f"Overall exposure level for latentd.service: {WORST_EXPOSURE}" in shown
