"""The engine against Envoy, which shares no code with it and little with tests/harness/hbone_peer.py, in both roles.

Envoy stands on a node without an engine of ours. That nothing got through is told by order: the application's first
connection is that of the good certificate, which came after the bad one's end.
"""

import secrets
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.harness.cluster import Nodes
from tests.harness.envoy import Envoy, inbound, outbound
from tests.harness.exchange import Case, Taken, exchange, taken
from tests.harness.netns import connect, listen
from tests.harness.pki import BAD, Leaf, bad_leaf, spiffe

PORT = 8080
GOOD, WRONG = 7000, 7001  # of Envoy's own listeners, as client
RESET = struct.pack("ii", 1, 0)
# Both orders of ending, some MiB each way, nothing at all, and many small ones beside.
CASES: list[Case] = [(0, 4 << 20, 3 << 20), (1, 3 << 20, 4 << 20), (0, 0, 0), (1, 0, 0)]
CASES += [(n % 2, 1 + 997 * n, 70_000 - 991 * n) for n in range(60)]
# Envoy as server ends the stream when the application ends first (RST_STREAM behind END_STREAM): the client's bytes are
# not wanted any more, and what a window holds back is cut (INTERNAL_ERROR). So there, only what fits into a window.
CASES_OF_SERVER = [(first if theirs < 1 << 17 else 0, mine * (not first), theirs) for first, mine, theirs in CASES]
CASES_OF_SERVER.append((0, 3 << 20, 4 << 20))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Our engine on the client's node, Envoy with the server."""
    folder = tmp_path_factory.mktemp("out")
    with Nodes(folder, {"client": 0, "server": 1}, engines=(True, False)) as nodes:
        nodes.publish()
        yield nodes


