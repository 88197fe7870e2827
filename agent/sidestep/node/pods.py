"""Pods as the agent keeps them, and who is enrolled.

A *projection* is the small part of an API object that the agent needs: the cache holds these and nothing else.
*Eligible* is a pod that should be in the mesh by its labels and its namespace's (reference/istio-ambient.md 1.2).
Pure: no I/O.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

MODE_LABEL = "istio.io/dataplane-mode"
REDIRECTION = "ambient.istio.io/redirection"
SIDECAR = "sidecar.istio.io/status"
EXCLUDED_NAMESPACES = frozenset({"kube-system"})

PROBED_PORTS = 64  # of one pod; more are not exempt
DECLARED_PORTS = 64  # of one pod; more are not shown

_NOT_PROBED = 15008  # HBONE: it is nobody's but the engine's
_PROBES = ("readinessProbe", "livenessProbe", "startupProbe")
_HOOKS = ("postStart", "preStop")
_RAW = frozenset({"ALL", "NET_RAW", "NET_ADMIN", "CAP_NET_RAW", "CAP_NET_ADMIN"})


@dataclass(frozen=True, slots=True)
class Pod:
    """One pod of this node. `ips` as the API lists them (text, both families); `phase` as in its status.

    `raw`: some container may hold CAP_NET_RAW or CAP_NET_ADMIN, so capture does not bind it (docs/threat-model.md).
    `probed`: the ports that the kubelet asks by TCP, by the containers' declared probes and hooks. `ports`: the TCP
    ports that its containers declare; what they say binds nobody, it is shown to people.
    """

    uid: str
    namespace: str
    name: str
    service_account: str
    node: str
    host_network: bool
    phase: str
    deleting: bool
    ips: tuple[str, ...]
    mode: str
    sidecar: bool
    redirection: str
    raw: bool
    probed: tuple[int, ...] = ()
    ports: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """NAMESPACE/NAME."""
        return f"{self.namespace}/{self.name}"

    @property
    def terminal(self) -> bool:
        """Its containers have ended for good; the API keeps only the object."""
        return self.phase in ("Succeeded", "Failed")


class Verdict(Enum):
    """Whether a pod belongs into the mesh; the value is what people read."""

    ENROL = "enrolled by label"
    HOST_NETWORK = "uses the host's network"
    SIDECAR = "has a sidecar"
    POD_NONE = "pod label says none"
    EXCLUDED = "namespace is excluded"
    NO_LABEL = "no label"
    TERMINAL = "has ended"


def pod_of(obj: Mapping[str, Any]) -> Pod:
    """Projects an API Pod. KeyError where the object has no uid, name or namespace (the API always sets them)."""
    meta = obj["metadata"]
    spec = obj.get("spec") or {}
    status = obj.get("status") or {}
    annotations = meta.get("annotations") or {}
    ips = [entry.get("ip", "") for entry in status.get("podIPs") or ()] or [status.get("podIP") or ""]
    return Pod(
        uid=meta["uid"],
        namespace=meta["namespace"],
        name=meta["name"],
        service_account=spec.get("serviceAccountName") or "default",
        node=spec.get("nodeName") or "",
        host_network=bool(spec.get("hostNetwork")),
        phase=status.get("phase") or "Pending",
        deleting=bool(meta.get("deletionTimestamp")),
        ips=tuple(ip for ip in ips if ip),
        mode=(meta.get("labels") or {}).get(MODE_LABEL, ""),
        sidecar=SIDECAR in annotations,
        redirection=annotations.get(REDIRECTION, ""),
        raw=any(_may_send_raw(c) for c in _containers(spec)),
        probed=tuple(sorted({port for c in _containers(spec) for port in _probed(c)})[:PROBED_PORTS]),
        ports=tuple(sorted({port for c in _containers(spec) for port in _declared(c)})[:DECLARED_PORTS]),
    )


def namespace_of(obj: Mapping[str, Any]) -> tuple[str, str]:
    """Projects an API Namespace to (name, value of its mode label or "")."""
    meta = obj["metadata"]
    return meta["name"], (meta.get("labels") or {}).get(MODE_LABEL, "")


def eligible(pod: Pod, namespace_mode: str, excluded: frozenset[str] = EXCLUDED_NAMESPACES) -> Verdict:
    """Should this pod be in the mesh? The first rule that hits decides (reference/istio-ambient.md 1.2)."""
    if pod.terminal:
        return Verdict.TERMINAL
    if pod.host_network:
        return Verdict.HOST_NETWORK
    if pod.sidecar:
        return Verdict.SIDECAR
    if pod.namespace in excluded:
        return Verdict.EXCLUDED
    if pod.mode == "ambient":
        return Verdict.ENROL
    if pod.mode == "none":
        return Verdict.POD_NONE
    return Verdict.ENROL if namespace_mode == "ambient" else Verdict.NO_LABEL


def spiffe(trust_domain: str, namespace: str, service_account: str) -> str:
    """The SPIFFE URI of a service account."""
    return f"spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}"


def workload_name(cluster_id: str, namespace: str, name: str) -> str:
    """The xDS name of a pod's own Workload record (reference/istio-ambient.md 5.4)."""
    return f"{cluster_id}//Pod/{namespace}/{name}"


