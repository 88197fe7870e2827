"""The host of the engine: decodes commands, calls the C engine, answers. No connection of a pod ever waits for this.

One thread: poll() over the listening socket, the controller's connection and a wake-up fd for signals. The C engine has
threads of its own, which never take the GIL. What the host remembers of a pod is what HELLO must tell a new agent. It
stays small: nothing of weight is imported (no asyncio, ssl, grpc), and Python refers to a key only while IDENTITY_SET
is worked on: what it was received into and what the engine was handed is overwritten, what json made of it is freed.
"""

import argparse
import binascii
import contextlib
import ctypes
import errno
import fcntl
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sidestep.engine import channel as endpoint
from sidestep.wire import channel

WORKERS_MAX = 4
REPORT_BYTES = 24 * 1024
AUTHZ_BYTES = 60 * 1024
POLL_MS = 1000
NUMBER_MAX = 2**64 - 1
TEXT_MAX = 4096
ADDRESSES_MAX = 16
SHUTDOWN_MAX_S = 3600
DUMPS = ("connections", "tunnels", "pods", "workloads", "services", "policies", "identities", "denials")
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_PR_SET_DUMPABLE = 4


class CommandError(Exception):
    """A command that was not carried out; the message goes into the reply."""


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod as HELLO tells of it."""

    uid: str
    netns_cookie: int
    netns_ino: int
    mode: str
    ports: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Identity:
    """An identity as HELLO tells of it. `not_after`: seconds since the epoch; `serial`: of the leaf, hexadecimal."""

    not_after: int
    serial: str


@dataclass(slots=True)
class Answer:
    """What a command gives back: the reply's body, and memfds that are closed once they were sent."""

    body: dict[str, object]
    fds: list[int]


Body = Mapping[str, Any]


def say(line: str) -> None:
    """One line on stderr, unless its reader stalls: then it is lost, for nothing may wait for a log."""
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    if poll.poll(0):
        with contextlib.suppress(OSError):
            os.write(2, f"sidestep engine: {line[:2000]}\n".encode("utf-8", "replace"))


