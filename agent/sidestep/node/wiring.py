"""Builds the agent's parts from its configuration and runs them in one TaskGroup. The only module that knows all of
them.
"""

import asyncio
import base64
import json
import random
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc

from sidestep import log
from sidestep.kube.client import KubeClient
from sidestep.node import ca, cni, httpd
from sidestep.node.admin import Pages, only_local
from sidestep.node.agent import Agent, Authority, CertificateError, Place
from sidestep.node.api import ClusterApi, reflectors, root_reflector
from sidestep.node.capture import Captures, native_problem, require
from sidestep.node.command import Config
from sidestep.node.events import Reporter
from sidestep.node.metrics import Metrics
from sidestep.node.netns import Records
from sidestep.node.resident import ApiError, Names
from sidestep.node.xds import Feed, Stream

ROOT_S = 5.0
CALL_S = 5.0
GRPC_OPTIONS = (
    ("grpc.max_receive_message_length", 200 * 1024 * 1024),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.use_local_subchannel_pool", 1),
)


async def serve(config: Config, listeners: dict[str, socket.socket]) -> int:
    """Runs the agent until SIGTERM or SIGINT. Raises StateError, CaptureError or ConfigError where it cannot start."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    require(config.bpf_dir)  # before anything is made: what cannot work leaves nothing
    config.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    no_native = native_problem() if config.same_node == "native" else ""
    if no_native:
        log.event("native_unavailable", level="WARN", reason=no_native, hint="same_node is direct on this node")
        config = replace(config, same_node="direct")
    metrics = Metrics()
    if config.state_file is not None:
        from sidestep.node import statefile  # YAML and X.509 parsing cost memory that only tests need
    async with KubeClient.from_config(config.kubeconfig) as client:
        api = ClusterApi(client, config.system_namespace)
        captures = Captures(config.bpf_dir)
        names = Names(
            trust_domain=config.trust_domain,
            cluster_id=config.cluster_id,
            drain_quiet_ms=int(config.drain_quiet_s * 1000),
            netns_dir=config.pod_netns_dir,
            native=config.same_node == "native",
        )
        channels = Channels(config, api)
        files = statefile.FileAuthority() if config.state_file is not None else None
        authority: Authority = files or ca.Authority(channels.get, config.token_file, config.cluster_id)
        agent = Agent(
            place=Place(config.node, _settings(config), config.excluded, config.cluster_domain, no_native),
            names=names,
            captures=captures,
            engine_path=config.engine_socket,
            api=api,
            authority=authority,
            records=Records(config.run_dir / "pods"),
            metrics=metrics,
            uniform=random.random,
            kubelet_cgroup=config.kubelet_cgroup,
        )
        feed: Feed
        if files is not None and config.state_file is not None:
            file_feed = statefile.FileFeed(config.state_file, files, agent)
            loop.add_signal_handler(signal.SIGHUP, file_feed.reload)
            feed = file_feed
        else:
            node_id, metadata = _node(config)
            feed = Stream(
                channel=channels.get,
                address=config.control,
                node_id=node_id,
                metadata=metadata,
                token_file=config.token_file,
                cluster_id=config.cluster_id,
                engine=agent.engine,
                metrics=metrics,
            )
        agent.engine_versions = feed.engine_holds
        pages = Pages(agent, feed.status, lambda: [*agent.pending(), *feed.pending()])
        cli = cni.listen(config.run_dir / "agent.sock", socket.SOCK_STREAM)
        pods, namespaces = reflectors(client, agent, config.node)
        roots_changed = asyncio.Event()

        def roots_seen(pem: str) -> None:
            agent.roots_changed(pem)
            roots_changed.set()

        roots = root_reflector(client, config.system_namespace, roots_seen)

        async def follow_roots() -> None:
            while True:
                await roots_changed.wait()
                roots_changed.clear()
                await channels.renew()

        reporter = Reporter(config.node, api.report, time.time)
        log.event("start", node=config.node, engine=config.engine_socket, control=config.control or config.state_file)

        async def listed() -> None:
            await pods.synced.wait()
            agent.list_complete(pods=True)

        async def namespaces_listed() -> None:
            await namespaces.synced.wait()
            agent.list_complete(namespaces=True)

        async with asyncio.TaskGroup() as group:
            agent_task = group.create_task(agent.run(), name="agent")
            await agent.restored.wait()
            tasks = [
                agent_task,
                group.create_task(feed.run(), name="feed"),
                group.create_task(pods.run(), name="pods"),
                group.create_task(namespaces.run(), name="namespaces"),
                group.create_task(roots.run(), name="roots"),
                group.create_task(follow_roots(), name="channel's roots"),
                group.create_task(reporter.watch(agent), name="causes"),
                group.create_task(reporter.run(), name="events"),
                group.create_task(listed(), name="pods listed"),
                group.create_task(namespaces_listed(), name="namespaces listed"),
                group.create_task(cni.serve(config.run_dir / "cni.sock", agent), name="cni"),
                group.create_task(httpd.serve(listeners["metrics"], pages.metrics), name="metrics"),
                group.create_task(httpd.serve(listeners["ready"], pages.ready), name="ready"),
                group.create_task(httpd.serve(listeners["admin"], only_local(pages.admin)), name="admin"),
                group.create_task(httpd.serve(cli, pages.admin), name="cli"),
            ]
            await stop.wait()
            log.event("stop")
            for task in tasks:
                task.cancel()
        await channels.close()
        captures.close()
    return 0


class Channels:
    """The gRPC channel to the control plane: TLS, trusted by the cluster's roots only, the server's name checked.

    One channel for stream and requests; made anew when the roots in the API have changed, so that a server may show a
    certificate of a new root at any time after it was published. A request that is under way on the old one has CALL_S
    to end; the stream begins anew.
    """

    def __init__(self, config: Config, api: ClusterApi) -> None:
        self._config = config
        self._api = api
        self._root = b""
        self._channel: grpc.aio.Channel | None = None
        self._making = asyncio.Lock()

    async def get(self, suspect: bool) -> grpc.aio.Channel:
        """The channel; where the last attempt failed (`suspect`) only after a look at the roots. Raises
        CertificateError where they are not to be had.
        """
        old = None
        try:
            async with self._making:
                if self._channel is None or suspect:
                    old = await self._make()
                if self._channel is None:
                    raise CertificateError("there is no channel to the control plane")
                return self._channel
        finally:
            if old is not None:
                await old.close(None)

    async def renew(self) -> None:
        """The roots in the API have changed."""
        old = None
        async with self._making:
            if self._channel is not None:
                old = await self._make()
        if old is not None:
            log.event("channel_renewed", control=self._config.control)
            await old.close(CALL_S)

    async def _make(self) -> grpc.aio.Channel | None:
        """Makes the channel where there is none or the roots are others. Returns the one whose place it takes. Raises
        CertificateError where there is none and the roots are not to be had.
        """
        try:
            async with asyncio.timeout(ROOT_S):
                root = await self._api.root_certificate()
        except (ApiError, TimeoutError) as err:
            if self._channel is None:
                raise CertificateError(str(err) or "the API did not answer in time") from None
            return None
        if self._channel is not None and root == self._root:
            return None
        options = (*GRPC_OPTIONS, ("grpc.ssl_target_name_override", self._config.control_name))
        credentials = grpc.ssl_channel_credentials(root_certificates=root)
        old, self._channel = self._channel, grpc.aio.secure_channel(self._config.control, credentials, options=options)
        self._root = root
        return old

    async def close(self) -> None:
        """Ends the channel and every call on it."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close(None)


