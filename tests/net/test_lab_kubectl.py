"""The lab's API as a process, with kubectl: Debian's, which must be there, and the machine's own where there is one.

No node runs here: the test says through the API what nodes would say. Everything is on 127.0.0.1.
"""

import json
import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEBIAN = ROOT / "build" / "kubectl"
KUBECTLS = [str(DEBIAN)] + [path for path in ("/usr/bin/kubectl", "/usr/local/bin/kubectl") if os.access(path, os.X_OK)]
GUARD_S = 30.0

NODES = json.dumps(
    {
        "apiVersion": "v1",
        "kind": "List",
        "items": [
            {
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
                "status": {"conditions": [{"type": "Ready", "status": "True"}]},
            }
            for name in ("node1", "node2")
        ],
    }
)
MANIFEST = """
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: web, namespace: shop}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: pages, namespace: shop}
data: {index.html: hello}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      serviceAccountName: web
      terminationGracePeriodSeconds: 1
      containers:
      - name: web
        image: host
        command: [sleep, infinity]
        ports: [{name: http, containerPort: 8080}]
        readinessProbe: {httpGet: {path: /, port: http}}
        volumeMounts: [{name: pages, mountPath: /pages}]
      volumes: [{name: pages, configMap: {name: pages}}]
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  ipFamilyPolicy: PreferDualStack
  selector: {app: web}
  ports: [{port: 80, targetPort: http}]
"""


class Api:
    """The process and its kubeconfig; `kubectl` is the one to ask with."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.kubectl = KUBECTLS[0]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.process = start(directory, self.port)
        assert self.process.stdout is not None
        self.ready = self.process.stdout.readline().strip()
        self.kubeconfig = directory / "kubeconfig"

    def run(self, *arguments: str, stdin: str = "", check: bool = True) -> "subprocess.CompletedProcess[str]":
        """One kubectl command."""
        done = subprocess.run(
            [self.kubectl, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=2 * GUARD_S,
            env=self.environment(),
        )
        assert not check or done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done

    def environment(self) -> dict[str, str]:
        """For kubectl: nothing of the caller's own clusters."""
        home = str(self.directory)
        return {"KUBECONFIG": str(self.kubeconfig), "HOME": home, "PATH": os.environ["PATH"]}

    def get(self, *arguments: str) -> Any:
        """`kubectl get -o json`."""
        return json.loads(self.run("get", *arguments, "-o", "json").stdout)

    def raw(self, method: str, path: str, body: Any = None) -> Any:
        """What kubectl has no verb for (a node's writes), and polling: a kubectl costs 0.1 s of a core."""
        import urllib.request

        config = yaml.safe_load(self.kubeconfig.read_text())
        form = {"PATCH": "application/merge-patch+json"}.get(method, "application/json")
        token = config["users"][0]["user"]["token"]
        headers = {"Authorization": f"Bearer {token}", "Content-Type": form}
        url = config["clusters"][0]["cluster"]["server"] + path
        request = urllib.request.Request(url, body and json.dumps(body).encode(), headers, method=method)
        with urllib.request.urlopen(request, context=self.tls(), timeout=GUARD_S) as answer:
            return json.load(answer)

    def tls(self) -> ssl.SSLContext:
        """Trusts the API's CA and nothing else."""
        import base64

        config = yaml.safe_load(self.kubeconfig.read_text())
        data = base64.b64decode(config["clusters"][0]["cluster"]["certificate-authority-data"])
        return ssl.create_default_context(cadata=data.decode())

    def pods(self, namespace: str) -> list[Any]:
        """The pods of a namespace."""
        return list(self.raw("GET", f"/api/v1/namespaces/{namespace}/pods")["items"])

    def act_as_nodes(self, namespace: str) -> None:
        """Says of pods on nodes that they run, and of those that go that they are gone."""
        for number, pod in enumerate(self.pods(namespace), 1):
            path = f"/api/v1/namespaces/{namespace}/pods/{pod['metadata']['name']}"
            if "deletionTimestamp" in pod["metadata"]:
                self.raw("DELETE", path, {"gracePeriodSeconds": 0, "preconditions": {"uid": pod["metadata"]["uid"]}})
            elif "nodeName" in pod["spec"] and pod["status"]["phase"] == "Pending":
                status = {
                    "phase": "Running",
                    "podIPs": [{"ip": f"10.213.0.{number}"}, {"ip": f"fd00:d5::{number}"}],
                    "conditions": [{"type": "Ready", "status": "True"}],
                    "containerStatuses": [{"name": "web", "ready": True, "restartCount": 0, "state": {"running": {}}}],
                }
                self.raw("PATCH", f"{path}/status", {"status": status})

    def until(self, what: str, good: Callable[[], Any], namespace: str = "") -> None:
        """Waits for something, playing the nodes meanwhile."""
        deadline = time.monotonic() + GUARD_S
        while not good():
            assert time.monotonic() < deadline, f"{what}: not within {GUARD_S} s"
            if namespace:
                self.act_as_nodes(namespace)
            time.sleep(0.02)

    def stop(self) -> int:
        """Ends the process as the lab does."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(GUARD_S)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        return status


def start(directory: Path, port: int) -> "subprocess.Popen[str]":
    """The API's process, as the lab starts it."""
    argv = [sys.executable, "-m", "sidestep.lab.api", "--name", "t", "--bind", "127.0.0.1", "--port", str(port)]
    argv += ["--dir", str(directory), "--service-cidr4", "10.213.128.0/24", "--service-cidr6", "fd5d:e57e:d5:200::/112"]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """One API for the module."""
    found = Api(tmp_path_factory.mktemp("api"))
    try:
        yield found
    finally:
        found.stop()


