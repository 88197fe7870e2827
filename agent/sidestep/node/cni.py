"""The agent's end of the CNI plugin: requests from `RUN_DIR/cni.sock`, answers in the words of the CNI specification.

The plugin (cni/sidestep-cni.c) forwards what the runtime gave it: the `CNI_*` variables, the configuration on stdin
and the network namespace as a file descriptor. What is decided about a pod is the caller's affair (`Enrolment`);
here are the framing, the deadlines, the configuration's version and the error objects. CNI_ARGS name the pod; they
are never believed for more.
"""

import array
import asyncio
import json
import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sidestep import log

MAGIC = b"SCNI"
PROTOCOL = 1
HEADER = struct.Struct("<4sIII")
MAX_ENVIRONMENT = 64 * 1024
MAX_STDIN = 1024 * 1024
READ_S = 5.0
VERSIONS = ("0.3.1", "0.4.0", "1.0.0")

INCOMPATIBLE_VERSION = 1
BAD_ENVIRONMENT = 4
DECODE = 6
BAD_CONFIG = 7
TRY_AGAIN = 11


class CniError(Exception):
    """Becomes a CNI error object. `code` as in the specification; 11 asks the runtime to try again."""

    def __init__(self, message: str, code: int = TRY_AGAIN, details: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.details = details


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the plugin. `netns_fd` is owned by the server and closed after the call; -1: none came.

    `addresses`: of the pod, as text without prefix length, from prevResult. `previous`: prevResult, None where
    absent.
    """

    command: str
    container: str
    interface: str
    netns: str
    netns_fd: int
    namespace: str
    name: str
    uid: str
    version: str
    addresses: tuple[str, ...]
    previous: Mapping[str, Any] | None = field(repr=False)


class Enrolment(Protocol):
    """What the agent does about a call. Each raises CniError where it cannot do it."""

    async def cni_add(self, call: Call) -> None: ...

    async def cni_del(self, call: Call) -> None: ...

    async def cni_check(self, call: Call) -> None: ...


def parse(environment: bytes, stdin: bytes, netns_fd: int = -1) -> Call:
    """Reads what the plugin forwarded. Raises CniError (4: environment, 6: not JSON, 7: not a configuration,
    1: version).
    """
    variables: dict[str, str] = {}
    for item in environment.split(b"\0"):
        if item:
            key, _, value = item.decode("utf-8", "replace").partition("=")
            variables[key] = value
    command = variables.get("CNI_COMMAND", "")
    if command not in ("ADD", "DEL", "CHECK"):
        raise CniError(f"CNI_COMMAND {command[:32]!r} is not known", BAD_ENVIRONMENT)
    needed = ["CNI_CONTAINERID", "CNI_IFNAME"] + (["CNI_NETNS"] if command != "DEL" else [])
    missing = [key for key in needed if not variables.get(key)]
    if missing:
        raise CniError(f"missing in the environment: {', '.join(missing)}", BAD_ENVIRONMENT)
    try:
        config = json.loads(stdin)
    except (ValueError, RecursionError) as err:
        raise CniError("the network configuration is not JSON", DECODE, str(err)[:200]) from None
    if not isinstance(config, dict):
        raise CniError("the network configuration is not an object", BAD_CONFIG)
    version = config.get("cniVersion")
    if version not in VERSIONS:
        raise CniError(f"cniVersion {str(version)[:32]!r} is none of {', '.join(VERSIONS)}", INCOMPATIBLE_VERSION)
    previous = config.get("prevResult")
    if previous is not None and not isinstance(previous, dict):
        raise CniError("prevResult is not an object", BAD_CONFIG)
    if command != "DEL" and previous is None:
        raise CniError("no prevResult: sidestep-cni comes after the plugin that made the interface", BAD_CONFIG)
    args = dict(pair.partition("=")[::2] for pair in variables.get("CNI_ARGS", "").split(";"))
    return Call(
        command=command,
        container=variables.get("CNI_CONTAINERID", ""),
        interface=variables.get("CNI_IFNAME", ""),
        netns=variables.get("CNI_NETNS", ""),
        netns_fd=netns_fd,
        namespace=args.get("K8S_POD_NAMESPACE", ""),
        name=args.get("K8S_POD_NAME", ""),
        uid=args.get("K8S_POD_UID", ""),
        version=version,
        addresses=_addresses(previous or {}),
        previous=previous,
    )


def result(call: Call) -> bytes:
    """What goes to stdout after a success: prevResult in the configuration's version for ADD, nothing else."""
    if call.command != "ADD" or call.previous is None:
        return b""
    answer = dict(call.previous)
    answer["cniVersion"] = call.version
    if isinstance(answer.get("ips"), list):
        answer["ips"] = [
            _ip_entry(entry, call.version) if isinstance(entry, dict) else entry for entry in answer["ips"]
        ]
    return json.dumps(answer).encode()


def error(version: str, err: CniError) -> bytes:
    """A CNI error object."""
    answer: dict[str, Any] = {"cniVersion": version, "code": err.code, "msg": str(err)}
    if err.details:
        answer["details"] = err.details
    return json.dumps(answer).encode()


async def answer(enrolment: Enrolment, environment: bytes, stdin: bytes, netns_fd: int) -> tuple[int, bytes]:
    """Performs one call. Returns the plugin's exit status and its stdout; never raises but for cancellation."""
    version = VERSIONS[-1]
    try:
        call = parse(environment, stdin, netns_fd)
        version = call.version
        perform = {"ADD": enrolment.cni_add, "DEL": enrolment.cni_del, "CHECK": enrolment.cni_check}[call.command]
        await perform(call)
        return 0, result(call)
    except CniError as err:
        log.event("cni_error", code=err.code, error=str(err), details=err.details)
        return 1, error(version, err)
    except Exception as err:
        log.event("cni_failed", error=f"{type(err).__name__}: {err}")
        return 1, error(version, CniError("sidestep agent failed", TRY_AGAIN, f"{type(err).__name__}: {err}"))


async def serve(path: Path, enrolment: Enrolment, deadline_s: float = 28.0) -> None:
    """Serves calls until cancelled. `deadline_s` per call: below the plugin's own. Replaces a stale socket file."""
    listener = listen(path, socket.SOCK_STREAM)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.TaskGroup() as group:
            while True:
                connection, _ = await loop.sock_accept(listener)
                connection.setblocking(False)
                group.create_task(_serve_one(connection, enrolment, deadline_s), name="cni call")
    finally:
        listener.close()


def listen(path: Path, kind: int) -> socket.socket:
    """A listening Unix socket, 0600 in a directory 0700, in place of whatever socket file was there."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    listener = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    try:
        listener.bind(str(fresh))
        fresh.chmod(0o600)
        listener.listen(128)
        fresh.rename(path)
    except OSError:
        listener.close()
        fresh.unlink(missing_ok=True)
        raise
    return listener


def peer_is_root(connection: socket.socket) -> bool:
    """The process at the other end runs as uid 0 (SO_PEERCRED)."""
    _pid, uid, _gid = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return bool(uid == 0)


async def _serve_one(connection: socket.socket, enrolment: Enrolment, deadline_s: float) -> None:
    loop = asyncio.get_running_loop()
    fds: list[int] = []
    with connection:
        try:
            if not peer_is_root(connection):
                return
            async with asyncio.timeout(READ_S):
                environment, stdin = await _read_request(connection, fds)
            try:
                async with asyncio.timeout(deadline_s):
                    status, out = await answer(enrolment, environment, stdin, fds[0] if fds else -1)
            except TimeoutError:
                log.event("cni_timeout", seconds=deadline_s)
                status, out = 1, error(VERSIONS[-1], CniError(f"not done after {deadline_s:.0f} s"))
            async with asyncio.timeout(READ_S):
                await loop.sock_sendall(connection, HEADER.pack(MAGIC, PROTOCOL, status, len(out)) + out)
        except (TimeoutError, OSError, ValueError) as err:
            log.event("cni_dropped", error=f"{type(err).__name__}: {err}")
        finally:
            for fd in fds:
                os.close(fd)


async def _read_request(connection: socket.socket, fds: list[int]) -> tuple[bytes, bytes]:
    """Reads one request; fds that came are appended to `fds`, whoever called closes them."""
    head = await _read_exactly(connection, HEADER.size, fds)
    magic, protocol, environment_length, stdin_length = HEADER.unpack(head)
    if magic != MAGIC or protocol != PROTOCOL:
        raise ValueError("not a request of sidestep-cni")
    if environment_length > MAX_ENVIRONMENT or stdin_length > MAX_STDIN:
        raise ValueError("a request that is too long")
    body = await _read_exactly(connection, environment_length + stdin_length, fds)
    return body[:environment_length], body[environment_length:]


async def _read_exactly(connection: socket.socket, length: int, fds: list[int]) -> bytes:
    data = bytearray()
    while len(data) < length:
        chunk, ancillary = await _recvmsg(connection, length - len(data))
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
                fds.extend(received)
        if not chunk:
            raise ValueError("the request ended early")
        data += chunk
    return bytes(data)


async def _recvmsg(connection: socket.socket, length: int) -> tuple[bytes, list[tuple[int, int, bytes]]]:
    loop = asyncio.get_running_loop()
    while True:
        try:
            data, ancillary, _flags, _address = connection.recvmsg(
                min(length, 65536), socket.CMSG_SPACE(4 * 4), socket.MSG_CMSG_CLOEXEC
            )
            return data, ancillary
        except BlockingIOError:
            await readable(loop, connection)


async def readable(loop: asyncio.AbstractEventLoop, connection: socket.socket) -> None:
    """Waits until there is something to read."""
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(connection, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(connection)


def _addresses(previous: Mapping[str, Any]) -> tuple[str, ...]:
    """The pod's addresses in prevResult: those of an interface inside the sandbox, or of no named interface."""
    interfaces = previous.get("interfaces")
    found = []
    for entry in previous.get("ips") or ():
        if not isinstance(entry, dict) or not isinstance(entry.get("address"), str):
            continue
        index = entry.get("interface")
        if isinstance(index, int) and isinstance(interfaces, list) and 0 <= index < len(interfaces):
            interface = interfaces[index]
            if isinstance(interface, dict) and not interface.get("sandbox"):
                continue
        found.append(entry["address"].partition("/")[0])
    return tuple(found)


def _ip_entry(entry: Mapping[str, Any], version: str) -> dict[str, Any]:
    """An entry of `ips`; `version` (4 or 6) belongs to it before 1.0.0 and not after."""
    converted = {key: value for key, value in entry.items() if key != "version"}
    if version < "1.0.0":
        converted["version"] = "6" if ":" in str(entry.get("address", "")) else "4"
    return converted
