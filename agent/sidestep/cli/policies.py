"""`sidestep policies`: every policy of the mesh, and what of it is not enforced.

The control plane knows what was made of each object; the agents know what their engines hold and what they refused.
Where no control plane can be asked the engines' records are shown instead. The exit status is 0 only when it is known
that every policy is in force as it is written.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sidestep.cli.nodes import Answering, NodeError, asked, control_addresses, control_status, find, one_mesh
from sidestep.cli.show import add_options
from sidestep.cli.table import Row, table

AUTHORIZATION = "AuthorizationPolicy"
PEER = "PeerAuthentication"
# Records that the control plane makes of PeerAuthentications.
STATIC, CONVERTED = "istio_converted_static_strict", "converted_peer_authentication_"
SCOPES = {
    "global": "mesh",
    "namespace": "namespace",
    "workload_selector": "selector",
    "workloadselector": "selector",
    "targetrefs": "waypoint",
}


def stands_for(record: str) -> str:
    """What a record was made of, where its name does not say so: "" for any but those of PeerAuthentications. Pure."""
    namespace, _, name = record.rpartition("/")
    if name == STATIC:
        return "PeerAuthentication STRICT"
    return f"PeerAuthentication {namespace}/{name.removeprefix(CONVERTED)}" if name.startswith(CONVERTED) else ""


def in_words(reason: str) -> str:
    """An engine's reason, with what the policy in it stands for. Pure."""
    meant = stands_for(reason.rpartition(": ")[2])
    return f"{reason} ({meant}: who has no identity is refused)" if meant else reason


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `policies`."""
    line = "the policies of the mesh, and what of them is not enforced"
    more = "Exit status: 0 all are in force as they are written; 1 something is not, or it cannot be known."
    add_options(subparsers.add_parser("policies", help=line, description=f"{line}. {more}"))


def run(args: argparse.Namespace) -> int:
    """Prints the policies; 1 where one is not enforced or refused, or where that cannot be known."""
    try:
        agents, problems = asked(find(args.lab, args.run_dir))
        one_mesh(agents)
    except NodeError as error:
        print(f"sidestep policies: {error}", file=sys.stderr)
        return 1
    held: dict[str, list[Row]] = {}
    for agent in agents:
        try:
            held[agent.name] = list(agent.node.ask("/policies"))
        except NodeError as error:
            problems.append(str(error))
    known: list[Row] | None = None
    for address in control_addresses(agents):
        try:
            known = [*(known or []), *(control_status(address).get("policies") or [])]
        except NodeError as error:
            problems.append(str(error))
    rows = from_control(known, held) if known is not None else from_engines(held)
    refused = refusals(agents, held)
    if known is None:
        problems.append(
            "no control plane could be asked: these are the records that the engines hold; "
            "what of the policies is not in them is not known here"
        )
    if args.json:
        source = "control plane" if known is not None else "engines"
        json.dump({"source": source, "policies": rows, "refused": refused, "problems": problems}, sys.stdout, indent=2)
        print()
    else:
        _print(rows, refused)
    for problem in problems:
        print(f"sidestep policies: {problem}", file=sys.stderr)
    bad = sum(1 for row in rows if not row["enforced"])
    if bad or refused:
        print(
            f"sidestep policies: {bad} of {len(rows)} not in force as written, {len(refused)} refused by agents",
            file=sys.stderr,
        )
    return 1 if bad or refused or problems else 0


def from_control(policies: Iterable[Row], held: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """One row for each object; what is not enforced of it, node by node where an engine does not hold what was made of
    it. Pure.
    """
    versions = {
        node: {str(record.get("key")): str(record.get("version")) for record in records}
        for node, records in held.items()
    }
    rows = []
    for policy in sorted(policies, key=lambda each: (str(each["namespace"]), str(each["name"]), str(each["kind"]))):
        why = list(policy.get("not_enforced") or ())
        if not policy.get("accepted") and not why:
            why = [str(policy.get("message") or policy.get("reason") or "refused")]
        for name, version in sorted((policy.get("records") or {}).items()):
            it = "it" if name == f"{policy['namespace']}/{policy['name']}" else name
            for node in sorted(versions):
                if name not in versions[node]:
                    why.append(f"{node}: its engine does not hold {it} (yet)")
                elif versions[node][name] != version:
                    why.append(f"{node}: its engine holds another version of {it} (still)")
        rows.append(
            {
                "kind": policy["kind"],
                "namespace": policy["namespace"],
                "name": policy["name"],
                "action": str(policy.get("action") or ""),
                "scope": _scope(policy.get("scope")),
                "dry_run": bool(policy.get("dry_run")),
                "selects": policy.get("selects"),
                "accepted": bool(policy.get("accepted")),
                "reason": str(policy.get("reason") or ""),
                "enforced": not why,
                "not_enforced": why,
            }
        )
    return rows


def from_engines(held: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """One row for each record that some engine holds. Pure."""
    records: dict[str, dict[str, Any]] = {}
    for node in sorted(held):
        for record in held[node]:
            records.setdefault(str(record.get("key")), {})[node] = record
    rows = []
    for key, by_node in sorted(records.items()):
        first = next(iter(by_node.values()))
        namespace, _, name = key.rpartition("/")
        why = [f"{node}: {each['undecodable']}" for node, each in by_node.items() if each.get("undecodable")]
        why += [f"{node}: its engine does not hold it (yet)" for node in sorted(held) if node not in by_node]
        peer = name == STATIC or name.startswith(CONVERTED)
        rows.append(
            {
                "kind": PEER if peer else AUTHORIZATION,
                "namespace": namespace,
                "name": name,
                "action": str(first.get("action") or "").upper(),
                "scope": _scope(first.get("scope")),
                "dry_run": bool(first.get("dryRun")),
                "selects": None,
                "accepted": not any(each.get("undecodable") for each in by_node.values()),
                "reason": "",
                "enforced": not why,
                "not_enforced": why,
            }
        )
    return rows


def refusals(agents: Iterable[Answering], held: Mapping[str, Sequence[Row]]) -> list[dict[str, str]]:
    """Policies that agents refused, and what stands in their place. Pure."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for agent in agents:
        for each in (agent.status.get("control") or {}).get("refused") or ():
            if each.get("type") == "policy":
                name = str(each.get("name"))
                instead = "its last version that could be decoded stays in force"
                found[agent.name, name] = _refusal(agent.name, name, str(each.get("reason")), instead)
        for record in held.get(agent.name, ()):
            if record.get("undecodable"):
                name = str(record.get("key"))
                what = "everything" if record.get("scope") == "Global" else f"namespace {record.get('namespace')}"
                found[agent.name, name] = _refusal(
                    agent.name, name, str(record["undecodable"]), f"{what} is denied in its place"
                )
    return [found[key] for key in sorted(found)]


