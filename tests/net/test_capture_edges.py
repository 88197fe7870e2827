"""Capture where the kernel takes a less trodden path: SYN cookies, tags nobody took, the pod's talk with itself."""

import ctypes
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable

import pytest

from sidestep._bpf import lib
from tests.harness.netns import Pair, Sniffer, connect, inside, listen, run
from tests.harness.stand_in import _BPF, Capture, StandIn, map_update, plain
from tests.net.test_bypass import mac, syn_frame

Close = Callable[..., None]


def sysctl(path: str, setting: str) -> None:
    run("nsenter", f"--net={path}", "sysctl", "-qw", setting)


# -- SYN cookies: no request, no socket behind the SYN-ACK, and the third packet meets no connection ----------------


def test_syn_cookies_towards_the_engine(strict: StandIn, link: Pair, family: int, closing: Close) -> None:
    """In a SYN flood the engine's listeners answer with cookies: that SYN-ACK leaves the pod, its ACK finds them."""
    sysctl(link.pod_path, "net.ipv4.tcp_syncookies=2")
    application = listen(link.pod_path, link.pod_address(family), 8080)
    closing(application)
    for port, listener in ((8080, strict.inbound), (15008, strict.hbone)):
        client = connect(link.outside_path, link.pod_address(family), port)
        client.sendall(b"hello")
        accepted, peer = listener.accept()
        closing(client, accepted)
        assert plain(peer) == plain(client.getsockname())
        assert accepted.recv(100) == b"hello"
    client = connect(link.pod_path, link.far(family), 80)
    client.sendall(b"hello")
    accepted, _ = strict.outbound.accept()
    closing(client, accepted)
    assert accepted.recv(100) == b"hello"


def test_syn_cookies_of_the_application(strict: StandIn, capture: Capture, link: Pair, family: int) -> None:
    """An application over its backlog answers with cookies: the engine's connects still arrive there, not at itself."""
    sysctl(link.pod_path, "net.ipv4.tcp_syncookies=2")
    application = listen(link.pod_path, link.pod_address(family), 8080)
    for _ in range(20):
        engine = strict.connect(link.pod_address(family), 8080, (link.far(family), 0))
        engine.sendall(b"request")
        served, peer = application.accept()
        assert plain(peer) == plain(engine.getsockname())
        assert served.recv(100) == b"request"
        served.sendall(b"response")
        assert engine.recv(100) == b"response"
        engine.close()
        served.close()
    application.close()
    assert capture.counters()["to_inbound"] == 0


def test_a_small_backlog(strict: StandIn, capture: Capture, link: Pair) -> None:
    """Twenty connects at once to an application with a backlog of one: all are served, as without the mesh."""
    application = listen(link.pod_path, link.pod4, 8080, backlog=1)
    served: list[str] = []

    def serve() -> None:
        while len(served) < 20:
            accepted, _ = application.accept()
            with accepted:
                served.append(accepted.recv(100).decode())
                accepted.sendall(b"ok")

    failed: list[OSError] = []

    def ask(n: int) -> None:
        try:
            with strict.connect(link.pod4, 8080, (link.far4, 0)) as engine:
                engine.sendall(str(n).encode())
                assert engine.recv(10) == b"ok"
        except OSError as err:
            failed.append(err)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(20)]
    server = threading.Thread(target=serve, daemon=True)
    for thread in (server, *threads):
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failed == []
    server.join(20)
    application.close()
    assert sorted(map(int, served)) == list(range(20))
    assert capture.counters()["to_inbound"] == 0


def flood(link: Pair, family: int, count: int) -> None:
    """SYNs from outside that are never completed, from `count` ports of an address whose host drops the answers."""
    header = b"".join(bytes.fromhex(mac(name).replace(":", "")) for name in (link.pod, link.outside))
    source = link.far(family)
    frames = [syn_frame(source, 1024 + n, link.pod_address(family), 8080, header) for n in range(count)]

    def send() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as raw:
            for frame in frames:
                raw.sendto(frame, ("eth0", 3))

    inside(link.outside_path, send)


