"""Vouched flows: the kernel passes connections between two pods of one node natively, once the engine has allowed the
pair.

The engine, the programs and the sockets are real. Every case that must not be native begins with a connection of the
same pair that is; every case that must be native says by counters of the programs that it was.
"""

import contextlib
import ctypes
import json
import os
import re
import resource
import secrets
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sidestep._bpf import ffi, lib
from sidestep.wire import batch, channel
from tests.harness.cluster import Nodes, Pod
from tests.harness.engine import CallError
from tests.harness.kubelet import Map, packed
from tests.harness.loss import losing
from tests.harness.netns import connect, inside, listen, run
from tests.harness.stand_in import plain
from tests.net.test_bypass import syn_frame
from tests.net.test_capture import RST_LINGER, eventually
from tests.net.test_engine_policy import is_reset, only, policy, refused, talk
from tests.tunnel import policy_model as model

PORT = 8080
SYN, NOTE = 36, 24  # sizes of struct capture_tuple, struct capture_probe
SLOT = int(ffi.sizeof("struct vouch_slot"))


class World:
    """`client`, `near` and `third` on node 0."""

    def __init__(self, nodes: Nodes, family: int) -> None:
        self.nodes, self.family = nodes, family
        self.client, self.near, self.third = (nodes[name] for name in ("client", "near", "third"))

    @property
    def address(self) -> str:
        return self.near.address(self.family)

    @property
    def source(self) -> str:
        return self.client.address(self.family)

    def listen(self, port: int = PORT, backlog: int = 128) -> socket.socket:
        """The application."""
        return listen(self.near.path, self.address, port, backlog=backlog)

    def connect(self, port: int = PORT, **more: Any) -> socket.socket:
        return connect(self.client.path, self.address, port, **more)

    def open(self, application: socket.socket, **more: Any) -> tuple[socket.socket, socket.socket]:
        """A connection; whether it was native is the caller's to say."""
        client = self.connect(application.getsockname()[1], **more)
        served, peer = application.accept()
        if plain(peer) != plain(client.getsockname()):
            assert plain(peer)[0] == self.source, "the engine takes a port of its own"
        talk(client, served)
        return client, served

    def native(self, application: socket.socket, **more: Any) -> tuple[socket.socket, socket.socket]:
        """A connection that was native: the application sees address and port of the client."""
        before = self.handed()
        client, served = self.open(application, **more)
        assert self.handed() > before
        assert plain(served.getpeername()) == plain(client.getsockname())
        return client, served

    def by_engine(self, application: socket.socket, **more: Any) -> tuple[socket.socket, socket.socket]:
        """A connection that was not."""
        before, captured = self.handed(), self.counter(self.client, "to_outbound")
        client, served = self.open(application, **more)
        assert (self.handed(), self.counter(self.client, "to_outbound")) == (before, captured + 1)
        return client, served

    def with_option(self, application: socket.socket, level: int, name: int, value: bytes) -> None:
        """A connection of a client that sets this option is none."""
        captured = self.counter(self.client, "to_outbound")
        client = self.client_socket()
        client.settimeout(20)
        client.setsockopt(level, name, value)
        client.connect((self.address, application.getsockname()[1]))
        served, _ = application.accept()
        talk(client, served)
        assert self.counter(self.client, "to_outbound") == captured + 1
        closed(client, served)

    def allow(self, application: socket.socket) -> None:
        """The first connection of the pair, and one more as the control."""
        for made in (self.by_engine(application), self.native(application)):
            for end in made:
                end.close()

    def counter(self, pod: Pod, name: str) -> int:
        assert pod.capture is not None
        return pod.capture.counters()[name]

    def handed(self) -> int:
        return self.counter(self.near, "to_application_vouched")

    def late(self) -> int:
        return self.counter(self.near, "vouched_late")

    # -- the engine ---------------------------------------------------------------------------------------------------
    def engine(self) -> Any:
        client = self.nodes.clients[0]
        assert client is not None
        return client

    def set(self, *policies: model.Policy) -> None:
        reply = self.engine().apply(model.records(list(policies), secrets.token_hex(4)))
        assert reply["rejected"] == []

    def remove(self, *names: str) -> None:
        self.engine().apply([batch.Record(batch.Op.POLICY_DEL, name) for name in names])

    def metric(self, name: str, reporter: str = "source") -> float:
        """Summed over label sets."""
        total = 0.0
        for line in self.engine().metrics().splitlines():
            if line.startswith(f"{name}{{") and f'reporter="{reporter}"' in line:
                assert 'connection_security_policy="unknown"' in line
                assert 'source_principal="spiffe://cluster.local/ns/default/sa/client"' in line
                assert 'destination_principal="spiffe://cluster.local/ns/default/sa/near"' in line
                total += float(line.rsplit(" ", 1)[1])
        return total

    def flows(self) -> list[dict[str, Any]]:
        return [each for each in self.engine().dump("connections") if each["protocol"] == "native"]

    # -- maps ---------------------------------------------------------------------------------------------------------
    def map(self, name: str, pod: Pod | None = None) -> Map:
        capture = (pod or self.client).capture
        assert capture is not None
        folder = capture.pins if pod else os.path.dirname(capture.pins) + b"/node"
        return Map(folder + b"/" + name.encode())

    def key(self, source_port: int, port: int = PORT) -> bytes:
        """Of a SYN's note."""
        return packed(self.address) + packed(self.source) + struct.pack("HH", port, source_port)

    def notes(self, name: str = "vouched", pod: Pod | None = None) -> dict[bytes, bytes]:
        with self.map(name, pod) as found:
            return {key: found.lookup(key, NOTE) for key in found.keys(SYN)}

    # -- the allowance ------------------------------------------------------------------------------------------------
    def slots_of(self) -> list[int]:
        """The slot of each allowance of the client's pod."""
        with self.map("verdicts", self.client) as verdicts:
            return [struct.unpack("IIQ", verdicts.lookup(key, 16))[0] for key in verdicts.keys(SYN)]

    def bump(self, slot: int) -> None:
        """As the engine takes an allowance back."""
        with self.map("slots") as slots:
            key = struct.pack("I", slot)
            value = slots.lookup(key, SLOT)
            (generation,) = struct.unpack_from("I", value)
            slots.update(key, struct.pack("I", generation + 1) + value[4:])

    def lost(self) -> tuple[int, int]:
        """A SYN that leaves its note and is lost: source port, initial sequence number. Its socket is closed."""
        with losing(self.client.pair):
            made = self.client_socket()
            made.connect_ex((self.address, PORT))
            port = int(made.getsockname()[1])
            made.close()
        return port, struct.unpack("IIQII", self.notes()[self.key(port)])[0]

    def client_socket(self) -> socket.socket:
        made = inside(self.client.path, lambda: socket.socket(socket.AF_INET6 if self.family == 6 else socket.AF_INET))
        made.setblocking(False)
        return made

    def forge(self, origin: str, source_port: int, sequence: int) -> None:
        """A SYN with the client's address, sent to the near pod by the node (`host`), by a process of the client's own
        pod (`source`), or by another pod.
        """
        host = origin == "host"
        pod = self.near if host else self.client if origin == "source" else self.nodes[origin]
        device = self.nodes.interface(self.near) if host else "eth0"
        router, path = f"/run/netns/{self.nodes.router}", pod.path
        own = link(router, device) if host else link(path, "eth0")
        other = link(path, "eth0") if host else link(router, self.nodes.interface(pod))
        frame = syn_frame(self.source, source_port, self.address, PORT, other + own, sequence=sequence)

        def send() -> None:
            with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as raw:
                if pod is not self.client:
                    raw.setsockopt(263, 20, 1)  # SOL_PACKET, PACKET_QDISC_BYPASS: past its own programs
                raw.sendto(frame, (device, 3))

        inside(router if host else path, send)


