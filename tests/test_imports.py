"""Allowed imports between modules, checked in the source of every module."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAVES = (
    *("server.settings", "server.errors", "server.metrics"),
    *("server.logs", "server.records", "server.telemetry", "server.threads"),
)
VERSION = "server.__version__"

FACTS = ("model.PRETRAINED", "model.WeightDtype")
BELOW_FAMILIES = (
    *(*FACTS, "model.batch", "model.files", "model.shares", "model.state", "model.network"),
    *("model.compiled", "model.kernels", "model.text", "model.weights"),
)
"""What a family's folder may import from outside."""

MAY_IMPORT = {
    "model": (),
    "model.memory": (),
    "model.state": ("model.memory",),
    "model.transfer": ("model.state",),
    "model.shares": (),
    "model.batch": (),
    "model.network": (*FACTS, "model.batch", "model.state", "model.text"),
    "model.compiled": ("model.kernels", "model.state"),
    "model.kernels": (*FACTS, "model.kernels", "model.memory"),
    "model.text": ("model.files", "model.text"),
    "model.weights": ("model.files", "model.kernels", "model.network"),
    "model.decoding": (*BELOW_FAMILIES, "model.decoding"),
    "model.checkpoint": ("model",),
    "model.verify": ("model",),
    "model.expected": ("model",),
    "model.training": ("model",),
    "server": (),
    "server.settings": ("model.PRETRAINED", "model.WeightDtype"),
    "server.errors": (),
    "server.metrics": (),
    "server.logs": (),
    "server.threads": (),
    "server.records": (),
    "server.telemetry": ("server.records",),
    "server.keys": ("model.files",),  # a leaf: the command line writes it, server.api reads it
    "server.sessions": ("model", "server.sessions", *LEAVES),
    "server.engine": ("model", "server.engine", *LEAVES),
    "server.api": (
        *("model", VERSION, "server.api", "server.sessions", "server.engine"),
        *("server.keys", *LEAVES),
    ),
    "server.api.schemas": ("model", "server.api.schemas"),
    "server.generate": ("model", "server.engine", *LEAVES),
    "server.connections": LEAVES,
    "server.listeners": ("model.files", *LEAVES),
    "server.fronts": ("server.fronts", "server.connections", *LEAVES),
    "server.serve": (
        *("model", VERSION, "server.api", "server.sessions", "server.engine"),
        *("server.connections", "server.listeners", "server.fronts", "server.keys", *LEAVES),
    ),
    "server.cli": ("server.cli", "model.files"),
    "server.cli.client": ("server.api.schemas",),
    "server.cli.dialogue": ("server.cli", "server.api.schemas"),
    "server.cli.keys": ("server.cli", "server.keys", "server.sessions.sqlite.erasing"),
    "server.cli.session": ("server.cli", "model.files", "model.weights", "model.network"),
    "server.cli.tables": ("server.api.schemas", "server.keys"),
    "server.cli.inspect": ("model", "server.cli", "server.sessions.codec"),
    "server.__main__": ("model", "server"),
}
"""Allowed imports of each part of the program; the longest matching name counts.

A folder of model/ that is not listed here is a family's.
"""

ONLY_IN = {
    "torch": ("model", "server.engine"),
    "triton": tuple(f"model.{part}.cuda" for part in ("kernels", "heinsen", "rwkv7", "decoding")),
    "numba": tuple(f"model.{part}.cpu" for part in ("kernels", "heinsen", "rwkv7", "decoding")),
    "llvmlite": ("model.kernels.cpu",),
    "llguidance": ("model.decoding.grammar",),
    "fastapi": ("server.api",),
    "starlette": ("server.api",),
    "httpx": ("server.cli.client",),
    "limits": ("server.api.limits",),
    "uvicorn": ("server.connections", "server.fronts.process", "server.serve"),
    "opentelemetry": ("server.telemetry",),
    "redis": ("server.sessions.redis",),
    "valkey": ("server.sessions.redis",),
    "sqlite3": ("server.sessions.sqlite",),
    "tests": (),
    "loadtest": (),
}
"""Where a library may be imported."""


