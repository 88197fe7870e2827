"""What a container runtime does for a pod: its network namespace, the CNI chain, its files, its processes.

Nothing here knows the API. A sandbox keeps what it needs to take itself apart under `pods/UID/`, so that a kubelet
part that was killed finds it again, and `lab down` needs nobody at all.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidestep.lab.cluster import Cluster, Node
from sidestep.lab.keeper import start_time
from sidestep.lab.network import POD_SYSCTLS, netns_inode

BIN = Path(__file__).resolve().parents[1] / "bin"
PROJECT = Path(__file__).resolve().parents[3]
CNI_BASE = Path("/usr/lib/cni")
CNI_VERSION = "1.0.0"
CNI_DEADLINE_S = 45.0
EXCLUDED = ("kube-system", "istio-system")
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class SandboxError(Exception):
    """A step of making the sandbox failed; `code` is the CNI error code where a plugin said so."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


def conflist(cluster: Cluster, node: Node, families: Sequence[int]) -> dict[str, Any]:
    """The node's CNI configuration list; with one family for a pod that asks for one only."""
    subnets = {4: str(node.pods4), 6: str(node.pods6)}
    defaults = {4: "0.0.0.0/0", 6: "::/0"}
    ipam = {
        "type": "host-local",
        "dataDir": str(node.state / "ipam"),
        "ranges": [[{"subnet": subnets[family]}] for family in families],
        "routes": [{"dst": defaults[family]} for family in families],
    }
    plugins: list[dict[str, Any]] = [{"type": "ptp", "mtu": 1500, "ipam": ipam}]
    if not cluster.plain:
        plugins.append(
            {
                "type": "sidestep-cni",
                "socket": str(node.run_dir / "cni.sock"),
                "timeout_s": 30,
                "exclude_namespaces": list(EXCLUDED),
            }
        )
    return {"cniVersion": CNI_VERSION, "name": "pods", "plugins": plugins}


@dataclass(frozen=True, slots=True)
class PodName:
    """Who the pod is, for CNI_ARGS and paths."""

    namespace: str
    name: str
    uid: str


async def _tool(command: Sequence[str], deadline_s: float = 30) -> None:
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(deadline_s):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise SandboxError(f"{command[0]}: not done within {deadline_s:.0f} s") from None
    if process.returncode != 0:
        raise SandboxError(f"{' '.join(command)}: {output.decode(errors='replace').strip()}")


