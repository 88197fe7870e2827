"""HTTP/1.1 towards one server, as much of it as the Kubernetes API needs: JSON bodies, bodies that go on for minutes.

A connection carries one request at a time and is kept for the next one when the answer was read to its end; at most
IDLE_MAX wait for work. One that waited may be closed by the server at that very moment: a request that can be made
twice (GET, PUT, DELETE) is then made again on a new connection. A body has a length, or comes in chunks, or ends with
the connection; there is no compression, for none is asked for. Whoever asks sets the deadline. Every error is an
OSError.

aiohttp does all that too, for 9 MiB of each process.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

IDLE_MAX = 8
HEADERS_MAX = 128
PIECE = 64 * 1024
AGAIN = frozenset({"GET", "PUT", "DELETE"})


class HttpError(OSError):
    """The server does not speak HTTP/1.1, or stopped in the middle of it."""


@dataclass(slots=True)
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    used: bool = False  # it had been kept for this request


class Answer:
    """What the server answers. `pieces` is read at most once."""

    def __init__(self, connection: _Connection, status: int, headers: Mapping[str, str]) -> None:
        self._connection = connection
        self.status = status
        self.headers = headers
        self.ended = False  # the body was read to its end, and another request may follow

    def option(self, level: int, name: int, value: int) -> None:
        """Sets an option of the connection's socket."""
        sock = self._connection.writer.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(level, name, value)

    async def read(self) -> bytes:
        """All of the body."""
        return b"".join([piece async for piece in self.pieces()])

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes."""
        reader = self._connection.reader
        keep = "close" not in self.headers.get("connection", "").lower()
        if self.status in (204, 304) or self.status < 200:
            pass
        elif "chunked" in self.headers.get("transfer-encoding", "").lower():
            while size := _size(await _line(reader)):
                async for piece in _exactly(reader, size):
                    yield piece
                if await _line(reader):
                    raise HttpError("a chunk of another size")
            while await _line(reader):
                pass  # trailers
        elif "content-length" in self.headers:
            async for piece in _exactly(reader, _length(self.headers["content-length"])):
                yield piece
        else:
            keep = False
            while piece := await reader.read(PIECE):
                yield piece
        self.ended = keep


class Http:
    """One server. `tls`: makes the context for https, when it is first needed."""

    def __init__(self, url: str, tls: Callable[[], ssl.SSLContext]) -> None:
        parts = urlsplit(url)
        self._host, self._secure = parts.hostname or "", parts.scheme == "https"
        self._port = parts.port or (443 if self._secure else 80)
        self._authority, self._path = parts.netloc, parts.path.rstrip("/")
        self._tls = tls
        self._context: ssl.SSLContext | None = None
        self._idle: list[_Connection] = []
        self._open: set[asyncio.StreamWriter] = set()

    @asynccontextmanager
    async def ask(
        self, method: str, target: str, headers: Mapping[str, str], body: bytes | None
    ) -> AsyncIterator[Answer]:
        """A request and the head of its answer. `target`: path and query, encoded. Raises OSError."""
        lines = [f"{method} {self._path}{target} HTTP/1.1", f"Host: {self._authority}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if body is not None or method in ("POST", "PUT", "PATCH"):
            lines.append(f"Content-Length: {len(body or b'')}")
        if any(not line.isprintable() for line in lines):
            raise HttpError("a control character in a request")
        message = "\r\n".join([*lines, "", ""]).encode() + (body or b"")
        connection, answer = await self._exchange(method, message)
        try:
            yield answer
        finally:
            if answer.ended and len(self._idle) < IDLE_MAX and connection.writer in self._open:
                connection.used = True
                self._idle.append(connection)
            else:
                self._drop(connection)

    async def close(self) -> None:
        """Ends every connection, those that are in use too."""
        for writer in self._open:
            writer.transport.abort()
        self._open.clear()
        self._idle.clear()
        await asyncio.sleep(0)  # the transports close their sockets in the loop's next turn

    async def _exchange(self, method: str, message: bytes) -> tuple[_Connection, Answer]:
        while True:
            connection = await self._connection()
            try:
                connection.writer.write(message)
                await connection.writer.drain()
                return connection, await _head(connection)
            except OSError:
                self._drop(connection)
                if not connection.used or method not in AGAIN:
                    raise
            except BaseException:
                self._drop(connection)
                raise

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.reader.at_eof() and not connection.writer.is_closing():
                return connection
            self._drop(connection)
        if self._secure and self._context is None:
            self._context = self._tls()
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._context, limit=PIECE)
        self._open.add(writer)
        return _Connection(reader, writer)

    def _drop(self, connection: _Connection) -> None:
        self._open.discard(connection.writer)
        connection.writer.transport.abort()


async def _head(connection: _Connection) -> Answer:
    """Status and headers; an answer that only announces another one is passed over."""
    while True:
        first = await _line(connection.reader)
        words = first.split(" ", 2)
        if len(words) < 2 or not words[0].startswith("HTTP/1.") or not (words[1].isdigit() and len(words[1]) == 3):
            raise HttpError("an answer that is not HTTP/1.1")
        headers: dict[str, str] = {}
        while line := await _line(connection.reader):
            name, colon, value = line.partition(":")
            if not colon or len(headers) == HEADERS_MAX:
                raise HttpError("a header that is none, or too many")
            headers[name.strip().lower()] = value.strip()
        if words[0] == "HTTP/1.0":
            headers.setdefault("connection", "close")
        if int(words[1]) >= 200:
            return Answer(connection, int(words[1]), headers)


async def _line(reader: asyncio.StreamReader) -> str:
    try:
        line = await reader.readuntil(b"\n")
    except asyncio.IncompleteReadError:
        raise HttpError("the server closed the connection") from None
    except asyncio.LimitOverrunError:
        raise HttpError("a line that is too long") from None
    return line.rstrip(b"\r\n").decode("latin-1")


async def _exactly(reader: asyncio.StreamReader, size: int) -> AsyncIterator[bytes]:
    while size:
        piece = await reader.read(min(size, PIECE))
        if not piece:
            raise HttpError("the server closed the connection in the middle of an answer")
        size -= len(piece)
        yield piece


def _size(line: str) -> int:
    text = line.partition(";")[0].strip()
    if not text or len(text) > 8 or not set(text) <= set("0123456789abcdefABCDEF"):
        raise HttpError("a chunk without a size")
    return int(text, 16)


def _length(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise HttpError("a length that is no number")
    return int(text)
