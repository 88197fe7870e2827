"""Processes die by SIGKILL under load: what must go on goes on, what must end ends with a reset, nothing leaks."""

import contextlib
import functools
import json
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from sidestep.lab.link import Flow, Tap, violations
from tests.harness.lab import Lab, build_customers, eventually

RATE, KEPT = 200, 20

# Both ends send and read as fast as they can and say how the connection ended; the server then waits for the next one.
TALK = """
def talk(s):
    import socket
    block = ({canary!r} * 4096)[:65536].encode()
    s.settimeout(0.05)
    got = 0
    while True:
        try: s.send(block)
        except TimeoutError: pass
        try:
            piece = s.recv(1 << 20)
            if not piece: return "clean end"
            if got < 1 << 20 <= got + len(piece): print("flows", flush=True)
            got += len(piece)
        except TimeoutError: pass
def ending(s):
    try: return talk(s)
    except ConnectionError as e: return type(e).__name__
import socket
"""
SERVER = """
listener = socket.create_server(("::", 7200), family=socket.AF_INET6, dualstack_ipv6=True)
print("up", flush=True)
while True:
    with listener.accept()[0] as s: print(ending(s), flush=True)
"""
STREAM = """
with socket.create_connection(({target!r}, 7200), timeout=20) as s: print(ending(s), flush=True)
"""
# New connections all the time, also while the engine is away: each sends the canary and hopes for its echo.
DIALS = """
import json, signal, socket, time
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
count = {{"answered": 0, "failed": 0}}
print("up", flush=True)
while not stop:
    try:
        with socket.create_connection(({target!r}, 7000), timeout=5) as s:
            s.sendall({canary!r}.encode())
            count["answered" if s.recv(1000) else "failed"] += 1
    except OSError: count["failed"] += 1
    time.sleep(0.002)
print(json.dumps(count), flush=True)
"""


class Customers:
    """The load in pod `client` towards another; reports are read as they come."""

    def __init__(self, lab: Lab, target: str = "server") -> None:
        command = [str(build_customers()), "buy", lab.address(f"world/{target}"), "7000", str(RATE), str(KEPT)]
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


@contextlib.contextmanager
def loaded(mesh: Lab, target: str) -> Iterator[Customers]:
    """A load that runs over enrolled pods."""
    mesh.reuse_ports("world/client")
    mesh.enrol("world")
    load = Customers(mesh, target)
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


@pytest.mark.parametrize(
    ("target", "process", "node"),
    [
        ("server", "agent", "node1"),
        ("server", "agent", "node2"),
        ("server", "control", ""),
        ("near", "agent", "node1"),
        ("near", "control", ""),
    ],
)
def test_killing_what_carries_no_traffic_changes_nothing(mesh: Lab, target: str, process: str, node: str) -> None:
    with loaded(mesh, target) as customers:
        engines = [pid(mesh, "engine", each) for each in ("node1", "node2")]
        kill(mesh, process, node)
        customers.more(2 * RATE)
        result = customers.end()
    print(result)
    assert result["failed"] == 0, result
    assert result["kept_open"] == KEPT
    assert [pid(mesh, "engine", each) for each in ("node1", "node2")] == engines
    mesh.release("world")  # the new one acts on what happens now
    mesh.enrol("world")


def test_a_pod_of_a_new_service_account_after_the_control_plane_was_killed(mesh: Lab) -> None:
    """A certificate issued after the restart works with one issued before."""
    from tests.e2e.conftest import pod

    mesh.enrol("world")
    kill(mesh, "control")
    mesh.apply(*pod("late", "node2", [str(build_customers()), "serve", "7000"], 7000)[:2])  # without a Service
    try:
        eventually("late is enrolled and ready", lambda: "late" in mesh.enrolled("world") and mesh.ready("world/late"))
        target = mesh.address("world/late")
        program = (
            f"import socket; s = socket.create_connection(({target!r}, 7000), 20); s.sendall(b'x'); print(s.recv(1))"
        )
        with mesh.tap() as tap:
            # until node1's agent has its stream again, and with it the record, the client is refused
            eventually("the client reaches it", functools.partial(answers, mesh, program))
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


