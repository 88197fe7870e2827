"""AuthorizationPolicy to records. What is expected comes from upstream (istio/istio, pilot/pkg/serviceregistry/ambient:
testdata/*.yaml are the golden files of TestRBACConvert, authorization_test.go has the statuses); each case names where.
Where we differ on purpose, the case says "ours".
"""

import copy
import random
from typing import Any

import pytest

from sidestep.control import objects, policies
from sidestep.control.policies import ACCEPTED, INVALID, UNSUPPORTED, WAYPOINT, Ruling
from sidestep.wire.pb import authorization_pb2 as pb
from tests.harness.policies import authorization, shape

ROOT = "istio-system"
WORDS = ["web", "web-*", "*-web", "*"]
BLOCKS = ["198.51.100.7", "203.0.113.0/24"]
NETS = ["198.51.100.7/32", "203.0.113.0/24"]


def rule_on(obj: dict[str, Any], last: Ruling | None = None) -> Ruling:
    before = copy.deepcopy(obj)
    made = policies.authorization(objects.authorization_policy_of(obj), ROOT, last)
    assert obj == before  # objects are shared
    return made


def record_of(ruling: Ruling) -> pb.Authorization:
    assert ruling.entry is not None
    return pb.Authorization.FromString(ruling.entry.body)


def source(**fields: Any) -> dict[str, Any]:
    return {"from": [{"source": fields}]}


def operation(**fields: Any) -> dict[str, Any]:
    return {"to": [{"operation": fields}]}


def when(key: str, values: list[str] | None = None, other: list[str] | None = None) -> dict[str, Any]:
    made: dict[str, Any] = {"key": key}
    return made | ({"values": values} if values else {}) | ({"notValues": other} if other else {})


