"""From objects to records: `istio.workload.Address` by the rules of reference/istio-ambient.md 5.3 to 5.5. Pure.

Each function makes one record from exactly the objects that it depends on; records.py knows which those are.
`Cluster` is what every record of this control plane shares.
"""

import hashlib
import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sidestep.control.objects import Endpoint, Pod, Service, Slice
from sidestep.wire.delta import Entry
from sidestep.wire.pb import workload_pb2

DEFAULT_TRUST_DOMAIN = "cluster.local"
_FAMILIES = {
    frozenset(["IPv4"]): workload_pb2.IPV4_ONLY,
    frozenset(["IPv6"]): workload_pb2.IPV6_ONLY,
    frozenset(["IPv4", "IPv6"]): workload_pb2.DUAL,
}
_KINDS = {"Deployment": workload_pb2.DEPLOYMENT, "Job": workload_pb2.JOB, "CronJob": workload_pb2.CRONJOB}
_BALANCING = workload_pb2.LoadBalancing
_CLOSE = (_BALANCING.NETWORK, _BALANCING.REGION, _BALANCING.ZONE)
_DISTRIBUTIONS = {
    "PreferClose": _CLOSE,
    "PreferSameZone": _CLOSE,
    "PreferSameNode": (*_CLOSE, _BALANCING.SUBZONE, _BALANCING.NODE),
}
_PROTOCOLS = {
    "http": workload_pb2.HTTP11,
    "http2": workload_pb2.HTTP2,
    "h2c": workload_pb2.HTTP2,
    "kubernetes.io/h2c": workload_pb2.HTTP2,
    "grpc": workload_pb2.GRPC,
    "tcp": workload_pb2.TCP,
    "tls": workload_pb2.TLS,
    "https": workload_pb2.TLS,
}


@dataclass(frozen=True, slots=True)
class Cluster:
    """What all records share. `domain` is the cluster's DNS suffix."""

    id: str = "Kubernetes"
    trust_domain: str = DEFAULT_TRUST_DOMAIN
    domain: str = "cluster.local"
    network: str = ""


def pod_uid(cluster: Cluster, namespace: str, name: str) -> str:
    """The name of a pod's record."""
    return f"{cluster.id}//Pod/{namespace}/{name}"


def service_name(cluster: Cluster, namespace: str, name: str) -> str:
    """The name of a Service's record: NAMESPACE/HOSTNAME."""
    return f"{namespace}/{hostname(cluster, namespace, name)}"


def hostname(cluster: Cluster, namespace: str, name: str) -> str:
    """A Service's name in DNS."""
    return f"{name}.{namespace}.svc.{cluster.domain}"


def workload(
    cluster: Cluster,
    pod: Pod,
    locality: Iterable[str],
    services: Mapping[str, Mapping[int, int]],
    policies: Iterable[str] = (),
) -> Entry | None:
    """A pod's record; None for one that has no address yet or runs no more. `locality` is its node's; `services`:
    target port by service port, by the name of the service's record; `policies`: names of those that select it.
    """
    if pod.terminal or not pod.addresses:
        return None
    uid = pod_uid(cluster, pod.namespace, pod.name)
    record = _workload(cluster, uid, pod.namespace, pod.name, pod.addresses, pod.network, services)
    record.tunnel_protocol = workload_pb2.HBONE if pod.hbone else workload_pb2.NONE
    record.native_tunnel = pod.native_tunnel
    record.service_account = pod.account
    record.node = pod.node
    record.canonical_name, record.canonical_revision = pod.canonical
    record.workload_name = pod.owner[0]
    record.workload_type = _KINDS.get(pod.owner[1], workload_pb2.POD)
    healthy = pod.ready and not pod.deleting
    record.status = workload_pb2.HEALTHY if healthy else workload_pb2.UNHEALTHY
    record.network_mode = workload_pb2.HOST_NETWORK if pod.host_network else workload_pb2.STANDARD
    _locate(record, pod.locality or locality)
    record.authorization_policies.extend(policies)
    aliases = () if pod.host_network else pod.addresses
    return _entry(uid, workload_pb2.Address(workload=record), record.network, aliases)


