"""What the agents of this machine know of the mesh together: pods, workloads, services; and who can be asked of one.

Every engine holds the records of the whole mesh, so those of one agent are enough; a pod is known to its node's agent.
"""

import functools
import ipaddress
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from sidestep.cli.nodes import Answering, NodeError, asked, control_addresses, control_status, find, one_mesh
from sidestep.cli.table import Row


@dataclass(slots=True)
class Mesh:
    """`pods`: by NAMESPACE/NAME, of the nodes that answered. `look(noun, text)`: the workloads or services, in the
    agent's words (node/dump.py), in whose record the text stands; there may be others among them. `problems`: who could
    not be asked.
    """

    agents: Sequence[Answering] = ()
    pods: Mapping[str, Row] = field(default_factory=dict)
    look: Callable[[str, str], Sequence[Row]] = lambda noun, text: ()
    problems: list[str] = field(default_factory=list)

    @property
    def trust_domain(self) -> str:
        """Of this mesh."""
        for agent in self.agents:
            return str((agent.status.get("settings") or {}).get("trust_domain") or "cluster.local")
        return "cluster.local"

    def agent(self, node: str) -> Answering | None:
        """The agent of a node, None where it is not to be asked from here."""
        return next((agent for agent in self.agents if agent.name == node), None)

    def named(self, namespace: str, name: str) -> list[Row]:
        """The workloads of that name."""
        found = self.look("workloads", f'"name":{json.dumps(name)},"namespace":{json.dumps(namespace)}')
        return [each for each in found if (each.get("namespace"), each.get("name")) == (namespace, name)]

    def identified(self, identity: str) -> list[Row]:
        """The workloads of a service account."""
        found = self.look("workloads", f'"identity":{json.dumps(identity)}')
        return [each for each in found if each.get("identity") == identity]

    def at(self, address: str) -> Row | None:
        """The workload that has an address."""
        found = self.look("workloads", f'"{address}"')
        return next((each for each in found if address in (each.get("workloadIps") or ())), None)

    def behind(self, service: str) -> list[Row]:
        """The workloads of a service, NAMESPACE/HOSTNAME."""
        found = self.look("workloads", f"{json.dumps(service)}:")
        return [each for each in found if service in (each.get("services") or {})]

    def service_at(self, address: str) -> Row | None:
        """The service that has an address."""
        for each in self.look("services", f'"{address}"'):
            if address in [str(vip).rpartition("/")[2] for vip in each.get("vips") or ()]:
                return each
        return None

    def service_named(self, namespace: str, name: str) -> Row:
        """The Service of that name in the API; empty where there is none."""
        found = self.look("services", f'"name":{json.dumps(name)}')
        return next((each for each in found if (each.get("namespace"), each.get("name")) == (namespace, name)), {})

    def service(self, name: str) -> Row:
        """The service NAMESPACE/HOSTNAME; empty where there is none."""
        found = self.look("services", f'"key":{json.dumps(name)}')
        return next((each for each in found if f"{each.get('namespace')}/{each.get('hostname')}" == name), {})


def gather(lab: str, run_dirs: Iterable[Any]) -> Mesh:
    """Asks the agents. Raises NodeError where there is none, where none answers, or where there are several meshes."""
    agents, problems = asked(find(lab, run_dirs))
    if not agents:
        raise NodeError("; ".join(problems))
    one_mesh(agents)
    mesh = Mesh(agents, problems=problems)
    pods: dict[str, Row] = {}
    for agent in agents:
        try:
            pods |= {f"{row['namespace']}/{row['name']}": row for row in agent.node.ask("/pods")}
        except NodeError as error:
            problems.append(str(error))
    mesh.pods = pods
    mesh.look = functools.partial(_look, agents)
    return mesh


def _look(agents: Sequence[Answering], noun: str, text: str) -> Sequence[Row]:
    """Asks the agents, until one answers. Raises NodeError where none does."""
    failed: NodeError | None = None
    for agent in agents:
        try:
            return list(agent.node.ask(f"/{noun}?{urlencode({'containing': text})}"))
        except NodeError as error:
            failed = error
    raise failed or NodeError("there is no agent to ask")


def not_as_written(mesh: Mesh) -> dict[str, str]:
    """AuthorizationPolicies that the control plane could not make into what they say: NAMESPACE/NAME -> why. Empty
    where it cannot be asked: `sidestep policies` complains about that.
    """
    rows = written(mesh).items()
    return {name: str(row.get("message") or row.get("reason")) for name, row in rows if not row.get("accepted")}


def written(mesh: Mesh) -> dict[str, Row]:
    """What the control plane made of AuthorizationPolicies, by NAMESPACE/NAME. Empty where it cannot be asked."""
    found: dict[str, Row] = {}
    for address in control_addresses(mesh.agents):
        try:
            policies = control_status(address).get("policies") or ()
        except NodeError:
            continue
        for row in policies:
            if row.get("kind") == "AuthorizationPolicy":
                found[f"{row['namespace']}/{row['name']}"] = row
    return found


def family(address: str) -> int:
    """4 or 6. Raises ValueError."""
    return ipaddress.ip_address(address).version


def endpoint(address: str, port: int) -> str:
    """IP:PORT, [IP]:PORT."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
