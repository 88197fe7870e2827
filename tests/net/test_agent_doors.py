"""Doors under load, as the agent keeps them: one end of native flows leaves the mesh and comes back, a pod is replaced
by another with its addresses, the agent is killed meanwhile.
"""

import asyncio
import itertools
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import pytest

from sidestep.node.pods import Pod
from sidestep.node.reconcile import Capture
from tests.harness.netns import Sniffer
from tests.harness.pods import Client, Sandbox, echo, eventually, ip
from tests.net import test_agent
from tests.net.test_agent import PORT, Node, run
from tests.net.test_agent_vouched import allow, flows, handed, native

node = test_agent.node
TOGGLES = 4


@pytest.fixture
def same_node() -> str:
    """Nothing here is without it."""
    return "native"


@dataclass(slots=True)
class Load:
    """What was asked and answered. A connection that is lost, or an answer that is another, is an exception of the
    block.
    """

    asked: int = 0
    opened: int = 0
    kept: list[Client] = field(default_factory=list)

    async def goes_on(self) -> None:
        """Each kept flow and each family has been heard of since."""
        asked, opened = self.asked, self.opened
        await eventually("the load goes on", lambda: self.asked > asked + 20 and self.opened > opened + 4)


@asynccontextmanager
async def load(web: Sandbox, api: Sandbox, kept: list[Client]) -> AsyncIterator[Load]:
    """Flows that are kept talk all the time, and new ones are made all the time, over both families."""
    found = Load(kept=kept)
    done = asyncio.Event()

    async def talk(client: Client) -> None:
        for number in itertools.count():
            if done.is_set():
                return
            text = f"{number}" + "x" * (number % 3 * 20_000)
            assert await client.ask(text) == text
            found.asked += 1
            await asyncio.sleep(0)

    async def come(address: str) -> None:
        while not done.is_set():
            client = await Client.open(web, address, PORT)
            assert await client.ask("new") == "new"
            await client.close()
            found.opened += 1

    async with asyncio.TaskGroup() as group:
        for client in kept:
            group.create_task(talk(client))
        for address in (api.v4, api.v6):
            group.create_task(come(address))
        try:
            yield found
        finally:
            done.set()


@pytest.fixture
def shop(node: Node) -> Node:
    """Pods web and api of a mesh, each in a namespace of its own name. A moment of quiet, because connections come all
    the time: one whose SYN the engine has and nobody has seen yet is to be seen.
    """
    node.drain_quiet_ms = 300
    node.pods = {name: node.pod(name, namespace=name) for name in ("web", "api")}
    for name in node.pods:
        node.cluster.label(name, "ambient")
    return node


def tell(shop: Node, which: str, mesh: bool) -> None:
    """The mesh learns that a pod has come or gone, as the control plane would say."""
    for record in shop.state["workloads"]:
        if record["name"] == which:
            record["protocol"] = "HBONE" if mesh else "TCP"
    shop.publish(["web", "api"])


async def flows_of(shop: Node) -> list[Client]:
    """Two native flows of each family, of pods that are enrolled."""
    (web, web_pod), (api, api_pod) = shop.pods["web"], shop.pods["api"]
    for pod in (web_pod, api_pod):
        await shop.enrolled(pod, Capture.STRICT)
    made = []
    for address in (api.v4, api.v6) * 2:
        await allow(shop, web, api, api_pod, address)
        made.append(await native(shop, web, api, api_pod, address))
    return made