def outside_workload(
    cluster: Cluster,
    group: Slice,
    endpoint: Endpoint,
    locality: Iterable[str],
    services: Mapping[str, Mapping[int, int]],
) -> Entry:
    """The record of an endpoint that is no pod: what somebody wrote into an EndpointSlice. It never speaks HBONE."""
    uid = slice_uid(cluster, group, endpoint)
    record = _workload(cluster, uid, group.namespace, group.name, (endpoint.address,), "", services)
    record.node = endpoint.node
    record.workload_type = workload_pb2.POD
    record.workload_name = record.canonical_name = group.name
    record.canonical_revision = "latest"
    record.status = workload_pb2.HEALTHY if endpoint.ready else workload_pb2.UNHEALTHY
    place = tuple(locality)
    _locate(record, place if any(place) or not endpoint.zone else ("", endpoint.zone, ""))
    return _entry(uid, workload_pb2.Address(workload=record), record.network, (endpoint.address,))


def slice_uid(cluster: Cluster, group: Slice, endpoint: Endpoint) -> str:
    """The name of such an endpoint's record."""
    return f"{cluster.id}/discovery.k8s.io/EndpointSlice/{group.namespace}/{group.name}/{endpoint.address}"


def service(cluster: Cluster, each: Service, namespace_distribution: str) -> Entry:
    """A Service's record. Its own wish for traffic distribution goes before its namespace's."""
    host = hostname(cluster, each.namespace, each.name)
    record = workload_pb2.Service(name=each.name, namespace=each.namespace, hostname=host, canonical=True)
    for address in each.addresses:
        record.addresses.add(network=cluster.network, address=ipaddress.ip_address(address).packed)
    for port in each.ports:
        record.ports.add(service_port=port.number, target_port=port.target, app_protocol=_protocol(port.protocol))
    record.ip_families = _FAMILIES.get(frozenset(each.families), workload_pb2.AUTOMATIC)
    preference = _DISTRIBUTIONS.get(each.distribution or namespace_distribution)
    if each.local_only:
        record.load_balancing.mode = _BALANCING.STRICT
        record.load_balancing.routing_preference.append(_BALANCING.NODE)
    elif preference:
        record.load_balancing.mode = _BALANCING.FAILOVER
        record.load_balancing.routing_preference.extend(preference)
    if each.all_endpoints:
        record.load_balancing.health_policy = _BALANCING.ALLOW_ALL
    name = f"{each.namespace}/{host}"
    return _entry(name, workload_pb2.Address(service=record), cluster.network, each.addresses)


def ports(each: Service, group: Slice) -> dict[int, int]:
    """Target port by service port, for the endpoints of one slice."""
    numbers = dict(group.ports)
    return {port.number: numbers[port.name] for port in each.ports if port.name in numbers}


def _workload(
    cluster: Cluster,
    uid: str,
    namespace: str,
    name: str,
    addresses: Iterable[str],
    network: str,
    services: Mapping[str, Mapping[int, int]],
) -> workload_pb2.Workload:
    record = workload_pb2.Workload(uid=uid, name=name, namespace=namespace, cluster_id=cluster.id)
    record.network = network or cluster.network
    record.addresses.extend(ipaddress.ip_address(address).packed for address in addresses)
    if cluster.trust_domain != DEFAULT_TRUST_DOMAIN:
        record.trust_domain = cluster.trust_domain
    for key, numbers in services.items():
        group = record.services[key]
        for number, target in sorted(numbers.items()):
            group.ports.add(service_port=number, target_port=target)
    return record


def _locate(record: workload_pb2.Workload, locality: Iterable[str]) -> None:
    region, zone, subzone, *_ = (*locality, "", "", "")
    if region or zone or subzone:
        record.locality.region, record.locality.zone, record.locality.subzone = region, zone, subzone


def _protocol(word: str) -> workload_pb2.AppProtocol:
    return _PROTOCOLS.get(word) or _PROTOCOLS.get(word.split("-")[0], workload_pb2.UNKNOWN)


def _entry(name: str, record: workload_pb2.Address, network: str, addresses: Iterable[str]) -> Entry:
    body = record.SerializeToString(deterministic=True)
    version = hashlib.blake2b(body, digest_size=8).hexdigest()
    return Entry(name, version, body, tuple(f"{network}/{ipaddress.ip_address(each)}" for each in addresses))
