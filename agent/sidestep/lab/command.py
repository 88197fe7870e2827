"""`sidestep lab`: a cluster on this machine. Reads the command line; every verb takes --name.

Exit status: 0 done, 1 failed (one line on stderr says what and what to do), 2 wrong usage; `exec` has the command's.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from sidestep.lab import keeper
from sidestep.lab.cluster import LABS, NETNS_DIR, Cluster, LabError, Node, cgroup2, check_name, load
from sidestep.lab.sandbox import SandboxError, enter


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `lab` and its verbs."""
    lab = subparsers.add_parser("lab", help="a cluster on this machine, in network namespaces")
    verbs = lab.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        parser = verbs.add_parser(name, help=text)
        parser.add_argument("--name", default="lab", help="which lab (default: lab)")
        return parser

    up = verb("up", "make a lab and wait until its pods are ready")
    up.add_argument("--nodes", type=int, default=2, metavar="N", help="how many nodes (default: 2)")
    up.add_argument("--plain", action="store_true", help="the same pods and addresses without the mesh")
    up.add_argument(
        "-f", "--file", action="append", default=[], metavar="PATH", help="manifest or directory; repeatable"
    )
    up.add_argument("--timeout", type=float, default=120, metavar="S", help="how long pods may take (default: 120)")
    up.add_argument(
        "--same-node", choices=("direct", "native", "mtls"),
        help="between pods of a node: by the engine (direct), by the kernel once allowed (native), with TLS (mtls)",
    )  # fmt: skip
    up.add_argument(
        "--agent-arg", action="append", default=[], metavar="ARG", help="for every agent: --agent-arg=--x=y"
    )
    up.add_argument("--engine-arg", action="append", default=[], metavar="ARG", help="for every engine")
    up.add_argument("--control-arg", action="append", default=[], metavar="ARG", help="for the control plane")
    run_in = verb("exec", "run a command in a pod, or on a node (--node)")
    run_in.add_argument("--node", metavar="NODE", help="on a node instead of in a pod")
    run_in.add_argument("-c", "--container", metavar="NAME", help="which container (default: the first)")
    run_in.add_argument("words", nargs="+", metavar="NAMESPACE/POD -- COMMAND", help="with --node only: -- COMMAND")
    logs = verb("logs", "what a pod's container printed")
    logs.add_argument("pod", metavar="NAMESPACE/POD")
    logs.add_argument("-c", "--container", metavar="NAME", help="which container (default: the first)")
    logs.add_argument("--follow", action="store_true", help="go on printing")
    verb("kubeconfig", "the path for kubectl")
    status = verb("status", "nodes, processes and pods")
    status.add_argument("--json", action="store_true", help="for programs")
    verb("down", "take everything away")


def run(args: argparse.Namespace) -> int:
    """Runs a verb."""
    verbs = {
        "up": _up, "exec": _exec, "logs": _logs, "kubeconfig": _kubeconfig, "status": _status, "down": _down,
    }  # fmt: skip
    try:
        return verbs[args.verb](args)
    except (LabError, SandboxError) as error:
        print(f"sidestep lab: {error}", file=sys.stderr)
        return 1


def _need_root() -> None:
    if os.geteuid() != 0:
        raise LabError("needs root: run it with sudo")


def _up(args: argparse.Namespace) -> int:
    from sidestep.lab import manifests, up

    check_name(args.name)
    found = manifests.read(args.file)
    same_node = [f"--same-node={args.same_node}"] if args.same_node else []
    return up.up(
        args.name, args.nodes, args.plain, found, timeout_s=args.timeout,
        extra={"agent": [*same_node, *args.agent_arg], "engine": args.engine_arg, "control": args.control_arg},
    )  # fmt: skip


def _down(args: argparse.Namespace) -> int:
    from sidestep.lab import down

    _need_root()
    check_name(args.name)
    if not down.exists(args.name):
        print(f"sidestep lab: there is no lab {args.name!r}", file=sys.stderr)
        return 0
    left = down.down(args.name)
    for line in left:
        print(f"sidestep lab: still there: {line}", file=sys.stderr)
    return 1 if left else 0


