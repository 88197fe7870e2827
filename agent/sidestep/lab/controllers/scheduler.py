"""Gives each pod without a node one: a ready node that its nodeSelector matches, spread.

Spread means: where the fewest pods of the same owner are, then where the fewest pods are, then by name.
"""

from collections.abc import Mapping
from typing import Any

from sidestep.lab.api.registry import Registry, timestamp
from sidestep.lab.api.resources import NODE, POD
from sidestep.lab.api.selectors import match_labels
from sidestep.lab.api.store import Object, Stored


def sync(registry: Registry) -> None:
    """Places what can be placed; the others say why not in their PodScheduled condition."""
    pods = registry.store.list(POD)
    waiting = [
        pod for pod in pods if "nodeName" not in pod.obj["spec"] and "deletionTimestamp" not in pod.obj["metadata"]
    ]
    if not waiting:
        return
    nodes = [node for node in registry.store.list(NODE) if _usable(node.obj)]
    total: dict[str, int] = {}
    siblings: dict[tuple[str, str], int] = {}
    for pod in pods:
        if "nodeName" in pod.obj["spec"]:
            _count(total, siblings, pod, pod.obj["spec"]["nodeName"])
    for pod in sorted(waiting, key=lambda item: item.revision):
        selector = pod.obj["spec"].get("nodeSelector", {})
        fitting = [node.name for node in nodes if match_labels(selector, node.obj["metadata"].get("labels", {}))]
        if fitting:
            owner = _owner(pod)
            chosen = min(fitting, key=lambda name: (siblings.get((owner, name), 0), total.get(name, 0), name))
            _count(total, siblings, pod, chosen)
            _place(registry, pod, chosen)
        else:
            words = ",".join(f"{key}={value}" for key, value in selector.items())
            why = f"no ready node has {words}" if words else "no node is ready"
            _refuse(registry, pod, f"0/{len(nodes)} nodes are available: {why}")


def _usable(node: Mapping[str, Any]) -> bool:
    if node.get("spec", {}).get("unschedulable") or "deletionTimestamp" in node["metadata"]:
        return False
    conditions = node.get("status", {}).get("conditions", [])
    return any(item.get("type") == "Ready" and item.get("status") == "True" for item in conditions)


def _owner(pod: Stored) -> str:
    owners = pod.obj["metadata"].get("ownerReferences", [])
    return str(owners[0]["uid"]) if owners else pod.obj["metadata"]["uid"]


def _count(total: dict[str, int], siblings: dict[tuple[str, str], int], pod: Stored, node: str) -> None:
    total[node] = total.get(node, 0) + 1
    key = (_owner(pod), node)
    siblings[key] = siblings.get(key, 0) + 1


def _condition(obj: Object, now: str, **fields: str) -> None:
    conditions = obj.setdefault("status", {}).setdefault("conditions", [])
    others = [item for item in conditions if item.get("type") != "PodScheduled"]
    obj["status"]["conditions"] = [*others, {"type": "PodScheduled", "lastTransitionTime": now, **fields}]


def _place(registry: Registry, pod: Stored, node: str) -> None:
    def change(obj: Object) -> None:
        obj["spec"]["nodeName"] = node
        _condition(obj, timestamp(registry.clock()), status="True")

    registry.modify(pod, change)


def _refuse(registry: Registry, pod: Stored, why: str) -> None:
    known = pod.obj.get("status", {}).get("conditions", [])
    if any(item.get("type") == "PodScheduled" and item.get("message") == why for item in known):
        return

    def change(obj: Object) -> None:
        _condition(obj, timestamp(registry.clock()), status="False", reason="Unschedulable", message=why)

    registry.modify(pod, change)
