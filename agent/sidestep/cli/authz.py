"""`sidestep authz check FROM TO[:PORT]`: may they speak, and which policy says so?

Names become what an engine decides by: an identity, a source address and a destination. Each question goes to the
engine of the node where the destination lives, through its agent; that engine answers with the function that decides
about connections, so nothing here knows what a policy means.

A *caller* is an identity ("" for none) at a source address; a *target* is a port of a workload at one of its
addresses. A pod has both families, a service account as many pods as it has: every pair of one family is asked.
"""

import argparse
import ipaddress
import json
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from sidestep.cli.mesh import Mesh, endpoint, family, gather, written
from sidestep.cli.nodes import NodeError
from sidestep.cli.policies import in_words, stands_for
from sidestep.cli.show import add_options
from sidestep.cli.table import Row
from sidestep.node.pods import spiffe

CHECKS_MAX = 512
RULES_TOLD = 8
# The lists of a match, in the words of an AuthorizationPolicy.
MISFITS = {
    "sourceIps": "source ipBlocks",
    "notSourceIps": "source notIpBlocks",
    "destinationIps": "destination.ip",
    "notDestinationIps": "destination.ip (notValues)",
    "destinationPorts": "ports",
    "notDestinationPorts": "notPorts",
}
ALLOWED, DENIED, UNKNOWN = 0, 1, 2
NOWHERE = {4: "0.0.0.0", 6: "::"}
NAMES = """\
FROM and TO are one of
  NAMESPACE/POD          a pod, by the name in the API
  NAMESPACE/sa/ACCOUNT   a service account: every pod that runs with it
  spiffe://TD/ns/N/sa/A  the same by identity (one of another trust domain is refused, whatever policies say)
  ADDRESS                IPv4 or IPv6, of a pod, of a Service or of somebody outside
TO may end in :PORT, an IPv6 address with a port is written [ADDRESS]:PORT. Without a port every port is asked that
the pod declares or a Service leads to.
A FROM that is not enrolled has no identity: its connections are clear text, and so they are judged.
rules[N] is the rule's number in the policy (where no control plane can be asked: among those that are in force).
Exit status: 0 all are allowed, 1 some are denied, 2 it cannot be said."""
_LABEL = r"[a-z0-9](?:[-a-z0-9.]*[a-z0-9])?"
_POD = re.compile(rf"({_LABEL})/({_LABEL})")
_ACCOUNT = re.compile(rf"({_LABEL})/sa/({_LABEL})")
_SPIFFE = re.compile(rf"spiffe://([^/]+)/ns/({_LABEL})/sa/({_LABEL})")


