"""What may go wrong with a vouched flow: forged SYNs, tables and memory that are full, a server that is slow to accept,
SYNs that come again, TCP Fast Open. It ends at the engine, or is refused; never is it somebody else's, and never clear
text that nobody counts.
"""

import contextlib
import ctypes
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from tests.harness.cluster import Nodes
from tests.harness.loss import losing
from tests.harness.netns import inside, run
from tests.harness.stand_in import plain
from tests.net import test_vouched
from tests.net.test_capture import eventually
from tests.net.test_engine_policy import talk
from tests.net.test_vouched import PORT, SLOT, World, closed, nobody

SLOTS = 8192  # VOUCH_MAX_SLOTS
FASTOPEN, MSG_FASTOPEN = 23, 0x20000000

application = test_vouched.application  # the fixture, in the world of this file


@pytest.fixture
def world(tmp_path: Path, family: int) -> Iterator[World]:
    """`client`, `near` and `third` on node 0; `far` on another node, with nothing of ours in it."""
    places = {"client": 0, "near": 0, "third": 0, "far": 1}
    with Nodes(tmp_path, places, workers=2, same_node="native", engines=(True, False)) as nodes:
        run("nsenter", f"--net=/run/netns/{nodes.router}", "sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0")
        nodes.publish()
        yield World(nodes, family)


def sysctl(world: World, pod: str, setting: str) -> None:
    run("nsenter", f"--net={world.nodes[pod].path}", "sysctl", "-qw", setting)


def netstat(world: World, pod: str, name: str) -> int:
    """A counter of TcpExt in a pod's namespace."""
    text = run("nsenter", f"--net={world.nodes[pod].path}", "grep", "^TcpExt:", "/proc/net/netstat")
    names, values = (line.split() for line in text.splitlines())
    return int(values[names.index(name)])


def begin(world: World) -> socket.socket:
    """A connect that is under way."""
    made = world.client_socket()
    made.connect_ex((world.address, PORT))
    return made


def served_by(application: socket.socket, *clients: socket.socket) -> list[tuple[socket.socket, socket.socket]]:
    """Each client with the socket that the application has for it; all of them talk."""
    there = {plain(each.getsockname()): each for each in clients}
    pairs = []
    for _ in clients:
        served, peer = application.accept()
        client = there.pop(plain(peer))
        client.settimeout(20)
        talk(client, served)
        pairs.append((client, served))
    return pairs


# -- forged -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["third", "far", "host"])
def test_a_forged_syn_beside_the_genuine_one(world: World, application: socket.socket, origin: str) -> None:
    """The client's SYN is lost on its way, its note is there, and somebody sends one of the same tuple: it is not the
    application's. The control: the client's own, when it comes again, is.
    """
    world.allow(application)
    handed, inbound = world.handed(), world.counter(world.near, "to_inbound")
    with losing(world.client.pair):
        client = begin(world)
        port = client.getsockname()[1]
        isn = struct.unpack("IIQII", world.notes()[world.key(port)])[0]
        for n, other in enumerate((isn + 1, isn - 1, isn + 65535, isn ^ 0x80000000)):
            world.forge(origin, port, other & 0xFFFFFFFF)
            what = "it is the engine's" if n == 0 else "and so is the next, or it meets the engine's"
            eventually(what, lambda: world.counter(world.near, "to_inbound") > inbound)
        assert world.handed() == handed
        nobody(application)
    ((client, served),) = served_by(application, client)
    assert world.handed() > handed
    nobody(application)
    closed(client, served)


@pytest.mark.parametrize("origin", ["third", "far", "host"])
def test_a_forged_syn_while_the_handshake_is_under_way(world: World, application: socket.socket, origin: str) -> None:
    """The note is taken, the SYN-ACK is lost, and somebody sends another SYN of the tuple. The client's handshake goes
    on and is the only one that the application sees.
    """
    world.allow(application)
    handed = world.handed()
    with losing(world.near.pair):
        client = begin(world)
        eventually("it is at the door", lambda: world.notes("pending", world.near))
        port = client.getsockname()[1]
        isn = struct.unpack("IIQII", next(iter(world.notes("pending", world.near).values())))[0]
        world.forge(origin, port, isn + 9 & 0xFFFFFFFF)
        eventually("it was seen", lambda: next(iter(world.notes("pending", world.near).values()))[4:8] == bytes(4))
        assert world.handed() == handed + 1
    ((client, served),) = served_by(application, client)
    assert len(world.flows()) == 1
    nobody(application)
    closed(client, served)


