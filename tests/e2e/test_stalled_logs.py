"""Nobody reads what agent, engine and control plane say: pipes that are full to the brim stop none of them."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import pod
from tests.e2e.test_faults import RATE, Customers
from tests.harness.lab import Lab, eventually

PARTS = {"node1-agent": ("node1", "agent"), "node1-engine": ("node1", "engine"), "control": ("", "control")}


def pid(lab: Lab, part: str) -> int:
    """Who has to die so that the lab starts the part anew: for an engine its supervisor."""
    node, name = PARTS[part]
    status = lab.status()
    found = next(each for each in status["nodes"] if each["name"] == node) if node else status
    process = found["processes"][name]
    return int(process.get("supervisor") or process["pid"])


def renew(lab: Lab, part: str) -> None:
    """Ends a part; the lab starts it with whatever its log is now."""
    old = pid(lab, part)
    os.kill(old, signal.SIGKILL)
    eventually(f"a new {part}", lambda: pid(lab, part) not in (0, old))


def fill(path: Path) -> None:
    """Until not one byte more goes in."""
    end = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    try:
        for block in (b"\n" * 4096, b"\n"):
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(end, block)
    finally:
        os.close(end)


def is_full(path: Path) -> bool:
    end = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    try:
        os.write(end, b"\n" * 4096)
    except BlockingIOError:
        return True
    finally:
        os.close(end)
    return False


def ready(lab: Lab) -> bool:
    return lab.page(15021, "/healthz/ready") == (200, "ready\n")


@pytest.fixture
def stalled(mesh: Lab) -> Iterator[dict[str, Path]]:
    """The logs of the three are pipes that somebody holds open and never reads."""
    mesh.release("world")
    logs = {part: Path(f"/run/sidestep/lab/{mesh.name}/logs/{part}.log") for part in PARTS}
    readers = []
    try:
        for part, log in logs.items():
            log.unlink()
            os.mkfifo(log, 0o600)
            readers.append(os.open(log, os.O_RDONLY | os.O_NONBLOCK))
            renew(mesh, part)
            fill(log)
        eventually("ready", lambda: ready(mesh))
        yield logs
    finally:
        for part, log in logs.items():
            log.unlink()  # the next one has a file again
            renew(mesh, part)
        for reader in readers:
            os.close(reader)
        eventually("ready", lambda: ready(mesh))


def test_full_pipes_behind_every_log_stop_nothing(mesh: Lab, stalled: dict[str, Path]) -> None:
    """Under load: in and out of the mesh, and a new pod of a new account, for which everybody has something to say."""
    lost = {name: mesh.counter(name) for name in
            ("sidestep_agent_log_lines_dropped_total", "sidestep_log_lines_dropped_total")}  # fmt: skip
    mesh.reuse_ports("world/client")
    load = Customers(mesh)
    try:
        load.more(RATE)
        for _ in range(3):
            mesh.enrol("world")
            load.more(RATE)
            mesh.release("world")
        mesh.label("world", "ambient")
        mesh.apply(*pod("quiet", "node1", ["sleep", "infinity"]))
        eventually("a new pod is enrolled", lambda: "quiet" in mesh.enrolled("world"))
        load.more(RATE)
        result = load.end()
    finally:
        load.process.kill()
        load.process.communicate()
        with contextlib.suppress(Exception):
            mesh.delete_pod("world/quiet")
    assert result["failed"] == 0, result
    assert all(is_full(log) for log in stalled.values())
    grown = {name: mesh.counter(name) - before for name, before in lost.items()}
    print(f"lines that nobody read: {grown}")
    assert grown["sidestep_agent_log_lines_dropped_total"] > 10  # they had much to say
    assert grown["sidestep_log_lines_dropped_total"] > 0
