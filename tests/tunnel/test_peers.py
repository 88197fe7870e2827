"""The engine against a peer that is not the engine (tests/harness/hbone_peer.py): protocol, and identity both ways."""

import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.harness import hbone_peer
from tests.harness.cluster import Nodes
from tests.harness.netns import connect, listen
from tests.harness.pki import BAD, bad_leaf


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """An engine for the client's node; the server's node is played by the peer."""
    folder = tmp_path_factory.mktemp("out")
    with Nodes(folder, {"client": 0, "server": 1}, engines=(True, False)) as nodes:
        nodes.publish()
        yield nodes


@pytest.fixture(scope="module")
def into(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """An engine for the server's node; the client's node is played by the peer."""
    folder = tmp_path_factory.mktemp("in")
    with Nodes(folder, {"client": 0, "server": 1}, engines=(False, True)) as nodes:
        nodes.publish()
        yield nodes


def send_all(client: socket.socket, payload: bytes) -> None:
    """Sends, then ends this direction."""
    client.sendall(payload)
    client.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("family", [4, 6])
def test_the_engine_as_client(out: Nodes, family: int) -> None:
    server = out["server"]
    address = server.address(family)
    payload = secrets.token_bytes(300_000)
    with hbone_peer.Server(server.path, address, out.authority.leaf(server.identity)) as peer:
        client = connect(out["client"].path, address, 8080)
        with client:
            sender = threading.Thread(target=send_all, args=(client, payload))
            sender.start()
            back = bytearray()
            while chunk := client.recv(65536):
                back += chunk
            sender.join()
    out.retire_tunnels("server")
    assert bytes(back) == payload
    (request,) = peer.requests
    assert bytes(request.received) == payload
    assert request.headers[":method"] == "CONNECT"
    assert request.headers[":authority"] == (f"[{address}]:8080" if family == 6 else f"{address}:8080")
    assert request.headers["forwarded"].startswith("for=")
    assert len(request.headers["traceparent"]) == 55
    assert "k8s.namespace.name=default" in request.headers["baggage"]
    assert request.peer == out["client"].address(family)


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_server_gets_no_byte(out: Nodes, kind: str) -> None:
    server = out["server"]
    with hbone_peer.Server(server.path, server.address(4), bad_leaf(out.authority, kind, server.identity)) as peer:
        with pytest.raises(ConnectionError), connect(out["client"].path, server.address(4), 8080) as client:
            client.sendall(b"secret")
            assert client.recv(1) != b"", "an orderly end"
            raise AssertionError("answered")
    assert peer.requests == []
    out.retire_tunnels("server")


def test_a_refused_connect_is_a_reset(out: Nodes) -> None:
    server = out["server"]
    with hbone_peer.Server(server.path, server.address(4), out.authority.leaf(server.identity), status=503) as peer:
        with pytest.raises(ConnectionResetError), connect(out["client"].path, server.address(4), 8080) as client:
            client.recv(1)
    assert len(peer.requests) == 1
    out.retire_tunnels("server")


def warm(out: Nodes) -> None:
    """A tunnel to the peer stands, and its SETTINGS have come: they are ahead of its first answer."""
    with connect(out["client"].path, out["server"].address(4), 8080) as client:
        client.sendall(b"warm")
        assert client.recv(4) == b"warm"


def requests(peer: hbone_peer.Server, count: int) -> None:
    """Until the peer has seen so many."""
    end = time.monotonic() + 20
    while len(peer.requests) < count:
        assert time.monotonic() < end, peer.errors
        time.sleep(0.005)


@pytest.mark.parametrize("size", [10, 70_000])
@pytest.mark.parametrize("half", [False, True])
def test_bytes_go_ahead_of_the_answer_where_the_peer_says_so(out: Nodes, size: int, half: bool) -> None:
    server, payload = out["server"], secrets.token_bytes(size)

    def answer(request: hbone_peer.Request) -> int | None:
        first = request is peer.requests[0]
        return 200 if first or (len(request.received) == size and request.ended == half) else None

    leaf = out.authority.leaf(server.identity)
    with hbone_peer.Server(server.path, server.address(4), leaf, early=True, answer=answer) as peer:
        warm(out)
        with connect(out["client"].path, server.address(4), 8080) as client:
            client.sendall(payload)
            if half:
                client.shutdown(socket.SHUT_WR)
            back = bytearray()
            while len(back) < size:
                back += client.recv(65536)
            assert bytes(back) == payload
            if not half:
                client.sendall(b"more")
            assert client.recv(4) == (b"" if half else b"more")
    assert peer.requests[1].ahead == payload
    out.retire_tunnels("server")


def test_no_byte_goes_ahead_of_the_answer_of_others(out: Nodes) -> None:
    server = out["server"]

    def answer(request: hbone_peer.Request) -> int | None:
        return 200 if request is peer.requests[0] or len(peer.requests) > 3 else None

    with (
        hbone_peer.Server(server.path, server.address(4), out.authority.leaf(server.identity), answer=answer) as peer,
        ExitStack() as stack,
    ):
        warm(out)
        # a byte of the first would be at the peer before the request of the third
        clients = []
        for number in (2, 3, 4):
            clients.append(stack.enter_context(connect(out["client"].path, server.address(4), 8080)))
            clients[-1].sendall(b"%d" % number)
            requests(peer, number)
        for number, client in zip((2, 3, 4), clients, strict=True):
            assert client.recv(1) == b"%d" % number
    assert [request.ahead for request in peer.requests[1:]] == [b"", b"", b""]
    out.retire_tunnels("server")


def test_what_went_ahead_of_a_refusal_is_a_reset(out: Nodes) -> None:
    server = out["server"]

    def answer(request: hbone_peer.Request) -> int | None:
        return 200 if request is peer.requests[0] else 503 if request.received else None

    leaf = out.authority.leaf(server.identity)
    with hbone_peer.Server(server.path, server.address(4), leaf, early=True, answer=answer) as peer:
        warm(out)
        with pytest.raises(ConnectionResetError), connect(out["client"].path, server.address(4), 8080) as client:
            client.sendall(b"ahead")
            client.recv(1)
    assert [bytes(request.received) for request in peer.requests] == [b"warm", b"ahead"]
    out.retire_tunnels("server")


@pytest.mark.parametrize("half", [False, True])
def test_what_went_ahead_of_an_unseen_request_is_sent_again(out: Nodes, half: bool) -> None:
    server, payload = out["server"], secrets.token_bytes(40_000)

    def answer(request: hbone_peer.Request) -> int | None:
        if request is peer.requests[0]:
            return 200
        whole = len(request.received) == len(payload) and request.ended == half
        return None if not whole else hbone_peer.REFUSED if request is peer.requests[1] else 200

    leaf = out.authority.leaf(server.identity)
    with hbone_peer.Server(server.path, server.address(4), leaf, early=True, answer=answer) as peer:
        warm(out)
        with connect(out["client"].path, server.address(4), 8080) as client:
            client.sendall(payload)
            if half:
                client.shutdown(socket.SHUT_WR)
            back = bytearray()
            while len(back) < len(payload):
                back += client.recv(65536)
            assert bytes(back) == payload
    assert [request.ahead for request in peer.requests[1:]] == [payload, payload]
    out.retire_tunnels("server")


def echo(listener: socket.socket, peers: list[str]) -> None:
    """One connection: what comes goes back, until its end."""
    accepted, peer = listener.accept()
    peers.append(peer[0])
    with accepted:
        accepted.settimeout(20)
        while chunk := accepted.recv(65536):
            accepted.sendall(chunk)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("family", [4, 6])
def test_the_engine_as_server(into: Nodes, family: int, ahead: bool) -> None:
    client, server = into["client"], into["server"]
    address = server.address(family)
    payload = secrets.token_bytes(60_000)
    peers: list[str] = []
    with listen(server.path, address, 8080) as listener:
        thread = threading.Thread(target=echo, args=(listener, peers))
        thread.start()
        authority = f"[{address}]:8080" if family == 6 else f"{address}:8080"
        leaf = into.authority.leaf(client.identity)
        settings: dict[int, int] = {}
        back = hbone_peer.exchange(client.path, address, leaf, authority, payload, ahead=ahead, settings=settings)
        assert back == payload
        assert settings[hbone_peer.EARLY] == 1
        thread.join()
    assert peers == [client.address(family)]


@pytest.mark.parametrize("kind", [kind for kind in BAD if kind != "other account"])
def test_a_bad_client_reaches_nothing(into: Nodes, kind: str) -> None:
    client, server = into["client"], into["server"]
    with listen(server.path, server.address(4), 8080) as listener:
        leaf = bad_leaf(into.authority, kind, client.identity)
        with pytest.raises(hbone_peer.Refused) as refused:
            hbone_peer.exchange(client.path, server.address(4), leaf, f"{server.address(4)}:8080", b"secret")
        assert refused.value.status == 0
        listener.settimeout(0.2)
        with pytest.raises(TimeoutError):
            listener.accept()


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(
    ("authority", "method", "status"),
    [
        ("{other}:8080", "CONNECT", 400),
        ("127.0.0.1:8080", "CONNECT", 400),
        ("{server}:15008", "CONNECT", 503),
        ("{server}:{own}", "CONNECT", 503),
        ("{server}:0", "CONNECT", 400),
        ("{server}:99999", "CONNECT", 400),
        ("nonsense", "CONNECT", 400),
        ("{server}:8080", "GET", 400),
        ("{server}:9", "CONNECT", 503),
    ],
)
def test_connects_that_are_refused(into: Nodes, authority: str, method: str, status: int, ahead: bool) -> None:
    client, server = into["client"], into["server"]
    text = authority.format(other=client.address(4), server=server.address(4), own=server.ports["inbound"])
    leaf = into.authority.leaf(client.identity)
    with pytest.raises(hbone_peer.Refused) as refused:
        hbone_peer.exchange(client.path, server.address(4), leaf, text, b"x", method=method, ahead=ahead)
    assert refused.value.status == status


def test_forged_headers_change_nothing(into: Nodes) -> None:
    client, server = into["client"], into["server"]
    forged = (("forwarded", 'for="192.0.2.7:1"'), ("baggage", "k8s.namespace.name=kube-system"))
    peers: list[str] = []
    with listen(server.path, server.address(4), 8080) as listener:
        thread = threading.Thread(target=echo, args=(listener, peers))
        thread.start()
        leaf = into.authority.leaf(client.identity)
        authority = f"{server.address(4)}:8080"
        assert hbone_peer.exchange(client.path, server.address(4), leaf, authority, b"x", headers=forged) == b"x"
        thread.join()
    assert peers == [client.address(4)]


@pytest.mark.parametrize("whose", ["client's", "server's", "nobody's"])
def test_intermediates_go_with_the_leaf(tmp_path: Path, whose: str) -> None:
    """A peer that knows the root only can verify what the engine shows, in both roles."""
    engines = (whose == "client's", whose != "client's")
    with Nodes(tmp_path, {"client": 0, "server": 1}, engines=engines) as nodes:
        nodes.publish()
        client, server, below = nodes["client"], nodes["server"], nodes.authority.intermediate()
        if whose == "client's":
            nodes.certify(client, below.leaf(client.identity))
            with hbone_peer.Server(server.path, server.address(4), nodes.authority.leaf(server.identity)):
                with connect(client.path, server.address(4), 8080) as connection:
                    connection.sendall(b"x")
                    assert connection.recv(1) == b"x"
            return
        nodes.certify(server, (below if whose == "server's" else nodes.authority).leaf(server.identity))
        with listen(server.path, server.address(4), 8080) as listener:
            thread = threading.Thread(target=echo, args=(listener, []))
            thread.start()
            leaf, authority = nodes.authority.leaf(client.identity), f"{server.address(4)}:8080"
            assert hbone_peer.exchange(client.path, server.address(4), leaf, authority, b"x") == b"x"
            thread.join()


def test_two_pods_of_one_account_never_share_a_tunnel(tmp_path: Path) -> None:
    places = {"one": 0, "two": 0, "server": 1}
    with Nodes(tmp_path, places, engines=(True, False), accounts={"one": "same", "two": "same"}) as nodes:
        nodes.publish()
        server = nodes["server"]
        with hbone_peer.Server(server.path, server.address(4), nodes.authority.leaf(server.identity)) as peer:
            for name in ("one", "two", "one"):
                with connect(nodes[name].path, server.address(4), 8080) as client:
                    client.sendall(b"x")
                    assert client.recv(1) == b"x"
        assert [request.peer for request in peer.requests] == [nodes[name].address(4) for name in ("one", "two", "one")]


def test_tunnels_are_spread_over_the_workers(tmp_path: Path) -> None:
    """Which worker accepts is the kernel's hash; which one keeps a tunnel is not."""
    with Nodes(tmp_path, {"client": 0, "server": 1}, engines=(False, True), workers=2) as nodes, ExitStack() as stack:
        nodes.publish()
        client, server = nodes["client"], nodes["server"]
        speaks = hbone_peer.context(nodes.authority.leaf(client.identity), server=False)
        for _ in range(24):
            tcp = connect(client.path, server.address(4), hbone_peer.PORT)
            stack.enter_context(speaks.wrap_socket(tcp))
        engine = nodes.clients[1]
        assert engine is not None
        workers = [tunnel["worker"] for tunnel in engine.dump("tunnels")]
        assert sorted(workers) == [0] * 12 + [1] * 12
