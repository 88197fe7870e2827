"""`sidestep lab up`: from nothing to ready pods, or back to nothing with one line that says why."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sidestep.kube.client import ConfigError, KubeClient, KubeError
from sidestep.lab import keeper, network, podspec
from sidestep.lab.cluster import (
    AGENT_ACCOUNT,
    API_PORT,
    BPFFS,
    LABS,
    MAX_NODES,
    MAX_NUMBER,
    SYSTEM_NAMESPACE,
    XDS_PORT,
    Cluster,
    LabError,
    cgroup2,
    check_name,
    locked,
)
from sidestep.lab.down import down, leftovers
from sidestep.lab.manifests import Manifest
from sidestep.lab.sandbox import BIN, CNI_BASE, conflist
from sidestep.lab.services import SERVICE_LABEL

START_S = 30.0  # of API, and of nodes
AGENTS_S = 60.0  # they need the engine, the control plane and a certificate first
STATE_BYTES = "size=2g,mode=700"
TOOLS = ("ip", "nft", "dnsmasq", "nsenter", "unshare", "sysctl", "umount", "mount")
PLUGINS = ("ptp", "host-local")
CAPABILITIES = {12: "CAP_NET_ADMIN", 21: "CAP_SYS_ADMIN"}  # linux/capability.h
HOST_ONLY = ("other meshes",)  # of `sidestep check`: the lab's nodes have a CNI configuration of their own

Object = Mapping[str, Any]


class Progress:
    """Says what is waited for: one line that changes on a terminal, a line for each change elsewhere."""

    def __init__(self) -> None:
        self._tty = sys.stdout.isatty()
        self._last = ""
        self._started = time.monotonic()

    def step(self, text: str) -> None:
        """A step begins."""
        self._clear()
        print(f"[{time.monotonic() - self._started:5.1f} s] {text}", flush=True)

    def wait(self, text: str) -> None:
        """What is waited for now."""
        if text == self._last:
            return
        self._last = text
        if self._tty:
            columns = shutil.get_terminal_size().columns
            print(f"\r\033[K          {text}"[: columns + 3], end="", flush=True)
        else:
            print(f"          {text}", flush=True)

    def _clear(self) -> None:
        if self._tty and self._last:
            print("\r\033[K", end="")
        self._last = ""


def check_machine(plain: bool) -> None:
    """Everything that the lab needs is there. Raises LabError; touches nothing."""
    if os.geteuid() != 0:
        raise LabError("needs root (network namespaces, mounts, eBPF): run it with sudo")
    missing = _missing_capabilities()
    if missing:
        raise LabError(f"needs {', '.join(missing)}: a container must be given it, or be privileged")
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise LabError(f"not installed: {', '.join(missing)}; `make setup` installs what the lab needs")
    missing = [str(CNI_BASE / plugin) for plugin in PLUGINS if not (CNI_BASE / plugin).exists()]
    if missing:
        raise LabError(
            f"not installed: {', '.join(missing)} (Debian package containernetworking-plugins): `make setup`"
        )
    needed = ["podrun"] if plain else ["podrun", "sidestep-cni", "supervise"]
    missing = [name for name in needed if not (BIN / name).exists()]
    if missing:
        raise LabError(f"not built: {', '.join(missing)}; run `make build`")
    cgroup2()
    if "overlay" not in Path("/proc/filesystems").read_text():
        subprocess.run(["modprobe", "overlay"], capture_output=True)
        if "overlay" not in Path("/proc/filesystems").read_text():
            raise LabError("the kernel has no overlay file system, which containers need")
    if not plain and not _is_bpffs():
        raise LabError(f"bpffs is not mounted: mount -t bpf bpf {BPFFS}")
    if not plain:
        _check_mesh()


def _missing_capabilities() -> list[str]:
    """Without these not even the nodes can be made."""
    status = Path("/proc/self/status").read_text()
    effective = int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), 16)
    return [name for bit, name in CAPABILITIES.items() if not effective >> bit & 1]


def _check_mesh() -> None:
    """Asks `sidestep check`, in a process of its own: what the agents will need of the kernel. Raises LabError."""
    try:
        check = subprocess.run([sys.executable, "-m", "sidestep", "check", "--json"], capture_output=True, text=True,
                               stdin=subprocess.DEVNULL, cwd="/", timeout=START_S)  # fmt: skip
    except subprocess.TimeoutExpired:
        raise LabError(f"`sidestep check` did not answer within {START_S:.0f} s") from None
    try:
        found = json.loads(check.stdout)
    except ValueError:
        said = (check.stderr.strip().splitlines() or [f"exit status {check.returncode}"])[-1]
        raise LabError(f"`sidestep check` did not answer: {said}") from None
    bad = [item for item in found if item["level"] == "fail" and item["name"] not in HOST_ONLY]
    if bad:
        what = "; ".join(f"{item['name']}: {item['found']}" for item in bad)
        raise LabError(f"the mesh cannot run here: {what} ({bad[0]['advice']}; `sidestep check` says more)")


def _is_bpffs() -> bool:
    return any(line.split()[1:3] == [str(BPFFS), "bpf"] for line in Path("/proc/self/mounts").read_text().splitlines())


def up(
    name: str,
    nodes: int,
    plain: bool,
    manifests: Sequence[Manifest],
    *,
    timeout_s: float = 120,
    extra: Mapping[str, Sequence[str]],
) -> int:
    """Makes the lab. `extra`: further arguments by what they are for, `agent`, `engine` or `control`. Raises LabError
    after taking everything back; returns 1 where pods do not become ready (the lab stays, so that one can look), 0
    otherwise."""
    check_name(name)
    if not 1 <= nodes <= MAX_NODES:
        raise LabError(f"--nodes is 1 to {MAX_NODES}")
    check_machine(plain)
    _check_nodes(manifests, nodes)
    progress = Progress()
    signal.signal(signal.SIGTERM, _interrupted)
    with _creation(name, nodes, plain) as cluster:
        try:
            progress.step(f"lab {name}: {nodes} nodes, {cluster.range4}" + (", without the mesh" if plain else ""))
            network.create(cluster)
            _start(cluster, extra)
            asyncio.run(_fill(cluster, manifests, progress))
        except BaseException as error:
            logs = _last_words(cluster) if isinstance(error, LabError) else ""
            down(name)
            if isinstance(error, (KubeError, ConfigError, OSError)):
                raise LabError(f"{error}") from error
            if logs:
                raise LabError(f"{error}{logs}") from None
            raise
    status = asyncio.run(_ready(cluster, progress, timeout_s))
    _say_next(cluster)
    return status


def _interrupted(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt  # what was made so far is taken away, as after Ctrl-C


def _check_nodes(manifests: Sequence[Manifest], nodes: int) -> None:
    names = [f"node{index + 1}" for index in range(nodes)]
    for manifest in manifests:
        spec = manifest.body.get("spec") or {}
        if manifest.kind.kind == "Deployment":
            spec = (spec.get("template") or {}).get("spec") or {}
        elif manifest.kind.kind != "Pod":
            continue
        wanted = spec.get("nodeName") or (spec.get("nodeSelector") or {}).get("kubernetes.io/hostname")
        if wanted and wanted not in names:
            raise LabError(f"{manifest.place}: {manifest} wants {wanted}; the lab has {', '.join(names)} (--nodes)")


@contextlib.contextmanager
def _creation(name: str, nodes: int, plain: bool) -> Iterator[Cluster]:
    """Takes name and number under a lock; two labs that start at once get two numbers."""
    with locked():
        left = list(leftovers(name))
        if left:
            raise LabError(f"lab {name!r} exists ({left[0]}): `sidestep lab down --name {name}` takes it away")
        taken = network.taken_numbers(LABS)
        number = next((item for item in range(1, MAX_NUMBER + 1) if item not in taken), None)
        if number is None:
            raise LabError(f"all {MAX_NUMBER} ranges of labs are in use: `sidestep lab down --name NAME` frees one")
        cluster = Cluster(name, number, nodes, plain)
        cluster.state.mkdir(mode=0o700)
        try:
            network.run(["mount", "-t", "tmpfs", "-o", STATE_BYTES, "sidestep-lab", str(cluster.state)])
            cluster.save()
            failure = None
        except BaseException as error:
            failure = error
    if failure is not None:
        down(name)  # takes the lock itself
        raise failure
    yield cluster


def _start(cluster: Cluster, extra: Mapping[str, Sequence[str]]) -> None:
    """Directories, cgroups, the list of processes, and the keeper that starts them."""
    root = cgroup2() / cluster.cgroup_name
    processes = list(_processes(cluster, root, extra))
    cluster.logs.mkdir(mode=0o700)
    for process in processes:
        Path(process.cgroup).mkdir(parents=True, exist_ok=True)
    (root / "exec").mkdir(parents=True, exist_ok=True)
    for node in cluster.nodes:
        for directory in (node.run_dir, node.engine_socket.parent, node.pod_netns_dir, node.pods_dir):
            directory.mkdir(mode=0o700, parents=True)
        (node.state / "10-lab.conflist").write_text(_json(conflist(cluster, node, (4, 6))))
    keeper.save(cluster.state / "processes.json", processes)
    with open(cluster.logs / "keeper.log", "ab") as log:
        subprocess.Popen(
            ["sh", "-c", 'echo 0 > "$0/cgroup.procs" && exec "$@"', str(root / "exec"),
             sys.executable, "-m", "sidestep.lab.keeper", str(cluster.state)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/",
        )  # fmt: skip


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _processes(cluster: Cluster, root: Path, extra: Mapping[str, Sequence[str]]) -> Iterator[keeper.Process]:
    python = (sys.executable, "-u", "-m")
    kubeconfig = str(cluster.kubeconfig)

    def process(name: str, netns: Path, cgroup: str, argv: Sequence[str], *needs: Path | str) -> keeper.Process:
        return keeper.Process(
            name, str(netns), str(root / cgroup), tuple(argv), tuple(map(str, needs)), str(cluster.logs / f"{name}.log")
        )

    api = [
        *python, "sidestep.lab.api", "--name", cluster.name, "--dir", str(cluster.state), "--port", str(API_PORT),
        "--bind", str(cluster.ip4), "--bind", str(cluster.ip6), "--service-cidr4", str(cluster.services4),
        "--service-cidr6", str(cluster.services6), "--agent-account", f"{SYSTEM_NAMESPACE}/{AGENT_ACCOUNT}",
    ]  # fmt: skip
    yield replace(process("api", cluster.netns_path, "api", api), once=True)
    yield process("dns", cluster.netns_path, "dns", [*python, "sidestep.lab.dns", cluster.name], kubeconfig)
    if not cluster.plain:
        control = [
            *python, "sidestep", "control", "--kubeconfig", kubeconfig, "--bind", str(cluster.ip4),
            "--namespace", SYSTEM_NAMESPACE, *extra.get("control", ()),
        ]  # fmt: skip
        yield process("control", cluster.netns_path, "control", control, kubeconfig)
    for node in cluster.nodes:
        kubelet = [*python, "sidestep.lab.kubelet", cluster.name, node.name]
        yield process(f"{node.name}-kubelet", node.netns_path, f"{node.cgroup}/kubelet", kubelet, kubeconfig)
        if cluster.plain:
            continue
        engine = [
            str(BIN / "supervise"), *python, "sidestep", "engine", "--socket", str(node.engine_socket),
            *extra.get("engine", ()),
        ]  # fmt: skip
        yield process(f"{node.name}-engine", node.netns_path, f"{node.cgroup}/engine", engine)
        agent = [
            *python, "sidestep", "agent", "--node", node.name, "--node-ip", str(node.ip4), "--kubeconfig", kubeconfig,
            "--engine-socket", str(node.engine_socket), "--run-dir", str(node.run_dir), "--bpf-dir", str(node.bpf_dir),
            "--control", f"{cluster.ip4}:{XDS_PORT}", "--control-name", f"istiod.{SYSTEM_NAMESPACE}.svc",
            "--pod-netns-dir", str(node.pod_netns_dir), "--token-file", str(node.token_file),
            "--kubelet-cgroup", str(root / node.cgroup / "kubelet"),
        ]  # fmt: skip
        for cidr in (cluster.pods4, cluster.pods6, cluster.services4, cluster.services6):
            agent += ["--cluster-cidr", str(cidr)]
        yield process(
            f"{node.name}-agent", node.netns_path, f"{node.cgroup}/agent", [*agent, *extra.get("agent", ())],
            kubeconfig, node.token_file,
        )  # fmt: skip


# -- objects -----------------------------------------------------------------------------------------------------------
def _base(cluster: Cluster) -> Iterator[tuple[str, dict[str, Any]]]:
    """The system's namespace, and Service kube-dns, whose endpoint is no pod."""
    yield "/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SYSTEM_NAMESPACE}}
    ports = [("dns", "UDP"), ("dns-tcp", "TCP")]
    yield (
        "/api/v1/namespaces/kube-system/services",
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "kube-dns", "namespace": "kube-system"},
            "spec": {
                "clusterIP": str(cluster.dns4),
                "clusterIPs": [str(cluster.dns4), str(cluster.dns6)],
                "ipFamilyPolicy": "RequireDualStack",
                "ipFamilies": ["IPv4", "IPv6"],
                "ports": [{"name": name, "protocol": protocol, "port": 53} for name, protocol in ports],
            },
        },
    )
    for family, address in (("IPv4", cluster.ip4), ("IPv6", cluster.ip6)):
        yield (
            "/apis/discovery.k8s.io/v1/namespaces/kube-system/endpointslices",
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "name": f"kube-dns-{family.lower()}",
                    "namespace": "kube-system",
                    "labels": {SERVICE_LABEL: "kube-dns"},
                },
                "addressType": family,
                "endpoints": [{"addresses": [str(address)], "conditions": {"ready": True}}],
                "ports": [{"name": name, "protocol": protocol, "port": 53} for name, protocol in ports],
            },
        )


