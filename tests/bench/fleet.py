"""The claim of the field: a node of 20 pods with an Envoy sidecar each against the same node with one sidestep.

The pods on node1 send 64 B round trips at a fixed rate to one server on node2, all at once, the same in both; the
plain network carries them too. Memory is that of node1's proxies; CPU is the whole machine's, for one request.
"""

import json
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.bench.envoy import sidecars
from tests.bench.load import LoadError, Sample, build, sample
from tests.bench.machine import Cpu, pss_mib, worked
from tests.bench.results import spread
from tests.bench.rows import LOAD_PORT, Row
from tests.bench.side import SERVERS, lab, namespace, pod, sleeper
from tests.bench.targets import EnvoyTarget, Sidestep, Target

PODS = 20
RATE = 4000.0  # requests per second, of all pods together
ROW = Row("64 B at a fixed rate", ("open", str(RATE / PODS), "64", "1"))
LESS = 0.95  # of the sidecars' memory


def _objects(mode: str, pods: Sequence[str]) -> list[dict[str, Any]]:
    serve = {"name": "load", "image": "host", "command": [str(build()), "serve", str(LOAD_PORT)]}
    objects = [namespace(mode), *pod(SERVERS["across"], "node2", [serve])]
    for name in pods:
        objects += sleeper(name)
    return objects


@contextmanager
def _targets(folder: Path, pods: Sequence[str]) -> Iterator[list[Target]]:
    with ExitStack() as stack:
        plain = stack.enter_context(lab(folder, "f", _objects("none", pods), mesh=False))
        mesh = stack.enter_context(lab(folder, "g", _objects("ambient", pods), mesh=True))
        pair = stack.enter_context(sidecars(folder, plain, pods, SERVERS["across"], [LOAD_PORT]))
        yield [Target(plain), EnvoyTarget(plain, pair), Sidestep(mesh)]


def _run(target: Target, pods: Sequence[str], seconds: float) -> tuple[list[Sample], Cpu]:
    """All pods at once. Returns their samples, and CPU for one request. Raises LoadError."""
    address, port = target.to("across", LOAD_PORT)
    link, counts, before = target.side.link_bytes(), target.counts(), worked()
    running = [
        subprocess.Popen(
            [*target.side.enter(name), str(build()), *ROW.words, address, str(port), str(seconds)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in pods
    ]
    said = [process.communicate(timeout=seconds + 60)[0] for process in running]
    cpu = worked() - before
    samples = []
    for text in said:
        found = json.loads(text) if text else {"errors": 1, "error": "it said nothing"}
        if found["errors"]:
            raise LoadError(f"{target.name}: {PODS} pods: {found['error']}")
        samples.append(sample(ROW, found, cpu))
    crossed = target.side.link_bytes() - link
    grown = [after - first for first, after in zip(counts, target.counts(), strict=True)]
    wrong = target.wrong("across", len(pods), grown)
    if crossed < 2 * sum(each.total_bytes for each in samples):
        wrong = f"{crossed} bytes crossed the link"
    if wrong:
        raise LoadError(f"{target.name}: {PODS} pods: {wrong}")
    return samples, cpu.over(sum(each.total_ops for each in samples))


def node_mib(target: Target, pods: Sequence[str]) -> float:
    """PSS of the proxies of node1: those of its pods, or agent and engine."""
    ours = {f"envoy, {name}" for name in pods} | {"agent, node1", "engine, node1"}
    return pss_mib(*(pid for name, pids in target.processes().items() if name in ours for pid in pids))


def fleet(folder: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """Target -> memory, CPU of a request, latencies. Raises LoadError when a run had an error or went another way."""
    pods = [f"client{number}" for number in range(PODS)]
    runs: dict[str, list[tuple[list[Sample], Cpu]]] = {}
    with _targets(folder, pods) as targets:
        for _ in range(rounds):
            for target in targets:
                runs.setdefault(target.name, []).append(_run(target, pods, seconds))
        memory = {target.name: round(node_mib(target, pods), 1) for target in targets}
    found: dict[str, Any] = {
        "pods": PODS,
        "rate": RATE,
        "less": round(1 - memory["sidestep"] / memory["envoy"], 4),
        "targets": {},
    }
    for name, each in runs.items():
        found["targets"][name] = {
            "memory_mib": memory[name],
            "cpu_us": spread([cpu.all * 1e6 for _, cpu in each]),
            "cpu_split": {
                part: round(statistics.median(getattr(cpu, part) for _, cpu in each) * 1e6, 2)
                for part in ("user", "system", "softirq")
            },
            "p50_us": spread([statistics.median(one.p50_ns for one in samples) / 1e3 for samples, _ in each]),
            "p99_us": spread([max(one.p99_ns for one in samples) / 1e3 for samples, _ in each]),
            "carried": round(statistics.median(sum(one.rate for one in samples) for samples, _ in each), 1),
        }
    return found
