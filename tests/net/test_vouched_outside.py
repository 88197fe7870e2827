"""Destinations outside the mesh: once the engine has let a pod go to one, the kernel does it alone.

The engine, the programs and the sockets are real. `far` is the world outside: an ordinary host behind the router, whose
address nobody has told the engine. Every case that must not be native begins with a connection that is; every case that
must be says by the counters of the programs, and by the port that the far end sees, that it was.
"""

import ctypes
import os
import re
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sidestep._bpf import lib
from sidestep.wire import batch, channel
from sidestep.wire.pb import workload_pb2 as pb
from tests.harness.cluster import Nodes, Pod
from tests.harness.kubelet import Map, packed
from tests.harness.netns import connect, inside, listen, run
from tests.harness.stand_in import plain
from tests.net.test_capture import RST_LINGER, eventually
from tests.net.test_engine_policy import refused, talk
from tests.net.test_vouched import SYN, closed, nobody, pump

PORT = 8080
CLOSED = 9
POD_LIMIT, NODE_LIMIT = 512, 4096  # OUTSIDE_POD and OUTSIDE_NODE of vouch.c


class World:
    """`client` and `near` on node 0, which the engine serves; `far` where it pleases."""

    def __init__(self, nodes: Nodes, family: int) -> None:
        self.nodes, self.family = nodes, family
        self.client, self.near, self.far = (nodes[name] for name in ("client", "near", "far"))

    @property
    def address(self) -> str:
        return self.far.address(self.family)

    @property
    def source(self) -> str:
        return self.client.address(self.family)

    def listen(self, port: int = PORT) -> socket.socket:
        return listen(self.far.path, self.address, port)

    def connect(self, port: int = PORT, **more: Any) -> socket.socket:
        return connect(self.client.path, self.address, port, **more)

    def client_socket(self) -> socket.socket:
        """Of the application; it does not wait."""
        made = inside(self.client.path, lambda: socket.socket(socket.AF_INET6 if self.family == 6 else socket.AF_INET))
        made.setblocking(False)
        return made

    def open(self, server: socket.socket, **more: Any) -> tuple[socket.socket, socket.socket]:
        """A connection; whether it was native is the caller's to say."""
        client = self.connect(server.getsockname()[1], **more)
        served, peer = server.accept()
        assert plain(peer)[0] == self.source
        talk(client, served)
        return client, served

    def native(self, server: socket.socket, **more: Any) -> tuple[socket.socket, socket.socket]:
        """A connection that was native: the engine saw nothing of it."""
        before, captured = self.passed(), self.captured()
        client, served = self.open(server, **more)
        assert self.passed() > before
        assert self.captured() == captured
        assert plain(served.getpeername()) == plain(client.getsockname())
        return client, served

    def by_engine(self, server: socket.socket, **more: Any) -> tuple[socket.socket, socket.socket]:
        """A connection that was not."""
        before, captured = self.passed(), self.captured()
        client, served = self.open(server, **more)
        assert (self.passed(), self.captured()) == (before, captured + 1)
        return client, served

    def allow(self, server: socket.socket) -> None:
        """The first connection, and one more as the control."""
        for made in (self.by_engine(server), self.native(server)):
            closed(*made)

    def counter(self, pod: Pod, name: str) -> int:
        assert pod.capture is not None
        return pod.capture.counters()[name]

    def passed(self) -> int:
        return self.counter(self.client, "outside_vouched")

    def captured(self) -> int:
        return self.counter(self.client, "to_outbound")

    # -- the engine ---------------------------------------------------------------------------------------------------
    def engine(self) -> Any:
        client = self.nodes.clients[0]
        assert client is not None
        return client

    def log(self) -> str:
        engine = self.nodes.engines[0]
        assert engine is not None
        return engine.log.read_text()

    def tell(self, *addresses: pb.Address) -> None:
        """Records for the engine of node 0."""
        records = []
        for each in addresses:
            name = each.workload.uid or f"{each.service.namespace}/{each.service.hostname}"
            records.append(batch.Record(batch.Op.ADDRESS_SET, name, os.urandom(4).hex(), each.SerializeToString()))
        assert self.engine().apply(records)["rejected"] == []

    def untell(self, name: str) -> None:
        self.engine().apply([batch.Record(batch.Op.ADDRESS_DEL, name)])

    def settings(self, **changes: Any) -> None:
        body = {"cluster_id": "Kubernetes", "trust_domain": "cluster.local", "cluster_cidrs": [], "same_node": "native"}
        self.engine().call(channel.SETTINGS, {**body, **changes})

    def series(self, name: str) -> dict[str, float]:
        """Of a metric: label set -> value, without those that are zero."""
        found = {}
        for line in self.engine().metrics().splitlines():
            if line.startswith(f"{name}{{") and float(line.rsplit(" ", 1)[1]):
                labels, value = line.removeprefix(name).rsplit(" ", 1)
                found[labels] = float(value)
        return found

    def metric(self, name: str) -> float:
        return sum(self.series(name).values())

    def total(self, name: str) -> int:
        """Of a metric without labels."""
        (found,) = re.findall(rf"^{name} (\d+)$", self.engine().metrics(), re.MULTILINE)
        return int(found)

    def flows(self) -> list[dict[str, Any]]:
        return [each for each in self.engine().dump("connections") if each["protocol"] == "native"]

    def verdicts(self) -> set[int]:
        """Destination ports that the client's pod may go to natively."""
        assert self.client.capture is not None
        with Map(self.client.capture.pins + b"/verdicts") as found:
            return {struct.unpack_from("HH", key, 32)[1] for key in found.keys(SYN)}

    def service(self, **changes: Any) -> pb.Address:
        """A Service whose VIP is the far address."""
        made = pb.Service(name="api", namespace="default", hostname="api.example.com")
        made.addresses.add(address=raw(self.address))
        made.ports.add(service_port=PORT, target_port=PORT)
        made.load_balancing.mode = pb.LoadBalancing.PASSTHROUGH
        for name, value in changes.items():
            setattr(made, name, value)
        return pb.Address(service=made)

    def dropping(self, pod: Pod) -> Any:
        """What a pod sends is lost."""
        return _Dropping(self.nodes, pod)


