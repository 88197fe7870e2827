"""The nouns: `status`, `pods`, `workloads`, `services`, `certificates`, `connections`.

Each asks the agents of this machine and prints a table for people, or with --json a list for programs.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from sidestep.cli.nodes import Node, NodeError, control_status, find
from sidestep.cli.table import Columns, Row, duration, listed, size, table


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]", noun: str, line: str) -> None:
    """Adds one noun."""
    add_options(subparsers.add_parser(noun, help=line, description=line))


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every question to the agents takes."""
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument(
        "--lab", default="", metavar="NAME", help="the nodes of one lab (default: this node, or every lab)"
    )
    parser.add_argument("--run-dir", action="append", type=Path, default=[], metavar="DIR", help="an agent's --run-dir")


def run(args: argparse.Namespace) -> int:
    """Prints the noun; 1 when an agent could not be asked."""
    try:
        nodes = find(args.lab, args.run_dir)
    except NodeError as error:
        print(f"sidestep {args.part}: {error}", file=sys.stderr)
        return 1
    if args.part == "status":
        return _status(nodes, args.json)
    rows, problems = _collect(nodes, f"/{args.part}")
    if args.json:
        json.dump(rows, sys.stdout, indent=2)
        print()
    else:
        table(COLUMNS[args.part], rows, f"no {args.part}")
    return _complain(args.part, problems)


def _collect(nodes: Iterable[Node], page: str) -> tuple[list[Row], list[str]]:
    rows: list[Row] = []
    problems = []
    for node in nodes:
        try:
            name = node.ask("/status")["node"]
            rows += [{"lab": node.lab, "node": name} | row for row in node.ask(page)]
        except NodeError as error:
            problems.append(str(error))
    if page in ("/workloads", "/services"):  # every node knows the same: shown once
        rows = list({row.get("uid") or f"{row.get('namespace')}/{row.get('hostname')}": row for row in rows}.values())
    return rows, problems


