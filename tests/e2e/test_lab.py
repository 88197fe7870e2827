"""The lab itself: what pods find in it, what a user may do wrong, and that nothing of it stays behind."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidestep.lab import podspec
from sidestep.lab.down import leftovers
from tests.harness.lab import SIDESTEP, Lab, eventually, everything_of, host_rules

PYTHON = "/usr/bin/python3"
ECHO = """
import socket
server = socket.create_server(("::", 7), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64)
while True:
    connection, peer = server.accept()
    connection.sendall(peer[0].encode())
    connection.close()
"""
ASK = """
import socket, sys
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])), 10)
print(connection.recv(100).decode().removeprefix("::ffff:"))
"""


def pod(name: str, node: str, container: dict[str, Any], **spec: Any) -> dict[str, Any]:
    annotations = spec.pop("annotations", {})
    namespace = spec.pop("namespace", "yard")
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": {"app": name}, "annotations": annotations},
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "main", "image": "host", "command": ["sleep", "infinity"], **container}],
            **spec,
        },
    }


def service(name: str, app: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "yard"},
        "spec": {
            "ipFamilyPolicy": "PreferDualStack",
            "selector": {"app": app},
            "ports": [{"port": 70, "targetPort": 7}],
            **spec,
        },
    }


ECHO_POD = {"command": [PYTHON, "-c", ECHO], "readinessProbe": {"tcpSocket": {"port": 7}, "periodSeconds": 1}}
YARD: list[dict[str, Any]] = [
    {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "yard"}},
    {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "words", "namespace": "yard"},
        "data": {"one": "first\n", "two": "second\n"},
    },
    {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "hidden", "namespace": "yard"},
        "stringData": {"key": "s3cret"},
    },
    pod("plain", "node1", {}),
    pod("echo", "node2", ECHO_POD),
    pod("only4", "node1", ECHO_POD, annotations={podspec.FAMILIES_ANNOTATION: "IPv4"}),
    pod("only6", "node2", ECHO_POD, annotations={podspec.FAMILIES_ANNOTATION: "IPv6"}),
    pod(
        "rich",
        "node2",
        {
            "workingDir": "/data",
            "env": [
                {"name": "WHO", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                {"name": "HELLO", "value": "I am $(WHO)"},
            ],
            "securityContext": {
                "runAsUser": 1234,
                "runAsGroup": 2345,
                "capabilities": {"drop": ["ALL"], "add": ["NET_RAW"]},
            },
            "readinessProbe": {"exec": {"command": ["test", "-e", "/data/ready"]}, "periodSeconds": 1,
                               "failureThreshold": 1},
            "command": ["sh", "-c", "touch /data/ready; exec sleep infinity"],
            "volumeMounts": [
                {"name": "data", "mountPath": "/data"},
                {"name": "words", "mountPath": "/etc/words"},
                {"name": "hidden", "mountPath": "/etc/hidden"},
                {"name": "token", "mountPath": "/var/run/secrets/tokens"},
            ],
        },
        volumes=[
            {"name": "data", "emptyDir": {}},
            {"name": "words", "configMap": {"name": "words", "items": [{"key": "two", "path": "deep/file"}]}},
            {"name": "hidden", "secret": {"secretName": "hidden", "defaultMode": 0o444}},
            {"name": "token", "projected": {"sources": [{"serviceAccountToken": {"path": "t", "audience": "aud"}}]}},
        ],
    ),
    service("echo", "echo"),
    service("rich", "rich"),
    service("nobody", "nobody"),
    service("every", "echo", clusterIP="None"),
]  # fmt: skip


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A lab without the mesh: what is tested here does not depend on it."""
    path = tmp_path_factory.mktemp("yard") / "yard.yaml"
    path.write_text(yaml.safe_dump_all(YARD))
    lab = Lab(f"y{os.getpid() % 10000}", plain=True)
    try:
        lab.up(path)
        yield lab
    finally:
        lab.down()


def ask(lab: Lab, source: str, target: str, port: int) -> str:
    return lab.exec(f"yard/{source}", PYTHON, "-c", ASK, target, str(port)).strip()


