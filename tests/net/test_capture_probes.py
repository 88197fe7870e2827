"""The kubelet exemption in a real namespace: whose SYN is handed to the application natively, and whose is not.

The outside is the node: the kubelet's sockets are made there by a process in a cgroup2 directory of its own
(tests/harness/kubelet.py), everybody else's by the test itself. The engine's place is taken by marked listeners, or by
nobody. Every case that must not be native begins with the same connect as it must be.
"""

import contextlib
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sidestep._bpf import lib
from sidestep.lab.cluster import cgroup2
from sidestep.lab.link import Tap
from tests.harness.kubelet import Exemption, Kubelet, packed
from tests.harness.netns import Pair, connect, inside, listen, run
from tests.harness.stand_in import Capture, StandIn, plain
from tests.net.test_bypass import mac, syn_frame
from tests.net.test_capture import RST_LINGER, eventually, payload_out

Close = Callable[..., None]
PORT, OTHER = 8080, 8081
NOTE_NS = 1_000_000_000


@dataclass
class World:
    """A strict pod, its application, the node's exemption and the kubelet."""

    link: Pair
    capture: Capture
    exemption: Exemption
    kubelet: Kubelet
    family: int

    def __post_init__(self) -> None:
        self.pod = self.link.pod_address(self.family)

    def probe(self, port: int = PORT, **options: int) -> socket.socket:
        """The kubelet asks."""
        made: socket.socket = self.kubelet.connect(self.link.outside_path, self.pod, port, **options)
        return made

    def native(self, application: socket.socket, client: socket.socket) -> socket.socket:
        """The application's end of a connection: data flows both ways."""
        served, peer = application.accept()
        assert plain(peer) == plain(client.getsockname())
        client.sendall(b"GET")
        assert served.recv(10) == b"GET"
        served.sendall(b"OK" * 50_000)
        received = 0
        while received < 100_000:
            received += len(client.recv(100_000))
        return served

    def check(self, application: socket.socket) -> None:
        """The control: as things are, a probe is native."""
        before = self.capture.counters()["to_application_probe"]
        with self.probe() as client, self.native(application, client):
            pass
        assert self.capture.counters()["to_application_probe"] == before + 1

    def key(self, source_port: int, port: int = PORT) -> bytes:
        """The tuple of a note."""
        return packed(self.pod) + packed(self.gateway()) + struct.pack("HH", port, source_port)

    def gateway(self) -> str:
        """The node's address towards the pod."""
        if self.family == 4:
            return self.link.pod4.rsplit(".", 1)[0] + ".1"
        return self.link.pod6.removesuffix("2") + "1"

    def forge(self, source_port: int, sequence: int) -> None:
        """A SYN with the node's address as source, as a neighbour on the link could send it."""
        header = b"".join(bytes.fromhex(mac(name).replace(":", "")) for name in (self.link.pod, self.link.outside))
        frame = syn_frame(self.gateway(), source_port, self.pod, PORT, header, sequence=sequence)

        def send() -> None:
            with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as raw:
                raw.sendto(frame, ("eth0", 3))

        inside(self.link.outside_path, send)

    def lost_probe(self) -> tuple[int, int]:
        """A probe whose SYN is lost behind the kubelet's cgroup: source port and sequence number of its note."""
        with dropping(self.link):
            made = self.kubelet.socket(self.link.outside_path, self.family)
            made.setblocking(False)
            made.connect_ex((self.pod, PORT))
            port = int(made.getsockname()[1])
            made.close()
        isn, _ = self.exemption.notes()[self.key(port)]
        return port, isn

    def to_application(self) -> int:
        return self.capture.counters()["to_application_probe"]

    def to_engine(self) -> int:
        return self.capture.counters()["to_inbound"]


