"""Capture as the agent sees it: one instance of programs and maps per pod, pinned, told by UID.

A typed face of sidestep._bpf (bpf/loader.h). Every call loads or asks the kernel and may take milliseconds, so all
run in one thread of their own: never two at once, and the loop goes on. The C side enters a pod's namespace and
comes back; that thread does nothing else.
"""

import asyncio
import errno
import ipaddress
import os
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sidestep import _bpf, log
from sidestep.node.netns import Netns
from sidestep.node.reconcile import Capture

INTERFACE = "eth0"

_ffi: Any = _bpf.ffi
_lib: Any = _bpf.lib
_MODES = {
    Capture.STRICT: _lib.MODE_STRICT,
    Capture.LENIENT: _lib.MODE_LENIENT,
    Capture.DRAINING: _lib.MODE_DRAINING,
}
_MISSING = {
    _lib.CAPTURE_NO_PINS: "pins",
    _lib.CAPTURE_NO_OUT_ETH: "egress program",
    _lib.CAPTURE_NO_IN_ETH: "ingress program",
    _lib.CAPTURE_NO_IN_LO: "ingress program on lo",
    _lib.CAPTURE_NO_OUT_LO: "egress program on lo",
    _lib.CAPTURE_NO_STEER: "sk_lookup program",
    _lib.CAPTURE_NO_ROUTE4: "IPv4 rule or route",
    _lib.CAPTURE_NO_ROUTE6: "IPv6 rule or route",
    _lib.CAPTURE_NO_ACCEPT_LOCAL: "accept_local of lo",
}
_ALL_SLOTS = (1 << _lib.SLOT_COUNT) - 1
_LAYOUT, _FORMER = "v3", ("v2", "v1")  # CAPTURE_LAYOUT of bpf/loader.h, and what capture_upgrade knows
_NODE = "node"  # the kubelet exemption's pins, beside the pods'
_NOTES = {_lib.KUBELET_NOTED: "noted", _lib.KUBELET_REFUSED: "refused_port", _lib.KUBELET_FULL: "full"}

T = TypeVar("T")


class CaptureError(Exception):
    """The kernel did not take it, or it is not there any more; says what was tried and the error."""


class NotYet(CaptureError):
    """LENIENT has begun, but connections from before are half open: to be asked again."""


@dataclass(frozen=True, slots=True)
class Found:
    """What the pins of a pod say. `netns_ino` 0: attached nowhere."""

    capture: Capture
    netns_ino: int


@dataclass(frozen=True, slots=True)
class Verified:
    """`missing`: what is not where it was put, in words. `listeners`: the engine's sockets are in every slot.
    `pins`: the maps can still be reached.
    """

    missing: str
    listeners: bool
    pins: bool = True

    @property
    def intact(self) -> bool:
        """Every program, filter, rule and pin is in place."""
        return not self.missing


