"""Last versions of policies that could be read, kept over a restart.

A policy that cannot be read keeps its last version in force (policies.py), and a control plane that starts again must
not forget it: it would deny all that the policy selects, some night long after the mistake. What stands in is kept in
ConfigMap `sidestep-policies` of the system namespace, as long as it stands in; usually there is none. A version is good
for the object with its UID only. What cannot be had or written is logged, and costs no more than the memory of it.
"""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from sidestep import log
from sidestep.control.objects import Policy
from sidestep.control.rulings import Key, Rulings
from sidestep.kube.client import KubeClient, KubeError

CONFIG_MAP = "sidestep-policies"
BACKOFF_S = (0.2, 60.0)
_FIELDS = ("kind", "namespace", "name", "uid", "created", "dry_run")


class Remembered:
    """Reads at the start, writes what changes. `failed`: why the last attempt did not succeed."""

    def __init__(self, client: KubeClient, namespace: str) -> None:
        self._client = client
        self._collection = f"/api/v1/namespaces/{namespace}/configmaps"
        self._stored: dict[str, str] = {}
        self._wanted: dict[str, str] = {}
        self._wake = asyncio.Event()
        self.failed = ""

    async def load(self) -> dict[Key, Policy]:
        """What was kept. Raises KubeError where the API cannot be asked now: nothing is served without."""
        try:
            answer = await self._client.get(f"{self._collection}/{CONFIG_MAP}")
        except KubeError as error:
            if error.status in (0, 429) or error.status >= 500:
                raise
            if error.status != 404:
                log.event("policies_not_remembered", level="WARN", error=error)
                self.failed = str(error)
            return {}
        found: dict[Key, Policy] = {}
        for name, text in (answer.get("data") or {}).items():
            self._stored[name] = str(text)
            try:
                policy = _policy(json.loads(text))
            except (ValueError, TypeError, KeyError) as error:
                log.event("policy_not_remembered", level="WARN", key=name, error=repr(error))
                continue
            found[policy.kind, policy.key] = policy
        self._wanted = dict(self._stored)
        return found

    def take(self, rulings: Rulings) -> None:
        """Notes what stands in now."""
        wanted = {f"{kind}.{policy.uid}": _text(policy) for (kind, _), policy in rulings.kept().items()}
        if wanted != self._wanted:
            self._wanted = wanted
            self._wake.set()

    async def run(self) -> None:
        """Writes until cancelled."""
        pause = BACKOFF_S[0]
        while True:
            self._wake.clear()
            if self._wanted == self._stored:
                pause = BACKOFF_S[0]
                await self._wake.wait()
            elif not await self._write(dict(self._wanted)):
                await asyncio.sleep(pause)
                pause = min(pause * 2, BACKOFF_S[1])

    async def _write(self, wanted: dict[str, str]) -> bool:
        data: dict[str, str | None] = dict.fromkeys(self._stored.keys() - wanted.keys())
        data |= wanted
        try:
            try:
                await self._client.patch(f"{self._collection}/{CONFIG_MAP}", {"data": data})
            except KubeError as error:
                if error.status != 404:
                    raise
                body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": CONFIG_MAP}, "data": wanted}
                await self._client.create(self._collection, body)
        except KubeError as error:
            if self.failed != str(error):
                log.event("policies_not_remembered", level="WARN", error=error)
            self.failed = str(error)
            return False
        self.failed = ""
        self._stored = wanted
        return True

    def status(self) -> dict[str, Any]:
        """For /status."""
        return {"versions": len(self._stored), "failed": self.failed}


def _text(policy: Policy) -> str:
    fields = {name: getattr(policy, name) for name in _FIELDS}
    return json.dumps(fields | {"spec": policy.spec}, sort_keys=True)


def _policy(found: Mapping[str, Any]) -> Policy:
    """Raises KeyError, TypeError."""
    fields = {name: found[name] for name in _FIELDS}
    if not all(isinstance(value, str) for value in fields.values()):
        raise TypeError("not all words")
    return Policy(**fields, generation=0, spec=found["spec"], conditions=(), version="")
