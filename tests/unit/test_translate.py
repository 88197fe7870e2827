"""From Kubernetes objects to records: each rule once; changes in any order end in the records of a fresh start."""

import copy
import ipaddress
import random
from collections.abc import Callable
from typing import Any

import pytest

from sidestep.control import objects
from sidestep.control.records import Mesh
from sidestep.control.translate import Cluster
from sidestep.wire.delta import Entry
from sidestep.wire.pb import workload_pb2 as pb

POD = "Kubernetes//Pod/shop/web-1"
WEB = "shop/web.shop.svc.cluster.local"
MANUAL = "Kubernetes/discovery.k8s.io/EndpointSlice/shop/db-x/192.0.2.7"


def pod(name: str = "web-1", node: str = "n1", *ips: str, **meta: Any) -> dict[str, Any]:
    return {
        "metadata": {"namespace": "shop", "name": name, "uid": f"uid-{name}", **meta},
        "spec": {"nodeName": node, "serviceAccountName": "web"},
        "status": {
            "phase": "Running",
            "podIPs": [{"ip": each} for each in ips or ("10.0.0.1", "fd00::1")],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }


def service(name: str = "web", **spec: Any) -> dict[str, Any]:
    base = {
        "clusterIPs": ["10.96.0.9", "fd00:96::9"],
        "ipFamilies": ["IPv4", "IPv6"],
        "ports": [
            {"name": "http", "port": 80, "targetPort": "web", "protocol": "TCP"},
            {"name": "admin", "port": 81, "targetPort": 9000},
            {"name": "plain", "port": 82},
            {"name": "dns", "port": 53, "protocol": "UDP"},
        ],
    }
    return {"metadata": {"namespace": "shop", "name": name}, "spec": base | spec}


def slice_(*pods: str, name: str = "web-x", of: str = "web", port: int = 8080) -> dict[str, Any]:
    return {
        "metadata": {"namespace": "shop", "name": name, "labels": {"kubernetes.io/service-name": of}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": port}, {"name": "dns", "port": 53, "protocol": "UDP"}],
        "endpoints": [{"addresses": ["10.0.0.1"], "targetRef": {"kind": "Pod", "name": each}} for each in pods],
    }


def manual(*addresses: str, ready: bool = True) -> dict[str, Any]:
    made = slice_(name="db-x", of="db")
    made["endpoints"] = [{"addresses": [each], "conditions": {"ready": ready}, "zone": "z9"} for each in addresses]
    return made


def node(name: str = "n1", **labels: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "labels": labels}}


def namespace(name: str, **annotations: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "annotations": annotations}}


class Api:
    """Feeds objects to a Mesh, and keeps the records that come out."""

    def __init__(self, cluster: Cluster | None = None) -> None:
        self.mesh = Mesh(cluster or Cluster(), "istio-system")
        self.records: dict[str, Entry] = {}
        self.changed: set[str] = set()

    def put(self, kind: str, obj: dict[str, Any], there: bool = True) -> None:
        kinds: dict[str, tuple[Callable[[Any], Any], Callable[[str, Any], None]]] = {
            "pod": (objects.pod_of, self.mesh.pod),
            "service": (objects.service_of, self.mesh.service),
            "slice": (objects.slice_of, self.mesh.slice),
            "node": (objects.node_of, self.mesh.node),
            "namespace": (objects.namespace_of, self.mesh.namespace),
        }
        project, take = kinds[kind]
        meta = obj["metadata"]
        key = f"{meta['namespace']}/{meta['name']}" if "namespace" in meta else meta["name"]
        take(key, project(obj) if there else None)

    def take(self) -> set[str]:
        """Takes what is due. Returns the names whose record is another one now."""
        self.changed = set()
        for name, record in self.mesh.take().items():
            if record == self.records.get(name):
                continue
            self.changed.add(name)
            if record is None:
                del self.records[name]
            else:
                self.records[name] = record
        return self.changed

    def workload(self, name: str = POD) -> Any:
        self.take()
        return pb.Address.FromString(self.records[name].body).workload

    def service(self, name: str = WEB) -> Any:
        self.take()
        return pb.Address.FromString(self.records[name].body).service


