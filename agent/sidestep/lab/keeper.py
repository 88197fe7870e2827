"""Keeps the lab's processes running: what a DaemonSet, a Deployment and an init system do in a real cluster.

`sidestep lab up` writes `processes.json` and starts one keeper; the keeper starts every process in its network
namespace and cgroup as soon as the files it needs are there, and starts it again when it ends, after 0.1 to 5 s. Pids
are recorded with start times in `running/`, so that `lab status` and `lab down` need no keeper. Logs are bounded.
"""

import asyncio
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

BACKOFF_S = (0.1, 0.5, 1.0, 2.0, 5.0)
STEADY_S = 30.0  # who lived that long starts again with the shortest pause
LOG_BYTES = 16 << 20
LOG_KEEP = 1 << 20
OPEN_FILES = 1 << 20

_SPAWN = 'echo 0 > "$1/cgroup.procs" && net="$2" && shift 2 && exec nsenter --net="$net" -- "$@"'


@dataclass(frozen=True, slots=True)
class Process:
    """One process to keep. `needs`: files that must exist before it is started. `once`: a process that keeps its
    state in memory (the API) is not started again: its successor would know nothing of what runs.
    """

    name: str
    netns: str
    cgroup: str
    argv: tuple[str, ...]
    needs: tuple[str, ...]
    log: str
    once: bool = False


@dataclass(frozen=True, slots=True)
class Running:
    """What `running/NAME.json` says. `start` tells the process from a later one with its pid."""

    pid: int
    start: int
    restarts: int
    alive: bool


def start_time(pid: int) -> int:
    """Field 22 of /proc/PID/stat; 0 where there is no such process, or only a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    fields = text[text.rindex(")") + 2 :].split()
    return 0 if fields[0] in "ZX" else int(fields[19])


def save(path: Path, processes: Sequence[Process]) -> None:
    """Writes the list for the keeper."""
    path.write_text(json.dumps([asdict(process) for process in processes], indent=1) + "\n")


def running(state: Path, name: str) -> Running | None:
    """What is known about a process; None before its first start."""
    try:
        found = json.loads((state / "running" / f"{name}.json").read_text())
        pid, start = int(found["pid"]), int(found["start"])
        return Running(pid, start, int(found["restarts"]), start_time(pid) == start)
    except (OSError, ValueError, KeyError):
        return None


def record(state: Path, name: str, pid: int, restarts: int) -> None:
    """Notes a pid with its start time."""
    directory = state / "running"
    directory.mkdir(mode=0o700, exist_ok=True)
    fresh = directory / f".{name}.json"
    fresh.write_text(json.dumps({"pid": pid, "start": start_time(pid), "restarts": restarts}) + "\n")
    os.replace(fresh, directory / f"{name}.json")


def bound(log: Path, limit: int, keep: int) -> None:
    """Cuts a log that somebody appends to: the last `keep` bytes move to LOG.old."""
    try:
        if log.stat().st_size <= limit:
            return
        with open(log, "r+b") as file:
            file.seek(-keep, os.SEEK_END)
            log.with_name(f"{log.name}.old").write_bytes(file.read(keep))
            file.truncate(0)
    except OSError:
        return


def _exist(paths: Sequence[str]) -> bool:
    return all(Path(path).exists() for path in paths)


def _log(process: Process) -> BinaryIO:
    return open(process.log, "ab")


def read(path: Path) -> list[Process]:
    """What `save` wrote."""
    return [
        Process(
            item["name"],
            item["netns"],
            item["cgroup"],
            tuple(item["argv"]),
            tuple(item["needs"]),
            item["log"],
            item["once"],
        )
        for item in json.loads(path.read_text())
    ]


async def _keep(state: Path, process: Process) -> None:
    restarts, pause = 0, 0
    while not _exist(process.needs):
        await asyncio.sleep(0.05)
    while True:
        with _log(process) as log:
            child = await asyncio.create_subprocess_exec(
                "sh", "-c", _SPAWN, "keeper", process.cgroup, process.netns, *process.argv,
                stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        started = time.monotonic()
        record(state, process.name, child.pid, restarts)
        status = await child.wait()
        with _log(process) as log:
            log.write(f"keeper: {process.name} ended with status {status}\n".encode())
        if process.once:
            return
        pause = 0 if time.monotonic() - started >= STEADY_S else pause
        await asyncio.sleep(BACKOFF_S[min(pause, len(BACKOFF_S) - 1)])
        pause += 1
        restarts += 1


async def _bound_logs(processes: Sequence[Process]) -> None:
    while True:
        await asyncio.sleep(5)
        for process in processes:
            bound(Path(process.log), LOG_BYTES, LOG_KEEP)


def _raise_limits() -> None:
    """As many open files as may be: engines hold two per connection."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (max(hard, OPEN_FILES), hard):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
            return
        except (OSError, ValueError):
            continue


async def keep(state: Path) -> None:
    """Runs until it is killed: `lab down` ends processes by itself."""
    os.umask(0o022)  # what pods are to read must not depend on who started the lab
    _raise_limits()
    processes = read(state / "processes.json")
    record(state, "keeper", os.getpid(), 0)
    async with asyncio.TaskGroup() as group:
        for process in processes:
            group.create_task(_keep(state, process), name=process.name)
        group.create_task(_bound_logs(processes), name="logs")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for `lab up`
    asyncio.run(keep(Path(sys.argv[1])))
