"""What is measured: the plain network, the floor, sidestep without and with the acceleration of one node, a pair of
Envoy sidecars, any other proxy.

Each target runs the same rows between the same kind of pods. It says where the load connects, what its processes are,
and, from counters of its own and of the link between the nodes, whether a run went the way that it claims: one that did
not is aborted, whatever its figures.
"""

import argparse
import contextlib
import io
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sidestep.node import command
from tests.bench import envoy as envoy_pair
from tests.bench import floor as floor_pair
from tests.bench.envoy import Sidecars, sidecars
from tests.bench.floor import Floor, floor
from tests.bench.load import LoadError, Sample, perform
from tests.bench.peer import Peer, peer
from tests.bench.rows import PLACES, Row
from tests.bench.side import SERVERS, Side, lab, manifests
from tests.harness.netns import inside

NAMES = ("plain", "floor", "sidestep", "native", "envoy", "peer")
PRIMED_S = 10.0
DETOURS = 0.02
STRAY = 1_000_000  # bytes on the link that are nobody's load: API, xDS, neighbours


class Astray(LoadError):
    """A run was no error and did not go the way that it claims."""


def accelerates() -> bool:
    """Whether this build's agent knows the acceleration of one node."""
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            parser.parse_args(["agent", *_AGENT, "--same-node=native"])
    except SystemExit:
        return False
    return True


_AGENT = ("--node=n", "--node-ip=::1", "--engine-socket=s", "--run-dir=r", "--bpf-dir=b")


class Target:
    """The plain network, and what the others have in common with it."""

    name = "plain"
    about = "the same pods without a mesh"
    places: tuple[str, ...] = PLACES

    def __init__(self, side: Side) -> None:
        self.side = side

    def to(self, place: str, port: int) -> tuple[str, int]:
        """Where the load connects to reach a server's port."""
        return self.side.addresses[SERVERS[place]], port

    def counts(self) -> tuple[float, ...]:
        """Counters of its own, so far."""
        return ()

    def wrong(self, place: str, connections: int, grown: Sequence[float]) -> str:
        """In which way the growth of its counters contradicts the path; "" when it does not."""
        return ""

    def uncounted(self, carried: int, grown: Sequence[float]) -> str:
        """In which way the growth contradicts the bytes that applications sent; "" when it does not."""
        return ""

    def processes(self) -> dict[str, list[int]]:
        """What it consists of."""
        return {}

    def prime(self, row: Row, place: str) -> None:
        """What has to have happened before a run. Raises LoadError."""

    def case(self, row: Row, place: str, seconds: float) -> Sample:
        """One run. Raises LoadError when it had an error or did not go the way it should."""
        try:
            self.prime(row, place)
            link, counts = self.side.link_bytes(), self.counts()
            sample = perform(row, self.side.enter("client"), *self.to(place, row.port), seconds)
            crossed = self.side.link_bytes() - link
            grown = [after - before for before, after in zip(counts, self.counts(), strict=True)]
        except (OSError, ValueError) as error:  # one of its processes does not answer any more
            raise LoadError(f"{self.name}, {place}: {row.name}: {type(error).__name__}: {error}") from error
        connections = sample.total_ops if row.kind == "crr" else row.connections
        wrong = link_wrong(row, place, sample, crossed) or self.wrong(place, connections, grown)
        wrong = wrong or self.uncounted(carried(row, sample), grown)
        if wrong:
            raise Astray(f"{self.name}, {place}: {row.name}: {wrong}")
        return sample


def carried(row: Row, sample: Sample) -> int:
    """Bytes that the applications sent, in both directions."""
    both = row.kind in ("rr", "crr", "open")  # what is sent comes back
    return sample.total_bytes * 2 if both else sample.total_bytes


def link_wrong(row: Row, place: str, sample: Sample, crossed: int) -> str:
    """In which way the bytes on the link between the nodes contradict the place; "" when they do not."""
    sent = carried(row, sample)
    if place == "across" and crossed < sent:
        return f"{crossed} bytes crossed the link, and the applications sent {sent}"
    if place == "local" and crossed > sent / 2 + STRAY:
        return f"{crossed} bytes crossed the link, and nothing should"
    return ""