@pytest.fixture(params=KUBECTLS, ids=["debian", *("machine" for _ in KUBECTLS[1:])])
def api(server: Api, request: pytest.FixtureRequest) -> Iterator[Api]:
    """The API with one of the kubectls; its namespaces are gone afterwards."""
    assert DEBIAN.exists(), f"{DEBIAN} is missing: `make setup` fetches it"
    server.kubectl = str(request.param)
    server.run("apply", "-f", "-", stdin=NODES)
    try:
        yield server
    finally:
        for kind in ("pods", "deployments", "services"):
            server.run("delete", kind, "-n", "default", "-l", "t", "--force", "--grace-period=0", "--wait=false")
        server.run("delete", "ns", "shop", "--ignore-not-found", "--wait=false")

        def gone() -> bool:
            return "shop" not in [item["metadata"]["name"] for item in server.raw("GET", "/api/v1/namespaces")["items"]]

        server.until("shop gone", gone, "shop")


def test_apply_wait_get_label_annotate_scale_delete(api: Api) -> None:
    done = api.run("apply", "-f", "-", stdin=MANIFEST).stdout
    assert done.count("created") == 5
    again = api.run("apply", "-f", "-", stdin=MANIFEST).stdout
    assert again.count("unchanged") == 5, again
    api.until("available", lambda: _available(api), "shop")
    api.run("wait", "-n", "shop", "--for=condition=Available", "deployment/web", f"--timeout={GUARD_S:.0f}s")
    api.run("wait", "-n", "shop", "--for=condition=Ready", "pod", "-l", "app=web", f"--timeout={GUARD_S:.0f}s")

    table = api.run("get", "pods", "-n", "shop", "-o", "wide").stdout.splitlines()
    assert table[0].split()[:5] == ["NAME", "READY", "STATUS", "RESTARTS", "AGE"] and len(table) == 3
    assert {line.split()[2] for line in table[1:]} == {"Running"}
    assert {line.split()[-1] for line in table[1:]} == {"node1", "node2"}
    for kind in ("ns", "nodes", "svc", "cm", "sa", "deploy", "rs", "endpointslices", "secrets", "events", "leases"):
        head = api.run("get", kind, "-n", "shop").stdout.splitlines()[:1]
        assert not head or (head[0].startswith("NAME ") and " AGE" in head[0]), (kind, head)
    assert yaml.safe_load(api.run("get", "cm", "pages", "-n", "shop", "-o", "yaml").stdout)["data"] == {
        "index.html": "hello"
    }
    addresses = [endpoint["addresses"] for item in _slices(api) for endpoint in item["endpoints"]]
    assert len(addresses) == 4 and {item["ports"][0]["port"] for item in _slices(api)} == {8080}

    api.run("label", "ns", "shop", "istio.io/dataplane-mode=ambient")
    assert api.run("get", "ns", "-l", "istio.io/dataplane-mode=ambient", "-o", "name").stdout == "namespace/shop\n"
    assert api.run("label", "ns", "shop", "istio.io/dataplane-mode=none", check=False).returncode != 0
    api.run("label", "ns", "shop", "istio.io/dataplane-mode-")
    assert api.run("get", "ns", "-l", "istio.io/dataplane-mode", "-o", "name").stdout == ""
    api.run("annotate", "-n", "shop", "service", "web", "a/b=c d")
    assert api.get("svc", "web", "-n", "shop")["metadata"]["annotations"]["a/b"] == "c d"
    named = api.run("get", "pods", "-n", "shop", "--field-selector", "spec.nodeName=node1", "-o", "name").stdout
    assert named.startswith("pod/web-") and named.count("\n") == 1

    api.run("scale", "-n", "shop", "deployment/web", "--replicas=3")
    api.until("scaled", lambda: _available(api) == 3, "shop")
    pods = {item["metadata"]["uid"] for item in api.pods("shop")}
    api.run("rollout", "restart", "-n", "shop", "deployment/web")
    api.until(
        "restarted",
        lambda: not pods & {item["metadata"]["uid"] for item in api.pods("shop")},
        "shop",
    )
    api.until("rolled out", lambda: _available(api) == 3, "shop")
    api.run("rollout", "status", "-n", "shop", "deployment/web", f"--timeout={GUARD_S:.0f}s")

    # A changed manifest: what is gone from it goes, what the server added stays.
    changed = MANIFEST.replace("data: {index.html: hello}", "data: {other.html: hello}")
    done = api.run("apply", "-f", "-", stdin=changed).stdout
    assert "configmap/pages configured" in done and "deployment.apps/web configured" in done  # two replicas again
    assert done.count("unchanged") == 3 and api.get("deployment", "web", "-n", "shop")["spec"]["replicas"] == 2
    assert api.get("cm", "pages", "-n", "shop")["data"] == {"other.html": "hello"}
    before = api.get("svc", "web", "-n", "shop")["spec"]["clusterIPs"]
    assert len(before) == 2
    api.run("apply", "-f", "-", stdin=changed.replace("port: 80,", "port: 81,"))
    service = api.get("svc", "web", "-n", "shop")["spec"]
    assert service["clusterIPs"] == before and [port["port"] for port in service["ports"]] == [81]

    api.run("delete", "-n", "shop", "deployment/web")
    api.until("no pods", lambda: not api.pods("shop"), "shop")
    api.run("delete", "namespace", "shop")
    assert api.run("get", "ns", "shop", check=False).returncode == 1


