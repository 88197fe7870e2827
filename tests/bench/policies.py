"""What policy costs: one decision, whatever else is in the mesh, and a change that meets open connections.

Decisions are timed in the engine's own function (tests/tunnel/decide.c); changes by the APPLY of a real engine whose
pods hold connections across nodes.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sidestep.wire import batch
from tests.bench.load import LoadError
from tests.harness.cluster import Nodes, Pod
from tests.harness.engine import Client
from tests.tunnel import policy_model as model
from tests.tunnel.policy_model import Connection, Policy, Workload

CALLER = "spiffe://cluster.local/ns/default/sa/client"
PORT = 7200
POLICIES, CONNECTIONS, NATIVE = 1000, 10_000, 1000
DECISIONS = ("decide_1", "decide_100", "decide_10000", "decide_flat")
CHANGES = ("change_0", "change_1000", "change_9000")


def unrelated(number: int, namespaces: int = 100) -> list[Policy]:
    """Policies that select nothing of namespace `default`: of other namespaces, half of them with selectors."""
    return [
        {
            "name": f"p{i}",
            "namespace": f"ns{i % namespaces}",
            "scope": ("Namespace", "WorkloadSelector")[i % 2],
            "action": ("Deny", "Allow")[i % 3 == 0],
            "rules": rules(i),
            "dryRun": False,
        }
        for i in range(number)
    ]


def rules(i: int, hit: bool = False) -> list[Any]:
    """Two rules as people write them; `hit`: the second one matches CALLER."""
    return [
        [
            [{"principals": [{"Exact": f"cluster.local/ns/ns{i}/sa/a{k}"} for k in range(4)]}],
            [{"destinationPorts": [80, 443]}],
        ],
        [
            [{"namespaces": [{"Exact": "default" if hit else f"ns{i}"}], "notPrincipals": [{"Suffix": "/sa/nobody"}]}],
            [{"sourceIps": ["10.0.0.0/8", "fd00::/8"]}],
        ],
    ]


def selecting() -> tuple[list[Policy], Workload]:
    """Five that select the workload: of its namespace, of the mesh, and named; one allows, four do not deny."""

    def one(name: str, scope: str, action: str, **more: Any) -> Policy:
        made = {"name": name, "namespace": "default", "scope": scope, "action": action, "dryRun": False}
        return {**made, "rules": rules(7, action == "Allow"), **more}

    made = [
        one("deny", "Namespace", "Deny"),
        one("mesh", "Global", "Deny", namespace="istio-system"),
        one("named", "WorkloadSelector", "Deny"),
        one("named-too", "WorkloadSelector", "Deny"),
        one("allow", "WorkloadSelector", "Allow"),
    ]
    return made, Workload("default", tuple(model.key(p) for p in made if p["scope"] == "WorkloadSelector"))


def decided() -> dict[str, list[float]]:
    """Microseconds for a decision with 1, 100 and 10 000 policies in the mesh, five of them select; by key of
    SINGLES."""
    found: dict[str, list[float]] = {}
    five, workload = selecting()
    asked = [model.question(Connection(CALLER, f"10.1.{i % 256}.7", "10.9.0.1", 8080)) for i in range(1000)]
    for total, chosen, record in ((1, five[:1], Workload("default")), (100, five, workload), (10_000, five, workload)):
        state = [model.destination(record, "10.9.0.1"), *model.records([*unrelated(total - len(chosen)), *chosen])]
        block = model.world(state, asked)
        found[f"decide_{total}"] = [float(model.ask(block, "200")[0].split()[0]) / 1000 for _ in range(3)]
    many, few = (statistics.median(found[f"decide_{total}"]) for total in (10_000, 100))
    found["decide_flat"] = [many / few]
    return found


SERVE = """
import select, socket, sys
listener = socket.create_server((sys.argv[1], int(sys.argv[2])), backlog=4096)
kept = []
print("listening", flush=True)
while True:
    accepted, _ = listener.accept()
    accepted.sendall(b"x")
    kept.append(accepted)
"""

# Told how many of its connections will be reset, says when the last of them was; it looks at them only afterwards.
HOLD = """
import select, socket, sys, time
address, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
poll, kept = select.epoll(), {}
for i in range(count):
    s = socket.create_connection((address, port + i % 10), 20)
    assert s.recv(1) == b"x"
    kept[s.fileno()] = s
    poll.register(s, select.EPOLLRDHUP | select.EPOLLET)
print("open", flush=True)
for line in sys.stdin:
    expected, gone = int(line), set()
    while len(gone) < expected:
        gone.update(fd for fd, _ in poll.poll(20, count))
    print(time.monotonic(), flush=True)
    for fd in gone:
        try:
            assert kept[fd].recv(1) == b"" and False
        except (ConnectionResetError, ConnectionAbortedError):
            kept.pop(fd).close()
    assert not poll.poll(0)
    print(len(gone), flush=True)
