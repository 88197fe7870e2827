"""Doors when what is behind them changes: a pod that is replaced by another with its addresses, one that leaves the
mesh and comes back, one that gets a new link; and a host that follows connections, rewrites them, and drops what it
cannot follow.
"""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sidestep._bpf import lib
from sidestep.wire import channel
from tests.harness.cluster import Nodes, Pod
from tests.harness.netns import Pair, Sniffer, connect, listen, run
from tests.harness.stand_in import Capture, StandIn
from tests.net import test_vouched
from tests.net.test_doors import opened, pods
from tests.net.test_engine_policy import only, policy, refused, talk
from tests.net.test_vouched import PORT, World, closed, nobody, pump

world = test_vouched.world
application = test_vouched.application
MUCH = 3_000_000  # more than any window that a host may have seen
OUTSIDE = {4: "192.0.2.10", 6: "2001:db8::10"}


def rules(nodes: Nodes, *lines: str) -> None:
    """Of the host's netfilter, in a table of its own."""
    run("nsenter", f"--net=/run/netns/{nodes.router}", "nft", "; ".join(("add table inet host", *lines)))


def follow(nodes: Nodes) -> None:
    """The host follows connections, and drops what belongs to none (as kube-proxy's rules do)."""
    rules(
        nodes,
        "add chain inet host way { type filter hook forward priority 0; }",
        "add rule inet host way ct state invalid drop",
    )


def join(nodes: Nodes, pair: Pair, port: str) -> None:
    """A link from the host to a namespace, with the addresses of `pair`."""
    run("ip", "link", "add", "eth0", "netns", pair.pod, "type", "veth", "peer", "name", port, "netns", nodes.router)
    for namespace, device, end in ((pair.pod, "eth0", 2), (nodes.router, port, 1)):
        run("ip", "-n", namespace, "link", "set", device, "up")
        run("ip", "-n", namespace, "addr", "add", f"{pair.pod4[:-1]}{end}/24", "dev", device)
        run("ip", "-n", namespace, "addr", "add", f"{pair.pod6[:-1]}{end}/64", "dev", device, "nodad")
    for gateway in (pair.pod4, pair.pod6):
        run("ip", "-n", pair.pod, "route", "add", "default", "via", f"{gateway[:-1]}1")


# -- another pod ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def next_pod(nodes: Nodes, meshed: bool) -> Iterator[Pod]:
    """near's link goes, as a runtime takes it away; another pod gets its addresses: captured, and not more."""
    near = nodes["near"]
    run("ip", "-n", nodes.router, "link", "del", nodes.interface(near))
    pair = Pair(f"{near.pair.pod}-next", near.pair.outside, near.pair.pod4, near.pair.pod6, "", "")
    pod = Pod("next", 0, "next", near.number, pair)
    with contextlib.ExitStack() as stack:
        run("ip", "netns", "add", pair.pod)
        stack.callback(run, "ip", "netns", "del", pair.pod)
        run("ip", "-n", pair.pod, "link", "set", "lo", "up")
        join(nodes, pair, nodes.interface(near))
        if meshed:
            pod.capture = Capture(pair, door=True)
            pod.capture.prepare()
            stack.callback(pod.capture.detach)
            pod.capture.set_mode(lib.MODE_STRICT)
        yield pod


@pytest.mark.parametrize("meshed", [True, False], ids=["meshed", "plain"])
def test_what_was_for_the_pod_before_does_not_reach_the_next(tmp_path: Path, meshed: bool, family: int) -> None:
    """Whoever sends on a connection with the pod that was there hears of its end, as without a mesh; without one the
    next pod sees the bytes.
    """
    canary = os.urandom(12).hex().encode()
    with (
        pods(tmp_path, meshed) as nodes,
        opened(nodes, meshed, family) as (client, _),
        next_pod(nodes, meshed) as pod,
        Sniffer(pod.path) as sniffer,
    ):
        client.sendall(canary)
        with pytest.raises(ConnectionError):
            client.recv(1)
        assert any(canary in frame for frame in sniffer.frames()) is not meshed