@pytest.mark.parametrize("which", ["web", "api"])
def test_one_end_leaves_and_comes_back_under_load(shop: Node, which: str) -> None:
    """Nothing is lost, whichever it is; also while an agent is killed and another one goes on."""

    async def work() -> None:
        shop.start_engine()
        (web, _), (api, api_pod) = shop.pods["web"], shop.pods["api"]
        pod = shop.pods[which][1]
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(echo(api, PORT))
            async with shop.running_agent():
                kept = await flows_of(shop)
                going = await stack.enter_async_context(load(web, api, kept))
                for _ in range(TOGGLES):
                    shop.cluster.label(which, "")
                    tell(shop, which, False)
                    await shop.released(pod)
                    await going.goes_on()
                    shop.cluster.label(which, "ambient")
                    await shop.enrolled(pod)
                    tell(shop, which, True)
                    await going.goes_on()
                tell(shop, which, False)
                shop.cluster.label(which, "")  # and the agent is killed in the middle of it
                await asyncio.sleep(0)
            await going.goes_on()
            async with shop.running_agent():
                await shop.released(pod)
                shop.cluster.label(which, "ambient")
                await shop.enrolled(pod)
                tell(shop, which, True)
                await going.goes_on()
                mine = {client.local[1] for client in kept}
                assert mine <= await flows(shop), "told by the end that stayed"
                await becomes_native(shop, api, api_pod)
                await stack.aclose()
                print(f"{which}: {going.asked} answers over {len(kept)} flows, {going.opened} connections")
                for client in kept:
                    await client.close()

    run(work())


async def becomes_native(shop: Node, server: Sandbox, pod: Pod) -> None:
    """Connections to the pod are handed to its application natively, once the engine has heard of it."""
    web, _ = shop.pods["web"]
    for address in (server.v4, server.v6):
        async with asyncio.timeout(30):
            before = await handed(shop, pod)
            while await handed(shop, pod) == before:
                client = await Client.open(web, address, PORT)
                assert await client.ask("hello") == "hello"
                await client.close()


async def replaced(shop: Node) -> tuple[Sandbox, Pod]:
    """api goes as a runtime takes it away, and pod next gets its addresses. Not yet enrolled."""
    api, api_pod = shop.pods["api"]
    shop.cluster.delete(api_pod)
    assert (await shop.cni("DEL", api, api_pod))[0] == 0
    await shop.released(api_pod)
    shop.bridge.unplug(api)
    made = shop.pod("next", namespace="api", running=False, of=api)
    ip("-n", shop.pods["web"][0].namespace, "neigh", "flush", "all")  # for want of a gratuitous ARP
    return made


@pytest.mark.parametrize("killed", [False, True], ids=["one agent", "agent killed"])
def test_a_pod_is_replaced_under_load(shop: Node, killed: bool) -> None:
    """Flows with the pod that was there end for whoever speaks; none of their bytes is at the next pod's link, and new
    connections reach it when it is enrolled, natively when they are allowed. So also if an agent was killed before it
    had heard of any of it.
    """
    canary = os.urandom(12).hex()

    async def speak(client: Client) -> None:
        with pytest.raises(ConnectionError):
            while True:
                assert await client.ask(canary) == canary
        await client.close()

    async def work() -> None:
        shop.start_engine()
        api, _ = shop.pods["api"]
        async with AsyncExitStack() as stack:
            talking = []
            async with AsyncExitStack() as before, echo(api, PORT):
                await before.enter_async_context(shop.running_agent())
                shop.publish(["web", "api"])
                kept = await flows_of(shop)
                group = await stack.enter_async_context(asyncio.TaskGroup())
                talking = [group.create_task(speak(client)) for client in kept[:2]]
                if killed:
                    await before.aclose()
                    await before.enter_async_context(shop.running_agent())
                following, pod = await replaced(shop)
                sniffer = stack.enter_context(Sniffer(following.path))
                clients = await stack.enter_async_context(echo(following, PORT))
                assert (await shop.cni("ADD", following, pod))[0] == 0
                idle = [group.create_task(speak(client)) for client in kept[2:]]
                await asyncio.gather(*talking, *idle)
                assert clients == [], "the engine has not heard of it"
                shop.publish(["web", "next"])
                await shop.enrolled(pod)
                await becomes_native(shop, following, pod)
                assert not any(canary.encode() in frame for frame in sniffer.frames())
                await stack.aclose()

    run(work())
