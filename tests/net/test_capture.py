"""Capture in a real network namespace: who gets which packet, in each mode, both families.

The engine's place is taken by marked listeners (tests/harness/stand_in.py); the outside is the pod's gateway and owns
a further address. What leaves the pod is watched on the outside's end of the link.
"""

import secrets
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from sidestep._bpf import lib
from sidestep.lab.link import Flow, Tap
from tests.harness.netns import Pair, connect, listen, pair, run
from tests.harness.stand_in import Capture, StandIn, plain

Close = Callable[..., None]
RST_LINGER = struct.pack("ii", 1, 0)


def eventually(what: str, question: Callable[[], object], seconds: float = 20) -> None:
    """Asks until true; a hang guard, no measurement."""
    deadline = time.monotonic() + seconds
    while not question():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def payload_out(flows: list[Flow], link: Pair) -> bytes:
    """All payload that left the pod."""
    return b"".join(flow.fragments() for flow in flows if flow.source.address in (link.pod4, link.pod6))


def test_outbound_reaches_the_engine_with_its_destination(
    strict: StandIn, link: Pair, family: int, closing: Close
) -> None:
    client = connect(link.pod_path, link.far(family), 4321)
    engine, peer = strict.outbound.accept()
    closing(client, engine)
    assert plain(engine.getsockname()) == (link.far(family), 4321)
    assert plain(peer) == plain(client.getsockname())
    client.sendall(b"there")
    engine.sendall(b"back")
    assert (engine.recv(100), client.recv(100)) == (b"there", b"back")


def test_inbound_and_hbone_reach_their_listeners(strict: StandIn, link: Pair, family: int, closing: Close) -> None:
    application = listen(link.pod_path, link.pod_address(family), 8080)
    outside = connect(link.outside_path, link.pod_address(family), 8080)
    engine, peer = strict.inbound.accept()
    closing(application, outside, engine)
    assert plain(engine.getsockname()) == (link.pod_address(family), 8080)
    assert plain(peer) == plain(outside.getsockname())
    hbone = connect(link.outside_path, link.pod_address(family), 15008)
    tunnel, _ = strict.hbone.accept()
    closing(hbone, tunnel)
    assert plain(tunnel.getsockname()) == (link.pod_address(family), 15008)
    application.settimeout(0)
    with pytest.raises(BlockingIOError):
        application.accept()


def test_the_engine_reaches_the_application_from_the_clients_address(
    strict: StandIn, link: Pair, family: int, closing: Close
) -> None:
    application = listen(link.pod_path, link.pod_address(family), 8080)
    engine = strict.connect(link.pod_address(family), 8080, (link.far(family), 0))
    served, peer = application.accept()
    closing(application, engine, served)
    assert plain(peer) == (link.far(family), engine.getsockname()[1])
    engine.sendall(b"request")
    served.sendall(b"response")
    assert (served.recv(100), engine.recv(100)) == (b"request", b"response")


def test_the_engine_goes_out_and_loopback_is_left_alone(
    strict: StandIn, link: Pair, family: int, closing: Close
) -> None:
    far = listen(link.outside_path, link.far(family), 7000)
    engine = strict.connect(link.far(family), 7000)
    seen, peer = far.accept()
    closing(far, engine, seen)
    assert plain(peer)[0] == link.pod_address(family)
    for address in ("127.0.0.1" if family == 4 else "::1", link.pod_address(family)):
        own = listen(link.pod_path, address, 9000)
        client = connect(link.pod_path, address, 9000)
        served, _ = own.accept()
        closing(own, client, served)
    assert strict.outbound.fileno() >= 0
    strict.outbound.settimeout(0)
    with pytest.raises(BlockingIOError):
        strict.outbound.accept()


@pytest.mark.parametrize("families", ["4", "6"])
def test_pods_with_one_family(families: str) -> None:
    with pair(families) as link:
        capture = Capture(link)
        capture.prepare()
        capture.set_mode(lib.MODE_STRICT)
        assert capture.verify() == 0
        engine = StandIn(capture)
        with connect(link.pod_path, link.far(int(families)), 80) as client:
            accepted, _ = engine.outbound.accept()
            with accepted:
                assert plain(accepted.getsockname()) == (link.far(int(families)), 80)
                client.sendall(b"x")
                assert accepted.recv(1) == b"x"
        engine.close()
        capture.detach()


# -- endings and reused ports ----------------------------------------------------------------------------------------


def serve_and_close_first(listener: socket.socket, stop: threading.Event) -> None:
    listener.settimeout(0.2)
    while not stop.is_set():
        try:
            accepted, _ = listener.accept()
        except TimeoutError:
            continue
        accepted.close()