_POD_UID = re.compile(r"pod([0-9a-f]{8}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12})")


def uid_of_cgroup(text: str) -> str | None:
    """The pod UID in the contents of /proc/PID/cgroup, None where there is none or more than one.

    Both drivers: `kubepods/burstable/pod1234-.../CONTAINER` and `kubepods-burstable-pod1234_....slice`.
    """
    lines = [line for line in text.splitlines() if "kubepods" in line]
    found = {match.replace("_", "-") for line in lines for match in _POD_UID.findall(line)}
    return found.pop() if len(found) == 1 else None


def _containers(spec: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for part in ("initContainers", "containers"):
        yield from spec.get(part) or ()


def _declared(container: Mapping[str, Any]) -> Iterator[int]:
    """TCP ports that a container declares."""
    for each in container.get("ports") or ():
        port = each.get("containerPort")
        if isinstance(port, int) and each.get("protocol", "TCP") == "TCP":
            yield port


def _probed(container: Mapping[str, Any]) -> Iterator[int]:
    """Ports of the pod that the kubelet connects to for this container. One that asks another host is none of ours,
    and what makes no sense is left out: it is then asked like any other port.
    """
    lifecycle = container.get("lifecycle") or {}
    handlers = [container.get(name) or {} for name in _PROBES] + [lifecycle.get(name) or {} for name in _HOOKS]
    for handler in handlers:
        for kind in ("httpGet", "tcpSocket", "grpc"):
            action = handler.get(kind) or {}
            port = _port(container, action.get("port"))
            if port is not None and not action.get("host"):
                yield port


def _port(container: Mapping[str, Any], port: Any) -> int | None:
    """A port by number, by the name of one of the container's ports, or (as the kubelet reads it) by digits."""
    if isinstance(port, str):
        named = [entry.get("containerPort") for entry in container.get("ports") or () if entry.get("name") == port]
        port = named[0] if named else int(port) if re.fullmatch("[0-9]{1,5}", port) else None
    if not isinstance(port, int) or isinstance(port, bool) or not 0 < port < 65536 or port == _NOT_PROBED:
        return None
    return port


def _may_send_raw(container: Mapping[str, Any]) -> bool:
    """Runtimes grant CAP_NET_RAW by default: only a container that drops it (or all) and adds nothing back is
    bound.
    """
    context = container.get("securityContext") or {}
    if context.get("privileged"):
        return True
    capabilities = context.get("capabilities") or {}
    dropped = {str(c).upper() for c in capabilities.get("drop") or ()}
    added = {str(c).upper() for c in capabilities.get("add") or ()}
    return bool(added & _RAW) or not dropped & {"ALL", "NET_RAW", "CAP_NET_RAW"}
