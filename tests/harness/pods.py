"""Pods without a cluster: network namespaces on a bridge, applications' sockets in them, certificates, an API in
memory.

For tests of one node: the agent, the engine and capture are the real ones; only Kubernetes, which is not ours, is
played.
"""

import asyncio
import os
import socket
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from sidestep.node.agent import Agent
from sidestep.node.pods import Pod
from tests.harness.netns import inside, run


def ip(*words: str) -> str:
    """`ip WORDS`."""
    return run("ip", *words)


async def eventually(what: str, question: Callable[[], Any], seconds: float = 30.0) -> Any:
    """Asks until the answer is true, and returns it. `seconds` is a hang guard, no measurement."""
    deadline = time.monotonic() + seconds
    while not (answer := question()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        await asyncio.sleep(0.02)
    return answer


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A pod's namespace. `v4`, `v6`: its addresses."""

    namespace: str
    v4: str
    v6: str

    @property
    def path(self) -> str:
        return f"/run/netns/{self.namespace}"

    def connect_socket(self, family: int = socket.AF_INET) -> socket.socket:
        """A client's socket, not connected."""

        def make() -> socket.socket:
            made = socket.socket(family, socket.SOCK_STREAM)
            made.setblocking(False)
            return made

        return inside(self.path, make)

    def listen_socket(self, port: int) -> socket.socket:
        """A server's socket, dual stack."""

        def make() -> socket.socket:
            return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)

        return inside(self.path, make)


class Bridge:
    """Namespaces joined by a bridge in one of their own; `net` tells networks of parallel runs apart. A context
    manager.
    """

    def __init__(self, name: str) -> None:
        self._name = f"t-{name}-{os.getpid()}"
        self._net = 1 + os.getpid() % 250
        self._made: list[str] = []

    def __enter__(self) -> "Bridge":
        self._namespace(self._name)
        ip("-n", self._name, "link", "add", "br0", "type", "bridge")
        ip("-n", self._name, "link", "set", "br0", "up")
        return self

    def __exit__(self, *unused: object) -> None:
        for name in self._made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    @property
    def path(self) -> str:
        """Of its namespace."""
        return f"/run/netns/{self._name}"

    def sandbox(self, of: Sandbox | None = None) -> Sandbox:
        """A new pod's namespace with eth0 on the bridge; with the addresses of another one, whose link has gone."""
        number = len(self._made) + 1
        pod = Sandbox(f"{self._name}-{number}", f"10.231.{self._net}.{number}", f"fd0a:e7:{self._net:x}::{number:x}")
        if of is not None:
            pod = replace(pod, v4=of.v4, v6=of.v6)
        self._namespace(pod.namespace)
        ip("-n", self._name, "link", "add", f"v{number}", "type", "veth", "peer", "eth0", "netns", pod.namespace)
        ip("-n", self._name, "link", "set", f"v{number}", "master", "br0", "up")
        ip("-n", pod.namespace, "addr", "add", f"{pod.v4}/24", "dev", "eth0")
        ip("-n", pod.namespace, "addr", "add", f"{pod.v6}/64", "dev", "eth0", "nodad")
        ip("-n", pod.namespace, "link", "set", "eth0", "up")
        return pod

    def unplug(self, pod: Sandbox) -> None:
        """The pod's link goes, whoever still holds its namespace."""
        ip("-n", self._name, "link", "del", f"v{pod.namespace.rpartition('-')[2]}")

    def remove(self, pod: Sandbox) -> None:
        """The pod's sandbox goes."""
        ip("netns", "del", pod.namespace)

    def _namespace(self, name: str) -> None:
        ip("netns", "add", name)
        self._made.append(name)
        ip("-n", name, "link", "set", "lo", "up")