CLIENT = """
import socket, sys, time
address, family, port, count, source = sys.argv[2], *(int(sys.argv[i]) for i in (1, 3, 4, 5))
slowest = 0
for _ in range(count):
    s = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6)
    s.settimeout(20)
    if source:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind(("", source))
    started = time.monotonic()
    s.connect((address, port))
    assert s.recv(1) == b""
    slowest = max(slowest, time.monotonic() - started)
    s.close()
print(count, round(slowest, 3))
"""


def storm(namespace: str, family: int, address: str, port: int, count: int, source: int = 0) -> str:
    """Connects one after another and waits for each end; returns what the client measured."""
    command = ["nsenter", f"--net=/run/netns/{namespace}", "python3", "-c", CLIENT]
    return run(*command, str(family), address, str(port), str(count), str(source))


@pytest.mark.parametrize("direction", ["outbound", "inbound"])
def test_connections_one_after_another_to_one_port(strict: StandIn, link: Pair, direction: str) -> None:
    """The engine closes first, so that each leaves a TIME_WAIT in the pod, and the ports come round again."""
    listener = strict.outbound if direction == "outbound" else strict.inbound
    run("ip", "netns", "exec", link.pod, "sysctl", "-qw", "net.ipv4.ip_local_port_range=40000 41999")
    run("ip", "netns", "exec", link.outside, "sysctl", "-qw", "net.ipv4.ip_local_port_range=40000 41999")
    for name in (link.pod, link.outside):
        run("ip", "netns", "exec", name, "sysctl", "-qw", "net.ipv4.tcp_tw_reuse=1")
    stop = threading.Event()
    server = threading.Thread(target=serve_and_close_first, args=(listener, stop))
    server.start()
    try:
        if direction == "outbound":
            said = storm(link.pod, 4, link.far4, 80, 6000)
        else:
            said = storm(link.outside, 4, link.pod4, 80, 6000)
        print("connections, slowest in s:", said)
    finally:
        stop.set()
        server.join()


def test_the_same_client_port_three_times(strict: StandIn, link: Pair, family: int, closing: Close) -> None:
    """Server closes first: the SYN meets a TIME_WAIT, and still the engine answers, never the application."""
    application = listen(link.pod_path, link.pod_address(family), 8080)
    closing(application)
    for _ in range(3):
        client = connect(link.outside_path, link.pod_address(family), 8080, source_port=34567)
        engine, _ = strict.inbound.accept()
        engine.close()
        assert client.recv(1) == b""
        client.close()
    application.settimeout(0)
    with pytest.raises(BlockingIOError):
        application.accept()


# -- failing closed --------------------------------------------------------------------------------------------------


def test_nothing_leaves_when_the_engine_is_gone(capture: Capture, link: Pair, family: int, closing: Close) -> None:
    canary = secrets.token_hex(16).encode()
    far = listen(link.outside_path, link.far(family), 80)
    closing(far)
    with Tap(link.outside_path, "eth0") as tap:
        with connect(link.pod_path, link.far(family), 80) as control:
            control.sendall(canary)
            far.accept()[0].close()
        eventually("the control sees the canary", lambda: canary in payload_out(tap.flows(), link))

    capture.set_mode(lib.MODE_STRICT)
    engine = StandIn(capture)
    with Tap(link.outside_path, "eth0") as tap:
        client = connect(link.pod_path, link.far(family), 80)
        accepted, _ = engine.outbound.accept()
        client.sendall(canary)
        assert accepted.recv(100) == canary
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_LINGER)
        accepted.close()
        engine.close()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        client.close()
        # IPv6 is refused; IPv4 gets no answer (no RST from a foreign address) and waits for the engine
        with pytest.raises(OSError, match=r"refused|timed out"):
            connect(link.pod_path, link.far(family), 80, timeout=2)
        with pytest.raises(ConnectionRefusedError):
            connect(link.outside_path, link.pod_address(family), 8080)
        assert payload_out(tap.flows(), link) == b""
        assert [flow for flow in tap.flows() if flow.destination.port == 80] == []
    assert capture.counters()["no_listener"] > 0


def lose_resets(link: Pair) -> None:
    """From now on no RST reaches a socket of the pod by way of lo."""
    rules = "add table inet t; add chain inet t i { type filter hook input priority 0; }; "
    run("nsenter", f"--net={link.pod_path}", "nft", rules + "add rule inet t i iif lo tcp flags rst drop")


