"""What an agent answers about policy: its pages over the real engine, fed by a scripted xDS server; and what becomes of
responses of which a part cannot be decoded.
"""

import asyncio
import contextlib
import io
import ipaddress
import json
import socket
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from sidestep.__main__ import main
from sidestep.cli import policies as cli
from sidestep.cli.nodes import Answering, Node
from sidestep.node import cni, httpd
from sidestep.node.admin import Pages
from sidestep.node.agent import Agent, Place
from sidestep.node.engine import Engine
from sidestep.node.httpd import Request
from sidestep.node.metrics import Metrics
from sidestep.node.resident import Names
from sidestep.node.xds import ADDRESS, AUTHORIZATION, Stream
from sidestep.wire.batch import NAME_MAX
from sidestep.wire.pb import authorization_pb2 as _pb
from sidestep.wire.pb import workload_pb2
from tests.net.test_agent_feed import Process, Server, feeding, run

pb: Any = _pb
BAD: Any = b"\xff"
WEB = "spiffe://cluster.local/ns/shop/sa/web"
DB4, DB6, OTHER4 = "10.77.0.2", "fd77::2", "10.77.0.3"


def workload(name: str, namespace: str, *addresses: str, policies: tuple[str, ...] = ()) -> Any:
    record = workload_pb2.Address()
    made = record.workload
    made.uid, made.name, made.namespace = f"Kubernetes//Pod/{namespace}/{name}", name, namespace
    made.service_account = name
    made.tunnel_protocol = workload_pb2.TunnelProtocol.HBONE
    made.addresses.extend(ipaddress.ip_address(each).packed for each in addresses)
    made.authorization_policies.extend(policies)
    return record.SerializeToString()


def policy(key: str, namespace: str = "", action: int = 1, scope: int = 1) -> Any:
    """A DENY (or ALLOW: 0) of its namespace for callers of a namespace; "" is everybody."""
    home, _, name = key.partition("/")
    made = pb.Authorization(name=name, namespace=home, action=action, scope=scope)
    rule = made.rules.add()
    if namespace:
        rule.clauses.add().matches.add().namespaces.add(exact=namespace)
    return made.SerializeToString()


DB: dict[str, Any] = {
    "Kubernetes//Pod/shop/db": workload("db", "shop", DB4, DB6),
    "Kubernetes//Pod/other/x": workload("x", "other", OTHER4),
}


class Asked:
    """The agent's pages over that engine."""

    def __init__(self, engine: Engine, stream: Stream) -> None:
        nobody: Any = None
        names = Names("cluster.local", "Kubernetes", 0, None)
        self.agent = Agent(Place("n1", {}), names, nobody, Path("none"), nobody, nobody, nobody, Metrics(), lambda: 0.5)
        self.agent.engine = engine
        self.pages = Pages(self.agent, stream.status, lambda: [])

    async def get(self, path: str, **query: str) -> tuple[HTTPStatus, Any]:
        response = await self.pages.admin(Request("GET", path, {}, query))
        return response.status, json.loads(response.body)

    async def authz(self, destination: str, identity: str = "", source: str = "10.77.0.1") -> dict[str, Any]:
        status, answer = await self.get("/authz", identity=identity, source=source, destination=destination)
        assert status == HTTPStatus.OK, answer
        return dict(answer)

    async def allowed(self, destination: str, identity: str = WEB) -> bool:
        return bool((await self.authz(destination, identity))["allow"])


def working(folder: Path, work: Callable[[Server, Asked, Stream], Awaitable[None]]) -> None:
    async def both(process: Process, server: Server) -> None:
        async with feeding(process, server, folder) as (engine, stream):
            await server.first(1)
            server.say("db", **DB)
            await server.answer("db")
            await work(server, Asked(engine, stream), stream)

    run(folder, both)


