"""Delta xDS, the server's side, as a state machine without I/O.

A *catalog* holds the records of one type. A *follower* is one client's view of a catalog: what it subscribed to, what
it holds, and what is due. `request` takes what the client says, `changed` what happened to the catalog, `next`
answers the push that is due now. At most one push per follower is unanswered; what changes meanwhile is noted by name
only, so a slow client costs one set of names and gets the last state of each record once.

Names: a record has one name and any number of aliases; a client may subscribe by either. A key that means nothing is
answered in `removed`, and remembered, in case it comes to mean something. The first request of a follower is always
answered, even with nothing: a client counts itself ready when it has acknowledged something of every type.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

WILDCARD = "*"
PUSH_BYTES = 64 << 20  # of bodies in one push, so that no message comes near the 200 MiB that clients take


@dataclass(frozen=True, slots=True)
class Entry:
    """One record. `body`: the serialized message; `version`: changes exactly when the body does."""

    name: str
    version: str
    body: bytes
    aliases: tuple[str, ...] = ()


class Catalog:
    """The records of one type, by name and by alias."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self._aliases: dict[str, set[str]] = {}

    def update(self, entries: Mapping[str, Entry | None]) -> frozenset[str]:
        """Takes new records; None removes. Returns the names whose content changed."""
        changed = set()
        for name, new in entries.items():
            old = self.entries.get(name)
            if old == new:
                continue
            for alias in old.aliases if old is not None else ():
                names = self._aliases[alias]
                names.discard(name)
                if not names:
                    del self._aliases[alias]
            if new is None:
                del self.entries[name]
            else:
                self.entries[name] = new
                for alias in new.aliases:
                    self._aliases.setdefault(alias, set()).add(name)
            changed.add(name)
        return frozenset(changed)

    def names(self, key: str) -> frozenset[str]:
        """The names that a key means: itself, or those that have it as an alias."""
        return frozenset([key]) if key in self.entries else frozenset(self._aliases.get(key, ()))


@dataclass(frozen=True, slots=True)
class Push:
    """One response."""

    nonce: str
    entries: tuple[Entry, ...]
    removed: tuple[str, ...]


class Follower:
    """One client's view of one catalog."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._started = False
        self._answer = False  # the next push is made even when it is empty
        self._wildcard = False
        self._keys: set[str] = set()
        self._held: dict[str, str] = {}
        self._due: set[str] = set()
        self._again: set[str] = set()  # due whatever version the client holds
        self._unknown: set[str] = set()  # keys to be answered with "there is none"
        self._serial = 0
        self.nonce = ""  # of the push that is not answered yet, "" without one
        self.acked = 0
        self.refused = 0
        self.reason = ""  # of the last refusal, as the client put it

    @property
    def held(self) -> int:
        """How many records the client holds, as far as we know."""
        return len(self._held)

    def request(
        self,
        subscribe: Iterable[str] = (),
        unsubscribe: Iterable[str] = (),
        versions: Mapping[str, str] | None = None,
        nonce: str = "",
        error: str | None = None,
    ) -> None:
        """What the client says: in its first request what it holds (`versions`) and wants, in others a push's nonce,
        with an error where it refused some of it, or changed wishes, or both.
        """
        subscribe, unsubscribe = set(subscribe), set(unsubscribe)
        if nonce and nonce == self.nonce:
            self.nonce = ""
            if error is None:
                self.acked += 1
            else:
                self.refused += 1
                self.reason = error[:4000]
        if not self._started:
            self._start(subscribe, unsubscribe, dict(versions or {}))
        if WILDCARD in subscribe and WILDCARD not in unsubscribe and not self._wildcard:
            self._wildcard = True
            self._due |= self._catalog.entries.keys() | self._held.keys()
        for key in sorted(subscribe - {WILDCARD} - unsubscribe):
            self._keys.add(key)
            names = self._catalog.names(key)
            self._due |= names
            self._again |= names
            if not names:
                self._unknown.add(key)
        if unsubscribe - {WILDCARD} or (self._wildcard and WILDCARD in unsubscribe):
            self._wildcard = self._wildcard and WILDCARD not in unsubscribe
            self._keys -= unsubscribe
            self._unknown -= unsubscribe
            self._forget()

    def _start(self, subscribe: set[str], unsubscribe: set[str], versions: dict[str, str]) -> None:
        """The first request. One that names nothing follows everything; one that takes the wildcard back at once
        follows what it holds and asks for the rest when it needs it.
        """
        self._started = self._answer = True
        if not subscribe:
            subscribe.add(WILDCARD)
        self._held = versions
        if WILDCARD not in subscribe - unsubscribe:
            self._keys = set(versions)
            self._unknown = {key for key in versions if not self._catalog.names(key)}
            self._due = {name for key in versions for name in self._catalog.names(key)}

    def _forget(self) -> None:
        """What is no longer followed is no longer held: a client drops it by itself."""
        if self._wildcard:
            return
        wanted = {name for key in self._keys for name in self._catalog.names(key)}
        self._due &= wanted
        self._again &= wanted
        self._held = {name: version for name, version in self._held.items() if name in wanted}

    def changed(self, names: Iterable[str]) -> bool:
        """Records of the catalog changed. Returns whether that concerns this client."""
        if self._wildcard:
            self._due.update(names)
        else:
            self._due.update(name for name in names if self._follows(name))
        return bool(self._due)

    def _follows(self, name: str) -> bool:
        entry = self._catalog.entries.get(name)
        aliases = entry.aliases if entry is not None else ()
        return name in self._held or name in self._keys or not self._keys.isdisjoint(aliases)

    def next(self) -> Push | None:
        """The push that is due, None where there is none or one is not answered yet."""
        if not self._started or self.nonce:
            return None
        entries: list[Entry] = []
        removed = sorted(self._unknown)
        size = 0
        done = set()
        for name in sorted(self._due):
            entry = self._catalog.entries.get(name)
            if entry is None:
                if self._held.pop(name, None) is not None:
                    removed.append(name)
            elif name in self._again or self._held.get(name) != entry.version:
                if entries and size + len(entry.body) > PUSH_BYTES:
                    break
                entries.append(entry)
                size += len(entry.body)
                self._held[name] = entry.version
            done.add(name)
        self._due -= done
        self._again -= done
        self._unknown.clear()
        if not (entries or removed or self._answer):
            return None
        self._answer = False
        self._serial += 1
        self.nonce = str(self._serial)
        return Push(self.nonce, tuple(entries), tuple(removed))
