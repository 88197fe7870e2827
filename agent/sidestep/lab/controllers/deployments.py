"""Deployments to ReplicaSets to pods, with rolling updates.

A template has a hash; the ReplicaSet DEPLOYMENT-HASH owns the pods made from it, so a pod's names and owners look as
in Kubernetes. An update moves replicas from the old sets to the new one within maxSurge and maxUnavailable; Recreate
waits until the old pods are gone.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from sidestep.lab.api.errors import ApiError
from sidestep.lab.api.registry import LETTERS, Registry, timestamp
from sidestep.lab.api.resources import DEPLOYMENT, POD, REPLICA_SET
from sidestep.lab.api.store import Object, Stored

HASH = "pod-template-hash"
FAILURE = "ReplicaFailure"
REVISION = "deployment.kubernetes.io/revision"
_BURST = 50  # pods made or deleted in one look


@dataclass(frozen=True, slots=True)
class Size:
    """What one ReplicaSet has: `wanted` by its spec, `active` pods that are not going, of them ready ones."""

    wanted: int
    active: int
    ready: int


def template_hash(template: Mapping[str, Any]) -> str:
    """Ten letters that stand for a template."""
    number = int.from_bytes(sha256(json.dumps(template, sort_keys=True).encode()).digest()[:8], "big")
    letters = []
    for _ in range(10):
        number, index = divmod(number, len(LETTERS))
        letters.append(LETTERS[index])
    return "".join(letters)


def amount(value: int | str, of: int, up: bool) -> int:
    """maxSurge or maxUnavailable as a number of pods."""
    if isinstance(value, int):
        return value
    share = int(value.rstrip("%")) * of
    return -(-share // 100) if up else share // 100


def roll(replicas: int, surge: int, unavailable: int, new: Size, old: list[Size]) -> tuple[int, list[int]]:
    """The next size of the new set and of each old one (oldest first) of a rolling update."""
    if surge == 0 and unavailable == 0:
        unavailable = 1
    total = new.wanted + sum(size.wanted for size in old)
    room = max(0, replicas + surge - total)
    target = min(replicas, new.wanted + room)
    least = replicas - unavailable
    spare = total - least - (new.wanted - min(new.ready, new.wanted))
    sizes = [size.wanted for size in old]
    if spare <= 0:
        return target, sizes
    for index, size in enumerate(old):  # those that serve nobody go first
        gone = min(spare, max(0, sizes[index] - size.ready))
        sizes[index] -= gone
        spare -= gone
    available = min(new.ready, new.wanted) + sum(min(size.ready, left) for size, left in zip(old, sizes, strict=True))
    spare = min(spare, available - least)
    for index in range(len(sizes)):
        gone = min(max(0, spare), sizes[index])
        sizes[index] -= gone
        spare -= gone
    return target, sizes


def is_ready(pod: Mapping[str, Any]) -> bool:
    """Does the pod say that it is ready, and is it not going?"""
    if "deletionTimestamp" in pod["metadata"]:
        return False
    conditions = pod.get("status", {}).get("conditions", [])
    return any(item.get("type") == "Ready" and item.get("status") == "True" for item in conditions)


def is_active(pod: Mapping[str, Any]) -> bool:
    """Does the pod count as a replica?"""
    return "deletionTimestamp" not in pod["metadata"] and pod.get("status", {}).get("phase") not in (
        "Succeeded",
        "Failed",
    )


def sync(registry: Registry) -> None:
    """One look at every Deployment and ReplicaSet. A refusal of one does not keep the others waiting; the last is
    raised at the end."""
    refused: ApiError | None = None
    owned: dict[str, list[Stored]] = {}
    for kind in (REPLICA_SET, POD):
        for stored in registry.store.list(kind):
            for owner in stored.obj["metadata"].get("ownerReferences", ()):
                if owner.get("controller"):
                    owned.setdefault(owner["uid"], []).append(stored)
    for deployment in registry.store.list(DEPLOYMENT):
        if "deletionTimestamp" not in deployment.obj["metadata"]:
            try:
                _deployment(registry, deployment, owned)
            except ApiError as error:
                refused = error
    for replica_set in registry.store.list(REPLICA_SET):
        if "deletionTimestamp" not in replica_set.obj["metadata"]:
            try:
                _replica_set(registry, replica_set, owned.get(replica_set.obj["metadata"]["uid"], []))
            except ApiError as error:
                refused = error
    if refused is not None:
        raise refused


def owner_of(stored: Stored) -> list[Object]:
    """ownerReferences that name an object as the controller."""
    return [
        {
            "apiVersion": stored.kind.api_version,
            "kind": stored.kind.kind,
            "name": stored.name,
            "uid": stored.obj["metadata"]["uid"],
            "controller": True,
            "blockOwnerDeletion": True,
        }
    ]


def _revision(stored: Stored) -> int:
    text = stored.obj["metadata"].get("annotations", {}).get(REVISION, "0")
    return int(text) if text.isdecimal() else 0


def _size(replica_set: Stored, pods: list[Stored]) -> Size:
    active = [pod for pod in pods if is_active(pod.obj)]
    return Size(replica_set.obj["spec"]["replicas"], len(active), sum(is_ready(pod.obj) for pod in active))


def _deployment(registry: Registry, deployment: Stored, owned: Mapping[str, list[Stored]]) -> None:
    spec, metadata = deployment.obj["spec"], deployment.obj["metadata"]
    letters = template_hash(spec["template"])
    name = f"{deployment.name}-{letters}"
    sets = sorted((item for item in owned.get(metadata["uid"], []) if item.kind is REPLICA_SET), key=_revision)
    new = next((item for item in sets if item.name == name), None)
    old = [item for item in sets if item.name != name]
    latest = max((_revision(item) for item in sets), default=0)
    if new is None:
        new = _make_set(registry, deployment, name, letters, latest + 1)
    elif _revision(new) < latest:
        new = _annotate(registry, new, latest + 1)  # back to an earlier template
    if _revision(deployment) != _revision(new):
        deployment = _annotate(registry, deployment, _revision(new))
    pods = {item.name: owned.get(item.obj["metadata"]["uid"], []) for item in (*old, new)}
    sizes = {key: _size(item, pods[key]) for key, item in ((item.name, item) for item in (*old, new))}
    replicas: int = spec["replicas"]
    before = [sizes[item.name] for item in old]
    if spec["strategy"]["type"] == "Recreate":
        left = any(pods[item.name] for item in old)
        target, targets = (sizes[name].wanted if left else replicas), [0] * len(old)
    elif not any(size.wanted for size in before):
        target, targets = replicas, [0] * len(old)
    else:
        rolling = spec["strategy"]["rollingUpdate"]
        surge = amount(rolling["maxSurge"], replicas, True)
        target, targets = roll(replicas, surge, amount(rolling["maxUnavailable"], replicas, False), sizes[name], before)
    for item, wanted in zip([*old, new], [*targets, target], strict=True):
        _resize(registry, item, wanted)
    idle = [item for item in old if sizes[item.name] == Size(0, 0, 0) and not pods[item.name]]
    for item in idle[: max(0, len(idle) - spec["revisionHistoryLimit"])]:
        registry.delete(REPLICA_SET, item.namespace, item.name)
    _report(registry, deployment, sizes[name], before, new.obj.get("status", {}).get("conditions", []))


def _make_set(registry: Registry, deployment: Stored, name: str, letters: str, revision: int) -> Stored:
    spec = deployment.obj["spec"]
    template = copy.deepcopy(spec["template"])
    template["metadata"].setdefault("labels", {})[HASH] = letters
    body = {
        "metadata": {
            "name": name,
            "labels": template["metadata"]["labels"],
            "annotations": {REVISION: str(revision)},
            "ownerReferences": owner_of(deployment),
        },
        "spec": {
            "replicas": 0,
            "selector": {"matchLabels": {**spec["selector"]["matchLabels"], HASH: letters}},
            "template": template,
        },
    }
    return registry.create(REPLICA_SET, deployment.namespace, body)


def _annotate(registry: Registry, stored: Stored, revision: int) -> Stored:
    def change(obj: Object) -> None:
        obj["metadata"].setdefault("annotations", {})[REVISION] = str(revision)

    return registry.modify(stored, change)


def _resize(registry: Registry, replica_set: Stored, replicas: int) -> None:
    if replica_set.obj["spec"]["replicas"] != replicas:

        def change(obj: Object) -> None:
            obj["spec"]["replicas"] = replicas

        registry.modify(replica_set, change)


def _report(registry: Registry, deployment: Stored, new: Size, old: list[Size], failures: list[Object]) -> None:
    """The deployment's status; `failures` are the conditions of its new set."""
    spec, replicas = deployment.obj["spec"], deployment.obj["spec"]["replicas"]
    ready = new.ready + sum(size.ready for size in old)
    rolling = spec["strategy"].get("rollingUpdate", {})
    least = replicas - amount(rolling.get("maxUnavailable", 0), replicas, False)
    status: Object = {
        "observedGeneration": deployment.obj["metadata"]["generation"],
        "replicas": new.active + sum(size.active for size in old),
        "updatedReplicas": new.active,
        "readyReplicas": ready,
        "availableReplicas": ready,
        "unavailableReplicas": max(0, replicas - ready),
    }
    done = new.ready >= replicas and new.active == replicas == status["replicas"]
    wanted = [
        ("Available", ready >= least, "MinimumReplicasAvailable" if ready >= least else "MinimumReplicasUnavailable"),
        ("Progressing", True, "NewReplicaSetAvailable" if done else "ReplicaSetUpdated"),
    ]
    before = {item["type"]: item for item in deployment.obj.get("status", {}).get("conditions", [])}
    now = timestamp(registry.clock())
    conditions = []
    for name, value, reason in wanted:
        text = "True" if value else "False"
        was = before.get(name, {})
        changed = was.get("lastTransitionTime", now) if was.get("status") == text else now
        updated = was.get("lastUpdateTime", now) if was.get("reason") == reason else now
        conditions.append(
            {
                "type": name,
                "status": text,
                "reason": reason,
                "message": f"{ready} of {replicas} replicas are available",
                "lastTransitionTime": changed,
                "lastUpdateTime": updated,
            }
        )
    status["conditions"] = conditions + [item for item in failures if item["type"] == FAILURE]
    _set_status(registry, deployment, status)