def link(path: str, device: str) -> bytes:
    """The MAC of an interface."""
    (found,) = json.loads(run("ip", "-n", path.removeprefix("/run/netns/"), "-j", "link", "show", device))
    return bytes.fromhex(str(found["address"]).replace(":", ""))


@pytest.fixture
def world(tmp_path: Path, family: int) -> Iterator[World]:
    places = {"client": 0, "near": 0, "third": 0}
    with Nodes(tmp_path, places, workers=2, same_node="native", engines=(True, False)) as nodes:
        run("nsenter", f"--net=/run/netns/{nodes.router}", "sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0")
        nodes.publish()
        yield World(nodes, family)


@pytest.fixture
def application(world: World, closing: Callable[..., None]) -> socket.socket:
    made = world.listen()
    closing(made)
    return made


def nobody(application: socket.socket) -> None:
    """The application was not reached."""
    application.settimeout(0)
    with pytest.raises(BlockingIOError):
        application.accept()
    application.settimeout(20)


def is_cut(client: socket.socket, served: socket.socket) -> None:
    """Both ends hear of it: the client of a reset; the other one was destroyed where it was."""
    is_reset(client)
    with pytest.raises(ConnectionError):
        while served.recv(65536):
            pass
        raise AssertionError("an orderly end")


def closed(*ends: socket.socket) -> None:
    for end in ends:
        end.close()


# -- native -----------------------------------------------------------------------------------------------------------


def test_after_the_first_the_kernel_does_it_alone(world: World, application: socket.socket) -> None:
    """Bytes are counted, exactly, by the programs; the engine carries none of them."""
    closed(*world.by_engine(application))
    sent = received = 0
    eventually("the first is counted", lambda: world.metric("istio_tcp_connections_closed_total") == 1)
    before = {
        name: world.metric(f"istio_tcp_{name}_total")
        for name in ("connections_opened", "connections_closed", "received_bytes", "sent_bytes")
    }
    for size in (1, 100, 70_000, 3_000_000):
        client, served = world.native(application)
        for one, other in ((client, served), (served, client)):
            assert pump(one, other, size) == size
        sent += size + 16  # what `talk` says
        received += size + 16
        found = world.flows()
        assert [(each["bytes_sent"], each["bytes_recv"]) for each in found] == [(size + 16, size + 16)]
        assert found[0]["src"].endswith(f":{client.getsockname()[1]}")
        assert found[0]["identity_peer"] == world.near.identity
        closed(client, served)
    eventually("all have ended", lambda: world.metric("istio_tcp_connections_closed_total") == 5)
    for reporter in ("source", "destination"):
        grown = {name: world.metric(f"istio_tcp_{name}_total", reporter) - was for name, was in before.items()}
        assert grown == {
            "connections_opened": 4,
            "connections_closed": 4,
            "received_bytes": sent,
            "sent_bytes": received,
        }
    assert "sidestep_same_node_connections_total 1\n" in world.engine().metrics()