# -- what pods find ----------------------------------------------------------------------------------------------------
def test_a_container_sees_no_host_and_has_a_runtimes_privileges(yard: Lab) -> None:
    status = yard.exec("yard/plain", "cat", "/proc/self/status")
    found = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert found["CapBnd"] == found["CapEff"] == "00000000a80425fb"
    assert found["CapInh"] == "0" * 16
    assert yard.exec("yard/plain", "cat", "/proc/1/comm") == "sleep\n"
    assert yard.exec("yard/plain", "hostname") == "plain\n"
    assert yard.exec("yard/plain", "ls", "/run", "/tmp", "/sys/fs/bpf").split() == ["/run:", "/sys/fs/bpf:", "/tmp:"]
    assert yard.exec("yard/plain", "ls", "/sys/class/net").split() == ["eth0", "lo"]
    mounts = yard.exec("yard/plain", "cat", "/proc/mounts")
    assert not {line.split()[2] for line in mounts.splitlines()} & {"bpf", "cgroup", "cgroup2", "nsfs"}
    assert yard.exec("yard/plain", "sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward; echo $?").strip() != "0"


def test_what_a_container_writes_stays_in_it(yard: Lab) -> None:
    mark = f"/usr/share/sidestep-test-{os.getpid()}"
    yard.exec("yard/plain", "touch", mark)
    assert yard.exec("yard/plain", "ls", mark).strip() == mark
    assert not Path(mark).exists()


def test_ids_capabilities_environment_volumes(yard: Lab) -> None:
    assert yard.exec("yard/rich", "id", "-u").strip() == "1234"
    assert yard.exec("yard/rich", "id", "-G").strip() == "2345"
    status = yard.exec("yard/rich", "cat", "/proc/self/status")
    assert "CapBnd:\t0000000000002000" in status
    assert "CapEff:\t0000000000000000" in status
    assert yard.exec("yard/rich", "sh", "-c", "echo $HELLO; pwd").splitlines() == ["I am rich", "/data"]
    assert yard.exec("yard/rich", "cat", "/etc/words/deep/file") == "second\n"
    assert yard.exec("yard/rich", "ls", "/etc/words").split() == ["deep"]
    assert yard.exec("yard/rich", "cat", "/etc/hidden/key") == "s3cret"
    assert yard.exec("yard/rich", "sh", "-c", "touch /etc/words/x || echo refused").strip() == "refused"
    token = yard.exec("yard/rich", "cat", "/var/run/secrets/tokens/t")
    review = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
              "spec": {"token": token, "audiences": ["aud", "other"]}}  # fmt: skip
    answer = yard.ask(lambda client: client.create("/apis/authentication.k8s.io/v1/tokenreviews", review))
    assert answer["status"]["audiences"] == ["aud"]
    assert answer["status"]["user"]["username"] == "system:serviceaccount:yard:default"


def test_readiness_follows_the_probe_into_endpoints(yard: Lab) -> None:
    def endpoints() -> bool:
        found = yard.ask(lambda client: client.list("/apis/discovery.k8s.io/v1/namespaces/yard/endpointslices"))
        mine = [item for item in found["items"] if item["metadata"]["labels"]["kubernetes.io/service-name"] == "rich"]
        return any(entry["conditions"]["ready"] for item in mine for entry in item.get("endpoints") or ())

    assert endpoints()
    yard.exec("yard/rich", "rm", "/data/ready")
    eventually("not ready", lambda: not endpoints())
    yard.exec("yard/rich", "touch", "/data/ready")
    eventually("ready again", endpoints)


# Answers the probe with what stands in /data/status: a status and a body, or "hang"; anybody else gets 400.
PROBED = """
import http.server, pathlib, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        status, _, body = pathlib.Path("/data/status").read_text().strip().partition(" ")
        if (self.path, self.headers["X-Probe"]) != ("/ready?now", "yes"): status, body = "400", "not the probe"
        if status == "hang": time.sleep(30)
        self.send_response(int(status)); self.end_headers(); self.wfile.write(body.encode())
    def log_message(self, *what): pass
class Server(http.server.ThreadingHTTPServer):
    address_family = __import__("socket").AF_INET6
Server(("::", 8080), Handler).serve_forever()
"""


