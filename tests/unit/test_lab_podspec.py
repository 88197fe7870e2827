"""What the lab reads of a pod, and what it refuses by name."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestep.lab import podspec


def pod(container: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    main = {"name": "main", "image": "host", "command": ["sleep", "1"], **(container or {})}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p", "namespace": "n", "uid": "u-1", "labels": {"app": "x"}},
        "spec": {"containers": [main], **spec},
    }


@pytest.mark.parametrize(
    ("broken", "name"),
    [
        (pod({"livenessProbe": {"tcpSocket": {"port": 1}}}), "spec.containers[0].livenessProbe"),
        (pod({"lifecycle": {"preStop": {}}}), "spec.containers[0].lifecycle"),
        (pod({"envFrom": [{"configMapRef": {"name": "x"}}]}), "spec.containers[0].envFrom"),
        (pod({"resources": {"limits": {"cpu": "1"}}}), "spec.containers[0].resources.limits"),
        (pod({"securityContext": {"privileged": True}}), "spec.containers[0].securityContext.privileged"),
        (pod({"securityContext": {"capabilities": {"add": ["FLY"]}}}), "capabilities.add (FLY)"),
        (pod({"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s"}}}]}), "env[0].valueFrom.secretKeyRef"),
        (
            pod({"env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "spec.x"}}}]}),
            "env[0].valueFrom.fieldRef.fieldPath (spec.x)",
        ),
        (pod({"readinessProbe": {"grpc": {"port": 1}}}), "readinessProbe.grpc"),
        (pod(initContainers=[{"name": "a"}]), "spec.initContainers"),
        (pod(affinity={"nodeAffinity": {}}), "spec.affinity"),
        (pod(hostPID=True), "spec.hostPID"),
        (pod(volumes=[{"name": "v", "hostPath": {"path": "/"}}]), "spec.volumes[0].hostPath"),
        (pod(volumes=[{"name": "v", "emptyDir": {"sizeLimit": "1Mi"}}]), "spec.volumes[0].emptyDir.sizeLimit"),
        (pod(dnsPolicy="None"), "spec.dnsPolicy"),
    ],
)
def test_what_would_change_behaviour_is_refused_by_name(broken: dict[str, Any], name: str) -> None:
    with pytest.raises(podspec.Refused) as error:
        podspec.parse(broken)
    assert name in str(error.value)


def test_what_changes_nothing_is_accepted() -> None:
    harmless = pod(
        {"imagePullPolicy": "Always", "resources": {"requests": {"cpu": "1"}}, "livenessProbe": None, "stdin": False},
        tolerations=[{"operator": "Exists"}],
        initContainers=[],
        hostPID=False,
        enableServiceLinks=False,
    )
    assert podspec.refusals(harmless) == []
    assert podspec.parse(harmless).grace_s == 30


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (pod({"command": []}), "no command"),
        ({**pod(), "spec": {"containers": []}}, "empty"),
        (pod({"volumeMounts": [{"name": "v", "mountPath": "/v"}]}), "no volume 'v'"),
        (
            pod({"volumeMounts": [{"name": "v", "mountPath": "/v", "subPath": "../x"}]}, volumes=[{"name": "v"}]),
            "leaves the volume",
        ),
        (pod({"readinessProbe": {"periodSeconds": 1}}), "needs one of"),
        (pod({"readinessProbe": {"tcpSocket": {"port": "web"}}}), "'web'"),
    ],
)
def test_what_is_missing_is_said(broken: dict[str, Any], text: str) -> None:
    with pytest.raises(podspec.Refused) as error:
        podspec.parse(broken)
    assert text in str(error.value)


def capabilities(**changes: list[str]) -> set[str]:
    mask = podspec.parse(pod({"securityContext": {"capabilities": changes}})).containers[0].capabilities
    return {name for index, name in enumerate(podspec.CAPABILITIES) if mask >> index & 1}


def test_capabilities_are_containerds_with_what_is_added_and_dropped() -> None:
    assert podspec.parse(pod()).containers[0].capabilities == 0xA80425FB
    assert capabilities(drop=["ALL"]) == set()
    assert capabilities(drop=["ALL"], add=["NET_BIND_SERVICE"]) == {"NET_BIND_SERVICE"}
    assert capabilities(drop=["CAP_NET_RAW"]) == podspec.DEFAULT_CAPABILITIES - {"NET_RAW"}
    assert capabilities(add=["net_admin"]) == podspec.DEFAULT_CAPABILITIES | {"NET_ADMIN"}
    assert capabilities(add=["ALL"]) == set(podspec.CAPABILITIES)


def test_a_containers_context_counts_before_the_pods() -> None:
    spec = podspec.parse(pod({"securityContext": {"runAsUser": 7}}, securityContext={"runAsUser": 1, "runAsGroup": 2}))
    assert (spec.containers[0].uid, spec.containers[0].gid) == (7, 2)


def test_environment_refers_to_fields_and_earlier_variables() -> None:
    item = pod(
        {
            "env": [
                {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                {"name": "APP", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}},
                {"name": "URL", "value": "http://$(IP)/$(APP)/$(LATER)/$$(IP)"},
                {"name": "LATER", "value": 5},
            ]
        }
    )
    container = podspec.parse(item).containers[0]
    found = podspec.environment(item, container, ["10.1.2.3", "fd00::1"], ["10.0.0.1"])
    assert found == {"IP": "10.1.2.3", "APP": "x", "URL": "http://10.1.2.3/x/$(LATER)/$(IP)", "LATER": "5"}


@given(st.text())
def test_text_without_dollar_is_not_changed(text: str) -> None:
    text = text.replace("$", "")
    assert podspec.expand(text, {"A": "b"}) == text


def test_families() -> None:
    def families(text: str) -> tuple[int, ...]:
        item = pod()
        item["metadata"]["annotations"] = {podspec.FAMILIES_ANNOTATION: text}
        return podspec.parse(item).families

    assert podspec.parse(pod()).families == (4, 6)
    assert (families("IPv4"), families("IPv6"), families("IPv6, IPv4")) == ((4,), (6,), (6, 4))
    with pytest.raises(podspec.Refused):
        families("IPv5")
