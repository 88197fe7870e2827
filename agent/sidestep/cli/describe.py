"""`sidestep describe pod NAMESPACE/NAME`: everything about a pod on one page."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

from sidestep.cli.authz import NOWHERE, known_ports
from sidestep.cli.mesh import Mesh, endpoint, family, gather, not_as_written
from sidestep.cli.nodes import Answering, NodeError
from sidestep.cli.policies import SCOPES, in_words, stands_for
from sidestep.cli.show import add_options
from sidestep.cli.table import Row, duration, listed, table

DENIALS = 10


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `describe`."""
    line = "everything about a pod on one page"
    parser = subparsers.add_parser("describe", help=line, description=line)
    parser.add_argument("what", choices=("pod",))
    parser.add_argument("name", metavar="NAMESPACE/NAME")
    add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the page; 1 where the pod is not known, or a part of the page could not be had."""
    namespace, _, name = args.name.partition("/")
    try:
        if not namespace or not name or "/" in name:
            raise NodeError(f"{args.name!r} is not NAMESPACE/NAME")
        mesh = gather(args.lab, args.run_dir)
        page = describe(mesh, namespace, name)
    except NodeError as error:
        print(f"sidestep describe: {error}", file=sys.stderr)
        return 1
    if args.json:
        json.dump(page, sys.stdout, indent=2)
        print()
    else:
        _print(page)
    for problem in mesh.problems:
        print(f"sidestep describe: {problem}", file=sys.stderr)
    return 1 if mesh.problems else 0


def describe(mesh: Mesh, namespace: str, name: str) -> dict[str, Any]:
    """The page as data. What could not be had is in `mesh.problems`. Raises NodeError where nobody knows the pod."""
    key = f"{namespace}/{name}"
    pod: Row = mesh.pods.get(key) or {}
    workload: Row = next(iter(mesh.named(namespace, name)), {})
    if not pod and not workload:
        raise NodeError(f"no pod {key} is known to the agents that answer; `sidestep pods` lists them")
    node = str(pod.get("node") or workload.get("node") or "")
    agent = mesh.agent(node)
    if agent is None:
        mesh.problems.append(
            f"the agent of {node or 'its node'} is not to be asked from here: only its record is shown"
        )
    addresses = list(pod.get("addresses") or workload.get("workloadIps") or ())
    identity = str(pod.get("identity") or workload.get("identity") or "")
    page: dict[str, Any] = {
        "pod": key,
        "uid": pod.get("uid", ""),
        "node": node,
        "mode": pod.get("mode", ""),
        "enrolled": bool(pod.get("enrolled")),
        "annotated": bool(pod.get("annotated")),
        "why": pod.get("why", ""),
        "waits_for": pod.get("waits_for", ""),
        "error": pod.get("error", ""),
        "host_network": bool(pod.get("host_network")) or workload.get("networkMode") == "HostNetwork",
        "identity": identity if pod.get("enrolled") or workload.get("protocol") == "HBONE" else "",
        "addresses": addresses,
        "record": {k: workload[k] for k in ("uid", "protocol", "status", "version") if k in workload},
        "services": _services(mesh, workload),
        "ports": {
            "known": known_ports(mesh, workload) if workload else list(pod.get("declared_ports") or ()),
            "probed": list(pod.get("probed") or ()),
            "held": pod.get("ports") or {},
        },
        "raw": bool(pod.get("raw")),
        "old_connections": pod.get("old_connections", 0),
        "doorless": pod.get("doorless", ""),
        "certificate": None,
        "connections": None,
        "policies": None,
        "denials": None,
    }
    if agent is not None:
        for part, found in (
            ("certificate", lambda: _certificate(agent, identity)),
            ("connections", lambda: _connections(agent, key)),
            ("policies", lambda: _policies(mesh, agent, addresses) if workload else []),
            ("denials", lambda: denials(mesh, key, str(page["uid"]), addresses)),
        ):
            try:
                page[part] = found()
            except NodeError as error:
                mesh.problems.append(str(error))
    return page


def _services(mesh: Mesh, workload: Row) -> list[dict[str, Any]]:
    found = []
    for key, ports in sorted((workload.get("services") or {}).items()):
        service = mesh.service(key)
        vips = [str(vip).rpartition("/")[2] for vip in service.get("vips") or ()]
        found.append({"name": key, "ports": dict(ports), "addresses": vips})
    return found


def _certificate(agent: Answering, identity: str) -> Row | None:
    return next((row for row in agent.node.ask("/certificates") if row["identity"] == identity), None)


def _connections(agent: Answering, key: str) -> dict[str, int]:
    mine = [row.get("direction") for row in agent.node.ask("/connections") if row.get("pod") == key]
    return {"inbound": mine.count("inbound"), "outbound": mine.count("outbound")}


def _policies(mesh: Mesh, agent: Answering, addresses: Sequence[str]) -> list[dict[str, Any]]:
    """The policies that select it, as the engine says that would decide: it is asked, and the verdict thrown away."""
    if not addresses:
        return []
    address = addresses[0]
    question = {"identity": "", "source": NOWHERE[family(address)], "destination": endpoint(address, 1)}
    answer = agent.node.ask(f"/authz?{urlencode(question)}")
    records = {str(row.get("key")): row for row in agent.node.ask("/policies")}
    unsaid = not_as_written(mesh)
    found = []
    for each in answer.get("policies") or ():
        record = records.get(str(each["name"]), {})
        scope = str(record.get("scope") or "")
        found.append(
            {
                "name": each["name"],
                "action": str(each["action"]).upper(),
                "scope": SCOPES.get(scope.lower(), scope),
                "dry_run": bool(each.get("dry_run")),
                "rules": len(record.get("rules") or ()),
                "undecodable": str(record.get("undecodable") or ""),
                "not_as_written": unsaid.get(str(each["name"]), ""),
            }
        )
    return found


def denials(mesh: Mesh, key: str, uid: str, addresses: Sequence[str]) -> list[Row]:
    """The last that concern the pod, oldest first: at its own door, and at others' where it was the caller."""
    found: list[Row] = []
    for agent in mesh.agents:
        for row in agent.node.ask("/denials"):
            source = str(row.get("src") or "").rpartition(":")[0].strip("[]")
            mine = row.get("pod_uid") == uid if uid else row.get("pod") == key
            if mine or source in addresses:
                found.append({**row, "node": agent.name})
    return sorted(found, key=lambda row: float(row.get("time_ms") or 0))[-DENIALS:]


