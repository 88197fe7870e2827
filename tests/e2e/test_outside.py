"""Destinations outside the mesh (decision 0011), in a mesh that runs: with acceleration the engine carries the first
connection and the kernel the next ones; when the destination joins the mesh, the next one is mutual TLS.
"""

import secrets
import socket
import subprocess
import threading
from collections.abc import Iterator

import pytest

from sidestep.cli.nodes import find
from sidestep.lab.link import HBONE_PORT, violations
from tests.e2e.conftest import pod
from tests.harness.lab import Lab, build_customers, eventually
from tests.harness.netns import inside

PORT = 7000
DECIDED = "sidestep_capture_packets_total"
# Keeps its connection and says each line that comes back.
TALK = """
import socket, sys
s = socket.create_connection(({target!r}, {port}), 20); f = s.makefile("rb")
for line in sys.stdin:
    s.sendall(line.encode()); print(f.readline().decode(), end="", flush=True)
"""


class Talk:
    """A connection of world/client that stays open."""

    def __init__(self, lab: Lab, target: str) -> None:
        command = ("/usr/bin/python3", "-c", TALK.format(target=target, port=PORT))
        self.process = lab.popen("world/client", *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def say(self, text: str) -> None:
        """It comes back."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{text}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == f"{text}\n"

    def end(self) -> None:
        self.process.communicate("", timeout=30)


def decided(lab: Lab, name: str) -> float:
    """node1's counter of a decision."""
    return lab.counter(DECIDED, "node1", f'decision="{name}"')


@pytest.fixture(params=["node1", "node2"])
def beyond(request: pytest.FixtureRequest, mesh: Lab) -> Iterator[Lab]:
    """The enrolled world, and a server in a namespace that is not in the mesh, on the client's node or the other."""
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "beyond"}}
    try:
        mesh.apply(namespace, *pod("out", request.param, [str(build_customers()), "serve", str(PORT)], PORT, "beyond"))
        mesh.enrol("world")
        eventually("the server is ready", lambda: mesh.ready("beyond/out"))
        eventually("node1 knows it", lambda: protocol(mesh) == "TCP")
        yield mesh
    finally:
        mesh.delete_pod("beyond/out")
        for kind in ("services", "serviceaccounts"):
            mesh.ask(lambda client, kind=kind: client.delete(f"/api/v1/namespaces/beyond/{kind}/out"))  # type: ignore[misc]
        mesh.ask(lambda client: client.delete("/api/v1/namespaces/beyond"))


def protocol(lab: Lab) -> str:
    """What node1's engine holds of the server: TCP, HBONE, or nothing."""
    agent = next(each for each in find(lab.name) if "node1" in each.path.parts)
    found = [each for each in agent.ask("/workloads?containing=beyond") if each["name"] == "out"]
    return str(found[0]["protocol"]) if found else ""


@pytest.mark.parametrize("family", [4, 6])
def test_natively_after_the_first_and_by_tls_once_it_is_in_the_mesh(beyond: Lab, same_node: str, family: int) -> None:
    lab, target = beyond, beyond.address("beyond/out", family)
    words = [f"canary-{secrets.token_hex(12)}" for _ in range(4)]
    here = lab.pod("beyond/out")["spec"]["nodeName"] == "node1"
    talks = []
    try:
        with lab.tap() as tap:
            for number, word in enumerate(words[:2]):
                before = decided(lab, "to_outbound"), decided(lab, "outside_vouched")
                talks.append(Talk(lab, target))
                talks[-1].say(word)
                by_engine, alone = (
                    decided(lab, name) - old
                    for name, old in zip(("to_outbound", "outside_vouched"), before, strict=True)
                )
                if number == 1 and same_node == "native":
                    assert by_engine == 0 and alone > 0
                else:
                    assert by_engine > 0 and alone == 0
            seen = [
                flow
                for flow in tap.flows(opened_only=True)
                if target in (flow.source.address, flow.destination.address)
            ]
        # The control of what is said about the link below: all of this is readable there.
        bad = violations(seen, [word.encode() for word in words])
        assert {each.kind for each in bad} == (set() if here else {"clear-connection", "canary"})
        lab.label("beyond", "ambient")
        eventually("node1 knows that it is in the mesh", lambda: protocol(lab) == "HBONE")
        before = decided(lab, "to_outbound"), decided(lab, "outside_vouched")
        with lab.tap() as tap:
            talks.append(Talk(lab, target))
            talks[-1].say(words[2])
            seen = [
                flow
                for flow in tap.flows(opened_only=True)
                if target in (flow.source.address, flow.destination.address)
            ]
        assert decided(lab, "to_outbound") > before[0] and decided(lab, "outside_vouched") == before[1]
        assert violations(seen, [word.encode() for word in words]) == []
        assert {flow.destination.port for flow in seen if flow.syn} == (set() if here else {HBONE_PORT})
        for each in talks:  # those from before live as long as their ends want
            each.say(words[3])
    finally:
        for each in talks:
            each.end()
        lab.label("beyond", None)


def echo(listener: socket.socket) -> None:
    """One connection, to its end."""
    made, _ = listener.accept()
    with made:
        while text := made.recv(1000):
            made.sendall(text)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("number", [0, 1], ids=["node1", "node2"])
def test_a_process_of_a_node(mesh: Lab, same_node: str, number: int, family: int) -> None:
    """As a pod of the host's network is: it has the node's addresses, and one pod of this kind is known by them, the
    agent's own. Of the client's node or another, the kernel does it alone after the first.
    """
    lab, node = mesh, mesh.status()["nodes"][number]
    lab.enrol("world")
    target = node["ips"][family == 6]
    kind = socket.AF_INET6 if family == 6 else socket.AF_INET
    with inside(node["netns"], lambda: socket.create_server((target, PORT), family=kind)) as listener:
        for which in range(3):
            server = threading.Thread(target=echo, args=(listener,), daemon=True)
            server.start()
            before = decided(lab, "to_outbound"), decided(lab, "outside_vouched")
            talk = Talk(lab, target)
            try:
                talk.say(f"canary-{secrets.token_hex(12)}")
            finally:
                talk.end()
            server.join(60)
            assert not server.is_alive()
            by_engine, alone = (
                decided(lab, name) - old for name, old in zip(("to_outbound", "outside_vouched"), before, strict=True)
            )
            if which and same_node == "native":
                assert by_engine == 0 and alone > 0
            else:
                assert by_engine > 0 and alone == 0
