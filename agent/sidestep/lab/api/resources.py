"""The kinds that the lab's API serves, one row each."""

from dataclasses import dataclass

VERBS = ("create", "delete", "deletecollection", "get", "list", "patch", "update", "watch")
MADE_HERE = ("delete", "get", "list", "watch")  # only the lab's controllers create them


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind. `subresources` are those that the server answers; `selectable` the field paths that a field selector
    may name besides metadata.name and metadata.namespace."""

    group: str
    version: str
    kind: str
    plural: str
    singular: str
    namespaced: bool = True
    short: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    subresources: tuple[str, ...] = ()
    verbs: tuple[str, ...] = VERBS
    selectable: tuple[str, ...] = ()
    has_status: bool = False
    has_generation: bool = False
    also: tuple[str, ...] = ()  # older versions of the same shape, under which the same objects are served

    @property
    def api_version(self) -> str:
        """`v1` or `apps/v1`."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def api_versions(self) -> tuple[str, ...]:
        """All under which it is served, its own first."""
        return (self.api_version, *(f"{self.group}/{version}" for version in self.also))

    @property
    def resource(self) -> str:
        """`pods` or `deployments.apps`."""
        return f"{self.plural}.{self.group}" if self.group else self.plural


NAMESPACE = Kind(
    "", "v1", "Namespace", "namespaces", "namespace", False, ("ns",), (), ("status",), VERBS, ("status.phase",), True
)
NODE = Kind("", "v1", "Node", "nodes", "node", False, ("no",), (), ("status",), VERBS, ("spec.unschedulable",), True)
POD = Kind(
    "",
    "v1",
    "Pod",
    "pods",
    "pod",
    True,
    ("po",),
    ("all",),
    ("status",),
    VERBS,
    (
        "spec.nodeName",
        "spec.restartPolicy",
        "spec.schedulerName",
        "spec.serviceAccountName",
        "spec.hostNetwork",
        "status.phase",
        "status.podIP",
    ),
    True,
)
SERVICE = Kind(
    "",
    "v1",
    "Service",
    "services",
    "service",
    True,
    ("svc",),
    ("all",),
    ("status",),
    VERBS,
    ("spec.clusterIP", "spec.type"),
    True,
)
CONFIG_MAP = Kind("", "v1", "ConfigMap", "configmaps", "configmap", True, ("cm",))
SECRET = Kind("", "v1", "Secret", "secrets", "secret", selectable=("type",))
SERVICE_ACCOUNT = Kind(
    "", "v1", "ServiceAccount", "serviceaccounts", "serviceaccount", True, ("sa",), subresources=("token",)
)
EVENT = Kind(
    "",
    "v1",
    "Event",
    "events",
    "event",
    True,
    ("ev",),
    selectable=(
        "involvedObject.kind",
        "involvedObject.namespace",
        "involvedObject.name",
        "involvedObject.uid",
        "involvedObject.apiVersion",
        "involvedObject.fieldPath",
        "involvedObject.resourceVersion",
        "reason",
        "reportingComponent",
        "source",
        "type",
    ),
)
DEPLOYMENT = Kind(
    "apps",
    "v1",
    "Deployment",
    "deployments",
    "deployment",
    True,
    ("deploy",),
    ("all",),
    ("status", "scale"),
    has_status=True,
    has_generation=True,
)
REPLICA_SET = Kind(
    "apps",
    "v1",
    "ReplicaSet",
    "replicasets",
    "replicaset",
    True,
    ("rs",),
    ("all",),
    verbs=MADE_HERE,
    has_status=True,
    has_generation=True,
)
ENDPOINT_SLICE = Kind("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices", "endpointslice", has_generation=True)
LEASE = Kind("coordination.k8s.io", "v1", "Lease", "leases", "lease")
SECURITY = "security.istio.io"
AUTHORIZATION_POLICY = Kind(
    SECURITY,
    "v1",
    "AuthorizationPolicy",
    "authorizationpolicies",
    "authorizationpolicy",
    True,
    ("ap",),
    ("istio-io", "security-istio-io"),
    ("status",),
    has_status=True,
    has_generation=True,
    also=("v1beta1",),
)
PEER_AUTHENTICATION = Kind(
    SECURITY,
    "v1",
    "PeerAuthentication",
    "peerauthentications",
    "peerauthentication",
    True,
    ("pa",),
    ("istio-io", "security-istio-io"),
    ("status",),
    has_status=True,
    has_generation=True,
    also=("v1beta1",),
)

KINDS: tuple[Kind, ...] = (
    NAMESPACE,
    NODE,
    POD,
    SERVICE,
    CONFIG_MAP,
    SECRET,
    SERVICE_ACCOUNT,
    EVENT,
    DEPLOYMENT,
    REPLICA_SET,
    ENDPOINT_SLICE,
    LEASE,
    AUTHORIZATION_POLICY,
    PEER_AUTHENTICATION,
)
# Answered, but nothing of them is kept: (group, version, kind, plural).
REVIEWS: tuple[tuple[str, str, str, str], ...] = (
    ("authentication.k8s.io", "v1", "TokenReview", "tokenreviews"),
    ("authentication.k8s.io", "v1", "SelfSubjectReview", "selfsubjectreviews"),
    ("authorization.k8s.io", "v1", "SelfSubjectAccessReview", "selfsubjectaccessreviews"),
)

BY_PATH: dict[tuple[str, str, str], Kind] = {
    (kind.group, version, kind.plural): kind for kind in KINDS for version in (kind.version, *kind.also)
}
GROUPS: tuple[tuple[str, str], ...] = tuple(
    dict.fromkeys(
        [(kind.group, version) for kind in KINDS for version in (kind.version, *kind.also)]
        + [(group, version) for group, version, _, _ in REVIEWS]
    )
)