def probed(name: str, namespace: str, probe: dict[str, Any], *command: str) -> dict[str, Any]:
    container = {
        "command": list(command),
        "readinessProbe": {"periodSeconds": 1, "failureThreshold": 1, **probe},
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
    }
    return pod(name, "node1", container, namespace=namespace, volumes=[{"name": "data", "emptyDir": {}}])


def unready(lab: Lab, name: str, why: str) -> bool:
    """The pod is not ready and says why."""
    return not lab.ready(name) and why in str(lab.pod(name)["status"].get("message") or "")


@pytest.mark.parametrize(("place", "namespace"), [("yard", "yard"), ("direct", "world"), ("native", "world")])
def test_probes_by_http_and_by_command(request: pytest.FixtureRequest, place: str, namespace: str) -> None:
    """On a node without the mesh, and of pods that are in it, without acceleration and with it."""
    lab: Lab = request.getfixturevalue(place)
    if place != "yard":
        lab.enrol(namespace)
    headers = [{"name": "X-Probe", "value": "yes"}]
    http = {"httpGet": {"path": "/ready?now", "port": 8080, "httpHeaders": headers}}
    command = {"exec": {"command": ["sh", "-c", "cat /data/why; test -e /data/ready"]}}
    web, asked = f"{namespace}/by-http", f"{namespace}/by-command"
    start = f"echo 503 opens at nine >/data/status; exec {PYTHON} -c '{PROBED}'"
    lab.apply(
        probed("by-http", namespace, http, "sh", "-c", start),
        probed("by-command", namespace, command, "sh", "-c", "echo closed >/data/why; exec sleep infinity"),
    )
    try:
        eventually("503", lambda: unready(lab, web, "HTTP status 503: opens at nine"))
        eventually("status 1", lambda: unready(lab, asked, "status 1: closed"))
        if place != "yard":
            eventually("both are enrolled", lambda: {"by-http", "by-command"} <= lab.enrolled(namespace))
        for answer, ready in (("200", True), ("404 gone", False), ("302", True), ("hang", False), ("399", True)):
            lab.exec(web, "sh", "-c", f"echo {answer} >/data/status.new; mv /data/status.new /data/status")
            eventually(answer, lambda ready=ready: lab.ready(web) is ready)  # type: ignore[misc]
            if answer == "hang":
                eventually("its time is over", lambda: unready(lab, web, "no answer within 1 s"))
        for words, ready in (("touch /data/ready", True), ("rm /data/ready", False)):
            lab.exec(asked, "sh", "-c", words)
            eventually(words, lambda ready=ready: lab.ready(asked) is ready)  # type: ignore[misc]
    finally:
        lab.delete_pod(web)
        lab.delete_pod(asked)


def test_restart_policy(yard: Lab) -> None:
    yard.apply(
        pod("fails", "node1", {"command": ["sh", "-c", "exit 3"]}, restartPolicy="Always"),
        pod("once", "node1", {"command": ["sh", "-c", "exit 3"]}, restartPolicy="Never"),
        pod("done", "node1", {"command": ["true"]}, restartPolicy="OnFailure"),
    )
    eventually("phases", lambda: yard.pod("yard/once")["status"].get("phase") == "Failed")
    eventually("phases", lambda: yard.pod("yard/done")["status"].get("phase") == "Succeeded")
    found = eventually(
        "a second restart",
        lambda: (
            (state := (yard.pod("yard/fails")["status"].get("containerStatuses") or [{}])[0]).get("restartCount", 0)
            >= 2
            and state
        ),
    )
    assert found["lastState"]["terminated"]["exitCode"] == 3
    ended = yard.pod("yard/once")["status"]["containerStatuses"][0]
    assert (ended["restartCount"], ended["state"]["terminated"]["exitCode"]) == (0, 3)
    for name in ("fails", "once", "done"):
        yard.delete_pod(f"yard/{name}")


def test_a_pod_is_told_to_end_and_given_its_time(yard: Lab) -> None:
    program = "trap 'echo told; sleep 0.5; echo bye; exit 0' TERM; echo up; while true; do sleep 0.05; done"
    yard.apply(pod("polite", "node1", {"command": ["sh", "-c", program]}, terminationGracePeriodSeconds=20))
    eventually("up", lambda: yard.command("logs", "yard/polite", check=False).stdout == "up\n")
    follow = subprocess.Popen(
        [SIDESTEP, "lab", "logs", "--name", yard.name, "--follow", "yard/polite"], stdout=subprocess.PIPE, text=True
    )
    assert follow.stdout is not None
    assert follow.stdout.readline() == "up\n"
    yard.delete_pod("yard/polite")
    assert follow.communicate(timeout=30)[0] == "told\nbye\n"