@dataclass(frozen=True, slots=True)
class Name:
    """What FROM or TO says. `kind`: pod, account or address; `trust_domain` "" for this mesh's; `port` 0 without."""

    kind: str
    namespace: str = ""
    name: str = ""
    trust_domain: str = ""
    address: str = ""
    port: int = 0

    def __str__(self) -> str:
        if self.kind == "address":
            return self.address
        return f"{self.namespace}/sa/{self.name}" if self.kind == "account" else f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who connects: by an identity, "" for none, from an address. `name`: as people call it."""

    name: str
    identity: str
    address: str


@dataclass(frozen=True, slots=True)
class Target:
    """Where to: a port of a workload, whose node decides."""

    name: str
    node: str
    address: str
    port: int
    identity: str = ""


def parse(text: str, port: bool) -> Name:
    """Reads FROM, or TO (`port`: it may have one). Raises ValueError, with what was expected."""
    host, number = text, 0
    if port:
        host, number = _port(text)
    try:
        return Name("address", address=str(ipaddress.ip_address(host.strip("[]"))), port=number)
    except ValueError:
        pass
    if match := _SPIFFE.fullmatch(host):
        return Name("account", match[2], match[3], match[1], port=number)
    if match := _ACCOUNT.fullmatch(host):
        return Name("account", match[1], match[2], port=number)
    if match := _POD.fullmatch(host):
        return Name("pod", match[1], match[2], port=number)
    raise ValueError(f"{text!r} is neither NAMESPACE/POD, NAMESPACE/sa/ACCOUNT, a SPIFFE URI nor an address")


def _port(text: str) -> tuple[str, int]:
    """Splits :PORT off, 0 without one. An IPv6 address without brackets has none."""
    host, colon, number = text.rpartition(":")
    bare = ":" in host and not host.endswith("]") and not host.startswith("spiffe:")
    if not colon or bare or text.endswith("]") or (host == "spiffe"):
        return text, 0
    if not number.isascii() or not number.isdigit() or not 0 < int(number) < 65536:
        raise ValueError(f"{text!r}: {number!r} is no port")
    return host, int(number)


def callers(mesh: Mesh, name: Name, notes: list[str]) -> list[Caller]:
    """Who FROM means. `notes` gets what people should know. Raises NodeError where nobody is known by it."""
    if name.kind == "account":
        return _account_callers(mesh, name, notes)
    if name.kind == "pod":
        workloads = mesh.named(name.namespace, name.name)
        pod = mesh.pods.get(str(name)) or {}
        if pod.get("host_network") and pod.get("addresses"):
            notes.append(f"{name} uses the host's network: it has no identity, and its node's address")
            return [Caller(str(name), "", address) for address in pod["addresses"]]
        if not workloads:
            raise NodeError(_unknown(mesh, name))
        return [caller for each in workloads for caller in _callers_of(each, each.get("workloadIps") or (), notes)]
    workload = mesh.at(name.address)
    if workload is None:
        notes.append(f"{name} is no workload of the mesh: it has no identity")
        return [Caller(name.address, "", name.address)]
    return _callers_of(workload, [name.address], notes)


def _callers_of(workload: Row, addresses: Iterable[str], notes: list[str]) -> list[Caller]:
    called = _called(workload)
    if not _enrolled(workload):
        why = "uses the host's network" if _on_host(workload) else "is not enrolled"
        notes.append(f"{called} {why}: it has no identity, its connections are clear text")
    identity = str(workload.get("identity") or "") if _enrolled(workload) else ""
    found = [Caller(called, identity, address) for address in addresses]
    if not found:
        raise NodeError(f"{called} has no address in the mesh, so nothing can be said about its connections")
    return found


def _account_callers(mesh: Mesh, name: Name, notes: list[str]) -> list[Caller]:
    identity = spiffe(name.trust_domain or mesh.trust_domain, name.namespace, name.name)
    pods = mesh.identified(identity)
    enrolled = [each for each in pods if _enrolled(each)]
    for each in pods:
        if not _enrolled(each):
            notes.append(f"{_called(each)} runs as {name} but is not enrolled: it has no identity and is left out here")
    found = [Caller(_called(each), identity, ip) for each in enrolled for ip in each.get("workloadIps") or ()]
    if not found:
        notes.append(
            f"no enrolled pod runs as {name} now: asked with the source addresses 0.0.0.0 and ::, "
            "so what policies say about source addresses does not count"
        )
        found = [Caller(str(name), identity, address) for address in NOWHERE.values()]
    return found


def targets(mesh: Mesh, name: Name, notes: list[str]) -> list[Target]:
    """Where TO leads. Raises NodeError where nothing of the mesh decides there, or no port is known."""
    if name.kind == "address":
        return _address_targets(mesh, name, notes)
    if name.kind == "pod":
        workloads = mesh.named(name.namespace, name.name)
    else:
        identity = spiffe(name.trust_domain or mesh.trust_domain, name.namespace, name.name)
        workloads = mesh.identified(identity)
    if not workloads:
        raise NodeError(_unknown(mesh, name))
    return _guarded(mesh, workloads, {}, name.port, notes)


def _address_targets(mesh: Mesh, name: Name, notes: list[str]) -> list[Target]:
    workload = mesh.at(name.address)
    if workload is not None:
        return _guarded(mesh, [workload], {str(workload.get("uid")): [name.address]}, name.port, notes)
    service = mesh.service_at(name.address)
    if service is None:
        raise NodeError(f"{name} is no workload and no Service of the mesh: no engine decides about what goes there")
    key = f"{service.get('namespace')}/{service.get('hostname')}"
    notes.append(f"{name} is Service {service.get('namespace')}/{service.get('name')}: its endpoints are asked")
    found: list[Target] = []
    for each in mesh.behind(key):
        ports: Mapping[str, Any] = (each.get("services") or {}).get(key) or {}
        wanted = sorted({int(to) for at, to in ports.items() if name.port in (0, int(at))})
        if wanted and _enrolled(each):
            same = [ip for ip in each.get("workloadIps") or () if family(ip) == family(name.address)]
            found += [_target(each, ip, port) for ip in same for port in wanted]
        elif wanted:
            notes.append(_not_guarded(each))
    if not found:
        at = f" with port {name.port}" if name.port else ""
        raise NodeError(f"{name} is Service {key}, and it has no endpoint{at} that the mesh guards")
    return found


def _target(workload: Row, address: str, port: int) -> Target:
    node, identity = str(workload.get("node") or ""), str(workload.get("identity") or "")
    return Target(_called(workload), node, address, port, identity)


def _guarded(
    mesh: Mesh, workloads: Iterable[Row], addresses: Mapping[str, Sequence[str]], port: int, notes: list[str]
) -> list[Target]:
    """The enrolled ones of these workloads, at these addresses of each (default: all)."""
    found, missing = [], []
    for each in workloads:
        if not _enrolled(each):
            missing.append(_not_guarded(each))
            continue
        ports = [port] if port else known_ports(mesh, each)
        if not ports:
            called = _called(each)
            missing.append(f"{called} declares no port and no Service leads to it: say {called}:PORT")
        for ip in addresses.get(str(each.get("uid"))) or each.get("workloadIps") or ():
            found += [_target(each, ip, number) for number in ports]
    if not found:
        raise NodeError("; ".join(missing) or "it has no address in the mesh")
    notes += missing
    return found


def known_ports(mesh: Mesh, workload: Row) -> list[int]:
    """Ports that the pod declares or that a Service leads to."""
    ports = {int(to) for each in (workload.get("services") or {}).values() for to in each.values()}
    pod = mesh.pods.get(_called(workload)) or {}
    return sorted({*ports, *(int(port) for port in pod.get("declared_ports") or ())} - {0})


def pairs(from_: Iterable[Caller], to: Sequence[Target], notes: list[str]) -> list[tuple[Caller, Target]]:
    """Who is asked about: each caller with each target of its family. A pod's way to itself is not captured."""
    found = []
    for caller in from_:
        for target in to:
            if family(caller.address) != family(target.address):
                continue
            if caller.name == target.name and caller.address == target.address:
                note = f"{caller.name} to its own address is not captured: no policy stands in that way"
                notes += [note] if note not in notes else []
                continue
            found.append((caller, target))
    return found


