"""Where clear text is refused (PeerAuthentication STRICT), the kubelet's probes go on and nobody else's do.

The lab's kubelet part asks from the node's namespace, in a cgroup2 directory of its own; the other process of the node
is this test, in the same namespace, from the same address.
"""

import contextlib
import json
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sidestep.kube.client import KubeError
from tests.harness.lab import ANNOTATION, LABEL, Lab, eventually
from tests.harness.netns import inside

NAMESPACE = "probed"
PORT, OTHER = 8080, 8081
SERVER = """
import http.server, socketserver, sys, threading
class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    address_family, daemon_threads = __import__("socket").AF_INET6, True
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.client_address[0].removeprefix("::ffff:").encode())
    def log_message(self, *what):
        print(self.headers["User-Agent"], self.client_address[0], flush=True)
for port in map(int, sys.argv[1:]):
    threading.Thread(target=Server(("::", port), Handler).serve_forever).start()
"""


def pod(name: str, probe: dict[str, Any], families: str = "") -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": NAMESPACE,
            "annotations": {"lab.sidestep.dev/families": families} if families else {},
        },
        "spec": {
            "nodeName": "node1",
            "terminationGracePeriodSeconds": 1,
            "containers": [
                {
                    "name": "main",
                    "image": "host",
                    "command": ["/usr/bin/python3", "-c", SERVER, str(PORT), str(OTHER)],
                    "ports": [{"name": "web", "containerPort": PORT}],
                    "readinessProbe": {"periodSeconds": 1, "failureThreshold": 1, **probe},
                }
            ],
        },
    }


HTTP = {"httpGet": {"path": "/", "port": "web"}}
PODS = {"http": pod("http", HTTP), "tcp": pod("tcp", {"tcpSocket": {"port": PORT}}), "six": pod("six", HTTP, "IPv6")}


@pytest.fixture(scope="module")
def probed(mesh: Lab) -> Iterator[Lab]:
    """Three enrolled pods with probes of every kind and family."""
    mesh.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": {LABEL: "ambient"}}},
        *PODS.values(),
    )
    try:
        for name in PODS:
            eventually(f"{name} is ready", lambda name=name: mesh.ready(f"{NAMESPACE}/{name}"))  # type: ignore[misc]
            eventually(f"{name} is enrolled", lambda name=name: enrolled(mesh, name))  # type: ignore[misc]
        yield mesh
    finally:
        for name in PODS:
            mesh.delete_pod(f"{NAMESPACE}/{name}")
        mesh.ask(lambda client: client.delete(f"/api/v1/namespaces/{NAMESPACE}"))


def enrolled(lab: Lab, name: str) -> bool:
    return (lab.pod(f"{NAMESPACE}/{name}")["metadata"].get("annotations") or {}).get(ANNOTATION) == "enabled"


