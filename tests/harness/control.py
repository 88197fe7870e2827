"""A control plane to test against: the lab's API server and `sidestep control`, as processes, on addresses of 127/8.

`Cluster` starts both; the functions make the objects that a kubelet would (nodes, pod status). `Follower` and
`certificate` are clients in the plainest form: they know the wire and nothing of our own client.
"""

import itertools
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from sidestep.kube.client import KubeClient, KubeError
from sidestep.wire.pb import authorization_pb2, citadel_pb2, discovery_pb2, workload_pb2

ADDRESS = "type.googleapis.com/istio.workload.Address"
AUTHORIZATION = "type.googleapis.com/istio.security.Authorization"
STREAM = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
CREATE = "/istio.v1.auth.IstioCertificateService/CreateCertificate"
SYSTEM = "istio-system"
HANG_S = 60.0
_number = itertools.count()


def own_address() -> str:
    """An address of 127/8 that no other test process uses."""
    return f"127.{64 + os.getpid() % 128}.{os.getpid() // 128 % 256}.{1 + next(_number) % 250}"


class Process:
    """A process whose output goes to a file; ended and reaped by `stop`."""

    def __init__(self, log: Path, *words: str) -> None:
        self.log = log
        with log.open("ab") as out:
            self.popen = subprocess.Popen([sys.executable, "-m", *words], stdout=out, stderr=out)

    def stop(self, kill: bool = False) -> int:
        """Ends it (SIGTERM, or SIGKILL); answers its exit status."""
        if self.popen.poll() is None:
            (self.popen.kill if kill else self.popen.terminate)()
        try:
            return self.popen.wait(20)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
            raise AssertionError(f"{self.popen.args!r} did not end in 20 s:\n{self.text()}") from None

    def text(self) -> str:
        """What it wrote."""
        return self.log.read_text(errors="replace")