@pytest.fixture(scope="module")
def into(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Our engine on the server's node, Envoy with the client."""
    folder = tmp_path_factory.mktemp("in")
    with Nodes(folder, {"client": 0, "server": 1}, engines=(False, True)) as nodes:
        nodes.publish()
        yield nodes


def as_server(nodes: Nodes, leaf: Leaf, expects: str) -> Envoy:
    """Envoy in the server's pod, on both addresses."""
    server = nodes["server"]
    parts = [inbound(server.address(family), PORT, leaf, expects) for family in (4, 6)]
    return Envoy(nodes.folder, server.path, *parts)


def as_client(
    nodes: Nodes, family: int, leaf: Leaf, expects: str, port: int = GOOD
) -> dict[str, list[dict[str, object]]]:
    """A listener of Envoy's in the client's pod: what comes there goes to the server."""
    address = nodes["server"].address(family)
    authority = f"[{address}]:{PORT}" if family == 6 else f"{address}:{PORT}"
    return outbound(port, address, authority, leaf, expects)


def check_exchange(received: list[Taken], served: list[Taken], cases: list[Case]) -> None:
    """Every byte, both ways."""
    assert received == [taken(theirs) for _, _, theirs in cases]
    assert served == sorted(taken(mine) for _, mine, _ in cases)


@pytest.mark.parametrize("family", [4, 6])
def test_envoy_as_client(into: Nodes, family: int) -> None:
    client, server = into["client"], into["server"]
    part = as_client(into, family, into.authority.leaf(client.identity), server.identity)
    with Envoy(into.folder, client.path, part) as envoy:
        received, served, peers = exchange(
            client.path, ("127.0.0.1", GOOD), server.path, (server.address(family), PORT), CASES
        )
        check_exchange(received, served, CASES)
        assert peers == {client.address(family)}
        assert envoy.counts(f"cluster.out{GOOD}.upstream_cx_total", f"cluster.out{GOOD}.upstream_rq_total") == [
            1,
            len(CASES),
        ]
        engine = into.clients[1]
        assert engine is not None
        (tunnel,) = [each for each in engine.dump("tunnels") if each["state"] == "open"]
        assert (tunnel["direction"], tunnel["identity_peer"]) == ("inbound", client.identity)


@pytest.mark.parametrize("family", [4, 6])
def test_envoy_as_server(out: Nodes, family: int) -> None:
    client, server = out["client"], out["server"]
    with as_server(out, out.authority.leaf(server.identity), client.identity) as envoy:
        address = (server.address(family), PORT)
        received, served, _ = exchange(client.path, address, server.path, address, CASES_OF_SERVER)
        check_exchange(received, served, CASES_OF_SERVER)
        assert envoy.counts(f"http.in{family}.downstream_cx_total", f"http.in{family}.downstream_rq_total") == [
            1,
            len(CASES_OF_SERVER),
        ]
        assert envoy.count(f"http.in{family}.downstream_rq_2xx") == len(CASES_OF_SERVER)
    out.retire_tunnels("server")


# -- endings and back-pressure -----------------------------------------------------------------------------------------


def reset(connection: socket.socket) -> None:
    """As an application that is killed with data unread."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    connection.close()


def talk(connection: socket.socket, other: socket.socket) -> None:
    """A few bytes each way: the stream stands."""
    for one, two in ((connection, other), (other, connection)):
        one.sendall(b"are you there?")
        assert two.recv(100) == b"are you there?"


def test_resets_through_envoy_as_server(out: Nodes) -> None:
    client, server = out["client"], out["server"]
    with as_server(out, out.authority.leaf(server.identity), client.identity) as envoy:
        with listen(server.path, server.address(), PORT) as listener:
            with connect(client.path, server.address(), PORT) as asking:
                serving, _ = listener.accept()
                talk(asking, serving)
                reset(serving)
                with pytest.raises(ConnectionResetError):
                    asking.recv(1)
            before = envoy.count("http.in4.downstream_rq_rx_reset")
            asking = connect(client.path, server.address(), PORT)
            serving, _ = listener.accept()
            with serving:
                serving.settimeout(20)
                talk(asking, serving)
                reset(asking)
                assert serving.recv(1) == b""  # what Envoy makes of it; our part is the RST_STREAM
        assert envoy.counts("http.in4.downstream_rq_rx_reset", "http.in4.downstream_cx_total") == [before + 1, 1]
    out.retire_tunnels("server")


def test_a_reset_through_envoy_as_client(into: Nodes) -> None:
    client, server = into["client"], into["server"]
    part = as_client(into, 4, into.authority.leaf(client.identity), server.identity)
    with Envoy(into.folder, client.path, part) as envoy, listen(server.path, server.address(), PORT) as listener:
        asking = connect(client.path, "127.0.0.1", GOOD)
        serving, _ = listener.accept()
        with serving:
            serving.settimeout(20)
            talk(asking, serving)
            reset(asking)
            with pytest.raises(ConnectionResetError):
                serving.recv(1)
        with connect(client.path, "127.0.0.1", GOOD) as asking:
            serving, _ = listener.accept()
            talk(asking, serving)
            reset(serving)
            assert asking.recv(1) == b""  # what Envoy makes of it; our part is the RST_STREAM
        assert envoy.counts(f"cluster.out{GOOD}.http2.rx_reset", f"cluster.out{GOOD}.upstream_cx_total") == [1, 1]


def fill(connection: socket.socket) -> None:
    """Sends until nothing more is taken."""
    connection.settimeout(0.5)
    with pytest.raises(TimeoutError):
        while True:
            connection.send(b"x" * 65536)


@pytest.mark.parametrize("role", ["client", "server"])
def test_readers_that_stop_stop_nobody_else(out: Nodes, into: Nodes, role: str) -> None:
    """Four readers stop on the one tunnel with Envoy; the rest of CASES goes past them, both ways."""
    nodes = into if role == "client" else out
    client, server = nodes["client"], nodes["server"]
    with ExitStack() as stack:
        if role == "client":
            part = as_client(nodes, 4, nodes.authority.leaf(client.identity), server.identity)
            envoy = stack.enter_context(Envoy(nodes.folder, client.path, part))
            called = ("127.0.0.1", GOOD)
        else:
            envoy = stack.enter_context(as_server(nodes, nodes.authority.leaf(server.identity), client.identity))
            called = (server.address(), PORT)
        with listen(server.path, server.address(), PORT) as listener:
            for _ in range(4):
                asking = stack.enter_context(connect(client.path, *called))
                stack.enter_context(listener.accept()[0])
                fill(asking)
        cases = CASES if role == "client" else CASES_OF_SERVER
        received, served, _ = exchange(client.path, called, server.path, (server.address(), PORT), cases)
        check_exchange(received, served, cases)
        tunnels = f"cluster.out{GOOD}.upstream_cx_total" if role == "client" else "http.in4.downstream_cx_total"
        assert envoy.count(tunnels) == 1
    out.retire_tunnels("server")


# -- identity ----------------------------------------------------------------------------------------------------------


def nothing_comes(path: str, address: str, port: int) -> None:
    """A connection that sends a secret and gets an end without a byte."""
    try:
        with connect(path, address, port) as asking:
            asking.sendall(b"secret")
            assert asking.recv(1) == b""
    except ConnectionError:
        pass


def only_the_good_came(path: str, address: str, port: int, listener: socket.socket) -> None:
    """The control: it works, and nobody was at the application before."""
    canary = secrets.token_hex(8).encode()
    with connect(path, address, port) as asking:
        asking.sendall(canary)
        serving, _ = listener.accept()
        with serving:
            serving.settimeout(20)
            assert serving.recv(100) == canary
            serving.sendall(canary)
            assert asking.recv(100) == canary
    listener.settimeout(0)
    with pytest.raises(BlockingIOError):
        listener.accept()


@pytest.mark.parametrize("kind", [kind for kind in BAD if kind != "other account"])
def test_envoy_with_a_bad_certificate_reaches_nothing(into: Nodes, kind: str) -> None:
    """Another account of the mesh is no bad client: that is policy's."""
    client, server = into["client"], into["server"]
    wrong = as_client(into, 4, bad_leaf(into.authority, kind, client.identity), server.identity, WRONG)
    good = as_client(into, 4, into.authority.leaf(client.identity), server.identity)
    with Envoy(into.folder, client.path, wrong, good) as envoy:
        with listen(server.path, server.address(), PORT) as listener:
            nothing_comes(client.path, "127.0.0.1", WRONG)
            only_the_good_came(client.path, "127.0.0.1", GOOD, listener)
        tried, answered = envoy.counts(
            f"cluster.out{WRONG}.upstream_cx_total", f"cluster.out{WRONG}.upstream_rq_completed"
        )
        assert tried >= 1
        assert answered == 0


@pytest.mark.parametrize("kind", BAD)
def test_envoy_with_a_bad_certificate_gets_no_byte(out: Nodes, kind: str) -> None:
    client, server = out["client"], out["server"]
    with listen(server.path, server.address(), PORT) as listener:
        with as_server(out, bad_leaf(out.authority, kind, server.identity), client.identity) as envoy:
            with pytest.raises(ConnectionResetError), connect(client.path, server.address(), PORT) as asking:
                asking.sendall(b"secret")
                assert asking.recv(1) != b"", "an orderly end"
                raise AssertionError("answered")
            tried, asked = envoy.counts("listener.in4.downstream_cx_total", "http.in4.downstream_rq_total")
            assert tried == 1
            assert asked == 0
        with as_server(out, out.authority.leaf(server.identity), client.identity):
            only_the_good_came(client.path, server.address(), PORT, listener)
    out.retire_tunnels("server")


def test_envoy_checks_the_engine_as_client(out: Nodes) -> None:
    """Envoy's matcher is no decoration: what expects somebody else turns our engine away."""
    client, server = out["client"], out["server"]
    good = out.authority.leaf(server.identity)
    with listen(server.path, server.address(), PORT) as listener:
        with as_server(out, good, spiffe("somebody-else")) as envoy:
            with pytest.raises(ConnectionResetError), connect(client.path, server.address(), PORT) as asking:
                asking.sendall(b"secret")
                assert asking.recv(1) != b"", "an orderly end"
                raise AssertionError("answered")
            assert envoy.count("listener.in4.ssl.fail_verify_san") == 1
        with as_server(out, good, client.identity):
            only_the_good_came(client.path, server.address(), PORT, listener)
    out.retire_tunnels("server")


def test_envoy_checks_the_engine_as_server(into: Nodes) -> None:
    client, server = into["client"], into["server"]
    leaf = into.authority.leaf(client.identity)
    wrong = as_client(into, 4, leaf, spiffe("somebody-else"), WRONG)
    with Envoy(into.folder, client.path, wrong, as_client(into, 4, leaf, server.identity)) as envoy:
        with listen(server.path, server.address(), PORT) as listener:
            nothing_comes(client.path, "127.0.0.1", WRONG)
            only_the_good_came(client.path, "127.0.0.1", GOOD, listener)
        assert envoy.count(f"cluster.out{WRONG}.ssl.fail_verify_san") == 1
