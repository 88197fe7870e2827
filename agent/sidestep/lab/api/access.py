"""Who asks, and what they may: bearer tokens, token requests, reviews.

Two kinds of callers. The *administrator* has the token of the kubeconfig and may do everything. *Service accounts*
have tokens of this API. The lab does not speak RBAC: accounts that the lab's start names as node agents may read what
an agent needs, patch pods and write Events; every other account may ask who it is, and nothing else.
"""

import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from sidestep.lab.api import errors
from sidestep.lab.api.errors import ApiError, Problem
from sidestep.lab.api.registry import timestamp
from sidestep.lab.api.resources import CONFIG_MAP, EVENT, NAMESPACE, NODE, POD, SERVICE, SERVICE_ACCOUNT, Kind
from sidestep.lab.api.store import Store, Stored
from sidestep.lab.api.tokens import API_AUDIENCE, Claims, Reference, TokenError, TokenKey

ADMIN_GROUP = "system:masters"
MIN_SECONDS, MAX_SECONDS = 600, 1 << 32
_READ = ("get", "list", "watch")
_REPORT = ("create", "patch", "update")
_AGENT_READS = (NAMESPACE, NODE, POD, SERVICE, CONFIG_MAP)


@dataclass(frozen=True, slots=True)
class User:
    """Who asks, as Kubernetes tells it."""

    name: str
    uid: str = ""
    groups: tuple[str, ...] = ()
    extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def info(self) -> dict[str, Any]:
        """`UserInfo`."""
        body: dict[str, Any] = {"username": self.name, "groups": list(self.groups)}
        if self.uid:
            body["uid"] = self.uid
        if self.extra:
            body["extra"] = {key: list(values) for key, values in self.extra.items()}
        return body


