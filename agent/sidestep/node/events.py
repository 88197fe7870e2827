"""Kubernetes Events about pods that cannot be enrolled: what `kubectl describe pod` shows to who owns the pod.

Once a second the pods are looked over (`causes`). A cause that lasts (LASTS_S: most are gone with the next attempt)
makes one Event for its pod and reason, whose count and time are raised when it is still there REPEAT_S later. Events
are written by a task of their own, one at a time, not more often than every GAP_S once BURST are used up: an API that
refuses or does not answer costs a log line and that Event, never enrolment.
"""

import asyncio
import hashlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sidestep import log
from sidestep.node.agent import ADD_FAILURES, Agent
from sidestep.node.pods import Pod, Verdict
from sidestep.node.reconcile import Step
from sidestep.node.resident import ApiError

LOOK_S = 1.0
LASTS_S = 5.0
REPEAT_S = 600.0
GAP_S = 2.0
BURST = 20
WAITING = 256  # Events that wait to be written; more are dropped and counted
KNOWN = 4096  # causes that are remembered; the oldest is forgotten
REPORT_S = 10.0
MESSAGE = 1000  # characters; the API takes 1024
NETNS_SEARCHES = 3
COMPONENT = "sidestep-agent"

# A pod that a label asks for and that can never be in the mesh. What its owner chose (no label, `none`) is no failure.
_NEVER = {
    Verdict.HOST_NETWORK: "it uses the host's network, which all pods of the node share",
    Verdict.SIDECAR: "it has a sidecar, which does the same work",
    Verdict.EXCLUDED: "its namespace is excluded by the agent's configuration",
}


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a pod is not in the mesh, or not as it should be. `reason`: one word, as Events have it."""

    pod: Pod
    reason: str
    message: str
    passing: bool = True  # the next attempt may succeed

    @property
    def key(self) -> tuple[str, str]:
        """What makes it the same cause."""
        return self.pod.uid, self.reason


def causes(agent: Agent) -> Iterator[Cause]:
    """What keeps pods of this node out of the mesh now."""
    for pod in agent.pods.values():
        verdict = agent.verdict(pod)
        asked = pod.mode == "ambient" or (pod.mode != "none" and agent.namespaces.get(pod.namespace) == "ambient")
        if verdict in _NEVER and asked and not pod.terminal:
            yield Cause(pod, "NotEnrolled", f"cannot be in the mesh: {_NEVER[verdict]}", passing=False)
    for resident in agent.residents.values():
        known = agent.pods.get(resident.uid)
        if known is None or not (resident.want.exists and resident.want.enrol) or known.terminal:
            continue
        if resident.failures >= ADD_FAILURES:
            what = resident.step.name.lower().replace("_", " ")
            yield Cause(known, "EnrolmentFailed", f"cannot be enrolled yet, step {what!r} failed: {resident.error}")
        elif resident.step is Step.WAIT_NETNS and resident.searches >= NETNS_SEARCHES:
            why = resident.error or "none was found that has an address of the pod"
            yield Cause(known, "EnrolmentFailed", f"cannot be enrolled yet, no network namespace is known: {why}")
        identity = agent.identities.get(agent.names.identity(known))
        if identity is not None and identity.error and not identity.valid(time.time()):
            yield Cause(known, "NoCertificate", f"no certificate for {identity.uri}: {identity.error}")


class Reporter:
    """Notes causes, and writes them. `write` puts one Event into the API and raises ApiError. `clock`: seconds since
    the epoch.
    """

    def __init__(
        self, node: str, write: Callable[[Mapping[str, Any]], Awaitable[None]], clock: Callable[[], float]
    ) -> None:
        self._node = node
        self._write = write
        self._clock = clock
        self._noted: dict[tuple[str, str], tuple[float, float, int]] = {}
        self._waiting: deque[tuple[Cause, float, int]] = deque()
        self._wake = asyncio.Event()
        self._since: dict[tuple[str, str], float] = {}
        self.dropped = 0

    def look(self, found: Iterable[Cause]) -> None:
        """These causes are there now, and no others."""
        now, since = self._clock(), {}
        for cause in found:
            since[cause.key] = self._since.get(cause.key, now)
            if not cause.passing or now - since[cause.key] >= LASTS_S:
                self.note(cause)
        self._since = since

    def note(self, cause: Cause) -> None:
        """A cause is there. Never blocks."""
        now = self._clock()
        first, last, count = self._noted.get(cause.key, (now, 0.0, 0))
        if now - last < REPEAT_S:
            return
        if len(self._waiting) >= WAITING:
            self.dropped += 1
            return
        self._noted.pop(cause.key, None)  # to the end: the one that was longest not there is forgotten first
        self._noted[cause.key] = (first, now, count + 1)
        if len(self._noted) > KNOWN:
            del self._noted[next(iter(self._noted))]
        self._waiting.append((cause, first, count + 1))
        self._wake.set()

    async def run(self) -> None:
        """Writes until cancelled."""
        left, since = float(BURST), self._clock()
        while True:
            if not self._waiting:
                self._wake.clear()
                await self._wake.wait()
                continue
            now = self._clock()
            left, since = min(float(BURST), left + max(0.0, now - since) / GAP_S), now
            if left < 1:
                await asyncio.sleep(GAP_S * (1 - left))
                continue
            left -= 1
            cause, first, count = self._waiting.popleft()
            try:
                async with asyncio.timeout(REPORT_S):
                    await self._write(event_of(cause, self._node, first, self._clock(), count))
            except (ApiError, TimeoutError) as err:
                why = str(err) or "the API did not answer in time"
                log.event("event_not_written", pod=cause.pod.key, reason=cause.reason, error=why)

    async def watch(self, agent: Agent) -> None:
        """Looks the pods over until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            if agent.listed:
                self.look(causes(agent))


def event_of(cause: Cause, node: str, first_s: float, last_s: float, count: int) -> dict[str, Any]:
    """The API object. Its name is made of pod and reason, so that another agent's life does not make another one."""
    digest = hashlib.sha256(f"{cause.pod.uid} {cause.reason}".encode()).hexdigest()[:16]
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{cause.pod.name[:200]}.{digest}", "namespace": cause.pod.namespace},
        "involvedObject": {
            "apiVersion": "v1",
            "kind": "Pod",
            "namespace": cause.pod.namespace,
            "name": cause.pod.name,
            "uid": cause.pod.uid,
        },
        "type": "Warning",
        "reason": cause.reason,
        "message": cause.message[:MESSAGE],
        "source": {"component": COMPONENT, "host": node},
        "firstTimestamp": _rfc3339(first_s),
        "lastTimestamp": _rfc3339(last_s),
        "count": count,
    }


def _rfc3339(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