def _complain(part: str, problems: list[str]) -> int:
    for problem in problems:
        print(f"sidestep {part}: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _status(nodes: Iterable[Node], as_json: bool) -> int:
    found: list[Row] = []
    problems = []
    for node in nodes:
        try:
            found.append({"lab": node.lab} | node.ask("/status") | {"pod_list": node.ask("/pods")})
        except NodeError as error:
            problems.append(str(error))
    addresses = sorted({str(row["control"].get("address") or "") for row in found} - {""})
    refused = {address: _refused_policies(address) for address in addresses}
    if as_json:
        told = [{**row, "refused_policies": refused.get(str(row["control"].get("address")), [])} for row in found]
        json.dump(told, sys.stdout, indent=2)
        print()
        return _complain("status", problems)
    table(
        {
            "NODE": lambda row: _node(row),
            "READY": lambda row: "yes" if row["ready"] else "no: " + ", ".join(row["pending"]),
            "ENGINE": lambda row: (
                f"pid {row['engine'].get('pid', '?')}" if row["engine"]["connected"] else "not connected"
            ),
            "CONTROL PLANE": lambda row: _control(row["control"]),
            "PODS": lambda row: row["pods"]["total"],
            "ENROLLED": lambda row: row["pods"]["enrolled"],
            "PENDING": lambda row: row["pods"]["pending"],
            "PROBES": lambda row: "exempt" if row["probes"]["active"] else "not exempt",
            "SAME NODE": lambda row: row["settings"].get("same_node", "?"),
            "UP": lambda row: duration(row["uptime_s"]),
        },
        found,
        "no nodes",
    )
    outside = [row | {"node": _node(status)} for status in found for row in status["pod_list"] if not row["enrolled"]]
    if outside:
        print("\nnot enrolled:")
        table({"POD": _pod, "NODE": lambda row: row["node"], "WHY": _why}, outside, "")
    for row in found:
        if row["control"].get("rejected"):
            print(f"\n{_node(row)} refused a part of the control plane's updates: {row['control']['rejected']}")
    for policies in filter(None, refused.values()):
        print("\npolicies that are not in force as they are written (`sidestep policies` says more):")
        table({"POLICY": _pod, "KIND": lambda row: row["kind"], "WHY": lambda row: row["message"]}, policies, "")
    for row in found:
        if not row["probes"]["active"]:
            print(f"\n{_node(row)}: the kubelet's probes are clear text like any other: {row['probes']['reason']}")
        if row.get("no_native"):
            print(f"\n{_node(row)}: pods of this node speak through the engine, not natively: {row['no_native']}")
    raw = sum(row["pods"]["raw"] for row in found)
    if raw:
        print(
            f"\n{raw} enrolled pod(s) may hold CAP_NET_RAW or CAP_NET_ADMIN: they can send clear text of their own "
            "(docs/threat-model.md; `sidestep pods` names them; drop the capability in the pod)"
        )
    return _complain("status", problems)


def _refused_policies(address: str) -> list[Row]:
    """Policies that the control plane did not take as they are written. One that cannot be asked is the agents' to
    complain about.
    """
    try:
        policies = control_status(address).get("policies") or []
    except NodeError:
        return []
    fields = ("kind", "namespace", "name", "reason", "message")
    return [{field: row.get(field, "") for field in fields} for row in policies if not row.get("accepted")]


def _node(row: Row) -> str:
    return f"{row['lab']}/{row['node']}" if row.get("lab") else str(row["node"])


def _pod(row: Row) -> str:
    return f"{row['namespace']}/{row['name']}"


def _why(row: Row) -> str:
    reason = str(row.get("why", ""))
    if row.get("waits_for"):
        reason += f"; waits for {row['waits_for']}"
    return reason + (f"; {row['error']}" if row.get("error") else "")


def _control(control: Row) -> str:
    address = str(control.get("address") or control.get("state_file") or "none")
    if control.get("connected"):
        return address
    return f"{address}: not connected" + (f" ({control['error']})" if control.get("error") else "")


def _ports(row: Row) -> str:
    ports = row.get("ports") or {}
    return listed([port for port in (ports.get(name) for name in ("outbound", "inbound", "hbone")) if port])


def _ends(row: Row) -> str:
    return f"in {duration(row['not_after'] - time.time())}" if row.get("not_after") else "-"


COLUMNS: dict[str, Columns] = {
    "pods": {
        "POD": _pod,
        "NODE": _node,
        "MODE": lambda row: row["mode"],
        "IDENTITY": lambda row: row.get("identity") or "-",
        "ADDRESSES": lambda row: listed(row.get("addresses")),
        "OLD": lambda row: row.get("old_connections", 0),
        "OPEN": lambda row: row.get("connections", 0),
        "PORTS HELD": _ports,
        "RAW": lambda row: "yes" if row.get("raw") else "no",
        "WHY": _why,
    },
    "workloads": {
        "WORKLOAD": _pod,
        "ADDRESSES": lambda row: listed(row.get("workloadIps")),
        "PROTOCOL": lambda row: row.get("protocol", "-"),
        "HEALTH": lambda row: row.get("status", "-"),
        "NODE": lambda row: row.get("node", "-"),
        "SERVICE ACCOUNT": lambda row: row.get("serviceAccount") or "default",
        "SERVICES": lambda row: listed(sorted(row.get("services") or {})),
    },
    "services": {
        "SERVICE": _pod,
        "HOSTNAME": lambda row: row.get("hostname", "-"),
        "VIPS": lambda row: listed([str(vip).rpartition("/")[2] for vip in row.get("vips") or []]),
        "PORTS": lambda row: listed([f"{port}->{target}" for port, target in (row.get("ports") or {}).items()]),
        "ENDPOINTS": lambda row: len(row.get("endpoints") or {}),
    },
    "certificates": {
        "IDENTITY": lambda row: row["identity"],
        "NODE": _node,
        "STATE": lambda row: row["state"],
        "ENDS": _ends,
        "RENEWED": lambda row: f"in {duration(row.get('renews_in_s'))}",
        "SERIAL": lambda row: str(row.get("serial") or "-")[:20],
        "ERROR": lambda row: row.get("error") or "",
    },
    "connections": {
        "POD": lambda row: row.get("pod", "-"),
        "NODE": _node,
        "DIRECTION": lambda row: row.get("direction", "-"),
        "FROM": lambda row: row.get("src", "-"),
        "TO": lambda row: row.get("dst", "-"),
        "HOP": lambda row: row.get("hop") or "-",
        "PROTOCOL": lambda row: row.get("protocol", "-"),
        "TLS": lambda row: "yes" if row.get("tls") else "no",
        "PEER": lambda row: row.get("identity_peer") or "-",
        "SENT": lambda row: size(row.get("bytes_sent")),
        "RECEIVED": lambda row: size(row.get("bytes_recv")),
        "AGE": lambda row: duration((row.get("age_ms") or 0) / 1000),
    },
}
