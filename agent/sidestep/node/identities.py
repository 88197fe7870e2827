"""Certificates of the node's service accounts: which are needed, and when the next one is asked for. Pure.

An *identity* is a SPIFFE URI; one certificate per identity serves every pod of that service account on this node. It
is renewed at half its life, with jitter so that a node's certificates do not all come due together; a request that
fails is repeated after 1 s, twice as long each time, at most 150 s, and never later than the certificate ends. An
identity that no pod uses is dropped. Keys are in memory only: `Certificate` never shows its key in a repr.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

BACKOFF_FIRST_S = 1.0
BACKOFF_LAST_S = 150.0
JITTER = 0.1


@dataclass(frozen=True, slots=True)
class Certificate:
    """PEM texts: PKCS#8 key, chain (leaf, then intermediates), roots. Times are seconds since the epoch."""

    key_pem: str = field(repr=False)
    chain_pem: str
    roots_pem: str
    not_before_s: float
    not_after_s: float
    serial: str


@dataclass(frozen=True, slots=True)
class Identity:
    """One identity: its certificate if there is one, when to ask (again), how long to wait after the next failure."""

    uri: str
    certificate: Certificate | None = None
    due_s: float = 0.0
    backoff_s: float = BACKOFF_FIRST_S
    asking: bool = False
    error: str = ""

    def valid(self, now_s: float) -> bool:
        """There is a certificate and it has not ended."""
        return self.certificate is not None and now_s < self.certificate.not_after_s


class Identities:
    """What the node needs and has. Every method takes the time; nothing here asks a clock or does I/O.

    `uniform` answers a random number in [0, 1): jitter.
    """

    def __init__(self, uniform: Callable[[], float]) -> None:
        self._uniform = uniform
        self._known: dict[str, Identity] = {}

    def __iter__(self) -> Iterator[Identity]:
        return iter(sorted(self._known.values(), key=lambda identity: identity.uri))

    def get(self, uri: str) -> Identity | None:
        """The identity, None where no pod needs it."""
        return self._known.get(uri)

    def need(self, uris: Iterable[str], now_s: float) -> list[str]:
        """Sets which identities are needed. Returns those that no pod uses any more: the engine must forget them."""
        wanted = set(uris)
        for uri in wanted - self._known.keys():
            self._known[uri] = Identity(uri, due_s=now_s)
        dropped = sorted(self._known.keys() - wanted)
        for uri in dropped:
            del self._known[uri]
        return dropped

    def due(self, now_s: float) -> list[str]:
        """Those to ask for now: first who has none, then by the end of what they have."""
        found = [i for i in self._known.values() if not i.asking and i.due_s <= now_s]
        found.sort(key=lambda i: (i.certificate.not_after_s if i.certificate else 0.0, i.uri))
        return [i.uri for i in found]

    def next_due_s(self) -> float | None:
        """When `due` will answer something, None if never."""
        return min((i.due_s for i in self._known.values() if not i.asking), default=None)

    def asking(self, uri: str) -> None:
        """A request is under way."""
        if uri in self._known:
            self._known[uri] = replace(self._known[uri], asking=True)

    def obtained(self, uri: str, certificate: Certificate, now_s: float) -> bool:
        """A certificate came. Returns False where no pod needs it any more: it must be thrown away."""
        identity = self._known.get(uri)
        if identity is None:
            return False
        half = (certificate.not_after_s - certificate.not_before_s) / 2
        due = certificate.not_before_s + half * (1 - JITTER * self._uniform())
        # A certificate that is already past its half (a clock that differs) is not asked for in a loop.
        due = max(due, now_s + BACKOFF_FIRST_S)
        self._known[uri] = Identity(uri, certificate, due_s=due)
        return True

    def failed(self, uri: str, reason: str, now_s: float) -> float:
        """A request failed. Returns in how many seconds it is repeated."""
        identity = self._known.get(uri)
        if identity is None:
            return 0.0
        wait = identity.backoff_s * (1 - 2 * JITTER + 4 * JITTER * self._uniform())
        if identity.certificate is not None and identity.certificate.not_after_s > now_s:
            wait = min(wait, max(BACKOFF_FIRST_S, identity.certificate.not_after_s - now_s))
        backoff = min(identity.backoff_s * 2, BACKOFF_LAST_S)
        self._known[uri] = replace(identity, asking=False, due_s=now_s + wait, backoff_s=backoff, error=reason)
        return wait