class Captures:
    """The instances of this node. A netns that is handed in may be closed by its owner at any time."""

    def __init__(self, directory: Path, host: Path = Path("/proc/self/ns/net")) -> None:
        """Opens (and makes) the directory of pins; takes over what an agent of a layout before left. `host`: the
        namespace where the pods' links end. Raises CaptureError where the directory is not on a bpffs, or where taking
        over cannot be done: it then stays as it is.
        """
        _require_bpffs(directory)
        self._directory = directory / _LAYOUT
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for former in _FORMER:
            self._upgrade(directory / former)
        self._host = os.open(host, os.O_RDONLY | os.O_CLOEXEC)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="capture")

    def close(self) -> None:
        """Ends the thread; what is attached and pinned stays."""
        self._thread.shutdown()
        os.close(self._host)

    async def list(self) -> Mapping[str, Found]:
        """Every pod that has pins."""

        def work() -> dict[str, Found]:
            found = {}
            for uid in os.listdir(self._directory):
                if uid == _NODE:
                    continue
                try:
                    found[uid] = self._read(uid)
                except CaptureError:
                    # Half made or half removed: without its mode nothing is attached. To be taken away as such.
                    found[uid] = Found(Capture.PREPARED, 0)
            return found

        return await self._call(work)

    def _upgrade(self, former: Path) -> None:
        if not former.is_dir():
            return

        def take_over(uid: str) -> None:
            _check(lambda error: _lib.capture_upgrade(str(former / uid).encode(), self._pins(uid), error))
            log.event("pins_upgraded", pod=uid, layout=_LAYOUT)

        for uid in sorted(os.listdir(former)):
            if uid != _NODE:
                take_over(uid)
        _check(lambda error: _lib.kubelet_detach(str(former / _NODE).encode(), error))
        former.rmdir()

    def _read(self, uid: str) -> Found:
        mode, inode = _ffi.new("uint32_t *"), _ffi.new("uint64_t *")
        _check(lambda error: _lib.capture_read(self._pins(uid), mode, inode, error))
        return Found(_capture_of(mode[0], inode[0]), int(inode[0]))

    async def prepare(self, uid: str, addresses: tuple[str, ...]) -> None:
        """Makes maps and pins, attaches nothing. Done already: the addresses are brought up to date."""
        text = ",".join(addresses).encode()
        await self._call(lambda: _check(lambda error: _lib.capture_prepare(self._pins(uid), text, error)))

    async def set_mode(self, uid: str, netns: Netns, interface: str, mode: Capture) -> None:
        """Attaches, or changes, to STRICT, LENIENT or DRAINING. Raises NotYet."""

        def work(fd: int, error: Any) -> int:
            return int(_lib.capture_set_mode(self._pins(uid), fd, interface.encode(), _MODES[mode], error))

        await self._with(netns, work)

    async def door(self, uid: str, netns: Netns, interface: str) -> bool:
        """Keeps the pod's door, so that flows between it and other pods of this node may pass natively. True: there was
        none, and now there is. Raises CaptureError where there can be none; the pod is captured all the same.
        """

        def work(fd: int, error: Any) -> int:
            return int(_lib.capture_door(self._pins(uid), self._host, fd, interface.encode(), error))

        return bool(await self._with(netns, work))

    async def detach(self, uid: str, netns: Netns | None, interface: str) -> None:
        """Takes everything out; also where the namespace is gone (None)."""

        def work(fd: int, error: Any) -> int:
            return int(_lib.capture_detach(self._pins(uid), self._host, fd, interface.encode(), error))

        await self._with(netns, work)

    async def verify(self, uid: str, netns: Netns | None, interface: str) -> Verified:
        """Compares what should be attached with what is; without a namespace only the listeners are looked at."""

        def work(fd: int, error: Any) -> int:
            return int(_lib.capture_verify(self._pins(uid), fd, interface.encode(), error))

        bits = await self._with(netns, work) if netns is not None else 0
        missing = ", ".join(word for bit, word in _MISSING.items() if bits & bit)
        if bits & _lib.CAPTURE_NO_PINS:
            return Verified(missing, listeners=False, pins=False)
        slots = await self._call(lambda: _check(lambda error: _lib.capture_listeners(self._pins(uid), error)))
        return Verified(missing, slots & _ALL_SLOTS == _ALL_SLOTS)

    async def old(self, uid: str, netns: Netns) -> int:
        """Connections from before the enrolment that are still open."""
        return await self._with(netns, lambda fd, error: int(_lib.capture_old(self._pins(uid), fd, error)))

    async def held(self, uid: str, netns: Netns) -> int:
        """Connections between engine and application that would be cut by a detach, also those that only the kernel
        still delivers.
        """
        return await self._with(netns, lambda fd, error: int(_lib.capture_held(self._pins(uid), fd, error)))

    async def counters(self, uid: str) -> Mapping[str, int]:
        """Decisions of the programs, by name."""

        def work() -> dict[str, int]:
            values = _ffi.new(f"uint64_t[{_lib.COUNT_MAX}]")
            count = _check(lambda error: _lib.capture_counters(self._pins(uid), values, _lib.COUNT_MAX, error))
            return {_ffi.string(_lib.capture_counter_name(i)).decode(): int(values[i]) for i in range(count)}

        return await self._call(work)

    async def kubelet_attach(self, cgroup: Path) -> bool:
        """Notes the probes that are sent from this cgroup2 directory. True: it was not so before, and no port is
        known.
        """
        path = str(cgroup).encode()
        return await self._call(lambda: bool(_check(lambda error: _lib.kubelet_attach(self._node(), path, error))))

    async def kubelet_ports(self, ports: Collection[tuple[str, int]], exact: bool) -> None:
        """Which (address, port) may be probed; port 0 names an enrolled pod. `exact`: and no others from here on."""
        made = _ffi.new("struct kubelet_port[]", max(1, len(ports)))
        for each, (address, port) in zip(made, ports, strict=False):
            try:
                ip = ipaddress.ip_address(address)
            except ValueError as err:
                raise CaptureError(f"ports that are probed: {err}") from None
            _ffi.memmove(each.ip, bytes(10) + b"\xff\xff" + ip.packed if ip.version == 4 else ip.packed, 16)
            each.port = port
        await self._call(
            lambda: _check(lambda error: _lib.kubelet_ports(self._node(), made, len(ports), int(exact), error))
        )

    async def kubelet_detach(self) -> None:
        """No probe is told from other clear text any more."""
        await self._call(lambda: _check(lambda error: _lib.kubelet_detach(self._node(), error)))

    async def kubelet_counters(self) -> Mapping[str, int]:
        """SYNs of the kubelet to enrolled pods, by result. Raises CaptureError where nothing is attached."""

        def work() -> dict[str, int]:
            values = _ffi.new(f"uint64_t[{_lib.KUBELET_MAX}]")
            _check(lambda error: _lib.kubelet_counters(self._node(), values, _lib.KUBELET_MAX, error))
            return {name: int(values[number]) for number, name in _NOTES.items()}

        return await self._call(work)

    @asynccontextmanager
    async def maps(self, uid: str, native: bool = False) -> AsyncIterator[tuple[int, ...]]:
        """File descriptors of `listeners` and `engine_sk`, closed at the end; `native`: and of what the engine needs to
        vouch for flows.
        """
        listeners, engine_sk, vouch = _ffi.new("int *"), _ffi.new("int *"), _ffi.new("int[]", _lib.VOUCH_FDS)
        await self._call(lambda: _check(lambda error: _lib.capture_maps(self._pins(uid), listeners, engine_sk, error)))
        fds = [int(listeners[0]), int(engine_sk[0])]
        try:
            if native:
                await self._call(lambda: _check(lambda error: _lib.capture_vouch(self._pins(uid), vouch, error)))
                fds += list(vouch)
            yield tuple(fds)
        finally:
            for fd in fds:
                os.close(fd)

    async def sweep(self, uid: str, netns: Netns | None) -> None:
        """Forgets SYNs of vouched flows that need not be remembered any more."""
        await self._with(netns, lambda fd, error: int(_lib.capture_sweep(self._pins(uid), fd, error)))

    async def sweep_notes(self) -> None:
        """Takes out what nobody took; also where there are no pods."""
        await self._call(lambda: _check(lambda error: _lib.capture_sweep_notes(self._node(), error)))

    def _node(self) -> bytes:
        return str(self._directory / _NODE).encode()

    def _pins(self, uid: str) -> bytes:
        if not uid or "/" in uid or uid.startswith(".") or uid == _NODE:
            raise CaptureError(f"not a pod's UID: {uid[:64]!r}")
        return str(self._directory / uid).encode()

    async def _call(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _with(self, netns: Netns | None, work: Callable[[int, Any], int]) -> int:
        """Calls the loader with a netns (-1: there is none) of which nobody else closes the descriptor."""
        fd = -1 if netns is None else os.dup(netns.fd)
        try:
            return await self._call(lambda: _check(lambda error: work(fd, error)))
        finally:
            if fd >= 0:
                os.close(fd)


def probe() -> Iterator[tuple[str, str, str]]:
    """Loads every program once, alone, and throws it away: (what it is, the problem or "", advice)."""
    name = _ffi.new("const char **")
    error = _ffi.new("char[]", _lib.CAPTURE_ERROR_LEN)
    number = 0
    while (result := _lib.capture_probe(number, name, error)) != -errno.ERANGE:
        problem = _ffi.string(error).decode("utf-8", "replace") if result < 0 else ""
        yield (
            _ffi.string(name[0]).decode(),
            problem,
            "a kernel of 5.15 or newer with BPF, and CAP_BPF and CAP_NET_ADMIN",
        )
        number += 1


def native_problem() -> str:
    """What this kernel lacks for native flows between pods of one node, "" for nothing."""
    try:
        _check(_lib.capture_native)
    except CaptureError as err:
        return str(err)
    return ""


def require(directory: Path) -> None:
    """Raises CaptureError where this kernel, what this process may do, or the place for pins is not enough. Makes
    nothing."""
    _require_bpffs(directory)
    for name, problem, advice in probe():
        if problem:
            raise CaptureError(f"BPF {name} cannot be loaded: {problem}; needed: {advice}")


def _require_bpffs(directory: Path) -> None:
    if _filesystem(directory) != "bpf":
        raise CaptureError(f"{directory} is not on a bpffs: mount -t bpf bpf /sys/fs/bpf, or give another --bpf-dir")


def _check(call: Callable[[Any], int]) -> int:
    """Calls the loader. Raises CaptureError with its line, NotYet for EAGAIN."""
    error = _ffi.new("char[]", _lib.CAPTURE_ERROR_LEN)
    result = int(call(error))
    if result < 0:
        text = _ffi.string(error).decode("utf-8", "replace") or os.strerror(-result)
        raise (NotYet if result == -errno.EAGAIN else CaptureError)(text)
    return result


def _capture_of(mode: int, inode: int) -> Capture:
    """NOTING is an enrolment that was cut off: as in DRAINING, some connections may be the engine's, some not."""
    if inode == 0:
        return Capture.PREPARED
    for capture, number in _MODES.items():
        if number == mode:
            return capture
    return Capture.DRAINING


def _filesystem(path: Path) -> str:
    """Type of the file system that a path (that need not exist) is on."""
    best, kind = "", ""
    text = str(path.absolute())
    with open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            fields = line.split(" ")
            point = fields[4]
            if len(point) >= len(best) and (text + "/").startswith(point.rstrip("/") + "/"):
                best, kind = point, fields[fields.index("-") + 1]
    return kind
