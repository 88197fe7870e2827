"""The lab's API over HTTP: who may, what is refused and how, watches, tokens, deletions."""

import asyncio
import io
import json
from typing import Any

import aiohttp
import pytest

from sidestep.lab.api import registry, watches
from sidestep.lab.api.resources import EVENT
from tests.harness.lab_api import ADMIN, GUARD_S, PODS, Api, node, pod, running, with_api

TOKENS = "/api/v1/namespaces/default/serviceaccounts/default/token"
REVIEWS = "/apis/authentication.k8s.io/v1/tokenreviews"


EVENTS = "/api/v1/namespaces/default/events"
POLICIES = "/apis/security.istio.io/v1/namespaces/default/authorizationpolicies"
PEERS = "/apis/security.istio.io/v1/namespaces/default/peerauthentications"


def happening(name: str) -> dict[str, Any]:
    """An Event."""
    about = {"kind": "Pod", "namespace": "default", "name": "p", "apiVersion": "v1"}
    return {"metadata": {"name": name}, "involvedObject": about, "reason": "Failed", "message": "x", "type": "Warning"}


# -- who may -------------------------------------------------------------------------------------------------------


@with_api()
async def test_every_request_but_version_and_health_needs_a_token(api: Api) -> None:
    for path in ("/version", "/healthz", "/livez", "/readyz"):
        async with api.session.get(api.url + path) as answer:
            assert answer.status == 200
    for path in ("/", "/api", "/apis", "/api/v1", "/openapi/v2", "/api/v1/pods", "/nothing", "/version/x"):
        for token in ("", "wrong", ADMIN[:-1], ADMIN + "x", "\u00e9"):
            code, answer = await api.ask("GET", path, token=token)
            assert (code, answer["kind"], answer["reason"]) == (401, "Status", "Unauthorized"), (path, token)
    code, _ = await api.ask("GET", "/api/v1/pods", headers={"Authorization": f"Basic {ADMIN}"})
    assert code == 401


@with_api()
async def test_accounts_may_do_what_their_role_says(api: Api) -> None:
    await api.make("/api/v1/namespaces/default/serviceaccounts", {"metadata": {"name": "agent"}})
    await api.make(PODS, pod())
    tokens = {}
    for name in ("agent", "default"):
        answer = await api.make(f"/api/v1/namespaces/default/serviceaccounts/{name}/token", {"spec": {}})
        tokens[name] = answer["status"]["token"]
    patch = {"metadata": {"annotations": {"a": "b"}}}
    asked: list[tuple[str, str, Any, int, int]] = [
        ("GET", PODS, None, 200, 403),
        ("GET", "/api/v1/namespaces", None, 200, 403),
        ("GET", "/api/v1/secrets", None, 403, 403),
        ("PATCH", f"{PODS}/p", patch, 200, 403),
        ("DELETE", f"{PODS}/p", None, 403, 403),
        ("POST", PODS, pod("q"), 403, 403),
        ("POST", TOKENS, {"spec": {}}, 403, 403),
        ("POST", REVIEWS, {"spec": {"token": "x"}}, 403, 403),
        ("GET", "/api/v1", None, 200, 200),
        ("POST", EVENTS, happening("e"), 201, 403),
        ("PATCH", f"{EVENTS}/e", {"count": 2}, 200, 403),
        ("GET", EVENTS, None, 403, 403),
        ("DELETE", f"{EVENTS}/e", None, 403, 403),
        ("GET", POLICIES, None, 403, 403),
        ("POST", POLICIES, {"metadata": {"name": "p"}, "spec": {}}, 403, 403),
    ]
    for method, path, body, agent, other in asked:
        for name, wanted in (("agent", agent), ("default", other)):
            content = "application/merge-patch+json" if method == "PATCH" else "application/json"
            code, answer = await api.ask(method, path, body, token=tokens[name], content_type=content)
            assert code == wanted, (method, path, name, answer)


# -- tokens --------------------------------------------------------------------------------------------------------