def test_each_has_a_line_in_the_access_log(world: World, application: socket.socket) -> None:
    """Whoever closes first, and whoever resets; with both names, and its own bytes."""
    world.allow(application)
    wanted = {}
    endings = [(size, order, reset) for size in (1, 50_000) for order in ("client", "served") for reset in (0, 1)]
    for size, order, reset in endings:
        client, served = world.native(application)
        assert (pump(client, served, size), pump(served, client, 2 * size)) == (size, 2 * size)
        wanted[f"src.addr={world.flows()[0]['src']} "] = (size + 16, 2 * size + 16, bool(reset))
        first, second = (client, served) if order == "client" else (served, client)
        if reset:
            first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_LINGER)
            first.close()
        else:
            first.shutdown(socket.SHUT_WR)
            assert second.recv(1) == b""
        closed(second, first)
    engine = world.nodes.engines[0]
    assert engine is not None

    def lines() -> list[str]:
        return [line for line in engine.log.read_text().splitlines() if "direction=native" in line]

    eventually("the lines", lambda: len(lines()) >= len(wanted) + 1)
    found = lines()[1:]  # of `allow`
    assert len(found) == len(wanted)
    for line in found:
        (source,) = [each for each in wanted if each in line]
        sent, received, reset_ = wanted[source]
        assert f" bytes_sent={sent} bytes_recv={received} " in line, line
        assert f'dst.identity="{world.near.identity}"' in line and f'src.identity="{world.client.identity}"' in line
        assert ('error="connection reset"' in line) is reset_


def test_those_without_room_to_tell_have_a_line_together(world: World, application: socket.socket) -> None:
    """An engine that does not read: none is lost, in the log or in the counters."""
    world.allow(application)
    engine = world.nodes.engines[0]
    assert engine is not None
    made, untold = 9500, world.counter(world.client, "vouched_untold")
    engine.process.send_signal(signal.SIGSTOP)
    try:
        for _ in range(made):
            client = world.connect()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_LINGER)
            served, _ = application.accept()
            served.sendall(b"x")
            closed(client, served)
    finally:
        engine.process.send_signal(signal.SIGCONT)
    untold = world.counter(world.client, "vouched_untold") - untold
    assert 0 < untold < made

    def told() -> tuple[int, int]:
        lines = [line for line in engine.log.read_text().splitlines() if "direction=native" in line]
        alone = [line for line in lines if "connection complete" in line]
        together = [int(found[0]) for line in lines if (found := re.findall(r"connections complete=(\d+) ", line))]
        return len(alone) - 1, sum(together)  # one of `allow`

    eventually("the lines", lambda: sum(told()) >= made)
    assert told() == (made - untold, untold)
    assert world.metric("istio_tcp_connections_closed_total") == made + 2


def pump(one: socket.socket, other: socket.socket, size: int) -> int:
    """Sends and reads at once; returns what arrived."""
    left, got = size, 0
    one.setblocking(False)
    other.setblocking(False)
    deadline = time.monotonic() + 20
    while got < size and time.monotonic() < deadline:
        readable, writable, _ = select.select([other], [one] if left else [], [], 1)
        if writable:
            left -= one.send(bytes(min(left, 1 << 20)))
        if readable:
            got += len(other.recv(1 << 20))
    one.settimeout(20)
    other.settimeout(20)
    return got


def test_the_other_direction_and_other_ports_are_other_pairs(
    world: World, application: socket.socket, closing: Callable[..., None]
) -> None:
    world.allow(application)
    other = world.listen(PORT + 1)
    back = listen(world.client.path, world.source, PORT)
    closing(other, back)
    closed(*world.by_engine(other))
    before = world.counter(world.near, "to_outbound")
    with connect(world.near.path, world.source, PORT) as client:
        back.accept()[0].close()
        client.close()
    assert world.counter(world.near, "to_outbound") == before + 1


@pytest.mark.parametrize("first", ["client", "application"])
def test_the_same_ports_again(world: World, application: socket.socket, first: str) -> None:
    """Through a TIME_WAIT of either side, and after resets."""
    world.allow(application)
    for ending in ("order", "order", "reset", "order"):
        client, served = world.native(application, source_port=34567)
        one, other = (client, served) if first == "client" else (served, client)
        if ending == "reset":
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_LINGER)
            one.close()
            is_reset(other)
        else:
            one.close()
            assert other.recv(1) == b""
        other.close()
    eventually("all have ended", lambda: world.flows() == [])


def test_half_close_and_late_words(world: World, application: socket.socket) -> None:
    world.allow(application)
    client, served = world.native(application)
    client.shutdown(socket.SHUT_WR)
    assert served.recv(10) == b""
    assert len(world.flows()) == 1
    assert pump(served, client, 500_000) == 500_000
    closed(client, served)


def test_a_connect_that_is_closed_at_once(world: World, application: socket.socket) -> None:
    """The application's end acknowledges a FIN with its first packet."""
    world.allow(application)
    for _ in range(20):
        before = world.handed()
        world.connect().close()
        served, _ = application.accept()
        assert world.handed() == before + 1
        assert served.recv(1) == b""
        served.close()
    assert world.counter(world.near, "vouch_cut") == 0


def test_a_refused_port(world: World, application: socket.socket) -> None:
    world.allow(application)
    application.close()
    before = world.handed()
    with pytest.raises(ConnectionRefusedError):
        world.connect()
    assert world.handed() == before + 1


def test_a_lost_syn_comes_again(world: World, application: socket.socket) -> None:
    world.allow(application)
    with losing(world.client.pair):
        client = world.client_socket()
        client.connect_ex((world.address, PORT))
        first = world.notes()
        assert len(first) == 1
    client.settimeout(20)
    served, peer = application.accept()  # a second later
    assert plain(peer) == plain(client.getsockname())
    talk(client, served)
    assert (world.notes(), len(world.flows())) == ({}, 1)
    closed(client, served)


