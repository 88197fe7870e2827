"""The shape of objects: which fields the lab honours, and what may stand in them.

A `Check` looks at one value and adds what is wrong with it to a list. A field that is not named here would be
ignored, so the object that carries it would behave otherwise than its author expects: it is refused by name. Fields
that change nothing in the lab (image, priorityClassName is *not* one of them) are named with `kept`.
"""

import re
from collections.abc import Callable, Mapping
from ipaddress import ip_address
from typing import Any

from sidestep.lab import podspec
from sidestep.lab.api.errors import Problem
from sidestep.lab.api.resources import (
    CONFIG_MAP,
    DEPLOYMENT,
    ENDPOINT_SLICE,
    EVENT,
    LEASE,
    NAMESPACE,
    NODE,
    POD,
    REPLICA_SET,
    SECRET,
    SERVICE,
    SERVICE_ACCOUNT,
    Kind,
)

Check = Callable[[Any, str, list[Problem]], None]

# A pod that the node's own part runs has this annotation; only such a pod may use the host's network.
MIRROR = podspec.MIRROR_ANNOTATION
ANNOTATIONS_BYTES = 256 * 1024

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_QUALIFIED = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_KEY = re.compile(r"(?!\.\.|\.$)[-._a-zA-Z0-9]{1,253}")
_ENV = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")
_FIELD_REF = re.compile(
    r"metadata\.(name|namespace|uid)|metadata\.(labels|annotations)\['[^']+'\]"
    r"|spec\.(nodeName|serviceAccountName)|status\.(podIP|podIPs|hostIP|hostIPs)"
)
_PORT_NAME = re.compile(r"(?=.{1,15}$)(?=.*[a-z])[a-z0-9]+(-[a-z0-9]+)*")


def _say(problems: list[Problem], path: str, message: str, reason: str = "FieldValueInvalid") -> None:
    problems.append(Problem(path, reason, message))


def kept(value: Any, path: str, problems: list[Problem]) -> None:
    """Kept as it is: it changes nothing in the lab."""


def text(pattern: re.Pattern[str] | None = None, longest: int = 1 << 20, what: str = "") -> Check:
    """A string."""

    def check(value: Any, path: str, problems: list[Problem]) -> None:
        if not isinstance(value, str):
            _say(problems, path, f"must be a string, is {_name(value)}")
        elif len(value) > longest or (pattern is not None and not pattern.fullmatch(value)):
            _say(problems, path, f"{value[:80]!r} {what or 'has the wrong form'}")

    return check


LABEL = text(_LABEL, 63, "must be a DNS label: lower-case letters, digits and '-', at most 63")
SUBDOMAIN = text(_SUBDOMAIN, 253, "must be a DNS name: lower-case letters, digits, '-' and '.', at most 253")
TEXT = text()


def integer(low: int, high: int = (1 << 31) - 1) -> Check:
    """A whole number."""

    def check(value: Any, path: str, problems: list[Problem]) -> None:
        if not isinstance(value, int) or isinstance(value, bool):
            _say(problems, path, f"must be a whole number, is {_name(value)}")
        elif not low <= value <= high:
            _say(problems, path, f"{value} must be from {low} to {high}")

    return check


PORT = integer(1, 65535)


def boolean(value: Any, path: str, problems: list[Problem]) -> None:
    """true or false."""
    if not isinstance(value, bool):
        _say(problems, path, f"must be true or false, is {_name(value)}")


def port_or_name(value: Any, path: str, problems: list[Problem]) -> None:
    """A port's number or its name."""
    if isinstance(value, str):
        text(_PORT_NAME, 15, "must be a port's number or name")(value, path, problems)
    else:
        PORT(value, path, problems)


def only(*allowed: Any) -> Check:
    """One of a few values; others are known to Kubernetes, but the lab does not honour them."""
    words = " or ".join(str(item).lower() if isinstance(item, bool) else str(item) for item in allowed)

    def check(value: Any, path: str, problems: list[Problem]) -> None:
        if not any(value == item and type(value) is type(item) for item in allowed):
            _say(problems, path, f"{str(value)[:80]!r}: the lab honours {words} only", "FieldValueNotSupported")

    return check


