"""The shape of a pod's spec: the fields that the lab's node part honours (`podspec` reads them there)."""

import re
from typing import Any

from sidestep.lab import podspec
from sidestep.lab.api.errors import Problem
from sidestep.lab.api.shapes import (
    LABEL,
    LABELS,
    PORT,
    PORT_NAME,
    TEXT,
    Check,
    boolean,
    integer,
    kept,
    listing,
    only,
    port_or_name,
    say,
    structure,
    text,
)

_ENV = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")
_FIELD_REF = re.compile(
    r"metadata\.(name|namespace|uid)|metadata\.(labels|annotations)\['[^']+'\]"
    r"|spec\.(nodeName|serviceAccountName)|status\.(podIP|podIPs|hostIP|hostIPs)"
)


def _inside(value: Any, path: str, problems: list[Problem]) -> None:
    """A path in a volume, which must not lead out of it: the node's part writes there as root."""
    if not isinstance(value, str) or not value or value.startswith("/") or ".." in value.split("/") or "\0" in value:
        say(problems, path, f"{str(value)[:80]!r} must be a relative path without '..'")


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
        say(problems, path, f"{str(value)[:80]!r} must be an absolute path without '..'")


_CAPABILITIES = frozenset({"ALL", *podspec.CAPABILITIES})


def _capability(value: Any, path: str, problems: list[Problem]) -> None:
    if not isinstance(value, str) or value.upper().removeprefix("CAP_") not in _CAPABILITIES:
        say(problems, path, f"{str(value)[:80]!r} is no capability; one is like NET_RAW")


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
                    "name": text(PORT_NAME, 15, "must be a port's name: lower-case letters, digits, '-', at most 15"),
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


def pod_spec(value: Any, path: str, problems: list[Problem]) -> None:
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
                say(problems, f"{here}.volumeMounts[{number}].name", f"there is no volume {mount['name']!r}")
        for number, port in enumerate(container.get("ports", ())):
            if "name" in port:
                if port["name"] in ports:
                    say(problems, f"{here}.ports[{number}].name", repr(port["name"]), "FieldValueDuplicate")
                ports.add(port["name"])
        for number, entry in enumerate(container.get("env", ())):
            if "value" in entry and entry["value"] and "valueFrom" in entry:
                say(problems, f"{here}.env[{number}].valueFrom", "value and valueFrom exclude each other")
        if not container.get("command") and not value.get("hostNetwork"):
            why = "must be given: the image is the host, it has no entry point"
            say(problems, f"{here}.command", why, "FieldValueRequired")
    if value.get("serviceAccount", value.get("serviceAccountName")) != value.get("serviceAccountName"):
        say(problems, f"{path}.serviceAccount", "differs from serviceAccountName")
