"""A list that stays current: list, watch, list again when the watch cannot go on.

A `Reflector` follows one collection and keeps what `keep` makes of each object (a projection: the API's own objects
are large). Callbacks run in the loop's thread, in the order of the API's events, and must not block: they note what
changed and return.
"""

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from sidestep.kube.client import KubeClient, KubeError, Object

ABSENT_S = 2.0
BACKOFF_S = (0.05, 10.0)  # first and longest pause between attempts; each doubles, with jitter

K = TypeVar("K")


def key_of(obj: Object) -> str:
    """NAMESPACE/NAME, or NAME of an object without a namespace."""
    meta = obj["metadata"]
    return f"{meta['namespace']}/{meta['name']}" if meta.get("namespace") else str(meta["name"])


class Reflector(Generic[K]):
    """Follows one collection. `items` is what is known now, by `key_of`.

    `on_change(key, old, new)` is called with None for what was or is not there; `synced` is set after the first
    complete list. `failed` holds the last error while the API cannot be asked, else None. `optional`: an API that does
    not have this kind (404 for ABSENT_S: its definition is not installed) has no objects of it, and is asked again.
    Objects that were there stay: the API deletes them one by one before a kind goes, and answers 404 while it starts.
    """

    def __init__(
        self,
        client: KubeClient,
        path: str,
        keep: Callable[[Object], K],
        on_change: Callable[[str, K | None, K | None], None],
        *,
        label_selector: str = "",
        field_selector: str = "",
        optional: bool = False,
    ) -> None:
        self._client = client
        self._optional = optional
        self._absent_s = 0.0  # when the kind was first not there
        self._path = path
        self._keep = keep
        self._on_change = on_change
        self._selectors = {"label_selector": label_selector, "field_selector": field_selector}
        self._version = ""
        self.items: dict[str, K] = {}
        self.synced = asyncio.Event()
        self.failed: KubeError | None = None

    async def run(self) -> None:
        """Follows until it is cancelled; an API that cannot be reached is tried again and again."""
        pause = BACKOFF_S[0]
        while True:
            heard = False
            try:
                if not self._version:
                    await self._list()
                async for kind, obj in self._client.watch(
                    self._path, resource_version=self._version, **self._selectors
                ):
                    self._take(kind, obj)
                    self.failed = None
                    heard = True
            except KubeError as error:
                if error.status == 410:
                    self._version = ""
                elif error.status == 404 and self._optional:
                    self._version = ""
                    self._absent(error)
                else:
                    self.failed = error
            if heard:
                pause = BACKOFF_S[0]
                if self.failed is None:
                    continue
            await asyncio.sleep(pause * random.uniform(0.8, 1.2))
            pause = min(pause * 2, BACKOFF_S[1])

    async def _list(self) -> None:
        answer = await self._client.list(self._path, **self._selectors)
        found: dict[str, Any] = {}
        for obj in answer.get("items") or ():
            found[key_of(obj)] = self._keep(obj)
        self._replace(found)
        self._absent_s = 0.0
        self._version = str(answer["metadata"].get("resourceVersion") or "0")

    def _absent(self, error: KubeError) -> None:
        now = time.monotonic()
        self._absent_s = self._absent_s or now
        if self.items or now - self._absent_s < ABSENT_S:
            self.failed = error
        else:
            self._replace({})

    def _replace(self, found: dict[str, Any]) -> None:
        """Takes a complete picture."""
        for key in [key for key in self.items if key not in found]:
            self._on_change(key, self.items.pop(key), None)
        for key, new in found.items():
            self._put(key, new)
        self.failed = None
        self.synced.set()

    def _take(self, kind: str, obj: Object) -> None:
        version = str(obj["metadata"].get("resourceVersion") or self._version)
        if kind in ("ADDED", "MODIFIED"):
            self._put(key_of(obj), self._keep(obj))
        elif kind == "DELETED":
            old = self.items.pop(key_of(obj), None)
            if old is not None:
                self._on_change(key_of(obj), old, None)
        self._version = version

    def _put(self, key: str, new: K) -> None:
        old = self.items.get(key)
        self.items[key] = new
        if old != new:
            self._on_change(key, old, new)
