"""Bytes and endings through two engines, compared with the same work without them."""

import hashlib
import random
import socket
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.harness.cluster import Nodes
from tests.harness.engine import opened
from tests.harness.exchange import PATTERN, Case, Taken, exchange, give, take, taken
from tests.harness.netns import connect, listen

PORT = 8080
RESET = struct.pack("ii", 1, 0)


def talk(nodes: Nodes, target: str, family: int, cases: list[Case]) -> tuple[list[Taken], list[Taken]]:
    """All cases at once; what the clients received in order, what the server received sorted."""
    server = nodes[target]
    address = (server.address(family), PORT)
    return exchange(nodes["client"].path, address, server.path, address, cases)[:2]


def two_hundred() -> list[Case]:
    """Each order of ending with nothing, all of 8 MiB and a frame's bounds; the rest at random between them."""
    dice = random.Random(11)
    most = 8 << 20
    pairs = [(0, 0), (0, most), (most, 0), (most, most), (1, 0), (0, 1), (16375, 16384), (16384, 16375), (16376, 65536)]
    cases = [(first, mine, theirs) for first in (0, 1) for mine, theirs in pairs]
    while len(cases) < 200:
        cases.append((len(cases) % 2, int(2 ** dice.uniform(0, 23)), int(2 ** dice.uniform(0, 23))))
    return cases


@pytest.mark.parametrize("family", [4, 6])
def test_two_hundred_at_once_as_without_the_mesh(tmp_path: Path, family: int) -> None:
    cases = two_hundred()
    places = {"client": 0, "near": 0, "server": 1}
    with Nodes(tmp_path, places, engines=(False, False)) as plain:
        expected = talk(plain, "server", family, cases)
    assert expected[0] == [taken(theirs) for _, _, theirs in cases]
    with Nodes(tmp_path, places, workers=2) as nodes:
        nodes.publish()
        assert talk(nodes, "server", family, cases) == expected
        assert talk(nodes, "near", family, cases) == expected
        client = nodes.clients[0]
        assert client is not None
        assert client.dump("connections") == []
    with Nodes(tmp_path, places, same_node="native", engines=(True, False)) as nodes:
        nodes.publish()
        nodes.allow(nodes["client"], nodes["near"], PORT)
        near = nodes["near"].capture
        assert near is not None
        handed = near.counters()["to_application_vouched"]
        assert talk(nodes, "near", family, cases) == expected
        assert near.counters()["to_application_vouched"] == handed + len(cases)


# -- resets ----------------------------------------------------------------------------------------------------------


def ending(connection: socket.socket) -> tuple[str, bytes]:
    """How a connection ends for its reader, and what came before."""
    received = bytearray()
    connection.settimeout(30)
    try:
        while chunk := connection.recv(65536):
            received += chunk
    except OSError as error:
        return type(error).__name__, bytes(received)
    return "end", bytes(received)