def listing(item: Check, unique: str = "", least: int = 0, most: int = 1000) -> Check:
    """A list; `unique` is the field that tells its items apart."""

    def check(value: Any, path: str, problems: list[Problem]) -> None:
        if not isinstance(value, list):
            _say(problems, path, f"must be a list, is {_name(value)}")
            return
        if len(value) < least:
            _say(problems, path, f"must have at least {least} item(s)", "FieldValueRequired")
        if len(value) > most:
            _say(problems, path, f"must have at most {most} items, has {len(value)}")
            return
        seen = set()
        for index, element in enumerate(value):
            item(element, f"{path}[{index}]", problems)
            if unique and isinstance(element, dict) and unique in element:
                name = str(element[unique])
                if name in seen:
                    _say(problems, f"{path}[{index}].{unique}", repr(name), "FieldValueDuplicate")
                seen.add(name)

    return check


def mapping(key: re.Pattern[str], value: Check, what: str = "is not a valid key") -> Check:
    """A map from strings."""

    def check(found: Any, path: str, problems: list[Problem]) -> None:
        if not isinstance(found, dict):
            _say(problems, path, f"must be a map, is {_name(found)}")
            return
        for name, item in found.items():
            if not key.fullmatch(name):
                _say(problems, path, f"{name[:80]!r} {what}")
            value(item, f"{path}.{name}", problems)

    return check


LABELS = mapping(_QUALIFIED, text(_VALUE, 63, "must be letters, digits, '-', '_' and '.', at most 63"))
ANNOTATIONS = mapping(_QUALIFIED, TEXT)


def structure(fields: Mapping[str, Check], required: tuple[str, ...] = (), one_of: tuple[str, ...] = ()) -> Check:
    """An object with these fields and no others; `one_of`: exactly one of these is there."""

    def check(value: Any, path: str, problems: list[Problem]) -> None:
        if not isinstance(value, dict):
            _say(problems, path, f"must be an object, is {_name(value)}")
            return
        dot = f"{path}." if path else ""
        for name, item in value.items():
            found = fields.get(name)
            if found is None:
                _say(problems, f"{dot}{name}", "the lab does not honour this field", "FieldValueForbidden")
            else:
                found(item, f"{dot}{name}", problems)
        for name in required:
            if name not in value or value[name] in ("", []):
                _say(problems, f"{dot}{name}", "must be given", "FieldValueRequired")
        if one_of and sum(name in value for name in one_of) != 1:
            _say(problems, path, f"must have exactly one of {', '.join(one_of)}", "FieldValueRequired")

    return check


def _name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


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
    "finalizers": listing(text(_QUALIFIED, 253, "is not a valid finalizer")),
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

# -- pods ----------------------------------------------------------------------------------------------------------


def _inside(value: Any, path: str, problems: list[Problem]) -> None:
    """A path in a volume, which must not lead out of it: the node's part writes there as root."""
    if not isinstance(value, str) or not value or value.startswith("/") or ".." in value.split("/") or "\0" in value:
        _say(problems, path, f"{str(value)[:80]!r} must be a relative path without '..'")


_ITEMS = listing(structure({"key": TEXT, "path": _inside, "mode": integer(0, 0o777)}, ("key", "path")), "path")
_DOWNWARD = re.compile(r"metadata\.(name|namespace|uid)|metadata\.(labels|annotations)\['[^']+'\]|spec\.[a-zA-Z]+")
_DOWNWARD_ITEM = structure(
    {
        "path": _inside,
        "fieldRef": structure(
            {"apiVersion": only("v1"), "fieldPath": text(_DOWNWARD, 400, "is not a field that the lab can hand in")},
            ("fieldPath",),
        ),
    },
    ("path", "fieldRef"),
)
_NAMED_FILES: dict[str, Check] = {"name": TEXT, "items": _ITEMS, "optional": boolean}
_TOKEN = structure({"audience": TEXT, "expirationSeconds": integer(600, 1 << 32), "path": _inside}, ("path",))
_SOURCES = ("serviceAccountToken", "configMap", "secret", "downwardAPI")
_PROJECTED = structure(
    {
        "defaultMode": integer(0, 0o777),
        "sources": listing(
            structure(
                {
                    "serviceAccountToken": _TOKEN,
                    "configMap": structure(_NAMED_FILES),
                    "secret": structure(_NAMED_FILES),
                    "downwardAPI": structure({"items": listing(_DOWNWARD_ITEM, "path")}),
                },
                one_of=_SOURCES,
            )
        ),
    }
)
_VOLUME = structure(
    {
        "name": LABEL,
        "emptyDir": structure({"medium": only("")}),
        "configMap": structure({**_NAMED_FILES, "defaultMode": integer(0, 0o777)}, ("name",)),
        "secret": structure(
            {"secretName": TEXT, "items": _ITEMS, "optional": boolean, "defaultMode": integer(0, 0o777)},
            ("secretName",),
        ),
        "projected": _PROJECTED,
    },
    ("name",),
    ("emptyDir", "configMap", "secret", "projected"),
)
_PROBE = structure(
    {
        "httpGet": structure(
            {
                "path": TEXT,
                "port": port_or_name,
                "scheme": only("HTTP", "HTTPS"),
                "host": TEXT,
                "httpHeaders": listing(structure({"name": TEXT, "value": TEXT}, ("name",))),
            },
            ("port",),
        ),
        "tcpSocket": structure({"port": port_or_name}, ("port",)),
        "exec": structure({"command": listing(TEXT, least=1)}, ("command",)),
        "initialDelaySeconds": integer(0),
        "periodSeconds": integer(1),
        "timeoutSeconds": integer(1),
        "successThreshold": integer(1),
        "failureThreshold": integer(1),
    },
    one_of=("httpGet", "tcpSocket", "exec"),
)


