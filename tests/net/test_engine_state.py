"""Records as the protobuf library writes them, read back from the engine's own decoder: field by field the same."""

import ipaddress
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sidestep.wire import batch
from sidestep.wire.pb import authorization_pb2 as authorization
from sidestep.wire.pb import workload_pb2 as workloads_
from tests.harness.engine import Client, EngineProcess

workload_pb2: Any = workloads_  # enums are set by number here
authorization_pb2: Any = authorization
COUNT = 400
WORDS = ("", "a", "shop", "edge-1", "ü", 'quo"te', "back\\slash", "x" * 300)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with EngineProcess(tmp_path) as engine, engine.client() as connected:
        yield connected


def addresses(chance: random.Random) -> list[bytes]:
    return [chance.randbytes(chance.choice((4, 16))) for _ in range(chance.randrange(4))]


def shown(raw: bytes) -> str:
    found = ipaddress.ip_address(raw)
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped:
        found = found.ipv4_mapped
    return str(found)


def workload(chance: random.Random, number: int) -> Any:
    name = chance.choice((f"web-{number}", "unlike-its-uid"))
    made = workload_pb2.Workload(
        uid=f"Kubernetes//Pod/shop/web-{number}",
        name=name,
        namespace=chance.choice(("shop", "data")),
        addresses=addresses(chance),
        network=chance.choice(WORDS),
        tunnel_protocol=chance.choice((0, 1)),
        trust_domain=chance.choice(("", "example.org")),
        service_account=chance.choice(("", "web")),
        node=chance.choice(WORDS),
        canonical_name=chance.choice(WORDS),
        canonical_revision=chance.choice(WORDS),
        workload_type=chance.randrange(4),
        workload_name=chance.choice(WORDS),
        native_tunnel=chance.choice((True, False)),
        authorization_policies=[f"shop/p{i}" for i in range(chance.randrange(3))],
        status=chance.randrange(2),
        cluster_id=chance.choice(("", "other")),
        network_mode=chance.randrange(2),
    )
    made.locality.region, made.locality.zone = chance.choice(WORDS), chance.choice(WORDS)
    if chance.randrange(2):
        made.capacity.value = chance.choice((0, 1, 7, 2**32 - 1))
    if chance.randrange(4) == 0:
        made.waypoint.hostname.namespace, made.waypoint.hostname.hostname = "shop", "waypoint"
        made.waypoint.hbone_mtls_port = 15008
    for index in range(chance.randrange(3)):
        ports = made.services[f"shop/s{index}.svc"].ports
        for port in chance.sample(range(1, 65536), chance.randrange(3)):
            ports.add(service_port=port, target_port=chance.randrange(65536), app_protocol=4)
    return made


def check_workload(made: Any, found: dict[str, Any]) -> None:
    domain, account = made.trust_domain or "cluster.local", made.service_account or "default"
    assert found["identity"] == f"spiffe://{domain}/ns/{made.namespace}/sa/{account}"
    for name in ("name", "namespace", "network", "node", "canonical_name", "canonical_revision", "workload_name"):
        assert found[name] == getattr(made, name)
    assert [found["region"], found["zone"]] == [made.locality.region, made.locality.zone]
    assert found["cluster_id"] == (made.cluster_id or "Kubernetes")
    assert found["workload_type"] == workload_pb2.WorkloadType.Name(made.workload_type).lower()
    assert found["addresses"] == [shown(each) for each in made.addresses]
    assert found["protocol"] == ("HBONE" if made.tunnel_protocol else "PLAIN")
    assert found["healthy"] == (made.status == 0)
    assert found["host_network"] == (made.network_mode == 1)
    assert found["waypoint"] == made.HasField("waypoint")
    assert found["capacity"] == (made.capacity.value if made.HasField("capacity") else 1)
    assert found["policies"] == list(made.authorization_policies)
    assert found["services"] == {
        name: {str(port.service_port): port.target_port for port in each.ports} for name, each in made.services.items()
    }


