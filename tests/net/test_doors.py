"""Doors: what two pods of a node say to each other natively goes from one pod's link to the other's, and nothing else
that is on the host's network can read it or add to it.

`meshed` False is the control: the same pods and the same attack without the mesh.
"""

import contextlib
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sidestep._bpf import ffi, lib
from tests.harness.cluster import Nodes, Pod
from tests.harness.kubelet import Map, packed
from tests.harness.loss import lose_object
from tests.harness.netns import Pair, Sniffer, connect, inside, listen, run
from tests.harness.stand_in import Capture, CaptureError, StandIn
from tests.net import attacker, test_vouched
from tests.net.test_bypass import syn_frame
from tests.net.test_capture import eventually
from tests.net.test_engine_policy import talk
from tests.net.test_vouched import PORT, World, closed, link

world = test_vouched.world
application = test_vouched.application
PSH_ACK, FIN_ACK = 0x18, 0x11
SO_MAX_PACING_RATE = 47
ALONE = 64  # of capture.bpf.c
TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ = 19, 20, 21


@contextlib.contextmanager
def pods(tmp_path: Path, meshed: bool) -> Iterator[Nodes]:
    """client, near and third on one node, with the mesh and natively or without."""
    places = {"client": 0, "near": 0, "third": 0}
    with Nodes(tmp_path, places, workers=2, same_node="native", engines=(meshed, False)) as nodes:
        run("nsenter", f"--net=/run/netns/{nodes.router}", "sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0")
        if meshed:
            nodes.publish()
        yield nodes


