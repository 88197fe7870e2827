"""PeerAuthentication to records, and which workloads list which records. Expected records are those of upstream's
golden files (istio/istio, pilot/pkg/serviceregistry/ambient/testdata/peer-authn-*.yaml) and of ambientindex_test.go;
each case names which. What differs on purpose says "ours".
"""

import copy
import random
import time
from typing import Any

import pytest

from sidestep.control import objects, peers
from sidestep.control.objects import Labels
from sidestep.control.peers import DISABLE, PERMISSIVE, STRICT, UNSET
from sidestep.control.records import Mesh
from sidestep.control.rulings import Rulings
from sidestep.control.translate import Cluster
from sidestep.wire.pb import authorization_pb2 as pb
from sidestep.wire.pb import workload_pb2
from tests.harness.policies import STATIC, authorization, peer, shape

ROOT = "istio-system"
NOBODY = {"not_principals": ["*"]}


def only(port: int) -> list[list[dict[str, Any]]]:
    """A rule for one port."""
    return [[{"destination_ports": [port], "not_principals": ["*"]}]]


def but(*ports: int, own: bool) -> list[list[list[dict[str, Any]]]]:
    """The rule that makes exceptions; whether the STRICT is the policy's own says where its clause stands."""
    rest: list[list[dict[str, Any]]] = [[{"not_destination_ports": [port]}] for port in ports]
    return [[[NOBODY], *rest]] if own else [[*rest, [NOBODY]]]


MESH: dict[str, Any] = {"name": "mesh", "namespace": ROOT}
SPACE: dict[str, Any] = {"name": "space"}
# (golden file, the policies before ours, ours, its record)
PEERS: list[tuple[str, list[dict[str, Any]], dict[str, Any], list[list[list[dict[str, Any]]]] | None]] = [
    ("disable", [], peer(DISABLE), None),
    ("disable-port-mtls-strict", [], peer(DISABLE, app="a", ports={"9090": STRICT}), [only(9090)]),
    ("permissive", [], peer(PERMISSIVE), None),
    (
        "permissive-port-mtls-strict-and-permissive",
        [],
        peer(PERMISSIVE, app="a", ports={"9090": STRICT, "8080": PERMISSIVE}),
        [only(9090)],
    ),
    ("permissive-port-mtls-strict", [], peer(PERMISSIVE, app="a", ports={"9090": STRICT}), [only(9090)]),
    (
        "permissive-root-permissive-namespace-strict-workload-ports",
        [peer(PERMISSIVE, **MESH), peer(PERMISSIVE, **SPACE)],
        peer(app="a", ports={"9090": STRICT, "8080": STRICT}),
        [only(8080), only(9090)],
    ),
    (
        "permissive-root-permissive-workload",
        [peer(PERMISSIVE, **MESH)],
        peer(app="a", ports={"9090": PERMISSIVE}),
        None,
    ),
    (
        "permissive-root-strict-namespace-permissive-workload",
        [peer(PERMISSIVE, **MESH), peer(STRICT, **SPACE)],
        peer(app="a", ports={"9090": PERMISSIVE}),
        but(9090, own=False),
    ),
    (
        "permissive-root-unset-namespace-mixed-workload-ports",
        [peer(PERMISSIVE, **MESH), peer(UNSET, **SPACE)],
        peer(app="a", ports={"9090": STRICT, "8080": PERMISSIVE}),
        [only(9090)],
    ),
    ("strict-and-disable-port-mtls", [], peer(STRICT, app="a", ports={"9090": DISABLE}), but(9090, own=True)),
    ("strict-and-permissive-port-mtls", [], peer(STRICT, app="a", ports={"9090": PERMISSIVE}), but(9090, own=True)),
    ("strict-and-strict-port-mtls", [], peer(STRICT, app="a", ports={"8080": STRICT}), None),
    (
        "strict-port-mtls-strict-and-permissive",
        [],
        peer(STRICT, app="a", ports={"9090": STRICT, "8080": PERMISSIVE}),
        but(8080, own=True),
    ),
    (
        "strict-root-permissive-namespace-strict-workload",
        [peer(STRICT, **MESH), peer(PERMISSIVE, **SPACE)],
        peer(app="a", ports={"9090": STRICT}),
        [only(9090)],
    ),
    (
        "strict-root-permissive-workload",
        [peer(STRICT, **MESH)],
        peer(app="a", ports={"9090": PERMISSIVE}),
        but(9090, own=False),
    ),
    (
        "strict-root-unset-workload-port-mtls-strict-and-permissive",
        [peer(STRICT, **MESH)],
        peer(app="a", ports={"9090": PERMISSIVE, "8080": STRICT}),
        but(9090, own=False),
    ),
    ("strict-workload", [], peer(STRICT, app="a"), None),
    ("strict", [], peer(STRICT), None),
    ("unset-port-mtls-strict", [], peer(UNSET, app="a", ports={"8080": STRICT}), [only(8080)]),
    ("reference 5.8: none for one in the root namespace", [], peer(app="a", namespace=ROOT, ports={"1": STRICT}), None),
    ("reference 5.8: none without a selector", [], peer(ports={"1": STRICT}), None),
    (
        "ours: STRICT beside PERMISSIVE under a STRICT root",
        [peer(STRICT, **MESH)],
        peer(PERMISSIVE, app="a", ports={"9090": STRICT}),
        [only(9090)],
    ),
    (
        "ours: an exception where the namespace is UNSET",
        [peer(STRICT, **MESH), peer(UNSET, **SPACE)],
        peer(app="a", ports={"9090": PERMISSIVE}),
        but(9090, own=False),
    ),
]