# (where it is from, a rule, what it becomes; None: left out). All of ALLOW.
ALLOW: list[tuple[str, dict[str, Any], list[list[dict[str, Any]]] | None]] = [
    (
        "allow-full: principals and notPrincipals, four forms each",
        source(principals=WORDS, notPrincipals=WORDS),
        [[{"principals": WORDS, "not_principals": WORDS}]],
    ),
    (
        "allow-full: service accounts, with and without a namespace",
        source(serviceAccounts=["bank/teller", "clerk"], notServiceAccounts=["bank/thief", "crook"]),
        [
            [
                {
                    "service_accounts": ["bank/teller", "shop/clerk"],
                    "not_service_accounts": ["bank/thief", "shop/crook"],
                }
            ]
        ],
    ),
    ("allow-full: requestPrincipals", source(requestPrincipals=WORDS, notRequestPrincipals=WORDS), None),
    (
        "allow-full: namespaces",
        source(namespaces=WORDS, notNamespaces=WORDS),
        [[{"namespaces": WORDS, "not_namespaces": WORDS}]],
    ),
    (
        "allow-full: ipBlocks",
        source(ipBlocks=BLOCKS, notIpBlocks=BLOCKS),
        [[{"source_ips": NETS, "not_source_ips": NETS}]],
    ),
    ("allow-full: remoteIpBlocks", source(remoteIpBlocks=BLOCKS, notRemoteIpBlocks=BLOCKS), None),
    ("allow-full: methods", operation(methods=["GET"], notMethods=["PUT"]), None),
    ("allow-full: hosts", operation(hosts=["a.example"], notHosts=["b.example"]), None),
    (
        "allow-full: ports",
        operation(ports=["80", "90"], notPorts=["800"]),
        [[{"destination_ports": [80, 90], "not_destination_ports": [800]}]],
    ),
    ("allow-full: paths", operation(paths=["/a"], notPaths=["/b"]), None),
    ("allow-full: when request.headers", {"when": [when("request.headers[x]", ["a"], ["b"])]}, None),
    (
        "allow-full: when source.ip",
        {"when": [when("source.ip", BLOCKS, BLOCKS)]},
        [[{"source_ips": NETS, "not_source_ips": NETS}]],
    ),
    ("allow-full: when remote.ip", {"when": [when("remote.ip", BLOCKS)]}, None),
    (
        "allow-full: when source.namespace",
        {"when": [when("source.namespace", WORDS, WORDS)]},
        [[{"namespaces": WORDS, "not_namespaces": WORDS}]],
    ),
    (
        "allow-full: when source.principal",
        {"when": [when("source.principal", WORDS, WORDS)]},
        [[{"principals": WORDS, "not_principals": WORDS}]],
    ),
    ("allow-full: when request.auth.principal", {"when": [when("request.auth.principal", ["a"])]}, None),
    ("allow-full: when request.auth.audiences", {"when": [when("request.auth.audiences", ["a"])]}, None),
    ("allow-full: when request.auth.presenter", {"when": [when("request.auth.presenter", ["a"])]}, None),
    ("allow-full: when request.auth.claims", {"when": [when("request.auth.claims[iss]", ["a"])]}, None),
    ("allow-full: when nested claims", {"when": [when("request.auth.claims[a][b]", ["a"])]}, None),
    (
        "allow-full: when destination.ip",
        {"when": [when("destination.ip", BLOCKS, BLOCKS)]},
        [[{"destination_ips": NETS, "not_destination_ips": NETS}]],
    ),
    (
        "allow-full: when destination.port",
        {"when": [when("destination.port", ["91", "92"], ["9001"])]},
        [[{"destination_ports": [91, 92], "not_destination_ports": [9001]}]],
    ),
    ("allow-full: when connection.sni", {"when": [when("connection.sni", ["a"])]}, None),
    ("allow-full: when experimental.envoy.filters", {"when": [when("experimental.envoy.filters.a[b]", ["a"])]}, None),
    (
        "allow-groups: L4 and L7 in one source, and to",
        source(principals=["a"], requestPrincipals=["b"], namespaces=["c"]) | operation(ports=["80"]),
        None,
    ),
    (
        "allow-groups: L4 and L7 in one operation, and from",
        source(principals=["a"], namespaces=["c"]) | operation(ports=["80"], methods=["GET"]),
        None,
    ),
    (
        "allow-groups: only L4; the clause of `to` is first",
        source(principals=["a"], namespaces=["c"]) | operation(ports=["80"]),
        [[{"destination_ports": [80]}], [{"principals": ["a"], "namespaces": ["c"]}]],
    ),
    ("allow-groups: only L7", source(requestPrincipals=["a"]) | operation(paths=["/a"], methods=["GET"]), None),
    ("allow-groups: when, L4 and L7", {"when": [when("source.namespace", ["a"]), when("connection.sni", ["b"])]}, None),
    (
        "allow-groups: when, L4 twice: a clause for each",
        {"when": [when("source.namespace", ["a"]), when("source.ip", ["192.0.2.1"])]},
        [[{"namespaces": ["a"]}], [{"source_ips": ["192.0.2.1/32"]}]],
    ),
    (
        "allow-groups: when, only L7",
        {"when": [when("connection.sni", ["a"]), when("request.headers[x]", ["b"])]},
        None,
    ),
    ("authorization.go hasEffectiveRules: a rule without clauses matches all", {}, []),
    (
        "authorization.go handleRule: several entries are matches of one clause",
        {"from": [{"source": {"principals": ["a"]}}, {"source": {"namespaces": ["b"]}}]},
        [[{"principals": ["a"]}, {"namespaces": ["b"]}]],
    ),
    (
        "authorization.go stringToIP: IPv6",
        source(ipBlocks=["2001:db8::/32", "fd00::1"]),
        [[{"source_ips": ["2001:db8::/32", "fd00::1/128"]}]],
    ),
    (
        "reference 5.7: source.trustDomains (upstream: an empty match)",
        source(principals=["a"], trustDomains=["td"]),
        None,
    ),
    ("reference 5.7: when source.trustDomain", {"when": [when("source.trustDomain", ["td"])]}, None),
    (
        "ours: when source.serviceAccount",
        {"when": [when("source.serviceAccount", ["bank/teller", "clerk"], ["bank/thief"])]},
        [[{"service_accounts": ["bank/teller", "shop/clerk"], "not_service_accounts": ["bank/thief"]}]],
    ),
    (
        "ours: an IPv4 block in IPv6 dress",
        source(ipBlocks=["::ffff:192.0.2.0/120"]),
        [[{"source_ips": ["192.0.2.0/24"]}]],
    ),
    ("ours: bits below the mask are cleared", source(ipBlocks=["192.0.2.77/24"]), [[{"source_ips": ["192.0.2.0/24"]}]]),
]