@contextlib.contextmanager
def opened(nodes: Nodes, meshed: bool, family: int) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection from client to near; with the mesh a native one."""
    world = World(nodes, family)
    with world.listen() as application:
        if meshed:
            world.allow(application)
            made = world.native(application)
        else:
            made = world.connect(), application.accept()[0]
        yield made
        closed(*made)


def sequence(end: socket.socket) -> int:
    """Of the next byte that it sends (tcp(7) does not say how: TCP_REPAIR, as CRIU uses it)."""
    end.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    end.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, 2)
    found = end.getsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ)
    end.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, -1)
    return found & 0xFFFFFFFF


def odd(frame: bytes) -> bytes:
    """The same segment behind IPv4 options, or behind an IPv6 extension header: both are read by any stack."""
    if frame[12:14] == b"\x08\x00":
        head = bytearray(frame[14:34] + b"\x01" * 4)  # no-operation
        head[0] = 0x46
        head[2:4] = struct.pack("!H", len(frame) - 14 + 4)
        head[10:12] = bytes(2)
        head[10:12] = struct.pack("!H", attacker.checksum(bytes(head)))
        return frame[:14] + bytes(head) + frame[34:]
    head = bytearray(frame[14:54])
    head[4:6] = struct.pack("!H", struct.unpack("!H", frame[18:20])[0] + 8)
    head[6] = 60  # destination options: six bytes of padding
    return frame[:14] + bytes(head) + bytes([6, 0, 1, 4, 0, 0, 0, 0]) + frame[54:]


def forge(nodes: Nodes, family: int, origin: str, frame: Callable[[bytes], bytes]) -> None:
    """Sends a frame to the near pod, from another pod or from the host; `frame` makes it of the MACs."""
    near = nodes["near"]
    router = f"/run/netns/{nodes.router}"
    path, device = (router, nodes.interface(near)) if origin == "host" else (nodes[origin].path, "eth0")
    own = link(path, device)
    other = link(near.path, "eth0") if origin == "host" else link(router, nodes.interface(nodes[origin]))

    def send() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as raw:
            raw.setsockopt(263, 20, 1)  # SOL_PACKET, PACKET_QDISC_BYPASS
            raw.sendto(frame(other + own), (device, 3))

    inside(path, send)


def counter(pod: Pod, name: str) -> int:
    assert pod.capture is not None
    return pod.capture.counters()[name]


# -- who is on the host's network -------------------------------------------------------------------------------------


@pytest.mark.parametrize("meshed", [True, False], ids=["meshed", "plain"])
def test_a_network_that_is_deceived_sees_nothing(tmp_path: Path, meshed: bool, family: int) -> None:
    """The other pod's address is the third pod's now, as ARP spoofing on a bridge makes it: without the mesh the bytes
    of the open connection go there; natively they do not, and new connections still reach whom they are for.
    """
    canary = os.urandom(12).hex().encode()
    with pods(tmp_path, meshed) as nodes, opened(nodes, meshed, family) as (client, served):
        near, third = nodes["near"], nodes["third"]
        bits = "32" if family == 4 else "128"
        via = ("via", third.address(family), "dev", nodes.interface(third))
        run("ip", "-n", nodes.router, "route", "add", f"{near.address(family)}/{bits}", *via)
        with Sniffer(third.path) as sniffer:
            client.sendall(canary)
            if not meshed:
                eventually("it is told", lambda: any(canary in frame for frame in sniffer.frames()))
                return
            assert served.recv(100) == canary
            served.sendall(canary)
            assert client.recv(100) == canary
            world = World(nodes, family)
            with world.listen(PORT + 1) as other:
                closed(*world.by_engine(other))
                again, again_served = world.native(other)
                again.sendall(canary)
                assert again_served.recv(100) == canary
                closed(again, again_served)
            assert not any(canary in frame for frame in sniffer.frames())


@pytest.mark.parametrize("meshed", [True, False], ids=["meshed", "plain"])
@pytest.mark.parametrize("origin", ["third", "host"])
@pytest.mark.parametrize(
    ("flags", "payload", "shape"),
    [(PSH_ACK, b"forged", "plain"), (FIN_ACK, b"", "plain"), (PSH_ACK, b"forged", "odd"), (FIN_ACK, b"", "odd")],
    ids=["bytes", "end", "odd bytes", "odd end"],
)
def test_who_knows_everything_adds_nothing(
    tmp_path: Path, meshed: bool, family: int, origin: str, flags: int, payload: bytes, shape: str
) -> None:
    """Bytes, or an end, with the tuple of an open flow and its next sequence number: without the mesh they are the
    application's; they did not come by the client's door, so they are nobody's.
    """
    with pods(tmp_path, meshed) as nodes, opened(nodes, meshed, family) as (client, served):
        port, number = client.getsockname()[1], sequence(client)
        source, target = nodes["client"].address(family), nodes["near"].address(family)

        def frame(macs: bytes) -> bytes:
            made = syn_frame(source, port, target, PORT, macs, flags=flags, sequence=number, payload=payload, ack=back)
            return made if shape == "plain" else odd(made)

        back = sequence(served)
        before = counter(nodes["near"], "vouched_astray") if meshed else 0
        forge(nodes, family, origin, frame)
        if not meshed:
            assert served.recv(100) == payload
            return
        eventually("it is dropped", lambda: counter(nodes["near"], "vouched_astray") > before)
        client.sendall(b"true")
        assert served.recv(100) == b"true"
        talk(client, served)


def test_nobody_speaks_for_another_pod_at_a_door(tmp_path: Path, family: int) -> None:
    """A pod that forwards what others hand it (no socket is at the packet) does not get another's address through its
    own door; the control: its own address it does.
    """
    with pods(tmp_path, True) as nodes, opened(nodes, True, family) as (client, served):
        third, near = nodes["third"], nodes["near"]
        world = World(nodes, family)
        port = client.getsockname()[1]
        astray, by_door = counter(near, "vouched_astray"), counter(third, "by_door")
        number, back = sequence(client), sequence(served)

        def ack(macs: bytes) -> bytes:
            return syn_frame(world.source, port, world.address, PORT, macs, flags=0x10, sequence=number, ack=back)

        forge(nodes, family, "third", ack)
        eventually("it is dropped", lambda: counter(near, "vouched_astray") == astray + 1)
        assert counter(third, "by_door") == by_door
        with listen(near.path, world.address, PORT + 2) as other:
            for _ in range(2):
                with connect(third.path, world.address, PORT + 2) as own, other.accept()[0] as accepted:
                    talk(own, accepted)
        assert counter(third, "by_door") > by_door
        talk(client, served)


def test_a_socket_of_one_device_is_the_engines(world: World, application: socket.socket) -> None:
    """The other end's door would not find it."""
    world.allow(application)
    world.with_option(application, socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")


def test_a_pod_that_makes_its_packets_anothers_gets_no_mark(world: World, application: socket.socket) -> None:
    """The third pod has a vouched flow of its own, and a rule that makes its packets the client's: they
    do not go by the door, so they end nothing and add nothing.
    """
    world.allow(application)
    client, served = world.native(application)
    with listen(world.near.path, world.address, PORT + 2) as other:
        closed(connect(world.third.path, world.address, PORT + 2), other.accept()[0])
        own = connect(world.third.path, world.address, PORT + 2)
        accepted, _ = other.accept()
        talk(own, accepted)
        at = "ip6" if world.family == 6 else "ip"
        nft = ("nsenter", f"--net={world.third.path}", "nft")
        chain = "add chain inet lie p { type filter hook output priority 0; }"
        port = client.getsockname()[1]
        rule = f"{at} daddr {world.address} {at} saddr set {world.source} tcp sport set {port} tcp dport set {PORT}"
        by_door, astray = world.counter(world.third, "by_door"), world.counter(world.near, "vouched_astray")
        run(*nft, f"add table inet lie; {chain}; add rule inet lie p {rule}")
        own.send(b"forged")
        eventually("it is dropped", lambda: world.counter(world.near, "vouched_astray") > astray)
        assert world.counter(world.third, "by_door") == by_door
        talk(client, served)
        closed(own, accepted)
    closed(client, served)


# -- bulk -------------------------------------------------------------------------------------------------------------


def bulk(pod: Pod) -> dict[str, int]:
    """What the pod's door remembers of large packets: variables of capture.bpf.c."""
    assert pod.capture is not None
    bpftool = ("/usr/sbin/bpftool", "-j")
    door = json.loads(run(*bpftool, "prog", "show", "pinned", f"{pod.capture.pins.decode()}/door"))
    shown = [json.loads(run(*bpftool, "map", "show", "id", str(number))) for number in door["map_ids"]]
    (number,) = (each["id"] for each in shown if each["name"].endswith(".bss"))
    (dump,) = json.loads(run(*bpftool, "map", "dump", "id", str(number)))
    return {name: value for each in dump["formatted"]["value"][".bss"] for name, value in each.items()}


def carry(client: socket.socket, served: socket.socket, amount: int) -> None:
    """`amount` bytes from end to end."""

    def take() -> None:
        left = amount
        while left:
            left -= len(served.recv(min(left, 1 << 20))) or left

    taker = threading.Thread(target=take)
    taker.start()
    client.sendall(bytes(amount))
    taker.join(60)
    assert not taker.is_alive()


def test_a_door_lingers_for_bulk_that_is_paced_and_alone(world: World, application: socket.socket) -> None:
    """And for no other: not without timers, not for two that take turns. Whether it then takes any longer is the
    machine's to say."""
    world.allow(application)

    def stream(paced: bool) -> tuple[socket.socket, socket.socket]:
        client = world.client_socket()
        client.settimeout(60)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        if paced:
            client.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, struct.pack("@L", 4_000_000_000))
        client.connect((world.address, PORT))
        served, _ = application.accept()
        served.settimeout(60)
        return client, served

    with_timers, other, without = stream(True), stream(True), stream(False)

    def until(ends: tuple[socket.socket, socket.socket], what: str, amount: int) -> dict[str, int]:
        """Sends until a variable is as large as that."""
        for _ in range(40):
            carry(*ends, 16 << 20)
            if (found := bulk(world.client))[what] >= amount:
                return found
        raise AssertionError(found)

    assert until(without, "bulk_run", ALONE)["lingered"] == 0
    assert bulk(world.near)["bulk_of"] == 0, "the other end sends nothing"
    before = until(with_timers, "lingered", 1)
    carry(*without, 1 << 19)
    for _ in range(20):
        for ends in (other, without):
            carry(*ends, 1 << 19)
    after = bulk(world.client)
    assert after["lingered"] == before["lingered"]
    assert after["bulk_of"] != before["bulk_of"]
    assert after["bulk_run"] < ALONE
    assert bulk(world.near)["lingered"] == 0
    for ends in (with_timers, other, without):
        closed(*ends)


