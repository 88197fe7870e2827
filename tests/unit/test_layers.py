"""Who may import whom, read from the source. The lab is one of several places to run in: nothing else knows of it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "agent/sidestep"

# What a package may import of the others; itself is always allowed. `tests` and `examples` may import everything.
ALLOWED = {
    "wire": {"model"},
    "kube": set[str](),
    "node": {"wire", "model", "kube", "log"},
    "engine": {"wire", "model"},
    "control": {"wire", "model", "kube", "log"},
    "lab": {"kube", "model"},
    "cli": {"model", "kube", "node", "lab"},
}
# Modules without I/O: none of these may be imported there, directly.
IO = {"asyncio", "socket", "ssl", "subprocess", "aiohttp", "grpc", "threading", "select", "selectors", "http", "urllib"}
# What makes a process heavy: the engine's host has none of it (design section 4).
HEAVY = {"asyncio", "ssl", "grpc", "aiohttp", "yaml", "cryptography", "pyroute2"}


def imports(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import in a module, relative ones resolved."""
    for found in ast.walk(ast.parse(source)):
        if isinstance(found, ast.Import):
            for name in found.names:
                yield found.lineno, name.name
        elif isinstance(found, ast.ImportFrom):
            base = found.module or ""
            if found.level:
                base = ".".join(
                    part for part in (*package.split(".")[: len(package.split(".")) - found.level + 1], base) if part
                )
            for name in found.names:
                yield found.lineno, f"{base}.{name.name}"


def violations(part: str, source: str, package: str) -> list[str]:
    """Imports of a part that cross into another one."""
    found = []
    for line, name in imports(source, package):
        words = name.split(".")
        if words[0] != "sidestep" or len(words) < 2:
            continue
        other = words[1]
        inner = (PACKAGE / other).is_dir() or (PACKAGE / f"{other}.py").exists()
        if inner and other != part and other not in ALLOWED[part] and other not in ("__init__", "_bpf", "_tunnel"):
            found.append(f"line {line}: {name}")
    return found


def sources(part: str) -> list[Path]:
    found = sorted(path for path in (PACKAGE / part).rglob("*.py") if "pb" not in path.relative_to(PACKAGE).parts)
    assert found, part
    return found


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_imports_go_one_way(part: str) -> None:
    for path in sources(part):
        package = ".".join(path.relative_to(PACKAGE.parent).parent.parts)
        assert violations(part, path.read_text(), package) == [], path


@pytest.mark.parametrize(
    ("source", "bad"),
    [
        ("import sidestep.lab.up", True),
        ("from sidestep.lab import up", True),
        ("from sidestep import lab", True),
        ("def f():\n    from ..lab.cluster import load", True),
        ("from sidestep.control.wiring import serve", True),
        ("from sidestep.kube.client import KubeClient", False),
        ("from . import pods\nfrom .pods import x", False),
        ("from sidestep import __version__, _bpf", False),
    ],
)
def test_the_check_sees_a_crossing(source: str, bad: bool) -> None:
    assert bool(violations("node", source, "sidestep.node")) is bad


@pytest.mark.parametrize("part", ["node", "engine", "control", "wire"])
def test_nothing_knows_the_lab(part: str) -> None:
    for path in sources(part):
        assert not re.search(r"\blab\b", path.read_text(), re.IGNORECASE), path


def test_nothing_knows_the_lab_in_c() -> None:
    for path in [*ROOT.glob("cni/*"), *ROOT.glob("tunnel/*.[ch]"), *ROOT.glob("bpf/*.[ch]")]:
        if path.is_file():
            assert not re.search(r"\blab\b", path.read_text(), re.IGNORECASE), path


def test_the_engines_host_is_light() -> None:
    for path in sources("engine"):
        names = {name.split(".")[0] for _, name in imports(path.read_text(), "sidestep.engine")}
        assert not names & HEAVY, path


def test_wire_does_no_io() -> None:
    for path in sources("wire"):
        names = {name.split(".")[0] for _, name in imports(path.read_text(), "sidestep.wire")}
        assert not names & IO, path


def test_tasks_have_owners() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        for found in ast.walk(ast.parse(path.read_text())):
            if isinstance(found, ast.Attribute) and found.attr in ("create_task", "ensure_future"):
                owner = found.value.id if isinstance(found.value, ast.Name) else ""
                assert owner != "asyncio", f"{path}:{found.lineno}"
