"""The kubelet part of a node: runs the pods that the API places here, and tells the API how they are.

Each pod has a worker that goes one way: sandbox (again and again until the CNI chain agrees), volumes, containers,
teardown. A worker never dies of a pod: what goes wrong becomes the pod's status and is tried again. The part may be
killed at any moment: containers go on, and its successor finds them by their directories. It also follows Services
for the node's nftables rules, and keeps the agent's token fresh.

Its own sockets are the probes' sockets, and it is alone in its cgroup: that is how probes are told apart.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from sidestep.kube.client import KubeClient, KubeError
from sidestep.kube.watch import Reflector
from sidestep.lab import keeper, podspec, probes, services, volumes
from sidestep.lab.cluster import AGENT_ACCOUNT, DOMAIN, SYSTEM_NAMESPACE, Cluster, Node, cgroup2, load
from sidestep.lab.sandbox import Bind, Launch, PodName, Process, Sandbox, SandboxError

RETRY_S = (0.2, 0.5, 1.0, 2.0, 5.0)  # between attempts at a sandbox, or at volumes
RESTART_S = (1.0, 2.0, 5.0, 10.0, 30.0)  # between runs of a container; one that ran a minute starts from the front
LOG_BYTES = 8 << 20
LOG_KEEP = 1 << 20
AGENT_AUDIENCE = "istio-ca"
AGENT_TOKEN_S = 3600
AGENT_READY_PORT = 15021
QUIET_S = 0.05

Object = Mapping[str, Any]


def say(text: str) -> None:
    """A line in the part's log."""
    print(f"{datetime.now(UTC).isoformat(timespec='milliseconds')} {text}", flush=True)


def now() -> str:
    """The API's time format."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


async def _pause(event: asyncio.Event, seconds: float) -> bool:
    """Waits that long, or until the event. Returns whether the event came."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
        return True
    except TimeoutError:
        return False


class ContainerState:
    """How one container is; the worker's status is made of these."""

    def __init__(self, container: podspec.Container) -> None:
        self.container = container
        self.state: dict[str, Any] = {"waiting": {"reason": "ContainerCreating"}}
        self.last: dict[str, Any] = {}
        self.ready = False
        self.restarts = 0
        self.finished = False  # it ended and will not be started again
        self.status = 0

    def report(self) -> dict[str, Any]:
        """An entry of containerStatuses."""
        return {
            "name": self.container.name,
            "image": self.container.image,
            "imageID": "",
            "ready": self.ready,
            "started": "running" in self.state,
            "restartCount": self.restarts,
            "state": self.state,
            "lastState": self.last,
        }


