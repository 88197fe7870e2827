"""An API server that says what a test tells it to: for answers that a real one gives rarely, or only an old one.

Plain HTTP on 127.0.0.1. `answers` is asked, with method, path and body; what it does not know is 404. A list given to
`watches` is what the next watch of that path says, line by line; then the watch ends, or stays open with `HOLD`.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from sidestep.kube.client import KubeClient, KubeConfig

HOLD = "hold"
Answer = tuple[int, Any] | None


class Kubernetes:
    """The server. `asked` is every request: method, path with query."""

    def __init__(self) -> None:
        self.answers: Callable[[str, str, Any], Answer] = lambda method, path, body: None
        self.watches: dict[str, list[list[Any]]] = {}
        self.asked: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.port = 0

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.method, request.path_qs))
        self.headers.append(dict(request.headers))
        if request.query.get("watch") == "true":
            return await self._watch(request)
        text = await request.text()
        answer = self.answers(request.method, request.path_qs, json.loads(text) if text else None)
        status, body = answer if answer is not None else (404, refusal("NotFound", f"no {request.path}"))
        if isinstance(body, str):
            return web.Response(status=status, text=body)
        return web.json_response(body, status=status)

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        script = self.watches.get(request.path, [])
        if not script:
            await asyncio.Event().wait()
        lines = script.pop(0)
        if lines and isinstance(lines[0], int):
            return web.json_response(lines[1], status=lines[0])
        response = web.StreamResponse()
        await response.prepare(request)
        for line in lines:
            if line == HOLD:
                await asyncio.Event().wait()
            data = line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n"
            await response.write(data)
        return response

    def client(self, **config: Any) -> KubeClient:
        """A client of this server."""
        return KubeClient(KubeConfig(server=f"http://127.0.0.1:{self.port}", **config))


def refusal(reason: str, message: str) -> dict[str, str]:
    """A Status object."""
    return {"kind": "Status", "reason": reason, "message": message}


def event(kind: str, version: int, name: str = "", **more: Any) -> dict[str, Any]:
    """A line of a watch."""
    return {"type": kind, "object": {"metadata": {"name": name, "resourceVersion": str(version)}, **more}}


@asynccontextmanager
async def kubernetes() -> AsyncIterator[Kubernetes]:
    """The server, listening."""
    made = Kubernetes()
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", made._handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        made.port = runner.addresses[0][1]
        yield made
    finally:
        await runner.cleanup()
