"""What applications do with a connection beyond send and recv: splice, sendfile, zero copy, peeking, half-close, urgent
data, resets, both directions at once. The same programs run without the mesh, on one node with acceleration off and on,
and across nodes; each says what it saw, and all must have seen the same.
"""

import fcntl
import hashlib
import os
import select
import socket
import struct
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest

from tests.harness.cluster import Nodes
from tests.harness.exchange import PATTERN, give, take, taken
from tests.harness.netns import connect, listen
from tests.net.test_capture import RST_LINGER

PORT = 8080
SO_ZEROCOPY, MSG_ZEROCOPY, SIOCATMARK = 60, 0x4000000, 0x8905
PLACES = {"plain": "server", "direct": "near", "native": "near", "across": "server"}
Seen = list[Any]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Nodes]]:
    """By name; `across` is the other node of `direct`."""
    places = {"client": 0, "near": 0, "server": 1}
    with ExitStack() as stack:
        found = {}
        for name, engines in (("plain", (False, False)), ("direct", (True, True)), ("native", (True, False))):
            setting = "native" if name == "native" else "direct"
            made = Nodes(tmp_path_factory.mktemp(name), places, workers=2, same_node=setting, engines=engines)
            found[name] = stack.enter_context(made)
            made.publish()
        yield {**found, "across": found["direct"]}


class Ends:
    """A connection: the client's end, the server's."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server

    def both(self) -> tuple[tuple[socket.socket, socket.socket], ...]:
        """Each of them as the one that sends."""
        return (self.client, self.server), (self.server, self.client)


def together(*works: Callable[[], Any]) -> list[Any]:
    """All at once; what each returned."""
    results: list[Any] = [None] * len(works)

    def run(n: int) -> None:
        try:
            results[n] = works[n]()
        except (OSError, AssertionError) as error:
            results[n] = repr(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def exactly(made: socket.socket, count: int) -> bytes:
    """So many bytes, or fewer and the end."""
    got = b""
    while len(got) < count and (part := made.recv(count - len(got))):
        got += part
    return got


def how(work: Callable[[], Any]) -> Any:
    """What it returns, or the name of its error."""
    try:
        return work()
    except OSError as error:
        return type(error).__name__


# -- the programs -----------------------------------------------------------------------------------------------------


def sendfile(ends: Ends) -> Seen:
    """A file into the socket, as a web server does."""

    def send(made: socket.socket) -> int:
        with open("/proc/self/exe", "rb") as file:
            count = made.sendfile(file)
        made.shutdown(socket.SHUT_WR)
        return count

    seen = []
    for one, other in ends.both():
        seen += together(partial(send, one), partial(take, other))
    return seen


def spliced(made: socket.socket) -> tuple[int, str]:
    """Reads to the end through a pipe: count and hash."""
    digest, count = hashlib.sha256(), 0
    reader, writer = os.pipe()
    try:
        while moved := os.splice(made.fileno(), writer, 1 << 16):
            count += moved
            while moved:
                part = os.read(reader, moved)
                digest.update(part)
                moved -= len(part)
    finally:
        os.close(reader)
        os.close(writer)
    return count, digest.hexdigest()


def splice(ends: Ends) -> Seen:
    """From the socket into a pipe, as proxies do; then on from the pipe into the socket."""
    seen = []
    for one, other in ends.both():
        other.settimeout(None)  # a splice on a socket that does not block
        seen += together(partial(give, one, 3_000_000), partial(spliced, other))
    return seen


def splice_out(ends: Ends) -> Seen:
    """From a pipe into the socket."""

    def send(made: socket.socket) -> int:
        made.settimeout(None)
        reader, writer = os.pipe()
        sent = 0
        for n in range(0, len(PATTERN), 1 << 16):
            left = os.write(writer, PATTERN[n : n + (1 << 16)])
            while left:
                moved = os.splice(reader, made.fileno(), left)
                left -= moved
                sent += moved
        os.close(reader)
        os.close(writer)
        made.shutdown(socket.SHUT_WR)
        return sent

    seen = []
    for one, other in ends.both():
        seen += together(partial(send, one), partial(take, other))
    return seen


def zero_copy(ends: Ends) -> Seen:
    """The pages are the application's until the kernel says that it is done with each send."""

    def send(made: socket.socket) -> int:
        made.setsockopt(socket.SOL_SOCKET, SO_ZEROCOPY, 1)
        calls = 0
        for n in range(0, len(PATTERN), 1 << 16):
            part = memoryview(PATTERN)[n : n + (1 << 16)]
            while part:
                part = part[made.send(part, MSG_ZEROCOPY) :]
                calls += 1
        made.shutdown(socket.SHUT_WR)
        done = 0
        waiting = select.poll()
        waiting.register(made.fileno(), 0)  # POLLERR: it cannot be asked not to
        while done < calls:
            assert waiting.poll(20_000), f"{done} of {calls}"
            _, extra, _, _ = made.recvmsg(1, 512, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)
            for _, _, data in extra:
                _, origin, low, high = struct.unpack_from("=IB3xII", data)
                assert origin == 5  # SO_EE_ORIGIN_ZEROCOPY
                done += high - low + 1
        return done - calls

    seen = []
    for one, other in ends.both():
        seen += together(partial(send, one), partial(take, other))
    return seen


