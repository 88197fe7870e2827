"""The agent's xDS stream between a scripted server (istiod's place) and the real engine: what is held, said,
refused, resumed.
"""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from sidestep.node.engine import Engine, Hello
from sidestep.node.metrics import Metrics
from sidestep.node.xds import ADDRESS, AUTHORIZATION, METHOD, Stream
from sidestep.wire.pb import discovery_pb2, workload_pb2
from tests.harness.pods import eventually

Request = discovery_pb2.DeltaDiscoveryRequest
Response = discovery_pb2.DeltaDiscoveryResponse
GUARD_S = 30


class Server:
    """An xDS server that notes what it hears and says what it is given. One client."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.streams = 0
        self._say: asyncio.Queue[Any] = asyncio.Queue()
        self._server: Any = None
        self.port = 0

    async def start(self) -> None:
        """Listens, on the same port every time."""
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        handler = grpc.stream_stream_rpc_method_handler(
            self._stream, request_deserializer=Request.FromString, response_serializer=Response.SerializeToString
        )
        service, _, method = METHOD[1:].partition("/")
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(None)

    def say(self, nonce: str, url: str = ADDRESS, removed: tuple[str, ...] = (), **records: bytes) -> None:
        """One response; records are name=body, their version is the nonce."""
        response = Response(type_url=url, nonce=nonce, removed_resources=removed)
        for name, body in records.items():
            resource = response.resources.add(name=name, version=nonce)
            resource.resource.type_url, resource.resource.value = url, body
        self._say.put_nowait(response)

    async def answer(self, nonce: str) -> Any:
        """Waits for the request that answers a response."""
        found = await eventually(
            f"answer to {nonce}", lambda: [each for _, each in self.heard if each.response_nonce == nonce]
        )
        return found[0]

    async def first(self, stream: int) -> dict[str, dict[str, str]]:
        """Waits for the first requests of a stream: type -> versions that the client says it has."""

        def both() -> dict[str, dict[str, str]] | None:
            found = {
                each.type_url: dict(each.initial_resource_versions)
                for number, each in self.heard
                if number == stream and not each.response_nonce
            }
            return found if len(found) == 2 else None

        return dict(await eventually(f"stream {stream}", both))

    async def _stream(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        self.streams += 1
        number = self.streams
        self.headers.append(dict(context.invocation_metadata()))

        async def listen() -> None:
            async for request in requests:
                self.heard.append((number, request))

        async with asyncio.TaskGroup() as group:
            group.create_task(listen())
            while True:
                yield await self._say.get()


def workload(name: str, last: int) -> bytes:
    record = workload_pb2.Address()
    record.workload.uid, record.workload.name, record.workload.namespace = name, name, "shop"
    record.workload.addresses.append(bytes([10, 77, 0, last]))
    return record.SerializeToString()


class Process:
    """The engine."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "engine" / "engine.sock"
        self._log = folder / "engine.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.socket.parent.mkdir(mode=0o700, exist_ok=True)
        command = [sys.executable, "-m", "sidestep", "engine", "--socket", str(self.socket), "--workers", "1"]
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

    def signal(self, number: signal.Signals) -> None:
        """Stops it, or lets it go on."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


@asynccontextmanager
async def feeding(process: Process, server: Server, folder: Path) -> AsyncIterator[tuple[Engine, Stream]]:
    """Engine connection and stream as the agent runs them."""
    token = folder / "token"
    token.write_text("TOKEN\n")
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=[("grpc.max_reconnect_backoff_ms", 200)])

    async def same(_: bool) -> grpc.aio.Channel:
        return channel

    hold: list[Callable[[Hello], None]] = []

    async def connected(hello: Hello) -> None:
        hold[0](hello)

    engine = Engine(process.socket, connected, lambda: None)
    stream = Stream(same, "test", "ztunnel~1~a.b~b.svc.c", {"NODE_NAME": "n"}, token, "Kubernetes", engine, Metrics())
    hold.append(stream.engine_holds)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(engine.run()), group.create_task(stream.run())]
        try:
            yield engine, stream
        finally:
            for task in tasks:
                task.cancel()
    await channel.close(None)


def run(folder: Path, work: Callable[[Process, Server], Awaitable[None]]) -> None:
    """A test's coroutine with server and engine, under a hang guard."""

    async def guarded() -> None:
        server, process = Server(), Process(folder)
        async with asyncio.timeout(120):
            await server.start()
            process.start()
            try:
                await work(process, server)
            finally:
                process.kill()
                await server.stop()

    asyncio.run(guarded())


@pytest.fixture(autouse=True)
def no_fd_stays() -> Any:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) <= before + 8  # gRPC keeps its pollers