def test_a_lost_syn_ack_comes_again(world: World, application: socket.socket) -> None:
    world.allow(application)
    with losing(world.near.pair):
        client = world.client_socket()
        client.connect_ex((world.address, PORT))
        eventually("it is at the door", lambda: world.notes("pending", world.near))
    client.settimeout(20)
    served, peer = application.accept()
    assert plain(peer) == plain(client.getsockname())
    talk(client, served)
    closed(client, served)


def test_syn_cookies(world: World, application: socket.socket) -> None:
    world.allow(application)
    run("nsenter", f"--net={world.near.path}", "sysctl", "-qw", "net.ipv4.tcp_syncookies=2")
    for _ in range(5):
        closed(*world.native(application))
    run("nsenter", f"--net={world.near.path}", "sysctl", "-qw", "net.ipv4.tcp_syncookies=1")


def test_simultaneous_open(world: World, application: socket.socket, closing: Callable[..., None]) -> None:
    """Both pairs are vouched for; both ends connect to each other before either SYN arrives."""
    world.allow(application)
    back = listen(world.client.path, world.source, PORT + 1)
    closing(back)
    for _ in range(2):
        with connect(world.near.path, world.source, PORT + 1) as made:
            back.accept()[0].close()
            made.close()
    closed(application, back)
    with losing(world.client.pair), losing(world.near.pair):
        ends = []
        for pod, port, address, to in (
            (world.client, PORT + 1, world.address, PORT),
            (world.near, PORT, world.source, PORT + 1),
        ):
            kind = socket.AF_INET6 if world.family == 6 else socket.AF_INET
            made = inside(pod.path, lambda kind=kind: socket.socket(kind))  # type: ignore[misc]
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((pod.address(world.family), port))
            made.setblocking(False)
            made.connect_ex((address, to))
            ends.append(made)
    for end in ends:
        end.settimeout(20)
        assert select.select([], [end], [], 20)[1]
        assert end.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    talk(ends[0], ends[1])
    assert len(world.flows()) == 2
    closed(*ends)


def test_who_says_nothing_for_long(world: World, application: socket.socket) -> None:
    """The accepted socket has sent no packet: the sweep gives it its fate, and the SYN is forgotten."""
    world.allow(application)
    client = world.connect()
    served, _ = application.accept()
    key = world.key(client.getsockname()[1])
    pending = world.notes("pending", world.near)
    assert key in pending
    capture = world.near.capture
    assert capture is not None
    capture.sweep()
    assert key in world.notes("pending", world.near), "young: it is left alone"
    isn, opened, when, slot, generation = struct.unpack("IIQII", pending[key])
    with world.map("pending", world.near) as found:
        found.update(key, struct.pack("IIQII", isn, opened, when - 200_000_000_000, slot, generation))
    capture.sweep()
    assert world.notes("pending", world.near) == {}
    talk(client, served)
    assert len(world.flows()) == 1
    closed(client, served)


def test_a_note_that_nobody_takes_goes(world: World, application: socket.socket) -> None:
    world.allow(application)
    port, _ = world.lost()
    capture = world.client.capture
    assert capture is not None
    capture.sweep()
    assert list(world.notes()) == [world.key(port)]
    isn, opened, when, slot, generation = struct.unpack("IIQII", world.notes()[world.key(port)])
    with world.map("vouched") as notes:
        notes.update(world.key(port), struct.pack("IIQII", isn, opened, when - 5_000_000_001, slot, generation))
    capture.sweep()
    assert world.notes() == {}


def test_an_old_note_is_worth_nothing(world: World, application: socket.socket) -> None:
    world.allow(application)
    port, isn = world.lost()
    value = struct.unpack("IIQII", world.notes()[world.key(port)])
    with world.map("vouched") as notes:
        notes.update(world.key(port), struct.pack("IIQII", isn, 0, value[2] - 1_000_000_001, *value[3:]))
    before, late = world.handed(), world.late()
    world.forge("host", port, isn)
    eventually("it is dropped", lambda: world.late() == late + 1)
    assert (world.handed(), world.notes()) == (before, {})
    nobody(application)


# -- forged -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["third", "host", "source"])
def test_a_forged_syn_is_not_the_noted_one(world: World, application: socket.socket, origin: str) -> None:
    """With the tuple of a fresh note and another number: not the application's. With the number neither, for it did not
    come by the client's door. The control: the client's own is.
    """
    world.allow(application)
    port, isn = world.lost()
    handed, inbound = world.handed(), world.counter(world.near, "to_inbound")
    turned = world.counter(world.client, "turned")
    world.forge(origin, port, isn + 7 & 0xFFFFFFFF)
    if origin == "source":  # a packet socket of the pod itself: it does not leave
        eventually("it was turned around", lambda: world.counter(world.client, "turned") > turned)
    else:
        eventually("it is the engine's", lambda: world.counter(world.near, "to_inbound") == inbound + 1)
    assert world.handed() == handed
    nobody(application)
    closed(*world.native(application))
    if origin != "source":
        handed, late = world.handed(), world.late()
        port, isn = world.lost()
        world.forge(origin, port, isn)
        eventually("it is dropped", lambda: world.late() == late + 1)
        assert world.handed() == handed
        nobody(application)


def test_a_syn_is_for_once(world: World, application: socket.socket) -> None:
    """A tuple of before, sent again by somebody who saw it: the engine's. A SYN under way, sent again: dropped."""
    world.allow(application)
    client, served = world.native(application)
    port = client.getsockname()[1]
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_LINGER)
    closed(client, served)
    handed = world.handed()
    inbound = world.counter(world.near, "to_inbound")
    world.forge("host", port, 12345)
    eventually("it is the engine's", lambda: world.counter(world.near, "to_inbound") == inbound + 1)
    with losing(world.near.pair):
        client = world.client_socket()
        client.connect_ex((world.address, PORT))
        eventually("it is handed over", lambda: world.handed() == handed + 1)
        (pending,) = world.notes("pending", world.near).values()
        late = world.late()
        world.forge("host", client.getsockname()[1], struct.unpack("IIQII", pending)[0])
        eventually("the second is dropped", lambda: world.late() == late + 1)
        client.close()
    assert world.handed() == handed + 1
    nobody(application)


