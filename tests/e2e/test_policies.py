"""Policies in the lab: what `sidestep authz check` answers is what upstream's tests say, and what happens.

The cases are those of tests/tunnel/policy_cases.py that can be written as an AuthorizationPolicy and acted by a few
pods: policies change, pods stay. Addresses and trust domain are the lab's. Each case is asked of the command and then
tried by a connection.
"""

import contextlib
import functools
import io
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pytest
import yaml

from sidestep.__main__ import main
from sidestep.cli.nodes import find
from sidestep.kube.client import KubeClient
from tests.e2e.conftest import pod
from tests.harness.lab import LABEL, Lab, eventually
from tests.tunnel.policy_cases import CASES, Case
from tests.tunnel.policy_model import Match, Policy

SECURITY = "/apis/security.istio.io/v1"
PORTS = (80, 8080, 9090, 12345)
# The upstream tests' callers and destinations, and who plays them here.
CALLERS = {
    "": "namespace/plain",
    "spiffe://td/ns/namespace/sa/account": "namespace/caller",
    "spiffe://td-alt/ns/ns-alt/sa/sa=alt": "ns-alt/other",
    "spiffe://td/ns/a/sa/account": "a/caller",
    "spiffe://td/ns/b/sa/account": "b/caller",
    "spiffe://td/ns/bad/sa/account": "bad/caller",
}
SERVERS = {"10.0.0.2": "namespace/server", "fd00::2": "namespace/server", "10.0.0.4": "namespace/elsewhere"}
LITERAL = ("10.0.0.0/8", "10.0.0.9/32", "192.0.2.0/24", "0.0.0.0/0", "::/0", "fd00::/8")
SOURCE = {
    "namespaces": "namespaces",
    "notNamespaces": "notNamespaces",
    "principals": "principals",
    "notPrincipals": "notPrincipals",
    "sourceIps": "ipBlocks",
    "notSourceIps": "notIpBlocks",
    "serviceAccounts": "serviceAccounts",
    "notServiceAccounts": "notServiceAccounts",
}
OPERATION = {"destinationPorts": "ports", "notDestinationPorts": "notPorts"}
WHEN = {"destinationIps": "values", "notDestinationIps": "notValues"}

SERVER = f"""
import socket, threading
def serve(c):
    with c:
        while data := c.recv(100):
            c.sendall(data)
def listen(port):
    made = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
    while True:
        threading.Thread(target=serve, args=(made.accept()[0],), daemon=True).start()
for port in {PORTS}:
    threading.Thread(target=listen, args=(port,)).start()
"""
CLIENT = """
import socket, sys
for line in sys.stdin:
    address, port = line.split()
    try:
        with socket.create_connection((address, int(port)), timeout=20) as c:
            c.sendall(b"hello")
            print("open" if c.recv(100) == b"hello" else "closed", flush=True)
    except ConnectionError:
        print("closed", flush=True)
"""


TALK = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20) as c:
    for line in sys.stdin:
        try:
            c.sendall(b"x")
            print("open" if c.recv(100) else "ended", flush=True)
        except ConnectionResetError:
            print("reset", flush=True)
            break
