"""The claim of the field: a node of 20 pods with an Envoy sidecar each against the same node with one sidestep.

The pods on node1 send 64 B round trips at a fixed rate to one server on node2, all at once, the same in both; the
plain network carries them too. Memory is that of node1's proxies; CPU is the whole machine's, for one request.

Twice: `bare`, where both know what the load needs and nothing else; and `mesh`, where there are 500 more services with
three endpoints each. Then a sidecar has what istiod tells it of them by default (tests/bench/envoy.py, `mesh`), and
sidestep's agent has them from its own control plane, which has them from the API. The claim is judged in both.
"""

import asyncio
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sidestep.cli.nodes import find
from sidestep.kube.client import KubeClient
from sidestep.lab.cluster import load
from tests.bench.envoy import ENDPOINTS, NAMESPACES, SERVICES, sidecars
from tests.bench.load import LoadError, Sample, answer, build, sample
from tests.bench.machine import Cpu, node_mib, pss_mib, worked
from tests.bench.results import spread
from tests.bench.rows import LOAD_PORT, Row
from tests.bench.side import SERVERS, Side, lab, namespace, pod, sleeper
from tests.bench.targets import EnvoyTarget, Sidestep, Target
from tests.bench.verdicts import FLEET
from tests.harness.lab import ANNOTATION, LABEL

PODS = FLEET
RATE = 4000.0  # requests per second, of all pods together
ROW = Row("64 B at a fixed rate", ("open", str(RATE / PODS), "64", "1"))
FAR = "far"  # the node of the mesh's other pods: nobody runs it
AT_ONCE = 16  # requests to the API
MESH_S = 90.0


def _objects(mode: str, pods: Sequence[str]) -> list[dict[str, Any]]:
    serve = {"name": "load", "image": "host", "command": [str(build()), "serve", str(LOAD_PORT)]}
    objects = [namespace(mode), *pod(SERVERS["across"], "node2", [serve])]
    for name in pods:
        objects += sleeper(name)
    return objects


