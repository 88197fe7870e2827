"""A pod of this node with what is ours in it, and the worker that moves it from what it is to what it should be.

A *resident* is every pod that is enrolled, should be, or in which something of ours was found. One worker per
resident performs its steps (reconcile.py), one at a time; everybody else (API events, CNI calls, the engine's coming
and going, the verify loop) only changes what is known and wakes the worker. A step that fails is repeated after 0.1
s, twice as long each time, at most 5 s.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeVar

from sidestep import log
from sidestep.node.capture import INTERFACE, CaptureError, Captures, NotYet, Verified
from sidestep.node.engine import Engine, EngineError, PodSpec, Ports
from sidestep.node.metrics import Metrics
from sidestep.node.netns import Netns, NetnsError, Record, Records, open_path, owns_address, scan, search_dir
from sidestep.node.pods import Pod, spiffe, workload_name
from sidestep.node.reconcile import WAITS, Actual, Capture, Desired, Serving, Step, next_step

RETRY_FIRST_S = 0.1
RETRY_LAST_S = 5.0
HALF_OPEN_S = 0.05
POLL_S = {Step.WAIT_OLD: 1.0, Step.WAIT_DRAINED: 0.2, Step.WAIT_NETNS: 1.0}
STEPS_LIMIT = 64

_UNDECIDED = Desired(exists=True, enrol=False)
_NO_PORTS = Ports(0, 0, 0)

T = TypeVar("T")


class PodStatus(Protocol):
    """What a worker asks of the API. Raises ApiError."""

    async def annotate(self, pod: Pod, enabled: bool) -> None: ...


class ApiError(Exception):
    """The Kubernetes API did not do it."""


@dataclass(slots=True)
class Resident:
    """What is known. `fresh`: came by CNI ADD and was never outside; `ended`: its sandbox was deleted by CNI DEL;
    `addresses`: as prevResult named them; `captured_ino`: the namespace that the pins belong to; `doorless`: why
    there is no `door`.
    """

    uid: str
    pod: Pod | None = None
    want: Desired = _UNDECIDED
    fresh: bool = False
    ended: bool = False
    container: str = ""
    interface: str = INTERFACE
    addresses: tuple[str, ...] = ()
    netns: Netns | None = None
    captured_ino: int = 0
    capture: Capture = Capture.ABSENT
    intact: bool = True
    pins: bool = True
    listeners: bool = False
    door: bool = False
    doorless: str = ""
    old: int = 0
    engine: Serving = Serving.ABSENT
    ports: Ports = _NO_PORTS
    connections: int = 0
    quiet_ms: int = 0
    step: Step = Step.DONE
    error: str = ""
    failures: int = 0
    searches: int = 0
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def key(self) -> str:
        """NAMESPACE/NAME, or the UID where the API knows no such pod."""
        return self.pod.key if self.pod else self.uid

    @property
    def captured(self) -> bool:
        """Clear text does not leave it, but on connections from before."""
        return self.capture in (Capture.STRICT, Capture.LENIENT)

    @property
    def served(self) -> bool:
        """Captured, verified, and the engine listens: what CNI ADD and the annotation promise."""
        return self.captured and self.intact and self.engine is Serving.SERVING and self.listeners

    @property
    def known_addresses(self) -> tuple[str, ...]:
        """The API's list where it has one: prevResult names only what one plugin gave."""
        return (self.pod.ips if self.pod else ()) or self.addresses

    def take(self, verified: Verified) -> None:
        """What verification found."""
        self.listeners, self.pins = verified.listeners, verified.pins
        self.intact = verified.intact or self.capture is Capture.PREPARED
        if not self.intact:
            self.error = f"missing: {verified.missing}"

    def tell(self) -> None:
        """Wakes whoever waits for a change of this resident."""
        self.changed.set()
        self.changed = asyncio.Event()


@dataclass(frozen=True, slots=True)
class Names:
    """What turns a pod into its names in the mesh, and the node's settings that steps need. `native`: the engine is
    given what it needs to vouch for flows between pods of this node.
    """

    trust_domain: str
    cluster_id: str
    drain_quiet_ms: int
    netns_dir: Path | None
    native: bool = False

    def identity(self, pod: Pod) -> str:
        """The SPIFFE URI the pod speaks with."""
        return spiffe(self.trust_domain, pod.namespace, pod.service_account)


