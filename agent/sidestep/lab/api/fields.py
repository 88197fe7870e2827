"""The shape of each kind's objects: which fields the lab honours, and what may stand in them."""

import re
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any

from sidestep.lab import podspec
from sidestep.lab.api.errors import Problem
from sidestep.lab.api.podshape import pod_spec
from sidestep.lab.api.resources import (
    AUTHORIZATION_POLICY,
    CONFIG_MAP,
    DEPLOYMENT,
    ENDPOINT_SLICE,
    EVENT,
    LEASE,
    NAMESPACE,
    NODE,
    PEER_AUTHENTICATION,
    POD,
    REPLICA_SET,
    SECRET,
    SERVICE,
    SERVICE_ACCOUNT,
    Kind,
)
from sidestep.lab.api.shapes import (
    ANNOTATIONS,
    DATA_KEY,
    DNS_LABEL,
    LABEL,
    LABELS,
    PORT,
    QUALIFIED,
    SUBDOMAIN,
    TEXT,
    Check,
    boolean,
    integer,
    kept,
    listing,
    mapping,
    name_of,
    only,
    port_or_name,
    say,
    structure,
    text,
)

# A pod that the node's own part runs has this annotation; only such a pod may use the host's network.
MIRROR = podspec.MIRROR_ANNOTATION
ANNOTATIONS_BYTES = 256 * 1024

# -- metadata ------------------------------------------------------------------------------------------------------

_OWNER = structure(
    {"apiVersion": TEXT, "kind": TEXT, "name": TEXT, "uid": TEXT, "controller": boolean, "blockOwnerDeletion": boolean},
    ("apiVersion", "kind", "name", "uid"),
)
_METADATA_FIELDS: dict[str, Check] = {
    "name": SUBDOMAIN,
    "generateName": kept,
    "namespace": LABEL,
    "labels": LABELS,
    "annotations": ANNOTATIONS,
    "finalizers": listing(text(QUALIFIED, 253, "is not a valid finalizer")),
    "ownerReferences": listing(_OWNER, "uid"),
    "uid": kept,
    "resourceVersion": kept,
    "generation": kept,
    "creationTimestamp": kept,
    "deletionTimestamp": kept,
    "deletionGracePeriodSeconds": kept,
}
_METADATA = structure(_METADATA_FIELDS)
_TEMPLATE_METADATA = structure(
    {key: _METADATA_FIELDS[key] for key in ("name", "labels", "annotations", "creationTimestamp")}
)

# -- everything else -----------------------------------------------------------------------------------------------

_SELECTOR = structure({"matchLabels": LABELS}, ("matchLabels",))
_TEMPLATE = structure({"metadata": _TEMPLATE_METADATA, "spec": pod_spec}, ("metadata", "spec"))
_SHARE = re.compile(r"[0-9]{1,3}%")


def _amount(value: Any, path: str, problems: list[Problem]) -> None:
    if isinstance(value, str):
        text(_SHARE, 4, "must be a number or a share like 25%")(value, path, problems)
    else:
        integer(0)(value, path, problems)


def _address(value: Any, path: str, problems: list[Problem]) -> None:
    try:
        ip_address(value)
    except ValueError:
        say(problems, path, f"{str(value)[:80]!r} is not an IP address")


def _cluster_ip(value: Any, path: str, problems: list[Problem]) -> None:
    if value != "None":
        _address(value, path, problems)


_SERVICE_PORT = structure(
    {
        "name": text(DNS_LABEL, 63, "must be a DNS label"),
        "port": PORT,
        "protocol": only("TCP", "UDP"),
        "targetPort": port_or_name,
        "appProtocol": TEXT,
    },
    ("port",),
)
_SERVICE_SPEC = structure(
    {
        "type": only("ClusterIP"),
        "clusterIP": _cluster_ip,
        "clusterIPs": listing(_cluster_ip, most=2),
        "ipFamilies": listing(only("IPv4", "IPv6"), most=2),
        "ipFamilyPolicy": only("SingleStack", "PreferDualStack", "RequireDualStack"),
        "selector": LABELS,
        "ports": listing(_SERVICE_PORT),
        "sessionAffinity": only("None"),
        "internalTrafficPolicy": only("Cluster"),
        "publishNotReadyAddresses": boolean,
        "trafficDistribution": only("PreferClose", "PreferSameZone", "PreferSameNode"),
    }
)


def _service(value: Any, path: str, problems: list[Problem]) -> None:
    before = len(problems)
    _SERVICE_SPEC(value, path, problems)
    if len(problems) > before:
        return
    ports = value.get("ports", [])
    if not ports and value.get("clusterIP") != "None":
        say(problems, f"{path}.ports", "must be given", "FieldValueRequired")
    names: set[str] = set()
    numbers: set[tuple[int, str]] = set()
    for index, port in enumerate(ports):
        name, number = port.get("name", ""), (port["port"], port.get("protocol", "TCP"))
        if len(ports) > 1 and not name:
            say(
                problems,
                f"{path}.ports[{index}].name",
                "must be given where there are several ports",
                "FieldValueRequired",
            )
        elif name in names:
            say(problems, f"{path}.ports[{index}].name", repr(name), "FieldValueDuplicate")
        if number in numbers:
            say(problems, f"{path}.ports[{index}].port", f"{number[0]}/{number[1]}", "FieldValueDuplicate")
        names.add(name)
        numbers.add(number)