def _unknown(mesh: Mesh, name: Name) -> str:
    pod = mesh.pods.get(str(name)) if name.kind == "pod" else None
    if pod is not None:
        why = "it uses the host's network" if pod.get("host_network") else pod.get("why") or "it has no address yet"
        return f"pod {name} has no record in the mesh ({why})"
    service = mesh.service_named(name.namespace, name.name) if name.kind == "pod" else {}
    if service:
        addresses = [str(vip).rpartition("/")[2] for vip in service.get("vips") or ()]
        how = f"as TO say its address ({', '.join(addresses)})" if addresses else "it has no address: say a pod"
        return f"{name} is a Service, not a pod; {how}"
    return f"no workload {name} is known to the mesh; `sidestep workloads` lists them"


def _called(workload: Row) -> str:
    return f"{workload.get('namespace')}/{workload.get('name')}"


def _enrolled(workload: Row) -> bool:
    return workload.get("protocol") == "HBONE" and not _on_host(workload)


def _on_host(workload: Row) -> bool:
    return workload.get("networkMode") == "HostNetwork"


def _not_guarded(workload: Row) -> str:
    why = "uses the host's network" if _on_host(workload) else "is not enrolled"
    return f"{_called(workload)} {why}: sidestep does not guard it, no policy is enforced there"


