"""Authorization as reference ztunnel.md 5 says it, in Python as plain as it can be: what the engine is compared with.

A *policy* is data in the words of ztunnel's dump: `name`, `namespace`, `scope` (Global, Namespace, WorkloadSelector),
`action` (Allow, Deny), `rules` (a list of rules, a rule a list of clauses, a clause a list of matches) and `dryRun`.
A *match* has lists by name: texts are {"Exact": x}, {"Prefix": x}, {"Suffix": x} or {"Presence": []}.
`Decider` asks the engine's own decision function, through tests/tunnel/decide.c.
"""

import ipaddress
import struct
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidestep.wire import batch
from sidestep.wire.pb import authorization_pb2 as _authorization
from sidestep.wire.pb import workload_pb2

authorization_pb2: Any = _authorization  # enums are set by number here
ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("mesh", "route", "record", "policy", "proto", "table", "intern", "dump", "rbac")
SCOPES = {"Global": 0, "Namespace": 1, "WorkloadSelector": 2}
REASONS = ("open", "not denied", "allowed", "denied", "not allowed", "not received")

Policy = Mapping[str, Any]
Match = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Connection:
    """`identity` is a SPIFFE URI or "" for none; `source` and `destination` are IP addresses."""

    identity: str
    source: str
    destination: str
    port: int


@dataclass(frozen=True, slots=True)
class Workload:
    """The destination: its namespace, and the selector policies that its record names ("namespace/name")."""

    namespace: str = "namespace"
    policies: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """`policy` decided by its `rule` (-1: none did); `dry_run`: the first dry run that would have denied, or ""."""

    reason: str
    policy: str = ""
    rule: int = -1
    dry_run: str = ""

    @property
    def allow(self) -> bool:
        return self.reason in ("open", "not denied", "allowed")


# -- one policy --------------------------------------------------------------------------------------------------------


def text_matches(wanted: Mapping[str, Any], text: str) -> bool:
    ((kind, value),) = wanted.items()
    if kind == "Exact":
        return bool(text == value)
    if kind == "Prefix":
        return text.startswith(value)
    if kind == "Suffix":
        return text.endswith(value)
    return text != ""


def net_holds(net: str, address: str) -> bool:
    return ipaddress.ip_address(address) in ipaddress.ip_network(net, strict=False)


def parts(identity: str) -> tuple[str, str]:
    """Namespace and service account."""
    if not identity:
        return "", ""
    _, _, namespace, _, account = identity.removeprefix("spiffe://").split("/")
    return namespace, account


def value_matches(name: str, wanted: Any, connection: Connection) -> bool:
    """One value of the positive list `name`."""
    namespace, account = parts(connection.identity)
    if name == "namespaces":
        return text_matches(wanted, namespace)
    if name == "principals":
        return connection.identity != "" and text_matches(wanted, connection.identity.removeprefix("spiffe://"))
    if name == "serviceAccounts":
        return connection.identity != "" and (wanted["namespace"], wanted["serviceAccount"]) == (namespace, account)
    if name == "sourceIps":
        return net_holds(wanted, connection.source)
    if name == "destinationIps":
        return net_holds(wanted, connection.destination)
    return bool(wanted == connection.port)


NEGATIONS = {
    "namespaces": "notNamespaces",
    "principals": "notPrincipals",
    "serviceAccounts": "notServiceAccounts",
    "sourceIps": "notSourceIps",
    "destinationIps": "notDestinationIps",
    "destinationPorts": "notDestinationPorts",
}


def match_matches(match: Match, connection: Connection) -> bool:
    if not any(match.values()):
        return False
    for name, negation in NEGATIONS.items():
        positive, negative = match.get(name, ()), match.get(negation, ())
        if positive and not any(value_matches(name, each, connection) for each in positive):
            return False
        if any(value_matches(name, each, connection) for each in negative):
            return False
    return True