# -- network -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", [4, 6])
def test_pods_reach_each_other_across_nodes_with_their_own_addresses(yard: Lab, family: int) -> None:
    assert ask(yard, "plain", yard.address("yard/echo", family), 7) == yard.address("yard/plain", family)


def test_pods_of_one_family(yard: Lab) -> None:
    assert [entry["ip"] for entry in yard.pod("yard/only4")["status"]["podIPs"]] == [yard.address("yard/only4", 4)]
    assert [entry["ip"] for entry in yard.pod("yard/only6")["status"]["podIPs"]] == [yard.address("yard/only6", 6)]
    assert ask(yard, "only4", yard.address("yard/echo", 4), 7) == yard.address("yard/only4", 4)
    assert ask(yard, "only6", yard.address("yard/echo", 6), 7) == yard.address("yard/only6", 6)
    assert ask(yard, "only6", "echo.yard", 70) == yard.address("yard/only6", 6)


@pytest.mark.parametrize("family", [4, 6])
def test_services_work_outside_the_mesh(yard: Lab, family: int) -> None:
    found = yard.ask(lambda client: client.get("/api/v1/namespaces/yard/services/echo"))
    address = next(text for text in found["spec"]["clusterIPs"] if (":" in text) == (family == 6))
    assert ask(yard, "plain", address, 70) == yard.address("yard/plain", family)
    # The pod behind the Service reaches itself through it; the node's address stands in for its own.
    assert ask(yard, "echo", address, 70) not in ("", yard.address("yard/echo", family))
    from_node = subprocess.run(
        [SIDESTEP, "lab", "exec", "--name", yard.name, "--node", "node1", "--", PYTHON, "-c", ASK, address, "70"],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    assert from_node.strip() == yard.status()["nodes"][0]["ips"][0 if family == 4 else 1]
    empty = yard.ask(lambda client: client.get("/api/v1/namespaces/yard/services/nobody"))
    address = next(text for text in empty["spec"]["clusterIPs"] if (":" in text) == (family == 6))
    refused = yard.command("exec", "yard/plain", "--", PYTHON, "-c", ASK, address, "70", check=False)
    assert "ConnectionRefusedError" in refused.stderr


def test_dns(yard: Lab) -> None:
    def resolve(name: str) -> set[str]:
        out = yard.command("exec", "yard/plain", "--", "getent", "ahosts", name, check=False).stdout
        return {line.split()[0] for line in out.splitlines()}

    found = yard.ask(lambda client: client.get("/api/v1/namespaces/yard/services/echo"))
    addresses = set(found["spec"]["clusterIPs"])
    assert len(addresses) == 2
    for name in ("echo", "echo.yard", "echo.yard.svc", "echo.yard.svc.cluster.local", "echo.yard.svc.cluster.local."):
        eventually(name, lambda name=name: resolve(name) == addresses)  # type: ignore[misc]
    both = {yard.address("yard/echo", 4), yard.address("yard/echo", 6)}
    eventually("the headless one", lambda: resolve("every") == both)
    assert resolve("no-such") == set()
    assert resolve("example.com") == set()
    assert resolve("kubernetes.default")


def test_exec_has_the_commands_status_and_signals(yard: Lab) -> None:
    assert yard.command("exec", "yard/plain", "--", "sh", "-c", "exit 7", check=False).returncode == 7
    assert yard.command("exec", "yard/plain", "--", "no-such-program", check=False).returncode == 127
    assert yard.command("exec", "yard/no-such", "--", "true", check=False).returncode == 1
    assert yard.exec("yard/plain", "echo", "--", "-x") == "-- -x\n"
    process = yard.popen("yard/plain", "sh", "-c", "trap 'exit 9' TERM; echo up; while true; do sleep 0.05; done",
                         stdout=subprocess.PIPE)  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 9
    process.stdout.close()


def test_a_stalled_log_reader_blocks_nobody(yard: Lab) -> None:
    program = "import sys\nfor n in range(20000): sys.stdout.write('x' * 99 + '\\n')\nopen('/data/done', 'w').close()\n"
    data = {"volumes": [{"name": "data", "emptyDir": {}}]}
    mounts = {"volumeMounts": [{"name": "data", "mountPath": "/data"}]}
    yard.apply(
        pod("loud", "node1", {"command": [PYTHON, "-c", program + "import time; time.sleep(1e6)"], **mounts}, **data)
    )
    follow = None
    try:
        eventually("running", lambda: yard.command("exec", "yard/loud", "--", "true", check=False).returncode == 0)
        follow = subprocess.Popen(
            [SIDESTEP, "lab", "logs", "--name", yard.name, "--follow", "yard/loud"], stdout=subprocess.PIPE
        )
        eventually(
            "all was written",
            lambda: yard.command("exec", "yard/loud", "--", "test", "-e", "/data/done", check=False).returncode == 0,
        )
    finally:
        if follow is not None:
            follow.kill()
            follow.communicate()
        yard.delete_pod("yard/loud")


# -- what dies ---------------------------------------------------------------------------------------------------------
def test_a_killed_kubelet_part_finds_its_pods_again(yard: Lab) -> None:
    before = yard.pod("yard/plain")
    old = yard.status()["nodes"][0]["processes"]["kubelet"]["pid"]
    inside = yard.popen("yard/plain", "sh", "-c", "echo up; read x", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert inside.stdout is not None
    assert inside.stdout.readline() == "up\n"
    os.kill(old, signal.SIGKILL)
    eventually("a new one", lambda: yard.status()["nodes"][0]["processes"]["kubelet"]["pid"] not in (0, old))
    yard.apply(pod("after", "node1", {}))
    eventually("a new pod runs", lambda: yard.pod("yard/after")["status"].get("phase") == "Running")
    after = yard.pod("yard/plain")
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert after["status"]["containerStatuses"][0]["restartCount"] == 0
    assert after["status"]["podIPs"] == before["status"]["podIPs"]
    assert inside.poll() is None
    inside.communicate("\n", timeout=30)
    yard.delete_pod("yard/after")


SMALL = yaml.safe_dump_all([YARD[0], pod("one", "node1", {})])


@pytest.mark.parametrize("victim", ["keeper", "api", "dns", "kubelet", "container", "nobody"])
def test_down_leaves_nothing_whatever_was_killed(tmp_path: Path, victim: str) -> None:
    manifest = tmp_path / "small.yaml"
    manifest.write_text(SMALL)
    lab = Lab(f"d{os.getpid() % 10000}", nodes=1, plain=True)
    try:
        lab.up(manifest)
        assert len(everything_of(lab.name)) > 5  # the check sees a lab
        status = lab.status()
        pids = {name: process["pid"] for name, process in status["processes"].items()}
        pids["kubelet"] = status["nodes"][0]["processes"]["kubelet"]["pid"]
        uid = status["pods"][0]["uid"]
        podrun = Path(f"/run/sidestep/lab/{lab.name}/node1/pods/{uid}/main/podrun").read_text()
        pids["container"] = int(podrun.split()[0])
        if victim != "nobody":
            os.kill(pids[victim], signal.SIGKILL)
    finally:
        lab.down()
    assert everything_of(lab.name) == []
    assert lab.command("down").returncode == 0  # again


def test_down_leaves_nothing_of_a_mesh_whose_parts_were_killed(tmp_path: Path) -> None:
    manifest = tmp_path / "small.yaml"
    namespace = {"apiVersion": "v1", "kind": "Namespace",
                 "metadata": {"name": "yard", "labels": {"istio.io/dataplane-mode": "ambient"}}}  # fmt: skip
    manifest.write_text(yaml.safe_dump_all([namespace, pod("one", "node1", {})]))
    lab = Lab(f"g{os.getpid() % 10000}", nodes=1)
    try:
        lab.up(manifest)
        status = lab.status()
        assert list(Path(status["nodes"][0]["bpf_dir"]).glob("*/*"))  # there are pins to take away
        node = status["nodes"][0]["processes"]
        for pid in (node["engine"]["supervisor"], node["engine"]["pid"], node["agent"]["pid"],
                    status["processes"]["control"]["pid"], status["processes"]["keeper"]["pid"]):  # fmt: skip
            with contextlib.suppress(ProcessLookupError):  # the engine dies with its supervisor
                os.kill(pid, signal.SIGKILL)
    finally:
        lab.down()
    assert everything_of(lab.name) == []


def test_without_an_agent_no_pod_starts_and_with_it_the_same_pod_does(mesh: Lab) -> None:
    status = mesh.status()
    keeper, agent = status["processes"]["keeper"]["pid"], status["nodes"][0]["processes"]["agent"]["pid"]
    os.kill(keeper, signal.SIGSTOP)  # or the agent would be back at once
    try:
        os.kill(agent, signal.SIGKILL)
        mesh.apply(pod("waits", "node1", {}, namespace="world"))

        def message() -> str:
            text = str(mesh.pod("world/waits").get("status", {}).get("message") or "")
            return text if text.startswith("sandbox") else ""

        refused = eventually("a CNI error", message)
        assert "sidestep-cni ADD: the sidestep agent of this node does not answer" in refused
        assert not mesh.pod("world/waits")["status"].get("podIPs")
    finally:
        os.kill(keeper, signal.SIGCONT)
    try:
        eventually("it runs", lambda: mesh.pod("world/waits")["status"].get("phase") == "Running")
    finally:
        mesh.delete_pod("world/waits")


@pytest.mark.parametrize(
    ("after", "number"),
    [
        (0.15, signal.SIGKILL),
        (0.4, signal.SIGKILL),
        (0.8, signal.SIGKILL),
        (1.3, signal.SIGKILL),
        (0.5, signal.SIGTERM),
    ],
)
def test_up_that_ends_half_way_leaves_nothing(tmp_path: Path, after: float, number: signal.Signals) -> None:
    """SIGKILL leaves it to `down`; after SIGTERM (and Ctrl-C) `up` has taken everything back itself."""
    manifest = tmp_path / "small.yaml"
    manifest.write_text(SMALL)
    name = f"k{os.getpid() % 10000}"
    up = subprocess.Popen([SIDESTEP, "lab", "up", "--name", name, "--nodes", "1", "--plain", "-f", str(manifest)],
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    time.sleep(after)  # a place in the middle, any will do
    up.send_signal(number)
    up.wait(60)
    if number == signal.SIGKILL:
        subprocess.run([SIDESTEP, "lab", "down", "--name", name], check=True, timeout=60)
    assert everything_of(name) == []
    assert list(leftovers(name)) == []


def captured(name: str) -> bool:
    """A pod of the lab has programs: its pins are there."""
    return any(Path("/sys/fs/bpf").glob(f"sidestep-{name}-node1/*/*-*-*"))


@pytest.mark.parametrize(
    ("words", "number"),
    [
        ("starting the API", signal.SIGKILL),
        ("starting the API", signal.SIGTERM),
        ("waiting for the agents", signal.SIGKILL),
        ("waiting for the agents", signal.SIGTERM),
        ("applying", signal.SIGKILL),
        ("a pod is captured", signal.SIGKILL),
        ("a pod is captured", signal.SIGTERM),  # by then all is made, and the lab stays to be looked at
    ],
)
def test_up_of_a_mesh_that_ends_half_way_leaves_nothing(tmp_path: Path, words: str, number: signal.Signals) -> None:
    """At each step: before there is an agent, while it starts, and with programs in a pod."""
    manifest = tmp_path / "small.yaml"
    namespace = {"apiVersion": "v1", "kind": "Namespace",
                 "metadata": {"name": "yard", "labels": {"istio.io/dataplane-mode": "ambient"}}}  # fmt: skip
    slow = {"readinessProbe": {"exec": {"command": ["false"]}}}  # `up` waits for it until it is killed
    manifest.write_text(yaml.safe_dump_all([namespace, pod("one", "node1", slow)]))
    name, before = f"k{os.getpid() % 10000}", host_rules()
    command = [SIDESTEP, "lab", "up", "--name", name, "--nodes", "1", "-f", str(manifest)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as up:
        assert up.stdout is not None
        try:
            seen = "waiting for the pods" if words == "a pod is captured" else words
            assert any(seen in line for line in up.stdout)
            if words == "a pod is captured":
                eventually(words, lambda: captured(name))
            assert everything_of(name) != []
        finally:
            up.send_signal(number)
            up.communicate(timeout=60)
    down = [SIDESTEP, "lab", "down", "--name", name]
    try:
        if number == signal.SIGTERM and words != "a pod is captured":
            assert everything_of(name) == []
    finally:
        subprocess.run(down, check=True, timeout=60)
    assert everything_of(name) == []
    assert list(leftovers(name)) == []
    assert [line for line in host_rules() if line not in before and f"{name}-" in line] == []


# -- what a user may do wrong ------------------------------------------------------------------------------------------
def refused(*args: str, env: dict[str, str] | None = None, prefix: tuple[str, ...] = ()) -> str:
    """Runs `sidestep lab ...`, which must fail with one line on stderr. Returns the line."""
    done = subprocess.run(
        [*prefix, SIDESTEP, "lab", *args], capture_output=True, text=True, timeout=60,
        env={**os.environ, **(env or {})},
    )  # fmt: skip
    assert done.returncode != 0
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr


POD_TEXT = "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {containers: [{name: a, command: [sleep, '1']}]}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not YAML"),
        ("apiVersion: v1\nkind: Namespace\nmetadata: {}", "without metadata.name"),
        ("apiVersion: v1\nkind: Unicorn\nmetadata: {name: x}", "unknown kind v1 Unicorn"),
        (POD_TEXT.replace("command:", "livenessProbe: {exec: {command: [x]}}, command:"), "livenessProbe"),
        (POD_TEXT.replace("spec: {", "spec: {nodeName: node9, "), "wants node9"),
        (POD_TEXT.replace("{name: p}", "{name: p, namespace: nowhere}"), "nowhere"),
        (POD_TEXT.replace("name: p", "name: Not_A_Name"), "Not_A_Name"),
    ],
)
def test_a_bad_manifest_is_one_clear_line_and_nothing_is_left(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    name = f"b{os.getpid() % 10000}"
    line = refused("up", "--name", name, "--nodes", "1", "--plain", "-f", str(path))
    assert message in line
    assert str(path) in line
    assert everything_of(name) == []


def test_other_mistakes(yard: Lab, tmp_path: Path) -> None:
    name = f"b{os.getpid() % 10000}"
    assert "exists" in refused("up", "--name", yard.name, "--plain")
    assert yard.status()["processes"]["api"]["alive"]  # and was not touched
    assert "no such file" in refused("up", "--name", name, "-f", str(tmp_path / "no.yaml"))
    assert "cannot name a lab" in refused("up", "--name", "Not-A-Name")
    assert "--nodes" in refused("up", "--name", name, "--nodes", "0")
    assert "there is no lab" in refused("status", "--name", name)
    assert "there is no lab" in refused("exec", "--name", name, "a/b", "--", "true")
    assert "not NAMESPACE/POD" in refused("exec", "--name", yard.name, "plain", "--", "true")
    assert "has no node" in refused("exec", "--name", yard.name, "--node", "node9", "--", "true")
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("ip", "nft", "nsenter", "unshare", "sysctl", "umount", "mount"):
        (tools / tool).symlink_to(subprocess.check_output(["which", tool], text=True).strip())
    assert "dnsmasq" in refused("up", "--name", name, "--plain", env={"PATH": str(tools)})
    assert everything_of(name) == []


def test_without_root_it_says_so(tmp_path: Path) -> None:
    name = f"b{os.getpid() % 10000}"
    unprivileged = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all")
    for verb in ("up", "down"):
        assert "needs root" in refused(verb, "--name", name, prefix=unprivileged)
    assert everything_of(name) == []


def test_status_is_the_same_for_people_and_programs(yard: Lab) -> None:
    status = json.loads(yard.command("status", "--json").stdout)
    text = yard.command("status").stdout
    assert [node["name"] for node in status["nodes"]] == ["node1", "node2"]
    assert all(process["alive"] for process in status["processes"].values())
    names = {item["name"] for item in status["pods"]}
    assert {"plain", "echo", "rich"} <= names
    assert all(name in text for name in names)
    assert os.stat(status["kubeconfig"]).st_mode & 0o777 == 0o600
