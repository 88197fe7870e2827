"""A control plane that says what it is told: delta xDS and certificates, over TLS, for agents of a lab.

What it says lies ready as bytes, so that the time from saying until the acknowledgement is the agent's, its engine's,
and that of the loopback.
"""

import queue
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent import futures
from typing import Any

import grpc

from sidestep.control import authority
from sidestep.model import Identity
from sidestep.node import ca, xds
from sidestep.node.wiring import GRPC_OPTIONS
from sidestep.wire.pb import citadel_pb2, discovery_pb2
from tests.bench.load import LoadError
from tests.harness.netns import inside

NAME = "istiod.istio-system.svc"
PORT = 15112
WAIT_S = 60.0
KINDS = (xds.ADDRESS, xds.AUTHORIZATION)


class Stream:
    """An agent's stream: what is to be said to it, and when it acknowledged what. Times are of time.monotonic()."""

    def __init__(self) -> None:
        self.to_say: queue.Queue[tuple[str, bytes] | None] = queue.Queue()
        self.said: dict[str, float] = {}
        self._answers: queue.Queue[tuple[float, Any]] = queue.Queue()

    def heard(self, request: Any) -> None:
        """The agent said something."""
        self._answers.put((time.monotonic(), request))

    def acknowledged(self, *nonces: str) -> float:
        """Waits until these were acknowledged. Returns seconds since the first of them was said. Raises LoadError."""
        missing, when = set(nonces), 0.0
        while missing:
            try:
                when, request = self._answers.get(timeout=WAIT_S)
            except queue.Empty:
                raise LoadError(f"the agent said nothing for {WAIT_S:.0f} s") from None
            if request.HasField("error_detail"):
                raise LoadError(f"refused: {request.error_detail.message[:500]}")
            missing.discard(request.response_nonce)
        return when - min(self.said[nonce] for nonce in nonces)


class Front:
    """The server. `first`: node -> type -> nonce and response with which a new stream of that node begins."""

    def __init__(self, netns: str, address: str) -> None:
        self.first: dict[str, dict[str, tuple[str, bytes]]] = {}
        self._streams: dict[str, queue.Queue[Stream]] = {}
        self._lock = threading.Lock()
        self.authority = authority.new("cluster.local", time.time())
        self.roots = self.authority.roots_pem
        self._server = grpc.server(futures.ThreadPoolExecutor(16), options=GRPC_OPTIONS)
        stream = grpc.stream_stream_rpc_method_handler(
            self._stream, request_deserializer=discovery_pb2.DeltaDiscoveryRequest.FromString
        )
        create = grpc.unary_unary_rpc_method_handler(
            self._create,
            request_deserializer=citadel_pb2.IstioCertificateRequest.FromString,
            response_serializer=citadel_pb2.IstioCertificateResponse.SerializeToString,
        )
        for method, handler in ((xds.METHOD, stream), (ca.METHOD, create)):
            service, _, name = method[1:].partition("/")
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {name: handler}),))
        credentials = grpc.ssl_server_credentials([self.authority.server([NAME], [], 86400, time.time())])
        if not inside(netns, lambda: self._server.add_secure_port(f"{address}:{PORT}", credentials)):
            raise LoadError(f"{address}:{PORT} cannot be listened on")
        self._server.start()

    def stream(self, node: str) -> Stream:
        """The next stream of a node's agent. Raises LoadError."""
        try:
            return self._of(node).get(timeout=WAIT_S)
        except queue.Empty:
            raise LoadError(f"the agent of {node} did not come for {WAIT_S:.0f} s") from None

    def stop(self) -> None:
        """Ends it and every stream."""
        self._server.stop(None).wait()

    def _of(self, node: str) -> "queue.Queue[Stream]":
        with self._lock:
            return self._streams.setdefault(node, queue.Queue())

    def _stream(self, requests: Iterator[Any], context: Any) -> Iterator[bytes]:
        stream = Stream()
        threading.Thread(target=self._listen, args=(stream, requests), daemon=True).start()
        while (item := stream.to_say.get()) is not None:
            nonce, response = item
            stream.said[nonce] = time.monotonic()
            yield response

    def _listen(self, stream: Stream, requests: Iterator[Any]) -> None:
        begun: Mapping[str, tuple[str, bytes]] | None = None
        try:
            for request in requests:
                if begun is None:
                    node = str(request.node.metadata["NODE_NAME"])
                    begun = self.first[node]
                    self._of(node).put(stream)
                if not request.response_nonce and request.type_url in begun:
                    stream.to_say.put(begun[request.type_url])
                stream.heard(request)
        except grpc.RpcError:
            pass  # the agent has ended
        finally:
            stream.to_say.put(None)

    def _create(self, request: Any, context: Any) -> Any:
        identity = Identity.parse(str(request.metadata["ImpersonatedIdentity"]))
        chain = self.authority.leaf(request.csr, identity, 86400, time.time())
        return citadel_pb2.IstioCertificateResponse(cert_chain=chain)
