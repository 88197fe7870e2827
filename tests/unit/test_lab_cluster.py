"""Names, addresses and Services of a lab: pure functions."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestep.lab import manifests, services
from sidestep.lab.cluster import MAX_NODES, MAX_NUMBER, Cluster, LabError, check_name


@given(st.integers(1, MAX_NUMBER), st.integers(1, MAX_NODES))
def test_no_two_parts_of_a_lab_share_an_address(number: int, count: int) -> None:
    cluster = Cluster("x", number, count, False)
    ranges: list[Any] = [cluster.services4, cluster.services6]
    for node in cluster.nodes:
        ranges += [node.pods4, node.pods6]
        assert node.pods4.subnet_of(cluster.pods4)
        assert node.pods6.subnet_of(cluster.pods6)
    for one, other in combinations(ranges, 2):
        assert one.version != other.version or not one.overlaps(other)
    single: list[Any] = [
        cluster.ip4,
        cluster.ip6,
        cluster.host_ip,
        *(ip for node in cluster.nodes for ip in (node.ip4, node.ip6)),
    ]
    assert len(set(single)) == len(single)
    assert not any(address in network for address in single for network in ranges)
    assert cluster.dns4 in cluster.services4
    assert cluster.dns6 in cluster.services6


def test_no_two_labs_share_a_range() -> None:
    ranges = [Cluster("x", number, 1, True).range4 for number in range(1, MAX_NUMBER + 1)]
    assert len(set(ranges)) == MAX_NUMBER
    assert all(network.is_private for network in ranges)


@pytest.mark.parametrize("name", ["", "Lab", "1lab", "a" * 12, "a b", "a/b", "../x", "a-b", "a\n"])
def test_a_name_that_does_not_fit_is_refused(name: str) -> None:
    with pytest.raises(LabError):
        check_name(name)


def test_interface_names_fit() -> None:
    assert len(Cluster(check_name("a" * 11), 1, 1, True).host_interface) == 15


SERVICES = {
    "n/web": services.Service(("10.1.0.5", "fd00::5"), (("http", "tcp", 80),), False),
    "n/none": services.Service(("10.1.0.6",), (("", "tcp", 81),), False),
    "n/all": services.Service((), (("", "tcp", 5432),), True),
}
SLICES = [
    services.Slice("n/web", 4, (("http", 8080),), ("10.2.0.1", "10.2.0.2")),
    services.Slice("n/web", 6, (("http", 8080),), ("fd00:2::1",)),
    services.Slice("n/all", 4, (("", 5432),), ("10.2.0.9",)),
]


def test_ports_have_the_endpoints_of_their_family() -> None:
    found = {(port.address, port.port): port.endpoints for port in services.ports(SERVICES, SLICES)}
    assert found == {
        ("10.1.0.5", 80): (("10.2.0.1", 8080), ("10.2.0.2", 8080)),
        ("fd00::5", 80): (("fd00:2::1", 8080),),
        ("10.1.0.6", 81): (),
    }


def test_rules_choose_at_random_and_refuse_where_nobody_is() -> None:
    text = services.ruleset(services.ports(SERVICES, SLICES))
    assert "ip daddr 10.1.0.5 tcp dport 80 dnat ip to numgen random mod 2 map" in text
    assert "ip6 daddr fd00::5 tcp dport 80 dnat ip6 to" in text
    assert "ip daddr 10.1.0.6 tcp dport 81 reject with tcp reset" in text
    assert "10.2.0.9" not in text  # headless: no cluster address


def test_names_of_services() -> None:
    lines = set(services.hosts(SERVICES, SLICES, "cluster.local").split("\n"))
    assert lines == {
        "10.1.0.5 web.n.svc.cluster.local",
        "fd00::5 web.n.svc.cluster.local",
        "10.1.0.6 none.n.svc.cluster.local",
        "10.2.0.9 all.n.svc.cluster.local",
        "",
    }


def test_projections() -> None:
    service = {
        "metadata": {"name": "web", "namespace": "n"},
        "spec": {"clusterIP": "None", "ports": [{"port": 80, "protocol": "UDP"}]},
    }
    assert services.service_of(service) == services.Service((), (("", "udp", 80),), True)
    endpoints = {
        "metadata": {"name": "web-1", "namespace": "n", "labels": {services.SERVICE_LABEL: "web"}},
        "addressType": "IPv6",
        "endpoints": [
            {"addresses": ["fd00::2"], "conditions": {"ready": True}},
            {"addresses": ["fd00::3"], "conditions": {"ready": False}},
            {"addresses": ["fd00::1"]},
        ],
        "ports": [{"port": 80}],
    }
    assert services.slice_of(endpoints) == services.Slice("n/web", 6, (("", 80),), ("fd00::1", "fd00::2"))


POD = "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {containers: [{name: a, command: [x]}]}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not YAML (line "),
        ("- 1", "not an object, but list"),
        ("hello", "not an object, but str"),
        ("kind: Pod\nmetadata: {name: x}", "no apiVersion"),
        ("apiVersion: v1\nmetadata: {name: x}", "no kind"),
        ("apiVersion: v1\nkind: Namespace", "Namespace without metadata.name"),
        ("apiVersion: v1\nkind: Namespace\nmetadata: {}", "Namespace without metadata.name"),
        ("apiVersion: v1\nkind: Unicorn\nmetadata: {name: x}", "unknown kind v1 Unicorn"),
        ("apiVersion: apps/v1\nkind: Pod\nmetadata: {name: x}", "unknown kind apps/v1 Pod"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: x}", "has no spec"),
        (POD.replace("command: [x]", "livenessProbe: {exec: {}}, command: [x]"), "livenessProbe"),
        (POD + "---\n" + POD.replace("name: p", "nome: p"), "document 2: Pod without metadata.name"),
    ],
)
def test_a_manifest_that_is_none_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(LabError) as error:
        manifests.read([str(path)])
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_manifests_come_in_order(tmp_path: Path) -> None:
    (tmp_path / "20.yaml").write_text(POD)
    (tmp_path / "10.yml").write_text("apiVersion: v1\nkind: Namespace\nmetadata: {name: n}\n---\n")
    (tmp_path / "README.md").write_text("not a manifest")
    found = manifests.read([str(tmp_path)])
    assert [str(item) for item in found] == ["Namespace n", "Pod default/p"]
    assert [item.collection for item in found] == ["/api/v1/namespaces", "/api/v1/namespaces/default/pods"]


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "no.yaml", tmp_path):
        with pytest.raises(LabError, match=str(path)):
            manifests.read([str(path)])
