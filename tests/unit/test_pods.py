"""Pods as the agent keeps them: the projection, who is enrolled, UIDs in cgroup paths."""

from typing import Any

import pytest

from sidestep.node.pods import (
    PROBED_PORTS,
    Verdict,
    eligible,
    namespace_of,
    pod_of,
    spiffe,
    uid_of_cgroup,
    workload_name,
)

UID = "1b4e28ba-2fa1-11d2-883f-0016d3cca427"


def pod(
    namespace: str = "shop", phase: str = "Running", labels: Any = None, annotations: Any = None, **spec: Any
) -> Any:
    meta = {"uid": UID, "name": "web", "namespace": namespace, "labels": labels, "annotations": annotations}
    return {"metadata": meta, "spec": {"nodeName": "n1"} | spec, "status": {"phase": phase, "podIP": "10.0.0.1"}}


AMBIENT, NONE = {"istio.io/dataplane-mode": "ambient"}, {"istio.io/dataplane-mode": "none"}
SIDECAR = {"sidecar.istio.io/status": "{}"}


@pytest.mark.parametrize(
    ("obj", "namespace", "verdict"),
    [
        (pod(), "ambient", Verdict.ENROL),
        (pod(), "", Verdict.NO_LABEL),
        (pod(), "none", Verdict.NO_LABEL),
        (pod(), "Ambient", Verdict.NO_LABEL),
        (pod(labels=AMBIENT), "", Verdict.ENROL),
        (pod(labels=NONE), "ambient", Verdict.POD_NONE),
        (pod(labels={"istio.io/dataplane-mode": "odd"}), "ambient", Verdict.ENROL),
        (pod(annotations=SIDECAR, labels=AMBIENT), "ambient", Verdict.SIDECAR),
        (pod(hostNetwork=True, labels=AMBIENT), "ambient", Verdict.HOST_NETWORK),
        (pod(namespace="kube-system", labels=AMBIENT), "ambient", Verdict.EXCLUDED),
        (pod(phase="Succeeded"), "ambient", Verdict.TERMINAL),
        (pod(phase="Failed"), "ambient", Verdict.TERMINAL),
        (pod(phase="Pending"), "ambient", Verdict.ENROL),
    ],
)
def test_who_is_enrolled(obj: Any, namespace: str, verdict: Verdict) -> None:
    assert eligible(pod_of(obj), namespace) is verdict


def test_the_projection() -> None:
    obj = pod(annotations={"ambient.istio.io/redirection": "enabled"}, serviceAccountName="till")
    obj["status"]["podIPs"] = [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]
    made = pod_of(obj)
    assert (made.uid, made.key, made.service_account, made.node) == (UID, "shop/web", "till", "n1")
    assert made.ips == ("10.0.0.1", "fd00::1") and made.redirection == "enabled" and not made.deleting
    bare = pod_of({"metadata": {"uid": UID, "name": "web", "namespace": "shop"}})
    assert bare.ips == () and bare.service_account == "default" and bare.phase == "Pending"
    assert namespace_of({"metadata": {"name": "shop", "labels": AMBIENT}}) == ("shop", "ambient")
    assert namespace_of({"metadata": {"name": "shop"}}) == ("shop", "")


@pytest.mark.parametrize(
    ("context", "raw"),
    [
        (None, True),
        ({"capabilities": {"drop": ["ALL"]}}, False),
        ({"capabilities": {"drop": ["all"]}}, False),
        ({"capabilities": {"drop": ["NET_RAW"]}}, False),
        ({"capabilities": {"drop": ["CHOWN"]}}, True),
        ({"capabilities": {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]}}, False),
        ({"capabilities": {"drop": ["ALL"], "add": ["NET_RAW"]}}, True),
        ({"capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN"]}}, True),
        ({"privileged": True, "capabilities": {"drop": ["ALL"]}}, True),
    ],
)
def test_who_may_send_raw_packets(context: Any, raw: bool) -> None:
    container: dict[str, Any] = {"name": "c"} | ({"securityContext": context} if context else {})
    assert pod_of(pod(containers=[container])).raw is raw
    dropped = {"name": "d", "securityContext": {"capabilities": {"drop": ["ALL"]}}}
    assert pod_of(pod(containers=[dropped], initContainers=[container])).raw is raw