class TestAuthority:
    """A certificate authority that writes what --state-file names."""

    __test__ = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "test root")])
        now = datetime.now(UTC)
        self._root = (
            x509.CertificateBuilder(name, name, self._key.public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(True, None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        (folder / "root.pem").write_bytes(self._root.public_bytes(serialization.Encoding.PEM))

    def issue(self, uri: str, seconds: float = 12 * 3600) -> dict[str, str]:
        """Files for an identity; an entry of `certificates`. It ends in so many seconds."""
        stem = uri.rpartition("/")[2]
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        leaf = (
            x509.CertificateBuilder(self._root.subject, x509.Name([]), key.public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=1))
            .not_valid_after(now + timedelta(seconds=seconds))
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        (self.folder / f"{stem}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        (self.folder / f"{stem}.pem").write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
        return {"identity": uri, "key": f"{stem}.key", "chain": f"{stem}.pem", "roots": "root.pem"}


class Cluster:
    """The Kubernetes API as far as an agent asks it, in memory. Changes reach the agent at once, as a watch would
    bring them.
    """

    def __init__(self, node: str) -> None:
        self._node = node
        self._agent: Agent | None = None
        self.pods: dict[str, Pod] = {}
        self.modes: dict[str, str] = {}
        self.annotations: list[tuple[str, str]] = []

    def watch(self, agent: Agent) -> None:
        """A (new) agent lists, then watches."""
        self._agent = agent
        for name, mode in self.modes.items():
            agent.namespace_seen(name, mode)
        for pod in self.pods.values():
            agent.pod_seen(pod)
        agent.list_complete(pods=True, namespaces=True)

    def label(self, namespace: str, mode: str) -> None:
        """kubectl label namespace."""
        self.modes[namespace] = mode
        if self._agent:
            self._agent.namespace_seen(namespace, mode)

    def add(self, namespace: str, name: str, *ips: str, account: str = "default", probed: tuple[int, ...] = ()) -> Pod:
        """A pod is placed on the node; with addresses it runs. `probed`: ports of its probes."""
        pod = Pod(
            str(uuid.uuid4()), namespace, name, account, self._node, False, "Running", False, ips, "", False, "", True,
            probed,
        )  # fmt: skip
        self._put(pod)
        return pod

    def delete(self, pod: Pod) -> None:
        """The pod object goes."""
        del self.pods[pod.key]
        if self._agent:
            self._agent.pod_gone(pod.uid)

    def _put(self, pod: Pod) -> None:
        self.pods[pod.key] = pod
        if self._agent:
            self._agent.pod_seen(pod)

    async def get_pod(self, namespace: str, name: str) -> Pod | None:
        return self.pods.get(f"{namespace}/{name}")

    async def namespace_mode(self, name: str) -> str:
        return self.modes.get(name, "")

    async def annotate(self, pod: Pod, enabled: bool) -> None:
        value = "enabled" if enabled else ""
        self.annotations.append((pod.key, value))
        if pod.key in self.pods:
            self._put(replace(self.pods[pod.key], redirection=value))


@asynccontextmanager
async def echo(pod: Sandbox, port: int) -> AsyncIterator[list[str]]:
    """An application that says its client's address and then echoes lines. Yields the clients it had, by address."""
    clients: list[str] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        address = writer.get_extra_info("peername")[0].removeprefix("::ffff:")
        clients.append(address)
        writer.write(f"{address}\n".encode())
        try:
            while line := await reader.readline():
                writer.write(line)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(talk, sock=pod.listen_socket(port))
    try:
        yield clients
    finally:
        server.close()


class Client:
    """An application's connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seen_as: str) -> None:
        self._reader = reader
        self._writer = writer
        self.seen_as = seen_as
        self.local = writer.get_extra_info("sockname")

    @classmethod
    async def open(cls, pod: Sandbox, address: str, port: int, seconds: float = 15) -> "Client":
        """Connects and reads the greeting. Raises OSError (a reset or refusal) or TimeoutError."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        made = pod.connect_socket(family)
        try:
            async with asyncio.timeout(seconds):
                await asyncio.get_running_loop().sock_connect(made, (address, port))
                reader, writer = await asyncio.open_connection(sock=made)
                greeting = await reader.readline()
        except BaseException:
            made.close()
            raise
        if not greeting:
            writer.close()
            raise ConnectionResetError("closed before the greeting")
        return cls(reader, writer, greeting.decode().strip())

    async def ask(self, text: str, seconds: float = 15) -> str:
        """Sends a line; returns the answer. Raises OSError or TimeoutError."""
        async with asyncio.timeout(seconds):
            self._writer.write(f"{text}\n".encode())
            answer = await self._reader.readline()
        if not answer:
            raise ConnectionResetError("closed instead of an answer")
        return answer.decode().strip()

    async def close(self) -> None:
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except OSError:
            pass