def test_raw_sockets_of_the_source_pod_get_no_note(world: World, application: socket.socket) -> None:
    world.allow(application)
    frame = syn_frame(world.source, 40000, world.address, PORT, b"", sequence=99)[2:]

    def send() -> None:
        kind = socket.AF_INET6 if world.family == 6 else socket.AF_INET
        with socket.socket(kind, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
            raw.sendto(frame, (world.address, 0))

    turned, handed = world.counter(world.client, "turned"), world.handed()
    inside(world.client.path, send)
    eventually("it was turned around", lambda: world.counter(world.client, "turned") > turned)
    assert (world.notes(), world.handed()) == ({}, handed)
    nobody(application)


def test_a_socket_that_was_native_is_captured_for_another_port(
    world: World, application: socket.socket, closing: Callable[..., None]
) -> None:
    """connect(AF_UNSPEC) and again: each SYN decides anew."""
    world.allow(application)
    other = world.listen(PORT + 1)
    closing(other)
    client, served = world.native(application)
    unspecified = struct.pack("H14x", socket.AF_UNSPEC)
    assert _connect(client, unspecified) == 0
    is_reset(served)
    captured, handed = world.counter(world.client, "to_outbound"), world.handed()
    client.connect((world.address, PORT + 1))
    again, _ = other.accept()
    talk(client, again)
    assert (world.counter(world.client, "to_outbound"), world.handed()) == (captured + 1, handed)
    closed(client, again, served)


def _connect(made: socket.socket, address: bytes) -> int:
    return int(ctypes.CDLL(None).connect(made.fileno(), address, len(address)))


# -- full -------------------------------------------------------------------------------------------------------------


def test_without_room_for_a_note_it_is_the_engines(world: World, application: socket.socket) -> None:
    world.allow(application)
    with world.map("vouched") as notes:
        now = time.monotonic_ns()
        for n in range(4096):
            notes.update(struct.pack("32xHH", 1, n), struct.pack("IIQII", 0, 0, now, 0, 0))
    full = world.counter(world.client, "vouch_full")
    closed(*world.by_engine(application))
    assert world.counter(world.client, "vouch_full") == full + 1


def test_without_room_at_the_door_it_is_the_engines(world: World, application: socket.socket) -> None:
    """The SYN is dropped; when it comes again the source has heard of it. Once there is room it is native again."""
    world.allow(application)
    late, captured = world.late(), world.counter(world.client, "to_outbound")
    with world.map("pending", world.near) as found:
        for n in range(2048):
            found.update(struct.pack("32xHH", 1, n), struct.pack("IIQII", 0, 0, 1, 0, 0))
    client = world.connect()
    served, _ = application.accept()
    talk(client, served)
    assert (world.late(), world.counter(world.client, "to_outbound")) == (late + 1, captured + 1)
    assert world.flows() == []
    closed(client, served)
    capture = world.near.capture
    assert capture is not None
    capture.sweep()
    closed(*world.by_engine(application))
    (slot,) = world.slots_of()
    with world.map("slots") as slots:
        value = slots.lookup(struct.pack("I", slot), SLOT)
        full = int(ffi.offsetof("struct vouch_slot", "full"))
        slots.update(struct.pack("I", slot), value[:full] + struct.pack("Q", 1) + value[full + 8 :])  # as if long ago
    closed(*world.native(application))


def test_what_said_nothing_and_is_gone_is_swept(world: World, application: socket.socket) -> None:
    """A reset before the first packet leaves its SYN at the door. Many of them make room; what is open there stays,
    with its fate.
    """
    world.allow(application)
    silent = world.connect(), application.accept()[0]
    for _ in range(700):
        client = world.connect()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_LINGER)
        served, _ = application.accept()
        closed(client, served)
    assert len(world.notes("pending", world.near)) > 512
    capture = world.near.capture
    assert capture is not None

    def swept() -> bool:
        capture.sweep()
        return len(world.notes("pending", world.near)) <= 512

    eventually("there is room", swept)
    assert len(world.flows()) == 1
    talk(*silent)
    closed(*silent)


def test_ip_options_are_the_engines(world: World, application: socket.socket) -> None:
    world.allow(application)
    if world.family == 6:
        return  # headers between IPv6 and TCP are dropped (tests/net/test_bypass.py)

    world.with_option(application, socket.IPPROTO_IP, socket.IP_OPTIONS, b"\x01\x01\x01\x00")


def test_without_room_for_an_allowance_it_is_the_engines(world: World, application: socket.socket) -> None:
    with world.map("verdicts", world.client) as verdicts:
        for n in range(1024):
            verdicts.update(struct.pack("32xHH", 1, n), bytes(16))
    for _ in range(3):
        closed(*world.by_engine(application))
    assert "sidestep_vouched_full_total 3\n" in world.engine().metrics()


def test_a_lost_note_is_recognised(world: World, application: socket.socket) -> None:
    """The source went its native way and nobody took its note, because the destination's program had been taken out: a
    reset, not one without identity.
    """
    world.allow(application)
    inbound = world.counter(world.near, "to_inbound")
    run("nsenter", f"--net={world.near.path}", "tc", "filter", "del", "dev", "eth0", "ingress", "pref", "1")
    with pytest.raises(ConnectionError), world.connect() as client:
        while True:
            client.sendall(b"x")
            if not client.recv(1):
                raise ConnectionResetError
    # one, and more where a byte comes when its connection has been reset already
    assert world.counter(world.near, "to_inbound") > inbound
    assert 'reason="late_vouched"' in world.engine().metrics()
    nobody(application)