@with_api()
async def test_a_pods_token_is_good_while_the_pod_is_there_and_for_its_audience(api: Api) -> None:
    made = await api.make(PODS, pod())
    await api.make("/api/v1/nodes", node("node1"))
    on_node = await api.make(PODS, pod("q", nodeName="node1"))
    bound = {"kind": "Pod", "apiVersion": "v1", "name": "p", "uid": made["metadata"]["uid"]}
    answer = await api.make(TOKENS, {"spec": {"audiences": ["istio-ca"], "boundObjectRef": bound}})
    token = answer["status"]["token"]

    async def review(audiences: list[str], what: str = token) -> Any:
        return (await api.make(REVIEWS, {"spec": {"token": what, "audiences": audiences}}))["status"]

    good = await review(["other", "istio-ca"])
    assert good["authenticated"] and good["audiences"] == ["istio-ca"]
    assert good["user"]["username"] == "system:serviceaccount:default:default"
    assert "system:serviceaccounts:default" in good["user"]["groups"]
    assert good["user"]["extra"]["authentication.kubernetes.io/pod-name"] == ["p"]
    assert good["user"]["extra"]["authentication.kubernetes.io/pod-uid"] == [made["metadata"]["uid"]]
    for audiences, what in (
        (["other"], token),
        ([], token),
        (["istio-ca"], token[:-8] + "AAAAAAAA"),
        (["istio-ca"], "x"),
    ):
        bad = await review(audiences, what)
        assert not bad["authenticated"] and bad["error"] and "audiences" not in bad
    code, _ = await api.ask("GET", "/api/v1", token=token)
    assert code == 401  # for istio-ca, not for the API

    bound = {"kind": "Pod", "name": "q", "uid": on_node["metadata"]["uid"]}
    other = (await api.make(TOKENS, {"spec": {"audiences": ["istio-ca"], "boundObjectRef": bound}}))["status"]["token"]
    assert (await review(["istio-ca"], other))["user"]["extra"]["authentication.kubernetes.io/node-name"] == ["node1"]

    await api.ask("DELETE", f"{PODS}/p", {"gracePeriodSeconds": 0})
    assert not (await review(["istio-ca"]))["authenticated"]
    await api.make(PODS, pod())  # one of that name again, but another pod
    assert not (await review(["istio-ca"]))["authenticated"]
    assert (await review(["istio-ca"], other))["authenticated"]
    await api.ask("DELETE", "/api/v1/namespaces/default/serviceaccounts/default")
    assert not (await review(["istio-ca"], other))["authenticated"]


@with_api()
async def test_token_requests_that_are_refused(api: Api) -> None:
    await api.make("/api/v1/namespaces/default/serviceaccounts", {"metadata": {"name": "other"}})
    await api.make(PODS, pod(serviceAccountName="other"))
    refused: list[tuple[dict[str, Any], int, str]] = [
        ({"boundObjectRef": {"kind": "Pod", "name": "none"}}, 404, "none"),
        ({"boundObjectRef": {"kind": "Pod", "name": "p", "uid": "x"}}, 409, "UID"),
        ({"boundObjectRef": {"kind": "Pod", "name": "p"}}, 400, "'other'"),
        ({"boundObjectRef": {"kind": "Secret", "name": "p"}}, 422, "spec.boundObjectRef"),
        ({"expirationSeconds": 10}, 422, "spec.expirationSeconds"),
        ({"audiences": "x"}, 422, "spec.audiences"),
    ]
    for spec, wanted, word in refused:
        code, answer = await api.ask("POST", TOKENS, {"spec": spec})
        assert code == wanted and word in answer["message"], answer


# -- what is refused, and how --------------------------------------------------------------------------------------


