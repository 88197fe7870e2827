"""The agent with the real engine and real capture on one node: CNI, live enrolment, release, restarts of either
side.
"""

import asyncio
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidestep.node.agent import Agent, Place
from sidestep.node.capture import Captures
from sidestep.node.cni import CniError, serve
from sidestep.node.metrics import Metrics
from sidestep.node.netns import Records
from sidestep.node.pods import Pod, spiffe, workload_name
from sidestep.node.reconcile import Capture
from sidestep.node.resident import Names, Resident
from sidestep.node.statefile import FileAuthority, FileFeed
from tests.harness.kubelet import Kubelet
from tests.harness.netns import run as tool
from tests.harness.pods import Bridge, Client, Cluster, Sandbox, TestAuthority, echo, eventually, ip

PLUGIN = Path(__file__).resolve().parents[2] / "agent/sidestep/bin/sidestep-cni"
NODE = "node1"
PORT = 8080


class Node:
    """One node: bridge, engine process, agent in this process, an API in memory."""

    def __init__(self, folder: Path, bridge: Bridge, same_node: str = "direct") -> None:
        self.folder = folder
        self.bridge = bridge
        self.cluster = Cluster(NODE)
        self.authority = TestAuthority(folder)
        self.state: dict[str, list[Any]] = {"workloads": [], "services": [], "certificates": []}
        self.state_file = folder / "state.yaml"
        self.bpf_dir = Path(f"/sys/fs/bpf/t-agent-{os.getpid()}")
        self.drain_quiet_ms = 0
        self.same_node = same_node
        self.pods: dict[str, tuple[Sandbox, Pod]] = {}
        self.kubelet_cgroup: Path | None = None
        self.engine: subprocess.Popen[bytes] | None = None
        self.feed: FileFeed | None = None
        self._agent: Agent | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def agent(self) -> Agent:
        assert self._agent is not None
        return self._agent

    def start_engine(self, *program: str) -> None:
        """A new engine process; its log goes to a file that a failure shows. `program`: Python's arguments instead of
        the command.
        """
        program = program or ("-m", "sidestep")
        command = [sys.executable, *program, "engine", "--socket", str(self.folder / "engine" / "engine.sock")]
        (self.folder / "engine").mkdir(mode=0o700, exist_ok=True)
        with open(self.folder / "engine.log", "ab") as log:
            self.engine = subprocess.Popen([*command, "--workers", "2"], stdout=log, stderr=log)

    def kill_engine(self) -> None:
        """kill -9."""
        if self.engine is not None:
            self.engine.send_signal(signal.SIGKILL)
            self.engine.wait()
            self.engine = None

    @asynccontextmanager
    async def running_agent(self) -> AsyncIterator[Agent]:
        """An agent as the command starts it, but for the API and the pages. At the end it is gone as after kill -9."""
        self.state_file.write_text(yaml.safe_dump(self.state))
        authority = FileAuthority()
        captures = Captures(self.bpf_dir, Path(self.bridge.path))
        agent = Agent(
            place=Place(
                NODE,
                {
                    "network": "",
                    "cluster_id": "Kubernetes",
                    "trust_domain": "cluster.local",
                    "node": NODE,
                    "cluster_cidrs": [],
                    "same_node": self.same_node,
                    "unknown": "hold",
                },
            ),
            names=Names(
                "cluster.local",
                "Kubernetes",
                self.drain_quiet_ms,
                self.folder / "netns",
                self.same_node == "native",
            ),
            captures=captures,
            engine_path=self.folder / "engine" / "engine.sock",
            api=self.cluster,
            authority=authority,
            records=Records(self.folder / "run" / "pods"),
            metrics=Metrics(),
            uniform=lambda: 0.5,
            kubelet_cgroup=self.kubelet_cgroup,
        )
        feed = FileFeed(self.state_file, authority, agent)
        agent.engine_versions = feed.engine_holds
        self.feed = feed
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(agent.run()),
                    group.create_task(feed.run()),
                    group.create_task(serve(self.folder / "run" / "cni.sock", agent)),
                ]
                self._agent = agent
                await agent.restored.wait()
                self.cluster.watch(agent)
                try:
                    yield agent
                finally:
                    for task in tasks:
                        task.cancel()
        finally:
            captures.close()  # what it was doing has ended by now

    def pod(
        self,
        name: str,
        namespace: str = "shop",
        running: bool = True,
        probed: tuple[int, ...] = (),
        of: Sandbox | None = None,
    ) -> tuple[Sandbox, Pod]:
        """A pod with a sandbox, a place in the API and a record in the mesh. The API has no address of it before it
        runs. `of`: it gets the addresses of a pod that is gone.
        """
        sandbox = self.bridge.sandbox(of)
        addresses = (sandbox.v4, sandbox.v6) if running else ()
        pod = self.cluster.add(namespace, name, *addresses, account=name, probed=probed)
        (self.folder / "netns").mkdir(exist_ok=True)
        (self.folder / "netns" / pod.uid).symlink_to(sandbox.path)
        self.state["workloads"].append(
            {
                "uid": workload_name("Kubernetes", namespace, name),
                "name": name,
                "namespace": namespace,
                "serviceAccount": name,
                "trustDomain": "cluster.local",
                "node": NODE,
                "clusterId": "Kubernetes",
                "protocol": "HBONE",
                "workloadIps": [sandbox.v4, sandbox.v6],
            }
        )
        self.state["certificates"].append(self.authority.issue(spiffe("cluster.local", namespace, name)))
        return sandbox, pod

    def publish(self, names: list[str]) -> None:
        """The mesh learns these workloads, and no others."""
        assert self.feed is not None
        state = {**self.state, "workloads": [each for each in self.state["workloads"] if each["name"] in names]}
        self.state_file.write_text(yaml.safe_dump(state))
        self.feed.reload()

    async def cni(self, command: str, sandbox: Sandbox, pod: Pod, container: str = "") -> tuple[int, dict[str, Any]]:
        """The real plugin, as a runtime runs it. Returns exit status and stdout."""
        config = {
            "cniVersion": "1.0.0",
            "name": "pods",
            "type": "sidestep-cni",
            "socket": str(self.folder / "run" / "cni.sock"),
            "prevResult": {
                "cniVersion": "1.0.0",
                "interfaces": [{"name": "eth0", "sandbox": sandbox.path}],
                "ips": [
                    {"address": f"{sandbox.v4}/24", "interface": 0},
                    {"address": f"{sandbox.v6}/64", "interface": 0},
                ],
            },
        }
        environment = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": container or f"c-{pod.uid}",
            "CNI_NETNS": sandbox.path,
            "CNI_IFNAME": "eth0",
            "CNI_PATH": "/usr/lib/cni",
            "CNI_ARGS": f"K8S_POD_NAMESPACE={pod.namespace};K8S_POD_NAME={pod.name};K8S_POD_UID={pod.uid}",
        }
        process = await asyncio.create_subprocess_exec(
            PLUGIN, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=environment
        )
        out, _ = await process.communicate(json.dumps(config).encode())
        return process.returncode or 0, json.loads(out) if out else {}

    def resident(self, pod: Pod) -> Resident | None:
        return self.agent.residents.get(pod.uid)

    async def enrolled(self, pod: Pod, capture: Capture | None = None) -> None:
        """Waits until the pod is served and annotated (and in this mode)."""

        def done() -> bool:
            resident = self.resident(pod)
            return bool(
                resident
                and resident.served
                and self.cluster.pods[pod.key].redirection == "enabled"
                and (capture is None or resident.capture is capture)
            )

        await eventually(f"{pod.key} enrolled {capture or ''}", done)

    async def captured(self, pod: Pod, capture: Capture) -> None:
        """Waits for a mode, whatever else."""
        await eventually(
            f"{pod.key} {capture.value}",
            lambda: (found := self.resident(pod)) is not None and found.capture is capture,
        )

    async def released(self, pod: Pod) -> None:
        """Waits until nothing of ours is in the pod."""
        await eventually(f"{pod.key} released", lambda: pod.uid not in self.agent.residents)
        assert pod.uid not in await self.agent.captures.list()
        assert all(each["uid"] != pod.uid for each in await self.agent.engine.dump("pods"))

    async def through_engine(self, client: Client) -> bool:
        """The engine carries this connection."""
        return any(each["protocol"] != "native" for each in await self._known(client))

    async def in_the_mesh(self, client: Client) -> bool:
        """The engine carries this connection, or has allowed it."""
        return bool(await self._known(client))

    async def _known(self, client: Client) -> list[dict[str, Any]]:
        """What the engine says of this connection."""
        address, port = client.local[0], client.local[1]
        ends = (f'"{address}:{port}"', f'"[{address}]:{port}"')
        found = await self.agent.engine.dump("connections")
        return [each for each in found if any(end in json.dumps(each) for end in ends)]