@pytest.mark.parametrize("origin", ["third", "far", "host"])
def test_who_knows_the_number_opens_nothing(world: World, application: socket.socket, origin: str) -> None:
    """A copy of the very SYN, sent before the genuine one comes, did not take the client's door: it is dropped, and
    the pair is the engine's for a while. The client's own comes again and is served.
    """
    world.allow(application)
    handed, late = world.handed(), world.late()
    with losing(world.client.pair):
        client = begin(world)
        port = client.getsockname()[1]
        isn = struct.unpack("IIQII", world.notes()[world.key(port)])[0]
        world.forge(origin, port, isn)
        eventually("it is dropped", lambda: world.late() == late + 1)
        nobody(application)
    served, _ = application.accept()  # from the engine, which has a port of its own
    client.settimeout(20)
    talk(client, served)
    assert world.handed() == handed
    closed(client, served)
    nobody(application)


# -- full -------------------------------------------------------------------------------------------------------------


def test_without_a_slot_it_is_the_engines(world: World, application: socket.socket) -> None:
    def take(slot: int, taken: int) -> None:
        key = struct.pack("I", slot)
        value = slots.lookup(key, SLOT)
        slots.update(key, value[:4] + struct.pack("I", taken) + value[8:])

    with world.map("slots") as slots:
        for slot in range(SLOTS):
            take(slot, 1)
        for _ in range(3):
            closed(*world.by_engine(application))
        assert "sidestep_vouched_full_total 3\n" in world.engine().metrics()
        assert world.slots_of() == []
        take(SLOTS - 1, 0)  # the control
        world.allow(application)
        assert world.slots_of() == [SLOTS - 1]