def test_records_go_to_the_engine_and_are_acknowledged_after_it(tmp_path: Path) -> None:
    async def work(process: Process, server: Server) -> None:
        async with feeding(process, server, tmp_path) as (engine, stream):
            assert await server.first(1) == {ADDRESS: {}, AUTHORIZATION: {}}
            assert (
                server.headers[0]["authorization"] == "Bearer TOKEN" and server.headers[0]["clusterid"] == "Kubernetes"
            )
            assert server.heard[0][1].node.id == "ztunnel~1~a.b~b.svc.c" and stream.pending() == ["state manager"]
            server.say("one", a=workload("a", 1), b=workload("b", 2))
            assert not (await server.answer("one")).HasField("error_detail")
            assert {each["uid"] for each in await engine.dump("workloads")} == {"a", "b"}
            server.say("two", removed=("a",), c=workload("c", 3))
            await server.answer("two")
            assert {each["uid"] for each in await engine.dump("workloads")} == {"b", "c"}
            server.say("three", url=AUTHORIZATION)
            await server.answer("three")
            assert stream.pending() == []
            server.say("four", url="type.googleapis.com/unknown.Thing", x=b"?")
            assert not (await server.answer("four")).HasField("error_detail")

    run(tmp_path, work)


def test_an_engine_that_has_not_answered_yet_keeps_the_acknowledgement_back(tmp_path: Path) -> None:
    """It is stopped: the response lies with it, and nothing is said to the server until it goes on."""

    async def work(process: Process, server: Server) -> None:
        async with feeding(process, server, tmp_path) as (engine, _):
            await server.first(1)
            server.say("one", a=workload("a", 1))
            await server.answer("one")
            process.signal(signal.SIGSTOP)
            server.say("two", b=workload("b", 2))
            await eventually("the response is with the engine", lambda: bool(engine._waiting))
            await asyncio.sleep(0.3)  # for an answer that comes too early
            assert [each for _, each in server.heard if each.response_nonce == "two"] == []
            process.signal(signal.SIGCONT)
            assert not (await server.answer("two")).HasField("error_detail")
            assert {each["uid"] for each in await engine.dump("workloads")} == {"a", "b"}

    run(tmp_path, work)


def test_a_record_that_cannot_be_read_is_named_and_asked_for_again(tmp_path: Path) -> None:
    async def work(process: Process, server: Server) -> None:
        async with feeding(process, server, tmp_path) as (engine, stream):
            await server.first(1)
            server.say("one", good=workload("good", 1), bad=b"\xff\xff\xff")
            nack = await server.answer("one")
            assert nack.error_detail.message.startswith("bad: ") and "good" not in nack.error_detail.message
            assert [each["uid"] for each in await engine.dump("workloads")] == ["good"]
            assert "bad" in stream.status()["rejected"]
            await server.stop()
            await server.start()
            assert (await server.first(2))[ADDRESS] == {"good": "one"}

    run(tmp_path, work)


def test_a_policy_that_cannot_be_read_is_held_without_a_version(tmp_path: Path) -> None:
    """The engine denies in its place; a server that has dropped it meanwhile must hear that it is there."""

    async def work(process: Process, server: Server) -> None:
        async with feeding(process, server, tmp_path) as (engine, _):
            await server.first(1)
            sent: dict[str, Any] = {"shop/bad": b"\xff", "shop/good": b"\x0a\x04good\x12\x04shop"}
            server.say("one", url=AUTHORIZATION, **sent)
            assert (await server.answer("one")).error_detail.message == "shop/bad: malformed protobuf"
            assert {each["key"] for each in await engine.dump("policies")} == {"shop/bad", "shop/good"}
            await server.stop()
            await server.start()
            assert (await server.first(2))[AUTHORIZATION] == {"shop/bad": "", "shop/good": "one"}
            server.say("two", url=AUTHORIZATION, removed=("shop/bad",))
            await server.answer("two")
            assert {each["key"] for each in await engine.dump("policies")} == {"shop/good"}
        async with feeding(process, server, tmp_path):
            assert (await server.first(3))[AUTHORIZATION] == {"shop/good": "one"}

    run(tmp_path, work)


def test_a_new_engine_is_given_everything_again(tmp_path: Path) -> None:
    async def work(process: Process, server: Server) -> None:
        async with feeding(process, server, tmp_path) as (engine, _):
            await server.first(1)
            server.say("one", a=workload("a", 1))
            await server.answer("one")
            process.kill()
            process.start()
            assert (await server.first(2))[ADDRESS] == {}
            server.say("two", a=workload("a", 1))
            await server.answer("two")
            assert [each["uid"] for each in await engine.dump("workloads")] == ["a"]

    run(tmp_path, work)


def test_a_new_agent_says_what_the_engine_holds(tmp_path: Path) -> None:
    async def work(process: Process, server: Server) -> None:
        async with feeding(process, server, tmp_path):
            await server.first(1)
            server.say("one", a=workload("a", 1), b=workload("b", 2))
            await server.answer("one")
        async with feeding(process, server, tmp_path) as (engine, _):
            assert (await server.first(2))[ADDRESS] == {"a": "one", "b": "one"}
            assert len(await engine.dump("workloads")) == 2

    run(tmp_path, work)
