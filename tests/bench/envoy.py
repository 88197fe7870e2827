"""A pair of Envoy sidecars: what a mesh with a proxy in each pod does to a TCP connection, without its capture.

The client connects to its own Envoy on 127.0.0.1, which opens a TLS 1.3 connection with a client certificate to the
Envoy in the server's pod for each connection of the client; that one connects to the application. Both check the
other's chain and SPIFFE URI. Two workers, as Istio gives a sidecar; no HTTP filter, no access log, no iptables: the
kindest form. Sockets do not pace where the system has a BBR, as those of the engine (docs/decisions/0007).
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.rows import PORTS
from tests.bench.side import Side
from tests.harness.envoy import Envoy
from tests.harness.pki import Authority, Leaf, spiffe

OUT, IN = 11000, 21000  # added to the application's port: where the client connects, where the peer does
WORKERS = 2
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
    return {"listeners": listener, "clusters": cluster}


@dataclass(frozen=True, slots=True)
class Sidecars:
    """By pod."""

    by_pod: dict[str, Envoy]

    def handshakes(self) -> int:
        """TLS handshakes that they have completed, in either role: two for each connection."""
        pages = (each.page("/stats?filter=ssl.handshake$") for each in self.by_pod.values())
        return sum(int(line.rsplit(": ", 1)[1]) for page in pages for line in page.splitlines())

    def pids(self) -> dict[str, list[int]]:
        """One of each pod."""
        return {f"envoy, {pod}": [each.process.pid] for pod, each in self.by_pod.items()}

    def version(self) -> str:
        """As Envoy says it."""
        return str(json.loads(next(iter(self.by_pod.values())).page("/server_info"))["version"]).split("/")[1]


@contextlib.contextmanager
def sidecars(
    folder: Path, side: Side, clients: Sequence[str], server: str, ports: Sequence[int] = PORTS
) -> Iterator[Sidecars]:
    """An Envoy in every client's pod and one in the server's. A client connects to 127.0.0.1, port + OUT."""
    authority = Authority()
    names = {pod: spiffe(pod, "bench") for pod in (*clients, server)}
    address = side.addresses[server]
    made: dict[str, Envoy] = {}
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
            parts = {kind: [each[kind] for each in hops] for kind in ("listeners", "clusters")}
            made[pod] = Envoy(folder, side.netns[pod], parts, workers=WORKERS)
            stack.push(made[pod])
        for each in made.values():  # all of them start at once
            each.__enter__()
        yield Sidecars(made)