@with_api()
async def test_refusals_are_one_clear_line(api: Api) -> None:
    await api.make(PODS, pod())
    asked: list[tuple[str, str, Any, int, str]] = [
        ("GET", "/apis/apps/v1/daemonsets", None, 404, "daemonsets.apps"),
        ("GET", "/apis/batch/v1/jobs", None, 404, "jobs.batch"),
        ("GET", f"{PODS}/p/log", None, 405, "sidestep lab logs"),
        ("POST", f"{PODS}/p/exec", {}, 405, "sidestep lab exec"),
        ("PUT", PODS, {}, 405, "PUT of pods"),
        ("POST", f"{PODS}/p", {}, 405, "POST of pods"),
        ("DELETE", f"{PODS}/p/status", None, 405, "pods/status"),
        ("POST", "/apis/apps/v1/namespaces/default/replicasets", {}, 405, "replicasets.apps"),
        ("POST", "/version", {}, 405, "/version"),
        ("DELETE", "/api/v1/namespaces/default", None, 403, "default"),
        ("POST", PODS, {"spec": {}}, 422, "metadata.name"),
        ("POST", PODS, {"metadata": {"name": "x"}}, 422, "spec: Required value"),
        ("POST", PODS, {**pod("x"), "sepc": 1}, 422, "sepc"),
        ("POST", PODS, {**pod("x"), "kind": "Node"}, 400, "'Node'"),
        ("POST", PODS, pod(), 409, '"p" already exists'),
        ("POST", PODS, pod("x", serviceAccountName="nobody"), 403, "default/nobody"),
        ("POST", PODS, [], 400, "object"),
        ("POST", PODS, b"{", 400, "not JSON"),
        ("POST", PODS, b"[" * 100000, 400, "nested"),
        ("POST", "/api/v1/namespaces/none/pods", pod(), 404, '"none"'),
        ("GET", f"{PODS}?labelSelector=a%20b", None, 400, "labelSelector"),
        ("GET", f"{PODS}?fieldSelector=spec.color%3Dred", None, 400, "spec.color"),
        ("GET", f"{PODS}?watch=1&resourceVersion=x", None, 400, "resourceVersion"),
        ("PATCH", f"{PODS}/p", {}, 415, "application/json"),
        ("GET", "/api/v1/configmaps/x", None, 404, "namespace"),
    ]
    for method, path, body, wanted, word in asked:
        code, answer = await api.ask(method, path, body)
        assert code == wanted and answer["code"] == wanted and answer["kind"] == "Status", (method, path, answer)
        assert word in answer["message"] and "\n" not in answer["message"], answer
    code, answer = await api.ask("POST", PODS, b"\x0a", content_type="application/vnd.kubernetes.protobuf")
    assert code == 415
    code, answer = await api.ask("POST", PODS, io.BytesIO(b'"' + b"x" * (4 << 20) + b'"'))
    assert code == 413


@with_api()
async def test_odd_patches_are_refused_and_change_nothing(api: Api) -> None:
    before = await api.make(PODS, pod())
    odd: list[tuple[str, Any]] = [
        ("merge-patch+json", 5),
        ("merge-patch+json", {"metadata": None}),
        ("merge-patch+json", {"metadata": {"labels": "x"}}),
        ("merge-patch+json", {"metadata": {"name": "other"}}),
        ("merge-patch+json", {"metadata": {"resourceVersion": "1"}}),
        ("strategic-merge-patch+json", {"spec": {"containers": 5}}),
        ("strategic-merge-patch+json", {"spec": {"$setElementOrder/containers": 5, "containers": []}}),
        ("strategic-merge-patch+json", {"$patch": "explode"}),
        ("strategic-merge-patch+json", {"$patch": "delete"}),
        ("json-patch+json", {"op": "remove"}),
        ("json-patch+json", [{"op": "remove", "path": "/metadata"}]),
        ("json-patch+json", [{"op": "add", "path": "/spec/containers/9", "value": 1}]),
        ("apply-patch+yaml", {"metadata": {"labels": {"1": 2}}}),
    ]
    for form, patch in odd:
        code, answer = await api.ask("PATCH", f"{PODS}/p", patch, content_type=f"application/{form}")
        assert 400 <= code < 500, (form, patch, answer)
    code, answer = await api.ask(
        "PATCH", f"{PODS}/p", b"metadata: {labels: {1: 2}}", content_type="application/apply-patch+yaml"
    )
    assert code == 422 and "metadata.labels.1" in answer["message"]
    assert (await api.ask("GET", f"{PODS}/p"))[1] == before


# -- writes --------------------------------------------------------------------------------------------------------


