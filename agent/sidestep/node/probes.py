"""The kubelet exemption: probes of this node's kubelet reach the application as they would without the mesh.

A program in the kubelet's own cgroup2 directory notes their SYNs (bpf/kubelet.bpf.c); the programs in a pod hand a
noted SYN to the application. Here: which directory that is, which ports of which pods may be probed, and that the
program stays attached. Program, ports and notes are pinned, so nothing changes while no agent is there.

Everything in doubt means no exemption, never a wider one: then probes are clear text without identity like any other,
and are refused where an identity is required. The directory is the one that is given, or that of the process `kubelet`
if there is exactly one in this network namespace, of root, and in no pod's cgroup. The root directory is everybody's.
"""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidestep import log
from sidestep.node.capture import CaptureError, Captures

SEARCH_S = 10.0  # between looks at all processes, while there is no kubelet
LOST_S = 60.0  # one that was there comes back soon: so long it is looked for whenever asked
NAME = "kubelet"
ADVICE = "give --kubelet-cgroup DIR; until then probes are refused where PeerAuthentication is STRICT"

Ports = frozenset[tuple[str, int]]


class NoCgroup(Exception):
    """There is no directory of the kubelet; says why. `absent`: there is no kubelet at all."""

    def __init__(self, why: str, absent: bool = False) -> None:
        super().__init__(why)
        self.absent = absent


@dataclass(frozen=True, slots=True)
class Found:
    """The kubelet's process, its cgroup2 path as /proc says it, and the directory."""

    pid: int
    path: str
    directory: Path


class Exemption:
    """Keeps the exemption as it should be. `wanted` says which ports may be probed now, and whether that is all
    (False: pods are still unknown, so nothing is taken away).
    """

    def __init__(self, captures: Captures, given: Path | None, wanted: Callable[[], tuple[Ports, bool]]) -> None:
        self._captures = captures
        self._given = given
        self._wanted = wanted
        self._lock = asyncio.Lock()
        self._found: Found | None = None
        self._search_due = 0.0
        self._eager_until = 0.0
        self._why_not = ""
        self._ports: tuple[Ports, bool] | None = None
        self._attached: bool | None = None
        self.cgroup = ""
        self.reason = "not looked for yet"

    def status(self) -> dict[str, Any]:
        """For people: `active` False means that probes are like any other clear text, and `reason` says why."""
        return {"cgroup": self.cgroup, "active": not self.reason, "reason": self.reason}

    async def keep(self) -> None:
        """Looks at everything and puts right what is not as it should be. Never fails: what cannot be had is told."""
        async with self._lock:
            try:
                directory = await self._directory()
                ports, complete = self._wanted()
                self.cgroup = str(directory)
                if ports:
                    await self._attach(directory, ports, complete)
                elif complete:
                    await self._detach()
                self._tell("")
            except NoCgroup as err:
                self.cgroup = ""
                self._tell(str(err))
                await self._quietly_detach()
            except (CaptureError, OSError) as err:
                self._ports = None
                self._tell(str(err))

    async def _attach(self, directory: Path, ports: Ports, complete: bool) -> None:
        new = await self._captures.kubelet_attach(directory)
        if new:
            log.event("probes_exempt", cgroup=directory)
        if new or self._ports != (ports, complete):
            await self._captures.kubelet_ports(ports, complete)
            self._ports = ports, complete
        self._attached = True

    async def _detach(self) -> None:
        if self._attached is not False:
            await self._captures.kubelet_detach()
            self._attached, self._ports = False, None

    async def _quietly_detach(self) -> None:
        try:
            await self._detach()
        except CaptureError as err:
            log.event("probes_still_exempt", error=err)

    def _tell(self, reason: str) -> None:
        if reason not in ("", self.reason):
            log.event("probes_not_exempt", level="WARN", reason=reason, hint=ADVICE)
        self.reason = reason

    async def _directory(self) -> Path:
        if self._given is not None:
            return await asyncio.to_thread(checked, self._given)
        now = asyncio.get_running_loop().time()
        if self._found is not None and _still(self._found):
            return self._found.directory
        if self._found is not None:
            self._found, self._eager_until = None, now + LOST_S
        if self._eager_until < now < self._search_due:
            raise NoCgroup(self._why_not)
        try:
            self._found = await asyncio.to_thread(search)
        except NoCgroup as err:
            self._search_due, self._why_not = now + SEARCH_S, str(err)
            raise
        return self._found.directory


def checked(directory: Path) -> Path:
    """The directory, where it may be the kubelet's. Raises NoCgroup."""
    if "kubepods" in str(directory.resolve()):
        raise NoCgroup(f"{directory} is a pod's cgroup")
    if not directory.is_dir():
        raise NoCgroup(f"{directory} is not there")
    # What every directory of cgroup2 has, but for the root; version 1 has it nowhere.
    if not (directory / "cgroup.type").exists():
        raise NoCgroup(f"{directory} is no cgroup2 directory, or its root")
    return directory


def search() -> Found:
    """The kubelet's process of this node and its directory. Raises NoCgroup, or OSError where it ends meanwhile."""
    mount = _mount(Path("/proc/self/mountinfo").read_text())
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit() and _is_kubelet(int(name))]
    if not pids:
        raise NoCgroup("no kubelet found", absent=True)
    if len(pids) > 1:
        raise NoCgroup(f"there are {len(pids)} processes {NAME} of root beside the agent")
    path = _unified(Path(f"/proc/{pids[0]}/cgroup").read_text())
    if path in ("", "/") or ".." in path.split("/"):
        raise NoCgroup(f"the kubelet's cgroup2 directory is {path or 'unknown'}")
    directory = checked(mount / path.lstrip("/"))
    if str(pids[0]) not in (directory / "cgroup.procs").read_text().split():
        raise NoCgroup(f"the kubelet is not in {directory}: cgroup2 of the host is not what is mounted here")
    return Found(pids[0], path, directory)


def _still(found: Found) -> bool:
    try:
        return _is_kubelet(found.pid) and _unified(Path(f"/proc/{found.pid}/cgroup").read_text()) == found.path
    except OSError:
        return False


def _mount(mountinfo: str) -> Path:
    """Where the whole of cgroup2 is mounted."""
    for line in mountinfo.splitlines():
        fields = line.split(" ")
        if fields[fields.index("-") + 1] == "cgroup2" and fields[3] == "/":
            return Path(fields[4])
    raise NoCgroup("cgroup2 is not mounted")


def _is_kubelet(pid: int) -> bool:
    """A process that may be this node's kubelet: anybody can call himself so, but not root of the node's namespace
    outside of every pod.
    """
    process = Path("/proc") / str(pid)
    try:
        return (
            (process / "comm").read_text().strip() == NAME
            and "\nUid:\t0\t0\t0\t0\n" in (process / "status").read_text()
            and (process / "ns/net").stat().st_ino == Path("/proc/self/ns/net").stat().st_ino
            and "kubepods" not in (process / "cgroup").read_text()
        )
    except OSError:
        return False


def _unified(cgroup: str) -> str:
    """The cgroup2 path in the contents of /proc/PID/cgroup, "" where there is none."""
    return next((line[3:] for line in cgroup.splitlines() if line.startswith("0::")), "")