# -- doors that are not there -----------------------------------------------------------------------------------------


def test_without_a_door_the_engine_carries_it(world: World, application: socket.socket) -> None:
    """What is open goes on."""
    world.allow(application)
    kept = world.native(application)
    capture = world.near.capture
    assert capture is not None
    with world.map("doors") as doors:
        for family in (4, 6):
            doors.delete(packed(world.near.address(family)))
    for _ in range(2):
        closed(*world.by_engine(application))
    talk(*kept)
    assert capture.door() is True
    closed(*world.native(application))
    talk(*kept)
    closed(*kept)


def test_a_door_that_was_taken_out_is_put_back(world: World, application: socket.socket) -> None:
    """Nothing of the flow goes another way meanwhile; nothing of it is lost."""
    world.allow(application)
    client, served = world.native(application)
    capture = world.client.capture
    assert capture is not None
    tc = ("nsenter", f"--net=/run/netns/{world.nodes.router}", "tc", "filter", "del", "dev")
    run(*tc, world.nodes.interface(world.client), "ingress", "pref", "1")
    astray = world.counter(world.near, "vouched_astray")
    client.sendall(b"once")
    eventually("it has no way", lambda: world.counter(world.near, "vouched_astray") > astray)
    assert (capture.door(), capture.door()) == (True, False)
    assert served.recv(100) == b"once"
    talk(client, served)
    closed(client, served)


