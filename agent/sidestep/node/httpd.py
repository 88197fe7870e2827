"""A small HTTP/1.1 server for the agent's own pages: GET, one answer per connection, strict limits.

A library would cost the agent 15 MB of memory for four pages. Head at most 8 KiB within 2 s, no body, 64 connections
at once; everything else is answered with a status and closed.
"""

import asyncio
import errno
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import parse_qsl

from sidestep import log

HEAD_BYTES = 8192
HEAD_S = 2.0
ANSWER_S = 10.0
WRITE_S = 10.0
CONNECTIONS = 64
PARAMETERS = 16


@dataclass(frozen=True, slots=True)
class Request:
    """A request's head. `path` without the query; header names in lower case; of a parameter that is given twice the
    last counts.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    query: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Response:
    """What is sent back."""

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: HTTPStatus = HTTPStatus.OK


Handler = Callable[[Request], Awaitable[Response]]


def refuse(status: HTTPStatus) -> Response:
    """An answer that only says why not."""
    return Response(f"{status.phrase}\n".encode(), status=status)


def bind(host: str, port: int) -> socket.socket:
    """A listening TCP socket; "" means every address of both families. Raises OSError (EADDRINUSE: name the port)."""
    if host:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=64)
    try:
        return socket.create_server(("::", port), family=socket.AF_INET6, backlog=64, dualstack_ipv6=True)
    except OSError as err:
        if err.errno == errno.EADDRINUSE:
            raise
        return socket.create_server(("0.0.0.0", port), backlog=64)


async def serve(listener: socket.socket, handler: Handler) -> None:
    """Serves until cancelled; owns the listener."""
    slots = asyncio.Semaphore(CONNECTIONS)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if slots.locked():
                return
            async with slots:
                await _one(reader, writer, handler)
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    start = asyncio.start_unix_server if listener.family == socket.AF_UNIX else asyncio.start_server
    server = await start(connected, sock=listener, limit=HEAD_BYTES)
    async with server:
        await server.serve_forever()


async def _one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handler: Handler) -> None:
    try:
        async with asyncio.timeout(HEAD_S):
            head = await reader.readuntil(b"\r\n\r\n")
        request = _parse(head)
    except asyncio.LimitOverrunError:
        response = refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
    except ValueError:
        response = refuse(HTTPStatus.BAD_REQUEST)
    else:
        if request.method not in ("GET", "HEAD"):
            response = refuse(HTTPStatus.METHOD_NOT_ALLOWED)
        else:
            try:
                async with asyncio.timeout(ANSWER_S):
                    response = await handler(request)
            except Exception as err:
                log.event("http_failed", path=request.path, error=f"{type(err).__name__}: {err}")
                response = refuse(HTTPStatus.INTERNAL_SERVER_ERROR)
        if request.method == "HEAD":
            response = Response(b"", response.content_type, response.status)
    writer.write(
        (
            f"HTTP/1.1 {response.status.value} {response.status.phrase}\r\n"
            f"content-type: {response.content_type}\r\n"
            f"content-length: {len(response.body)}\r\nconnection: close\r\n\r\n"
        ).encode()
        + response.body
    )
    async with asyncio.timeout(WRITE_S):
        await writer.drain()


def _parse(head: bytes) -> Request:
    """Reads a request's head. Raises ValueError."""
    lines = head.decode("latin-1").split("\r\n")
    method, target, version = lines[0].split(" ")
    if not version.startswith("HTTP/1.") or not target.startswith("/"):
        raise ValueError("not HTTP/1.1")
    headers = {}
    for line in lines[1:]:
        if line:
            name, colon, value = line.partition(":")
            if not colon:
                raise ValueError("a header without a colon")
            headers[name.strip().lower()] = value.strip()
    path, _, query = target.partition("?")
    parameters = dict(parse_qsl(query, keep_blank_values=True, max_num_fields=PARAMETERS))
    return Request(method, path, headers, parameters)
