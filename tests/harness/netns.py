"""Network namespaces for tests: a pod and what is outside of it, code and sockets inside, a witness on the link.

A `Pair` is a pod's namespace (eth0, both families, a default route) and an outside namespace that is its gateway and
owns further addresses, so that "somewhere else" answers. Names carry the pid, so that parallel runs do not meet.
"""

import ctypes
import itertools
import os
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
_LIBC = ctypes.CDLL(None, use_errno=True)
_NUMBERS = itertools.count()


def run(*words: str, check: bool = True) -> str:
    """A command; fails the test with what it said."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stderr or done.stdout}"
    return done.stdout


def inside(path: str, work: Callable[[], T]) -> T:
    """Runs `work` in a thread inside the namespace; sockets that it makes belong there for good."""
    done: list[T] = []
    failed: list[BaseException] = []

    def enter() -> None:
        try:
            with open(path) as file:
                assert _LIBC.setns(file.fileno(), 0x40000000) == 0, os.strerror(ctypes.get_errno())
            done.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return done[0]


@dataclass(frozen=True, slots=True)
class Pair:
    """`pod` and `outside` are names of namespaces; addresses are text, "" where a family is off."""

    pod: str
    outside: str
    pod4: str
    pod6: str
    far4: str
    far6: str

    @property
    def pod_path(self) -> str:
        """Path of the pod's namespace."""
        return f"/run/netns/{self.pod}"

    @property
    def outside_path(self) -> str:
        """Path of the outside namespace; its end of the link is eth0."""
        return f"/run/netns/{self.outside}"

    def addresses(self) -> str:
        """The pod's addresses as the loader takes them."""
        return ",".join(filter(None, (self.pod4, self.pod6)))

    def pod_address(self, family: int) -> str:
        """The pod's address of family 4 or 6."""
        return self.pod4 if family == 4 else self.pod6

    def far(self, family: int) -> str:
        """An address outside, of family 4 or 6."""
        return self.far4 if family == 4 else self.far6

    def in_pod(self, work: Callable[[], T]) -> T:
        """Runs work inside the pod."""
        return inside(self.pod_path, work)

    def in_outside(self, work: Callable[[], T]) -> T:
        """Runs work outside."""
        return inside(self.outside_path, work)


@contextmanager
def pair(families: str = "46") -> Iterator[Pair]:
    """A pod and its outside, gone at the end. `families`: "46", "4" or "6"."""
    n = next(_NUMBERS)
    a, b = os.getpid() >> 8 & 0xFF, os.getpid() & 0xFF
    names = Pair(
        pod=f"t-pod-{os.getpid()}-{n}",
        outside=f"t-out-{os.getpid()}-{n}",
        pod4=f"10.{200 + n % 40}.{b}.2" if "4" in families else "",
        pod6=f"fd{a:02x}:{0x1000 + b:x}:{0x1000 + n:x}::2" if "6" in families else "",
        far4=f"10.{200 + n % 40}.{b}.129" if "4" in families else "",
        far6=f"fd{a:02x}:{0x1000 + b:x}:{0x1000 + n:x}:1::9" if "6" in families else "",
    )
    try:
        for name in (names.pod, names.outside):
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        run(
            "ip",
            "link",
            "add",
            "eth0",
            "netns",
            names.pod,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            names.outside,
        )
        for name in (names.pod, names.outside):
            run("ip", "-n", name, "link", "set", "eth0", "up")
        if "4" in families:
            gateway = names.pod4.rsplit(".", 1)[0] + ".1"
            run("ip", "-n", names.pod, "addr", "add", f"{names.pod4}/30", "dev", "eth0")
            run("ip", "-n", names.outside, "addr", "add", f"{gateway}/30", "dev", "eth0")
            run("ip", "-n", names.outside, "addr", "add", f"{names.far4}/32", "dev", "lo")
            run("ip", "-n", names.pod, "route", "add", "default", "via", gateway)
        if "6" in families:
            net = names.pod6.removesuffix("2")
            run("ip", "-n", names.pod, "addr", "add", f"{names.pod6}/64", "dev", "eth0", "nodad")
            run("ip", "-n", names.outside, "addr", "add", f"{net}1/64", "dev", "eth0", "nodad")
            run("ip", "-n", names.outside, "addr", "add", f"{names.far6}/128", "dev", "lo", "nodad")
            run("ip", "-n", names.pod, "route", "add", "default", "via", f"{net}1")
        yield names
    finally:
        for name in (names.pod, names.outside):
            run("ip", "netns", "del", name, check=False)


def listen(path: str, address: str, port: int, *, backlog: int = 128) -> socket.socket:
    """A listening TCP socket inside a namespace, with a deadline of 20 s on what it accepts and receives."""

    def make() -> socket.socket:
        made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((address, port))
            made.listen(backlog)
            made.settimeout(20)
        except OSError:
            made.close()
            raise
        return made

    return inside(path, make)


def connect(path: str, address: str, port: int, *, source_port: int = 0, timeout: float = 20) -> socket.socket:
    """A TCP connection from inside a namespace."""

    def make() -> socket.socket:
        made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        made.settimeout(timeout)
        try:
            if source_port:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                made.bind(("::" if ":" in address else "0.0.0.0", source_port))
            made.connect((address, port))
        except OSError:
            made.close()
            raise
        return made

    return inside(path, make)


class Sniffer:
    """Every frame that an interface sends or receives while the block runs, with its link header; VLAN tags that the
    kernel keeps beside the frame are put back. One that lost frames fails the test: it would prove nothing.
    """

    def __init__(self, path: str, device: str = "eth0") -> None:
        self._path, self._device = path, device
        self._frames: list[bytes] = []

    def __enter__(self) -> "Sniffer":
        def make() -> socket.socket:
            made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            made.setsockopt(263, 8, 1)  # SOL_PACKET, PACKET_AUXDATA
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 << 20)
            made.bind((self._device, 3))
            made.setblocking(False)
            return made

        self._socket = inside(self._path, make)
        return self

    def __exit__(self, *unused: object) -> None:
        self.frames()
        _, lost = struct.unpack("II", self._socket.getsockopt(263, 6, 8))  # PACKET_STATISTICS
        self._socket.close()
        assert lost == 0, f"the sniffer lost {lost} frames"

    def frames(self) -> list[bytes]:
        """What has crossed until now."""
        while select.select([self._socket], [], [], 0)[0]:
            frame, extra, _, _ = self._socket.recvmsg(1 << 17, 256)
            for _, kind, data in extra:
                status, _, _, _, _, tci, protocol = struct.unpack("=IIIHHHH", data[:20])
                if kind == 8 and status & 0x10:  # TP_STATUS_VLAN_VALID
                    frame = frame[:12] + struct.pack("!HH", protocol, tci) + frame[12:]
            self._frames.append(frame)
        return self._frames

    def wait_for(self, mark: bytes, seconds: float = 20) -> list[bytes]:
        """All frames up to one that carries `mark`: what was sent before it has crossed."""
        deadline = time.monotonic() + seconds
        while not any(mark in frame for frame in self.frames()):
            assert time.monotonic() < deadline, f"{mark!r} has not crossed"
            time.sleep(0.01)
        return self._frames
