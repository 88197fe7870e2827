"""docs/threat-model.md, what a privileged application wins by getting past capture: nothing.

Its own clear text it can send. It gains no identity by that, is refused where one is required, reads no other pod's
traffic, and what it took out of its own pod is noticed, counted and put back. Each with a control that shows that the
attack as such works.
"""

import asyncio
import contextlib
import functools
import secrets
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from sidestep._bpf import lib
from sidestep.lab.link import parse
from sidestep.node.reconcile import Capture as Mode
from tests.harness.cluster import Nodes, Pod
from tests.harness.hbone_peer import Refused, exchange
from tests.harness.netns import Pair, Sniffer, connect, listen, run
from tests.harness.pki import spiffe
from tests.harness.pods import Bridge, Client, echo, eventually
from tests.harness.stand_in import Capture, StandIn
from tests.net.test_agent import Node

PORT = 8080
HBONE = 15008
PYTHON = "/usr/bin/python3"
CAPABILITIES = {"unprivileged": "", "net_raw": "net_raw", "net_admin": "net_admin"}


def application(path: str, kind: str, *command: str) -> list[str]:
    """The command as a process of a pod: user 65534 with one capability, or none; "root" is all of them."""
    words = ["nsenter", f"--net={path}"]
    if kind != "root":
        kept = f",+{CAPABILITIES[kind]}" if CAPABILITIES[kind] else ""
        words += ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        words += [f"--{which}=-all{kept}" for which in ("inh-caps", "ambient-caps", "bounding-set")]
    return [*words, *command]


@pytest.fixture
def nodes(tmp_path: Path, same_node: str) -> Iterator[Nodes]:
    """attacker, victim and near on one node, server on the next; every pod is captured, strict."""
    with Nodes(tmp_path, {"attacker": 0, "victim": 0, "near": 0, "server": 1}, same_node=same_node) as made:
        made.publish()
        yield made


def escape(pod: Pod) -> None:
    """A process of the pod with CAP_NET_ADMIN takes the egress program out; nobody puts it back here."""
    run(*application(pod.path, "net_admin", "tc", "qdisc", "del", "dev", "eth0", "clsact"))


def inbound(nodes: Nodes, source: str) -> dict[str, object]:
    """The server's engine on the one connection that it has from this address."""
    engine = nodes.clients[1]
    assert engine is not None
    found = [each for each in engine.dump("connections") if each["direction"] == "inbound"]
    (shown,) = [each for each in found if str(each["src"]).rpartition(":")[0].strip("[]") == source]
    return shown


def principals(nodes: Nodes) -> dict[tuple[str, str], float]:
    """Opened connections at the server's engine, by (source_principal, connection_security_policy)."""
    engine = nodes.clients[1]
    assert engine is not None
    found: dict[tuple[str, str], float] = {}
    for line in engine.metrics().splitlines():
        if line.startswith('istio_tcp_connections_opened_total{reporter="destination"'):
            words = dict(
                word.split("=", 1) for word in line.partition("{")[2].rpartition("}")[0].split(",") if "=" in word
            )
            key = (words["source_principal"].strip('"'), words["connection_security_policy"].strip('"'))
            found[key] = found.get(key, 0) + float(line.rsplit(" ", 1)[1])
    return found


# -- no identity -------------------------------------------------------------------------------------------------------
def test_clear_text_past_capture_has_no_identity(nodes: Nodes, family: int) -> None:
    attacker, server = nodes["attacker"], nodes["server"]
    with listen(server.path, server.address(family), PORT) as listener:

        def said(expected: object, tls: bool) -> None:
            with nodes.tap("attacker") as tap, connect(attacker.path, server.address(family), PORT) as client:
                accepted, peer = listener.accept()
                with accepted:
                    client.sendall(b"canary-of-the-attacker")
                    assert accepted.recv(100) == b"canary-of-the-attacker"
                    assert peer[0] == attacker.address(family)  # the address is right all the same
                    shown = inbound(nodes, attacker.address(family))
                    assert shown["identity_peer"] == expected
                    assert bool(shown["tls"]) is tls
                assert any(b"canary-of-the-attacker" in flow.fragments() for flow in tap.flows()) is not tls

        said(attacker.identity, True)  # the control: captured, it is who it is
        before = principals(nodes)
        escape(attacker)
        said("", False)
        after = principals(nodes)
        assert after.get(("unknown", "unknown"), 0) == before.get(("unknown", "unknown"), 0) + 1
        assert {key: count for key, count in after.items() if key[0] != "unknown"} == {
            key: count for key, count in before.items() if key[0] != "unknown"
        }


