"""The agent's side of the channel to the engine (docs/interfaces.md, wire/channel.py).

`Engine.run` keeps one connection: it looks for the engine's socket every 20 ms at first, says HELLO, tells its owner
what the engine holds, and starts again when the engine is gone. Commands may be sent by any task; each has exactly
one reply and a deadline. Bulk goes and comes in sealed memfds, which are closed here.
"""

import array
import asyncio
import json
import mmap
import os
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidestep import log
from sidestep.node.identities import Certificate
from sidestep.wire import channel
from sidestep.wire.batch import Batch

CALL_S = 10.0
APPLY_S = 120.0
RETRY_FIRST_S = 0.02
RETRY_LAST_S = 1.0
MAX_REPLY_MEMFD = 512 * 1024 * 1024


class EngineError(Exception):
    """The engine did not do it: it is not there, it refused, or it did not answer in time."""


class EngineAway(EngineError):
    """There is no connection to the engine."""


class EngineRefused(EngineError):
    """The engine answered that it does not do it."""


@dataclass(frozen=True, slots=True)
class Ports:
    """The listeners' own ports in the pod, which an application cannot have."""

    outbound: int
    inbound: int
    hbone: int


@dataclass(frozen=True, slots=True)
class EnginePod:
    """A pod as HELLO and POD_STATS tell of it. `mode`: serving or draining."""

    uid: str
    netns_cookie: int
    netns_ino: int
    mode: str
    ports: Ports


@dataclass(frozen=True, slots=True)
class Stats:
    """POD_STATS."""

    connections: int
    quiet_ms: int
    held: int


@dataclass(frozen=True, slots=True)
class Hello:
    """What the engine holds. `identities`: URI -> (not_after, serial); `counts`: records, by kind; of its settings
    `same_node`, "" for none.
    """

    generation: str
    pid: int
    info: Mapping[str, Any]
    pods: Mapping[str, EnginePod]
    identities: Mapping[str, tuple[float, str]]
    counts: Mapping[str, int]
    same_node: str = ""


@dataclass(frozen=True, slots=True)
class Applied:
    """APPLY of a response: what it says of itself, the rejected records (name, reason), how many of each kind there are
    now.
    """

    type_url: str
    nonce: str
    resources: int
    rejected: list[tuple[str, str]]
    counts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class PodSpec:
    """A pod as POD_ADD gives it to the engine."""

    uid: str
    namespace: str
    name: str
    service_account: str
    workload: str
    addresses: tuple[str, ...]
    identity: str
    netns_cookie: int
    netns_ino: int