# -- taken back -------------------------------------------------------------------------------------------------------


def test_a_deny_ends_what_is_open_and_refuses_what_comes(
    world: World, application: socket.socket, closing: Callable[..., None]
) -> None:
    world.allow(application)
    other = world.listen(PORT + 1)
    closing(other)
    world.allow(other)
    cut, kept = world.native(application), world.native(other)
    port = cut[0].getsockname()[1]
    started = time.monotonic()
    world.set(policy("late", only(destinationPorts=[PORT])))
    answered = time.monotonic()
    is_cut(*cut)
    print(
        f"answered after {(answered - started) * 1000:.1f} ms, both ends reset after "
        f"{(time.monotonic() - started) * 1000:.1f} ms"
    )
    assert [each["dst"].rsplit(":", 1)[1] for each in world.flows()] == [str(PORT + 1)]
    talk(*kept)
    assert refused(world.client.path, world.address)
    nobody(application)
    closed(*world.native(other))
    last = world.engine().dump("denials")
    assert [each["policy"] for each in last] == ["default/late"] * 2
    assert last[0]["src"].endswith(f":{port}")
    metrics = world.engine().metrics()
    assert 'sidestep_policy_denied_total{policy="default/late",destination_workload="near"' in metrics
    world.remove("default/late")
    world.allow(application)
    closed(*cut, *kept)


def test_by_the_programs_alone(world: World, application: socket.socket) -> None:
    """Without anybody who destroys sockets: the next packet of either side is turned round, which resets that side."""
    world.allow(application)
    client, served = world.native(application)
    (key,) = world.slots_of()
    world.bump(key)
    turned = world.counter(world.client, "vouch_cut")
    client.sendall(b"x" * 10)
    is_reset(client)
    assert world.counter(world.client, "vouch_cut") > turned
    nothing = served.recv(100) if select.select([served], [], [], 0)[0] else b""
    assert b"x" not in nothing
    with contextlib.suppress(ConnectionError):
        served.sendall(b"y")
    is_reset(served)
    closed(client, served)


@pytest.mark.parametrize("what", ["label", "dry run", "policy on its way", "allow policy"])
def test_what_changes_is_decided_anew(world: World, application: socket.socket, what: str) -> None:
    """An open flow that is still allowed goes on; the next connection meets the engine."""
    world.allow(application)
    open_ends = world.native(application)
    if what == "label":
        world.nodes.apply(world.nodes.record(world.near, canonical_name="other"))
    elif what == "dry run":
        port = plain(open_ends[0].getsockname())[1]
        tried = 'sidestep_policy_dry_run_denied_total{policy="default/try"'
        engine = world.nodes.engines[0]
        assert engine is not None

        def told() -> list[str]:
            return [line for line in engine.log.read_text().splitlines() if "dry run would deny" in line]

        def count() -> float:
            found = [line for line in world.engine().metrics().splitlines() if line.startswith(tried)]
            return sum(float(line.rsplit(" ", 1)[1]) for line in found)

        before = len(told())
        world.set(policy("try", only(destinationPorts=[PORT + 1]), dryRun=True))
        assert count() == 0  # the control: it would deny another port
        world.set(policy("try", [[]], dryRun=True))
        assert count() == 1  # the one that is open is told of it, once
        world.set(policy("beside", only(destinationPorts=[PORT + 1])))
        assert count() == 1
        eventually("its line", lambda: len(told()) > before)
        (line,) = told()[before:]
        assert line.partition("src.addr=")[2].partition(" ")[0].endswith(f":{port}")
        assert f'src.identity="{world.client.identity}"' in line and 'policy="default/try"' in line
    elif what == "policy on its way":
        record = world.nodes.record(world.near)
        record.workload.authorization_policies.append("default/coming")
        world.nodes.apply(record)
    else:
        mine = world.client.identity.removeprefix("spiffe://")
        world.set(policy("some", only(principals=[{"Exact": mine}]), action="Allow"))
        closed(*world.native(application))  # decided anew already: it names this pair
        world.set(policy("some", only(principals=[{"Exact": mine + "x"}]), action="Allow"))
        is_cut(*open_ends)
        assert refused(world.client.path, world.address)
        closed(*open_ends)
        return
    talk(*open_ends)
    if what == "policy on its way":
        world.set(policy("coming", only(destinationPorts=[1]), scope="WorkloadSelector"))
    made = world.by_engine(application)
    talk(*open_ends)
    if what == "dry run":
        closed(*world.by_engine(application))
        assert count() == 3  # the two that the engine carried
    else:
        closed(*world.native(application))
    closed(*made, *open_ends)


def test_an_address_that_becomes_anothers(world: World, application: socket.socket) -> None:
    world.allow(application)
    ends = world.native(application)
    moved = world.nodes.record(world.third)
    moved.workload.addresses.append(packed(world.address)[-4 if world.family == 4 else -16 :])
    gone = batch.Record(batch.Op.ADDRESS_DEL, world.near.workload)
    other = batch.Record(batch.Op.ADDRESS_SET, world.third.workload, "9", moved.SerializeToString())
    assert world.engine().apply([gone, other])["rejected"] == []
    is_cut(*ends)
    closed(*ends)