def test_data_without_a_peer_stays_in_the_pod(strict: StandIn, link: Pair, closing: Close) -> None:
    """The engine's end vanishes without a word (its RST is lost): retransmissions are turned around, not sent."""
    canary = secrets.token_hex(16).encode()
    client = connect(link.pod_path, link.far4, 80)
    accepted, _ = strict.outbound.accept()
    closing(client)
    with Tap(link.outside_path, "eth0") as tap:
        lose_resets(link)
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_LINGER)
        accepted.close()
        client.sendall(canary)
        with pytest.raises(TimeoutError):
            client.settimeout(1)
            client.recv(1)
        assert payload_out(tap.flows(), link) == b""


# -- enrolment of a pod that runs ------------------------------------------------------------------------------------


def test_lenient_old_connections_go_on_new_ones_are_the_engines(
    capture: Capture, link: Pair, family: int, closing: Close
) -> None:
    far = listen(link.outside_path, link.far(family), 80)
    application = listen(link.pod_path, link.pod_address(family), 8080)
    old_out = connect(link.pod_path, link.far(family), 80)
    old_out_far, _ = far.accept()
    old_in = connect(link.outside_path, link.pod_address(family), 8080)
    old_in_app, _ = application.accept()
    silent = connect(link.outside_path, link.pod_address(family), 8080)
    silent_app, _ = application.accept()
    engine = StandIn(capture)
    closing(far, application, old_out, old_out_far, old_in, old_in_app, silent, silent_app, engine)

    capture.set_mode(lib.MODE_LENIENT)
    assert capture.old() == 3
    for one, other in ((old_out, old_out_far), (old_in, old_in_app), (silent_app, silent)):
        one.sendall(b"ping")
        assert other.recv(10) == b"ping"
        other.sendall(b"pong")
        assert one.recv(10) == b"pong"

    new = connect(link.pod_path, link.far(family), 80)
    accepted, _ = engine.outbound.accept()
    came = connect(link.outside_path, link.pod_address(family), 8080)
    taken, _ = engine.inbound.accept()
    closing(new, accepted, came, taken)
    assert capture.old() == 3
    for each in (old_out, old_out_far, old_in, old_in_app, silent, silent_app):
        each.close()
    eventually("the old ones are gone", lambda: capture.old() == 0)
    capture.set_mode(lib.MODE_STRICT)
    new.sendall(b"still the engine's")
    assert accepted.recv(100) == b"still the engine's"


def test_an_old_socket_that_connects_anew_is_captured(capture: Capture, link: Pair, closing: Close) -> None:
    far = listen(link.outside_path, link.far4, 80)
    client = connect(link.pod_path, link.far4, 80)
    far.accept()[0].close()
    engine = StandIn(capture)
    closing(far, client, engine)
    capture.set_mode(lib.MODE_LENIENT)
    libc_disconnect(client)
    client.connect((link.far4, 80))
    accepted, _ = engine.outbound.accept()
    accepted.close()


