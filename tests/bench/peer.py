"""Any other proxy as a target: a command that takes over the pods of a plain lab.

The contract (CONTRACT, shown by --help) is all that the benchmark knows of it.
"""

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

from tests.bench.load import LoadError
from tests.bench.machine import session
from tests.bench.rows import PLACES, PORTS
from tests.bench.side import Side

START_S, STOP_S = 120.0, 20.0
CONTRACT = """\
--peer COMMAND: another proxy, in a lab of its own without the mesh. COMMAND is run by sh, in a session of its own, and
finds in its environment:

  BENCH_LAB                            the lab's name (for `sidestep lab exec` and the like)
  BENCH_NODE1_NETNS, BENCH_NODE2_NETNS the nodes' network namespaces (paths)
  BENCH_CLIENT_NETNS, _IP              the pod on node1 in which the load runs
  BENCH_SERVER_NETNS, _IP              the pod on node2 with the servers
  BENCH_NEAR_NETNS, _IP                the pod on node1 with the same servers
  BENCH_PORTS                          the servers' ports, with spaces between

It puts its proxy between them and says on its standard output, line by line:

  to PLACE PORT ADDRESS PORT           where the load shall connect instead of that port of PLACE's server (across:
                                       BENCH_SERVER_IP, local: BENCH_NEAR_IP); without it that is where it connects
  skip PLACE                           it does nothing there: no rows
  version TEXT                         for the report
  ready                                the load may begin (within 120 s)

and goes on until SIGTERM. Its processes are those of its session: their memory is reported, and whoever is left 20 s
after SIGTERM is killed. What it changed in the namespaces goes with the lab."""


@dataclass(slots=True)
class Peer:
    """One that is ready. `to`: (place, port) -> where the load connects."""

    process: "subprocess.Popen[bytes]"
    to: dict[tuple[str, int], tuple[str, int]]
    places: tuple[str, ...]
    version: str

    def pids(self) -> dict[str, list[int]]:
        """All of its session."""
        return {"peer": session(self.process.pid)}


def read(lines: Iterator[str]) -> tuple[dict[tuple[str, int], tuple[str, int]], tuple[str, ...], str]:
    """What a peer says until it is ready: where to connect, places, version. Raises LoadError."""
    to: dict[tuple[str, int], tuple[str, int]] = {}
    places, version = list(PLACES), ""
    for line in lines:
        match line.split():
            case ["ready"]:
                return to, tuple(places), version
            case ["to", place, port, address, other] if place in PLACES and int(port) in PORTS:
                to[place, int(port)] = address, int(other)
            case ["skip", place] if place in places:
                places.remove(place)
            case ["version", *words]:
                version = " ".join(words)
            case _:
                raise LoadError(f"the peer said {line!r}, which the contract does not know")
    raise LoadError("the peer ended before it was ready")


def _lines(process: "subprocess.Popen[bytes]") -> Iterator[str]:
    """What it says, line by line, until START_S are over. The pipe is read raw: select() sees no buffer of ours."""
    assert process.stdout is not None
    end, rest = time.monotonic() + START_S, b""
    while select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
        said = os.read(process.stdout.fileno(), 4096)
        if not said:
            return
        *lines, rest = (rest + said).split(b"\n")
        yield from (line.decode() for line in lines)
    raise LoadError(f"the peer was not ready within {START_S:.0f} s")


@contextlib.contextmanager
def peer(side: Side, command: str) -> Iterator[Peer]:
    """Runs it. Raises LoadError."""
    environment = {"BENCH_LAB": side.lab.name, "BENCH_PORTS": " ".join(map(str, PORTS))}
    for name, node in side.nodes.items():
        environment[f"BENCH_{name.upper()}_NETNS"] = node["netns"]
    for pod in ("client", "server", "near"):
        environment[f"BENCH_{pod.upper()}_NETNS"] = side.netns[pod]
        environment[f"BENCH_{pod.upper()}_IP"] = side.addresses[pod]
    process = subprocess.Popen(
        ["sh", "-c", command], stdout=subprocess.PIPE, bufsize=0, start_new_session=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    try:
        yield Peer(process, *read(_lines(process)))
    finally:
        _stop(process)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    for number, patience in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
        for pid in session(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        end = time.monotonic() + patience
        while time.monotonic() < end:
            process.poll()
            if not session(process.pid):
                break
            time.sleep(0.05)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
