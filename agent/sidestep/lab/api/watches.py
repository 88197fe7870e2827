"""One watch as a stream of JSON lines, bounded on both sides.

The store's backlog bounds how far a watcher may be behind; a peer that reads nothing for `STALL_S` loses its
connection. Either way only this watch ends, with a 410 where it can still be told, and the client lists again.
"""

import asyncio
import json
import time
from dataclasses import dataclass

from aiohttp import web

from sidestep.lab.api import tables
from sidestep.lab.api.errors import ApiError
from sidestep.lab.api.resources import Kind
from sidestep.lab.api.selectors import Predicate
from sidestep.lab.api.store import Event, Store, Stored, Watcher

STALL_S = 10.0  # a peer that takes nothing for so long is gone
BOOKMARK_S = 15.0
LONGEST_S = 3600.0
WATCHES = 512  # open at once
_BATCH = 64  # events per write


@dataclass(frozen=True, slots=True)
class Wish:
    """What a watch asks for. `since` None: everything there is first. `table`: rows instead of objects, with what
    each row carries (empty: objects)."""

    kind: Kind
    namespace: str
    match: Predicate
    since: int | None
    bookmarks: bool
    seconds: float
    api_version: str
    table: str = ""


class Stream:
    """Serves one watch."""

    def __init__(self, store: Store, wish: Wish) -> None:
        self._store = store
        self._wish = wish
        self._head = True  # the columns have not been sent

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Answers the request until its time is over, the peer goes or the store closes."""
        wish, store = self._wish, self._store
        first: list[bytes] = []
        since = wish.since
        if since is None:
            since = store.revision
            first = [
                self._line("ADDED", stored)
                for stored in store.list(wish.kind, wish.namespace)
                if wish.match(stored.obj)
            ]
        watcher: Watcher | None = None
        try:
            watcher = store.watch(wish.kind, since)
        except ApiError as error:
            first = [_error(error)]
        response = web.StreamResponse(headers={"Content-Type": "application/json", "Cache-Control": "no-cache"})
        try:
            await response.prepare(request)
            for start in range(0, len(first), _BATCH):
                await _write(response, b"".join(first[start : start + _BATCH]))
            if watcher is not None:
                await self._follow(response, watcher)
        except (ConnectionError, TimeoutError):
            if request.transport is not None:
                request.transport.abort()
        finally:
            if watcher is not None:
                store.unwatch(watcher)
        return response

    async def _follow(self, response: web.StreamResponse, watcher: Watcher) -> None:
        wish = self._wish
        end = time.monotonic() + min(wish.seconds, LONGEST_S)
        while (left := end - time.monotonic()) > 0:
            try:
                event = await asyncio.wait_for(watcher.next(), min(left, BOOKMARK_S))
            except TimeoutError:
                if left > BOOKMARK_S:
                    await self._bookmark(response)
                continue
            lines: list[bytes] = []
            while event is not None:
                if line := self._event(event):
                    lines.append(line)
                event = watcher.pop() if len(lines) < _BATCH else None
            if lines:
                await _write(response, b"".join(lines))
            elif watcher.cut:
                await _write(response, _error(ApiError(410, "this watch was too slow: list again")))
                return
            elif watcher.closed:
                return
        await self._bookmark(response)

    async def _bookmark(self, response: web.StreamResponse) -> None:
        """Tells the peer how far it has seen; also finds out whether it is still there."""
        if self._wish.bookmarks and not self._wish.table:
            kind = self._wish.kind
            obj = {
                "kind": kind.kind,
                "apiVersion": self._wish.api_version,
                "metadata": {"resourceVersion": str(self._store.revision), "creationTimestamp": None},
            }
            await _write(response, json.dumps({"type": "BOOKMARK", "object": obj}).encode() + b"\n")

    def _event(self, event: Event) -> bytes:
        """The line for an event; empty when it does not concern this watch. An object that begins to match is ADDED,
        one that ceases to is DELETED."""
        wish = self._wish
        before = event.old if event.old is not None and self._wants(event.old) else None
        after = event.new if event.new is not None and self._wants(event.new) else None
        if after is not None:
            return self._line("MODIFIED" if before is not None else "ADDED", after)
        if before is not None:
            last = before
            if event.new is not None:  # it is still there: its old version, at the revision of the change
                obj = {**before.obj, "metadata": {**before.obj["metadata"], "resourceVersion": str(event.revision)}}
                last = Stored(wish.kind, obj, event.revision)
            return self._line("DELETED", last)
        return b""

    def _wants(self, stored: Stored) -> bool:
        wish = self._wish
        return (not wish.namespace or stored.namespace == wish.namespace) and wish.match(stored.obj)

    def _line(self, kind: str, stored: Stored) -> bytes:
        wish = self._wish
        if not wish.table:
            return b'{"type":"%s","object":%s}\n' % (kind.encode(), stored.under(wish.api_version))
        revision = str(stored.revision)
        rows = tables.table(wish.kind, [stored.obj], time.time(), wish.table, revision, self._head)
        self._head = False
        return json.dumps({"type": kind, "object": rows}).encode() + b"\n"


async def _write(response: web.StreamResponse, data: bytes) -> None:
    await asyncio.wait_for(response.write(data), STALL_S)


def _error(error: ApiError) -> bytes:
    return json.dumps({"type": "ERROR", "object": error.status()}).encode() + b"\n"
