"""Policy on live connections: the real engines, real sockets. Who is let in, who is cut when policy changes and who is
not, what waits for a policy that has not come, and what a forger gains.

"When APPLY is answered" is asked of the engine itself, which answers commands in order: by then it has no connection
that the new state denies.
"""

import json
import re
import resource
import secrets
import select
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import pytest

from sidestep.wire import batch, channel
from tests.harness import hbone_peer
from tests.harness.cluster import Nodes, Pod
from tests.harness.engine import Client
from tests.harness.lab import eventually
from tests.harness.netns import connect, inside, listen, run
from tests.harness.pki import Authority, Leaf
from tests.tunnel import policy_model as model
from tests.tunnel.policy_model import Policy

PORT = 8080
WAYS = ("hbone", "local", "plain")
EVERYBODY: list[Any] = [[]]


def policy(name: str, *rules: Any, action: str = "Deny", scope: str = "Namespace", **more: Any) -> Policy:
    made = {"name": name, "namespace": "default", "scope": scope, "action": action, "rules": list(rules)}
    return {**made, "dryRun": False, **more}


def only(**match: Any) -> list[Any]:
    return [[match]]


class Mesh:
    """Nodes with policies: `client` and `near` on node 0, `server` and `other` on node 1."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes

    def __getitem__(self, name: str) -> Pod:
        return self.nodes[name]

    def engine(self, pod: Pod) -> Client:
        client = self.nodes.clients[pod.node]
        assert client is not None
        return client

    def log(self, pod: Pod) -> str:
        engine = self.nodes.engines[pod.node]
        assert engine is not None
        return engine.log.read_text()

    def apply(self, *records: batch.Record) -> list[dict[str, str]]:
        """To all engines, one after the other. Returns what the last refused."""
        rejected: list[dict[str, str]] = []
        for client in self.nodes.clients:
            if client is not None:
                rejected = client.apply(records)["rejected"]
        return rejected

    def set(self, *policies: Policy) -> None:
        assert self.apply(*model.records(policies, secrets.token_hex(4))) == []

    def remove(self, *names: str) -> None:
        self.apply(*(batch.Record(batch.Op.POLICY_DEL, name) for name in names))

    def names(self, pod: Pod, *policies: str) -> None:
        """The pod's record, with these selector policies."""
        record = self.nodes.record(pod)
        record.workload.authorization_policies.extend(policies)
        self.nodes.apply(record)

    def clear(self) -> None:
        """No policy, every record as it was."""
        for client in self.nodes.clients:
            if client is not None:
                client.apply([], full=True)
        self.nodes.publish()

    def target(self, way: str) -> Pod:
        """The pod that is called on this way."""
        return self["near"] if way == "local" else self["server"]

    def caller(self, way: str) -> str:
        """The namespace that calls on this way."""
        return f"/run/netns/{self.nodes.router}" if way == "plain" else self["client"].path

    def native(self, way: str) -> bool:
        """Whether no engine carries connections on this way."""
        return way == "local" and self.nodes.same_node == "native"

    def source(self, way: str, family: int) -> str:
        """The address that calls on this way."""
        pod = self.target(way)
        return pod.address(family)[:-1] + "1" if way == "plain" else self["client"].address(family)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, same_node: str) -> Iterator[Nodes]:
    places = {"client": 0, "near": 0, "server": 1, "other": 1}
    with Nodes(tmp_path_factory.mktemp("policy"), places, workers=2, same_node=same_node) as made:
        made.publish()
        yield made


@pytest.fixture
def mesh(nodes: Nodes) -> Iterator[Mesh]:
    """No policies at the beginning and at the end; connections between client and near are native, if any are."""
    made = Mesh(nodes)
    made.clear()
    nodes.allow(nodes["client"], nodes["near"], PORT, PORT + 1)
    yield made
    made.clear()