def _kubeconfig(args: argparse.Namespace) -> int:
    print(load(args.name).kubeconfig)
    return 0


# -- pods --------------------------------------------------------------------------------------------------------------
def _containers(cluster: Cluster, pod: str) -> tuple[Node, list[Path]]:
    """A pod's node and its containers' directories, the first container first. Raises LabError."""
    namespace, slash, name = pod.partition("/")
    if not slash or not namespace or not name:
        raise LabError(f"{pod!r} is not NAMESPACE/POD")
    found = []
    for node in cluster.nodes:
        for path in node.pods_dir.glob("*/name"):
            try:
                if path.read_text().strip() == pod:
                    containers = [entry.parent for entry in path.parent.glob("*/enter.json")]
                    found.append((path.stat().st_mtime, node, sorted(containers, key=_order)))
            except OSError:
                continue
    if not found:
        raise LabError(
            f"there is no pod {pod} running in lab {cluster.name}: `sidestep lab status --name {cluster.name}`"
        )
    _, node, containers = max(found, key=lambda item: item[0])
    return node, containers


def _order(directory: Path) -> float:
    return (directory / "root").stat().st_ctime


def _container(cluster: Cluster, pod: str, name: str | None) -> Path:
    _, containers = _containers(cluster, pod)
    if name is None and containers:
        return containers[0]
    for directory in containers:
        if directory.name == name:
            return directory
    known = ", ".join(directory.name for directory in containers)
    raise LabError(f"pod {pod} has no running container{f' {name!r}; it has {known}' if name else ''}")


def _exec(args: argparse.Namespace) -> int:
    _need_root()
    cluster = load(args.name)
    sys.stdout.flush()
    if args.node:
        node = cluster.node(args.node)
        join = cgroup2() / cluster.cgroup_name / "exec" / "cgroup.procs"
        try:
            join.write_text("0")
            os.execvp("nsenter", ["nsenter", f"--net={NETNS_DIR / node.netns}", "--", *args.words])
        except OSError as error:
            raise LabError(f"cannot run on {node.name}: {error}") from None
    pod, *command = args.words
    if not command:
        raise LabError("what shall run? sidestep lab exec NAMESPACE/POD -- COMMAND")
    argv, environment = enter(_container(cluster, pod, args.container), command)
    terminal = {"TERM": os.environ["TERM"]} if "TERM" in os.environ else {}
    os.execve(argv[0], argv, environment | terminal)


def _logs(args: argparse.Namespace) -> int:
    cluster = load(args.name)
    log = _container(cluster, args.pod, args.container) / "log"
    out = sys.stdout.buffer
    old = log.with_name("log.old")
    if old.exists():
        out.write(old.read_bytes())
    try:
        with open(log, "rb") as file:
            ended = False
            while True:
                text = file.read(1 << 16)
                out.write(text)
                out.flush()
                if text:
                    continue
                if ended or not args.follow:
                    return 0
                ended = not log.exists()  # the pod is gone: read what it said last
                if not ended:
                    time.sleep(0.1)
                    if os.fstat(file.fileno()).st_size < file.tell():
                        file.seek(0)  # the log was cut
    except FileNotFoundError:
        raise LabError(f"pod {args.pod} has printed nothing yet") from None


# -- status ------------------------------------------------------------------------------------------------------------
def _process(cluster: Cluster, name: str) -> dict[str, Any]:
    found = keeper.running(cluster.state, name)
    if found is None:
        return {"pid": 0, "alive": False, "restarts": 0}
    pid = found.pid
    if name.endswith("-engine"):
        # The supervisor's child is the engine; it has a new pid after each restart.
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:
            children = []
        return {"pid": int(children[0]) if children else 0, "alive": bool(children), "restarts": found.restarts,
                "supervisor": pid}  # fmt: skip
    return {"pid": pid, "alive": found.alive, "restarts": found.restarts}