def api(*parts: tuple[str, dict[str, Any]], cluster: Cluster | None = None) -> Api:
    made = Api(cluster)
    for kind, obj in parts:
        made.put(kind, obj)
    made.take()
    return made


def test_pod() -> None:
    made = api(("pod", pod(labels={"app": "shopfront"})), ("node", node("n1")))
    record = made.workload()
    assert (record.uid, record.name, record.namespace) == (POD, "web-1", "shop")
    assert list(record.addresses) == [ipaddress.ip_address(each).packed for each in ("10.0.0.1", "fd00::1")]
    assert (record.service_account, record.node, record.cluster_id, record.trust_domain) == (
        "web",
        "n1",
        "Kubernetes",
        "",
    )
    assert (record.canonical_name, record.canonical_revision) == ("shopfront", "latest")
    assert (record.workload_name, record.workload_type) == ("web-1", pb.POD)
    assert (record.status, record.tunnel_protocol, record.network_mode) == (pb.HEALTHY, pb.NONE, pb.STANDARD)
    assert not record.authorization_policies and not record.services and not record.HasField("locality")
    assert made.records[POD].aliases == ("/10.0.0.1", "/fd00::1")


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_pods_that_ended_or_have_no_address_are_none(phase: str) -> None:
    made = api(("pod", pod()))
    ended = pod()
    ended["status"]["phase"] = phase
    made.put("pod", ended)
    assert made.take() == {POD} and POD not in made.records
    fresh = pod()
    fresh["status"] = {"phase": "Pending"}
    made.put("pod", fresh)
    assert not made.take()
    fresh["status"]["podIP"] = "10.0.0.1"
    made.put("pod", fresh)
    assert made.workload().status == pb.UNHEALTHY


def test_a_pod_that_is_deleted_or_not_ready_is_unhealthy() -> None:
    assert api(("pod", pod(deletionTimestamp="2026-01-01T00:00:00Z"))).workload().status == pb.UNHEALTHY
    waiting = pod()
    waiting["status"]["conditions"] = [{"type": "Ready", "status": "False"}, {"type": "Other", "status": "True"}]
    assert api(("pod", waiting)).workload().status == pb.UNHEALTHY


@pytest.mark.parametrize(
    ("meta", "hbone", "native"),
    [
        ({"annotations": {objects.REDIRECTION: "enabled"}}, True, False),
        ({"annotations": {objects.REDIRECTION: "pending"}}, False, False),
        ({"labels": {objects.REDIRECTION: "enabled"}}, False, False),
        ({"labels": {objects.TUNNEL: "http"}}, True, True),
        ({"labels": {objects.TUNNEL: "none"}}, False, False),
        ({"labels": {"istio.io/dataplane-mode": "ambient"}}, False, False),
    ],
)
def test_hbone_is_what_the_annotation_says(meta: dict[str, Any], hbone: bool, native: bool) -> None:
    record = api(("pod", pod(**meta))).workload()
    assert record.tunnel_protocol == (pb.HBONE if hbone else pb.NONE)
    assert record.native_tunnel is native


def test_host_network_is_not_found_by_address() -> None:
    obj = pod()
    obj["spec"]["hostNetwork"] = True
    made = api(("pod", obj))
    assert made.workload().network_mode == pb.HOST_NETWORK
    assert made.records[POD].aliases == ()


