"""EndpointSlices from Services and pods: one for each family and each way in which named ports resolve.

As in Kubernetes: a pod is an endpoint from the moment it has an address until it is gone or ended; `serving` is its
readiness, `ready` is serving and not going (or always, where the service publishes those that are not ready),
`terminating` that it is going.
"""

import json
from collections.abc import Mapping
from hashlib import sha256
from ipaddress import ip_address
from typing import Any

from sidestep.lab.api.registry import LETTERS, Registry, selected_pods
from sidestep.lab.api.resources import ENDPOINT_SLICE, SERVICE
from sidestep.lab.api.store import Object, Stored
from sidestep.lab.controllers.deployments import owner_of

SERVICE_NAME = "kubernetes.io/service-name"
MANAGED_BY = "endpointslice.kubernetes.io/managed-by"
CONTROLLER = "endpointslice-controller.k8s.io"
HEADLESS = "service.kubernetes.io/headless"


def sync(registry: Registry) -> None:
    """Makes the slices what they should be."""
    wanted: dict[tuple[str, str], Object] = {}
    for service in registry.store.list(SERVICE):
        if service.obj["spec"].get("selector") and "deletionTimestamp" not in service.obj["metadata"]:
            pods = selected_pods(registry.store, service.namespace, service.obj["spec"]["selector"])
            for body in slices(service, pods):
                wanted[(service.namespace, body["metadata"]["name"])] = body
    for stored in registry.store.list(ENDPOINT_SLICE):
        if stored.obj["metadata"].get("labels", {}).get(MANAGED_BY) != CONTROLLER:
            continue
        found = wanted.pop((stored.namespace, stored.name), None)
        if found is None:
            registry.delete(ENDPOINT_SLICE, stored.namespace, stored.name)
        elif any(stored.obj.get(key) != found[key] for key in ("endpoints", "ports", "addressType")) or (
            stored.obj["metadata"].get("labels") != found["metadata"]["labels"]
        ):
            registry.update(ENDPOINT_SLICE, stored.namespace, stored.name, found)
    for (namespace, _), body in wanted.items():
        if not registry.terminating(namespace):
            registry.create(ENDPOINT_SLICE, namespace, body)


def slices(service: Stored, pods: list[Stored]) -> list[Object]:
    """The slices of a service. A family without pods has one slice without endpoints."""
    found: list[Object] = []
    for family in service.obj["spec"]["ipFamilies"]:
        groups: dict[str, tuple[list[Object], list[Object]]] = {}
        for pod in pods:
            endpoint = _endpoint(service.obj, pod.obj, family)
            if endpoint is not None:
                ports = _ports(service.obj, pod.obj)
                groups.setdefault(json.dumps(ports), (ports, []))[1].append(endpoint)
        for ports, endpoints in groups.values() or [([], [])]:
            found.append(_slice(service, family, ports, endpoints))
    return found


def _endpoint(service: Mapping[str, Any], pod: Mapping[str, Any], family: str) -> Object | None:
    status, metadata = pod.get("status", {}), pod["metadata"]
    if status.get("phase") in ("Succeeded", "Failed"):
        return None
    version = 4 if family == "IPv4" else 6
    addresses = [entry["ip"] for entry in status.get("podIPs", []) if ip_address(entry["ip"]).version == version]
    if not addresses:
        return None
    going = "deletionTimestamp" in metadata
    serving = any(item.get("type") == "Ready" and item.get("status") == "True" for item in status.get("conditions", []))
    always = bool(service["spec"].get("publishNotReadyAddresses"))
    endpoint: Object = {
        "addresses": addresses[:1],
        "conditions": {"ready": always or (serving and not going), "serving": serving, "terminating": going},
        "targetRef": {
            "kind": "Pod",
            "namespace": metadata["namespace"],
            "name": metadata["name"],
            "uid": metadata["uid"],
        },
    }
    if "nodeName" in pod["spec"]:
        endpoint["nodeName"] = pod["spec"]["nodeName"]
    return endpoint


def _ports(service: Mapping[str, Any], pod: Mapping[str, Any]) -> list[Object]:
    """The service's ports as this pod has them; a name that the pod does not have is left out."""
    found: list[Object] = []
    for port in service["spec"].get("ports", []):
        target = port.get("targetPort", port["port"])
        if isinstance(target, str):
            target = next(
                (
                    item["containerPort"]
                    for container in pod["spec"]["containers"]
                    for item in container.get("ports", [])
                    if item.get("name") == target and item.get("protocol", "TCP") == port["protocol"]
                ),
                0,
            )
        if target:
            entry = {"name": port.get("name", ""), "port": target, "protocol": port["protocol"]}
            if "appProtocol" in port:
                entry["appProtocol"] = port["appProtocol"]
            found.append(entry)
    return found


def _slice(service: Stored, family: str, ports: list[Object], endpoints: list[Object]) -> Object:
    number = int.from_bytes(sha256(f"{family} {json.dumps(ports)}".encode()).digest()[:8], "big")
    letters = ""
    for _ in range(5):
        number, index = divmod(number, len(LETTERS))
        letters += LETTERS[index]
    labels = {SERVICE_NAME: service.name, MANAGED_BY: CONTROLLER}
    if service.obj["spec"].get("clusterIP") == "None":
        labels[HEADLESS] = ""
    return {
        "metadata": {
            "name": f"{service.name}-{letters}",
            "namespace": service.namespace,
            "labels": {**service.obj["metadata"].get("labels", {}), **labels},
            "ownerReferences": owner_of(service),
        },
        "addressType": family,
        "endpoints": endpoints,
        "ports": ports,
    }
