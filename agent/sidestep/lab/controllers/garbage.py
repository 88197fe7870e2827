"""What goes because something else went: objects without owners, the content of namespaces, pods of lost nodes."""

from sidestep.lab.api.registry import Deletion, Registry
from sidestep.lab.api.resources import KINDS, NAMESPACE, NODE, POD
from sidestep.lab.api.store import Event

_OWNERS = {(kind.api_version, kind.kind) for kind in KINDS}


def wants(event: Event) -> bool:
    """After deletions, beginnings of deletions, and for new objects with owners."""
    if event.new is None:
        return True
    metadata = event.new.obj["metadata"]
    return "deletionTimestamp" in metadata or (event.old is None and "ownerReferences" in metadata)


def sync(registry: Registry) -> None:
    """Deletes what has lost all its owners, empties namespaces, removes pods that no node can confirm."""
    store = registry.store
    everything = [stored for kind in KINDS for stored in store.list(kind)]
    uids = {stored.obj["metadata"]["uid"] for stored in everything}
    for stored in everything:
        metadata = stored.obj["metadata"]
        owners = metadata.get("ownerReferences", [])
        known = all((owner["apiVersion"], owner["kind"]) in _OWNERS for owner in owners)
        lost = owners and known and not any(owner["uid"] in uids for owner in owners)
        if lost and "deletionTimestamp" not in metadata and store.get(stored.kind, stored.namespace, stored.name):
            registry.delete(stored.kind, stored.namespace, stored.name)
    nodes = {node.name for node in store.list(NODE)}
    for pod in store.list(POD):
        if "deletionTimestamp" in pod.obj["metadata"] and pod.obj["spec"].get("nodeName") not in nodes:
            registry.delete(POD, pod.namespace, pod.name, Deletion(grace_s=0))
    for namespace in store.list(NAMESPACE):
        registry.sweep(namespace.name)