@pytest.mark.parametrize(("rule", "expected"), [case[1:] for case in ALLOW], ids=[case[0] for case in ALLOW])
def test_allow(rule: dict[str, Any], expected: list[list[dict[str, Any]]] | None) -> None:
    other = source(namespaces=["other"])
    ruling = rule_on(authorization({"action": "ALLOW", "rules": [rule, other]}))
    record = record_of(ruling)
    assert (record.action, record.scope, record.name, record.namespace) == (pb.ALLOW, pb.NAMESPACE, "p", "shop")
    assert shape(record) == [*([expected] if expected is not None else []), [[{"namespaces": ["other"]}]]]
    assert ruling.accepted is (expected is not None)
    if expected is None:
        [line] = ruling.not_enforced
        assert ruling.reason == UNSUPPORTED and line.startswith("spec.rules[0]: NOT ENFORCED, left out: ")
        assert ruling.message == line


# (where it is from, a rule, what it becomes, what is said). All of DENY.
DENY: list[tuple[str, dict[str, Any], list[list[dict[str, Any]]], str]] = [
    (
        "deny-groups: L4 and L7 in one source, and to",
        source(principals=["a"], requestPrincipals=["b"], namespaces=["c"]) | operation(ports=["80"]),
        [[{"destination_ports": [80]}], [{"principals": ["a"], "namespaces": ["c"]}]],
        "denies more: L4 does not know from[0].source.requestPrincipals",
    ),
    (
        "deny-groups: L4 and L7 in one operation, and from",
        source(principals=["a"]) | operation(ports=["80"], methods=["GET"]),
        [[{"destination_ports": [80]}], [{"principals": ["a"]}]],
        "denies more: L4 does not know to[0].operation.methods",
    ),
    ("deny-groups: only L4", source(principals=["a"]), [[{"principals": ["a"]}]], ""),
    (
        "deny-groups: only L7: empty matches",
        source(requestPrincipals=["a"]) | operation(paths=["/a"], methods=["GET"]),
        [[{}], [{}]],
        "no effect: L4 does not know to[0].operation.methods, to[0].operation.paths, from[0].source.requestPrincipals",
    ),
    (
        "deny-groups: when, L4 and L7: the L7 clause never matches, so the rule has no effect",
        {"when": [when("source.namespace", ["a"]), when("connection.sni", ["b"])]},
        [[{"namespaces": ["a"]}], [{}]],
        "has no effect: L4 does not know when[1].key connection.sni",
    ),
    (
        "deny-groups: when, L4 twice, with notValues",
        {"when": [when("source.namespace", ["a"]), when("source.ip", ["192.0.2.1"], ["192.0.2.2"])]},
        [[{"namespaces": ["a"]}], [{"source_ips": ["192.0.2.1/32"], "not_source_ips": ["192.0.2.2/32"]}]],
        "",
    ),
    (
        "deny-groups: when, only L7",
        {"when": [when("connection.sni", ["a"]), when("request.headers[x]", ["b"])]},
        [[{}], [{}]],
        "has no effect: L4 does not know when[0].key connection.sni, when[1].key request.headers[x]",
    ),
    (
        "authorization.go isMatchEmpty: one match of two is empty, the clause can match",
        {"from": [{"source": {"requestPrincipals": ["a"]}}, {"source": {"principals": ["b"]}}]},
        [[{}, {"principals": ["b"]}]],
        "denies more: L4 does not know from[0].source.requestPrincipals",
    ),
    (
        "reference 5.7: source.notTrustDomains beside a principal",
        source(principals=["a"], notTrustDomains=["td"]),
        [[{"principals": ["a"]}]],
        "denies more: L4 does not know from[0].source.notTrustDomains",
    ),
    (
        "reference 5.7: source.trustDomains alone",
        source(trustDomains=["td"]),
        [[{}]],
        "has no effect: L4 does not know from[0].source.trustDomains",
    ),
    ("authorization.go: a rule without clauses denies all", {}, [], ""),
]


