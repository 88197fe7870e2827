"""Volumes of the lab's pods: emptyDir, configMap, secret and projected, as directories on the node."""

import asyncio
import base64
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sidestep.kube.client import KubeClient
from sidestep.lab import podspec

REFRESH_SHARE = 0.8  # of a token's life, then it is renewed
TOKEN_S = 3600

Object = Mapping[str, Any]


class VolumeError(Exception):
    """A volume cannot be made (yet); says which object is missing."""


async def token(
    client: KubeClient, namespace: str, account: str, pod: Object, audience: str, seconds: int
) -> tuple[str, float]:
    """A token of the service account, bound to the pod; with the time (time.time) when to ask for the next one."""
    meta = pod["metadata"]
    spec: dict[str, Any] = {
        "expirationSeconds": seconds,
        "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": meta["name"], "uid": meta["uid"]},
    }
    if audience:
        spec["audiences"] = [audience]
    answer = await client.create(
        f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token",
        {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec},
    )
    return str(answer["status"]["token"]), time.time() + REFRESH_SHARE * seconds


def write(path: Path, content: bytes, mode: int) -> None:
    """Replaces a file in one step."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_bytes(content)
    fresh.chmod(mode)
    os.replace(fresh, path)


class Volumes:
    """The volumes of one pod. `make` may be repeated; `refresh` renews tokens."""

    def __init__(self, client: KubeClient, pod: Object, spec: podspec.Spec, directory: Path) -> None:
        self._client = client
        self._pod = pod
        self._spec = spec
        self._directory = directory
        self._tokens: dict[Path, tuple[Object, int, float]] = {}

    def path(self, name: str) -> Path:
        """Where a volume is on the node."""
        return self._directory / name

    async def make(self) -> None:
        """Raises VolumeError (an object is missing) or KubeError."""
        for name, (kind, source) in self._spec.volumes.items():
            self.path(name).mkdir(mode=0o755, parents=True, exist_ok=True)
            if kind == "emptyDir":
                self.path(name).chmod(0o777)
            elif kind == "projected":
                for part in source.get("sources") or ():
                    await self._project(name, part, int(source.get("defaultMode") or 0o644))
            else:
                await self._copy(name, kind, source, int(source.get("defaultMode") or 0o644))

    async def _project(self, name: str, part: Object, mode: int) -> None:
        for kind, source in part.items():
            if kind == "serviceAccountToken":
                self._tokens[self.path(name) / source["path"]] = (source, mode, 0.0)
            elif kind == "downwardAPI":
                for item in source.get("items") or ():
                    value = podspec.field(self._pod, item["fieldRef"]["fieldPath"], (), ("",))
                    write(self.path(name) / item["path"], value.encode(), mode)
            else:
                await self._copy(name, kind, source, mode)
        await self.refresh()

    async def _copy(self, name: str, kind: str, source: Object, mode: int) -> None:
        """Files of a ConfigMap or Secret."""
        from sidestep.kube.client import KubeError

        namespace = self._pod["metadata"]["namespace"]
        wanted = source.get("name") or source.get("secretName") or ""
        plural = "configmaps" if kind == "configMap" else "secrets"
        try:
            found = await self._client.get(f"/api/v1/namespaces/{namespace}/{plural}/{wanted}")
        except KubeError as error:
            if error.status != 404:
                raise
            if source.get("optional"):
                return
            raise VolumeError(f"{kind} {namespace}/{wanted} is not there") from None
        files = {key: base64.b64decode(text) for key, text in (found.get("binaryData") or {}).items()}
        for key, text in (found.get("data") or {}).items():
            files[key] = text.encode() if kind == "configMap" else base64.b64decode(text)
        items = source.get("items")
        chosen = {item["key"]: item["path"] for item in items} if items else {key: key for key in files}
        modes = {item["key"]: int(item["mode"]) for item in items or () if item.get("mode")}
        for key, path in chosen.items():
            if ".." in path.split("/") or path.startswith("/"):
                raise VolumeError(f"{kind} {namespace}/{wanted}: path {path!r} leaves the volume")
            if key in files:
                write(self.path(name) / path, files[key], modes.get(key, mode))
            elif not source.get("optional"):
                raise VolumeError(f"{kind} {namespace}/{wanted} has no key {key!r}")

    async def refresh(self) -> None:
        """Renews tokens that are due. Raises KubeError."""
        meta = self._pod["metadata"]
        for path, (source, mode, due) in list(self._tokens.items()):
            if time.time() < due:
                continue
            seconds = int(source.get("expirationSeconds") or TOKEN_S)
            text, next_due = await token(
                self._client, meta["namespace"], self._spec.service_account, self._pod,
                source.get("audience") or "", seconds,
            )  # fmt: skip
            await asyncio.to_thread(write, path, text.encode(), mode)
            self._tokens[path] = (source, mode, next_due)
