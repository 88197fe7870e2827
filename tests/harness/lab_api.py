"""The lab's API in this process, on a free port of 127.0.0.1, for tests that speak HTTP to it."""

import asyncio
import io
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import web

from sidestep.lab import controllers
from sidestep.lab.api.access import Access
from sidestep.lab.api.addresses import Ranges
from sidestep.lab.api.registry import Registry
from sidestep.lab.api.resources import NAMESPACE
from sidestep.lab.api.server import Server
from sidestep.lab.api.store import Store
from sidestep.lab.api.tokens import TokenKey

ADMIN = "the-administrators-token"
GUARD_S = 30.0
PODS = "/api/v1/namespaces/default/pods"


class Api:
    """A running API and a client of it."""

    def __init__(self, registry: Registry, session: aiohttp.ClientSession, url: str) -> None:
        self.registry = registry
        self.session = session
        self.url = url
        self.now = 0.0

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        token: str = ADMIN,
        content_type: str = "application/json",
        **more: Any,
    ) -> tuple[int, Any]:
        """Status and JSON of one request."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        if body is not None:
            headers["Content-Type"] = content_type
            more["data"] = body if isinstance(body, (bytes, io.BytesIO)) else json.dumps(body)
        async with self.session.request(
            method, self.url + path, headers=headers | more.pop("headers", {}), **more
        ) as answer:
            return answer.status, json.loads(await answer.read())

    async def make(self, path: str, body: Any) -> Any:
        """Creates an object, which must succeed."""
        code, answer = await self.ask("POST", path, body)
        assert code == 201, answer
        return answer

    async def until(self, path: str, good: Callable[[Any], bool]) -> Any:
        """Asks until the answer is good."""
        async with asyncio.timeout(GUARD_S):
            while True:
                _, answer = await self.ask("GET", path)
                if good(answer):
                    return answer
                await asyncio.sleep(0.01)


@asynccontextmanager
async def running(*, backlog: int = 2048, history: int = 8192, control: bool = False) -> AsyncIterator[Api]:
    """An API on a free port of 127.0.0.1, with the controllers if asked for."""
    store = Store(history, backlog)
    registry = Registry(store, Ranges.parse("10.211.0.0/24", "fd5d:e57e:9:200::/112"), "a root")
    shift = [0.0]
    clock = lambda: time.time() + shift[0]  # noqa: E731
    access = Access(store, TokenKey(), ADMIN, ("default/agent",), clock)
    registry.create(NAMESPACE, "", {"metadata": {"name": "default"}})
    runner = Server(registry, access, clock).runner()
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        async with asyncio.timeout(2 * GUARD_S), asyncio.TaskGroup() as group, aiohttp.ClientSession() as session:
            work = group.create_task(controllers.run(registry)) if control else None
            api = Api(registry, session, f"http://127.0.0.1:{runner.addresses[0][1]}")
            yield api
            if work is not None:
                work.cancel()
    finally:
        await runner.cleanup()


def with_api(**options: Any) -> Callable[[Callable[[Api], Awaitable[None]]], Callable[[], None]]:
    """Runs an async test against an API of its own."""

    def wrap(test: Callable[[Api], Awaitable[None]]) -> Callable[[], None]:
        def run() -> None:
            async def inner() -> None:
                async with running(**options) as api:
                    await test(api)

            asyncio.run(inner())

        run.__name__ = getattr(test, "__name__", "test")
        return run

    return wrap


def pod(name: str = "p", **spec: Any) -> dict[str, Any]:
    """A pod's manifest."""
    return {"metadata": {"name": name}, "spec": {"containers": [{"name": "c", "command": ["sleep"]}], **spec}}


def node(name: str) -> dict[str, Any]:
    """A node that is ready."""
    labels = {"kubernetes.io/hostname": name}
    return {
        "metadata": {"name": name, "labels": labels},
        "status": {"conditions": [{"type": "Ready", "status": "True"}]},
    }
