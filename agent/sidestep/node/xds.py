"""Delta xDS: responses go from the control plane to the engine as they came; the agent keeps nothing of them.

A response goes into a sealed memfd and is one APPLY: the engine reads it (decision 0001), and says of what type it was
and how it is to be acknowledged. It is acknowledged when the engine answers, that is when every worker has adopted it
and has judged its open connections anew. Records that the engine rejects are named in a NACK, the others of the
response are in force. What the server is told on a new stream (initial_resource_versions) is what the engine holds,
asked for then: after a restart of the engine nothing, and everything comes again. A rejected record is told with the
version of its last good one, or not at all, so that the server sends it again.

A policy that is rejected and has no last good version is stood in for by the engine with one that denies its
namespace. The server is told of it with version "": it must send it again, and say when it is gone.
"""

import asyncio
import ctypes
import os
import random
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import grpc

from sidestep import log
from sidestep.node.agent import CertificateError
from sidestep.node.ca import credentials
from sidestep.node.engine import Engine, EngineError, Hello
from sidestep.node.metrics import Metrics
from sidestep.wire import proto
from sidestep.wire.batch import NAME_MAX, sealed

METHOD = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
ADDRESS = "type.googleapis.com/istio.workload.Address"
AUTHORIZATION = "type.googleapis.com/istio.security.Authorization"
KINDS = {ADDRESS: "address", AUTHORIZATION: "policy"}
RETRY_FIRST_S = 0.01
RETRY_LAST_S = 15.0
LARGE = 1 << 20  # bytes of a response: what it took would stay with the process
NACK_CHARS = 4000
RESOURCES, REMOVED = (
    2,
    6,
)  # fields of DeltaDiscoveryResponse; of its request: node 1, type 2, versions 5, nonce 6, error 7
REFUSED_MAX = 256  # of each type, that /status tells of
# The engine's report of what it rejects has 24 KiB and ends where the next line does not fit: one that is longer than
# this may have been cut.
REPORT_FULL = 21 * 1024
_LIBC = ctypes.CDLL(None)


class Feed(Protocol):
    """Where the engine's records come from."""

    async def run(self) -> None: ...

    def engine_holds(self, hello: Hello) -> None: ...

    def pending(self) -> list[str]: ...

    def status(self) -> dict[str, Any]: ...