class Access:
    """Authentication and authorization over the store's accounts and pods."""

    def __init__(
        self, store: Store, key: TokenKey, admin_token: str, agents: tuple[str, ...], clock: Callable[[], float]
    ) -> None:
        """`agents`: NAMESPACE/NAME of the accounts that node agents have."""
        self._store = store
        self._key = key
        self._admin = sha256(admin_token.encode()).digest()
        self._agents = frozenset(f"system:serviceaccount:{agent.replace('/', ':')}" for agent in agents)
        self._clock = clock

    def authenticate(self, header: str) -> User:
        """The user behind an Authorization header; 401 without a good one."""
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise ApiError(401, "Unauthorized: a bearer token is needed")
        if hmac.compare_digest(sha256(token.encode(errors="replace")).digest(), self._admin):
            return User("kubernetes-admin", groups=(ADMIN_GROUP, "system:authenticated"))
        try:
            return self._user(token, (API_AUDIENCE,))[0]
        except TokenError as error:
            raise ApiError(401, f"Unauthorized: {error}") from None

    def authorize(self, user: User, verb: str, kind: Kind, subresource: str, namespace: str) -> None:
        """403 where the user may not."""
        if ADMIN_GROUP in user.groups or self._may(user, verb, kind, subresource):
            return
        what = f"{kind.plural}/{subresource}" if subresource else kind.plural
        where = f' in the namespace "{namespace}"' if namespace else ""
        why = f'User "{user.name}" cannot {verb} resource "{what}" in API group "{kind.group}"{where}'
        raise ApiError(403, f"{kind.resource} is forbidden: {why}")

    def administrator(self, user: User, what: str) -> None:
        """403 for everybody but the administrator."""
        if ADMIN_GROUP not in user.groups:
            raise ApiError(403, f'{what} is forbidden: User "{user.name}" may not')

    def _may(self, user: User, verb: str, kind: Kind, subresource: str) -> bool:
        if user.name not in self._agents:
            return False
        if kind is POD and verb == "patch":
            return subresource in ("", "status")
        if kind is EVENT:
            return verb in _REPORT
        return verb in _READ and kind in _AGENT_READS

    # -- tokens ----------------------------------------------------------------------------------------------------

    def _user(self, token: str, audiences: tuple[str, ...]) -> tuple[User, tuple[str, ...]]:
        """The user of an account's token, and those of `audiences` that it is for. Raises TokenError."""
        claims = self._key.check(token, int(self._clock()))
        common = tuple(audience for audience in audiences if audience in claims.audiences)
        if not common:
            raise TokenError("the token is for another audience")
        account = self._store.get(SERVICE_ACCOUNT, claims.namespace, claims.account.name)
        if account is None or account.obj["metadata"]["uid"] != claims.account.uid:
            raise TokenError("the service account does not exist any more")
        if claims.pod is not None:
            pod = self._store.get(POD, claims.namespace, claims.pod.name)
            if pod is None or pod.obj["metadata"]["uid"] != claims.pod.uid:
                raise TokenError("the pod of the token does not exist any more")
        return _user_of(claims), common

    def request(self, namespace: str, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """TokenRequest: a token of an account, bound to a pod when the request names one."""
        account = self._store.need(SERVICE_ACCOUNT, namespace, name)
        spec = _spec(body, "TokenRequest", "authentication.k8s.io/v1")
        problems: list[Problem] = []
        audiences = spec.get("audiences") or [API_AUDIENCE]
        if not isinstance(audiences, list) or not all(isinstance(item, str) and item for item in audiences):
            problems.append(Problem("spec.audiences", "FieldValueInvalid", "must be a list of strings"))
        seconds = spec.get("expirationSeconds", 3600)
        if not isinstance(seconds, int) or isinstance(seconds, bool) or not MIN_SECONDS <= seconds <= MAX_SECONDS:
            why = f"must be a number of seconds, at least {MIN_SECONDS}"
            problems.append(Problem("spec.expirationSeconds", "FieldValueInvalid", why))
        bound = spec.get("boundObjectRef")
        if bound is not None and (not isinstance(bound, dict) or bound.get("kind") != "Pod" or not bound.get("name")):
            problems.append(Problem("spec.boundObjectRef", "FieldValueInvalid", "the lab binds tokens to pods only"))
        if problems:
            raise errors.invalid("TokenRequest", "authentication.k8s.io", name, problems)
        pod, node = self._bound(namespace, name, bound) if bound is not None else (None, None)
        now = int(self._clock())
        token = self._key.sign(
            namespace=namespace,
            account=Reference(name, account.obj["metadata"]["uid"]),
            pod=pod,
            node=node,
            audiences=audiences,
            now=now,
            seconds=seconds,
        )
        return {
            "kind": "TokenRequest",
            "apiVersion": "authentication.k8s.io/v1",
            "metadata": {"name": name, "namespace": namespace, "creationTimestamp": timestamp(now)},
            "spec": {"audiences": audiences, "expirationSeconds": seconds, "boundObjectRef": bound},
            "status": {"token": token, "expirationTimestamp": timestamp(now + seconds)},
        }

    def _bound(self, namespace: str, account: str, bound: Mapping[str, Any]) -> tuple[Reference, Reference | None]:
        """The pod that a token is to be bound to, and its node."""
        stored = self._store.need(POD, namespace, str(bound["name"]))
        uid = stored.obj["metadata"]["uid"]
        if bound.get("uid", uid) != uid:
            why = f"the UID in the bound object reference ({bound['uid']}) does not match the UID in record ({uid})"
            raise errors.conflict("pods", "", stored.name, why)
        used = stored.obj["spec"]["serviceAccountName"]
        if used != account:
            raise ApiError(
                400, f'pod "{stored.name}" uses service account {used!r}: cannot bind a token of {account!r} to it'
            )
        node = None
        if "nodeName" in stored.obj["spec"]:
            home: Stored | None = self._store.get(NODE, "", stored.obj["spec"]["nodeName"])
            if home is not None:
                node = Reference(home.name, home.obj["metadata"]["uid"])
        return Reference(stored.name, uid), node

    def review(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """TokenReview: whose token is this, and for which of the asked audiences."""
        spec = _spec(body, "TokenReview", "authentication.k8s.io/v1")
        token, audiences = spec.get("token"), spec.get("audiences") or [API_AUDIENCE]
        if not isinstance(token, str) or not token:
            raise ApiError(400, "TokenReview: spec.token must be given")
        if not isinstance(audiences, list) or not all(isinstance(item, str) for item in audiences):
            raise ApiError(400, "TokenReview: spec.audiences must be a list of strings")
        status: dict[str, Any]
        try:
            user, common = self._user(token, tuple(audiences))
            status = {"authenticated": True, "user": user.info(), "audiences": list(common)}
        except TokenError as error:
            status = {"authenticated": False, "user": {}, "error": str(error)}
        return {
            "kind": "TokenReview",
            "apiVersion": "authentication.k8s.io/v1",
            "metadata": {},
            "spec": {"token": token, "audiences": audiences},
            "status": status,
        }

    def may(self, user: User, body: Mapping[str, Any]) -> dict[str, Any]:
        """SelfSubjectAccessReview, as `kubectl auth can-i` asks it."""
        spec = _spec(body, "SelfSubjectAccessReview", "authorization.k8s.io/v1")
        asked = spec.get("resourceAttributes") or {}
        allowed = ADMIN_GROUP in user.groups
        if not allowed and user.name in self._agents:
            allowed = any(
                kind.plural == asked.get("resource")
                and kind.group == asked.get("group", "")
                and self._may(user, str(asked.get("verb")), kind, str(asked.get("subresource", "")))
                for kind in (*_AGENT_READS, EVENT)
            )
        return {
            "kind": "SelfSubjectAccessReview",
            "apiVersion": "authorization.k8s.io/v1",
            "metadata": {},
            "spec": spec,
            "status": {"allowed": allowed},
        }


def _spec(body: Mapping[str, Any], kind: str, api_version: str) -> dict[str, Any]:
    if not isinstance(body, Mapping) or body.get("kind", kind) != kind:
        raise ApiError(400, f"the body must be a {kind}")
    if body.get("apiVersion", api_version) != api_version:
        raise ApiError(400, f"the body must be a {kind} of {api_version}, is {body['apiVersion']}")
    spec = body.get("spec")
    if not isinstance(spec, dict):
        raise ApiError(400, f"{kind}: spec must be given")
    return {key: value for key, value in spec.items() if value is not None}


def _user_of(claims: Claims) -> User:
    extra: dict[str, tuple[str, ...]] = {"authentication.kubernetes.io/credential-id": (f"JTI={claims.id}",)}
    if claims.pod is not None:
        extra["authentication.kubernetes.io/pod-name"] = (claims.pod.name,)
        extra["authentication.kubernetes.io/pod-uid"] = (claims.pod.uid,)
    if claims.node is not None:
        extra["authentication.kubernetes.io/node-name"] = (claims.node.name,)
        extra["authentication.kubernetes.io/node-uid"] = (claims.node.uid,)
    groups = ("system:serviceaccounts", f"system:serviceaccounts:{claims.namespace}", "system:authenticated")
    return User(claims.user, claims.account.uid, groups, extra)
