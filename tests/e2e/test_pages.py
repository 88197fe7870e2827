"""The pages of an agent that runs on a node: readiness, metrics with the names and labels of reference/ztunnel.md 8.1,
and /config_dump in the shape of 8.3, over HTTP as a scraper or a person asks for them.
"""

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from tests.e2e.conftest import pod
from tests.harness.lab import Lab, eventually

TRAFFIC = [
    "reporter", "source_workload", "source_canonical_service", "source_canonical_revision", "source_workload_namespace",
    "source_principal", "source_app", "source_version", "source_cluster", "destination_service",
    "destination_service_namespace", "destination_service_name", "destination_workload",
    "destination_canonical_service", "destination_canonical_revision", "destination_workload_namespace",
    "destination_principal", "destination_app", "destination_version", "destination_cluster", "request_protocol",
    "response_flags", "connection_security_policy", "source_region", "source_zone", "destination_region",
    "destination_zone",
]  # fmt: skip
ADDRESS, AUTHORIZATION = (
    "type.googleapis.com/istio.workload.Address",
    "type.googleapis.com/istio.security.Authorization",
)
PING = """
import socket
s = socket.create_connection(({target!r}, {port}), 20); s.sendall(b"PING\\r\\n"); assert s.recv(100) == b"+PONG\\r\\n"
s.shutdown(socket.SHUT_WR); assert s.recv(100) == b""
"""
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(lab: Lab, node: str = "node1") -> Samples:
    status, text = lab.page(15020, "/metrics", node)
    assert status == 200
    return {
        (each.name, tuple(sorted(each.labels.items()))): each.value
        for family in parse_text(text)
        for each in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float:
    """Sum of the samples that have these labels."""
    return sum(number for (each, has), number in found.items() if each == name and labels.items() <= dict(has).items())


# -- readiness ---------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def without_an_engine(lab: Lab, node: int) -> Iterator[None]:
    """The node's engine is dead and its supervisor does not bring it back meanwhile."""
    engine = lab.status()["nodes"][node]["processes"]["engine"]
    os.kill(engine["supervisor"], signal.SIGSTOP)
    try:
        os.kill(engine["pid"], signal.SIGKILL)
        yield
    finally:
        os.kill(engine["supervisor"], signal.SIGCONT)


def test_readiness_says_what_is_missing(mesh: Lab) -> None:
    mesh.enrol("world")
    assert mesh.page(15021, "/healthz/ready", "node2") == (200, "ready\n")
    assert mesh.page(15021, "/", "node2")[0] == 404
    eventually("nobody waits", lambda: value(samples(mesh, "node2"), "workload_manager_pending_proxy_count") == 0)
    with without_an_engine(mesh, 1):
        said = eventually(
            "not ready", lambda: (answer := mesh.page(15021, "/healthz/ready", "node2"))[0] != 200 and answer
        )
        assert said == (500, "not ready, pending: engine\n")
        eventually("pods that wait", lambda: value(samples(mesh, "node2"), "workload_manager_pending_proxy_count") > 0)
        assert value(samples(mesh, "node2"), "sidestep_engine_up") == 0
        assert mesh.page(15021, "/healthz/ready", "node1") == (200, "ready\n")  # the other node is another matter
    eventually("ready again", lambda: mesh.page(15021, "/healthz/ready", "node2") == (200, "ready\n"))
    eventually("nobody waits", lambda: value(samples(mesh, "node2"), "workload_manager_pending_proxy_count") == 0)


# -- metrics -----------------------------------------------------------------------------------------------------------
def test_a_connection_is_counted_with_all_its_labels_on_both_nodes(mesh: Lab) -> None:
    mesh.enrol("world")
    before = {node: samples(mesh, node) for node in ("node1", "node2")}
    labels = {
        "source_workload": "client", "source_canonical_service": "client", "source_workload_namespace": "world",
        "source_principal": "spiffe://cluster.local/ns/world/sa/client", "source_app": "client",
        "source_cluster": "Kubernetes", "destination_workload": "redis", "destination_canonical_service": "redis",
        "destination_workload_namespace": "world", "destination_principal": "spiffe://cluster.local/ns/world/sa/redis",
        "destination_app": "redis", "destination_cluster": "Kubernetes", "request_protocol": "tcp",
        "response_flags": "-", "connection_security_policy": "mutual_tls",
    }  # fmt: skip
    vip = mesh.ask(lambda client: client.get("/api/v1/namespaces/world/services/redis"))["spec"]["clusterIP"]
    mesh.exec("world/client", "/usr/bin/python3", "-c", PING.format(target=vip, port=6379))

    def grown(node: str, reporter: str, name: str, **more: str) -> float:
        has = {**labels, "reporter": reporter, **more}
        return value(samples(mesh, node), name, **has) - value(before[node], name, **has)

    service = {"destination_service": "redis.world.svc.cluster.local", "destination_service_name": "redis",
               "destination_service_namespace": "world"}  # fmt: skip
    for node, reporter in (("node1", "source"), ("node2", "destination")):
        eventually("closed", lambda node=node, r=reporter: grown(node, r, "istio_tcp_connections_closed_total") == 1)  # type: ignore[misc]
        assert grown(node, reporter, "istio_tcp_connections_opened_total", **service) == 1
        # For both reporters as the server sees it: 6 bytes of request, 7 of answer.
        assert grown(node, reporter, "istio_tcp_received_bytes_total", **service) == 6
        assert grown(node, reporter, "istio_tcp_sent_bytes_total", **service) == 7
        assert grown(node, reporter, "istio_tcp_connections_failed_total") == 0
    # Names and order, as written.
    page = mesh.page(15020, "/metrics")[1]
    lines = [line for line in page.splitlines() if line.startswith("istio_tcp_connections_opened_total{")]
    assert lines
    for line in lines:
        assert re.findall(r'(?:\{|,)([a-z_]+)="', line) == TRAFFIC, line


def test_the_agents_families(mesh: Lab) -> None:
    mesh.enrol("world")
    page = mesh.page(15020, "/metrics")[1]
    assert page.endswith("# EOF\n")
    families = {family.name: family for family in parse_text(page)}
    build = families["istio_build"].samples[0]
    assert build.value == 1
    assert build.labels.keys() == {"component", "tag"}
    assert build.labels["component"] == "ztunnel"
    for family, kind in (("istio_xds_message", "counter"), ("istio_xds_message_bytes", "counter"),
                         ("workload_manager_active_proxy_count", "gauge"), ("process_open_fds", "gauge")):  # fmt: skip
        assert families[family].type == kind
    found = samples(mesh)
    for name in ("istio_xds_message_total", "istio_xds_message_bytes_total"):
        assert {dict(labels)["url"] for each, labels in found if each == name} == {ADDRESS, AUTHORIZATION}
        assert value(found, name, url=ADDRESS) > 0
    agent = mesh.status()["nodes"][0]["processes"]["agent"]["pid"]
    fds = len(os.listdir(f"/proc/{agent}/fd"))
    assert abs(value(found, "process_open_fds") - fds) < 10
    limits = Path(f"/proc/{agent}/limits").read_text().splitlines()
    assert value(found, "process_max_fds") == int(
        next(line for line in limits if line.startswith("Max open")).split()[3]
    )
    assert value(found, "process_resident_memory_bytes") > 10 << 20
    assert value(found, "process_cpu_seconds_total") > 0
    assert 0 < time.time() - value(found, "process_start_time_seconds") < 3600
    assert mesh.page(15020, "/stats/prometheus")[1].splitlines()[0] == page.splitlines()[0]
    assert mesh.page(15020, "/other")[0] == 404
    asked = ("curl", "-sS", "-H", "Accept: application/openmetrics-text", "http://localhost:15020/metrics")
    newer = mesh.command("exec", "--node", "node1", "--", *asked).stdout
    assert {family.name for family in parse_openmetrics(newer)} >= {"istio_build", "istio_tcp_connections_opened"}  # type: ignore[no-untyped-call]


def test_the_stream_s_ends_are_counted_by_reason(mesh: Lab) -> None:
    name = "istio_xds_connection_terminations_total"
    before = samples(mesh)
    os.kill(mesh.status()["processes"]["control"]["pid"], signal.SIGKILL)
    eventually("an end is counted", lambda: value(samples(mesh), name) > value(before, name))
    after = samples(mesh)
    reasons = {dict(labels)["reason"] for each, labels in after if each == name}
    assert reasons
    assert reasons <= {"ConnectionError", "Error", "Reconnect", "Complete"}
    received = value(after, "istio_xds_message_total", url=ADDRESS)
    eventually("a new stream", lambda: value(samples(mesh), "istio_xds_message_total", url=ADDRESS) > received)
    eventually("ready", lambda: mesh.page(15021, "/healthz/ready") == (200, "ready\n"))


def test_pods_that_come_and_go_are_counted(mesh: Lab) -> None:
    kinds = ("active_proxy_count", "pending_proxy_count", "proxies_started_total", "proxies_stopped_total")
    names = [f"workload_manager_{kind}" for kind in kinds]

    def now() -> list[float]:
        found = samples(mesh)
        return [value(found, name) for name in names]

    mesh.enrol("world")
    here = sum(each["spec"]["nodeName"] == "node1" for each in mesh.pods("world"))
    eventually("the world is counted", lambda: now()[:2] == [here, 0])
    started, stopped = now()[2:]
    mesh.apply(*pod("counted", "node1", ["sleep", "infinity"]))
    try:
        eventually("one more", lambda: now() == [here + 1, 0, started + 1, stopped])
    finally:
        mesh.delete_pod("world/counted")
    eventually("one less", lambda: now() == [here, 0, started + 1, stopped + 1])


# -- config_dump -------------------------------------------------------------------------------------------------------
def dump(lab: Lab) -> dict[str, Any]:
    status, text = lab.page(15000, "/config_dump")
    assert status == 200
    assert "PRIVATE KEY" not in text
    return dict(json.loads(text))


def test_config_dump_has_the_shape_that_tools_know(mesh: Lab) -> None:
    mesh.enrol("world")
    found = dump(mesh)
    assert found.keys() >= {"workloads", "services", "policies", "stagedServices", "staticConfig", "version", "config",
                            "certificates", "workloadState"}  # fmt: skip
    assert [each["uid"] for each in found["workloads"]] == sorted(each["uid"] for each in found["workloads"])
    hosts = [each["hostname"] for each in found["services"]]
    assert hosts == sorted(hosts)
    client = next(each for each in found["workloads"] if each["uid"] == "Kubernetes//Pod/world/client")
    always = {"workloadIps", "protocol", "networkMode", "name", "namespace", "status", "clusterId", "capacity"}
    assert client.keys() >= always
    assert (client["protocol"], client["serviceAccount"], client["node"]) == ("HBONE", "client", "node1")
    redis = next(each for each in found["services"] if each["hostname"] == "redis.world.svc.cluster.local")
    assert redis["ports"] == {"6379": 6379}
    assert redis["endpoints"].keys() == {"Kubernetes//Pod/world/redis"}
    assert all(vip.startswith("/") for vip in redis["vips"])
    certificates = {each["identity"]: each for each in found["certificates"]}
    mine = certificates["spiffe://cluster.local/ns/world/sa/client"]
    assert mine["state"] == "Available"
    assert mine["certChain"][0].keys() == {"pem", "serialNumber", "validFrom", "expirationTime"}
    assert mine["rootCerts"]
    uid = mesh.pod("world/client")["metadata"]["uid"]
    info = {"name": "client", "namespace": "world", "serviceAccount": "client"}
    assert found["workloadState"][uid] == {"state": "Up", "info": info}
    assert found["config"]["localNode"] == "node1"
    assert found["config"]["clusterId"] == "Kubernetes"
    assert not [key for key in found["config"] if "_" in key]


def test_only_who_names_this_machine_may_read_the_admin_pages(mesh: Lab) -> None:
    asked = ("curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "-H", "Host: mesh.example.com")
    said = mesh.command("exec", "--node", "node1", "--", *asked, "http://127.0.0.1:15000/config_dump").stdout
    assert said == "403"
    assert mesh.page(15000, "/config_dump")[0] == 200


@pytest.fixture
def elsewhere() -> Iterator[Lab]:
    """A lab whose agents were told another DNS suffix than the trust domain."""
    lab = Lab(f"e{os.getpid() % 10000}", nodes=1)
    try:
        lab.command("up", "--nodes", "1", "--agent-arg=--cluster-domain=shop.example", timeout=240)
        yield lab
    finally:
        lab.down()


def test_the_cluster_s_domain_is_no_trust_domain(elsewhere: Lab) -> None:
    config = dump(elsewhere)["config"]
    assert (config["clusterDomain"], config["trustDomain"]) == ("shop.example", "cluster.local")
