"""A mesh of a hundred thousand workloads and a thousand policies: until it is in force, what a push does to those who
connect meanwhile, what agent and engine have of memory then, and how soon they enrol a pod when they start.

A plain lab gives nodes, pods and the API; agents and engines are started here, as the lab would, with a control plane
that says everything in one response (tests/bench/front.py), as istiod does to a client that knows nothing. The agent of
node1 is told of the large mesh, that of node2 of the two real pods only, so that what is measured is one node's.
"""

import asyncio
import ipaddress
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sidestep.kube.client import KubeClient
from sidestep.lab.cluster import Cluster, Node, load
from sidestep.node.xds import ADDRESS, AUTHORIZATION
from sidestep.wire.pb import discovery_pb2, workload_pb2
from tests.bench import policies
from tests.bench.front import NAME, PORT, Front, Stream
from tests.bench.load import LoadError, answer, build
from tests.bench.machine import node_mib, pss_mib
from tests.bench.rows import LOAD_PORT
from tests.bench.side import Side, lab, namespace, pod, sleeper
from tests.bench.verdicts import POLICIES, WORKLOADS
from tests.harness.engine import SUPERVISE
from tests.harness.lab import ANNOTATION
from tests.tunnel import policy_model as model

KEYS = (
    "start", "start_full", "memory_large", "memory_large_own", "push_full", "push_one", "push_wait_full",
    "push_wait_one", "push_wait_none",
)  # fmt: skip
NAMESPACES = 50
RATE, WINDOW_S = 500, 3.0  # new connections a second while pushes come; for how long
EVERY_S = 0.1  # an incremental push, while there are connections
START_S = 60.0


def workload(number: int, generation: int) -> Any:
    """A record with the fields that a pod of a Deployment behind a Service has; one of its namespace's policies selects
    it."""
    space, application = number % NAMESPACES, f"application-{number % 900}"
    namespace_, name = f"namespace-{space}", f"{application}-5d9c7b8f6b-{number:05d}"
    record = workload_pb2.Address()
    made = record.workload
    made.uid, made.name, made.namespace = f"Kubernetes//Pod/{namespace_}/{name}", name, namespace_
    made.service_account, made.node = f"account-{number % 900}", f"node-{number % 1000}"
    made.tunnel_protocol = workload_pb2.TunnelProtocol.HBONE
    made.addresses.append(bytes([10, 8 + (number >> 16), number >> 8 & 255, number & 255]))
    made.canonical_name, made.canonical_revision = application, f"v{generation}"
    made.workload_name, made.cluster_id = application, "Kubernetes"
    made.authorization_policies.append(f"{namespace_}/p{space + NAMESPACES * (number % 10 * 2 + 1)}")
    ports = made.services[f"{namespace_}/{application}.{namespace_}.svc.cluster.local"].ports
    ports.add(service_port=80, target_port=8080)
    return record


