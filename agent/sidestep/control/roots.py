"""Where the authority is kept, and how its root gets to those who must trust it.

The authority is in Secret `sidestep-ca`, or in the files of a directory that somebody else keeps (`--cacerts`). The
Secret is created when there is none and never changed: two control planes that start together agree on the one that was
first. The roots are in ConfigMap `istio-ca-root-cert` of every namespace; `Publisher` keeps them so.

What is kept may change while we run, so that a root is replaced without a restart (docs/decisions/0005): `Current`
looks again and again, and goes on with what it has where the new cannot be used.
"""

import asyncio
import base64
import binascii
import hashlib
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from sidestep import log
from sidestep.control import authority
from sidestep.control.authority import Authority, AuthorityError
from sidestep.kube.client import KubeClient, KubeError, Object
from sidestep.kube.watch import Reflector

SECRET = "sidestep-ca"
CONFIG_MAP = "istio-ca-root-cert"
ROOT_KEY = "root-cert.pem"
RETRY_S = 1.0
LOOK_S = 1.0


def from_directory(directory: Path) -> Authority:
    """From files. Raises AuthorityError."""
    files = {}
    for name in authority.FILES:
        try:
            files[name] = (directory / name).read_text()
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise AuthorityError(f"{directory}/{name}: {error}") from None
    try:
        return authority.load(files, time.time())
    except AuthorityError as error:
        raise AuthorityError(f"{directory}: {error}") from None


async def kept(client: KubeClient, namespace: str, trust_domain: str) -> Authority:
    """The authority of the Secret, which is created where there is none. Raises AuthorityError for one that cannot be
    used (it is not replaced: what it signed is in use), KubeError where the API does not answer or refuses.
    """
    collection = f"/api/v1/namespaces/{namespace}/secrets"
    for _ in range(3):
        try:
            return _from_secret(await client.get(f"{collection}/{SECRET}"), namespace)
        except KubeError as error:
            if error.status != 404:
                raise
        made = authority.new(trust_domain, time.time())
        data = {name: base64.b64encode(text.encode()).decode() for name, text in made.files().items()}
        secret = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": SECRET, "namespace": namespace},
            "type": "Opaque",
            "data": data,
        }
        try:
            return _from_secret(await client.create(collection, secret), namespace)
        except KubeError as error:
            if error.status != 409:
                raise
    raise AuthorityError(f"Secret {namespace}/{SECRET} comes and goes")


def _from_secret(secret: Object, namespace: str) -> Authority:
    try:
        data = secret.get("data") or {}
        files = {name: base64.b64decode(data[name]).decode() for name in authority.FILES if name in data}
        return authority.load(files, time.time())
    except (AuthorityError, binascii.Error, UnicodeDecodeError) as error:
        raise AuthorityError(
            f"Secret {namespace}/{SECRET}: {error}; it is left as it is: repair it, or delete it for a new root"
        ) from None


async def stored(client: KubeClient, namespace: str) -> Authority:
    """The authority of the Secret as it is now. Raises AuthorityError, KubeError."""
    return _from_secret(await client.get(f"/api/v1/namespaces/{namespace}/secrets/{SECRET}"), namespace)


class Current:
    """The authority in force. `read` answers what is kept; without it nothing ever changes. `problem`: why what is
    kept now is not in force.
    """

    def __init__(self, authority: Authority, read: Callable[[], Awaitable[Authority]] | None = None) -> None:
        self.authority = authority
        self.problem = ""
        self._read = read
        self._told: list[Callable[[Authority], None]] = []

    def tell(self, told: Callable[[Authority], None]) -> None:
        """Calls `told` with each new authority."""
        self._told.append(told)

    async def run(self) -> None:
        """Looks until cancelled."""
        while self._read is not None:
            await asyncio.sleep(LOOK_S)
            try:
                new = await self._read()
            except (AuthorityError, KubeError) as error:
                if self.problem != str(error):
                    log.event("authority_not_taken", level="WARN", reason=error)
                self.problem = str(error)
                continue
            self.problem = ""
            if new.files() != self.authority.files():
                self._take(new)

    def _take(self, new: Authority) -> None:
        old, self.authority = self.authority, new
        issuer = new.certificate.subject.rfc4514_string()
        known = set(x509.load_pem_x509_certificates(old.roots_pem.encode()))
        if new.under() in known:
            log.event("authority", issuer=issuer, roots=len(_roots(new)))
        else:
            reason = "who has not heard of its root yet refuses what it signs"
            log.event("authority", level="WARN", issuer=issuer, roots=len(_roots(new)), reason=reason)
        for told in self._told:
            told(new)

    def status(self) -> dict[str, Any]:
        """For /status."""
        return {
            "subject": self.authority.certificate.subject.rfc4514_string(),
            "roots": [
                {
                    "subject": each.subject.rfc4514_string(),
                    "sha256": each.fingerprint(hashes.SHA256()).hex(),
                    "not_after": each.not_valid_after_utc.strftime("%Y-%m-%dT%H:%M:%SZ"),
                    "issues": each == self.authority.under(),
                }
                for each in _roots(self.authority)
            ],
            "problem": self.problem,
        }


