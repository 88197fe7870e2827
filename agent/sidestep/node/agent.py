"""The agent: what the API, the runtime and the engine say goes to the residents; certificates and pages go the other
way.

Start: pins and records of an earlier agent become residents; the engine is asked what it holds; the API is listed.
Until that list is complete nothing is enrolled or released, only kept: an agent that cannot reach the API changes
nothing. What is found in pins, engine or records and is no pod of this node any more is taken out after that.
"""

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from sidestep import log
from sidestep.node.capture import CaptureError, Captures
from sidestep.node.cni import TRY_AGAIN, Call, CniError
from sidestep.node.engine import Engine, EngineAway, EngineError, Hello
from sidestep.node.identities import Certificate, Identities
from sidestep.node.metrics import Metrics
from sidestep.node.netns import Netns, NetnsError, Record, Records
from sidestep.node.pods import EXCLUDED_NAMESPACES, Pod, Verdict, eligible
from sidestep.node.probes import Exemption, Ports
from sidestep.node.reconcile import Capture, Desired, Serving, Step
from sidestep.node.resident import ApiError, Names, PodStatus, Resident, Steps, restore

VERIFY_S = 1.0
CA_CONCURRENCY = 8
CACHE_WAIT_S = 3.0
ADD_FAILURES = 3
ADD_S = 20.0
DEL_S = 4.0  # below the plugin's 5 s
_UNATTACHED = (Capture.ABSENT, Capture.PREPARED)


class Api(PodStatus, Protocol):
    """What the agent asks of the Kubernetes API. Each raises ApiError."""

    async def get_pod(self, namespace: str, name: str) -> Pod | None: ...

    async def namespace_mode(self, name: str) -> str: ...


class Authority(Protocol):
    """Issues certificates. Raises CertificateError."""

    async def issue(self, uri: str) -> Certificate: ...


class CertificateError(Exception):
    """No certificate: the authority refused, cannot be reached, or answered with one that is not ours."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the agent runs."""

    node: str
    settings: Mapping[str, Any]
    excluded: frozenset[str] = EXCLUDED_NAMESPACES
    cluster_domain: str = "cluster.local"  # the DNS suffix of Services
    no_native: str = ""  # why same_node is direct where native was asked for