class Cluster:
    """API server and control plane."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.directory = directory
        self.address = own_address()
        self.arguments = arguments
        self.kubeconfig = directory / "kubeconfig"
        where = ("--bind", self.address, "--port", "6443", "--dir", str(directory))
        self.api = Process(directory / "api.log", "sidestep.lab.api", "--name", "t", *where)
        self.control: Process | None = None

    def started(self) -> bool:
        """Whether the API listens."""
        if self.api.popen.poll() is not None:
            raise AssertionError(f"the API ended:\n{self.api.text()}")
        return self.kubeconfig.exists()

    def start(self) -> None:
        """Starts the control plane and waits until it is ready."""
        where = ("--kubeconfig", str(self.kubeconfig), "--bind", self.address)
        self.control = Process(self.directory / "control.log", "sidestep", "control", *where, *self.arguments)
        self.wait_ready()

    def wait_ready(self) -> None:
        """Until /ready answers 200."""
        deadline = time.monotonic() + HANG_S
        while True:
            assert self.control is not None
            if self.control.popen.poll() is not None:
                raise AssertionError(f"the control plane ended:\n{self.control.text()}")
            try:
                self.page("/ready")
                return
            except OSError:
                assert time.monotonic() < deadline, self.control.text()
                time.sleep(0.05)

    def page(self, path: str) -> bytes:
        """A page of port 15014."""
        with urllib.request.urlopen(f"http://{self.address}:15014{path}", timeout=10) as response:
            return bytes(response.read())

    def restart(self) -> None:
        """kill -9, and a new one."""
        assert self.control is not None
        self.control.stop(kill=True)
        self.start()

    def stop(self) -> None:
        """Ends both."""
        if self.control is not None:
            self.control.stop()
        self.api.stop()


@contextmanager
def cluster(directory: Path, *arguments: str) -> Iterator[Cluster]:
    """A cluster with a namespace for the system, without its control plane (`start`)."""
    made = Cluster(directory, *arguments)
    try:
        deadline = time.monotonic() + HANG_S
        while not made.started():
            assert time.monotonic() < deadline, made.api.text()
            time.sleep(0.02)
        yield made
    finally:
        made.stop()


async def add_namespace(kube: KubeClient, name: str, **labels: str) -> None:
    """A namespace; it may be there."""
    try:
        await kube.create("/api/v1/namespaces", {"metadata": {"name": name, "labels": labels}})
    except KubeError as error:
        if error.status != 409:
            raise


async def add_node(kube: KubeClient, name: str, address: str, **labels: str) -> None:
    """A node that is ready."""
    conditions = [{"type": "Ready", "status": "True"}]
    status = {"conditions": conditions, "addresses": [{"type": "InternalIP", "address": address}]}
    labels = {key.replace("__", "/").replace("_", "."): value for key, value in labels.items()}
    body = {"metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, **labels}}, "status": status}
    await kube.create("/api/v1/nodes", body)


async def add_account(kube: KubeClient, namespace: str, name: str) -> None:
    """A service account; it may be there."""
    try:
        await kube.create(f"/api/v1/namespaces/{namespace}/serviceaccounts", {"metadata": {"name": name}})
    except KubeError as error:
        if error.status != 409:
            raise


async def add_pod(
    kube: KubeClient,
    namespace: str,
    name: str,
    node: str,
    *addresses: str,
    account: str = "default",
    labels: dict[str, str] | None = None,
    host_network: bool = False,
    phase: str = "Running",
    ready: bool = True,
    **meta: Any,
) -> dict[str, Any]:
    """A pod as it is when its kubelet has started it."""
    spec: dict[str, Any] = {
        "nodeName": node,
        "serviceAccountName": account,
        "containers": [{"name": "a", "image": "none", "command": ["sleep", "1d"], "ports": _PORTS}],
    }
    metadata: dict[str, Any] = {"name": name, "labels": labels or {}, **meta}
    if host_network:
        spec["hostNetwork"] = True
        metadata.setdefault("annotations", {})["kubernetes.io/config.mirror"] = "yes"
    path = f"/api/v1/namespaces/{namespace}/pods"
    await kube.create(path, {"metadata": metadata, "spec": spec})
    return await set_pod(kube, namespace, name, *addresses, phase=phase, ready=ready)


_PORTS = [{"name": "web", "containerPort": 8080}]


async def set_pod(
    kube: KubeClient, namespace: str, name: str, *addresses: str, phase: str = "Running", ready: bool = True
) -> dict[str, Any]:
    """Its status."""
    status: dict[str, Any] = {
        "phase": phase,
        "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
    }
    if addresses:
        status |= {"podIP": addresses[0], "podIPs": [{"ip": each} for each in addresses]}
    return await kube.patch(f"/api/v1/namespaces/{namespace}/pods/{name}/status", {"status": status})


async def token(
    kube: KubeClient, namespace: str, account: str, pod: dict[str, Any] | None, audience: str = "istio-ca"
) -> str:
    """A token of that account, bound to a pod."""
    spec: dict[str, Any] = {"audiences": [audience], "expirationSeconds": 3600}
    if pod is not None:
        meta = pod["metadata"]
        spec["boundObjectRef"] = {"kind": "Pod", "apiVersion": "v1", "name": meta["name"], "uid": meta["uid"]}
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
    answer = await kube.create(f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token", body)
    return str(answer["status"]["token"])


async def add_agent(kube: KubeClient, node: str, address: str) -> str:
    """The pod that stands for a node's agent. Returns its token."""
    await add_account(kube, SYSTEM, "ztunnel")
    pod = await add_pod(kube, SYSTEM, f"ztunnel-{node}", node, address, account="ztunnel", host_network=True)
    return await token(kube, SYSTEM, "ztunnel", pod)


async def root(kube: KubeClient, namespace: str = SYSTEM) -> bytes:
    """The root certificate as published."""
    answer = await kube.get(f"/api/v1/namespaces/{namespace}/configmaps/istio-ca-root-cert")
    return str(answer["data"]["root-cert.pem"]).encode()