def _roots(of: Authority) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(of.roots_pem.encode())


class Publisher:
    """Keeps the roots in every namespace's ConfigMap: made where they are missing, put right where they differ."""

    def __init__(self, client: KubeClient, roots_pem: str) -> None:
        self._client = client
        self._roots_pem = roots_pem
        self._namespaces: set[str] = set()
        self._due: set[str] = set()
        self._wake = asyncio.Event()
        self._maps: Reflector[bytes] = Reflector(
            client,
            "/api/v1/configmaps",
            keep=lambda obj: _digest((obj.get("data") or {}).get(ROOT_KEY)),
            on_change=self._seen,
            field_selector=f"metadata.name={CONFIG_MAP}",
        )
        self.written = 0
        self.failed: dict[str, str] = {}

    def namespace(self, name: str, there: bool) -> None:
        """A namespace that wants the root, or no longer does."""
        if there and name not in self._namespaces:
            self._namespaces.add(name)
            self._check(name)
        elif not there:
            self._namespaces.discard(name)
            self._due.discard(name)
            self.failed.pop(name, None)

    def roots(self, roots_pem: str) -> None:
        """Others are to be published from now on."""
        self._roots_pem = roots_pem
        for namespace in self._namespaces:
            self._check(namespace)

    def _right(self, namespace: str) -> bool:
        return self._maps.items.get(f"{namespace}/{CONFIG_MAP}") == _digest(self._roots_pem)

    def _seen(self, key: str, _old: bytes | None, _new: bytes | None) -> None:
        namespace, _, name = key.partition("/")
        if name == CONFIG_MAP:
            self._check(namespace)

    def _check(self, namespace: str) -> None:
        if not self._right(namespace) and namespace in self._namespaces:
            self._due.add(namespace)
            self._wake.set()

    async def run(self) -> None:
        """Follows until cancelled. A namespace that cannot be written to is tried again, the others meanwhile."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._maps.run(), name="root ConfigMaps")
            await self._maps.synced.wait()
            while True:
                await self._wake.wait()
                self._wake.clear()
                again = False
                for namespace in sorted(self._due):
                    if self._right(namespace):
                        self._due.discard(namespace)
                    elif namespace in self._due:  # it may have gone while another was written
                        again = not await self._write(namespace) or again
                if again:
                    await asyncio.sleep(RETRY_S)
                    self._wake.set()

    async def _write(self, namespace: str) -> bool:
        collection = f"/api/v1/namespaces/{namespace}/configmaps"
        roots_pem = self._roots_pem
        data = {ROOT_KEY: roots_pem}
        body = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": CONFIG_MAP, "namespace": namespace},
            "data": data,
        }
        try:
            try:
                await self._client.create(collection, body)
            except KubeError as error:
                if error.status != 409:
                    raise
                await self._client.patch(f"{collection}/{CONFIG_MAP}", {"data": data})
        except KubeError as error:
            if self.failed.get(namespace) != str(error):
                log.event("root_not_published", namespace=namespace, error=error)
            self.failed[namespace] = str(error)
            return False
        if roots_pem == self._roots_pem:  # else it is due again
            self._due.discard(namespace)
        self.failed.pop(namespace, None)
        self.written += 1
        return roots_pem == self._roots_pem


def _digest(text: object) -> bytes:
    return hashlib.blake2b(str(text).encode(), digest_size=16).digest()