def reset(connection: socket.socket) -> None:
    """As an application that is killed with data unread."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    connection.close()


def client_resets(client: socket.socket, server: socket.socket) -> tuple[str, bytes]:
    client.sendall(PATTERN[:100_000])
    got = b""
    while len(got) < 50_000:
        got += server.recv(50_000 - len(got))
    reset(client)
    how, rest = ending(server)
    return how, got + rest


def server_resets(client: socket.socket, server: socket.socket) -> tuple[str, bytes]:
    return client_resets(server, client)


def reset_after_half_close(client: socket.socket, server: socket.socket) -> tuple[str, bytes]:
    """The client ended its direction; later it dies: the server learns it when it writes or reads on."""
    client.sendall(b"request")
    client.shutdown(socket.SHUT_WR)
    assert ending(server) == ("end", b"request")
    reset(client)
    try:
        for _ in range(2000):
            server.sendall(PATTERN[:65536])
    except OSError as error:
        return type(error).__name__, b""
    return "wrote all", b""


@pytest.mark.parametrize("scene", [client_resets, server_resets, reset_after_half_close])
def test_a_reset_is_the_same_error_at_the_same_side(
    tmp_path: Path, scene: Callable[[socket.socket, socket.socket], tuple[str, bytes]]
) -> None:
    def run(nodes: Nodes, target: str) -> tuple[str, bytes]:
        with listen(nodes[target].path, nodes[target].address(4), PORT) as listener:
            client = connect(nodes["client"].path, nodes[target].address(4), PORT)
            server, _ = listener.accept()
            server.settimeout(30)
            with client, server:
                return scene(client, server)

    places = {"client": 0, "near": 0, "server": 1}
    with Nodes(tmp_path, places, engines=(False, False)) as plain:
        expected, _ = run(plain, "server")
    same = {"ConnectionResetError", "BrokenPipeError"}
    for setting in ("direct", "native"):
        with Nodes(tmp_path, places, same_node=setting) as nodes:
            nodes.publish()
            nodes.allow(nodes["client"], nodes["near"], PORT)
            for target in ("server", "near"):
                how, received = run(nodes, target)
                assert how == expected or {how, expected} == same
                assert PATTERN.startswith(received)


def test_five_thousand_resets_beside_an_open_stream(tmp_path: Path) -> None:
    """By turns the client and the server reset, each after both have heard from the other: no reset is lost unseen."""
    count = 5000

    def expect_reset(connection: socket.socket) -> None:
        with pytest.raises(ConnectionResetError):
            connection.recv(1)

    def serve_all(listener: socket.socket) -> int:
        for n in range(count):
            accepted, _ = listener.accept()
            with accepted:
                accepted.settimeout(20)
                assert accepted.recv(1) == b"?"
                accepted.sendall(b"!")
                if n % 2:
                    assert accepted.recv(1) == b"."
                    reset(accepted)
                else:
                    expect_reset(accepted)
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            listener.accept()
        return count

    with Nodes(tmp_path, {"client": 0, "server": 1}) as nodes:
        nodes.publish()
        server, path = nodes["server"], nodes["client"].path
        with (
            listen(server.path, server.address(4), PORT) as listener,
            listen(server.path, server.address(4), PORT + 1) as resetting,
            ThreadPoolExecutor(1) as pool,
        ):
            neighbour = connect(path, server.address(4), PORT)
            other, _ = listener.accept()
            serving = pool.submit(serve_all, resetting)
            with neighbour, other:
                other.settimeout(20)
                for n in range(count):
                    with connect(path, server.address(4), PORT + 1) as made:
                        made.sendall(b"?")
                        assert made.recv(1) == b"!"
                        if n % 2:
                            made.sendall(b".")
                            expect_reset(made)
                        else:
                            reset(made)
                    if n % 500 == 0:
                        neighbour.sendall(b"still here")
                        assert other.recv(100) == b"still here"
                assert serving.result() == count
                neighbour.sendall(b"and at the end")
                assert other.recv(100) == b"and at the end"
                for direction, client in zip(("outbound", "inbound"), nodes.clients, strict=True):
                    assert client is not None
                    (tunnel,) = client.dump("tunnels")
                    assert (tunnel["direction"], tunnel["state"], tunnel["retired"]) == (direction, "open", False)
                    assert tunnel["streams"] == 1
                    assert opened(client.metrics(), "source" if direction == "outbound" else "destination") == count + 1


# -- back-pressure ---------------------------------------------------------------------------------------------------


def pss_mib(pid: int) -> float:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) / 1024


def test_readers_that_stop_stop_nobody_else(tmp_path: Path) -> None:
    count = 256 << 20
    with Nodes(tmp_path, {"client": 0, "server": 1}) as nodes:
        nodes.publish()
        server, path = nodes["server"], nodes["client"].path
        engines = [engine.process.pid for engine in nodes.engines if engine is not None]
        before = [pss_mib(pid) for pid in engines]
        with listen(server.path, server.address(4), PORT) as listener:
            stuck = []
            for _ in range(8):
                client = connect(path, server.address(4), PORT)
                stuck += [client, listener.accept()[0]]
                client.settimeout(0.5)
                with pytest.raises(TimeoutError):
                    while True:
                        client.send(PATTERN)
            ninth = connect(path, server.address(4), PORT, timeout=120)
            reader, _ = listener.accept()
            reader.settimeout(120)
            sender = threading.Thread(target=give, args=(ninth, count))
            sender.start()
            received = take(reader)
            sender.join()
            after = [pss_mib(pid) for pid in engines]
            for each in (*stuck, ninth, reader):
                each.close()
        digest = hashlib.sha256()
        for _ in range(count // len(PATTERN)):
            digest.update(PATTERN)
        assert received == (count, digest.hexdigest())
        client_end = nodes.clients[0]
        assert client_end is not None
        assert len([item for item in client_end.dump("tunnels") if item["direction"] == "outbound"]) == 1
        print(f"engines' PSS in MiB before {before}, with eight stuck readers and 256 MiB passed {after}")
        for first, last in zip(before, after, strict=True):
            assert last <= first + 64 + 16
