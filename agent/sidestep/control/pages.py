"""Port 15014: `/metrics` for Prometheus, `/status` for people and tests, `/ready` for the kubelet. Shows no key."""

import socket
from collections.abc import Callable
from typing import Any

from aiohttp import web

from sidestep.control.metrics import Metrics


async def serve(
    listener: socket.socket, metrics: Metrics, status: Callable[[], dict[str, Any]], ready: Callable[[], str]
) -> web.AppRunner:
    """Starts; the answer's `cleanup` ends it. `ready` answers what is missing, "" when nothing is."""

    async def metrics_page(_request: web.Request) -> web.Response:
        return web.Response(body=metrics.page(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def status_page(_request: web.Request) -> web.Response:
        return web.json_response(status())

    async def ready_page(_request: web.Request) -> web.Response:
        missing = ready()
        return web.Response(text=(missing or "ready") + "\n", status=503 if missing else 200)

    app = web.Application(client_max_size=4096)
    app.router.add_get("/metrics", metrics_page)
    app.router.add_get("/status", status_page)
    app.router.add_get("/ready", ready_page)
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    return runner