def test_the_page_answers_what_the_engine_decides(tmp_path: Path) -> None:
    async def work(server: Server, asked: Asked, _: Stream) -> None:
        answer = await asked.authz(f"{DB4}:80", WEB)
        assert (answer["allow"], answer["policy"], answer["rule"]) == (True, "", -1)
        assert answer["node"] == "n1" and answer["workload"] == "Kubernetes//Pod/shop/db"
        server.say("p", url=AUTHORIZATION, **{"shop/deny": policy("shop/deny", "shop")})
        await server.answer("p")
        for destination in (f"{DB4}:80", f"[{DB6}]:80"):
            answer = await asked.authz(destination, WEB)
            assert (answer["allow"], answer["policy"], answer["rule"]) == (False, "shop/deny", 0)
            assert answer["reason"] == "explicitly denied by: shop/deny"
            assert [(each["name"], each["matched"]) for each in answer["policies"]] == [("shop/deny", True)]
            assert (await asked.authz(destination))["allow"], "without an identity there is no namespace"
        answer = await asked.authz("10.77.9.9:80", WEB)
        assert (answer["workload"], answer["reason"]) == ("", "no workload at 10.77.9.9")
        status, answer = await asked.get("/authz", identity="nobody", source="x", destination="y")
        assert status == HTTPStatus.BAD_REQUEST and "SPIFFE" in answer["error"]
        assert (await asked.get("/authz"))[0] == HTTPStatus.BAD_REQUEST
        status, answer = await asked.get("/denials")
        assert (status, answer) == (HTTPStatus.OK, [])

    working(tmp_path, work)


def test_what_cannot_be_decoded_denies_its_namespace_and_the_rest_is_in_force(tmp_path: Path) -> None:
    async def work(server: Server, asked: Asked, stream: Stream) -> None:
        assert await asked.allowed(f"{DB4}:80") and await asked.allowed(f"{OTHER4}:80")
        server.say("good", url=AUTHORIZATION, **{"shop/p": policy("shop/p", "nobody")})
        assert not (await server.answer("good")).HasField("error_detail")
        assert await asked.allowed(f"{DB4}:80"), "the control: one that can be decoded denies whom it says"
        # Three in one response: one that is good, one that had a good version, one that never had.
        sent: dict[str, Any] = {"other/q": policy("other/q", "shop"), "shop/p": BAD, "shop/new": BAD}
        server.say("half", url=AUTHORIZATION, **sent)
        nack = await server.answer("half")
        assert nack.error_detail.message == "shop/new: malformed protobuf; shop/p: malformed protobuf"
        assert not await asked.allowed(f"{OTHER4}:80"), "the good one of the response is in force"
        answer = await asked.authz(f"{DB4}:80", WEB)
        assert (answer["allow"], answer["policy"]) == (False, "shop/new"), "only the one that never was good"
        _, held = await asked.get("/policies")
        assert [(each["key"], bool(each.get("undecodable"))) for each in held] == [
            ("other/q", False),
            ("shop/new", True),
            ("shop/p", False),
        ]
        # What `sidestep policies` makes of it.
        _, status = await asked.get("/status")
        assert "shop/new: malformed protobuf" in status["control"]["rejected"]
        agent = Answering(Node(tmp_path), "n1", status)
        assert {each["policy"]: each["instead"] for each in cli.refusals([agent], {"n1": held})} == {
            "shop/p": "its last version that could be decoded stays in force",
            "shop/new": "namespace shop is denied in its place",
        }
        [row] = [each for each in cli.from_engines({"n1": held}) if each["name"] == "new"]
        assert not row["enforced"] and row["not_enforced"] == ["n1: malformed protobuf"]
        # Repaired and removed: nothing of it stays, and nothing is told of it any more.
        server.say("mended", url=AUTHORIZATION, removed=("shop/new",), **{"shop/p": policy("shop/p", "none")})
        assert not (await server.answer("mended")).HasField("error_detail")
        assert await asked.allowed(f"{DB4}:80")
        assert stream.status()["rejected"] == "" and stream.status()["refused"] == []

    working(tmp_path, work)