@pytest.fixture
def node(tmp_path: Path, same_node: str) -> Iterator[Node]:
    subprocess.run("mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf", shell=True, check=True)
    with Bridge("agent") as bridge:
        node = Node(tmp_path, bridge, same_node)
        try:
            yield node
        finally:
            node.kill_engine()
            subprocess.run(["rm", "-rf", str(node.bpf_dir)], check=True)
            log = tmp_path / "engine.log"
            print(log.read_text()[-4000:] if log.exists() else "the engine was not started")


def run(work: Coroutine[Any, Any, None]) -> None:
    """Runs a test's coroutine under one hang guard."""

    async def guarded() -> None:
        async with asyncio.timeout(120):
            await work

    asyncio.run(guarded())


def test_new_pods_are_captured_before_cni_add_returns(node: Node) -> None:
    async def work() -> None:
        node.cluster.label("shop", "ambient")
        web, web_pod = node.pod("web", running=False)
        api, api_pod = node.pod("api", running=False)
        node.start_engine()
        async with node.running_agent():
            for sandbox, pod in ((web, web_pod), (api, api_pod)):
                status, answer = await node.cni("ADD", sandbox, pod)
                assert (status, answer.get("msg"), answer.get("details")) == (0, None, None)
                resident = node.resident(pod)
                assert resident is not None and resident.served and resident.capture is Capture.STRICT
            await node.enrolled(web_pod)
            await node.enrolled(api_pod)
            async with echo(api, PORT) as seen:
                for address, mine in ((api.v4, web.v4), (api.v6, web.v6)):
                    client = await Client.open(web, address, PORT)
                    assert client.seen_as == mine and await client.ask("hello") == "hello"
                    assert await node.through_engine(client)
                    await client.close()
                assert seen == [web.v4, web.v6]
            assert (await node.cni("CHECK", web, web_pod))[0] == 0
            status, _ = await node.cni("DEL", web, web_pod)
            assert status == 0
            await node.released(web_pod)
            assert (await node.cni("DEL", web, web_pod))[0] == 0
            assert (await node.cni("CHECK", web, web_pod))[0] == 1

    run(work())


