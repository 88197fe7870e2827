"""Builds the control plane's parts from its configuration and runs them in one TaskGroup. The only module that knows
all of them.
"""

import asyncio
import contextlib
import ipaddress
import signal
import socket
import time
from typing import Any

import grpc

from sidestep import log
from sidestep.control import pages, roots
from sidestep.control.authority import LIFETIME_S
from sidestep.control.callers import Gate
from sidestep.control.certificates import Certificates
from sidestep.control.command import PAGES_PORT, PLAIN_PORT, XDS_PORT, Config, StartError
from sidestep.control.metrics import Metrics
from sidestep.control.records import Mesh
from sidestep.control.remembered import Remembered
from sidestep.control.roots import Current
from sidestep.control.sources import Sources
from sidestep.control.translate import Cluster
from sidestep.control.verdicts import Verdicts
from sidestep.control.xds import Discovery
from sidestep.kube.client import KubeClient, KubeError

START_S = 60.0  # so long an API that cannot be reached is waited for
STOP_S = 0.5
OPTIONS = (
    ("grpc.max_receive_message_length", 32 << 20),  # the versions that a client of 200 000 workloads holds
    ("grpc.max_send_message_length", 200 << 20),
    ("grpc.so_reuseport", 0),  # a second control plane on this address is a mistake
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.max_concurrent_streams", 128),
)


async def serve(config: Config) -> int:
    """Runs until SIGTERM or SIGINT. Raises StartError, AuthorityError, ConfigError, KubeError where it cannot start."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    listener = _listener(config.bind, PAGES_PORT)
    started_s = time.time()
    async with KubeClient.from_config(config.kubeconfig) as client, contextlib.AsyncExitStack() as ends:
        current = await _current(config, client)
        metrics = Metrics()
        mesh = Mesh(Cluster(config.cluster_id, config.trust_domain, config.domain, config.network), config.namespace)
        gate = Gate(client, mesh, config.trusted)
        discovery = Discovery(gate, metrics)
        publisher = roots.Publisher(client, current.authority.roots_pem)
        current.tell(lambda authority: publisher.roots(authority.roots_pem))
        verdicts = Verdicts(client)
        remembered = Remembered(client, config.namespace)
        sources = Sources(client, mesh, discovery, publisher, verdicts, remembered)
        certificates = Certificates(gate, current, config.trust_domain, config.max_ttl_s, metrics)

        def status() -> dict[str, Any]:
            return {
                "ready": discovery.synced.is_set(),
                "uptime_s": int(time.time() - started_s),
                "trust_domain": config.trust_domain,
                "cluster_id": config.cluster_id,
                "root": {**current.status(), "unpublished": publisher.failed},
                **sources.status(),
                "conditions": verdicts.status(),
                "remembered": remembered.status(),
                **discovery.status(),
            }

        def gauges() -> dict[str, tuple[str, str, dict[str, float]]]:
            now = discovery.status()
            return {
                "records": ("Records that followers are served", "type", now["records"]),
                "objects": ("Objects of the API that they are made from", "kind", sources.status()["objects"]),
                "policies": ("Policies, by whether they are in force as written", "accepted", mesh.rulings.tally()),
                "streams_open": ("Streams that are open", "kind", {"delta": len(now["streams"])}),
            }

        metrics.gauges(gauges)
        runner = await pages.serve(
            listener, metrics, status, lambda: "" if discovery.synced.is_set() else "the cluster is not known yet"
        )
        ends.push_async_callback(runner.cleanup)
        server = grpc.aio.server(options=OPTIONS)
        server.add_generic_rpc_handlers((discovery.handlers(), certificates.handlers()))
        _bind(server, _host(config.bind), XDS_PORT, _credentials(config, current))
        plain = grpc.aio.server(options=OPTIONS)
        plain.add_generic_rpc_handlers((discovery.handlers(anonymous=True),))
        if config.plaintext:
            _bind(plain, "127.0.0.1", PLAIN_PORT, None)
            await plain.start()
            ends.push_async_callback(plain.stop, STOP_S)
        await server.start()
        ends.push_async_callback(server.stop, STOP_S)
        log.event("start", bind=config.bind, trust_domain=config.trust_domain, cluster=config.cluster_id)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(sources.run(), name="sources"),
                group.create_task(publisher.run(), name="roots"),
                group.create_task(current.run(), name="authority"),
                group.create_task(verdicts.run(), name="verdicts"),
                group.create_task(remembered.run(), name="remembered"),
            ]
            await stop.wait()
            log.event("stop")
            for task in tasks:
                task.cancel()
    return 0


async def _current(config: Config, client: KubeClient) -> Current:
    """The authority; an API that does not answer yet is waited for."""
    if config.cacerts is not None:
        directory = config.cacerts
        return Current(roots.from_directory(directory), lambda: asyncio.to_thread(roots.from_directory, directory))
    deadline = time.monotonic() + START_S
    while True:
        try:
            kept = await roots.kept(client, config.namespace, config.trust_domain)
            return Current(kept, lambda: roots.stored(client, config.namespace))
        except KubeError as error:
            if error.status not in (0, 404, 429, 500, 503) or time.monotonic() > deadline:
                raise
            log.event("waiting_for_api", error=error)
            await asyncio.sleep(0.5)


def _credentials(config: Config, current: Current) -> grpc.ServerCredentials:
    """TLS with a certificate of our own authority, made anew at half its life, and by each new authority."""
    names = []
    for service in (f"istiod.{config.namespace}", "istiod.istio-system", f"sidestep-control.{config.namespace}"):
        names += [f"{service}.svc", f"{service}.svc.{config.domain}"]
    address = ipaddress.ip_address(config.bind)
    addresses = ["127.0.0.1", "::1"] if address.is_unspecified else [str(address)]
    by = current.authority
    made = by.server([*names, "localhost"], addresses, LIFETIME_S, time.time())
    renewed = time.monotonic()

    def fetch() -> grpc.ServerCertificateConfiguration | None:  # None: go on with the last
        nonlocal by, renewed
        if current.authority is by and time.monotonic() - renewed < LIFETIME_S / 2:
            return None
        by, renewed = current.authority, time.monotonic()
        new = by.server([*names, "localhost"], addresses, LIFETIME_S, time.time())
        return grpc.ssl_server_certificate_configuration([new])

    first = grpc.ssl_server_certificate_configuration([made])
    return grpc.dynamic_ssl_server_credentials(first, fetch, False)  # type: ignore[arg-type]


def _bind(server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None) -> None:
    try:
        address = f"{host}:{port}"
        bound = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError:
        bound = 0
    if bound != port:
        raise StartError(f"port {port} on {host} cannot be had; does another control plane run here?")


def _host(bind: str) -> str:
    return f"[{bind}]" if ":" in bind else bind


def _listener(bind: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((bind, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise StartError(f"port {port} on {bind}: {error.strerror}; does another control plane run here?") from None
    listener.setblocking(False)
    return listener
