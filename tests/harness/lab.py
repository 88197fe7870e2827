"""A lab as the tests use it: brought up once, asked by the commands that people use, taken down whatever happens."""

import asyncio
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sidestep.kube.client import KubeClient
from sidestep.lab.link import Tap

SIDESTEP = str(Path(sys.executable).with_name("sidestep"))
ROOT = Path(__file__).resolve().parents[2]
LABEL = "istio.io/dataplane-mode"
ANNOTATION = "ambient.istio.io/redirection"

T = TypeVar("T")


def build_customers() -> Path:
    """The C load of tests/e2e/customers.c, compiled once. Returns its path."""
    source, binary = ROOT / "tests/e2e/customers.c", ROOT / "build/customers"
    if not binary.exists() or binary.stat().st_mtime < source.stat().st_mtime:
        binary.parent.mkdir(exist_ok=True)
        new = binary.with_suffix(".new")
        subprocess.run(["gcc", "-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-o", new, source], check=True)
        new.rename(binary)
    return binary


def eventually(what: str, question: Callable[[], T], seconds: float = 60) -> T:
    """Asks until the answer is true and returns it. Fails the test after `seconds`, a hang guard and no measurement."""
    deadline = time.monotonic() + seconds
    while True:
        answer = question()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s; last answer {answer!r}"
        time.sleep(0.1)


def everything_of(name: str) -> list[str]:
    """What is there of a lab, looked for without the lab's own means."""
    found = [
        line for line in subprocess.check_output(["ip", "netns"], text=True).split() if line.startswith(f"{name}-")
    ]
    found += [each for each in os.listdir("/sys/class/net") if each == f"{name}-api"]
    found += [line for line in host_rules() if f"{name}-" in line]
    found += [line for line in Path("/proc/mounts").read_text().splitlines() if f"/lab/{name}" in line]
    found += [str(path) for path in Path("/sys/fs/bpf").glob(f"sidestep-{name}-*")]
    # os.walk, for cgroups of others come and go meanwhile
    found += [path for path, _, _ in os.walk("/sys/fs/cgroup") if path.endswith(f"/sidestep-lab-{name}")]
    found += [str(path) for path in Path("/run/sidestep/lab").glob(f"{name}*")]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if any(f"/lab/{name}/" in word for word in words) or ("sidestep.lab.dns" in words and name in words):
            found.append(" ".join(words))
    return found


def host_rules() -> list[str]:
    """Rules, packet filters and routes of this machine's own namespace, one a line; a lab has no business with any but
    the route to its API."""
    asked = (["ip", "-4", "rule"], ["ip", "-6", "rule"], ["nft", "list", "ruleset"],
             ["ip", "-4", "route", "show", "table", "all"], ["ip", "-6", "route", "show", "table", "all"])  # fmt: skip
    return [line for words in asked for line in subprocess.check_output(words, text=True).splitlines()]


async def _create(path: str, item: dict[str, Any], client: KubeClient) -> Any:
    return await client.create(path, item)


