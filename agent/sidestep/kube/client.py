"""Kubernetes over HTTP: one connection pool, plain dictionaries, one error class.

`KubeClient` speaks JSON to the API server that a kubeconfig (or the pod's own service account) names. Objects are
dictionaries as the API sends them; whoever keeps them projects them to something smaller (watch.Reflector). The
generated client libraries cost 65 MB.
"""

import asyncio
import base64
import json
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlencode

from sidestep.kube.http import Answer, Http

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
PATCH_TYPES = {
    "merge": "application/merge-patch+json",
    "strategic": "application/strategic-merge-patch+json",
    "json": "application/json-patch+json",
}
TIMEOUT_S = 30.0
WATCH_S = 300  # the server ends a watch after this; a connection that died silently is noticed not much later

Object = dict[str, Any]


class KubeError(Exception):
    """The API refused (`status` is the HTTP status, `reason` its word: NotFound, Conflict, ...) or cannot be reached
    (status 0).
    """

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}" if reason else message)
        self.status = status
        self.reason = reason
        self.message = message


class ConfigError(Exception):
    """The kubeconfig cannot be used; says which file and what is missing."""


@dataclass(frozen=True, slots=True)
class KubeConfig:
    """Where the API is and how to speak to it. `token_file` is read again for each request: the kubelet renews it."""

    server: str
    ca: bytes | None = None
    token: str = ""
    token_file: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None


def load_config(path: str | Path | None) -> KubeConfig:
    """The current context of a kubeconfig file; None: the service account of the pod this runs in. Raises
    ConfigError.
    """
    if path is None:
        return _in_cluster()
    import yaml

    try:
        config = yaml.safe_load(Path(path).read_text())
        contexts = {entry["name"]: entry["context"] for entry in config["contexts"]}
        context = contexts[config.get("current-context") or next(iter(contexts))]
        cluster = next(entry["cluster"] for entry in config["clusters"] if entry["name"] == context["cluster"])
        user = next(entry["user"] for entry in config["users"] if entry["name"] == context["user"])
        return KubeConfig(
            server=cluster["server"].rstrip("/"),
            ca=_data(cluster, "certificate-authority"),
            token=user.get("token") or "",
            token_file=Path(user["tokenFile"]) if user.get("tokenFile") else None,
            client_cert=Path(user["client-certificate"]) if user.get("client-certificate") else None,
            client_key=Path(user["client-key"]) if user.get("client-key") else None,
        )
    except OSError as error:
        raise ConfigError(f"kubeconfig {path}: {error.strerror}") from error
    except (yaml.YAMLError, KeyError, TypeError, StopIteration, ValueError) as error:
        raise ConfigError(f"kubeconfig {path}: no usable context, cluster and user ({error!r})") from error


def _data(entry: Mapping[str, Any], key: str) -> bytes | None:
    if entry.get(f"{key}-data"):
        return base64.b64decode(entry[f"{key}-data"])
    return Path(entry[key]).read_bytes() if entry.get(key) else None


def _in_cluster() -> KubeConfig:
    import os

    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        raise ConfigError("not in a cluster (KUBERNETES_SERVICE_HOST is not set): give --kubeconfig")
    try:
        ca = (SERVICE_ACCOUNT / "ca.crt").read_bytes()
    except OSError as error:
        raise ConfigError(f"{SERVICE_ACCOUNT}/ca.crt: {error.strerror}") from error
    host = f"[{host}]" if ":" in host else host
    return KubeConfig(server=f"https://{host}:{port}", ca=ca, token_file=SERVICE_ACCOUNT / "token")


