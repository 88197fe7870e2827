"""`sidestep policies`, `authz check` and `describe`: names, who is asked about what, and what people read."""

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sidestep.cli import authz, describe, policies
from sidestep.cli.authz import Caller, Name, Target, parse
from sidestep.cli.mesh import Mesh
from sidestep.cli.nodes import Answering, Node, NodeError

TD = "cluster.local"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("shop/web", Name("pod", "shop", "web")),
        ("shop/web-0.x", Name("pod", "shop", "web-0.x")),
        ("shop/sa/web", Name("account", "shop", "web")),
        ("sa/sa/sa", Name("account", "sa", "sa")),
        ("sa/web", Name("pod", "sa", "web")),
        ("spiffe://td.example/ns/shop/sa/web", Name("account", "shop", "web", "td.example")),
        ("10.0.0.1", Name("address", address="10.0.0.1")),
        ("fd00::1", Name("address", address="fd00::1")),
        ("[fd00::1]", Name("address", address="fd00::1")),
        ("FD00:0::1", Name("address", address="fd00::1")),
    ],
)
def test_from_and_to(text: str, name: Name) -> None:
    assert parse(text, False) == name
    assert parse(text, True) == name


@pytest.mark.parametrize(
    ("text", "port", "rest"),
    [
        ("shop/web:80", 80, Name("pod", "shop", "web", port=80)),
        ("shop/sa/web:65535", 65535, Name("account", "shop", "web", port=65535)),
        ("spiffe://td/ns/shop/sa/web:1", 1, Name("account", "shop", "web", "td", port=1)),
        ("10.0.0.1:8080", 8080, Name("address", address="10.0.0.1", port=8080)),
        ("[fd00::1]:8080", 8080, Name("address", address="fd00::1", port=8080)),
        ("fd00::8080", 0, Name("address", address="fd00::8080")),
    ],
)
def test_to_with_a_port(text: str, port: int, rest: Name) -> None:
    assert parse(text, True) == rest and rest.port == port


@pytest.mark.parametrize(
    "text",
    [
        "",
        "web",
        "/web",
        "shop/",
        "shop/web/x",
        "shop/sa/",
        "Shop/web",
        "shop/web:",
        "shop/web:0",
        "shop/web:65536",
        "shop/web:x",
        "shop/web:-1",
        "shop/web:\u0661",
        "10.0.0.256",
        "[fd00::1]:",
        "spiffe://td/ns/shop/web",
        "spiffe://td",
        "shop/web:80:80",
        "shop/we b",
    ],
)
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"is neither|is no port"):
        parse(text, True)


def workload(name: str, *ips: str, account: str = "", node: str = "n1", protocol: str = "HBONE", **more: Any) -> Any:
    account = account or name
    return {
        "uid": f"Kubernetes//Pod/shop/{name}",
        "name": name,
        "namespace": "shop",
        "serviceAccount": account,
        "identity": f"spiffe://{TD}/ns/shop/sa/{account}",
        "workloadIps": list(ips),
        "node": node,
        "protocol": protocol,
        "networkMode": "Standard",
        **more,
    }


SERVICE = "shop/db.shop.svc.cluster.local"
SERVES: dict[str, Any] = {"services": {SERVICE: {"80": 8080, "81": 8081}}}


def mesh() -> Mesh:
    node = Node(Path("/nowhere"))
    agents = [Answering(node, name, {"node": name, "settings": {"trust_domain": TD}}) for name in ("n1", "n2")]
    pods: dict[str, Any] = {
        "shop/web": {"namespace": "shop", "name": "web", "declared_ports": [9000]},
        "shop/host": {"namespace": "shop", "name": "host", "host_network": True, "addresses": ["10.5.0.1"]},
    }
    records: dict[str, list[Any]] = {
        "workloads": [
            workload("web", "10.0.0.1", "fd00::1"),
            workload("web2", "10.0.0.2", account="web"),
            workload("db", "10.0.1.1", "fd00::2", node="n2", **SERVES),
            workload("plain", "10.0.0.9", protocol="TCP", **SERVES),
            workload("lost", "10.0.0.8", protocol="TCP", account="web"),
            workload("agent", "10.0.0.7", networkMode="HostNetwork"),
        ],
        "services": [
            {
                "namespace": "shop",
                "name": "db",
                "hostname": "db.shop.svc.cluster.local",
                "vips": ["/10.9.0.1", "/fd99::1"],
            },
            {"namespace": "shop", "name": "front", "hostname": "front.shop.svc.cluster.local", "vips": ["/10.9.0.2"]},
            {"namespace": "shop", "name": "headless", "hostname": "headless.shop.svc.cluster.local"},
        ],
    }
    return Mesh(agents, pods, lambda noun, text: records[noun])


