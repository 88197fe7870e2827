"""What becomes of a pod whose certificate cannot be had, or cannot be renewed: a clear line in the log, an error on the
page, no connection that hangs; and everything as before once the authority answers.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import yaml

from sidestep.node.admin import Pages
from sidestep.node.agent import Agent
from sidestep.node.httpd import Request
from sidestep.node.pods import spiffe
from sidestep.node.reconcile import Capture
from tests.harness.pods import Client, Sandbox, echo, eventually
from tests.net import test_agent
from tests.net.test_agent import PORT, Node, run

node = test_agent.node  # the fixture


@pytest.fixture
def same_node() -> str:
    """Once: what ends with a certificate on one node is in test_vouched_hazards.py."""
    return "direct"


WEB = spiffe("cluster.local", "shop", "web")
LIFE_S = 24  # half of it is spent before the authority is asked again; the rest is room for a machine that is busy


def give(node: Node, *certificates: dict[str, str]) -> None:
    """The authority has these from now on."""
    node.state["certificates"] = list(certificates)
    node.state_file.write_text(yaml.safe_dump(node.state))
    assert node.feed is not None
    node.feed.reload()


async def page(agent: Agent) -> dict[str, Any]:
    """WEB on /certificates."""
    pages = Pages(agent, dict, list)
    answer = json.loads((await pages.admin(Request("GET", "/certificates", {}))).body)
    return dict(next(each for each in answer if each["identity"] == WEB))


async def logged(node: Node, text: str) -> None:
    """Waits until the engine has said so: its log thread writes a little after the fact."""
    await eventually(text, lambda: text in (node.folder / "engine.log").read_text())


async def until_open(web: Sandbox, address: str, opens: bool) -> None:
    """Connects until it goes, or does not any more. Each attempt ends by itself, the deadline is a hang guard."""
    async with asyncio.timeout(60):
        while True:
            try:
                client = await Client.open(web, address, PORT, seconds=30)
            except OSError:
                if not opens:
                    return
            else:
                await client.close()
                if opens:
                    return
            await asyncio.sleep(0.05)


def with_two(node: Node, seconds: float, work: Callable[[Agent, Sandbox, Sandbox], Awaitable[None]]) -> None:
    """Pods web and api, api with a certificate, web with one that ends in so many seconds; 0: with none."""

    async def both() -> None:
        node.cluster.label("shop", "ambient")
        web, web_pod = node.pod("web", running=False)
        api, api_pod = node.pod("api", running=False)
        certificates = [each for each in node.state["certificates"] if each["identity"] != WEB]
        node.state["certificates"] = [*certificates, *([node.authority.issue(WEB, seconds)] if seconds else [])]
        node.start_engine()
        async with node.running_agent() as agent, echo(api, PORT):
            for sandbox, pod in ((web, web_pod), (api, api_pod)):
                assert (await node.cni("ADD", sandbox, pod))[0] == 0
                await node.captured(pod, Capture.STRICT)
            await work(agent, web, api)

    run(both())


def test_without_a_certificate_connections_fail_with_a_clear_line(node: Node) -> None:
    async def work(agent: Agent, web: Sandbox, api: Sandbox) -> None:
        for address in (api.v4, api.v6):
            await until_open(web, address, False)
        await logged(node, f"no certificate for {WEB} within 5 s")
        told = await page(agent)
        assert (told["state"], told["error"]) == ("missing", "the state file names no certificate for it")
        assert agent.metrics.value("sidestep_certificate_requests_total", result="failed") >= 1
        await eventually("gauge", lambda: agent.metrics.value("sidestep_identities", state="missing") == 1)
        give(node, *node.state["certificates"], node.authority.issue(WEB))
        for address in (api.v4, api.v6):  # the control: it was the certificate
            await until_open(web, address, True)
        assert (await page(agent))["error"] == ""

    with_two(node, 0, work)


def test_what_cannot_be_renewed_works_until_it_ends_and_not_longer(node: Node) -> None:
    async def work(agent: Agent, web: Sandbox, api: Sandbox) -> None:
        api_certificate = [each for each in node.state["certificates"] if each["identity"] != WEB]
        give(node, *api_certificate)  # the authority is away for this one
        identity = agent.identities.get(WEB)
        assert identity is not None and identity.certificate is not None
        ends_s = identity.certificate.not_after_s
        await eventually("a request that failed", lambda: (agent.identities.get(WEB) or identity).error)
        await until_open(web, api.v4, True)
        assert (await page(agent))["state"] == "available" and (await page(agent))["error"]
        await until_open(web, api.v4, False)
        await logged(node, f"the certificate for {WEB} has expired")
        told = await page(agent)
        assert told["state"] == "expired" and told["not_after"] == int(ends_s) and told["error"]
        give(node, *api_certificate, node.authority.issue(WEB))
        await until_open(web, api.v4, True)
        assert (await page(agent))["state"] == "available" and not (await page(agent))["error"]

    with_two(node, LIFE_S, work)