def _set_status(registry: Registry, stored: Stored, status: Object) -> None:
    if stored.obj.get("status") != status:

        def change(obj: Object) -> None:
            obj["status"] = status

        registry.modify(registry.store.need(stored.kind, stored.namespace, stored.name), change)


def _replica_set(registry: Registry, replica_set: Stored, pods: list[Stored]) -> None:
    replica_set = registry.store.need(REPLICA_SET, replica_set.namespace, replica_set.name)  # as resized just now
    spec = replica_set.obj["spec"]
    active = [pod for pod in pods if is_active(pod.obj)]
    missing = spec["replicas"] - len(active)
    refused: ApiError | None = None
    try:
        for _ in range(min(missing, _BURST)):
            registry.create(POD, replica_set.namespace, _pod_of(replica_set))
    except ApiError as error:
        refused = error
    if missing < 0:
        order = sorted(active, key=lambda pod: ("nodeName" in pod.obj["spec"], is_ready(pod.obj), -pod.revision))
        for pod in order[: min(-missing, _BURST)]:
            registry.delete(POD, pod.namespace, pod.name)
    size = _size(replica_set, pods)
    status: Object = {
        "observedGeneration": replica_set.obj["metadata"]["generation"],
        "replicas": size.active,
        "fullyLabeledReplicas": size.active,
        "readyReplicas": size.ready,
        "availableReplicas": size.ready,
    }
    if refused is not None:
        status["conditions"] = [
            {"type": FAILURE, "status": "True", "reason": "FailedCreate", "message": refused.message}
        ]
    _set_status(registry, replica_set, status)
    if refused is not None:
        raise refused


def _pod_of(replica_set: Stored) -> Object:
    """A pod as the set's template has it."""
    template = replica_set.obj["spec"]["template"]
    metadata = {"generateName": f"{replica_set.name}-", "ownerReferences": owner_of(replica_set)}
    return {"metadata": {**template["metadata"], **metadata}, "spec": template["spec"]}
