"""What is told about policies: a condition in the object's status, an Event where it is refused, lines in the log.

The condition is `ZtunnelAccepted` (reference/istio-ambient.md 5.9). It is written only where the object does not say it
already, so that nothing is written when a control plane starts again, and every other condition is left as it is. An
API that refuses is asked again, later and later; serving never waits for it. Of two writers at once the API takes one
(resourceVersion), the other looks again; two that disagree about one generation of an object take turns, later and
later. Policies that are a waypoint's get no condition of ours.
"""

import asyncio
import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sidestep import log
from sidestep.control.objects import Policy
from sidestep.control.policies import WAYPOINT, Ruling
from sidestep.control.rulings import Key, Rulings
from sidestep.kube.client import KubeClient, KubeError

TYPE = "ZtunnelAccepted"
PLURALS = {"AuthorizationPolicy": "authorizationpolicies", "PeerAuthentication": "peerauthentications"}
API = "security.istio.io/v1"
BACKOFF_S = (0.2, 60.0)
LINES = 20  # of the log, for one policy
EVENT_MESSAGE = 1000  # the API takes 1024


@dataclass(slots=True)
class _Due:
    """A policy whose object does not say what it should. `at_s`: not before (monotonic)."""

    policy: Policy
    ruling: Ruling
    at_s: float
    pause_s: float