@pytest.mark.parametrize(("rule", "expected", "says"), [case[1:] for case in DENY], ids=[case[0] for case in DENY])
def test_deny(rule: dict[str, Any], expected: list[list[dict[str, Any]]], says: str) -> None:
    ruling = rule_on(authorization({"action": "DENY", "rules": [rule]}))
    assert record_of(ruling).action == pb.DENY and shape(record_of(ruling)) == [expected]
    assert ruling.accepted is not bool(says) and ruling.reason == (UNSUPPORTED if says else ACCEPTED)
    for line in ruling.not_enforced:
        assert line.startswith("spec.rules[0]: NOT ENFORCED") and says in line
    assert len(ruling.not_enforced) == bool(says)


@pytest.mark.parametrize(
    ("namespace", "selector", "scope", "selects"),
    [
        ("shop", None, pb.NAMESPACE, None),
        (ROOT, None, pb.GLOBAL, None),
        ("shop", {"matchLabels": {"app": "a", "v": "1"}}, pb.WORKLOAD_SELECTOR, {("app", "a"), ("v", "1")}),
        (ROOT, {"matchLabels": {"app": "a"}}, pb.WORKLOAD_SELECTOR, {("app", "a")}),
        ("shop", {}, pb.NAMESPACE, None),  # ours: upstream sends one that nobody lists
        ("shop", {"matchLabels": {}}, pb.NAMESPACE, None),
    ],
)
def test_scopes(namespace: str, selector: Any, scope: int, selects: set[tuple[str, str]] | None) -> None:
    spec = {"rules": [{}]} | ({"selector": selector} if selector is not None else {})
    ruling = rule_on(authorization(spec, namespace=namespace))
    assert record_of(ruling).scope == scope and ruling.selector == selects
    assert ruling.entry is not None and ruling.entry.name == f"{namespace}/p"


@pytest.mark.parametrize("spec", [None, {}, {"rules": []}, {"action": "ALLOW"}, {"rules": None, "action": None}])
def test_a_policy_without_rules_allows_nothing(spec: Any) -> None:
    ruling = rule_on(authorization(spec))
    assert record_of(ruling).action == pb.ALLOW and not record_of(ruling).rules and ruling.accepted


def test_a_deny_without_rules_is_said_to_deny_nothing() -> None:
    """As upstream's validation says: it will never be triggered."""
    ruling = rule_on(authorization({"action": "DENY"}))
    assert not record_of(ruling).rules and not ruling.accepted and "denies nothing" in ruling.message


@pytest.mark.parametrize("action", ["CUSTOM", "AUDIT"])
def test_actions_that_are_not_of_l4(action: str) -> None:
    """TestConvertAuthorizationPolicyStatus: unsupported AUDIT action, unsupported CUSTOM action."""
    ruling = rule_on(authorization({"action": action, "rules": [{}]}))
    assert ruling.entry is None and (ruling.accepted, ruling.reason) == (False, UNSUPPORTED)
    assert action in ruling.message and "NOT ENFORCED" in ruling.message


