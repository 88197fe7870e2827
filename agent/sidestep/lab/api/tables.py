"""Tables for kubectl: the columns of each kind, and `meta.k8s.io/v1 Table` objects from rows. Pure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sidestep.lab.api.resources import (
    AUTHORIZATION_POLICY,
    CONFIG_MAP,
    DEPLOYMENT,
    ENDPOINT_SLICE,
    EVENT,
    LEASE,
    NAMESPACE,
    NODE,
    PEER_AUTHENTICATION,
    POD,
    REPLICA_SET,
    SECRET,
    SERVICE,
    SERVICE_ACCOUNT,
    Kind,
)

Object = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Column:
    """A column; `wide` ones are shown with -o wide only."""

    name: str
    cell: Callable[[Object, float], Any]
    wide: bool = False
    type: str = "string"


def _at(obj: Object, *path: str, default: Any = "") -> Any:
    here: Any = obj
    for step in path:
        if not isinstance(here, Mapping) or step not in here:
            return default
        here = here[step]
    return here


def _path(*path: str, default: Any = "<none>") -> Callable[[Object, float], Any]:
    return lambda obj, now: _at(obj, *path, default=default)


def _since(text: str, now: float) -> str:
    """`12s`, `5m`, `3h`, `2d`: the time since an RFC 3339 timestamp."""
    try:
        then = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return "<unknown>"
    seconds = max(0, int(now - then.replace(tzinfo=then.tzinfo or UTC).timestamp()))
    if seconds < 120:
        return f"{seconds}s"
    if seconds < 600:
        return f"{seconds // 60}m{seconds % 60}s" if seconds % 60 else f"{seconds // 60}m"
    if seconds < 7200:
        return f"{seconds // 60}m"
    if seconds < 48 * 3600:
        return f"{seconds // 3600}h"
    return f"{seconds // 86400}d"


def _age(obj: Object, now: float) -> str:
    return _since(str(_at(obj, "metadata", "creationTimestamp")), now)


def _containers(obj: Object, now: float) -> str:
    statuses = _at(obj, "status", "containerStatuses", default=[])
    return f"{sum(bool(status.get('ready')) for status in statuses)}/{len(_at(obj, 'spec', 'containers', default=[]))}"


def _pod_status(obj: Object, now: float) -> str:
    if _at(obj, "metadata", "deletionTimestamp"):
        return "Terminating"
    for status in _at(obj, "status", "containerStatuses", default=[]):
        state = status.get("state", {})
        for which in ("waiting", "terminated"):
            if which in state and state[which].get("reason"):
                return str(state[which]["reason"])
    return str(_at(obj, "status", "reason") or _at(obj, "status", "phase"))


def _restarts(obj: Object, now: float) -> str:
    return str(sum(status.get("restartCount", 0) for status in _at(obj, "status", "containerStatuses", default=[])))


def _pod_ips(obj: Object, now: float) -> str:
    return ",".join(entry["ip"] for entry in _at(obj, "status", "podIPs", default=[])) or "<none>"


def _node_status(obj: Object, now: float) -> str:
    ready = [item.get("status") for item in _at(obj, "status", "conditions", default=[]) if item.get("type") == "Ready"]
    words = {"True": "Ready", "False": "NotReady"}
    state = words.get(ready[0], "Unknown") if ready else "Unknown"
    return f"{state},SchedulingDisabled" if _at(obj, "spec", "unschedulable", default=False) else state


def _node_ip(obj: Object, now: float) -> str:
    found = [
        item["address"] for item in _at(obj, "status", "addresses", default=[]) if item.get("type") == "InternalIP"
    ]
    return found[0] if found else "<none>"


def _service_ports(obj: Object, now: float) -> str:
    return ",".join(f"{port['port']}/{port['protocol']}" for port in _at(obj, "spec", "ports", default=[])) or "<none>"


def _selector(obj: Object, now: float) -> str:
    return ",".join(f"{key}={value}" for key, value in _at(obj, "spec", "selector", default={}).items()) or "<none>"


def _count(field: str) -> Callable[[Object, float], Any]:
    return lambda obj, now: str(len(obj.get(field) or ()))


def _deployment_ready(obj: Object, now: float) -> str:
    return f"{_at(obj, 'status', 'readyReplicas', default=0)}/{_at(obj, 'spec', 'replicas', default=0)}"


def _number(*path: str) -> Callable[[Object, float], Any]:
    return lambda obj, now: str(_at(obj, *path, default=0))


def _slice_ports(obj: Object, now: float) -> str:
    return ",".join(str(port.get("port")) for port in obj.get("ports") or ()) or "<unset>"


def _slice_addresses(obj: Object, now: float) -> str:
    found = [address for endpoint in obj.get("endpoints") or () for address in endpoint["addresses"]]
    return ",".join(found[:3]) + (f" + {len(found) - 3} more..." if len(found) > 3 else "") or "<unset>"


def _last_seen(obj: Object, now: float) -> str:
    return _since(
        str(obj.get("lastTimestamp") or obj.get("eventTime") or _at(obj, "metadata", "creationTimestamp")), now
    )


def _involved(obj: Object, now: float) -> str:
    return f"{str(_at(obj, 'involvedObject', 'kind')).lower()}/{_at(obj, 'involvedObject', 'name')}"


_NAME = Column("Name", _path("metadata", "name"))
_AGE = Column("Age", _age)

COLUMNS: dict[Kind, tuple[Column, ...]] = {
    NAMESPACE: (_NAME, Column("Status", _path("status", "phase")), _AGE),
    NODE: (
        _NAME,
        Column("Status", _node_status),
        Column("Roles", lambda obj, now: "<none>"),
        _AGE,
        Column("Version", _path("status", "nodeInfo", "kubeletVersion", default="")),
        Column("Internal-IP", _node_ip, True),
    ),
    POD: (
        _NAME,
        Column("Ready", _containers),
        Column("Status", _pod_status),
        Column("Restarts", _restarts),
        _AGE,
        Column("IP", _pod_ips, True),
        Column("Node", _path("spec", "nodeName"), True),
    ),
    SERVICE: (
        _NAME,
        Column("Type", _path("spec", "type")),
        Column("Cluster-IP", _path("spec", "clusterIP")),
        Column("External-IP", lambda obj, now: "<none>"),
        Column("Port(s)", _service_ports),
        _AGE,
        Column("Selector", _selector, True),
    ),
    CONFIG_MAP: (_NAME, Column("Data", _count("data")), _AGE),
    SECRET: (_NAME, Column("Type", _path("type")), Column("Data", _count("data")), _AGE),
    SERVICE_ACCOUNT: (_NAME, Column("Secrets", _count("secrets")), _AGE),
    EVENT: (
        Column("Last Seen", _last_seen),
        Column("Type", _path("type")),
        Column("Reason", _path("reason")),
        Column("Object", _involved),
        Column("Message", _path("message")),
    ),
    DEPLOYMENT: (
        _NAME,
        Column("Ready", _deployment_ready),
        Column("Up-to-date", _number("status", "updatedReplicas")),
        Column("Available", _number("status", "availableReplicas")),
        _AGE,
    ),
    REPLICA_SET: (
        _NAME,
        Column("Desired", _number("spec", "replicas")),
        Column("Current", _number("status", "replicas")),
        Column("Ready", _number("status", "readyReplicas")),
        _AGE,
    ),
    ENDPOINT_SLICE: (
        _NAME,
        Column("AddressType", _path("addressType")),
        Column("Ports", _slice_ports),
        Column("Endpoints", _slice_addresses),
        _AGE,
    ),
    LEASE: (_NAME, Column("Holder", _path("spec", "holderIdentity")), _AGE),
    AUTHORIZATION_POLICY: (_NAME, Column("Action", _path("spec", "action", default="")), _AGE),
    PEER_AUTHENTICATION: (_NAME, Column("Mode", _path("spec", "mtls", "mode", default="")), _AGE),
}


def table(
    kind: Kind, objects: Sequence[Object], now: float, include: str, revision: str, head: bool = True
) -> dict[str, Any]:
    """A Table; `include` is what each row carries: Metadata (default), Object or None. `head`: with the columns'
    definitions, which a watch sends once."""
    columns = COLUMNS[kind]
    definitions = [
        {
            "name": column.name,
            "type": column.type,
            "format": "name" if column is _NAME else "",
            "description": "",
            "priority": int(column.wide),
        }
        for column in columns
    ]
    rows = []
    for obj in objects:
        row: dict[str, Any] = {"cells": [column.cell(obj, now) for column in columns]}
        if include == "Object":
            row["object"] = obj
        elif include != "None":
            row["object"] = {
                "kind": "PartialObjectMetadata",
                "apiVersion": "meta.k8s.io/v1",
                "metadata": obj["metadata"],
            }
        rows.append(row)
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": {"resourceVersion": revision},
        "columnDefinitions": definitions if head else None,
        "rows": rows,
    }
