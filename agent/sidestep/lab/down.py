"""`sidestep lab down`: leaves no process, namespace, mount, pin, rule or file of a lab.

Works from the name alone and asks nobody: whatever of the lab was killed, in whatever half-made state it is. What ends
first is who could start something again: the lab's whole cgroup is killed at once, then who sits in its namespaces,
then who was recorded. Then namespaces (rules die with them), pins, mounts, files.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from sidestep.lab import keeper, network
from sidestep.lab.cluster import BPFFS, LABS, NETNS_DIR, LabError, cgroup2, check_name, locked
from sidestep.lab.sandbox import kill_cgroup, remove_cgroup

DEADLINE_S = 20.0


def exists(name: str) -> bool:
    """Anything of a lab of that name is there."""
    return any(True for _ in leftovers(name))


def down(name: str) -> list[str]:
    """Takes everything away; more than once does no harm. Returns what is left (nothing, or the machine is broken)."""
    check_name(name)
    state = LABS / name
    cgroup = cgroup2() / f"sidestep-lab-{name}"
    nodes = _nodes(name)
    _kill(name, state, cgroup, nodes)
    deadline = time.monotonic() + DEADLINE_S
    while not remove_cgroup(cgroup) and time.monotonic() < deadline:
        kill_cgroup(cgroup)
        time.sleep(0.02)
    for pin in _pod_pins(state):
        if network.netns_inode(pin):
            subprocess.run(["umount", "-l", str(pin)], capture_output=True, timeout=30)
    network.remove(name, nodes)
    for directory in _bpf_dirs(name):
        shutil.rmtree(directory, ignore_errors=True)
    _unmount(state)
    with locked():
        shutil.rmtree(state, ignore_errors=True)
    while (left := list(leftovers(name))) and time.monotonic() < deadline:
        time.sleep(0.05)  # processes that were killed are gone when the kernel has taken their memory apart
    return left


def leftovers(name: str) -> Iterator[str]:
    """What is there of a lab, one line each."""
    state = LABS / name
    if state.exists():
        yield f"directory {state}"
    for node in (*_nodes(name), "cp"):
        if (NETNS_DIR / f"{name}-{node}").exists():
            yield f"namespace {name}-{node}"
    for directory in _bpf_dirs(name):
        yield f"pins {directory}"
    if Path(f"/sys/class/net/{name}-api").exists():
        yield f"interface {name}-api"
    with contextlib.suppress(LabError):
        cgroup = cgroup2() / f"sidestep-lab-{name}"
        if cgroup.exists():
            yield f"cgroup {cgroup}"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        if line.split()[1].startswith(f"{state}/") or line.split()[1] == str(state):
            yield f"mount {line.split()[1]}"


def _nodes(name: str) -> list[str]:
    """Node names, from the namespaces that are there."""
    prefix = f"{name}-node"
    try:
        return sorted(entry[len(name) + 1 :] for entry in os.listdir(NETNS_DIR) if entry.startswith(prefix))
    except OSError:
        return []


def _bpf_dirs(name: str) -> list[Path]:
    return sorted(BPFFS.glob(f"sidestep-{name}-node*"))


def _pod_pins(state: Path) -> list[Path]:
    return sorted(state.glob("node*/netns/*"))


def _kill(name: str, state: Path, cgroup: Path, nodes: list[str]) -> None:
    kill_cgroup(cgroup)
    _kill_members(cgroup)  # a kernel before 5.14 has no cgroup.kill
    inodes = {network.netns_inode(NETNS_DIR / f"{name}-{node}") for node in (*nodes, "cp")}
    inodes |= {network.netns_inode(pin) for pin in _pod_pins(state)}
    inodes -= {0, network.netns_inode(Path("/proc/self/ns/net")), network.netns_inode(Path("/proc/1/ns/net"))}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{entry}/ns/net").st_ino in inodes:
                    os.kill(int(entry), signal.SIGKILL)
    for path in state.glob("running/*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            found = json.loads(path.read_text())
            if int(found["start"]) and keeper.start_time(int(found["pid"])) == int(found["start"]):
                os.kill(int(found["pid"]), signal.SIGKILL)


def _kill_members(cgroup: Path) -> None:
    for procs in cgroup.rglob("cgroup.procs"):
        with contextlib.suppress(OSError):
            for pid in procs.read_text().split():
                with contextlib.suppress(OSError):
                    os.kill(int(pid), signal.SIGKILL)


def _unmount(state: Path) -> None:
    """Every mount at or below the directory, the last one first."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    for mount in reversed([line.split()[1] for line in lines]):
        if mount == str(state) or mount.startswith(f"{state}/"):
            subprocess.run(["umount", "-l", mount], capture_output=True, timeout=30)