def test_a_pod_outside_the_mesh_needs_no_engine(node: Node) -> None:
    async def work() -> None:
        web, web_pod = node.pod("web", running=False)
        async with node.running_agent():
            status, answer = await node.cni("ADD", web, web_pod)
            assert status == 0 and answer["ips"][0]["address"] == f"{web.v4}/24"
            assert node.resident(web_pod) is None and await node.agent.captures.list() == {}

    run(work())


def test_what_cni_add_refuses(node: Node) -> None:
    async def work() -> None:
        node.cluster.label("shop", "ambient")
        web, web_pod = node.pod("web", running=False)
        api, api_pod = node.pod("api", running=False)
        node.start_engine()
        async with node.running_agent():
            host = Sandbox("../../proc/self/ns/net", web.v4, web.v6)
            for sandbox, pod, word in (
                (host, web_pod, "host"),
                (web, Pod(**{f: getattr(web_pod, f) for f in Pod.__slots__} | {"uid": "other"}), "UID"),
                (web, Pod(**{f: getattr(web_pod, f) for f in Pod.__slots__} | {"name": "nobody"}), "not known"),
            ):
                status, answer = await node.cni("ADD", sandbox, pod)
                assert status == 1 and answer["code"] in (7, 11) and word in json.dumps(answer), answer
            assert (await node.cni("ADD", web, web_pod))[0] == 0
            status, answer = await node.cni("ADD", web, api_pod)
            assert status == 1 and answer["code"] == 11 and "belongs to pod shop/web" in answer["msg"]
            # Again for the same pod and sandbox: as a runtime that did not hear the answer would.
            assert (await node.cni("ADD", web, web_pod))[0] == 0
        assert issubclass(CniError, Exception) and api.v4

    run(work())