@pytest.mark.parametrize(
    ("owner", "labels", "name", "kind"),
    [
        (("ReplicaSet", "web-5f7"), {"pod-template-hash": "5f7"}, "web", pb.DEPLOYMENT),
        (("ReplicaSet", "web-5f7"), {}, "web-5f7", pb.POD),
        (("StatefulSet", "db"), {}, "db", pb.POD),
        (("Job", "once"), {}, "once", pb.JOB),
        (("Job", "nightly-29112345"), {}, "nightly", pb.CRONJOB),
    ],
)
def test_owner(owner: tuple[str, str], labels: dict[str, str], name: str, kind: int) -> None:
    owners = [
        {"kind": "Other", "name": "x", "controller": False},
        {"kind": owner[0], "name": owner[1], "controller": True},
    ]
    record = api(("pod", pod(ownerReferences=owners, labels=labels))).workload()
    assert (record.workload_name, record.workload_type) == (name, kind)
    assert record.canonical_name == name


def test_locality_is_the_nodes_unless_the_pod_says_otherwise() -> None:
    labels = {
        "topology.kubernetes.io/region": "r",
        "topology.kubernetes.io/zone": "z",
        "topology.istio.io/subzone": "s",
    }
    made = api(("pod", pod()))
    made.put("node", node("n1", **labels))
    record = made.workload()
    assert (record.locality.region, record.locality.zone, record.locality.subzone) == ("r", "z", "s")
    made.put("pod", pod(labels={"topology.istio.io/locality": "r2.z2"}))
    record = made.workload()
    assert (record.locality.region, record.locality.zone, record.locality.subzone) == ("r2", "z2", "")


def test_trust_domain_and_network() -> None:
    made = api(("pod", pod()), ("service", service()), cluster=Cluster(trust_domain="example.org", network="net0"))
    assert (made.workload().trust_domain, made.workload().network) == ("example.org", "net0")
    system = {"metadata": {"name": "istio-system", "labels": {objects.NETWORK: "net1"}}}
    made.put("namespace", system)
    assert made.workload().network == "net1"
    assert {each.network for each in made.service().addresses} == {"net1"}
    assert made.records[POD].aliases == ("net1/10.0.0.1", "net1/fd00::1")
    made.put("pod", pod(labels={objects.NETWORK: "net2"}))
    assert made.workload().network == "net2"


def test_service() -> None:
    made = api(("service", service(externalIPs=["192.0.2.1"])))
    record = made.service()
    assert (record.name, record.namespace, record.hostname) == ("web", "shop", "web.shop.svc.cluster.local")
    addresses = [str(ipaddress.ip_address(each.address)) for each in record.addresses]
    assert addresses == ["10.96.0.9", "fd00:96::9", "192.0.2.1"]
    ports = [(each.service_port, each.target_port, each.app_protocol) for each in record.ports]
    assert ports == [(80, 0, pb.HTTP11), (81, 9000, pb.UNKNOWN), (82, 82, pb.UNKNOWN)]
    assert record.ip_families == pb.DUAL and record.canonical
    assert not record.HasField("load_balancing")
    assert made.records[WEB].aliases == ("/10.96.0.9", "/fd00:96::9", "/192.0.2.1")


def test_headless_and_external_name() -> None:
    made = api(("service", service(clusterIPs=["None"], ipFamilies=["IPv6"])))
    assert not made.service().addresses and made.service().ip_families == pb.IPV6_ONLY
    made.put("service", service(type="ExternalName", externalName="example.org"))
    assert made.take() == {WEB} and not made.records


CLOSE = [pb.LoadBalancing.NETWORK, pb.LoadBalancing.REGION, pb.LoadBalancing.ZONE]


