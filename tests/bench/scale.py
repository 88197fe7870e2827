"""A hundred thousand workloads: how long until they are in force, and what agent and engine have of memory then.

A delta-xDS server says them all in one response, as istiod does to a client that knows nothing; the agent's stream
(tests/bench/feed.py) gives them to a real engine and acknowledges when every worker has adopted them.
"""

import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc

from sidestep.node.wiring import GRPC_OPTIONS
from sidestep.node.xds import ADDRESS, METHOD
from sidestep.wire.pb import discovery_pb2, workload_pb2
from tests.bench.load import LoadError
from tests.bench.machine import pss_mib
from tests.harness.engine import EngineProcess

WORKLOADS = 100_000
MEMORY_MIB = 150
WAIT_S = 120.0


def response(count: int) -> Any:
    """Every workload with the fields that a pod of a Deployment behind a Service has."""
    made = discovery_pb2.DeltaDiscoveryResponse(type_url=ADDRESS, nonce="all")
    for number in range(count):
        namespace, application = f"namespace-{number % 50}", f"application-{number % 900}"
        name = f"{application}-5d9c7b8f6b-{number:05d}"
        record = workload_pb2.Address()
        workload = record.workload
        workload.uid, workload.name, workload.namespace = f"Kubernetes//Pod/{namespace}/{name}", name, namespace
        workload.service_account, workload.node = f"account-{number % 900}", f"node-{number % 1000}"
        workload.tunnel_protocol = workload_pb2.TunnelProtocol.HBONE
        workload.addresses.append(bytes([10, 8 + (number >> 16), number >> 8 & 255, number & 255]))
        workload.canonical_name, workload.canonical_revision = application, "latest"
        workload.workload_name, workload.cluster_id = application, "Kubernetes"
        ports = workload.services[f"{namespace}/{application}.{namespace}.svc.cluster.local"].ports
        ports.add(service_port=80, target_port=8080)
        resource = made.resources.add(name=workload.uid, version=f"{number:x}")
        resource.resource.type_url, resource.resource.value = ADDRESS, record.SerializeToString()
    return made


class Server:
    """Answers the first request for addresses with one response; `answer` waits for what the client says to it."""

    def __init__(self, said: Any) -> None:
        self._said = said
        self._times: queue.Queue[tuple[float, Any]] = queue.Queue()
        self._server = grpc.server(futures.ThreadPoolExecutor(4), options=GRPC_OPTIONS)
        handler = grpc.stream_stream_rpc_method_handler(
            self._stream,
            request_deserializer=discovery_pb2.DeltaDiscoveryRequest.FromString,
            response_serializer=discovery_pb2.DeltaDiscoveryResponse.SerializeToString,
        )
        service, _, method = METHOD[1:].partition("/")
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def _stream(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        for request in requests:
            if request.type_url != ADDRESS:
                continue
            self._times.put((time.monotonic(), request))
            if not request.response_nonce:
                yield self._said

    def next(self) -> tuple[float, Any]:
        """When the next request for addresses came, and it. Raises LoadError."""
        try:
            return self._times.get(timeout=WAIT_S)
        except queue.Empty:
            raise LoadError(f"the agent said nothing for {WAIT_S:.0f} s") from None

    def stop(self) -> None:
        """Ends it."""
        self._server.stop(None).wait()


def scale(folder: Path, quick: bool) -> list[dict[str, Any]]:
    """Lines for the table of single figures. Raises LoadError."""
    count = WORKLOADS // 20 if quick else WORKLOADS
    server = Server(response(count))
    token = folder / "token"
    token.write_text("token\n")
    with EngineProcess(folder, workers=0, supervised=True) as engine:
        command = [sys.executable, "-m", "tests.bench.feed", str(engine.path), f"127.0.0.1:{server.port}", str(token)]
        started = time.monotonic()
        agent = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            asked, _ = server.next()
            acked, answer = server.next()
            if answer.HasField("error_detail"):
                raise LoadError(f"{count} workloads were refused: {answer.error_detail.message}")
            memory = [_settled_mib(pid) for pid in (agent.pid, _child(engine.process.pid))]
        finally:
            agent.kill()
            agent.wait()
            server.stop()
    what = f"{count} workloads"
    wanted = f"under {MEMORY_MIB}" if count == WORKLOADS else ""
    return [
        {
            "what": f"{what}, from agent's start until in force, s",
            "value": f"{acked - started:.2f}",
            "wanted": "",
            "ok": None,
        },
        {
            "what": f"{what}, from the question until in force, s",
            "value": f"{acked - asked:.2f}",
            "wanted": "",
            "ok": None,
        },
        {
            "what": f"{what}, memory of agent (without its pods) and engine, MiB",
            "value": f"{sum(memory):.1f} ({memory[0]:.1f} and {memory[1]:.1f})",
            "wanted": wanted,
            "ok": sum(memory) < MEMORY_MIB if wanted else None,
        },
    ]


def _settled_mib(pid: int) -> float:
    """PSS once it falls no more: what the work took is given back after it."""
    before, now = float("inf"), pss_mib(pid)
    while now < before - 0.5:
        time.sleep(0.5)
        before, now = now, pss_mib(pid)
    return now


def _child(pid: int) -> int:
    """The engine below its supervisor."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