def test_live_enrolment_and_release_break_nothing(node: Node) -> None:
    async def work() -> None:
        web, web_pod = node.pod("web")
        api, api_pod = node.pod("api")
        node.start_engine()
        async with node.running_agent(), echo(api, PORT):
            await eventually("engine", lambda: node.agent.engine.up)
            old = await Client.open(web, api.v4, PORT)
            node.cluster.label("shop", "ambient")
            await node.enrolled(web_pod, Capture.LENIENT)
            await node.enrolled(api_pod, Capture.LENIENT)
            assert await old.ask("still") == "still" and not await node.through_engine(old)
            new = await Client.open(web, api.v4, PORT)
            assert await new.ask("new") == "new" and new.seen_as == web.v4 and await node.through_engine(new)
            assert await old.ask("still") == "still"
            await old.close()
            await node.enrolled(web_pod, Capture.STRICT)
            await node.enrolled(api_pod, Capture.STRICT)
            assert await new.ask("strict") == "strict"

            node.cluster.label("shop", "")
            for pod in (web_pod, api_pod):
                await node.captured(pod, Capture.DRAINING)
                assert node.cluster.pods[pod.key].redirection == ""
            assert await new.ask("drained") == "drained"
            native = await Client.open(web, api.v4, PORT)
            assert await native.ask("plain") == "plain" and not await node.through_engine(native)
            await new.close()
            await node.released(web_pod)
            await node.released(api_pod)
            assert await native.ask("plain") == "plain"
            await native.close()

    run(work())


def test_label_flips_at_any_moment(node: Node) -> None:
    async def work() -> None:
        web, web_pod = node.pod("web")
        api, api_pod = node.pod("api")
        node.start_engine()
        async with node.running_agent(), echo(api, PORT):
            await eventually("engine", lambda: node.agent.engine.up)
            kept = await Client.open(web, api.v4, PORT)
            for turn in range(30):
                node.cluster.label("shop", "ambient" if turn % 2 == 0 else "")
                if turn % 3:
                    await asyncio.sleep(0.01 * turn)
                client = await Client.open(web, api.v4, PORT)
                assert await client.ask(str(turn)) == str(turn)
                assert await kept.ask(str(turn)) == str(turn)
                await client.close()
            node.cluster.label("shop", "ambient")
            await node.enrolled(web_pod)
            await node.enrolled(api_pod)
            await kept.close()
            node.cluster.label("shop", "")
            await node.released(web_pod)
            await node.released(api_pod)

    run(work())


