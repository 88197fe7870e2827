"""The engine's dumps in the words of ztunnel's /config_dump (reference/ztunnel.md 8.3), which people and `istioctl`
know. Pure.

Made when somebody asks, one page at a time; the agent keeps none of it.
"""

from collections.abc import Mapping
from typing import Any

WORKLOAD_KEYS = {
    "uid": "uid",
    "name": "name",
    "namespace": "namespace",
    "trust_domain": "trustDomain",
    "service_account": "serviceAccount",
    "network": "network",
    "workload_name": "workloadName",
    "workload_type": "workloadType",
    "canonical_name": "canonicalName",
    "canonical_revision": "canonicalRevision",
    "node": "node",
    "policies": "authorizationPolicies",
    "services": "services",
    "identity": "identity",
    "version": "version",
}
SHOWN_EMPTY = frozenset({"name", "namespace"})


def workload(record: Mapping[str, Any]) -> dict[str, Any]:
    """One workload. What is empty is left out, as there."""
    shown: dict[str, Any] = {"workloadIps": list(record.get("addresses") or ())}
    for ours, theirs in WORKLOAD_KEYS.items():
        value = record.get(ours)
        if value or ours in SHOWN_EMPTY:
            shown[theirs] = value
    shown["protocol"] = "HBONE" if record.get("protocol") == "HBONE" else "TCP"
    shown["networkMode"] = "HostNetwork" if record.get("host_network") else "Standard"
    shown["status"] = "Healthy" if record.get("healthy", True) else "Unhealthy"
    shown["clusterId"] = record.get("cluster_id", "")
    shown["capacity"] = record.get("capacity", 1)
    locality = {key: record[key] for key in ("region", "zone", "subzone") if record.get(key)}
    if locality:
        shown["locality"] = locality
    return shown


def service(record: Mapping[str, Any]) -> dict[str, Any]:
    """One service, its endpoints by workload."""
    shown: dict[str, Any] = {
        "name": record.get("name", ""),
        "namespace": record.get("namespace", ""),
        "hostname": record.get("hostname", ""),
        "vips": [f"{record.get('network', '')}/{address}" for address in record.get("addresses") or ()],
        "ports": record.get("ports") or {},
        "endpoints": {uid: {"workloadUid": uid} for uid in record.get("endpoints") or ()},
        "canonical": bool(record.get("canonical")),
        "visibility": "Namespace" if record.get("namespace_only") else "Public",
    }
    if record.get("subject_alt_names"):
        shown["subjectAltNames"] = record["subject_alt_names"]
    if record.get("version"):
        shown["version"] = record["version"]
    return shown


def shaped(what: str, records: list[Any]) -> list[Any]:
    """A whole dump: workloads by uid, services by hostname, policies by key; any other as it is."""
    if what == "workloads":
        return sorted((workload(each) for each in records), key=lambda each: str(each.get("uid", "")))
    if what == "services":
        return sorted((service(each) for each in records), key=lambda each: str(each["hostname"]))
    if what == "policies":
        return sorted(records, key=lambda each: str(each.get("key", "")))
    return records
