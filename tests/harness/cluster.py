"""Two nodes without a cluster: pods behind one router, an engine process per node, capture, a fixed snapshot.

    with Nodes(tmp_path, ["client", "server"]) as nodes:   # "client" on node 0, "server" on node 1, and so on
    alternating nodes.publish()

The router's namespace has one interface per pod, so that each pod's link is a wire of its own that can be tapped.
"""

import ipaddress
import itertools
import os
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from sidestep._bpf import lib
from sidestep.lab.link import Tap
from sidestep.wire import batch, channel
from sidestep.wire.pb import workload_pb2 as pb
from tests.harness.engine import Client, EngineProcess
from tests.harness.netns import Pair, connect, listen, run
from tests.harness.pki import Authority, Leaf, spiffe
from tests.harness.stand_in import Capture

_SERIAL = itertools.count()
CLUSTER_CIDRS = ["10.0.0.0/8", "fd00::/8"]


@dataclass(slots=True)
class Pod:
    """One pod: its namespace and addresses, its node, what capture and engine have of it."""

    name: str
    node: int
    account: str
    number: int
    pair: Pair
    capture: Capture | None = None
    ports: dict[str, int] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return self.pair.pod_path

    @property
    def uid(self) -> str:
        return f"uid-{self.name}"

    @property
    def workload(self) -> str:
        return f"Kubernetes//Pod/default/{self.name}"

    @property
    def identity(self) -> str:
        return spiffe(self.account)

    def address(self, family: int = 4) -> str:
        return self.pair.pod_address(family)