@contextlib.contextmanager
def foreign(capture: Capture, kind: str) -> Iterator[None]:
    """Somebody else's program at the host's end of the pod's link."""
    path, inside_ = capture.pair.outside_path, ("nsenter", f"--net={capture.pair.outside_path}", "tc")
    if kind != "tcx":
        run(*inside_, "qdisc", "replace", "dev", "eth0", "clsact")
        pref, handle = {"behind": (5, 1), "at our place": (1, 1), "beside": (1, 2)}[kind]
        where = ("dev", "eth0", "ingress", "protocol", "all", "pref", str(pref), "handle", str(handle))
        run(*inside_, "filter", "add", *where, "bpf", "da", "object-file", lose_object(), "section", "tc/tcp")
        yield
        run(*inside_, "filter", "del", *where, "bpf")
        return

    def attach(program: int) -> int:
        """BPF_LINK_CREATE, BPF_TCX_INGRESS."""
        return Map._call(28, struct.pack("IIIIQQ", program, socket.if_nametoindex("eth0"), 46, 0, 0, 0))

    with Map(capture.pins + b"/in_lo") as program:  # any does
        made = inside(path, lambda: attach(program.fd))
    yield
    os.close(made)


@pytest.mark.parametrize("kind", ["behind", "at our place", "beside", "tcx"])
def test_where_somebody_else_looks_there_is_none(capture: Capture, kind: str) -> None:
    """A network plugin's program may enforce a policy: nothing goes past it."""
    capture.set_mode(lib.MODE_STRICT)
    with foreign(capture, kind):
        with pytest.raises(CaptureError, match="somebody else's programs are at the other end of eth0"):
            capture.door()
        assert capture.verify() == 0
    assert (capture.door(), capture.door()) == (True, False)
    if kind == "at our place":
        return  # it would have taken ours out
    with foreign(capture, kind), pytest.raises(CaptureError, match="somebody else's programs"):
        capture.door()
    with Map(os.path.dirname(capture.pins) + b"/node/doors") as doors:
        assert doors.keys(16) == []
    assert capture.door() is True


def test_addresses_that_a_pod_has_no_more_have_none(link: Pair, capture: Capture) -> None:
    capture.set_mode(lib.MODE_STRICT)
    capture.door()
    with Map(os.path.dirname(capture.pins) + b"/node/doors") as doors:
        assert sorted(doors.keys(16)) == sorted([packed(link.pod4), packed(link.pod6)])
        error = ffi.new("char[]", lib.CAPTURE_ERROR_LEN)
        assert lib.capture_prepare(capture.pins, link.pod6.encode(), error) == 0
        assert doors.keys(16) == [packed(link.pod6)]


def test_a_link_that_ends_elsewhere_has_none(link: Pair, capture: Capture) -> None:
    capture.set_mode(lib.MODE_STRICT)
    error = ffi.new("char[]", lib.CAPTURE_ERROR_LEN)
    with open(link.pod_path) as netns, open("/proc/self/ns/net") as host:
        made = lib.capture_door(capture.pins, host.fileno(), netns.fileno(), b"eth0", error)
    assert made < 0
    assert b"is not on this host" in ffi.string(error)


def test_it_goes_with_the_pod(link: Pair, capture: Capture) -> None:
    """Nothing stays at the host's end, and no address."""
    capture.set_mode(lib.MODE_STRICT)
    assert capture.door() is True
    look = ("nsenter", f"--net={link.outside_path}", "tc", "filter", "show", "dev", "eth0", "ingress")
    assert "door" in run(*look)
    with Map(os.path.dirname(capture.pins) + b"/node/doors") as doors:
        for key in doors.keys(16):  # as if an agent had been killed before it had written them
            doors.delete(key)
    capture.detach()
    assert run(*look) == ""


# -- connections that are no vouched flows ----------------------------------------------------------------------------


def test_connections_from_before_go_on(tmp_path: Path, family: int, closing: Callable[..., None]) -> None:
    """Both pods are enrolled with a connection between them open; it goes on, either way, and to its orderly end."""
    with Nodes(tmp_path, {"client": 0, "near": 0}, engines=(False, False)) as nodes, contextlib.ExitStack() as stack:
        address = nodes["near"].address(family)
        application = listen(nodes["near"].path, address, PORT)
        client = connect(nodes["client"].path, address, PORT)
        served, _ = application.accept()
        closing(application, client, served)
        for name in ("near", "client"):
            capture = Capture(nodes[name].pair)
            capture.prepare()
            stack.callback(capture.detach)
            engine = StandIn(capture)
            stack.callback(engine.close)
            capture.set_mode(lib.MODE_LENIENT)
            talk(client, served)
            assert capture.door() is True
            talk(client, served)
            assert capture.old() == 1
        client.shutdown(socket.SHUT_WR)
        assert served.recv(1) == b""
        served.sendall(b"last")
        served.close()
        assert client.recv(100) == b"last"
        assert client.recv(1) == b""
