"""Delta xDS: records go from the control plane to the engine as they came; the agent keeps name and version.

A response becomes one batch (wire/batch.py) in one APPLY; it is acknowledged when the engine answers, that is when
every worker has adopted it and has judged its open connections anew. Records that the engine rejects are named in a
NACK, the others of the response are in force; the rejected version is not remembered, so that the server sends it
again. What the server is told on a new stream (initial_resource_versions) is what the engine said it holds: after a
restart of the engine nothing, and everything comes again.

A policy that is rejected and has no last good version is stood in for by the engine with one that denies its
namespace. The server is told of it with version "": it must send it again, and say when it is gone.
"""

import asyncio
import ctypes
import hashlib
import random
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import grpc

from sidestep.node import log
from sidestep.node.agent import CertificateError
from sidestep.node.ca import credentials
from sidestep.node.engine import Engine, EngineError, Hello
from sidestep.node.metrics import Metrics
from sidestep.wire.batch import NAME_MAX, VERSION_MAX, Batch, Op, Record
from sidestep.wire.pb import discovery_pb2

METHOD = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
ADDRESS = "type.googleapis.com/istio.workload.Address"
AUTHORIZATION = "type.googleapis.com/istio.security.Authorization"
KINDS = {ADDRESS: "address", AUTHORIZATION: "policy"}
RETRY_FIRST_S = 0.01
RETRY_LAST_S = 15.0
MANY = 1000
NACK_CHARS = 4000
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
        self._node = discovery_pb2.Node(id=node_id)
        self._node.metadata.update(dict(metadata))
        self._token_file = token_file
        self._cluster_id = cluster_id
        self._engine = engine
        self._metrics = metrics
        self._held: dict[str, dict[str, str]] = {url: {} for url in KINDS}
        self._acked: set[str] = set()
        self._changed = asyncio.Event()
        self._connected = False
        self._error = ""
        self._refused: dict[str, dict[str, str]] = {url: {} for url in KINDS}

    def engine_holds(self, hello: Hello) -> None:
        """A connection to the engine is there, and this is what it holds."""
        kinds = {kind: url for url, kind in KINDS.items()}
        self._held = {url: {} for url in KINDS}
        for (kind, name), version in hello.versions.items():
            if kind in kinds:
                self._held[kinds[kind]][name] = version
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
            "resources": {KINDS[url]: len(held) for url, held in self._held.items()},
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
            call = (await self._channel(bool(self._error))).stream_stream(
                METHOD,
                request_serializer=discovery_pb2.DeltaDiscoveryRequest.SerializeToString,
                response_deserializer=discovery_pb2.DeltaDiscoveryResponse.FromString,
            )(None, metadata=headers)
            try:
                for url in KINDS:
                    await call.write(self._first(url))
                while True:
                    response = await call.read()
                    if response is grpc.aio.EOF:  # type: ignore[attr-defined]
                        return (
                            "Complete"
                            if (await call.code()) is grpc.StatusCode.OK
                            else self._failed(await call.details())
                        )
                    await call.write(await self._take(response))  # type: ignore[arg-type]
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

    def _first(self, url: str) -> discovery_pb2.DeltaDiscoveryRequest:
        """The first request of a stream: a wildcard subscription, and what is held already."""
        return discovery_pb2.DeltaDiscoveryRequest(
            node=self._node, type_url=url, initial_resource_versions=self._held[url]
        )

    async def _take(self, response: discovery_pb2.DeltaDiscoveryResponse) -> discovery_pb2.DeltaDiscoveryRequest:
        """Gives a response to the engine. Returns the ACK or NACK."""
        url = response.type_url
        answer = discovery_pb2.DeltaDiscoveryRequest(node=self._node, type_url=url, response_nonce=response.nonce)
        if not self._connected:
            self._connected, self._error = True, ""
            log.event("xds_connected", control=self._address)
        if url not in KINDS:
            log.event("xds_unknown_type", type=url)
            return answer
        self._metrics.add("istio_xds_message_total", url=url)
        self._metrics.add("istio_xds_message_bytes_total", response.ByteSize(), url=url)
        with Batch() as batch:
            rejected = _fill(batch, url, response)
            answers = await self._engine.apply(batch, whole=self._acked | {url} >= KINDS.keys())
        cut = sum(len(name.encode()) + len(reason) + 3 for name, reason in answers) > REPORT_FULL
        told = dict(answers)
        for resource in response.resources:
            reason = told.get(_as_told(record_name(url, resource.name)))
            if reason is not None:
                rejected.setdefault(resource.name, reason)
        self._remember(url, response, rejected, cut)
        if url not in self._acked or rejected:
            log.event("xds_applied", type=KINDS[url], records=len(response.resources), rejected=len(rejected))
        self._acked.add(url)
        if len(response.resources) > MANY:
            _LIBC.malloc_trim(0)  # what a large response took would stay with the process
        if rejected:
            more = "; and others, their names did not fit" if cut else ""
            answer.error_detail.message = _listed(rejected) + more
            log.event("xds_rejected", level="WARN", type=KINDS[url], records=answer.error_detail.message)
        return answer

    def _remember(
        self, url: str, response: discovery_pb2.DeltaDiscoveryResponse, rejected: Mapping[str, str], cut: bool
    ) -> None:
        """Notes what the engine holds now, and what is refused. Where the engine's report was cut, any version may be
        one that was rejected: none is remembered.
        """
        held, refused = self._held[url], self._refused[url]
        for name in response.removed_resources:
            held.pop(name, None)
            refused.pop(name, None)
        for resource in response.resources:
            name = resource.name
            if name in rejected:
                if len(refused) < REFUSED_MAX or name in refused:
                    refused[name] = rejected[name][:NACK_CHARS]
                if url == AUTHORIZATION:
                    held.setdefault(name, "")
            else:
                held[name] = "" if cut or len(resource.version) > VERSION_MAX else resource.version
                refused.pop(name, None)

    def _rejected(self) -> str:
        """What is refused now, in one text."""
        return _listed({name: reason for refused in self._refused.values() for name, reason in refused.items()})