class Host:
    """Owns the C engine and what it was told. `close` resets what is open."""

    def __init__(self, workers: int, pod_budget: int, engine_budget: int, log_fd: int) -> None:
        from sidestep import _tunnel

        self._ffi, self._lib = _tunnel.ffi, _tunnel.lib
        self._generation = os.urandom(8).hex()
        self._started = int(time.time())
        self._workers = workers or min(len(os.sched_getaffinity(0)), WORKERS_MAX)
        self._pods: dict[str, Pod] = {}
        self._identities: dict[str, Identity] = {}
        self._settings: dict[str, object] = {}
        self.shutdown_at: float | None = None
        config = self._ffi.new("struct tunnel_config *")
        config.workers = self._workers
        config.pod_budget, config.engine_budget, config.log_fd = pod_budget, engine_budget, log_fd
        out = self._ffi.new("struct tunnel **")
        self._check("start the engine", self._lib.tunnel_new(out, config))
        self._tunnel = out[0]
        self._commands: dict[int, Callable[[Body, list[int]], Answer]] = {
            channel.HELLO: self._hello,
            channel.SETTINGS: self._set_settings,
            channel.POD_ADD: self._pod_add,
            channel.POD_MODE: self._pod_mode,
            channel.POD_DEL: self._pod_del,
            channel.IDENTITY_SET: self._identity_set,
            channel.IDENTITY_DEL: self._identity_del,
            channel.APPLY: self._apply,
            channel.METRICS: self._metrics,
            channel.DUMP: self._dump,
            channel.POD_STATS: self._pod_stats,
            channel.SHUTDOWN: self._shutdown,
            channel.AUTHZ: self._authz,
        }
        self._fds = {channel.POD_ADD: (3, 8), channel.APPLY: (1,)}

    def close(self) -> None:
        """Ends the engine: every connection is reset, every listener closed."""
        self._lib.tunnel_free(self._tunnel)

    def execute(self, kind: int, body: Body, fds: list[int]) -> Answer:
        """One command. The fds stay the caller's, those of the answer become its. Raises CommandError."""
        command = self._commands.get(kind)
        if command is None:
            raise CommandError(f"command {kind} is not known")
        wanted = self._fds.get(kind, (0,))
        if len(fds) not in wanted:
            numbers = " or ".join(map(str, wanted))
            raise CommandError(f"{channel.NAMES[kind]} takes {numbers} file descriptors, not {len(fds)}")
        return command(body, fds)

    def idle(self) -> bool:
        """No pod has an open connection."""
        try:
            return all(self._stats(uid)["connections"] == 0 for uid in self._pods)
        except CommandError:
            return False

    def _check(self, what: str, result: int) -> None:
        if result < 0:
            raise CommandError(f"{what}: {os.strerror(-result)}")

    def _hello(self, body: Body, _: list[int]) -> Answer:
        low, high = _number(body, "min"), _number(body, "max")
        if not low <= channel.VERSION <= high:
            raise CommandError(f"no common version: this engine speaks {channel.VERSION}")
        reply: dict[str, object] = {
            "version": channel.VERSION,
            "engine": {
                "pid": os.getpid(),
                "generation": self._generation,
                "started": self._started,
                "workers": self._workers,
                "openssl": self._ffi.string(self._lib.tunnel_openssl_version()).decode(),
            },
            "pods": [
                {
                    "uid": pod.uid,
                    "netns_cookie": pod.netns_cookie,
                    "netns_ino": pod.netns_ino,
                    "mode": pod.mode,
                    "ports": _ports(pod.ports),
                    **self._stats(pod.uid),
                }
                for pod in self._pods.values()
            ],
            "identities": [
                {"id": uri, "not_after": each.not_after, "serial": each.serial}
                for uri, each in self._identities.items()
            ],
            "settings": self._settings,
        }
        return Answer(reply, [self._memfd("versions", lambda fd: self._lib.tunnel_dump(self._tunnel, b"versions", fd))])

    def _set_settings(self, body: Body, _: list[int]) -> Answer:
        same_node, unknown = _text(body, "same_node", "direct"), _text(body, "unknown", "hold")
        if same_node not in ("direct", "native", "mtls"):
            raise CommandError(f"same_node is direct, native or mtls, not {same_node!r}")
        if unknown not in ("hold", "pass"):
            raise CommandError(f"unknown is hold or pass, not {unknown!r}")
        cidrs = _texts(body, "cluster_cidrs")
        keep: list[Any] = []

        def text(value: str) -> Any:
            keep.append(self._ffi.new("char[]", value.encode()))
            return keep[-1]

        settings = self._ffi.new("struct tunnel_settings *")
        settings.network = text(_text(body, "network", ""))
        settings.cluster_id = text(_text(body, "cluster_id", "Kubernetes"))
        settings.trust_domain = text(_text(body, "trust_domain", "cluster.local"))
        settings.root_namespace = text(_text(body, "root_namespace", "istio-system"))
        settings.node = text(_text(body, "node", ""))
        settings.cluster_cidrs = text(",".join(cidrs))
        settings.same_node_mtls, settings.same_node_native = same_node == "mtls", same_node == "native"
        settings.unknown_pass = unknown == "pass"
        self._check("settings", self._lib.tunnel_settings(self._tunnel, settings))
        self._settings = {
            "network": _text(body, "network", ""),
            "cluster_id": _text(body, "cluster_id", "Kubernetes"),
            "trust_domain": _text(body, "trust_domain", "cluster.local"),
            "root_namespace": _text(body, "root_namespace", "istio-system"),
            "node": _text(body, "node", ""),
            "cluster_cidrs": cidrs,
            "same_node": same_node,
            "unknown": unknown,
        }
        return Answer({}, [])

    def _pod_add(self, body: Body, fds: list[int]) -> Answer:
        uid = _text(body, "uid")
        addresses = _texts(body, "addresses")
        if len(addresses) > ADDRESSES_MAX or not all(map(_is_address, addresses)):
            raise CommandError(f"addresses of pod {uid}: not a list of at most {ADDRESSES_MAX} IP addresses")
        texts = {
            "uid": uid,
            "namespace_": _text(body, "namespace"),
            "name": _text(body, "name"),
            "service_account": _text(body, "service_account"),
            "workload": _text(body, "workload"),
            "identity": _text(body, "identity"),
            "addresses": ",".join(addresses),
        }
        keep = {name: self._ffi.new("char[]", value.encode()) for name, value in texts.items()}
        pod = self._ffi.new("struct tunnel_pod *")
        for name, value in keep.items():
            setattr(pod, name, value)
        pod.netns_cookie, pod.netns_ino = _number(body, "netns_cookie"), _number(body, "netns_ino")
        ports = self._ffi.new("struct tunnel_ports *")
        vouch = self._ffi.new("int[]", fds[3:]) if fds[3:] else self._ffi.NULL
        result = self._lib.tunnel_pod_add(self._tunnel, pod, fds[0], fds[1], fds[2], vouch, ports)
        self._check(f"add pod {uid}", result)
        was = self._pods.get(uid)
        mode = was.mode if was and was.netns_cookie == pod.netns_cookie else "serving"
        found = (int(ports.outbound), int(ports.inbound), int(ports.hbone))
        self._pods[uid] = Pod(uid, int(pod.netns_cookie), int(pod.netns_ino), mode, found)
        return Answer({"ports": _ports(found)}, [])

    def _pod_mode(self, body: Body, _: list[int]) -> Answer:
        uid, mode = _text(body, "uid"), _text(body, "mode")
        if mode not in ("serving", "draining"):
            raise CommandError(f"mode is serving or draining, not {mode!r}")
        number = self._lib.TUNNEL_DRAINING if mode == "draining" else self._lib.TUNNEL_SERVING
        self._check(f"mode of pod {uid}", self._lib.tunnel_pod_mode(self._tunnel, uid.encode(), number))
        if uid in self._pods:
            self._pods[uid] = replace(self._pods[uid], mode=mode)
        return Answer({}, [])

    def _pod_del(self, body: Body, _: list[int]) -> Answer:
        uid = _text(body, "uid")
        if uid in self._pods:
            self._check(f"remove pod {uid}", self._lib.tunnel_pod_del(self._tunnel, uid.encode()))
            del self._pods[uid]
        return Answer({}, [])

    def _stats(self, uid: str) -> dict[str, object]:
        stats = self._ffi.new("struct tunnel_pod_stats *")
        self._check(f"pod {uid}", self._lib.tunnel_pod_stats(self._tunnel, uid.encode(), stats))
        return {
            "connections": int(stats.connections),
            "streams_quiet_ms": int(stats.quiet_ms),
            "held": int(stats.held),
        }

    def _pod_stats(self, body: Body, _: list[int]) -> Answer:
        return Answer(self._stats(_text(body, "uid")), [])

    def _identity_set(self, body: Body, _: list[int]) -> Answer:
        uri, chain = _text(body, "identity"), _text(body, "chain_pem", limit=channel.PACKET_MAX)
        roots = _text(body, "roots_pem", limit=channel.PACKET_MAX)
        key = self._ffi.new("char[]", _text(body, "key_pem", limit=channel.PACKET_MAX).encode())
        not_after = self._ffi.new("int64_t *")
        try:
            result = self._lib.tunnel_identity_set(
                self._tunnel, uri.encode(), key, chain.encode(), roots.encode(), not_after
            )
        finally:
            self._ffi.memmove(key, bytes(self._ffi.sizeof(key)), self._ffi.sizeof(key))
        self._check(f"identity {uri}", result)
        self._identities[uri] = Identity(int(not_after[0]), _serial(chain))
        return Answer({"not_after": int(not_after[0])}, [])

    def _identity_del(self, body: Body, _: list[int]) -> Answer:
        uri = _text(body, "identity")
        if uri in self._identities:
            self._check(f"remove {uri}", self._lib.tunnel_identity_del(self._tunnel, uri.encode()))
            del self._identities[uri]
        return Answer({}, [])

    def _apply(self, body: Body, fds: list[int]) -> Answer:
        size = _number(body, "size")
        if os.fstat(fds[0]).st_size != size:
            raise CommandError(f"the batch has {os.fstat(fds[0]).st_size} bytes, not {size}")
        report = self._ffi.new("char[]", REPORT_BYTES)
        self._check("apply", self._lib.tunnel_apply(self._tunnel, fds[0], report, REPORT_BYTES))
        rejected = []
        for line in self._ffi.string(report).decode("utf-8", "replace").splitlines():
            name, _, reason = line.partition(": ")
            rejected.append({"name": name, "reason": reason})
        if body.get("whole") is True:
            self._check("apply", self._lib.tunnel_whole(self._tunnel))
        counts = self._ffi.new("struct tunnel_counts *")
        self._lib.tunnel_counts(self._tunnel, counts)
        reply: dict[str, object] = {
            "rejected": rejected,
            "workloads": int(counts.workloads),
            "services": int(counts.services),
            "policies": int(counts.policies),
        }
        return Answer(reply, [])

    def _metrics(self, _: Body, __: list[int]) -> Answer:
        return Answer({}, [self._memfd("metrics", lambda fd: self._lib.tunnel_metrics(self._tunnel, fd))])

    def _dump(self, body: Body, _: list[int]) -> Answer:
        what = _text(body, "what")
        if what not in DUMPS:
            raise CommandError(f"what is one of {', '.join(DUMPS)}, not {what!r}")
        return Answer({}, [self._memfd(what, lambda fd: self._lib.tunnel_dump(self._tunnel, what.encode(), fd))])

    def _authz(self, body: Body, _: list[int]) -> Answer:
        identity, source, destination = _text(body, "identity", ""), _text(body, "source"), _text(body, "destination")
        out = self._ffi.new("char[]", AUTHZ_BYTES)
        result = self._lib.tunnel_authz(
            self._tunnel, identity.encode(), source.encode(), destination.encode(), out, AUTHZ_BYTES
        )
        if result == -errno.EINVAL:
            raise CommandError(
                "identity is a SPIFFE URI or empty, source IP or IP:PORT, destination IP:PORT, not "
                f"{identity!r}, {source!r}, {destination!r}"
            )
        self._check("authz", result)
        return Answer(json.loads(self._ffi.string(out)), [])

    def _shutdown(self, body: Body, _: list[int]) -> Answer:
        self.shutdown_at = time.monotonic() + min(_number(body, "drain_s"), SHUTDOWN_MAX_S)
        return Answer({}, [])

    def _memfd(self, what: str, write: Callable[[int], int]) -> int:
        fd = os.memfd_create("sidestep-reply", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            self._check(f"write {what}", write(fd))
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        except BaseException:
            os.close(fd)
            raise
        return fd


def _ports(ports: tuple[int, int, int]) -> dict[str, int]:
    return {"outbound": ports[0], "inbound": ports[1], "hbone": ports[2]}


def _text(body: Body, name: str, otherwise: str | None = None, limit: int = TEXT_MAX) -> str:
    value = body.get(name, otherwise)
    if not isinstance(value, str) or len(value) > limit or "\0" in value:
        raise CommandError(f"{name} must be text of at most {limit} characters")
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate from a \ud800 escape
        raise CommandError(f"{name} is not text") from None
    if not value and otherwise is None:
        raise CommandError(f"{name} is missing")
    return value


def _texts(body: Body, name: str) -> list[str]:
    value = body.get(name, [])
    if not isinstance(value, list) or len(value) > 1024:
        raise CommandError(f"{name} must be a list of text")
    found = [_text({name: each}, name) for each in value]
    if any("," in each for each in found):
        raise CommandError(f"{name}: a comma in an element")
    return found


def _number(body: Body, name: str) -> int:
    value = body.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= NUMBER_MAX:
        raise CommandError(f"{name} must be a whole number from 0 to 2^64 - 1")
    return value


def _is_address(text: str) -> bool:
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            socket.inet_pton(family, text)
            return True
    return False


def _serial(chain_pem: str) -> str:
    """Serial number of the first certificate, hexadecimal; "" when not found (the engine has checked the rest)."""
    _, _, rest = chain_pem.partition("-----BEGIN CERTIFICATE-----")
    text, _, _ = rest.partition("-----END CERTIFICATE-----")
    with contextlib.suppress(binascii.Error, IndexError):
        der = binascii.a2b_base64(text)
        at = _content(der, _content(der, 0))  # Certificate, TBSCertificate
        if der[at] == 0xA0:  # version
            at = _content(der, at) + _length(der, at)
        if der[at] == 0x02:
            return der[_content(der, at) : _content(der, at) + _length(der, at)].hex()
    return ""


def _content(der: bytes, at: int) -> int:
    return at + 2 + (der[at + 1] & 0x7F if der[at + 1] & 0x80 else 0)


def _length(der: bytes, at: int) -> int:
    first = der[at + 1]
    return int.from_bytes(der[at + 2 : at + 2 + (first & 0x7F)], "big") if first & 0x80 else first


class Server:
    """The loop: one controller at a time, until a signal or SHUTDOWN."""

    def __init__(self, host: Host, listener: socket.socket) -> None:
        self._host = host
        self._listener = listener
        self._controller: endpoint.Connection | None = None
        self._ready_fd = _ready_fd()
        self._wake, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._stopped = False
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, *_: object) -> None:
        self._stopped = True

    def run(self) -> None:
        """Serves until told to stop."""
        while not self._stopped and not self._drained():
            poll = select.poll()
            poll.register(self._listener, select.POLLIN)
            poll.register(self._wake, select.POLLIN)
            if self._controller is not None:
                poll.register(self._controller, select.POLLIN)
            for fd, _ in poll.poll(POLL_MS if self._host.shutdown_at is not None else None):
                if fd == self._wake:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wake, 4096)
                elif fd == self._listener.fileno():
                    self._accept()
                elif self._controller is not None and fd == self._controller.fileno():
                    self._command(self._controller)

    def _drained(self) -> bool:
        end = self._host.shutdown_at
        return end is not None and (time.monotonic() >= end or self._host.idle())

    def _accept(self) -> None:
        connection = endpoint.accept(self._listener)
        if connection is None:
            return
        if self._controller is not None and not self._controller.dead():
            with contextlib.suppress(endpoint.Disconnected):
                connection.reply(0, 0, {"ok": False, "error": "busy"}, [])
            connection.close()
            return
        self._drop("another one came")
        self._controller = connection

    def _drop(self, why: str) -> None:
        if self._controller is not None:
            self._controller.close()
            self._controller = None
            say(f"the controller is gone ({why}); serving on")

    def _command(self, connection: endpoint.Connection) -> None:
        try:
            with connection.receive() as request:
                answer = self._answer(connection, request)
                try:
                    self._reply(connection, request, answer)
                finally:
                    endpoint.close_all(answer.fds)
        except endpoint.Disconnected as err:
            self._drop(str(err))

    def _reply(self, connection: endpoint.Connection, request: endpoint.Request, answer: Answer) -> None:
        # Before the answer: whoever has read that may kill us, and the supervisor must know by then that we came up.
        if request.kind == channel.HELLO and connection.greeted and self._ready_fd >= 0:
            os.write(self._ready_fd, b"1")
            os.close(self._ready_fd)
            self._ready_fd = -1
        try:
            connection.reply(request.kind, request.sequence, answer.body, answer.fds)
        except channel.PacketError as err:
            connection.reply(
                request.kind, request.sequence, {"ok": False, "error": f"the reply does not fit: {err}"}, []
            )

    def _answer(self, connection: endpoint.Connection, request: endpoint.Request) -> Answer:
        if request.packet is None:
            return Answer({"ok": False, "error": request.error}, [])
        if not connection.greeted and request.kind != channel.HELLO:
            return Answer({"ok": False, "error": "the first command must be HELLO"}, [])
        try:
            answer = self._host.execute(request.kind, request.packet.body, request.fds)
        except CommandError as err:
            return Answer({"ok": False, "error": str(err)}, [])
        except Exception as err:  # a bug: the command failed, the traffic must go on
            say(f"command {channel.NAMES.get(request.kind, request.kind)} failed: {err!r}")
            return Answer({"ok": False, "error": f"internal error: {type(err).__name__}"}, [])
        connection.greeted = True
        answer.body = {"ok": True, **answer.body}
        return answer