def service(chance: random.Random, number: int) -> Any:
    made = workload_pb2.Service(
        name=chance.choice(WORDS),
        namespace="shop",
        hostname=f"s{number}.svc",
        ip_families=chance.randrange(4),
        canonical=chance.choice((True, False)),
        visibility=chance.randrange(2),
        subject_alt_names=[f"spiffe://a/ns/b/sa/{i}" for i in range(chance.randrange(4))],
    )
    for port in chance.sample(range(1, 65536), chance.randrange(4)):
        made.ports.add(service_port=port, target_port=chance.randrange(65536))
    for raw in addresses(chance):
        vip = made.addresses.add(address=raw)
        if chance.randrange(2):
            vip.length = chance.randrange(len(raw) * 8 + 1)
    made.load_balancing.mode = chance.randrange(4)
    made.load_balancing.health_policy = chance.randrange(2)
    made.load_balancing.routing_preference.extend(chance.randrange(1, 7) for _ in range(chance.randrange(4)))
    return made


def check_service(made: Any, found: dict[str, Any]) -> None:
    assert [found["name"], found["hostname"]] == [made.name, made.hostname]
    assert found["ip_families"] == ("automatic", "ipv4", "ipv6", "dual")[made.ip_families]
    assert found["load_balancing"] == ("", "strict", "failover", "passthrough")[made.load_balancing.mode]
    assert found["allow_unhealthy"] == (made.load_balancing.health_policy == 1)
    assert found["canonical"] == made.canonical
    assert found["namespace_only"] == (made.visibility == 1)
    assert found["subject_alt_names"] == list(made.subject_alt_names)
    assert found["ports"] == {str(port.service_port): port.target_port for port in made.ports}
    wanted = []
    for vip in made.addresses:
        whole = not vip.HasField("length") or vip.length == len(vip.address) * 8
        wanted.append(shown(vip.address) + ("" if whole else f"/{vip.length}"))
    assert found["addresses"] == wanted


def test_addresses_agree(client: Client) -> None:
    chance = random.Random(11)
    workloads = {each.uid: each for each in (workload(chance, i) for i in range(COUNT))}
    services = {f"shop/{each.hostname}": each for each in (service(chance, i) for i in range(COUNT))}
    records = [
        batch.Record(batch.Op.ADDRESS_SET, uid, "1", workload_pb2.Address(workload=made).SerializeToString())
        for uid, made in workloads.items()
    ]
    records += [
        batch.Record(batch.Op.ADDRESS_SET, key, "1", workload_pb2.Address(service=made).SerializeToString())
        for key, made in services.items()
    ]
    chance.shuffle(records)
    assert client.apply(records)["rejected"] == []
    found = {each["uid"]: each for each in client.dump("workloads")}
    assert found.keys() == workloads.keys()
    for uid, made in workloads.items():
        check_workload(made, found[uid])
    found = {each["key"]: each for each in client.dump("services")}
    assert found.keys() == services.keys()
    for key, made_service in services.items():
        check_service(made_service, found[key])
        members = {uid for uid, made in workloads.items() if key in made.services}
        assert set(found[key]["endpoints"]) == members


def test_policies_agree(client: Client) -> None:
    made = authorization_pb2.Authorization(name="p", namespace="shop", scope=1, action=1)
    match = made.rules.add().clauses.add().matches.add()
    match.principals.add(prefix="cluster.local/")
    match.not_namespaces.add().presence.SetInParent()
    match.source_ips.add(address=bytes(4), length=8)
    match.destination_ports.extend([80, 65535])
    good = made.SerializeToString()
    match.destination_ips.add(address=bytes(5), length=8)
    records = [
        batch.Record(batch.Op.POLICY_SET, "shop/p", "1", good),
        batch.Record(batch.Op.POLICY_SET, "shop/q", "1", made.SerializeToString()),
    ]
    assert client.apply(records)["rejected"] == [{"name": "shop/q", "reason": "address is neither 4 nor 16 bytes"}]
    found = {each["key"]: each for each in client.dump("policies")}
    assert found["shop/p"] == {
        "key": "shop/p",
        "name": "p",
        "namespace": "shop",
        "scope": "Namespace",
        "action": "Deny",
        "rules": [
            [
                [
                    {
                        "notNamespaces": [{"Presence": []}],
                        "principals": [{"Prefix": "cluster.local/"}],
                        "sourceIps": ["0.0.0.0/8"],
                        "destinationPorts": [80, 65535],
                    }
                ]
            ]
        ],
        "dryRun": False,
        "version": "1",
    }
    assert found["shop/q"] == {
        "key": "shop/q",
        "name": "q",
        "namespace": "shop",
        "scope": "Namespace",
        "action": "Deny",
        "rules": [[]],
        "dryRun": False,
        "undecodable": "address is neither 4 nor 16 bytes",
        "version": "",
    }
