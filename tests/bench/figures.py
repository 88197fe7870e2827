"""Single figures beside the rows: readers that do not read, idle connections, enrolment, memory."""

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tests.bench.load import LoadError, build
from tests.bench.machine import node_mib, pss_mib
from tests.bench.results import FAST, OURS
from tests.bench.rows import LOAD_PORT, ROWS
from tests.bench.side import Side
from tests.bench.targets import Target
from tests.bench.verdicts import IDLE as IDLE
from tests.bench.verdicts import STALLED as STALLED

ENROLMENT_S = 60.0


@contextlib.contextmanager
def beside(target: Target, place: str, word: str, count: int, seconds: float) -> Iterator[None]:
    """The load in a mode that goes on by itself (stall, hold), while the block runs. Raises LoadError."""
    address, port = target.to(place, LOAD_PORT)
    command = [*target.side.enter("client"), str(build()), word, str(count), address, str(port), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        if said not in ("full\n", "open\n"):
            raise LoadError(f"{target.name}, {place}: {word} {count}: {said or 'it ended'}")
        yield
        if process.poll() is not None:
            raise LoadError(f"{target.name}, {place}: {word} {count}: its connections ended")
    finally:
        process.kill()
        process.communicate()


def stalled(target: Target, rounds: int, seconds: float) -> list[float]:
    """Rate of one bulk connection beside STALLED readers that do not read, as a share of its rate alone, by round.

    Raises LoadError when a run had an error, or when the readers were not full in time.
    """
    row = next(row for row in ROWS if row.words == ("bulk", "1"))
    shares = []
    for _ in range(rounds):
        alone = target.case(row, "across", seconds)
        with beside(target, "across", "stall", STALLED, seconds + 60):
            shares.append(target.case(row, "across", seconds).rate / alone.rate)
    return shares


def memory(targets: Sequence[Target]) -> dict[str, dict[str, float]]:
    """Target -> process -> PSS in MiB."""
    found = {target.name: target.processes() for target in targets}
    return {
        name: {process: round(pss_mib(*pids), 1) for process, pids in processes.items()}
        for name, processes in found.items()
        if processes
    }


def node(targets: Sequence[Target]) -> dict[str, float]:
    """Agent and engine of node1, of each target that has them, as on a machine of their own: MiB."""
    parts = ("agent, node1", "engine, node1")
    found = {target.name: target.processes() for target in targets}
    return {
        name: node_mib(*(pid for part in parts for pid in processes[part]))
        for name, processes in found.items()
        if parts[0] in processes
    }


def idle(targets: Sequence[Target]) -> list[dict[str, Any]]:
    """What each process grows by for each of IDLE connections that have made one round trip and stay open (KiB). To be
    asked before any load, which leaves free memory in the processes. Raises LoadError."""
    found: list[dict[str, Any]] = []
    for target in targets:
        before = memory([target]).get(target.name, {})
        with contextlib.ExitStack() as stack:
            for place in target.places if before else ():
                # Those of the first place stay: memory given back would be taken again, and seem to cost nothing.
                stack.enter_context(beside(target, place, "hold", IDLE, 60))
                after = memory([target])[target.name]
                grown = {name: round((after[name] - before[name]) * 1024 / IDLE, 2) for name in before}
                found.append({"target": target.name, "place": place, "connections": IDLE, "kib_each": grown})
                before = after
    return found


def idle_worst(found: Sequence[Mapping[str, Any]]) -> float:
    """KiB for each connection in the engine that has the most of them. Raises LoadError where none of ours was
    asked."""
    engines = [
        kib
        for each in found
        if each["target"] in (OURS, FAST)
        for name, kib in each["kib_each"].items()
        if name.startswith("engine")
    ]
    if not engines:
        raise LoadError("no engine was looked at")
    return float(max(engines))


def enrolment(side: Side, rounds: int) -> dict[str, list[float]]:
    """Seconds from the label on the namespace until every pod is enrolled, and from its removal until none is captured
    (the lab's agents wait for no quiet time)."""
    pods = {item["metadata"]["name"] for item in side.lab.pods("bench")}
    took: dict[str, list[float]] = {"release": [], "enrol": []}
    for _ in range(rounds):
        took["release"].append(_toggle(side, None, lambda: side.modes() == {"none"}))
        took["enrol"].append(_toggle(side, "ambient", lambda: side.lab.enrolled("bench") == pods))
    return took


def _toggle(side: Side, label: str | None, done: Callable[[], bool]) -> float:
    started = time.monotonic()
    side.lab.label("bench", label)
    while not done():
        if time.monotonic() > started + ENROLMENT_S:
            raise LoadError(f"label {label}: not every pod within {ENROLMENT_S:.0f} s")
        time.sleep(0.005)
    return time.monotonic() - started
