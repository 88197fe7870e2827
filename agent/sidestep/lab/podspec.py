"""Reads a Pod object: what the lab honours, and the name of every field that it does not. Pure.

A field that would change how a pod behaves is refused by name instead of being ignored: a manifest that runs here runs
the same way on a real cluster. Fields that cannot change anything in a lab (image, pull policies, tolerations,
resource requests, termination messages) are accepted and have no effect; the image is always the host's files.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Object = Mapping[str, Any]

FAMILIES_ANNOTATION = "lab.sidestep.dev/families"
MIRROR_ANNOTATION = "kubernetes.io/config.mirror"

_CAPABILITY_NAMES = (
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE "
    "NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN "
    "SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE "
    "MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE"
)  # linux/capability.h, in order
CAPABILITIES = _CAPABILITY_NAMES.split()
_DEFAULT_NAMES = (
    "CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID SETPCAP NET_BIND_SERVICE NET_RAW SYS_CHROOT MKNOD AUDIT_WRITE "
    "SETFCAP"
)  # containerd's
DEFAULT_CAPABILITIES = frozenset(_DEFAULT_NAMES.split())

# Fields that are read (True) or have no effect here (False); anything else that is set is refused.
_SPEC = {
    "containers": True, "volumes": True, "nodeName": True, "nodeSelector": True, "serviceAccountName": True,
    "serviceAccount": True, "restartPolicy": True, "terminationGracePeriodSeconds": True, "hostNetwork": True,
    "securityContext": True, "automountServiceAccountToken": False, "enableServiceLinks": False, "dnsPolicy": True,
    "schedulerName": False, "tolerations": False, "priority": False, "priorityClassName": False,
    "preemptionPolicy": False, "imagePullSecrets": False,
}  # fmt: skip
_CONTAINER = {
    "name": True, "image": False, "imagePullPolicy": False, "command": True, "args": True, "env": True,
    "workingDir": True, "ports": True, "securityContext": True, "readinessProbe": True, "volumeMounts": True,
    "terminationMessagePath": False, "terminationMessagePolicy": False, "resources": True,
}  # fmt: skip
_SECURITY = {"runAsUser": True, "runAsGroup": True, "capabilities": True}
_PROBE = {
    "httpGet", "tcpSocket", "exec", "initialDelaySeconds", "periodSeconds", "timeoutSeconds", "successThreshold",
    "failureThreshold",
}  # fmt: skip
_FIELD_REF = re.compile(r"metadata\.(labels|annotations)\['([^']+)'\]")


class Refused(Exception):
    """A pod that the lab cannot run as it is written; the text names the fields."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A readiness probe. One of `http` (path, scheme, headers), `tcp`, `command`; `port` is a number."""

    kind: str
    port: int
    path: str
    scheme: str
    host: str
    headers: tuple[tuple[str, str], ...]
    command: tuple[str, ...]
    delay_s: float
    period_s: float
    timeout_s: float
    successes: int
    failures: int


@dataclass(frozen=True, slots=True)
class Mount:
    """A volume in a container."""

    volume: str
    path: str
    read_only: bool
    sub_path: str


@dataclass(frozen=True, slots=True)
class Container:
    """What podrun needs to know. `environment`: (name, value or None, field path where the value is None)."""

    name: str
    image: str
    command: tuple[str, ...]
    environment: tuple[tuple[str, str | None, str], ...]
    workdir: str
    uid: int
    gid: int
    capabilities: int
    probe: Probe | None
    mounts: tuple[Mount, ...]


@dataclass(frozen=True, slots=True)
class Spec:
    """A pod as the lab runs it. `volumes`: name -> (kind, the volume's own object)."""

    containers: tuple[Container, ...]
    volumes: Mapping[str, tuple[str, Object]]
    restart_policy: str
    grace_s: float
    service_account: str
    host_network: bool
    families: tuple[int, ...]
    dns: bool


def refusals(pod: Object) -> list[str]:
    """Names of the fields that would change the pod's behaviour and that the lab does not honour."""
    spec = pod.get("spec") or {}
    found = [f"spec.{key}" for key in _unknown(spec, _SPEC)]
    found += [f"spec.securityContext.{key}" for key in _unknown(spec.get("securityContext") or {}, _SECURITY)]
    if "capabilities" in (spec.get("securityContext") or {}):
        found.append("spec.securityContext.capabilities")
    for index, container in enumerate(spec.get("containers") or ()):
        found += [f"spec.containers[{index}].{field}" for field in _container_refusals(container)]
    for index, volume in enumerate(spec.get("volumes") or ()):
        found += [f"spec.volumes[{index}].{field}" for field in _volume_refusals(volume)]
    if spec.get("dnsPolicy", "ClusterFirst") not in ("ClusterFirst", "Default"):
        found.append("spec.dnsPolicy")
    if spec.get("restartPolicy", "Always") not in ("Always", "OnFailure", "Never"):
        found.append("spec.restartPolicy")
    return found