class Sandbox:
    """One pod's namespace, addresses and directories."""

    def __init__(self, cluster: Cluster, node: Node, pod: PodName, cgroup: Path) -> None:
        self._cluster = cluster
        self._node = node
        self._pod = pod
        self.directory = node.pods_dir / pod.uid
        self.netns = node.pod_netns_dir / pod.uid
        self.cgroup = cgroup / "kubepods" / f"pod{pod.uid}"
        self.ips: tuple[str, ...] = ()
        self._attempt = 0

    # -- set up and take apart ---------------------------------------------------------------------------------------
    async def create(self, families: Sequence[int], *, host_network: bool) -> None:
        """Makes the namespace and runs the chain's ADD. Raises SandboxError; everything is taken back then."""
        if self._adopt():
            return
        self.directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        self.cgroup.mkdir(parents=True, exist_ok=True)
        (self.directory / "name").write_text(f"{self._pod.namespace}/{self._pod.name}\n")
        if host_network:
            self.netns = self._node.netns_path
            self.ips = (str(self._node.ip4), str(self._node.ip6))
            return
        await self.destroy_network()
        self._attempt += 1
        self.netns.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.netns.touch(mode=0o600)
        setup = f"ip link set lo up && sysctl -q -w {' '.join(POD_SYSCTLS)}"
        await _tool(["unshare", f"--net={self.netns}", "sh", "-c", setup])
        config = conflist(self._cluster, self._node, families)
        state: dict[str, Any] = {"config": config, "container": f"{self._pod.uid}-{self._attempt}", "result": None}
        self._save(state)  # before the first plugin: whatever it leaves behind is found again
        try:
            result: Any = None
            for plugin in config["plugins"]:
                result = await self._call("ADD", config, plugin, state["container"], result)
            self.ips = tuple(str(entry["address"]).partition("/")[0] for entry in result.get("ips") or ())
            if not self.ips:
                raise SandboxError("the CNI chain gave the pod no address")
            state["result"] = result
            self._save(state)
        except SandboxError:
            await self.destroy_network()
            raise

    def _adopt(self) -> bool:
        state = self._load()
        if state is None or state.get("result") is None or not netns_inode(self.netns):
            return False
        self.ips = tuple(str(entry["address"]).partition("/")[0] for entry in state["result"].get("ips") or ())
        return True

    async def destroy_network(self) -> None:
        """The chain's DEL in reverse, then the namespace. Repeatable; a plugin that fails does not stop the others."""
        state = self._load()
        if state is not None:
            for plugin in reversed(state["config"]["plugins"]):
                with contextlib.suppress(SandboxError):
                    await self._call("DEL", state["config"], plugin, state["container"], state["result"])
            (self.directory / "sandbox.json").unlink(missing_ok=True)
        path = self._node.pod_netns_dir / self._pod.uid
        if path.exists():
            if netns_inode(path):
                await _tool(["umount", "-l", str(path)])
            path.unlink(missing_ok=True)

    async def destroy(self) -> None:
        """Kills what is left in the pod's cgroup, takes network and files away."""
        kill_cgroup(self.cgroup)
        deadline = time.monotonic() + 10
        while not remove_cgroup(self.cgroup):
            if time.monotonic() > deadline:
                raise SandboxError(f"processes of the pod do not end: {self.cgroup}")
            await asyncio.sleep(0.02)
        await self.destroy_network()
        shutil.rmtree(self.directory, ignore_errors=True)

    # -- CNI ---------------------------------------------------------------------------------------------------------
    async def _call(
        self, verb: str, config: Mapping[str, Any], plugin: Mapping[str, Any], container: str, previous: Any
    ) -> Any:
        """Runs one plugin as libcni does. Raises SandboxError with the plugin's message and code."""
        binary = next((path for path in (BIN / plugin["type"], CNI_BASE / plugin["type"]) if path.exists()), None)
        if binary is None:
            raise SandboxError(f"CNI plugin {plugin['type']} is not installed: `make setup` installs it")
        stdin = {"cniVersion": config["cniVersion"], "name": config["name"], **plugin}
        if previous is not None:
            stdin["prevResult"] = previous
        pod = self._pod
        process = await asyncio.create_subprocess_exec(
            str(binary), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env={
                "PATH": DEFAULT_PATH,
                "CNI_COMMAND": verb,
                "CNI_CONTAINERID": container,
                "CNI_NETNS": str(self.netns) if netns_inode(self.netns) else "",
                "CNI_IFNAME": "eth0",
                "CNI_PATH": f"{BIN}:{CNI_BASE}",
                "CNI_ARGS": f"IgnoreUnknown=1;K8S_POD_NAMESPACE={pod.namespace};K8S_POD_NAME={pod.name};"
                f"K8S_POD_INFRA_CONTAINER_ID={container};K8S_POD_UID={pod.uid}",
            },
        )  # fmt: skip
        try:
            async with asyncio.timeout(CNI_DEADLINE_S):
                out, err = await process.communicate(json.dumps(stdin).encode())
        except TimeoutError:
            process.kill()
            await process.wait()
            raise SandboxError(f"CNI {plugin['type']} {verb}: no answer within {CNI_DEADLINE_S:.0f} s") from None
        try:
            answer = json.loads(out) if out.strip() else None
        except ValueError:
            answer = None
        if process.returncode != 0:
            said = answer if isinstance(answer, dict) else {}
            text = said.get("msg") or err.decode(errors="replace").strip()[-300:] or f"status {process.returncode}"
            details = f": {said['details']}" if said.get("details") else ""
            raise SandboxError(f"CNI {plugin['type']} {verb}: {text}{details}", int(said.get("code") or 0))
        return answer

    def _save(self, state: Mapping[str, Any]) -> None:
        fresh = self.directory / ".sandbox.json"
        fresh.write_text(json.dumps(state))
        os.replace(fresh, self.directory / "sandbox.json")

    def _load(self) -> dict[str, Any] | None:
        try:
            return dict(json.loads((self.directory / "sandbox.json").read_text()))
        except (OSError, ValueError):
            return None


def kill_cgroup(directory: Path) -> None:
    """SIGKILL for everything in a cgroup and below it; a cgroup that is not there has nothing to kill."""
    with contextlib.suppress(OSError):
        (directory / "cgroup.kill").write_text("1")


def remove_cgroup(directory: Path) -> bool:
    """Removes a cgroup with all below. False while there are processes in it."""
    if not directory.exists():
        return True
    for child in sorted(directory.rglob("*"), reverse=True):
        if child.is_dir():
            with contextlib.suppress(OSError):
                child.rmdir()
    try:
        directory.rmdir()
    except OSError:
        return not directory.exists()
    return True


