"""Where a connection goes, who it seems to come from, and what is refused: two engines, real sockets, both families."""

import ipaddress
import json
import secrets
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidestep.lab.link import violations
from sidestep.wire.pb import workload_pb2 as pb
from tests.harness.cluster import Nodes, Pod
from tests.harness.engine import opened
from tests.harness.lab import build_customers, eventually
from tests.harness.netns import connect, inside, listen, run

PORT = 8080
HOST = "shop.default.svc.cluster.local"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, same_node: str) -> Iterator[Nodes]:
    """client and near on one node, server and other on the next. Connections between client and near are native, if
    any are."""
    places = {"client": 0, "near": 0, "server": 1, "other": 1}
    with Nodes(tmp_path_factory.mktemp("routes"), places, workers=2, same_node=same_node) as made:
        made.publish()
        made.allow(made["client"], made["near"], PORT)
        yield made


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(("target", "protocol"), [("server", "HBONE"), ("near", "local")])
def test_the_application_sees_the_client(nodes: Nodes, target: str, protocol: str, family: int) -> None:
    pod = nodes[target]
    native = protocol == "local" and nodes.same_node == "native"
    with listen(pod.path, pod.address(family), PORT) as listener:
        with connect(nodes["client"].path, pod.address(family), PORT) as client:
            accepted, peer = listener.accept()
            with accepted:
                assert peer[0] == nodes["client"].address(family)
                assert native == (peer[1] == client.getsockname()[1])
                accepted.sendall(b"the server speaks first")
                assert client.recv(100) == b"the server speaks first"
                engine = nodes.clients[0]
                assert engine is not None
                (shown,) = [item for item in engine.dump("connections") if item["direction"] == "outbound"]
                assert (shown["protocol"], shown["tls"]) == ("native" if native else protocol, protocol == "HBONE")
                assert shown["identity_peer"] == pod.identity


@pytest.mark.parametrize("family", [4, 6])
def test_plaintext_from_outside_keeps_its_address(nodes: Nodes, family: int) -> None:
    pod = nodes["server"]
    gateway = pod.address(family)[:-1] + "1"
    with listen(pod.path, pod.address(family), PORT) as listener:
        with connect(f"/run/netns/{nodes.router}", pod.address(family), PORT) as client:
            accepted, peer = listener.accept()
            with accepted:
                assert peer[0] == gateway
                client.sendall(b"x")
                assert accepted.recv(1) == b"x"
    engine = nodes.clients[1]
    assert engine is not None
    assert 'reporter="destination",source_workload="unknown"' in engine.metrics()


def received_bytes(metrics: str) -> int:
    """Of all label sets, at the source."""
    lines = [
        line for line in metrics.splitlines() if line.startswith('istio_tcp_received_bytes_total{reporter="source"')
    ]
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in lines)


def test_an_open_connection_is_counted(nodes: Nodes) -> None:
    pod, engine = nodes["server"], nodes.clients[0]
    assert engine is not None
    before = received_bytes(engine.metrics())
    with listen(pod.path, pod.address(), PORT) as listener:
        with connect(nodes["client"].path, pod.address(), PORT) as client:
            accepted, _ = listener.accept()
            with accepted:
                client.sendall(b"x" * 1234)
                while len(accepted.recv(2000, socket.MSG_PEEK)) < 1234:
                    pass
                # Bytes that went ahead of the answer to CONNECT count when it has come.
                eventually("they count", lambda: received_bytes(engine.metrics()) == before + 1234)


def test_the_applications_port_stays_free(nodes: Nodes) -> None:
    """A server that starts anew gets its port while connections of before are still open in the engine."""
    pod = nodes["server"]
    kept = []
    for _ in range(2):
        with listen(pod.path, pod.address(), PORT) as listener:
            client = connect(f"/run/netns/{nodes.router}", pod.address(), PORT)
            kept += [client, listener.accept()[0]]
    with listen(nodes["client"].path, "0.0.0.0", PORT):  # the port of a destination that it is connected to
        pass
    for each in kept:
        each.close()


def service(vips: list[str], **ports: int) -> pb.Address:
    """Service `shop`, port 80 to PORT."""
    made = pb.Service(name="shop", namespace="default", hostname=HOST)
    for vip in vips:
        made.addresses.add(address=ipaddress.ip_address(vip).packed)
    made.ports.add(service_port=80, target_port=PORT)
    return pb.Address(service=made)