def _mount_path(value: Any, path: str, problems: list[Problem]) -> None:
    if not isinstance(value, str) or not value.startswith("/") or ".." in value.split("/") or "\0" in value:
        _say(problems, path, f"{str(value)[:80]!r} must be an absolute path without '..'")


_CAPABILITIES = frozenset({"ALL", *podspec.CAPABILITIES})


def _capability(value: Any, path: str, problems: list[Problem]) -> None:
    if not isinstance(value, str) or value.upper().removeprefix("CAP_") not in _CAPABILITIES:
        _say(problems, path, f"{str(value)[:80]!r} is no capability; one is like NET_RAW")


_CONTAINER = structure(
    {
        "name": LABEL,
        "image": TEXT,
        "imagePullPolicy": kept,
        "command": listing(TEXT),
        "args": listing(TEXT),
        "env": listing(
            structure(
                {
                    "name": text(_ENV, 253, "is not a valid name of a variable"),
                    "value": TEXT,
                    "valueFrom": structure(
                        {
                            "fieldRef": structure(
                                {
                                    "apiVersion": only("v1"),
                                    "fieldPath": text(_FIELD_REF, 400, "is not a field that the lab can hand in"),
                                },
                                ("fieldPath",),
                            )
                        },
                        ("fieldRef",),
                    ),
                },
                ("name",),
            )
        ),
        "workingDir": TEXT,
        "ports": listing(
            structure(
                {
                    "name": text(_PORT_NAME, 15, "must be a port's name: lower-case letters, digits, '-', at most 15"),
                    "containerPort": PORT,
                    "protocol": only("TCP", "UDP"),
                },
                ("containerPort",),
            ),
        ),
        "readinessProbe": _PROBE,
        "resources": structure({"requests": kept}),
        "securityContext": structure(
            {
                "runAsUser": integer(0),
                "runAsGroup": integer(0),
                "capabilities": structure({"add": listing(_capability), "drop": listing(_capability)}),
                "privileged": only(False),
                "readOnlyRootFilesystem": only(False),
            }
        ),
        "volumeMounts": listing(
            structure(
                {
                    "name": LABEL,
                    "mountPath": _mount_path,
                    "readOnly": boolean,
                    "subPath": _inside,
                },
                ("name", "mountPath"),
            ),
            "mountPath",
        ),
        "terminationMessagePath": kept,
        "terminationMessagePolicy": kept,
    },
    ("name",),
)
_POD_FIELDS: dict[str, Check] = {
    "containers": listing(_CONTAINER, "name", 1),
    "volumes": listing(_VOLUME, "name"),
    "nodeName": TEXT,
    "nodeSelector": LABELS,
    "serviceAccountName": TEXT,
    "serviceAccount": TEXT,
    "automountServiceAccountToken": only(False),
    "restartPolicy": only("Always", "OnFailure", "Never"),
    "terminationGracePeriodSeconds": integer(0),
    "dnsPolicy": only("ClusterFirst", "Default"),
    "schedulerName": only("default-scheduler"),
    "enableServiceLinks": only(False),
    "hostNetwork": boolean,
    "securityContext": structure({"runAsUser": integer(0), "runAsGroup": integer(0)}),
    "tolerations": kept,  # the lab's nodes have no taints
    "priority": kept,  # and no pod is ever evicted
    "priorityClassName": kept,
    "preemptionPolicy": kept,
    "imagePullSecrets": kept,
}
_POD_SPEC = structure(_POD_FIELDS, ("containers",))


