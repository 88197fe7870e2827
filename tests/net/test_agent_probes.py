"""The kubelet exemption as the agent keeps it: the real engine, real capture, and a kubelet in a cgroup of its own."""

import asyncio
import errno
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidestep.lab.cluster import cgroup2
from sidestep.node.pods import Pod
from tests.harness.kubelet import Kubelet
from tests.harness.netns import inside
from tests.harness.pods import Sandbox, echo, eventually
from tests.net.test_agent import PORT, Node, attached, node, run

__all__ = ["node"]


@pytest.fixture
def kubelet() -> Iterator[Kubelet]:
    with Kubelet() as made:
        yield made


async def greeted(made: socket.socket, address: str, port: int = PORT) -> str:
    """What the application says at once: the address it saw; "" where the connection is refused or reset."""
    loop = asyncio.get_running_loop()
    made.setblocking(False)
    try:
        async with asyncio.timeout(15):
            await loop.sock_connect(made, (address, port))
            return (await loop.sock_recv(made, 100)).decode().strip()
    except OSError as err:
        assert err.errno in (errno.ECONNREFUSED, errno.ECONNRESET), err
        return ""
    finally:
        made.close()


async def probe(kubelet: Kubelet, host: Sandbox, address: str, port: int = PORT) -> str:
    """The kubelet's; `host` is the node's namespace."""
    return await greeted(kubelet.socket(host.path, 6 if ":" in address else 4), address, port)


async def other(host: Sandbox, address: str) -> str:
    """Any other process of the node."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return await greeted(inside(host.path, lambda: socket.socket(family)), address)


async def handed(node: Node, pod: Pod) -> int:
    return (await node.agent.captures.counters(pod.uid))["to_application_probe"]


def test_probes_go_on_whatever_dies(node: Node, kubelet: Kubelet) -> None:
    async def work() -> None:
        node.cluster.label("shop", "ambient")
        host = node.bridge.sandbox()
        web, web_pod = node.pod("web", running=False, probed=(PORT,))
        api, api_pod = node.pod("api", running=False)
        node.kubelet_cgroup = kubelet.cgroup
        node.start_engine()
        async with echo(web, PORT), echo(api, PORT):
            async with node.running_agent() as agent:
                for sandbox, pod in ((web, web_pod), (api, api_pod)):
                    assert (await node.cni("ADD", sandbox, pod))[0] == 0
                    await node.enrolled(pod)
                assert agent.probes.status() == {"cgroup": str(kubelet.cgroup), "active": True, "reason": ""}
                for count, (mine, address) in enumerate(((host.v4, web.v4), (host.v6, web.v6)), start=1):
                    assert await probe(kubelet, host, address) == mine
                    assert await handed(node, web_pod) == count
                    await other(host, address)
                    assert await probe(kubelet, host, api.v4 if ":" not in address else api.v6) in (mine, "")
                assert (await handed(node, web_pod), await handed(node, api_pod)) == (2, 0), "api declares no probe"
                syns = await agent.captures.kubelet_counters()
                assert syns == {"noted": 2, "refused_port": 2, "full": 0}
                node.kill_engine()
                for mine, address in ((host.v4, web.v4), (host.v6, web.v6)):
                    assert await probe(kubelet, host, address) == mine
                    assert await other(host, address) == ""
            # No agent and no engine: what is pinned goes on.
            assert await probe(kubelet, host, web.v4) == host.v4
            assert await other(host, web.v4) == ""
            node.start_engine()
            async with node.running_agent() as agent:
                assert await probe(kubelet, host, web.v6) == host.v6
                await node.enrolled(web_pod)
                assert await probe(kubelet, host, web.v4) == host.v4
                assert await handed(node, web_pod) == 7
                node.cluster.label("shop", "")
                await node.released(web_pod)
                await node.released(api_pod)
                assert list((node.bpf_dir / "v3").iterdir()) == [] and attached(kubelet) == ""
                assert await probe(kubelet, host, web.v4) == host.v4
                assert agent.probes.status()["active"]

    run(work())


def test_what_is_taken_away_is_put_back(node: Node, kubelet: Kubelet) -> None:
    """The link, the port, the kubelet's directory itself: until it is back probes are like any other clear text."""

    async def work() -> None:
        node.cluster.label("shop", "ambient")
        host = node.bridge.sandbox()
        web, web_pod = node.pod("web", running=False, probed=(PORT,))
        node.kubelet_cgroup = kubelet.cgroup
        node.start_engine()
        async with echo(web, PORT), node.running_agent() as agent:
            assert (await node.cni("ADD", web, web_pod))[0] == 0
            await node.enrolled(web_pod)
            node.kill_engine()
            assert await probe(kubelet, host, web.v4) == host.v4

            async def back() -> None:
                async with asyncio.timeout(20):
                    while await probe(kubelet, host, web.v4) != host.v4:
                        await asyncio.sleep(0.05)

            (node.bpf_dir / "v3/node/link").unlink()
            await back()
            kubelet.__exit__()
            await eventually("said so", lambda: not agent.probes.status()["active"])
            assert "is not there" in agent.probes.status()["reason"]
            assert await other(host, web.v4) == ""
            kubelet.__enter__()
            await back()
            node.cluster.delete(web_pod)
            await eventually("gone", lambda: web_pod.uid not in agent.residents)
            assert list((node.bpf_dir / "v3").iterdir()) == []

    run(work())