@contextmanager
def conversation(
    mesh: Mesh, way: str, family: int = 4, port: int = PORT
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """An open connection: the client's end and the application's. Bytes have gone both ways."""
    pod = mesh.target(way)
    with listen(pod.path, pod.address(family), port) as listener:
        with connect(mesh.caller(way), pod.address(family), port) as client:
            accepted, _ = listener.accept()
            with accepted:
                talk(client, accepted)
                yield client, accepted


def talk(client: socket.socket, server: socket.socket) -> None:
    """Bytes go both ways."""
    for one, other in ((client, server), (server, client)):
        sent = secrets.token_bytes(16)
        one.sendall(sent)
        got = b""
        while len(got) < len(sent):
            part = other.recv(len(sent) - len(got))
            assert part, "ended"
            got += part
        assert got == sent


def refused(path: str, address: str, port: int = PORT) -> bool:
    """Whether a connection ends with a reset before a byte."""
    try:
        with connect(path, address, port) as client:
            client.sendall(b"x")
            return not client.recv(1)
    except ConnectionResetError:
        return True


def is_reset(*ends: socket.socket, native: bool = False) -> None:
    """Each of them ends with a reset, not with an orderly end (20 s is only a hang guard). The socket of a native flow
    may be ended where it is, and then its owner hears ECONNABORTED.
    """
    errors = (ConnectionResetError, ConnectionAbortedError) if native else ConnectionResetError
    for end in ends:
        with pytest.raises(errors):
            while end.recv(65536):
                pass
            raise AssertionError("an orderly end")


def open_flows(client: Client, pod: Pod) -> list[dict[str, Any]]:
    """What the engine has open at this pod."""
    return [each for each in client.dump("connections") if each["pod"] == f"default/{pod.name}"]


# -- let in or not -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("way", WAYS)
def test_denied_means_reset_and_nothing_reaches_the_application(mesh: Mesh, way: str, family: int) -> None:
    pod, engine = mesh.target(way), mesh.engine(mesh.target(way))
    before = counter(engine, "default/deny-8080", pod)
    with (
        listen(pod.path, pod.address(family), PORT) as listener,
        listen(pod.path, pod.address(family), PORT + 1) as also,
    ):
        mesh.set(policy("deny-8080", only(destinationPorts=[PORT])))
        assert refused(mesh.caller(way), pod.address(family))
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            listener.accept()
        with connect(mesh.caller(way), pod.address(family), PORT + 1) as client:  # the control
            accepted, _ = also.accept()
            with accepted:
                talk(client, accepted)
    assert counter(engine, "default/deny-8080", pod) == before + 1
    last = engine.dump("denials")[-1]
    assert last["pod"] == f"default/{pod.name}"
    assert last["pod_uid"] == pod.uid
    assert last["direction"] == "inbound"
    assert last["policy"] == "default/deny-8080"
    assert last["reason"] == "explicitly denied by: default/deny-8080"
    assert last["identity"] == ("" if way == "plain" else mesh["client"].identity)
    assert last["src"].startswith(f"[{mesh.source(way, family)}]:" if family == 6 else f"{mesh.source(way, family)}:")
    assert last["dst"] == (f"[{pod.address(6)}]:{PORT}" if family == 6 else f"{pod.address(4)}:{PORT}")
    assert abs(last["time_ms"] / 1000 - time.time()) < 3600
    line = logged(mesh, pod, 'policy="default/deny-8080"')[-1]
    assert 'error="connection closed due to policy rejection: explicitly denied by: default/deny-8080"' in line
    if way == "hbone":
        told = mesh.engine(mesh["client"]).dump("denials")[-1]
        assert (told["direction"], told["pod"], told["policy"]) == ("outbound", "default/client", "")
        assert "401" in told["reason"]


def counter(client: Client, name: str, pod: Pod) -> int:
    labels = f'policy="{name}",destination_workload="{pod.name}",destination_workload_namespace="default"'
    found = re.search(rf"^sidestep_policy_denied_total{{{re.escape(labels)}}} (\d+)$", client.metrics(), re.MULTILINE)
    return int(found[1]) if found else 0


def logged(mesh: Mesh, pod: Pod, text: str, count: int = 1) -> list[str]:
    """Lines with this text, once there are that many: another thread writes them."""
    deadline = time.monotonic() + 20
    while True:
        lines = [line for line in mesh.log(pod).splitlines() if text in line]
        if len(lines) >= count:
            return lines
        assert time.monotonic() < deadline, f"not logged: {text}"
        time.sleep(0.01)


@pytest.mark.parametrize("way", ["hbone", "local"])
def test_an_allow_policy_admits_whom_it_names(mesh: Mesh, way: str) -> None:
    pod = mesh.target(way)
    mine = mesh["client"].identity.removeprefix("spiffe://")
    mesh.set(policy("some", only(principals=[{"Exact": mine}]), action="Allow"))
    with conversation(mesh, way):
        pass
    mesh.set(policy("some", only(principals=[{"Exact": mine + "x"}]), action="Allow"))
    assert refused(mesh.caller(way), pod.address())
    line = logged(mesh, pod, "allow policies exist, but none allowed")[-1]
    assert 'policy="default/some"' in line


@pytest.mark.parametrize("way", WAYS)
def test_a_dry_run_is_counted_and_denies_nothing(mesh: Mesh, way: str) -> None:
    engine = mesh.engine(mesh.target(way))
    name = f"try-{secrets.token_hex(4)}"
    mesh.set(policy(name, EVERYBODY, dryRun=True))
    with conversation(mesh, way):
        pass
    assert f'sidestep_policy_dry_run_denied_total{{policy="default/{name}"' in engine.metrics()
    assert counter(engine, f"default/{name}", mesh.target(way)) == 0


def dry_counter(client: Client, name: str) -> int:
    found = re.search(rf'^sidestep_policy_dry_run_denied_total{{policy="{name}",.*}} (\d+)$', client.metrics(), re.M)
    return int(found[1]) if found else 0


@pytest.mark.parametrize("way", WAYS)
def test_whom_a_dry_run_would_deny_is_logged_once(mesh: Mesh, way: str) -> None:
    """Who comes, and who was there before; not again at every change that has them judged anew."""
    pod = mesh.target(way)
    told_before = 1
    engine = mesh.engine(pod)
    one, two = (f"default/try-{secrets.token_hex(4)}" for _ in range(2))
    dry = {name: policy(name.rpartition("/")[2], only(destinationPorts=[PORT]), dryRun=True) for name in (one, two)}
    with conversation(mesh, way) as before:
        with conversation(mesh, way, port=PORT + 1):  # the control: another port
            mesh.set(dry[one])
            assert dry_counter(engine, one) == told_before
            for number in range(5):
                mesh.set(policy("other", only(destinationPorts=[number + 1])))
            assert dry_counter(engine, one) == told_before
            mesh.remove(one)
            mesh.set(dry[two])
            assert (dry_counter(engine, one), dry_counter(engine, two)) == (told_before, told_before)
            talk(*before)
    with conversation(mesh, way):
        assert (dry_counter(engine, one), dry_counter(engine, two)) == (told_before, told_before + 1)
    who = "" if way == "plain" else f' src.identity="{mesh["client"].identity}"'
    for name, count in ((one, told_before), (two, told_before + 1)):
        lines = logged(mesh, pod, f'policy="{name}"', count)
        for line in lines:
            told = re.search(
                r"info\tdry run would deny src\.addr=(\S+):\d+(.*) dst\.addr=(\S+) dst\.workload=(.*)", line
            )
            assert told is not None, line
            assert told.groups() == (
                mesh.source(way, 4),
                who,
                f"{pod.address()}:{PORT}",
                f'"{pod.name}" dst.namespace="default" policy="{name}"',
            )
        assert len(lines) == count


def test_denials_are_the_last_256(mesh: Mesh) -> None:
    pod = mesh["near"]
    mesh.set(policy("closed", EVERYBODY))
    for _ in range(260):
        assert refused(mesh.caller("local"), pod.address())
    found = mesh.engine(pod).dump("denials")
    assert len(found) == 256
    assert [each["time_ms"] for each in found] == sorted(each["time_ms"] for each in found)


# -- live --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("way", WAYS)
def test_a_new_deny_cuts_what_is_open(mesh: Mesh, way: str, family: int) -> None:
    """Both ends get a reset; another port, and another pod, are not touched. In force when APPLY is answered."""
    pod, engine = mesh.target(way), mesh.engine(mesh.target(way))
    with conversation(mesh, way, family) as cut, conversation(mesh, way, family, PORT + 1) as kept:
        before = counter(engine, "default/late", pod)
        mesh.set(policy("late", only(destinationPorts=[PORT])))
        at = "client" if way == "local" else pod.name
        left = [each["dst"].rsplit(":", 1)[1] for each in open_flows(engine, mesh[at])]
        assert str(PORT) not in left
        assert str(PORT + 1) in left
        is_reset(*cut, native=mesh.native(way))
        talk(*kept)
        assert counter(engine, "default/late", pod) == before + 1
        line = logged(mesh, pod, 'policy="default/late"')[-1]
        assert 'error="connection closed due to policy change"' in line
        mesh.remove("default/late")
        talk(*kept)
    with conversation(mesh, way, family):
        pass


MANY = 1500


def many(path: str, address: str) -> list[socket.socket]:
    """MANY connections to PORT."""

    def make() -> list[socket.socket]:
        return [socket.create_connection((address, PORT), 20) for _ in range(MANY)]

    return inside(path, make)


@pytest.mark.parametrize("way", WAYS)
def test_apply_is_answered_when_the_last_of_many_is_cut(mesh: Mesh, way: str) -> None:
    """More than one turn of the engine's loop can end: the answer waits for all of them, others go on meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    pod, engine = mesh.target(way), mesh.engine(mesh.target(way))
    at = mesh["client"] if way == "local" else pod
    try:
        with ExitStack() as stack, conversation(mesh, way, port=PORT + 1) as kept:
            listener = stack.enter_context(listen(pod.path, pod.address(), PORT, backlog=2 * MANY))
            clients = [stack.enter_context(each) for each in many(mesh.caller(way), pod.address())]
            for _ in clients:
                stack.enter_context(listener.accept()[0])
            assert len(open_flows(engine, at)) >= MANY
            mesh.engine(pod).apply(model.records([policy("late", only(destinationPorts=[PORT]))]))
            left = [each["dst"] for each in open_flows(engine, at)]
            assert len(left) == 1
            assert left[0].endswith(f":{PORT + 1}")
            talk(*kept)
            is_reset(*clients, native=mesh.native(way))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_of_many_those_that_are_denied_now(mesh: Mesh) -> None:
    """Connections of several callers to several ports of one pod, and a change that is about some of each."""
    server = mesh["server"]
    router = f"/run/netns/{mesh.nodes.router}"
    callers = {"client": mesh["client"].path, "near": mesh["near"].path, "plain": router}
    ends: dict[tuple[str, int], list[tuple[socket.socket, socket.socket]]] = {}
    with ExitStack() as stack:
        for port in (PORT, PORT + 1):
            listener = stack.enter_context(listen(server.path, server.address(), port))
            for name, path in list(callers.items()) * 5:
                client = stack.enter_context(connect(path, server.address(), port))
                accepted, _ = listener.accept()
                ends.setdefault((name, port), []).append((client, stack.enter_context(accepted)))
        near = mesh["near"].identity.removeprefix("spiffe://")
        mesh.set(
            policy(
                "some",
                [[{"principals": [{"Exact": near}]}], [{"destinationPorts": [PORT + 1]}]],
                [[{"notPrincipals": [{"Presence": []}], "destinationPorts": [PORT]}]],
            )
        )
        for who, pairs in ends.items():
            for pair in pairs:
                if who in (("near", PORT + 1), ("plain", PORT)):
                    is_reset(*pair)
                else:
                    talk(*pair)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "change", ["selector", "record names it", "allow removed", "allow narrowed", "mesh-wide", "undecodable"]
)
def test_what_else_cuts(mesh: Mesh, way: str, change: str) -> None:
    """A selector policy that becomes one that denies; a record that names one; the last allow that let it in; a policy
    of the mesh; a stand-in for what cannot be decoded."""
    pod = mesh.target(way)
    deny = policy("p", only(destinationPorts=[PORT]), scope="WorkloadSelector")
    if change == "selector":
        mesh.set(policy("p", scope="WorkloadSelector"))
        mesh.names(pod, "default/p")
        mesh.set(policy("p", EVERYBODY, action="Allow", scope="WorkloadSelector"))
    elif change == "record names it":
        mesh.set(deny)
    elif change in ("allow removed", "allow narrowed"):
        mesh.set(
            policy("nobody", action="Allow"), policy("some", only(destinationPorts=[PORT, PORT + 1]), action="Allow")
        )
    with conversation(mesh, way) as ends:
        if change == "selector":
            mesh.set(deny)
        elif change == "record names it":
            mesh.names(pod, "default/p")
        elif change == "allow removed":
            mesh.remove("default/some")
        elif change == "allow narrowed":
            mesh.set(policy("some", only(destinationPorts=[PORT + 1]), action="Allow"))
        elif change == "mesh-wide":
            mesh.set(policy("all", EVERYBODY, scope="Global", namespace="istio-system"))
        else:
            assert mesh.apply(batch.Record(batch.Op.POLICY_SET, "default/odd", "1", b"\xff")) != []
        is_reset(*ends, native=mesh.native(way))


@pytest.mark.parametrize("way", WAYS)
def test_what_does_not_cut(mesh: Mesh, way: str) -> None:
    """A policy elsewhere, one that does not match, a dry run, a record with another version, one that is gone."""
    pod = mesh.target(way)
    with conversation(mesh, way) as ends:
        mesh.set(
            policy("far", EVERYBODY, namespace="elsewhere"), policy("unnamed", EVERYBODY, scope="WorkloadSelector")
        )
        mesh.set(policy("miss", only(destinationPorts=[1])), policy("dry", EVERYBODY, dryRun=True))
        mesh.nodes.publish()
        talk(*ends)
        mesh.apply(batch.Record(batch.Op.ADDRESS_DEL, pod.workload))
        mesh.set(policy("nobody", action="Allow"))
        talk(*ends)  # while there is no record only an explicit deny ends it
        mesh.set(policy("explicit", only(destinationPorts=[PORT])))
        is_reset(*ends, native=mesh.native(way))


@pytest.mark.parametrize("way", WAYS)
def test_a_policy_that_has_not_come(mesh: Mesh, way: str) -> None:
    """New connections wait for it and are then refused, those that are open go on until it is there."""
    pod = mesh.target(way)
    with conversation(mesh, way) as ends:
        mesh.names(pod, "default/late")
        talk(*ends)
        started = time.monotonic()
        assert refused(mesh.caller(way), pod.address(), PORT + 1)
        print(f"refused after {time.monotonic() - started:.2f} s")
        logged(mesh, pod if way != "local" else mesh["client"], "policy not received yet: default/late")
        with listen(pod.path, pod.address(), PORT + 1) as listener:  # one that comes in time
            with connect(mesh.caller(way), pod.address(), PORT + 1) as client:
                client.sendall(b"early")
                mesh.set(policy("late", only(destinationPorts=[PORT]), scope="WorkloadSelector"))
                accepted, _ = listener.accept()
                with accepted:
                    assert accepted.recv(10) == b"early"
        is_reset(*ends, native=mesh.native(way))
        assert mesh.engine(pod).dump("denials")[-1]["policy"] == "default/late"


def test_a_pod_that_names_a_missing_policy_still_calls_others(mesh: Mesh) -> None:
    mesh.names(mesh["client"], "default/missing")
    for way in ("hbone", "local"):
        with conversation(mesh, way):
            pass


@pytest.mark.parametrize("way", WAYS)
def test_a_new_pod_and_a_deny_that_was_there_before(tmp_path: Path, way: str) -> None:
    """Its record comes before its policy: the first connection waits for both, and is denied."""
    with Nodes(tmp_path, {"client": 0, "near": 0, "server": 1}) as nodes:
        mesh = Mesh(nodes)
        pod = mesh.target(way)
        nodes.apply(nodes.record(nodes["client"]))
        outcome: list[bool] = []
        with listen(pod.path, pod.address(), PORT) as listener:
            thread = threading.Thread(target=lambda: outcome.append(refused(mesh.caller(way), pod.address())))
            thread.start()
            mesh.names(pod, "default/closed")
            mesh.set(policy("closed", EVERYBODY, scope="WorkloadSelector"))
            thread.join()
            listener.settimeout(0)
            with pytest.raises(BlockingIOError):
                listener.accept()
        assert outcome == [True]


def test_nobody_is_let_in_for_lack_of_data(tmp_path: Path) -> None:
    """A pod whose own record has not come, and one whose record names a policy that has not, before their first
    complete state: who comes is held, and then reset. All ways at once, for each waits its time; what each lacks is in
    the log. With the data the same ways are open.
    """
    with Nodes(tmp_path, {"client": 0, "near": 0, "server": 1}) as nodes:
        mesh, server, near = Mesh(nodes), nodes["server"], nodes["near"]
        records = [nodes.record(pod) for pod in nodes.pods.values()]
        records[1].workload.authorization_policies.append("default/never")
        mesh.engine(nodes["client"]).apply(
            [batch.Record(batch.Op.ADDRESS_SET, each.workload.uid, "1", each.SerializeToString()) for each in records]
        )
        outcome: dict[str, bool] = {}

        def call(way: str, family: int) -> None:
            outcome[f"{way} {family}"] = refused(mesh.caller(way), mesh.target(way).address(family))

        with ExitStack() as stack:
            listeners = [
                stack.enter_context(listen(pod.path, pod.address(family), PORT))
                for pod in (server, near)
                for family in (4, 6)
            ]
            threads = [threading.Thread(target=call, args=(way, family)) for way in WAYS for family in (4, 6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for listener in listeners:
                listener.settimeout(0)
                with pytest.raises(BlockingIOError):
                    listener.accept()
        assert outcome == {f"{way} {family}": True for way in WAYS for family in (4, 6)}
        logged(mesh, server, f"no record of {server.workload} within 5 s", 2)
        logged(mesh, server, "no certificate or record of the pod within 5 s", 2)
        logged(mesh, nodes["client"], "policy not received yet: default/never", 2)
        nodes.publish()
        for way in WAYS:
            with conversation(mesh, way):
                pass


@pytest.mark.parametrize("denied", [True, False])
def test_nobody_is_let_in_before_the_first_state_is_whole(tmp_path: Path, denied: bool) -> None:
    """A policy of a whole namespace is named by no record: until the agent says that all is there, who comes waits."""
    with Nodes(tmp_path, {"client": 0, "near": 0, "server": 1}) as nodes, ExitStack() as stack:
        mesh = Mesh(nodes)
        engines = [mesh.engine(nodes["client"]), mesh.engine(nodes["server"])]
        records = [
            batch.Record(batch.Op.ADDRESS_SET, each.workload.uid, "1", each.SerializeToString())
            for each in map(nodes.record, nodes.pods.values())
        ]
        for engine in engines:
            engine.apply(records, whole=False)
        listeners = [
            stack.enter_context(listen(pod.path, pod.address(), PORT)) for pod in (nodes["server"], nodes["near"])
        ]
        callers = [stack.enter_context(connect(mesh.caller(way), mesh.target(way).address(), PORT)) for way in WAYS]
        for caller in callers:
            caller.sendall(b"x")
        eventually(
            "all are held",
            lambda: sum(pod["held"] for engine in engines for pod in engine.dump("pods")) == len(WAYS),
        )
        for listener in listeners:
            listener.settimeout(0)
            with pytest.raises(BlockingIOError):
                listener.accept()
            listener.settimeout(20)
        late = model.records([policy("late", EVERYBODY)], "1") if denied else []
        for engine in engines:
            engine.apply(late)
        if denied:
            is_reset(*callers)
        else:
            accepted = [stack.enter_context(listeners[i].accept()[0]) for i in (0, 0, 1)]
            assert [each.recv(1) for each in accepted] == [b"x"] * 3


@pytest.mark.parametrize("way", WAYS)
def test_undecodable_policies_keep_what_was_good_or_close_the_namespace(mesh: Mesh, way: str) -> None:
    pod = mesh.target(way)
    mesh.set(policy("p", only(destinationPorts=[PORT])))
    bad = batch.Record(batch.Op.POLICY_SET, "default/p", "2", b"\x08")
    elsewhere = batch.Record(batch.Op.POLICY_SET, "elsewhere/p", "1", b"\xff")
    reasons = {each["name"] for each in mesh.apply(bad, elsewhere)}
    assert reasons == {"default/p", "elsewhere/p"}
    assert refused(mesh.caller(way), pod.address())
    with conversation(mesh, way, port=PORT + 1):
        pass
    mesh.apply(batch.Record(batch.Op.POLICY_SET, "default/q", "1", b"\xff"))
    assert refused(mesh.caller(way), pod.address(), PORT + 1)
    mesh.set(policy("q", only(destinationPorts=[1])))
    with conversation(mesh, way, port=PORT + 1):
        pass
    for name in ("istio-system/p", "without-a-namespace"):
        mesh.apply(batch.Record(batch.Op.POLICY_SET, name, "1", b"\xff"))
        assert refused(mesh.caller(way), pod.address(), PORT + 1)
        mesh.remove(name)
        with conversation(mesh, way, port=PORT + 1):
            pass
    again = mesh.nodes.engines[pod.node]
    assert again is not None
    mesh.apply(batch.Record(batch.Op.POLICY_SET, "default/odd name", "1", b""))
    assert {each["key"] for each in mesh.engine(pod).dump("policies")} >= {
        "default/p",
        "elsewhere/p",
        "default/odd?name",
    }
    versions = {line["key"]: line["version"] for line in mesh.engine(pod).dump("policies")}
    assert versions["elsewhere/p"] == versions["default/odd?name"] == ""


def test_a_pod_with_another_identity_loses_its_connections(mesh: Mesh) -> None:
    """POD_ADD with another account: what was let in as the old one ends."""
    client = mesh["client"]
    with conversation(mesh, "local") as ends:
        was = client.account
        client.account = "renamed"
        try:
            mesh.nodes.certify(client, mesh.nodes.authority.leaf(client.identity))
            mesh.nodes.add(client)
            is_reset(*ends, native=mesh.native("local"))
            mesh.set(policy("old", only(principals=[{"Suffix": f"/sa/{was}"}]), action="Allow"))
            mesh.nodes.publish()
            assert refused(client.path, mesh["near"].address())
        finally:
            client.account = was
            mesh.nodes.add(client)
            mesh.nodes.publish()
    with conversation(mesh, "local"):
        pass


HAMMER = """
import json, socket, sys, time
address, port, stop = sys.argv[1], int(sys.argv[2]), sys.stdin
import select
out = []
while not select.select([stop], [], [], 0)[0]:
    started = time.monotonic()
    try:
        s = socket.create_connection((address, port), 20)
        s.sendall(b"x")
        said = "served" if s.recv(1) else "ended"
        s.close()
    except ConnectionResetError:
        said = "reset"
    except ConnectionAbortedError as error:  # a native flow may be ended where it is
        said = "reset" if sys.argv[3] == "native" else repr(error)
    except OSError as error:
        said = repr(error)
    out.append((started, time.monotonic(), said))
print(json.dumps(out))
"""


def test_a_deny_toggled_a_hundred_times_under_load(mesh: Mesh) -> None:
    """A connection that began after a state was acknowledged and ended before the next one was sent is as it says."""
    stop = threading.Event()
    listeners, servers = [], []
    for pod in (mesh["server"], mesh["near"]):
        listener = listen(pod.path, pod.address(), PORT, backlog=4096)
        listener.settimeout(None)
        listeners.append(listener)
        servers.append(threading.Thread(target=answer, args=(listener, stop)))
        servers[-1].start()
    hammers = []
    try:
        for way in WAYS:
            run("nsenter", f"--net={mesh.caller(way)}", "sysctl", "-qw", "net.ipv4.tcp_tw_reuse=1")
            words = ["nsenter", f"--net={mesh.caller(way)}", "--", sys.executable, "-c", HAMMER]
            words += [mesh.target(way).address(), str(PORT), "native" if mesh.native(way) else "engine"]
            hammers.append(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        times: list[tuple[float, float, str]] = []  # acknowledged, next one sent, what must happen meanwhile
        acknowledged = time.monotonic()
        for _ in range(100):
            for action, must in (("set", "reset"), ("remove", "served")):
                sent = time.monotonic()
                times.append((acknowledged, sent, "served" if must == "reset" else "reset"))
                if action == "set":
                    mesh.set(policy("toggle", EVERYBODY))
                else:
                    mesh.remove("default/toggle")
                acknowledged = time.monotonic()
                select.select([], [], [], 0.02)  # some load between two changes
        said = [json.loads(each.communicate("stop\n", timeout=60)[0]) for each in hammers]
    finally:
        for each in hammers:
            each.kill()
            each.wait()
        stop.set()
        for listener in listeners:
            listener.shutdown(socket.SHUT_RDWR)
        for thread in servers:
            thread.join()
        for listener in listeners:
            listener.close()
    checked, seconds = 0, times[-1][1] - times[0][0]
    for way, results in zip(WAYS, said, strict=True):
        assert {each[2] for each in results} == {"served", "reset"}, way
        for begun, ended, result in results:
            for acknowledged, sent, must in times[1:]:
                if acknowledged <= begun and ended <= sent:
                    checked += 1
                    assert result == must, (way, begun, ended, acknowledged, sent)
    total = sum(map(len, said))
    print(f"{total} connections, {total / seconds:.0f}/s, {checked} inside one state")
    assert checked > 500


def answer(listener: socket.socket, stop: threading.Event) -> None:
    """Echoes one byte of each connection."""
    while not stop.is_set():
        try:
            accepted, _ = listener.accept()
        except OSError:
            continue
        with accepted:
            with suppress(OSError):  # cut meanwhile
                accepted.sendall(accepted.recv(1))


# -- forgers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def into(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """An engine for the servers' node only; `client` and `twin`, of one account, are played by the peer."""
    places = {"client": 0, "twin": 0, "server": 1, "other": 1}
    accounts = {"client": "same", "twin": "same"}
    with Nodes(tmp_path_factory.mktemp("into"), places, engines=(False, True), accounts=accounts) as made:
        made.publish()
        yield made


def hbone(nodes: Nodes, source: Pod, authority: str, headers: tuple[tuple[str, str], ...] = ()) -> int:
    """CONNECT from a pod's namespace with its own certificate. Returns the status, 0 when there was none."""
    server = nodes["server"]
    to = server.address(6 if authority.startswith("[") else 4)
    try:
        hbone_peer.exchange(source.path, to, nodes.authority.leaf(source.identity), authority, b"x", headers=headers)
    except hbone_peer.Refused as refusal:
        return refusal.status
    return 200


@contextmanager
def echoing(pod: Pod, *families: int) -> Iterator[list[str]]:
    """The application of a pod, on PORT. Yields the addresses of its callers."""
    callers: list[str] = []
    stop = threading.Event()
    with ExitStack() as stack:
        for family in families:
            listener = stack.enter_context(listen(pod.path, pod.address(family), PORT))
            listener.settimeout(0.05)
            thread = threading.Thread(target=echo, args=(listener, stop, callers))
            stack.callback(thread.join)
            thread.start()
        stack.callback(stop.set)
        yield callers


def echo(listener: socket.socket, stop: threading.Event, callers: list[str]) -> None:
    while not stop.is_set():
        try:
            accepted, peer = listener.accept()
        except TimeoutError:
            continue
        callers.append(peer[0])
        with accepted, suppress(ConnectionError):  # a peer that leaves its streams open resets them
            accepted.settimeout(20)
            while chunk := accepted.recv(65536):
                accepted.sendall(chunk)


@pytest.mark.parametrize(
    ("authority", "status"),
    [
        ("{server4}:8080", 200),
        ("[{server6}]:8080", 200),
        ("{other4}:8080", 400),
        ("[{other6}]:8080", 400),
        ("{client4}:8080", 400),
        ("127.0.0.1:8080", 400),
        ("[::1]:8080", 400),
        ("0.0.0.0:8080", 400),
        ("[::ffff:{server4}]:8080", 400),
        ("{server4}:15008", 503),
        ("[{server6}]:15008", 503),
        ("{server4}:{inbound}", 503),
        ("{server4}:{outbound}", 503),
        ("{server4}:{hbone}", 503),
        ("[{server6}]:{inbound}", 503),
        ("server.default.svc.cluster.local:8080", 400),
    ],
)
def test_connect_reaches_the_pods_application_only(into: Nodes, authority: str, status: int) -> None:
    addresses = {f"{name}{family}": into[name].address(family) for name in into.pods for family in (4, 6)}
    with echoing(into["server"], 4, 6) as callers, echoing(into["other"], 4, 6) as others:
        assert hbone(into, into["client"], authority.format(**addresses, **into["server"].ports)) == status
    assert len(callers) == (status == 200)
    assert others == []


FORGED = (
    ("forwarded", 'for="{twin}:1";host=x'),
    ("forwarded", "for={twin}"),
    ("x-forwarded-for", "{twin}"),
    ("baggage", "k8s.namespace.name=admitted,k8s.deployment.name=twin"),
    ("x-forwarded-network", "elsewhere"),
    ("x-forwarded-client-cert", "URI=spiffe://cluster.local/ns/admitted/sa/admitted"),
)


@pytest.mark.parametrize("family", [4, 6])
def test_one_of_two_pods_of_one_account_by_its_address(into: Nodes, family: int) -> None:
    """ipBlocks admits `twin`. `client` is of the same account, and says in headers that it is `twin`."""
    mesh, twin, client, server = Mesh(into), into["twin"], into["client"], into["server"]
    address = server.address(family)
    authority = f"[{address}]:{PORT}" if family == 6 else f"{address}:{PORT}"
    width = 128 if family == 6 else 32
    mesh.set(policy("twin", only(sourceIps=[f"{twin.address(family)}/{width}"]), action="Allow"))
    try:
        with echoing(server, 4, 6) as callers:
            assert hbone(into, twin, authority) == 200
            assert hbone(into, client, authority) == 401
            for name, value in FORGED:
                header = (name, value.format(twin=twin.address(family)))
                assert hbone(into, client, authority, (header,)) == 401, header
        assert callers == [twin.address(family)]
    finally:
        mesh.remove("default/twin")


def test_forged_headers_give_no_identity(into: Nodes) -> None:
    """A policy on namespace and principal, and a caller who claims both."""
    mesh, client, server = Mesh(into), into["client"], into["server"]
    authority = f"{server.address()}:{PORT}"
    admitted = only(namespaces=[{"Exact": "admitted"}]), only(principals=[{"Suffix": "/sa/admitted"}])
    mesh.set(policy("admitted", *admitted, action="Allow"))
    try:
        with echoing(server, 4) as callers:
            for name, value in FORGED:
                assert hbone(into, client, authority, ((name, value.format(twin=client.address())),)) == 401
            assert callers == []
            mesh.set(policy("admitted", only(principals=[{"Suffix": "/sa/same"}]), action="Allow"))
            assert hbone(into, client, authority) == 200
    finally:
        mesh.remove("default/admitted")


@pytest.mark.parametrize("family", [4, 6])
def test_plaintext_from_a_pods_address_has_no_identity(into: Nodes, family: int) -> None:
    """`client` has no engine: what it sends in clear text comes from an enrolled pod's address, and is nobody's."""
    mesh, client, server = Mesh(into), into["client"], into["server"]
    mine = client.identity.removeprefix("spiffe://")
    try:
        with echoing(server, 4, 6) as callers:
            with connect(client.path, server.address(family), PORT) as plain:  # no policy: open
                plain.sendall(b"x")
                assert plain.recv(1) == b"x"
            mesh.set(policy("strict", only(notPrincipals=[{"Presence": []}])))
            assert refused(client.path, server.address(family))
            assert mesh.engine(server).dump("denials")[-1]["identity"] == ""
            mesh.remove("default/strict")
            mesh.set(
                policy(
                    "named", only(principals=[{"Exact": mine}]), only(namespaces=[{"Exact": "default"}]), action="Allow"
                )
            )
            assert refused(client.path, server.address(family))
            authority = f"[{server.address(6)}]:{PORT}" if family == 6 else f"{server.address()}:{PORT}"
            assert hbone(into, client, authority) == 200
        assert callers == [client.address(family)] * 2
    finally:
        mesh.remove("default/strict", "default/named")


def test_a_cut_stream_is_reset_and_its_neighbours_go_on(into: Nodes) -> None:
    """Of two streams of one tunnel the one that is denied gets RST_STREAM; the tunnel and the other stay."""
    mesh, client, server = Mesh(into), into["client"], into["server"]
    with echoing(server, 4), Streams(into, client, server) as streams:
        with listen(server.path, server.address(), PORT + 1) as quiet:
            first = streams.open(f"{server.address()}:{PORT}")
            second = streams.open(f"{server.address()}:{PORT + 1}")
            accepted, _ = quiet.accept()
            with accepted:
                try:
                    mesh.set(policy("late", only(destinationPorts=[PORT + 1])))
                    assert streams.until_reset() == second
                    streams.send(first, b"still here")
                    assert streams.receive(first) == b"still here"
                    is_reset(accepted)
                finally:
                    mesh.remove("default/late")


class Streams:
    """A tunnel of the peer's with several streams."""

    def __init__(self, nodes: Nodes, source: Pod, to: Pod, leaf: Leaf | None = None) -> None:
        def dial() -> socket.socket:
            return socket.create_connection((to.address(), hbone_peer.PORT), hbone_peer.DEADLINE_S)

        raw = inside(source.path, dial)
        leaf = leaf or nodes.authority.leaf(source.identity)
        self._tls = hbone_peer.context(leaf, server=False).wrap_socket(raw)
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self._h2.initiate_connection()
        self._events: list[Any] = []

    def __enter__(self) -> "Streams":
        return self

    def __exit__(self, *_: object) -> None:
        self._tls.close()

    def _next(self, kind: str, stream: int = 0) -> Any:
        """The next event of this kind (of this stream), others are kept."""
        while True:
            for event in self._events:
                if type(event).__name__ == kind and stream in (0, event.stream_id):
                    self._events.remove(event)
                    return event
            self._tls.sendall(self._h2.data_to_send())
            data = self._tls.recv(65536)
            assert data, "the tunnel ended"
            self._events += self._h2.receive_data(data)

    def open(self, authority: str) -> int:
        """A stream that was answered 200."""
        stream: int = self._h2.get_next_available_stream_id()
        self._h2.send_headers(stream, [(":method", "CONNECT"), (":authority", authority)])
        headers = dict(self._next("ResponseReceived", stream).headers)
        assert headers[":status"] == "200"
        return stream

    def send(self, stream: int, data: bytes) -> None:
        self._h2.send_data(stream, data)

    def receive(self, stream: int) -> bytes:
        data: bytes = self._next("DataReceived", stream).data
        return data

    def until_closed(self) -> None:
        """Until the other side has ended the tunnel."""
        with suppress(ssl.SSLError, ConnectionResetError):
            while self._tls.recv(65536):
                pass

    def until_reset(self) -> int:
        """The number of the next stream that is reset."""
        number: int = self._next("StreamReset").stream_id
        return number


# -- certificates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_an_identity_without_certificate_fails_with_a_line(tmp_path: Path, way: str) -> None:
    """It does not hang: the pod's connections are refused and the log says which identity has none."""
    with Nodes(tmp_path, {"client": 0, "near": 0, "server": 1}) as nodes:
        mesh = Mesh(nodes)
        nodes.publish()
        pod = nodes["server"] if way == "plain" else nodes["client"]
        mesh.engine(pod).call(channel.IDENTITY_DEL, {"identity": pod.identity})
        assert refused(mesh.caller(way), mesh.target(way).address())
        logged(mesh, pod, f"no certificate for {pod.identity} within 5 s")
        nodes.certify(pod, nodes.authority.leaf(pod.identity))
        with conversation(mesh, way):
            pass


SOON = timedelta(seconds=4)


@pytest.mark.parametrize("whose", ["own", "the client's"])
def test_as_server_no_tunnel_outlives_a_certificate(tmp_path: Path, whose: str) -> None:
    """The peer would go on for ever; the engine ends it, and what it had let in."""
    with Nodes(tmp_path, {"client": 0, "server": 1}, engines=(False, True)) as nodes:
        mesh, client, server = Mesh(nodes), nodes["client"], nodes["server"]
        nodes.publish()
        leaf = nodes.authority.leaf(client.identity, not_after=SOON if whose != "own" else timedelta(hours=1))
        if whose == "own":
            nodes.certify(server, nodes.authority.leaf(server.identity, not_after=SOON))
        with listen(server.path, server.address(), PORT) as listener, Streams(nodes, client, server, leaf) as streams:
            streams.open(f"{server.address()}:{PORT}")
            accepted, _ = listener.accept()
            with accepted:
                is_reset(accepted)
            streams.until_closed()
        logged(mesh, server, "a certificate of the tunnel has expired")
        if whose == "own":  # and new ones wait for another one
            nodes.certify(server, nodes.authority.leaf(server.identity))
        with echoing(server, 4):
            assert hbone(nodes, client, f"{server.address()}:{PORT}") == 200


@pytest.mark.parametrize("whose", ["own", "the server's"])
def test_as_client_no_tunnel_outlives_a_certificate(tmp_path: Path, whose: str) -> None:
    """The same from the other side. Without another certificate of its own the pod's connections are refused."""
    with Nodes(tmp_path, {"client": 0, "server": 1}, engines=(True, False)) as nodes:
        mesh, client, server = Mesh(nodes), nodes["client"], nodes["server"]
        nodes.publish()
        leaf = nodes.authority.leaf(server.identity, not_after=SOON if whose != "own" else timedelta(hours=1))
        if whose == "own":
            nodes.certify(client, nodes.authority.leaf(client.identity, not_after=SOON))
        with hbone_peer.Server(server.path, server.address(), leaf):
            with connect(client.path, server.address(), PORT) as end:
                end.sendall(b"x")
                assert end.recv(1) == b"x"
                is_reset(end)
            logged(mesh, client, "a certificate of the tunnel has expired")
            assert refused(client.path, server.address())
        if whose == "own":
            logged(mesh, client, f"the certificate for {client.identity} has expired")
        nodes.certify(client, nodes.authority.leaf(client.identity))
        with hbone_peer.Server(server.path, server.address(), nodes.authority.leaf(server.identity)):
            with connect(client.path, server.address(), PORT) as end:
                end.sendall(b"x")
                assert end.recv(1) == b"x"


def test_a_root_is_rotated(tmp_path: Path) -> None:
    """Two roots overlap: nothing fails. When the old one goes, what it had verified is cut, the rest goes on."""
    with Nodes(tmp_path, {"client": 0, "server": 1}) as nodes:
        mesh, old, new = Mesh(nodes), nodes.authority, Authority("another root")
        nodes.publish()

        def certify(authority: Authority, *trusted: Authority) -> None:
            for pod in (nodes["client"], nodes["server"]):
                leaf = authority.leaf(pod.identity)
                roots = "".join(each.leaf(pod.identity).roots for each in trusted)
                nodes.certify(pod, Leaf(leaf.key, leaf.chain, roots))

        with conversation(mesh, "hbone") as first:
            certify(old, old, new)
            talk(*first)
            certify(new, old, new)
            with conversation(mesh, "hbone", port=PORT + 1) as second:
                talk(*first)
                certify(new, new)
                is_reset(*first)
                talk(*second)
        logged(mesh, nodes["client"], "the root of the peer's certificate is not trusted any more")
        with conversation(mesh, "hbone"):
            pass