@dataclass(frozen=True, slots=True)
class Bind:
    """A file or directory of the node at a path of the container."""

    source: Path
    target: str
    read_only: bool


@dataclass(frozen=True, slots=True)
class Launch:
    """Everything podrun needs to run a container, or a command in it."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    hostname: str
    workdir: str
    uid: int
    gid: int
    capabilities: int
    binds: tuple[Bind, ...]


class Process:
    """A container that runs, or ran: podrun outside, the command inside. Found again by its directory."""

    def __init__(self, directory: Path, cgroup: Path) -> None:
        self.directory = directory
        self.log = directory / "log"
        self._cgroup = cgroup
        self._pidfd = -1
        self._pid = 0

    def start(self, launch: Launch, netns: Path) -> None:
        """Starts it. Raises OSError."""
        root = self.directory / "root"
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._cgroup.mkdir(parents=True, exist_ok=True)
        for name in ("pid", "exit"):
            (self.directory / name).unlink(missing_ok=True)
        common = self._common(launch)
        (self.directory / "enter.json").write_text(
            json.dumps({"argv": common, "environment": dict(launch.environment), "workdir": launch.workdir})
        )
        argv = [
            str(BIN / "podrun"), "run", "--root", str(root), "--netns", str(netns), "--hostname", launch.hostname[:63],
            "--pid-file", str(self.directory / "pid"), "--exit-file", str(self.directory / "exit"),
            "--workdir", launch.workdir, *common,
        ]  # fmt: skip
        for bind in (*launch.binds, *_project_binds()):
            argv += ["--bind", str(bind.source), bind.target, "ro" if bind.read_only else "rw"]
        with open(self.log, "ab") as log:
            process = subprocess.Popen(
                [*argv, "--", *launch.command], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=dict(launch.environment), start_new_session=True, cwd="/",
            )  # fmt: skip
        process.returncode = 0  # reaped by `_reap`, not by Popen
        self._watch(process.pid)
        (self.directory / "podrun").write_text(f"{self._pid} {start_time(self._pid)}\n")

    def adopt(self) -> bool:
        """Takes a container over that a former kubelet part started. False where there is none."""
        try:
            pid, start = (int(word) for word in (self.directory / "podrun").read_text().split())
            if start_time(pid) != start:
                return False
            self._watch(pid)
        except (OSError, ValueError):
            return False
        return True

    def _watch(self, pid: int) -> None:
        self._pid = pid
        self._pidfd = os.pidfd_open(pid)

    async def wait(self) -> None:
        """Until podrun ends."""
        loop = asyncio.get_running_loop()
        ended = loop.create_future()
        loop.add_reader(self._pidfd, lambda: None if ended.done() else ended.set_result(None))
        try:
            await ended
        finally:
            loop.remove_reader(self._pidfd)

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal; podrun passes it on. A process that is gone is no error."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def close(self) -> int:
        """After the end: reaps podrun; returns the command's exit status (137 where podrun itself was killed)."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)
        kill_cgroup(self._cgroup)  # what the command left behind ends with its process 1; this is for podrun's death
        try:
            return int((self.directory / "exit").read_text().split()[0])
        except (OSError, ValueError, IndexError):
            return 137

    def _common(self, launch: Launch) -> list[str]:
        return [
            "--cgroup", str(self._cgroup), "--uid", str(launch.uid), "--gid", str(launch.gid),
            "--caps", f"{launch.capabilities:x}",
        ]  # fmt: skip


def _project_binds() -> tuple[Bind, ...]:
    """A project under /tmp or /run would be hidden from containers: its own programs are among the host's."""
    hidden = any(PROJECT.is_relative_to(path) for path in ("/tmp", "/run"))
    return (Bind(PROJECT, str(PROJECT), True),) if hidden else ()


def enter(directory: Path, command: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The command line and environment that run a command in the container of that directory.

    Raises SandboxError where it does not run.
    """
    try:
        known = json.loads((directory / "enter.json").read_text())
        pid, start = (directory / "pid").read_text().split()
    except (OSError, ValueError):
        raise SandboxError("the container does not run") from None
    if start_time(int(pid)) != int(start):
        raise SandboxError("the container does not run")
    argv = [str(BIN / "podrun"), "enter", pid, start, *known["argv"], "--workdir", known["workdir"], "--", *command]
    return argv, known["environment"]