def _ready_fd() -> int:
    """The supervisor's fd that is told of the first HELLO (tunnel/supervise.c), or -1."""
    text = os.environ.pop("SIDESTEP_READY_FD", "")
    if not text.isdigit():
        return -1
    try:
        os.set_inheritable(int(text), False)
    except OSError:
        return -1
    return int(text)


def _harden() -> None:
    """No core, no ptrace, no /proc/PID/mem for others: the engine holds keys. And as many fds as we may have."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0):
        raise CommandError(f"prctl(PR_SET_DUMPABLE): {os.strerror(ctypes.get_errno())}")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def add_parser(subparsers: Any) -> None:
    """The command line of `sidestep engine`."""
    parser = subparsers.add_parser("engine", help="the engine's process: carries the traffic of a node's pods")
    parser.add_argument(
        "--socket", required=True, metavar="PATH", help="where the agent finds it; the directory must be 0700"
    )
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="threads (usual: one per CPU, at most 4)")
    parser.add_argument("--pod-budget-mib", type=int, default=64, metavar="N", help="bytes buffered for one pod (64)")
    parser.add_argument("--engine-budget-mib", type=int, default=256, metavar="N", help="bytes buffered in all (256)")


def run(args: argparse.Namespace) -> int:
    """Serves until SIGTERM or SHUTDOWN. Returns 0 then, 1 when it could not start."""
    if not 0 <= args.workers <= 64 or args.pod_budget_mib < 1 or args.engine_budget_mib < 1:
        print("sidestep engine: --workers is 0 to 64, budgets are at least 1 MiB", file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        print(
            "sidestep engine: must run as root: it opens sockets inside the pods' network namespaces", file=sys.stderr
        )
        return 1
    # Whoever can connect can also stop it: a signal waits until the loop has its handlers.
    signals = (signal.SIGTERM, signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        _harden()
        listener = endpoint.listen(args.socket)
        mine = os.stat(args.socket).st_ino
        host = Host(args.workers, args.pod_budget_mib << 20, args.engine_budget_mib << 20, 1)
    except (CommandError, endpoint.ChannelError, OSError, ImportError) as err:
        print(f"sidestep engine: {err}", file=sys.stderr)
        return 1
    try:
        server = Server(host, listener)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        server.run()
    finally:
        with contextlib.suppress(OSError):
            if os.stat(args.socket).st_ino == mine:
                os.unlink(args.socket)
        listener.close()
        host.close()
    return 0