@pytest.mark.parametrize(
    "target", [{"targetRef": {"kind": "Service", "name": "a"}}, {"targetRefs": [{"kind": "Gateway", "name": "a"}]}]
)
def test_a_waypoints_policy_is_not_sent(target: dict[str, Any]) -> None:
    """TestConvertAuthorizationPolicyStatus: targetRef is not for ztunnel."""
    ruling = rule_on(authorization({**target, "action": "DENY", "rules": [{}]}))
    assert ruling.entry is None and ruling.reason == WAYPOINT and not ruling.accepted and ruling.not_enforced


@pytest.mark.parametrize(
    ("word", "dry"),
    [("", False), ("true", True), ("TRUE", True), ("1", True), ("t", True), ("false", False), ("0", False)],
)
def test_dry_run(word: str, dry: bool) -> None:
    """The words of Go's ParseBool."""
    annotations = {"istio.io/dry-run": word} if word else {}
    ruling = rule_on(authorization({"action": "DENY", "rules": [{}]}, annotations=annotations))
    assert record_of(ruling).dry_run is dry is ruling.dry_run and ruling.accepted


def test_a_mixed_policy_says_what_of_each_rule() -> None:
    """TestConvertAuthorizationPolicyStatus: unsupported HTTP methods; all three attributes are named."""
    rule = (
        source(requestPrincipals=["a"]) | operation(methods=["GET"]) | {"when": [when("request.auth.presenter", ["b"])]}
    )
    ruling = rule_on(authorization({"rules": [rule, {}, operation(hosts=["x"])]}))
    assert shape(record_of(ruling)) == [[]]
    first, second = ruling.not_enforced
    assert all(word in first for word in ("methods", "requestPrincipals", "request.auth.presenter"))
    assert second.startswith("spec.rules[2]: ") and "to[0].operation.hosts" in second
    assert ruling.rules == (1,)  # the number of the one that is left


def test_a_principal_with_a_scheme_never_matches_and_that_is_said() -> None:
    ruling = rule_on(
        authorization({"action": "DENY", "rules": [source(principals=["spiffe://cluster.local/ns/a/sa/b"])]})
    )
    assert not ruling.accepted and "never matches" in ruling.message
    assert shape(record_of(ruling)) == [[[{"principals": ["spiffe://cluster.local/ns/a/sa/b"]}]]]