PORTS = [{"name": "web", "containerPort": 8080}, {"name": "9", "containerPort": 9090}, {"containerPort": 7}]


@pytest.mark.parametrize(
    ("container", "ports"),
    [
        ({}, ()),
        ({"readinessProbe": {"httpGet": {"path": "/", "port": 8081}}}, (8081,)),
        ({"livenessProbe": {"tcpSocket": {"port": 8082}}}, (8082,)),
        ({"startupProbe": {"grpc": {"port": 8083, "service": "x"}}}, (8083,)),
        (
            {"lifecycle": {"postStart": {"httpGet": {"port": 8084}}, "preStop": {"httpGet": {"port": 8085}}}},
            (8084, 8085),
        ),
        ({"lifecycle": {"preStop": {"exec": {"command": ["true"]}}}}, ()),
        ({"readinessProbe": {"exec": {"command": ["true"]}}}, ()),
        ({"readinessProbe": {"httpGet": {"port": "web"}}}, (8080,)),
        ({"readinessProbe": {"httpGet": {"port": "9"}}}, (9090,)),
        ({"readinessProbe": {"httpGet": {"port": "81"}}}, (81,)),
        ({"readinessProbe": {"httpGet": {"port": "none"}}}, ()),
        ({"readinessProbe": {"httpGet": {"port": 8081, "host": "192.0.2.1"}}}, ()),
        ({"readinessProbe": {"httpGet": {"port": 8081}}, "livenessProbe": {"httpGet": {"port": 8081}}}, (8081,)),
        ({"readinessProbe": {"httpGet": {"port": 15008}}, "livenessProbe": {"tcpSocket": {"port": 15007}}}, (15007,)),
        ({"readinessProbe": {"httpGet": {}}, "livenessProbe": {"tcpSocket": None}, "startupProbe": None}, ()),
    ],
)
def test_which_ports_are_probed(container: Any, ports: tuple[int, ...]) -> None:
    other = {"name": "other", "livenessProbe": {"tcpSocket": {"port": 1}}}
    whole = {"name": "c", "ports": PORTS} | container
    assert pod_of(pod(containers=[whole])).probed == ports
    assert pod_of(pod(initContainers=[whole])).probed == ports
    assert pod_of(pod(containers=[whole, other])).probed == (1, *ports)


@pytest.mark.parametrize(
    "port", [0, -1, 65536, 1.5, True, None, [], "", "0", "65536", "-1", "\uff11", "99999999999999"]
)
def test_a_port_that_makes_no_sense_is_not_probed(port: Any) -> None:
    assert pod_of(pod(containers=[{"name": "c", "readinessProbe": {"httpGet": {"port": port}}}])).probed == ()
    good = {"name": "d", "readinessProbe": {"httpGet": {"port": 80}}}
    assert pod_of(pod(containers=[{"name": "c", "readinessProbe": {"httpGet": {"port": port}}}, good])).probed == (80,)


def test_there_is_a_bound_of_probed_ports() -> None:
    many = [{"name": f"c{n}", "readinessProbe": {"tcpSocket": {"port": 1000 + n}}} for n in range(100)]
    assert len(pod_of(pod(containers=many)).probed) == PROBED_PORTS


@pytest.mark.parametrize(
    ("text", "uid"),
    [
        (f"0::/kubepods/burstable/pod{UID}/abc\n", UID),
        (f"0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{UID.replace('-', '_')}.slice/x\n", UID),
        (f"4:cpu:/kubepods/pod{UID}/c\n3:memory:/kubepods/pod{UID}/c\n", UID),
        (f"4:cpu:/kubepods/pod{UID}/c\n3:memory:/kubepods/pod{UID.replace('1b', '2b')}/c\n", None),
        (f"0::/user.slice/pod{UID}\n", None),
        ("0::/\n", None),
        ("", None),
    ],
)
def test_uid_in_a_cgroup(text: str, uid: str | None) -> None:
    assert uid_of_cgroup(text) == uid


def test_names() -> None:
    assert spiffe("cluster.local", "shop", "till") == "spiffe://cluster.local/ns/shop/sa/till"
    assert workload_name("Kubernetes", "shop", "web") == "Kubernetes//Pod/shop/web"