class FloorTarget(Target):
    """Two forwarders that seal and do nothing else."""

    name = "floor"
    about = "two forwarders that seal and do nothing else (tests/bench/floor.c)"
    places = ("across",)

    def __init__(self, side: Side, pair: Floor) -> None:
        super().__init__(side)
        self.pair = pair

    def to(self, place: str, port: int) -> tuple[str, int]:
        """The forwarder in the client's pod."""
        return "127.0.0.1", port + floor_pair.IN

    def counts(self) -> tuple[float, ...]:
        """Connections at both ends."""
        return (self.pair.flows(),)

    def wrong(self, place: str, connections: int, grown: Sequence[float]) -> str:
        """Both ends must have seen every one."""
        return "" if grown[0] >= 2 * connections else f"{connections} connections, {grown[0]:.0f} ends of forwarders"

    def processes(self) -> dict[str, list[int]]:
        """One pair."""
        return self.pair.pids()


class Sidestep(Target):
    """The mesh."""

    name = "sidestep"
    about = (
        "the mesh: mutual TLS across nodes; on one node without acceleration: through the engine, from socket to socket"
    )

    def counts(self) -> tuple[float, ...]:
        """Connections with mutual TLS at both ends, and those that stayed on the node."""
        return self.side.connections()

    def wrong(self, place: str, connections: int, grown: Sequence[float]) -> str:
        """All of one kind and none of the other."""
        tls, local = grown
        right = tls >= 2 * connections and not local if place == "across" else local >= connections and not tls
        return "" if right else f"{connections} connections, {tls:.0f} ends with mutual TLS, {local:.0f} local ones"

    def processes(self) -> dict[str, list[int]]:
        """Agents and engines."""
        return self.side.processes()


class Native(Sidestep):
    """The mesh with acceleration: on one node the kernel passes a pair's connections once the first was allowed."""

    name = "native"
    about = "the mesh with acceleration (--same-node native): on one node the kernel alone, once a pair was allowed"
    places = ("local",)

    def prime(self, row: Row, place: str) -> None:
        """Connects until a connection passes natively: the first of a pair is the engine's, which allows it."""
        address, port = self.to(place, row.port)
        end = time.monotonic() + PRIMED_S
        while time.monotonic() < end:
            before = self.side.natives()
            inside(self.side.netns["client"], lambda: socket.create_connection((address, port), 5).close())
            engine, handed, _ = (after - old for old, after in zip(before, self.side.natives(), strict=True))
            if handed >= 1 and not engine:
                return
        raise LoadError(f"{self.name}, {place}: {row.name}: no connection passed natively within {PRIMED_S:.0f} s")

    def case(self, row: Row, place: str, seconds: float) -> Sample:
        """As others; a second time where the engine was asked again, as it is after any change and in any doubt."""
        try:
            return super().case(row, place, seconds)
        except Astray:
            return super().case(row, place, seconds)

    def counts(self) -> tuple[float, ...]:
        """Connections that the engine carried, those that the programs handed on natively, bytes of all."""
        return self.side.natives()

    def wrong(self, place: str, connections: int, grown: Sequence[float]) -> str:
        """The programs must have handed on every one that the engine has not carried, and of a few the engine none; of
        very many it may have carried DETOURS, for in any doubt a pair is the engine's for a moment."""
        engine, handed, _ = grown
        if engine <= DETOURS * connections and handed + engine >= connections:
            return ""
        return f"{connections} connections, {handed:.0f} native ones, {engine:.0f} through the engine"

    def uncounted(self, carried: int, grown: Sequence[float]) -> str:
        """What is native is counted: no byte may be missing."""
        return "" if grown[2] >= carried else f"{carried} bytes sent, {grown[2]:.0f} counted"


