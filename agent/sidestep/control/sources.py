"""The objects that the mesh is made of, followed at the API.

Each kind has a reflector that keeps the projection of objects.py. A change is noted in the Mesh at once; `run` makes
records of what was noted: the first change goes out immediately, those that come within DEBOUNCE_S of it together. The
catalogs are complete before the first stream is served (a client that comes back is told what has gone, so half a
picture would take pods out of the mesh).
"""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from sidestep import log
from sidestep.control import objects
from sidestep.control.objects import Json, Namespace, Policy
from sidestep.control.records import Mesh
from sidestep.control.remembered import Remembered
from sidestep.control.roots import Publisher
from sidestep.control.rulings import Key
from sidestep.control.verdicts import Verdicts
from sidestep.control.xds import ADDRESS, AUTHORIZATION, Discovery
from sidestep.kube.client import KubeClient, KubeError
from sidestep.kube.watch import Reflector, key_of

DEBOUNCE_S = 0.05
RETRY_S = 0.5
SECURITY = "/apis/security.istio.io/v1"

K = TypeVar("K")


class Sources:
    """Reflectors for every kind, and what they feed."""

    def __init__(
        self,
        client: KubeClient,
        mesh: Mesh,
        discovery: Discovery,
        publisher: Publisher,
        verdicts: Verdicts,
        remembered: Remembered,
    ) -> None:
        self._client = client
        self._verdicts = verdicts
        self._remembered = remembered
        self._mesh = mesh
        self._discovery = discovery
        self._publisher = publisher
        self._changed = asyncio.Event()
        self.unreadable: dict[str, str] = {}
        self._reflectors: dict[str, Reflector[Any]] = {
            "namespaces": self._follow("/api/v1/namespaces", objects.namespace_of, self._namespace),
            "nodes": self._follow("/api/v1/nodes", objects.node_of, mesh.node),
            "services": self._follow("/api/v1/services", objects.service_of, mesh.service),
            "endpointslices": self._follow("/apis/discovery.k8s.io/v1/endpointslices", objects.slice_of, mesh.slice),
            "pods": self._follow("/api/v1/pods", objects.pod_of, mesh.pod),
            "authorizationpolicies": self._follow(
                f"{SECURITY}/authorizationpolicies",
                objects.authorization_policy_of,
                mesh.rulings.authorization_policy,
                optional=True,
            ),
            "peerauthentications": self._follow(
                f"{SECURITY}/peerauthentications",
                objects.peer_authentication_of,
                mesh.rulings.peer_authentication,
                optional=True,
            ),
        }

    def _follow(
        self,
        path: str,
        project: Callable[[Json], K | None],
        take: Callable[[str, K | None], None],
        *,
        optional: bool = False,
    ) -> Reflector[K | None]:
        def keep(obj: dict[str, Any]) -> K | None:
            name = f"{path.rpartition('/')[2]} {key_of(obj)}"
            try:
                kept = project(obj)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                self.unreadable[name] = repr(error)
                log.event("object_unreadable", object=name, error=repr(error))
                return None
            self.unreadable.pop(name, None)
            return kept

        def note(key: str, _old: K | None, new: K | None) -> None:
            take(key, new)
            self._changed.set()

        return Reflector(self._client, path, keep, note, optional=optional)

    def _namespace(self, key: str, new: Namespace | None) -> None:
        self._mesh.namespace(key, new)
        self._publisher.namespace(key, new is not None and not new.terminating)

    async def run(self) -> None:
        """Follows until cancelled."""
        self._mesh.rulings.recall(await self._recalled())
        async with asyncio.TaskGroup() as group:
            for name, each in self._reflectors.items():
                group.create_task(each.run(), name=f"follow {name}")
            for each in self._reflectors.values():
                await each.synced.wait()
            while True:
                self._changed.clear()
                # Policies first: a workload that names one which is not there yet keeps its connections waiting.
                self._discovery.update(AUTHORIZATION, self._mesh.rulings.take())
                self._discovery.update(ADDRESS, self._mesh.take())
                self._verdicts.take(self._mesh.rulings)
                self._remembered.take(self._mesh.rulings)
                if not self._discovery.synced.is_set():
                    self._discovery.synced.set()
                    log.event("synced", **{name: len(each.items) for name, each in self._reflectors.items()})
                await asyncio.sleep(DEBOUNCE_S)
                await self._changed.wait()

    async def _recalled(self) -> dict[Key, Policy]:
        while True:
            try:
                return await self._remembered.load()
            except KubeError as error:
                log.event("waiting_for_api", error=error)
                await asyncio.sleep(RETRY_S)

    def status(self) -> dict[str, Any]:
        """For /status."""
        return {
            "objects": {name: len(each.items) for name, each in self._reflectors.items()},
            "problems": self._mesh.problems | self.unreadable,
            "policies": self._mesh.rulings.report(),
            "api": "; ".join(sorted({str(each.failed) for each in self._reflectors.values() if each.failed})),
        }