class _Dropping:
    def __init__(self, nodes: Nodes, pod: Pod) -> None:
        self.nft = ("nsenter", f"--net=/run/netns/{nodes.router}", "nft")
        self.device = nodes.interface(pod)

    def __enter__(self) -> None:
        chain = f"add chain netdev lose i {{ type filter hook ingress device {self.device} priority 0; }}; "
        run(*self.nft, f"add table netdev lose; {chain} add rule netdev lose i meta l4proto tcp drop")

    def __exit__(self, *unused: object) -> None:
        run(*self.nft, "delete table netdev lose")


def raw(address: str) -> bytes:
    """As records have it."""
    return packed(address)[-4:] if ":" not in address else packed(address)


@pytest.fixture
def world(tmp_path: Path, family: int) -> Iterator[World]:
    places = {"client": 0, "near": 0, "far": 1}
    with Nodes(tmp_path, places, workers=2, same_node="native", engines=(True, False), cidrs=[]) as nodes:
        nodes.apply(nodes.record(nodes["client"]), nodes.record(nodes["near"]))
        yield World(nodes, family)


@pytest.fixture
def server(world: World, closing: Callable[..., None]) -> socket.socket:
    made = world.listen()
    closing(made)
    return made


# -- native -----------------------------------------------------------------------------------------------------------


def test_after_the_first_the_kernel_does_it_alone(world: World, server: socket.socket) -> None:
    """Counted exactly, in the series and with the fields that the engine's own connection had."""
    closed(*world.by_engine(server))
    eventually("the first is counted", lambda: world.metric("istio_tcp_connections_closed_total") == 1)
    (labels,) = world.series("istio_tcp_connections_opened_total")
    for part in ('reporter="source"', 'source_workload="client"', 'destination_workload="unknown"'):
        assert part in labels
    assert 'connection_security_policy="unknown"' in labels
    sent = received = 16
    for size in (1, 100, 70_000, 3_000_000):
        client, served = world.native(server)
        for one, other in ((client, served), (served, client)):
            assert pump(one, other, size) == size
        sent += size + 16
        received += size + 16
        eventually("acknowledged", lambda size=size: world.flows()[0]["bytes_recv"] == size + 16)  # type: ignore[misc]
        (found,) = world.flows()
        assert found["bytes_sent"] == size + 16
        world.engine().metrics()  # what is told there is told by the line of its end all the same
        assert found["src"].endswith(f":{client.getsockname()[1]}")
        assert (found["identity_peer"], found["tls"]) == ("", False)
        closed(client, served)
    eventually("all have ended", lambda: world.metric("istio_tcp_connections_closed_total") == 5)
    for name, total in (
        ("connections_opened", 5),
        ("connections_closed", 5),
        ("received_bytes", sent),
        ("sent_bytes", received),
    ):
        assert sum(world.series(f"istio_tcp_{name}_total").values()) == total, name
    assert list(world.series("istio_tcp_connections_opened_total")) == [labels]
    assert world.total("sidestep_vouched_outside_total") == 1
    eventually("the lines", lambda: told(world)["complete"] == 4)
    assert told(world) == {"complete": 4, "bytes_sent": sent - 16, "bytes_recv": received - 16}
    line = next(line for line in world.log().splitlines() if "direction=native" in line)
    assert f'src.workload="client" src.namespace="default" dst.addr={bracketed(world.address)}:{PORT}' in line
    assert "identity" not in line