def _print(page: Row) -> None:
    now = time.time()
    width = 14
    for name, text in _facts(page, now):
        print(f"{name + ':':<{width}} {text}")
    if page["policies"] is not None:
        print("\npolicies that select it" + (":" if page["enrolled"] else ", NOT ENFORCED, for it is not enrolled:"))
        table(
            {
                "POLICY": _policy_name,
                "ACTION": lambda row: row["action"],
                "SCOPE": lambda row: row["scope"] or "-",
                "DRY RUN": lambda row: "yes" if row["dry_run"] else "no",
                "RULES": lambda row: row["rules"],
                "PROBLEM": _problem,
            },
            page["policies"],
            "none: everything is allowed" if page["record"] else "none: it has no record in the mesh",
        )
    if page["denials"] is not None:
        print("\nrecent denials:")
        table(
            {
                "AGO": lambda row: duration(max(0.0, now - float(row.get("time_ms") or 0) / 1000)),
                "AT": lambda row: row.get("pod") or "-",
                "WAY": lambda row: row.get("direction") or "-",
                "FROM": lambda row: row.get("src") or "-",
                "IDENTITY": lambda row: row.get("identity") or "none",
                "TO": lambda row: row.get("dst") or "-",
                "WHY": lambda row: in_words(str(row.get("reason") or "-")),
            },
            page["denials"],
            "none",
        )


def _policy_name(policy: Row) -> str:
    meant = stands_for(policy["name"])
    return f"{policy['name']} ({meant})" if meant else str(policy["name"])


def _problem(policy: Row) -> str:
    if policy["undecodable"]:
        return f"cannot be decoded: {policy['undecodable']}"
    return f"not in force as written: {policy['not_as_written']}" if policy["not_as_written"] else ""


def _facts(page: Row, now: float) -> list[tuple[str, str]]:
    facts = [("pod", str(page["pod"])), ("node", str(page["node"]) or "-")]
    if page["mode"]:
        mode = str(page["mode"])
        if page["enrolled"]:
            mode += ", enrolled" + ("" if page["annotated"] else ", not announced yet")
        facts.append(("mode", mode))
    if not page["enrolled"]:
        why = [text for text in (page["why"], page["error"]) if text]
        if page["waits_for"] and page["waits_for"] not in ("nothing", "done"):
            why.insert(1, f"waits for {page['waits_for']}")
        facts.append(("not enrolled", "; ".join(why) or "its node's agent does not say why"))
    facts.append(("identity", str(page["identity"]) or "none: what it sends is clear text"))
    facts.append(("certificate", _ends(page["certificate"], now) if page["identity"] else "-"))
    facts.append(("addresses", listed(page["addresses"])))
    record = page["record"]
    facts.append(("record", f"{record.get('protocol')}, {record.get('status')}" if record else "none in the mesh"))
    for service in page["services"]:
        ports = ", ".join(f"{at}->{to}" for at, to in service["ports"].items())
        facts.append(("service", f"{service['name']} {ports} ({listed(service['addresses'])})"))
    facts.append(("ports", listed(page["ports"]["known"])))
    if page["ports"]["probed"]:
        facts.append(("probed", f"{listed(page['ports']['probed'])} (the kubelet's probes need no identity there)"))
    if page["connections"] is not None:
        old = f", {page['old_connections']} from before it was enrolled" if page["old_connections"] else ""
        facts.append(
            ("connections", f"{page['connections']['inbound']} in, {page['connections']['outbound']} out{old}")
        )
    if page["doorless"]:
        facts.append(("same node", f"through the engine, not natively: {page['doorless']}"))
    if page["raw"]:
        facts.append(
            ("capabilities", "may hold CAP_NET_RAW or CAP_NET_ADMIN: it can send clear text past capture (drop them)")
        )
    return facts


def _ends(certificate: Row | None, now: float) -> str:
    if certificate is None:
        return "none asked for"
    error = f"; last error: {certificate['error']}" if certificate.get("error") else ""
    if not certificate.get("not_after"):
        return f"{certificate['state']}{error}"
    end = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(certificate["not_after"]))
    left = certificate["not_after"] - now
    when = f"ends in {duration(left)}" if left > 0 else f"ENDED {duration(-left)} ago"
    return f"{when} ({end}), renewed in {duration(certificate.get('renews_in_s'))}{error}"