def rules_of(count: int) -> list[Any]:
    """Policies of those namespaces: by turns for all of it and by selector."""
    return [
        {
            **each,
            "namespace": f"namespace-{number % NAMESPACES}",
            "scope": ("Namespace", "WorkloadSelector")[number // NAMESPACES % 2],
        }
        for number, each in enumerate(policies.unrelated(count, NAMESPACES))
    ]


def response(url: str, nonce: str, resources: Sequence[tuple[str, str, bytes]]) -> bytes:
    """A delta response: (name, version, body) of each resource."""
    made = discovery_pb2.DeltaDiscoveryResponse(type_url=url, nonce=nonce)
    for name, version, body in resources:
        resource = made.resources.add(name=name, version=version)
        resource.resource.type_url, resource.resource.value = url, body
    return bytes(made.SerializeToString())


class Mesh:
    """What the front says. `real`: records of the lab's own pods."""

    def __init__(self, real: Sequence[Any], workloads: int) -> None:
        self.real, self.workloads = real, workloads

    def addresses(self, nonce: str, generation: int, only: Sequence[int] | None = None) -> bytes:
        """The real ones and all others, or `only` some of the others."""
        records = [workload(number, generation) for number in (range(self.workloads) if only is None else only)]
        if only is None:
            records += self.real
        version = f"g{generation}"
        return response(ADDRESS, nonce, [(each.workload.uid, version, each.SerializeToString()) for each in records])

    def rules(self, nonce: str, count: int) -> bytes:
        """Policies."""
        found = model.records(rules_of(count))
        return response(AUTHORIZATION, nonce, [(each.name, "1", each.body) for each in found])


class Started:
    """Agent and engine of a node, started here."""

    def __init__(self, folder: Path, cluster: Cluster, node: Node, control: str) -> None:
        folder.mkdir()
        (folder / "engine").mkdir(mode=0o700)
        socket = folder / "engine" / "engine.sock"
        enter = ["nsenter", f"--net={node.netns_path}", "--"]
        sidestep = [sys.executable, "-m", "sidestep"]
        agent = [
            *sidestep, "agent", "--node", node.name, "--node-ip", str(node.ip4),
            "--kubeconfig", str(cluster.kubeconfig),
            "--engine-socket", str(socket), "--run-dir", str(folder / "run"), "--bpf-dir", str(node.bpf_dir),
            "--control", control, "--control-name", NAME, "--pod-netns-dir", str(node.pod_netns_dir),
            "--drain-quiet-s=0",
        ]  # fmt: skip
        for cidr in (cluster.pods4, cluster.pods6, cluster.services4, cluster.services6):
            agent += ["--cluster-cidr", str(cidr)]
        with (folder / "log").open("wb") as log:
            engine = [*enter, str(SUPERVISE), *sidestep, "engine", "--socket", str(socket)]
            self.engine = subprocess.Popen(engine, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            self.agent = subprocess.Popen([*enter, *agent], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.log = folder / "log"
        self.bpf_dir = node.bpf_dir

    def mib(self) -> tuple[float, float]:
        """Of both, once it falls no more (what the work took is given back after it): as on a machine of their own, and
        PSS as it is here."""
        pids = [self.agent.pid, self.engine.pid, *_children(self.engine.pid)]
        before, now = float("inf"), node_mib(*pids)
        while now < before - 0.5:
            time.sleep(0.5)
            before, now = now, node_mib(*pids)
        return now, pss_mib(*pids)

    def stop(self) -> None:
        """Ends both; what they pinned goes."""
        for process in (self.agent, self.engine):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.bpf_dir, ignore_errors=True)


def _children(pid: int) -> list[int]:
    """The engine below its supervisor."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Watch:
    """When a pod of namespace bench was annotated as enrolled, from the API; one connection, asked all the time."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self._cluster, self._path = cluster, f"/api/v1/namespaces/bench/pods/{name}"

    def wait(self, enrolled: bool) -> float:
        """Until it is so. Returns time.monotonic(). Raises LoadError."""
        return asyncio.run(self._wait(enrolled))

    async def _wait(self, enrolled: bool) -> float:
        end = time.monotonic() + START_S
        async with KubeClient.from_config(self._cluster.kubeconfig) as client:
            while time.monotonic() < end:
                found = (await client.get(self._path))["metadata"].get("annotations") or {}
                if (found.get(ANNOTATION) == "enabled") is enrolled:
                    return time.monotonic()
                await asyncio.sleep(0.02)
        raise LoadError(f"{self._path}: {'not enrolled' if enrolled else 'enrolled'} for {START_S:.0f} s")


def record(item: dict[str, Any]) -> Any:
    """A real pod's Workload."""
    made = workload_pb2.Address()
    name, space = item["metadata"]["name"], item["metadata"]["namespace"]
    found = made.workload
    found.uid, found.name, found.namespace = f"Kubernetes//Pod/{space}/{name}", name, space
    found.service_account, found.node = item["spec"]["serviceAccountName"], item["spec"]["nodeName"]
    found.tunnel_protocol = workload_pb2.TunnelProtocol.HBONE
    found.addresses.extend(ipaddress.ip_address(each["ip"]).packed for each in item["status"]["podIPs"])
    found.canonical_name = found.workload_name = name
    found.cluster_id = "Kubernetes"
    return made


class Pusher:
    """What is said to node1's agent while it runs."""

    def __init__(self, mesh: Mesh, stream: Stream) -> None:
        self._mesh, self._stream = mesh, stream
        self._number, self._generation = 0, 0
        self._ready: list[tuple[str, bytes]] = []

    def prepare(self, generation: int) -> None:
        """Makes a full push: every record changed, and the policies."""
        self._generation, self._number = generation, self._number + 1
        nonces = f"w{self._number}", f"p{self._number}"
        rules = self._mesh.rules(nonces[1], POLICIES)
        self._ready = [(nonces[0], self._mesh.addresses(nonces[0], generation)), (nonces[1], rules)]

    def full(self) -> list[float]:
        """Pushes what was prepared. Returns seconds until it was in force."""
        for item in self._ready:
            self._stream.to_say.put(item)
        return [self._stream.acknowledged(*(nonce for nonce, _ in self._ready))]

    def one(self, until: float) -> list[float]:
        """One workload or one policy at a time, until then. Returns seconds until each was in force."""
        took = []
        while time.monotonic() < until:
            self._number += 1
            nonce, version = f"n{self._number}", 1000 * self._generation + self._number
            if self._number % 2:
                self._stream.to_say.put((nonce, self._mesh.addresses(nonce, version, [self._number % 1000])))
            else:
                self._stream.to_say.put((nonce, self._mesh.rules(nonce, 1)))
            took.append(self._stream.acknowledged(nonce))
            time.sleep(EVERY_S)
        return took


def waits(side: Side, push: Callable[[float], list[float]]) -> tuple[float, list[float]]:
    """Connects at a fixed rate, across nodes, while `push` (told when the connections end) runs. Returns the longest
    wait in ms, and what `push` returned. Raises LoadError where a connection failed or did not go through the mesh."""
    address = side.addresses["server"]
    words = ["dial", str(RATE), address, str(LOAD_PORT), str(WINDOW_S)]
    before = side.connections()[0]
    process = subprocess.Popen([*side.enter("client"), str(build()), *words], stdout=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + WINDOW_S
        time.sleep(WINDOW_S / 6)  # warm-up, and then some
        result = push(end - 0.2)
        said, _ = process.communicate(timeout=WINDOW_S + 60)
    finally:
        process.kill()
        process.wait()
    found = answer(said)
    if found["errors"] or found["unsent"]:
        raise LoadError(f"{found['errors']} errors, {found['unsent']} unsent, the last: {found['error']}")
    grown = side.connections()[0] - before
    if grown < 2 * found["total_ops"]:
        raise LoadError(f"{found['total_ops']} connections, {grown:.0f} ends with mutual TLS")
    return found["max_ns"] / 1e6, result


def large(folder: Path, rounds: int, quick: bool, tell: Callable[[str], None]) -> dict[str, list[float]]:
    """By key of SINGLES. Raises LoadError."""
    serve = {"name": "load", "image": "host", "command": [str(build()), "serve", str(LOAD_PORT)]}
    objects = [namespace("ambient"), *pod("server", "node2", [serve]), *sleeper("client")]
    with ExitStack() as stack:
        side = stack.enter_context(lab(folder, "l", objects, mesh=False))
        cluster = load(side.lab.name)
        front = Front(str(cluster.netns_path), str(cluster.ip4))
        stack.callback(front.stop)
        root = {"name": "istio-ca-root-cert", "namespace": "istio-system"}
        side.lab.apply(
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": root, "data": {"root-cert.pem": front.roots}}
        )
        tell("large mesh: its records are made")
        mesh = Mesh([record(item) for item in side.lab.pods("bench")], WORKLOADS // 20 if quick else WORKLOADS)
        front.first = {
            "node1": {ADDRESS: ("w0", mesh.addresses("w0", 0)), AUTHORIZATION: ("p0", mesh.rules("p0", POLICIES))},
            "node2": {
                ADDRESS: ("w0", Mesh(mesh.real, 0).addresses("w0", 0)),
                AUTHORIZATION: ("p0", response(AUTHORIZATION, "p0", ())),
            },
        }  # fmt: skip
        control = f"{cluster.ip4}:{PORT}"
        other = Started(folder / "large-node2", cluster, cluster.nodes[1], control)
        stack.callback(other.stop)
        front.stream("node2").acknowledged("w0", "p0")
        Watch(cluster, "server").wait(True)
        times: dict[str, list[float]] = {key: [] for key in KEYS}
        for number in range(rounds):
            tell(f"large mesh: agent and engine start, {number + 1}/{rounds}")
            started = time.monotonic()
            own = Started(folder / f"large-node1-{number}", cluster, cluster.nodes[0], control)
            with ExitStack() as running:
                running.callback(own.stop)
                times["start"].append(Watch(cluster, "client").wait(True) - started)
                stream = front.stream("node1")
                took = stream.acknowledged("w0", "p0")
                times["push_full"].append(took)
                times["start_full"].append(stream.said["w0"] + took - started)
                if number == rounds - 1:
                    stack.push(running.pop_all())
                    break
                side.lab.label("bench", None)
                Watch(cluster, "client").wait(False)
            side.lab.label("bench", "ambient")
        _weigh(own, times)
        pusher = Pusher(mesh, stream)
        for number in range(rounds):
            tell(f"large mesh: pushes, {number + 1}/{rounds}")
            pusher.prepare(number + 1)
            quiet, _ = waits(side, lambda until: [])
            beside_full, took_full = waits(side, lambda until: pusher.full())
            beside_one, took_one = waits(side, pusher.one)
            times["push_full"] += took_full
            times["push_one"] += [1000 * each for each in took_one]
            times["push_wait_none"].append(quiet)
            times["push_wait_full"].append(max(0.0, beside_full - quiet))
            times["push_wait_one"].append(max(0.0, beside_one - quiet))
        _weigh(own, times)
    return dict(times)


def _weigh(own: Started, times: dict[str, list[float]]) -> None:
    for key, mib in zip(("memory_large_own", "memory_large"), own.mib(), strict=True):
        times[key].append(mib)