class Nodes:
    """Pods and engines. `engines[i]` and `clients[i]` are None for a node that is played by somebody else."""

    def __init__(
        self,
        folder: Path,
        pods: list[str] | dict[str, int],
        *,
        workers: int = 1,
        same_node: str = "direct",
        engines: tuple[bool, bool] = (True, True),
        accounts: dict[str, str] | None = None,
        cidrs: list[str] | None = None,
    ) -> None:
        self.folder = folder
        self.authority = Authority()
        serial = next(_SERIAL)
        self.router = f"t-rt-{os.getpid()}-{serial}"
        self.accounts = accounts or {}
        self.same_node = same_node
        self.cidrs = CLUSTER_CIDRS if cidrs is None else cidrs
        self._workers = workers
        self._with = engines
        self._stack = ExitStack()
        self.engines: list[EngineProcess | None] = [None, None]
        self.clients: list[Client | None] = [None, None]
        places = pods if isinstance(pods, dict) else {name: i % 2 for i, name in enumerate(pods)}
        self.pods: dict[str, Pod] = {}
        for number, (name, node) in enumerate(places.items()):
            low = os.getpid() & 0xFF
            pair = Pair(
                pod=f"t-{name}-{os.getpid()}-{serial}",
                outside=self.router,
                pod4=f"10.{160 + number}.{low}.2",
                pod6=f"fd16:{0x1000 + number:x}:{0x1000 + low:x}::2",
                far4="",
                far6="",
            )
            self.pods[name] = Pod(name, node, self.accounts.get(name, name), number, pair)
        self._versions = 0

    def __getitem__(self, name: str) -> Pod:
        return self.pods[name]

    def __enter__(self) -> Self:
        try:
            self._network()
            for node in (0, 1):
                if self._with[node]:
                    self.start(node)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _network(self) -> None:
        run("ip", "netns", "add", self.router)
        self._stack.callback(run, "ip", "netns", "del", self.router, check=False)
        run("ip", "-n", self.router, "link", "set", "lo", "up")
        for setting in ("net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"):
            run("nsenter", f"--net=/run/netns/{self.router}", "sysctl", "-qw", setting)
        for pod in self.pods.values():
            name, port = pod.pair.pod, self.interface(pod)
            run("ip", "netns", "add", name)
            self._stack.callback(run, "ip", "netns", "del", name, check=False)
            run("ip", "link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", port, "netns", self.router)
            run("ip", "-n", name, "link", "set", "lo", "up")
            for namespace, device, end in ((name, "eth0", 2), (self.router, port, 1)):
                run("ip", "-n", namespace, "link", "set", device, "up")
                run("ip", "-n", namespace, "addr", "add", f"{pod.pair.pod4[:-1]}{end}/24", "dev", device)
                run("ip", "-n", namespace, "addr", "add", f"{pod.pair.pod6[:-1]}{end}/64", "dev", device, "nodad")
            run("ip", "-n", name, "route", "add", "default", "via", f"{pod.pair.pod4[:-1]}1")
            run("ip", "-n", name, "route", "add", "default", "via", f"{pod.pair.pod6[:-1]}1")

    def interface(self, pod: Pod) -> str:
        """The router's end of a pod's link."""
        return f"p{pod.number}"

    def tap(self, name: str) -> Tap:
        """A witness on a pod's link."""
        return Tap(f"/run/netns/{self.router}", self.interface(self.pods[name]))

    # -- engines -----------------------------------------------------------------------------------------------------
    def start(self, node: int, supervised: bool = False, pods: Collection[str] | None = None) -> None:
        """An engine for a node, with its pods captured and given to it (`pods`: only these)."""
        engine = EngineProcess(self.folder, self._workers, supervised=supervised)
        self._stack.enter_context(engine)
        self.engines[node] = engine
        for pod in self.pods.values():
            if pod.node == node and pod.capture is None and (pods is None or pod.name in pods):
                capture = pod.capture = Capture(pod.pair, door=self.same_node == "native")
                capture.prepare()
                self._stack.callback(capture.detach)
                capture.set_mode(lib.MODE_STRICT)
        self.feed(node, pods)

    def feed(self, node: int, pods: Collection[str] | None = None) -> None:
        """What an agent says to an engine that knows nothing."""
        engine = self.engines[node]
        assert engine is not None
        client = engine.client()
        self._stack.enter_context(client)
        self.clients[node] = client
        client.call(
            channel.SETTINGS,
            {
                "network": "",
                "cluster_id": "Kubernetes",
                "trust_domain": "cluster.local",
                "node": f"node{node}",
                "cluster_cidrs": self.cidrs,
                "same_node": self.same_node,
                "unknown": "hold",
            },
        )
        for pod in self.pods.values():
            if pod.node == node and (pods is None or pod.name in pods):
                self.certify(pod, self.authority.leaf(pod.identity))
                self.add(pod)

    def certify(self, pod: Pod, leaf: Leaf) -> None:
        """IDENTITY_SET on the pod's node."""
        client = self.clients[pod.node]
        assert client is not None
        body = {"identity": pod.identity, "key_pem": leaf.key, "chain_pem": leaf.chain, "roots_pem": leaf.roots}
        client.call(channel.IDENTITY_SET, body)

    def add(self, pod: Pod) -> None:
        """POD_ADD."""
        client, capture = self.clients[pod.node], pod.capture
        assert client is not None
        assert capture is not None
        fds = [*capture.maps(), *(capture.vouch() if self.same_node == "native" else [])]
        with open(pod.path) as netns:
            body = {
                "uid": pod.uid,
                "namespace": "default",
                "name": pod.name,
                "service_account": pod.account,
                "workload": pod.workload,
                "addresses": [pod.address(4), pod.address(6)],
                "identity": pod.identity,
                "netns_cookie": os.fstat(netns.fileno()).st_ino,
                "netns_ino": os.fstat(netns.fileno()).st_ino,
            }
            pod.ports = client.call(channel.POD_ADD, body, [netns.fileno(), *fds])["ports"]
        for fd in fds:
            os.close(fd)

    def allow(self, client: Pod, server: Pod, *ports: int) -> None:
        """Where the setting is native: from now on connections from one pod to these ports of another of its node are.
        The first of each goes through the engine, the second is the control.
        """
        if self.same_node != "native":
            return
        assert server.capture is not None
        for family, port in itertools.product((4, 6), ports):
            handed = server.capture.counters()["to_application_vouched"]
            with listen(server.path, server.address(family), port) as listener:
                for _ in range(2):
                    with connect(client.path, server.address(family), port) as made:
                        made.sendall(b"x")
                        accepted, _ = listener.accept()
                        with accepted:  # what the engine has carried it decided about before
                            assert accepted.recv(1) == b"x"
            assert server.capture.counters()["to_application_vouched"] > handed

    # -- the snapshot ------------------------------------------------------------------------------------------------
    def record(self, pod: Pod, **changes: object) -> pb.Address:
        """The pod's Workload: HBONE, healthy."""
        workload = pb.Workload(
            uid=pod.workload,
            name=pod.name,
            namespace="default",
            service_account=pod.account,
            node=f"node{pod.node}",
            tunnel_protocol=pb.TunnelProtocol.HBONE,
            addresses=[ipaddress.ip_address(pod.address(family)).packed for family in (4, 6)],
            canonical_name=pod.name,
            workload_name=pod.name,
            cluster_id="Kubernetes",
        )
        for name, value in changes.items():
            setattr(workload, name, value)
        return pb.Address(workload=workload)

    def apply(self, *addresses: pb.Address, full: bool = False) -> None:
        """Gives records to both engines."""
        self._versions += 1
        records = []
        for address in addresses:
            if address.HasField("workload"):
                name = address.workload.uid
            else:
                name = f"{address.service.namespace}/{address.service.hostname}"
            records.append(batch.Record(batch.Op.ADDRESS_SET, name, str(self._versions), address.SerializeToString()))
        for client in self.clients:
            if client is not None:
                reply = client.apply(records, full)
                assert reply["rejected"] == []

    def publish(self) -> None:
        """Every pod's record, to both engines."""
        self.apply(*(self.record(pod) for pod in self.pods.values()))

    def retire_tunnels(self, name: str) -> None:
        """The pod's record changes: no tunnel to it is used again."""
        self.apply(self.record(self[name], canonical_revision=os.urandom(4).hex()))
