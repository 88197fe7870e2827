"""Delta xDS over gRPC: streams of agents, and of whoever else speaks the protocol.

A *stream* is one client with a follower (wire/delta.py) for each type that it asks for. Its reader takes requests, its
writer sends what is due; between them is nothing but the followers' sets of names and one event, so a client that
is slow, or stuck, costs no other anything. A client that leaves a response without an answer, or unread, for a minute
is cut off; it comes back with what it has.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc

from sidestep import log
from sidestep.control.callers import Caller, Denied, Gate, Unauthenticated, Unavailable
from sidestep.control.certificates import OPAQUE, Context, headers
from sidestep.control.metrics import Metrics
from sidestep.wire.delta import Catalog, Entry, Follower, Push
from sidestep.wire.pb import discovery_pb2

SERVICE = "envoy.service.discovery.v3.AggregatedDiscoveryService"
ADDRESS = "type.googleapis.com/istio.workload.Address"
AUTHORIZATION = "type.googleapis.com/istio.security.Authorization"
SHORT = {AUTHORIZATION: "authorization", ADDRESS: "address"}  # what is due of the first goes out first
ANSWER_S = 60.0
ENDED = "ended by the client"
SYNC_S = 30.0  # a stream that comes before we know the cluster waits so long


@dataclass(slots=True, eq=False)
class Stream:
    """One client, as /status shows it."""

    caller: Caller | None
    peer: str
    since_s: float
    node_id: str = ""
    followers: dict[str, Follower] = field(default_factory=dict)
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    def status(self) -> dict[str, Any]:
        """For /status."""
        return {
            "node": self.caller.node if self.caller else "",
            "pod": self.caller.pod if self.caller else "",
            "id": self.node_id,
            "peer": self.peer,
            "since": int(self.since_s),
            "types": {
                SHORT[url]: {
                    "held": each.held,
                    "acked": each.acked,
                    "refused": each.refused,
                    "waiting": bool(each.nonce),
                    "reason": each.reason,
                }
                for url, each in self.followers.items()
            },
        }


class Discovery:
    """The gRPC service: catalogs, and the streams that follow them."""

    def __init__(self, gate: Gate, metrics: Metrics) -> None:
        self.catalogs = {url: Catalog() for url in SHORT}
        self.synced = asyncio.Event()
        self._gate = gate
        self._metrics = metrics
        self._streams: set[Stream] = set()

    def update(self, url: str, entries: Mapping[str, Entry | None]) -> int:
        """Takes changed records and tells the streams. Returns how many changed."""
        changed = self.catalogs[url].update(entries)
        if changed:
            for stream in self._streams:
                follower = stream.followers.get(url)
                if follower is not None and follower.changed(changed):
                    stream.wake.set()
        return len(changed)

    def handlers(self, *, anonymous: bool = False) -> "grpc.GenericRpcHandler[Any, Any]":
        """For a server; `anonymous`: for one that only this machine reaches, which asks for no token."""

        async def stream(_requests: object, context: Context) -> None:
            await self._stream(context, anonymous)

        method = grpc.stream_stream_rpc_method_handler(
            stream,
            request_deserializer=discovery_pb2.DeltaDiscoveryRequest.FromString,
            response_serializer=discovery_pb2.DeltaDiscoveryResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(SERVICE, {"DeltaAggregatedResources": method})

    async def _stream(self, context: Context, anonymous: bool) -> None:
        code = grpc.StatusCode.UNAVAILABLE
        caller = None
        try:
            if not anonymous:
                caller = await self._gate.caller(headers(context))
            async with asyncio.timeout(SYNC_S):
                await self.synced.wait()
        except Unauthenticated as error:
            code, reason = grpc.StatusCode.UNAUTHENTICATED, str(error)
        except Denied as error:
            code, reason = grpc.StatusCode.PERMISSION_DENIED, str(error)
        except Unavailable as error:
            reason = str(error)
        except TimeoutError:
            reason = "the cluster is not known yet"
        else:
            await self._serve(Stream(caller, context.peer(), time.time()), context)
            return
        self._metrics.streams.labels(code.name.lower()).inc()
        log.event("stream_refused", peer=context.peer(), code=code.name, reason=reason)
        await context.abort(code, OPAQUE[code])

    async def _serve(self, stream: Stream, context: Context) -> None:
        self._metrics.streams.labels("accepted").inc()
        self._streams.add(stream)
        reason = ENDED
        try:
            async with asyncio.TaskGroup() as group:
                writer = group.create_task(self._write(stream, context), name="xds writer")
                while (request := await context.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
                    self._take(stream, request)
                writer.cancel()
        except* Stuck as stuck:
            reason = str(stuck.exceptions[0])
        except* (grpc.RpcError, grpc.aio.UsageError, asyncio.InvalidStateError) as broken:
            reason = f"broken: {broken.exceptions[0]}"
        finally:
            self._streams.discard(stream)
            log.event("stream_ended", node=_name(stream), peer=stream.peer, reason=reason)
        if reason != ENDED:
            await context.abort(grpc.StatusCode.UNAVAILABLE, reason)

    def _take(self, stream: Stream, request: Any) -> None:
        url = request.type_url
        if url not in self.catalogs:
            log.event("unknown_type", node=_name(stream), type=url)
            return
        follower = stream.followers.get(url)
        if follower is None:
            follower = stream.followers[url] = Follower(self.catalogs[url])
            if not stream.node_id:
                stream.node_id = request.node.id[:300]
                log.event("stream", node=_name(stream), peer=stream.peer, id=stream.node_id)
        error = request.error_detail.message if request.HasField("error_detail") else None
        if request.response_nonce and request.response_nonce == follower.nonce:
            self._metrics.answers.labels(SHORT[url], "ack" if error is None else "nack").inc()
            if error is not None:
                log.event("refused", node=_name(stream), type=SHORT[url], reason=error)
        follower.request(
            request.resource_names_subscribe,
            request.resource_names_unsubscribe,
            request.initial_resource_versions,
            request.response_nonce,
            error,
        )
        stream.wake.set()

    async def _write(self, stream: Stream, context: Context) -> None:
        asked: dict[str, float] = {}
        loop = asyncio.get_running_loop()
        while True:
            stream.wake.clear()
            for url in SHORT:
                follower = stream.followers.get(url)
                if follower is None:
                    continue
                if not follower.nonce:
                    asked.pop(url, None)
                push = follower.next()
                if push is not None:
                    response = _response(url, push)
                    self._count(url, push, response)
                    try:
                        async with asyncio.timeout(ANSWER_S):
                            await context.write(response)
                    except TimeoutError:
                        raise Stuck("the client does not read") from None
                    asked[url] = loop.time()
                    break  # the followers may have become others meanwhile: look again from the start
            else:
                try:
                    async with asyncio.timeout_at(min(asked.values()) + ANSWER_S if asked else None):
                        await stream.wake.wait()
                except TimeoutError:
                    raise Stuck("the client does not answer") from None

    def _count(self, url: str, push: Push, response: Any) -> None:
        self._metrics.pushes.labels(SHORT[url]).inc()
        self._metrics.pushed.labels(SHORT[url]).inc(len(push.entries) + len(push.removed))
        self._metrics.pushed_bytes.labels(SHORT[url]).inc(response.ByteSize())

    def status(self) -> dict[str, Any]:
        """For /status."""
        return {
            "records": {SHORT[url]: len(each.entries) for url, each in self.catalogs.items()},
            "streams": [stream.status() for stream in sorted(self._streams, key=_name)],
        }


class Stuck(Exception):
    """A client that reads or answers nothing any more."""


def _name(stream: Stream) -> str:
    return stream.caller.node if stream.caller else stream.peer


def _response(url: str, push: Push) -> Any:
    response = discovery_pb2.DeltaDiscoveryResponse(type_url=url, nonce=push.nonce, removed_resources=push.removed)
    for entry in push.entries:
        resource = response.resources.add(name=entry.name, version=entry.version, aliases=entry.aliases)
        resource.resource.type_url = url
        resource.resource.value = entry.body
    return response