async def _fill(cluster: Cluster, manifests: Sequence[Manifest], progress: Progress) -> None:
    """Waits for the API, the nodes and the agents, then applies. Raises LabError or KubeError."""
    progress.step("starting the API")
    await _wait_for_file(cluster)
    async with KubeClient.from_config(cluster.kubeconfig) as client:
        await _until("the API", START_S, lambda: _api_answers(client), progress)
        for path, body in _base(cluster):
            await _create(client, path, body)
        progress.step("waiting for the nodes")
        await _until("the nodes", START_S, lambda: _nodes_wait_for(client, cluster), progress)
        if not cluster.plain:
            progress.step("waiting for the agents")
            await _until("the agents", AGENTS_S, lambda: _agents_wait_for(client, cluster), progress)
        progress.step(f"applying {len(manifests)} objects")
        for manifest in manifests:
            try:
                await _create(client, manifest.collection, manifest.body)
            except KubeError as error:
                raise LabError(f"{manifest.place}: {manifest}: {error.message or error}") from None


async def _wait_for_file(cluster: Cluster) -> None:
    deadline = time.monotonic() + START_S
    while not cluster.kubeconfig.exists():
        if time.monotonic() > deadline:
            raise LabError(f"the API did not start within {START_S:.0f} s")
        await asyncio.sleep(0.05)