def test_a_record_that_goes_leaves_what_is_open(world: World, application: socket.socket) -> None:
    world.allow(application)
    ends = world.native(application)
    world.engine().apply([batch.Record(batch.Op.ADDRESS_DEL, world.near.workload)])
    talk(*ends)
    before = world.handed()
    assert refused(world.client.path, world.address)
    assert world.handed() == before
    world.nodes.publish()
    world.allow(application)
    talk(*ends)
    closed(*ends)


@pytest.mark.parametrize("which", ["client", "near"])
def test_a_draining_pod_gets_no_new_one(world: World, application: socket.socket, which: str) -> None:
    world.allow(application)
    ends = world.native(application)
    pod = world.nodes[which]
    world.engine().call(channel.POD_MODE, {"uid": pod.uid, "mode": "draining"})
    closed(*world.by_engine(application))
    talk(*ends)
    world.engine().call(channel.POD_MODE, {"uid": pod.uid, "mode": "serving"})
    world.allow(application)
    talk(*ends)
    closed(*ends)


def test_through_every_mode(world: World, application: socket.socket) -> None:
    """An open flow goes on while the modes of both pods change."""
    world.allow(application)
    ends = world.native(application)
    for pod in (world.client, world.near):
        capture = pod.capture
        assert capture is not None
        for mode in (lib.MODE_DRAINING, lib.MODE_LENIENT, lib.MODE_STRICT, lib.MODE_DRAINING, lib.MODE_STRICT):
            capture.set_mode(mode)
            talk(*ends)
            assert capture.old() == 0
    closed(*world.native(application))
    closed(*ends)


@pytest.mark.parametrize("setting", ["direct", "mtls"])
def test_turned_off(world: World, application: socket.socket, setting: str) -> None:
    world.allow(application)
    ends = world.native(application)
    settings = {"cluster_cidrs": ["10.0.0.0/8", "fd00::/8"], "same_node": setting}
    world.engine().call(channel.SETTINGS, settings)
    for _ in range(2):
        closed(*world.by_engine(application))
    talk(*ends)
    closed(*ends)


def test_a_pod_with_another_identity(world: World, application: socket.socket) -> None:
    """What was opened as the old one ends; the new one is somebody else."""
    world.allow(application)
    ends = world.native(application)
    was, world.client.account = world.client.account, "other"
    world.nodes.certify(world.client, world.nodes.authority.leaf(world.client.identity))
    world.nodes.add(world.client)
    is_cut(*ends)
    world.client.account = was
    closed(*ends)


def test_the_silent_are_cut_too(world: World, application: socket.socket) -> None:
    """The accepted socket has sent nothing: only its SYN is remembered. Its client is ended, and a reset reaches it."""
    world.allow(application)
    pairs = []
    for _ in range(50):
        client = world.connect()
        pairs.append((client, application.accept()[0]))
    assert len(world.flows()) == 50
    world.set(policy("late", only(destinationPorts=[PORT])))
    for pair in pairs:
        for end in pair:
            with pytest.raises(ConnectionError):
                end.recv(1)
        closed(*pair)
    assert world.flows() == []