class World:
    """A Mesh, fed with objects, and all records that came out."""

    def __init__(self) -> None:
        self.mesh = Mesh(Cluster(), ROOT)
        self.policies: dict[str, Any] = {}
        self.versions: dict[str, str] = {}
        self.workloads: dict[str, Any] = {}

    def put(self, obj: dict[str, Any], there: bool = True) -> None:
        obj = copy.deepcopy(obj)  # each version is another object, as from the API
        meta = obj["metadata"]
        key = f"{meta['namespace']}/{meta['name']}"
        if obj["kind"] == "Pod":
            self.mesh.pod(key, objects.pod_of(obj) if there else None)
        elif obj["kind"] == "AuthorizationPolicy":
            self.mesh.rulings.authorization_policy(key, objects.authorization_policy_of(obj) if there else None)
        else:
            self.mesh.rulings.peer_authentication(key, objects.peer_authentication_of(obj) if there else None)

    def take(self) -> set[str]:
        """Takes what is due; the names of the workloads whose record was made again."""
        for name, entry in self.mesh.rulings.take().items():
            self.policies.pop(name, None)
            self.versions.pop(name, None)
            if entry is not None:
                assert entry.name == name
                self.versions[name] = entry.version
                self.policies[name] = pb.Authorization.FromString(entry.body)
        made = self.mesh.take()
        for name, entry in made.items():
            self.workloads.pop(name, None)
            if entry is not None:
                self.workloads[name] = workload_pb2.Address.FromString(entry.body).workload
        return {name.rpartition("/Pod/")[2] for name in made}

    def lists(self, name: str, namespace: str = "shop") -> list[str]:
        """What a pod's record lists."""
        return list(self.workloads[f"Kubernetes//Pod/{namespace}/{name}"].authorization_policies)


def world(*things: dict[str, Any]) -> World:
    made = World()
    for each in things:
        made.put(each)
    made.take()
    return made


def pod(name: str, namespace: str = "shop", phase: str = "Running", **labels: str) -> dict[str, Any]:
    return {
        "kind": "Pod",
        "metadata": {"namespace": namespace, "name": name, "uid": name, "labels": labels},
        "spec": {"nodeName": "n", "serviceAccountName": "a"},
        "status": {"phase": phase, "podIPs": [{"ip": "10.0.0.1"}]},
    }


@pytest.mark.parametrize(("others", "ours", "expected"), [case[1:] for case in PEERS], ids=[case[0] for case in PEERS])
def test_records_of_peer_authentications(
    others: list[dict[str, Any]], ours: dict[str, Any], expected: list[list[list[dict[str, Any]]]] | None
) -> None:
    for things in ([*others, ours], [ours, *others]):
        made = world(*things)
        static = made.policies.pop(STATIC)
        assert shape(static) == [[[NOBODY]]]
        records = [static]
        if expected is None:
            assert not made.policies
        else:
            [(name, record)] = made.policies.items()
            assert name == "shop/converted_peer_authentication_p" and shape(record) == expected
            records.append(record)
        assert all((each.scope, each.action) == (pb.WORKLOAD_SELECTOR, pb.DENY) for each in records)