def ask(mesh: Mesh, caller: Caller, target: Target, notes: list[str]) -> dict[str, Any]:
    """One decision of the engine of the target's node; of another node's, which has the same records, where that
    cannot be asked.
    """
    agent = mesh.agent(target.node)
    if agent is None:
        agent = mesh.agents[0]
        note = f"the agent of {target.node or 'its node'} is not to be asked from here: {agent.name}'s engine answers"
        notes += [note] if note not in notes else []
    query = urlencode(
        {
            "identity": caller.identity,
            "source": caller.address,
            "destination": endpoint(target.address, target.port),
        }
    )
    answer = judged(mesh.trust_domain, caller.identity, agent.node.ask(f"/authz?{query}"))
    return {
        "from": {"name": caller.name, "identity": caller.identity, "address": caller.address},
        "to": {"name": target.name, "node": target.node, "address": target.address, "port": target.port},
        "allow": bool(answer["allow"]),
        "known": bool(answer.get("workload")),
        "policy": str(answer.get("policy") or ""),
        "rule": int(answer.get("rule", -1)),
        "reason": str(answer.get("reason") or ""),
        "policies": answer.get("policies") or [],
        "answered_by": str(answer.get("node") or ""),
    }


def judged(trust_domain: str, identity: str, answer: Row) -> Row:
    """The engine's answer about policy; of a caller of another trust domain what happens before any policy is asked:
    its certificate is refused in the handshake. Pure.
    """
    theirs = identity.removeprefix("spiffe://").partition("/")[0]
    if not identity or theirs == trust_domain or not answer.get("workload"):
        return answer
    why = f"refused in the handshake, before any policy: its trust domain is {theirs}, this mesh's is {trust_domain}"
    return {**answer, "allow": False, "policy": "", "rule": -1, "reason": why}


def numbered(check: dict[str, Any], objects: Mapping[str, Row]) -> dict[str, Any]:
    """An answer with rules by their numbers in the objects, of which rules may have been left out. Pure."""

    def number(name: str, rule: int) -> int:
        numbers = (objects.get(name) or {}).get("rules") or ()
        return int(numbers[rule]) if 0 <= rule < len(numbers) else rule

    policies = []
    for each in check["policies"]:
        name, missed = each["name"], each.get("missed")
        told = {**each, "rule": number(name, each.get("rule", -1))}
        if missed is not None:
            told["missed"] = [{"rule": number(name, rule), "lists": lists} for rule, lists in enumerate(missed)]
        policies.append(told)
    return {**check, "rule": number(check["policy"], check["rule"]), "policies": policies}


def _certificates(mesh: Mesh, notes: list[str]) -> dict[str, Iterable[Row]]:
    """By node."""
    found: dict[str, Iterable[Row]] = {}
    for agent in mesh.agents:
        try:
            found[agent.name] = agent.node.ask("/certificates")
        except NodeError as error:
            notes.append(str(error))
    return found


def uncertified(identities: Collection[str], held: Mapping[str, Iterable[Row]]) -> list[str]:
    """Who of these cannot prove who it is now, by node: policy may allow it, the connection fails. Pure."""
    found = []
    for node, certificates in sorted(held.items()):
        for each in certificates:
            if each["identity"] in identities and each["state"] != "available":
                why = f" ({each['error']})" if each.get("error") else ""
                found.append(
                    f"{each['identity']} has no valid certificate on {node}: it is {each['state']}{why}; "
                    "connections of its pods there are refused, whatever policies say"
                )
    return found


