"""The CNI plugin as a runtime runs it: a process of its own, real sockets, a real network namespace.

The agent's end is the agent's own server (`sidestep.node.cni`) with an enrolment that notes the calls, so both sides of
the socket are the real ones.
"""

import asyncio
import json
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sidestep.node import cni

PLUGIN = Path(__file__).resolve().parents[2] / "agent/sidestep/bin/sidestep-cni"
PREVIOUS = {
    "cniVersion": "1.0.0",
    "interfaces": [{"name": "eth0", "sandbox": "/some/netns"}],
    "ips": [{"address": "10.222.1.2/24", "gateway": "10.222.1.1", "interface": 0}],
    "dns": {},
}


class Notes:
    """Enrolment that notes what it was asked; refuses where `refusal` is set."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, str, int]] = []
        self.refusal: cni.CniError | None = None
        self.stall = False

    async def _note(self, call: cni.Call) -> None:
        inode = os.fstat(call.netns_fd).st_ino if call.netns_fd >= 0 else 0
        self.calls.append((call.command, f"{call.namespace}/{call.name}", ",".join(call.addresses), inode))
        if self.stall:
            await asyncio.sleep(60)
        if self.refusal is not None:
            raise self.refusal

    cni_add = cni_del = cni_check = _note


class Agent:
    """The agent's CNI server in a thread, ended by `close`."""

    def __init__(self, path: Path, enrolment: Notes) -> None:
        self._loop = asyncio.new_event_loop()
        self._path = path
        self._enrolment = enrolment
        self._task: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        deadline = threading.Event()
        for _ in range(1000):
            if path.exists():
                return
            deadline.wait(0.01)
        raise AssertionError("the server did not start")

    def _run(self) -> None:
        async def main() -> None:
            self._task = asyncio.current_task()
            await cni.serve(self._path, self._enrolment)

        try:
            self._loop.run_until_complete(main())
        except asyncio.CancelledError:
            pass
        finally:
            self._loop.close()

    def close(self) -> None:
        assert self._task is not None
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def agent(tmp_path: Path, notes: Notes) -> Iterator[Agent]:
    running = Agent(tmp_path / "run/cni.sock", notes)
    yield running
    running.close()


@pytest.fixture
def netns() -> Iterator[str]:
    name = f"t-cni-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    yield f"/run/netns/{name}"
    subprocess.run(["ip", "netns", "del", name], check=True)


def config(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """A configuration as libcni hands it to the plugin; None removes a key."""
    base = {
        "cniVersion": "1.0.0",
        "name": "pods",
        "type": "sidestep-cni",
        "socket": str(tmp_path / "run/cni.sock"),
        "prevResult": PREVIOUS,
    }
    return {key: value for key, value in {**base, **changes}.items() if value is not None}


def call(
    command: str, stdin: dict[str, Any] | bytes, namespace: str = "world", *, without: str = "", **environment: str
) -> tuple[int, Any]:
    """Runs the plugin. Returns its exit status and stdout, as JSON where there is any."""
    variables = {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": "c0ffee",
        "CNI_NETNS": "/proc/self/ns/net",
        "CNI_IFNAME": "eth0",
        "CNI_ARGS": f"IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME=web;K8S_POD_UID=u-1",
        **environment,
    }
    variables.pop(without, None)
    text = stdin if isinstance(stdin, bytes) else json.dumps(stdin).encode()
    done = subprocess.run([PLUGIN], input=text, env=variables, capture_output=True, timeout=60)
    return done.returncode, json.loads(done.stdout) if done.stdout else None


def test_version_is_answered_without_an_agent() -> None:
    status, answer = call("VERSION", b"")
    assert (status, answer["supportedVersions"]) == (0, ["0.3.1", "0.4.0", "1.0.0"])


def test_add_check_del_reach_the_agent_with_the_namespace(
    tmp_path: Path, agent: Agent, notes: Notes, netns: str
) -> None:
    status, answer = call("ADD", config(tmp_path), CNI_NETNS=netns)
    assert (status, answer) == (0, PREVIOUS)
    assert call("CHECK", config(tmp_path), CNI_NETNS=netns) == (0, None)
    assert call("DEL", config(tmp_path), CNI_NETNS=netns) == (0, None)
    inode = os.stat(netns).st_ino
    assert notes.calls == [(verb, "world/web", "10.222.1.2", inode) for verb in ("ADD", "CHECK", "DEL")]


def test_what_the_agent_refuses_is_refused(tmp_path: Path, agent: Agent, notes: Notes) -> None:
    notes.refusal = cni.CniError("the pod is not on this node", 11, 'a "quoted" reason')
    status, answer = call("ADD", config(tmp_path))
    assert status == 1
    assert answer == {
        "cniVersion": "1.0.0",
        "code": 11,
        "msg": "the pod is not on this node",
        "details": 'a "quoted" reason',
    }


def test_add_without_an_agent_fails_and_can_be_repeated(tmp_path: Path) -> None:
    for _ in range(2):
        status, answer = call("ADD", config(tmp_path))
        assert (status, answer["code"], answer["cniVersion"]) == (1, 11, "1.0.0")
    notes = Notes()
    agent = Agent(tmp_path / "run/cni.sock", notes)
    try:
        assert call("ADD", config(tmp_path))[0] == 0
    finally:
        agent.close()


def test_a_dead_agents_socket_file_fails_add_and_lets_del_pass(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "run/cni.sock"))
    listener.close()
    status, answer = call("ADD", config(tmp_path))
    assert (status, answer["code"]) == (1, 11)
    assert call("CHECK", config(tmp_path))[0] == 1
    assert call("DEL", config(tmp_path)) == (0, None)
    assert call("DEL", config(tmp_path, prevResult=None), without="CNI_NETNS") == (0, None)