class Stream:
    """The stream to the control plane. It runs only while the engine is there, and begins anew with every engine."""

    def __init__(
        self,
        channel: Callable[[bool], Awaitable[grpc.aio.Channel]],
        address: str,
        node_id: str,
        metadata: Mapping[str, str],
        token_file: Path | None,
        cluster_id: str,
        engine: Engine,
        metrics: Metrics,
    ) -> None:
        self._channel = channel
        self._address = address
        self._node = proto.field(1, proto.field(1, node_id) + proto.field(3, proto.struct(metadata)))
        self._token_file = token_file
        self._cluster_id = cluster_id
        self._engine = engine
        self._metrics = metrics
        self._counts: Mapping[str, int] = {}
        self._acked: set[str] = set()
        self._changed = asyncio.Event()
        self._connected = False
        self._error = ""
        self._refused: dict[str, dict[str, str]] = {url: {} for url in KINDS}

    def engine_holds(self, hello: Hello) -> None:
        """A connection to the engine is there, and this is what it holds."""
        self._counts = hello.counts
        self._acked = set()
        self._refused = {url: {} for url in KINDS}
        self._changed.set()

    def pending(self) -> list[str]:
        """What is missing until the agent is ready."""
        return [] if self._acked >= KINDS.keys() else ["state manager"]

    def status(self) -> dict[str, Any]:
        """For /status."""
        return {
            "address": self._address,
            "connected": self._connected,
            "error": self._error,
            "rejected": self._rejected(),
            "refused": [
                {"type": KINDS[url], "name": name, "reason": reason}
                for url, refused in self._refused.items()
                for name, reason in sorted(refused.items())[:REFUSED_MAX]
            ],
            "resources": {kind: self._counts.get(kind, 0) for kind in KINDS.values()},
        }

    async def run(self) -> None:
        """Keeps a stream, again and again, until cancelled."""
        wait_s = RETRY_FIRST_S
        while True:
            self._changed.clear()
            if self._engine.hello is None:
                await self._changed.wait()
                continue
            reason = await self._until_engine_changes()
            self._connected = False
            if reason is None:
                wait_s = RETRY_FIRST_S
                continue
            self._metrics.add("istio_xds_connection_terminations_total", reason=reason)
            if reason in ("Complete", "Reconnect"):
                wait_s = RETRY_FIRST_S
            await asyncio.sleep(wait_s * random.uniform(0.8, 1.2))
            wait_s = min(wait_s * 2, RETRY_LAST_S)

    async def _until_engine_changes(self) -> str | None:
        """One stream. Returns why it ended, None where the engine is another one now."""
        async with asyncio.TaskGroup() as group:
            stream = group.create_task(self._stream(), name="xds stream")
            changed = group.create_task(self._changed.wait(), name="engine changes")
            await asyncio.wait((stream, changed), return_when=asyncio.FIRST_COMPLETED)
            other = changed.done()
            stream.cancel()
            changed.cancel()
        if other:
            return None
        return "Reconnect" if stream.cancelled() else stream.result()

    async def _stream(self) -> str:
        """One stream, to its end. Returns the reason in the words of reference/ztunnel.md 3.1."""
        try:
            headers = await asyncio.to_thread(credentials, self._token_file, self._cluster_id)
            call = (await self._channel(bool(self._error))).stream_stream(METHOD, None, None)(None, metadata=headers)
            try:
                versions = await self._engine.versions()
                for url in KINDS:
                    await call.write(self._first(url, versions))
                del versions
                while True:
                    response: Any = await call.read()
                    if response is grpc.aio.EOF:  # type: ignore[attr-defined]
                        return (
                            "Complete"
                            if (await call.code()) is grpc.StatusCode.OK
                            else self._failed(await call.details())
                        )
                    taking = self._take(response)
                    del response  # the coroutine lets go of it before it waits
                    await call.write(await taking)
            finally:
                call.cancel()
        except grpc.aio.AioRpcError as err:
            self._failed(f"{err.code().name}: {err.details()}")
            return "ConnectionError" if err.code() is grpc.StatusCode.UNAVAILABLE else "Error"
        except (asyncio.InvalidStateError, grpc.aio.UsageError):  # the channel was replaced
            return "Reconnect"
        except (CertificateError, EngineError, OSError, ValueError) as err:
            return self._failed(str(err))

    def _failed(self, error: str) -> str:
        if error != self._error:
            log.event("xds_failed", control=self._address, error=error)
        self._error = error
        return "Error"

    def _first(self, url: str, versions: bytes) -> bytes:
        """The first request of a stream: a wildcard subscription, and what the engine holds already. Fields that are
        put behind a message are part of it, so there is no object for any of a hundred thousand.
        """
        head = self._node + proto.field(2, url)
        kind = f"{KINDS[url]} ".encode()
        held = (line.split(b" ", 2) for line in versions.splitlines() if line.startswith(kind))
        return head + b"".join(
            proto.field(5, proto.field(1, name) + proto.field(2, version)) for _, name, version in held
        )

    async def _take(self, response: bytes) -> bytes:
        """Gives a response to the engine. Returns the ACK or NACK."""
        size = len(response)
        memfd = sealed(response)
        del response
        missing = [url for url in KINDS if url not in self._acked]
        whole = missing[0] if len(missing) == 1 else not missing
        try:
            applied = await self._engine.apply_delta(memfd, size, whole)
            url, rejected = applied.type_url, {}
            if url in KINDS and (applied.rejected or self._refused[url]):
                rejected = self._refuse(url, os.pread(memfd, size, 0), dict(applied.rejected))
        finally:
            os.close(memfd)
        answer = self._node + proto.field(2, url) + proto.field(6, applied.nonce)
        if not self._connected:
            self._connected, self._error = True, ""
            log.event("xds_connected", control=self._address)
        if url not in KINDS:
            log.event("xds_unknown_type", type=url)
            return answer
        self._metrics.add("istio_xds_message_total", url=url)
        self._metrics.add("istio_xds_message_bytes_total", size, url=url)
        self._counts = applied.counts
        if url not in self._acked or rejected:
            log.event("xds_applied", type=KINDS[url], records=applied.resources, rejected=len(rejected))
        self._acked.add(url)
        if size > LARGE:
            _LIBC.malloc_trim(0)
        if rejected:
            cut = sum(len(name.encode()) + len(reason) + 3 for name, reason in applied.rejected) > REPORT_FULL
            more = "; and others, their names did not fit" if cut else ""
            message = _listed(rejected) + more
            answer += proto.field(7, proto.field(2, message))
            log.event("xds_rejected", level="WARN", type=KINDS[url], records=message)
        return answer

    def _refuse(self, url: str, response: bytes, told: Mapping[str, str]) -> dict[str, str]:
        """Notes what is refused now, after a response of which the engine told that, or that may heal what was refused
        before. Returns name -> reason of what is refused of it, with the names as the server writes them.
        """
        refused, rejected = self._refused[url], {}
        names = []
        for number, value in proto.fields(response):
            if isinstance(value, bytes) and number == REMOVED:
                refused.pop(value.decode(), None)
            elif isinstance(value, bytes) and number == RESOURCES:
                names.append("".join(proto.texts(value, 3)[-1:]))
        for name in names:
            reason = told.get(_as_told(name))
            if reason is None:
                refused.pop(name, None)
                continue
            rejected[name] = reason
            if len(refused) < REFUSED_MAX or name in refused:
                refused[name] = reason[:NACK_CHARS]
        return rejected

    def _rejected(self) -> str:
        """What is refused now, in one text."""
        return _listed({name: reason for refused in self._refused.values() for name, reason in refused.items()})


def _as_told(name: str) -> str:
    """A name as the engine's report tells it: its beginning, what would break a line there a question mark."""
    packed = name.encode()[:NAME_MAX]
    return bytes(63 if each < 33 or each == 127 else each for each in packed).decode(errors="replace")


def _listed(rejected: Mapping[str, str]) -> str:
    return "; ".join(f"{name[:200]}: {reason}" for name, reason in sorted(rejected.items()))[:NACK_CHARS]