def test_engine_killed_and_back(node: Node) -> None:
    async def work() -> None:
        node.cluster.label("shop", "ambient")
        web, web_pod = node.pod("web", running=False)
        api, api_pod = node.pod("api", running=False)
        node.start_engine()
        async with node.running_agent(), echo(api, PORT) as seen:
            for sandbox, pod in ((web, web_pod), (api, api_pod)):
                assert (await node.cni("ADD", sandbox, pod))[0] == 0
            for _ in range(3):
                client = await Client.open(web, api.v4, PORT)
                assert await client.ask("before") == "before"
                native = not await node.through_engine(client)
                assert not native or node.same_node == "native"
                node.kill_engine()
                if native:
                    assert await client.ask("after") == "after"
                    await client.close()
                else:
                    with pytest.raises(OSError):
                        await client.ask("after")
                count = len(seen)
                with pytest.raises((OSError, TimeoutError)):
                    await Client.open(web, api.v4, PORT, seconds=1)
                assert len(seen) == count, "clear text reached the application while the engine was dead"
                node.start_engine()
                await node.enrolled(web_pod)
                await node.enrolled(api_pod)
                client = await Client.open(web, api.v4, PORT)
                assert client.seen_as == web.v4 and await node.through_engine(client)
                await client.close()

    run(work())


def test_agent_gone_and_back(node: Node) -> None:
    async def work() -> None:
        node.cluster.label("shop", "ambient")
        web, web_pod = node.pod("web", running=False)
        api, api_pod = node.pod("api", running=False)
        gone, gone_pod = node.pod("gone", running=False)
        node.start_engine()
        async with echo(api, PORT):
            async with node.running_agent():
                for sandbox, pod in ((web, web_pod), (api, api_pod), (gone, gone_pod)):
                    assert (await node.cni("ADD", sandbox, pod))[0] == 0
                    await node.enrolled(pod)
                kept = await Client.open(web, api.v4, PORT)
            assert await kept.ask("alone") == "alone"
            fresh = await Client.open(web, api.v4, PORT)
            assert await fresh.ask("alone") == "alone"
            del node.cluster.pods[gone_pod.key]
            async with node.running_agent() as agent:
                await node.enrolled(web_pod)
                await node.enrolled(api_pod)
                await node.released(gone_pod)
                assert await kept.ask("again") == "again" and await fresh.ask("again") == "again"
                assert agent.metrics.value("sidestep_reconcile_steps_total", step="engine_add", result="done") == 0
                assert await node.through_engine(kept)
                # Without records the programs alone must be enough to go on, and a label still counts.
                node.kill_engine()
                node.start_engine()
                await node.enrolled(web_pod)
                await node.enrolled(api_pod)
                client = await Client.open(web, api.v4, PORT)
                assert await client.ask("both new") == "both new"
                for each in (client, fresh, kept):  # a native one has outlived the engine
                    await each.close()

    run(work())


def test_a_pod_that_ends_leaves_nothing(node: Node) -> None:
    async def work() -> None:
        node.cluster.label("shop", "ambient")
        web, web_pod = node.pod("web", running=False)
        node.start_engine()
        async with node.running_agent():
            assert (await node.cni("ADD", web, web_pod))[0] == 0
            await node.enrolled(web_pod)
            node.bridge.remove(web)
            node.cluster.delete(web_pod)
            await node.released(web_pod)
            assert list((node.folder / "run" / "pods").iterdir()) == []
            assert await node.agent.engine.dump("identities") == [] or not node.agent.identities.get(
                spiffe("cluster.local", "shop", "web")
            )

    run(work())


def attached(kubelet: Kubelet) -> str:
    """What is attached to the kubelet's cgroup."""
    return tool(
        shutil.which("bpftool", path="/usr/sbin:/sbin:/usr/bin") or "bpftool", "cgroup", "show", str(kubelet.cgroup)
    )


