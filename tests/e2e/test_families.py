"""IPv4-only, IPv6-only and dual-stack pods in the mesh: every client to every server that it shares a family with.

Six pods, one of each kind on each node, all of them client and server. What crosses the link is looked at with the
mesh and, as the control, in the lab without it.
"""

import itertools
import json
import secrets
from collections.abc import Iterator
from typing import Any

import pytest

from sidestep.lab.link import HBONE_PORT, Flow, Violation, violations
from sidestep.lab.podspec import FAMILIES_ANNOTATION
from tests.e2e.conftest import pod
from tests.harness.lab import Lab, eventually

PORT = 7007
KINDS = {"four": "IPv4", "six": "IPv6", "both": ""}
NODES = ("node1", "node2")
NAMES = [f"{kind}-{node}" for node in NODES for kind in KINDS]

OPENED, CLIENTS = "istio_tcp_connections_opened_total", 'reporter="source"'
ROUNDS = 2  # of every conversation; with acceleration those of one node by address are native in the second
CONVERSATIONS = ROUNDS * 2 * (4 * 3 + 2 * 6)  # by address and by Service: 3 peers of one family, 6 of both
NATIVE = 4  # on a node and by address: those of one family and the dual-stack pod, both directions
DECIDED, HANDED = "sidestep_capture_packets_total", 'decision="to_application_vouched"'

# Says who it talks to, then echoes. `family` 4 has no IPv6 to listen on.
SERVE = """
import socket, threading
family, address = (socket.AF_INET, "0.0.0.0") if {only4} else (socket.AF_INET6, "::")
listener = socket.create_server((address, {port}), family=family, dualstack_ipv6=not {only4}, backlog=64)
def serve(c):
    with c:
        c.sendall(c.getpeername()[0].removeprefix("::ffff:").encode() + b"\\n")
        while data := c.recv(65536): c.sendall(data)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""
# To each target in turn: the address that the server saw (or the error) and what came back.
ASK = """
import json, socket, sys
canary, found = sys.argv[2].encode(), []
for target, port in json.loads(sys.argv[1]):
    try:
        with socket.create_connection((target, port), 20) as s:
            f = s.makefile("rb"); seen = f.readline().decode().strip()
            s.sendall(canary); s.shutdown(socket.SHUT_WR)
            found.append([seen, f.read().decode()])
    except OSError as error:
        found.append([type(error).__name__, str(error)])
print(json.dumps(found))
"""


def namespace(name: str, mode: str = "") -> dict[str, Any]:
    labels = {"istio.io/dataplane-mode": mode} if mode else {}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def inhabitants(place: str) -> list[dict[str, Any]]:
    """The six pods with their Services; those of one family have a Service of that family only."""
    objects = []
    for name in NAMES:
        kind, node = name.split("-")
        command = ["/usr/bin/python3", "-c", SERVE.format(only4=kind == "four", port=PORT)]
        for each in pod(name, node, command, PORT, namespace=place):
            if KINDS[kind] and each["kind"] == "Pod":
                each["metadata"] = {**each["metadata"], "annotations": {FAMILIES_ANNOTATION: KINDS[kind]}}
            if KINDS[kind] and each["kind"] == "Service":
                each["spec"] |= {"ipFamilyPolicy": "SingleStack", "ipFamilies": [KINDS[kind]]}
            objects.append(each)
    return objects


class Place:
    """A namespace with the six pods in a lab. `addresses`: of each pod, by family."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab, self.name = lab, name
        self.addresses: dict[str, dict[int, str]] = {}
        for each in lab.pods(name):
            ips = [entry["ip"] for entry in each["status"]["podIPs"]]
            self.addresses[each["metadata"]["name"]] = {6 if ":" in ip else 4: ip for ip in ips}

    def vips(self, name: str) -> dict[int, str]:
        """The Service's addresses, by family."""
        found = self.lab.ask(lambda client: client.get(f"/api/v1/namespaces/{self.name}/services/{name}"))
        return {6 if ":" in ip else 4: ip for ip in found["spec"]["clusterIPs"]}

    def talk(self, canary: str) -> list[str]:
        """Everybody asks everybody, by address and by Service; what did not come out as it must, in words."""
        wrong = []
        vips = {name: self.vips(name) for name in NAMES}
        for client, own in self.addresses.items():
            targets, expected = [], []
            for server, family in itertools.product(NAMES, own):
                if server != client and family in self.addresses[server]:
                    for address in (self.addresses[server][family], vips[server][family]):
                        targets.append((address, PORT))
                        expected.append((server, family))
            words = ["/usr/bin/python3", "-c", ASK, json.dumps(targets), canary]
            answers = json.loads(self.lab.exec(f"{self.name}/{client}", *words, timeout=120))
            for (server, family), (address, _), answer in zip(expected, targets, answers, strict=True):
                if answer != [own[family], canary]:
                    wrong.append(f"{client} -> {server} ({address}): {answer}")
        return wrong

    def crossings(self) -> set[tuple[str, str]]:
        """Pairs of addresses, client and server, on different nodes and of one family."""
        return {
            (self.addresses[a][family], self.addresses[b][family])
            for a, b in itertools.product(NAMES, NAMES)
            for family in self.addresses[a].keys() & self.addresses[b].keys()
            if a.split("-")[1] != b.split("-")[1]
        }

    def on_the_link(self, flows: list[Flow]) -> list[Flow]:
        mine = {ip for each in self.addresses.values() for ip in each.values()}
        return [flow for flow in flows if {flow.source.address, flow.destination.address} <= mine]


