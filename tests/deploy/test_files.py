"""The files of deploy/ agree with the server and with each other."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from server import __version__
from server.serve import LAST_BYTES_S
from server.settings import Settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
FILES = [*(path for path in DEPLOY.rglob("*") if path.is_file()), ROOT / "Dockerfile"]
RULES = DEPLOY / "prometheus" / "rules.yml"


def load(path: str) -> Any:
    return yaml.safe_load((DEPLOY / path).read_text())


def test_the_server_knows_every_variable() -> None:
    written = {
        name.removeprefix("LATENTD_").lower()
        for path in FILES
        for name in re.findall(r"\bLATENTD_[A-Z_]+\b", path.read_text())
    }
    assert {"port", "data_dir", "api_key", "key_file"} <= written
    assert written <= Settings.model_fields.keys()


def grace_times() -> dict[str, int]:
    """Seconds between the signal and the kill."""
    compose = load("compose.yaml")["services"]
    [stateful_set] = [
        each
        for each in yaml.safe_load_all((DEPLOY / "kubernetes/base/server.yaml").read_text())
        if each["kind"] == "StatefulSet"
    ]
    unit = (DEPLOY / "systemd" / "latentd.service").read_text()
    [timeout] = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    return {
        "compose": int(compose["latentd"]["stop_grace_period"].removesuffix("s")),
        "compose, GPU": int(compose["latentd-gpu"]["stop_grace_period"].removesuffix("s")),
        "kubernetes": stateful_set["spec"]["template"]["spec"]["terminationGracePeriodSeconds"],
        "systemd": int(timeout),
    }


def test_nobody_is_killed_while_draining() -> None:
    drain_s = Settings.model_fields["drain_timeout_s"].default + LAST_BYTES_S
    assert {where: time for where, time in grace_times().items() if time < drain_s + 10} == {}


def test_kubernetes_has_the_rules_of_prometheus() -> None:
    groups = load("kubernetes/overlays/prometheus-operator/rules.yaml")["spec"]["groups"]
    assert groups == yaml.safe_load(RULES.read_text())["groups"]


def test_the_runbook_has_a_paragraph_for_each_alert() -> None:
    text = (DEPLOY / "runbook.md").read_text()
    paragraphs = dict(re.findall(r"^## (\w+)\n\n(.+?)(?=\n## |\Z)", text, re.MULTILINE | re.DOTALL))
    alerts = [
        rule
        for group in yaml.safe_load(RULES.read_text())["groups"]
        for rule in group["rules"]
        if "alert" in rule
    ]
    assert paragraphs.keys() == {rule["alert"] for rule in alerts}
    for rule in alerts:
        anchor = f"deploy/runbook.md#{rule['alert'].lower()}"
        assert rule["annotations"]["runbook"] == anchor
        assert rule["labels"]["severity"] in ("page", "ticket")


def test_the_readme_needs_at_most_five_commands_per_path() -> None:
    text = (DEPLOY / "README.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        assert len(re.sub(r"\\\n", "", block).splitlines()) <= 5
        for path in re.findall(r"\bdeploy/[\w./-]+", block):
            assert (ROOT / path).exists() or path == "deploy/.env", path
    for link in re.findall(r"\]\(([^):#]+)", text):
        assert (DEPLOY / link).exists(), link


def test_images_are_of_this_version() -> None:
    tags = {
        tag
        for path in FILES
        for tag in re.findall(r"(?:latentd:|newTag: )([\d.]+)-(?:cpu|cuda)\b", path.read_text())
    }
    assert tags == {__version__}


@pytest.mark.parametrize("name", ["Dockerfile", "deploy/compose.yaml"])
def test_images_of_others_have_exact_tags(name: str) -> None:
    text = (ROOT / name).read_text()
    tags = re.findall(r"(?:ARG BASE=|image: (?!latentd))\S+?:(\S+)", text)
    assert tags
    for tag in tags:
        assert re.match(r"v?\d+\.\d+\.\d+", tag), tag


def test_panels_of_the_dashboard_do_not_overlap() -> None:
    panels = json.loads((DEPLOY / "grafana" / "latentd.json").read_text())["panels"]
    cells = [
        (x, y)
        for position in (panel["gridPos"] for panel in panels)
        for x in range(position["x"], position["x"] + position["w"])
        for y in range(position["y"], position["y"] + position["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)