def endpoint(nodes: Nodes, pod: Pod, capacity: int, healthy: bool = True) -> pb.Address:
    """The pod's record as an endpoint of `shop`."""
    record = nodes.record(pod)
    record.workload.services[f"default/{HOST}"].ports.add(service_port=80, target_port=PORT)
    record.workload.capacity.value = capacity
    record.workload.status = pb.WorkloadStatus.HEALTHY if healthy else pb.WorkloadStatus.UNHEALTHY
    return record


def of_one_family(nodes: Nodes, pod: Pod, family: int) -> pb.Address:
    """An endpoint that has an address of that family only."""
    record = endpoint(nodes, pod, 1)
    record.workload.addresses[:] = [ipaddress.ip_address(pod.address(family)).packed]
    return record


@pytest.mark.parametrize("family", [4, 6])
def test_a_service_whose_endpoints_have_different_families(nodes: Nodes, family: int) -> None:
    """The VIP's family goes first; an endpoint of the other one only where there is no other, on both ways."""
    vips = ["10.99.0.1", "fd99::1"]
    vip, other = vips[family == 6], 10 - family
    client = nodes["client"]
    try:
        for ours, theirs in (("server", "near"), ("near", "server")):
            nodes.apply(
                service(vips),
                of_one_family(nodes, nodes[ours], family),
                of_one_family(nodes, nodes[theirs], other),
            )
            with (
                listen(nodes[ours].path, nodes[ours].address(family), PORT) as here,
                listen(nodes[theirs].path, nodes[theirs].address(other), PORT) as there,
            ):
                for _ in range(20):
                    with connect(client.path, vip, 80):
                        accepted, peer = here.accept()
                        accepted.close()
                        assert peer[0] == client.address(family)
                nodes.apply(endpoint(nodes, nodes[ours], 1, healthy=False))
                with connect(client.path, vip, 80):
                    accepted, peer = there.accept()
                    accepted.close()
                    assert peer[0] == client.address(other)
    finally:
        nodes.publish()


