"""Network namespaces of pods: opened, told apart, found again.

A namespace is told by its inode while somebody holds it open, and by its *cookie* (SO_NETNS_COOKIE), which the
kernel never uses twice. Where a CNI call named it, a *record* under RUN_DIR/pods/ keeps path, inode and cookie, so
that a new agent finds it again; where there is none, a process of the pod leads to it (/proc scan by the pod's UID
in its cgroup).
"""

import ctypes
import errno
import fcntl
import ipaddress
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from sidestep.node.pods import uid_of_cgroup

_NS_GET_NSTYPE = 0xB703
_CLONE_NEWNET = 0x40000000
_SO_NETNS_COOKIE = 71
_LIBC = ctypes.CDLL(None, use_errno=True)

T = TypeVar("T")


class NetnsError(Exception):
    """A network namespace that is not one, is the host's, or cannot be opened. Says which."""


@dataclass(frozen=True, slots=True)
class Record:
    """What is kept about an enrolled pod in RUN_DIR/pods/UID.json. Only what the API cannot tell."""

    uid: str
    namespace: str
    name: str
    service_account: str
    container: str
    interface: str
    netns_path: str
    netns_ino: int
    netns_cookie: int
    addresses: tuple[str, ...]


class Netns:
    """An open network namespace: owns its fd."""

    __slots__ = ("cookie", "fd", "ino", "path")

    def __init__(self, fd: int, path: str) -> None:
        """Takes over fd. Raises NetnsError (and closes it) where it is no network namespace or the agent's own or
        pid 1's.
        """
        self.fd = fd
        self.path = path
        try:
            try:
                if fcntl.ioctl(fd, _NS_GET_NSTYPE) != _CLONE_NEWNET:
                    raise NetnsError(f"{path}: not a network namespace")
            except OSError:
                raise NetnsError(f"{path}: not a network namespace") from None
            self.ino = os.fstat(fd).st_ino
            if self.ino in host_inodes():
                raise NetnsError(f"{path}: the host's network namespace")
            self.cookie = _cookie(fd)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets the namespace go; more than once does no harm."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def open_path(path: str) -> Netns:
    """Opens a namespace by path. Raises NetnsError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as err:
        raise NetnsError(f"{path}: {err.strerror}") from None
    return Netns(fd, path)


def host_inodes() -> set[int]:
    """The namespaces that are never a pod's: the agent's own and pid 1's."""
    found = set()
    for path in ("/proc/self/ns/net", "/proc/1/ns/net"):
        try:
            found.add(os.stat(path).st_ino)
        except OSError:
            continue
    return found


def scan(wanted: Iterable[str]) -> dict[str, Netns]:
    """Finds running pods' namespaces by their processes' cgroups: UID -> Netns, owned by the caller.

    Where a pod has several, that of its oldest process counts (a pod may make namespaces of its own). One pass over
    /proc.
    """
    uids = set(wanted)
    oldest: dict[str, tuple[int, int]] = {}
    if uids:
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            try:
                uid = uid_of_cgroup(Path(f"/proc/{entry}/cgroup").read_text())
                if uid not in uids:
                    continue
                # Field 22 of stat, counted behind the last parenthesis: a command's name may hold anything.
                started = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[19])
            except (OSError, IndexError, ValueError):
                continue
            if uid not in oldest or started < oldest[uid][0]:
                oldest[uid] = (started, int(entry))
    found = {}
    for uid, (_, pid) in oldest.items():
        try:
            found[uid] = open_path(f"/proc/{pid}/ns/net")
        except NetnsError:
            continue
    return found


def search_dir(directory: Path, wanted: Iterable[str]) -> dict[str, Netns]:
    """Finds namespaces that a runtime pinned under `directory` with the pod's UID in the file's name."""
    found = {}
    try:
        names = os.listdir(directory)
    except OSError:
        return {}
    for uid in wanted:
        for name in names:
            if uid in name:
                try:
                    found[uid] = open_path(str(directory / name))
                    break
                except NetnsError:
                    continue
    return found


def owns_address(netns: Netns, addresses: Iterable[str]) -> bool:
    """One of the addresses is local inside: a namespace found by a scan must show that it is the pod's."""

    def bind() -> bool:
        for text in addresses:
            address = ipaddress.ip_address(text)
            family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                try:
                    probe.bind((text, 0))
                    return True
                except OSError as err:
                    if err.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                        raise
        return False

    return _inside(netns.fd, bind)


class Records:
    """RUN_DIR/pods/: one file per enrolled pod, replaced atomically."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = directory

    def load(self) -> dict[str, Record]:
        """Every record that can be read; one that cannot is removed."""
        found = {}
        for path in sorted(self._directory.glob("*.json")):
            try:
                fields = json.loads(path.read_text())
                record = Record(**fields | {"addresses": tuple(fields["addresses"])})
                found[record.uid] = record
            except (OSError, ValueError, TypeError, KeyError):
                path.unlink(missing_ok=True)
        return found

    def save(self, record: Record) -> None:
        """Writes or replaces a record."""
        path = self._path(record.uid)
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(asdict(record)))
        fresh.rename(path)

    def remove(self, uid: str) -> None:
        """Removes a record if there is one."""
        self._path(uid).unlink(missing_ok=True)

    def _path(self, uid: str) -> Path:
        if not uid or not all(c.isalnum() or c in "-_." for c in uid) or uid.startswith("."):
            raise NetnsError(f"not a pod's UID: {uid[:64]!r}")
        return self._directory / f"{uid}.json"


def _cookie(fd: int) -> int:
    """SO_NETNS_COOKIE of a namespace (since Linux 5.14)."""

    def read() -> int:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            return int(struct.unpack("<Q", probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8))[0])

    return _inside(fd, read)


def _inside(fd: int, work: Callable[[], T]) -> T:
    """Runs `work` inside a namespace, in a thread of its own that ends there: no way back is needed, none can fail."""
    outcome: list[T] = []
    failure: list[BaseException] = []

    def enter() -> None:
        try:
            if _LIBC.setns(fd, _CLONE_NEWNET) != 0:
                number = ctypes.get_errno()
                raise NetnsError(f"cannot enter a network namespace: {os.strerror(number)}")
            outcome.append(work())
        except BaseException as err:
            failure.append(err)

    thread = threading.Thread(target=enter, name="netns")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]