def is_within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path for part in ("model", "server") for path in (ROOT / part).rglob("*.py")
}


def imports(module: str, source: str, is_package: bool) -> Iterator[str]:
    """Full names of all that the module imports, also inside of functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")
            above = parents[: len(parents) - node.level + is_package] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imports_of(module: str) -> list[str]:
    path = MODULES[module]
    return list(imports(module, path.read_text(), path.stem == "__init__"))


def family_of(module: str) -> str | None:
    """The family's folder that a module stands in, if it stands in one."""
    folder = MODULES[module].relative_to(ROOT).parts[:-1][:2]
    name = ".".join(folder)
    return name if folder[0] == "model" and folder[1:] and name not in MAY_IMPORT else None


def is_allowed(module: str, imported: str) -> bool:
    """Whether the rules allow it."""
    part = max((part for part in MAY_IMPORT if is_within(module, part)), key=len)
    family = family_of(module)
    may_import = (*BELOW_FAMILIES, family) if family else MAY_IMPORT[part]
    return any(is_within(imported, allowed) for allowed in may_import)


def test_the_reader_finds_every_kind_of_import() -> None:
    source = """
import a.b, c as d
from . import e
from .f import g
from ..h.i import j
from k import l
def late():
    if True:
        import m
        from .. import n
"""
    found = ["a.b", "c", "p.q.e", "p.q.f.g", "p.h.i.j", "k.l", "m", "p.n"]
    assert list(imports("p.q.r", source, False)) == found
    assert list(imports("p.q", "from . import e\nfrom .. import n", True)) == ["p.q.e", "p.n"]
    assert {"model.state", "server.engine.engine", "server", "server.__main__"} <= set(MODULES)


@pytest.mark.parametrize(
    ("module", "imported", "allowed"),
    [
        ("model.network", "server.errors.NotFound", False),
        ("model.network", "model.state.StatePool", True),
        ("model.network", "model.heinsen.network.LanguageModel", False),
        ("model.state", "model.network.Network", False),
        ("model.files", "model.state.StatePool", False),
        ("model.kernels.linear", "model.kernels.cpu.products.product", True),
        ("model.kernels.linear", "model.heinsen.config.ModelConfig", False),
        ("model.heinsen.network", "model.kernels.linear.PackedLinear", True),
        ("model.heinsen.network", "model.decoding.decoder.Decoder", False),
        ("model.heinsen.network", "model.checkpoint.Checkpoint", False),
        ("model.decoding.decoder", "model.network.Network", True),
        ("model.decoding.decoder", "model.heinsen.network.LanguageModel", False),
        ("model.checkpoint", "model.heinsen.network.LanguageModel", True),
        ("server.settings", "model.PRETRAINED", True),
        ("server.settings", "model.checkpoint.load", False),
        ("server.errors", "server.settings.Settings", False),
        ("server.sessions.sqlite.store", "server.engine.messages.Parked", False),
        ("server.engine.engine", "server.sessions.codec.Codec", False),
        ("server.engine.engine", "server.api.generation.turn.AdmittedTurn", False),
        ("server.sessions.ledger", "server.api.generation.turn", False),
        ("server.api.generation.turn", "server.sessions.codec.SessionState", True),
        ("server.api.schemas.chat", "server.api.schemas.base.Prompt", True),
        ("server.api.schemas.chat", "server.api.service.Service", False),
        ("server.api.schemas.chat", "server.sessions.store.Entry", False),
        ("server.api.app", "server.serve.serve", False),
        ("server.fronts.front_connection", "server.api.app", False),
        ("server.api.app", "server.fronts.front_connection.App", False),
        ("server.api.app", "server.__version__", True),
        ("server.engine.engine", "server.__version__", False),
        ("server.generate", "server.api.app", False),
        ("server.cli.session", "server.cli.client.Client", True),
        ("server.cli.session", "server.api.sessions.router", False),
        ("server.cli.client", "server.api.schemas.Session", True),
        ("server.cli.client", "server.sessions.codec.Codec", False),
        ("server.cli.inspect", "server.sessions.codec.Codec", True),
        ("server.cli.inspect", "server.engine.engine.Engine", False),
        ("server.api.auth", "server.keys.digest", True),
        ("server.sessions.ledger", "server.keys.digest", False),
        ("server.cli.keys", "server.keys.add_key", True),
        ("server.cli.keys", "server.api.limits.Limiter", False),
        ("server.api.app", "server.cli.client.Client", False),
        ("server.__main__", "server.serve.serve", True),
    ],
)
def test_the_rules_say_what_the_design_says(module: str, imported: str, allowed: bool) -> None:
    assert is_allowed(module, imported) is allowed


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_is_below_it(module: str) -> None:
    ours = [name for name in imports_of(module) if name.split(".")[0] in ("model", "server")]
    assert [name for name in ours if not is_allowed(module, name)] == []