"""


def objects() -> list[dict[str, Any]]:
    """Callers on node1, servers on node2; `plain` is in the namespace and not in the mesh."""
    found: list[dict[str, Any]] = []
    for name in sorted({caller.partition("/")[0] for caller in CALLERS.values()}):
        metadata = {"name": name, "labels": {LABEL: "ambient"}}
        found.append({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
    sleeper = ["sleep", "infinity"]
    accounts = {"caller": "account", "other": "sa-alt"}
    for caller in CALLERS.values():
        namespace, _, name = caller.partition("/")
        account, made = pod(name, "node1", sleeper, namespace=namespace)
        account["metadata"] = {"name": accounts.get(name, name), "namespace": namespace}
        made["spec"]["serviceAccountName"] = accounts.get(name, name)
        if name == "plain":
            made["metadata"]["labels"][LABEL] = "none"
        found += [account, made]
    for server in ("server", "elsewhere"):
        found += pod(server, "node2", ["/usr/bin/python3", "-c", SERVER], 8080, namespace="namespace")
    # Asked for by its namespace's label, and impossible: somebody else's sidecar.
    account, made = pod("sidecar", "node1", sleeper, namespace="namespace")
    made["metadata"]["annotations"] = {"sidecar.istio.io/status": "{}"}
    return [*found, account, made]


class World:
    """The lab, one client process for each caller, and the policies that are there."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.there: set[str] = set()
        self._clients: dict[str, subprocess.Popen[str]] = {}
        self._addresses: dict[tuple[str, int], str] = {}
        self._nodes = find(lab.name)

    def address(self, name: str, family: int) -> str:
        if (name, family) not in self._addresses:
            self._addresses[name, family] = self.lab.address(name, family)
        return self._addresses[name, family]

    def connect(self, caller: str, address: str, port: int) -> bool:
        """Whether an application of that pod gets through."""
        if caller not in self._clients:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 1}
            self._clients[caller] = self.lab.popen(caller, "/usr/bin/python3", "-c", CLIENT, **pipes)
        client = self._clients[caller]
        assert client.stdin is not None and client.stdout is not None
        client.stdin.write(f"{address} {port}\n")
        answer = client.stdout.readline().strip()
        assert answer in ("open", "closed"), f"{caller}: {answer!r}"
        return answer == "open"

    @contextlib.contextmanager
    def conversation(self, caller: str, server: str) -> Iterator[Callable[[], str]]:
        """A connection that stays. Called, it sends a byte, and says `open` where it came back, else what ended it."""
        words = ("/usr/bin/python3", "-c", TALK, self.address(server, 4), "8080")
        with self.lab.popen(caller, *words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1) as talk:
            assert talk.stdin is not None and talk.stdout is not None
            stdin, stdout = talk.stdin, talk.stdout

            def ask() -> str:
                stdin.write("\n")
                return stdout.readline().strip()

            yield ask

    def close(self) -> None:
        for client in self._clients.values():
            client.communicate(timeout=20)

    def command(self, *words: str) -> tuple[int, Any]:
        """`sidestep WORDS --json` of this lab: exit status and answer."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            status = main([*words, "--lab", self.lab.name, "--json"])
        return status, json.loads(out.getvalue())

    def put(self, *made: Mapping[str, Any]) -> None:
        """These AuthorizationPolicies and no others; returns when the engines hold them. The old ones have to be gone
        first: one of the same name would be taken for the new one.
        """

        async def remove(client: KubeClient) -> None:
            for key in sorted(self.there):
                await client.delete(_path(*key.split("/")))

        async def create(client: KubeClient) -> None:
            for each in made:
                await client.create(_path(each["metadata"]["namespace"]), each)

        self.lab.ask(remove)
        self.there = set()
        self.wait(self.there)
        self.lab.ask(create)
        self.there = {f"{each['metadata']['namespace']}/{each['metadata']['name']}" for each in made}
        self.wait(self.there)

    def wait(self, keys: set[str]) -> None:
        """Until both engines hold these records and no others."""

        def held() -> bool:
            return all({row["key"] for row in node.ask("/policies")} == keys for node in self._nodes)

        eventually(f"the engines hold {keys}", held)


def _path(namespace: str, name: str = "") -> str:
    return f"{SECURITY}/namespaces/{namespace}/authorizationpolicies" + (f"/{name}" if name else "")


class NotLive(Exception):
    """A case that no AuthorizationPolicy can say, or no pod can act."""


def _text(value: Mapping[str, Any]) -> str:
    ((kind, text),) = value.items()
    if kind == "Presence":
        return "*"
    if not text or "spiffe:" in text:
        raise NotLive(text)
    text = text.replace("td/", "cluster.local/") if text.startswith("td/") else text
    shapes: dict[str, str] = {"Exact": text, "Prefix": f"{text}*", "Suffix": f"*{text}"}
    return shapes[kind]


def _nets(world: World, nets: Iterable[str], source: bool) -> list[str]:
    found = []
    for net in nets:
        if net in ("10.0.0.1/32", "fd00::1/128") and source:
            family = 6 if ":" in net else 4
            found += [world.address(name, family) for name in ("namespace/caller", "namespace/plain")]
        elif net in ("10.0.0.2/32", "fd00::2/128"):
            found.append(world.address("namespace/server", 6 if ":" in net else 4))
        elif net == "10.0.0.1/24" and not source:
            found.append(world.address("namespace/server", 4).rpartition(".")[0] + ".1/24")
        elif net in LITERAL:
            found.append(net)
        else:
            raise NotLive(net)
    return found


def _parts(world: World, match: Match) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A match as source, operation and condition on destination.ip: all three must hold."""
    source: dict[str, Any] = {}
    operation: dict[str, Any] = {}
    when: dict[str, Any] = {}
    for field, values in match.items():
        if field in ("sourceIps", "notSourceIps"):
            source[SOURCE[field]] = _nets(world, values, True)
        elif field in ("serviceAccounts", "notServiceAccounts"):
            source[SOURCE[field]] = [f"{each['namespace']}/{each['serviceAccount']}" for each in values]
        elif field in SOURCE:
            source[SOURCE[field]] = [_text(each) for each in values]
        elif field in OPERATION:
            operation[OPERATION[field]] = [str(each) for each in values]
        else:
            when[WHEN[field]] = _nets(world, values, False)
    return source, operation, when


