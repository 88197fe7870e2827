"""Policies as manifests, and records in a form that can be read and compared."""

import ipaddress
from typing import Any

from sidestep.wire.pb import authorization_pb2 as pb

STATIC = "istio-system/istio_converted_static_strict"


def manifest(kind: str, spec: Any, name: str = "p", namespace: str = "shop", **meta: Any) -> dict[str, Any]:
    """An object as the API sends it."""
    made = {
        "kind": kind,
        "apiVersion": "security.istio.io/v1",
        "metadata": {"namespace": namespace, "name": name, "uid": f"uid-{name}", "generation": 1, **meta},
    }
    return made if spec is None else made | {"spec": spec}


def authorization(spec: Any, name: str = "p", namespace: str = "shop", **meta: Any) -> dict[str, Any]:
    """An AuthorizationPolicy."""
    return manifest("AuthorizationPolicy", spec, name, namespace, **meta)


def peer(
    mode: str | None = None,
    name: str = "p",
    namespace: str = "shop",
    ports: dict[str, str] | None = None,
    app: str = "",
    **meta: Any,
) -> dict[str, Any]:
    """A PeerAuthentication: a mode, modes of ports, and the label `app` that it selects by."""
    spec: dict[str, Any] = {}
    if mode is not None:
        spec["mtls"] = {"mode": mode}
    if ports is not None:
        spec["portLevelMtls"] = {port: {"mode": word} for port, word in ports.items()}
    if app:
        spec["selector"] = {"matchLabels": {"app": app}}
    return manifest("PeerAuthentication", spec, name, namespace, **meta)


def shape(record: pb.Authorization) -> list[list[list[dict[str, Any]]]]:
    """Rules of clauses of matches; a match has only what it says. Words are written as in policies."""
    return [[[_match(match) for match in clause.matches] for clause in rule.clauses] for rule in record.rules]


def _match(match: pb.Match) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field, values in match.ListFields():
        if field.name.endswith("ips"):
            found[field.name] = [f"{ipaddress.ip_address(each.address)}/{each.length}" for each in values]
        elif field.name.endswith("service_accounts"):
            found[field.name] = [f"{each.namespace}/{each.serviceAccount}" for each in values]
        elif field.name.endswith("ports"):
            found[field.name] = list(values)
        else:
            found[field.name] = [_word(each) for each in values]
    return found


def _word(each: pb.StringMatch) -> str:
    kind = each.WhichOneof("match_type")
    return {"exact": each.exact, "prefix": f"{each.prefix}*", "suffix": f"*{each.suffix}", "presence": "*"}[str(kind)]