@pytest.mark.parametrize(
    ("spec", "mode", "preference", "health"),
    [
        ({"internalTrafficPolicy": "Cluster"}, 0, [], 0),
        ({"internalTrafficPolicy": "Local"}, pb.LoadBalancing.STRICT, [pb.LoadBalancing.NODE], 0),
        ({"trafficDistribution": "PreferClose"}, pb.LoadBalancing.FAILOVER, CLOSE, 0),
        ({"trafficDistribution": "PreferSameZone"}, pb.LoadBalancing.FAILOVER, CLOSE, 0),
        (
            {"trafficDistribution": "PreferSameNode"},
            pb.LoadBalancing.FAILOVER,
            [*CLOSE, pb.LoadBalancing.SUBZONE, pb.LoadBalancing.NODE],
            0,
        ),
        ({"publishNotReadyAddresses": True}, 0, [], pb.LoadBalancing.ALLOW_ALL),
        ({"trafficDistribution": "Unheard-of"}, 0, [], 0),
    ],
)
def test_load_balancing(spec: dict[str, Any], mode: int, preference: list[int], health: int) -> None:
    balancing = api(("service", service(**spec))).service().load_balancing
    assert (balancing.mode, list(balancing.routing_preference), balancing.health_policy) == (mode, preference, health)


def test_distribution_of_the_namespace_gives_way_to_the_service() -> None:
    made = api(("service", service()), ("namespace", namespace("shop", **{objects.DISTRIBUTION: "PreferClose"})))
    assert list(made.service().load_balancing.routing_preference) == CLOSE
    obj = service()
    obj["metadata"]["annotations"] = {objects.DISTRIBUTION: "PreferSameNode"}
    made.put("service", obj)
    assert len(made.service().load_balancing.routing_preference) == 5
    made.put("service", service())
    made.put("namespace", namespace("shop"))
    assert not made.service().HasField("load_balancing")


def members(made: Api, name: str = POD) -> dict[str, list[tuple[int, int]]]:
    services = made.workload(name).services
    return {key: [(port.service_port, port.target_port) for port in group.ports] for key, group in services.items()}


def test_membership_follows_slices_in_any_order() -> None:
    parts = [("pod", pod()), ("service", service()), ("slice", slice_("web-1"))]
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0], [2, 0, 1]):
        made = api(*(parts[index] for index in order))
        assert members(made) == {WEB: [(80, 8080)]}, order
    made.put("slice", slice_("web-1", port=8081))
    assert members(made) == {WEB: [(80, 8081)]}
    made.put("slice", slice_("other"))
    assert members(made) == {}
    made.put("slice", slice_("other", "web-1"))
    assert members(made) == {WEB: [(80, 8080)]}
    made.put("service", service(), there=False)
    assert members(made) == {}


def test_two_slices_of_a_service_and_two_services() -> None:
    second = slice_("web-1", name="web-y")
    second["addressType"] = "IPv6"
    second["ports"] = [{"name": "admin", "port": 9000}]
    made = api(
        ("pod", pod()),
        ("service", service()),
        ("service", service("shadow")),
        ("slice", slice_("web-1")),
        ("slice", second),
        ("slice", slice_("web-1", name="s", of="shadow", port=1)),
    )
    assert members(made) == {WEB: [(80, 8080), (81, 9000)], "shop/shadow.shop.svc.cluster.local": [(80, 1)]}
    made.put("slice", second, there=False)
    assert members(made)[WEB] == [(80, 8080)]


def test_endpoints_that_are_no_pods() -> None:
    made = api(("service", service("db")), ("slice", manual("192.0.2.7", "192.0.2.8")))
    record = made.workload(MANUAL)
    assert record.tunnel_protocol == pb.NONE and record.status == pb.HEALTHY and record.service_account == ""
    assert record.locality.zone == "z9"
    assert members(made, MANUAL) == {"shop/db.shop.svc.cluster.local": [(80, 8080)]}
    made.put("slice", manual("192.0.2.8", ready=False))
    assert made.take() == {MANUAL, MANUAL[:-1] + "8"} and MANUAL not in made.records
    made.put("slice", manual(), there=False)
    made.take()
    assert not any("EndpointSlice" in name for name in made.records)