def _rule(world: World, rule: Any) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for clause in rule:
        parts = [_parts(world, match) for match in clause]
        kinds = {tuple(bool(part) for part in each) for each in parts}
        if not parts or (len(parts) > 1 and kinds not in ({(True, False, False)}, {(False, True, False)})):
            raise NotLive("a clause without matches, or of different matches")
        for index, (name, inner) in enumerate((("from", "source"), ("to", "operation"), ("when", ""))):
            found = [each[index] for each in parts if each[index]]
            if found and name in made:
                raise NotLive(f"two clauses of {name}")
            if found:
                made[name] = [{inner: each} if inner else {"key": "destination.ip", **each} for each in found]
        if kinds == {(False, False, False)}:
            raise NotLive("an empty match")
    return made


def _policy(world: World, policy: Policy, case: Case) -> dict[str, Any]:
    """The AuthorizationPolicy."""
    spec: dict[str, Any] = {"action": policy["action"].upper()}
    metadata: dict[str, Any] = {"name": policy["name"], "namespace": policy["namespace"]}
    if (policy["scope"] == "Global") != (policy["namespace"] == "istio-system"):
        raise NotLive("a global policy of another namespace")
    if policy["scope"] == "WorkloadSelector":
        if f"{policy['namespace']}/{policy['name']}" not in case.workload.policies:
            raise NotLive("a selector that nobody names")
        spec["selector"] = {"matchLabels": {"app": "server"}}
    if policy["dryRun"]:
        metadata["annotations"] = {"istio.io/dry-run": "true"}
    if not policy["rules"] and policy["action"] == "Deny":
        raise NotLive("a DENY without rules is no record")
    if policy["rules"]:
        spec["rules"] = [_rule(world, rule) for rule in policy["rules"]]
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": metadata,
        "spec": spec,
    }


def live(world: World) -> Iterator[tuple[Case, list[dict[str, Any]]]]:
    """The cases that can be acted, with their policies."""
    for case in CASES:
        connection = case.connection
        known = connection.identity in CALLERS and connection.destination in SERVERS and connection.port in PORTS
        if not known or case.workload.namespace != "namespace" or case.verdict.reason == "not received":
            continue
        with contextlib.suppress(NotLive):
            yield case, [_policy(world, policy, case) for policy in case.policies]


def _addresses(lab: Lab, name: str) -> Any:
    return lab.pod(name)["status"].get("podIPs")


def _enrolled(lab: Lab, namespace: str, wanted: set[str]) -> bool:
    return lab.enrolled(namespace) == wanted


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, same_node: str) -> Iterator[World]:
    manifest = tmp_path_factory.mktemp("policies") / "world.yaml"
    manifest.write_text(yaml.safe_dump_all(objects()))
    lab = Lab(f"a{os.getpid() % 10000}")
    made = None
    try:
        lab.up(manifest, options=["--same-node", same_node])
        for name in {caller.partition("/")[0] for caller in CALLERS.values()}:
            wanted = {each["metadata"]["name"] for each in lab.pods(name)} - {"plain", "sidecar"}
            eventually(f"{name} enrolled", functools.partial(_enrolled, lab, name, wanted))
        made = World(lab)
        yield made
    finally:
        if made is not None:
            made.close()
        lab.down()


