"""A kubelet as far as capture can tell one: a cgroup2 directory with a process in it that makes sockets.

A socket belongs to the cgroup and the network namespace in which it was made, whoever uses it afterwards: the helper
makes it, hands it over, and the test connects.
"""

import array
import ctypes
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sidestep._bpf import ffi, lib
from sidestep.lab.cluster import cgroup2

_LIBC = ctypes.CDLL(None, use_errno=True)

_HELPER = """
import array, ctypes, os, socket, sys
with open(sys.argv[1] + "/cgroup.procs", "w") as procs:
    procs.write("0")
here = socket.socket(fileno=int(sys.argv[2]))
while said := here.recv(4096).decode():
    path, family = said.split()
    fd = os.open(path, os.O_RDONLY)
    assert ctypes.CDLL(None).setns(fd, 0x40000000) == 0
    os.close(fd)
    with socket.socket(int(family), socket.SOCK_STREAM) as made:
        here.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [made.fileno()]))])
"""


class Kubelet:
    """A directory below the cgroup2 root (or below `parent`) with one process. A context manager."""

    def __init__(self, name: str = "kubelet", parent: "Kubelet | None" = None) -> None:
        above = cgroup2() if parent is None else parent.cgroup
        self.cgroup: Path = above / f"t-{name}-{os.getpid()}"

    def __enter__(self) -> "Kubelet":
        self.cgroup.mkdir()
        self._here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._here.settimeout(20)
        with there:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _HELPER, str(self.cgroup), str(there.fileno())], pass_fds=[there.fileno()]
            )
        return self

    def __exit__(self, *unused: object) -> None:
        self._here.close()
        self._process.wait(20)
        deadline = time.monotonic() + 20
        while True:
            try:
                self.cgroup.rmdir()
                return
            except OSError:
                assert time.monotonic() < deadline, f"{self.cgroup} stays busy"
                time.sleep(0.01)

    @property
    def pid(self) -> int:
        """Of the process in the directory."""
        return self._process.pid

    def socket(self, path: str, family: int) -> socket.socket:
        """A TCP socket of this kubelet in a network namespace; `family` 4 or 6."""
        number = socket.AF_INET6 if family == 6 else socket.AF_INET
        self._here.send(f"{path} {int(number)}".encode())
        _, extra, _, _ = self._here.recvmsg(1, 64)
        fds = array.array("i", extra[0][2])
        made = socket.socket(fileno=fds[0])
        made.settimeout(20)
        return made

    def connect(self, path: str, address: str, port: int, *, source_port: int = 0, timeout: float = 20) -> Any:
        """A connection of this kubelet."""
        made = self.socket(path, 6 if ":" in address else 4)
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


def packed(address: str) -> bytes:
    """16 bytes, IPv4 mapped."""
    if ":" in address:
        return socket.inet_pton(socket.AF_INET6, address)
    return bytes(10) + b"\xff\xff" + socket.inet_aton(address)


class Exemption:
    """The node's part of the exemption, beside the pods of `pins` (a pod's directory of pins)."""

    def __init__(self, pins: bytes) -> None:
        self.node = os.path.dirname(pins) + b"/node"
        self._error = ffi.new("char[]", lib.CAPTURE_ERROR_LEN)

    def _check(self, result: int) -> int:
        if result < 0:
            raise OSError(-result, ffi.string(self._error).decode())
        return result

    def attach(self, cgroup: Path) -> int:
        """1: it was not attached there."""
        return self._check(lib.kubelet_attach(self.node, str(cgroup).encode(), self._error))

    def ports(self, *ports: tuple[str, int], exact: bool = True) -> None:
        """What is probed."""
        made = ffi.new("struct kubelet_port[]", max(1, len(ports)))
        for each, (address, port) in zip(made, ports, strict=False):
            ffi.memmove(each.ip, packed(address), 16)
            each.port = port
        self._check(lib.kubelet_ports(self.node, made, len(ports), int(exact), self._error))

    def counters(self) -> dict[str, int]:
        """What the program in the cgroup counted."""
        out = ffi.new("uint64_t[]", lib.KUBELET_MAX)
        self._check(lib.kubelet_counters(self.node, out, lib.KUBELET_MAX, self._error))
        return {"noted": int(out[lib.KUBELET_NOTED]), "refused": int(out[lib.KUBELET_REFUSED])}

    def detach(self) -> None:
        """No exemption any more."""
        self._check(lib.kubelet_detach(self.node, self._error))

    def notes(self) -> dict[bytes, tuple[int, int]]:
        """Every note: its key (a struct capture_tuple) and (initial sequence number, when in ns)."""
        found: dict[bytes, tuple[int, int]] = {}
        with Map(self.node + b"/probe_notes") as notes:
            for key in notes.keys(36):
                isn, _, when, _, _ = struct.unpack("IIQII", notes.lookup(key, 24))
                found[key] = isn, when
        return found

    def note(self, key: bytes, isn: int, when_ns: int) -> None:
        """Writes a note as the program would, at a time of the test's own."""
        with Map(self.node + b"/probe_notes") as notes:
            notes.update(key, struct.pack("IIQII", isn, 0, when_ns, 0, 0))


class Map:
    """A pinned BPF map by bpf(2)."""

    def __init__(self, path: bytes) -> None:
        self._path = path

    def __enter__(self) -> "Map":
        name = ctypes.create_string_buffer(self._path)
        self.fd = self._call(7, struct.pack("QII", ctypes.addressof(name), 0, 0))  # BPF_OBJ_GET
        return self

    def __exit__(self, *unused: object) -> None:
        os.close(self.fd)

    @staticmethod
    def _call(command: int, attributes: bytes) -> int:
        result = int(_LIBC.syscall(321, command, ctypes.create_string_buffer(attributes), len(attributes)))
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return result

    def keys(self, size: int) -> list[bytes]:
        """Every key."""
        found: list[bytes] = []
        following = ctypes.create_string_buffer(size)
        while True:
            key = ctypes.create_string_buffer(found[-1], size) if found else None
            attributes = struct.pack(
                "IIQQQ", self.fd, 0, ctypes.addressof(key) if key else 0, ctypes.addressof(following), 0
            )
            try:
                self._call(4, attributes)  # BPF_MAP_GET_NEXT_KEY
            except FileNotFoundError:
                return found
            found.append(following.raw)

    def lookup(self, key: bytes, size: int) -> bytes:
        """A value."""
        k, v = ctypes.create_string_buffer(key), ctypes.create_string_buffer(size)
        self._call(1, struct.pack("IIQQQ", self.fd, 0, ctypes.addressof(k), ctypes.addressof(v), 0))
        return v.raw

    def update(self, key: bytes, value: bytes) -> None:
        """Sets a value."""
        k, v = ctypes.create_string_buffer(key), ctypes.create_string_buffer(value)
        self._call(2, struct.pack("IIQQQ", self.fd, 0, ctypes.addressof(k), ctypes.addressof(v), 0))

    def delete(self, key: bytes) -> None:
        """Takes an entry out."""
        k = ctypes.create_string_buffer(key)
        self._call(3, struct.pack("IIQQQ", self.fd, 0, ctypes.addressof(k), 0, 0))