def test_the_command_says_what_was_refused_and_why(tmp_path: Path) -> None:
    """`sidestep status` and `sidestep policies` over the agent's socket."""

    async def work(server: Server, asked: Asked, _: Stream) -> None:
        def said(*words: str) -> tuple[int, str]:
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                return main([*words, "--run-dir", str(tmp_path / "run")]), out.getvalue()

        listener = cni.listen(tmp_path / "run" / "agent.sock", socket.SOCK_STREAM)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(httpd.serve(listener, asked.pages.admin))
            server.say("good", url=AUTHORIZATION, **{"shop/p": policy("shop/p", "nobody")})
            await server.answer("good")
            status, text = await asyncio.to_thread(said, "status")
            assert status == 0 and "refused" not in text
            server.say("bad", url=AUTHORIZATION, **{"shop/p": BAD, "shop/new": BAD})
            await server.answer("bad")
            status, text = await asyncio.to_thread(said, "status")
            told = "shop/new: malformed protobuf; shop/p: malformed protobuf"
            assert status == 0 and f"n1 refused a part of the control plane's updates: {told}" in text
            status, text = await asyncio.to_thread(said, "policies")
            assert status == 1
            assert "shop/p on n1: malformed protobuf; its last version that could be decoded stays in force" in text
            assert "shop/new on n1: malformed protobuf; namespace shop is denied in its place" in text
            task.cancel()

    working(tmp_path, work)


def test_of_the_root_namespace_it_denies_everything(tmp_path: Path) -> None:
    async def work(server: Server, asked: Asked, _: Stream) -> None:
        server.say("one", url=AUTHORIZATION, **{"istio-system/bad": BAD})
        await server.answer("one")
        for destination in (f"{DB4}:80", f"{OTHER4}:80"):
            assert (await asked.authz(destination, WEB))["policy"] == "istio-system/bad"
        server.say("two", url=AUTHORIZATION, removed=("istio-system/bad",))
        await server.answer("two")
        assert await asked.allowed(f"{DB4}:80") and await asked.allowed(f"{OTHER4}:80")

    working(tmp_path, work)


@pytest.mark.parametrize(
    ("name", "everywhere", "unsayable"),
    [
        ("shop/with space", False, True),
        ("shop/line\nfeed", False, True),
        ("shop/ünlaut", False, False),
        ("shop/" + "x" * NAME_MAX, False, False),
        ("shop/" + "x" * (NAME_MAX - 5), False, False),
        ("x" * (NAME_MAX + 1), True, False),
        ("no-namespace", True, False),
        ("", True, False),
    ],
)
def test_a_policy_whose_name_cannot_be_is_not_passed_over(
    tmp_path: Path, name: str, everywhere: bool, unsayable: bool
) -> None:
    """Named in the NACK, stood in for, never remembered, and gone when the server says so."""

    async def work(server: Server, asked: Asked, stream: Stream) -> None:
        server.say("one", url=AUTHORIZATION, **{name: BAD})
        nack = await server.answer("one")
        assert nack.error_detail.message.startswith(f"{name[:200]}: ")
        assert not await asked.allowed(f"{DB4}:80") and await asked.allowed(f"{OTHER4}:80") is not everywhere
        assert stream._held[AUTHORIZATION] == {name: ""}
        assert [each["name"] for each in stream.status()["refused"]] == [name]
        server.say("two", url=AUTHORIZATION, removed=(name,))
        await server.answer("two")
        assert await asked.allowed(f"{DB4}:80") and await asked.allowed(f"{OTHER4}:80")
        assert stream.status()["refused"] == [] and stream._held[AUTHORIZATION] == {}
        # The control: one that can be decoded does what it says.
        server.say("three", url=AUTHORIZATION, **{name: policy("other/p", "shop")})
        assert (await server.answer("three")).HasField("error_detail") is unsayable
        assert await asked.allowed(f"{DB4}:80") is not unsayable
        assert await asked.allowed(f"{OTHER4}:80") is (unsayable and not everywhere)

    working(tmp_path, work)