def record_name(url: str, name: str) -> str:
    """The name under which the engine is given a resource: its own. A policy whose name is empty or too long for a
    record must not be passed over: it comes under one that begins alike, so that it is in force, or stood in for, in
    its namespace.
    """
    packed = name.encode()
    if url != AUTHORIZATION or 0 < len(packed) <= NAME_MAX:
        return name
    digest = hashlib.sha256(packed).hexdigest()[:16]
    return f"{packed[: NAME_MAX - 32].decode(errors='ignore')}~{digest}"


def _as_told(name: str) -> str:
    """A name as the engine's report tells it: what would break a line there is a question mark."""
    return bytes(63 if each < 33 or each == 127 else each for each in name.encode()).decode(errors="replace")


def _listed(rejected: Mapping[str, str]) -> str:
    return "; ".join(f"{name[:200]}: {reason}" for name, reason in sorted(rejected.items()))[:NACK_CHARS]


def _fill(batch: Batch, url: str, response: discovery_pb2.DeltaDiscoveryResponse) -> dict[str, str]:
    """Puts a response into a batch. Bodies are the resources' bytes as they came, whatever is in them. Returns what
    cannot be a record at all: name -> reason.
    """
    policy = url == AUTHORIZATION
    rejected: dict[str, str] = {}
    for name in response.removed_resources:
        try:
            batch.add(Record(Op.POLICY_DEL if policy else Op.ADDRESS_DEL, record_name(url, name)))
        except ValueError:
            continue  # it never was one
    for resource in response.resources:
        name, version = record_name(url, resource.name), resource.version
        if len(version) > VERSION_MAX:
            version = ""
        try:
            batch.add(Record(Op.POLICY_SET if policy else Op.ADDRESS_SET, name, version, resource.resource.value))
        except ValueError as err:
            rejected[resource.name] = str(err)
    return rejected
