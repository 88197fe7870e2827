"""Processes die by SIGKILL under load: what must go on goes on, what must end ends with a reset, nothing leaks."""

import functools
import json
import os
import secrets
import signal
import subprocess
from collections.abc import Iterator

import pytest

from sidestep.lab.link import violations
from tests.harness.lab import Lab, build_customers, eventually

RATE, KEPT = 200, 20

STREAM = """
import socket, sys
s = socket.create_connection(({target!r}, 7000), timeout=20)
block = ({canary!r} * 4096)[:65536].encode()
print("up", flush=True)
try:
    s.settimeout(0.05)
    while True:
        try: s.send(block)
        except TimeoutError: pass
        try:
            if not s.recv(1 << 20): print("clean end", flush=True); break
        except TimeoutError: pass
except ConnectionError as e:
    print(type(e).__name__, flush=True)
"""


class Customers:
    """The load in pod `client` towards pod `server`; reports are read as they come."""

    def __init__(self, lab: Lab) -> None:
        command = [str(build_customers()), "buy", lab.address("world/server"), "7000", str(RATE), str(KEPT)]
        self.process = lab.popen("world/client", *command, stdout=subprocess.PIPE)

    def report(self) -> dict[str, float]:
        """The next report (two a second)."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the customers ended"
        return dict(json.loads(line))

    def more(self, requests: int) -> dict[str, float]:
        """Reads on until that many more requests were made."""
        start = self.report()["requests"]
        return eventually(
            f"{requests} requests", lambda: report if (report := self.report())["requests"] - start >= requests else {}
        )

    def end(self) -> dict[str, float]:
        """Ends the load, returns the last report."""
        self.process.send_signal(signal.SIGTERM)
        output, _ = self.process.communicate(timeout=30)
        return dict(json.loads(output.strip().splitlines()[-1]))


@pytest.fixture
def customers(mesh: Lab) -> Iterator[Customers]:
    """A load that runs over enrolled pods."""
    mesh.reuse_ports("world/client")
    mesh.enrol("world")
    load = Customers(mesh)
    try:
        load.more(RATE)
        yield load
    finally:
        load.process.kill()
        load.process.communicate()


def pid(lab: Lab, process: str, node: str = "") -> int:
    """The pid of a part of the lab: agent or engine of a node, or control."""
    status = lab.status()
    if not node:
        return int(status["processes"][process]["pid"])
    found = next(item for item in status["nodes"] if item["name"] == node)
    return int(found["processes"][process]["pid"])


def kill(lab: Lab, process: str, node: str = "") -> int:
    """SIGKILL; returns the pid of the successor once there is one."""
    old = pid(lab, process, node)
    os.kill(old, signal.SIGKILL)
    return eventually(f"a new {process}", lambda: (new := pid(lab, process, node)) != old and new)


@pytest.mark.parametrize(("process", "node"), [("agent", "node1"), ("agent", "node2"), ("control", "")])
def test_killing_what_carries_no_traffic_changes_nothing(
    mesh: Lab, customers: Customers, process: str, node: str
) -> None:
    kill(mesh, process, node)
    customers.more(2 * RATE)
    result = customers.end()
    print(result)
    assert result["failed"] == 0, result
    assert result["kept_open"] == KEPT


def test_a_pod_of_a_new_service_account_after_the_control_plane_was_killed(mesh: Lab) -> None:
    """A certificate issued after the restart works with one issued before."""
    from tests.e2e.conftest import pod

    mesh.enrol("world")
    kill(mesh, "control")
    mesh.apply(*pod("late", "node2", [str(build_customers()), "serve", "7000"], 7000))
    try:
        eventually("late is enrolled and ready", lambda: "late" in mesh.enrolled("world") and mesh.ready("world/late"))
        target = mesh.address("world/late")
        program = (
            f"import socket; s = socket.create_connection(({target!r}, 7000), 20); s.sendall(b'x'); print(s.recv(1))"
        )
        with mesh.tap() as tap:
            assert "b'x'" in mesh.exec("world/client", "/usr/bin/python3", "-c", program)
            flows = [
                flow
                for flow in tap.flows(opened_only=True)
                if target in (flow.source.address, flow.destination.address)
            ]
        assert flows
        assert violations(flows) == []
    finally:
        mesh.delete_pod("world/late")


def answers(lab: Lab, program: str) -> bool:
    """Does the program in pod `client` get its answer?"""
    return "b'x'" in lab.exec("world/client", "/usr/bin/python3", "-c", program, check=False)


@pytest.mark.parametrize("node", ["node1", "node2"])
def test_killing_the_engine_five_times(mesh: Lab, node: str) -> None:
    """Streams in the middle end with a reset; no clear text; pods work again, untouched."""
    mesh.enrol("world")
    canary = f"canary-{secrets.token_hex(12)}"
    target = mesh.address("world/server")
    program = STREAM.format(target=target, canary=canary)
    before = {item["metadata"]["name"]: item["metadata"]["uid"] for item in mesh.pods("world")}
    with mesh.tap() as tap:
        for _ in range(5):
            stream = mesh.popen("world/client", "/usr/bin/python3", "-c", program, stdout=subprocess.PIPE)
            try:
                assert stream.stdout is not None
                assert stream.stdout.readline() == "up\n"
                kill(mesh, "engine", node)
                ending = stream.stdout.readline().strip()
            finally:
                stream.kill()
                stream.communicate()

            assert ending in ("ConnectionResetError", "BrokenPipeError"), ending
            check = (
                f"import socket; s = socket.create_connection(({target!r}, 7000), 5); s.sendall(b'x'); print(s.recv(1))"
            )
            eventually("the pods work again", functools.partial(answers, mesh, check))
        pods = {target, mesh.address("world/client")}
        flows = [flow for flow in tap.flows() if {flow.source.address, flow.destination.address} <= pods]
    assert flows
    assert violations(flows, [canary.encode()]) == []
    assert {item["metadata"]["name"]: item["metadata"]["uid"] for item in mesh.pods("world")} == before
