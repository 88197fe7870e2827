"""The mesh as records, kept up to date object by object. Pure.

`Mesh` holds the objects (objects.py) and knows what depends on what: a changed object marks the records that it is
part of, `take` makes those again and answers them. A pod's record is made from the pod, its node, the slices that name
it and their Services, and the policies that select it (rulings.py); a Service's from the Service and its namespace;
that of an endpoint that is no pod from its slice, that slice's Service and its node.

A record that cannot be made (an object with an address that is none) is left out and named in `problems`; the others
are not touched by that.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TypeVar

from sidestep.control import translate
from sidestep.control.objects import Namespace, Node, Pod, Service, Slice
from sidestep.control.rulings import Rulings
from sidestep.control.translate import Cluster
from sidestep.wire.delta import Entry

V = TypeVar("V")


class Mesh:
    """All objects, and which records are to be made again. Keys are NAMESPACE/NAME, or NAME."""

    def __init__(self, cluster: Cluster, system_namespace: str) -> None:
        self._configured = cluster
        self.cluster = cluster
        self._system_namespace = system_namespace
        self.pods: dict[str, Pod] = {}
        self.services: dict[str, Service] = {}
        self.slices: dict[str, Slice] = {}
        self.nodes: dict[str, Node] = {}
        self.namespaces: dict[str, Namespace] = {}
        self.rulings = Rulings(system_namespace)
        self.problems: dict[str, str] = {}
        self._pods_of_node: dict[str, set[str]] = {}
        self._slices_of_pod: dict[str, set[str]] = {}
        self._slices_of_service: dict[str, set[str]] = {}
        self._slices_of_node: dict[str, set[str]] = {}
        self._services_of_namespace: dict[str, set[str]] = {}
        self._names_of_slice: dict[str, set[str]] = {}
        self._due_pods: set[str] = set()
        self._due_services: set[str] = set()
        self._due_slices: set[str] = set()

    def pod(self, key: str, new: Pod | None) -> None:
        """A pod is new, changed, or gone (None). So for the others below."""
        old = _swap(self.pods, key, new)
        _move(self._pods_of_node, key, {old.node} if old else set(), {new.node} if new else set())
        self.rulings.pod(key, old, new)
        self._due_pods.add(key)

    def service(self, key: str, new: Service | None) -> None:
        """A Service; its ports and name are part of its endpoints' records."""
        old = _swap(self.services, key, new)
        spaces = [{each.namespace} if each else set() for each in (old, new)]
        _move(self._services_of_namespace, key, *spaces)
        self._due_services.add(key)
        if old is None or new is None or old.ports != new.ports:
            for each in self._slices_of_service.get(key, ()):
                self._endpoints_due(each)

    def slice(self, key: str, new: Slice | None) -> None:
        """An EndpointSlice."""
        old = self.slices.get(key)
        if old is not None:
            self._endpoints_due(key)
        _swap(self.slices, key, new)
        _move(self._slices_of_service, key, _service_keys(old), _service_keys(new))
        _move(self._slices_of_pod, key, _pod_keys(old), _pod_keys(new))
        _move(self._slices_of_node, key, _node_names(old), _node_names(new))
        self._due_slices.add(key)
        if new is not None:
            self._endpoints_due(key)

    def node(self, key: str, new: Node | None) -> None:
        """A node; its locality is part of its workloads' records."""
        _swap(self.nodes, key, new)
        self._due_pods |= self._pods_of_node.get(key, set())
        self._due_slices |= self._slices_of_node.get(key, set())

    def namespace(self, key: str, new: Namespace | None) -> None:
        """A namespace. The system namespace names the cluster's network, which is part of every record."""
        old = _swap(self.namespaces, key, new)
        if (old.distribution if old else "") != (new.distribution if new else ""):
            self._due_services |= self._services_of_namespace.get(key, set())
        if key == self._system_namespace:
            network = (new.network if new else "") or self._configured.network
            if network != self.cluster.network:
                self.cluster = replace(self.cluster, network=network)
                self._due_pods |= self.pods.keys()
                self._due_services |= self.services.keys()
                self._due_slices |= self.slices.keys()

    def on_node(self, name: str) -> Iterator[Pod]:
        """The pods of a node."""
        for key in self._pods_of_node.get(name, ()):
            yield self.pods[key]

    def take(self) -> dict[str, Entry | None]:
        """The records of workloads and services that changed since the last call, by name; None: there is none any
        more.
        """
        made: dict[str, Entry | None] = {}
        self._due_pods |= self.rulings.take_pods()
        for key in self._due_services:
            self._make(made, translate.service_name(self.cluster, *key.split("/")), partial(self._service, key))
        for key in self._due_pods:
            self._make(made, translate.pod_uid(self.cluster, *key.split("/")), partial(self._pod, key))
        for key in self._due_slices:
            self._outside(made, key)
        for due in (self._due_services, self._due_pods, self._due_slices):
            due.clear()
        return made

    def _endpoints_due(self, key: str) -> None:
        group = self.slices[key]
        self._due_pods |= _pod_keys(group) & self.pods.keys()
        self._due_slices.add(key)

    def _make(self, made: dict[str, Entry | None], name: str, make: Callable[[], Entry | None]) -> None:
        try:
            made[name] = make()
            self.problems.pop(name, None)
        except ValueError as error:
            made[name] = None
            self.problems[name] = str(error)

    def _service(self, key: str) -> Entry | None:
        each = self.services.get(key)
        if each is None:
            return None
        space = self.namespaces.get(each.namespace)
        return translate.service(self.cluster, each, space.distribution if space else "")

    def _pod(self, key: str) -> Entry | None:
        pod = self.pods.get(key)
        if pod is None:
            return None
        services: dict[str, dict[int, int]] = {}
        for each in sorted(self._slices_of_pod.get(key, ())):
            for name, numbers in self._ports(self.slices[each]).items():
                services.setdefault(name, {}).update(numbers)
        return translate.workload(self.cluster, pod, self._locality(pod.node), services, self.rulings.names(pod))

    def _outside(self, made: dict[str, Entry | None], key: str) -> None:
        """Records of a slice's endpoints that are no pods; those that it no longer has are removed."""
        group = self.slices.get(key)
        names = set()
        for endpoint in group.endpoints if group is not None else ():
            if group is None or endpoint.pod:
                continue
            name = translate.slice_uid(self.cluster, group, endpoint)
            names.add(name)
            place, services = self._locality(endpoint.node), self._ports(group)
            make = partial(translate.outside_workload, self.cluster, group, endpoint, place, services)
            self._make(made, name, make)
        for name in self._names_of_slice.pop(key, set()) - names:
            made[name] = None
            self.problems.pop(name, None)
        if names:
            self._names_of_slice[key] = names

    def _ports(self, group: Slice) -> dict[str, dict[int, int]]:
        each = self.services.get(f"{group.namespace}/{group.service}")
        if each is None:
            return {}
        return {translate.service_name(self.cluster, each.namespace, each.name): translate.ports(each, group)}

    def _locality(self, node: str) -> tuple[str, str, str]:
        found = self.nodes.get(node)
        return found.locality if found is not None else ("", "", "")


def _swap(table: dict[str, V], key: str, new: V | None) -> V | None:
    old = table.pop(key, None)
    if new is not None:
        table[key] = new
    return old


def _move(index: dict[str, set[str]], key: str, old: set[str], new: set[str]) -> None:
    for name in old - new:
        index[name].discard(key)
        if not index[name]:
            del index[name]
    for name in new - old:
        index.setdefault(name, set()).add(key)


def _service_keys(group: Slice | None) -> set[str]:
    return {f"{group.namespace}/{group.service}"} if group is not None else set()


def _pod_keys(group: Slice | None) -> set[str]:
    return {f"{group.namespace}/{each.pod}" for each in group.endpoints if each.pod} if group is not None else set()


def _node_names(group: Slice | None) -> set[str]:
    return {each.node for each in group.endpoints if each.node} if group is not None else set()