def test_what_was_allowed_for_the_pod_before_is_not_for_the_next(
    world: World, application: socket.socket, closing: Callable[..., None]
) -> None:
    """An allowance is in force, and its address is another pod's already, of which the engine has not heard; then it
    hears of it piece by piece. The next pod's application is reached when its own policy allows it.
    """
    world.allow(application)
    application.close()
    with next_pod(world.nodes, True) as pod:
        other = listen(pod.path, world.address, PORT)
        closing(other)
        for _ in range(2):
            with pytest.raises(OSError), world.connect() as client:
                client.sendall(b"x")
                client.recv(1)
        nobody(other)
        world.nodes.certify(pod, world.nodes.authority.leaf(pod.identity))
        world.nodes.add(pod)
        world.engine().call(channel.POD_DEL, {"uid": world.near.uid})
        world.set(policy("next", only(destinationPorts=[PORT])))
        world.nodes.apply(world.nodes.record(pod))
        assert refused(world.client.path, world.address)
        nobody(other)
        world.remove("default/next")
        assert pod.capture is not None
        for _ in range(2):
            client, served = world.connect(), other.accept()[0]
            talk(client, served)
            closed(client, served)
        assert pod.capture.counters()["to_application_vouched"] == 1
        world.engine().call(channel.POD_DEL, {"uid": pod.uid})


# -- the same pod -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["client", "near"])
def test_a_new_link_with_the_old_addresses(world: World, application: socket.socket, which: str) -> None:
    """What is open goes on when the agent has put everything in place on it; so does what is new."""
    world.allow(application)
    ends = world.native(application)
    pod = world.nodes[which]
    assert pod.capture is not None
    run("ip", "-n", world.nodes.router, "link", "del", world.nodes.interface(pod))
    for end in ends:
        end.sendall(b"while there was none")
    join(world.nodes, pod.pair, world.nodes.interface(pod))
    assert pod.capture.verify() == lib.CAPTURE_NO_OUT_ETH | lib.CAPTURE_NO_IN_ETH
    pod.capture.set_mode(lib.MODE_STRICT)
    for end in ends:
        assert end.recv(100) == b"while there was none"
    talk(*ends)
    closed(*world.native(application), *ends)


@pytest.mark.parametrize("which", ["client", "near"])
def test_a_new_link_of_a_pod_that_is_enrolled_anew(world: World, application: socket.socket, which: str) -> None:
    """Nobody knows its sockets any more: whoever sends hears of it."""
    world.allow(application)
    ends = world.native(application)
    pod = world.nodes[which]
    other = ends[1] if which == "client" else ends[0]
    world.engine().call(channel.POD_DEL, {"uid": pod.uid})
    assert pod.capture is not None
    run("ip", "-n", world.nodes.router, "link", "del", world.nodes.interface(pod))
    pod.capture.detach()
    join(world.nodes, pod.pair, world.nodes.interface(pod))
    pod.capture.prepare()
    pod.capture.set_mode(lib.MODE_STRICT)
    world.nodes.add(pod)
    other.sendall(b"x")
    with pytest.raises(ConnectionError):
        other.recv(1)
    world.allow(application)
    closed(*ends)


def leave(world: World, pod: Pod) -> None:
    """As the agent releases it."""
    assert pod.capture is not None
    world.engine().call(channel.POD_MODE, {"uid": pod.uid, "mode": "draining"})
    pod.capture.set_mode(lib.MODE_DRAINING)
    pod.capture.detach()
    world.engine().call(channel.POD_DEL, {"uid": pod.uid})


def enrol(world: World, pod: Pod) -> None:
    """As the agent enrols a pod that runs."""
    assert pod.capture is not None
    pod.capture.prepare()
    world.nodes.add(pod)
    pod.capture.set_mode(lib.MODE_LENIENT)


@pytest.mark.parametrize("busy", [True, False], ids=["busy", "silent"])
@pytest.mark.parametrize("which", ["client", "near"])
def test_one_end_leaves_and_comes_back(world: World, application: socket.socket, which: str, busy: bool) -> None:
    """Open flows go on, over a host that follows connections, whether or not something was said meanwhile; what the
    end that stayed has sent is counted.
    """
    follow(world.nodes)
    world.allow(application)
    flow = world.native(application)
    pod = world.nodes[which]
    for _ in range(2):
        for step in (leave, enrol):
            step(world, pod)
            if busy:
                talk(*flow)
                assert (pump(flow[0], flow[1], MUCH), pump(flow[1], flow[0], MUCH)) == (MUCH, MUCH)
        assert pod.capture is not None
        assert pod.capture.old() == 1
    talk(*flow)
    (seen,) = world.flows()
    sent = 32 + busy * 4 * (MUCH + 16)
    assert seen["bytes_sent"] == sent
    world.allow(application)
    talk(*flow)
    closed(*flow)