def rule_of(policy: Policy, connection: Connection) -> int:
    """The number of the first rule that matches, or -1."""
    for number, rule in enumerate(policy["rules"]):
        if all(not clause or any(match_matches(match, connection) for match in clause) for clause in rule):
            return number
    return -1


def missed(policy: Policy, connection: Connection) -> list[list[str]]:
    """Why no rule matches: for each rule the lists that stand in the way, in any match of any clause that does not
    hold; "nothing" for a match that asks for nothing.
    """
    found = []
    for rule in policy["rules"]:
        names = set()
        for clause in rule:
            if not clause or any(match_matches(match, connection) for match in clause):
                continue
            for match in clause:
                names |= {"nothing"} if not any(match.values()) else set()
                for name, negation in NEGATIONS.items():
                    positive, negative = match.get(name, ()), match.get(negation, ())
                    if positive and not any(value_matches(name, each, connection) for each in positive):
                        names.add(name)
                    if any(value_matches(name, each, connection) for each in negative):
                        names.add(negation)
        found.append(sorted(names))
    return found


# -- all of them -------------------------------------------------------------------------------------------------------


def key(policy: Policy) -> str:
    return f"{policy['namespace']}/{policy['name']}"


def considered(policies: Sequence[Policy], workload: Workload) -> list[Policy]:
    """Those of the namespace by name, those of the mesh by name, those that the record names as it names them."""
    by_name = sorted(policies, key=key)
    found = [p for p in by_name if p["scope"] == "Namespace" and p["namespace"] == workload.namespace]
    found += [p for p in by_name if p["scope"] == "Global"]
    by_key = {key(p): p for p in policies}
    return found + [by_key[name] for name in workload.policies if name in by_key]


def decide(policies: Sequence[Policy], workload: Workload, connection: Connection) -> Verdict:
    all_of_them = considered(policies, workload)
    enforced = [p for p in all_of_them if not p.get("dryRun")]
    denying = [p for p in enforced if p["action"] == "Deny"]
    allowing = [p for p in enforced if p["action"] == "Allow"]
    for policy in denying:
        if (rule := rule_of(policy, connection)) >= 0:
            return Verdict("denied", key(policy), rule)
    for name in workload.policies:
        if name not in {key(p) for p in policies}:
            return Verdict("not received", name)
    for policy in allowing:
        if (rule := rule_of(policy, connection)) >= 0:
            return Verdict("allowed", key(policy), rule, would_deny(all_of_them, allowing, connection))
    if allowing:
        return Verdict("not allowed", key(allowing[0]))
    return Verdict("not denied" if denying else "open", dry_run=would_deny(all_of_them, allowing, connection))


def would_deny(policies: Sequence[Policy], allowing: Sequence[Policy], connection: Connection) -> str:
    """Name of the first dry run that would have denied, or ""."""
    dry = [p for p in policies if p.get("dryRun")]
    for policy in dry:
        if policy["action"] == "Deny" and rule_of(policy, connection) >= 0:
            return key(policy)
    dry_allowing = [p for p in dry if p["action"] == "Allow"]
    if dry_allowing and not allowing and all(rule_of(p, connection) < 0 for p in dry_allowing):
        return key(dry_allowing[0])
    return ""


# -- on the wire -------------------------------------------------------------------------------------------------------


def _text(into: Any, wanted: Mapping[str, Any]) -> None:
    ((kind, value),) = wanted.items()
    if kind == "Presence":
        into.presence.SetInParent()
    else:
        setattr(into, kind.lower(), value)


def _match(into: Any, match: Match) -> None:
    fields = {
        "namespaces": "namespaces",
        "principals": "principals",
        "serviceAccounts": "service_accounts",
        "sourceIps": "source_ips",
        "destinationIps": "destination_ips",
        "destinationPorts": "destination_ports",
    }
    for positive, field in fields.items():
        for name, to in ((positive, getattr(into, field)), (NEGATIONS[positive], getattr(into, f"not_{field}"))):
            for value in match.get(name, ()):
                if positive in ("namespaces", "principals"):
                    _text(to.add(), value)
                elif positive == "serviceAccounts":
                    to.add(namespace=value["namespace"], serviceAccount=value["serviceAccount"])
                elif positive == "destinationPorts":
                    to.append(value)
                else:
                    address, _, length = value.partition("/")
                    to.add(address=ipaddress.ip_address(address).packed, length=int(length))