def peek(ends: Ends) -> Seen:
    """What was looked at is still there; what is waiting can be asked."""
    seen: Seen = []
    for one, other in ends.both():
        other.settimeout(None)  # else MSG_WAITALL does not wait
        one.sendall(b"look")
        seen.append(other.recv(4, socket.MSG_PEEK | socket.MSG_WAITALL))
        one.sendall(b" again")
        seen.append(other.recv(10, socket.MSG_PEEK | socket.MSG_WAITALL))
        seen.append(fcntl.ioctl(other, termios.FIONREAD, bytes(4)))
        seen.append(other.recv(4))
        seen.append(other.recv(100, socket.MSG_PEEK))
        seen.append(exactly(other, 6))
        one.shutdown(socket.SHUT_WR)
        seen.append(other.recv(1, socket.MSG_PEEK))
        seen.append(other.recv(1))
    return seen


def half_close(ends: Ends) -> Seen:
    """The client has said all and is answered; and the other way round."""
    ends.client.sendall(b"question")
    ends.client.shutdown(socket.SHUT_WR)
    seen: Seen = [exactly(ends.server, 100)]
    seen += together(lambda: give(ends.server, 2_000_000), lambda: take(ends.client))
    return seen


def half_close_of_the_server(ends: Ends) -> Seen:
    ends.server.shutdown(socket.SHUT_WR)
    seen: Seen = [exactly(ends.client, 100)]
    seen += together(lambda: give(ends.client, 2_000_000), lambda: take(ends.server))
    return seen


def both_at_once(ends: Ends) -> Seen:
    """Much in both directions."""
    size = 16 << 20
    seen = together(
        lambda: give(ends.client, size),
        lambda: give(ends.server, size),
        lambda: take(ends.server),
        lambda: take(ends.client),
    )
    assert seen[2:] == [taken(size)] * 2
    return seen


def reset(ends: Ends) -> Seen:
    """SO_LINGER 0: the other side hears of it, whether it reads or writes."""
    ends.client.sendall(b"all there")
    seen: Seen = [exactly(ends.server, 9)]
    ends.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_LINGER)
    ends.client.close()
    seen.append(how(lambda: ends.server.recv(1)))
    return [*seen, how(lambda: ends.server.send(b"x"))]


def reset_of_the_server(ends: Ends) -> Seen:
    return reset(Ends(ends.server, ends.client))


def unread(ends: Ends) -> Seen:
    """Closed with bytes that nobody read: a reset, too."""
    ends.client.sendall(b"nobody reads this")
    ends.server.recv(1, socket.MSG_PEEK)
    ends.server.close()
    return [how(lambda: ends.client.recv(1))]