def libc_disconnect(client: socket.socket) -> None:
    """connect(AF_UNSPEC): the socket may be used again."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.connect(client.fileno(), struct.pack("H14x", socket.AF_UNSPEC), 16) == 0


# -- leaving the mesh ------------------------------------------------------------------------------------------------


def test_draining_keeps_the_engines_flows_and_lets_new_ones_out(
    strict: StandIn, capture: Capture, link: Pair, family: int, closing: Close
) -> None:
    far = listen(link.outside_path, link.far(family), 80)
    application = listen(link.pod_path, link.pod_address(family), 8080)
    held = connect(link.pod_path, link.far(family), 80)
    accepted, _ = strict.outbound.accept()
    closing(far, application, held, accepted)
    capture.set_mode(lib.MODE_DRAINING)
    native = connect(link.pod_path, link.far(family), 80)
    native_far, _ = far.accept()
    came = connect(link.outside_path, link.pod_address(family), 8080)
    came_app, _ = application.accept()
    late = connect(link.outside_path, link.pod_address(family), 15008)
    tunnel, _ = strict.hbone.accept()
    closing(native, native_far, came, came_app, late, tunnel)
    for one, other in ((held, accepted), (native, native_far), (came, came_app)):
        one.sendall(b"x")
        assert other.recv(1) == b"x"
        other.sendall(b"y")
        assert one.recv(1) == b"y"

    # and back again: what is native now is old, what the engine holds stays the engine's
    capture.set_mode(lib.MODE_LENIENT)
    assert capture.old() == 2
    for one, other in ((held, accepted), (native, native_far), (came, came_app)):
        one.sendall(b"x")
        assert other.recv(1) == b"x"
        other.sendall(b"y")
        assert one.recv(1) == b"y"
    with connect(link.pod_path, link.far(family), 80):
        strict.outbound.accept()[0].close()


def test_draining_sends_nothing_of_a_flow_whose_engine_died(
    strict: StandIn, capture: Capture, link: Pair, closing: Close
) -> None:
    canary = secrets.token_hex(16).encode()
    held = connect(link.pod_path, link.far4, 80)
    accepted, _ = strict.outbound.accept()
    closing(held)
    capture.set_mode(lib.MODE_DRAINING)
    with Tap(link.outside_path, "eth0") as tap:
        lose_resets(link)
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_LINGER)
        accepted.close()
        held.sendall(canary)
        held.settimeout(1)
        with pytest.raises(TimeoutError):
            held.recv(1)
        assert canary not in payload_out(tap.flows(), link)


# -- what is there stays there, what is taken out leaves nothing -----------------------------------------------------


@pytest.mark.parametrize(
    ("command", "bit"),
    [
        (["tc", "filter", "del", "dev", "eth0", "egress"], lib.CAPTURE_NO_OUT_ETH),
        (["tc", "filter", "del", "dev", "lo", "ingress"], lib.CAPTURE_NO_IN_LO),
        (["tc", "qdisc", "del", "dev", "lo", "clsact"], lib.CAPTURE_NO_IN_LO | lib.CAPTURE_NO_OUT_LO),
        (["ip", "rule", "del", "fwmark", "0x111"], lib.CAPTURE_NO_ROUTE4),
        (["ip", "-6", "route", "flush", "table", "100"], lib.CAPTURE_NO_ROUTE6),
        (["sysctl", "-qw", "net.ipv4.conf.lo.accept_local=0"], lib.CAPTURE_NO_ACCEPT_LOCAL),
    ],
)
def test_what_was_taken_out_is_noticed_and_put_back(
    strict: StandIn, capture: Capture, link: Pair, command: list[str], bit: int
) -> None:
    assert capture.verify() == 0
    run("nsenter", f"--net={link.pod_path}", *command)
    assert capture.verify() == bit
    capture.set_mode(lib.MODE_STRICT)
    assert capture.verify() == 0
    with connect(link.pod_path, link.far4, 80):
        strict.outbound.accept()[0].close()


def objects() -> dict[str, int]:
    """How many BPF programs, maps and links the machine has."""
    found = {}
    for kind in ("prog", "map", "link"):
        listing = subprocess.run(["/usr/sbin/bpftool", kind, "show", "-j"], capture_output=True, text=True, check=True)
        found[kind] = listing.stdout.count('"id":')
    return found


def test_in_and_out_again_leaves_nothing(link: Pair, closing: Close) -> None:
    def state() -> dict[str, str]:
        enter = ("nsenter", f"--net={link.pod_path}")
        return {
            "filters": run(*enter, "tc", "filter", "show", "dev", "eth0", "egress"),
            "rules": run(*enter, "ip", "rule") + run(*enter, "ip", "-6", "rule"),
            "routes": "".join(run(*enter, "ip", f, "route", "show", "table", "100", check=False) for f in ("-4", "-6")),
            "accept_local": run(*enter, "sysctl", "net.ipv4.conf.lo.accept_local"),
        }

    capture = Capture(link)
    before_state, before = state(), {}
    for cycle in range(60):
        capture.prepare()
        capture.set_mode((lib.MODE_STRICT, lib.MODE_LENIENT)[cycle % 2])
        capture.detach()
        if cycle == 9:
            eventually("freed", lambda: settled())
            before = objects()
    eventually(
        "objects are what they were", lambda: objects()["prog"] <= before["prog"] and objects()["map"] <= before["map"]
    )
    assert state() == before_state


def settled() -> bool:
    """The kernel frees maps a moment after their last reference: equal twice in a row."""
    first = objects()
    time.sleep(0.2)
    return first == objects()


def test_a_call_that_is_repeated_changes_nothing(strict: StandIn, capture: Capture, link: Pair) -> None:
    capture.prepare()
    capture.set_mode(lib.MODE_STRICT)
    assert capture.verify() == 0
    assert capture.listeners() == 7
    with connect(link.pod_path, link.far4, 80):
        strict.outbound.accept()[0].close()


def test_detach_after_the_namespace_is_gone() -> None:
    with ExitStack() as stack:
        link = stack.enter_context(pair())
        capture = Capture(link)
        capture.prepare()
        capture.set_mode(lib.MODE_STRICT)
    error = capture._error
    assert lib.capture_detach(capture.pins, -1, -1, b"eth0", error) == 0
    assert lib.capture_detach(capture.pins, -1, -1, b"eth0", error) == 0


def test_errors_say_what_failed(link: Pair) -> None:
    capture = Capture(link, interface="eth7")
    capture.prepare()
    with pytest.raises(Exception, match="eth7"):
        capture.set_mode(lib.MODE_STRICT)
    assert lib.capture_prepare(capture.pins, b"10.0.0.1,not-an-address", capture._error) < 0
    capture.detach()