_DEPLOYMENT_FIELDS: dict[str, Check] = {
    "replicas": integer(0, 500),
    "selector": _SELECTOR,
    "template": _TEMPLATE,
    "strategy": structure(
        {
            "type": only("RollingUpdate", "Recreate"),
            "rollingUpdate": structure({"maxSurge": _amount, "maxUnavailable": _amount}),
        }
    ),
    "minReadySeconds": only(0),
    "paused": only(False),
    "revisionHistoryLimit": integer(0),
    "progressDeadlineSeconds": integer(1),
}
_DEPLOYMENT_SPEC = structure(_DEPLOYMENT_FIELDS, ("selector", "template"))


def _deployment(value: Any, path: str, problems: list[Problem]) -> None:
    before = len(problems)
    _DEPLOYMENT_SPEC(value, path, problems)
    if len(problems) > before:
        return
    labels = value["template"]["metadata"].get("labels", {})
    for key, item in value["selector"]["matchLabels"].items():
        if labels.get(key) != item:
            say(
                problems,
                f"{path}.template.metadata.labels",
                f"`selector` does not match the template: {key}={item} is missing",
            )
    if value["template"]["spec"].get("restartPolicy", "Always") != "Always":
        say(
            problems,
            f"{path}.template.spec.restartPolicy",
            "a Deployment's pods are always restarted",
            "FieldValueNotSupported",
        )
    if value["template"]["spec"].get("hostNetwork"):
        say(
            problems,
            f"{path}.template.spec.hostNetwork",
            "the lab's pods have a network of their own",
            "FieldValueForbidden",
        )


_DATA = mapping(DATA_KEY, TEXT, "must be letters, digits, '-', '_' and '.'")
_ENDPOINT = structure(
    {
        "addresses": listing(_address, least=1),
        "conditions": structure({"ready": boolean, "serving": boolean, "terminating": boolean}),
        "hostname": TEXT,
        "nodeName": TEXT,
        "zone": TEXT,
        "targetRef": kept,
        "hints": kept,
        "deprecatedTopology": kept,
    },
    ("addresses",),
)


def _object(value: Any, path: str, problems: list[Problem]) -> None:
    if not isinstance(value, dict):
        say(problems, path, f"must be an object, is {name_of(value)}")


_status = _object
# What stands in a policy is the control plane's to judge: it must cope with whatever an API lets through.
_POLICY: dict[str, Check] = {"spec": _object, "status": _status}


_EVENT_FIELDS = (
    *("involvedObject", "reason", "message", "source", "firstTimestamp", "lastTimestamp", "count", "type"),
    *("eventTime", "series", "action", "related", "reportingComponent", "reportingInstance"),
)
_BODIES: dict[Kind, tuple[dict[str, Check], tuple[str, ...]]] = {
    NAMESPACE: ({"spec": structure({"finalizers": kept}), "status": _status}, ()),
    NODE: (
        {
            "spec": structure(
                {"podCIDR": TEXT, "podCIDRs": listing(TEXT), "providerID": TEXT, "unschedulable": boolean}
            ),
            "status": _status,
        },
        (),
    ),
    POD: ({"spec": pod_spec, "status": _status}, ("spec",)),
    SERVICE: ({"spec": _service, "status": _status}, ("spec",)),
    CONFIG_MAP: ({"data": _DATA, "binaryData": _DATA, "immutable": only(False)}, ()),
    SECRET: ({"data": _DATA, "stringData": _DATA, "type": TEXT, "immutable": only(False)}, ()),
    SERVICE_ACCOUNT: ({"secrets": kept, "imagePullSecrets": kept, "automountServiceAccountToken": boolean}, ()),
    EVENT: (dict.fromkeys(_EVENT_FIELDS, kept), ("involvedObject",)),
    DEPLOYMENT: ({"spec": _deployment, "status": _status}, ("spec",)),
    REPLICA_SET: ({"spec": _deployment, "status": _status}, ("spec",)),
    ENDPOINT_SLICE: (
        {
            "addressType": only("IPv4", "IPv6"),
            "endpoints": listing(_ENDPOINT),
            "ports": listing(
                structure({"name": TEXT, "port": PORT, "protocol": only("TCP", "UDP"), "appProtocol": TEXT})
            ),
        },
        ("addressType",),
    ),
    LEASE: ({"spec": kept}, ()),
    AUTHORIZATION_POLICY: (_POLICY, ()),
    PEER_AUTHENTICATION: (_POLICY, ()),
}
_LABEL_NAMES = frozenset({NAMESPACE, SERVICE})  # kinds whose names become one DNS label


def problems_of(kind: Kind, obj: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with an object; the object has its defaults and no nulls."""
    fields, required = _BODIES[kind]
    problems: list[Problem] = []
    structure({"apiVersion": TEXT, "kind": TEXT, "metadata": _METADATA, **fields}, ("metadata", *required))(
        obj, "", problems
    )
    metadata = obj.get("metadata")
    if problems or not isinstance(metadata, dict):
        return problems
    if kind in _LABEL_NAMES:
        LABEL(metadata["name"], "metadata.name", problems)
    if sum(len(key) + len(value) for key, value in metadata.get("annotations", {}).items()) > ANNOTATIONS_BYTES:
        say(problems, "metadata.annotations", f"must have at most {ANNOTATIONS_BYTES} bytes together")
    if kind is POD and obj["spec"].get("hostNetwork") and MIRROR not in metadata.get("annotations", {}):
        why = "the lab's pods have a network of their own"
        say(problems, "spec.hostNetwork", why, "FieldValueForbidden")
    return problems