@contextlib.contextmanager
def dropping(link: Pair) -> Iterator[None]:
    """No TCP packet leaves the outside's socket layer by the link."""
    nft = ("nsenter", f"--net={link.outside_path}", "nft")
    chain = "add chain netdev lose e { type filter hook egress device eth0 priority 0; }; "
    run(*nft, f"add table netdev lose; {chain} add rule netdev lose e meta l4proto tcp drop")
    try:
        yield
    finally:
        run(*nft, "delete table netdev lose")


@pytest.fixture
def world(capture: Capture, link: Pair, family: int) -> Iterator[World]:
    """The exemption is attached; no engine."""
    exemption = Exemption(capture.pins)
    with Kubelet() as kubelet:
        exemption.attach(kubelet.cgroup)
        exemption.ports(*((address, port) for address in (link.pod4, link.pod6) for port in (0, PORT)))
        capture.set_mode(lib.MODE_STRICT)
        yield World(link, capture, exemption, kubelet, family)


@pytest.fixture
def application(world: World, closing: Close) -> socket.socket:
    """Listens on the probed port and takes nothing by itself."""
    made = listen(world.link.pod_path, world.pod, PORT)
    closing(made)
    return made


@pytest.fixture
def engine(world: World) -> Iterator[StandIn]:
    """The engine is there."""
    made = StandIn(world.capture)
    try:
        yield made
    finally:
        made.close()


def nobody(application: socket.socket) -> None:
    """The application was not reached."""
    application.settimeout(0)
    with pytest.raises(BlockingIOError):
        application.accept()
    application.settimeout(20)


# -- native ----------------------------------------------------------------------------------------------------------


def test_a_probe_reaches_the_application_without_an_engine(world: World, application: socket.socket) -> None:
    """Engine dead, pod strict: the probe is answered, and the same connect of another process is not."""
    world.check(application)
    counters = world.capture.counters()
    assert (counters["turned"], counters["no_listener"], world.exemption.notes()) == (0, 0, {})
    assert world.exemption.counters()["noted"] == 1
    with pytest.raises(ConnectionRefusedError):
        connect(world.link.outside_path, world.pod, PORT)
    nobody(application)


def test_the_pods_own_connections_to_the_node_stay_captured(
    world: World, application: socket.socket, engine: StandIn, closing: Close
) -> None:
    world.check(application)
    node = listen(world.link.outside_path, world.gateway(), PORT)
    client = connect(world.link.pod_path, world.gateway(), PORT)
    taken, _ = engine.outbound.accept()
    closing(node, client, taken)
    nobody(node)


@pytest.mark.parametrize("first", ["application", "kubelet"])
def test_who_closes_first_makes_no_difference(world: World, application: socket.socket, first: str) -> None:
    for _ in range(3):  # the same ports again, through a TIME_WAIT of either side
        client = world.probe(source_port=34567)
        served = world.native(application, client)
        one, other = (served, client) if first == "application" else (client, served)
        one.close()
        assert other.recv(1) == b""
        other.close()
    assert world.capture.counters()["turned"] == 0


def test_a_probe_of_a_closed_port_is_refused_by_the_pod(world: World, engine: StandIn) -> None:
    with pytest.raises(ConnectionRefusedError):
        world.probe()
    assert (world.to_application(), world.to_engine()) == (1, 0)


def test_a_repeated_syn_is_handed_over_too(world: World, application: socket.socket, engine: StandIn) -> None:
    world.check(application)  # the neighbour is known
    with dropping(world.link):
        client = world.kubelet.socket(world.link.outside_path, world.family)
        client.setblocking(False)
        client.connect_ex((world.pod, PORT))
        first = world.exemption.notes()
        assert len(first) == 1
    client.settimeout(20)
    served = world.native(application, client)  # accept() waits for the second SYN, a second later
    assert (world.to_application(), world.to_engine(), world.exemption.notes()) == (2, 0, {})
    assert world.exemption.counters()["noted"] == 3
    served.close()
    client.close()


