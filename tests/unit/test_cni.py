"""CNI: what the plugin forwards is read strictly, and answers follow the specification."""

import array
import asyncio
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from sidestep.node import cni

PREVIOUS = {
    "cniVersion": "1.0.0",
    "interfaces": [{"name": "veth1"}, {"name": "eth0", "sandbox": "/run/netns/a"}],
    "ips": [{"address": "10.1.0.5/24", "interface": 1}, {"address": "fd00::5/64", "interface": 1}],
    "routes": [{"dst": "0.0.0.0/0"}],
    "x": {"kept": True},
}


def environment(**changes: str) -> bytes:
    variables = {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": "c1",
        "CNI_IFNAME": "eth0",
        "CNI_NETNS": "/run/netns/a",
        "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_UID=u1",
    } | changes
    return b"".join(f"{key}={value}".encode() + b"\0" for key, value in variables.items())


def config(version: Any = "1.0.0", **changes: Any) -> bytes:
    return json.dumps(
        {"cniVersion": version, "name": "n", "type": "sidestep-cni", "prevResult": PREVIOUS} | changes
    ).encode()


def test_add_is_read() -> None:
    call = cni.parse(environment(), config(), 7)
    assert (call.command, call.namespace, call.name, call.uid) == ("ADD", "shop", "web", "u1")
    assert call.addresses == ("10.1.0.5", "fd00::5") and call.netns_fd == 7


def test_addresses_of_host_interfaces_are_not_the_pods() -> None:
    previous = {
        "interfaces": [{"name": "br0"}],
        "ips": [{"address": "10.9.0.1/24", "interface": 0}, {"address": "10.9.0.2/24"}],
    }
    assert cni.parse(environment(), config(prevResult=previous)).addresses == ("10.9.0.2",)


@pytest.mark.parametrize(
    ("env", "stdin", "code"),
    [
        (environment(CNI_COMMAND="EAT"), config(), cni.BAD_ENVIRONMENT),
        (environment(CNI_CONTAINERID=""), config(), cni.BAD_ENVIRONMENT),
        (environment(CNI_NETNS=""), config(), cni.BAD_ENVIRONMENT),
        (environment(), b"{", cni.DECODE),
        (environment(), b"[" * 100000, cni.DECODE),
        (environment(), b"[]", cni.BAD_CONFIG),
        (environment(), config("9.9.9"), cni.INCOMPATIBLE_VERSION),
        (environment(), config(["1.0.0"]), cni.INCOMPATIBLE_VERSION),
        (environment(), config(prevResult=[]), cni.BAD_CONFIG),
        (environment(), config(prevResult=None), cni.BAD_CONFIG),
    ],
)
def test_bad_input_is_a_cni_error(env: bytes, stdin: bytes, code: int) -> None:
    with pytest.raises(cni.CniError) as caught:
        cni.parse(env, stdin)
    assert caught.value.code == code


def test_del_needs_neither_netns_nor_previous_result() -> None:
    call = cni.parse(environment(CNI_COMMAND="DEL", CNI_NETNS=""), config(prevResult=None))
    assert call.previous is None and call.addresses == () and cni.result(call) == b""


@pytest.mark.parametrize(
    ("version", "families"), [("0.3.1", ["4", "6"]), ("0.4.0", ["4", "6"]), ("1.0.0", [None, None])]
)
def test_the_result_is_the_previous_one_in_the_configs_version(version: str, families: list[str | None]) -> None:
    answer = json.loads(cni.result(cni.parse(environment(), config(version))))
    assert answer["cniVersion"] == version and answer["x"] == {"kept": True}
    assert [entry.get("version") for entry in answer["ips"]] == families


class Recorder:
    """Stands where the agent does: keeps the calls, fails as told."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[cni.Call] = []
        self.inodes: list[int] = []
        self.error = error

    async def _note(self, call: cni.Call) -> None:
        self.calls.append(call)
        if call.netns_fd >= 0:
            self.inodes.append(os.fstat(call.netns_fd).st_ino)
        if self.error:
            raise self.error

    cni_add = cni_del = cni_check = _note


async def ask(path: Path, env: bytes, stdin: bytes, fd: int = -1, magic: bytes = cni.MAGIC) -> tuple[int, bytes]:
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        await loop.sock_connect(client, str(path))
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd >= 0 else []
        head = cni.HEADER.pack(magic, cni.PROTOCOL, len(env), len(stdin))
        client.sendmsg([head[:1]], ancillary)
        await loop.sock_sendall(client, head[1:] + env + stdin)
        data = b""
        while chunk := await loop.sock_recv(client, 65536):
            data += chunk
    if not data:
        return -1, b""
    _, _, status, length = cni.HEADER.unpack(data[: cni.HEADER.size])
    assert len(data) == cni.HEADER.size + length
    return status, data[cni.HEADER.size :]


def served(tmp_path: Path, enrolment: Recorder, *calls: Any, **options: Any) -> list[tuple[int, bytes]]:
    async def run() -> list[tuple[int, bytes]]:
        path = tmp_path / f"run{len(os.listdir(tmp_path))}" / "cni.sock"
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            server = group.create_task(cni.serve(path, enrolment, **options))
            while not path.exists():
                await asyncio.sleep(0.005)
            answers = [await ask(path, *call) for call in calls]
            assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
            server.cancel()
            return answers

    before = len(os.listdir("/proc/self/fd"))
    answers = asyncio.run(run())
    assert len(os.listdir("/proc/self/fd")) == before
    return answers


def test_served_with_the_netns(tmp_path: Path) -> None:
    recorder = Recorder()
    with open("/proc/self/ns/net") as netns:
        [(status, out)] = served(tmp_path, recorder, (environment(), config(), netns.fileno()))
        assert status == 0 and json.loads(out)["ips"] == PREVIOUS["ips"]
        assert recorder.inodes == [os.fstat(netns.fileno()).st_ino]


def test_failures_are_error_objects(tmp_path: Path) -> None:
    for failure in (cni.CniError("no engine"), RuntimeError("boom")):
        [(status, out)] = served(tmp_path, Recorder(failure), (environment(), config("0.4.0")))
        assert status == 1 and json.loads(out)["code"] == cni.TRY_AGAIN and json.loads(out)["cniVersion"] == "0.4.0"


def test_a_stranger_does_not_stop_the_server(tmp_path: Path) -> None:
    recorder = Recorder()
    answers = served(tmp_path, recorder, (b"", b"", -1, b"NOPE"), (environment(), config()))
    assert [status for status, _ in answers] == [-1, 0] and len(recorder.calls) == 1


def test_a_call_that_does_not_end_is_answered(tmp_path: Path) -> None:
    class Stuck(Recorder):
        async def cni_add(self, call: cni.Call) -> None:
            await asyncio.Event().wait()

    [(status, out)] = served(tmp_path, Stuck(), (environment(), config()), deadline_s=0.05)
    assert status == 1 and json.loads(out)["code"] == cni.TRY_AGAIN


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "run" / "cni.sock"
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stale:
        stale.bind(str(path))
    listener = cni.listen(path, socket.SOCK_STREAM)
    with listener, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(path))