class Talkers:
    """A stream between `client` and `server` in both directions at once, and connections that never stop coming."""

    def __init__(self, lab: Lab, canary: str) -> None:
        self._lab, self._canary = lab, canary
        self.target = lab.address("world/server")
        self._server = self._start("world/server", TALK + SERVER)
        self._dials = self._start("world/client", DIALS)
        assert self.line(self._server) == "up" and self.line(self._dials) == "up"

    def _start(self, pod: str, program: str) -> "subprocess.Popen[str]":
        text = program.format(target=self.target, canary=self._canary)
        return self._lab.popen(pod, "/usr/bin/python3", "-c", text, stdout=subprocess.PIPE)

    @staticmethod
    def line(process: "subprocess.Popen[str]") -> str:
        """Its next line."""
        assert process.stdout is not None
        return process.stdout.readline().strip()

    def ending(self) -> str:
        """How the stream ended for the server."""
        return self.line(self._server)

    def stream(self) -> "subprocess.Popen[str]":
        """A stream of which both ends have read a MiB."""
        client = self._start("world/client", TALK + STREAM)
        assert self.line(client) == "flows" and self.line(self._server) == "flows"
        return client

    def end(self) -> dict[str, int]:
        """No more connections; returns what became of them."""
        self._dials.send_signal(signal.SIGTERM)
        return dict(json.loads(self.line(self._dials)))

    def kill(self) -> None:
        """Nothing of it is left."""
        for process in (self._server, self._dials):
            process.kill()
            process.communicate()


def between(lab: Lab, tap: Tap) -> list[Flow]:
    """What the tap saw between client and server."""
    pods = {lab.address("world/server"), lab.address("world/client")}
    return [flow for flow in tap.flows() if {flow.source.address, flow.destination.address} <= pods]


@pytest.mark.parametrize("node", ["node1", "node2"])
def test_killing_the_engine_five_times(mesh: Lab, node: str) -> None:
    """Streams in the middle end with a reset at both ends; no clear text, though somebody dials all the time; pods work
    again, untouched. How long it took is printed.
    """
    mesh.enrol("world")
    canary = f"canary-{secrets.token_hex(12)}"
    before = {item["metadata"]["name"]: item["metadata"]["uid"] for item in mesh.pods("world")}
    target = mesh.address("world/server")
    check = f"import socket; s = socket.create_connection(({target!r}, 7000), 5); s.sendall(b'x'); print(s.recv(1))"
    took = []
    with mesh.tap() as tap:
        talkers = Talkers(mesh, canary)
        try:
            for _ in range(5):
                stream = talkers.stream()
                victim = pid(mesh, "engine", node)
                killed = time.monotonic()
                try:
                    os.kill(victim, signal.SIGKILL)
                    endings = [talkers.line(stream), talkers.ending()]
                    ended = time.monotonic() - killed
                finally:
                    stream.kill()
                    stream.communicate()
                assert all(ending in ("ConnectionResetError", "BrokenPipeError") for ending in endings), endings
                eventually("the pods work again", functools.partial(answers, mesh, check))
                took.append(f"{ended:.2f}/{time.monotonic() - killed:.2f}")
            counts = talkers.end()
        finally:
            talkers.kill()
        flows = between(mesh, tap)
    print(f"s until both ends knew / until a new connection was answered: {took}; dialled meanwhile: {counts}")
    assert counts["answered"] > 0
    assert flows
    assert violations(flows, [canary.encode()]) == []
    assert {item["metadata"]["name"]: item["metadata"]["uid"] for item in mesh.pods("world")} == before


def test_without_the_mesh_the_talkers_are_seen(plain: Lab) -> None:
    """The control: the same work is found in clear text, and none of it fails."""
    canary = f"canary-{secrets.token_hex(12)}"
    with plain.tap() as tap:
        talkers = Talkers(plain, canary)
        try:
            stream = talkers.stream()
            stream.kill()
            stream.communicate()
            assert talkers.ending()
            counts = talkers.end()
        finally:
            talkers.kill()
        flows = between(plain, tap)
    assert counts["answered"] > 0 and counts["failed"] == 0
    assert {each.kind for each in violations(flows, [canary.encode()])} == {"clear-connection", "canary"}