def status_of(checks: Sequence[Row]) -> int:
    """The exit status."""
    if any(check["known"] and not check["allow"] for check in checks):
        return DENIED
    return UNKNOWN if not checks or any(not check["known"] for check in checks) else ALLOWED


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `authz`."""
    line = "may one workload connect to another, and which policy says so?"
    parser = subparsers.add_parser("authz", help=line, description=line)
    verbs = parser.add_subparsers(dest="verb", metavar="check", required=True)
    check = verbs.add_parser(
        "check", help=line, description=line, epilog=NAMES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    check.add_argument("from_", metavar="FROM")
    check.add_argument("to", metavar="TO[:PORT]")
    add_options(check)


def run(args: argparse.Namespace) -> int:
    """Asks and prints. 0 allowed, 1 denied, 2 cannot be said."""
    notes: list[str] = []
    checks: list[dict[str, Any]] = []
    try:
        asked_from, asked_to = parse(args.from_, False), parse(args.to, True)
        mesh = gather(args.lab, args.run_dir)
        notes += mesh.problems
        chosen = pairs(callers(mesh, asked_from, notes), targets(mesh, asked_to, notes), notes)
        objects = written(mesh)
        for caller, target in chosen[:CHECKS_MAX]:
            checks.append(numbered(ask(mesh, caller, target, notes), objects))
        notes += uncertified({each.identity for pair in chosen for each in pair}, _certificates(mesh, notes))
        for name in dict.fromkeys(each["name"] for check in checks for each in check["policies"]):
            row = objects.get(name)
            if row is not None and not row.get("accepted"):
                notes.append(f"policy {name} is not in force as it is written: {row.get('message')}")
    except (ValueError, NodeError) as error:
        for note in notes:
            print(f"sidestep authz: {note}", file=sys.stderr)
        print(f"sidestep authz: {error}", file=sys.stderr)
        return UNKNOWN
    status = status_of(checks)
    if len(chosen) > CHECKS_MAX:
        notes.append(f"only {CHECKS_MAX} of {len(chosen)} pairs of addresses and ports were asked")
        status = status or UNKNOWN
    if not chosen and not notes:
        notes.append("the two have no address of one family")
    if args.json:
        verdict = {ALLOWED: "allowed", DENIED: "denied", UNKNOWN: "unknown"}[status]
        answer = {"from": args.from_, "to": args.to, "verdict": verdict, "checks": checks, "notes": notes}
        json.dump(answer, sys.stdout, indent=2)
        print()
        return status
    for lines in told(checks):
        print(lines)
    for note in notes:
        print(f"note: {note}")
    return status


def told(checks: Iterable[Row]) -> list[str]:
    """What people read: checks with one answer together. Pure."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for check in checks:
        answer = (check["known"], check["allow"], check["policy"], check["rule"], check["reason"])
        considered = tuple((each["name"], each.get("rule", -1)) for each in check["policies"])
        who = (check["from"]["name"], check["from"]["identity"], check["to"]["name"], check["to"]["port"])
        groups.setdefault((who, answer, considered), []).append(check)
    return [_told(group) for group in groups.values()]


def _told(group: Sequence[Row]) -> str:
    first = group[0]
    word = "cannot say" if not first["known"] else "allowed" if first["allow"] else "DENIED"
    because = in_words(first["reason"])
    if first["rule"] >= 0 and not stands_for(first["policy"]):
        because += f", rules[{first['rule']}]"
    lines = [
        f"{word}: {first['from']['name']} -> {first['to']['name']}:{first['to']['port']}",
        f"  from     {first['from']['identity'] or 'no identity (clear text)'}"
        f" at {', '.join(dict.fromkeys(each['from']['address'] for each in group))}",
        f"  to       {', '.join(dict.fromkeys(each['to']['address'] for each in group))}",
        f"  because  {because}",
    ]
    for each in first["policies"]:
        meant = stands_for(each["name"])
        what = [str(each["action"]).upper(), *([meant] if meant else [])]
        what += ["dry run: it decides nothing"] if each.get("dry_run") else []
        lines.append(f"  policy   {each['name']} ({', '.join(what)}) {_whether(each, bool(meant))}")
    return "\n".join(lines)


def _whether(policy: Row, peer: bool) -> str:
    """Whether it matches, and by which rule; or why none does: for each rule what does not fit."""
    if policy.get("matched"):
        return "matches: no identity" if peer else f"matches by rules[{policy['rule']}]"
    missed = policy.get("missed")
    if missed is None:
        return "does not match"
    if peer:
        known = any("notPrincipals" in each["lists"] for each in missed)
        return "does not match: the caller has an identity" if known else "does not match: not at this port"
    if not missed:
        return "does not match: it has no rules"
    parts = [f"rules[{each['rule']}] {_misfits(each['lists'])}" for each in missed[:RULES_TOLD]]
    if len(missed) > RULES_TOLD:
        parts.append("and so on")
    return "does not match: " + "; ".join(parts)


def _misfits(lists: Sequence[str]) -> str:
    if "nothing" in lists:
        return "has a part that L4 does not know, and never matches"
    return f"does not fit in {', '.join(MISFITS.get(each, each) for each in lists)}"
