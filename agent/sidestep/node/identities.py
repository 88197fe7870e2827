"""Certificates of the node's service accounts: which are needed, and when the next one is asked for. Pure.

An *identity* is a SPIFFE URI; one certificate per identity serves every pod of that service account on this node. It
is renewed at half its life, with jitter so that a node's certificates do not all come due together; a request that
fails is repeated after 1 s, twice as long each time, at most 150 s, and never later than the certificate ends. An
identity that no pod uses is dropped. Keys are in memory only: `Certificate` never shows its key in a repr.

*Roots* come with each certificate: whom its holder trusts. When they change, a peer may soon show a certificate of a
root that this node has not heard of, so every certificate is renewed within ROOTS_SPREAD_S, spread evenly.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

BACKOFF_FIRST_S = 1.0
BACKOFF_LAST_S = 150.0
JITTER = 0.1
ROOTS_SPREAD_S = 10.0
ROOTS_SEEN = 16  # sets of roots that are remembered: two authorities that disagree must not renew for ever


@dataclass(frozen=True, slots=True)
class Certificate:
    """PEM texts: PKCS#8 key, chain (leaf, then intermediates), roots. Times are seconds since the epoch."""

    key_pem: str = field(repr=False)
    chain_pem: str
    roots_pem: str
    not_before_s: float
    not_after_s: float
    serial: str

    @property
    def roots(self) -> frozenset[str]:
        """Its roots, to be compared with others'."""
        return roots_of(self.roots_pem)


def roots_of(pem: str) -> frozenset[str]:
    """The certificates of a PEM text, whatever their order and what stands between them."""
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    return frozenset("".join(part.partition(begin)[2].split()) for part in pem.split(end)[:-1])


@dataclass(frozen=True, slots=True)
class Identity:
    """One identity: its certificate if there is one, when to ask (again), how long to wait after the next failure.
    `roots`: how often the roots had changed when it was asked for last.
    """

    uri: str
    certificate: Certificate | None = None
    due_s: float = 0.0
    backoff_s: float = BACKOFF_FIRST_S
    asking: bool = False
    error: str = ""
    roots: int = 0

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
        self._roots = 0
        self._seen: list[frozenset[str]] = []

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
            self._known[uri] = replace(self._known[uri], asking=True, roots=self._roots)

    def obtained(self, uri: str, certificate: Certificate, now_s: float) -> bool:
        """A certificate came. Returns False where no pod needs it any more: it must be thrown away."""
        identity = self._known.get(uri)
        if identity is None:
            return False
        half = (certificate.not_after_s - certificate.not_before_s) / 2
        due = certificate.not_before_s + half * (1 - JITTER * self._uniform())
        # One that is already past its half (a clock that differs, an issuer that ends soon) is not asked for in a loop.
        if due < now_s + BACKOFF_FIRST_S:
            due = now_s + max(BACKOFF_FIRST_S, (certificate.not_after_s - now_s) / 2)
        if identity.roots != self._roots and identity.asking:
            due = min(due, self._soon(now_s))  # they changed while it was made
        self._known[uri] = Identity(uri, certificate, due_s=due, roots=self._roots)
        if certificate.roots not in self._seen:
            first = not self._seen
            self._seen = [*self._seen[1 - ROOTS_SEEN :], certificate.roots]
            if not first:
                self._renew_others(certificate.roots, now_s)
        return True

    def roots_changed(self, pem: str, now_s: float) -> int:
        """The cluster's roots are these now, and were others before. Returns how many certificates are renewed soon."""
        self._roots += 1
        return self._renew_others(roots_of(pem), now_s)

    def _renew_others(self, roots: frozenset[str], now_s: float) -> int:
        """Certificates with other roots are due soon."""
        count = 0
        for uri, identity in self._known.items():
            if identity.certificate is not None and identity.certificate.roots != roots:
                self._known[uri] = replace(identity, due_s=min(identity.due_s, self._soon(now_s)))
                count += 1
        return count

    def _soon(self, now_s: float) -> float:
        return now_s + ROOTS_SPREAD_S * self._uniform()

    def failed(self, uri: str, reason: str, now_s: float) -> float:
        """A request failed. Returns in how many seconds it is repeated."""
        identity = self._known.get(uri)
        if identity is None:
            return 0.0
        wait = identity.backoff_s * (1 - 2 * JITTER + 4 * JITTER * self._uniform())  # 0.8 to 1.2 of it
        if identity.certificate is not None and identity.certificate.not_after_s > now_s:
            wait = min(wait, max(BACKOFF_FIRST_S, identity.certificate.not_after_s - now_s))
        backoff = min(identity.backoff_s * 2, BACKOFF_LAST_S)
        self._known[uri] = replace(identity, asking=False, due_s=now_s + wait, backoff_s=backoff, error=reason)
        return wait