def test_syn_cookies(world: World, application: socket.socket, engine: StandIn) -> None:
    """The application's listener keeps no request: the third packet asks sk_lookup again."""
    run("nsenter", f"--net={world.link.pod_path}", "sysctl", "-qw", "net.ipv4.tcp_syncookies=2")
    for _ in range(3):
        world.check(application)
    assert world.to_engine() == 0
    with connect(world.link.outside_path, world.pod, PORT):
        engine.inbound.accept()[0].close()
    nobody(application)


def test_an_open_probe_lives_through_every_mode(
    world: World, application: socket.socket, engine: StandIn, closing: Close
) -> None:
    client = world.probe()
    served = world.native(application, client)
    closing(client, served)
    for mode in (lib.MODE_DRAINING, lib.MODE_STRICT, lib.MODE_DRAINING, lib.MODE_LENIENT, lib.MODE_STRICT):
        world.capture.set_mode(mode)
        client.sendall(b"ping")
        assert served.recv(10) == b"ping"
        served.sendall(b"pong")
        assert client.recv(10) == b"pong"
        assert world.capture.old() == 0, "it is not from before the enrolment"
    world.capture.set_mode(lib.MODE_DRAINING)
    world.capture.set_mode(lib.MODE_LENIENT)
    world.check(application)
    with connect(world.link.outside_path, world.pod, PORT):
        engine.inbound.accept()[0].close()


def test_a_probe_that_has_said_nothing_lives_through_a_change_of_mode(
    world: World, application: socket.socket, engine: StandIn, closing: Close
) -> None:
    """The application's end has sent no packet, so only the connection's number says whose it is."""
    client = world.probe()
    served, _ = application.accept()
    assert world.capture.counters()["probe"] == 1, "its SYN-ACK"
    closing(client, served)
    world.capture.set_mode(lib.MODE_DRAINING)
    client.sendall(b"ping")
    assert served.recv(10) == b"ping"
    served.sendall(b"pong")
    assert client.recv(10) == b"pong"
    # The control: the application's end of a connection of the engine, which has said nothing either, is the engine's.
    world.capture.set_mode(lib.MODE_STRICT)
    connected = engine.connect(world.pod, PORT, (world.gateway(), 0))
    taken, _ = application.accept()
    closing(connected, taken)
    turned = world.capture.counters()["turned"]
    world.capture.set_mode(lib.MODE_DRAINING)
    taken.sendall(b"to the engine")
    assert connected.recv(100) == b"to the engine"
    assert world.capture.counters()["turned"] > turned


# -- not native ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "who", ["process", "cgroup below", "undeclared port", "undeclared address", "detached", "moved"]
)
def test_whoever_else_meets_the_engine(
    world: World, application: socket.socket, engine: StandIn, closing: Close, who: str
) -> None:
    world.check(application)
    other = listen(world.link.pod_path, world.pod, OTHER)
    closing(other)
    port = PORT
    with contextlib.ExitStack() as stack:
        made: Callable[[], socket.socket] = world.probe
        if who == "process":
            made = lambda: connect(world.link.outside_path, world.pod, PORT)  # noqa: E731
        elif who == "cgroup below":
            below = stack.enter_context(Kubelet("below", world.kubelet))
            made = lambda: below.connect(world.link.outside_path, world.pod, PORT)  # noqa: E731
        elif who == "undeclared port":
            port = OTHER
            made = lambda: world.probe(OTHER)  # noqa: E731
        elif who == "undeclared address":
            world.exemption.ports(("192.0.2.1", PORT))
        elif who == "detached":
            world.exemption.detach()
        else:
            moved = stack.enter_context(Kubelet("moved"))
            assert world.exemption.attach(moved.cgroup) == 1
            with moved.connect(world.link.outside_path, world.pod, PORT) as client:
                world.native(application, client).close()
        client = made()
        taken, peer = engine.inbound.accept()
        assert plain(peer) == plain(client.getsockname())
        assert plain(taken.getsockname()) == (world.pod, port)
        taken.close()
        client.close()
        nobody(application)
        nobody(other)
        if who == "undeclared port":
            assert world.exemption.counters()["refused"] == 1


