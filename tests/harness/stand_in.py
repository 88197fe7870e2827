"""What stands where the engine will: listeners in a pod's SOCKMAP. For tests of capture alone."""

import contextlib
import ctypes
import os
import platform
import socket
import struct
from pathlib import Path
from typing import Protocol

from sidestep._bpf import ffi, lib
from tests.harness.netns import Pair, inside

_LIBC = ctypes.CDLL(None, use_errno=True)
_BPF = {"x86_64": 321, "aarch64": 280}[platform.machine()]
_UPDATE = 2
IP_TRANSPARENT, IPV6_TRANSPARENT, IPV6_FREEBIND, IP_FREEBIND = 19, 75, 78, 15
BPFFS = Path("/sys/fs/bpf")


class CaptureError(Exception):
    """A call of the loader failed; the text is its own."""


class Capture:
    """One instance of the programs, in a directory of pins of its own."""

    def __init__(self, pair: Pair, interface: str = "eth0", *, door: bool = False) -> None:
        self.pair = pair
        self.pins = str(BPFFS / f"t-{os.getpid()}" / "v3" / pair.pod).encode()
        self.interface = interface.encode()
        self.with_door = door
        self._error = ffi.new("char[]", lib.CAPTURE_ERROR_LEN)

    def _check(self, result: int) -> int:
        if result < 0:
            raise CaptureError(result, ffi.string(self._error).decode())
        return result

    def _netns(self, call: str, *args: object) -> int:
        with open(self.pair.pod_path) as netns:
            return int(getattr(lib, call)(self.pins, netns.fileno(), self.interface, *args, self._error))

    def _both(self, call: str) -> int:
        """The namespace outside is the pod's host."""
        with open(self.pair.pod_path) as netns, open(self.pair.outside_path) as host:
            return int(getattr(lib, call)(self.pins, host.fileno(), netns.fileno(), self.interface, self._error))

    def prepare(self) -> None:
        self._check(lib.capture_prepare(self.pins, self.pair.addresses().encode(), self._error))

    def set_mode(self, mode: int) -> None:
        self._check(self._netns("capture_set_mode", mode))
        if self.with_door:
            self.door()

    def door(self) -> bool:
        """True: there was none."""
        return bool(self._check(self._both("capture_door")))

    def verify(self) -> int:
        return self._check(self._netns("capture_verify"))

    def detach(self) -> None:
        self._check(self._both("capture_detach"))
        for folder in Path(self.pins.decode()).parents[:2]:
            with contextlib.suppress(OSError):  # another instance of this run is in it
                folder.rmdir()

    def old(self) -> int:
        with open(self.pair.pod_path) as netns:
            return self._check(lib.capture_old(self.pins, netns.fileno(), self._error))

    def held(self) -> int:
        with open(self.pair.pod_path) as netns:
            return self._check(lib.capture_held(self.pins, netns.fileno(), self._error))

    def listeners(self) -> int:
        return self._check(lib.capture_listeners(self.pins, self._error))

    def counters(self) -> dict[str, int]:
        out = ffi.new("uint64_t[]", lib.COUNT_MAX)
        n = self._check(lib.capture_counters(self.pins, out, lib.COUNT_MAX, self._error))
        return {ffi.string(lib.capture_counter_name(i)).decode(): int(out[i]) for i in range(n)}

    def vouch(self) -> list[int]:
        """What an engine that vouches gets beside `maps`."""
        fds = ffi.new("int[]", lib.VOUCH_FDS)
        self._check(lib.capture_vouch(self.pins, fds, self._error))
        return list(fds)

    def sweep(self) -> None:
        """What the agent does each second."""
        with open(self.pair.pod_path) as netns:
            self._check(lib.capture_sweep(self.pins, netns.fileno(), self._error))
        self._check(lib.capture_sweep_notes(str(Path(self.pins.decode()).parent / "node").encode(), self._error))

    def maps(self) -> tuple[int, int]:
        first, second = ffi.new("int*"), ffi.new("int*")
        self._check(lib.capture_maps(self.pins, first, second, self._error))
        return first[0], second[0]


def map_update(fd: int, key: bytes, value: bytes) -> None:
    """bpf(BPF_MAP_UPDATE_ELEM)."""
    k, v = ctypes.create_string_buffer(key), ctypes.create_string_buffer(value)
    attributes = struct.pack("IIQQQ", fd, 0, ctypes.addressof(k), ctypes.addressof(v), 0)
    if _LIBC.syscall(_BPF, _UPDATE, ctypes.create_string_buffer(attributes), len(attributes)) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class Instance(Protocol):
    """Programs in a pod."""

    pair: Pair

    def maps(self) -> tuple[int, int]: ...


class StandIn:
    """Listeners for the three slots, marked as the engine's."""

    def __init__(self, capture: Instance) -> None:
        self.listeners_fd, self.engine_sk = capture.maps()
        self.pair = capture.pair
        self.outbound, self.inbound, self.hbone = (self._listener(slot) for slot in range(3))

    def _listener(self, slot: int) -> socket.socket:
        family = socket.AF_INET6 if self.pair.pod6 else socket.AF_INET

        def make() -> socket.socket:
            made = socket.socket(family, socket.SOCK_STREAM)
            made.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                made.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
            self.own(made)
            made.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", 0))
            made.listen(4096)
            made.settimeout(20)
            return made

        made = inside(self.pair.pod_path, make)
        map_update(self.listeners_fd, struct.pack("I", slot), struct.pack("Q", made.fileno()))
        return made

    def own(self, made: socket.socket) -> None:
        """Marks a socket as the engine's."""
        map_update(self.engine_sk, struct.pack("i", made.fileno()), struct.pack("I", 1))

    def connect(self, address: str, port: int, source: tuple[str, int] | None = None) -> socket.socket:
        """A connection of the engine from inside the pod; `source` may be anybody's address."""

        def make() -> socket.socket:
            six = ":" in address
            made = socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_STREAM)
            made.settimeout(20)
            self.own(made)
            if source is not None:
                made.setsockopt(
                    socket.IPPROTO_IPV6 if six else socket.SOL_IP, IPV6_TRANSPARENT if six else IP_TRANSPARENT, 1
                )
                made.setsockopt(socket.IPPROTO_IPV6 if six else socket.SOL_IP, IPV6_FREEBIND if six else IP_FREEBIND, 1)
                made.bind(source)
            made.connect((address, port))
            return made

        return inside(self.pair.pod_path, make)

    def close(self) -> None:
        """As when the engine dies: every listener and map fd is closed."""
        for made in (self.outbound, self.inbound, self.hbone):
            made.close()
        os.close(self.listeners_fd)
        os.close(self.engine_sk)


def plain(address: tuple[object, ...]) -> tuple[str, int]:
    """Address and port of a socket's name, a mapped IPv4 address as IPv4."""
    return str(address[0]).removeprefix("::ffff:"), int(str(address[1]))