def told(world: World) -> dict[str, int]:
    """The sums of the access log's lines."""
    lines = [line for line in world.log().splitlines() if "direction=native" in line]
    return {
        field: sum(int(re.findall(rf" {field}=(\d+)", line)[0]) for line in lines)
        for field in ("complete", "bytes_sent", "bytes_recv")
    }


def bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def test_the_engine_has_all_of_it_when_it_is_off(world: World, server: socket.socket) -> None:
    """The control of everything here: what `native` counts is what the engine would have counted."""
    world.settings(same_node="direct")
    for _ in range(3):
        closed(*world.by_engine(server))
    eventually("counted", lambda: world.metric("istio_tcp_connections_closed_total") == 3)
    before = world.series("istio_tcp_connections_opened_total")
    world.settings()
    closed(*world.by_engine(server))
    for _ in range(3):
        closed(*world.native(server))
    eventually("counted", lambda: world.metric("istio_tcp_connections_closed_total") == 7)
    after = world.series("istio_tcp_connections_opened_total")
    assert (list(after), sum(after.values())) == (list(before), 7)
    assert world.metric("istio_tcp_received_bytes_total") == world.metric("istio_tcp_sent_bytes_total") == 7 * 16
    for setting in ("direct", "mtls"):
        world.settings(same_node=setting)
        closed(*world.by_engine(server), *world.by_engine(server))


@pytest.mark.parametrize("ending", ["server first", "client first", "half", "client resets", "server resets"])
def test_what_came_is_counted_to_the_byte_however_it_ends(world: World, server: socket.socket, ending: str) -> None:
    world.allow(server)
    eventually("the first are counted", lambda: world.metric("istio_tcp_connections_closed_total") == 2)
    before = world.metric("istio_tcp_sent_bytes_total"), world.metric("istio_tcp_received_bytes_total")
    client, served = world.native(server)
    if ending == "half":
        client.shutdown(socket.SHUT_WR)
        assert served.recv(10) == b""
        assert pump(served, client, 500_000) == 500_000
        served.close()
        assert client.recv(1) == b""
        client.close()
    elif ending == "client resets":
        assert pump(served, client, 1000) == 1000
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_LINGER)
        closed(client, served)
    else:
        one, other = (served, client) if ending.startswith("server") else (client, served)
        assert pump(served, client, 1000) == 1000
        if ending == "server resets":
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_LINGER)
            eventually("acknowledged", lambda: world.flows()[0]["bytes_recv"] == 1016)
            one.close()
            with pytest.raises(ConnectionResetError):
                other.recv(1)
        else:
            one.close()
            assert other.recv(1) == b""
        other.close()
    eventually("ended", lambda: world.metric("istio_tcp_connections_closed_total") == 3)
    came = 16 + (500_000 if ending == "half" else 1000)
    grown = world.metric("istio_tcp_sent_bytes_total"), world.metric("istio_tcp_received_bytes_total")
    assert (grown[0] - before[0], grown[1] - before[1]) == (came, 16)
    assert world.flows() == []


def test_a_server_that_speaks_and_leaves_at_once(world: World, server: socket.socket) -> None:
    """Its bytes and its end come together, to a client that has ended already: the end is not a byte."""
    world.allow(server)
    eventually("the first are counted", lambda: world.metric("istio_tcp_connections_closed_total") == 2)
    before = world.metric("istio_tcp_sent_bytes_total")
    for size in (0, 1, 100):
        client = world.connect()
        served, _ = server.accept()
        client.shutdown(socket.SHUT_WR)
        assert served.recv(1) == b""
        served.sendall(bytes(size))
        served.close()
        got = b""
        while part := client.recv(1000):
            got += part
        assert len(got) == size
        client.close()
    eventually("ended", lambda: world.metric("istio_tcp_connections_closed_total") == 5)
    assert world.metric("istio_tcp_sent_bytes_total") - before == 101


