"""The agent's pages: what people and the `sidestep` command ask a node.

The same pages, all read-only, over RUN_DIR/agent.sock and over 127.0.0.1:15000; there a request must name localhost
as its Host, so that no web page that a user of the node opens can read them. No page shows a key. /metrics is on
15020, readiness on 15021.
"""

import base64
import ipaddress
import json
import re
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from sidestep import __version__
from sidestep.node import metrics
from sidestep.node.agent import Agent
from sidestep.node.capture import CaptureError
from sidestep.node.dump import shaped
from sidestep.node.engine import EngineAway, EngineError
from sidestep.node.httpd import Handler, Request, Response, refuse
from sidestep.node.identities import Identity
from sidestep.node.pods import Verdict
from sidestep.node.resident import Resident

METRICS_PORT = 15020
READY_PORT = 15021
ADMIN_PORT = 15000
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(?::[0-9]+)?")
DUMPS = ("workloads", "services", "policies", "connections", "tunnels", "denials")


class Pages:
    """Handlers over one agent. `control` tells of the connection to the control plane."""

    def __init__(self, agent: Agent, control: Callable[[], dict[str, Any]], pending: Callable[[], list[str]]) -> None:
        self._agent = agent
        self._control = control
        self._pending = pending
        self._started_s = time.time()
        self._pages: dict[str, Callable[[], Awaitable[Any]]] = {
            "/status": self._status,
            "/pods": self._pods,
            "/certificates": self._certificates,
            "/config_dump": self._config_dump,
        }

    async def admin(self, request: Request) -> Response:
        """Pages for the command line and people."""
        name = request.path.removeprefix("/")
        if request.path == "/":
            return Response(
                "\n".join([*sorted([*self._pages, "/authz"]), *(f"/{each}" for each in DUMPS), ""]).encode()
            )
        if request.path in self._pages:
            return _json(await self._pages[request.path]())
        if request.path == "/authz":
            return await self._authz(request)
        if name in DUMPS:
            try:
                return _json(shaped(name, await self._agent.engine.dump(name, request.query.get("containing", ""))))
            except EngineError as err:
                return Response(_text({"error": str(err)}), "application/json", HTTPStatus.SERVICE_UNAVAILABLE)
        return refuse(HTTPStatus.NOT_FOUND)

    async def _authz(self, request: Request) -> Response:
        """What this node's engine would decide about `identity` ("" or left out: none), `source`, `destination`."""
        asked = {name: request.query.get(name, "") for name in ("identity", "source", "destination")}
        try:
            answer = await self._agent.engine.authz(**asked)
        except EngineAway as err:
            return Response(_text({"error": str(err)}), "application/json", HTTPStatus.SERVICE_UNAVAILABLE)
        except EngineError as err:
            return Response(_text({"error": str(err)}), "application/json", HTTPStatus.BAD_REQUEST)
        return _json({"node": self._agent.place.node, **asked, **answer})

    async def ready(self, request: Request) -> Response:
        """/healthz/ready in the words of reference/ztunnel.md 8.4."""
        if request.path != "/healthz/ready":
            return refuse(HTTPStatus.NOT_FOUND)
        pending = self._pending()
        if pending:
            text = f"not ready, pending: {', '.join(sorted(pending))}\n"
            return Response(text.encode(), status=HTTPStatus.INTERNAL_SERVER_ERROR)
        return Response(b"ready\n")

    async def metrics(self, request: Request) -> Response:
        """The agent's and the engine's families."""
        if request.path not in ("/metrics", "/stats/prometheus"):
            return refuse(HTTPStatus.NOT_FOUND)
        agent = self._agent
        packets = metrics.summed(
            [await agent.captures.counters(r.uid) for r in list(agent.residents.values()) if r.captured]
        )
        for decision, count in packets.items():
            agent.metrics.set("sidestep_capture_packets_total", count, decision=decision)
        try:
            for result, count in (await agent.captures.kubelet_counters()).items():
                agent.metrics.set("sidestep_probe_syns_total", count, result=result)
        except CaptureError:
            pass  # nothing is attached: the last values stand
        try:
            text = await agent.engine.metrics() if agent.engine.up else ""
        except EngineError:
            text = ""
        openmetrics = metrics.OPENMETRICS in request.headers.get("accept", "")
        page = agent.metrics.render(text, openmetrics)
        return Response(page.encode(), metrics.OPENMETRICS_TYPE if openmetrics else metrics.TEXT_TYPE)

    async def _status(self) -> dict[str, Any]:
        agent = self._agent
        pods = [self._pod(resident) for resident in agent.residents.values()]
        hello = agent.engine.hello
        verdicts: dict[str, int] = {}
        for pod in agent.pods.values():
            why = agent.verdict(pod)
            verdicts[why.value] = verdicts.get(why.value, 0) + 1
        return {
            "node": agent.place.node,
            "version": __version__,
            "ready": not self._pending(),
            "pending": sorted(self._pending()),
            "uptime_s": int(time.time() - self._started_s),
            "engine": {"connected": agent.engine.up, **(dict(hello.info) if hello else {})},
            "control": self._control(),
            "settings": dict(agent.settings),
            "probes": agent.probes.status(),
            "no_native": agent.no_native,
            "pods": {
                "total": len(agent.pods),
                "enrolled": sum(1 for pod in pods if pod["enrolled"]),
                "pending": sum(1 for pod in pods if pod["wanted"] and not pod["enrolled"]),
                "raw": sum(1 for pod in pods if pod["enrolled"] and pod["raw"]),
                "by_verdict": verdicts,
            },
        }

    async def _pods(self) -> list[dict[str, Any]]:
        agent = self._agent
        shown = [self._pod(resident) for resident in agent.residents.values()]
        carried = await self._carried()
        for each in shown:  # the agent itself counts them only while a pod drains
            each["connections"] = carried.get(each["uid"], each["connections"])
        for uid, pod in agent.pods.items():
            if uid not in agent.residents:
                why = agent.verdict(pod)
                shown.append(
                    {
                        "uid": uid,
                        "namespace": pod.namespace,
                        "name": pod.name,
                        "node": pod.node,
                        "addresses": list(pod.ips),
                        "mode": "none",
                        "wanted": why is Verdict.ENROL,
                        "enrolled": False,
                        "why": why.value,
                        "raw": pod.raw,
                        "service_account": pod.service_account,
                        "host_network": pod.host_network,
                        "ports": {},
                        "declared_ports": list(pod.ports),
                    }
                )
        return sorted(shown, key=lambda pod: (str(pod["namespace"]), str(pod["name"])))

    async def _carried(self) -> dict[str, int]:
        """Open connections of each pod that the engine has, by UID; nothing where it does not answer."""
        if not self._agent.engine.up:
            return {}
        try:
            return {str(each["uid"]): int(each["connections"]) for each in await self._agent.engine.dump("pods")}
        except EngineError:
            return {}

    def _pod(self, resident: Resident) -> dict[str, Any]:
        agent, pod = self._agent, resident.pod
        return {
            "uid": resident.uid,
            "namespace": pod.namespace if pod else "",
            "name": pod.name if pod else "",
            "node": agent.place.node,
            "service_account": pod.service_account if pod else "",
            "identity": agent.names.identity(pod) if pod else "",
            "addresses": list((pod.ips if pod else ()) or resident.addresses),
            "mode": resident.capture.value,
            "engine": resident.engine.value,
            "wanted": resident.want.exists and resident.want.enrol,
            "enrolled": resident.served,
            "annotated": pod is not None and pod.redirection == "enabled",
            "why": agent.verdict(pod).value if pod else "unknown to the API",
            "waits_for": resident.step.value,
            "error": resident.error,
            "old_connections": resident.old,
            "doorless": resident.doorless,
            "connections": resident.connections,
            "ports": {
                "outbound": resident.ports.outbound,
                "inbound": resident.ports.inbound,
                "hbone": resident.ports.hbone,
            },
            "netns_ino": resident.netns.ino if resident.netns else resident.captured_ino,
            "raw": pod.raw if pod else False,
            "host_network": pod.host_network if pod else False,
            "declared_ports": list(pod.ports) if pod else [],
            "probed": list(pod.probed) if pod else [],
        }

    async def _certificates(self) -> list[dict[str, Any]]:
        return [_certificate(identity) for identity in self._agent.identities]

    async def _config_dump(self) -> dict[str, Any]:
        """The shape of reference/ztunnel.md 8.3, as far as the node knows it."""
        agent = self._agent
        dump: dict[str, Any] = {"workloads": [], "services": [], "policies": []}
        if agent.engine.up:
            for what in dump:
                try:
                    dump[what] = shaped(what, await agent.engine.dump(what))
                except EngineError as err:
                    dump["error"] = str(err)
        return {
            **dump,
            "stagedServices": {},
            "staticConfig": {"workloads": [], "services": [], "policies": []},
            "version": {"version": __version__, "istioVersion": __version__, "buildStatus": "sidestep"},
            "config": {
                "localNode": agent.place.node,
                "clusterDomain": agent.place.cluster_domain,
                **{_camel(key): value for key, value in agent.place.settings.items() if key != "node"},
            },
            "certificates": [_config_certificate(identity) for identity in agent.identities],
            "workloadState": {
                resident.uid: {
                    "state": "Up" if resident.served else "Pending",
                    "info": {
                        "name": resident.pod.name,
                        "namespace": resident.pod.namespace,
                        "serviceAccount": resident.pod.service_account,
                    },
                }
                for resident in agent.residents.values()
                if resident.pod is not None
            },
        }


