"""A pod that is born into the mesh is captured before its program runs: its very first act is to send a canary."""

import secrets

import pytest

from sidestep.lab.link import HBONE_PORT, Flow, violations
from tests.e2e.conftest import pod
from tests.harness.lab import Lab, eventually

# As early as a program can: bash has its connection some milliseconds after exec. Says what came back.
FIRST = """
exec 3<>/dev/tcp/{target}/7000; echo {canary} >&3; IFS= read -r line <&3; echo "echoed $line"; exec sleep infinity
"""


def first_act(lab: Lab, name: str, target: str, canary: str) -> list[Flow]:
    """Creates the pod on node1, waits until its canary came back, and returns what it opened on the link."""
    family = 6 if ":" in target else 4
    command = ["bash", "-c", FIRST.format(target=target, canary=canary)]
    with lab.tap() as tap:
        lab.apply(*pod(name, "node1", command))
        try:
            said = f"echoed {canary}\n"
            eventually("its canary came back", lambda: lab.command("logs", f"world/{name}", check=False).stdout == said)
            address = lab.address(f"world/{name}", family)
            found = [each for each in tap.flows() if address in (each.source.address, each.destination.address)]
        finally:
            lab.delete_pod(f"world/{name}")
    return found


@pytest.mark.parametrize("family", [4, 6])
def test_the_first_packet_of_a_new_pod_is_captured(mesh: Lab, plain: Lab, family: int) -> None:
    canary = f"canary-{secrets.token_hex(12)}"
    mesh.enrol("world")
    flows = first_act(mesh, f"first{family}", mesh.address("world/server", family), canary)
    assert violations(flows, [canary.encode()]) == []
    opened = [flow for flow in flows if flow.syn]
    assert [flow.destination.port for flow in opened] == [HBONE_PORT]  # one tunnel carried it, and nothing else left
    assert opened[0].payload_bytes > 0

    flows = first_act(plain, f"first{family}", plain.address("world/server", family), canary)
    assert {each.kind for each in violations(flows, [canary.encode()])} == {"clear-connection", "canary"}