def _available(api: Api) -> int:
    deployment = api.raw("GET", "/apis/apps/v1/namespaces/shop/deployments/web")
    status, wanted = deployment.get("status", {}), deployment["spec"]["replicas"]
    good = status.get("availableReplicas") == status.get("updatedReplicas") == status.get("replicas") == wanted
    return int(wanted) if good and status["observedGeneration"] == deployment["metadata"]["generation"] else 0


def _slices(api: Api) -> list[Any]:
    return list(api.get("endpointslices", "-n", "shop", "-l", "kubernetes.io/service-name=web")["items"])


def test_server_side_apply_and_create(api: Api) -> None:
    assert api.run("apply", "--server-side", "-f", "-", stdin=MANIFEST).stdout.count("serverside-applied") == 5
    changed = MANIFEST.replace("data: {index.html: hello}", "data: {other.html: hello}")
    api.run("apply", "--server-side", "-f", "-", stdin=changed)
    assert api.get("cm", "pages", "-n", "shop")["data"] == {"other.html": "hello"}
    refused = api.run("create", "-f", "-", stdin=MANIFEST, check=False)
    assert refused.returncode == 1 and refused.stderr.count("already exists") == 5


POLICIES = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: web, namespace: default}
spec:
  action: DENY
  selector: {matchLabels: {app: web}}
  rules: [{from: [{source: {namespaces: [other]}}]}]