@pytest.mark.parametrize("first", ["client", "server"])
def test_the_same_ports_again(world: World, server: socket.socket, first: str) -> None:
    """Through a TIME_WAIT of either side, and after resets."""
    world.allow(server)
    for ending in ("order", "order", "reset", "order"):
        client, served = world.native(server, source_port=34567)
        one, other = (client, served) if first == "client" else (served, client)
        if ending == "reset":
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_LINGER)
            one.close()
            with pytest.raises(ConnectionResetError):
                other.recv(1)
        else:
            one.close()
            assert other.recv(1) == b""
        other.close()
    eventually("all have ended", lambda: world.flows() == [])


def test_a_lost_syn_and_a_refused_port(world: World, server: socket.socket) -> None:
    """As without the mesh: the client's own SYN comes again; a refusal is a refusal."""
    world.allow(server)
    with world.dropping(world.client):
        client = world.client_socket()
        client.connect_ex((world.address, PORT))
    client.settimeout(20)
    served, peer = server.accept()
    assert plain(peer) == plain(client.getsockname())
    talk(client, served)
    closed(client, served)
    eventually("ended", lambda: world.metric("istio_tcp_connections_closed_total") == 3)
    server.close()
    before = world.passed()
    with pytest.raises(ConnectionRefusedError):
        world.connect()
    assert world.passed() == before + 1
    eventually("counted", lambda: world.metric("istio_tcp_connections_closed_total") == 4)
    assert world.metric("istio_tcp_connections_opened_total") == 4


def test_only_that_pod_and_that_port(world: World, server: socket.socket, closing: Callable[..., None]) -> None:
    world.allow(server)
    other = world.listen(PORT + 1)
    closing(other)
    closed(*world.by_engine(other))
    before = world.counter(world.near, "to_outbound")
    connect(world.near.path, world.address, PORT).close()
    server.accept()[0].close()
    assert world.counter(world.near, "to_outbound") == before + 1


def test_a_socket_that_was_native_is_captured_for_another_port(
    world: World, server: socket.socket, closing: Callable[..., None]
) -> None:
    world.allow(server)
    other = world.listen(PORT + 1)
    closing(other)
    client, served = world.native(server)
    unspecific = struct.pack("H14x", socket.AF_UNSPEC)
    assert inside(world.client.path, lambda: libc_connect(client, unspecific)) == 0
    captured = world.captured()
    client.connect((world.address, PORT + 1))
    again, _ = other.accept()
    talk(client, again)
    assert world.captured() == captured + 1
    closed(client, served, again)


def libc_connect(client: socket.socket, address: bytes) -> int:
    return int(ctypes.CDLL(None, use_errno=True).connect(client.fileno(), address, len(address)))


def test_datagrams_are_nobodys(world: World, server: socket.socket) -> None:
    world.allow(server)
    kind = socket.AF_INET6 if world.family == 6 else socket.AF_INET
    one = inside(world.client.path, lambda: socket.socket(kind, socket.SOCK_DGRAM))
    other = inside(world.far.path, lambda: socket.socket(kind, socket.SOCK_DGRAM))
    other.bind((world.address, PORT))
    other.settimeout(20)
    before = world.passed(), world.captured()
    one.sendto(b"datagram", (world.address, PORT))
    assert other.recvfrom(100)[0] == b"datagram"
    assert (world.passed(), world.captured()) == before
    closed(one, other)


# -- what is outside --------------------------------------------------------------------------------------------------


def test_what_speaks_no_hbone_is_outside(world: World, server: socket.socket) -> None:
    """A record, but no mesh behind it: an un-enrolled pod. Its labels are in the metrics."""
    world.tell(world.nodes.record(world.far, tunnel_protocol=pb.TunnelProtocol.NONE))
    world.allow(server)
    eventually("counted", lambda: world.metric("istio_tcp_connections_closed_total") == 2)
    (labels,) = world.series("istio_tcp_connections_opened_total")
    assert 'destination_workload="far"' in labels
    world.tell(world.nodes.record(world.far))
    assert refused(world.client.path, world.address)
    nobody(server)