def _unknown(found: Object, known: Iterable[str]) -> Iterator[str]:
    return (key for key, value in found.items() if key not in known and value not in (None, [], {}, "", False))


def _container_refusals(container: Object) -> Iterator[str]:
    yield from _unknown(container, _CONTAINER)
    context = container.get("securityContext") or {}
    yield from (f"securityContext.{key}" for key in _unknown(context, _SECURITY))
    for verb in ("add", "drop"):
        for name in (context.get("capabilities") or {}).get(verb) or ():
            if _capability(name) not in (*CAPABILITIES, "ALL"):
                yield f"securityContext.capabilities.{verb} ({name})"
    yield from (f"resources.{key}" for key in _unknown(container.get("resources") or {}, ("requests",)))
    for index, variable in enumerate(container.get("env") or ()):
        source = variable.get("valueFrom") or {}
        for key in _unknown(source, ("fieldRef",)):
            yield f"env[{index}].valueFrom.{key}"
        if "fieldRef" in source and not _known_field(source["fieldRef"].get("fieldPath", "")):
            yield f"env[{index}].valueFrom.fieldRef.fieldPath ({source['fieldRef'].get('fieldPath', '')})"
    probe = container.get("readinessProbe") or {}
    yield from (f"readinessProbe.{key}" for key in _unknown(probe, _PROBE))
    for index, mount in enumerate(container.get("volumeMounts") or ()):
        for key in _unknown(mount, ("name", "mountPath", "readOnly", "subPath")):
            yield f"volumeMounts[{index}].{key}"


def _volume_refusals(volume: Object) -> Iterator[str]:
    for key, value in volume.items():
        if key == "name":
            continue
        if key not in ("emptyDir", "configMap", "secret", "projected"):
            yield key
        elif key == "emptyDir":
            yield from (f"emptyDir.{field}" for field in _unknown(value or {}, ("medium",)))
        elif key == "projected":
            for index, source in enumerate(value.get("sources") or ()):
                for field in _unknown(source, ("serviceAccountToken", "configMap", "secret", "downwardAPI")):
                    yield f"projected.sources[{index}].{field}"


def _known_field(path: str) -> bool:
    return bool(_FIELD_REF.fullmatch(path)) or path in (
        "metadata.name", "metadata.namespace", "metadata.uid", "spec.nodeName", "spec.serviceAccountName",
        "status.podIP", "status.podIPs", "status.hostIP", "status.hostIPs",
    )  # fmt: skip


def _capability(name: str) -> str:
    return str(name).upper().removeprefix("CAP_")


def capability_mask(names: Iterable[str]) -> int:
    """Bits of linux/capability.h."""
    return sum(1 << CAPABILITIES.index(name) for name in set(names))


def parse(pod: Object) -> Spec:
    """Raises Refused with the names of what is not honoured, or of what is missing."""
    found = refusals(pod)
    if found:
        raise Refused(f"not honoured here: {', '.join(found)}")
    spec = pod["spec"]
    context = spec.get("securityContext") or {}
    containers = tuple(_container(item, context) for item in spec.get("containers") or ())
    if not containers:
        raise Refused("spec.containers is empty")
    volumes = {}
    for volume in spec.get("volumes") or ():
        kind = next((key for key in volume if key != "name"), "emptyDir")
        volumes[volume["name"]] = (kind, volume.get(kind) or {})
    for container in containers:
        for mount in container.mounts:
            if mount.volume not in volumes:
                raise Refused(f"container {container.name}: there is no volume {mount.volume!r}")
            if ".." in mount.sub_path.split("/") or mount.sub_path.startswith("/"):
                raise Refused(f"container {container.name}: subPath {mount.sub_path!r} leaves the volume")
    grace = spec.get("terminationGracePeriodSeconds")
    return Spec(
        containers=containers,
        volumes=volumes,
        restart_policy=spec.get("restartPolicy") or "Always",
        grace_s=float(30 if grace is None else grace),
        service_account=spec.get("serviceAccountName") or spec.get("serviceAccount") or "default",
        host_network=bool(spec.get("hostNetwork")),
        families=_families(pod),
        dns=spec.get("dnsPolicy", "ClusterFirst") == "ClusterFirst",
    )