class KubeClient:
    """Asks one API server. Use as an async context manager, or call `close`.

    Paths are those of the REST API ("/api/v1/namespaces/x/pods"). Every call has a deadline of 30 s and raises
    KubeError.
    """

    def __init__(self, config: KubeConfig) -> None:
        self.config = config
        self._http = Http(config.server, self._tls)

    @classmethod
    def from_config(cls, path: str | Path | None) -> "KubeClient":
        """From a kubeconfig file, or (None) from the pod's service account. Raises ConfigError."""
        return cls(load_config(path))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends every connection, watches included."""
        await self._http.close()

    async def get(self, path: str, params: Mapping[str, str] | None = None) -> Object:
        """One object (or anything else that answers JSON)."""
        return await self.request("GET", path, params=params)

    async def list(self, path: str, *, label_selector: str = "", field_selector: str = "") -> Object:
        """A list object: `items`, and `metadata.resourceVersion` to watch from."""
        return await self.request("GET", path, params=_selectors(label_selector, field_selector))

    async def create(self, path: str, body: Mapping[str, Any]) -> Object:
        """POSTs an object to its collection."""
        return await self.request("POST", path, body=body)

    async def update(self, path: str, body: Mapping[str, Any]) -> Object:
        """Replaces an object (Conflict where its resourceVersion is not the current one)."""
        return await self.request("PUT", path, body=body)

    async def patch(
        self, path: str, patch: Any, *, kind: str = "merge", params: Mapping[str, str] | None = None
    ) -> Object:
        """Patches an object; `kind` is merge, strategic or json. A subresource is part of the path (".../status")."""
        return await self.request("PATCH", path, body=patch, content_type=PATCH_TYPES[kind], params=params)

    async def delete(self, path: str, *, grace_s: int | None = None, uid: str = "") -> Object:
        """Deletes; `grace_s` overrides the object's grace period, `uid` makes sure that it is this one."""
        body: Object = {"kind": "DeleteOptions", "apiVersion": "v1"}
        if grace_s is not None:
            body["gracePeriodSeconds"] = grace_s
        if uid:
            body["preconditions"] = {"uid": uid}
        return await self.request("DELETE", path, body=body)

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        params: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> Object:
        """Any request; the answer as a dictionary."""
        data = None if body is None else json.dumps(body).encode()
        headers = self._headers() | ({"Content-Type": content_type} if data is not None else {})
        try:
            async with asyncio.timeout(TIMEOUT_S):
                async with self._http.ask(method, _target(path, params), headers, data) as response:
                    text = await response.read()
            if response.status >= 400:
                raise _refusal(response.status, text)
            answer = json.loads(text) if text else {}
            return answer if isinstance(answer, dict) else {"value": answer}
        except (TimeoutError, OSError, ValueError) as error:
            raise self._unreachable(method, path, error) from error

    async def watch(
        self, path: str, *, resource_version: str, label_selector: str = "", field_selector: str = ""
    ) -> AsyncIterator[tuple[str, Object]]:
        """Events (ADDED, MODIFIED, DELETED, BOOKMARK) after a version, until the server ends the watch.

        Raises KubeError; status 410 (Expired) means: list again.
        """
        params = _selectors(label_selector, field_selector) | {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "timeoutSeconds": str(WATCH_S),
        }
        end = asyncio.get_running_loop().time() + WATCH_S + TIMEOUT_S
        try:
            async with AsyncExitStack() as stack:
                async with asyncio.timeout(TIMEOUT_S):
                    asked = self._http.ask("GET", _target(path, params), self._headers(), None)
                    response = await stack.enter_async_context(asked)
                    if response.status >= 400:
                        raise _refusal(response.status, await response.read())
                _keep_alive(response)
                lines = _lines(response.pieces())
                while True:
                    async with asyncio.timeout_at(end):  # not around the yield: whoever watches has time of its own
                        line = await anext(lines, None)
                    if line is None:
                        return
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        status = event.get("object") or {}
                        raise KubeError(
                            int(status.get("code") or 500),
                            str(status.get("reason", "")),
                            str(status.get("message", "")),
                        )
                    yield event["type"], event["object"]
        except (TimeoutError, OSError, ValueError) as error:
            raise self._unreachable("watch", path, error) from error

    def _unreachable(self, what: str, path: str, error: Exception) -> KubeError:
        message = f"{what} {self.config.server}{path}: {error or type(error).__name__}"
        return KubeError(0, "Unreachable", message)

    def _headers(self) -> dict[str, str]:
        token = self.config.token
        if self.config.token_file is not None:
            try:
                token = self.config.token_file.read_text().strip()
            except OSError as error:
                raise KubeError(0, "Unauthorized", f"{self.config.token_file}: {error.strerror}") from error
        return {"Accept": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})

    def _tls(self) -> ssl.SSLContext:
        tls = ssl.create_default_context(cadata=self.config.ca.decode() if self.config.ca else None)
        if self.config.client_cert is not None:
            tls.load_cert_chain(self.config.client_cert, self.config.client_key)
        return tls


def _target(path: str, params: Mapping[str, str] | None) -> str:
    return f"{path}?{urlencode(params)}" if params else path


def _keep_alive(response: Answer) -> None:
    """A watch may be silent for long; a server that is gone without a word is noticed after 30 s all the same."""
    for level, option, value in (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    ):
        response.option(level, option, value)


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Lines of any length: an object may be larger than the reader's own limit for a line."""
    rest = b""
    async for chunk in pieces:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line:
                yield line


def _selectors(label: str, field: str) -> dict[str, str]:
    return ({"labelSelector": label} if label else {}) | ({"fieldSelector": field} if field else {})


def _refusal(status: int, text: bytes) -> KubeError:
    try:
        answer = json.loads(text)
        return KubeError(status, str(answer.get("reason", "")), str(answer.get("message", "")))
    except (ValueError, AttributeError):
        return KubeError(status, "", text[:200].decode(errors="replace"))