def _run(target: Target, pods: Sequence[str], seconds: float) -> tuple[list[Sample], Cpu]:
    """All pods at once. Returns their samples, and CPU for one request. Raises LoadError."""
    address, port = target.to("across", LOAD_PORT)
    link, counts, before = target.side.link_bytes(), target.counts(), worked()
    words = [str(build()), *ROW.words, address, str(port), str(seconds)]
    running: list[subprocess.Popen[str]] = []
    try:
        for name in pods:
            running.append(subprocess.Popen([*target.side.enter(name), *words], stdout=subprocess.PIPE, text=True))
        said = [process.communicate(timeout=seconds + 60)[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    cpu = worked() - before
    samples = []
    for text in said:
        found = answer(text)
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


def proxies(target: Target, pods: Sequence[str]) -> list[int]:
    """The proxies of node1: those of its pods, or agent and engine."""
    ours = {f"envoy, {name}" for name in pods} | {"agent, node1", "engine, node1"}
    return [pid for name, pids in target.processes().items() if name in ours for pid in pids]


def fleet(folder: Path, rounds: int, seconds: float, quick: bool, tell: Callable[[str], None]) -> dict[str, Any]:
    """Kind (bare, mesh) -> target -> memory, CPU of a request, latencies. Raises LoadError when a run had an error or
    went another way."""
    pods = [f"client{number}" for number in range(PODS)]
    found: dict[str, Any] = {"pods": PODS, "rate": RATE, "less": {}, "kinds": {}}
    with ExitStack() as stack:
        tell("fleet: labs come up")
        plain = stack.enter_context(lab(folder, "f", _objects("none", pods), mesh=False))
        mesh = stack.enter_context(lab(folder, "g", _objects("ambient", pods), mesh=True))
        for kind in ("bare", "mesh"):
            tell(f"fleet: {kind}, {PODS} Envoys start")
            services = 0
            if kind == "mesh":
                services = SERVICES // 20 if quick else SERVICES
                asyncio.run(_populate(mesh, services))
                _known(mesh, services)
            with sidecars(folder, plain, pods, SERVERS["across"], [LOAD_PORT], services=services) as pair:
                targets = [Target(plain), EnvoyTarget(plain, pair), Sidestep(mesh)]
                runs: dict[str, list[tuple[list[Sample], Cpu]]] = {target.name: [] for target in targets}
                for number in range(rounds):
                    for target in targets:
                        tell(f"fleet: {kind}, round {number + 1}/{rounds}, {target.name}")
                        runs[target.name].append(_run(target, pods, seconds))
                pids = {target.name: proxies(target, pods) for target in targets}
                memory = {name: round(pss_mib(*each), 1) for name, each in pids.items()}
                own = {name: round(node_mib(*each), 1) for name, each in pids.items()}
            found["less"][kind] = round(100 * (1 - memory["sidestep"] / memory["envoy"]), 2)
            found["kinds"][kind] = {
                "services": services,
                "targets": {
                    name: {"memory_mib": memory[name], "own_mib": own[name], **_entry(each)}
                    for name, each in runs.items()
                },
            }
    return found


def _entry(runs: Sequence[tuple[list[Sample], Cpu]]) -> dict[str, Any]:
    return {
        "cpu_us": spread([cpu.all * 1e6 for _, cpu in runs]),
        "cpu_split": {
            part: round(statistics.median(getattr(cpu, part) for _, cpu in runs) * 1e6, 2)
            for part in ("user", "system", "softirq")
        },
        "p50_us": spread([statistics.median(one.p50_ns for one in samples) / 1e3 for samples, _ in runs]),
        "p99_us": spread([max(one.p99_ns for one in samples) / 1e3 for samples, _ in runs]),
        "carried": round(statistics.median(sum(one.rate for one in samples) for samples, _ in runs), 1),
    }


async def _populate(side: Side, services: int) -> None:
    """The other services: each with ENDPOINTS pods on a node that nobody runs, as their kubelet would have left
    them."""
    gate = asyncio.Semaphore(AT_ONCE)
    async with KubeClient.from_config(load(side.lab.name).kubeconfig) as client:

        async def make(path: str, item: dict[str, Any]) -> None:
            async with gate:
                await client.create(path, item)

        async def endpoint(number: int, which: int) -> None:
            name = f"service-{number}-{which}"
            spec = {"nodeName": FAR, "serviceAccountName": f"service-{number}", "containers": [_CONTAINER]}
            meta = {"name": name, "labels": {"app": f"service-{number}"}, "annotations": {ANNOTATION: "enabled"}}
            await make(f"{_space(number)}/pods", {"metadata": meta, "spec": spec})
            addresses = [{"ip": f"10.{20 + which}.{number >> 8}.{number & 255}"}]
            ready = [{"type": "Ready", "status": "True"}]
            status = {"phase": "Running", "podIP": addresses[0]["ip"], "podIPs": addresses, "conditions": ready}
            async with gate:
                await client.patch(f"{_space(number)}/pods/{name}/status", {"status": status})

        async def service(number: int) -> None:
            name = f"service-{number}"
            await make(f"{_space(number)}/serviceaccounts", {"metadata": {"name": name}})
            ports = [{"name": "http", "port": 80, "targetPort": 8080}]
            await make(
                f"{_space(number)}/services",
                {"metadata": {"name": name}, "spec": {"selector": {"app": name}, "ports": ports}},
            )
            await asyncio.gather(*(endpoint(number, which) for which in range(ENDPOINTS)))

        conditions = [{"type": "Ready", "status": "True"}]
        status = {"conditions": conditions, "addresses": [{"type": "InternalIP", "address": "10.19.0.1"}]}
        labels = {"kubernetes.io/hostname": FAR}
        await make("/api/v1/nodes", {"metadata": {"name": FAR, "labels": labels}, "status": status})
        for number in range(NAMESPACES):
            await make(
                "/api/v1/namespaces", {"metadata": {"name": f"namespace-{number}", "labels": {LABEL: "ambient"}}}
            )
        await asyncio.gather(*(service(number) for number in range(services)))


_CONTAINER = {"name": "main", "image": "none", "command": ["sleep", "1d"]}


def _space(number: int) -> str:
    return f"/api/v1/namespaces/namespace-{number % NAMESPACES}"


def _known(side: Side, services: int) -> None:
    """Waits until every node's agent has them all. Raises LoadError."""
    end = time.monotonic() + MESH_S
    want = services * (1 + ENDPOINTS)
    while True:
        have = [each.ask("/status")["control"]["resources"]["address"] for each in find(side.lab.name)]
        if min(have) >= want:
            return
        if time.monotonic() > end:
            raise LoadError(f"the agents have {have} of {want} records after {MESH_S:.0f} s")
        time.sleep(0.2)
