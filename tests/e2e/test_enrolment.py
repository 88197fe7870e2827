"""A running namespace joins and leaves the mesh, over and over, and its customers notice nothing."""

import functools
import json
import signal
import subprocess

import pytest

from tests.harness.lab import Lab, build_customers, eventually

TOGGLES = 20
RATE, KEPT = 500, 50
OPENED = "istio_tcp_connections_opened_total"


def last(process: "subprocess.Popen[str]") -> dict[str, float]:
    """Ends the customers and returns their final report."""
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    return dict(json.loads(output.strip().splitlines()[-1]))


def grown(lab: Lab, before: float) -> float:
    """How many connections node1's engine has opened since, once that is more than a few."""
    more = lab.counter(OPENED) - before
    return more if more > 20 else 0.0


@pytest.mark.parametrize("target", ["server", "near"])
def test_toggles_under_load_lose_nothing(mesh: Lab, target: str) -> None:
    mesh.release("world")
    before = {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in mesh.pods("world")}
    mesh.reuse_ports("world/client")
    customers = str(build_customers())
    command = [customers, "buy", mesh.address(f"world/{target}"), "7000", str(RATE), str(KEPT)]
    process = mesh.popen("world/client", *command, stdout=subprocess.PIPE)
    carried = []
    try:
        for _ in range(TOGGLES // 2):
            mesh.enrol("world")
            carried.append(eventually("the mesh carries it", functools.partial(grown, mesh, mesh.counter(OPENED))))
            mesh.release("world")
    finally:
        result = last(process)
    print(f"{mesh.name}, {target}, {TOGGLES} toggles: {result}; connections seen by the mesh while enrolled: {carried}")
    assert result["failed"] == 0, result
    assert result["kept_open"] == KEPT
    assert result["kept_broken"] == 0
    assert result["opened"] - KEPT >= RATE * result["seconds"] - RATE  # by the clock, whatever the mesh did
    assert result["requests"] >= result["opened"] - KEPT - RATE  # and answered, but for those of the last moment
    assert {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in mesh.pods("world")} == before


def test_the_load_can_fail(mesh: Lab) -> None:
    """The control: customers of a server that goes away count it."""
    customers = str(build_customers())
    server = mesh.popen("world/server", customers, "serve", "7001")
    command = [customers, "buy", mesh.address("world/server"), "7001", "50", "5"]
    process = mesh.popen("world/client", *command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        eventually("customers", lambda: json.loads(process.stdout.readline() or "{}").get("requests", 0) > 10)  # type: ignore[union-attr]
        server.terminate()
        server.wait(20)
        eventually("failures", lambda: json.loads(process.stdout.readline() or "{}").get("kept_broken", 0) == 5)  # type: ignore[union-attr]
    finally:
        server.kill()
        result = last(process)
    assert result["failed"] > 5