class Worker:
    """One pod on this node."""

    def __init__(self, kubelet: "Kubelet", pod: Object) -> None:
        meta = pod["metadata"]
        self._kubelet = kubelet
        self.pod = pod
        self.key = f"{meta['namespace']}/{meta['name']}"
        self.uid = str(meta["uid"])
        self._name = PodName(meta["namespace"], meta["name"], self.uid)
        self._path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}"
        self._sandbox = Sandbox(kubelet.cluster, kubelet.node, self._name, kubelet.cgroup)
        self._leaving = asyncio.Event()  # deleted, or gone from the API
        self._dirty = asyncio.Event()
        self._containers: list[ContainerState] = []
        self._processes: dict[str, Process] = {}
        self._ips: tuple[str, ...] = ()
        self._message = ""
        self._refused = False
        self._times: dict[str, tuple[str, str]] = {}  # condition -> (status, since)
        self._started_at = now()
        self._gone = False
        self._mirror_ready: bool | None = None

    @property
    def mirror(self) -> bool:
        """Processes of the lab stand behind it: nothing to run."""
        return podspec.MIRROR_ANNOTATION in (self.pod["metadata"].get("annotations") or {})

    def take(self, pod: Object | None) -> None:
        """The API's newest word; None: the object is gone."""
        if pod is None:
            self._gone = True
            self._leaving.set()
            return
        self.pod = pod
        if pod["metadata"].get("deletionTimestamp"):
            self._leaving.set()

    async def run(self) -> None:
        """From the first sight of the pod to its end."""
        self.take(self.pod)
        async with asyncio.TaskGroup() as group:
            reporter = group.create_task(self._report_changes(), name=f"report {self.key}")
            try:
                if not self._leaving.is_set():
                    await self._live()
                await self._leaving.wait()
                await self._end()
            finally:
                reporter.cancel()

    async def _live(self) -> None:
        if self.mirror:
            await self._follow_agent()
            return
        try:
            spec = podspec.parse(self.pod)
        except podspec.Refused as error:
            self._refused, self._message = True, str(error)
            self._dirty.set()
            return
        self._containers = [ContainerState(container) for container in spec.containers]
        self._dirty.set()
        made = volumes.Volumes(self._kubelet.client, self.pod, spec, self._sandbox.directory / "volumes")
        if not await self._retry("sandbox", lambda: self._make_sandbox(spec)):
            return
        if not await self._retry("volumes", made.make):
            return
        self._message = ""
        async with asyncio.TaskGroup() as group:
            refresher = group.create_task(self._refresh(made))
            for state in self._containers:
                group.create_task(self._run_container(spec, state, made))
            await self._leaving.wait()
            await self._stop_containers()
            refresher.cancel()

    async def _follow_agent(self) -> None:
        """The agent's pod: its processes are the keeper's, its readiness is asked for as a kubelet would."""
        node = self._kubelet.node
        self._ips = (str(node.ip4), str(node.ip6))
        probe = podspec.Probe("httpGet", AGENT_READY_PORT, "/healthz/ready", "HTTP", "", (), (), 0, 1, 1, 1, 1)
        while True:
            why = await probes.attempt(probe, self._ips[0], self._sandbox.directory)
            message = f"the agent is not ready: {why}" if why else ""
            if self._mirror_ready is None or (not why) != self._mirror_ready or message != self._message:
                self._mirror_ready, self._message = not why, message
                self._dirty.set()
            if await _pause(self._leaving, 0.2 if why else 1.0):
                return

    async def _retry(self, what: str, step: Any) -> bool:
        """Repeats a step until it is done. False: the pod is leaving."""
        attempt = 0
        while not self._leaving.is_set():
            try:
                await step()
                return True
            except (SandboxError, volumes.VolumeError, KubeError, OSError) as error:
                self._message = f"{what}: {error}"
                say(f"pod {self.key}: {self._message}")
            self._dirty.set()
            await _pause(self._leaving, RETRY_S[min(attempt, len(RETRY_S) - 1)])
            attempt += 1
        return False

    async def _make_sandbox(self, spec: podspec.Spec) -> None:
        await self._sandbox.create(spec.families, host_network=spec.host_network)
        self._ips = self._sandbox.ips
        self._dirty.set()

    async def _refresh(self, made: volumes.Volumes) -> None:
        while True:
            await asyncio.sleep(30)
            try:
                await made.refresh()
            except KubeError as error:
                say(f"pod {self.key}: token: {error}")

    # -- containers --------------------------------------------------------------------------------------------------
    async def _run_container(self, spec: podspec.Spec, state: ContainerState, made: volumes.Volumes) -> None:
        directory = self._sandbox.directory / state.container.name
        process = Process(directory, self._sandbox.cgroup / state.container.name)
        self._processes[state.container.name] = process
        failures = 0
        adopted = process.adopt()
        while not self._leaving.is_set():
            started, clock = now(), time.monotonic()
            if not adopted:
                try:
                    process.start(self._launch(spec, state.container, made), self._sandbox.netns)
                except OSError as error:
                    state.state = {"waiting": {"reason": "CreateContainerError", "message": str(error)}}
                    self._dirty.set()
                    await _pause(self._leaving, RETRY_S[-1])
                    continue
            adopted = False
            state.state = {"running": {"startedAt": started}}
            state.ready = state.container.probe is None
            self._dirty.set()
            async with asyncio.TaskGroup() as group:
                prober = group.create_task(self._probe(state, directory))
                await process.wait()
                prober.cancel()
            state.status = process.close()
            state.ready = False
            ended = {
                "exitCode": state.status,
                "reason": "Completed" if state.status == 0 else "Error",
                "startedAt": started,
                "finishedAt": now(),
            }
            state.state = {"terminated": ended}
            again = spec.restart_policy == "Always" or (spec.restart_policy == "OnFailure" and state.status != 0)
            if not again:
                state.finished = True
                self._dirty.set()
                return
            if self._leaving.is_set():
                return
            failures = 0 if time.monotonic() - clock > 60 else failures
            pause = RESTART_S[min(failures, len(RESTART_S) - 1)]
            state.last = {"terminated": ended}
            message = f"ended with status {state.status}; next start in {pause:g} s"
            state.state = {"waiting": {"reason": "CrashLoopBackOff", "message": message}}
            self._dirty.set()
            await _pause(self._leaving, pause)
            failures += 1
            state.restarts += 1

    def _launch(self, spec: podspec.Spec, container: podspec.Container, made: volumes.Volumes) -> Launch:
        node, cluster = self._kubelet.node, self._kubelet.cluster
        meta = self.pod["metadata"]
        hostname = node.name if spec.host_network else str(meta["name"])
        own = podspec.environment(self.pod, container, self._ips, (str(node.ip4), str(node.ip6)))
        variables = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root" if container.uid == 0 else "/",
            "HOSTNAME": hostname,
            "KUBERNETES_SERVICE_HOST": str(cluster.services4[1]),
            "KUBERNETES_SERVICE_PORT": "443",
        } | own
        etc = self._sandbox.directory / "etc"
        self._write_etc(etc, spec, hostname)
        binds = [Bind(etc / name, f"/etc/{name}", False) for name in ("resolv.conf", "hosts", "hostname")]
        for mount in container.mounts:
            source = made.path(mount.volume) / mount.sub_path if mount.sub_path else made.path(mount.volume)
            if mount.sub_path and not source.exists():
                source.mkdir(parents=True)
            kind = spec.volumes[mount.volume][0]
            binds.append(Bind(source, mount.path, mount.read_only or kind != "emptyDir"))
        return Launch(
            command=tuple(podspec.expand(word, variables) for word in container.command),
            environment=variables,
            hostname=hostname,
            workdir=container.workdir,
            uid=container.uid,
            gid=container.gid,
            capabilities=container.capabilities,
            binds=tuple(binds),
        )

    def _write_etc(self, etc: Path, spec: podspec.Spec, hostname: str) -> None:
        cluster = self._kubelet.cluster
        servers = [str(cluster.dns4)] if 4 in spec.families else []
        servers += [str(cluster.dns6)] if 6 in spec.families else []
        lines = [f"nameserver {server}" for server in servers] if spec.dns else []
        if spec.dns:
            namespace = self._name.namespace
            lines += [f"search {namespace}.svc.{DOMAIN} svc.{DOMAIN} {DOMAIN}", "options ndots:5"]
        hosts = ["127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback"]
        hosts += [f"{address} {hostname}" for address in self._ips]
        for name, text in (("resolv.conf", lines), ("hosts", hosts), ("hostname", [hostname])):
            volumes.write(etc / name, ("\n".join(text) + "\n").encode(), 0o644)

    async def _probe(self, state: ContainerState, directory: Path) -> None:
        probe = state.container.probe
        if probe is None:
            return
        await asyncio.sleep(probe.delay_s)
        good = bad = 0
        while True:
            why = await probes.attempt(probe, self._ips[0], directory)
            good, bad = (0, bad + 1) if why else (good + 1, 0)
            ready = good >= probe.successes if not state.ready else bad < probe.failures
            message = f"container {state.container.name} is not ready: {why}" if why and not ready else ""
            if ready != state.ready or (message and message != self._message):
                state.ready, self._message = ready, message
                self._dirty.set()
            # Until it is ready ask more often, as a slow start should not cost a whole period.
            await asyncio.sleep(probe.period_s if state.ready else min(probe.period_s, 0.5))

    # -- the end -----------------------------------------------------------------------------------------------------
    async def _end(self) -> None:
        """Nothing of the pod is left afterwards, and then the API's object goes too."""
        attempt = 0
        while not self.mirror:
            try:
                await self._sandbox.destroy()
                break
            except (SandboxError, OSError) as error:
                say(f"pod {self.key}: {error}")
                await asyncio.sleep(RETRY_S[min(attempt, len(RETRY_S) - 1)])
                attempt += 1
        while not self._gone:
            try:
                await self._kubelet.client.delete(self._path, grace_s=0, uid=self.uid)
                return
            except KubeError as error:
                if error.status in (404, 409):
                    return
                say(f"pod {self.key}: delete: {error}")
                await asyncio.sleep(1)

    async def _stop_containers(self) -> None:
        """SIGTERM, the grace period, SIGKILL."""
        meta = self.pod["metadata"]
        grace = float(meta.get("deletionGracePeriodSeconds") or 0) if not self._gone else 0.0
        deadline = time.monotonic() + grace
        if grace:
            for process in self._processes.values():
                process.signal(signal.SIGTERM)
        while time.monotonic() < deadline and any("running" in item.state for item in self._containers):
            await asyncio.sleep(0.02)
        for process in self._processes.values():
            process.signal(signal.SIGKILL)

    # -- status ------------------------------------------------------------------------------------------------------
    async def _report_changes(self) -> None:
        sent: dict[str, Any] = {}
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            status = self._status()
            if status == sent:
                continue
            try:
                await self._kubelet.client.patch(f"{self._path}/status", {"status": status})
                sent = status
            except KubeError as error:
                if error.status == 404:
                    return
                say(f"pod {self.key}: status: {error}")
                await asyncio.sleep(0.5)
                self._dirty.set()

    def _status(self) -> dict[str, Any]:
        phase = self._phase()
        ready = phase == "Running" and (
            bool(self._mirror_ready) if self.mirror else all(item.ready for item in self._containers)
        )
        node = self._kubelet.node
        conditions = {
            "PodScheduled": True,
            "Initialized": True,
            "ContainersReady": ready,
            "Ready": ready,
        }
        status: dict[str, Any] = {
            "phase": phase,
            "conditions": [self._condition(name, value) for name, value in conditions.items()],
            "hostIP": str(node.ip4),
            "hostIPs": [{"ip": str(node.ip4)}, {"ip": str(node.ip6)}],
            "startTime": self._started_at,
            "message": self._message or None,
            "containerStatuses": [item.report() for item in self._containers],
        }
        if self._refused:
            status["reason"] = "Refused"
        if self._ips:
            status |= {"podIP": self._ips[0], "podIPs": [{"ip": address} for address in self._ips]}
        return status

    def _phase(self) -> str:
        if self._refused:
            return "Failed"
        if self.mirror:
            return "Running"
        if self._containers and all(item.finished for item in self._containers):
            return "Failed" if any(item.status for item in self._containers) else "Succeeded"
        started = [item for item in self._containers if "waiting" not in item.state or item.last]
        return "Running" if self._containers and len(started) == len(self._containers) else "Pending"

    def _condition(self, name: str, value: bool) -> dict[str, Any]:
        text = "True" if value else "False"
        old, since = self._times.get(name, ("", ""))
        if old != text:
            self._times[name] = (text, since := now())
        found = {"type": name, "status": text, "lastTransitionTime": since}
        if not value and self._message:
            found |= {"reason": "ContainersNotReady", "message": self._message}
        return found


