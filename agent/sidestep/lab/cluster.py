"""What a lab consists of, derived from its name, its number and how many nodes it has. Pure, but for `load` and `save`.

Every name, address and path of a lab is here and nowhere else, so that `lab down` can find what is to be taken away
from the name alone. A lab's number n (1 to 60) chooses its ranges:

    link     10.(128+n).0.0/24     fd5d:e57e:n::/64        .1 control plane and API, .(10+i) node i
    pods     10.(128+n).64.0/18    fd5d:e57e:n:100::/56    a /24 and a /64 of each node
    services 10.(128+n).128.0/20   fd5d:e57e:n:200::/112
    host     10.(128+n).255.1      the machine's end of the veth to the API
"""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path

LABS = Path("/run/sidestep/lab")
NETNS_DIR = Path("/run/netns")
BPFFS = Path("/sys/fs/bpf")
API_PORT = 6443
XDS_PORT = 15012
MAX_NODES = 16
MAX_NUMBER = 60
SYSTEM_NAMESPACE = "istio-system"
AGENT_ACCOUNT = "ztunnel"
DOMAIN = "cluster.local"
_NAME = re.compile(r"[a-z][a-z0-9]{0,10}")


class LabError(Exception):
    """What went wrong and what to do, in one line for people."""


def check_name(name: str) -> str:
    """Raises LabError where a name does not fit (it becomes part of interface names of at most 15 characters)."""
    if not _NAME.fullmatch(name):
        raise LabError(f"{name!r} cannot name a lab: up to 11 lower-case letters and digits, a letter first")
    return name


@dataclass(frozen=True, slots=True)
class Node:
    """Node `index` (from 1) of a lab."""

    lab: str
    number: int
    index: int

    @property
    def name(self) -> str:
        return f"node{self.index}"

    @property
    def netns(self) -> str:
        return f"{self.lab}-{self.name}"

    @property
    def netns_path(self) -> Path:
        return NETNS_DIR / self.netns

    @property
    def state(self) -> Path:
        return LABS / self.lab / self.name

    @property
    def run_dir(self) -> Path:
        """The agent's --run-dir: cni.sock and agent.sock."""
        return self.state / "agent"

    @property
    def engine_socket(self) -> Path:
        return self.state / "engine" / "engine.sock"

    @property
    def pod_netns_dir(self) -> Path:
        """Where the kubelet part pins the pods' namespaces, named by UID."""
        return self.state / "netns"

    @property
    def pods_dir(self) -> Path:
        return self.state / "pods"

    @property
    def token_file(self) -> Path:
        return self.state / "token"

    @property
    def bpf_dir(self) -> Path:
        return BPFFS / f"sidestep-{self.lab}-{self.name}"

    @property
    def cgroup(self) -> str:
        """Relative to the lab's cgroup."""
        return self.name

    @property
    def agent_pod(self) -> str:
        """Name of the API object that stands for the agent on this node."""
        return f"ztunnel-{self.name}"

    @property
    def ip4(self) -> IPv4Address:
        return IPv4Network(f"10.{128 + self.number}.0.0/24")[10 + self.index]

    @property
    def ip6(self) -> IPv6Address:
        return IPv6Network(f"fd5d:e57e:{self.number:x}::/64")[10 + self.index]

    @property
    def pods4(self) -> IPv4Network:
        return IPv4Network(f"10.{128 + self.number}.{64 + self.index}.0/24")

    @property
    def pods6(self) -> IPv6Network:
        return IPv6Network(f"fd5d:e57e:{self.number:x}:{0x100 + self.index:x}::/64")


@dataclass(frozen=True, slots=True)
class Cluster:
    """A lab. `plain`: no agent, no engine, no control plane, the chain without sidestep-cni."""

    name: str
    number: int
    nodes_count: int
    plain: bool

    @property
    def state(self) -> Path:
        return LABS / self.name

    @property
    def netns(self) -> str:
        """The control plane's."""
        return f"{self.name}-cp"

    @property
    def netns_path(self) -> Path:
        return NETNS_DIR / self.netns

    @property
    def nodes(self) -> tuple[Node, ...]:
        return tuple(Node(self.name, self.number, index + 1) for index in range(self.nodes_count))

    @property
    def host_interface(self) -> str:
        return f"{self.name}-api"

    @property
    def kubeconfig(self) -> Path:
        return self.state / "kubeconfig"

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    @property
    def cgroup_name(self) -> str:
        return f"sidestep-lab-{self.name}"

    @property
    def range4(self) -> IPv4Network:
        """Everything IPv4 of this lab."""
        return IPv4Network(f"10.{128 + self.number}.0.0/16")

    @property
    def ip4(self) -> IPv4Address:
        """Of the control plane, and of the API."""
        return IPv4Network(f"10.{128 + self.number}.0.0/24")[1]

    @property
    def ip6(self) -> IPv6Address:
        return IPv6Network(f"fd5d:e57e:{self.number:x}::/64")[1]

    @property
    def host_ip(self) -> IPv4Address:
        return IPv4Address(f"10.{128 + self.number}.255.1")

    @property
    def pods4(self) -> IPv4Network:
        return IPv4Network(f"10.{128 + self.number}.64.0/18")

    @property
    def pods6(self) -> IPv6Network:
        return IPv6Network(f"fd5d:e57e:{self.number:x}:100::/56")

    @property
    def services4(self) -> IPv4Network:
        return IPv4Network(f"10.{128 + self.number}.128.0/20")

    @property
    def services6(self) -> IPv6Network:
        return IPv6Network(f"fd5d:e57e:{self.number:x}:200::/112")

    @property
    def dns4(self) -> IPv4Address:
        """Cluster address of Service kube-system/kube-dns."""
        return self.services4[10]

    @property
    def dns6(self) -> IPv6Address:
        return self.services6[10]

    @property
    def api_url(self) -> str:
        return f"https://{self.ip4}:{API_PORT}"

    def node(self, name: str) -> Node:
        """A node by name. Raises LabError."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise LabError(f"lab {self.name} has no node {name!r}: it has {', '.join(node.name for node in self.nodes)}")

    def save(self) -> None:
        """Writes cluster.json; the first thing a lab has on disk."""
        fresh = self.state / ".cluster.json"
        fresh.write_text(json.dumps(asdict(self)) + "\n")
        os.replace(fresh, self.state / "cluster.json")


def load(name: str) -> Cluster:
    """The lab of that name. Raises LabError where there is none."""
    check_name(name)
    try:
        return Cluster(**json.loads((LABS / name / "cluster.json").read_text()))
    except (OSError, ValueError, TypeError):
        raise LabError(f"there is no lab {name!r}: `sidestep lab up --name {name} -f PATH` makes one") from None


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Only one command at a time makes or removes labs' directories. The lock's file goes with the last lab."""
    path = LABS.parent / "lab.lock"
    while True:
        LABS.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(path, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                if os.stat(path).st_ino != os.fstat(lock.fileno()).st_ino:
                    continue  # somebody removed it meanwhile: that lock excludes nobody
            except FileNotFoundError:
                continue
            LABS.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    LABS.rmdir()  # not when there is a lab
                    path.unlink()
                    LABS.parent.rmdir()
            return


def cgroup2() -> Path:
    """Where cgroup2 is mounted. Raises LabError where it is not."""
    with open("/proc/self/mounts") as mounts:
        for line in mounts:
            fields = line.split()
            if len(fields) > 2 and fields[2] == "cgroup2":
                return Path(fields[1])
    raise LabError("cgroup2 is not mounted: mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none $_")