def _pod(value: Any, path: str, problems: list[Problem]) -> None:
    """A pod's spec, with what one field says about another."""
    before = len(problems)
    _POD_SPEC(value, path, problems)
    if len(problems) > before:
        return
    volumes = {volume["name"] for volume in value.get("volumes", ())}
    ports = set()
    for index, container in enumerate(value["containers"]):
        here = f"{path}.containers[{index}]"
        for number, mount in enumerate(container.get("volumeMounts", ())):
            if mount["name"] not in volumes:
                _say(problems, f"{here}.volumeMounts[{number}].name", f"there is no volume {mount['name']!r}")
        for number, port in enumerate(container.get("ports", ())):
            if "name" in port:
                if port["name"] in ports:
                    _say(problems, f"{here}.ports[{number}].name", repr(port["name"]), "FieldValueDuplicate")
                ports.add(port["name"])
        for number, entry in enumerate(container.get("env", ())):
            if "value" in entry and entry["value"] and "valueFrom" in entry:
                _say(problems, f"{here}.env[{number}].valueFrom", "value and valueFrom exclude each other")
        if not container.get("command") and not value.get("hostNetwork"):
            why = "must be given: the image is the host, it has no entry point"
            _say(problems, f"{here}.command", why, "FieldValueRequired")
    if value.get("serviceAccount", value.get("serviceAccountName")) != value.get("serviceAccountName"):
        _say(problems, f"{path}.serviceAccount", "differs from serviceAccountName")


# -- everything else -----------------------------------------------------------------------------------------------

_SELECTOR = structure({"matchLabels": LABELS}, ("matchLabels",))
_TEMPLATE = structure({"metadata": _TEMPLATE_METADATA, "spec": _pod}, ("metadata", "spec"))
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
        _say(problems, path, f"{str(value)[:80]!r} is not an IP address")


def _cluster_ip(value: Any, path: str, problems: list[Problem]) -> None:
    if value != "None":
        _address(value, path, problems)


_SERVICE_PORT = structure(
    {
        "name": text(_LABEL, 63, "must be a DNS label"),
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
        _say(problems, f"{path}.ports", "must be given", "FieldValueRequired")
    names: set[str] = set()
    numbers: set[tuple[int, str]] = set()
    for index, port in enumerate(ports):
        name, number = port.get("name", ""), (port["port"], port.get("protocol", "TCP"))
        if len(ports) > 1 and not name:
            _say(
                problems,
                f"{path}.ports[{index}].name",
                "must be given where there are several ports",
                "FieldValueRequired",
            )
        elif name in names:
            _say(problems, f"{path}.ports[{index}].name", repr(name), "FieldValueDuplicate")
        if number in numbers:
            _say(problems, f"{path}.ports[{index}].port", f"{number[0]}/{number[1]}", "FieldValueDuplicate")
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
            _say(
                problems,
                f"{path}.template.metadata.labels",
                f"`selector` does not match the template: {key}={item} is missing",
            )
    if value["template"]["spec"].get("restartPolicy", "Always") != "Always":
        _say(
            problems,
            f"{path}.template.spec.restartPolicy",
            "a Deployment's pods are always restarted",
            "FieldValueNotSupported",
        )
    if value["template"]["spec"].get("hostNetwork"):
        _say(
            problems,
            f"{path}.template.spec.hostNetwork",
            "the lab's pods have a network of their own",
            "FieldValueForbidden",
        )


_DATA = mapping(_KEY, TEXT, "must be letters, digits, '-', '_' and '.'")
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


def _status(value: Any, path: str, problems: list[Problem]) -> None:
    if not isinstance(value, dict):
        _say(problems, path, f"must be an object, is {_name(value)}")


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
    POD: ({"spec": _pod, "status": _status}, ("spec",)),
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
        _say(problems, "metadata.annotations", f"must have at most {ANNOTATIONS_BYTES} bytes together")
    if kind is POD and obj["spec"].get("hostNetwork") and MIRROR not in metadata.get("annotations", {}):
        why = "the lab's pods have a network of their own"
        _say(problems, "spec.hostNetwork", why, "FieldValueForbidden")
    return problems
