"""--state-file: workloads and services from a YAML file, in place of a control plane; certificates from files it names.

The format is a subset of reference/ztunnel.md 3.8 (`workloads`, `services`, camelCase), with one more key:
`certificates`, a list of {identity, key, chain, roots} with paths of PEM files. Unknown keys are errors. What comes
out are the same
`istio.workload.Address` records that xDS delivers. For tests and for trying the node alone.
"""

import asyncio
import hashlib
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from cryptography import x509

from sidestep.node import log
from sidestep.node.agent import Agent, CertificateError
from sidestep.node.engine import EngineError, Hello
from sidestep.node.identities import Certificate
from sidestep.wire.batch import Batch, Op, Record
from sidestep.wire.pb import workload_pb2

WORKLOAD_KEYS = {
    "uid": "uid",
    "name": "name",
    "namespace": "namespace",
    "trustDomain": "trust_domain",
    "serviceAccount": "service_account",
    "network": "network",
    "node": "node",
    "hostname": "hostname",
    "clusterId": "cluster_id",
    "canonicalName": "canonical_name",
    "canonicalRevision": "canonical_revision",
    "workloadName": "workload_name",
    "nativeTunnel": "native_tunnel",
}
PROTOCOLS = {"TCP": workload_pb2.TunnelProtocol.NONE, "HBONE": workload_pb2.TunnelProtocol.HBONE}
STATUSES = {"Healthy": workload_pb2.WorkloadStatus.HEALTHY, "Unhealthy": workload_pb2.WorkloadStatus.UNHEALTHY}
MODES = {"Standard": workload_pb2.NetworkMode.STANDARD, "HostNetwork": workload_pb2.NetworkMode.HOST_NETWORK}


class StateError(Exception):
    """The file cannot be used; says which entry and why."""


@dataclass(frozen=True, slots=True)
class State:
    """Records as xDS would bring them: (name, version, serialized Address); certificates' files by identity."""

    records: tuple[tuple[str, str, bytes], ...]
    certificates: Mapping[str, tuple[Path, Path, Path]]


def load(path: Path) -> State:
    """Reads the file. Raises StateError."""
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as err:
        raise StateError(f"{path}: {err.strerror}") from None
    except yaml.YAMLError as err:
        raise StateError(f"{path}: {' '.join(str(err).split())}") from None
    if not isinstance(document, dict):
        raise StateError(f"{path}: not a mapping of workloads and services")
    _only(document, {"workloads", "services", "certificates"}, str(path))
    records = []
    try:
        for workload in document.get("workloads") or ():
            records.append(_record(*_workload(workload)))
        for service in document.get("services") or ():
            records.append(_record(*_service(service)))
        certificates = {}
        for each in document.get("certificates") or ():
            _only(each, {"identity", "key", "chain", "roots"}, "certificate")
            files = (path.parent / each["key"], path.parent / each["chain"], path.parent / each["roots"])
            certificates[each["identity"]] = files
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise StateError(f"{path}: {type(err).__name__}: {err}") from None
    return State(tuple(records), certificates)


class FileAuthority:
    """Certificates from the files that the state names."""

    def __init__(self) -> None:
        self.files: Mapping[str, tuple[Path, Path, Path]] = {}

    async def issue(self, uri: str) -> Certificate:
        """Reads the identity's files. Raises CertificateError."""
        if uri not in self.files:
            raise CertificateError("the state file names no certificate for it")
        key, chain, roots = self.files[uri]
        try:
            texts = [path.read_text() for path in (key, chain, roots)]
            leaf = x509.load_pem_x509_certificate(texts[1].encode())
        except (OSError, ValueError) as err:
            raise CertificateError(str(err)) from None
        before, after = leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp()
        return Certificate(texts[0], texts[1], texts[2], before, after, str(leaf.serial_number))