---
apiVersion: security.istio.io/v1beta1
kind: PeerAuthentication
metadata: {name: default, namespace: default}
spec: {mtls: {mode: STRICT}}
"""


def test_policies(api: Api) -> None:
    assert api.run("apply", "-f", "-", stdin=POLICIES).stdout.count("created") == 2
    assert api.run("apply", "-f", "-", stdin=POLICIES).stdout.count("unchanged") == 2
    table = [line.split() for line in api.run("get", "authorizationpolicies").stdout.splitlines()]
    assert table[0] == ["NAME", "ACTION", "AGE"] and table[1][:2] == ["web", "DENY"]
    assert api.run("get", "peerauthentication").stdout.splitlines()[1].split()[:2] == ["default", "STRICT"]
    for each in ("ap", "authorizationpolicy.security.istio.io", "authorizationpolicies.v1beta1.security.istio.io"):
        assert api.run("get", each, "-o", "name").stdout == "authorizationpolicy.security.istio.io/web\n"
    done = api.run("apply", "-f", "-", stdin=POLICIES.replace("STRICT", "PERMISSIVE")).stdout
    assert done.count("unchanged") == 1 and done.count("configured") == 1
    assert api.get("peerauthentication", "default")["spec"] == {"mtls": {"mode": "PERMISSIVE"}}
    status = {"status": {"conditions": [{"type": "ZtunnelAccepted", "status": "False"}]}}
    api.raw("PATCH", "/apis/security.istio.io/v1/namespaces/default/authorizationpolicies/web/status", status)
    api.run("wait", "--for=condition=ZtunnelAccepted=false", "authorizationpolicy/web", f"--timeout={GUARD_S:.0f}s")
    assert "ZtunnelAccepted" in api.run("describe", "authorizationpolicy", "web").stdout
    assert api.run("apply", "-f", "-", stdin=POLICIES).stdout.count("configured") == 1  # the status is not its affair
    assert api.get("authorizationpolicy", "web")["status"]["conditions"][0]["status"] == "False"
    assert api.run("delete", "-f", "-", stdin=POLICIES).stdout.count("deleted") == 2
    assert api.run("get", "ap,pa", "-o", "name").stdout == ""


def test_get_w_shows_changes_as_they_come(api: Api) -> None:
    api.run("create", "ns", "shop")
    argv = [api.kubectl, "get", "configmaps", "-n", "shop", "-w", "--output-watch-events"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=api.environment()) as watch:
        try:
            assert watch.stdout is not None
            assert watch.stdout.readline().split() == ["EVENT", "NAME", "DATA", "AGE"]
            assert watch.stdout.readline().split()[:3] == ["ADDED", "kube-root-ca.crt", "1"]
            api.run("create", "configmap", "fresh", "-n", "shop", "--from-literal=a=b")
            assert watch.stdout.readline().split()[:3] == ["ADDED", "fresh", "1"]
            api.run("label", "configmap", "fresh", "-n", "shop", "x=y")
            assert watch.stdout.readline().split()[:3] == ["MODIFIED", "fresh", "1"]
            api.run("delete", "configmap", "fresh", "-n", "shop")
            assert watch.stdout.readline().split()[:3] == ["DELETED", "fresh", "1"]
        finally:
            watch.terminate()


def test_delete_waits_for_the_node_and_wait_for_delete_sees_it(api: Api) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "labels": {"t": "1"}}}
    pod["spec"] = {"nodeName": "node1", "containers": [{"name": "c", "command": ["sleep"]}]}
    api.run("create", "-f", "-", stdin=json.dumps(pod))
    wait = [api.kubectl, "wait", "--for=delete", "pod/p", f"--timeout={GUARD_S:.0f}s"]
    with subprocess.Popen(wait, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=api.environment()) as waiting:
        with subprocess.Popen(
            [api.kubectl, "delete", "pod", "p"], stdout=subprocess.DEVNULL, env=api.environment()
        ) as going:
            api.until("marked", lambda: "deletionTimestamp" in api.pods("default")[0]["metadata"])
            assert waiting.poll() is None and going.poll() is None
            api.raw("DELETE", "/api/v1/namespaces/default/pods/p", {"gracePeriodSeconds": 0})
            assert going.wait(GUARD_S) == 0
        # kubectl may only now come to ask, and then finds nothing to wait for; both mean gone.
        said = b"" if waiting.wait(GUARD_S) == 0 or waiting.stderr is None else waiting.stderr.read()
        assert waiting.returncode == 0 or b"not found" in said or b"no matching resources found" in said


def test_bad_input_is_refused_in_one_clear_line(api: Api) -> None:
    pod: dict[str, Any] = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "bad"}}
    pod["spec"] = {"containers": [{"name": "c", "command": ["sleep"], "livenessProbe": {"exec": {"command": ["x"]}}}]}
    cases = [
        (("apply", "-f", "-"), "a: [", "YAML"),
        (("apply", "-f", "-"), "apiVersion: v1\nkind: Toaster\nmetadata: {name: x}\n", "Toaster"),
        (("create", "-f", "-"), "apiVersion: v1\nkind: ConfigMap\nmetadata: {namespace: default}\n", "name"),
        (("apply", "-f", "-"), json.dumps(pod), "spec.containers[0].livenessProbe"),
        (("create", "-f", "-"), json.dumps(pod), "spec.containers[0].livenessProbe"),
        (("get", "toasters"), "", "toasters"),
        (("get", "pods", "--field-selector", "spec.color=red"), "", "spec.color"),
        (("get", "pod", "none"), "", '"none" not found'),
        (("annotate", "pod", "none", "a=b"), "", '"none" not found'),
        (("delete", "ns", "kube-system"), "", "forbidden"),
    ]
    for arguments, stdin, word in cases:
        done = api.run(*arguments, stdin=stdin, check=False)
        assert done.returncode != 0 and word in done.stderr, (arguments, done.stderr)
    api.run(
        "create", "-f", "-", stdin=json.dumps({**pod, "spec": {"containers": [{"name": "c", "command": ["sleep"]}]}})
    )
    api.run("label", "pod", "bad", "t=1")
    for arguments in (("exec", "bad", "--", "ls"), ("attach", "bad"), ("port-forward", "bad", "1:1")):
        done = api.run(*arguments, check=False)
        assert done.returncode != 0, arguments
    assert "sidestep lab exec" in api.run("exec", "bad", "--", "ls", check=False).stderr


def test_version_and_api_resources(api: Api) -> None:
    assert "sidestep-lab" in api.run("version").stdout
    names = {line.split()[0] for line in api.run("api-resources").stdout.splitlines()[1:]}
    assert {
        "pods",
        "services",
        "deployments",
        "endpointslices",
        "namespaces",
        "nodes",
        "configmaps",
        "secrets",
        "events",
        "authorizationpolicies",
        "peerauthentications",
    } <= names


def test_the_kubeconfig_is_the_owners_and_the_token_is_needed(server: Api) -> None:
    assert server.ready == f"ready {server.kubeconfig}"
    assert stat.S_IMODE(server.kubeconfig.stat().st_mode) == 0o600
    assert [path.name for path in server.directory.iterdir() if path.is_file()] == ["kubeconfig"]  # no key anywhere
    for head, code in ((b"", b"401"), (b"Authorization: Bearer x\r\n", b"401")):
        with socket.create_connection(("127.0.0.1", server.port), timeout=GUARD_S) as plain:
            with server.tls().wrap_socket(plain, server_hostname="127.0.0.1") as tls:
                tls.sendall(b"GET /api/v1/secrets HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + head + b"\r\n")
                assert tls.recv(4096).split()[1] == code
    with socket.create_connection(("127.0.0.1", server.port), timeout=GUARD_S) as plain:
        plain.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")  # without TLS
        try:
            assert not plain.recv(4096).startswith(b"HTTP")
        except ConnectionError:
            pass


def test_a_taken_port_is_said_in_one_line(server: Api, tmp_path: Path) -> None:
    second = start(tmp_path, server.port)
    out, err = second.communicate(timeout=GUARD_S)
    assert second.returncode == 1 and out == "" and not (tmp_path / "kubeconfig").exists()
    assert err.count("\n") == 1 and "another process" in err and str(server.port) in err


def test_it_ends_at_once_and_in_order_with_watches_open(tmp_path: Path) -> None:
    api = Api(tmp_path)
    argv = [api.kubectl, "get", "namespaces", "-w", "-o", "name"]
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=api.environment()
    ) as watch:
        try:
            assert watch.stdout is not None and watch.stdout.readline()
            assert api.stop() == 0
        finally:
            watch.terminate()