def test_a_pod_of_this_node_that_is_not_said_to_be_in_the_mesh(world: World, closing: Callable[..., None]) -> None:
    """Its enrolment has begun: it is captured, and peers still come in clear text. They are not taken for lost ones."""
    world.tell(world.nodes.record(world.near, tunnel_protocol=pb.TunnelProtocol.NONE))
    address = world.near.address(world.family)
    near = listen(world.near.path, address, PORT)
    closing(near)
    for native in (False, True, True):
        before, inbound = world.passed(), world.counter(world.near, "to_inbound")
        client = connect(world.client.path, address, PORT)
        served, _ = near.accept()
        talk(client, served)
        assert (world.passed() - before, world.counter(world.near, "to_inbound") - inbound) == (int(native), 1)
        closed(client, served)
    world.tell(world.nodes.record(world.near))
    before = world.passed()
    client = connect(world.client.path, address, PORT)
    served, _ = near.accept()
    talk(client, served)
    assert world.passed() == before
    assert 'reason="late_vouched"' not in world.engine().metrics()
    closed(client, served)


def test_a_service_that_passes_through(world: World, server: socket.socket) -> None:
    """Is outside, under its name; one that chooses is the engine's, and one with a waypoint is nobody's."""
    world.tell(world.service())
    world.allow(server)
    eventually("counted", lambda: world.metric("istio_tcp_connections_closed_total") == 2)
    (labels,) = world.series("istio_tcp_connections_opened_total")
    assert 'destination_service="api.example.com"' in labels
    with_waypoint = world.service()
    with_waypoint.service.waypoint.hostname.namespace = "default"
    with_waypoint.service.waypoint.hostname.hostname = "waypoint"
    with_waypoint.service.waypoint.hbone_mtls_port = 15008
    world.tell(with_waypoint)
    before = world.passed()
    assert refused(world.client.path, world.address)
    assert world.passed() == before
    nobody(server)
    world.tell(world.service())
    world.allow(server)
    endpoint = world.nodes.record(world.far, tunnel_protocol=pb.TunnelProtocol.NONE)
    endpoint.workload.services["default/api.example.com"].ports.add(service_port=PORT, target_port=PORT)
    chooses = world.service()
    chooses.service.load_balancing.Clear()
    world.tell(endpoint, chooses)
    for _ in range(3):
        closed(*world.by_engine(server))


def test_a_waypoint_of_a_workload(world: World, server: socket.socket) -> None:
    world.tell(world.nodes.record(world.far, tunnel_protocol=pb.TunnelProtocol.NONE))
    world.allow(server)
    record = world.nodes.record(world.far, tunnel_protocol=pb.TunnelProtocol.NONE)
    record.workload.waypoint.hostname.namespace = "default"
    record.workload.waypoint.hostname.hostname = "waypoint"
    world.tell(record)
    before = world.passed()
    assert refused(world.client.path, world.address)
    assert world.passed() == before
    nobody(server)


def test_an_unknown_address_of_the_cluster(world: World, server: socket.socket) -> None:
    """Is held, not outside; unless the setting says that it passes."""
    world.allow(server)
    inside_ = [f"{world.address}/{128 if world.family == 6 else 32}"]
    world.settings(cluster_cidrs=inside_)
    before = world.passed()
    assert refused(world.client.path, world.address)
    assert world.passed() == before
    nobody(server)
    assert 'reason="unknown_destination"' in world.engine().metrics()
    world.settings(cluster_cidrs=inside_, unknown="pass")
    world.allow(server)
    world.tell(world.nodes.record(world.far))
    assert refused(world.client.path, world.address)
    nobody(server)


# -- taken back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["own record", "a record", "a service", "no record"])
def test_what_changes_is_decided_anew(world: World, server: socket.socket, what: str) -> None:
    """An open flow goes on; the next connection meets the engine, which allows it again."""
    plain_record = world.nodes.record(world.far, tunnel_protocol=pb.TunnelProtocol.NONE)
    if what == "no record":
        world.tell(plain_record)
    world.allow(server)
    ends = world.native(server)
    world.tell(world.nodes.record(world.near, canonical_name="other"))
    closed(*world.native(server))  # the control: it is about somebody else
    if what == "own record":
        world.tell(world.nodes.record(world.client, canonical_name="other"))
    elif what == "a record":
        world.tell(plain_record)
    elif what == "no record":
        world.untell(world.far.workload)
    else:
        world.tell(world.service())
    assert world.verdicts() == set()
    talk(*ends)
    world.allow(server)
    talk(*ends)
    closed(*ends)