def test_a_syn_flood_lets_nobody_past(strict: StandIn, capture: Capture, link: Pair, family: int) -> None:
    """20 000 half-open connections: the application meets none, a client is served, the engine's connects too."""
    rules = "add table inet t; add chain inet t o { type filter hook output priority 0; };"
    run("nsenter", f"--net={link.outside_path}", "nft", rules + " add rule inet t o tcp flags & rst == rst drop")
    application = listen(link.pod_path, link.pod_address(family), 8080)
    enter = ("nsenter", f"--net={link.pod_path}")
    flood(link, family, 20000)
    with connect(link.outside_path, link.pod_address(family), 8080) as client:
        accepted, peer = strict.inbound.accept()
        assert plain(peer) == plain(client.getsockname())
        accepted.close()
    engine = strict.connect(link.pod_address(family), 8080, (link.far(family), 0))
    served, peer = application.accept()
    assert plain(peer) == plain(engine.getsockname())
    application.settimeout(0)
    with pytest.raises(BlockingIOError):
        application.accept()
    for each in (engine, served, application):
        each.close()
    counters = capture.counters()
    assert counters["to_inbound"] > 4096, counters  # a slow machine may lose frames; the backlog was exceeded
    assert counters["to_application"] == 1, counters
    names, values = (line.split() for line in run(*enter, "grep", "^TcpExt:", "/proc/net/netstat").splitlines())
    assert int(values[names.index("SyncookiesSent")]) > 0


# -- tags -------------------------------------------------------------------------------------------------------------


def own_map(capture: Capture) -> int:
    path = ctypes.create_string_buffer(capture.pins + b"/own")
    attributes = struct.pack("QII", ctypes.addressof(path), 0, 0)
    fd = ctypes.CDLL(None, use_errno=True).syscall(_BPF, 7, ctypes.create_string_buffer(attributes), len(attributes))
    assert fd >= 0, "BPF_OBJ_GET"
    return int(fd)


def plant(capture: Capture, link: Pair, family: int, port: int, age_ns: int) -> None:
    """A tag as the program writes it, `age_ns` old."""
    mapped = link.far(family) if family == 6 else f"::ffff:{link.far(family)}"
    key = socket.inet_pton(socket.AF_INET6, mapped) + struct.pack("=HH", port, 8080)
    fd = own_map(capture)
    map_update(fd, key, struct.pack("=Q", time.monotonic_ns() - age_ns))
    os.close(fd)


def from_outside(link: Pair, family: int, port: int) -> socket.socket:
    def make() -> socket.socket:
        made = socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET)
        made.settimeout(20)
        made.bind((link.far(family), port))
        made.connect((link.pod_address(family), 8080))
        return made

    return inside(link.outside_path, make)


def test_a_tag_that_nobody_took_is_worth_nothing(
    strict: StandIn, capture: Capture, link: Pair, family: int, closing: Close
) -> None:
    """The engine's SYN was lost between the programs: two seconds later its tag lets no outsider past the engine."""
    application = listen(link.pod_path, link.pod_address(family), 8080)
    plant(capture, link, family, 40001, age_ns=2_000_000_000)
    client = from_outside(link, family, 40001)
    accepted, _ = strict.inbound.accept()
    closing(client, accepted, application)
    application.settimeout(0)
    with pytest.raises(BlockingIOError):
        application.accept()
    assert capture.counters()["to_application"] == 0


def test_a_fresh_tag_is_what_a_tag_is(strict: StandIn, capture: Capture, link: Pair, family: int) -> None:
    """The control: a fresh one hands the SYN to the application, once (whose answer is turned around all the same: the
    client's next SYN meets the engine). Tried again if the machine was too slow.
    """
    application = listen(link.pod_path, link.pod_address(family), 8080)
    for port in range(40002, 40012):
        plant(capture, link, family, port, age_ns=0)
        with from_outside(link, family, port):
            strict.inbound.accept()[0].close()
        if capture.counters()["to_application"] == 1:
            break
    else:
        pytest.fail("no tag was taken")
    application.close()


def test_no_tag_outlives_its_connect(strict: StandIn, capture: Capture, link: Pair, family: int) -> None:
    """After connects, and data on them, the map is empty: nothing waits there for an outsider's SYN."""
    application = listen(link.pod_path, link.pod_address(family), 8080)
    for _ in range(5):
        engine = strict.connect(link.pod_address(family), 8080, (link.far(family), 0))
        engine.sendall(b"x")
        served, _ = application.accept()
        assert served.recv(1) == b"x"
        engine.close()
        served.close()
    application.close()
    listing = run("/usr/sbin/bpftool", "-j", "map", "dump", "pinned", (capture.pins + b"/own").decode())
    assert '"key"' not in listing, listing
    assert capture.counters()["tagged"] == 5