OWN = "shop/converted_peer_authentication_p"
# (where it is from, policies, what pod `a` lists, what pod `b` lists)
LISTED: list[tuple[str, list[dict[str, Any]], list[str], list[str]]] = [
    ("no policy at all", [], [], []),
    ("ambientindex_test.go: a PERMISSIVE root", [peer(PERMISSIVE, **MESH)], [], []),
    (
        "ambientindex_test.go: STRICT for the namespace under it",
        [peer(PERMISSIVE, **MESH), peer(STRICT, **SPACE)],
        [STATIC],
        [STATIC],
    ),
    ("ambientindex_test.go: STRICT for a workload", [peer(STRICT, app="a")], [STATIC], []),
    (
        "ambientindex_test.go: PERMISSIVE for a workload in a STRICT namespace",
        [peer(STRICT, **SPACE), peer(PERMISSIVE, app="a")],
        [],
        [STATIC],
    ),
    (
        "ambientindex_test.go: PERMISSIVE with a STRICT port in a STRICT namespace",
        [peer(STRICT, **SPACE), peer(PERMISSIVE, app="a", ports={"9090": STRICT})],
        [OWN],
        [STATIC],
    ),
    (
        "ambientindex_test.go: a selector in the root namespace does nothing",
        [peer(STRICT, name="x", namespace=ROOT, app="a")],
        [],
        [],
    ),
    (
        "ambientindex_test.go: PERMISSIVE with a PERMISSIVE port says nothing",
        [peer(PERMISSIVE, app="a", ports={"9090": PERMISSIVE})],
        [],
        [],
    ),
    (
        "ambientindex_test.go: STRICT with a PERMISSIVE port: its own instead of the common one",
        [peer(STRICT, app="a", ports={"9090": PERMISSIVE})],
        [OWN],
        [],
    ),
    ("authorization.go: STRICT with STRICT ports", [peer(STRICT, app="a", ports={"9090": STRICT})], [STATIC], []),
    ("authorization.go: UNSET asks the root", [peer(STRICT, **MESH), peer(UNSET, **SPACE)], [STATIC], [STATIC]),
    ("authorization.go: DISABLE acts as PERMISSIVE", [peer(STRICT, **MESH), peer(DISABLE, **SPACE)], [], []),
    (
        "authorization.go: UNSET with a PERMISSIVE port under STRICT",
        [peer(STRICT, **MESH), peer(app="a", ports={"9090": PERMISSIVE})],
        [OWN],
        [STATIC],
    ),
    (
        "authorization.go: UNSET with a DISABLE port under STRICT makes no exception",
        [peer(STRICT, **MESH), peer(app="a", ports={"9090": DISABLE})],
        [STATIC],
        [STATIC],
    ),
    (
        "authorization.go: STRICT with a DISABLE port makes one",
        [peer(STRICT, app="a", ports={"9090": DISABLE})],
        [OWN],
        [],
    ),
    (
        "authorization.go: UNSET with a STRICT port under PERMISSIVE",
        [peer(app="a", ports={"9090": STRICT})],
        [OWN],
        [],
    ),
    (
        "authorization.go: of two the oldest",
        [
            peer(PERMISSIVE, name="young", creationTimestamp="2026-01-02T00:00:00Z"),
            peer(STRICT, name="old", creationTimestamp="2026-01-01T00:00:00Z"),
        ],
        [STATIC],
        [STATIC],
    ),
    (
        "authorization.go: of two that select the oldest",
        [
            peer(STRICT, name="young", app="a", creationTimestamp="2026-01-02T00:00:00Z"),
            peer(PERMISSIVE, name="old", app="a", creationTimestamp="2026-01-01T00:00:00Z"),
        ],
        [],
        [],
    ),
    (
        "an empty selector selects the namespace",
        [peer(STRICT) | {"spec": {"mtls": {"mode": STRICT}, "selector": {}}}],
        [STATIC],
        [STATIC],
    ),
    (
        "workloads.go: AuthorizationPolicies sorted, then the PeerAuthentication's",
        [
            peer(STRICT),
            authorization({"selector": {"matchLabels": {"app": "a"}}}, name="z"),
            authorization({"selector": {"matchLabels": {"app": "a"}}}, name="y"),
            authorization({"selector": {"matchLabels": {"app": "a"}}}, name="x", namespace=ROOT),
            authorization({"selector": {"matchLabels": {"app": "a"}}}, name="w", namespace="other"),
            authorization({"selector": {"matchLabels": {"app": "a", "v": "1"}}}, name="v"),
            authorization({}, name="u"),
        ],
        [f"{ROOT}/x", "shop/y", "shop/z", STATIC],
        [STATIC],
    ),
    (
        "policies.go: one that is not sent is not listed",
        [authorization({"action": "AUDIT", "selector": {"matchLabels": {"app": "a"}}})],
        [],
        [],
    ),
]


@pytest.mark.parametrize(("things", "a", "b"), [case[1:] for case in LISTED], ids=[case[0] for case in LISTED])
def test_what_a_workload_lists(things: list[dict[str, Any]], a: list[str], b: list[str]) -> None:
    pods = [pod("a", app="a", tier="x"), pod("b", app="b")]
    for order in ([*pods, *things], [*things, *pods], [*reversed(things), *pods]):
        made = world(*order)
        assert (made.lists("a"), made.lists("b")) == (a, b)


def test_disable_and_what_cannot_be_are_said() -> None:
    made = world(
        peer(DISABLE, name="one"),
        peer(app="a", ports={"9090": DISABLE}, name="two"),
        peer(STRICT, app="a", namespace=ROOT, name="three"),
        peer(STRICT, ports={"1": PERMISSIVE}, name="four", namespace="x"),
        peer(STRICT, name="five", namespace="y"),
    )
    said = {each["name"]: each for each in made.mesh.rulings.report()}
    assert "DISABLE acts as PERMISSIVE" in said["one"]["message"] and said["one"]["action"] == DISABLE
    assert "portLevelMtls.9090.mode" in said["two"]["message"] and "no exception" in said["two"]["message"]
    assert "spec.selector" in said["three"]["message"] and "spec.portLevelMtls" in said["four"]["message"]
    assert [said[name]["accepted"] for name in ("one", "two", "three", "four", "five")] == [False] * 4 + [True]
    assert all(each["reason"] == "UnsupportedValue" for each in said.values() if not each["accepted"])
    assert made.mesh.rulings.tally() == {"true": 1, "false": 4}
    assert said["five"]["message"] == "accepted" and said["five"]["kind"] == "PeerAuthentication"