# What cannot be read in a rule: (the rule, the field that the error names).
BAD_RULES: list[tuple[Any, str]] = [
    (None, ""),
    ("all", ""),
    ([], ""),
    ({"form": []}, ".form"),
    ({"from": []}, ".from"),
    ({"from": {}}, ".from"),
    ({"from": "x"}, ".from"),
    ({"from": [None]}, ".from[0]"),
    ({"from": ["x"]}, ".from[0]"),
    ({"from": [{}]}, ".from[0].source"),
    ({"from": [{"source": None}]}, ".from[0].source"),
    ({"from": [{"source": {}}]}, ".from[0].source"),
    ({"from": [{"source": []}]}, ".from[0].source"),
    ({"from": [{"source": {"principals": []}}]}, ".from[0].source"),
    ({"from": [{"sauce": {}}]}, ".from[0].sauce"),
    (source(principal=["a"]), ".from[0].source.principal"),
    (source(principals="a"), ".from[0].source.principals"),
    (source(principals={"a": "b"}), ".from[0].source.principals"),
    (source(principals=[""]), ".from[0].source.principals[0]"),
    (source(principals=["a", 7]), ".from[0].source.principals[1]"),
    (source(principals=[None]), ".from[0].source.principals[0]"),
    (source(notPrincipals=[True]), ".from[0].source.notPrincipals[0]"),
    (source(namespaces=[["a"]]), ".from[0].source.namespaces[0]"),
    (source(notNamespaces=[""]), ".from[0].source.notNamespaces[0]"),
    (source(serviceAccounts=["a/b/c"]), ".from[0].source.serviceAccounts[0]"),
    (source(serviceAccounts=["a/*"]), ".from[0].source.serviceAccounts[0]"),
    (source(serviceAccounts=["/a"]), ".from[0].source.serviceAccounts[0]"),
    (source(notServiceAccounts=["a/"]), ".from[0].source.notServiceAccounts[0]"),
    (source(ipBlocks=["192.0.2.1", "192.0.2.256"]), ".from[0].source.ipBlocks[1]"),
    (source(ipBlocks=["192.0.2.0/33"]), ".from[0].source.ipBlocks[0]"),
    (source(ipBlocks=["192.0.2.0/255.255.255.0"]), ".from[0].source.ipBlocks[0]"),
    (source(ipBlocks=["192.0.2.0/08"]), ".from[0].source.ipBlocks[0]"),
    (source(ipBlocks=["192.0.2.0/"]), ".from[0].source.ipBlocks[0]"),
    (source(ipBlocks=["192.0.2.01"]), ".from[0].source.ipBlocks[0]"),
    (source(ipBlocks=[" 192.0.2.1"]), ".from[0].source.ipBlocks[0]"),
    (source(ipBlocks=["fe80::1%eth0"]), ".from[0].source.ipBlocks[0]"),
    (source(ipBlocks=["::/129"]), ".from[0].source.ipBlocks[0]"),
    (source(notIpBlocks=["any"]), ".from[0].source.notIpBlocks[0]"),
    (source(notIpBlocks=[1]), ".from[0].source.notIpBlocks[0]"),
    ({"to": []}, ".to"),
    ({"to": [{}]}, ".to[0].operation"),
    ({"to": [{"operation": {}}]}, ".to[0].operation"),
    ({"to": [{"operation": "80"}]}, ".to[0].operation"),
    (operation(port=["80"]), ".to[0].operation.port"),
    (operation(ports=["http"]), ".to[0].operation.ports[0]"),
    (operation(ports=["80", "99999"]), ".to[0].operation.ports[1]"),
    (operation(ports=["0"]), ".to[0].operation.ports[0]"),
    (operation(ports=["-1"]), ".to[0].operation.ports[0]"),
    (operation(ports=["+80"]), ".to[0].operation.ports[0]"),
    (operation(ports=["8_0"]), ".to[0].operation.ports[0]"),
    (operation(ports=["٨٠"]), ".to[0].operation.ports[0]"),  # digits, but not ours
    (operation(ports=[80]), ".to[0].operation.ports[0]"),
    (operation(ports="80"), ".to[0].operation.ports"),
    (operation(notPorts=["65536"]), ".to[0].operation.notPorts[0]"),
    (operation(methods="GET"), ".to[0].operation.methods"),
    ({"when": {}}, ".when"),
    ({"when": [None]}, ".when[0]"),
    ({"when": [{}]}, ".when[0].key"),
    ({"when": [{"key": ""}]}, ".when[0].key"),
    ({"when": [{"key": 7, "values": ["a"]}]}, ".when[0].key"),
    ({"when": [{"key": "source.ip"}]}, ".when[0]"),
    ({"when": [{"key": "source.ip", "values": []}]}, ".when[0]"),
    ({"when": [{"key": "source.ip", "value": ["192.0.2.1"]}]}, ".when[0].value"),
    ({"when": [{"key": "source.ip", "values": ["nowhere"]}]}, ".when[0].values[0]"),
    ({"when": [{"key": "source.ip", "values": "192.0.2.1"}]}, ".when[0].values"),
    ({"when": [{"key": "source.ip", "notValues": ["192.0.2.1/64"]}]}, ".when[0].notValues[0]"),
    ({"when": [{"key": "source.namespace", "values": [""]}]}, ".when[0].values[0]"),
    ({"when": [{"key": "source.principal", "notValues": [3]}]}, ".when[0].notValues[0]"),
    ({"when": [{"key": "source.serviceAccount", "values": ["*"]}]}, ".when[0].values[0]"),
    ({"when": [{"key": "destination.ip", "values": ["::g"]}]}, ".when[0].values[0]"),
    ({"when": [{"key": "destination.port", "values": ["eighty"]}]}, ".when[0].values[0]"),
    ({"when": [{"key": "destination.port", "notValues": ["70000"]}]}, ".when[0].notValues[0]"),
]