@with_api()
async def test_conflicts_and_statuses(api: Api) -> None:
    made = await api.make(PODS, {**pod(), "status": {"phase": "Running"}})
    assert made["status"]["phase"] == "Pending"
    merge = {"content_type": "application/merge-patch+json"}
    code, spec = await api.ask("PATCH", f"{PODS}/p", {"status": {"phase": "Failed"}}, **merge)
    assert code == 200 and spec["status"]["phase"] == "Pending" and spec["metadata"] == made["metadata"]
    change = {"status": {"phase": "Running"}, "metadata": {"annotations": {"k": "v"}}, "spec": {"nodeName": "x"}}
    code, running_ = await api.ask("PATCH", f"{PODS}/p/status", change, **merge)
    assert (
        code == 200 and running_["status"]["phase"] == "Running" and running_["metadata"]["annotations"] == {"k": "v"}
    )
    assert "nodeName" not in running_["spec"]
    code, answer = await api.ask("PUT", f"{PODS}/p", made)
    assert code == 409 and answer["reason"] == "Conflict"
    running_["metadata"]["labels"] = {"a": "b"}
    code, answer = await api.ask("PUT", f"{PODS}/p", running_)
    assert code == 200 and answer["status"]["phase"] == "Running"
    code, again = await api.ask("PUT", f"{PODS}/p", answer)
    assert code == 200 and again == answer  # a write that changes nothing is no new version
    code, answer = await api.ask("PATCH", f"{PODS}/p?dryRun=All", {"metadata": {"labels": {"a": None}}}, **merge)
    assert code == 200 and "a" not in answer["metadata"].get("labels", {})
    assert (await api.ask("GET", f"{PODS}/p"))[1] == again


@with_api()
async def test_a_pod_on_a_node_goes_when_the_node_confirms(api: Api) -> None:
    await api.make("/api/v1/nodes", node("node1"))
    made = await api.make(PODS, pod(nodeName="node1", terminationGracePeriodSeconds=7))
    code, marked = await api.ask("DELETE", f"{PODS}/p")
    assert code == 200 and marked["metadata"]["deletionGracePeriodSeconds"] == 7
    assert (await api.ask("GET", f"{PODS}/p"))[1] == marked
    code, sooner = await api.ask("DELETE", f"{PODS}/p", {"gracePeriodSeconds": 1})
    assert sooner["metadata"]["deletionGracePeriodSeconds"] == 1
    code, later = await api.ask("DELETE", f"{PODS}/p", {"gracePeriodSeconds": 30})
    assert later == sooner
    code, _ = await api.ask("DELETE", f"{PODS}/p", {"gracePeriodSeconds": 0, "preconditions": {"uid": "another"}})
    assert code == 409
    code, _ = await api.ask(
        "DELETE", f"{PODS}/p", {"gracePeriodSeconds": 0, "preconditions": {"uid": made["metadata"]["uid"]}}
    )
    assert code == 200 and (await api.ask("GET", f"{PODS}/p"))[0] == 404


@with_api()
async def test_finalizers_hold_an_object(api: Api) -> None:
    maps = "/api/v1/namespaces/default/configmaps"
    await api.make(maps, {"metadata": {"name": "c", "finalizers": ["example.org/hold"]}})
    await api.ask("DELETE", f"{maps}/c")
    code, held = await api.ask("GET", f"{maps}/c")
    assert code == 200 and held["metadata"]["deletionTimestamp"]
    patch = {"metadata": {"finalizers": None}}
    await api.ask("PATCH", f"{maps}/c", patch, content_type="application/merge-patch+json")
    assert (await api.ask("GET", f"{maps}/c"))[0] == 404


# -- policies and Events --------------------------------------------------------------------------------------------