def test_who_is_hidden_by_an_older_one_is_told() -> None:
    made = world(
        peer(STRICT, name="wide", creationTimestamp="2026-01-03T00:00:00Z"),
        peer(PERMISSIVE, name="older", creationTimestamp="2026-01-02T00:00:00Z"),
        peer(STRICT, name="own", app="a", creationTimestamp="2026-01-01T00:00:00Z"),
        peer(STRICT, name="other", app="b", creationTimestamp="2026-01-04T00:00:00Z"),
        peer(DISABLE, name="same", app="a", creationTimestamp="2026-01-01T00:00:00Z"),
        peer(STRICT, name="elsewhere", namespace="other", creationTimestamp="2026-01-05T00:00:00Z"),
    )

    def said() -> dict[str, str]:
        return {each["name"]: each["message"] for each in made.mesh.rulings.report() if not each["accepted"]}

    assert said().keys() == {"wide", "same"}
    assert said()["wide"] == "NOT ENFORCED: shop/older is older, and selects the same"
    assert said()["same"].startswith("NOT ENFORCED: shop/own is older") and "DISABLE acts" in said()["same"]
    reasons = {each["reason"] for each in made.mesh.rulings.report()}
    assert reasons == {"Accepted", "Overridden"}
    made.mesh.rulings.changed.clear()
    made.put(peer(PERMISSIVE, name="older", creationTimestamp="2026-01-02T00:00:00Z"), there=False)
    assert said().keys() == {"same"} and ("PeerAuthentication", "shop/wide") in made.mesh.rulings.changed


# (changes to the spec of one that selects app=a, the field, can the selector be read)
BAD: list[tuple[Any, str, bool]] = [
    ({"mtls": "STRICT"}, "spec.mtls", True),
    ({"mtls": {"mode": "strict"}}, "spec.mtls.mode", True),
    ({"mtls": {"mode": "MUTUAL"}}, "spec.mtls.mode", True),
    ({"mtls": {"mode": 3}}, "spec.mtls.mode", True),
    ({"mtls": {"mood": "STRICT"}}, "spec.mtls.mood", True),
    ({"mtl": {}}, "spec.mtl", True),
    ({"portLevelMtls": []}, "spec.portLevelMtls", True),
    ({"portLevelMtls": {"http": {"mode": "STRICT"}}}, "spec.portLevelMtls.http", True),
    ({"portLevelMtls": {"0": {"mode": "STRICT"}}}, "spec.portLevelMtls.0", True),
    ({"portLevelMtls": {"70000": {"mode": "STRICT"}}}, "spec.portLevelMtls.70000", True),
    ({"portLevelMtls": {"80": "STRICT"}}, "spec.portLevelMtls.80", True),
    ({"portLevelMtls": {"80": {"mode": "x"}}}, "spec.portLevelMtls.80.mode", True),
    ({"selector": "app=a"}, "spec.selector", False),
    ({"selector": {"matchLabels": []}}, "spec.selector.matchLabels", False),
    ({"selector": {"matchLabels": {"app": 7}}}, "spec.selector.matchLabels.app", False),
    ({"selector": {"matchExpressions": []}}, "spec.selector.matchExpressions", False),
]


@pytest.mark.parametrize(("change", "field", "selects"), BAD, ids=[case[1] for case in BAD])
def test_a_peer_authentication_that_cannot_be_read(change: dict[str, Any], field: str, selects: bool) -> None:
    pods = [pod("a", app="a"), pod("b", app="b"), pod("c", "other", app="a")]
    spec = {"selector": {"matchLabels": {"app": "a"}}, "mtls": {"mode": PERMISSIVE}}
    bad = peer() | {"spec": spec | change}
    made = world(*pods, bad, peer(PERMISSIVE, **SPACE, creationTimestamp="2020-01-01T00:00:00Z"))
    assert made.lists("a") == [STATIC] and made.lists("b") == ([] if selects else [STATIC])
    assert made.lists("c", "other") == []
    [said] = [each for each in made.mesh.rulings.report() if each["name"] == "p"]
    assert (said["accepted"], said["reason"]) == (False, "Invalid") and f"{field}: " in said["message"]

    good = peer(app="a", mode=PERMISSIVE, ports={"9090": STRICT})
    kept = world(*pods, good)
    kept.put(bad)
    kept.take()
    assert kept.lists("a") == [OWN] and kept.lists("b") == [] and shape(kept.policies[OWN]) == [only(9090)]
    [said] = kept.mesh.rulings.report()
    assert said["reason"] == "Invalid" and "stays in force" in said["message"] and f"{field}: " in said["message"]
    kept.put(bad, there=False)
    kept.put(bad)
    kept.take()
    assert kept.lists("a") == [STATIC]  # the object is another one: nothing is remembered

    root = world(*pods, bad | {"metadata": bad["metadata"] | {"namespace": ROOT}})
    assert [root.lists("a"), root.lists("b"), root.lists("c", "other")] == [[], [], []]  # it selects: nothing


