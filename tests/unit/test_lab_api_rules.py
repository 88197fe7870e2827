"""The lab API's pure parts: patches, selectors, addresses, tokens, shapes, rolling updates, watches' backlog."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestep.lab.api import addresses, defaults, fields, patches, selectors
from sidestep.lab.api.errors import ApiError
from sidestep.lab.api.resources import DEPLOYMENT, NAMESPACE, POD, SERVICE
from sidestep.lab.api.store import Store
from sidestep.lab.api.tokens import Reference, TokenError, TokenKey
from sidestep.lab.controllers.deployments import Size, roll

RANGES = addresses.Ranges.parse("10.211.0.0/24", "fd5d:e57e:9:200::/112")


# -- patches -------------------------------------------------------------------------------------------------------


def test_merge_patch_is_rfc_7396() -> None:
    old = {"a": "b", "c": {"d": "e", "f": "g"}, "l": [1, 2]}
    assert patches.merge(old, {"a": "z", "c": {"f": None}, "l": [3]}) == {"a": "z", "c": {"d": "e"}, "l": [3]}
    assert old == {"a": "b", "c": {"d": "e", "f": "g"}, "l": [1, 2]}


def test_strategic_merge_by_key_and_directives() -> None:
    old = {
        "spec": {
            "containers": [{"name": "a", "image": "1", "env": [{"name": "X", "value": "1"}]}, {"name": "b"}],
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}},
        },
        "metadata": {"finalizers": ["x"]},
    }
    patch = {
        "spec": {
            "$setElementOrder/containers": [{"name": "c"}, {"name": "a"}],
            "containers": [
                {"name": "a", "image": "2", "env": [{"name": "Y", "value": "2"}]},
                {"name": "b", "$patch": "delete"},
                {"name": "c"},
            ],
            "strategy": {"$retainKeys": ["type"], "type": "Recreate"},
        },
        "metadata": {"$deleteFromPrimitiveList/finalizers": ["x"], "finalizers": ["y"]},
    }
    assert patches.strategic(old, patch) == {
        "spec": {
            "containers": [
                {"name": "c"},
                {"name": "a", "image": "2", "env": [{"name": "X", "value": "1"}, {"name": "Y", "value": "2"}]},
            ],
            "strategy": {"type": "Recreate"},
        },
        "metadata": {"finalizers": ["y"]},
    }


def test_strategic_ports_of_two_protocols_are_two() -> None:
    old = {"ports": [{"port": 53, "protocol": "UDP", "name": "dns"}]}
    new = patches.strategic(old, {"ports": [{"port": 53, "protocol": "TCP", "name": "dns-tcp"}]})
    assert [port["protocol"] for port in new["ports"]] == ["UDP", "TCP"]


def test_json_patch_operations() -> None:
    old = {"a": [1, 2], "b~/": 1}
    operations = [
        {"op": "test", "path": "/a/0", "value": 1},
        {"op": "add", "path": "/a/-", "value": 3},
        {"op": "remove", "path": "/a/0"},
        {"op": "move", "from": "/b~0~1", "path": "/c"},
        {"op": "replace", "path": "/c", "value": {"d": 1}},
        {"op": "copy", "from": "/c/d", "path": "/c/e"},
    ]
    assert patches.json_patch(old, operations) == {"a": [2, 3], "c": {"d": 1, "e": 1}}
    for bad in (
        [{"op": "test", "path": "/a/0", "value": 9}],
        [{"op": "remove", "path": "/x"}],
        [{"op": "zap", "path": ""}],
    ):
        with pytest.raises(ApiError) as refusal:
            patches.json_patch(old, bad)
        assert refusal.value.code == 422


def test_apply_takes_away_what_is_no_longer_applied_and_leaves_the_rest() -> None:
    before = {"metadata": {"labels": {"a": "1", "b": "2"}}, "spec": {"containers": [{"name": "x"}, {"name": "y"}]}}
    old = {
        "metadata": {"labels": {"a": "1", "b": "2", "theirs": "3"}},
        "spec": {"containers": [{"name": "x", "image": "filled"}, {"name": "y"}, {"name": "injected"}]},
    }
    wanted = {"metadata": {"labels": {"a": "9"}}, "spec": {"containers": [{"name": "x"}]}}
    assert patches.apply(old, wanted, before) == {
        "metadata": {"labels": {"a": "9", "theirs": "3"}},
        "spec": {"containers": [{"name": "x", "image": "filled"}, {"name": "injected"}]},
    }


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=12,
)


@given(_json, _json)
def test_merge_patch_never_leaves_a_null_it_brought(old: Any, patch: Any) -> None:
    def nulls(value: Any) -> bool:
        return isinstance(value, dict) and any(item is None or nulls(item) for item in value.values())

    result = patches.merge({}, patch) if isinstance(patch, dict) else {}
    assert not nulls(result)
    frozen = json.dumps(old)
    patches.merge(old, patch)
    assert json.dumps(old) == frozen


# -- selectors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "abc"),
        ("app=x", "a"),
        ("app!=x", "bc"),
        ("app in (x, y)", "ab"),
        ("app notin (x),app", "b"),
        ("!app", "c"),
        ("istio.io/mode==ambient", "b"),
    ],
)
def test_label_selectors(text: str, expected: str) -> None:
    labels = {"a": {"app": "x"}, "b": {"app": "y", "istio.io/mode": "ambient"}, "c": None}
    match = selectors.labels(text)
    assert "".join(name for name, have in labels.items() if match({"metadata": {"labels": have}})) == expected


def test_selectors_that_cannot_be_understood_are_refused() -> None:
    bad: list[Callable[[], object]] = [
        lambda: selectors.labels("a=b=c"),
        lambda: selectors.labels("a in b"),
        lambda: selectors.fields(POD, "spec.color=red"),
        lambda: selectors.fields(POD, "spec.nodeName"),
    ]
    for make in bad:
        with pytest.raises(ApiError) as refusal:
            make()
        assert refusal.value.code == 400
    assert selectors.fields(POD, "spec.nodeName=n,status.phase!=Failed")({"spec": {"nodeName": "n"}, "metadata": {}})


# -- shapes --------------------------------------------------------------------------------------------------------


def _pod(**spec: Any) -> dict[str, Any]:
    container = {"name": "c", "command": ["sleep"], **spec.pop("container", {})}
    body = {"metadata": {"name": "p", "namespace": "n"}, "spec": {"containers": [container], **spec}}
    return defaults.fill(POD, {"apiVersion": "v1", "kind": "Pod", **body})


def _fields(kind: Any, obj: dict[str, Any]) -> list[str]:
    return [problem.field for problem in fields.problems_of(kind, obj)]


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"affinity": {}}, "spec.affinity"),
        ({"initContainers": []}, "spec.initContainers"),
        ({"hostNetwork": True}, "spec.hostNetwork"),
        ({"hostPID": True}, "spec.hostPID"),
        ({"dnsPolicy": "None"}, "spec.dnsPolicy"),
        ({"automountServiceAccountToken": True}, "spec.automountServiceAccountToken"),
        ({"securityContext": {"fsGroup": 1}}, "spec.securityContext.fsGroup"),
        ({"volumes": [{"name": "v", "hostPath": {"path": "/"}}]}, "spec.volumes[0].hostPath"),
        (
            {"volumes": [{"name": "v", "projected": {"sources": [{"serviceAccountToken": {"path": "../../x"}}]}}]},
            "spec.volumes[0].projected.sources[0].serviceAccountToken.path",
        ),
        (
            {"volumes": [{"name": "v", "configMap": {"name": "m", "items": [{"key": "k", "path": "/x"}]}}]},
            "spec.volumes[0].configMap.items[0].path",
        ),
        (
            {"container": {"securityContext": {"capabilities": {"add": ["FLY"]}}}},
            "spec.containers[0].securityContext.capabilities.add[0]",
        ),
        ({"nodeSelector": {"a": 1}}, "spec.nodeSelector.a"),
        ({"terminationGracePeriodSeconds": -1}, "spec.terminationGracePeriodSeconds"),
        ({"container": {"livenessProbe": {}}}, "spec.containers[0].livenessProbe"),
        ({"container": {"lifecycle": {}}}, "spec.containers[0].lifecycle"),
        ({"container": {"envFrom": []}}, "spec.containers[0].envFrom"),
        ({"container": {"command": []}}, "spec.containers[0].command"),
        ({"container": {"command": "sleep"}}, "spec.containers[0].command"),
        ({"container": {"resources": {"limits": {}}}}, "spec.containers[0].resources.limits"),
        ({"container": {"securityContext": {"privileged": True}}}, "spec.containers[0].securityContext.privileged"),
        ({"container": {"ports": [{"containerPort": 0}]}}, "spec.containers[0].ports[0].containerPort"),
        ({"container": {"ports": [{"containerPort": 1, "hostPort": 1}]}}, "spec.containers[0].ports[0].hostPort"),
        (
            {"container": {"env": [{"name": "A", "valueFrom": {"secretKeyRef": {}}}]}},
            "spec.containers[0].env[0].valueFrom.secretKeyRef",
        ),
        ({"container": {"readinessProbe": {"grpc": {"port": 1}}}}, "spec.containers[0].readinessProbe.grpc"),
        ({"container": {"readinessProbe": {}}}, "spec.containers[0].readinessProbe"),
        (
            {"container": {"volumeMounts": [{"name": "v", "mountPath": "/v"}]}},
            "spec.containers[0].volumeMounts[0].name",
        ),
        (
            {"container": {"volumeMounts": [{"name": "v", "mountPath": "v"}]}},
            "spec.containers[0].volumeMounts[0].mountPath",
        ),
    ],
)
def test_what_a_pod_may_not_say_is_refused_by_name(spec: dict[str, Any], field: str) -> None:
    assert field in _fields(POD, _pod(**spec))


def test_what_a_pod_may_say() -> None:
    container = {
        "args": ["1"],
        "env": [{"name": "A", "value": "b"}, {"name": "B", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
        "workingDir": "/tmp",
        "ports": [{"name": "http", "containerPort": 80}, {"containerPort": 53, "protocol": "UDP"}],
        "securityContext": {"runAsUser": 1, "runAsGroup": 1, "capabilities": {"add": ["NET_RAW"], "drop": ["ALL"]}},
        "readinessProbe": {"httpGet": {"port": "http"}, "periodSeconds": 1},
        "volumeMounts": [{"name": name, "mountPath": f"/{name}"} for name in "abcd"],
    }
    volumes = [
        {"name": "a", "emptyDir": {}},
        {"name": "b", "configMap": {"name": "x"}},
        {"name": "c", "secret": {"secretName": "x"}},
        {"name": "d", "projected": {"sources": [{"serviceAccountToken": {"path": "t", "audience": "istio-ca"}}]}},
    ]
    pod = _pod(container=container, volumes=volumes, nodeName="node1", restartPolicy="Never", tolerations=[{"a": 1}])
    assert _fields(POD, pod) == []
    mirror = _pod(hostNetwork=True, container={"command": []})
    mirror["metadata"]["annotations"] = {fields.MIRROR: "1"}
    assert _fields(POD, mirror) == []


def test_names_and_labels_have_a_form() -> None:
    pod = _pod()
    pod["metadata"] |= {"name": "../x", "labels": {"a": "b c"}, "colour": 1}
    assert _fields(POD, pod) == ["metadata.name", "metadata.labels.a", "metadata.colour"]
    assert _fields(NAMESPACE, {"metadata": {"name": "a.b"}}) == ["metadata.name"]


def test_a_template_must_carry_what_its_deployment_selects() -> None:
    template = {"metadata": {"labels": {"app": "y"}}, "spec": {"containers": [{"name": "c", "command": ["x"]}]}}
    body = {"metadata": {"name": "d"}, "spec": {"selector": {"matchLabels": {"app": "x"}}, "template": template}}
    assert _fields(DEPLOYMENT, defaults.fill(DEPLOYMENT, body)) == ["spec.template.metadata.labels"]


def test_services_the_lab_cannot_honour() -> None:
    for spec, field in (
        ({"type": "LoadBalancer"}, "spec.type"),
        ({"ports": [{"port": 1, "nodePort": 1}]}, "spec.ports[0].nodePort"),
        ({"ports": [{"port": 1}, {"port": 2}]}, "spec.ports[0].name"),
        ({"ports": []}, "spec.ports"),
        ({"sessionAffinity": "ClientIP"}, "spec.sessionAffinity"),
    ):
        body = {"metadata": {"name": "s"}, "spec": {"ports": [{"port": 80}], **spec}}
        assert field in _fields(SERVICE, defaults.fill(SERVICE, body))


def test_defaults_are_stable() -> None:
    pod = _pod(
        container={"readinessProbe": {"tcpSocket": {"port": 1}}}, volumes=[{"name": "v", "secret": {"secretName": "s"}}]
    )
    assert defaults.fill(POD, pod) == pod


# -- addresses -----------------------------------------------------------------------------------------------------


def test_cluster_addresses() -> None:
    def given_to(spec: dict[str, Any], old: dict[str, Any] | None = None, used: tuple[str, ...] = ()) -> dict[str, Any]:
        result, problems = addresses.assign(spec, old or {}, RANGES, used)
        assert not problems
        return result

    assert given_to({})["clusterIPs"] == ["10.211.0.16"]
    assert given_to({}, used=("10.211.0.16",))["clusterIP"] == "10.211.0.17"
    both = given_to({"ipFamilyPolicy": "PreferDualStack"})
    assert both["clusterIPs"] == ["10.211.0.16", "fd5d:e57e:9:200::10"] and both["ipFamilies"] == ["IPv4", "IPv6"]
    assert given_to({"ipFamilies": ["IPv6"]})["clusterIPs"] == ["fd5d:e57e:9:200::10"]
    assert given_to({"clusterIP": "10.211.0.10"})["clusterIPs"] == ["10.211.0.10"]
    assert given_to({"clusterIP": "None"})["clusterIPs"] == ["None"]
    assert given_to({"ports": []}, both)["clusterIPs"] == both["clusterIPs"]
    assert given_to({"ipFamilyPolicy": "SingleStack"}, both)["clusterIPs"] == ["10.211.0.16"]
    grown = given_to({"ipFamilyPolicy": "RequireDualStack"}, given_to({}))
    assert grown["clusterIPs"] == ["10.211.0.16", "fd5d:e57e:9:200::10"]


def test_cluster_addresses_that_cannot_be_had() -> None:
    for spec, used in (({"clusterIP": "10.9.9.9"}, ()), ({"clusterIP": "10.211.0.10"}, ("10.211.0.10",))):
        _, problems = addresses.assign(spec, {}, RANGES, used)
        assert [problem.field for problem in problems] == ["spec.clusterIPs[0]"]
    _, problems = addresses.assign({"clusterIP": "10.211.0.20"}, {"clusterIP": "10.211.0.10"}, RANGES, ())
    assert [problem.field for problem in problems] == ["spec.clusterIP"]
    everything = [str(RANGES.v4[n]) for n in range(256)]
    _, problems = addresses.assign({}, {}, RANGES, everything)
    assert problems


# -- tokens --------------------------------------------------------------------------------------------------------


def _token(key: TokenKey) -> str:
    pod = Reference("p", "u2")
    return key.sign(
        namespace="n", account=Reference("a", "u1"), pod=pod, node=None, audiences=["istio-ca"], now=1000, seconds=600
    )


def test_a_token_says_what_was_signed() -> None:
    key = TokenKey()
    claims = key.check(_token(key), 1000)
    assert (claims.user, claims.audiences, claims.expires) == ("system:serviceaccount:n:a", ("istio-ca",), 1600)
    assert claims.account == Reference("a", "u1") and claims.pod == Reference("p", "u2") and claims.node is None


def test_tokens_that_are_not_good() -> None:
    key = TokenKey()
    token = _token(key)
    with pytest.raises(TokenError, match="expired"):
        key.check(token, 1600)
    with pytest.raises(TokenError, match="not valid yet"):
        key.check(token, 999)
    with pytest.raises(TokenError, match="signature"):
        TokenKey().check(token, 1000)
    head, body, signature = token.split(".")
    none = "eyJhbGciOiJub25lIiwia2lkIjoibGFiIn0"  # {"alg":"none","kid":"lab"}
    for bad in (f"{none}.{body}.{signature}", f"{none}.{body}.", f"{head}.{body}.", "a.b.c", "", "x" * 20000):
        with pytest.raises(TokenError):
            key.check(bad, 1000)


@given(st.integers(0, 10**6), st.integers(0, 255))
def test_a_changed_token_is_not_good(where: int, byte: int) -> None:
    token = _KEYED[1]
    index = where % len(token)
    changed = token[:index] + chr(byte) + token[index + 1 :]
    if changed != token:
        with pytest.raises(TokenError):
            _KEYED[0].check(changed, 1000)


_KEYED = (lambda key: (key, _token(key)))(TokenKey())


# -- rolling updates -----------------------------------------------------------------------------------------------


@given(
    st.integers(0, 8),
    st.integers(0, 3),
    st.integers(0, 3),
    st.lists(st.integers(0, 5), max_size=3),
    st.integers(0, 8),
    st.randoms(use_true_random=False),
)
def test_a_rolling_update_ends_and_keeps_its_bounds(
    replicas: int, surge: int, unavailable: int, old: list[int], new: int, dice: Any
) -> None:
    """However pods become ready: never more than replicas + surge are wanted (once below), never are ready ones taken
    so that fewer than replicas - unavailable are left, and when all pods become ready it ends with the new set only."""
    new = min(new, replicas)
    ready = [dice.randint(0, size) for size in old]
    new_ready = dice.randint(0, new)
    least = replicas - (unavailable if surge or unavailable else 1)
    for _ in range(60):
        before = sum(ready) + new_ready
        total = new + sum(old)
        sizes = [Size(size, size, up) for size, up in zip(old, ready, strict=True)]
        target, targets = roll(replicas, surge, unavailable, Size(new, new, new_ready), sizes)
        assert target + sum(targets) <= max(replicas + surge, total)
        assert all(0 <= after <= size for after, size in zip(targets, old, strict=True)) and new <= target <= replicas
        ready = [min(up, after) for up, after in zip(ready, targets, strict=True)]
        after_ready = sum(ready) + new_ready
        assert after_ready >= min(before, least)
        old, new = targets, target
        new_ready = new  # every new pod becomes ready
    assert new == replicas and sum(old) == 0


# -- the backlog of watches ----------------------------------------------------------------------------------------


def _object(name: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "n"}}


def test_a_slow_watcher_is_cut_and_the_others_are_not() -> None:
    async def run() -> None:
        store = Store(history=100, backlog=5)
        slow, quick = store.watch(POD, store.revision), store.watch(POD, store.revision)
        for number in range(10):
            store.create(POD, _object(f"p{number}"))
            event = await quick.next()
            assert event is not None and event.new is not None and event.new.name == f"p{number}"
        assert await slow.next() is None and slow.cut and not quick.cut

    asyncio.run(run())


def test_a_watch_from_before_the_history_is_refused() -> None:
    store = Store(history=10, backlog=100)
    first = store.revision
    for number in range(20):
        store.create(POD, _object(f"p{number}"))
    with pytest.raises(ApiError) as refusal:
        store.watch(POD, first)
    assert refusal.value.code == 410
    with pytest.raises(ApiError) as refusal:  # a client of a process before this one
        store.watch(POD, store.revision + 1)
    assert refusal.value.code == 410
    watcher = store.watch(POD, store.revision - 10)
    seen = []
    while (event := watcher.pop()) is not None:
        seen.append(event.revision)
    assert seen == list(range(store.revision - 9, store.revision + 1))


def test_watchers_see_their_kind_only_and_deletions_have_their_own_revision() -> None:
    store = Store()
    watcher = store.watch(POD, store.revision)
    store.create(SERVICE, _object("s"))
    store.create(POD, _object("p"))
    last = store.remove(POD, "n", "p")
    events = [watcher.pop(), watcher.pop(), watcher.pop()]
    assert events[0] is not None and events[1] is not None and events[2] is None
    assert events[1].new is None and events[1].old is last and last.revision > events[0].revision