def test_what_is_answered_is_what_happens(world: World) -> None:
    """Each case: by upstream's verdict, by the command's answer, by a connection."""
    done = differences = 0
    names: set[str] = set()
    applied: list[dict[str, Any]] | None = None
    cases = sorted(live(world), key=lambda each: json.dumps(each[1], sort_keys=True))
    for case, policies in cases:
        if policies != applied:
            world.put(*policies)
            applied = policies
        family = 6 if ":" in case.connection.source else 4
        caller, server = CALLERS[case.connection.identity], SERVERS[case.connection.destination]
        source, target = world.address(caller, family), world.address(server, family)
        to = f"[{target}]:{case.connection.port}" if family == 6 else f"{target}:{case.connection.port}"
        status, answer = world.command("authz", "check", source, to)
        [check] = answer["checks"]
        happened = world.connect(caller, target, case.connection.port)
        # The policy that decided, and the first that allowed nobody, are named; a caller without identity is one here.
        said = (check["allow"], check["policy"], check["rule"])
        expected = (case.verdict.allow, case.verdict.policy, case.verdict.rule)
        if said != expected or happened != case.verdict.allow or status != (0 if case.verdict.allow else 1):
            differences += 1
            print(f"{case.name} ({case.source}): {expected}, answered {said}, happened {happened}\n  {policies}")
        assert bool(check["from"]["identity"]) == bool(case.connection.identity)
        done += 1
        names.add(case.source)
    world.put()
    allowed = sum(1 for case, _ in cases if case.verdict.allow)
    print(f"{done} cases of {len(names)} sources, {allowed} allowed, {done - allowed} denied")
    assert differences == 0
    assert done >= 100 and 30 <= allowed <= done - 30


def test_by_names_and_without_a_port(world: World) -> None:
    """Pods and accounts by name; the port is the one that the pod declares."""
    rule = {"from": [{"source": {"serviceAccounts": ["namespace/account"]}}]}
    policy = {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "only-account", "namespace": "namespace"},
        "spec": {"selector": {"matchLabels": {"app": "server"}}, "rules": [rule]},
    }
    world.put(policy)
    for caller, status in (("namespace/caller", 0), ("namespace/sa/account", 0), ("a/sa/account", 1), ("a/caller", 1)):
        got, answer = world.command("authz", "check", caller, "namespace/server")
        assert (got, {check["to"]["port"] for check in answer["checks"]}) == (status, {8080}), caller
        assert {check["answered_by"] for check in answer["checks"]} == {"node2"}
        assert len({check["to"]["address"] for check in answer["checks"]}) == 2, "both families"
    stranger = "spiffe://elsewhere/ns/namespace/sa/account"  # of another trust domain: no matter what the policy says
    got, answer = world.command("authz", "check", stranger, "namespace/server")
    assert got == 1 and all("trust domain is elsewhere" in check["reason"] for check in answer["checks"])
    got, answer = world.command("authz", "check", "namespace/plain", "namespace/server")
    assert got == 1 and answer["checks"][0]["from"]["identity"] == ""
    assert any("namespace/plain is not enrolled" in note for note in answer["notes"])
    assert main(["authz", "check", "a/caller", "namespace/plain", "--lab", world.lab.name]) == 2
    assert main(["authz", "check", "a/nobody", "namespace/server", "--lab", world.lab.name]) == 2
    vip = world.lab.ask(lambda client: client.get("/api/v1/namespaces/namespace/services/server"))["spec"]["clusterIP"]
    for caller, status in (("namespace/caller", 0), ("a/caller", 1)):
        got, answer = world.command("authz", "check", caller, f"{vip}:8080")
        assert (got, {check["to"]["name"] for check in answer["checks"]}) == (status, {"namespace/server"})
    world.put()