"""


def start(pod: Pod, script: str, *words: str) -> subprocess.Popen[str]:
    """A Python program in a pod; returns when it has said its first line."""
    command = ["nsenter", f"--net={pod.path}", "--", sys.executable, "-c", script, *words]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if not process.stdout.readline():
        raise LoadError(f"{pod.name}: nothing was said")
    return process


def live(
    nodes: Nodes, client: Pod, server: Pod, connections: int = CONNECTIONS, policies: int = POLICIES
) -> dict[str, list[float]]:
    """Milliseconds from APPLY until it is answered and the last reset was heard, with open connections of which none, a
    tenth and the rest are denied; by key of SINGLES. Raises LoadError."""
    results: dict[str, list[float]] = {key: [] for key in CHANGES}
    engine = nodes.clients[server.node]
    assert engine is not None
    five, named = selecting()
    record = nodes.record(server)
    record.workload.authorization_policies.extend(named.policies)
    state = [batch.Record(batch.Op.ADDRESS_SET, server.workload, "live", record.SerializeToString())]
    five[4] = {**five[4], "rules": [[[{"namespaces": [{"Exact": "default"}]}]]]}
    apply(engine, [*state, *model.records([*unrelated(policies - len(five)), *five])])
    with ExitStack() as stack:
        for i in range(10):
            stack.callback(end, start(server, SERVE, server.address(), str(PORT + i)))
        holder = start(client, HOLD, server.address(), str(PORT), str(connections))
        stack.callback(end, holder)
        changes: tuple[tuple[str, int, dict[str, Any]], ...] = (
            ("change_0", 0, {"destinationPorts": [1]}),
            ("change_0", 0, {"destinationPorts": [2]}),
            ("change_1000", connections // 10, {"destinationPorts": [PORT]}),
            ("change_9000", connections - connections // 10, {"sourceIps": [f"{client.address()}/32"]}),
        )
        for key, expected, match in changes:
            results[key].append(1000 * denied(engine, holder, {**five[0], "rules": [[[match]]]}, expected))
    return results


def cut(rounds: int) -> list[float]:
    """Milliseconds from APPLY of a policy until it is answered and the last of NATIVE connections of one node, which
    the engine does not carry, has ended. Raises LoadError."""
    took = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="sidestep-bench-") as name, ExitStack() as stack:
            pods = {"client": 0, "near": 0}
            nodes = stack.enter_context(Nodes(Path(name), pods, workers=2, same_node="native", engines=(True, False)))
            nodes.publish()
            engine, near = nodes.clients[0], nodes["near"]
            assert engine is not None
            for i in range(10):
                stack.callback(end, start(near, SERVE, near.address(), str(PORT + i)))
            # The first connection to each port is the engine's, which allows the pair.
            end(start(nodes["client"], HOLD, near.address(), str(PORT), "10"))
            before = carried(engine)
            holder = start(nodes["client"], HOLD, near.address(), str(PORT), str(NATIVE))
            stack.callback(end, holder)
            if carried(engine) != before:
                raise LoadError(f"the engine carried {carried(engine) - before} of {NATIVE} native connections")
            five, _ = selecting()
            policy = {**five[0], "rules": [[[{"sourceIps": [f"{nodes['client'].address()}/32"]}]]]}
            took.append(1000 * denied(engine, holder, policy, NATIVE))
    return took


def carried(engine: Client) -> int:
    """Connections between two pods of its node that went through the engine."""
    name = "sidestep_same_node_connections_total "
    return sum(int(line.split()[1]) for line in engine.metrics().splitlines() if line.startswith(name))


def denied(engine: Client, holder: "subprocess.Popen[str]", policy: Policy, expected: int) -> float:
    """Applies a policy. Returns seconds until it was in force and so many of the holder's connections had ended. Raises
    LoadError where others did, or fewer."""
    assert holder.stdin is not None
    assert holder.stdout is not None
    holder.stdin.write(f"{expected}\n")
    holder.stdin.flush()
    began = time.monotonic()
    took = apply(engine, model.records([policy], f"{began}"))
    heard = float(holder.stdout.readline() or "nan") - began
    if holder.stdout.readline() != f"{expected}\n":
        raise LoadError("not the connections that were to be denied")
    return max(took, heard) if expected else took


def apply(engine: Client, records: Sequence[batch.Record]) -> float:
    """Seconds that APPLY took; nothing may be refused."""
    started = time.monotonic()
    reply = engine.apply(records)
    took = time.monotonic() - started
    if reply["rejected"]:
        raise LoadError(f"refused: {reply['rejected']}")
    return took


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def changed(rounds: int = 1, connections: int = CONNECTIONS) -> dict[str, list[float]]:
    """`live` with nodes of its own, in every round anew."""
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="sidestep-bench-") as name:
            with Nodes(Path(name), {"client": 0, "server": 1}, workers=2) as nodes:
                nodes.publish()
                for key, values in live(nodes, nodes["client"], nodes["server"], connections).items():
                    found.setdefault(key, []).extend(values)
    return found
