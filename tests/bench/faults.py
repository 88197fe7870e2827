"""Engines that are killed: how soon both ends of a stream know, and how soon a new connection is answered.

A stream across the nodes sends in both directions as fast as it goes; then the engine of one of its nodes is killed.
All times are CLOCK_MONOTONIC, which is one for all namespaces of a machine.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack

from tests.bench.load import LoadError
from tests.bench.rows import LOAD_PORT
from tests.bench.side import SERVERS, Side
from tests.harness.netns import inside

KEYS = ("killed_ends", "killed_back")
PORT = 7300
BACK_S = 20.0

# Says "flows" when it has read a MiB, then how the connection ended and when.
_TALK = """
import socket, sys, time
def talk(s):
    s.settimeout(0.01)
    block, got = bytes(65536), 0
    try:
        while True:
            try: s.send(block)
            except TimeoutError: pass
            try:
                piece = s.recv(1 << 20)
                if not piece: return "a clean end"
                if got < 1 << 20 <= got + len(piece): print("flows", flush=True)
                got += len(piece)
            except TimeoutError: pass
    except ConnectionError: return "reset"
if sys.argv[1] == "serve":
    listener = socket.create_server((sys.argv[2], int(sys.argv[3])))
    print("up", flush=True)
    s = listener.accept()[0]
else:
    s = socket.create_connection((sys.argv[2], int(sys.argv[3])), 20)
how = talk(s)
print(time.monotonic(), how, flush=True)
"""


class End:
    """One end of the stream."""

    def __init__(self, side: Side, pod: str, role: str, port: int) -> None:
        words = [sys.executable, "-c", _TALK, role, side.addresses[SERVERS["across"]], str(port)]
        self.process = subprocess.Popen([*side.enter(pod), *words], stdout=subprocess.PIPE, text=True)

    def line(self) -> str:
        """What it says next. Raises LoadError where it has ended."""
        assert self.process.stdout is not None
        said = self.process.stdout.readline().strip()
        if not said:
            raise LoadError("an end of the stream ended before its time")
        return said

    def stop(self) -> None:
        """Ends it."""
        self.process.kill()
        self.process.communicate()


def killed(side: Side, rounds: int) -> dict[str, list[float]]:
    """Seconds, of every round and both nodes. Raises LoadError."""
    took: dict[str, list[float]] = {key: [] for key in KEYS}
    for number in range(rounds):
        for node in ("node1", "node2"):
            port = PORT + 2 * number + (node == "node2")  # of its own: the last one's may not be free yet
            ends, back = _kill(side, node, port)
            took["killed_ends"].append(ends)
            took["killed_back"].append(back)
    return took


def _kill(side: Side, node: str, port: int) -> tuple[float, float]:
    with ExitStack() as stack:
        ends = []
        for pod, role, said in ((SERVERS["across"], "serve", "up"), ("client", "dial", "flows")):
            ends.append(End(side, pod, role, port))
            stack.callback(ends[-1].stop)
            if ends[-1].line() != said:
                raise LoadError(f"the {role} end did not say {said}")
        if ends[0].line() != "flows":
            raise LoadError("the stream does not flow in both directions")
        victim = engine(side, node)
        at = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        back = _answered(side, at)
        heard = []
        for end in ends:
            when, _, how = end.line().partition(" ")
            if how != "reset":
                raise LoadError(f"the engine of {node} was killed, and a stream had {how}")
            heard.append(float(when) - at)
    if engine(side, node) == victim:
        raise LoadError(f"the engine of {node} was not killed")
    return max(heard), back


def engine(side: Side, node: str) -> int:
    """The pid of a node's engine, as the lab says it."""
    found = next(each for each in side.lab.status()["nodes"] if each["name"] == node)
    return int(found["processes"]["engine"]["pid"])


def _answered(side: Side, since: float) -> float:
    """Seconds from `since` until a new connection across the nodes is answered. Raises LoadError."""
    address = side.addresses[SERVERS["across"]], LOAD_PORT

    def dial() -> float:
        while time.monotonic() < since + BACK_S:
            try:
                with socket.create_connection(address, 5) as s:
                    s.sendall(b"r\0\0\0\0\0\0\x01x")  # tests/bench/load.c: one message of one byte
                    if s.recv(1) == b"x":
                        return time.monotonic() - since
            except OSError:
                time.sleep(0.005)
        raise LoadError(f"no new connection was answered within {BACK_S:.0f} s")

    return inside(side.netns["client"], dial)