def test_another_pods_address_is_not_another_pods_identity(nodes: Nodes, family: int) -> None:
    """The network even lets itself be deceived: what is for the victim's address goes to the attacker."""
    attacker, victim, server = nodes["attacker"], nodes["victim"], nodes["server"]
    address, bits = victim.address(family), "32" if family == 4 else "128"
    with listen(server.path, server.address(family), PORT) as listener:
        with connect(victim.path, server.address(family), PORT):
            listener.accept()[0].close()
        before = principals(nodes)
        assert before[victim.identity, "mutual_tls"] == 1
        escape(attacker)
        run(*application(attacker.path, "net_admin", "ip", "addr", "add", f"{address}/{bits}", "dev", "lo", "nodad"))
        via = ("via", attacker.address(family), "dev", nodes.interface(attacker))
        run("ip", "-n", nodes.router, "route", "add", f"{address}/{bits}", *via)
        program = (
            f"import socket; s = socket.create_connection(({server.address(family)!r}, {PORT}), 15, ({address!r}, 0)); "
            "s.sendall(b'it is me'); print(s.recv(100).decode())"
        )
        words = application(attacker.path, "unprivileged", PYTHON, "-c", program)
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as forger:
            accepted, peer = listener.accept()
            with accepted:
                assert accepted.recv(100) == b"it is me"
                assert peer[0] == address  # the control: the application is deceived
                shown = inbound(nodes, address)
                assert (shown["identity_peer"], bool(shown["tls"])) == ("", False)
                accepted.sendall(b"so what")
            assert forger.communicate(timeout=20)[0] == "so what\n"
        after = principals(nodes)
        assert after[victim.identity, "mutual_tls"] == 1
        assert after["unknown", "unknown"] == before.get(("unknown", "unknown"), 0) + 1


def test_port_15008_takes_nobody_without_a_certificate(nodes: Nodes, family: int) -> None:
    """Where an identity is required: the HBONE port, tried past capture in clear text and in TLS without a name."""
    attacker, server = nodes["attacker"], nodes["server"]
    escape(attacker)
    at = server.address(family)
    authority = f"[{at}]:{PORT}" if family == 6 else f"{at}:{PORT}"
    request = f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\ncanary".encode()
    with listen(server.path, at, PORT) as listener:
        answer = b""
        with connect(attacker.path, at, HBONE) as clear, contextlib.suppress(ConnectionResetError):
            clear.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + request)
            while data := clear.recv(1000):
                answer += data
        assert answer[:1] in (b"", b"\x15")  # nothing, or a TLS alert
        anonymous = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        anonymous.check_hostname, anonymous.verify_mode = False, ssl.CERT_NONE
        anonymous.set_alpn_protocols(["h2"])
        with connect(attacker.path, at, HBONE) as raw:
            with pytest.raises(OSError):  # TLS 1.3: the client learns of it when it reads
                with anonymous.wrap_socket(raw) as tls:
                    tls.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
                    assert tls.recv(1000) == b""
                    raise ConnectionResetError("closed without a word")
        forged = nodes.authority.leaf(nodes["victim"].identity, self_signed=True)
        with pytest.raises(Refused):
            exchange(attacker.path, at, forged, authority, b"canary")
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            listener.accept()
        # The control: who has a certificate of the mesh gets through, the same way.
        listener.settimeout(20)
        leaf = nodes.authority.leaf(spiffe("attacker"))
        thread = threading.Thread(target=echo_once, args=(listener,))
        thread.start()
        assert exchange(attacker.path, at, leaf, authority, b"ping") == b"ping"
        thread.join(20)


def echo_once(listener: socket.socket) -> None:
    accepted, _ = listener.accept()
    with accepted:
        while data := accepted.recv(100):
            accepted.sendall(data)


