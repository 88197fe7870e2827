"""What the API says about itself: groups, resources, version. Pure."""

import platform
from typing import Any

from sidestep import __version__
from sidestep.lab.api.resources import GROUPS, KINDS, REVIEWS

# The API's dialect, not a Kubernetes: kubectl compares it with its own version.
KUBERNETES = ("1", "30")
# An OpenAPI document that holds nothing but `swagger: "2.0"`: field 1, three bytes. Without any document `kubectl
# apply` fails; with this one old and new clients leave validation to the server.
OPENAPI = b"\x0a\x032.0"


def version() -> dict[str, str]:
    """`/version`."""
    major, minor = KUBERNETES
    return {
        "major": major,
        "minor": minor,
        "gitVersion": f"v{major}.{minor}.0+sidestep-lab.{__version__}",
        "gitCommit": "",
        "gitTreeState": "",
        "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "none",
        "compiler": "none",
        "platform": f"linux/{ {'x86_64': 'amd64', 'aarch64': 'arm64'}.get(platform.machine(), platform.machine()) }",
    }


def core() -> dict[str, Any]:
    """`/api`."""
    return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}


def _group(group: str) -> dict[str, Any]:
    """A group; its first version is the one that clients are to prefer."""
    versions = [version_ for found, version_ in GROUPS if found == group]
    entries = [{"groupVersion": f"{group}/{version_}", "version": version_} for version_ in versions]
    return {"name": group, "versions": entries, "preferredVersion": entries[0]}


def groups() -> dict[str, Any]:
    """`/apis`."""
    found = [_group(group) for group in dict.fromkeys(group for group, _ in GROUPS) if group]
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": found}


def group(name: str) -> dict[str, Any] | None:
    """`/apis/GROUP`."""
    if not name or name not in {found for found, _ in GROUPS}:
        return None
    return {"kind": "APIGroup", "apiVersion": "v1", **_group(name)}


def resources(group_: str, version_: str) -> dict[str, Any] | None:
    """`/api/v1` or `/apis/GROUP/VERSION`."""
    if (group_, version_) not in GROUPS:
        return None
    found: list[dict[str, Any]] = []
    for kind in KINDS:
        if kind.group != group_ or version_ not in (kind.version, *kind.also):
            continue
        entry: dict[str, Any] = {
            "name": kind.plural,
            "singularName": kind.singular,
            "namespaced": kind.namespaced,
            "kind": kind.kind,
            "verbs": list(kind.verbs),
        }
        if kind.short:
            entry["shortNames"] = list(kind.short)
        if kind.categories:
            entry["categories"] = list(kind.categories)
        found.append(entry)
        for name in kind.subresources:
            sub: dict[str, Any] = {
                "name": f"{kind.plural}/{name}",
                "singularName": "",
                "namespaced": kind.namespaced,
                "kind": kind.kind,
                "verbs": ["get", "patch", "update"],
            }
            if name == "token":
                sub |= {"kind": "TokenRequest", "group": "authentication.k8s.io", "version": "v1", "verbs": ["create"]}
            elif name == "scale":
                sub |= {"kind": "Scale", "group": "autoscaling", "version": "v1"}
            found.append(sub)
    for review_group, review_version, kind_name, plural in REVIEWS:
        if (review_group, review_version) == (group_, version_):
            found.append(
                {"name": plural, "singularName": "", "namespaced": False, "kind": kind_name, "verbs": ["create"]}
            )
    full = f"{group_}/{version_}" if group_ else version_
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": full, "resources": found}