def test_no_input_is_too_strange() -> None:
    choose = random.Random(13)

    def anything(depth: int = 0) -> Any:
        words = ["a", "", "80", "0", "STRICT", "DISABLE", None, True, 80, 1.5]
        if depth > 3 or choose.random() < 0.4:
            return choose.choice(words)
        if choose.random() < 0.2:
            return [anything(depth + 1) for _ in range(choose.randrange(3))]
        keys = ["mtls", "mode", "portLevelMtls", "selector", "matchLabels", "80", "app", "\u0663"]
        return {choose.choice(keys): anything(depth + 1) for _ in range(choose.randrange(4))}

    reasons = set()
    for _ in range(10_000):
        spec = anything()
        if choose.random() < 0.5:
            spec = {"mtls": {"mode": choose.choice([*peers.MODES, "x"])}, "portLevelMtls": anything()}
        made = world(pod("a", app="a"), peer() | {"spec": spec})
        [said] = made.mesh.rulings.report()
        reasons.add(said["reason"])
        assert said["accepted"] is not bool(said["not_enforced"])
        if said["reason"] == "Invalid" and said["scope"] == "NAMESPACE":
            assert made.lists("a") == [STATIC]  # what cannot be read is STRICT
    assert len(reasons) == 3


def test_a_bad_mode_for_a_namespace_and_for_the_mesh_is_strict() -> None:
    pods = [pod("a", app="a"), pod("c", "other", app="a")]
    space = world(*pods, peer("X"))
    assert (space.lists("a"), space.lists("c", "other")) == ([STATIC], [])
    mesh = world(*pods, peer("X", namespace=ROOT))
    assert (mesh.lists("a"), mesh.lists("c", "other")) == ([STATIC], [STATIC])


def test_a_deny_that_cannot_be_read_keeps_its_last_version() -> None:
    good = authorization({"action": "DENY", "selector": {"matchLabels": {"app": "a"}}, "rules": [{}]})
    bad = copy.deepcopy(good)
    bad["spec"] |= {"selector": {"matchLabels": {"app": "b"}}, "rules": [{"to": [{"operation": {"ports": ["x"]}}]}]}
    made = world(pod("a", app="a"), pod("b", app="b"), good)
    made.put(bad)
    assert made.take() == set() and made.lists("a") == ["shop/p"] and made.lists("b") == []
    bad["metadata"]["uid"] = "another"  # deleted and made again, seen as one change
    made.put(bad)
    made.take()
    assert made.lists("a") == [] and made.lists("b") == ["shop/p"] and shape(made.policies["shop/p"]) == [[]]
    fine = copy.deepcopy(bad)
    fine["spec"]["rules"] = [{"to": [{"operation": {"ports": ["80"]}}]}]
    made.put(fine)
    assert made.take() == set() and shape(made.policies["shop/p"]) == [[[{"destination_ports": [80]}]]]
    assert made.mesh.rulings.report()[0]["accepted"]


def test_what_stands_in_is_recalled_for_the_same_object_only() -> None:
    app = {"selector": {"matchLabels": {"app": "a"}}}
    things = [
        authorization({"action": "DENY", "rules": [{"to": [{"operation": {"ports": ["80"]}}]}]} | app, name="deny"),
        authorization({"rules": [{}]} | app, name="allow"),
        peer(PERMISSIVE, app="a", name="peer"),
        authorization({"rules": [{}]} | app, name="fine"),
    ]
    bad = copy.deepcopy(things[:3])
    bad[0]["spec"]["rules"] = bad[1]["spec"]["rules"] = [7]
    bad[2]["spec"]["mtls"] = 7
    made = world(pod("a", app="a"), *things)
    assert made.mesh.rulings.kept() == {}
    for each in bad:
        made.put(each)
    made.take()
    kept = made.mesh.rulings.kept()
    assert {name for _, name in kept} == {"shop/deny", "shop/allow", "shop/peer"}

    fresh = World()
    fresh.mesh.rulings.recall(kept)
    for each in (pod("a", app="a"), *bad, things[3]):
        fresh.put(each)
    fresh.take()
    assert (fresh.policies, fresh.workloads) == (made.policies, made.workloads)
    assert fresh.mesh.rulings.report() == made.mesh.rulings.report() and fresh.mesh.rulings.kept() == kept
    for each in things:
        fresh.put(each)
    assert fresh.mesh.rulings.kept() == {}

    others = World()
    others.mesh.rulings.recall(kept)
    for each in bad:
        others.put(each | {"metadata": each["metadata"] | {"uid": "another"}})
    others.take()
    assert shape(others.policies["shop/deny"]) == [[]] and others.mesh.rulings.kept() == {}


def test_what_was_read_and_is_not_enforced_ends_what_was() -> None:
    rules = {"rules": [{"to": [{"operation": {"ports": ["80"]}}]}]}
    made = world(authorization(rules | {"action": "DENY"}))
    made.put(authorization(rules | {"action": "AUDIT"}))
    made.put(authorization(rules | {"action": "DENNY"}))
    made.take()
    assert shape(made.policies["shop/p"]) == [[]]


