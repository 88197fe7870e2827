"""What the agent asks of the Kubernetes API, in its own words: pods and namespaces as projections, one annotation,
one root.

Needed rights: list and watch pods and namespaces, get both, patch pods/status; get, list and watch ConfigMap
istio-ca-root-cert in the system namespace; create and patch events.
"""

from collections.abc import Callable, Mapping
from typing import Any

from sidestep.kube.client import KubeClient, KubeError
from sidestep.kube.watch import Reflector
from sidestep.node.agent import Agent
from sidestep.node.pods import REDIRECTION, Pod, namespace_of, pod_of
from sidestep.node.resident import ApiError

ROOT_CONFIG_MAP = "istio-ca-root-cert"
ROOT_KEY = "root-cert.pem"


class ClusterApi:
    """Single requests. Each raises ApiError."""

    def __init__(self, client: KubeClient, system_namespace: str) -> None:
        self._client = client
        self._system_namespace = system_namespace

    async def get_pod(self, namespace: str, name: str) -> Pod | None:
        """The pod, None where there is none."""
        try:
            return pod_of(await self._client.get(f"/api/v1/namespaces/{namespace}/pods/{name}"))
        except KubeError as err:
            if err.status == 404:
                return None
            raise ApiError(str(err)) from None

    async def namespace_mode(self, name: str) -> str:
        """The namespace's mode label as it is now, "" without one."""
        try:
            return namespace_of(await self._client.get(f"/api/v1/namespaces/{name}"))[1]
        except KubeError as err:
            raise ApiError(str(err)) from None

    async def annotate(self, pod: Pod, enabled: bool) -> None:
        """Says in the pod's annotation whether it speaks HBONE. A pod that is gone (or replaced) needs none."""
        patch = {"metadata": {"uid": pod.uid, "annotations": {REDIRECTION: "enabled" if enabled else None}}}
        try:
            await self._client.patch(f"/api/v1/namespaces/{pod.namespace}/pods/{pod.name}/status", patch)
        except KubeError as err:
            if not (err.status == 404 or (err.status == 409 and not enabled)):
                raise ApiError(str(err)) from None

    async def root_certificate(self) -> bytes:
        """The root that signs the control plane's certificate, PEM."""
        path = f"/api/v1/namespaces/{self._system_namespace}/configmaps/{ROOT_CONFIG_MAP}"
        try:
            data = (await self._client.get(path)).get("data") or {}
        except KubeError as err:
            raise ApiError(f"ConfigMap {self._system_namespace}/{ROOT_CONFIG_MAP}: {err}") from None
        if not data.get(ROOT_KEY):
            raise ApiError(f"ConfigMap {self._system_namespace}/{ROOT_CONFIG_MAP} has no {ROOT_KEY}")
        return str(data[ROOT_KEY]).encode()

    async def report(self, event: Mapping[str, Any]) -> None:
        """Writes an Event; one of that name that is there gets the new count, time and message. In a namespace that is
        going there is nothing to write.
        """
        meta = event["metadata"]
        path = f"/api/v1/namespaces/{meta['namespace']}/events"
        try:
            try:
                await self._client.create(path, event)
            except KubeError as err:
                if err.status != 409:
                    raise
                patch = {key: event[key] for key in ("count", "lastTimestamp", "message")}
                await self._client.patch(f"{path}/{meta['name']}", patch)
        except KubeError as err:
            if err.status != 404 and "being terminated" not in err.message:
                raise ApiError(str(err)) from None


def root_reflector(client: KubeClient, system_namespace: str, changed: Callable[[str], None]) -> "Reflector[str]":
    """A watch of the roots that the cluster trusts: `changed` is told the new ones, never the first."""
    last = ""

    def root_of(obj: Mapping[str, Any]) -> str:
        mine = obj["metadata"].get("name") == ROOT_CONFIG_MAP
        return str((obj.get("data") or {}).get(ROOT_KEY) or "") if mine else ""

    def seen(_key: str, _old: str | None, new: str | None) -> None:
        nonlocal last
        if new and new != last:
            before, last = last, new
            if before:
                changed(new)

    path = f"/api/v1/namespaces/{system_namespace}/configmaps"
    return Reflector(client, path, root_of, seen, field_selector=f"metadata.name={ROOT_CONFIG_MAP}")


def reflectors(client: KubeClient, agent: Agent, node: str) -> "tuple[Reflector[Pod], Reflector[tuple[str, str]]]":
    """Watches of this node's pods and of namespaces that tell the agent what changed."""

    def pod_changed(_key: str, old: Pod | None, new: Pod | None) -> None:
        if old is not None and (new is None or new.uid != old.uid):
            agent.pod_gone(old.uid)
        if new is not None:
            agent.pod_seen(new)

    def namespace_changed(_key: str, old: tuple[str, str] | None, new: tuple[str, str] | None) -> None:
        if new is not None:
            agent.namespace_seen(*new)
        elif old is not None:
            agent.namespace_gone(old[0])

    pods = Reflector(client, "/api/v1/pods", pod_of, pod_changed, field_selector=f"spec.nodeName={node}")
    return pods, Reflector(client, "/api/v1/namespaces", namespace_of, namespace_changed)
