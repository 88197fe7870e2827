"""The floor as a target: a pair of tests/bench/floor.c for each port, one end in the client's pod, one in the server's.

It has what any pair of sealing proxies of this shape has, and nothing else: what it does is the most that is left to
gain.
"""

import contextlib
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from tests.bench.load import LoadError, compiled
from tests.bench.rows import PORTS
from tests.bench.side import SERVERS, Side

IN, OUT = 10000, 20000  # added to the application's port
TUNNELS = 32  # of each of two workers


class End:
    """One process."""

    def __init__(self, side: Side, pod: str, *words: str) -> None:
        command = [*side.enter(pod), str(compiled("floor", "-lcrypto", "-lpthread")), *words]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.libcrypto = self._line().removeprefix("ready ")

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise LoadError("the floor ended")
        return line

    def flows(self) -> int:
        """Connections that it has carried."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return int(json.loads(self._line())["flows"])

    def stop(self) -> None:
        """Ends it."""
        self.process.kill()
        self.process.communicate()


@dataclass(frozen=True, slots=True)
class Floor:
    """Ends of the pairs: in, out, in, out."""

    ends: tuple[End, ...]

    def flows(self) -> int:
        """Connections, as both ends count them: two for each."""
        return sum(end.flows() for end in self.ends)

    def pids(self) -> dict[str, list[int]]:
        """Of the pair that carries the load."""
        return {"floor, client": [self.ends[0].process.pid], "floor, server": [self.ends[1].process.pid]}


@contextlib.contextmanager
def floor(side: Side) -> Iterator[Floor]:
    """Runs it across the nodes of a plain lab. The load connects to 127.0.0.1, port + IN, in the client's pod."""
    server = SERVERS["across"]
    with contextlib.ExitStack() as stack:
        ends = []
        for port in PORTS:
            address = side.addresses[server]
            end = End(side, server, "out", address, str(port + OUT), "127.0.0.1", str(port))
            stack.callback(end.stop)
            peer = (address, str(port + OUT))
            first = End(side, "client", "in", "127.0.0.1", str(port + IN), *peer, str(TUNNELS))
            stack.callback(first.stop)
            ends += [first, end]
        yield Floor(tuple(ends))