@pytest.mark.parametrize(
    ("text", "who", "note"),
    [
        ("shop/web", [("web", True, "10.0.0.1"), ("web", True, "fd00::1")], ""),
        ("fd00::1", [("web", True, "fd00::1")], ""),
        ("shop/plain", [("plain", False, "10.0.0.9")], "is not enrolled: it has no identity"),
        ("10.0.0.9", [("plain", False, "10.0.0.9")], "is not enrolled: it has no identity"),
        ("shop/agent", [("agent", False, "10.0.0.7")], "uses the host's network: it has no identity"),
        ("192.0.2.1", [("", False, "192.0.2.1")], "is no workload of the mesh"),
        ("shop/host", [("host", False, "10.5.0.1")], "shop/host uses the host's network: it has no identity"),
        (
            "shop/sa/web",
            [("web", True, "10.0.0.1"), ("web", True, "fd00::1"), ("web2", True, "10.0.0.2")],
            "shop/lost runs as shop/sa/web but is not enrolled",
        ),
        ("shop/sa/nobody", [("", True, "0.0.0.0"), ("", True, "::")], "no enrolled pod runs as shop/sa/nobody"),
        ("spiffe://elsewhere/ns/shop/sa/web", [("", True, "0.0.0.0"), ("", True, "::")], "no enrolled pod runs as"),
    ],
)
def test_callers(text: str, who: list[tuple[str, bool, str]], note: str) -> None:
    notes: list[str] = []
    found = authz.callers(mesh(), parse(text, False), notes)
    assert [(bool(each.identity), each.address) for each in found] == [(known, address) for _, known, address in who]
    assert all(each.name == f"shop/{name}" for each, (name, _, _) in zip(found, who, strict=True) if name)
    assert note in "; ".join(notes) and bool(note) == bool(notes)
    if text.startswith("spiffe:"):
        assert {each.identity for each in found} == {text}


@pytest.mark.parametrize(
    ("text", "where", "note"),
    [
        ("shop/db", [("10.0.1.1", 8080), ("10.0.1.1", 8081), ("fd00::2", 8080), ("fd00::2", 8081)], ""),
        ("shop/db:5", [("10.0.1.1", 5), ("fd00::2", 5)], ""),
        ("10.0.1.1:5", [("10.0.1.1", 5)], ""),
        ("10.0.1.1", [("10.0.1.1", 8080), ("10.0.1.1", 8081)], ""),
        ("shop/web", [("10.0.0.1", 9000), ("fd00::1", 9000)], ""),
        ("10.9.0.1:80", [("10.0.1.1", 8080)], "shop/plain is not enrolled"),
        ("fd99::1", [("fd00::2", 8080), ("fd00::2", 8081)], "is Service shop/db"),
        ("shop/sa/web:7", [("10.0.0.1", 7), ("fd00::1", 7), ("10.0.0.2", 7)], "shop/lost is not enrolled"),
    ],
)
def test_targets(text: str, where: list[tuple[str, int]], note: str) -> None:
    notes: list[str] = []
    found = authz.targets(mesh(), parse(text, True), notes)
    assert [(each.address, each.port) for each in found] == where
    assert note in "; ".join(notes)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("shop/plain:80", "shop/plain is not enrolled: sidestep does not guard it"),
        ("shop/agent:80", "shop/agent uses the host's network"),
        ("shop/host:80", "pod shop/host has no record in the mesh \\(it uses the host's network\\)"),
        ("shop/nobody:80", "no workload shop/nobody is known"),
        ("shop/front:80", "shop/front is a Service, not a pod; as TO say its address \\(10.9.0.2\\)"),
        ("shop/headless:80", "shop/headless is a Service, not a pod; it has no address: say a pod"),
        ("shop/sa/nobody:80", "no workload shop/sa/nobody is known"),
        ("shop/web2", "shop/web2 declares no port and no Service leads to it: say shop/web2:PORT"),
        ("192.0.2.1:80", "is no workload and no Service"),
        ("10.9.0.1:99", "has no endpoint with port 99"),
    ],
)
def test_where_nothing_decides(text: str, why: str) -> None:
    with pytest.raises(NodeError, match=why):
        authz.targets(mesh(), parse(text, True), [])