def make(lab: Lab, name: str, mode: str) -> Place:
    lab.apply(namespace(name, mode), *inhabitants(name))
    for each in NAMES:
        eventually(f"{each} is ready", lambda each=each: lab.ready(f"{name}/{each}"))  # type: ignore[misc]
    return Place(lab, name)


def unmake(lab: Lab, name: str) -> None:
    def left() -> list[str]:
        return [each["metadata"]["name"] for each in lab.pods(name)]

    for each in left():
        lab.ask(lambda client, each=each: client.delete(f"/api/v1/namespaces/{name}/pods/{each}"))  # type: ignore[misc]
    eventually(f"{name} is empty", lambda: not left())


@pytest.fixture(params=["born", "joined"])
def place(request: pytest.FixtureRequest, mesh: Lab) -> Iterator[Place]:
    """Pods that were created in a namespace of the mesh, or whose namespace was labelled while they ran."""
    try:
        place = make(mesh, request.param, "ambient" if request.param == "born" else "")
        if request.param == "joined":
            mesh.enrol("joined")
        eventually("enrolled", lambda: mesh.enrolled(place.name) == set(NAMES))
        yield place
    finally:
        unmake(mesh, request.param)


@pytest.fixture
def outside(plain: Lab) -> Iterator[Place]:
    """The same pods in the lab without the mesh."""
    try:
        yield make(plain, "born", "ambient")
    finally:
        unmake(plain, "born")


def witnessed(place: Place) -> tuple[list[str], list[Violation], set[tuple[str, str]]]:
    """Everybody talks: what went wrong, what was wrong on the link, and who opened a tunnel to whom on it."""
    canary = f"canary-{secrets.token_hex(12)}"
    with place.lab.tap() as tap:
        wrong = [each for _ in range(ROUNDS) for each in place.talk(canary)]
        flows = place.on_the_link(tap.flows(opened_only=True))
    tunnels = {
        (flow.source.address, flow.destination.address)
        for flow in flows
        if flow.syn and flow.destination.port == HBONE_PORT and flow.payload_bytes
    }
    return wrong, violations(flows, [canary.encode()]), tunnels


def test_every_family_speaks_tls_across_nodes(place: Place, same_node: str) -> None:
    assert {name: sorted(each) for name, each in place.addresses.items()} == {
        name: {"four": [4], "six": [6], "both": [4, 6]}[name.split("-")[0]] for name in NAMES
    }
    before = {node: place.lab.counter(OPENED, node, CLIENTS) for node in NODES}
    handed = {node: place.lab.counter(DECIDED, node, HANDED) for node in NODES}
    wrong, bad, tunnels = witnessed(place)
    assert wrong == []
    assert bad == []
    assert tunnels == place.crossings()  # each pair, in both directions
    # Those of one node cross no link: the counters show that they went through the mesh as well, and which way.
    carried = {node: place.lab.counter(OPENED, node, CLIENTS) - before[node] for node in NODES}
    assert carried == dict.fromkeys(NODES, CONVERSATIONS / 2)
    passed = {node: place.lab.counter(DECIDED, node, HANDED) - handed[node] for node in NODES}
    assert passed == dict.fromkeys(NODES, NATIVE * (ROUNDS - 1) if same_node == "native" else 0)
    print(f"{CONVERSATIONS} connections, {len(tunnels)} tunnels between pods of two nodes")


def test_without_the_mesh_the_same_is_in_clear(outside: Place) -> None:
    """The control: the same conversation, readable."""
    wrong, bad, tunnels = witnessed(outside)
    assert wrong == []
    assert {each.kind for each in bad} == {"clear-connection", "canary"}
    assert tunnels == set()