@pytest.mark.parametrize(
    ("bad", "field"), BAD_RULES, ids=[f"{index} {case[1]}" for index, case in enumerate(BAD_RULES)]
)
def test_a_rule_that_cannot_be_read(bad: Any, field: str) -> None:
    good = source(namespaces=["good"])
    allow = rule_on(authorization({"rules": [good, bad]}))
    assert shape(record_of(allow)) == [[[{"namespaces": ["good"]}]]]
    assert not allow.accepted and allow.reason == INVALID and f"spec.rules[1]{field}: " in allow.message
    assert allow.message.startswith("spec.rules[1]: NOT ENFORCED, left out: ")

    spec = {"action": "DENY", "selector": {"matchLabels": {"app": "a"}}, "rules": [good, bad]}
    alone = rule_on(authorization(spec))
    assert shape(record_of(alone)) == [[]] and record_of(alone).action == pb.DENY  # it denies all
    assert alone.selector == frozenset({("app", "a")}) and record_of(alone).scope == pb.WORKLOAD_SELECTOR
    assert not alone.accepted and alone.reason == INVALID and f"spec.rules[1]{field}: " in alone.message

    last = rule_on(authorization({"action": "DENY", "rules": [good]}))
    kept = rule_on(authorization(spec), last)
    assert kept.entry == last.entry and kept.selector == last.selector  # selector and all
    assert not kept.accepted and "stays in force" in kept.message and f"spec.rules[1]{field}: " in kept.message
    assert last.good and not kept.good and not alone.good and not allow.good


# What cannot be read in the policy itself: (changes to a good one, the field, has it a selector that can be read).
BAD_POLICIES: list[tuple[dict[str, Any], str, bool]] = [
    ({"action": "DENNY"}, "spec.action", True),
    ({"action": "deny"}, "spec.action", True),
    ({"action": 1}, "spec.action", True),
    ({"action": ["DENY"]}, "spec.action", True),
    ({"rules": {}}, "spec.rules", True),
    ({"rules": "all"}, "spec.rules", True),
    ({"rule": []}, "spec.rule", True),
    ({"selector": "app=a"}, "spec.selector", False),
    ({"selector": []}, "spec.selector", False),
    ({"selector": {"matchExpressions": []}}, "spec.selector.matchExpressions", False),
    ({"selector": {"matchLabels": "a"}}, "spec.selector.matchLabels", False),
    ({"selector": {"matchLabels": {"app": 1}}}, "spec.selector.matchLabels.app", False),
    ({"selector": {"matchLabels": {"app": "a*"}}}, "spec.selector.matchLabels.app", False),
    ({"selector": {"matchLabels": {"": "a"}}}, "spec.selector.matchLabels.", False),
]