@pytest.mark.parametrize("which", ["client", "near"])
def test_connections_from_before_over_a_host_that_follows_them(
    tmp_path: Path, family: int, which: str, closing: Callable[..., None]
) -> None:
    """Both pods are enrolled, much is said, and one of them leaves: the host has seen all of it."""
    with Nodes(tmp_path, {"client": 0, "near": 0}, engines=(False, False)) as nodes, contextlib.ExitStack() as stack:
        follow(nodes)
        address = nodes["near"].address(family)
        application = listen(nodes["near"].path, address, PORT)
        client = connect(nodes["client"].path, address, PORT)
        served, _ = application.accept()
        closing(application, client, served)
        captures = {}
        for name in ("near", "client"):
            captures[name] = capture = Capture(nodes[name].pair, door=True)
            capture.prepare()
            stack.callback(capture.detach)
            stack.callback(StandIn(capture).close)
            capture.set_mode(lib.MODE_LENIENT)
        assert (pump(client, served, MUCH), pump(served, client, MUCH)) == (MUCH, MUCH)
        captures[which].detach()
        talk(client, served)


def test_what_was_outside_over_a_host_that_follows_it(world: World, application: socket.socket) -> None:
    """A native connection to a pod that is not in the mesh, which then joins it, and leaves."""
    follow(world.nodes)
    leave(world, world.near)
    world.nodes.apply(world.nodes.record(world.near, tunnel_protocol=0))
    outside = world.counter(world.client, "outside_vouched")
    first = world.connect(), application.accept()[0]
    talk(*first)  # what the engine carries it has allowed before
    closed(*first)
    client, served = world.connect(), application.accept()[0]
    talk(client, served)
    assert world.counter(world.client, "outside_vouched") == outside + 1
    enrol(world, world.near)
    world.nodes.publish()
    assert (pump(client, served, MUCH), pump(served, client, MUCH)) == (MUCH, MUCH)
    leave(world, world.near)
    assert (pump(client, served, MUCH), pump(served, client, MUCH)) == (MUCH, MUCH)
    closed(client, served)


@pytest.mark.parametrize("which", ["client", "near"])
def test_what_a_draining_pod_opens_over_a_host_that_follows_it(
    world: World, application: socket.socket, which: str
) -> None:
    """It goes on when the pod has left."""
    follow(world.nodes)
    world.allow(application)
    pod = world.nodes[which]
    assert pod.capture is not None
    world.engine().call(channel.POD_MODE, {"uid": pod.uid, "mode": "draining"})
    pod.capture.set_mode(lib.MODE_DRAINING)
    if which == "near":  # its peer has learned that it leaves
        world.nodes.apply(world.nodes.record(pod, tunnel_protocol=0))
    client, served = world.connect(), application.accept()[0]
    talk(client, served)
    assert pump(client, served, MUCH) == MUCH
    pod.capture.detach()
    talk(client, served)
    assert pump(served, client, MUCH) == MUCH
    closed(client, served)


# -- a host that rewrites ---------------------------------------------------------------------------------------------


def rewrite(world: World, masquerade: bool) -> str:
    """The host makes an address of its own near's, as for a Service or a hostPort that the mesh does not know."""
    family = "ip6" if world.family == 6 else "ip"
    outside = OUTSIDE[world.family]
    address = f"[{world.address}]" if world.family == 6 else world.address
    rules(
        world.nodes,
        "add chain inet host to { type nat hook prerouting priority -100; }",
        f"add rule inet host to {family} daddr {outside} tcp dport 80 dnat {family} to {address}:{PORT}",
        "add chain inet host from { type nat hook postrouting priority 100; }",
        *(["add rule inet host from ct status dnat masquerade"] if masquerade else []),
    )
    follow(world.nodes)
    return outside


@pytest.mark.parametrize("masquerade", [False, True], ids=["dnat", "dnat and masquerade"])
def test_a_host_that_rewrites_between_two_pods(world: World, application: socket.socket, masquerade: bool) -> None:
    """By its address and past it at once: the first is the engine's, then both ways are native, and none disturbs the
    other. Who comes by the host's address has no identity for the pod behind it.
    """
    outside = rewrite(world, masquerade)
    world.allow(application)
    direct = world.native(application)
    for _ in range(3):
        client, served = connect(world.client.path, outside, 80), application.accept()[0]
        talk(client, served)
        assert (pump(client, served, MUCH), pump(served, client, MUCH)) == (MUCH, MUCH)
        gateway = world.address[:-1] + "1"
        assert served.getpeername()[0] == (gateway if masquerade else world.source)
        talk(*direct)
        closed(client, served)
        closed(*world.native(application))
    world.set(policy("named", only(notPrincipals=[{"exact": "cluster.local/ns/default/sa/client"}])))
    assert refused(world.client.path, outside, 80)
    nobody(application)
    talk(*direct)
    closed(*world.native(application), *direct)
