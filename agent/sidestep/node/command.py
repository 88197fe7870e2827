"""`sidestep agent`: reads the command line once, builds the parts, runs them in one TaskGroup.

Exit status: 0 after SIGTERM or SIGINT, 1 where it cannot start (one line says why and what to do). An engine, API or
control plane that cannot be reached is no reason to stop: it is waited for, and readiness names it. SIGHUP reads
--state-file again.
"""

import argparse
import asyncio
import ctypes
import ipaddress
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from sidestep.node.pods import EXCLUDED_NAMESPACES

# mallopt(3). Each thread's own arena would keep what it once used; and libbpf's buffers (copies of the kernel's BTF)
# would stay in the heap for good whenever something small came to lie behind them.
_M_ARENA_MAX, _M_MMAP_THRESHOLD = -8, -3
_LARGE = 256 * 1024


@dataclass(frozen=True, slots=True)
class Config:
    """The command line, checked. `control` None: --state-file is there instead."""

    node: str
    node_ip: str
    kubeconfig: Path | None
    engine_socket: Path
    run_dir: Path
    bpf_dir: Path
    control: str
    control_name: str
    cluster_cidrs: tuple[str, ...]
    trust_domain: str
    cluster_domain: str
    cluster_id: str
    network: str
    same_node: str
    unknown: str
    drain_quiet_s: float
    pod_netns_dir: Path | None
    kubelet_cgroup: Path | None
    token_file: Path | None
    state_file: Path | None
    system_namespace: str
    excluded: frozenset[str]


class StartError(Exception):
    """The agent cannot start; says what is wrong and what to do."""


class StateError(Exception):
    """The --state-file cannot be used; says which and why."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `agent` to the command."""
    parser = subparsers.add_parser("agent", help="the node agent: enrols pods, feeds the engine")
    add = parser.add_argument
    add("--node", required=True, metavar="NAME", help="this node's name in the API")
    add("--node-ip", required=True, metavar="IP", help="this node's address")
    add("--kubeconfig", type=Path, metavar="FILE", help="default: the pod's own service account")
    add("--engine-socket", type=Path, required=True, metavar="PATH", help="where sidestep engine listens")
    add("--run-dir", type=Path, required=True, metavar="DIR", help="sockets and records of the agent")
    add("--bpf-dir", type=Path, required=True, metavar="DIR", help="directory for pins, on a bpffs")
    add("--control", default="", metavar="HOST:PORT", help="control plane: xDS and certificate authority")
    add("--control-name", default="", metavar="NAME", help="name in the control plane's certificate (default: HOST)")
    add("--cluster-cidr", action="append", default=[], metavar="CIDR", help="a range of the cluster's addresses")
    add("--trust-domain", default="cluster.local", metavar="TD")
    add("--cluster-domain", default="cluster.local", metavar="DOMAIN", help="DNS suffix of Services")
    add("--cluster-id", default="Kubernetes", metavar="ID")
    add("--network", default="", metavar="N")
    add(
        "--same-node",
        choices=("direct", "native", "mtls"),
        default="native",
        help="between two pods of this node: by the kernel alone once a first connection was allowed (native, the "
        "default; destinations outside the mesh likewise), through the engine without TLS (direct), with TLS (mtls)",
    )
    add("--unknown", choices=("hold", "pass"), default="hold", help="cluster addresses without a record")
    add("--drain-quiet-s", type=float, default=10.0, metavar="S", help="quiet time before a released pod is let go")
    add("--pod-netns-dir", type=Path, metavar="DIR", help="where the runtime pins namespaces, named by pod UID")
    add(
        "--kubelet-cgroup", type=Path, metavar="DIR", help="the kubelet's cgroup2 directory (default: it is looked for)"
    )
    add("--token-file", type=Path, metavar="FILE", help="service account token for the control plane")
    add("--state-file", type=Path, metavar="FILE", help="workloads and services instead of a control plane (tests)")
    add(
        "--system-namespace",
        default="istio-system",
        metavar="NS",
        help="the root namespace: its policies are for the whole mesh, and it holds ConfigMap istio-ca-root-cert",
    )
    add("--exclude-namespace", action="append", default=[], metavar="NS", help="never enrolled, beside kube-system")


def config_of(args: argparse.Namespace) -> Config:
    """Checks the command line. Raises StartError."""
    for text in (args.node_ip, *(args.cluster_cidr)):
        try:
            ipaddress.ip_network(text, strict=False)
        except ValueError:
            raise StartError(f"{text!r} is no address (--node-ip, --cluster-cidr)") from None
    if bool(args.control) == bool(args.state_file):
        raise StartError("give one of --control HOST:PORT and --state-file FILE")
    if args.control and not args.control.rpartition(":")[2].isdigit():
        raise StartError(f"--control {args.control!r} is not HOST:PORT")
    if args.drain_quiet_s < 0:
        raise StartError("--drain-quiet-s must not be negative")
    return Config(
        node=args.node,
        node_ip=args.node_ip,
        kubeconfig=args.kubeconfig,
        engine_socket=args.engine_socket,
        run_dir=args.run_dir,
        bpf_dir=args.bpf_dir,
        control=args.control,
        control_name=args.control_name or args.control.rpartition(":")[0].strip("[]"),
        cluster_cidrs=tuple(args.cluster_cidr),
        trust_domain=args.trust_domain,
        cluster_domain=args.cluster_domain,
        cluster_id=args.cluster_id,
        network=args.network,
        same_node=args.same_node,
        unknown=args.unknown,
        drain_quiet_s=args.drain_quiet_s,
        pod_netns_dir=args.pod_netns_dir,
        kubelet_cgroup=args.kubelet_cgroup,
        token_file=args.token_file,
        state_file=args.state_file,
        system_namespace=args.system_namespace,
        excluded=EXCLUDED_NAMESPACES | frozenset(args.exclude_namespace),
    )


def run(args: argparse.Namespace) -> int:
    """Runs the agent until SIGTERM or SIGINT."""
    try:
        config = config_of(args)
        if os.geteuid() != 0:
            raise StartError("needs root: it enters the pods' network namespaces and loads BPF programs")
        # Addresses are taken before anything is changed: a second agent on a node stops here.
        listeners = _listeners()
    except StartError as err:
        print(f"sidestep agent: {err}", file=sys.stderr)
        return 1
    ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # else its threads write lines of their own into the log
    from sidestep.kube.client import ConfigError
    from sidestep.node.capture import CaptureError
    from sidestep.node.wiring import serve

    try:
        return asyncio.run(serve(config, listeners))
    except (StateError, ConfigError, CaptureError, OSError) as err:
        print(f"sidestep agent: {err}", file=sys.stderr)
        return 1


def _listeners() -> dict[str, socket.socket]:
    from sidestep.node import admin, httpd

    found: dict[str, socket.socket] = {}
    for name, host, port in (
        ("metrics", "", admin.METRICS_PORT),
        ("ready", "", admin.READY_PORT),
        ("admin", "127.0.0.1", admin.ADMIN_PORT),
    ):
        try:
            found[name] = httpd.bind(host, port)
        except OSError as err:
            for listener in found.values():
                listener.close()
            raise StartError(f"port {port} ({name}): {err.strerror}; does another agent run on this node?") from None
    return found