def test_an_open_flow_outlives_its_allowance(world: World, server: socket.socket) -> None:
    """The address is a mesh pod's by now: who has it open keeps it, as in the engine; who comes gets HBONE."""
    world.allow(server)
    ends = world.native(server)
    world.tell(world.nodes.record(world.far))
    assert refused(world.client.path, world.address)
    nobody(server)
    talk(*ends)
    assert len(world.flows()) == 1
    closed(*ends)
    eventually("counted", lambda: world.metric("istio_tcp_connections_closed_total") == 4)


def test_a_syn_under_way_when_it_is_taken_back(world: World, server: socket.socket) -> None:
    """It was lost, and comes again as the engine's."""
    world.allow(server)
    with world.dropping(world.client):
        client = world.client_socket()
        client.connect_ex((world.address, PORT))
        world.tell(world.nodes.record(world.far))
        captured = world.captured()
    eventually("the engine has it", lambda: world.captured() == captured + 1)
    client.settimeout(20)
    with suppress(ConnectionError):
        client.sendall(b"x")
        assert client.recv(1) == b""
    client.close()
    nobody(server)


def test_a_draining_pod_gets_no_new_one(world: World, server: socket.socket) -> None:
    world.allow(server)
    ends = world.native(server)
    world.engine().call(channel.POD_MODE, {"uid": world.client.uid, "mode": "draining"})
    for _ in range(2):
        closed(*world.by_engine(server))
    talk(*ends)
    world.engine().call(channel.POD_MODE, {"uid": world.client.uid, "mode": "serving"})
    world.allow(server)
    talk(*ends)
    closed(*ends)


def test_through_every_mode(world: World, server: socket.socket) -> None:
    """An open flow goes on while the pod's mode changes; while draining all is native, and none of ours."""
    world.allow(server)
    ends = world.native(server)
    capture = world.client.capture
    assert capture is not None
    for mode in (lib.MODE_DRAINING, lib.MODE_LENIENT, lib.MODE_STRICT, lib.MODE_DRAINING, lib.MODE_STRICT):
        capture.set_mode(mode)
        talk(*ends)
        assert capture.old() == 0
        before = world.passed()
        more = world.open(server)
        assert world.passed() - before == (mode != lib.MODE_DRAINING)
        closed(*more)
    closed(*ends)


def test_a_pod_with_another_identity(world: World, server: socket.socket) -> None:
    """What was opened as the old one ends, as it does in the engine."""
    world.allow(server)
    client, served = world.native(server)
    was, world.client.account = world.client.account, "other"
    world.nodes.certify(world.client, world.nodes.authority.leaf(world.client.identity))
    world.nodes.add(world.client)
    for end in (client, served):
        with pytest.raises(ConnectionError):
            while end.recv(65536):
                pass
            raise AssertionError("an orderly end")
    world.client.account = was
    closed(client, served)


def test_an_identity_that_ends(world: World, server: socket.socket) -> None:
    """Who has no certificate is held by the engine, wherever it goes."""
    world.allow(server)
    ends = world.native(server)
    world.engine().call(channel.IDENTITY_DEL, {"identity": world.client.identity})
    client = world.client_socket()
    before = world.passed()
    client.connect_ex((world.address, PORT))
    eventually("it is held", lambda: any(each["state"] == "held" for each in world.engine().dump("connections")))
    assert world.passed() == before
    talk(*ends)
    closed(client, *ends)


def test_a_pod_leaves(world: World, server: socket.socket) -> None:
    """Un-enrolled with a flow open: it goes on, and nothing of ours is left."""
    world.allow(server)
    ends = world.native(server)
    for name in ("client", "near"):
        pod = world.nodes[name]
        capture = pod.capture
        assert capture is not None
        world.engine().call(channel.POD_DEL, {"uid": pod.uid})
        capture.detach()
        pod.capture = None
        talk(*ends)
    assert world.engine().dump("connections") == []
    assert world.metric("istio_tcp_connections_closed_total") == world.metric("istio_tcp_connections_opened_total") == 3
    closed(*ends)


# -- an engine dies ---------------------------------------------------------------------------------------------------