class FileFeed:
    """--state-file in place of the stream: applied whole, to every engine and again on SIGHUP."""

    def __init__(self, path: Path, authority: FileAuthority, agent: Agent) -> None:
        self._path = path
        self._authority = authority
        self._agent = agent
        self._state = load(path)
        self._authority.files = self._state.certificates
        self._changed = asyncio.Event()
        self._applied = False
        self._rejected = ""

    def engine_holds(self, hello: Hello) -> None:
        """A connection to the engine is there."""
        self._applied = False
        self._changed.set()

    def reload(self) -> None:
        """Reads the file again; keeps what it had where that cannot be used."""
        try:
            self._state = load(self._path)
        except StateError as err:
            log.event("state_file", error=err)
            return
        self._authority.files = self._state.certificates
        self._changed.set()

    def pending(self) -> list[str]:
        """What is missing until the agent is ready."""
        return [] if self._applied else ["state manager"]

    def status(self) -> dict[str, Any]:
        """For /status."""
        return {
            "state_file": str(self._path),
            "connected": self._applied,
            "rejected": self._rejected,
            "resources": {"address": len(self._state.records)},
        }

    async def run(self) -> None:
        """Applies the file when the engine or the file is new."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                with Batch(full=True) as batch:
                    for record in self._state.records:
                        batch.add(Record(Op.ADDRESS_SET, *record))
                    rejected = await self._agent.engine.apply(batch, whole=True)
            except EngineError as err:
                log.event("state_file_not_applied", error=err)
                continue
            self._applied = True
            self._rejected = "; ".join(f"{name}: {reason}" for name, reason in rejected)
            log.event("state_file_applied", records=len(self._state.records), rejected=self._rejected)


def _workload(entry: Mapping[str, Any]) -> tuple[str, workload_pb2.Address]:
    known = set(WORKLOAD_KEYS) | {
        "workloadIps",
        "protocol",
        "networkMode",
        "status",
        "services",
        "authorizationPolicies",
        "capacity",
        "locality",
        "waypoint",
    }
    _only(entry, known, "workload")
    address = workload_pb2.Address()
    workload = address.workload
    for key, field in WORKLOAD_KEYS.items():
        if key in entry:
            setattr(workload, field, entry[key])
    workload.addresses.extend(ipaddress.ip_address(ip).packed for ip in entry["workloadIps"])
    workload.tunnel_protocol = PROTOCOLS[entry.get("protocol", "TCP")]
    workload.status = STATUSES[entry.get("status", "Healthy")]
    workload.network_mode = MODES[entry.get("networkMode", "Standard")]
    workload.authorization_policies.extend(entry.get("authorizationPolicies") or ())
    if "capacity" in entry:
        workload.capacity.value = entry["capacity"]
    if "waypoint" in entry:
        _gateway(workload.waypoint, entry["waypoint"])
    for key, value in (entry.get("locality") or {}).items():
        setattr(workload.locality, key, value)
    for name, ports in (entry.get("services") or {}).items():
        for service_port, target_port in ports.items():
            workload.services[name].ports.add(service_port=int(service_port), target_port=int(target_port))
    if not workload.uid:
        raise StateError(f"workload {workload.name!r} has no uid")
    return workload.uid, address


def _service(entry: Mapping[str, Any]) -> tuple[str, workload_pb2.Address]:
    _only(entry, {"name", "namespace", "hostname", "vips", "ports", "subjectAltNames", "waypoint"}, "service")
    address = workload_pb2.Address()
    service = address.service
    service.name, service.namespace, service.hostname = entry["name"], entry["namespace"], entry["hostname"]
    for vip in entry.get("vips") or ():
        network, _, ip = vip.rpartition("/")
        service.addresses.add(network=network, address=ipaddress.ip_address(ip).packed)
    for service_port, target_port in (entry.get("ports") or {}).items():
        service.ports.add(service_port=int(service_port), target_port=int(target_port))
    service.subject_alt_names.extend(entry.get("subjectAltNames") or ())
    if "waypoint" in entry:
        _gateway(service.waypoint, entry["waypoint"])
    return f"{service.namespace}/{service.hostname}", address


def _gateway(gateway: workload_pb2.GatewayAddress, entry: Mapping[str, Any]) -> None:
    """`destination` is network/ip or namespace/hostname."""
    first, _, second = entry["destination"].rpartition("/")
    try:
        packed = ipaddress.ip_address(second).packed
    except ValueError:
        gateway.hostname.namespace, gateway.hostname.hostname = first, second
    else:
        gateway.address.network, gateway.address.address = first, packed
    gateway.hbone_mtls_port = entry.get("hboneMtlsPort", 15008)


def _record(name: str, address: workload_pb2.Address) -> tuple[str, str, bytes]:
    body = address.SerializeToString(deterministic=True)
    return name, hashlib.sha256(body).hexdigest()[:16], body


def _only(entry: Any, known: set[str], what: str) -> None:
    if not isinstance(entry, dict):
        raise StateError(f"{what}: not a mapping")
    unknown = sorted(str(key) for key in entry.keys() - known)
    if unknown:
        raise StateError(f"{what}: unknown: {', '.join(unknown)}")
