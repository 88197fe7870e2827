"""What crosses a link: the witness of the demo, the tests and the benchmark.

A `Tap` listens with AF_PACKET on one interface of a network namespace and puts the TCP payload of each direction of
each connection back into order. `violations()` says in which ways what was seen breaks the promise of the mesh; it is
a pure function over `Flow`s, so the same check that finds nothing with the mesh must find something without it.

Words: a flow is one direction of one TCP connection, named by its source and destination endpoint; *opened* flows are
those whose SYN was seen, so that connections from before the tap are told apart.
"""

import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address

HBONE_PORT = 15008
CATCH_UP_S = 60.0  # a hang guard
KEEP = 4 << 20  # payload bytes kept per flow; beyond that they are counted only

_ETH_P_ALL = 3
_ETH_VLAN = 0x8100
_SOL_PACKET = 263
_PACKET_STATISTICS = 6
_SO_RCVBUFFORCE = 33
_CLONE_NEWNET = 0x40000000


class LinkError(Exception):
    """The tap cannot tell the truth: it could not listen, or packets were lost between the kernel and it."""


@dataclass(frozen=True, slots=True, order=True)
class Endpoint:
    """An address in text form and a port."""

    address: str
    port: int

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


@dataclass(slots=True)
class Flow:
    """One direction of one connection."""

    source: Endpoint
    destination: Endpoint
    syn: bool = False  # a SYN without ACK was seen in this direction: its source opened the connection
    answered: bool = False  # SYN with ACK
    reset: bool = False
    payload_bytes: int = 0  # without retransmissions of what was kept
    packets: int = 0
    since: float = 0.0  # monotonic time of its first packet
    _first: int | None = None
    _parts: dict[int, bytes] = field(default_factory=dict)

    def add(self, sequence: int, payload: bytes) -> None:
        """Takes a segment; keeps the longest of those that start at the same place."""
        if self._first is None:
            self._first = sequence
        offset = (sequence - self._first) & 0xFFFFFFFF
        if offset >= 1 << 31:  # before the first one that was seen: rebase
            shift = (1 << 32) - offset
            self._parts = {start + shift: part for start, part in self._parts.items()}
            self._first, offset = sequence, 0
        if len(self._parts.get(offset, b"")) < len(payload):
            self.payload_bytes += len(payload) - len(self._parts.get(offset, b""))
            if offset < KEEP:
                self._parts[offset] = payload

    def ports(self) -> tuple[int, int]:
        """Of source and destination."""
        return self.source.port, self.destination.port

    def payload(self) -> bytes:
        """The bytes in order, up to the first gap or `KEEP`."""
        out = bytearray()
        for offset in sorted(self._parts):
            if offset > len(out):
                break
            out += self._parts[offset][len(out) - offset :]
        return bytes(out)

    def fragments(self) -> bytes:
        """All kept segments, gaps closed: for searching a canary, not for parsing."""
        return b"".join(self._parts[offset] for offset in sorted(self._parts))


@dataclass(frozen=True, slots=True)
class Violation:
    """One way in which the traffic breaks the promise; `kind` is a fixed word for tests, `detail` is for people."""

    kind: str
    detail: str