class Agent:
    """Owns the residents. `run` ends only by cancellation or by a bug."""

    def __init__(
        self,
        place: Place,
        names: Names,
        captures: Captures,
        engine_path: Any,
        api: Api,
        authority: Authority,
        records: Records,
        metrics: Metrics,
        uniform: Callable[[], float],
        kubelet_cgroup: Path | None = None,
    ) -> None:
        self.place = place
        self.names = names
        self.metrics = metrics
        self.captures = captures
        self.engine = Engine(engine_path, self._engine_connected, self._engine_lost)
        self.identities = Identities(uniform)
        self.residents: dict[str, Resident] = {}
        self.pods: dict[str, Pod] = {}
        self.namespaces: dict[str, str] = {}
        self.pods_listed = False
        self.namespaces_listed = False
        self._api = api
        self._authority = authority
        self._records = records
        self._known_records: dict[str, Record] = {}
        self.probes = Exemption(captures, kubelet_cgroup, self._probed)
        self._steps = Steps(names, captures, self.engine, api, records, metrics, self._has_identity, self.probes.keep)
        self._engine_identities: dict[str, float] = {}
        self._asked = asyncio.Event()
        self._cached = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None
        self.restored = asyncio.Event()
        self.engine_versions: Callable[[Hello], None] = lambda hello: None

    # --- life ---

    async def run(self) -> None:
        """Restores what an earlier agent left, then works until cancelled."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            await self._restore()
            await self.probes.keep()
            self.restored.set()
            group.create_task(self.engine.run(), name="engine")
            group.create_task(self._verify(), name="verify")
            group.create_task(self._certify(), name="identities")

    async def _restore(self) -> None:
        self._known_records = self._records.load()
        found = await self.captures.list()
        for uid, what in found.items():
            resident = self._resident(uid)
            record = self._known_records.get(uid)
            resident.capture, resident.captured_ino = what.capture, what.netns_ino
            if record is not None:
                resident.netns = await asyncio.to_thread(restore, record)
                resident.container, resident.addresses = record.container, record.addresses
                resident.interface = record.interface
                resident.captured_ino = resident.captured_ino or record.netns_ino
                resident.pod = _remembered(record, self.place.node, what.capture)
            try:
                resident.take(await self.captures.verify(uid, resident.netns, resident.interface))
            except CaptureError as err:
                resident.intact, resident.error = False, str(err)
            if what.netns_ino:
                await self._steps.keep_door(resident)
        for uid in self._known_records.keys() - found.keys():
            self._records.remove(uid)
        if found:
            log.event("restored", pods=len(found))

    @property
    def listed(self) -> bool:
        """The API's pods of this node and its namespaces are known completely."""
        return self.pods_listed and self.namespaces_listed

    @property
    def no_native(self) -> str:
        """Why `same_node` is direct where native was asked for, "" for nothing."""
        return self.place.no_native or self.engine.no_native

    @property
    def settings(self) -> Mapping[str, Any]:
        """The engine's settings as they are in force."""
        return {**self.place.settings, "same_node": "direct"} if self.engine.no_native else self.place.settings

    def pending(self) -> list[str]:
        """What is missing until the agent is ready, by name."""
        missing = [] if self.engine.up else ["engine"]
        if not self.listed:
            missing.append("kubernetes")
        if any(self._stuck(resident) for resident in self.residents.values()):
            missing.append("workload proxy manager")
        return missing

    @staticmethod
    def _stuck(resident: Resident) -> bool:
        return (
            resident.want.exists and resident.want.enrol and not resident.served and resident.failures >= ADD_FAILURES
        )

    # --- what the API says ---

    def pod_seen(self, pod: Pod) -> None:
        """A pod of this node was added or changed."""
        self.pods[pod.uid] = pod
        resident = self.residents.get(pod.uid)
        if resident is not None:
            resident.pod = pod
        self._decide(pod.uid)
        self._cached.set()

    def pod_gone(self, uid: str) -> None:
        """A pod was deleted."""
        self.pods.pop(uid, None)
        self._decide(uid)

    def namespace_seen(self, name: str, mode: str) -> None:
        """A namespace was added, or its label changed."""
        if self.namespaces.get(name) != mode:
            self.namespaces[name] = mode
            if mode == "ambient" and name in self.place.excluded:
                log.event("namespace_excluded", namespace=name, hint="it is labelled, but excluded by configuration")
            self._decide_all(name)

    def namespace_gone(self, name: str) -> None:
        """A namespace was deleted."""
        self.namespaces.pop(name, None)
        self._decide_all(name)

    def list_complete(self, pods: bool = False, namespaces: bool = False) -> None:
        """The first list of pods or namespaces is complete. With both, what nobody owns can be taken out."""
        before = self.listed
        self.pods_listed |= pods
        self.namespaces_listed |= namespaces
        if self.listed and not before:
            log.event("listed", pods=len(self.pods), namespaces=len(self.namespaces))
            for uid in [*self.pods, *self.residents]:
                self._decide(uid)

    def verdict(self, pod: Pod) -> Verdict:
        """Whether the pod belongs into the mesh, and why (not)."""
        return eligible(pod, self.namespaces.get(pod.namespace, ""), self.place.excluded)

    def _decide_all(self, namespace: str) -> None:
        for pod in list(self.pods.values()):
            if pod.namespace == namespace:
                self._decide(pod.uid)

    def _decide(self, uid: str) -> None:
        """Says what a pod should be, and wakes (or makes) its worker where something is to be done."""
        pod, resident = self.pods.get(uid), self.residents.get(uid)
        if not self.listed:
            if resident is not None and not resident.fresh and resident.capture not in _UNATTACHED:
                # Kept as it is; what is in draining stays so.
                resident.want = Desired(True, resident.capture is not Capture.DRAINING)
                resident.wake.set()
            return
        if resident is not None and resident.ended:
            want = Desired(False, False)
        elif pod is None:
            want = Desired(resident is not None and resident.fresh, resident is not None and resident.fresh)
            if resident is not None and not want.exists:
                resident.pod = resident.pod and replace(resident.pod, redirection="")
        else:
            want = Desired(not pod.terminal, self.verdict(pod) is Verdict.ENROL)
        if resident is None:
            lies = pod is not None and pod.redirection == "enabled" and not pod.terminal
            leaving = pod is not None and pod.deleting
            if leaving or (not (want.exists and want.enrol) and not lies):
                return
            resident = self._resident(uid)
        resident.pod = pod or resident.pod
        resident.want = want
        resident.wake.set()
        self._need()

    def _resident(self, uid: str) -> Resident:
        """The resident, made with its worker where there is none."""
        resident = self.residents.get(uid)
        if resident is None:
            resident = self.residents[uid] = Resident(uid, pod=self.pods.get(uid))
            if self._group is None:
                raise RuntimeError("the agent does not run")
            self._group.create_task(self._work(resident), name=f"pod {uid}")
        return resident

    async def _work(self, resident: Resident) -> None:
        # Until the caller has said what is wanted nothing may happen.
        await resident.wake.wait()
        try:
            await self._steps.work(resident)
        finally:
            if self.residents.get(resident.uid) is resident:
                del self.residents[resident.uid]
            resident.tell()
            self._need()
        log.event("pod_released", pod=resident.key)

    # --- what the runtime says ---

    async def cni_add(self, call: Call) -> None:
        """Returns when the pod is captured and the engine listens, or at once where it is none of ours."""
        result = "failed"
        try:
            result = await self._add(call)
        finally:
            self.metrics.add("sidestep_cni_requests_total", command="ADD", result=result)

    async def _add(self, call: Call) -> str:
        if not call.namespace or not call.name or call.namespace in self.place.excluded:
            return "passed"
        pod = await self._pod_of(call)
        try:
            mode = await self._api.namespace_mode(pod.namespace)
        except ApiError as err:
            if pod.namespace not in self.namespaces:
                raise CniError(f"namespace {pod.namespace}: {err}") from None
            mode = self.namespaces[pod.namespace]
        verdict = eligible(pod, mode, self.place.excluded)
        if verdict is not Verdict.ENROL:
            log.event("cni_passed", pod=pod.key, why=verdict.value)
            return "passed"
        if call.netns_fd < 0:
            raise CniError(f"{call.netns}: the network namespace could not be opened")
        if not call.addresses and not pod.ips:
            raise CniError("prevResult names no address of the pod")
        netns = self._netns_of(call, pod)
        resident = self._resident(pod.uid)
        if resident.netns is not None:
            resident.netns.close()
        resident.netns, resident.container, resident.addresses = netns, call.container, call.addresses
        resident.interface = call.interface
        resident.pod = resident.pod or pod
        resident.ended, resident.failures, resident.error = False, 0, ""
        resident.fresh = not (resident.served and resident.captured_ino == netns.ino)
        resident.want = Desired(True, True)
        resident.wake.set()
        self._need()
        await self._until_served(resident, netns)
        log.event("cni_add", pod=pod.key, mode=resident.capture.value, netns_ino=netns.ino)
        return "enrolled"

    async def _until_served(self, resident: Resident, netns: Netns) -> None:
        try:
            async with asyncio.timeout(ADD_S):
                while not (resident.served and resident.captured_ino == netns.ino):
                    if resident.failures >= ADD_FAILURES:
                        raise CniError(f"pod {resident.key} cannot be captured", TRY_AGAIN, resident.error)
                    if resident.ended or self.residents.get(resident.uid) is not resident:
                        raise CniError(f"pod {resident.key} was deleted meanwhile")
                    await resident.changed.wait()
        except TimeoutError:
            missing = resident.error or resident.step.value
            raise CniError(
                f"pod {resident.key} is not ready to be meshed", TRY_AGAIN, f"waits for: {missing}"
            ) from None

    async def _pod_of(self, call: Call) -> Pod:
        """The API's object: only it gives the account and the UID. From the cache, or asked for."""
        pod = self._cached_pod(call)
        if pod is None:
            try:
                pod = await self._api.get_pod(call.namespace, call.name)
            except ApiError as err:
                pod = await self._await_cached(call)
                if pod is None:
                    raise CniError(f"pod {call.namespace}/{call.name}: {err}") from None
        if pod is None or (call.uid and pod.uid != call.uid):
            raise CniError(f"pod {call.namespace}/{call.name} is not known to the API with this UID")
        if pod.node != self.place.node:
            raise CniError(f"pod {pod.key} is not placed on this node by the API")
        return pod

    def _cached_pod(self, call: Call) -> Pod | None:
        for pod in self.pods.values():
            if (pod.namespace, pod.name) == (call.namespace, call.name) and (not call.uid or pod.uid == call.uid):
                return pod
        return None

    async def _await_cached(self, call: Call) -> Pod | None:
        try:
            async with asyncio.timeout(CACHE_WAIT_S):
                while (pod := self._cached_pod(call)) is None:
                    self._cached.clear()
                    await self._cached.wait()
                return pod
        except TimeoutError:
            return None

    def _netns_of(self, call: Call, pod: Pod) -> Netns:
        """The call's namespace, owned by the caller; refused where it is the host's or enrolled for another pod."""
        try:
            netns = Netns(os.dup(call.netns_fd), call.netns)
        except NetnsError as err:
            raise CniError(str(err)) from None
        for other in self.residents.values():
            if other.uid == pod.uid or other.netns is None or not other.want.exists:
                continue
            if (other.netns.ino, other.netns.cookie) == (netns.ino, netns.cookie):
                netns.close()
                raise CniError(f"{call.netns}: belongs to pod {other.key}")
        return netns

    async def cni_del(self, call: Call) -> None:
        """Takes everything of ours out of the sandbox; done already is done."""
        self.metrics.add("sidestep_cni_requests_total", command="DEL", result="done")
        for resident in list(self.residents.values()):
            if resident.container and resident.container == call.container:
                resident.ended, resident.fresh = True, False
                resident.want = Desired(False, False)
                resident.wake.set()
                await self._until_gone(resident)
                log.event("cni_del", pod=resident.key)

    async def _until_gone(self, resident: Resident) -> None:
        try:
            async with asyncio.timeout(DEL_S):
                while self.residents.get(resident.uid) is resident and resident.ended:
                    await resident.changed.wait()
        except TimeoutError:
            raise CniError(f"pod {resident.key} is not released yet", TRY_AGAIN, resident.error) from None

    async def cni_check(self, call: Call) -> None:
        """The pod is what it should be: captured, programs in place, the engine listens; or none of ours."""
        self.metrics.add("sidestep_cni_requests_total", command="CHECK", result="done")
        if not call.namespace or not call.name or call.namespace in self.place.excluded:
            return
        pod = await self._pod_of(call)
        resident = self.residents.get(pod.uid)
        if self.verdict(pod) is not Verdict.ENROL:
            if resident is not None and resident.captured:
                raise CniError(f"pod {pod.key} is captured and should not be")
            return
        if resident is None or not resident.served:
            raise CniError(f"pod {pod.key} is not enrolled", TRY_AGAIN, resident.error if resident else "")
        try:
            verified = await self.captures.verify(pod.uid, resident.netns, resident.interface)
        except CaptureError as err:
            raise CniError(f"pod {pod.key}: {err}") from None
        if not verified.intact or not verified.listeners:
            raise CniError(f"pod {pod.key}: programs or listeners are not in place")

    # --- the engine ---

    async def _engine_connected(self, hello: Hello) -> None:
        """Feeds a new connection: settings, certificates; workers see what the engine has of their pods."""
        await self.engine.settings(self.place.settings)
        self.metrics.add("sidestep_engine_connects_total")
        self._engine_identities = {uri: ends for uri, (ends, _) in hello.identities.items()}
        for identity in self.identities:
            certificate = identity.certificate
            if certificate is not None and not _same(hello.identities.get(identity.uri), certificate):
                try:
                    await self._give(identity.uri, certificate)
                except EngineAway:
                    raise
                except EngineError as err:
                    log.event("certificate_not_given", identity=identity.uri, error=err)
        for uid in hello.pods.keys() - self.residents.keys():
            self._resident(uid)
        for uid, resident in self.residents.items():
            has = hello.pods.get(uid)
            resident.engine, resident.listeners = Serving.ABSENT, False
            if has is None or (resident.netns is not None and has.netns_cookie != resident.netns.cookie):
                continue
            native = self.names.native and not self.engine.no_native
            if native and hello.same_node != "native" and has.mode == "serving":
                continue  # It was added without what native flows need: once more, which changes nothing else.
            resident.engine = Serving.DRAINING if has.mode == "draining" else Serving.SERVING
            resident.ports = has.ports
            if resident.capture is not Capture.ABSENT:
                try:
                    resident.listeners = (await self.captures.verify(uid, None, resident.interface)).listeners
                except CaptureError as err:
                    log.event("verify_failed", pod=resident.key, error=err)
        self.engine_versions(hello)
        # The engine counts as up when this returns: the workers run after that.
        asyncio.get_running_loop().call_soon(self._wake_all)

    def _wake_all(self) -> None:
        for uid in list(self.residents):
            self._decide(uid)

    def _engine_lost(self) -> None:
        self._engine_identities = {}
        for resident in self.residents.values():
            resident.engine, resident.listeners = Serving.ABSENT, False
            resident.tell()

    # --- certificates ---

    def _has_identity(self, uri: str) -> bool:
        return self._engine_identities.get(uri, 0.0) > time.time()

    def _need(self) -> None:
        """Which identities local pods need now; the engine forgets the others."""
        needed = {
            self.names.identity(resident.pod)
            for resident in self.residents.values()
            if resident.pod is not None
            and ((resident.want.exists and resident.want.enrol) or resident.engine is not Serving.ABSENT)
        }
        self.identities.need(needed, time.time())
        self._asked.set()

    def roots_changed(self, pem: str) -> None:
        """The cluster trusts other roots now: certificates with the ones before are renewed soon."""
        count = self.identities.roots_changed(pem, time.time())
        log.event("roots_changed", renewed_soon=count)
        self._asked.set()

    async def _certify(self) -> None:
        """Asks for certificates when they are due, a few at a time."""
        slots = asyncio.Semaphore(CA_CONCURRENCY)

        async def ask(uri: str) -> None:
            async with slots:
                try:
                    certificate = await self._authority.issue(uri)
                except CertificateError as err:
                    wait_s = self.identities.failed(uri, str(err), time.time())
                    self.metrics.add("sidestep_certificate_requests_total", result="failed")
                    log.event("certificate_failed", identity=uri, error=err, again_s=round(wait_s, 1))
                else:
                    self.metrics.add("sidestep_certificate_requests_total", result="done")
                    if self.identities.obtained(uri, certificate, time.time()):
                        log.event("certificate", identity=uri, ends_s=int(certificate.not_after_s))
                        if self.engine.up:
                            try:
                                await self._give(uri, certificate)
                            except EngineError as err:
                                log.event("certificate_not_given", identity=uri, error=err)
                self._asked.set()
                self._wake_all()

        async with asyncio.TaskGroup() as group:
            while True:
                self._asked.clear()
                await self._forget()
                for uri in self.identities.due(time.time()):
                    self.identities.asking(uri)
                    group.create_task(ask(uri), name=f"certificate {uri}")
                due_s = self.identities.next_due_s()
                try:
                    async with asyncio.timeout(None if due_s is None else max(0.01, due_s - time.time())):
                        await self._asked.wait()
                except TimeoutError:
                    pass

    async def _give(self, uri: str, certificate: Certificate) -> None:
        self._engine_identities[uri] = await self.engine.identity_set(uri, certificate)

    async def _forget(self) -> None:
        """Takes from the engine what no pod here needs; only when it is known which pods there are."""
        if not self.engine.up or not self.listed:
            return
        for uri in [uri for uri in self._engine_identities if self.identities.get(uri) is None]:
            del self._engine_identities[uri]
            try:
                await self.engine.identity_del(uri)
                log.event("certificate_dropped", identity=uri)
            except EngineError as err:
                log.event("certificate_not_dropped", identity=uri, error=err)

    # --- what must stay true ---

    async def _verify(self) -> None:
        """Each second: are the programs where they were put? Workers put back what was taken out."""
        while True:
            await asyncio.sleep(VERIFY_S)
            for resident in list(self.residents.values()):
                if resident.capture in _UNATTACHED or resident.step is Step.REPAIR:
                    continue
                before = resident.capture
                try:
                    verified = await self.captures.verify(resident.uid, resident.netns, resident.interface)
                except CaptureError as err:
                    log.event("verify_failed", pod=resident.key, error=err)
                    continue
                if resident.capture is not before:
                    continue
                if resident.intact and not verified.intact:
                    log.event("programs_missing", pod=resident.key, missing=verified.missing, hint="put back now")
                    resident.intact, resident.pins = False, verified.pins
                    resident.wake.set()
                if resident.listeners and not verified.listeners and self.engine.up:
                    resident.listeners = False
                    resident.wake.set()
            await self.probes.keep()
            if self.names.native:
                await self._keep_native()
            self._gauges()

    async def _keep_native(self) -> None:
        """What vouched flows leave behind that nobody came for goes; doors that were taken out are put back."""
        for resident in list(self.residents.values()):
            if resident.capture in _UNATTACHED:
                continue
            try:
                await self.captures.sweep(resident.uid, resident.netns)
            except CaptureError as err:
                log.event("sweep_failed", pod=resident.key, error=err)
            await self._steps.keep_door(resident)
        try:
            await self.captures.sweep_notes()
        except CaptureError as err:
            log.event("sweep_failed", error=err)

    def _probed(self) -> tuple[Ports, bool]:
        """Ports of captured pods that the kubelet may ask; port 0 stands for the pod. All of them, or is the API's list
        still incomplete?
        """
        ports = {
            (address, port)
            for resident in self.residents.values()
            if resident.capture is not Capture.ABSENT and resident.pod is not None
            for address in resident.known_addresses
            for port in (0, *resident.pod.probed)
        }
        return frozenset(ports), self.listed

    def _gauges(self) -> None:
        residents = list(self.residents.values())
        wanted = [r for r in residents if r.want.exists and r.want.enrol]
        served = [r for r in wanted if r.served]
        self.metrics.set("workload_manager_active_proxy_count", len(served))
        self.metrics.set("workload_manager_pending_proxy_count", len(wanted) - len(served))
        self.metrics.set("sidestep_pods_raw", sum(1 for r in served if r.pod is not None and r.pod.raw))
        self.metrics.set("sidestep_engine_up", int(self.engine.up))
        self.metrics.set("sidestep_same_node_native", int(self.names.native and not self.engine.no_native))
        self.metrics.set("sidestep_agent_log_lines_dropped_total", log.dropped())
        now = time.time()
        states = [identity.valid(now) for identity in self.identities]
        self.metrics.set("sidestep_identities", states.count(True), state="available")
        self.metrics.set("sidestep_identities", states.count(False), state="missing")


def _same(held: tuple[float, str] | None, certificate: Certificate) -> bool:
    """The engine has this certificate: it tells serial numbers in hexadecimal."""
    try:
        return held is not None and int(held[1], 16) == int(certificate.serial)
    except ValueError:
        return False


def _remembered(record: Record, node: str, capture: Capture) -> Pod:
    """What a record knows of a pod, until the API says more."""
    return Pod(
        uid=record.uid,
        namespace=record.namespace,
        name=record.name,
        service_account=record.service_account,
        node=node,
        host_network=False,
        phase="Running",
        deleting=False,
        ips=record.addresses,
        mode="",
        sidecar=False,
        redirection="enabled" if capture in (Capture.STRICT, Capture.LENIENT) else "",
        raw=False,
    )