def test_a_change_touches_only_what_depends_on_it() -> None:
    made = api(
        *(("pod", pod(f"web-{number}", f"n{number % 2}", f"10.0.0.{number}")) for number in range(1, 9)),
        ("service", service()),
        ("service", service("other")),
        ("slice", slice_("web-1", "web-2")),
    )
    made.put("pod", pod("web-3", "n1", "10.0.0.3", annotations={objects.REDIRECTION: "enabled"}))
    assert made.mesh.take().keys() == {"Kubernetes//Pod/shop/web-3"}
    made.put("slice", slice_("web-1", "web-2", port=1))
    assert made.mesh.take().keys() == {f"Kubernetes//Pod/shop/web-{number}" for number in (1, 2)}
    made.put("node", node("n0", **{"topology.kubernetes.io/zone": "z"}))
    assert made.mesh.take().keys() == {f"Kubernetes//Pod/shop/web-{number}" for number in (2, 4, 6, 8)}
    made.put("service", service("other", publishNotReadyAddresses=True))
    assert made.mesh.take().keys() == {"shop/other.shop.svc.cluster.local"}


def test_version_is_of_the_content() -> None:
    made = api(("pod", pod()))
    first = made.records[POD].version
    made.put("pod", pod(labels={"irrelevant": "yes"}, resourceVersion="7"))
    assert not made.take()
    made.put("pod", pod(labels={"version": "v2"}))
    made.take()
    assert made.records[POD].version != first
    made.put("pod", pod())
    made.take()
    assert made.records[POD].version == first


def test_an_object_that_cannot_be_a_record_hurts_no_other() -> None:
    made = api(("pod", pod("bad", "n1", "not-an-address")), ("pod", pod()))
    assert set(made.records) == {POD} and set(made.mesh.problems) == {"Kubernetes//Pod/shop/bad"}
    made.put("pod", pod("bad", "n1", "10.0.0.3"))
    made.take()
    assert "Kubernetes//Pod/shop/bad" in made.records and not made.mesh.problems


def test_changes_in_any_order_end_as_a_fresh_start() -> None:
    choose = random.Random(7)
    for _ in range(60):
        made = Api()
        now: dict[tuple[str, str], dict[str, Any]] = {}
        for _ in range(choose.randrange(1, 40)):
            number = choose.randrange(3)
            kind, obj = choose.choice(
                [
                    (
                        "pod",
                        pod(
                            f"p{number}",
                            f"n{choose.randrange(2)}",
                            f"10.0.0.{number}",
                            labels={"app": f"{choose.randrange(2)}"},
                        ),
                    ),
                    (
                        "service",
                        service(
                            f"s{number}",
                            trafficDistribution=choose.choice(["", "PreferClose"]),
                            ports=[{"name": "http", "port": choose.randrange(1, 3)}],
                        ),
                    ),
                    (
                        "slice",
                        slice_(*choose.sample(["p0", "p1", "p2"], 2), name=f"e{number}", of=f"s{choose.randrange(3)}"),
                    ),
                    ("slice", manual(f"192.0.2.{number}", ready=bool(choose.randrange(2)))),
                    ("node", node(f"n{number}", **{"topology.kubernetes.io/zone": f"z{choose.randrange(2)}"})),
                    ("namespace", namespace("shop", **{objects.DISTRIBUTION: choose.choice(["", "PreferSameNode"])})),
                    (
                        "namespace",
                        {"metadata": {"name": "istio-system", "labels": {objects.NETWORK: f"{choose.randrange(2)}"}}},
                    ),
                ]
            )
            there = choose.random() < 0.75
            made.put(kind, copy.deepcopy(obj), there)
            now.pop((kind, obj["metadata"]["name"]), None)
            if there:
                now[kind, obj["metadata"]["name"]] = obj
            if choose.random() < 0.5:
                made.take()
        made.take()
        fresh = api(*((kind, obj) for (kind, _), obj in now.items()))
        assert made.records == fresh.records