def test_a_forged_syn_needs_the_number(world: World, application: socket.socket, engine: StandIn) -> None:
    """Tuple of a fresh note, another number: the engine's. The control: with the number it would be handed over."""
    world.check(application)
    port, isn = world.lost_probe()
    base, engines = world.to_application(), world.to_engine()
    world.exemption.note(world.key(port), isn, time.monotonic_ns())
    world.forge(port, isn + 1 & 0xFFFFFFFF)
    eventually("it is the engine's", lambda: world.to_engine() == engines + 1)
    assert world.to_application() == base
    nobody(application)
    port, isn = world.lost_probe()
    world.exemption.note(world.key(port), isn, time.monotonic_ns())
    world.forge(port, isn)
    eventually("the control is the application's", lambda: world.to_application() == base + 1)
    assert world.exemption.notes().get(world.key(port)) is None, "a note is for once"
    assert world.to_engine() == engines + 1


def test_a_note_is_for_once(world: World, application: socket.socket, engine: StandIn) -> None:
    """The SYN of a finished probe, sent again by a neighbour that saw it: the engine's."""
    world.check(application)
    source, isn = world.lost_probe()
    world.exemption.note(world.key(source), isn, time.monotonic_ns())
    base, engines = world.to_application(), world.to_engine()
    world.forge(source, isn)
    eventually("the first is handed over", lambda: world.to_application() == base + 1)
    # Nobody answers its SYN-ACK but with a RST; then the same frame once more.
    eventually("its request is gone", lambda: "SYN-RECV" not in sockets(world.link))
    world.forge(source, isn)
    eventually("the second is the engine's", lambda: world.to_engine() == engines + 1)
    assert world.to_application() == base + 1


def sockets(link: Pair) -> str:
    """TCP sockets of the pod."""
    return run("nsenter", f"--net={link.pod_path}", "ss", "-Htna")


def test_an_old_note_is_worth_nothing(world: World, application: socket.socket, engine: StandIn) -> None:
    world.check(application)
    base, engines = world.to_application(), world.to_engine()
    port, isn = world.lost_probe()
    world.exemption.note(world.key(port), isn, time.monotonic_ns() - NOTE_NS - 1)
    world.forge(port, isn)
    eventually("it is the engine's", lambda: world.to_engine() == engines + 1)
    assert world.to_application() == base
    port, isn = world.lost_probe()
    world.exemption.note(world.key(port), isn, time.monotonic_ns())
    world.forge(port, isn)
    eventually("the control is the application's", lambda: world.to_application() == base + 1)


def test_the_tuple_of_a_probe_is_no_pass_for_the_next(
    world: World, application: socket.socket, engine: StandIn, closing: Close
) -> None:
    """A probe that got no socket leaves its tuple behind. Another process connects from the same port, and the engine
    from there to the application: what the application says to the engine must not leave the pod.
    """
    canary = secrets.token_hex(16).encode()
    application.close()
    with pytest.raises(ConnectionRefusedError):
        world.probe(source_port=34567)
    assert world.to_application() == 1
    application = listen(world.link.pod_path, world.pod, PORT)
    closing(application)
    with Tap(world.link.outside_path, "eth0") as tap:
        client = connect(world.link.outside_path, world.pod, PORT, source_port=34567)
        taken, _ = engine.inbound.accept()
        nobody(application)
        taken.sendall(b"shown")
        assert client.recv(100) == b"shown"
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_LINGER)
        taken.close()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        client.close()
        connected = engine.connect(world.pod, PORT, (world.gateway(), 34567))
        served, _ = application.accept()
        closing(connected, served)
        served.sendall(canary)
        assert connected.recv(100) == canary
        eventually("the witness sees what leaves", lambda: b"shown" in payload_out(tap.flows(), world.link))
        assert canary not in payload_out(tap.flows(), world.link)
    assert world.capture.counters()["probe"] == 0


