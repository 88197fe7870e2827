"""The command: every part has help, wrong usage says so, and the engine's host stays small."""

import subprocess
import sys

import pytest

from sidestep.__main__ import PARTS

HEAVY = {
    "asyncio",
    "ssl",
    "grpc",
    "aiohttp",
    "google.protobuf",
    "cryptography",
    "yaml",
    "pyroute2",
    "prometheus_client",
}


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "sidestep", *args], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("part", sorted(PARTS))
def test_every_part_has_help(part: str) -> None:
    done = run(part, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage: sidestep" in done.stdout


def test_help_lists_every_part() -> None:
    done = run("--help")
    assert done.returncode == 0
    for part, (_, line) in PARTS.items():
        assert part in done.stdout
        assert line.split()[0] in done.stdout


@pytest.mark.parametrize("args", [[], ["no-such-part"], ["version", "--no-such-option"]])
def test_wrong_usage(args: list[str]) -> None:
    done = run(*args)
    assert done.returncode == 2
    assert "usage:" in done.stderr


def test_the_engine_imports_nothing_of_weight() -> None:
    program = (
        "import sys; from sidestep.__main__ import main\n"
        "try: main(['engine', '--help'])\nexcept SystemExit: pass\n"
        "print('LOADED', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    loaded = set(done.stdout.split("LOADED", 1)[1].split())
    assert "sidestep.engine.host" in loaded
    assert loaded & HEAVY == set()