def test_a_deny_ends_a_thousand_before_it_is_answered(
    world: World, application: socket.socket, closing: Callable[..., None]
) -> None:
    """Each has ended when the change is acknowledged; flows of another port go on. An accepted socket that has said
    nothing is not seen by the engine: its client's reset is on its way to it, and what it sends goes nowhere.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8192)), hard))
    world.allow(application)
    other = world.listen(PORT + 1)
    closing(other)
    world.allow(other)
    kept = world.native(other)
    pairs = []
    for n in range(1000):
        client = world.connect()
        served, _ = application.accept()
        pairs.append((client, served))
        closing(client, served)
        if n % 2:  # the other half has never had an answer
            talk(client, served)
    assert len(world.flows()) == 1001
    started = time.monotonic()
    world.set(policy("late", only(destinationPorts=[PORT])))
    print(f"1000 flows had ended after {(time.monotonic() - started) * 1000:.1f} ms")
    for n, (client, served) in enumerate(pairs):
        client.setblocking(False)
        served.setblocking(n % 2 == 0)
        for end in (client, served):
            with pytest.raises(ConnectionError):
                end.recv(1)
    talk(*kept)
    assert len(world.flows()) == 1
    closed(*kept)


def test_an_identity_that_ends(world: World, application: socket.socket) -> None:
    world.allow(application)
    ends = world.native(application)
    world.engine().call(channel.IDENTITY_DEL, {"identity": world.client.identity})
    client = world.client_socket()
    before = world.handed()
    client.connect_ex((world.address, PORT))
    eventually("it is held", lambda: any(each["state"] == "held" for each in world.engine().dump("connections")))
    assert world.handed() == before
    talk(*ends)
    closed(client, *ends)


# -- engines come and go ----------------------------------------------------------------------------------------------


def test_the_engine_dies_and_another_comes(world: World, application: socket.socket) -> None:
    """What is open goes on and is counted; nothing new is native without an engine; the next engine judges again."""
    world.allow(application)
    ends = world.native(application)
    engine = world.nodes.engines[0]
    assert engine is not None
    engine.process.kill()
    engine.process.wait()
    talk(*ends)
    before = world.handed()
    with pytest.raises((ConnectionError, TimeoutError)):
        world.connect(timeout=2)
    assert world.handed() == before
    world.nodes.start(0)
    talk(*ends)
    world.nodes.publish()
    talk(*ends)
    assert [each["bytes_sent"] for each in world.flows()] == [48 + 16]
    eventually("counted", lambda: world.metric("istio_tcp_connections_opened_total") == 1)
    world.allow(application)
    talk(*ends)
    closed(*ends)
    eventually("ended", lambda: world.metric("istio_tcp_connections_closed_total") == 3)
    assert world.metric("istio_tcp_connections_opened_total") == 3


def test_the_next_engine_cuts_what_is_denied(world: World, application: socket.socket) -> None:
    world.allow(application)
    ends = world.native(application)
    engine = world.nodes.engines[0]
    assert engine is not None
    engine.process.kill()
    engine.process.wait()
    world.nodes.start(0)
    world.nodes.publish()
    talk(*ends)
    world.set(policy("late", only(destinationPorts=[PORT])))
    is_cut(*ends)
    closed(*ends)


def restarted(world: World, pods: list[str]) -> None:
    """Another engine that has these pods and no state."""
    engine = world.nodes.engines[0]
    assert engine is not None
    engine.process.kill()
    engine.process.wait()
    world.nodes.start(0, pods=pods)


def piece(world: World, *parts: str | model.Policy, whole: bool = False) -> None:
    """Some of the state: records of pods by name, and policies."""
    records = [
        batch.Record(batch.Op.ADDRESS_SET, world.nodes[each].workload, "1", made.SerializeToString())
        for each in parts
        if isinstance(each, str)
        for made in [world.nodes.record(world.nodes[each])]
    ]
    records += model.records([each for each in parts if not isinstance(each, str)], secrets.token_hex(4))
    assert world.engine().apply(records, whole=whole)["rejected"] == []


@pytest.mark.parametrize("denied", [False, True])
def test_the_next_engine_judges_when_it_has_all(world: World, application: socket.socket, denied: bool) -> None:
    """Its state comes in pieces: the allow policy of others before the one of this pair, records in any order, a pod
    last.
    """
    mine = world.client.identity.removeprefix("spiffe://")
    others = policy("others", only(principals=[{"Exact": mine + "x"}]), action="Allow")
    this = policy("this", only(principals=[{"Exact": mine}]), action="Allow")
    world.set(others, this)
    world.allow(application)
    ends = world.native(application)
    restarted(world, ["client", "third"])
    for parts in (["near"], [others], ["client"], ["third"]):
        piece(world, *parts)
        talk(*ends)
    world.nodes.certify(world.near, world.nodes.authority.leaf(world.near.identity))
    world.nodes.add(world.near)
    talk(*ends)
    if denied:
        piece(world, whole=True)
        is_cut(*ends)
        closed(*ends)
        return
    piece(world, this, whole=True)
    talk(*ends)
    world.allow(application)
    talk(*ends)
    closed(*ends)


def test_half_a_state_allows_nothing(world: World, application: socket.socket) -> None:
    """The engine has who comes meanwhile, and lets them in when it has the rest."""
    restarted(world, ["client", "near", "third"])
    piece(world, "near", "client")
    before, captured = world.handed(), world.counter(world.client, "to_outbound")
    held = [world.connect() for _ in range(3)]
    eventually("held", lambda: sum(pod["held"] for pod in world.engine().dump("pods")) == len(held))
    assert (world.handed(), world.counter(world.client, "to_outbound")) == (before, captured + len(held))
    piece(world, whole=True)
    served = [application.accept()[0] for _ in held]
    assert world.handed() == before
    for ends, others in ((held, served), (served, held)):
        for end in ends:
            end.sendall(b"x")
        assert [end.recv(1) for end in others] == [b"x"] * len(held)
    closed(*held, *served)
    closed(*world.native(application))


def test_the_next_engine_cuts_what_a_piece_denies(world: World, application: socket.socket) -> None:
    """No other piece can allow it."""
    world.allow(application)
    ends = world.native(application)
    restarted(world, ["client", "near", "third"])
    piece(world, "client")
    piece(world, policy("late", only(destinationPorts=[PORT])))
    is_cut(*ends)
    closed(*ends)


@pytest.mark.parametrize("left", ["client", "near"])
def test_the_next_engine_and_an_end_that_left_the_mesh(world: World, application: socket.socket, left: str) -> None:
    """The flow goes on, is told and counted by the end that is left, with both names; a policy still ends it."""
    world.allow(application)
    kept, cut = world.native(application), world.native(application)
    pod = world.nodes[left]
    world.engine().call(channel.POD_DEL, {"uid": pod.uid})
    assert pod.capture is not None
    pod.capture.detach()
    pod.capture = None
    talk(*kept)
    restarted(world, [name for name in ("client", "near", "third") if name != left])
    world.nodes.publish()
    talk(*kept)
    assert len(world.flows()) == 2
    eventually("counted", lambda: world.metric("istio_tcp_connections_opened_total") == 2)
    closed(*kept)
    eventually("ended", lambda: world.metric("istio_tcp_connections_closed_total") == 1)
    world.set(policy("late", only(destinationPorts=[PORT])))
    with pytest.raises(ConnectionError):
        while cut[0].recv(65536):
            pass
        raise AssertionError("an orderly end")
    eventually("ended too", lambda: world.metric("istio_tcp_connections_closed_total") == 2)
    assert world.metric("istio_tcp_connections_opened_total") == 2
    closed(*cut)


def test_a_pod_leaves(world: World, application: socket.socket) -> None:
    """Un-enrolled with a flow open: it goes on, and nothing of ours is left."""
    world.allow(application)
    ends = world.native(application)
    for name in ("client", "near", "third"):
        pod = world.nodes[name]
        capture = pod.capture
        assert capture is not None
        world.engine().call(channel.POD_DEL, {"uid": pod.uid})
        capture.detach()
        pod.capture = None
        talk(*ends)
    assert world.engine().dump("connections") == []
    closed(*ends)
    with pytest.raises(CallError):
        world.engine().call(channel.POD_STATS, {"uid": world.client.uid})