def test_one_page_about_a_pod(world: World) -> None:
    policy = {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "no-b", "namespace": "namespace"},
        "spec": {
            "action": "DENY",
            "selector": {"matchLabels": {"app": "server"}},
            "rules": [{"from": [{"source": {"namespaces": ["b"]}}]}],
        },
    }
    world.put(policy)
    assert not world.connect("b/caller", world.address("namespace/server", 4), 8080)
    assert world.connect("a/caller", world.address("namespace/server", 4), 8080)
    status, page = world.command("describe", "pod", "namespace/server")
    assert status == 0 and page["enrolled"] and page["mode"] == "strict" and page["node"] == "node2"
    assert page["identity"] == "spiffe://cluster.local/ns/namespace/sa/server"
    assert page["certificate"]["state"] == "available" and page["certificate"]["error"] == ""
    assert [(each["name"], each["action"], each["scope"]) for each in page["policies"]] == [
        ("namespace/no-b", "DENY", "selector")
    ]
    assert [each["name"] for each in page["services"]] == ["namespace/server.namespace.svc.cluster.local"]
    last = page["denials"][-1]
    assert last["identity"] == "spiffe://cluster.local/ns/b/sa/account" and last["policy"] == "namespace/no-b"
    status, page = world.command("describe", "pod", "b/caller")
    assert status == 0 and page["policies"] == []
    assert page["denials"][-1]["src"].startswith(world.address("b/caller", 4)), "denied elsewhere, as the caller"
    status, page = world.command("describe", "pod", "namespace/plain")
    assert (status, page["enrolled"], page["why"], page["identity"]) == (0, False, "pod label says none", "")
    assert main(["describe", "pod", "namespace/nobody", "--lab", world.lab.name]) == 1
    world.put()


def test_what_is_not_enforced_is_told(world: World) -> None:
    metadata = {"name": "http", "namespace": "namespace"}
    rules = [{"to": [{"operation": {"methods": ["GET"]}}]}]
    http = {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": metadata,
        "spec": {"action": "DENY", "rules": rules},
    }
    good = {**http, "metadata": {**metadata, "name": "good"}, "spec": {"action": "DENY", "rules": [_NOBODY]}}
    world.put(good)
    assert [row["refused_policies"] for row in world.command("status")[1]] == [[], []]
    status, answer = world.command("policies")
    assert status == 0 and answer["source"] == "control plane"
    assert [(row["name"], row["enforced"]) for row in answer["policies"]] == [("good", True)]
    world.put(http, good)
    status, answer = world.command("policies")
    assert status == 1
    found = {row["name"]: row for row in answer["policies"]}
    assert found["good"]["enforced"] and not found["http"]["enforced"]
    assert any("NOT ENFORCED" in line for line in found["http"]["not_enforced"])
    kept = {**http, "spec": {"action": "ALLOW", "rules": [*rules, {}]}}
    world.put(kept)
    got, answer = world.command("authz", "check", "a/caller", "namespace/server")
    assert got == 0 and {check["rule"] for check in answer["checks"]} == {1}, "its number in the object"
    world.put(http, good)
    for row in world.command("status")[1]:
        [refused] = row["refused_policies"]
        said = (refused["kind"], refused["name"], refused["reason"])
        assert said == ("AuthorizationPolicy", "http", "UnsupportedValue")
        assert "to[0].operation.methods" in refused["message"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main(["status", "--lab", world.lab.name])
    assert re.search(r"^namespace/http +AuthorizationPolicy +.*to\[0\]\.operation\.methods", out.getvalue(), re.M)
    world.put()


def test_a_peer_authentication_is_in_force_when_the_engines_hold_its_records(world: World) -> None:
    path = f"{SECURITY}/namespaces/namespace/peerauthentications"
    selector = {"matchLabels": {"app": "server"}}
    spec = {"selector": selector, "mtls": {"mode": "STRICT"}, "portLevelMtls": {"9090": {"mode": "PERMISSIVE"}}}
    metadata = {"name": "own", "namespace": "namespace"}
    made = {"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication", "metadata": metadata, "spec": spec}
    world.put()
    world.lab.apply(made)
    try:
        world.wait({"istio-system/istio_converted_static_strict", "namespace/converted_peer_authentication_own"})
        status, answer = world.command("policies")
        assert [(row["name"], row["not_enforced"]) for row in answer["policies"]] == [("own", [])] and status == 0
        target = world.address("namespace/server", 4)
        eventually("the server's record names it", lambda: not world.connect("namespace/plain", target, 8080))
        for port, status in ((8080, 1), (9090, 0)):
            assert world.connect("namespace/plain", target, port) is not bool(status)
            got, answer = world.command("authz", "check", "namespace/plain", f"namespace/server:{port}")
            assert got == status and answer["checks"][0]["from"]["identity"] == ""
    finally:
        world.lab.ask(lambda client: client.delete(f"{path}/own"))
        world.put()


def test_a_changed_label_cuts_what_is_open_now(world: World) -> None:
    """From the API to the socket: the label brings a selector DENY, and takes it away again."""
    closed = {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "closed", "namespace": "namespace"},
        "spec": {"action": "DENY", "selector": {"matchLabels": {"tier": "closed"}}, "rules": [{}]},
    }
    world.put(closed)
    path = "/api/v1/namespaces/namespace/pods/server"

    def label(value: str | None) -> None:
        world.lab.ask(lambda client: client.patch(path, {"metadata": {"labels": {"tier": value}}}))

    with world.conversation("a/caller", "namespace/server") as cut:
        with world.conversation("a/caller", "namespace/elsewhere") as kept:
            assert (cut(), kept()) == ("open", "open")
            label("closed")
            try:
                assert eventually("it is cut", lambda: said if (said := cut()) != "open" else None) == "reset"
                assert not world.connect("a/caller", world.address("namespace/server", 6), 8080)
                assert kept() == "open"
            finally:
                label(None)
    eventually("it is let in again", lambda: world.connect("a/caller", world.address("namespace/server", 6), 8080))
    world.put()