@pytest.mark.parametrize(("change", "field", "selects"), BAD_POLICIES, ids=[case[1] for case in BAD_POLICIES])
@pytest.mark.parametrize("namespace", ["shop", ROOT])
def test_a_policy_that_cannot_be_read(change: dict[str, Any], field: str, selects: bool, namespace: str) -> None:
    good = {"action": "DENY", "selector": {"matchLabels": {"app": "a"}}, "rules": [source(namespaces=["x"])]}
    wide = pb.GLOBAL if namespace == ROOT else pb.NAMESPACE
    alone = rule_on(authorization(good | change, namespace=namespace))
    assert record_of(alone).action == pb.DENY and shape(record_of(alone)) == [[]]
    assert record_of(alone).scope == (pb.WORKLOAD_SELECTOR if selects else wide)
    assert (alone.reason, alone.accepted) == (INVALID, False) and f"{field}: " in alone.message
    last = rule_on(authorization(good, namespace=namespace))
    assert rule_on(authorization(good | change, namespace=namespace), last).entry == last.entry
    if "action" in change:
        return
    allow = rule_on(authorization(good | change | {"action": "ALLOW"}, namespace=namespace))
    assert record_of(allow).action == pb.ALLOW and not record_of(allow).rules  # it admits nobody
    assert record_of(allow).scope == record_of(alone).scope and f"{field}: " in allow.message


def test_a_spec_that_is_none_denies_the_namespace() -> None:
    for spec in ("x", [1], 7):
        ruling = rule_on(authorization(spec))
        assert record_of(ruling).scope == pb.NAMESPACE and ruling.reason == INVALID
        assert record_of(ruling).action == pb.DENY and shape(record_of(ruling)) == [[]]


def test_a_dry_run_that_is_no_word_is_enforced() -> None:
    rules = [source(namespaces=["x"])]
    for action in ("ALLOW", "DENY"):
        spec = {"action": action, "rules": rules}
        ruling = rule_on(authorization(spec, annotations={"istio.io/dry-run": "maybe"}))
        assert not record_of(ruling).dry_run and "istio.io/dry-run" in ruling.message and ruling.reason == INVALID
        assert shape(record_of(ruling)) == ([[[{"namespaces": ["x"]}]]] if action == "ALLOW" else [[]])
        last = rule_on(authorization(spec, annotations={"istio.io/dry-run": "true"}))
        kept = rule_on(authorization(spec, annotations={"istio.io/dry-run": "maybe"}), last)
        assert kept.entry == last.entry and record_of(kept).dry_run and kept.dry_run


def test_what_was_never_enforced_does_not_stand_in() -> None:
    last = rule_on(authorization({"action": "AUDIT", "rules": [{}]}))
    assert not last.good


def test_messages_are_bounded() -> None:
    ruling = rule_on(authorization({"rules": [source(ipBlocks=["x" * 500] * 50)] * 100}))
    assert len(ruling.message) <= policies.MESSAGE and len(ruling.not_enforced) == 100
    assert all(len(line) < 2000 for line in ruling.not_enforced)


def anything(choose: random.Random, depth: int = 0) -> Any:
    """JSON, mostly of words that mean something somewhere."""
    words = ["a", "", "*", "80", "192.0.2.0/24", "source.ip", "ALLOW", "DENY", "STRICT", "x/y", "é"]
    kind = choose.randrange(5 if depth < 5 else 3)
    if kind < 3:
        return choose.choice([*words, *words, None, True, 0, 80, -1, 1.5])
    if kind == 3:
        return [anything(choose, depth + 1) for _ in range(choose.randrange(3))]
    keys = ["rules", "from", "to", "when", "source", "operation", "key", "values", "ports", "principals", "ipBlocks",
            "selector", "matchLabels", "action", "mtls", "mode", "portLevelMtls", "80", "app"]  # fmt: skip
    return {choose.choice(keys): anything(choose, depth + 1) for _ in range(choose.randrange(4))}


def test_no_input_is_too_strange() -> None:
    choose = random.Random(11)
    for _ in range(20_000):
        spec = anything(choose)
        if choose.random() < 0.7:
            spec = {"action": choose.choice(["ALLOW", "DENY"]), "rules": [anything(choose) for _ in range(2)]}
        ruling = rule_on(authorization(spec))
        assert ruling.accepted is not bool(ruling.not_enforced)
        if ruling.entry is not None:
            record_of(ruling)
