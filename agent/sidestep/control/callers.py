"""Who calls: the agent of a node, proven by its pod's token.

A caller is taken for what the API says of its token, nothing else: authenticated, with our audience found again in
the answer (an API server that does not know audiences answers none), of an account that is trusted with other pods'
identities, and bound to a pod that exists with that UID and account. The node is that pod's. What the request itself
says of its node is never used.
"""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sidestep.control.objects import Pod, pod_of
from sidestep.control.records import Mesh
from sidestep.kube.client import KubeClient, KubeError

AUDIENCE = "istio-ca"
TOKEN_MAX = 16384
AT_ONCE = 32  # TokenReviews; more wait
WAIT_S = 10.0
_USER = "system:serviceaccount:"
_EXTRA = "authentication.kubernetes.io/"


class Unauthenticated(Exception):
    """Nobody we know; says why, for our log only."""


class Denied(Exception):
    """Somebody we know, who may not; says why, for our log only."""


class Unavailable(Exception):
    """The API cannot be asked now."""


@dataclass(frozen=True, slots=True)
class Caller:
    """A node's agent."""

    account: str
    pod: str
    node: str


class Gate:
    """Tells callers. Pods come from the mesh that is kept anyway, and from the API where that is behind."""

    def __init__(self, client: KubeClient, mesh: Mesh, trusted: Iterable[str]) -> None:
        self._client = client
        self._mesh = mesh
        self._trusted = frozenset(trusted)
        self._slots = asyncio.Semaphore(AT_ONCE)

    async def caller(self, metadata: Mapping[str, str]) -> Caller:
        """Who sent a call with these headers. Raises Unauthenticated, Denied, Unavailable."""
        token = _bearer(metadata)
        try:
            async with asyncio.timeout(WAIT_S):
                async with self._slots:
                    return await self._caller(token)
        except TimeoutError:
            raise Unavailable("the API did not answer in time") from None
        except KubeError as error:
            raise Unavailable(str(error)) from None

    async def _caller(self, token: str) -> Caller:
        review = await self._client.create(
            "/apis/authentication.k8s.io/v1/tokenreviews",
            {
                "apiVersion": "authentication.k8s.io/v1",
                "kind": "TokenReview",
                "spec": {"token": token, "audiences": [AUDIENCE]},
            },
        )
        status = review.get("status") or {}
        if status.get("authenticated") is not True:
            raise Unauthenticated(f"the token is not good: {status.get('error') or 'not authenticated'}")
        if AUDIENCE not in (status.get("audiences") or ()):
            raise Unauthenticated(f"the token is not for {AUDIENCE}")
        user = status.get("user") or {}
        name = str(user.get("username") or "")
        namespace, _, account = name.removeprefix(_USER).partition(":")
        if not name.startswith(_USER) or not namespace or not account:
            raise Unauthenticated(f"{name!r} is no service account")
        if f"{namespace}/{account}" not in self._trusted:
            raise Denied(f"{namespace}/{account} is not trusted with nodes")
        extra = user.get("extra") or {}
        pod_name, pod_uid = _one(extra, "pod-name"), _one(extra, "pod-uid")
        if not pod_name or not pod_uid:
            raise Denied(f"the token of {namespace}/{account} is not bound to a pod")
        pod = await self._pod(namespace, pod_name, pod_uid)
        if pod is None or pod.uid != pod_uid:
            raise Denied(f"pod {namespace}/{pod_name} with UID {pod_uid} does not exist")
        if pod.account != account:
            raise Denied(f"pod {namespace}/{pod_name} is of account {pod.account}, the token of {account}")
        if pod.terminal or not pod.node:
            raise Denied(f"pod {namespace}/{pod_name} does not run on a node")
        return Caller(f"{namespace}/{account}", f"{namespace}/{pod_name}", pod.node)

    async def _pod(self, namespace: str, name: str, uid: str) -> Pod | None:
        pod = self._mesh.pods.get(f"{namespace}/{name}")
        if pod is not None and pod.uid == uid and pod.node:
            return pod
        try:
            return pod_of(await self._client.get(f"/api/v1/namespaces/{namespace}/pods/{name}"))
        except KubeError as error:
            if error.status == 404:
                return None
            raise

    async def runs(self, node: str, namespace: str, account: str) -> bool:
        """Whether a pod of that account is on that node: placed there, not ended, with a network of its own. Raises
        Unavailable.
        """

        def counts(pod: Pod) -> bool:
            return pod.node == node and pod.account == account and not pod.terminal and not pod.host_network

        if any(pod.namespace == namespace and counts(pod) for pod in self._mesh.on_node(node)):
            return True
        try:
            async with asyncio.timeout(WAIT_S):
                async with self._slots:
                    # A pod's first certificate is asked for while the news of the pod is still on its way here.
                    answer = await self._client.list(
                        f"/api/v1/namespaces/{namespace}/pods", field_selector=f"spec.nodeName={node}"
                    )
        except TimeoutError:
            raise Unavailable("the API did not answer in time") from None
        except KubeError as error:
            raise Unavailable(str(error)) from None
        return any(counts(pod_of(obj)) for obj in answer.get("items") or ())


def _bearer(metadata: Mapping[str, str]) -> str:
    scheme, _, token = metadata.get("authorization", "").partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token:
        raise Unauthenticated("no token")
    if len(token) > TOKEN_MAX:
        raise Unauthenticated(f"a token of {len(token)} bytes")
    return token


def _one(extra: Mapping[str, object], key: str) -> str:
    values = extra.get(_EXTRA + key)
    return str(values[0]) if isinstance(values, list) and len(values) == 1 else ""