def test_one_bad_object_hurts_no_other() -> None:
    selector = {"matchLabels": {"app": "a"}}
    made = world(
        pod("a", app="a"),
        authorization({"selector": selector, "rules": [{"from": 7}]}, name="bad1"),
        authorization(7, name="bad2", namespace="other"),
        authorization({"selector": selector, "rules": [{}]}, name="good"),
    )
    assert made.lists("a") == ["shop/bad1", "shop/good"]
    assert {"shop/bad1", "other/bad2", "shop/good"} == made.policies.keys()


def test_a_change_touches_only_who_lists_it() -> None:
    pods = [pod(f"{space}{number}", space, app=f"{number % 4}") for space in ("s", "t") for number in range(8)]
    made = world(*pods, *(authorization({"selector": {"matchLabels": {"app": "9"}}}, name=f"n{i}") for i in range(5)))
    select = authorization({"selector": {"matchLabels": {"app": "1"}}, "rules": [{}]}, namespace="s")
    made.put(select)
    assert made.take() == {"s/s1", "s/s5"}
    changed = copy.deepcopy(select)
    changed["spec"]["rules"] = []
    made.put(changed)
    assert made.take() == set()  # its content is not in their records
    changed["spec"]["selector"]["matchLabels"]["app"] = "2"
    made.put(copy.deepcopy(changed))
    assert made.take() == {"s/s1", "s/s5", "s/s2", "s/s6"}
    made.put(peer(STRICT, namespace="t"))
    assert made.take() == {f"t/t{number}" for number in range(8)}
    made.put(peer(STRICT, namespace="t", name="younger"))
    assert made.take() == set()
    made.put(peer(PERMISSIVE, namespace=ROOT))
    assert made.take() == set()
    made.put(authorization({"selector": {"matchLabels": {"app": "3"}}}, namespace=ROOT))
    assert made.take() == {"s/s3", "s/s7", "t/t3", "t/t7"}
    status = copy.deepcopy(changed) | {"status": {"conditions": [{"type": "ZtunnelAccepted", "status": "True"}]}}
    made.put(status)
    assert made.take() == set() and not made.mesh.rulings.take()


def test_what_is_reported() -> None:
    made = world(
        pod("a", app="a"),
        pod("b", app="b"),
        pod("c", "other", app="a"),
        pod("ended", phase="Succeeded", app="a"),
        authorization({"action": "DENY", "rules": [{}], "selector": {"matchLabels": {"app": "a"}}}, name="one"),
        authorization({}, name="two", annotations={"istio.io/dry-run": "true"}),
        authorization({}, name="three", namespace=ROOT),
        authorization({"selector": {"matchLabels": {"app": "a"}}}, name="four", namespace=ROOT),
        authorization({"rules": [{"to": [{"operation": {"methods": ["GET"]}}]}]}, name="five"),
        authorization({"action": "AUDIT"}, name="six"),
        peer(STRICT, name="seven", app="a"),
    )
    said = {each["name"]: each for each in made.mesh.rulings.report()}
    assert {name: each["selects"] for name, each in said.items()} == {
        "one": 1, "two": 2, "three": 3, "four": 2, "five": 2, "six": 0, "seven": 1
    }  # fmt: skip
    assert said["one"] == {
        "kind": "AuthorizationPolicy",
        "namespace": "shop",
        "name": "one",
        "action": "DENY",
        "scope": "WORKLOAD_SELECTOR",
        "dry_run": False,
        "accepted": True,
        "reason": "Accepted",
        "message": "accepted",
        "not_enforced": [],
        "selects": 1,
        "records": {"shop/one": made.versions["shop/one"]},
        "rules": [0],
    }
    assert said["two"]["dry_run"] and said["two"]["scope"] == "NAMESPACE" and said["three"]["scope"] == "GLOBAL"
    assert not said["five"]["accepted"] and len(said["five"]["not_enforced"]) == 1
    assert not said["six"]["accepted"] and said["six"]["not_enforced"]


def test_the_records_that_stand_for_a_policy() -> None:
    """Which an engine has to hold, by the versions that are served."""
    made = world(
        authorization({"action": "AUDIT"}, name="none"),
        authorization({"rules": [{"to": [{"operation": {"methods": ["GET"]}}]}]}, name="part"),
        peer(STRICT, name="common"),
        peer(STRICT, name="own", app="a", ports={"80": PERMISSIVE}),
        peer(PERMISSIVE, name="port", app="b", ports={"80": STRICT}),
        peer(PERMISSIVE, name="lax", app="c"),
        peer(UNSET, name="unset", namespace="other"),
    )
    said = {each["name"]: each["records"] for each in made.mesh.rulings.report()}
    own, port = "shop/converted_peer_authentication_own", "shop/converted_peer_authentication_port"
    names = {
        "none": [],
        "part": ["shop/part"],
        "common": [STATIC],
        "own": [STATIC, own],
        "port": [port],
        "lax": [],
        "unset": [],
    }
    assert said == {name: {each: made.versions[each] for each in records} for name, records in names.items()}
    assert {name for records in said.values() for name in records} == made.policies.keys()
    made.put(peer(STRICT, name="own", app="a", ports={"81": PERMISSIVE}))
    made.take()
    [again] = [each["records"] for each in made.mesh.rulings.report() if each["name"] == "own"]
    assert again == {each: made.versions[each] for each in (STATIC, own)} and again[own] != said["own"][own]