def test_when_the_engines_report_does_not_hold_all_that_is_refused_nothing_is_remembered(tmp_path: Path) -> None:
    """2 000 bad ones with long names: which of the response are in force cannot be told from the report."""

    async def work(server: Server, asked: Asked, stream: Stream) -> None:
        bad: dict[str, Any] = {f"shop/{'n' * 100}{number}": BAD for number in range(2000)}
        server.say("many", url=AUTHORIZATION, **bad, **{"other/good": policy("other/good", "shop")})
        nack = await server.answer("many")
        assert nack.error_detail.message.endswith("their names did not fit")
        assert len(nack.error_detail.message) < 5000
        assert set(stream._held[AUTHORIZATION].values()) == {""} and len(stream._held[AUTHORIZATION]) == 2001
        assert len(stream.status()["refused"]) <= 256
        assert not await asked.allowed(f"{DB4}:80") and not await asked.allowed(f"{OTHER4}:80")
        server.say("away", url=AUTHORIZATION, removed=tuple(bad))
        await server.answer("away")
        assert await asked.allowed(f"{DB4}:80") and not await asked.allowed(f"{OTHER4}:80")
        # The control: few that are bad leave the good one's version known.
        server.say("few", url=AUTHORIZATION, **{"other/good": policy("other/good", "b"), "shop/bad": BAD})
        await server.answer("few")
        assert stream._held[AUTHORIZATION] == {"other/good": "few", "shop/bad": ""}

    working(tmp_path, work)


def test_an_address_that_cannot_be_read_is_told_until_it_is_good(tmp_path: Path) -> None:
    async def work(server: Server, _: Asked, stream: Stream) -> None:
        server.say("bad", x=BAD)
        assert (await server.answer("bad")).error_detail.message.startswith("x: ")
        assert stream.status()["refused"][0]["type"] == "address"
        server.say("other", url=ADDRESS, **{"Kubernetes//Pod/shop/y": workload("y", "shop", "10.77.0.9")})
        await server.answer("other")
        assert "x: " in stream.status()["rejected"], "another response does not heal it"
        server.say("gone", removed=("x",))
        await server.answer("gone")
        assert stream.status()["rejected"] == ""

    working(tmp_path, work)


def test_records_are_looked_for_by_their_text(tmp_path: Path) -> None:
    """What is asked for comes whole, from the first, the last and a middle line; nothing that does not contain it."""

    async def work(server: Server, asked: Asked, stream: Stream) -> None:
        assert stream.pending()
        many = {f"Kubernetes//Pod/shop/m{n}": workload(f"m{n}", "shop", f"10.77.1.{n}") for n in range(1, 200)}
        server.say("many", **many, removed=tuple(DB))
        await server.answer("many")
        _, whole = await asked.get("/workloads")
        assert len(whole) == 199
        for each in whole:
            text = f'"name":"{each["name"]}","namespace":"shop"'
            assert await asked.get("/workloads", containing=text) == (HTTPStatus.OK, [each])
        _, tens = await asked.get("/workloads", containing='"name":"m10')
        assert {each["name"] for each in tens} == {"m10", *(f"m10{n}" for n in range(10))}
        assert await asked.get("/workloads", containing="nowhere") == (HTTPStatus.OK, [])
        assert await asked.get("/connections", containing="nowhere") == (HTTPStatus.OK, [])
        server.say("none", removed=tuple(many))
        await server.answer("none")
        assert await asked.get("/workloads", containing="shop") == (HTTPStatus.OK, [])
        assert await asked.get("/workloads") == (HTTPStatus.OK, [])

    working(tmp_path, work)


def test_the_query_comes_through_the_agents_socket(tmp_path: Path) -> None:
    """As the command asks: over the Unix socket, with an IPv6 destination."""

    async def work(server: Server, asked: Asked, _: Stream) -> None:
        listener = cni.listen(tmp_path / "run" / "agent.sock", socket.SOCK_STREAM)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(httpd.serve(listener, asked.pages.admin))
            query = urlencode({"identity": WEB, "source": "fd77::1", "destination": f"[{DB6}]:80"})
            node = Node(tmp_path / "run" / "agent.sock")
            answer = await asyncio.to_thread(node.ask, f"/authz?{query}")
            assert answer["allow"] and answer["destination"] == f"[{DB6}]:80"
            task.cancel()

    working(tmp_path, work)