def channel(address: str, roots: bytes, name: str = "istiod.istio-system.svc") -> grpc.aio.Channel:
    """To port 15012, trusting those roots, checking that name."""
    options = (
        ("grpc.ssl_target_name_override", name),
        ("grpc.max_receive_message_length", 200 << 20),
        ("grpc.use_local_subchannel_pool", 1),
    )
    credentials = grpc.ssl_channel_credentials(root_certificates=roots)
    return grpc.aio.secure_channel(f"{address}:15012", credentials, options=options)


def bearer(text: str) -> tuple[tuple[str, str], ...]:
    """The headers of a call."""
    return (("authorization", f"Bearer {text}"), ("clusterid", "Kubernetes"))


class Follower:
    """One xDS stream. `addresses` and `policies` are what it holds, by name."""

    def __init__(self, on: grpc.aio.Channel, headers: tuple[tuple[str, str], ...]) -> None:
        call = on.stream_stream(
            STREAM,
            request_serializer=discovery_pb2.DeltaDiscoveryRequest.SerializeToString,
            response_deserializer=discovery_pb2.DeltaDiscoveryResponse.FromString,
        )
        self.call: Any = call(None, metadata=headers)
        self.addresses: dict[str, Any] = {}
        self.policies: dict[str, Any] = {}
        self.versions: dict[str, str] = {}
        self.pushes: list[Any] = []

    async def ask(self, url: str = ADDRESS, **fields: Any) -> None:
        """Sends a request."""
        await self.call.write(
            discovery_pb2.DeltaDiscoveryRequest(
                node=discovery_pb2.Node(id="ztunnel~1.1.1.1~a.b~b"), type_url=url, **fields
            )
        )

    async def take(self, *, answer: bool = True, error: str = "") -> Any:
        """Reads one response and acknowledges it, or refuses with an error."""
        response = await self.call.read()
        assert response is not grpc.aio.EOF, "the stream ended"  # type: ignore[attr-defined]
        self.pushes.append(response)
        for name in response.removed_resources:
            for held in (self.addresses, self.policies, self.versions):
                held.pop(name, None)
        for each in response.resources:
            self.versions[each.name] = each.version
            if response.type_url == ADDRESS:
                self.addresses[each.name] = workload_pb2.Address.FromString(each.resource.value)
            else:
                self.policies[each.name] = authorization_pb2.Authorization.FromString(each.resource.value)
        if answer:
            status = discovery_pb2.Status(message=error) if error else None
            await self.ask(response.type_url, response_nonce=response.nonce, error_detail=status)
        return response

    async def until(self, holds: Any) -> None:
        """Takes responses until a condition on `addresses` holds."""
        while not holds(self.addresses):
            await self.take()

    async def ruled(self, holds: Any) -> None:
        """Takes responses until a condition on `policies` holds."""
        while not holds(self.policies):
            await self.take()


def signing_request(key: ec.EllipticCurvePrivateKey | None = None, uri: str = "spiffe://ignored/ns/x/sa/y") -> str:
    """A CSR in PEM, with a name that the authority must not look at."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri), x509.DNSName("evil.example")])
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(names, critical=False)
    return request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


async def certificate(
    on: grpc.aio.Channel,
    headers: tuple[tuple[str, str], ...],
    uri: str,
    *,
    csr: str | None = None,
    seconds: int = 86400,
    **more: str,
) -> list[str]:
    """Asks for a certificate."""
    request = citadel_pb2.IstioCertificateRequest(csr=csr or signing_request(), validity_duration=seconds)
    request.metadata.update({"ImpersonatedIdentity": uri, **more} if uri else more)
    call = on.unary_unary(
        CREATE,
        request_serializer=citadel_pb2.IstioCertificateRequest.SerializeToString,
        response_deserializer=citadel_pb2.IstioCertificateResponse.FromString,
    )
    response = await call(request, metadata=headers, timeout=HANG_S)
    return list(response.cert_chain)