STATIC = f"istio-system/{policies.STATIC}"


def test_pairs_are_of_one_family_and_not_with_oneself() -> None:
    notes: list[str] = []
    callers = [Caller("shop/web", "x", "10.0.0.1"), Caller("shop/web", "x", "fd00::1")]
    to = [Target("shop/db", "n2", "10.0.1.1", 80), Target("shop/db", "n2", "fd00::2", 80)]
    assert authz.pairs(callers, [*to, Target("shop/web", "n1", "10.0.0.1", 80)], notes) == [
        (callers[0], to[0]),
        (callers[1], to[1]),
    ]
    assert len(notes) == 1 and "its own address" in notes[0]


def check(allow: bool, known: bool = True, address: str = "10.0.0.1", identity: str = "spiffe://x", **more: Any) -> Any:
    return {
        "from": {"name": "shop/web", "identity": identity, "address": address},
        "to": {"name": "shop/db", "node": "n2", "address": "10.0.1.1", "port": 80},
        "allow": allow,
        "known": known,
        "policy": "shop/p",
        "rule": 1,
        "reason": "explicitly denied by: shop/p",
        "policies": [{"name": "shop/p", "action": "Deny", "dry_run": False, "matched": True, "rule": 1}],
        "answered_by": "n2",
        **more,
    }


@pytest.mark.parametrize(
    ("checks", "status"),
    [
        ([], 2),
        ([check(True)], 0),
        ([check(True), check(False)], 1),
        ([check(True), check(False, known=False)], 2),
        ([check(False), check(False, known=False)], 1),
    ],
)
def test_exit_status(checks: list[Any], status: int) -> None:
    assert authz.status_of(checks) == status


def test_what_people_read() -> None:
    same = [check(False), check(False, address="fd00::1"), check(True, rule=-1, reason="no policy selects it")]
    denied, allowed = authz.told(same)
    assert denied.splitlines() == [
        "DENIED: shop/web -> shop/db:80",
        "  from     spiffe://x at 10.0.0.1, fd00::1",
        "  to       10.0.1.1",
        "  because  explicitly denied by: shop/p, rules[1]",
        "  policy   shop/p (DENY) matches by rules[1]",
    ]
    assert allowed.startswith("allowed: ") and "because  no policy selects it\n" in allowed
    [unknown] = authz.told([check(False, known=False, identity="")])
    assert unknown.startswith("cannot say: ") and "no identity (clear text)" in unknown


@pytest.mark.parametrize(
    ("identity", "workload", "allow"),
    [
        (f"spiffe://{TD}/ns/shop/sa/web", "db", True),
        ("", "db", True),
        ("spiffe://elsewhere/ns/shop/sa/web", "db", False),
        (f"spiffe://{TD}.elsewhere/ns/shop/sa/web", "db", False),
        ("spiffe://elsewhere/ns/shop/sa/web", "", True),  # nothing is known about the destination: as it was
    ],
)
def test_a_stranger_does_not_come_as_far_as_policy(identity: str, workload: str, allow: bool) -> None:
    answer = {"allow": True, "policy": "shop/p", "rule": 0, "reason": "allowed by: shop/p", "workload": workload}
    found = authz.judged(TD, identity, answer)
    assert found["allow"] is allow
    assert found == answer if allow else (found["policy"], found["rule"]) == ("", -1)
    assert allow or "refused in the handshake" in found["reason"]