class Lab:
    """One lab by name. `plain` labs have the same pods and addresses without the mesh: the controls."""

    def __init__(self, name: str, *, nodes: int = 2, plain: bool = False) -> None:
        self.name, self.nodes, self.plain = name, nodes, plain
        self._kubeconfig = ""

    def command(self, *args: str, timeout: float = 120, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`sidestep lab VERB --name NAME ...`."""
        verb, rest = args[0], args[1:]
        done = subprocess.run(
            [SIDESTEP, "lab", verb, "--name", self.name, *rest], capture_output=True, text=True, timeout=timeout
        )
        assert not check or done.returncode == 0, f"lab {' '.join(args)}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done

    def up(self, *manifests: Path, options: Sequence[str] = ()) -> None:
        """Brings it up with these manifests and further options; every pod is ready afterwards."""
        words = ["--nodes", str(self.nodes), *(["--plain"] if self.plain else []), *options]
        for manifest in manifests:
            words += ["-f", str(manifest)]
        self.command("up", *words, timeout=240)

    def down(self) -> None:
        """Takes it down."""
        self.command("down", timeout=120)

    def status(self) -> dict[str, Any]:
        """`lab status --json`."""
        return dict(json.loads(self.command("status", "--json").stdout))

    def exec(self, pod: str, *command: str, timeout: float = 60, check: bool = True) -> str:
        """Runs a command in a pod (`NAMESPACE/NAME`); returns what it printed."""
        return self.command("exec", pod, "--", *command, timeout=timeout, check=check).stdout

    def popen(self, pod: str, *command: str, **options: Any) -> "subprocess.Popen[str]":
        """Starts a command in a pod and leaves it running; the caller ends it."""
        argv = [SIDESTEP, "lab", "exec", "--name", self.name, pod, "--", *command]
        return subprocess.Popen(argv, text=True, **options)

    def logs(self, pod: str) -> str:
        """What the pod's container printed."""
        return self.command("logs", pod).stdout

    def tap(self, node: int = 0) -> Tap:
        """A witness on a node's end of the link."""
        link = self.status()["nodes"][node]["link"]
        return Tap(link["netns"], link["interface"])

    # -- the Kubernetes API ------------------------------------------------------------------------------------------
    def ask(self, call: Callable[[KubeClient], Any]) -> Any:
        """One question to the API."""
        if not self._kubeconfig:
            self._kubeconfig = self.command("kubeconfig").stdout.strip()

        async def run() -> Any:
            async with KubeClient.from_config(self._kubeconfig) as client:
                return await call(client)

        return asyncio.run(run())

    def pod(self, pod: str) -> dict[str, Any]:
        """The pod's object."""
        namespace, name = pod.split("/")
        return dict(self.ask(lambda client: client.get(f"/api/v1/namespaces/{namespace}/pods/{name}")))

    def pods(self, namespace: str) -> list[dict[str, Any]]:
        """The pods of a namespace."""
        return list(self.ask(lambda client: client.list(f"/api/v1/namespaces/{namespace}/pods"))["items"])

    def address(self, pod: str, family: int = 4) -> str:
        """A pod's address of one family."""
        found = [entry["ip"] for entry in self.pod(pod)["status"]["podIPs"] if (":" in entry["ip"]) == (family == 6)]
        return str(found[0])

    def apply(self, *objects: dict[str, Any]) -> None:
        """Creates objects; the path is found from kind and namespace."""
        paths = {
            "Pod": "pods",
            "Service": "services",
            "ServiceAccount": "serviceaccounts",
            "ConfigMap": "configmaps",
            "AuthorizationPolicy": "authorizationpolicies",
            "PeerAuthentication": "peerauthentications",
        }
        for item in objects:
            api = "/api/v1" if "/" not in item["apiVersion"] else f"/apis/{item['apiVersion']}"
            if item["kind"] == "Namespace":
                path = "/api/v1/namespaces"
            else:
                path = f"{api}/namespaces/{item['metadata']['namespace']}/{paths[item['kind']]}"
            self.ask(functools.partial(_create, path, item))

    def netns(self, pod: str) -> str:
        """Path of the pod's network namespace (docs/interfaces.md, "Inside the lab")."""
        item = self.pod(pod)
        return f"/run/sidestep/lab/{self.name}/{item['spec']['nodeName']}/netns/{item['metadata']['uid']}"

    def ready(self, pod: str) -> bool:
        """Is the pod's condition Ready true?"""
        conditions = self.pod(pod)["status"].get("conditions") or []
        return any(entry["type"] == "Ready" and entry["status"] == "True" for entry in conditions)

    def reuse_ports(self, pod: str) -> None:
        """For hundreds of connections a second between two addresses: the client's ports do not wait for 60 s."""
        enter = ["nsenter", f"--net={self.netns(pod)}"]
        subprocess.run([*enter, "sysctl", "-qw", "net.ipv4.tcp_tw_reuse=1"], check=True)

    def delete_pod(self, pod: str) -> None:
        """Deletes a pod and waits until it is gone."""
        namespace, name = pod.split("/")
        self.ask(lambda client: client.delete(f"/api/v1/namespaces/{namespace}/pods/{name}"))
        eventually(f"{pod} gone", lambda: name not in [item["metadata"]["name"] for item in self.pods(namespace)])

    def page(self, port: int, path: str, node: str = "node1") -> tuple[int, str]:
        """A page of a node's agent, asked for on the node: status and text."""
        asked = ("curl", "-sS", "-w", "\n%{http_code}", f"http://localhost:{port}{path}")
        text, _, status = self.command("exec", "--node", node, "--", *asked).stdout.rpartition("\n")
        return int(status), text

    def counter(self, name: str, node: str = "node1", label: str = "") -> float:
        """A metric of a node's agent and engine, summed over its labels; only samples with `label` in their text."""
        lines = self.page(15020, "/metrics", node)[1].splitlines()
        mine = [line for line in lines if line.startswith((f"{name}{{", f"{name} ")) and label in line]
        return sum(float(line.rsplit(" ", 1)[1]) for line in mine)

    # -- the mesh ----------------------------------------------------------------------------------------------------
    def label(self, namespace: str, value: str | None) -> None:
        """Sets or removes the label that decides."""
        patch = {"metadata": {"labels": {LABEL: value}}}
        self.ask(lambda client: client.patch(f"/api/v1/namespaces/{namespace}", patch))

    def enrolled(self, namespace: str) -> set[str]:
        """Names of the pods whose annotation says so."""
        return {
            pod["metadata"]["name"]
            for pod in self.pods(namespace)
            if (pod["metadata"].get("annotations") or {}).get(ANNOTATION) == "enabled"
        }

    def enrol(self, namespace: str) -> None:
        """Labels and waits for every running pod."""
        self.label(namespace, "ambient")
        eventually(
            f"{namespace} enrolled",
            lambda: self.enrolled(namespace) == {pod["metadata"]["name"] for pod in self.pods(namespace)},
        )

    def release(self, namespace: str) -> None:
        """Takes the label off and waits."""
        self.label(namespace, None)
        eventually(f"{namespace} released", lambda: not self.enrolled(namespace))