async def _pods(cluster: Cluster) -> list[dict[str, Any]]:
    from sidestep.kube.client import KubeClient
    from sidestep.lab import podspec
    from sidestep.lab.up import not_ready

    async with KubeClient.from_config(cluster.kubeconfig) as client:
        items = (await client.list("/api/v1/pods"))["items"]
    found = []
    for pod in items:
        meta, status = pod["metadata"], pod.get("status") or {}
        if podspec.MIRROR_ANNOTATION in (meta.get("annotations") or {}):
            continue
        why = not_ready(pod)
        found.append(
            {
                "namespace": meta["namespace"],
                "name": meta["name"],
                "uid": meta["uid"],
                "node": pod["spec"].get("nodeName", ""),
                "phase": status.get("phase", "Pending"),
                "ready": not why and status.get("phase") == "Running",
                "ips": [entry["ip"] for entry in status.get("podIPs") or ()],
                "restarts": sum(item.get("restartCount", 0) for item in status.get("containerStatuses") or ()),
                "message": why,
            }
        )
    return found


def describe(cluster: Cluster) -> dict[str, Any]:
    """Everything that `lab status` shows; `api_error` is there when the API does not answer."""
    central = ["keeper", "api", "dns", *([] if cluster.plain else ["control"])]
    local = ["kubelet", *([] if cluster.plain else ["agent", "engine"])]
    answer: dict[str, Any] = {
        "name": cluster.name,
        "number": cluster.number,
        "plain": cluster.plain,
        "api": cluster.api_url,
        "kubeconfig": str(cluster.kubeconfig),
        "processes": {name: _process(cluster, name) for name in central},
        "nodes": [
            {
                "name": node.name,
                "netns": str(node.netns_path),
                "ips": [str(node.ip4), str(node.ip6)],
                "run_dir": str(node.run_dir),
                "bpf_dir": str(node.bpf_dir),
                "link": {"netns": str(node.netns_path), "interface": "eth0"},
                "processes": {name: _process(cluster, f"{node.name}-{name}") for name in local},
            }
            for node in cluster.nodes
        ],
        "pods": [],
    }
    from sidestep.kube.client import ConfigError, KubeError

    try:
        answer["pods"] = asyncio.run(_pods(cluster))
    except (KubeError, ConfigError) as error:
        answer["api_error"] = str(error)
    return answer


def _table(rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _status(args: argparse.Namespace) -> int:
    cluster = load(args.name)
    found = describe(cluster)
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    print(f"lab {found['name']}: {found['api']}, {cluster.range4}" + (", without the mesh" if found["plain"] else ""))
    rows = [["PROCESS", "WHERE", "PID", "STATE", "RESTARTS"]]
    places = [(cluster.netns, found["processes"])] + [(node["name"], node["processes"]) for node in found["nodes"]]
    for place, processes in places:
        for name, process in processes.items():
            state = "running" if process["alive"] else "not running"
            rows.append([name, place, str(process["pid"] or "-"), state, str(process["restarts"])])
    _table(rows)
    print()
    if "api_error" in found:
        print(f"pods: the API does not answer: {found['api_error']}")
        return 1
    rows = [["NAMESPACE", "POD", "NODE", "READY", "PHASE", "RESTARTS", "IPS", "WHY NOT READY"]]
    for pod in found["pods"]:
        ready = "yes" if pod["ready"] else "no"
        rows.append(
            [pod["namespace"], pod["name"], pod["node"] or "-", ready, pod["phase"], str(pod["restarts"]),
             ",".join(pod["ips"]) or "-", pod["message"][:120]]
        )  # fmt: skip
    _table(rows)
    return 0


def labs() -> list[str]:
    """Names of the labs of this machine."""
    return sorted(path.parent.name for path in LABS.glob("*/cluster.json"))