def test_an_open_probe_is_no_way_out_for_raw_packets(
    world: World, application: socket.socket, engine: StandIn, closing: Close
) -> None:
    """A process of the pod with CAP_NET_RAW sends a segment with the tuple of an open probe: it does not leave. The
    control: what the application's own socket says does.
    """
    canary, said = secrets.token_hex(16).encode(), secrets.token_hex(16).encode()
    client = world.probe()
    served = world.native(application, client)
    closing(client, served)
    address, port = plain(client.getsockname())
    header = b"".join(bytes.fromhex(mac(name).replace(":", "")) for name in (world.link.outside, world.link.pod))
    frame = syn_frame(world.pod, PORT, address, port, header, flags=0x18, payload=canary)

    def send() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as raw:
            raw.sendto(frame, ("eth0", 3))

    with Tap(world.link.outside_path, "eth0") as tap:
        turned = world.capture.counters()["turned"]
        inside(world.link.pod_path, send)
        eventually("it was turned around", lambda: world.capture.counters()["turned"] > turned)
        served.sendall(said)
        assert client.recv(100) == said
        eventually("the witness sees what leaves", lambda: said in payload_out(tap.flows(), world.link))
        assert canary not in payload_out(tap.flows(), world.link)


def test_what_finds_no_room_is_like_any_other(world: World, application: socket.socket, engine: StandIn) -> None:
    """More ports than the map holds: an error, and those that are not in it are the engine's."""
    world.check(application)
    many = [(f"10.9.{n >> 8}.{n & 255}", 1) for n in range(16384)]
    world.exemption.ports()
    with pytest.raises(OSError, match="probe_ports, entry 16384 of 16386"):
        world.exemption.ports(*many, *((address, PORT) for address in (world.link.pod4, world.link.pod6)))
    with world.probe() as client:
        taken, peer = engine.inbound.accept()
        assert plain(peer) == plain(client.getsockname())
        taken.close()
    nobody(application)


# -- attaching -------------------------------------------------------------------------------------------------------


def test_the_root_and_what_is_no_cgroup_are_refused(capture: Capture, link: Pair, tmp_path: Path) -> None:
    exemption = Exemption(capture.pins)
    for directory, reason in ((cgroup2(), "root"), (tmp_path, "no cgroup2"), (tmp_path / "none", "No such file")):
        with pytest.raises(OSError, match=reason):
            exemption.attach(directory)
    with Kubelet() as kubelet:
        assert (exemption.attach(kubelet.cgroup), exemption.attach(kubelet.cgroup)) == (1, 0)


def test_a_new_directory_of_the_same_name_is_another(world: World, application: socket.socket) -> None:
    """The kubelet's unit was started anew: the link went with the old directory, and comes back for the new one."""
    world.check(application)
    world.kubelet.__exit__()
    world.kubelet.__enter__()
    with pytest.raises(ConnectionRefusedError):
        world.probe()
    assert world.exemption.attach(world.kubelet.cgroup) == 1
    world.check(application)


def test_the_last_pod_takes_the_nodes_part_along(world: World, application: socket.socket) -> None:
    world.check(application)
    node = Path(world.exemption.node.decode())
    assert sorted(os.listdir(node)) == [
        *("doors", "doors_asking", "ended", "kubelet_counters", "link"),
        *("probe_notes", "probe_ports", "probe_syn", "slots", "vouched"),
    ]
    world.capture.detach()
    assert not node.exists()
    application.close()
    application = listen(world.link.pod_path, world.pod, PORT)
    with connect(world.link.outside_path, world.pod, PORT) as client:  # nothing is in the way any more
        application.accept()[0].close()
        client.close()
    application.close()