def test_who_cannot_prove_who_it_is_is_told() -> None:
    """A certificate that is missing or has ended, of somebody who was asked about."""
    held = {
        "n2": [{"identity": "spiffe://x", "state": "expired", "error": "UNAVAILABLE: away"}],
        "n1": [
            {"identity": "spiffe://x", "state": "available", "error": "away"},
            {"identity": "spiffe://y", "state": "missing", "error": ""},
            {"identity": "spiffe://z", "state": "missing", "error": ""},
        ],
    }
    first, second = authz.uncertified({"spiffe://x", "spiffe://y", ""}, held)
    assert first.startswith("spiffe://y has no valid certificate on n1: it is missing; connections")
    assert second.startswith("spiffe://x has no valid certificate on n2: it is expired (UNAVAILABLE: away); ")


POLICY_LINES = [
    ({"matched": True, "rule": 2}, "(DENY) matches by rules[2]"),
    ({"dry_run": True, "matched": True, "rule": 0}, "(DENY, dry run: it decides nothing) matches by rules[0]"),
    ({"missed": []}, "(DENY) does not match: it has no rules"),
    (
        {"missed": [["serviceAccounts", "destinationPorts"]]},
        "does not match: rules[0] does not fit in serviceAccounts, ports",
    ),
    (
        {"missed": [["notSourceIps"], ["nothing", "principals"]]},
        "does not match: rules[0] does not fit in source notIpBlocks; "
        "rules[1] has a part that L4 does not know, and never matches",
    ),
    ({"missed": [["principals"]] * 9}, "rules[7] does not fit in principals; and so on"),
    ({}, "(DENY) does not match"),
    (
        {"name": STATIC, "missed": [["notPrincipals"]]},
        f"{STATIC} (DENY, PeerAuthentication STRICT) does not match: the caller has an identity",
    ),
    ({"name": STATIC, "matched": True, "rule": 0}, "(DENY, PeerAuthentication STRICT) matches: no identity"),
    (
        {"name": "shop/converted_peer_authentication_own", "missed": [["destinationPorts"], ["destinationPorts"]]},
        "(DENY, PeerAuthentication shop/own) does not match: not at this port",
    ),
]


@pytest.mark.parametrize(("policy", "says"), POLICY_LINES)
def test_why_a_policy_matches_or_not(policy: dict[str, Any], says: str) -> None:
    considered = {"name": "shop/p", "action": "Deny", "dry_run": False, "matched": False, "rule": -1, **policy}
    [text] = authz.told([authz.numbered(check(True, policies=[considered]), {})])
    assert text.splitlines()[-1].endswith(says)


def test_rules_have_the_numbers_of_the_object() -> None:
    """Of four rules the first and the third were left out."""
    considered = [
        {"name": "shop/p", "action": "Allow", "dry_run": False, "matched": True, "rule": 1},
        {"name": "shop/q", "action": "Allow", "matched": False, "rule": -1, "missed": [["principals"], []]},
        {"name": "shop/r", "action": "Allow", "matched": False, "rule": -1, "missed": [["principals"]]},
    ]
    objects = {"shop/p": {"rules": [1, 3]}, "shop/q": {"rules": [1, 3]}}
    found = authz.numbered(check(True, policies=considered), objects)
    assert (found["policy"], found["rule"]) == ("shop/p", 3)
    assert [each["rule"] for each in found["policies"]] == [3, -1, -1]
    assert [[miss["rule"] for miss in each["missed"]] for each in found["policies"][1:]] == [[1, 3], [0]]
    [text] = authz.told([found])
    assert "because  explicitly denied by: shop/p, rules[3]" in text
    assert "shop/q (ALLOW) does not match: rules[1] does not fit in principals" in text


def test_peer_authentication_by_its_own_name() -> None:
    """Where it denied, in the answer and among a pod's denials."""
    [text] = authz.told([check(False, policy=STATIC, rule=0, reason=f"explicitly denied by: {STATIC}")])
    meant = f"explicitly denied by: {STATIC} (PeerAuthentication STRICT: who has no identity is refused)"
    assert f"  because  {meant}" in text.splitlines()
    assert policies.in_words(f"explicitly denied by: {STATIC}") == meant
    for reason in ("explicitly denied by: shop/p", "allow policies exist, but none allowed", "-"):
        assert policies.in_words(reason) == reason