def _refusal(node: str, name: str, reason: str, instead: str) -> dict[str, str]:
    return {"node": node, "policy": name, "reason": reason, "instead": instead}


def _scope(scope: Any) -> str:
    text = str(scope or "")
    return SCOPES.get(text.lower(), text)


def _print(rows: Sequence[Row], refused: Sequence[Row]) -> None:
    table(
        {
            "POLICY": lambda row: f"{row['namespace']}/{row['name']}",
            "KIND": lambda row: row["kind"],
            "ACTION": lambda row: row["action"] or "-",
            "SCOPE": lambda row: row["scope"] or "-",
            "DRY RUN": lambda row: "yes" if row["dry_run"] else "no",
            "SELECTS": lambda row: "-" if row["selects"] is None else row["selects"],
            "ACCEPTED": lambda row: "yes" if row["accepted"] else f"no: {row['reason']}" if row["reason"] else "no",
            "IN FORCE": lambda row: "yes" if row["enforced"] else "NOT as written, see below",
        },
        rows,
        "no policies",
    )
    not_enforced = [row for row in rows if not row["enforced"]]
    if not_enforced:
        print("\nnot in force as written:")
        for row in not_enforced:
            print(f"  {row['kind']} {row['namespace']}/{row['name']}")
            for line in row["not_enforced"]:
                print(f"    {line}")
    if refused:
        print("\nrefused by agents:")
        for row in refused:
            print(f"  {row['policy']} on {row['node']}: {row['reason']}; {row['instead']}")