@pytest.mark.parametrize("family", [4, 6])
def test_services_by_capacity_and_health(nodes: Nodes, family: int) -> None:
    vips = ["10.99.0.1", "fd99::1"]
    weights = {"near": 1, "server": 3, "other": 0}
    nodes.apply(service(vips), *(endpoint(nodes, nodes[name], weight) for name, weight in weights.items()))
    stop = threading.Event()
    hits: Counter[str] = Counter()

    def serve(name: str, listener: socket.socket) -> None:
        listener.settimeout(0.1)
        while not stop.is_set():
            try:
                accepted, _ = listener.accept()
            except TimeoutError:
                continue
            with accepted:
                accepted.sendall(name.encode())

    listeners = [listen(nodes[name].path, nodes[name].address(family), PORT) for name in weights]
    threads = [
        threading.Thread(target=serve, args=(name, listener)) for name, listener in zip(weights, listeners, strict=True)
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in range(200):
            with connect(nodes["client"].path, vips[family == 6], 80) as client:
                hits[client.recv(100).decode()] += 1
        print(hits)
        assert hits["other"] == 0
        assert 20 <= hits["near"] <= 90  # a quarter of 200: outside by chance once in 10^8
        nodes.apply(endpoint(nodes, nodes["server"], 3, healthy=False))
        for _ in range(20):
            with connect(nodes["client"].path, vips[family == 6], 80) as client:
                assert client.recv(100) == b"near"
        nodes.apply(endpoint(nodes, nodes["near"], 1, healthy=False))
        with pytest.raises(ConnectionResetError), connect(nodes["client"].path, vips[family == 6], 80) as client:
            client.recv(1)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        for listener in listeners:
            listener.close()
        nodes.publish()


def test_unknown_addresses_of_the_cluster_are_held_then_refused(nodes: Nodes) -> None:
    with pytest.raises(ConnectionResetError), connect(nodes["client"].path, "10.77.0.1", 80) as client:
        client.recv(1)
    engine = nodes.clients[0]
    assert engine is not None
    assert 'reason="unknown_destination"' in engine.metrics()


def test_a_workload_with_a_policy_is_closed(nodes: Nodes) -> None:
    record = nodes.record(nodes["server"])
    record.workload.authorization_policies.append("default/somebody-only")
    nodes.apply(record)
    try:
        with listen(nodes["server"].path, nodes["server"].address(), PORT) as listener:
            with pytest.raises(ConnectionResetError):
                with connect(nodes["client"].path, nodes["server"].address(), PORT) as client:
                    client.recv(1)
            listener.settimeout(0)
            with pytest.raises(BlockingIOError):
                listener.accept()
    finally:
        nodes.publish()


def test_a_record_says_hbone_and_nothing_else_is_tried(nodes: Nodes) -> None:
    """The peer's engine does not answer: an error, and never clear text."""
    canary = secrets.token_hex(12).encode()
    record = nodes.record(nodes["server"])
    stranger = nodes[("server")].pair.pod4[:-1] + "1"  # the router: nothing listens on 15008 there
    record.workload.addresses[0] = ipaddress.ip_address(stranger).packed
    nodes.apply(record)
    try:
        with nodes.tap("client") as tap, listen(f"/run/netns/{nodes.router}", stranger, PORT) as listener:
            with pytest.raises(ConnectionResetError), connect(nodes["client"].path, stranger, PORT) as client:
                client.sendall(canary)
                client.recv(1)
            assert not any(canary in flow.fragments() for flow in tap.flows())
            listener.settimeout(0)
            with pytest.raises(BlockingIOError):
                listener.accept()
    finally:
        nodes.publish()


def test_the_wire_and_its_control(nodes: Nodes, tmp_path: Path) -> None:
    canary = secrets.token_hex(12).encode()

    def talk(where: Nodes) -> list[str]:
        pod = where["server"]
        with where.tap("client") as tap, listen(pod.path, pod.address(), PORT + 1) as listener:
            with connect(where["client"].path, pod.address(), PORT + 1) as client:
                accepted, _ = listener.accept()
                with accepted:
                    client.sendall(canary)
                    assert accepted.recv(100) == canary
            return sorted({found.kind for found in violations(tap.flows(), [canary])})

    assert talk(nodes) == []
    with Nodes(tmp_path, {"client": 0, "server": 1}, engines=(False, False)) as plain:
        assert talk(plain) == ["canary", "clear-connection"]


def test_same_node_with_mtls(tmp_path: Path) -> None:
    with Nodes(tmp_path, {"client": 0, "near": 0}, same_node="mtls") as nodes:
        nodes.publish()
        near = nodes["near"]
        with nodes.tap("client") as tap, listen(near.path, near.address(), PORT) as listener:
            with connect(nodes["client"].path, near.address(), PORT) as client:
                accepted, peer = listener.accept()
                with accepted:
                    client.sendall(b"x")
                    assert accepted.recv(1) == b"x"
                    assert peer[0] == nodes["client"].address()
            assert any(15008 in flow.ports() for flow in tap.flows())
            assert violations(tap.flows()) == []


def test_a_pod_without_its_record_is_held(tmp_path: Path) -> None:
    with Nodes(tmp_path, {"client": 0, "server": 1}) as nodes:
        server = nodes["server"]
        with listen(server.path, server.address(), PORT) as listener:
            with connect(nodes["client"].path, server.address(), PORT) as client:
                client.sendall(b"early")
                listener.settimeout(0.3)
                with pytest.raises(TimeoutError):
                    listener.accept()
                nodes.publish()
                listener.settimeout(20)
                accepted, _ = listener.accept()
                with accepted:
                    assert accepted.recv(10) == b"early"
    with Nodes(tmp_path, {"client": 0, "server": 1}) as nodes:
        started = time.monotonic()
        with pytest.raises(ConnectionResetError):
            with connect(nodes["client"].path, nodes["server"].address(), PORT) as client:
                client.recv(1)
        print(f"refused after {time.monotonic() - started:.1f} s")


def opened_by_both(nodes: Nodes) -> list[int]:
    """As source by the client's engine, as destination by the server's."""
    source, destination = nodes.clients
    assert source is not None
    assert destination is not None
    return [opened(source.metrics(), "source"), opened(destination.metrics(), "destination")]


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("way", ["outbound", "same node", "inbound"])
def test_one_client_port_three_times_with_the_server_closing_first(nodes: Nodes, way: str, family: int) -> None:
    """The engine's end towards the client is in TIME_WAIT when the port comes again.

    `inbound`: a client outside of the mesh.
    """
    server = nodes["near" if way == "same node" else "server"]
    if way == "same node":
        nodes.allow(nodes["client"], server, PORT)
    client, address = nodes["client"].path, nodes["client"].address(family)
    if way == "inbound":
        client, address = f"/run/netns/{nodes.router}", server.address(family)[:-1] + "1"
    engines = nodes.clients[0], nodes.clients[0 if way == "same node" else 1]
    assert engines[0] is not None
    assert engines[1] is not None
    before = opened(engines[0].metrics(), "source"), opened(engines[1].metrics(), "destination")
    with listen(server.path, server.address(family), PORT) as listener:
        for n in range(3):
            with connect(client, server.address(family), PORT, source_port=45678) as asking:
                accepted, peer = listener.accept()
                accepted.sendall(f"{server.name} {n}".encode())
                accepted.close()
                got = b""
                while part := asking.recv(100):
                    got += part
                assert got == f"{server.name} {n}".encode()
                assert peer[0] == address
    after = opened(engines[0].metrics(), "source"), opened(engines[1].metrics(), "destination")
    assert after == (before[0] + (0 if way == "inbound" else 3), before[1] + 3)


ONE_AFTER_ANOTHER = """
import socket, sys, time
slowest = 0
for n in range(int(sys.argv[3])):
    started = time.monotonic()
    s = socket.create_connection((sys.argv[1], int(sys.argv[2])), 20)
    s.sendall(b"x" * 64)
    got = b""
    while len(got) < 64:
        part = s.recv(64)
        assert part, n
        got += part
    s.close()
    slowest = max(slowest, time.monotonic() - started)
print(sys.argv[3], "connections, slowest", round(slowest, 3), "s")
"""


@pytest.mark.parametrize("same_node", ["direct"], indirect=True)  # of two nodes, and long
def test_thirty_thousand_connections_to_one_port(nodes: Nodes) -> None:
    """More than a client has ports: each comes round again while the engine's ends are in TIME_WAIT."""
    server = nodes["server"]
    run("nsenter", f"--net={nodes['client'].path}", "sysctl", "-qw", "net.ipv4.tcp_tw_reuse=1")
    serving = inside(server.path, lambda: subprocess.Popen([str(build_customers()), "serve", "7000"]))
    try:
        deadline = time.monotonic() + 20
        while "7000" not in run("nsenter", f"--net={server.path}", "ss", "-Hltn"):
            assert time.monotonic() < deadline
        before = opened_by_both(nodes)
        enter = ["nsenter", f"--net={nodes['client'].path}", "python3", "-c", ONE_AFTER_ANOTHER]
        said = subprocess.run([*enter, server.address(), "7000", "30000"], capture_output=True, text=True, timeout=240)
        assert said.returncode == 0, said.stderr
        print(said.stdout)
        assert opened_by_both(nodes) == [each + 30000 for each in before]  # none went past an engine
    finally:
        serving.kill()
        serving.wait()


def test_new_certificates_under_load_lose_nothing(tmp_path: Path) -> None:
    """Each renewal retires the tunnels; a CONNECT that is on its way is still served."""
    with Nodes(tmp_path, {"client": 0, "server": 1}, workers=2) as nodes:
        nodes.publish()
        server, path = nodes["server"], nodes["client"].path
        run("nsenter", f"--net={path}", "sysctl", "-qw", "net.ipv4.tcp_tw_reuse=1")
        customers = str(build_customers())
        serving = inside(server.path, lambda: subprocess.Popen([customers, "serve", "7000"]))
        try:
            deadline = time.monotonic() + 20
            while "7000" not in run("nsenter", f"--net={server.path}", "ss", "-Hltn"):
                assert time.monotonic() < deadline
            command = [customers, "buy", server.address(), "7000", "400", "20"]
            buying = inside(path, lambda: subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            for pod in [nodes["client"], server] * 10:
                nodes.certify(pod, nodes.authority.leaf(pod.identity))
                assert buying.stdout is not None
                buying.stdout.readline()  # half a second of requests
            buying.terminate()
            output, _ = buying.communicate(timeout=30)
        finally:
            serving.kill()
            serving.wait()
        last = json.loads(output.strip().splitlines()[-1])
        print(last)
        assert last["requests"] > 1000
        assert last["failed"] == 0, last