def row(name: str, kind: str = "AuthorizationPolicy", accepted: bool = True, **more: Any) -> Any:
    said = {"action": "DENY", "scope": "NAMESPACE", "dry_run": False, "reason": "", "message": "", "selects": 1}
    said |= {"not_enforced": [], "records": {f"shop/{name}": "v2"}}
    return {"kind": kind, "namespace": "shop", "name": name, "accepted": accepted, **said, **more}


STILL = "n1: its engine holds another version of"


@pytest.mark.parametrize(
    ("policy", "keys", "why"),
    [
        (row("p"), {"n1": {"shop/p": "v2"}, "n2": {"shop/p": "v2"}}, []),
        (row("p"), {"n1": {"shop/p": "v2"}, "n2": {}}, ["n2: its engine does not hold it (yet)"]),
        (row("p"), {"n1": {"shop/p": "v1"}, "n2": {"shop/p": "v2"}}, [f"{STILL} it (still)"]),
        (row("p"), {"n1": {"shop/p": ""}}, [f"{STILL} it (still)"]),  # stands in for what cannot be decoded
        (row("p"), {}, []),
        (row("p", accepted=False, message="bad port", records={}), {"n1": {}}, ["bad port"]),
        (
            row("p", accepted=False, not_enforced=["rules[0]: methods"]),
            {"n1": {"shop/p": "v1"}},
            ["rules[0]: methods", f"{STILL} it (still)"],
        ),
        (row("p", "PeerAuthentication", records={}), {"n1": {}}, []),
        (row("p", "PeerAuthentication", not_enforced=["DISABLE"], records={}), {"n1": {}}, ["DISABLE"]),
        (row("p", "PeerAuthentication", records={STATIC: "v2"}), {"n1": {STATIC: "v2"}}, []),
        (
            row("p", "PeerAuthentication", records={STATIC: "v2", "shop/converted_peer_authentication_p": "v2"}),
            {"n1": {"shop/converted_peer_authentication_p": "v1"}},
            [f"n1: its engine does not hold {STATIC} (yet)", f"{STILL} shop/converted_peer_authentication_p (still)"],
        ),
    ],
)
def test_policies_of_the_control_plane(policy: Any, keys: dict[str, dict[str, str]], why: list[str]) -> None:
    held = {node: [{"key": key, "version": at} for key, at in each.items()] for node, each in keys.items()}
    [found] = policies.from_control([policy], held)
    assert found["not_enforced"] == why and found["enforced"] is not bool(why) and found["scope"] == "namespace"


def record(key: str, **more: Any) -> Any:
    namespace, _, name = key.rpartition("/")
    return {"key": key, "name": name, "namespace": namespace, "scope": "WorkloadSelector", "action": "Deny", **more}


def test_policies_as_the_engines_hold_them() -> None:
    bad = record("shop/bad", undecodable="malformed protobuf", scope="Namespace")
    held = {
        "n1": [record("shop/p"), record(f"istio-system/{policies.STATIC}"), record("shop/dry", dryRun=True)],
        "n2": [record("shop/p"), record(f"istio-system/{policies.STATIC}"), record("shop/dry", dryRun=True), bad],
    }
    found = {each["name"]: each for each in policies.from_engines(held)}
    assert found["p"]["enforced"] and found["p"]["action"] == "DENY" and found["p"]["scope"] == "selector"
    assert found[policies.STATIC]["kind"] == "PeerAuthentication" and found["dry"]["dry_run"]
    assert found["bad"]["not_enforced"] == ["n2: malformed protobuf", "n1: its engine does not hold it (yet)"]
    assert not found["bad"]["accepted"] and not found["bad"]["enforced"]


