"""What the control plane keeps of Kubernetes objects: small frozen values, made from the API's JSON. Pure.

An object as the API sends it is 5 to 20 KB of dictionaries, most of it status and managed fields; two that differ only
in those are equal here, so that a change of them causes no work. Addresses are text in the API's spelling. Policies are
the exception: their `spec` is kept as it came, because what cannot be read in it must be named, and their conditions,
because one of them is ours to write.
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

REDIRECTION = "ambient.istio.io/redirection"
TUNNEL = "networking.istio.io/tunnel"
NETWORK = "topology.istio.io/network"
DRY_RUN = "istio.io/dry-run"
DISTRIBUTION = "networking.istio.io/traffic-distribution"
TERMINAL = frozenset(["Succeeded", "Failed"])
_CRON = re.compile(r"(.+)-\d{8,10}")

Json = Mapping[str, Any]
Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod. `owner` is the name and kind of what made it (Deployment, Job, CronJob, or any other kind), the pod itself
    where nothing did. `locality`: region, zone, subzone of its own label, empty without one.
    """

    namespace: str
    name: str
    uid: str
    account: str
    node: str
    addresses: tuple[str, ...]
    phase: str
    ready: bool
    deleting: bool
    host_network: bool
    hbone: bool
    native_tunnel: bool
    network: str
    canonical: tuple[str, str]
    owner: tuple[str, str]
    locality: tuple[str, ...]
    labels: Labels

    @property
    def terminal(self) -> bool:
        """It runs no more and never will."""
        return self.phase in TERMINAL


@dataclass(frozen=True, slots=True)
class Port:
    """A Service's TCP port. `target` 0: named, each endpoint has its own."""

    name: str
    number: int
    target: int
    protocol: str


@dataclass(frozen=True, slots=True)
class Service:
    """A Service that has endpoints in the cluster (no ExternalName)."""

    namespace: str
    name: str
    addresses: tuple[str, ...]
    ports: tuple[Port, ...]
    families: tuple[str, ...]
    all_endpoints: bool
    local_only: bool
    distribution: str


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One endpoint of a slice: a pod's name, or "" and what is known of an address that is no pod's."""

    pod: str
    address: str
    ready: bool
    node: str
    zone: str


@dataclass(frozen=True, slots=True)
class Slice:
    """An EndpointSlice of a Service. `ports`: the number by the name of the Service's port."""

    namespace: str
    name: str
    service: str
    ports: tuple[tuple[str, int], ...]
    endpoints: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True)
class Node:
    """A node's place: region, zone, subzone."""

    name: str
    locality: tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Namespace:
    """A namespace."""

    name: str
    network: str
    distribution: str
    terminating: bool


@dataclass(frozen=True, slots=True)
class Policy:
    """An AuthorizationPolicy or a PeerAuthentication (`kind`). `spec`: JSON as it came, or None; nobody changes it.
    `dry_run`: the annotation. `conditions`: those of the status, JSON as it came; `version`: resourceVersion.
    """

    kind: str
    namespace: str
    name: str
    uid: str
    created: str
    generation: int
    dry_run: str
    spec: Any
    conditions: tuple[Any, ...]
    version: str

    @property
    def key(self) -> str:
        """NAMESPACE/NAME."""
        return f"{self.namespace}/{self.name}"

    def means(self, other: "Policy | None") -> bool:
        """Whether another version asks for the same: only its status differs."""
        return other is not None and (self.uid, self.created, self.dry_run, self.spec) == (
            other.uid,
            other.created,
            other.dry_run,
            other.spec,
        )


def pod_of(obj: Json) -> Pod:
    """From the API's Pod."""
    meta, spec, status = obj["metadata"], obj.get("spec") or {}, obj.get("status") or {}
    labels, annotations = meta.get("labels") or {}, meta.get("annotations") or {}
    addresses = tuple(entry["ip"] for entry in status.get("podIPs") or () if entry.get("ip"))
    owner = _owner(meta, labels)
    native = labels.get(TUNNEL) == "http"
    return Pod(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta.get("uid", ""),
        account=spec.get("serviceAccountName") or "default",
        node=spec.get("nodeName") or "",
        addresses=addresses or ((status["podIP"],) if status.get("podIP") else ()),
        phase=status.get("phase") or "Pending",
        ready=any(
            each.get("type") == "Ready" and each.get("status") == "True" for each in status.get("conditions") or ()
        ),
        deleting=bool(meta.get("deletionTimestamp")),
        host_network=bool(spec.get("hostNetwork")),
        hbone=native or annotations.get(REDIRECTION) == "enabled",
        native_tunnel=native,
        network=labels.get(NETWORK, ""),
        canonical=(
            labels.get("service.istio.io/canonical-name")
            or labels.get("app.kubernetes.io/name")
            or labels.get("app")
            or owner[0],
            labels.get("service.istio.io/canonical-revision")
            or labels.get("app.kubernetes.io/version")
            or labels.get("version")
            or "latest",
        ),
        owner=owner,
        locality=tuple(re.split(r"[/.]", labels.get("topology.istio.io/locality", ""))[:3])
        if labels.get("topology.istio.io/locality")
        else (),
        labels=_labels(labels),
    )


@lru_cache(maxsize=1 << 16)
def _shared(labels: Labels) -> Labels:
    return labels