# -- properties ------------------------------------------------------------------------------------------------------

APPS = ["a", "b"]


def some_peer(choose: random.Random) -> dict[str, Any]:
    ports = None
    if choose.random() < 0.6:
        ports = {port: choose.choice(peers.MODES) for port in choose.sample(["80", "81"], choose.randrange(1, 3))}
    return peer(
        choose.choice([None, *peers.MODES]),
        name=f"p{choose.randrange(3)}",
        namespace=choose.choice(["shop", "shop", ROOT]),
        ports=ports,
        app=choose.choice(["", *APPS]),
        creationTimestamp=f"2026-01-0{choose.randrange(1, 4)}T00:00:00Z",
    )


def mode_of(found: list[dict[str, Any]], app: str, port: str) -> str:
    """What holds for a port, read from the objects in the plainest way."""

    def oldest(some: list[dict[str, Any]]) -> dict[str, Any] | None:
        return min(
            some, key=lambda each: (each["metadata"]["creationTimestamp"], each["metadata"]["name"]), default=None
        )

    def wide(namespace: str) -> dict[str, Any] | None:
        return oldest([e for e in found if e["metadata"]["namespace"] == namespace and "selector" not in e["spec"]])

    def word(each: dict[str, Any] | None) -> str:
        said = str(each["spec"].get("mtls", {}).get("mode", UNSET)) if each is not None else UNSET
        return PERMISSIVE if said == DISABLE else said

    label = {"matchLabels": {"app": app}}
    own = oldest([e for e in found if e["metadata"]["namespace"] == "shop" and e["spec"].get("selector") == label])
    inherited = next((word(each) for each in (wide("shop"), wide(ROOT)) if word(each) != UNSET), PERMISSIVE)
    base = word(own) if word(own) != UNSET else inherited
    ports = {number: each["mode"] for number, each in (own["spec"].get("portLevelMtls", {}) if own else {}).items()}
    mode = str(ports.get(port, UNSET))
    if mode == DISABLE and own is not None and word(own) == UNSET and PERMISSIVE not in ports.values():
        mode = UNSET  # upstream's way, see reference 5.8
    return base if mode == UNSET else PERMISSIVE if mode == DISABLE else mode


def denies_nobody(record: pb.Authorization, port: int) -> bool:
    """Whether a record denies who has no identity at a port."""

    def matches(match: pb.Match) -> bool:
        if not match.ByteSize():
            return False
        if match.destination_ports and port not in match.destination_ports:
            return False
        return port not in match.not_destination_ports

    return any(all(any(matches(match) for match in clause.matches) for clause in rule.clauses) for rule in record.rules)


def test_peer_authentications_mean_what_they_say() -> None:
    choose = random.Random(3)
    seen = set()
    for _ in range(4000):
        made = World()
        for app in APPS:
            made.put(pod(app, app=app))
        now: dict[tuple[str, str], dict[str, Any]] = {}
        for _ in range(choose.randrange(1, 7)):
            each = some_peer(choose)
            made.put(each)
            now[each["metadata"]["namespace"], each["metadata"]["name"]] = each
            if choose.random() < 0.3:
                made.take()
        made.take()
        for app in APPS:
            listed = [made.policies[name] for name in made.lists(app)]  # what is listed is there
            for port in ("80", "81", "82"):
                expected = mode_of(list(now.values()), app, port)
                seen.add((expected, len(listed)))
                assert any(denies_nobody(each, int(port)) for each in listed) is (expected == STRICT), (app, port, now)
    assert {mode for mode, _ in seen} == {STRICT, PERMISSIVE}


def some_policy(choose: random.Random) -> dict[str, Any]:
    labels = dict(choose.sample([("app", "a"), ("app", "b"), ("v", "1")], choose.randrange(3)))
    spec: dict[str, Any] = {"action": choose.choice(["ALLOW", "DENY", "AUDIT", "DENNY"])}
    if labels:
        spec["selector"] = {"matchLabels": labels}
    ports = choose.choice([["80"], ["81"], ["x"]])
    spec["rules"] = [{"to": [{"operation": {"ports": ports}}]}]
    return authorization(spec, name=f"a{choose.randrange(4)}", namespace=choose.choice(["shop", "other", ROOT]))


