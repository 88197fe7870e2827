"""What the agent asks of the Kubernetes API, in its own words: pods and namespaces as projections, one annotation,
one root.

Needed rights: list and watch pods and namespaces, get both, patch pods/status, get ConfigMap istio-ca-root-cert.
"""

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