class Kubelet:
    """The node's part."""

    def __init__(self, cluster: Cluster, node: Node, client: KubeClient, cgroup: Path) -> None:
        self.cluster = cluster
        self.node = node
        self.client = client
        self.cgroup = cgroup
        self._workers: dict[str, Worker] = {}
        self._changed = asyncio.Event()
        self._services_changed = asyncio.Event()
        self._pods: Reflector[Object] = Reflector(
            client, "/api/v1/pods", lambda pod: pod, self._on_pod, field_selector=f"spec.nodeName={node.name}"
        )
        self._services: Reflector[services.Service] = Reflector(
            client, "/api/v1/services", services.service_of, lambda *_: self._services_changed.set()
        )
        self._slices: Reflector[services.Slice] = Reflector(
            client,
            "/apis/discovery.k8s.io/v1/endpointslices",
            services.slice_of,
            lambda *_: self._services_changed.set(),
        )
        self._group: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Until it is killed."""
        await self._until_done("node", self._register)
        async with asyncio.TaskGroup() as group:
            self._group = group
            group.create_task(self._pods.run(), name="pods")
            group.create_task(self._services.run(), name="services")
            group.create_task(self._slices.run(), name="slices")
            group.create_task(self._rules(), name="rules")
            group.create_task(self._sweep(), name="sweep")
            group.create_task(self._bound_logs(), name="logs")
            if not self.cluster.plain:
                group.create_task(self._agent(), name="agent's pod")

    async def _until_done(self, what: str, step: Any) -> None:
        attempt = 0
        while True:
            try:
                await step()
                return
            except (KubeError, OSError) as error:
                say(f"{what}: {error}")
            await asyncio.sleep(RETRY_S[min(attempt, len(RETRY_S) - 1)])
            attempt += 1

    async def _create(self, path: str, obj: Object) -> None:
        """Creates what is not there yet."""
        try:
            await self.client.create(path, obj)
        except KubeError as error:
            if error.status != 409:
                raise

    async def _register(self) -> None:
        node = self.node
        labels = {"kubernetes.io/hostname": node.name, "kubernetes.io/os": "linux"}
        await self._create(
            "/api/v1/nodes",
            {
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": node.name, "labels": labels},
                "spec": {"podCIDR": str(node.pods4), "podCIDRs": [str(node.pods4), str(node.pods6)]},
            },
        )
        await self._report_node("the rules for Services are not loaded yet")

    async def _report_node(self, why_not: str) -> None:
        """The node's status. `why_not`: what its network still lacks; "" when pods can be placed here."""
        node = self.node
        addresses = [("InternalIP", str(node.ip4)), ("InternalIP", str(node.ip6)), ("Hostname", node.name)]
        ready = {
            "type": "Ready",
            "status": "False" if why_not else "True",
            "reason": "NetworkNotReady" if why_not else "KubeletReady",
            "message": why_not or "the lab's kubelet part runs",
            "lastTransitionTime": now(),
        }
        status = {
            "addresses": [{"type": kind, "address": text} for kind, text in addresses],
            "conditions": [ready],
            "nodeInfo": {"kernelVersion": os.uname().release, "operatingSystem": "linux", "osImage": "host"},
        }
        await self.client.patch(f"/api/v1/nodes/{node.name}/status", {"status": status})

    # -- pods --------------------------------------------------------------------------------------------------------
    def _on_pod(self, _key: str, old: Object | None, new: Object | None) -> None:
        old_uid = str(old["metadata"]["uid"]) if old else ""
        new_uid = str(new["metadata"]["uid"]) if new else ""
        if old_uid and old_uid != new_uid and old_uid in self._workers:
            self._workers[old_uid].take(None)
        if new is None or self._group is None:
            return
        worker = self._workers.get(new_uid)
        if worker is not None:
            worker.take(new)
            return
        worker = Worker(self, new)
        self._workers[new_uid] = worker
        self._group.create_task(self._work(worker), name=f"pod {worker.key}")

    async def _work(self, worker: Worker) -> None:
        try:
            await worker.run()
        except* Exception as errors:
            # One pod's bug must not take the node's other pods with it.
            say(f"pod {worker.key}: given up: {errors.exceptions!r}")
        finally:
            self._workers.pop(worker.uid, None)

    async def _sweep(self) -> None:
        """Once: pods that a former part ran and that the API no longer has."""
        await self._pods.synced.wait()
        for directory in self.node.pods_dir.glob("*"):
            if directory.name not in self._workers:
                sandbox = Sandbox(self.cluster, self.node, PodName("", "", directory.name), self.cgroup)
                with contextlib.suppress(SandboxError, OSError):
                    await sandbox.destroy()
                shutil.rmtree(directory, ignore_errors=True)

    async def _bound_logs(self) -> None:
        while True:
            await asyncio.sleep(2)
            for log in self.node.pods_dir.glob("*/*/log"):
                keeper.bound(log, LOG_BYTES, LOG_KEEP)

    # -- services ----------------------------------------------------------------------------------------------------
    async def _rules(self) -> None:
        await self._services.synced.wait()
        await self._slices.synced.wait()
        loaded = problem = ""
        while True:
            await asyncio.sleep(QUIET_S)
            self._services_changed.clear()
            wanted = services.ruleset(services.ports(self._services.items, self._slices.items.values()))
            if wanted != loaded:
                process = await asyncio.create_subprocess_exec(
                    "nft", "-f", "-", stdin=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
                )
                _, error = await process.communicate(wanted.encode())
                said = error.decode(errors="replace").strip() if process.returncode else ""
                if said or problem or not loaded:
                    problem = f"nft: {said.splitlines()[0]}" if said else ""
                    await self._until_done("node", partial(self._report_node, problem))
                if said:
                    say(f"services: nft: {said}")
                    await asyncio.sleep(1)
                    continue
                loaded = wanted
            await self._services_changed.wait()

    # -- the agent ---------------------------------------------------------------------------------------------------
    async def _agent(self) -> None:
        """The API object that stands for the node's agent, and its token."""
        await self._until_done("agent's pod", self._make_agent_pod)
        path = f"/api/v1/namespaces/{SYSTEM_NAMESPACE}/pods/{self.node.agent_pod}"
        due = 0.0
        while True:
            if time.time() >= due:
                try:
                    pod = await self.client.get(path)
                    text, due = await volumes.token(
                        self.client, SYSTEM_NAMESPACE, AGENT_ACCOUNT, pod, AGENT_AUDIENCE, AGENT_TOKEN_S
                    )
                    volumes.write(self.node.token_file, text.encode(), 0o600)
                except KubeError as error:
                    say(f"agent's token: {error}")
                    if error.status == 404:
                        await self._until_done("agent's pod", self._make_agent_pod)
            await asyncio.sleep(1)

    async def _make_agent_pod(self) -> None:
        meta = {"name": AGENT_ACCOUNT, "namespace": SYSTEM_NAMESPACE}
        await self._create(
            f"/api/v1/namespaces/{SYSTEM_NAMESPACE}/serviceaccounts",
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta},
        )
        await self._create(
            f"/api/v1/namespaces/{SYSTEM_NAMESPACE}/pods",
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": self.node.agent_pod,
                    "namespace": SYSTEM_NAMESPACE,
                    "labels": {"app": "ztunnel"},
                    "annotations": {podspec.MIRROR_ANNOTATION: self.node.name},
                },
                "spec": {
                    "nodeName": self.node.name,
                    "serviceAccountName": AGENT_ACCOUNT,
                    "hostNetwork": True,
                    "containers": [
                        {"name": "engine", "image": "host", "command": ["supervise"]},
                        {"name": "agent", "image": "host", "command": ["sidestep"]},
                    ],
                },
            },
        )


async def serve(name: str, node_name: str) -> None:
    """Runs the part for one node of a lab."""
    cluster = load(name)
    node = cluster.node(node_name)
    cgroup = cgroup2() / cluster.cgroup_name / node.cgroup
    async with KubeClient.from_config(cluster.kubeconfig) as client:
        await Kubelet(cluster, node, client, cgroup).run()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], sys.argv[2]))
