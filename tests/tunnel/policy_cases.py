"""Policies, connections and what must come of them, as data: run against the engine's decision function
(test_policies.py), and there for whoever tries them on live connections.

Each case says where its result comes from: the name of a test of the upstream evaluator (istio/ztunnel, src/rbac.rs or
src/state.rs, restated with addresses of our own), or a sentence of reference ztunnel.md. The connections are those of
the upstream tests: PLAIN without an identity, TLS from the same place, OTHER of another trust domain, namespace,
account and address to another address and port.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tests.tunnel.policy_model import Connection, Match, Policy, Verdict, Workload

SPIFFE = "spiffe://td/ns/namespace/sa/account"
PLAIN = Connection("", "10.0.0.1", "10.0.0.2", 8080)
TLS = Connection(SPIFFE, "10.0.0.1", "10.0.0.2", 8080)
OTHER = Connection("spiffe://td-alt/ns/ns-alt/sa/sa=alt", "10.0.0.3", "10.0.0.4", 9090)
ADDRESSES = ("10.0.0.2", "10.0.0.4", "fd00::2")  # of the destination
RBAC = "ztunnel src/rbac.rs "
STATE = "ztunnel src/state.rs "
RULES = "ztunnel.md 5: "
HERE = Workload()  # namespace `namespace`, no selector policies


@dataclass(frozen=True, slots=True)
class Case:
    """`source` says why `verdict` is right."""

    name: str
    source: str
    policies: tuple[Policy, ...]
    connection: Connection
    verdict: Verdict
    workload: Workload = HERE


def policy(name: str, *rules: Any, action: str = "Deny", scope: str = "Namespace", **more: Any) -> Policy:
    """A policy of namespace `namespace`."""
    return {
        "name": name,
        "namespace": "namespace",
        "scope": scope,
        "action": action,
        "rules": list(rules),
        "dryRun": False,
        **more,
    }


def only(**match: Any) -> list[list[Match]]:
    """A rule of one clause of one match."""
    return [[match]]


def caller(namespace: str, account: str = "account", trust_domain: str = "td") -> str:
    """An identity."""
    return f"spiffe://{trust_domain}/ns/{namespace}/sa/{account}"


def whether(name: str, source: str, rules: list[Any], connection: Connection, matches: bool) -> Iterator[Case]:
    """A policy matches a connection or does not: the same policy once as one that denies, once as one that allows."""
    denying, allowing = (policy("p", *rules, action=action) for action in ("Deny", "Allow"))
    if matches:
        found = (Verdict("denied", "namespace/p", 0), Verdict("allowed", "namespace/p", 0))
    else:
        found = (Verdict("not denied"), Verdict("not allowed", "namespace/p"))
    yield Case(f"{name}, deny", source, (denying,), connection, found[0])
    yield Case(f"{name}, allow", source, (allowing,), connection, found[1])


# What is true of (PLAIN, TLS, OTHER), by list.
FIELDS: dict[str, tuple[Any, tuple[bool, bool, bool]]] = {
    "namespaces": ({"Exact": "namespace"}, (False, True, False)),
    "serviceAccounts": ({"namespace": "namespace", "serviceAccount": "account"}, (False, True, False)),
    "principals": ({"Exact": "td/ns/namespace/sa/account"}, (False, True, False)),
    "sourceIps": ("10.0.0.1/32", (True, True, False)),
    "destinationIps": ("10.0.0.2/32", (True, True, False)),
    "destinationPorts": (8080, (True, True, False)),
}


def fields() -> Iterator[Case]:
    for field, (value, results) in FIELDS.items():
        upstream = "".join(f"_{c.lower()}" if c.isupper() else c for c in field)
        negation = f"not{field[0].upper()}{field[1:]}"
        for label, connection, result in zip(("plain", "tls", "other"), (PLAIN, TLS, OTHER), results, strict=True):
            yield from whether(f"{field}, {label}", f"{RBAC}{upstream}", [only(**{field: [value]})], connection, result)
            yield from whether(
                f"{negation}, {label}", f"{RBAC}not_{upstream}", [only(**{negation: [value]})], connection, not result
            )
    for label, connection in (("plain", PLAIN), ("tls", TLS), ("other", OTHER)):
        yield from whether(
            f"cidr, {label}", f"{RBAC}cidr_range", [only(destinationIps=["10.0.0.1/24"])], connection, True
        )


def shapes() -> Iterator[Case]:
    source = f"{RBAC}rbac_empty_policy"
    yield from whether("an empty match", source, [only()], PLAIN, False)
    yield from whether("a clause without matches", source, [[[]]], PLAIN, True)
    yield from whether("a rule without clauses", source, [[]], PLAIN, True)
    yield from whether("no rules", source, [], PLAIN, False)
    source = RULES + "clause matches if ANY match matches; a Match with all lists empty does not match"
    yield from whether(
        "an empty match beside one that matches", source, [[[{}, {"destinationPorts": [8080]}]]], TLS, True
    )
    yield from whether(
        "an empty match in a clause of its own", source, [[[{"destinationPorts": [8080]}], [{}]]], TLS, False
    )
    source = RULES + "rule matches if ALL clauses match"
    yield from whether("a clause without matches beside one", source, [[[], [{"destinationPorts": [1]}]]], TLS, False)
    yield from whether(
        "two clauses that match",
        source,
        [[[{"destinationPorts": [8080]}], [{"sourceIps": ["10.0.0.1/32"]}]]],
        TLS,
        True,
    )


NESTED = [[{"namespaces": [{"Exact": "a"}]}, {"namespaces": [{"Exact": "b"}]}], [{"destinationPorts": [80]}]]
MULTI = [only(namespaces=[{"Exact": "a"}]), only(namespaces=[{"Exact": "b"}])]


def nesting() -> Iterator[Case]:
    for namespace, port, result in (("a", 80, True), ("b", 80, True), ("bad", 80, False), ("b", 12345, False)):
        connection = Connection(caller(namespace), "10.0.0.1", "10.0.0.2", port)
        yield from whether(f"nested, {namespace} to {port}", f"{RBAC}rbac_nesting", [NESTED], connection, result)
    for namespace, rule in (("a", 0), ("b", 1), ("bad", -1)):
        connection = Connection(caller(namespace), "10.0.0.1", "10.0.0.2", 80)
        verdict = Verdict("denied", "namespace/p", rule) if rule >= 0 else Verdict("not denied")
        yield Case(f"two rules, {namespace}", f"{RBAC}rbac_multi_rule", (policy("p", *MULTI),), connection, verdict)
        verdict = Verdict("allowed", "namespace/p", rule) if rule >= 0 else Verdict("not allowed", "namespace/p")
        allowing = policy("p", *MULTI, action="Allow")
        yield Case(f"two rules that allow, {namespace}", f"{RBAC}rbac_multi_rule", (allowing,), connection, verdict)


# kind, pattern, text ("" stands for no identity), result
STRINGS: tuple[tuple[str, Any, str, bool], ...] = (
    ("Exact", "foo", "foo", True),
    ("Exact", "foo", "not", False),
    ("Exact", "foo", "", False),
    ("Prefix", "foo", "foobar", True),
    ("Prefix", "foo", "notfoo", False),
    ("Prefix", "foo", "", False),
    ("Suffix", "foo", "barfoo", True),
    ("Suffix", "foo", "foonot", False),
    ("Suffix", "foo", "", False),
    ("Presence", [], "foo", True),
    ("Presence", [], "", False),
)


def strings() -> Iterator[Case]:
    for kind, pattern, text, result in STRINGS:
        source = f"{RBAC}string_match"
        connection = replace(TLS, identity=caller(text) if text else "")
        name = f"{kind} {pattern or ''} on {text or 'nothing'}"
        yield from whether(f"namespace {name}", source, [only(namespaces=[{kind: pattern}])], connection, result)
        # the same of a principal: the trust domain begins it, the account ends it
        connection = replace(TLS, identity=caller("ns", text, text) if text else "")
        account = {"Exact": f"{text}/ns/ns/sa/{text}" if result else pattern}.get(kind, pattern)
        yield from whether(f"principal {name}", source, [only(principals=[{kind: account}])], connection, result)
    source = RULES + "StringMatch: case sensitive"
    yield from whether("another case", source, [only(namespaces=[{"Exact": "Namespace"}])], TLS, False)
    source = RULES + "identity must start with spiffe://, which is stripped before comparison"
    yield from whether("a principal with its scheme", source, [only(principals=[{"Exact": SPIFFE}])], TLS, False)
    yield from whether(
        "a principal's scheme as prefix", source, [only(principals=[{"Prefix": "spiffe://"}])], TLS, False
    )
    source = RULES + 'missing identity: exact "" would match namespaces'
    yield from whether("namespace is nothing, plain", source, [only(namespaces=[{"Exact": ""}])], PLAIN, True)
    yield from whether("namespace is nothing, tls", source, [only(namespaces=[{"Exact": ""}])], TLS, False)
    source = RULES + "missing identity: positive principals do not match"
    for kind in ("Exact", "Prefix", "Suffix"):
        yield from whether(f"principal {kind} nothing, plain", source, [only(principals=[{kind: ""}])], PLAIN, False)
        yield from whether(
            f"not principal {kind} nothing, plain", source, [only(notPrincipals=[{kind: ""}])], PLAIN, True
        )
    source = "ztunnel.md 5 and istio-ambient.md 5.8: STRICT is DENY of not_principals presence"
    for label, connection, result in (("plain", PLAIN, True), ("tls", TLS, False)):
        yield from whether(f"STRICT, {label}", source, [only(notPrincipals=[{"Presence": []}])], connection, result)


def dimensions() -> Iterator[Case]:
    source = RULES + "match = AND over the dimensions; inside: any positive hit AND no negative hit"
    table: list[tuple[str, Match, Connection, bool]] = [
        ("both hold", {"sourceIps": ["10.0.0.0/8"], "destinationPorts": [8080]}, TLS, True),
        ("one does not", {"sourceIps": ["10.0.0.0/8"], "destinationPorts": [80]}, TLS, False),
        ("any of a list", {"destinationPorts": [80, 443, 8080]}, TLS, True),
        ("none of a list", {"destinationPorts": [80, 443]}, TLS, False),
        ("but not this one", {"sourceIps": ["10.0.0.0/8"], "notSourceIps": ["10.0.0.1/32"]}, TLS, False),
        ("but not that one", {"sourceIps": ["10.0.0.0/8"], "notSourceIps": ["10.0.0.9/32"]}, TLS, True),
        ("any of what must not be", {"notDestinationPorts": [80, 8080]}, TLS, False),
        (
            "principal and namespace",
            {"principals": [{"Prefix": "td/"}], "namespaces": [{"Suffix": "space"}]},
            TLS,
            True,
        ),
        (
            "not its own namespace",
            {"principals": [{"Presence": []}], "notNamespaces": [{"Exact": "namespace"}]},
            TLS,
            False,
        ),
        ("address and no identity", {"sourceIps": ["10.0.0.1/32"], "notPrincipals": [{"Presence": []}]}, PLAIN, True),
    ]
    for name, match, connection, result in table:
        yield from whether(name, source, [only(**match)], connection, result)
    source = RULES + "service_accounts: namespace AND account equal, trust domain ignored"
    account = {"serviceAccounts": [{"namespace": "namespace", "serviceAccount": "account"}]}
    for label, identity, result in (
        ("another trust domain", caller("namespace", "account", "elsewhere"), True),
        ("another namespace", caller("elsewhere", "account"), False),
        ("another account", caller("namespace", "other"), False),
        ("a longer account", caller("namespace", "account2"), False),
    ):
        yield from whether(f"account, {label}", source, [only(**account)], replace(TLS, identity=identity), result)


def addresses() -> Iterator[Case]:
    source = (
        RULES + "source_ips, destination_ips contain the address (ipnet: a net of one family holds none of the other)"
    )
    six = Connection(SPIFFE, "fd00::1", "fd00::2", 8080)
    table: list[tuple[str, Match, Connection, bool]] = [
        ("all of IPv4", {"sourceIps": ["0.0.0.0/0"]}, TLS, True),
        ("all of IPv4, from IPv6", {"sourceIps": ["0.0.0.0/0"]}, six, False),
        ("all of IPv6", {"sourceIps": ["::/0"]}, six, True),
        ("all of IPv6, from IPv4", {"sourceIps": ["::/0"]}, TLS, False),
        ("not of IPv6, from IPv4", {"notSourceIps": ["::/0"]}, TLS, True),
        ("one of IPv6", {"sourceIps": ["fd00::1/128"]}, six, True),
        ("its neighbour", {"sourceIps": ["fd00::2/128"]}, six, False),
        ("a net of IPv6", {"destinationIps": ["fd00::/64"]}, six, True),
        ("another net of IPv6", {"destinationIps": ["fd00:0:0:1::/64"]}, six, False),
        ("an odd length, inside", {"sourceIps": ["10.0.0.0/31"]}, TLS, True),
        ("an odd length, outside", {"sourceIps": ["10.0.0.2/31"]}, TLS, False),
        ("host bits", {"sourceIps": ["10.0.0.77/25"]}, TLS, True),
        ("IPv6 of 127 bits", {"sourceIps": ["fd00::/127"]}, six, True),
        ("both families", {"sourceIps": ["192.0.2.0/24", "fd00::/8"]}, six, True),
    ]
    for name, match, connection, result in table:
        yield from whether(name, source, [only(**match)], connection, result)


def order() -> Iterator[Case]:
    allowing = policy("allow", only(principals=[{"Exact": "cluster.local/ns/default/sa/defaultacct"}]), action="Allow")
    denying = policy("deny", only(principals=[{"Exact": "cluster.local/ns/default/sa/denyacct"}]))
    both = (allowing, denying)

    def account(name: str) -> Connection:
        return replace(TLS, identity=caller("default", name, "cluster.local"))

    source = f"{STATE}assert_rbac_logic_deny_allow"
    elsewhere = Workload("elsewhere")
    yield Case("a namespace without policies", source, both, account("not-defaultacct"), Verdict("open"), elsewhere)
    yield Case("an allow matches", source, both, account("defaultacct"), Verdict("allowed", "namespace/allow", 0))
    yield Case("no allow matches", source, both, account("not-defaultacct"), Verdict("not allowed", "namespace/allow"))
    yield Case("a deny matches", source, both, account("denyacct"), Verdict("denied", "namespace/deny", 0))
    yield Case(
        "no policies", f"{STATE}assert_rbac_with_dest_workload_info", (), account("defaultacct"), Verdict("open")
    )
    source = RULES + "order: enforced DENY any match, then ALLOW"
    everybody, nobody = policy("all", [], action="Allow"), policy("none", action="Allow")
    closed = policy("closed", [])
    yield Case("deny wins over allow", source, (everybody, closed), TLS, Verdict("denied", "namespace/closed", 0))
    yield Case("one allow of two is enough", source, (everybody, nobody), TLS, Verdict("allowed", "namespace/all", 0))
    yield Case("an allow that names nobody", source, (nobody,), TLS, Verdict("not allowed", "namespace/none"))
    yield Case("only a deny, which does not match", source, (denying,), TLS, Verdict("not denied"))
    yield Case(
        "a deny that does not match, an allow that does", source, (denying, everybody), TLS,
        Verdict("allowed", "namespace/all", 0),
    )  # fmt: skip
    source = RULES + "policies considered = namespace-scoped + global + names listed by the workload"
    mesh = policy("mesh", [], scope="Global", namespace="istio-system")
    named, unnamed = policy("named", [], scope="WorkloadSelector"), policy("unnamed", [], scope="WorkloadSelector")
    pod = Workload(policies=("namespace/named",))
    yield Case("of the mesh", source, (mesh,), TLS, Verdict("denied", "istio-system/mesh", 0))
    yield Case("of the mesh, elsewhere", source, (mesh,), TLS, Verdict("denied", "istio-system/mesh", 0), elsewhere)
    yield Case("a selector that the record names", source, (named,), TLS, Verdict("denied", "namespace/named", 0), pod)
    yield Case("a selector that it does not name", source, (unnamed,), TLS, Verdict("open"))
    yield Case("of another namespace", source, (closed,), TLS, Verdict("open"), elsewhere)
    mesh_allow = policy("mesh", [], action="Allow", scope="Global", namespace="istio-system")
    yield Case(
        "the mesh allows, the namespace denies",
        source,
        (mesh_allow, closed),
        TLS,
        Verdict("denied", "namespace/closed", 0),
    )
    yield Case(
        "the mesh allows, the namespace allows nobody", source, (mesh_allow, nobody), TLS,
        Verdict("allowed", "istio-system/mesh", 0),
    )  # fmt: skip
    source = "ztunnel src/state/policy.rs rbac_change_scope"
    for scope, verdict in (("Namespace", "denied"), ("WorkloadSelector", "open"), ("Global", "denied")):
        found = Verdict(verdict, "namespace/p", 0) if verdict == "denied" else Verdict(verdict)
        yield Case(f"as {scope}", source, (policy("p", [], scope=scope),), TLS, found)
    source = "issue 4: a policy that the record names and that was not received (upstream: skipped, fail open)"
    missing = Workload(policies=("namespace/missing",))
    yield Case("not received", source, (), TLS, Verdict("not received", "namespace/missing"), missing)
    yield Case(
        "not received beside an allow", source, (everybody,), TLS, Verdict("not received", "namespace/missing"), missing
    )
    yield Case("not received beside a deny", source, (closed,), TLS, Verdict("denied", "namespace/closed", 0), missing)


def dry_runs() -> Iterator[Case]:
    source = f"{STATE}assert_rbac_dry_run_with_real_policies; ztunnel.md 5: order"
    closed = policy("closed", [], dryRun=True)
    nobody = policy("nobody", action="Allow", dryRun=True)
    everybody = policy("everybody", [], action="Allow", dryRun=True)
    real = policy("real", [], action="Allow")
    yield Case("a dry deny that matches", source, (closed,), TLS, Verdict("open", dry_run="namespace/closed"))
    yield Case(
        "a dry deny beside an allow", source, (closed, real), TLS,
        Verdict("allowed", "namespace/real", 0, "namespace/closed"),
    )  # fmt: skip
    yield Case(
        "a dry deny that does not match",
        source,
        (policy("d", only(destinationPorts=[1]), dryRun=True),),
        TLS,
        Verdict("open"),
    )
    yield Case("a dry allow that allows nobody", source, (nobody,), TLS, Verdict("open", dry_run="namespace/nobody"))
    yield Case("a dry allow that matches", source, (everybody,), TLS, Verdict("open"))
    yield Case("a dry allow of two", source, (everybody, nobody), TLS, Verdict("open"))
    yield Case("a dry allow beside one", source, (nobody, real), TLS, Verdict("allowed", "namespace/real", 0))
    yield Case(
        "a dry allow opens nothing",
        source,
        (everybody, policy("none", action="Allow")),
        TLS,
        Verdict("not allowed", "namespace/none"),
    )
    pod = Workload(policies=("namespace/dry",))
    dry = policy("dry", [], scope="WorkloadSelector", dryRun=True)
    yield Case("a dry selector", source, (dry,), TLS, Verdict("open", dry_run="namespace/dry"), pod)


CASES = tuple(
    case for group in (fields, shapes, nesting, strings, dimensions, addresses, order, dry_runs) for case in group()
)