def test_refusals_say_what_is_in_force_instead() -> None:
    refused = [
        {"type": "policy", "name": "shop/kept", "reason": "malformed protobuf"},
        {"type": "policy", "name": "shop/bad", "reason": "malformed protobuf"},
        {"type": "address", "name": "x", "reason": "no matter"},
    ]
    agent = Answering(Node(Path("/nowhere")), "n1", {"node": "n1", "control": {"refused": refused}})
    held = {
        "n1": [
            record("shop/kept"),
            record("shop/bad", undecodable="malformed protobuf", scope="Namespace"),
            record("istio-system/all", undecodable="no name", scope="Global"),
        ]
    }
    found = {each["policy"]: each["instead"] for each in policies.refusals([agent], held)}
    assert found == {
        "shop/kept": "its last version that could be decoded stays in force",
        "shop/bad": "namespace shop is denied in its place",
        "istio-system/all": "everything is denied in its place",
    }


def page(**changes: Any) -> Any:
    made = {
        "pod": "shop/web",
        "node": "n1",
        "mode": "strict",
        "enrolled": True,
        "annotated": True,
        "why": "enrolled by label",
        "waits_for": "done",
        "error": "",
        "identity": "spiffe://x",
        "addresses": ["10.0.0.1"],
        "record": {"protocol": "HBONE", "status": "Healthy"},
        "services": [],
        "ports": {"known": [80], "probed": [], "held": {}},
        "raw": False,
        "old_connections": 0,
        "doorless": "",
        "certificate": {"state": "available", "not_after": 4000, "renews_in_s": 100, "error": ""},
        "connections": {"inbound": 1, "outbound": 2},
    }
    return made | changes


@pytest.mark.parametrize(
    ("changes", "fact", "text"),
    [
        ({}, "mode", "strict, enrolled"),
        ({"annotated": False}, "mode", "strict, enrolled, not announced yet"),
        ({}, "certificate", "ends in 50m (1970-01-01T01:06:40Z), renewed in 100s"),
        ({"certificate": None}, "certificate", "none asked for"),
        (
            {"certificate": {"state": "missing", "error": "UNAVAILABLE: away"}},
            "certificate",
            "missing; last error: UNAVAILABLE: away",
        ),
        (
            {"certificate": {"state": "expired", "not_after": 400, "renews_in_s": 3, "error": "away"}},
            "certificate",
            "ENDED 10m ago (1970-01-01T00:06:40Z), renewed in 3s; last error: away",
        ),
        ({"enrolled": False, "why": "no label", "identity": ""}, "not enrolled", "no label"),
        (
            {"enrolled": False, "waits_for": "identity", "error": "no tc"},
            "not enrolled",
            "enrolled by label; waits for identity; no tc",
        ),
        ({"identity": ""}, "identity", "none: what it sends is clear text"),
        ({}, "connections", "1 in, 2 out"),
        ({"old_connections": 3}, "connections", "1 in, 2 out, 3 from before it was enrolled"),
        ({"record": {}}, "record", "none in the mesh"),
        ({"doorless": "eth0 is no veth"}, "same node", "through the engine, not natively: eth0 is no veth"),
        ({"ports": {"known": [], "probed": [], "held": {}}}, "ports", "-"),
    ],
)
def test_one_page(changes: dict[str, Any], fact: str, text: str) -> None:
    assert dict(describe._facts(page(**changes), 1000.0))[fact] == text
    assert ("capabilities" in dict(describe._facts(page(raw=True), 0.0))) is True
    assert "capabilities" not in dict(describe._facts(page(), 0.0))


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b'{\n  "error": "no connection\\n to the engine"\n}\n', "/pods answered 503: no connection to the engine"),
        (b"not json\n at all", "/pods answered 503: not json at all"),
        (b'["a list"]', '/pods answered 503: ["a list"]'),
    ],
)
def test_a_page_that_fails_is_one_line(tmp_path: Path, body: bytes, why: str) -> None:
    path = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 503 No\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

        with ThreadPoolExecutor(1) as pool:
            answered = pool.submit(answer)
            with pytest.raises(NodeError) as caught:
                Node(path).ask("/pods")
            answered.result(10)
    assert str(caught.value) == f"{path}: {why}"