class Filter(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def attach(made: socket.socket, instructions: int) -> None:
    """A packet filter that lets everything through; its instructions are memory that counts against the socket's
    option memory. Raises OSError.
    """
    load, accept = struct.pack("HBBI", 0, 0, 0, 0), struct.pack("HBBI", 6, 0, 0, 0xFFFFFFFF)
    code = ctypes.create_string_buffer(load * (instructions - 1) + accept)
    program = Filter(instructions, ctypes.addressof(code))
    made.setsockopt(socket.SOL_SOCKET, 26, bytes(program))  # SO_ATTACH_FILTER


def filled(make: Callable[[], socket.socket]) -> socket.socket:
    """A socket without room for another word of socket storage: as large a filter as goes."""
    low, high = 1, 4096
    while high - low > 1:
        middle = (low + high) // 2
        with make() as trial:
            try:
                attach(trial, middle)
                low = middle
            except OSError:
                high = middle
    made = make()
    attach(made, low)
    return made


@pytest.fixture
def little_memory(world: World) -> None:
    for pod in ("client", "near"):
        sysctl(world, pod, "net.core.optmem_max=8192")


def test_a_client_without_memory_is_the_engines(world: World, application: socket.socket, little_memory: None) -> None:
    """Its socket has no room for its fate: it is captured, as any socket that nothing is known of."""
    world.allow(application)
    handed, captured = world.handed(), world.counter(world.client, "to_outbound")
    client = filled(world.client_socket)
    client.settimeout(20)
    client.connect((world.address, PORT))
    served, _ = application.accept()
    talk(client, served)
    assert (world.handed(), world.counter(world.client, "to_outbound")) == (handed, captured + 1)
    assert world.flows() == []
    closed(client, served)
    closed(*world.native(application))  # the control


def test_a_server_without_memory_is_refused_and_then_the_engines(
    world: World, application: socket.socket, little_memory: None, closing: Callable[..., None]
) -> None:
    """The accepted socket has no room for its fate: nothing of it leaves natively. Its client hears a reset; for a
    while the pair's connections are the engine's, which are served.
    """
    world.allow(application)
    application.close()

    def listener() -> socket.socket:
        made = socket.socket(socket.AF_INET6 if world.family == 6 else socket.AF_INET)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return made

    poor = inside(world.near.path, lambda: filled(listener))
    closing(poor)
    poor.bind((world.address, PORT))
    poor.listen(16)
    poor.settimeout(20)
    handed, vouched = world.handed(), world.counter(world.near, "vouched")
    client = world.connect()
    assert world.handed() == handed + 1
    served, _ = poor.accept()
    with contextlib.suppress(ConnectionError):
        served.sendall(b"nobody counts this")
    with pytest.raises(ConnectionError):
        while True:
            client.sendall(b"x")
            assert client.recv(100) == b""
            raise ConnectionResetError("an orderly end of nothing")
    assert world.counter(world.near, "vouched") == vouched + 1  # the SYN-ACK
    closed(client, served)
    closed(*world.by_engine(poor))


# -- slow to accept ---------------------------------------------------------------------------------------------------


def test_a_full_accept_queue(world: World, closing: Callable[..., None]) -> None:
    """Clients whose SYN finds no room send it again, and note it again; each is served natively in the end."""
    application = world.listen(backlog=1)
    closing(application)
    world.allow(application)
    sysctl(world, "near", "net.ipv4.tcp_syncookies=0")  # with a cookie a client may be connected and not know better
    handed = world.handed()
    clients = [begin(world) for _ in range(5)]
    eventually("some were not taken", lambda: netstat(world, "near", "ListenDrops") > 0)
    pairs = served_by(application, *clients)
    assert world.handed() > handed + 5  # some came twice
    assert len(world.flows()) == 5
    assert (world.notes(), world.notes("pending", world.near)) == ({}, {})
    for pair in pairs:
        closed(*pair)


def test_the_third_packet_meets_a_full_queue(world: World, closing: Callable[..., None]) -> None:
    """Both sides have answered, the client's last word is lost, and when it comes again there is no room: what the
    server then says again is the flow's too.
    """
    application = world.listen(backlog=2)
    closing(application)
    world.allow(application)
    early = [begin(world) for _ in range(2)]
    with losing(world.client.pair, "all_but_syn"):
        clients = [*early, *(begin(world) for _ in range(2))]
        for client in clients:
            assert select.select([], [client], [], 20)[1]
    for client in clients:
        client.settimeout(20)
        client.sendall(b"first word")
    eventually("one of them finds no room", lambda: netstat(world, "near", "ListenOverflows") > 0)
    there = {plain(each.getsockname()): each for each in clients}
    for _ in clients:
        served, peer = application.accept()
        assert served.recv(100) == b"first word"
        talk(there.pop(plain(peer)), served)
        served.close()
    closed(*clients)


@pytest.mark.parametrize("wait_s", [0, 2])
def test_a_cookie_that_comes_late(world: World, application: socket.socket, wait_s: int) -> None:
    """The listener keeps no request; the client's third packet is lost, and it says nothing for a while."""
    world.allow(application)
    sysctl(world, "near", "net.ipv4.tcp_syncookies=2")
    with losing(world.client.pair, "all_but_syn"):
        client = begin(world)
        assert select.select([], [client], [], 20)[1]
        select.select([], [], [], wait_s)
    client.sendall(b"late word")
    served, peer = application.accept()
    assert plain(peer) == plain(client.getsockname())
    client.settimeout(20)
    assert served.recv(100) == b"late word"
    talk(client, served)
    assert len(world.flows()) == 1
    closed(client, served)


# -- TCP Fast Open ----------------------------------------------------------------------------------------------------


def test_fast_open(world: World, closing: Callable[..., None]) -> None:
    """A SYN that asks for a cookie is native; one with data is the engine's, which carries the data once; one with a
    cookie and without data is native again, and the application may speak before the handshake has ended.
    """
    for pod in ("client", "near"):
        sysctl(world, pod, "net.ipv4.tcp_fastopen=3")
    application = world.listen()
    closing(application)
    application.setsockopt(socket.IPPROTO_TCP, FASTOPEN, 16)
    world.allow(application)

    def fast(said: bytes) -> tuple[socket.socket, socket.socket]:
        client = world.client_socket()
        client.setblocking(True)
        client.sendto(said, MSG_FASTOPEN, (world.address, PORT))
        client.settimeout(20)
        served, _ = application.accept()
        return client, served

    def counts() -> tuple[int, int, int]:
        return world.handed(), world.counter(world.client, "to_outbound"), netstat(world, "near", "TCPFastOpenPassive")

    for said, grown in ((b"word", (1, 0, 0)), (b"word", (0, 1, 0)), (b"", (1, 0, 1)), (b"again", (0, 1, 0))):
        before = counts()
        client, served = fast(said)
        served.sendall(b"answer")
        assert client.recv(100) == b"answer"
        got = b""
        while len(got) < len(said):
            got += served.recv(100)
        assert got == said
        talk(client, served)
        assert tuple(now - was for now, was in zip(counts(), before, strict=True)) == grown
        if grown[0]:
            (flow,) = world.flows()
            assert (flow["bytes_sent"], flow["bytes_recv"]) == (len(said) + 16, len(b"answer") + 16)
        client.shutdown(socket.SHUT_WR)
        assert served.recv(100) == b""
        closed(served, client)
        eventually("it has ended", lambda: world.flows() == [])


# -- time -------------------------------------------------------------------------------------------------------------


def test_an_allowance_ends_with_a_certificate(world: World, application: socket.socket) -> None:
    """It says until when, which is no later than either certificate does; after that the engine is asked."""
    for pod, minutes in ((world.client, 20), (world.near, 10)):
        leaf = world.nodes.authority.leaf(pod.identity, not_after=timedelta(minutes=minutes))
        world.nodes.certify(pod, leaf)
    world.allow(application)
    with world.map("verdicts", world.client) as verdicts:
        (key,) = verdicts.keys(36)
        slot, generation, until = struct.unpack("IIQ", verdicts.lookup(key, 16))
        assert 0 < until - time.monotonic_ns() < 601e9
        verdicts.update(key, struct.pack("IIQ", slot, generation, time.monotonic_ns()))
    closed(*world.by_engine(application))
    closed(*world.native(application))  # asked, it says yes again