# -- the pod's talk with itself ---------------------------------------------------------------------------------------


def test_connections_inside_the_pod_are_not_old(capture: Capture, link: Pair, family: int, closing: Close) -> None:
    """They never leave the pod: a pod is not lenient for ever because two of its processes talk."""
    loopback = "127.0.0.1" if family == 4 else "::1"
    far = listen(link.outside_path, link.far(family), 80)
    closing(far)
    for address in (loopback, link.pod_address(family)):
        own = listen(link.pod_path, address, 9000)
        client = connect(link.pod_path, address, 9000)
        served, _ = own.accept()
        closing(own, client, served)
    old = connect(link.pod_path, link.far(family), 80)
    old_far, _ = far.accept()
    closing(old_far)
    engine = StandIn(capture)
    closing(engine)
    capture.set_mode(lib.MODE_LENIENT)
    assert capture.old() == 1
    old.close()
    old_far.recv(1)
    old_far.close()
    for _ in range(200):
        if capture.old() == 0:
            break
    assert capture.old() == 0


def test_a_second_address_of_the_pod(capture: Capture, link: Pair, family: int, closing: Close) -> None:
    """From one address of the pod to the other is the pod to itself; an address that is not known is outside."""
    second = "10.199.255.7" if family == 4 else "fd0a:e8:ffff::7"
    run("ip", "-n", link.pod, "addr", "add", second, "dev", "lo", *(["nodad"] if family == 6 else []))
    addresses = f"{link.addresses()},{second}".encode()
    assert lib.capture_prepare(capture.pins, addresses, capture._error) == 0
    capture.set_mode(lib.MODE_STRICT)
    engine = StandIn(capture)
    own = listen(link.pod_path, second, 9000)

    def across() -> socket.socket:
        made = socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET)
        made.settimeout(20)
        made.bind((link.pod_address(family), 0))
        made.connect((second, 9000))
        return made

    client = inside(link.pod_path, across)
    served, _ = own.accept()
    closing(engine, own, client, served)
    capture.prepare()  # the second one is forgotten
    other = inside(link.pod_path, across)
    accepted, _ = engine.outbound.accept()
    closing(other, accepted)
    assert plain(accepted.getsockname()) == (second, 9000)
    # and what the engine then opens reaches it, by its tag
    onward = engine.connect(second, 9000, (link.pod_address(family), 0))
    arrived, _ = own.accept()
    closing(onward, arrived)


def test_an_inbound_flow_whose_engine_dies_while_draining(
    strict: StandIn, capture: Capture, link: Pair, family: int, closing: Close
) -> None:
    """The application's answer to a connection that the engine made stays in the pod, also if the RST is lost."""
    canary = secrets.token_hex(16).encode()
    application = listen(link.pod_path, link.pod_address(family), 8080)
    engine = strict.connect(link.pod_address(family), 8080, (link.far(family), 0))
    served, _ = application.accept()
    closing(application, served)
    capture.set_mode(lib.MODE_DRAINING)
    rules = "add table inet t; add chain inet t i { type filter hook input priority 0; }; "
    run("nsenter", f"--net={link.pod_path}", "nft", rules + "add rule inet t i iif lo tcp flags rst drop")
    with Sniffer(link.outside_path) as sniffer:
        engine.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        engine.close()
        served.sendall(canary)
        inside(link.pod_path, lambda: mark_end(link, family))
        assert [frame for frame in sniffer.wait_for(b"the end") if canary in frame] == []


def mark_end(link: Pair, family: int) -> None:
    with socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET, socket.SOCK_DGRAM) as last:
        last.sendto(b"the end", (link.far(family), 9))


def test_a_lost_pin_is_made_again_with_what_is_attached(
    strict: StandIn, capture: Capture, link: Pair, closing: Close
) -> None:
    """Half of the pins gone (a crash, a hand): prepare and set_mode make it whole, with the new programs."""
    for name in ("addresses", "steer", "pod", "listeners"):
        os.unlink(os.path.join(capture.pins.decode(), name))
    assert capture.verify() & lib.CAPTURE_NO_PINS
    capture.prepare()
    capture.set_mode(lib.MODE_STRICT)
    assert capture.verify() == 0
    assert capture.listeners() == 0
    engine = StandIn(capture)
    client = connect(link.pod_path, link.far4, 80)
    accepted, _ = engine.outbound.accept()
    closing(engine, client, accepted)