@with_api()
async def test_policies_have_a_status_of_their_own_and_a_generation(api: Api) -> None:
    merge = {"content_type": "application/merge-patch+json"}
    for path, kind in ((POLICIES, "AuthorizationPolicy"), (PEERS, "PeerAuthentication")):
        made = await api.make(path, {"metadata": {"name": "p"}, "spec": {"odd": [1]}, "status": {"conditions": [1]}})
        assert (made["kind"], made["apiVersion"]) == (kind, "security.istio.io/v1")
        assert made["metadata"]["generation"] == 1 and "status" not in made
        said = {"status": {"conditions": [{"type": "a"}]}, "spec": {"odd": []}}
        code, answer = await api.ask("PATCH", f"{path}/p/status", said, **merge)
        assert code == 200 and answer["status"] == said["status"] and answer["spec"] == {"odd": [1]}
        assert answer["metadata"]["generation"] == 1
        code, answer = await api.ask("PATCH", f"{path}/p", said, **merge)
        assert answer["spec"] == {"odd": []} and answer["metadata"]["generation"] == 2
        assert answer["status"] == said["status"]
        stale = {"metadata": {"resourceVersion": made["metadata"]["resourceVersion"]}, "status": {}}
        code, answer = await api.ask("PATCH", f"{path}/p/status", stale, **merge)
        assert code == 409 and answer["reason"] == "Conflict"
        code, answer = await api.ask("POST", path, {"metadata": {"name": "q"}, "spec": "x"})
        assert code == 422 and "spec" in answer["message"]
        code, answer = await api.ask("POST", path, {"metadata": {"name": "q"}, "spec": {}, "rules": []})
        assert code == 422 and "rules" in answer["message"]


@with_api()
async def test_an_older_version_is_the_same_objects(api: Api) -> None:
    old = POLICIES.replace("/v1/", "/v1beta1/")
    body = {"apiVersion": "security.istio.io/v1beta1", "kind": "AuthorizationPolicy", "metadata": {"name": "p"}}
    made = await api.make(old, body)
    for path, version in ((POLICIES, "security.istio.io/v1"), (old, "security.istio.io/v1beta1")):
        assert (await api.ask("GET", f"{path}/p"))[1] == made | {"apiVersion": version}
        _, listed = await api.ask("GET", path)
        assert {each["apiVersion"] for each in (listed, *listed["items"])} == {version}
    code, answer = await api.ask("PUT", f"{old}/p", made)
    assert code == 200 and answer == made  # the same in both: nothing was changed
    code, answer = await api.ask("POST", POLICIES, body | {"apiVersion": "security.istio.io/v1alpha1"})
    assert code == 400 and "v1alpha1" in answer["message"]
    _, groups = await api.ask("GET", "/apis")
    [found] = [each for each in groups["groups"] if each["name"] == "security.istio.io"]
    assert [each["version"] for each in found["versions"]] == ["v1", "v1beta1"]
    assert found["preferredVersion"]["version"] == "v1"
    assert (await api.ask("GET", "/apis/security.istio.io"))[1]["versions"] == found["versions"]
    for version in ("v1", "v1beta1"):
        _, served = await api.ask("GET", f"/apis/security.istio.io/{version}")
        names = [each["name"] for each in served["resources"]]
        assert names == [
            *("authorizationpolicies", "authorizationpolicies/status"),
            *("peerauthentications", "peerauthentications/status"),
        ]
    assert len({each["name"] for each in groups["groups"]}) == len(groups["groups"])


@with_api()
async def test_policies_are_watched(api: Api) -> None:
    made = await api.make(POLICIES, {"metadata": {"name": "p"}, "spec": {}})
    version = made["metadata"]["resourceVersion"]
    watch = f"{api.url}/apis/security.istio.io/v1/authorizationpolicies?watch=true&resourceVersion={version}"
    async with api.session.get(watch, headers={"Authorization": f"Bearer {ADMIN}"}) as answer:
        await api.make(PEERS, {"metadata": {"name": "other"}, "spec": {}})
        await api.make(POLICIES, {"metadata": {"name": "q"}, "spec": {}})
        await api.ask("DELETE", f"{POLICIES}/p")
        seen = [(each["type"], each["object"]["metadata"]["name"]) for each in await _events(answer, 2)]
    assert seen == [("ADDED", "q"), ("DELETED", "p")]


@with_api()
async def test_of_events_the_newest_are_kept(api: Api) -> None:
    for number in range(registry.EVENTS + 5):
        api.registry.create(EVENT, "default", happening(f"e{number}"))
    _, answer = await api.ask("GET", EVENTS)
    names = {each["metadata"]["name"] for each in answer["items"]}
    assert len(names) == registry.EVENTS and "e4" not in names and {"e5", f"e{registry.EVENTS + 4}"} <= names


# -- watches -------------------------------------------------------------------------------------------------------