def _labels(labels: Json) -> Labels:
    """Pods of one template have the same labels, but for a few: kept once."""
    return _shared(frozenset((sys.intern(key), sys.intern(str(value))) for key, value in labels.items()))


def _owner(meta: Json, labels: Json) -> tuple[str, str]:
    """Name and kind. A ReplicaSet that carries a pod-template-hash is a Deployment's; a Job whose name ends in a time
    is a CronJob's.
    """
    owners = [owner for owner in meta.get("ownerReferences") or () if owner.get("controller")]
    if not owners:
        return meta["name"], "Pod"
    name, kind = owners[0]["name"], owners[0]["kind"]
    template = labels.get("pod-template-hash")
    if kind == "ReplicaSet" and template and name.endswith(f"-{template}"):
        return name.removesuffix(f"-{template}"), "Deployment"
    cron = _CRON.fullmatch(name) if kind == "Job" else None
    return (cron[1], "CronJob") if cron else (name, kind)


def service_of(obj: Json) -> Service | None:
    """From the API's Service; None for an ExternalName."""
    meta, spec = obj["metadata"], obj.get("spec") or {}
    if spec.get("type") == "ExternalName":
        return None
    cluster = spec.get("clusterIPs") or ([spec["clusterIP"]] if spec.get("clusterIP") else [])
    ingress = ((obj.get("status") or {}).get("loadBalancer") or {}).get("ingress") or ()
    outside = [*(spec.get("externalIPs") or ()), *(entry["ip"] for entry in ingress if entry.get("ip"))]
    return Service(
        namespace=meta["namespace"],
        name=meta["name"],
        addresses=tuple(dict.fromkeys(address for address in [*cluster, *outside] if address != "None")),
        ports=tuple(
            Port(
                name=port.get("name") or "",
                number=port["port"],
                target=_target(port),
                protocol=port.get("appProtocol") or port.get("name") or "",
            )
            for port in spec.get("ports") or ()
            if port.get("protocol", "TCP") == "TCP"
        ),
        families=tuple(spec.get("ipFamilies") or ()),
        all_endpoints=bool(spec.get("publishNotReadyAddresses")),
        local_only=spec.get("internalTrafficPolicy") == "Local",
        distribution=spec.get("trafficDistribution") or (meta.get("annotations") or {}).get(DISTRIBUTION) or "",
    )


def _target(port: Json) -> int:
    target = port.get("targetPort")
    if not target:
        return int(port["port"])
    return target if isinstance(target, int) else int(target) if str(target).isdecimal() else 0


def slice_of(obj: Json) -> Slice | None:
    """From the API's EndpointSlice; None where it is no Service's, or of names instead of addresses."""
    meta = obj["metadata"]
    service = (meta.get("labels") or {}).get("kubernetes.io/service-name")
    if not service or obj.get("addressType") not in ("IPv4", "IPv6"):
        return None
    endpoints = []
    for each in obj.get("endpoints") or ():
        ref = each.get("targetRef") or {}
        pod = ref.get("name", "") if ref.get("kind") == "Pod" else ""
        ready = (each.get("conditions") or {}).get("ready") is not False
        for address in (each.get("addresses") or ())[:1]:
            if pod:  # its own object says the rest: readiness here would only be a second copy
                endpoints.append(Endpoint(pod, "", True, "", ""))
            else:
                endpoints.append(Endpoint("", address, ready, each.get("nodeName") or "", each.get("zone") or ""))
    return Slice(
        namespace=meta["namespace"],
        name=meta["name"],
        service=service,
        ports=tuple(
            (port.get("name") or "", port["port"])
            for port in obj.get("ports") or ()
            if port.get("port") and (port.get("protocol") or "TCP") == "TCP"
        ),
        endpoints=tuple(endpoints),
    )


def node_of(obj: Json) -> Node:
    """From the API's Node."""
    labels = obj["metadata"].get("labels") or {}
    region = labels.get("topology.kubernetes.io/region", "")
    zone = labels.get("topology.kubernetes.io/zone", "")
    return Node(obj["metadata"]["name"], (region, zone, labels.get("topology.istio.io/subzone", "")))


def namespace_of(obj: Json) -> Namespace:
    """From the API's Namespace."""
    meta = obj["metadata"]
    return Namespace(
        name=meta["name"],
        network=(meta.get("labels") or {}).get(NETWORK, ""),
        distribution=(meta.get("annotations") or {}).get(DISTRIBUTION, ""),
        terminating=bool(meta.get("deletionTimestamp")),
    )


def authorization_policy_of(obj: Json) -> Policy:
    """From the API's AuthorizationPolicy."""
    return _policy("AuthorizationPolicy", obj)


def peer_authentication_of(obj: Json) -> Policy:
    """From the API's PeerAuthentication."""
    return _policy("PeerAuthentication", obj)


def _policy(kind: str, obj: Json) -> Policy:
    meta, status = obj["metadata"], obj.get("status")
    conditions = status.get("conditions") if isinstance(status, Mapping) else None
    annotations = meta.get("annotations")
    dry_run = annotations.get(DRY_RUN) if isinstance(annotations, Mapping) else ""
    return Policy(
        kind=kind,
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta.get("uid", ""),
        created=meta.get("creationTimestamp") or "",
        generation=meta.get("generation") or 0,
        dry_run=dry_run or "",
        spec=obj.get("spec"),
        conditions=tuple(conditions) if isinstance(conditions, list) else (),
        version=meta.get("resourceVersion") or "",
    )