def test_a_new_pod_and_a_selector_deny_that_was_there_before(world: World) -> None:
    """As soon as the pod has an address it is called, again and again, by one with and one without an identity; nobody
    ever gets in. The pod that no policy selects, made in the same way, is the control.
    """
    closed = {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "closed", "namespace": "namespace"},
        "spec": {"action": "DENY", "selector": {"matchLabels": {"app": "born-closed"}}, "rules": [{}]},
    }
    world.put(closed)
    for name in ("born-closed", "born-open"):
        pod_of = f"namespace/{name}"
        world.lab.apply(*pod(name, "node2", ["/usr/bin/python3", "-c", SERVER], 8080, namespace="namespace"))
        try:
            eventually("an address", functools.partial(_addresses, world.lab, pod_of))
            address = world.lab.address(pod_of)
            callers = {"a/caller", "namespace/plain"}
            got_in: set[str] = set()
            rounds, deadline = 0, time.monotonic() + 120
            # The closed one is called until it is ready and then some, the open one until both were let in.
            while got_in != callers if name == "born-open" else rounds < 5 or not world.lab.ready(pod_of):
                assert time.monotonic() < deadline, f"{name}: {got_in} after {rounds} rounds"
                got_in |= {caller for caller in callers if world.connect(caller, address, 8080)}
                rounds += 1
            print(name, rounds, got_in)
            if name == "born-closed":
                assert got_in == set()
                got, answer = world.command("authz", "check", "a/caller", f"{pod_of}:8080")
                assert got == 1 and {each["policy"] for each in answer["checks"]} == {"namespace/closed"}
        finally:
            world.lab.delete_pod(pod_of)
    world.put()


_NOBODY = {"from": [{"source": {"namespaces": ["nobody"]}}]}


def test_a_pod_that_cannot_be_enrolled_says_so_in_an_event(world: World) -> None:
    def events() -> list[dict[str, Any]]:
        items = world.lab.ask(lambda client: client.list("/api/v1/namespaces/namespace/events"))["items"]
        return [each for each in items if each["involvedObject"]["kind"] == "Pod"]

    found = eventually("an event", events)
    assert [(each["involvedObject"]["name"], each["reason"], each["count"]) for each in found] == [
        ("sidecar", "NotEnrolled", 1)
    ]
    assert "sidecar" in found[0]["message"] and found[0]["type"] == "Warning"