def _settings(config: Config) -> dict[str, Any]:
    return {
        "network": config.network,
        "cluster_id": config.cluster_id,
        "trust_domain": config.trust_domain,
        "root_namespace": config.system_namespace,
        "node": config.node,
        "cluster_cidrs": list(config.cluster_cidrs),
        "same_node": config.same_node,
        "unknown": config.unknown,
    }


def _node(config: Config) -> tuple[str, dict[str, str]]:
    """xDS node id and metadata (reference/ztunnel.md 3.1). The agent's own pod is the one its token is bound to."""
    pod, namespace, account = _token_pod(config.token_file)
    pod = pod or f"sidestep-agent-{config.node}"
    namespace = namespace or config.system_namespace
    node_id = f"ztunnel~{config.node_ip}~{pod}.{namespace}~{namespace}.svc.{config.cluster_domain}"
    metadata = {
        "NAME": pod,
        "NAMESPACE": namespace,
        "INSTANCE_IPS": config.node_ip,
        "NODE_NAME": config.node,
        "CLUSTER_ID": config.cluster_id,
        "NETWORK": config.network,
        "SERVICE_ACCOUNT": account or "ztunnel",
    }
    return node_id, metadata


def _token_pod(token_file: Path | None) -> tuple[str, str, str]:
    """Pod, namespace and account that a service account token names, "" where it does not. Only names; trusted for
    nothing.
    """
    if token_file is None:
        return "", "", ""
    try:
        payload = token_file.read_text().strip().split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        bound = claims["kubernetes.io"]
        account = (bound.get("serviceaccount") or {}).get("name", "")
        return str((bound.get("pod") or {}).get("name", "")), str(bound["namespace"]), str(account)
    except (OSError, IndexError, ValueError, KeyError, TypeError, AttributeError):
        return "", "", ""
