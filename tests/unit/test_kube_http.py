"""HTTP/1.1 as a server may speak it and as it must not: framing, kept connections, what is asked again and what not."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from sidestep.kube.http import Http, HttpError

GUARD_S = 20.0


class Server:
    """Says what it is told to, one text a request; None: it closes instead. `heard` is every request's head."""

    def __init__(self, *says: bytes | None) -> None:
        self._says = list(says)
        self.heard: list[bytes] = []
        self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while self._says:
                head = await reader.readuntil(b"\r\n\r\n")
                length = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
                await reader.readexactly(int(length[0].split(b":")[1]) if length else 0)
                self.heard.append(head)
                text = self._says.pop(0)
                if text is None:
                    break
                writer.write(text)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.transport.abort()


def no_tls() -> ssl.SSLContext:
    raise AssertionError("nobody asked for TLS")


@asynccontextmanager
async def speaking(*says: bytes | None) -> AsyncIterator[tuple[Server, Http]]:
    server = Server(*says)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    http = Http(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/base/", no_tls)
    try:
        async with asyncio.timeout(GUARD_S):
            yield server, http
    finally:
        await http.close()
        listener.close()


async def ask(http: Http, method: str = "GET", body: bytes | None = None) -> tuple[int, bytes]:
    async with http.ask(method, "/x?y=z", {"Accept": "application/json"}, body) as answer:
        return answer.status, await answer.read()


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@pytest.mark.parametrize(
    ("says", "status", "body"),
    [
        (OK, 200, b"ok"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, 200, b"ok"),
        (b"HTTP/1.1 201\r\ncontent-length:0\r\n\r\n", 201, b""),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n", 200, b"abcde"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n1\r\na\r\n0\r\nTrailer: x\r\n\r\n", 200, b"a"),
    ],
)
def test_answers_and_the_connection_goes_on(says: bytes, status: int, body: bytes) -> None:
    async def whole() -> None:
        async with speaking(says, OK) as (server, http):
            assert await ask(http) == (status, body)
            assert await ask(http, "POST", b"{}") == (200, b"ok")
            assert server.connections == 1
            assert server.heard[0].startswith(b"GET /base/x?y=z HTTP/1.1\r\nHost: 127.0.0.1:")
            assert b"Content-Length: 2\r\n" in server.heard[1] and b"Content-Length" not in server.heard[0]

    asyncio.run(whole())


@pytest.mark.parametrize(
    "says",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    ],
)
def test_a_connection_that_ends_is_not_used_again(says: bytes) -> None:
    async def whole() -> None:
        async with speaking(says, OK) as (server, http):
            assert await ask(http) == (200, b"ok")
            assert await ask(http) == (200, b"ok")
            assert server.connections == 2

    asyncio.run(whole())


def test_a_body_that_ends_with_the_connection() -> None:
    async def whole() -> None:
        async with speaking(b"HTTP/1.1 200 OK\r\n\r\nall of it") as (server, http):
            async with http.ask("GET", "/", {}, None) as answer:
                first = await anext(answer.pieces())
            assert first == b"all of it" and server.connections == 1

    asyncio.run(whole())


@pytest.mark.parametrize(
    "says",
    [
        b"SSH-2.0-x\r\n\r\n",
        b"HTTP/1.1 20x OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"".join(b"a%d: b\r\n" % i for i in range(200)) + b"\r\n",
        b"HTTP/1.1 200 OK\r\na: " + b"x" * 200_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nConnection: close\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0x3\r\nabc\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nab",
        b"HTTP/1.1 200 OK\r\nContent-Le",
    ],
)
def test_what_is_no_answer_is_an_error(says: bytes) -> None:
    async def whole() -> None:
        async with speaking(says) as (server, http):
            with pytest.raises(OSError):
                await ask(http)
            assert len(server.heard) == 1, "a new connection is asked once"

    asyncio.run(whole())


@pytest.mark.parametrize(
    ("method", "again"), [("GET", True), ("PUT", True), ("DELETE", True), ("POST", False), ("PATCH", False)]
)
def test_a_kept_connection_that_was_closed_meanwhile(method: str, again: bool) -> None:
    async def whole() -> None:
        async with speaking(OK, None, OK) as (server, http):
            await ask(http)
            if again:
                assert await ask(http, method, b"{}") == (200, b"ok")
            else:
                with pytest.raises(OSError):
                    await ask(http, method, b"{}")
            assert server.connections == (2 if again else 1)

    asyncio.run(whole())


def test_a_new_connection_that_is_closed_is_not_asked_again() -> None:
    async def whole() -> None:
        async with speaking(None, OK) as (server, http):
            with pytest.raises(OSError):
                await ask(http)
            assert server.connections == 1

    asyncio.run(whole())


@pytest.mark.parametrize("spoil", [lambda: {"A": "b\r\nC: d"}, lambda: {"A\n": "b"}])
def test_nobody_slips_a_header_in(spoil: Callable[[], dict[str, str]]) -> None:
    async def whole() -> None:
        async with speaking(OK) as (server, http):
            with pytest.raises(HttpError, match="control character"):
                async with http.ask("GET", "/", spoil(), None):
                    pass
            assert server.connections == 0

    asyncio.run(whole())


def test_close_ends_what_is_under_way() -> None:
    async def whole() -> None:
        async with speaking(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n", OK) as (_, http):
            async with http.ask("GET", "/", {}, None) as answer:
                pieces = answer.pieces()
                assert await anext(pieces) == b"a"
                await http.close()
                with pytest.raises(OSError):
                    await anext(pieces)

    asyncio.run(whole())