class Verdicts:
    """Writes conditions and Events. `failed`: why the last attempt did not succeed, by kind and name."""

    def __init__(self, client: KubeClient) -> None:
        self._client = client
        self._due: dict[Key, _Due] = {}
        self._said: dict[Key, tuple[str, tuple[str, ...]]] = {}
        self._wrote: dict[Key, tuple[str, int, float]] = {}  # uid, generation, the pause before
        self._wake = asyncio.Event()
        self.written = 0
        self.failed: dict[str, str] = {}

    def take(self, rulings: Rulings) -> None:
        """Notes what changed."""
        changed, rulings.changed = rulings.changed, set()
        for key in changed:
            policy, ruling = rulings.policies.get(key), rulings.ruling(*key)
            if policy is None or ruling is None:
                for table in (self._due, self._said, self._wrote):
                    table.pop(key, None)
                self.failed.pop(" ".join(key), None)
                continue
            self._log(key, policy, ruling)
            if ruling.reason == WAYPOINT or _says(policy, ruling):
                self._due.pop(key, None)
                self.failed.pop(" ".join(key), None)
                continue
            old = self._due.get(key)
            at_s, pause_s = (old.at_s, old.pause_s) if old is not None else self._when(key, policy)
            self._due[key] = _Due(policy, ruling, at_s, pause_s)
            self._wake.set()

    def _when(self, key: Key, policy: Policy) -> tuple[float, float]:
        """When to write, and the pause after that."""
        uid, generation, pause_s = self._wrote.get(key, ("", 0, 0.0))
        if (uid, generation) != (policy.uid, policy.generation):
            return 0.0, BACKOFF_S[0]
        pause_s = min(max(pause_s * 2, BACKOFF_S[0]), BACKOFF_S[1])
        return asyncio.get_running_loop().time() + pause_s, pause_s

    def _log(self, key: Key, policy: Policy, ruling: Ruling) -> None:
        """Once for each thing that is wrong with a version of a policy."""
        now = (policy.uid, ruling.not_enforced)
        if self._said.get(key) == now:
            return
        self._said[key] = now
        for line in ruling.not_enforced[:LINES]:
            log.event("policy_not_enforced", level="WARN", kind=key[0], policy=policy.key, reason=line)
        if len(ruling.not_enforced) > LINES:
            more = f"and {len(ruling.not_enforced) - LINES} lines more"
            log.event("policy_not_enforced", level="WARN", kind=key[0], policy=policy.key, reason=more)

    async def run(self) -> None:
        """Writes until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            now = loop.time()
            for key in [key for key, due in self._due.items() if due.at_s <= now]:
                due = self._due.get(key)
                if due is not None:
                    await self._write(key, due)
            wait = min((due.at_s for due in self._due.values()), default=None)
            try:
                async with asyncio.timeout_at(wait):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _write(self, key: Key, due: _Due) -> None:
        name = " ".join(key)
        policy, ruling = due.policy, due.ruling
        path = f"/apis/{API}/namespaces/{policy.namespace}/{PLURALS[policy.kind]}/{policy.name}/status"
        patch = {"metadata": {"resourceVersion": policy.version}, "status": {"conditions": _conditions(policy, ruling)}}
        try:
            await self._client.patch(path, patch)
        except KubeError as error:
            if error.status == 404:
                self._done(key, due)  # it is gone; the news is on its way
                return
            if error.status != 409 and self.failed.get(name) != str(error):
                log.event("status_not_written", kind=policy.kind, policy=policy.key, error=error)
            self.failed[name] = str(error)
            due = self._due.get(key, due)
            due.at_s = asyncio.get_running_loop().time() + due.pause_s * random.uniform(0.8, 1.2)
            due.pause_s = min(due.pause_s * 2, BACKOFF_S[1])
            return
        self.written += 1
        self._wrote[key] = policy.uid, policy.generation, due.pause_s
        self._done(key, due)
        if not ruling.accepted:
            await self._report(policy, ruling)

    def _done(self, key: Key, due: _Due) -> None:
        self.failed.pop(" ".join(key), None)
        if self._due.get(key) is due:
            del self._due[key]

    async def _report(self, policy: Policy, ruling: Ruling) -> None:
        """An Event; one more of the same counts the first up. One that is refused is only logged: the condition says
        the same.
        """
        digest = hashlib.blake2b(f"{policy.uid} {ruling.reason} {ruling.message}".encode(), digest_size=8).hexdigest()
        name = f"{policy.name[:200]}.{digest}"
        collection = f"/api/v1/namespaces/{policy.namespace}/events"
        now = _now()
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": policy.namespace},
            "involvedObject": {
                "apiVersion": API,
                "kind": policy.kind,
                "namespace": policy.namespace,
                "name": policy.name,
                "uid": policy.uid,
            },
            "type": "Warning",
            "reason": "NotEnforced",
            "message": ruling.message[:EVENT_MESSAGE],
            "source": {"component": "sidestep-control"},
            "reportingComponent": "sidestep-control",
            "reportingInstance": "sidestep-control",
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        try:
            try:
                await self._client.create(collection, event)
            except KubeError as error:
                if error.status != 409:
                    raise
                before = await self._client.get(f"{collection}/{name}")
                count = before.get("count")
                again = {"lastTimestamp": now, "count": (count if isinstance(count, int) else 1) + 1}
                await self._client.patch(f"{collection}/{name}", again)
        except KubeError as error:
            log.event("event_not_written", kind=policy.kind, policy=policy.key, error=error)

    def status(self) -> dict[str, Any]:
        """For /status."""
        return {"written": self.written, "due": len(self._due), "failed": dict(self.failed)}


def _says(policy: Policy, ruling: Ruling) -> bool:
    """Whether the object says it already."""
    found = _ours(policy)
    return found is not None and {**found, "lastTransitionTime": ""} == _condition(policy, ruling, "")


def _ours(policy: Policy) -> Mapping[str, Any] | None:
    return next((each for each in policy.conditions if isinstance(each, Mapping) and each.get("type") == TYPE), None)


def _condition(policy: Policy, ruling: Ruling, since: str) -> dict[str, Any]:
    return {
        "type": TYPE,
        "status": "True" if ruling.accepted else "False",
        "reason": ruling.reason,
        "message": ruling.message,
        "observedGeneration": policy.generation,
        "lastTransitionTime": since,
    }


def _conditions(policy: Policy, ruling: Ruling) -> list[Any]:
    """All conditions, with ours."""
    old = _ours(policy)
    made = _condition(policy, ruling, _now())
    if old is not None and old.get("status") == made["status"] and old.get("lastTransitionTime"):
        made["lastTransitionTime"] = old["lastTransitionTime"]
    rest = [each for each in policy.conditions if each is not old]
    return [*rest, made]


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