def test_changes_in_any_order_end_as_a_fresh_start() -> None:
    """But for what is remembered of objects that cannot be read: those are made anew here each time they change."""
    choose = random.Random(5)
    for _ in range(600):
        made = World()
        now: dict[tuple[str, str, str], dict[str, Any]] = {}
        for step in range(choose.randrange(1, 40)):
            space = choose.choice(["shop", "other", ROOT])
            labels = {"app": choose.choice(APPS)} | choose.choice([{}, {"v": "1"}])
            each = choose.choice(
                [
                    some_peer(choose),
                    some_policy(choose),
                    pod(f"w{choose.randrange(5)}", space, choose.choice(["Running", "Succeeded"]), **labels),
                ]
            )
            meta = each["metadata"]
            meta["uid"] = str(step)
            there = choose.random() < 0.75
            made.put(copy.deepcopy(each), there)
            key = each["kind"], meta["namespace"], meta["name"]
            now.pop(key, None)
            if there:
                now[key] = each
            if choose.random() < 0.4:
                made.take()
        made.take()
        fresh = World()
        things = list(now.values())
        choose.shuffle(things)
        for each in things:
            fresh.put(each)
        fresh.take()
        assert made.policies == fresh.policies and made.workloads == fresh.workloads
        assert made.mesh.rulings.report() == fresh.mesh.rulings.report()
        listed = {name for each in made.workloads.values() for name in each.authorization_policies}
        assert listed <= made.policies.keys()


def test_labels_that_come_and_go_leave_nothing_behind() -> None:
    made = Rulings(ROOT)
    for number in range(50):
        one = objects.pod_of(pod("a", app=f"{number}"))
        two = objects.pod_of(pod("a", app=f"{number + 1}"))
        made.pod("shop/a", None if number == 0 else one, two)
    made.pod("shop/a", two, None)
    for number in range(50):
        spec = {"selector": {"matchLabels": {"app": f"{number}"}}}
        made.authorization_policy("shop/p", objects.authorization_policy_of(authorization(spec)))
        made.peer_authentication("shop/q", objects.peer_authentication_of(peer(STRICT, app=f"{number}")))
    made.authorization_policy("shop/p", None)
    made.peer_authentication("shop/q", None)
    made.take()
    made.take_pods()
    empty = Rulings(ROOT)
    for name in vars(empty):
        if name not in ("changed", "_parents"):
            assert vars(made)[name] == vars(empty)[name], name


def test_a_large_mesh(capsys: pytest.CaptureFixture[str]) -> None:
    """100 000 workloads, 1 000 policies: how long, for people; that it is right is asserted elsewhere."""
    made = Mesh(Cluster(), ROOT)
    spaces, apps = 100, 20
    for number in range(100_000):
        space, app = f"s{number % spaces}", f"a{number // spaces % apps}"
        key = f"{space}/p{number}"
        labels = {"app": app, "version": "v1", "pod-template-hash": f"h{number % (spaces * apps)}"}
        obj = pod(f"p{number}", space, **labels)
        obj["status"]["podIPs"] = [{"ip": f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"}]
        made.pod(key, objects.pod_of(obj))
    rule = {"from": [{"source": {"namespaces": ["x"], "ipBlocks": ["192.0.2.0/24"]}}]}
    start = time.perf_counter()
    for number in range(1000):
        selector = {"matchLabels": {"app": f"a{number % apps}"}}
        space = f"s{number % spaces}" if number % 10 else ROOT
        obj = authorization(
            {"action": "DENY", "selector": selector, "rules": [rule]}, name=f"p{number}", namespace=space
        )
        made.rulings.authorization_policy(f"{space}/p{number}", objects.authorization_policy_of(obj))
    made.rulings.peer_authentication("s1/default", objects.peer_authentication_of(peer(STRICT, namespace="s1")))
    policies = made.rulings.take()
    between = time.perf_counter()
    records = made.take()
    done = time.perf_counter()
    obj = authorization({"action": "DENY", "selector": {"matchLabels": {"app": "a1"}}}, name="new", namespace="s1")
    made.rulings.authorization_policy("s1/new", objects.authorization_policy_of(obj))
    made.rulings.take()
    changed = made.take()
    one = time.perf_counter()
    made.rulings.authorization_policy(f"{ROOT}/new", objects.authorization_policy_of(obj))
    everywhere = made.take()
    two = time.perf_counter()
    made.rulings.report()
    three = time.perf_counter()
    assert len(policies) == 1001 and len(records) == 100_000 and 0 < len(changed) < 1000 < len(everywhere)
    with capsys.disabled():
        print(
            f"\n1 000 policies {between - start:.2f} s, 100 000 records {done - between:.2f} s, one more policy with "
            f"{len(changed)} workloads {(one - done) * 1e3:.1f} ms, one of the root namespace with {len(everywhere)} "
            f"{(two - one) * 1e3:.0f} ms, /status {(three - two) * 1e3:.0f} ms"
        )


def test_selectors_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a group lists is worked out once, however many pods it has."""
    made = World()
    asked: list[Labels] = []
    names = Rulings._names

    def counted(self: Rulings, space: str, labels: Labels) -> tuple[str, ...]:
        asked.append(labels)
        return names(self, space, labels)

    monkeypatch.setattr(Rulings, "_names", counted)
    for number in range(100):
        made.put(pod(f"p{number}", app=f"{number % 3}"))
    made.put(authorization({"selector": {"matchLabels": {"app": "1"}}}))
    made.take()
    assert len(asked) == 3
