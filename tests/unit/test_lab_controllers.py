"""The lab's controllers: deployments to pods on nodes, endpoints, rolling updates, what goes with what."""

import asyncio
from collections.abc import Callable
from typing import Any

from tests.harness.lab_api import GUARD_S, PODS, Api, node, pod, with_api


def _deployment(**spec: Any) -> dict[str, Any]:
    template = {"metadata": {"labels": {"app": "d"}}, "spec": pod()["spec"]}
    return {
        "metadata": {"name": "d"},
        "spec": {"replicas": 3, "selector": {"matchLabels": {"app": "d"}}, "template": template, **spec},
    }


async def _run_pods(api: Api, skip: frozenset[str] = frozenset()) -> None:
    """What a node does: says that its pods run, and that those that go have gone."""
    _, listed = await api.ask("GET", PODS)
    for number, item in enumerate(listed["items"]):
        name, metadata = item["metadata"]["name"], item["metadata"]
        if "deletionTimestamp" in metadata:
            await api.ask(
                "DELETE", f"{PODS}/{name}", {"gracePeriodSeconds": 0, "preconditions": {"uid": metadata["uid"]}}
            )
        elif "nodeName" in item["spec"] and item["status"]["phase"] == "Pending" and name not in skip:
            last = int(metadata["resourceVersion"]) % 200 + number % 50 + 1
            status = {
                "phase": "Running",
                "podIPs": [{"ip": f"10.212.{number}.{last}"}, {"ip": f"fd00:{number}::{last}"}],
                "conditions": [{"type": "Ready", "status": "True"}],
            }
            await api.ask(
                "PATCH", f"{PODS}/{name}/status", {"status": status}, content_type="application/merge-patch+json"
            )


async def _settle(api: Api, path: str, good: Callable[[Any], bool]) -> Any:
    async with asyncio.timeout(GUARD_S):
        while True:
            await _run_pods(api)
            _, answer = await api.ask("GET", path)
            if good(answer):
                return answer
            await asyncio.sleep(0.01)


def _available(deployment: Any) -> bool:
    status, wanted = deployment.get("status", {}), deployment["spec"]["replicas"]
    counts = {status.get(f"{name}Replicas") for name in ("available", "updated", "ready")} | {status.get("replicas")}
    return counts == {wanted} and status["observedGeneration"] == deployment["metadata"]["generation"]


@with_api(control=True)
async def test_a_deployment_becomes_pods_on_nodes_and_endpoints(api: Api) -> None:
    deployments, path = "/apis/apps/v1/namespaces/default/deployments", "/apis/apps/v1/namespaces/default/deployments/d"
    for name in ("node1", "node2"):
        await api.make("/api/v1/nodes", node(name))
    await api.make(deployments, _deployment())
    ports = [{"port": 80, "targetPort": 8080}]
    spec = {"selector": {"app": "d"}, "ipFamilyPolicy": "RequireDualStack", "ports": ports}
    await api.make("/api/v1/namespaces/default/services", {"metadata": {"name": "s"}, "spec": spec})
    done = await _settle(api, path, _available)
    conditions = {item["type"]: item["status"] for item in done["status"]["conditions"]}
    assert conditions["Available"] == "True"
    _, pods = await api.ask("GET", PODS)
    assert sorted(item["spec"]["nodeName"] for item in pods["items"])[::2] == ["node1", "node2"]  # 1 and 2, or 2 and 1
    for item in pods["items"]:
        owner = item["metadata"]["ownerReferences"][0]
        letters = item["metadata"]["labels"]["pod-template-hash"]
        assert (owner["kind"], owner["name"]) == ("ReplicaSet", f"d-{letters}")
        assert item["metadata"]["name"].startswith(f"d-{letters}-")
    slices = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices?labelSelector=kubernetes.io/service-name%3Ds"

    def full(answer: Any) -> bool:
        return [len(item["endpoints"]) for item in answer["items"]] == [3, 3]

    found = await api.until(slices, full)
    assert sorted(item["addressType"] for item in found["items"]) == ["IPv4", "IPv6"]
    for item in found["items"]:
        assert item["ports"] == [{"name": "", "port": 8080, "protocol": "TCP"}]
        assert all(endpoint["conditions"]["ready"] for endpoint in item["endpoints"])
        assert {endpoint["targetRef"]["uid"] for endpoint in item["endpoints"]} == {
            item["metadata"]["uid"] for item in pods["items"]
        }
    # A pod that goes is terminating and not ready, but still serving; a pod that is not ready is neither.
    first, second, _ = (item["metadata"]["name"] for item in pods["items"])
    await api.ask("DELETE", f"{PODS}/{first}")
    unready = {"status": {"conditions": [{"type": "Ready", "status": "False"}]}}
    await api.ask("PATCH", f"{PODS}/{second}/status", unready, content_type="application/merge-patch+json")

    def told(answer: Any) -> bool:
        said = {item["targetRef"]["name"]: item["conditions"] for item in answer["items"][0]["endpoints"]}
        return said.get(first) == {"ready": False, "serving": True, "terminating": True} and said.get(second) == {
            "ready": False,
            "serving": False,
            "terminating": False,
        }

    await api.until(slices, told)
    await api.ask("DELETE", "/api/v1/namespaces/default/services/s")
    await api.until(slices, lambda answer: not answer["items"])
    await api.ask("DELETE", path)
    await _settle(api, PODS, lambda answer: not answer["items"])
    _, sets = await api.ask("GET", "/apis/apps/v1/namespaces/default/replicasets")
    assert sets["items"] == []