def modules_of(module: str) -> set[str]:
    """The modules of the program that a module imports, or of which it imports a part."""
    found = set[str]()
    for name in imports_of(module):
        parent = name.rpartition(".")[0]
        found |= {known for known in (name, parent) if known in MODULES}
    return found - {module}


ROUTES = {
    module
    for module in MODULES
    if is_within(module, "server.api") and "fastapi.APIRouter" in imports_of(module)
}
"""Modules that answer at paths."""


def layer(module: str) -> str:
    """The layer of server.api that a module belongs to."""
    if module in ROUTES:
        return "routes"
    if module in ("server.api.app", "server.api.openapi"):
        return "app"
    inner = [part for part in ("schemas", "generation") if is_within(module, f"server.api.{part}")]
    return inner[0] if inner else "parts"


MAY_KNOW = {
    "schemas": {"schemas"},
    "parts": {"schemas", "parts"},
    "generation": {"schemas", "parts", "generation"},
    "routes": {"schemas", "parts", "generation"},
    "app": {"schemas", "parts", "generation", "routes", "app"},
}
"""Layers of server.api: imports go from the routes down, and routes do not import each other."""

ROUTER = "server.api.generation.router"
"""Part of the service, imported by every layer but the schemas; it imports no other layer
itself."""


def test_the_routes_are_found() -> None:
    expected = {"chat", "completions", "health", "models", "responses", "resumption", "sessions"}
    assert {f"server.api.{name}" for name in expected | {"tokens", "usage"}} == ROUTES


@pytest.mark.parametrize("module", sorted(m for m in MODULES if is_within(m, "server.api")))
def test_a_request_goes_down_through_the_layers(module: str) -> None:
    known = {name for name in modules_of(module) if is_within(name, "server.api")}
    if module == ROUTER:
        assert not known
    if module == "server.api.service":
        known.remove(ROUTER)
    assert {name for name in known if layer(name) not in MAY_KNOW[layer(module)]} == set()


def test_no_modules_import_each_other_in_a_circle() -> None:
    TopologicalSorter({module: modules_of(module) for module in MODULES}).prepare()


def test_the_families_are_found() -> None:
    assert {family_of(module) for module in MODULES} == {None, "model.heinsen", "model.rwkv7"}


@pytest.mark.parametrize("module", sorted(m for m in MODULES if is_within(m, "server")))
def test_the_server_knows_no_family(module: str) -> None:
    assert not any(family_of(known) for known in modules_of(module))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_library_stays_in_its_place(module: str) -> None:
    for imported in imports_of(module):
        for library, places in ONLY_IN.items():
            if is_within(imported, library):
                assert any(is_within(module, place) for place in places), imported


def test_no_module_is_a_drawer_for_odds_and_ends() -> None:
    names = {part for module in MODULES for part in module.split(".")}
    assert names.isdisjoint({"utils", "util", "helpers", "helper", "common", "misc"})


def test_the_command_line_does_not_import_slow_modules() -> None:
    script = "import sys, server.__main__; print(*sys.modules)"
    shown = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = set(shown.stdout.split())
    assert "server.settings" in loaded
    slow = {
        "torch",
        "numpy",
        "fastapi",
        "uvicorn",
        "tokenizers",
        "safetensors",
        "httpx",
        "llguidance",
    }
    assert loaded.isdisjoint(slow)
