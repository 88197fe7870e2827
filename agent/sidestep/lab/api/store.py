"""Objects in memory, with the history that watches need.

Every write gets the next revision. The last `HISTORY` events are kept; a watch that wants to begin before them gets
410 and lists again. A watcher has a bounded backlog: one that does not keep up is cut off and told so, the others do
not notice. Everything happens in one event loop, no call here waits.

Stored objects are shared: whoever wants to change one makes a copy first.
"""

import asyncio
import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sidestep.lab.api import errors
from sidestep.lab.api.resources import Kind

Object = dict[str, Any]

HISTORY = 2048  # events, over all kinds
BACKLOG = 1024  # events that one watcher may be behind


class Stored:
    """One version of an object; `json` is made once, however many watchers want it."""

    def __init__(self, kind: Kind, obj: Object, revision: int) -> None:
        self.kind = kind
        self.obj = obj
        self.revision = revision

    @cached_property
    def json(self) -> bytes:
        """The object as JSON."""
        return json.dumps(self.obj, separators=(",", ":")).encode()

    def under(self, api_version: str) -> bytes:
        """As JSON, under one of the versions that the kind is served in."""
        if api_version == self.kind.api_version:
            return self.json
        return json.dumps({**self.obj, "apiVersion": api_version}, separators=(",", ":")).encode()

    @property
    def namespace(self) -> str:
        """Empty for what has none."""
        return str(self.obj["metadata"].get("namespace", ""))

    @property
    def name(self) -> str:
        """metadata.name."""
        return str(self.obj["metadata"]["name"])


@dataclass(frozen=True, slots=True)
class Event:
    """One change: `new` is None when the object went, `old` is None when it is new. The object of a deletion carries
    the revision of the deletion."""

    revision: int
    kind: Kind
    old: Stored | None
    new: Stored | None


class Watcher:
    """The backlog of one watch. `next()` waits for an event; None means the watcher was too slow or the store closed
    (`cut` tells which)."""

    def __init__(self, kind: Kind, backlog: int) -> None:
        self.kind = kind
        self.cut = False
        self.closed = False
        self._limit = backlog
        self._events: deque[Event] = deque()
        self._wake = asyncio.Event()

    def put(self, event: Event) -> None:
        """Hands in an event; never waits."""
        if self.cut or self.closed:
            return
        if len(self._events) >= self._limit:
            self.cut = True
            self._events.clear()
        else:
            self._events.append(event)
        self._wake.set()

    def close(self) -> None:
        """No more events will come."""
        self.closed = True
        self._wake.set()

    async def next(self) -> Event | None:
        """The next event."""
        while not self._events:
            if self.cut or self.closed:
                return None
            self._wake.clear()
            await self._wake.wait()
        return self._events.popleft()

    def pop(self) -> Event | None:
        """The next event if there is one already."""
        return self._events.popleft() if self._events else None


class Store:
    """All objects. Raises `ApiError` 404, 409 and 410."""

    def __init__(self, history: int = HISTORY, backlog: int = BACKLOG) -> None:
        self.revision = 1
        self._backlog = backlog
        self._objects: dict[Kind, dict[tuple[str, str], Stored]] = {}
        self._history: deque[Event] = deque(maxlen=history)
        self._forgotten = 1  # events up to this revision are no longer known
        self._watchers: set[Watcher] = set()
        self._listeners: list[Callable[[Event], None]] = []

    def get(self, kind: Kind, namespace: str, name: str) -> Stored | None:
        """An object, or None."""
        return self._objects.get(kind, {}).get((namespace, name))

    def need(self, kind: Kind, namespace: str, name: str) -> Stored:
        """An object, or 404."""
        stored = self.get(kind, namespace, name)
        if stored is None:
            raise errors.not_found(kind.plural, kind.group, name)
        return stored

    def list(self, kind: Kind, namespace: str = "") -> list[Stored]:
        """The objects of a kind in one namespace, or (empty) in all, by namespace and name."""
        found = self._objects.get(kind, {})
        keys = sorted(key for key in found if not namespace or key[0] == namespace)
        return [found[key] for key in keys]

    def create(self, kind: Kind, obj: Object) -> Stored:
        """Keeps a new object, which must not be changed afterwards; gives it its revision."""
        key = _key(obj)
        objects = self._objects.setdefault(kind, {})
        if key in objects:
            raise errors.exists(kind.plural, kind.group, key[1])
        stored = self._stamp(kind, obj)
        objects[key] = stored
        self._publish(Event(stored.revision, kind, None, stored))
        return stored

    def replace(self, kind: Kind, obj: Object) -> Stored:
        """Keeps a new version of an object that exists."""
        key = _key(obj)
        old = self.need(kind, *key)
        stored = self._stamp(kind, obj)
        self._objects[kind][key] = stored
        self._publish(Event(stored.revision, kind, old, stored))
        return stored

    def remove(self, kind: Kind, namespace: str, name: str) -> Stored:
        """Forgets an object; returns its last version, with the revision of the deletion."""
        old = self.need(kind, namespace, name)
        del self._objects[kind][(namespace, name)]
        last = self._stamp(kind, {**old.obj, "metadata": dict(old.obj["metadata"])})
        self._publish(Event(last.revision, kind, last, None))
        return last

    def watch(self, kind: Kind, since: int) -> Watcher:
        """A watcher that gets every event of a kind after the revision `since`; 410 when they are no longer all known.
        The caller gives it back with `unwatch`."""
        if since < self._forgotten or since > self.revision:  # from the future: of a process before this one
            raise errors.gone(since, self._forgotten)
        watcher = Watcher(kind, self._backlog)
        missed = [event for event in self._history if event.revision > since and event.kind is kind]
        if len(missed) > self._backlog:
            raise errors.gone(since, missed[-self._backlog].revision)
        for event in missed:
            watcher.put(event)
        self._watchers.add(watcher)
        return watcher

    def unwatch(self, watcher: Watcher) -> None:
        """Ends a watch."""
        self._watchers.discard(watcher)

    @property
    def watching(self) -> int:
        """How many watches are open."""
        return len(self._watchers)

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Calls `listener` at every event, inside the write; it must only take note."""
        self._listeners.append(listener)

    def close(self) -> None:
        """Ends every watch."""
        for watcher in self._watchers:
            watcher.close()

    def _stamp(self, kind: Kind, obj: Object) -> Stored:
        self.revision += 1
        obj["metadata"]["resourceVersion"] = str(self.revision)
        return Stored(kind, obj, self.revision)

    def _publish(self, event: Event) -> None:
        if self._history.maxlen is not None and len(self._history) == self._history.maxlen:
            self._forgotten = self._history[0].revision
        self._history.append(event)
        for watcher in self._watchers:
            if watcher.kind is event.kind:
                watcher.put(event)
        for listener in self._listeners:
            listener(event)


def _key(obj: Object) -> tuple[str, str]:
    metadata = obj["metadata"]
    return str(metadata.get("namespace", "")), str(metadata["name"])