class Variant(Sidestep):
    """The mesh with other options than it comes with: a lab of its own. On one node it may seal or not."""

    def __init__(self, side: Side, name: str, options: Sequence[str]) -> None:
        super().__init__(side)
        self.name = name
        self.about = f"the mesh with {' '.join(options)}"

    def wrong(self, place: str, connections: int, grown: Sequence[float]) -> str:
        """All of one kind and none of the other, whichever it is on one node."""
        return super().wrong(place, connections, grown) and super().wrong("across", connections, grown)


class EnvoyTarget(Target):
    """A sidecar in each of the two pods."""

    name = "envoy"
    about = "a pair of Envoy sidecars, mutual TLS for each connection, no capture"
    places = ("across",)

    def __init__(self, side: Side, pair: Sidecars) -> None:
        super().__init__(side)
        self.pair = pair
        self.about += f", {pair.version()}"

    def to(self, place: str, port: int) -> tuple[str, int]:
        """The Envoy in the client's pod."""
        return "127.0.0.1", port + envoy_pair.OUT

    def counts(self) -> tuple[float, ...]:
        """Handshakes, at both ends."""
        return (self.pair.handshakes(),)

    def wrong(self, place: str, connections: int, grown: Sequence[float]) -> str:
        """Each connection has one."""
        return "" if grown[0] >= 2 * connections else f"{connections} connections, {grown[0]:.0f} ends of handshakes"

    def processes(self) -> dict[str, list[int]]:
        """Both."""
        return self.pair.pids()


class PeerTarget(Target):
    """Somebody else's proxy."""

    name = "peer"
    about = "another proxy"

    def __init__(self, side: Side, found: Peer) -> None:
        super().__init__(side)
        self.peer = found
        self.places = found.places
        self.about = f"another proxy: {found.version or 'without a version'}"

    def to(self, place: str, port: int) -> tuple[str, int]:
        """Where it said."""
        return self.peer.to.get((place, port), super().to(place, port))

    def processes(self) -> dict[str, list[int]]:
        """Its session."""
        return self.peer.pids()


def _mesh(folder: Path, letter: str, same_node: str, enrol: bool) -> contextlib.AbstractContextManager[Side]:
    objects = manifests("ambient" if enrol else "none")
    return lab(folder, letter, objects, mesh=True, enrol=enrol, options=[f"--agent-arg=--same-node={same_node}"])


@contextlib.contextmanager
def targets(
    folder: Path, names: Sequence[str], peer_command: str, variants: Mapping[str, Sequence[str]], *, enrol: bool = True
) -> Iterator[list[Target]]:
    """The targets of these names, up, in the order of NAMES, then the variants (name -> options of `lab up`). The floor
    and Envoy share the plain network's lab: they do nothing while nobody connects to them. `enrol=False`: sidestep's
    pods stay outside the mesh: its rows must abort."""
    with contextlib.ExitStack() as stack:
        made: list[Target] = []
        plain = stack.enter_context(lab(folder, "p", manifests("none"), mesh=False))
        for name in sorted(names, key=NAMES.index):
            if name == "plain":
                made.append(Target(plain))
            elif name == "floor":
                made.append(FloorTarget(plain, stack.enter_context(floor(plain))))
            elif name == "sidestep":
                made.append(Sidestep(stack.enter_context(_mesh(folder, "m", "direct", enrol))))
            elif name == "native":
                made.append(Native(stack.enter_context(_mesh(folder, "n", "native", enrol))))
            elif name == "envoy":
                pair = sidecars(folder, plain, ["client"], SERVERS["across"])
                made.append(EnvoyTarget(plain, stack.enter_context(pair)))
            elif name == "peer":
                own = stack.enter_context(lab(folder, "x", manifests("none"), mesh=False))
                made.append(PeerTarget(own, stack.enter_context(peer(own, peer_command))))
        for number, (name, options) in enumerate(variants.items()):
            objects = manifests("ambient")
            side = stack.enter_context(lab(folder, f"v{number}x", objects, mesh=True, options=options))
            made.append(Variant(side, name, options))
        yield made
