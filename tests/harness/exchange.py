"""One exchange between two applications over a TCP connection: a header, bytes both ways, an end of each direction.

A case is (who ends first: 0 the client, 1 the server; bytes of the client; bytes of the server). What came is told as
count and hash, so that thousands of bytes compare as two numbers.
"""

import hashlib
import random
import socket
import struct
from concurrent.futures import ThreadPoolExecutor

from tests.harness.netns import connect, listen

Case = tuple[int, int, int]
Taken = tuple[int, str]
HEADER = struct.Struct("!BII")
PATTERN = random.Random(7).randbytes(1 << 20)
PATIENCE_S = 60


def take(connection: socket.socket) -> Taken:
    """Reads to the end: count and hash."""
    digest, count = hashlib.sha256(), 0
    while chunk := connection.recv(1 << 18):
        digest.update(chunk)
        count += len(chunk)
    return count, digest.hexdigest()


def give(connection: socket.socket, count: int) -> None:
    """Sends `count` bytes of the pattern, and the end."""
    while count > 0:
        part = PATTERN[: min(count, len(PATTERN))]
        connection.sendall(part)
        count -= len(part)
    connection.shutdown(socket.SHUT_WR)


def taken(count: int) -> Taken:
    """What `take` says of what `give` gave."""
    whole, rest = divmod(count, len(PATTERN))
    digest = hashlib.sha256(PATTERN * whole + PATTERN[:rest])
    return count, digest.hexdigest()


def serve_one(connection: socket.socket) -> Taken:
    """The server's part of one exchange; returns what it received after the header."""
    with connection:
        connection.settimeout(PATIENCE_S)
        header = b""
        while len(header) < HEADER.size:
            part = connection.recv(HEADER.size - len(header))
            assert part, "the connection ended within the header"
            header += part
        server_first, _, mine = HEADER.unpack(header)
        if server_first:
            give(connection, mine)
            return take(connection)
        received = take(connection)
        give(connection, mine)
        return received


def ask_one(path: str, address: str, port: int, case: Case) -> Taken:
    """The client's part of one exchange, from inside a namespace."""
    with connect(path, address, port, timeout=PATIENCE_S) as connection:
        connection.sendall(HEADER.pack(*case))
        if case[0]:
            received = take(connection)
            give(connection, case[1])
            return received
        give(connection, case[1])
        return take(connection)


def serve(listener: socket.socket, count: int, pool: ThreadPoolExecutor) -> tuple[list[Taken], set[str]]:
    """`count` exchanges at once: what was received, in no order, and the clients' addresses."""
    listener.settimeout(PATIENCE_S)
    waiting, peers = [], set()
    for _ in range(count):
        accepted, peer = listener.accept()
        peers.add(peer[0])
        waiting.append(pool.submit(serve_one, accepted))
    return [each.result() for each in waiting], peers


def exchange(
    client: str, called: tuple[str, int], server: str, bound: tuple[str, int], cases: list[Case]
) -> tuple[list[Taken], list[Taken], set[str]]:
    """All cases at once, from namespace `client` to `called`, served in namespace `server` at `bound`.

    Returns what the clients received, in order, what the server received, sorted, and the addresses that it saw.
    """
    with (
        listen(server, *bound, backlog=512) as listener,
        ThreadPoolExecutor(2 * len(cases) + 1) as pool,
    ):
        serving = pool.submit(serve, listener, len(cases), pool)
        clients = [pool.submit(ask_one, client, *called, case) for case in cases]
        received = [each.result() for each in clients]
        served, peers = serving.result()
        return received, sorted(served), peers