class Tap:
    """Listens on an interface from `__enter__` to `__exit__`; `flows()` may be called at any time.

    Raises LinkError when the namespace or the interface is not there, and from `flows()` when the kernel dropped
    packets.
    """

    def __init__(self, netns: str, interface: str) -> None:
        self._netns = netns
        self._interface = interface
        self._flows: dict[tuple[Endpoint, Endpoint], list[Flow]] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._asked = self._caught_up = (
            0  # numbers of questions: the last one, and the last with all that came before it
        )
        self._answer = threading.Condition()
        self._error: Exception | None = None
        self._dropped = 0
        self._thread = threading.Thread(target=self._listen, name="tap", daemon=True)

    def __enter__(self) -> "Tap":
        self._thread.start()
        if not self._ready.wait(10) or self._error is not None:
            raise LinkError(f"cannot listen on {self._interface} in {self._netns}: {self._error}")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)

    def flows(self, *, opened_only: bool = False) -> list[Flow]:
        """The flows seen so far. With `opened_only` those of connections whose opening was seen."""
        with self._answer:  # what is on its way from the kernel belongs to the answer
            self._asked += 1
            mine = self._asked
            if not self._answer.wait_for(lambda: self._caught_up >= mine, CATCH_UP_S):
                raise LinkError(
                    f"the tap on {self._interface} did not catch up within {CATCH_UP_S:.0f} s: measure again"
                )
        if self._dropped:
            raise LinkError(
                f"{self._dropped} packets were lost on the way to the tap on {self._interface}: measure again"
            )
        with self._lock:
            found = [flow for generations in self._flows.values() for flow in generations]
        return [flow for flow in found if flow.syn or flow.answered] if opened_only else found

    def _listen(self) -> None:
        try:
            with open(self._netns) as netns:
                _setns(netns.fileno())
            tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        except OSError as error:
            self._error = error
            self._ready.set()
            return
        with tap:
            try:
                tap.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 64 << 20)
                tap.bind((self._interface, _ETH_P_ALL))
                tap.setblocking(False)
            except OSError as error:
                self._error = error
                self._ready.set()
                return
            self._ready.set()
            while True:
                # Read before the queue: what was there when the question came is there now, or was taken.
                asked, stop = self._asked, self._stop.is_set()
                try:
                    frame, _ = tap.recvfrom(1 << 17)
                except BlockingIOError:
                    statistics = tap.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)
                    self._dropped += int(struct.unpack("II", statistics)[1])
                    with self._answer:
                        self._caught_up = 1 << 62 if stop else asked  # who asks later has all
                        self._answer.notify_all()
                    if stop:
                        return
                    select.select([tap], [], [], 0.1)
                    continue
                segment = parse(frame)
                if segment is not None:
                    with self._lock:
                        self._take(segment)

    def _take(self, segment: "Segment") -> None:
        generations = self._flows.setdefault((segment.source, segment.destination), [])
        opening = bool(segment.flags & 0x02)
        if not generations or (opening and (generations[-1].packets > 1 or generations[-1].reset)):
            generations.append(Flow(segment.source, segment.destination, since=time.monotonic()))
        flow = generations[-1]
        flow.packets += 1
        flow.syn |= opening and not segment.flags & 0x10
        flow.answered |= opening and bool(segment.flags & 0x10)
        flow.reset |= bool(segment.flags & 0x04)
        if segment.payload:
            flow.add(segment.sequence, segment.payload)