async def _events(answer: aiohttp.ClientResponse, count: int) -> list[Any]:
    """The next events of a watch; fewer when it ends."""
    found: list[Any] = []
    async with asyncio.timeout(GUARD_S):
        while len(found) < count and (line := await answer.content.readline()):
            found.append(json.loads(line))
    return found


def _watch(api: Api, query: str) -> Any:
    return api.session.get(f"{api.url}{PODS}?watch=1&{query}", headers={"Authorization": f"Bearer {ADMIN}"})


@with_api()
async def test_a_watch_sees_every_change_in_order_through_its_selectors(api: Api) -> None:
    _, listed = await api.ask("GET", PODS)
    version = listed["metadata"]["resourceVersion"]
    merge = {"content_type": "application/merge-patch+json"}
    async with _watch(api, f"resourceVersion={version}&labelSelector=app%3Dx") as answer:
        await api.make(PODS, pod("other"))
        await api.make(PODS, pod("p"))
        for label in ("x", "x2", "x"):
            await api.ask("PATCH", f"{PODS}/p", {"metadata": {"labels": {"app": label}}}, **merge)
        await api.ask("DELETE", f"{PODS}/p")
        events = await _events(answer, 4)
    assert [event["type"] for event in events] == ["ADDED", "DELETED", "ADDED", "DELETED"]
    revisions = [int(event["object"]["metadata"]["resourceVersion"]) for event in events]
    assert revisions == sorted(set(revisions))
    async with _watch(api, f"resourceVersion={version}") as answer:  # the same again, from the history
        events = await _events(answer, 6)
    assert [event["type"] for event in events] == ["ADDED", "ADDED", "MODIFIED", "MODIFIED", "MODIFIED", "DELETED"]
    async with _watch(api, "") as answer:  # without a version: what there is, first
        events = await _events(answer, 1)
    assert [(event["type"], event["object"]["metadata"]["name"]) for event in events] == [("ADDED", "other")]
    async with _watch(api, "resourceVersion=0&timeoutSeconds=1&allowWatchBookmarks=true") as answer:
        events = await _events(answer, 9)
    assert [event["type"] for event in events] == ["ADDED", "BOOKMARK"]
    assert int(events[1]["object"]["metadata"]["resourceVersion"]) == api.registry.store.revision


@with_api(history=10)
async def test_a_watch_from_too_long_ago_is_told_410(api: Api) -> None:
    for number in range(20):
        await api.make(PODS, pod(f"p{number}"))
    async with _watch(api, "resourceVersion=2") as answer:
        events = await _events(answer, 9)
    assert [(event["type"], event["object"]["code"]) for event in events] == [("ERROR", 410)]


def test_a_watcher_that_reads_nothing_is_cut_and_the_others_miss_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watches, "STALL_S", 1.0)
    count = 400

    async def run() -> None:
        async with running(backlog=50) as api:
            host, port = api.url.removeprefix("http://").split(":")
            version = api.registry.store.revision
            reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
            path = f"{PODS}?watch=1&resourceVersion={version}"
            writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ADMIN}\r\n\r\n".encode())
            await reader.readline()  # the watch is on; from here it is not read
            async with _watch(api, f"resourceVersion={version}") as answer:
                for number in range(count):
                    body = pod(f"p{number}")
                    body["metadata"]["annotations"] = {"fat": "x" * 50_000}
                    await api.make(PODS, body)
                    event = (await _events_long(answer))[0]
                    assert event["object"]["metadata"]["name"] == f"p{number}"
            rest = b""
            async with asyncio.timeout(GUARD_S):
                try:
                    while not rest.endswith(b"\r\n0\r\n\r\n") and (chunk := await reader.read(1 << 20)):
                        rest = (rest + chunk)[-4096:]
                except ConnectionError:
                    rest = b"reset"
            assert b'"code": 410' in rest or not rest.endswith(b"0\r\n\r\n")
            writer.close()
            async with asyncio.timeout(GUARD_S):
                while api.registry.store.watching:
                    await asyncio.sleep(0.01)

    async def _events_long(answer: aiohttp.ClientResponse) -> list[Any]:
        data = b""
        async with asyncio.timeout(GUARD_S):
            while not data.endswith(b"\n"):
                data += await answer.content.readany()
        return [json.loads(line) for line in data.splitlines()]

    asyncio.run(run())
