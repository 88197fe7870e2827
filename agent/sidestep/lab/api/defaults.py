"""What Kubernetes would add to an object that does not say it. Pure: gives back a new object.

Applied before an object is checked, at every write, so that an object that a client read and sends back is equal to
the one that is kept.
"""

import base64
import binascii
import copy
from typing import Any

from sidestep.lab.api.errors import ApiError
from sidestep.lab.api.resources import DEPLOYMENT, ENDPOINT_SLICE, NAMESPACE, POD, REPLICA_SET, SECRET, SERVICE, Kind

Object = dict[str, Any]


def without_nulls(value: Any) -> Any:
    """A copy in which no map has a null: for Kubernetes a null is a field that is not there."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def fill(kind: Kind, obj: Object) -> Object:
    """The object with its defaults. What has the wrong type is left alone: it is refused later, by name."""
    result = copy.deepcopy(obj)
    spec = result.get("spec")
    if kind is POD and isinstance(spec, dict):
        _pod(spec)
    elif kind in (DEPLOYMENT, REPLICA_SET) and isinstance(spec, dict):
        _deployment(spec, kind)
    elif kind is SERVICE and isinstance(spec, dict):
        _service(spec)
    elif kind is SECRET:
        _secret(result)
    elif kind is NAMESPACE:
        labels = result["metadata"].setdefault("labels", {})
        if isinstance(labels, dict):
            labels["kubernetes.io/metadata.name"] = result["metadata"].get("name", "")
        result["spec"] = {"finalizers": ["kubernetes"]}
        result.setdefault("status", {"phase": "Active"})
    elif kind is ENDPOINT_SLICE:
        result.setdefault("endpoints", [])
        for port in _objects(result, "ports"):
            port.setdefault("name", "")
            port.setdefault("protocol", "TCP")
    return result


def _objects(parent: Any, name: str) -> list[Object]:
    """The objects of a list, leaving out what is none."""
    found = parent.get(name) if isinstance(parent, dict) else None
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def _pod(spec: Object) -> None:
    spec.setdefault("restartPolicy", "Always")
    spec.setdefault("terminationGracePeriodSeconds", 30)
    spec.setdefault("dnsPolicy", "ClusterFirst")
    spec.setdefault("schedulerName", "default-scheduler")
    spec.setdefault("securityContext", {})
    spec.setdefault("serviceAccountName", spec.get("serviceAccount", "default"))
    spec.setdefault("serviceAccount", spec["serviceAccountName"])
    for container in _objects(spec, "containers"):
        container.setdefault("image", "host")
        container.setdefault("imagePullPolicy", "IfNotPresent")
        container.setdefault("resources", {})
        for port in _objects(container, "ports"):
            port.setdefault("protocol", "TCP")
        for entry in _objects(container, "env"):
            source = entry.get("valueFrom")
            if isinstance(source, dict) and isinstance(source.get("fieldRef"), dict):
                source["fieldRef"].setdefault("apiVersion", "v1")
        probe = container.get("readinessProbe")
        if isinstance(probe, dict):
            for key, value in (
                ("periodSeconds", 10),
                ("timeoutSeconds", 1),
                ("successThreshold", 1),
                ("failureThreshold", 3),
            ):
                probe.setdefault(key, value)
            if isinstance(probe.get("httpGet"), dict):
                probe["httpGet"].setdefault("path", "/")
                probe["httpGet"].setdefault("scheme", "HTTP")
    for volume in _objects(spec, "volumes"):
        for name in ("configMap", "secret", "projected"):
            if isinstance(volume.get(name), dict):
                volume[name].setdefault("defaultMode", 0o644)
        for source in _objects(volume.get("projected"), "sources"):
            if isinstance(source.get("serviceAccountToken"), dict):
                source["serviceAccountToken"].setdefault("expirationSeconds", 3600)


def _deployment(spec: Object, kind: Kind) -> None:
    spec.setdefault("replicas", 1)
    if kind is DEPLOYMENT:
        spec.setdefault("revisionHistoryLimit", 10)
        spec.setdefault("progressDeadlineSeconds", 600)
        strategy = spec.setdefault("strategy", {})
        if isinstance(strategy, dict) and strategy.setdefault("type", "RollingUpdate") == "RollingUpdate":
            rolling = strategy.setdefault("rollingUpdate", {})
            if isinstance(rolling, dict):
                rolling.setdefault("maxSurge", "25%")
                rolling.setdefault("maxUnavailable", "25%")
    template = spec.get("template")
    if isinstance(template, dict) and isinstance(template.get("spec"), dict):
        template.setdefault("metadata", {})
        _pod(template["spec"])
        if "serviceAccount" in template["spec"] and template["spec"]["serviceAccountName"] == "default":
            # As in Kubernetes: a template that names no account stays without one, its pods get the default.
            template["spec"].pop("serviceAccount")
            template["spec"].pop("serviceAccountName")


def _service(spec: Object) -> None:
    spec.setdefault("type", "ClusterIP")
    spec.setdefault("sessionAffinity", "None")
    spec.setdefault("internalTrafficPolicy", "Cluster")
    for port in _objects(spec, "ports"):
        port.setdefault("protocol", "TCP")
        if "port" in port:
            port.setdefault("targetPort", port["port"])


def _secret(obj: Object) -> None:
    obj.setdefault("type", "Opaque")
    plain = obj.get("stringData")
    if isinstance(plain, dict) and all(isinstance(value, str) for value in plain.values()):
        del obj["stringData"]
        data = obj.setdefault("data", {})
        if isinstance(data, dict):
            data.update({key: base64.b64encode(value.encode()).decode() for key, value in plain.items()})


def check_base64(kind: Kind, obj: Object) -> None:
    """Raises ApiError 400 where a value of a Secret (or of binaryData) is not base64."""
    for field in ("data",) if kind is SECRET else ("binaryData",):
        for key, value in (obj.get(field) or {}).items():
            try:
                base64.b64decode(value, validate=True)
            except (binascii.Error, ValueError):
                name = obj["metadata"].get("name", "")
                raise ApiError(400, f'{kind.kind} "{name}": {field}.{key} is not base64') from None