def _setns(fd: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@dataclass(frozen=True, slots=True)
class Segment:
    """A TCP segment as it was on the wire."""

    source: Endpoint
    destination: Endpoint
    sequence: int
    flags: int  # RFC 9293 3.1: FIN 1, SYN 2, RST 4, ACK 16
    payload: bytes


def parse(frame: bytes) -> Segment | None:
    """An Ethernet frame (with or without VLAN tag) with TCP over IPv4 or IPv6; None for everything else."""
    if len(frame) < 14:
        return None
    kind, at = struct.unpack_from("!H", frame, 12)[0], 14
    while kind == _ETH_VLAN and len(frame) >= at + 4:
        kind, at = struct.unpack_from("!H", frame, at + 2)[0], at + 4
    if kind == 0x0800 and len(frame) >= at + 20:
        end = at + struct.unpack_from("!H", frame, at + 2)[0]
        protocol, source, destination = frame[at + 9], frame[at + 12 : at + 16], frame[at + 16 : at + 20]
        at += (frame[at] & 15) * 4
    elif kind == 0x86DD and len(frame) >= at + 40:
        end = at + 40 + struct.unpack_from("!H", frame, at + 4)[0]
        protocol, source, destination = frame[at + 6], frame[at + 8 : at + 24], frame[at + 24 : at + 40]
        at += 40
    else:
        return None
    if protocol != 6 or len(frame) < at + 20:
        return None
    sport, dport, sequence = struct.unpack_from("!HHI", frame, at)
    return Segment(
        Endpoint(str(ip_address(source)), sport),
        Endpoint(str(ip_address(destination)), dport),
        (sequence + bool(frame[at + 13] & 2)) & 0xFFFFFFFF,
        frame[at + 13],
        frame[at + (frame[at + 12] >> 4) * 4 : end],
    )


def records(payload: bytes) -> Iterator[tuple[int, bytes]]:
    """The TLS records (RFC 8446 5.1) of a stream: (content type, body); a last, incomplete one is left out.

    Raises ValueError where the stream is not TLS.
    """
    at = 0
    while len(payload) - at >= 5:
        kind, major, length = payload[at], payload[at + 1], struct.unpack_from("!H", payload, at + 3)[0]
        if kind not in (20, 21, 22, 23) or major != 3 or length > (1 << 14) + 256:
            raise ValueError(f"byte {at} is not the start of a TLS record: {payload[at : at + 5]!r}")
        if len(payload) - at < 5 + length:
            return
        yield kind, payload[at + 5 : at + 5 + length]
        at += 5 + length


def server_hello_version(body: bytes) -> int | None:
    """The version that a ServerHello chose (RFC 8446 4.2.1: extension 43), None where the record is no ServerHello."""
    if len(body) < 42 or body[0] != 2:
        return None
    at = 4 + 2 + 32
    at += 1 + body[at] + 2 + 1
    if len(body) < at + 2:
        return int.from_bytes(body[4:6], "big")
    end = at + 2 + struct.unpack_from("!H", body, at)[0]
    at += 2
    while at + 4 <= min(end, len(body)):
        extension, length = struct.unpack_from("!HH", body, at)
        if extension == 43 and length == 2:
            return int(struct.unpack_from("!H", body, at + 4)[0])
        at += 4 + length
    return int.from_bytes(body[4:6], "big")


def tls_bytes(flows: Iterable[Flow]) -> int:
    """Payload bytes of flows to or from the HBONE port."""
    return sum(flow.payload_bytes for flow in flows if HBONE_PORT in (flow.source.port, flow.destination.port))


def violations(flows: Iterable[Flow], canaries: Iterable[bytes] = ()) -> list[Violation]:
    """What is wrong with connections that were opened between enrolled pods.

    Kinds: `clear-connection` (a connection to another port than 15008 that carried bytes), `not-tls` (bytes on 15008
    that are no TLS records), `old-tls` (another version than 1.3), `no-server-hello`, `canary` (a string of the
    applications is readable).
    """
    found = []
    canaries = list(canaries)
    for flow in flows:
        name = f"{flow.source} -> {flow.destination}"
        for canary in canaries:
            if canary in flow.fragments():
                found.append(Violation("canary", f"{name}: {canary!r} is readable"))
        if not flow.payload_bytes:
            continue
        if HBONE_PORT not in (flow.source.port, flow.destination.port):
            found.append(Violation("clear-connection", f"{name}: {flow.payload_bytes} bytes: {flow.payload()[:40]!r}"))
            continue
        from_server = flow.source.port == HBONE_PORT
        try:
            seen = list(records(flow.payload()))
        except ValueError as error:
            found.append(Violation("not-tls", f"{name}: {error}"))
            continue
        if from_server and flow.answered and seen and seen[0][0] != 21:
            version = server_hello_version(seen[0][1]) if seen[0][0] == 22 else None
            if version is None:
                found.append(Violation("no-server-hello", name))
            elif version != 0x0304:
                found.append(Violation("old-tls", f"{name}: version {version:#06x}"))
    return found
