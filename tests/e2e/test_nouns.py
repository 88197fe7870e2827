"""The nouns of the command line over a mesh that runs: a table for people and JSON for programs, and both say
the same.
"""

import json
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.conftest import pod
from tests.harness.lab import SIDESTEP, Lab, eventually

HOLD = """
import socket, sys
s = socket.create_connection(({target!r}, 7000), 20); s.sendall(b"x"); s.recv(1)
print("up", flush=True); sys.stdin.read()
"""


def sidestep(lab: Lab, noun: str, *more: str) -> str:
    """What a noun prints about this lab; it must end with 0 and complain about nothing."""
    done = subprocess.run(
        [SIDESTEP, noun, "--lab", lab.name, *more], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def rows(lab: Lab, noun: str) -> list[dict[str, Any]]:
    return list(json.loads(sidestep(lab, noun, "--json")))


def parsed(text: str) -> list[dict[str, str]]:
    """A table's rows by column: each column begins where its heading does."""
    head, *lines = text.splitlines()
    found = list(re.finditer(r"\S+(?: \S+)*", head))
    names, starts = [each[0] for each in found], [each.start() for each in found]
    ends: list[int | None] = [*starts[1:], None]
    assert "" not in names
    return [
        {name: line[start:end].strip() for name, start, end in zip(names, starts, ends, strict=True)} for line in lines
    ]


def table(lab: Lab, noun: str) -> list[dict[str, str]]:
    return parsed(sidestep(lab, noun))


@pytest.fixture(scope="module")
def world(mesh: Lab) -> Iterator[Lab]:
    """The enrolled world with a connection across the link and one on node1 that stay open, and beside it a pod that
    cannot send raw packets, one that got CAP_NET_ADMIN instead, and one that is not in the mesh."""
    bound = pod("bound", "node1", ["sleep", "infinity"])
    bound[1]["spec"]["containers"][0]["securityContext"] = {"capabilities": {"drop": ["ALL"]}}
    admin = pod("admin", "node2", ["sleep", "infinity"])
    admin[1]["spec"]["containers"][0]["securityContext"] = {"capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN"]}}
    stranger = pod("stranger", "node2", ["sleep", "infinity"])
    stranger[1]["metadata"]["labels"] = {"istio.io/dataplane-mode": "none"}
    mesh.label("world", "ambient")
    mesh.apply(*bound, *admin, *stranger)
    held = []
    try:
        everybody = {each["metadata"]["name"] for each in mesh.pods("world")} - {"stranger"}
        eventually("the world is enrolled", lambda: mesh.enrolled("world") == everybody)
        eventually("stranger runs", lambda: mesh.ready("world/stranger"))
        for name in ("server", "near"):
            text = HOLD.format(target=mesh.address(f"world/{name}"))
            command = ("/usr/bin/python3", "-c", text)
            held.append(mesh.popen("world/client", *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            assert held[-1].stdout is not None
            assert held[-1].stdout.readline() == "up\n"
        yield mesh
    finally:
        for process in held:
            process.communicate("", timeout=30)
        for name in ("bound", "admin", "stranger"):
            mesh.delete_pod(f"world/{name}")


def test_pods(world: Lab) -> None:
    found = {row["name"]: row for row in rows(world, "pods") if row["namespace"] == "world"}
    shown = {row["POD"]: row for row in table(world, "pods")}
    assert found.keys() == {each["metadata"]["name"] for each in world.pods("world")}
    for name, row in found.items():
        api, cells = world.pod(f"world/{name}"), shown[f"world/{name}"]
        addresses = [entry["ip"] for entry in api["status"]["podIPs"]]
        assert (row["uid"], row["node"]) == (api["metadata"]["uid"], api["spec"]["nodeName"])
        assert row["addresses"] == addresses == cells["ADDRESSES"].split(",")
        assert cells["NODE"] == f"{world.name}/{row['node']}"
        assert cells["MODE"] == row["mode"]
        assert row["enrolled"] is (name != "stranger")
        assert row["raw"] is (name != "bound")
        assert cells["RAW"] == ("yes" if row["raw"] else "no")
    client = found["client"]
    assert client["identity"] == shown["world/client"]["IDENTITY"] == "spiffe://cluster.local/ns/world/sa/client"
    assert client["mode"] in ("strict", "lenient")
    assert min(client["connections"], int(shown["world/client"]["OPEN"])) >= 2
    ports = [client["ports"][name] for name in ("outbound", "inbound", "hbone")]
    assert len(set(ports)) == 3
    assert all(61000 <= port <= 65535 for port in ports)
    assert shown["world/client"]["PORTS HELD"] == ",".join(map(str, ports))
    assert found["stranger"]["mode"] == "none"
    assert "none" in shown["world/stranger"]["WHY"]


def test_status_and_the_pods_whose_capabilities_weaken_the_promise(world: Lab) -> None:
    found = {row["node"]: row for row in rows(world, "status")}
    text = sidestep(world, "status")
    shown = {row["NODE"]: row for row in parsed(text.split("\n\n")[0])}
    assert found.keys() == {"node1", "node2"}
    pods = rows(world, "pods")
    for name, row in found.items():
        cells = shown[f"{world.name}/{name}"]
        mine = [each for each in pods if each["node"] == name]
        assert row["ready"] is True
        assert row["pending"] == []
        assert cells["READY"] == "yes"
        assert row["engine"]["connected"] is True
        engine = next(node for node in world.status()["nodes"] if node["name"] == name)["processes"]["engine"]["pid"]
        assert cells["ENGINE"] == f"pid {engine}"
        assert row["control"]["connected"] is True
        assert cells["CONTROL PLANE"] == row["control"]["address"]
        assert row["pods"]["total"] == len(mine) == int(cells["PODS"])
        assert row["pods"]["enrolled"] == sum(each["enrolled"] for each in mine) == int(cells["ENROLLED"])
        assert row["pods"]["pending"] == 0 == int(cells["PENDING"])
    left = parsed(text.split("\nnot enrolled:\n")[1].split("\n\n")[0])
    assert [row["WHY"] for row in left if row["POD"] == "world/stranger"] == ["pod label says none"]
    assert not [row for row in left if row["POD"] == "world/client"]
    # The count: of the world's enrolled pods only `bound` has neither capability.
    weak = [each["metadata"]["name"] for each in world.pods("world")]
    weak = [name for name in weak if name not in ("bound", "stranger")]
    counted = re.search(r"^(\d+) enrolled pod\(s\) may hold CAP_NET_RAW or CAP_NET_ADMIN", text, re.MULTILINE)
    assert counted is not None
    assert int(counted[1]) == sum(row["pods"]["raw"] for row in found.values()) == len(weak)


def test_workloads_and_services(world: Lab) -> None:
    found = {row["name"]: row for row in rows(world, "workloads") if row["namespace"] == "world"}
    shown = {row["WORKLOAD"]: row for row in table(world, "workloads")}
    assert found.keys() == {each["metadata"]["name"] for each in world.pods("world")}
    for name, row in found.items():
        cells = shown[f"world/{name}"]
        addresses = {entry["ip"] for entry in world.pod(f"world/{name}")["status"]["podIPs"]}
        assert set(row["workloadIps"]) == addresses == set(cells["ADDRESSES"].split(","))
        assert row["protocol"] == cells["PROTOCOL"] == ("TCP" if name == "stranger" else "HBONE")
        assert row["serviceAccount"] == cells["SERVICE ACCOUNT"] == name
        assert (cells["HEALTH"], cells["NODE"]) == (row["status"], row["node"])
    services = {row["name"]: row for row in rows(world, "services") if row["namespace"] == "world"}
    seen = {row["SERVICE"]: row for row in table(world, "services")}
    assert services.keys() == {"near", "server", "banner", "redis", "db", "web"}
    for name, row in services.items():
        cells = seen[f"world/{name}"]
        path = f"/api/v1/namespaces/world/services/{name}"
        api = world.ask(lambda client, path=path: client.get(path))  # type: ignore[misc]
        port = str(api["spec"]["ports"][0]["port"])
        assert row["hostname"] == cells["HOSTNAME"] == f"{name}.world.svc.cluster.local"
        assert set(cells["VIPS"].split(",")) == set(api["spec"]["clusterIPs"])
        assert cells["PORTS"] == f"{port}->{port}"
        assert row["endpoints"].keys() == {f"Kubernetes//Pod/world/{name}"}
        assert cells["ENDPOINTS"] == "1"
        assert f"world/{name}.world.svc.cluster.local" in found[name]["services"]


def test_certificates(world: Lab) -> None:
    found = rows(world, "certificates")
    shown = table(world, "certificates")
    names = {(row["node"], row["identity"].rpartition("/")[2]) for row in found if "/ns/world/" in row["identity"]}
    expected = {(row["node"], row["name"]) for row in rows(world, "pods") if row["enrolled"]}
    assert names >= expected
    for row in found:
        assert row["state"] == "available"
        assert row["not_before"] < row["not_after"]
        assert row["error"] == ""
        cells = next(
            each
            for each in shown
            if (each["IDENTITY"], each["NODE"]) == (row["identity"], f"{world.name}/{row['node']}")
        )
        assert cells["STATE"] == "available"
        assert cells["SERIAL"] == str(row["serial"])[:20]
        assert re.fullmatch(r"in \d+[dhms]", cells["ENDS"])
    assert not re.search("PRIVATE", sidestep(world, "certificates", "--json"))


def test_connections(world: Lab) -> None:
    client, server, near = (world.address(f"world/{name}") for name in ("client", "server", "near"))

    def of(target: str) -> list[dict[str, Any]]:
        ends = (f"{client}:", f"{target}:7000")
        return [row for row in rows(world, "connections") if row["src"].startswith(ends[0]) and row["dst"] == ends[1]]

    across = {(row["node"], row["direction"]): row for row in of(server)}
    assert across.keys() == {("node1", "outbound"), ("node2", "inbound")}
    assert all(row["tls"] for row in across.values())
    assert across["node1", "outbound"]["identity_peer"] == "spiffe://cluster.local/ns/world/sa/server"
    assert across["node2", "inbound"]["identity_peer"] == "spiffe://cluster.local/ns/world/sa/client"
    assert across["node1", "outbound"]["pod"] == "world/client"
    here = of(near)
    assert here
    assert {row["node"] for row in here} == {"node1"}
    assert not any(row["tls"] for row in here)  # logs and tables never say TLS of a flow that had none
    for target, tls in ((server, "yes"), (near, "no")):
        cells = [row for row in table(world, "connections") if row["TO"] == f"{target}:7000"]
        mine = [row for row in cells if row["FROM"].startswith(f"{client}:")]
        assert mine
        assert {row["TLS"] for row in mine} == {tls}
        assert {row["DIRECTION"] for row in mine} >= {"outbound"}
        assert all(re.fullmatch(r"\d+[dhms]", row["AGE"]) for row in mine)


@pytest.mark.parametrize("noun", ["status", "pods", "workloads", "services", "certificates", "connections"])
def test_where_there_is_no_lab_or_no_agent_it_is_one_line(mesh: Lab, tmp_path: Any, noun: str) -> None:
    for words, says in ((["--lab", "nowhere"], "there is no lab"), (["--run-dir", str(tmp_path)], "agent")):
        done = subprocess.run([SIDESTEP, noun, *words], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert says in done.stderr
