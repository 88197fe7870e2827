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

SERVICES, ENDPOINTS, NAMESPACES = 500, 3, 20  # of the mesh that a sidecar knows by default: all of it
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


def mesh(leaf: Leaf, services: int) -> dict[str, list[dict[str, Any]]]:
    """What istiod tells a sidecar of a mesh of so many services with one port each, unless somebody limits it (kind
    Sidecar): for each a cluster with its endpoints, mutual TLS by the endpoints' metadata with certificates of one
    secret, SANs of the service; four of five speak HTTP on port 80 and share a listener whose routes have a virtual
    host for each, the fifth is TCP and has a listener of its own. Nothing binds a port: connections come by
    redirection. Istio's own filters (statistics, exchange of metadata) are not there: Envoy as shipped has none, and
    they would cost more."""
    clusters, hosts, listeners = [], [], []
    for number in range(services):
        service, space = f"service-{number}", f"namespace-{number % NAMESPACES}"
        host, address = f"{service}.{space}.svc.cluster.local", f"10.96.{number >> 8}.{number & 255}"
        http = number % 5 != 0
        port = 80 if http else 9000 + number
        clusters.append(_service(f"outbound|{port}||{host}", number, spiffe(service, space)))
        if http:
            names = [host, f"{service}.{space}.svc", f"{service}.{space}", address]
            route = {"cluster": f"outbound|{port}||{host}", "timeout": "0s", "retry_policy": _RETRY}
            hosts.append(
                {
                    "name": f"{host}:{port}",
                    "domains": [*names, *(f"{name}:{port}" for name in names)],
                    "routes": [{"name": "default", "match": {"prefix": "/"}, "route": route}],
                    "include_request_attempt_count": True,
                }
            )
        else:
            proxy = {"@type": f"{_TYPES}.filters.network.tcp_proxy.v3.TcpProxy"}
            proxy |= {"stat_prefix": f"outbound|{port}||{host}", "cluster": f"outbound|{port}||{host}"}
            listeners.append(_unbound(f"{address}_{port}", address, port, "tcp_proxy", proxy))
    manager: dict[str, Any] = {
        "@type": f"{_TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "outbound_0.0.0.0_80",
        "route_config": {"name": "80", "virtual_hosts": hosts, "validate_clusters": False},
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{_TYPES}.filters.http.router.v3.Router"},
            }
        ],
    }
    listeners.append(_unbound("0.0.0.0_80", "0.0.0.0", 80, "http_connection_manager", manager))
    secrets = [
        {
            "name": "default",
            "tls_certificate": {
                "certificate_chain": {"inline_string": leaf.chain},
                "private_key": {"inline_string": leaf.key},
            },
        },
        {"name": "ROOTCA", "validation_context": {"trusted_ca": {"inline_string": leaf.roots}}},
    ]
    return {"clusters": clusters, "listeners": listeners, "secrets": secrets}


_RETRY = {
    "retry_on": "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes",
    "num_retries": 2,
    "retriable_status_codes": [503],
}
# What Istio leaves of Envoy's own counters, unless asked for more; and those of our load's hops.
STATS = {
    "stats_config": {
        "stats_matcher": {
            "inclusion_list": {
                "patterns": [
                    {"prefix": each}
                    for each in ("cluster_manager", "listener_manager", "server", "cluster.xds-grpc", "cluster.port")
                ]
            }
        }
    }
}


def _service(name: str, number: int, identity: str) -> dict[str, Any]:
    tls = {
        "tls_certificate_sds_secret_configs": [{"name": "default"}],
        "combined_validation_context": {
            "default_validation_context": {
                "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": identity}}]
            },
            "validation_context_sds_secret_config": {"name": "ROOTCA"},
        },
        "alpn_protocols": ["istio-peer-exchange", "istio", "h2"],
    }
    upstream = {"@type": f"{_TYPES}.transport_sockets.tls.v3.UpstreamTlsContext", "common_tls_context": tls}
    upstream["sni"] = f"outbound_.{name}"
    raw = {"@type": f"{_TYPES}.transport_sockets.raw_buffer.v3.RawBuffer"}
    endpoints = [
        {
            "endpoint": {"address": _address(f"10.{20 + each}.{number >> 8}.{number & 255}", 8080)},
            "metadata": {
                "filter_metadata": {
                    "istio": {
                        "workload": f"service-{number};namespace-{number % NAMESPACES};service-{number};v1;Kubernetes"
                    },
                    "envoy.transport_socket_match": {"tlsMode": "istio"},
                }
            },
            "load_balancing_weight": 1,
        }
        for each in range(ENDPOINTS)
    ]
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "10s",
        "lb_policy": "LEAST_REQUEST",
        "circuit_breakers": {"thresholds": [{"max_connections": 2**32 - 1, "max_requests": 2**32 - 1}]},
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"locality": {"region": "region", "zone": "zone"}, "lb_endpoints": endpoints}],
        },
        "metadata": {"filter_metadata": {"istio": {"services": [{"host": name, "namespace": "n"}]}}},
        "transport_socket_matches": [
            {
                "name": "tlsMode-istio",
                "match": {"tlsMode": "istio"},
                "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": upstream},
            },
            {
                "name": "tlsMode-disabled",
                "match": {},
                "transport_socket": {"name": "envoy.transport_sockets.raw_buffer", "typed_config": raw},
            },
        ],
    }


def _unbound(name: str, address: str, port: int, kind: str, typed: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "address": _address(address, port),
        "bind_to_port": False,
        "traffic_direction": "OUTBOUND",
        "filter_chains": [{"filters": [{"name": f"envoy.filters.network.{kind}", "typed_config": typed}]}],
    }


@contextlib.contextmanager
def sidecars(
    folder: Path,
    side: Side,
    clients: Sequence[str],
    server: str,
    ports: Sequence[int] = PORTS,
    *,
    services: int = 0,
) -> Iterator[Sidecars]:
    """An Envoy in every client's pod and one in the server's. A client connects to 127.0.0.1, port + OUT. With
    `services` the clients' know such a mesh, not only where their load goes."""
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
            large = services > 0 and pod != server
            known = [parts, mesh(leaf, services)] if large else [parts]
            made[pod] = Envoy(folder, side.netns[pod], *known, workers=WORKERS, more=STATS if large else None)
            stack.push(made[pod])
        for each in made.values():  # all of them start at once
            each.__enter__()
        yield Sidecars(made)