def test_toggles_leave_nothing(node: Node) -> None:
    """One idle pod in and out again and again: descriptors, pins, rules, routes and programs are what they were."""

    async def work(kubelet: Kubelet) -> None:
        web, web_pod = node.pod("web", probed=(PORT,))
        node.kubelet_cgroup = kubelet.cgroup
        node.start_engine()
        async with node.running_agent():
            await eventually("engine", lambda: node.agent.engine.up)

            async def toggle() -> None:
                node.cluster.label("shop", "ambient")
                await node.enrolled(web_pod)
                node.cluster.label("shop", "")
                await node.released(web_pod)

            def left() -> dict[str, object]:
                assert node.engine is not None
                gc.collect()  # what earlier tests of this process forgot to close does not count, nor does its going
                listed = {
                    "agent fds": len(os.listdir("/proc/self/fd")),
                    "engine fds": len(os.listdir(f"/proc/{node.engine.pid}/fd")),
                    "pins": sorted(os.listdir(node.bpf_dir / "v3")),
                    "records": sorted(os.listdir(node.folder / "run" / "pods")),
                }
                for what in (
                    ["rule"],
                    ["-6", "rule"],
                    ["route", "show", "table", "100"],
                    ["-6", "route", "show", "table", "100"],
                ):
                    done = subprocess.run(["ip", "-n", web.namespace, *what], capture_output=True, text=True)
                    listed[" ".join(what)] = done.stdout
                listed["kubelet's cgroup"] = attached(kubelet)
                for device, way in (("eth0", "egress"), ("eth0", "ingress"), ("lo", "egress"), ("lo", "ingress")):
                    command = ["tc", "-n", web.namespace, "filter", "show", "dev", device, way]
                    listed[f"tc {device} {way}"] = subprocess.run(command, capture_output=True, text=True).stdout
                return listed

            for _ in range(5):
                await toggle()
            # What a toggle leaves to the loop's next turns (a reply being read, a namespace just looked at) is gone
            # when three looks agree: only then is it the state that has to come back.
            looks = [left()]

            def settled() -> bool:
                looks.append(left())
                return len(looks) > 3 and looks[-1] == looks[-2] == looks[-3]

            await eventually("toggles settled", settled)
            before = looks[-1]
            started = time.monotonic()
            for _ in range(30):
                await toggle()
            print(f"one toggle: {(time.monotonic() - started) / 30 * 1000:.0f} ms")
            try:
                await eventually("what is left is what was there", lambda: left() == before)
            finally:
                print(f"before: {before}\nafter:  {left()}")
            assert before["pins"] == [] and before["kubelet's cgroup"] == ""

    with Kubelet() as kubelet:
        run(work(kubelet))


def test_programs_taken_out_are_put_back(node: Node) -> None:
    async def work() -> None:
        node.cluster.label("shop", "ambient")
        web, web_pod = node.pod("web", running=False)
        api, api_pod = node.pod("api", running=False)
        node.start_engine()
        async with node.running_agent() as agent, echo(api, PORT):
            for sandbox, pod in ((web, web_pod), (api, api_pod)):
                assert (await node.cni("ADD", sandbox, pod))[0] == 0
                await node.enrolled(pod)

            async def repaired(times: int) -> None:
                repairs = "sidestep_capture_repairs_total"
                await eventually(f"repair {times}", lambda: agent.metrics.value(repairs) == times)

            ways = (("eth0", "egress"), ("lo", "ingress"), ("lo", "egress"), ("eth0", "ingress"))
            for number, (device, way) in enumerate(ways, start=1):
                tool("tc", "-n", web.namespace, "filter", "del", "dev", device, way)
                await repaired(number)
            ip("-n", web.namespace, "rule", "del", "pref", "32764")
            await repaired(5)
            await node.enrolled(web_pod, Capture.STRICT)
            client = await Client.open(web, api.v4, PORT)
            assert await client.ask("whole") == "whole" and await node.through_engine(client)
            await client.close()

    run(work())


def test_both_gone_stays_closed_until_the_agent_is_back(node: Node) -> None:
    async def work() -> None:
        node.cluster.label("shop", "ambient")
        web, web_pod = node.pod("web", running=False)
        api, api_pod = node.pod("api", running=False)
        node.start_engine()
        async with echo(api, PORT) as seen:
            async with node.running_agent():
                for sandbox, pod in ((web, web_pod), (api, api_pod)):
                    assert (await node.cni("ADD", sandbox, pod))[0] == 0
                    await node.enrolled(pod)
            node.kill_engine()
            for _ in range(3):
                with pytest.raises((OSError, TimeoutError)):
                    await Client.open(web, api.v4, PORT, seconds=1)
            node.start_engine()
            with pytest.raises((OSError, TimeoutError)):
                await Client.open(web, api.v4, PORT, seconds=1)
            assert seen == []
            async with node.running_agent():
                await node.enrolled(web_pod, Capture.STRICT)
                await node.enrolled(api_pod, Capture.STRICT)
                client = await Client.open(web, api.v4, PORT)
                assert client.seen_as == web.v4 and await node.through_engine(client)
                await client.close()

    run(work())


