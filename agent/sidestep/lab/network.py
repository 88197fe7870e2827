"""The lab's network: namespaces joined by veth, made and found by plain `ip`.

    host -- NAME-api ------ host  (NAME-cp) br0 -- node1 ------ eth0  (NAME-node1) -- veth... -- eth0 (pod)
                                            br0 -- node2 ------ eth0  (NAME-node2)

The link between the nodes is eth0 of a node's namespace: everything that pods of different nodes say to each other
crosses it and nothing else but the node's own traffic does. Duplicate address detection is off everywhere: it would
only delay each pod by a second.
"""

import ipaddress
import json
import os
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from sidestep.lab.cluster import MAX_NUMBER, NETNS_DIR, Cluster, LabError

_NODE_SYSCTLS = (
    "net.ipv4.ip_forward=1",
    "net.ipv6.conf.all.forwarding=1",
    "net.ipv6.conf.default.forwarding=1",
    "net.ipv4.conf.all.rp_filter=0",
    "net.ipv4.conf.default.rp_filter=0",
    *(no_dad := ("net.ipv6.conf.all.accept_dad=0", "net.ipv6.conf.default.accept_dad=0")),
)
POD_SYSCTLS = no_dad


def run(command: Sequence[str], *, stdin: str = "", timeout: float = 30) -> str:
    """Runs a tool, returns its stdout. Raises LabError with what it said."""
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout)
    except FileNotFoundError:
        raise LabError(f"{command[0]} is not installed: `make setup` installs what the lab needs") from None
    except subprocess.TimeoutExpired:
        raise LabError(f"{' '.join(command)}: not done within {timeout:.0f} s") from None
    if done.returncode != 0:
        raise LabError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _batch(netns: str, lines: Iterable[str]) -> None:
    run(["ip", *(["-n", netns] if netns else []), "-batch", "-"], stdin="\n".join(lines) + "\n")


def _sysctl(netns: str, settings: Iterable[str]) -> None:
    run(["nsenter", f"--net={NETNS_DIR / netns}", "sysctl", "-q", "-w", *settings])


def create(cluster: Cluster) -> None:
    """Makes namespaces, links, addresses and routes. Raises LabError; `remove` takes away what is there then."""
    run(["ip", "netns", "add", cluster.netns])
    _sysctl(cluster.netns, no_dad)
    lines = [
        "link set lo up",
        "link add br0 type bridge stp_state 0 mcast_snooping 0",
        f"address add {cluster.ip4}/24 dev br0",
        f"address add {cluster.ip6}/64 dev br0",
        "link set br0 up",
    ]
    for node in cluster.nodes:
        run(["ip", "netns", "add", node.netns])
        _sysctl(node.netns, _NODE_SYSCTLS)
        lines += [
            f"link add {node.name} type veth peer name eth0 netns {node.netns}",
            f"link set {node.name} master br0 up",
        ]
    _batch(cluster.netns, lines)
    for node in cluster.nodes:
        lines = [
            "link set lo up",
            f"address add {node.ip4}/24 dev eth0",
            f"address add {node.ip6}/64 dev eth0",
            "link set eth0 up",
        ]
        for other in cluster.nodes:
            if other != node:
                lines += [f"route add {other.pods4} via {other.ip4}", f"route add {other.pods6} via {other.ip6}"]
        # Cluster addresses never leave the node; without a route the node's own processes could not even try them.
        lines += [f"route add {cluster.services4} dev eth0", f"route add {cluster.services6} dev eth0"]
        _batch(node.netns, lines)
    # The control plane answers pods (DNS): they are behind their nodes.
    lines = []
    for node in cluster.nodes:
        lines += [f"route add {node.pods4} via {node.ip4}", f"route add {node.pods6} via {node.ip6}"]
    _batch(cluster.netns, lines)
    _batch(
        "",
        [
            f"link add {cluster.host_interface} type veth peer name host netns {cluster.netns}",
            f"address add {cluster.host_ip}/32 dev {cluster.host_interface}",
            f"link set {cluster.host_interface} up",
        ],
    )
    _batch(cluster.netns, ["link set host up", f"route add {cluster.host_ip}/32 dev host src {cluster.ip4}"])
    run(["ip", "route", "add", f"{cluster.ip4}/32", "dev", cluster.host_interface, "src", str(cluster.host_ip)])


def taken_numbers(labs: Path) -> set[int]:
    """Numbers of the labs there are, and those whose IPv4 range the machine itself uses."""
    taken = set()
    for path in labs.glob("*/cluster.json"):
        try:
            taken.add(int(json.loads(path.read_text())["number"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    used = []
    for route in json.loads(run(["ip", "-j", "-4", "route", "show", "table", "all"]) or "[]"):
        destination = route.get("dst", "")
        if destination in ("default", ""):
            continue
        try:
            used.append(ipaddress.IPv4Network(destination, strict=False))
        except ValueError:
            continue
    for number in range(1, MAX_NUMBER + 1):
        mine = Cluster("x", number, 1, True).range4
        # A route wider than a lab's range (10.0.0.0/8 of a company) is no conflict: the lab's own routes are longer.
        if any(mine.supernet_of(other) for other in used):
            taken.add(number)
    return taken


def remove(name: str, node_names: Iterable[str]) -> None:
    """Takes namespaces and links of the lab away; what is not there is no error."""
    for netns in (*(f"{name}-{node}" for node in node_names), f"{name}-cp"):
        path = NETNS_DIR / netns
        if path.exists():
            subprocess.run(["ip", "netns", "del", netns], capture_output=True, timeout=30)
        if path.exists():  # a file without a mount: `ip netns add` was killed
            path.unlink(missing_ok=True)
    if Path(f"/sys/class/net/{name}-api").exists():
        subprocess.run(["ip", "link", "del", f"{name}-api"], capture_output=True, timeout=30)


def netns_inode(path: Path) -> int:
    """The namespace's inode, 0 where there is none (a pin that lost its mount)."""
    try:
        status = os.stat(path)
    except OSError:
        return 0
    return status.st_ino if status.st_dev == os.stat("/proc/self/ns/net").st_dev else 0