def test_the_engine_dies_and_another_comes(world: World, server: socket.socket) -> None:
    """What is open goes on and is counted; nothing new leaves without an engine; the next engine decides again."""
    world.allow(server)
    client, served = world.native(server)
    engine = world.nodes.engines[0]
    assert engine is not None
    engine.process.kill()
    engine.process.wait()
    talk(client, served)
    before = world.passed()
    with pytest.raises((ConnectionError, TimeoutError)):
        world.connect(timeout=2)
    assert world.passed() == before
    nobody(server)
    world.nodes.start(0)
    talk(client, served)
    world.nodes.apply(world.nodes.record(world.client), world.nodes.record(world.near))
    talk(client, served)
    talk(served, client)  # the client's word acknowledges what came
    assert [(each["bytes_sent"], each["bytes_recv"]) for each in world.flows()] == [(80, 80)]
    eventually("counted", lambda: world.metric("istio_tcp_connections_opened_total") == 1)
    (labels,) = world.series("istio_tcp_connections_opened_total")
    assert 'source_workload="client"' in labels
    world.allow(server)
    talk(client, served)
    closed(client, served)
    eventually("ended", lambda: world.metric("istio_tcp_connections_closed_total") == 3)
    assert world.metric("istio_tcp_connections_opened_total") == 3
    assert list(world.series("istio_tcp_connections_opened_total")) == [labels]


def test_an_agent_that_begins_anew_says_it_again(world: World, server: socket.socket) -> None:
    """The pod is given to the same engine once more: what is open stays what it was, counted once."""
    world.allow(server)
    client, served = world.native(server)
    for _ in range(3):
        world.nodes.add(world.client)
        world.allow(server)
        talk(client, served)
        talk(served, client)
    assert [each["bytes_sent"] for each in world.flows()] == [16 + 3 * 32]
    eventually("counted", lambda: world.metric("istio_tcp_connections_opened_total") == 9)
    eventually("counted", lambda: world.metric("istio_tcp_connections_closed_total") == 8)
    closed(client, served)
    eventually("ended", lambda: world.metric("istio_tcp_connections_closed_total") == 9)
    assert world.metric("istio_tcp_connections_opened_total") == 9


# -- too many ---------------------------------------------------------------------------------------------------------


def test_who_asks_for_all_the_world(world: World, server: socket.socket, closing: Callable[..., None]) -> None:
    """A pod has its share and no more: the rest is the engine's, pods go on as they did, what is in use stays, and what
    is not makes room.
    """
    near = listen(world.near.path, world.near.address(world.family), PORT)
    closing(near)
    world.allow(server)
    ends = world.native(server)

    def crawl(first: int, n: int) -> None:
        for port in range(first, first + n):
            with suppress(ConnectionError), connect(world.client.path, world.address, port) as made:
                made.recv(1)

    crawl(20000, POD_LIMIT + 50)
    assert len(world.verdicts()) == POD_LIMIT
    assert world.total("sidestep_vouched_outside_total") == POD_LIMIT
    assert world.total("sidestep_vouched_outside_full_total") == 51
    for native in (False, True):
        before = world.counter(world.near, "to_application_vouched")
        client = connect(world.client.path, world.near.address(world.family), PORT)
        served, _ = near.accept()
        talk(client, served)  # what the engine carries it has allowed before
        closed(client, served)
        assert (world.counter(world.near, "to_application_vouched") > before) == native
    assert world.total("sidestep_vouched_full_total") == 0

    def makes_room() -> bool:
        crawl(30000, 1)
        return 30000 in world.verdicts()

    eventually("what is not used makes room", makes_room, 60)
    assert PORT in world.verdicts(), "it has a flow open"
    talk(*ends)
    closed(*world.native(server), *ends)