def _families(pod: Object) -> tuple[int, ...]:
    text = ((pod.get("metadata") or {}).get("annotations") or {}).get(FAMILIES_ANNOTATION, "IPv4,IPv6")
    known = {"IPv4": 4, "IPv6": 6}
    names = [name.strip() for name in text.split(",")]
    if not all(name in known for name in names):
        raise Refused(f"annotation {FAMILIES_ANNOTATION} is IPv4, IPv6 or both, not {text!r}")
    return tuple(known[name] for name in names)


def _container(container: Object, pod_context: Object) -> Container:
    name = container.get("name") or ""
    command = [str(word) for word in container.get("command") or ()]
    if not command:
        raise Refused(f"container {name!r} has no command: the image is the host, it has no entry point")
    context = {**pod_context, **(container.get("securityContext") or {})}
    capabilities = set(DEFAULT_CAPABILITIES)
    changes = context.get("capabilities") or {}
    dropped = {_capability(item) for item in changes.get("drop") or ()}
    added = {_capability(item) for item in changes.get("add") or ()}
    capabilities -= set(CAPABILITIES) if "ALL" in dropped else dropped
    capabilities |= set(CAPABILITIES) if "ALL" in added else added
    ports = {port.get("name"): int(port["containerPort"]) for port in container.get("ports") or ()}
    return Container(
        name=name,
        image=container.get("image") or "",
        command=tuple(command + [str(word) for word in container.get("args") or ()]),
        environment=tuple(
            (
                item["name"],
                None if "valueFrom" in item else str(item.get("value") or ""),
                ((item.get("valueFrom") or {}).get("fieldRef") or {}).get("fieldPath", ""),
            )
            for item in container.get("env") or ()
        ),
        workdir=container.get("workingDir") or "/",
        uid=int(context.get("runAsUser") or 0),
        gid=int(context.get("runAsGroup") or 0),
        capabilities=capability_mask(capabilities),
        probe=_probe(name, container.get("readinessProbe"), ports),
        mounts=tuple(
            Mount(item["name"], item["mountPath"], bool(item.get("readOnly")), item.get("subPath") or "")
            for item in container.get("volumeMounts") or ()
        ),
    )


def _probe(container: str, probe: Object | None, ports: Mapping[str | None, int]) -> Probe | None:
    if not probe:
        return None
    kinds = [kind for kind in ("httpGet", "tcpSocket", "exec") if probe.get(kind)]
    if len(kinds) != 1:
        raise Refused(f"container {container}: readinessProbe needs one of httpGet, tcpSocket, exec")
    action = probe[kinds[0]]
    port = action.get("port", 0)
    if isinstance(port, str):
        if port not in ports and not port.isdigit():
            raise Refused(f"container {container}: readinessProbe names port {port!r}, which is not in ports")
        port = ports[port] if port in ports else int(port)
    return Probe(
        kind=kinds[0],
        port=int(port),
        path=action.get("path") or "/",
        scheme=(action.get("scheme") or "HTTP").upper(),
        host=action.get("host") or "",
        headers=tuple((item["name"], item["value"]) for item in action.get("httpHeaders") or ()),
        command=tuple(str(word) for word in action.get("command") or ()),
        delay_s=float(probe.get("initialDelaySeconds") or 0),
        period_s=float(probe.get("periodSeconds") or 10),
        timeout_s=float(probe.get("timeoutSeconds") or 1),
        successes=int(probe.get("successThreshold") or 1),
        failures=int(probe.get("failureThreshold") or 3),
    )


def field(pod: Object, path: str, ips: Sequence[str], host_ips: Sequence[str]) -> str:
    """The value of a fieldRef; empty where the pod has none."""
    meta, spec = pod["metadata"], pod["spec"]
    match = _FIELD_REF.fullmatch(path)
    if match:
        return str((meta.get(match[1]) or {}).get(match[2], ""))
    known = {
        "metadata.name": meta["name"],
        "metadata.namespace": meta["namespace"],
        "metadata.uid": meta["uid"],
        "spec.nodeName": spec.get("nodeName", ""),
        "spec.serviceAccountName": spec.get("serviceAccountName") or "default",
        "status.podIP": ips[0] if ips else "",
        "status.podIPs": ",".join(ips),
        "status.hostIP": host_ips[0],
        "status.hostIPs": ",".join(host_ips),
    }
    return str(known[path])


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Kubernetes' $(NAME); $$ stands for $, a name that is not known stays as it is."""

    def replace(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return str(variables.get(match[1], match[0]))

    return re.sub(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)", replace, text)


def environment(pod: Object, container: Container, ips: Sequence[str], host_ips: Sequence[str]) -> dict[str, str]:
    """The container's variables, later ones may refer to earlier ones."""
    variables: dict[str, str] = {}
    for name, value, path in container.environment:
        variables[name] = field(pod, path, ips, host_ips) if value is None else expand(value, variables)
    return variables