# -- no other pod's traffic --------------------------------------------------------------------------------------------
LISTEN = """
import select, socket, sys
marks, found = [word.encode() for word in sys.argv[1:]], set()
sockets = []
for device in ("eth0", "lo"):
    s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)); s.bind((device, 3))
    s.setsockopt(263, 1, bytes.fromhex(f"{socket.if_nametoindex(device):08x}")[::-1] + b"\\1\\0" + bytes(10))
    sockets.append(s)
print("listening", flush=True)
while True:
    ready = select.select([*sockets, sys.stdin], [], [])[0]
    for s in ready:
        if s is not sys.stdin:
            frame = s.recv(1 << 17)
            found |= {mark.decode() for mark in marks if mark in frame}
    if ready == [sys.stdin]:  # and nothing is left to be heard
        print(" ".join(sorted(found)), flush=True); sys.exit()
"""


def exchanged(client: Pod, server: Pod, family: int, canary: bytes) -> None:
    """Both ways."""
    with listen(server.path, server.address(family), PORT) as listener:
        with connect(client.path, server.address(family), PORT) as made:
            accepted, _ = listener.accept()
            with accepted:
                made.sendall(canary)
                assert accepted.recv(100) == canary
                accepted.sendall(canary)
                assert made.recv(100) == canary


def test_a_listener_in_a_pod_reads_no_other_pod(nodes: Nodes, family: int) -> None:
    """Promiscuous, on every device of its pod, while the neighbour talks on the node and across nodes."""
    attacker, victim, near, server = (nodes[name] for name in ("attacker", "victim", "near", "server"))
    own, across, here = (f"canary-{secrets.token_hex(12)}" for _ in range(3))
    nodes.allow(victim, near, PORT)
    words = application(attacker.path, "net_raw", PYTHON, "-c", LISTEN, own, across, here)
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as spy:
        assert spy.stdout is not None
        assert spy.stdout.readline() == "listening\n"
        exchanged(victim, server, family, across.encode())
        exchanged(victim, near, family, here.encode())
        exchanged(attacker, server, family, own.encode())
        seen = set(spy.communicate("\n", timeout=20)[0].split())
    assert seen == {own}  # and the control: it hears what is its own


@pytest.mark.parametrize("meshed", [True, False], ids=["meshed", "plain"])
def test_who_takes_another_pods_address_gets_nothing(tmp_path: Path, meshed: bool, family: int) -> None:
    """The network is deceived once more: the server's address is the attacker's now. Without the mesh it is told
    everything; with it, it cannot show the server's certificate."""
    canary = secrets.token_hex(12).encode()
    with Nodes(tmp_path, {"attacker": 0, "victim": 0, "server": 1}, engines=(meshed, meshed)) as nodes:
        if meshed:
            nodes.publish()
        attacker, victim, server = nodes["attacker"], nodes["victim"], nodes["server"]
        address, bits = server.address(family), "32" if family == 4 else "128"
        run(*application(attacker.path, "net_admin", "ip", "addr", "add", f"{address}/{bits}", "dev", "lo", "nodad"))
        via = ("via", attacker.address(family), "dev", nodes.interface(attacker))
        run("ip", "-n", nodes.router, "route", "add", f"{address}/{bits}", *via)
        with listen(attacker.path, address, PORT) as listener, listen(attacker.path, address, HBONE) as squatter:
            with Sniffer(attacker.path) as sniffer:
                if not meshed:
                    with connect(victim.path, address, PORT) as client:
                        accepted, _ = listener.accept()
                        with accepted:
                            client.sendall(canary)
                            assert accepted.recv(100) == canary
                    return
                with connect(victim.path, address, PORT, timeout=3) as client:
                    with contextlib.suppress(ConnectionError):
                        client.sendall(canary)
                    try:
                        answer = client.recv(100)
                    except (ConnectionError, TimeoutError):
                        answer = b""
                    assert answer == b""
                assert not any(canary in frame for frame in sniffer.frames())
                asked = [found for frame in sniffer.frames() if (found := parse(frame)) is not None]
                assert any((each.destination.address, each.destination.port) == (address, HBONE) for each in asked)
            for each in (listener, squatter):
                each.settimeout(0)
                with pytest.raises(BlockingIOError):
                    each.accept()


# -- 15008 -------------------------------------------------------------------------------------------------------------
SQUAT = """
import select, socket, sys
listeners = []
for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
    s = socket.socket(family); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6: s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    s.bind((address, 15008)); s.listen(16); listeners.append(s)
print("bound", flush=True)
sys.stdin.readline()
print(sum(len(select.select([s], [], [], 0)[0]) for s in listeners))
"""