def agent(lab: Lab, page: str) -> Any:
    """A page of node1's agent."""
    run_dir = next(node["run_dir"] for node in lab.status()["nodes"] if node["name"] == "node1")
    command = ["curl", "-s", "--fail", "--unix-socket", f"{run_dir}/agent.sock", f"http://localhost{page}"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def node_netns(lab: Lab) -> str:
    return str(next(node["netns"] for node in lab.status()["nodes"] if node["name"] == "node1"))


def counted(lab: Lab) -> int:
    """Probes that node1 handed to applications."""
    command = ["nsenter", f"--net={node_netns(lab)}", "curl", "-s", "--fail", "http://127.0.0.1:15020/metrics"]
    page = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    name = 'sidestep_capture_packets_total{decision="to_application_probe"} '
    return sum(int(line.removeprefix(name)) for line in page.splitlines() if line.startswith(name))


def ask(lab: Lab, address: str, port: int = PORT) -> str:
    """What another process of the node gets as an answer; "" where it is refused."""

    def connect() -> socket.socket:
        made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        made.settimeout(20)
        return made

    with contextlib.closing(inside(node_netns(lab), connect)) as made:
        try:
            made.connect((address, port))
            made.sendall(b"GET / HTTP/1.0\r\nUser-Agent: another\r\n\r\n")
            text = b""
            while more := made.recv(4096):
                text += more
        except (ConnectionResetError, ConnectionRefusedError):
            return ""
        return text.decode()


def since(lab: Lab, name: str) -> tuple[str, str]:
    """The pod's readiness, and since when."""
    conditions = lab.pod(f"{NAMESPACE}/{name}")["status"]["conditions"]
    ready = next(entry for entry in conditions if entry["type"] == "Ready")
    return ready["status"], ready["lastTransitionTime"]


def strict(lab: Lab, mode: str) -> None:
    """kubectl apply of the namespace's PeerAuthentication."""
    path = f"/apis/security.istio.io/v1/namespaces/{NAMESPACE}/peerauthentications"
    spec = {"mtls": {"mode": mode}}
    try:
        lab.ask(lambda client: client.patch(f"{path}/default", {"spec": spec}))
    except KubeError as error:
        assert error.status == 404, error
        meta = {"name": "default", "namespace": NAMESPACE}
        item = {"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication", "metadata": meta, "spec": spec}
        lab.apply(item)


def test_probes_go_on_under_strict_and_another_process_is_refused(probed: Lab) -> None:
    lab = probed
    addresses = [lab.address(f"{NAMESPACE}/http", 4), lab.address(f"{NAMESPACE}/http", 6)]
    addresses += [lab.address(f"{NAMESPACE}/six", 6)]
    status = agent(lab, "/status")["probes"]
    assert status["active"] and status["cgroup"].endswith("/kubelet") and status["reason"] == ""
    for address in addresses:  # the control: without the policy this process is served
        assert ask(lab, address) != ""
    strict(lab, "STRICT")
    for address in addresses:
        eventually(f"clear text to {address} is refused", lambda address=address: ask(lab, address) == "")  # type: ignore[misc]
    before = {name: since(lab, name) for name in PODS}
    assert {status for status, _ in before.values()} == {"True"}
    asked = counted(lab)

    def said(agent: str) -> int:
        return lab.logs(f"{NAMESPACE}/http").count(agent)

    kubelets, others = said("kube-probe"), said("another")
    eventually("each pod was probed again and again", lambda: counted(lab) >= asked + 5 * len(PODS))
    eventually("the application saw it", lambda: said("kube-probe") >= kubelets + 5)
    assert {name: since(lab, name) for name in PODS} == before, "readiness never wavered"
    for address in addresses:
        assert ask(lab, address) == "" and ask(lab, address, OTHER) == ""
    assert said("another") == others
    strict(lab, "PERMISSIVE")
    eventually("and served again when the policy is gone", lambda: ask(lab, addresses[0]) != "")


def test_without_the_exemption_strict_makes_a_pod_unready(probed: Lab) -> None:
    """The control of the test above: the kubelet in another directory than the agent knows is another process."""
    lab = probed
    cgroup = Path(agent(lab, "/status")["probes"]["cgroup"])
    beside = cgroup.with_name("beside")
    strict(lab, "STRICT")
    address = lab.address(f"{NAMESPACE}/http")
    eventually("clear text is refused", lambda: ask(lab, address) == "")
    ready: Callable[[], bool] = lambda: lab.ready(f"{NAMESPACE}/http")  # noqa: E731
    assert ready()
    pids = (cgroup / "cgroup.procs").read_text().split()
    beside.mkdir()
    try:
        for pid in pids:
            (beside / "cgroup.procs").write_text(pid)
        eventually("not ready", lambda: not ready())
        for pid in pids:
            (cgroup / "cgroup.procs").write_text(pid)
        eventually("ready again", ready)
    finally:
        with contextlib.suppress(OSError):
            for pid in pids:
                (cgroup / "cgroup.procs").write_text(pid)
        beside.rmdir()