def message(policy: Policy) -> Any:
    """The policy as istio.security.Authorization."""
    made = authorization_pb2.Authorization(
        name=policy["name"],
        namespace=policy["namespace"],
        scope=SCOPES[policy["scope"]],
        action=1 if policy["action"] == "Deny" else 0,
        dry_run=bool(policy.get("dryRun")),
    )
    for rule in policy["rules"]:
        into_rule = made.rules.add()
        for clause in rule:
            into_clause = into_rule.clauses.add()
            for match in clause:
                _match(into_clause.matches.add(), match)
    return made


def records(policies: Iterable[Policy], version: str = "1") -> list[batch.Record]:
    """The policies for a batch."""
    return [
        batch.Record(batch.Op.POLICY_SET, key(each), version, message(each).SerializeToString()) for each in policies
    ]


def destination(workload: Workload, *addresses: str) -> batch.Record:
    """The destination's record for a batch."""
    made = workload_pb2.Workload(
        uid=f"Kubernetes//Pod/{workload.namespace}/web",
        name="web",
        namespace=workload.namespace,
        addresses=[ipaddress.ip_address(each).packed for each in addresses],
        authorization_policies=workload.policies,
    )
    body = workload_pb2.Address(workload=made).SerializeToString()
    return batch.Record(batch.Op.ADDRESS_SET, made.uid, "1", body)


# -- the engine's decision function ------------------------------------------------------------------------------------


def build() -> Path:
    """Compiles decide.c with what of tunnel/ it needs, once. Returns its path."""
    sources = [ROOT / f"tunnel/{name}.c" for name in SOURCES]
    inputs = [ROOT / "tests/tunnel/decide.c", *sources, *(ROOT / "tunnel").glob("*.h")]
    binary = ROOT / "build/decide"
    if not binary.exists() or binary.stat().st_mtime < max(each.stat().st_mtime for each in inputs):
        binary.parent.mkdir(exist_ok=True)
        new = binary.with_suffix(".new")
        flags = ["-O2", "-g", "-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-Itunnel"]
        subprocess.run(["gcc", *flags, "-o", new, inputs[0], *sources], check=True, cwd=ROOT)
        new.rename(binary)
    return binary


def _endpoint(address: str, port: int) -> bytes:
    ip = ipaddress.ip_address(address)
    packed = ip.packed if ip.version == 6 else bytes(10) + b"\xff\xff" + ip.packed
    return packed + struct.pack("<H", port)


def question(connection: Connection) -> bytes:
    """One question of decide.c."""
    identity = connection.identity.encode()
    return b"".join(
        (
            struct.pack("<H", len(identity)),
            identity,
            _endpoint(connection.source, 40000),
            _endpoint(connection.destination, connection.port),
        )
    )


def world(state: Sequence[batch.Record], questions: Sequence[bytes]) -> bytes:
    """A full state and questions about it, for decide.c."""
    body = batch.encode(state, full=True)
    return b"".join(
        (b"B", struct.pack("<I", len(body)), body, b"Q", struct.pack("<I", len(questions)), b"".join(questions))
    )


def line(verdict: Verdict) -> str:
    """The verdict as decide.c prints it."""
    return f"{REASONS.index(verdict.reason)} {verdict.rule} {verdict.policy or '-'} {verdict.dry_run or '-'}"


def ask(blocks: bytes, *arguments: str) -> list[str]:
    """Runs decide.c over blocks. Returns its lines; whatever it refused fails the test."""
    done = subprocess.run([build(), *arguments], input=blocks, capture_output=True, check=True, timeout=300)
    assert done.stderr == b"", done.stderr.decode()
    return done.stdout.decode().splitlines()