def test_an_agent_that_never_answers_is_not_waited_for_longer_than_the_deadline(
    tmp_path: Path, agent: Agent, notes: Notes
) -> None:
    notes.stall = True
    status, answer = call("ADD", config(tmp_path, timeout_s=1))
    assert (status, answer["code"]) == (1, 11)
    assert call("DEL", config(tmp_path, timeout_s=1)) == (0, None)
    assert len(notes.calls) == 2


@contextmanager
def answering(path: Path, answer: bytes) -> Iterator[None]:
    """Something that is no agent: takes one connection, reads, sends `answer`, closes."""
    path.parent.mkdir(parents=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    listener.settimeout(30)

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(30)
            connection.recv(65536)
            connection.sendall(answer)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        thread.join(60)
        listener.close()
        assert not thread.is_alive()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SCNI",
        cni.HEADER.pack(b"HTTP", 1, 0, 0),
        cni.HEADER.pack(cni.MAGIC, 2, 0, 0),
        cni.HEADER.pack(cni.MAGIC, 1, 0, 100) + b"short",
        cni.HEADER.pack(cni.MAGIC, 1, 0, 1 << 31),
    ],
)
def test_a_stranger_on_the_socket_is_no_agent(tmp_path: Path, answer: bytes) -> None:
    with answering(tmp_path / "run/cni.sock", answer):
        status, out = call("ADD", config(tmp_path))
    assert (status, out["code"]) == (1, 11)


def test_excluded_namespaces_pass_without_an_agent(tmp_path: Path) -> None:
    assert call("ADD", config(tmp_path), "kube-system") == (0, PREVIOUS)
    assert call("CHECK", config(tmp_path), "kube-system") == (0, None)
    listed = config(tmp_path, exclude_namespaces=["istio-system", "storage"])
    assert call("ADD", listed, "storage") == (0, PREVIOUS)
    for namespace in ("kube-system", "istio", "storage2", ""):
        assert call("ADD", listed, namespace)[0] == 1, namespace
    assert call("ADD", config(tmp_path, exclude_namespaces=[]), "kube-system")[0] == 1
    assert call("ADD", config(tmp_path, prevResult=None), "kube-system")[1]["code"] == 7


@pytest.mark.parametrize("variable", ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"])
def test_missing_environment_is_named(tmp_path: Path, variable: str) -> None:
    status, answer = call("ADD", config(tmp_path), without=variable)
    assert (status, answer["code"]) == (1, 4)
    assert variable in answer["details"]


def test_unknown_commands_and_versions_are_refused(tmp_path: Path) -> None:
    assert call("MOVE", config(tmp_path))[1]["code"] == 4
    assert call("", config(tmp_path))[1]["code"] == 4
    for version in ("0.2.0", "1.1.0", "2.0.0", "", None):
        assert call("ADD", config(tmp_path, cniVersion=version))[1]["code"] == 1, version
    assert call("CHECK", config(tmp_path, cniVersion="0.3.1"))[1]["code"] == 1
    assert call("GC", config(tmp_path))[1]["code"] == 1
    assert call("STATUS", config(tmp_path))[1]["code"] == 1
    answer = call("ADD", config(tmp_path, cniVersion="0.4.0"))[1]
    assert (answer["cniVersion"], answer["code"]) == ("0.4.0", 11)


@pytest.mark.parametrize(
    ("stdin", "code"),
    [
        (b"", 6),
        (b"[]", 6),
        (b"{", 6),
        (b'{"a":1,}', 6),
        (b'{"a":01}', 6),
        (b'{"a":"\n"}', 6),
        (b'{"a":"\\x"}', 6),
        (b'{"a":tru}', 6),
        (b"{} {}", 6),
        (b'{"a":' + b"[" * 1000 + b"]" * 1000 + b"}", 6),
        (b'{"cniVersion":1}', 7),
        (b'{"cniVersion":"1.0.0","socket":7}', 7),
        (b'{"cniVersion":"1.0.0","timeout_s":0}', 7),
        (b'{"cniVersion":"1.0.0","timeout_s":1e3}', 7),
        (b'{"cniVersion":"1.0.0","exclude_namespaces":"x"}', 7),
        (b'{"cniVersion":"1.0.0","prevResult":{}}', 7),
        (b'{"cniVersion":"1.0.0","socket":"relative","prevResult":{}}', 7),
        (b'{"cniVersion":"1.0.0","socket":"/' + b"x" * 200 + b'"}', 7),
        (b" " * (1 << 20) + b"{}", 5),
    ],
)
def test_a_configuration_that_is_none_is_refused_with_the_specifications_code(stdin: bytes, code: int) -> None:
    status, answer = call("ADD", stdin)
    assert (status, answer["code"]) == (1, code)


def test_the_largest_configuration_goes_through(tmp_path: Path, agent: Agent, notes: Notes) -> None:
    stdin = json.dumps(config(tmp_path, padding="x" * 1_000_000)).encode()
    assert call("ADD", stdin)[0] == 0
    assert len(notes.calls) == 1


def test_the_plugin_is_one_file_without_dependencies() -> None:
    listed = subprocess.run(["ldd", PLUGIN], capture_output=True, text=True)
    assert "not a dynamic executable" in listed.stderr + listed.stdout