def options(ends: Ends) -> Seen:
    """What is set stays; corked words come when they are let go."""
    seen: Seen = []
    for one, other in ends.both():
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        for n in range(10):
            one.sendall(bytes([n]), socket.MSG_MORE)
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
        other.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 10)
        assert select.select([other], [], [], 20)[0]
        seen.append(other.recv(100))
        seen.append(one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
    return seen


def urgent(ends: Ends, inline: bool) -> Seen:
    """Words around an urgent byte."""
    seen: Seen = []
    for one, other in ends.both():
        other.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, inline)
        one.sendall(b"before")
        one.send(b"!", socket.MSG_OOB)
        one.sendall(b"after")
        one.shutdown(socket.SHUT_WR)
        arrived = select.poll()
        arrived.register(other, select.POLLRDHUP)
        assert arrived.poll(20_000)
        seen.append(bool(select.select([], [], [other], 0)[2]))
        if not inline:
            seen.append(how(partial(other.recv, 1, socket.MSG_OOB | socket.MSG_DONTWAIT)))
        words, mark = b"", -1
        while True:
            if mark < 0 and fcntl.ioctl(other, SIOCATMARK, bytes(4)) != bytes(4):
                mark = len(words)
            part = other.recv(100)
            if not part:
                break
            words += part
        seen += [words, mark]
    return seen


SAME = [
    sendfile, splice, splice_out, zero_copy, peek, half_close, half_close_of_the_server, both_at_once, reset,
    reset_of_the_server, unread, options,
]  # fmt: skip


def played(worlds: dict[str, Nodes], place: str, family: int, program: Callable[[Ends], Seen]) -> Seen:
    """What a program sees in a world; that the connection went the way the world says is part of it."""
    nodes = worlds[place]
    client, server = nodes["client"], nodes[PLACES[place]]
    if place == "native":
        nodes.allow(client, server, PORT)
    with listen(server.path, server.address(family), PORT) as listener:
        with connect(client.path, server.address(family), PORT) as asks:
            answers, peer = listener.accept()
            with answers:
                answers.settimeout(20)
                assert peer[0] == client.address(family)
                if place != "plain":
                    engine = nodes.clients[0]
                    assert engine is not None
                    ways = {"direct": "local", "native": "native", "across": "HBONE"}
                    port = f":{asks.getsockname()[1]}"  # one of before may be on its way out
                    shown = [each for each in engine.dump("connections") if each["src"].endswith(port)]
                    assert [each["protocol"] for each in shown] == [ways[place]]
                return program(Ends(asks, answers))


@pytest.mark.parametrize("place", ["direct", "native", "across"])
@pytest.mark.parametrize("program", SAME)
def test_as_without_the_mesh(
    worlds: dict[str, Nodes], program: Callable[[Ends], Seen], place: str, family: int
) -> None:
    expected = played(worlds, "plain", family, program)
    assert played(worlds, place, family, program) == expected


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("place", ["direct", "native", "across"])
def test_urgent_data(worlds: dict[str, Nodes], place: str, inline: bool, family: int) -> None:
    """Natively as without the mesh. Through the engine the byte keeps its place and is not urgent (decision 0012)."""

    def program(ends: Ends) -> Seen:
        return urgent(ends, inline)

    expected = played(worlds, "plain", family, program)
    assert expected == ([True, b"before!after", 6] if inline else [True, b"!", b"beforeafter", 6]) * 2
    if place != "native":
        expected = ([False, b"before!after", -1] if inline else [False, "OSError", b"before!after", -1]) * 2
    assert played(worlds, place, family, program) == expected


def test_urgent_bytes_in_a_long_stream(worlds: dict[str, Nodes], family: int) -> None:
    """The reader that stops at each mark does not stop for good, and loses nothing."""

    def program(ends: Ends) -> Seen:
        seen: Seen = []
        for one, other in ends.both():

            def send(one: socket.socket = one) -> None:
                for n in range(200):
                    one.sendall(PATTERN[: 1 + 37 * n])
                    one.send(b"!", socket.MSG_OOB)
                one.shutdown(socket.SHUT_WR)

            other.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
            seen += together(send, partial(take, other))
        return seen

    expected = played(worlds, "plain", family, program)
    for place in ("direct", "native", "across"):
        assert played(worlds, place, family, program) == expected