@contextlib.contextmanager
def squatting(link: Pair, kind: str) -> Iterator[Callable[[], int]]:
    """A process of the pod holds port 15008 of every address; the function ends it and says how many listeners of
    it have a connection."""
    words = application(link.pod_path, kind, PYTHON, "-c", SQUAT)
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as squatter:
        assert squatter.stdout is not None
        assert squatter.stdout.readline() == "bound\n"
        yield lambda: int(squatter.communicate("\n", timeout=20)[0])


@pytest.mark.parametrize("kind", ["root", "net_raw", "unprivileged"])
def test_nobody_gets_15008_by_binding_it_first(capture: Capture, link: Pair, family: int, kind: str) -> None:
    with squatting(link, kind) as taken:  # the control: without the programs it has the port
        connect(link.outside_path, link.pod_address(family), HBONE).close()
        assert taken() == 1
    with squatting(link, kind) as taken:  # bound before the pod is captured
        capture.set_mode(lib.MODE_STRICT)
        engine = StandIn(capture)
        try:
            for _ in range(3):
                client = connect(link.outside_path, link.pod_address(family), HBONE)
                engine.hbone.accept()[0].close()
                client.close()
            assert taken() == 0
        finally:
            engine.close()


# -- put back ----------------------------------------------------------------------------------------------------------
TAKEN_OUT: dict[str, Sequence[Sequence[str]]] = {
    "filter": [["tc", "filter", "del", "dev", "eth0", "egress"]],
    "qdisc of eth0": [["tc", "qdisc", "del", "dev", "eth0", "clsact"]],
    "qdisc of lo": [["tc", "qdisc", "del", "dev", "lo", "clsact"]],
    "rules": [["ip", family, "rule", "del", "pref", "32764"] for family in ("-4", "-6")],
    "routes": [["ip", family, "route", "flush", "table", "100"] for family in ("-4", "-6")],
}


def test_what_a_pod_takes_out_of_itself_is_noticed_counted_and_put_back(tmp_path: Path, same_node: str) -> None:
    async def work(node: Node) -> None:
        node.cluster.label("shop", "ambient")
        web, web_pod = node.pod("web", running=False)
        api, api_pod = node.pod("api", running=False)
        node.start_engine()
        repairs = "sidestep_capture_repairs_total"
        async with node.running_agent() as agent, echo(api, PORT):
            for sandbox, pod in ((web, web_pod), (api, api_pod)):
                assert (await node.cni("ADD", sandbox, pod))[0] == 0
                await node.enrolled(pod)
            for what, commands in TAKEN_OUT.items():
                before = agent.metrics.value(repairs)
                for command in commands:
                    run(*application(web.path, "net_admin", *command))
                started = time.monotonic()
                noticed = functools.partial(lambda before: agent.metrics.value(repairs) > before, before)
                await eventually(f"{what}: noticed", noticed)
                await node.enrolled(web_pod, Mode.STRICT)
                for address in (api.v4, api.v6):
                    client = await Client.open(web, address, PORT)
                    assert await client.ask("whole") == "whole"
                    assert await node.in_the_mesh(client)
                    await client.close()
                print(f"{what}: captured again {time.monotonic() - started:.2f} s after it was taken out")

    async def guarded(node: Node) -> None:
        async with asyncio.timeout(120):
            await work(node)

    with Bridge("admin") as bridge:
        node = Node(tmp_path, bridge, same_node)
        try:
            asyncio.run(guarded(node))
        finally:
            node.kill_engine()
            subprocess.run(["rm", "-rf", str(node.bpf_dir)], check=True)


def test_without_the_capability_nothing_is_taken_out(capture: Capture, link: Pair) -> None:
    """The control of who may do it: the same commands by an application, and by one with CAP_NET_RAW."""
    capture.set_mode(lib.MODE_STRICT)
    for kind in ("unprivileged", "net_raw"):
        for commands in TAKEN_OUT.values():
            for command in commands:
                done = subprocess.run(application(link.pod_path, kind, *command), capture_output=True, timeout=30)
                assert done.returncode != 0, (kind, command)
    assert capture.verify() == 0