class Steps:
    """Performs steps for residents: the only place that changes capture, engine and annotation of a pod."""

    def __init__(
        self,
        names: Names,
        captures: Captures,
        engine: Engine,
        status: PodStatus,
        records: Records,
        metrics: Metrics,
        has_identity: Callable[[str], bool],
        keep_probes: Callable[[], Awaitable[None]],
    ) -> None:
        self._names = names
        self._captures = captures
        self._engine = engine
        self._status = status
        self._records = records
        self._metrics = metrics
        self._has_identity = has_identity
        self._keep_probes = keep_probes

    async def work(self, resident: Resident) -> None:
        """Moves a resident until nothing of ours is left in it and nothing is wanted; then lets its namespace go."""
        steps = 0
        while True:
            resident.wake.clear()
            try:
                step = await self._next(resident)
                if step not in WAITS:
                    await self._perform(step, resident)
                    self._metrics.add("sidestep_reconcile_steps_total", step=step.name.lower(), result="done")
            except NotYet as err:
                resident.error = str(err)
                await asyncio.sleep(HALF_OPEN_S)
                continue
            except (CaptureError, EngineError, NetnsError, ApiError, OSError) as err:
                self._failed(resident, err)
                await _wait(resident.wake, min(RETRY_FIRST_S * 2 ** min(resident.failures - 1, 10), RETRY_LAST_S))
                await asyncio.sleep(
                    RETRY_FIRST_S / 2
                )  # A wake-up that comes with every failure must not become a loop.
                continue
            resident.step, resident.error, resident.failures = step, "", 0
            resident.tell()
            if step not in WAITS:
                steps += 1
                if steps % STEPS_LIMIT == 0:
                    log.event("pod_restless", pod=resident.key, steps=steps, step=step.name.lower())
                    await asyncio.sleep(RETRY_LAST_S)
                continue
            steps = 0
            if step is Step.DONE and not (resident.want.exists and resident.want.enrol):
                if not resident.wake.is_set():
                    self._let_go(resident)
                    return
                continue
            await _wait(resident.wake, self._poll_s(step, resident))

    def _poll_s(self, step: Step, resident: Resident) -> float | None:
        if step is Step.WAIT_NETNS:
            return min(POLL_S[step] * resident.searches, 10.0)
        return POLL_S.get(step)

    def _failed(self, resident: Resident, err: Exception) -> None:
        resident.failures += 1
        resident.error = str(err) or type(err).__name__
        self._metrics.add("sidestep_reconcile_steps_total", step=resident.step.name.lower(), result="failed")
        if resident.failures in (1, 3) or resident.failures % 20 == 0:
            log.event("pod_step_failed", pod=resident.key, error=resident.error, failures=resident.failures)
        resident.tell()

    def _let_go(self, resident: Resident) -> None:
        self._records.remove(resident.uid)
        if resident.netns is not None:
            resident.netns.close()
            resident.netns = None

    async def _next(self, resident: Resident) -> Step:
        """Looks at what a step's answer depends on, and asks for the step."""
        want = resident.want
        if want.exists and want.enrol and resident.netns is None and not resident.ended:
            await self._find_netns(resident)
        if resident.capture is Capture.LENIENT:
            resident.old = await self._captures.old(resident.uid, _known(resident.netns))
        if resident.capture is Capture.DRAINING and resident.engine is Serving.DRAINING and self._engine.up:
            stats = await self._engine.pod_stats(resident.uid)
            # What the engine has closed may still be on its way to the application.
            held = await self._captures.held(resident.uid, resident.netns) if resident.netns else 0
            resident.connections, resident.quiet_ms = max(stats.connections, held), stats.quiet_ms
        step = next_step(replace(want, fresh=resident.fresh), self.actual(resident), self._names.drain_quiet_ms)
        resident.step = step
        return step

    def actual(self, resident: Resident) -> Actual:
        """The resident as reconcile.py sees it."""
        netns, pod = resident.netns, resident.pod
        return Actual(
            netns=netns is not None,
            address=bool(resident.known_addresses),
            moved=netns is not None and resident.capture is not Capture.ABSENT and resident.captured_ino != netns.ino,
            capture=resident.capture,
            intact=resident.intact,
            engine_up=self._engine.up,
            engine=resident.engine,
            listeners=resident.listeners,
            identity=pod is not None and self._has_identity(self._names.identity(pod)),
            annotated=pod is not None and pod.redirection == "enabled",
            old=resident.old,
            connections=resident.connections,
            quiet_ms=resident.quiet_ms,
        )

    async def _find_netns(self, resident: Resident) -> None:
        """By the runtime's directory, then by the pod's processes. What a search finds must own an address of the
        pod.
        """
        resident.searches += 1
        addresses = resident.known_addresses
        if not addresses:
            return
        found = {}
        if self._names.netns_dir is not None:
            found = await asyncio.to_thread(search_dir, self._names.netns_dir, [resident.uid])
        if not found:
            found = await asyncio.to_thread(scan, [resident.uid])
        netns = found.get(resident.uid)
        if netns is None:
            return
        owns = await asyncio.to_thread(owns_address, netns, addresses)
        # Meanwhile a CNI call may have brought one: that one counts.
        if not owns or resident.netns is not None or resident.ended:
            netns.close()
            return
        resident.netns, resident.searches = netns, 0

    async def _perform(self, step: Step, resident: Resident) -> None:
        uid = resident.uid
        if step not in (Step.ENGINE_DRAIN, Step.TIGHTEN):
            log.event("pod_step", pod=resident.key, step=step.name.lower())
        match step:
            case Step.PREPARE:
                netns = _known(resident.netns)
                await self._captures.prepare(uid, resident.known_addresses)
                resident.capture, resident.captured_ino, resident.listeners = Capture.PREPARED, netns.ino, False
                self._record(resident)
                await self._keep_probes()  # before anything is captured
            case Step.STRICT | Step.LENIENT | Step.TIGHTEN | Step.DRAIN:
                mode = {Step.LENIENT: Capture.LENIENT, Step.DRAIN: Capture.DRAINING}.get(step, Capture.STRICT)
                try:
                    await self._captures.set_mode(uid, _known(resident.netns), resident.interface, mode)
                except NotYet:
                    # Begun: some new connections are the engine's already, so from here back it must be drained.
                    resident.capture = Capture.DRAINING
                    raise
                if mode is not Capture.DRAINING and not resident.captured:
                    self._metrics.add("workload_manager_proxies_started_total")
                resident.capture = mode
                await self._verify(resident)
                if not resident.intact:
                    raise CaptureError(f"{step.name.lower()}: programs are not in place after they were attached")
                await self.keep_door(resident)
            case Step.REPAIR:
                lost = not resident.pins
                if lost:
                    # The maps are out of reach: new ones, and the engine's sockets must be in them and marked in them.
                    await self._captures.prepare(uid, resident.known_addresses)
                # Every call attaches what is not attached: the mode that it has already puts back what was taken out.
                await self._captures.set_mode(uid, _known(resident.netns), resident.interface, resident.capture)
                self._metrics.add("sidestep_capture_repairs_total")
                if lost and resident.engine is not Serving.ABSENT and self._engine.up:
                    await self._engine.pod_del(uid)
                    resident.engine = Serving.ABSENT
                await self._verify(resident)
                if not resident.intact:
                    raise CaptureError("programs could not be put back")
                await self.keep_door(resident)
            case Step.ENGINE_ADD:
                await self._engine_add(resident)
            case Step.ENGINE_SERVE:
                await self._engine.pod_mode(uid, "serving")
                resident.engine = Serving.SERVING
            case Step.ENGINE_DRAIN:
                await self._engine.pod_mode(uid, "draining")
                resident.engine = Serving.DRAINING
            case Step.ENGINE_DEL:
                await self._engine.pod_del(uid)
                resident.engine, resident.listeners = Serving.ABSENT, False
            case Step.DETACH:
                await self._captures.detach(uid, self._attached_netns(resident), resident.interface)
                if resident.capture is not Capture.PREPARED:
                    self._metrics.add("workload_manager_proxies_stopped_total")
                resident.capture, resident.intact, resident.listeners, resident.old = Capture.ABSENT, True, False, 0
                resident.captured_ino = 0
                resident.fresh = resident.fresh and resident.want.exists
                await self._keep_probes()
            case Step.ANNOTATE | Step.CLEAR:
                await self._annotate(resident, step is Step.ANNOTATE)
            case _:
                raise AssertionError(step)

    async def _engine_add(self, resident: Resident) -> None:
        pod, netns = resident.pod, _known(resident.netns)
        if pod is None:
            raise CaptureError("no pod of this UID in the API")
        spec = PodSpec(
            uid=resident.uid,
            namespace=pod.namespace,
            name=pod.name,
            service_account=pod.service_account,
            workload=workload_name(self._names.cluster_id, pod.namespace, pod.name),
            addresses=resident.known_addresses,
            identity=self._names.identity(pod),
            netns_cookie=netns.cookie,
            netns_ino=netns.ino,
        )
        fd = os.dup(netns.fd)
        try:
            native = self._names.native and not self._engine.no_native
            async with self._captures.maps(resident.uid, native) as maps:
                resident.ports = await self._engine.pod_add(spec, fd, maps)
        finally:
            os.close(fd)
        resident.engine = Serving.SERVING
        await self._verify(resident)
        if not resident.listeners:
            raise CaptureError("the engine answered, but its listeners are not in the map")

    async def _annotate(self, resident: Resident, enabled: bool) -> None:
        pod = resident.pod
        if pod is None:
            return
        await self._status.annotate(pod, enabled)
        if resident.pod is pod:
            resident.pod = replace(pod, redirection="enabled" if enabled else "")
        if enabled:
            resident.fresh = False
            self._record(resident)

    async def keep_door(self, resident: Resident) -> None:
        """Without one the engine carries what goes to other pods of the node, which is said once."""
        if not self._names.native or resident.netns is None:
            return
        try:
            new = await self._captures.door(resident.uid, resident.netns, resident.interface)
            if new and resident.door:
                log.event("programs_missing", pod=resident.key, missing="door", hint="put back now")
            resident.door, resident.doorless = True, ""
        except CaptureError as err:
            if not resident.doorless:
                hint = "the engine carries its connections to other pods of this node"
                log.event("no_door", level="WARN", pod=resident.key, reason=err, hint=hint)
            resident.door, resident.doorless = False, str(err)

    async def _verify(self, resident: Resident) -> None:
        verified = await self._captures.verify(resident.uid, resident.netns, resident.interface)
        resident.take(verified)

    @staticmethod
    def _attached_netns(resident: Resident) -> Netns | None:
        """The namespace that the programs are in: the known one, unless the sandbox is another by now."""
        netns = resident.netns
        return netns if netns is not None and resident.captured_ino in (0, netns.ino) else None

    def _record(self, resident: Resident) -> None:
        pod, netns = resident.pod, resident.netns
        if pod is not None and netns is not None:
            self._records.save(
                Record(
                    uid=resident.uid,
                    namespace=pod.namespace,
                    name=pod.name,
                    service_account=pod.service_account,
                    container=resident.container,
                    interface=resident.interface,
                    netns_path=netns.path,
                    netns_ino=netns.ino,
                    netns_cookie=netns.cookie,
                    addresses=resident.known_addresses,
                )
            )


def restore(record: Record) -> Netns | None:
    """Opens a record's namespace again; None where it is gone or the path leads to another one by now."""
    try:
        netns = open_path(record.netns_path)
    except NetnsError:
        return None
    if (netns.ino, netns.cookie) != (record.netns_ino, record.netns_cookie):
        netns.close()
        return None
    return netns


def _known(value: T | None) -> T:
    if value is None:
        raise NetnsError("no network namespace is known")
    return value


async def _wait(event: asyncio.Event, timeout_s: float | None) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        pass