def _camel(name: str) -> str:
    """trust_domain -> trustDomain, as all of the dump."""
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def only_local(handler: Handler) -> Handler:
    """Refuses a request whose Host is not this machine: a page elsewhere must not read ours through a browser."""

    async def checked(request: Request) -> Response:
        match = _HOST.fullmatch(request.headers.get("host", ""))
        name = match[1] if match else ""
        if name.lower() not in LOCAL_NAMES and not _loopback(name):
            return refuse(HTTPStatus.FORBIDDEN)
        return await handler(request)

    return checked


def _loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _certificate(identity: Identity) -> dict[str, Any]:
    certificate, now = identity.certificate, time.time()
    return {
        "identity": identity.uri,
        "state": "available" if identity.valid(now) else "expired" if certificate else "missing",
        "not_before": int(certificate.not_before_s) if certificate else None,
        "not_after": int(certificate.not_after_s) if certificate else None,
        "serial": certificate.serial if certificate else None,
        "renews_in_s": max(0, int(identity.due_s - now)) if not identity.asking else 0,
        "error": identity.error,
    }


def _config_certificate(identity: Identity) -> dict[str, Any]:
    certificate = identity.certificate
    if certificate is None:
        state = f"Unavailable: {identity.error}" if identity.error else "Initializing"
        return {"identity": identity.uri, "state": state, "certChain": [], "rootCerts": []}
    chain: list[dict[str, Any]] = [{"pem": each} for each in _pems(certificate.chain_pem)]
    chain[0] |= {
        "serialNumber": certificate.serial,
        "validFrom": _rfc3339(certificate.not_before_s),
        "expirationTime": _rfc3339(certificate.not_after_s),
    }
    roots = [{"pem": each} for each in _pems(certificate.roots_pem)]
    return {"identity": identity.uri, "state": "Available", "certChain": chain, "rootCerts": roots}


def _pems(text: str) -> list[str]:
    """Each certificate of a PEM text, in base64 as ztunnel shows it."""
    end = "-----END CERTIFICATE-----"
    parts = [f"{part.strip()}\n{end}\n" for part in text.split(end)[:-1]]
    return [base64.b64encode(part.encode()).decode() for part in parts]


def _rfc3339(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _text(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


def _json(value: Any) -> Response:
    return Response(_text(value), "application/json")