def test_a_new_sandbox_of_the_same_pod(node: Node) -> None:
    async def work() -> None:
        node.cluster.label("shop", "ambient")
        web, web_pod = node.pod("web", running=False)
        node.start_engine()
        async with node.running_agent():
            assert (await node.cni("ADD", web, web_pod, container="first"))[0] == 0
            await node.enrolled(web_pod)
            again = node.bridge.sandbox()
            assert (await node.cni("ADD", again, web_pod, container="second"))[0] == 0
            resident = node.resident(web_pod)
            assert resident is not None and resident.netns is not None
            assert resident.captured_ino == os.stat(again.path).st_ino and resident.capture is Capture.STRICT
            # The runtime cleans the first one up late: that must not touch the second.
            assert (await node.cni("DEL", web, web_pod, container="first"))[0] == 0
            await node.enrolled(web_pod, Capture.STRICT)
            assert (await node.cni("DEL", again, web_pod, container="second"))[0] == 0
            await node.released(web_pod)

    run(work())


def test_pins_taken_away_are_made_again(node: Node) -> None:
    async def work() -> None:
        node.cluster.label("shop", "ambient")
        web, web_pod = node.pod("web", running=False)
        api, api_pod = node.pod("api", running=False)
        node.start_engine()
        async with node.running_agent() as agent, echo(api, PORT):
            for sandbox, pod in ((web, web_pod), (api, api_pod)):
                assert (await node.cni("ADD", sandbox, pod))[0] == 0
                await node.enrolled(pod)
            tool("rm", "-r", str(node.bpf_dir / "v3" / web_pod.uid))
            await eventually("repair", lambda: agent.metrics.value("sidestep_capture_repairs_total") >= 1)
            await node.enrolled(web_pod, Capture.STRICT)
            client = await Client.open(web, api.v4, PORT)
            assert await client.ask("whole") == "whole" and await node.through_engine(client)
            await client.close()
            node.cluster.label("shop", "")
            await node.released(web_pod)
            await node.released(api_pod)

    run(work())


def test_a_new_pod_is_held_until_its_record_is_there(node: Node) -> None:
    async def work() -> None:
        node.cluster.label("shop", "ambient")
        web, web_pod = node.pod("web", running=False)
        api, api_pod = node.pod("api", running=False)
        node.start_engine()
        async with node.running_agent() as agent, echo(api, PORT) as seen:
            node.publish(["api"])
            for sandbox, pod in ((web, web_pod), (api, api_pod)):
                assert (await node.cni("ADD", sandbox, pod))[0] == 0
                await node.enrolled(pod)

            async def known() -> set[str]:
                return {each["name"] for each in await agent.engine.dump("workloads")}

            while await known() != {"api"}:
                await asyncio.sleep(0.02)
            async with asyncio.TaskGroup() as group:
                waiting = group.create_task(Client.open(web, api.v4, PORT))
                while (await agent.engine.pod_stats(web_pod.uid)).held != 1:
                    await asyncio.sleep(0.02)
                assert seen == []
                node.publish(["api", "web"])
            client = waiting.result()
            assert client.seen_as == web.v4 and (await agent.engine.pod_stats(web_pod.uid)).held == 0
            await client.close()
            node.publish(["api"])
            while await known() != {"api"}:
                await asyncio.sleep(0.02)
            with pytest.raises(OSError):
                await Client.open(web, api.v4, PORT, seconds=60)
            assert seen == [web.v4]

    run(work())