@pytest.mark.parametrize("given", ["root", "no cgroup", "a pod's"])
def test_a_directory_that_is_not_the_kubelets_exempts_nobody(
    node: Node, kubelet: Kubelet, tmp_path: Path, given: str, capfd: pytest.CaptureFixture[str]
) -> None:
    directory, reason = {
        "root": (cgroup2(), "or its root"),
        "no cgroup": (tmp_path, "no cgroup2 directory"),
        "a pod's": (kubelet.cgroup / "kubepods", "is a pod's"),
    }[given]

    async def work() -> None:
        node.cluster.label("shop", "ambient")
        host = node.bridge.sandbox()
        web, web_pod = node.pod("web", running=False, probed=(PORT,))
        node.kubelet_cgroup = directory
        node.start_engine()
        async with echo(web, PORT), node.running_agent() as agent:
            assert (await node.cni("ADD", web, web_pod))[0] == 0
            await node.enrolled(web_pod)
            status = agent.probes.status()
            assert (status["active"], status["cgroup"]) == (False, "") and reason in status["reason"]
            node.kill_engine()
            assert await probe(kubelet, host, web.v4) == ""
            assert await handed(node, web_pod) == 0
            assert not (node.bpf_dir / "v3/node/link").exists()

    made = kubelet.cgroup / "kubepods"
    made.mkdir()
    try:
        run(work())
    finally:
        made.rmdir()
    lines = [line for line in capfd.readouterr().err.splitlines() if "probes_not_exempt" in line]
    assert len(lines) == 1 and "WARN" in lines[0] and "--kubelet-cgroup" in lines[0]


SEARCH = """
import json, subprocess, sys
from pathlib import Path
from sidestep.node.probes import NoCgroup, search
REST = "import sys; open('/proc/self/comm', 'w').write(sys.argv[1]); print('up', flush=True); sys.stdin.read()"
def ask():
    try:
        found = search()
        return [found.pid, str(found.directory)]
    except NoCgroup as error:
        return [0, str(error)]
def start(name, cgroup, *before):
    made = subprocess.Popen([*before, sys.executable, "-c", REST, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    made.stdout.readline()
    Path(cgroup, "cgroup.procs").write_text(str(made.pid))
    return made
root, mine, pods = sys.argv[1:]
setpriv = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
said = {"nobody": ask()}
for what, arguments in {
    "kubelet": ("kubelet", mine),
    "another name": ("kubelet2", mine),
    "in the root": ("kubelet", root),
    "of a pod": ("kubelet", pods),
    "not root": ("kubelet", mine, *setpriv),
    "of another namespace": ("kubelet", mine, "unshare", "--net"),
}.items():
    made = start(*arguments)
    said[what] = [*ask(), made.pid]
    if what == "kubelet":
        second = start("kubelet", mine)
        said["two"] = ask()
        second.kill(), second.wait()
    made.kill(), made.wait()
print(json.dumps(said))
"""


def test_the_kubelet_is_found_and_nobody_else(kubelet: Kubelet) -> None:
    """In a network namespace of its own, so that no other kubelet of this machine is in the way."""
    pods = kubelet.cgroup / "kubepods"
    pods.mkdir()
    try:
        done = subprocess.run(
            ["unshare", "--net", sys.executable, "-c", SEARCH, str(cgroup2()), str(kubelet.cgroup), str(pods)],
            capture_output=True,
            text=True,
            timeout=60,
        )
    finally:
        pods.rmdir()
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    pid, directory, real = said["kubelet"]
    assert (pid, directory) == (real, str(kubelet.cgroup))
    assert said["two"] == [0, "there are 2 processes kubelet of root beside the agent"]
    assert said["in the root"][:2] == [0, "the kubelet's cgroup2 directory is /"]
    for what in ("nobody", "another name", "of a pod", "not root", "of another namespace"):
        assert said[what][:2] == [0, "no kubelet found"], what