class Engine:
    """One connection to the engine at a time. `connected` is called with what the engine holds, before anything else is
    sent; when it returns the engine counts as up. `lost` is called when the connection is gone.
    """

    def __init__(self, path: Path, connected: Callable[[Hello], Awaitable[None]], lost: Callable[[], None]) -> None:
        self._path = path
        self._connected = connected
        self._lost = lost
        self._socket: socket.socket | None = None
        self._sequence = 0
        self._waiting: dict[int, asyncio.Future[tuple[dict[str, Any], list[int]]]] = {}
        self._sending = asyncio.Lock()
        self.hello: Hello | None = None
        self.up = False
        self.no_native = ""  # why this engine was given `direct` where `native` was meant

    async def run(self) -> None:
        """Connects, again and again, until cancelled."""
        wait_s, complained = RETRY_FIRST_S, False
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
            try:
                connection.connect(str(self._path))
            except OSError as err:
                connection.close()
                if not complained:
                    log.event("engine_unreachable", socket=self._path, error=err, hint="is sidestep engine running?")
                    complained = True
            else:
                # A task group whose task has failed forgets that it was cancelled too (until Python 3.13); gather,
                # which gives it a task of its own, does not.
                (answered,) = await asyncio.gather(self._once(connection))
                if answered:
                    wait_s, complained = RETRY_FIRST_S, False
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 1.2, RETRY_LAST_S)

    async def _once(self, connection: socket.socket) -> bool:
        """One connection, to its end; owns it. Returns whether the engine answered HELLO."""
        self._socket = connection
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read(connection), name="engine reader")
                self.hello = await self._hello()
                log.event(
                    "engine_connected",
                    pid=self.hello.pid,
                    generation=self.hello.generation,
                    pods=len(self.hello.pods),
                    records=sum(self.hello.counts.values()),
                )
                await self._connected(self.hello)
                self.up = True
        except* (EngineError, ValueError, KeyError, OSError) as errors:
            log.event("engine_lost", error=errors.exceptions[0])
        finally:
            answered = self.hello is not None
            self.hello, self.up, self._socket = None, False, None
            connection.close()
            waiting, self._waiting = self._waiting, {}
            for future in waiting.values():
                if not future.done():
                    future.set_exception(EngineAway("the engine went away"))
            if answered:
                self._lost()
        return answered

    async def _hello(self) -> Hello:
        body, fds = await self._call(channel.HELLO, {"min": channel.VERSION, "max": channel.VERSION})
        held = b"\n" + _read_memfds(fds)
        counts = {kind: held.count(f"\n{kind} ".encode()) for kind in ("address", "policy")}
        engine = body.get("engine") or {}
        pods = {}
        for pod in body.get("pods") or ():
            pods[pod["uid"]] = EnginePod(
                pod["uid"], int(pod["netns_cookie"]), int(pod["netns_ino"]), pod["mode"], _ports(pod.get("ports") or {})
            )
        identities = {
            each["id"]: (float(each["not_after"]), str(each.get("serial", ""))) for each in body.get("identities") or ()
        }
        same_node = str((body.get("settings") or {}).get("same_node", ""))
        return Hello(
            str(engine.get("generation", "")), int(engine.get("pid", 0)), engine, pods, identities, counts, same_node
        )

    async def _read(self, connection: socket.socket) -> None:
        """Hands replies to those who wait, until the engine closes."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                packet, ancillary, _flags, _address = connection.recvmsg(
                    channel.PACKET_MAX, socket.CMSG_SPACE(channel.FDS_MAX * 4), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                await _readable(loop, connection)
                continue
            except OSError:
                packet, ancillary = b"", []
            fds = _fds(ancillary)
            if not packet:
                _close(fds)
                raise EngineAway("the engine closed the connection")
            try:
                reply = channel.decode(packet)
            except ValueError:
                _close(fds)
                raise
            if reply.kind == channel.REPLY:
                _close(fds)
                raise EngineError(f"the engine says: {reply.body.get('error', 'no')} (does another agent run here?)")
            future = self._waiting.pop(reply.sequence, None)
            if future is None or future.done():
                _close(fds)
            else:
                future.set_result((dict(reply.body), fds))

    async def _call(
        self, kind: int, body: Mapping[str, Any], fds: Sequence[int] = (), timeout_s: float = CALL_S
    ) -> tuple[dict[str, Any], list[int]]:
        """Sends a command and waits for its reply; the fds of the reply are the caller's. Raises EngineError."""
        loop = asyncio.get_running_loop()
        connection = self._socket
        if connection is None:
            raise EngineAway("no connection to the engine")
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        sequence = self._sequence
        packet = channel.encode(kind, sequence, body)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        future: asyncio.Future[tuple[dict[str, Any], list[int]]] = loop.create_future()
        self._waiting[sequence] = future
        try:
            async with asyncio.timeout(timeout_s):
                async with self._sending:
                    while True:
                        try:
                            connection.sendmsg([packet], ancillary)
                            break
                        except BlockingIOError:
                            await _writable(loop, connection)
                answer, received = await future
        except TimeoutError:
            raise EngineError(f"{channel.NAMES.get(kind, kind)}: no answer after {timeout_s:.0f} s") from None
        except OSError as err:
            raise EngineAway(f"cannot send to the engine: {err.strerror}") from None
        finally:
            self._waiting.pop(sequence, None)
        if not answer.get("ok"):
            _close(received)
            raise EngineRefused(f"{channel.NAMES.get(kind, kind)}: {answer.get('error', 'refused')}")
        return answer, received

    async def _simple(self, kind: int, body: Mapping[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
        answer, received = await self._call(kind, body, fds)
        _close(received)
        return answer

    async def settings(self, settings: Mapping[str, Any]) -> None:
        """SETTINGS. An engine from before decision 0010, which an agent may meet while a node is brought up to date,
        refuses `native`: it is given `direct` and goes on serving, and `no_native` says why.
        """
        self.no_native = ""
        try:
            await self._simple(channel.SETTINGS, settings)
        except EngineRefused as err:
            if settings.get("same_node") != "native":
                raise
            await self._simple(channel.SETTINGS, {**settings, "same_node": "direct"})
            self.no_native = f"the engine refuses it ({err})"
            hint = "same_node is direct until there is a newer engine"
            log.event("native_unavailable", level="WARN", reason=self.no_native, hint=hint)

    async def pod_add(self, pod: PodSpec, netns: int, maps: Sequence[int]) -> Ports:
        """POD_ADD: the engine listens when this returns. `maps`: listeners and engine_sk, or those and what native
        flows need.
        """
        body = {
            "uid": pod.uid,
            "namespace": pod.namespace,
            "name": pod.name,
            "service_account": pod.service_account,
            "workload": pod.workload,
            "addresses": list(pod.addresses),
            "identity": pod.identity,
            "netns_cookie": pod.netns_cookie,
            "netns_ino": pod.netns_ino,
        }
        return _ports((await self._simple(channel.POD_ADD, body, (netns, *maps)))["ports"])

    async def pod_mode(self, uid: str, mode: str) -> None:
        """POD_MODE: `serving` or `draining`."""
        await self._simple(channel.POD_MODE, {"uid": uid, "mode": mode})

    async def pod_del(self, uid: str) -> None:
        """POD_DEL: listeners closed, what is left is reset."""
        await self._simple(channel.POD_DEL, {"uid": uid})

    async def pod_stats(self, uid: str) -> Stats:
        """POD_STATS."""
        body = await self._simple(channel.POD_STATS, {"uid": uid})
        return Stats(int(body["connections"]), int(body["streams_quiet_ms"]), int(body.get("held", 0)))

    async def identity_set(self, uri: str, certificate: Certificate) -> float:
        """IDENTITY_SET. Returns notAfter as the engine reads it, seconds since the epoch."""
        body = {
            "identity": uri,
            "key_pem": certificate.key_pem,
            "chain_pem": certificate.chain_pem,
            "roots_pem": certificate.roots_pem,
        }
        return float((await self._simple(channel.IDENTITY_SET, body))["not_after"])

    async def identity_del(self, uri: str) -> None:
        """IDENTITY_DEL."""
        await self._simple(channel.IDENTITY_DEL, {"identity": uri})

    async def apply(self, batch: Batch, whole: bool = False) -> list[tuple[str, str]]:
        """APPLY; ends the batch. Returns the rejected records: (name, reason). When it returns every worker has
        adopted the state and has reset the open connections that it denies. `whole`: with it the state is complete.
        """
        memfd, size = batch.seal()
        try:
            answer, received = await self._call(channel.APPLY, {"size": size, "whole": whole}, (memfd,), APPLY_S)
        finally:
            os.close(memfd)
        _close(received)
        return [(str(each["name"]), str(each["reason"])) for each in answer.get("rejected") or ()]

    async def apply_delta(self, memfd: int, size: int, whole: str | bool = False) -> Applied:
        """APPLY of a delta-xDS response, in a sealed memfd that stays the caller's; in force when this returns.
        `whole`: with it the state is complete; a type URL: if the response is of that type.
        """
        body = {"size": size, "delta": True, "whole": whole}
        answer, received = await self._call(channel.APPLY, body, (memfd,), APPLY_S)
        _close(received)
        return Applied(
            str(answer["type_url"]),
            str(answer["nonce"]),
            int(answer["resources"]),
            [(str(each["name"]), str(each["reason"])) for each in answer.get("rejected") or ()],
            {"address": int(answer["workloads"]) + int(answer["services"]), "policy": int(answer["policies"])},
        )

    async def versions(self) -> bytes:
        """DUMP of versions: a line "kind name version" for each record that is held."""
        _, fds = await self._call(channel.DUMP, {"what": "versions"})
        return _read_memfds(fds)

    async def metrics(self) -> str:
        """METRICS: Prometheus text."""
        _, fds = await self._call(channel.METRICS, {})
        return _read_memfds(fds).decode("utf-8", "replace")

    async def authz(self, identity: str, source: str, destination: str) -> dict[str, Any]:
        """AUTHZ: what the engine would decide about a connection (docs/interfaces.md), by its own decision function.

        `identity`: a SPIFFE URI, or "" for none; `source`: "IP" or "IP:PORT"; `destination`: "IP:PORT".
        """
        answer = await self._simple(channel.AUTHZ, {"identity": identity, "source": source, "destination": destination})
        return {key: value for key, value in answer.items() if key != "ok"}

    async def dump(self, what: str, containing: str = "") -> list[Any]:
        """DUMP: a list of objects; with a text only those that contain it, as it stands in the engine's JSON. A record
        that does not is passed over unread: of a hundred thousand, a few cost no memory.
        """
        _, fds = await self._call(channel.DUMP, {"what": what})
        if containing:
            return _lines_with(fds, containing.encode())
        found = json.loads(_read_memfds(fds) or b"[]")
        return found if isinstance(found, list) else []


async def _readable(loop: asyncio.AbstractEventLoop, connection: socket.socket) -> None:
    """Waits until there is something to read."""
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(connection, _done, ready)
    try:
        await ready
    finally:
        loop.remove_reader(connection)


async def _writable(loop: asyncio.AbstractEventLoop, connection: socket.socket) -> None:
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_writer(connection, _done, ready)
    try:
        await ready
    finally:
        loop.remove_writer(connection)


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _ports(body: Mapping[str, Any]) -> Ports:
    return Ports(int(body.get("outbound", 0)), int(body.get("inbound", 0)), int(body.get("hbone", 0)))


def _fds(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    found: list[int] = []
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            received = array.array("i")
            received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
            found.extend(received)
    return found


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _lines_with(fds: Sequence[int], text: bytes) -> list[Any]:
    """The records of the first fd, one a line, that contain the text; closes all."""
    try:
        if not fds or not os.fstat(fds[0]).st_size:
            return []
        with mmap.mmap(fds[0], 0, prot=mmap.PROT_READ) as whole:
            lines = iter(whole.readline, b"")
            return [json.loads(line.rstrip(b",\n")) for line in lines if line.startswith(b"{") and text in line]
    finally:
        _close(fds)


def _read_memfds(fds: Sequence[int]) -> bytes:
    """The contents of the first fd; closes all."""
    try:
        if not fds:
            return b""
        size = os.fstat(fds[0]).st_size
        if size > MAX_REPLY_MEMFD:
            raise EngineError(f"an answer of {size} bytes")
        return os.pread(fds[0], size, 0)
    finally:
        _close(fds)