async def _until(what: str, seconds: float, question: Callable[[], Awaitable[str]], progress: Progress) -> None:
    """Asks until the answer is "": nothing more to wait for. Raises LabError with the last answer."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            why = await question()
        except KubeError as error:
            why = str(error)
        if not why:
            return
        progress.wait(why)
        if time.monotonic() > deadline:
            raise LabError(f"{what}: not ready within {seconds:.0f} s: {why}")
        await asyncio.sleep(0.1)


async def _api_answers(client: KubeClient) -> str:
    await client.get("/version")
    return ""


async def _nodes_wait_for(client: KubeClient, cluster: Cluster) -> str:
    waiting = {node.name: "has not come yet" for node in cluster.nodes}
    for item in (await client.list("/api/v1/nodes"))["items"]:
        waiting[item["metadata"]["name"]] = "says nothing yet"
        for condition in (item.get("status") or {}).get("conditions") or ():
            if condition["type"] == "Ready":
                ready = condition["status"] == "True"
                waiting[item["metadata"]["name"]] = "" if ready else str(condition.get("message"))
    return next((f"{name}: {why}" for name, why in waiting.items() if why), "")


async def _agents_wait_for(client: KubeClient, cluster: Cluster) -> str:
    waiting = {node.agent_pod: "starts" for node in cluster.nodes}
    for pod in (await client.list(f"/api/v1/namespaces/{SYSTEM_NAMESPACE}/pods"))["items"]:
        waiting[pod["metadata"]["name"]] = not_ready(pod)
    return next((f"{name}: {why}" for name, why in waiting.items() if why), "")


async def _create(client: KubeClient, path: str, body: Object) -> None:
    """Creates an object, or brings one that exists (namespace default) to the same state."""
    try:
        await client.create(path, body)
    except KubeError as error:
        if error.status != 409:
            raise
        await client.patch(f"{path}/{body['metadata']['name']}", body)


def _last_words(cluster: Cluster) -> str:
    """The last line of a process that did not stay."""
    local = [f"{node.name}-{part}" for node in cluster.nodes for part in ("engine", "agent", "kubelet")]
    for process in ("api", "control", *local):
        log = cluster.logs / f"{process}.log"
        with contextlib.suppress(OSError, IndexError):
            lines = [line for line in log.read_text(errors="replace").splitlines() if not line.startswith("keeper:")]
            found = keeper.running(cluster.state, process)
            if lines and (found is None or found.restarts or not found.alive):
                return f" ({process}: {lines[-1].strip()[:300]})"
    return ""


# -- pods --------------------------------------------------------------------------------------------------------------
def not_ready(pod: Object) -> str:
    """Why a pod is not ready; "" where it is, or has done its work."""
    status = pod.get("status") or {}
    if status.get("phase") == "Succeeded":
        return ""
    if any(item["type"] == "Ready" and item["status"] == "True" for item in status.get("conditions") or ()):
        return ""
    if status.get("message"):
        return str(status["message"])
    for item in status.get("containerStatuses") or ():
        waiting = (item.get("state") or {}).get("waiting") or {}
        if waiting.get("message"):
            return f"{waiting['reason']}: {waiting['message']}"
    for item in status.get("conditions") or ():
        if item["type"] == "PodScheduled" and item["status"] != "True":
            return str(item.get("message") or "not scheduled")
    return str(status.get("phase") or "Pending")


async def _ready(cluster: Cluster, progress: Progress, timeout_s: float) -> int:
    """Waits for every pod. 0 when all are ready, else 1 after saying which are not and why."""
    deadline = time.monotonic() + timeout_s
    progress.step("waiting for the pods")
    waiting: dict[str, str] = {}
    async with KubeClient.from_config(cluster.kubeconfig) as client:
        while time.monotonic() < deadline:
            try:
                pods = (await client.list("/api/v1/pods"))["items"]
                deployments = (await client.list("/apis/apps/v1/deployments"))["items"]
            except KubeError as error:
                waiting = {"the API": str(error)}
                progress.wait(f"the API: {error}")
                await asyncio.sleep(0.5)
                continue
            waiting = {
                f"{pod['metadata']['namespace']}/{pod['metadata']['name']}": why
                for pod in pods
                if (why := not_ready(pod))
            }
            for item in deployments:
                wanted = int(item["spec"].get("replicas", 1))
                if int((item.get("status") or {}).get("readyReplicas") or 0) < wanted:
                    key = f"{item['metadata']['namespace']}/{item['metadata']['name']}"
                    if not any(pod.startswith(f"{key}-") for pod in waiting):
                        waiting[key] = "pods are being made"
            own = [pod for pod in pods if podspec.MIRROR_ANNOTATION not in (pod["metadata"].get("annotations") or {})]
            if not waiting:
                progress.step(f"{len(own)} pods are ready")
                return 0
            first, why = next(iter(waiting.items()))
            progress.wait(f"{len(pods) - len(waiting)} of {len(pods)} ready; {first}: {why}")
            await asyncio.sleep(0.2)
    progress.step(f"not ready after {timeout_s:.0f} s:")
    for pod, why in waiting.items():
        print(f"  {pod}: {why}", file=sys.stderr)
    print(f"sidestep lab: the lab stays; `sidestep lab logs --name {cluster.name} NAMESPACE/POD` may say more,"
          f" `sidestep lab down --name {cluster.name}` ends it", file=sys.stderr)  # fmt: skip
    return 1


def _say_next(cluster: Cluster) -> None:
    name = "" if cluster.name == "lab" else f" --name {cluster.name}"
    print(f"\n  export KUBECONFIG={cluster.kubeconfig}        # for kubectl")
    print(f"  sidestep lab exec{name} NAMESPACE/POD -- COMMAND   # as in the pod")
    if not cluster.plain:
        print("  kubectl label namespace NAMESPACE istio.io/dataplane-mode=ambient   # into the mesh, nothing restarts")
    print(f"  sidestep lab status{name}; sidestep lab down{name}")
    sys.stdout.flush()