def test_pods_that_ask_for_all_the_world_together(tmp_path: Path, family: int) -> None:
    """A node has its share too, and it is kept, though no pod has all of its own; the rest is the engine's."""
    crowd = [f"client{number}" for number in range(9)]
    with Nodes(
        tmp_path, {**dict.fromkeys(crowd, 0), "far": 1}, workers=2, same_node="native", engines=(True, False), cidrs=[]
    ) as nodes:
        nodes.apply(*(nodes.record(nodes[name]) for name in crowd))
        engine, far = nodes.clients[0], nodes["far"].address(family)
        assert engine is not None

        def total(name: str) -> int:
            (found,) = re.findall(rf"^{name} (\d+)$", engine.metrics(), re.MULTILINE)
            return int(found)

        def held(name: str) -> int:
            capture = nodes[name].capture
            assert capture is not None
            with Map(capture.pins + b"/verdicts") as found:
                return len(found.keys(SYN))

        def crawl(ports: range) -> None:
            for port in ports:
                with suppress(ConnectionError), socket.create_connection((far, port), 20) as made:
                    made.recv(1)

        # Once it is full, what nobody has used for 5 s makes room every second: should that be just before the one that
        # is too many, it is full again after as many more.
        full, port, asked = "sidestep_vouched_outside_full_total", 20000, 0
        deadline = time.monotonic() + 120
        while not total(full):
            assert time.monotonic() < deadline
            name = min(crowd, key=held)
            assert held(name) < POD_LIMIT - 50, "no pod has all of its own"
            before = sum(map(held, crowd))
            inside(nodes[name].path, lambda ports=range(port, port + 50): crawl(ports))  # type: ignore[misc]
            port, asked = port + 50, asked + 50
            assert sum(map(held, crowd)) <= min(before + 50, NODE_LIMIT)
        assert asked > NODE_LIMIT
        assert total("sidestep_vouched_outside_total") + total(full) == asked
        assert total("sidestep_vouched_outside_total") >= NODE_LIMIT
        with listen(nodes["far"].path, far, PORT) as server, connect(nodes[crowd[0]].path, far, PORT) as client:
            accepted, _ = server.accept()
            with accepted:
                talk(client, accepted)


# -- becoming the mesh's ----------------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path, family: int) -> Iterator[World]:
    """`far` is a pod of the mesh on node 1; the engine of node 0 does not know it."""
    places = {"client": 0, "near": 0, "far": 1}
    with Nodes(tmp_path, places, workers=2, same_node="native", engines=(True, True), cidrs=[]) as nodes:
        nodes.publish()
        made = World(nodes, family)
        made.untell(nodes["far"].workload)
        yield made


class Load:
    """Connections without a pause: each gets its answer, or the load ends with an error. A context manager."""

    def __init__(self, world: World, server: socket.socket) -> None:
        self.world, self.server = world, server
        self.done = [0, 0]
        self.ended = threading.Event()
        self.errors: list[BaseException] = []
        self.threads = [threading.Thread(target=self._guarded, args=[work], daemon=True) for work in self._works()]

    def _works(self) -> list[Callable[[], None]]:
        return [self._serve, lambda: self._ask(0), lambda: self._ask(1)]

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self.errors.append(error)

    def _serve(self) -> None:
        while not self.ended.is_set():
            if select.select([self.server], [], [], 0.1)[0]:
                made, _ = self.server.accept()
                with made:
                    made.sendall(b"word")

    def _ask(self, me: int) -> None:
        while not self.ended.is_set():
            with self.world.connect() as client:
                got = b""
                while part := client.recv(5):
                    got += part
                assert got == b"word"
            self.done[me] += 1

    def __enter__(self) -> "Load":
        for each in self.threads:
            each.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self.ended.set()
        for each in self.threads[1:] + self.threads[:1]:
            each.join(20)

    def more(self, n: int = 10) -> None:
        """Each of both has begun and ended that many."""
        until = [done + n + 1 for done in self.done]
        eventually("connections", lambda: self.errors or all(map(int.__ge__, self.done, until)))
        assert self.errors == []


def test_an_address_becomes_a_mesh_pods(pair: World, closing: Callable[..., None]) -> None:
    """While connections are made without a pause: after the answer to APPLY not one leaves in clear text."""
    server = pair.listen()
    closing(server)
    with Load(pair, server) as load:
        for _ in range(5):
            before = pair.passed()
            load.more()
            assert pair.passed() > before, "the control: it is native"
            pair.tell(pair.nodes.record(pair.far))
            passed = pair.passed()
            load.more(1)  # what was begun before has ended
            in_clear, in_tunnels = pair.counter(pair.far, "to_inbound"), tunnelled(pair)
            load.more()
            assert pair.passed() == passed, "natively after the answer"
            assert pair.counter(pair.far, "to_inbound") == in_clear, "in clear text after the answer"
            assert tunnelled(pair) >= in_tunnels + 20, "the control: they were made, by HBONE"
            pair.untell(pair.far.workload)


def tunnelled(world: World) -> float:
    """Connections that the engine has made by HBONE."""
    found = world.series("istio_tcp_connections_opened_total")
    return sum(value for labels, value in found.items() if "mutual_tls" in labels)