@with_api(control=True)
async def test_a_new_template_replaces_every_pod_and_scaling_works(api: Api) -> None:
    deployments, path = "/apis/apps/v1/namespaces/default/deployments", "/apis/apps/v1/namespaces/default/deployments/d"
    await api.make("/api/v1/nodes", node("node1"))
    merge = {"content_type": "application/merge-patch+json"}
    for strategy in ("RollingUpdate", "Recreate"):
        await api.make(deployments, _deployment(strategy={"type": strategy}))
        await _settle(api, path, _available)
        _, before = await api.ask("GET", PODS)
        change = {"spec": {"replicas": 5, "template": {"metadata": {"annotations": {"restarted": strategy}}}}}
        await api.ask("PATCH", path, change, **merge)
        await _settle(api, path, _available)
        after = await _settle(api, PODS, lambda answer: len(answer["items"]) == 5)
        uids = [{item["metadata"]["uid"] for item in listed["items"]} for listed in (before, after)]
        assert not uids[0] & uids[1]
        code, answer = await api.ask("PATCH", f"{path}/scale", {"spec": {"replicas": 1}}, **merge)
        assert code == 200 and answer["kind"] == "Scale"
        await _settle(api, path, _available)
        await api.ask("DELETE", path)
        await _settle(api, PODS, lambda answer: not answer["items"])


@with_api(control=True)
async def test_the_scheduler_honours_selectors_and_says_why_not(api: Api) -> None:
    for name in ("node1", "node2"):
        await api.make("/api/v1/nodes", node(name))
    await api.make(PODS, pod("a", nodeSelector={"kubernetes.io/hostname": "node2"}))
    await api.make(PODS, pod("b", nodeSelector={"kubernetes.io/hostname": "node9"}))
    await api.until(f"{PODS}/a", lambda item: item["spec"].get("nodeName") == "node2")
    stuck = await api.until(f"{PODS}/b", lambda item: "conditions" in item["status"])
    assert "kubernetes.io/hostname=node9" in stuck["status"]["conditions"][0]["message"]
    await api.make("/api/v1/nodes", node("node9"))
    await api.until(f"{PODS}/b", lambda item: item["spec"].get("nodeName") == "node9")
    await api.ask("DELETE", f"{PODS}/b")  # and its node goes before it has confirmed
    await api.ask("DELETE", "/api/v1/nodes/node9")
    await api.until(PODS, lambda answer: [item["metadata"]["name"] for item in answer["items"]] == ["a"])


@with_api(control=True)
async def test_a_namespace_goes_with_its_content(api: Api) -> None:
    await api.make("/api/v1/namespaces", {"metadata": {"name": "n"}})
    code, _ = await api.ask("GET", "/api/v1/namespaces/n/serviceaccounts/default")
    assert code == 200
    _, root = await api.ask("GET", "/api/v1/namespaces/n/configmaps/kube-root-ca.crt")
    assert root["data"] == {"ca.crt": "a root"}
    await api.make("/api/v1/nodes", node("node1"))
    await api.make("/api/v1/namespaces/n/pods", pod(nodeName="node1"))
    code, answer = await api.ask("DELETE", "/api/v1/namespaces/n")
    assert code == 200 and answer["status"]["phase"] == "Terminating"
    code, answer = await api.ask("POST", "/api/v1/namespaces/n/pods", pod("q"))
    assert code == 403 and "terminated" in answer["message"]
    assert (await api.ask("GET", "/api/v1/namespaces/n"))[0] == 200  # the pod has not ended yet
    await api.ask("DELETE", "/api/v1/namespaces/n/pods/p", {"gracePeriodSeconds": 0})
    await api.until("/api/v1/namespaces/n", lambda answer: answer.get("code") == 404)


@with_api(control=True)
async def test_a_deployment_whose_pods_are_refused_says_why(api: Api) -> None:
    body = _deployment(replicas=1)
    body["spec"]["template"]["spec"]["serviceAccountName"] = "later"
    path = "/apis/apps/v1/namespaces/default/deployments"
    await api.make(path, body)

    def failure(answer: Any) -> str:
        said = {item["type"]: item["message"] for item in answer.get("status", {}).get("conditions", [])}
        return str(said.get("ReplicaFailure", ""))

    await api.until(f"{path}/d", lambda answer: "default/later" in failure(answer))
    await api.make("/api/v1/namespaces/default/serviceaccounts", {"metadata": {"name": "later"}})
    await api.until(PODS, lambda answer: len(answer["items"]) == 1)
    await api.until(f"{path}/d", lambda answer: not failure(answer))
