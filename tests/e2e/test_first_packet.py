"""A pod that is born into the mesh is captured before its program runs: its very first act is to send a canary."""

import contextlib
import secrets
from collections.abc import Iterator

import pytest

from sidestep.lab.link import HBONE_PORT, Flow, violations
from tests.e2e.conftest import pod
from tests.harness.lab import Lab, eventually

# As early as a program can: bash has its connection some milliseconds after exec. Says what came back.
FIRST = """
exec 3<>/dev/tcp/{target}/7000; echo {canary} >&3; IFS= read -r line <&3; echo "echoed $line"; exec sleep infinity
"""


@contextlib.contextmanager
def first_act(lab: Lab, target: str, canary: str) -> Iterator[tuple[str, list[Flow]]]:
    """Creates a pod on node1 and waits until its canary came back. The pod's name and what it opened on the link."""
    family = 6 if ":" in target else 4
    name = f"first-{secrets.token_hex(4)}"
    command = ["bash", "-c", FIRST.format(target=target, canary=canary)]
    with lab.tap() as tap:
        lab.apply(*pod(name, "node1", command))
        try:
            said = f"echoed {canary}\n"
            eventually("its canary came back", lambda: lab.command("logs", f"world/{name}", check=False).stdout == said)
            address = lab.address(f"world/{name}", family)
            yield name, [each for each in tap.flows() if address in (each.source.address, each.destination.address)]
        finally:
            lab.delete_pod(f"world/{name}")


@pytest.mark.parametrize("family", [4, 6])
def test_the_first_packet_of_a_new_pod_is_captured(mesh: Lab, plain: Lab, family: int) -> None:
    canary = f"canary-{secrets.token_hex(12)}"
    mesh.enrol("world")
    with first_act(mesh, mesh.address("world/server", family), canary) as (_, flows):
        pass
    assert violations(flows, [canary.encode()]) == []
    opened = [flow for flow in flows if flow.syn]
    assert [flow.destination.port for flow in opened] == [HBONE_PORT]  # one tunnel carried it, and nothing else left
    assert opened[0].payload_bytes > 0

    with first_act(plain, plain.address("world/server", family), canary) as (_, flows):
        pass
    assert {each.kind for each in violations(flows, [canary.encode()])} == {"clear-connection", "canary"}


@pytest.mark.parametrize("family", [4, 6])
def test_and_so_is_the_first_one_to_a_pod_of_its_node(mesh: Lab, family: int) -> None:
    """Nobody has decided about a pod that is new: the engine does, whatever the setting, and knows both ends."""
    canary = f"canary-{secrets.token_hex(12)}"
    mesh.enrol("world")
    with first_act(mesh, mesh.address("world/near", family), canary) as (name, flows):
        mine = [
            each for each in mesh_lines(mesh) if f'source_principal="spiffe://cluster.local/ns/world/sa/{name}"' in each
        ]
    assert flows == []
    assert len(mine) == 2  # as its client and as its server see it
    assert all('destination_principal="spiffe://cluster.local/ns/world/sa/near"' in each for each in mine)
    assert all(each.endswith(" 1") for each in mine)
    assert all('connection_security_policy="unknown"' in each for each in mine)


def mesh_lines(lab: Lab) -> list[str]:
    """node1's counters of opened connections."""
    return [
        line
        for line in lab.page(15020, "/metrics")[1].splitlines()
        if line.startswith("istio_tcp_connections_opened_total{")
    ]
