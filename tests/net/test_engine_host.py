"""The engine's process: who may command it, what it answers to nonsense, what it keeps, how it ends.

The real engine, without a pod.
"""

import array
import fcntl
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from sidestep.wire import batch, channel
from tests.harness.engine import SUPERVISE, CallError, Client, EngineProcess
from tests.harness.pods import TestAuthority

DEADLINE_S = 20.0


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[EngineProcess]:
    with EngineProcess(tmp_path) as process:
        yield process


def alive(engine: EngineProcess) -> bool:
    """The engine answers a new controller."""
    assert engine.process.poll() is None, engine.log.read_text()
    with engine.client() as client:
        return client.hello["ok"] is True


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def text(field: int, value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return varint(field << 3 | 2) + varint(len(data)) + data


def workload(number: int, version: str = "1") -> batch.Record:
    """A record as a control plane would make it, by the field numbers of istio.workload."""
    uid = f"Kubernetes//Pod/shop/web-{number}"
    body = text(20, uid) + text(1, f"web-{number}") + text(2, "shop") + text(7, "web")
    body += text(3, bytes([10, 9, number >> 8, number & 255])) + b"\x28\x01"
    return batch.Record(batch.Op.ADDRESS_SET, uid, version, text(1, body))


def test_hello_says_what_is_held(engine: EngineProcess) -> None:
    with engine.client() as client:
        assert client.hello["engine"]["pid"] == engine.process.pid
        assert client.hello["engine"]["workers"] == 1
        assert (client.hello["pods"], client.hello["identities"], client.versions) == ([], [], {})
        client.call(channel.SETTINGS, {"cluster_cidrs": ["10.0.0.0/8", "fd00::/8"], "node": "n1"})
        reply = client.apply([workload(1, "v 7"), workload(2)])
        assert (reply["rejected"], reply["workloads"], reply["services"], reply["policies"]) == ([], 2, 0, 0)
    with engine.client() as client:
        assert client.versions == {
            ("address", "Kubernetes//Pod/shop/web-1"): "v 7",
            ("address", "Kubernetes//Pod/shop/web-2"): "1",
        }
        assert client.hello["settings"]["node"] == "n1"
        assert client.hello["settings"]["root_namespace"] == "istio-system"
        found = client.dump("workloads")
        assert {each["name"] for each in found} == {"web-1", "web-2"}
        assert {each["identity"] for each in found} == {"spiffe://cluster.local/ns/shop/sa/web"}


def test_the_root_namespace_is_a_setting(engine: EngineProcess) -> None:
    """A policy of it that cannot be decoded closes everything; HELLO lists it without a version."""
    bad = [batch.Record(batch.Op.POLICY_SET, name, "1", b"\xff") for name in ("roots/p", "shops/p")]
    with engine.client() as client:
        client.call(channel.SETTINGS, {"root_namespace": "roots"})
        rejected = client.apply([workload(1), *bad])["rejected"]
        assert {each["name"] for each in rejected} == {"roots/p", "shops/p"}
        said = client.call(channel.AUTHZ, {"identity": "", "source": "10.0.0.1", "destination": "10.9.0.1:80"})
        assert (said["allow"], said["policy"]) == (False, "roots/p")
        assert {each["key"]: each["scope"] for each in client.dump("policies")} == {
            "roots/p": "Global",
            "shops/p": "Namespace",
        }
    with engine.client() as client:
        assert client.versions["policy", "roots/p"] == client.versions["policy", "shops/p"] == ""


def test_an_answer_that_is_long_still_fits(engine: EngineProcess) -> None:
    """AUTHZ names at most 256 policies, and says so when even those are too much for a packet."""
    empty = b"\x12\x04shop\x18\x01"  # of namespace shop, without rules
    short = [batch.Record(batch.Op.POLICY_SET, f"shop/{n:04}", "1", empty) for n in range(1000)]
    question = {"identity": "", "source": "10.0.0.1", "destination": "10.9.0.1:80"}
    with engine.client() as client:
        client.apply([workload(1), *short])
        said = client.call(channel.AUTHZ, question)
        assert (said["allow"], said["policy"], len(said["policies"])) == (False, "shop/0000", 256)
        long = [batch.Record(batch.Op.POLICY_SET, f"shop/{n:02000}", "1", empty) for n in range(256)]
        client.apply([workload(1), *long], full=True)
        said = client.call(channel.AUTHZ, question)
        assert not said["allow"]
        assert 0 < len(said["policies"]) < 256


def test_versions_of_the_channel(engine: EngineProcess) -> None:
    with engine.client(greet=False) as client:
        with pytest.raises(CallError, match="first command must be HELLO"):
            client.call(channel.POD_DEL, {"uid": "u"})
        with pytest.raises(CallError, match="no common version"):
            client.call(channel.HELLO, {"min": 2, "max": 3})
        client.send(channel.HEADER.pack(channel.MAGIC, 9, channel.HELLO, 5, 2) + b"{}")
        answer = client.receive()
        assert answer is not None
        assert answer[0].sequence == 5
        assert "version 9" in answer[0].body["error"]
        assert client.greet()["ok"]


def test_one_controller_at_a_time(engine: EngineProcess) -> None:
    with engine.client() as first:
        with engine.client(greet=False) as second:
            answer = second.receive()
            assert answer is not None
            assert answer[0].body == {"ok": False, "error": "busy"}
            assert second.receive() is None
        assert first.greet()["ok"]
    assert alive(engine)


def test_the_next_one_may_come_at_once(engine: EngineProcess) -> None:
    for _ in range(50):
        with engine.client() as client:
            assert client.hello["ok"]


def test_only_root(engine: EngineProcess, tmp_path: Path) -> None:
    assert stat.S_IMODE(engine.path.stat().st_mode) == 0o600
    code = (
        "import os, socket, sys\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "fd = os.open(sys.argv[1], os.O_PATH)\n"
        "os.setuid(65534)\n"
        "try:\n"
        "    s.connect(f'/proc/self/fd/{fd}')\n"
        "    print('connected', s.recv(10))\n"
        "except PermissionError:\n"
        "    print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(engine.path)], capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() == "refused", done
    os.chmod(engine.path, 0o666)  # even if somebody could connect
    done = subprocess.run([sys.executable, "-c", code, str(engine.path)], capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() in ("connected b''", "refused"), done
    assert alive(engine)


@pytest.mark.parametrize(
    "packet",
    [
        b"x",
        b"SSTP" + bytes(11),
        b"SSTQ" + bytes(12),
        channel.HEADER.pack(channel.MAGIC, 1, channel.REPLY | 1, 1, 2) + b"{}",
        channel.MAGIC + bytes(channel.PACKET_MAX),
    ],
)
def test_what_is_no_packet_ends_the_connection(engine: EngineProcess, packet: bytes) -> None:
    with engine.client() as client:
        client.send(packet)
        assert client.receive() is None
    assert alive(engine)


@pytest.mark.parametrize(
    ("kind", "body", "error"),
    [
        (99, {}, "not known"),
        (channel.POD_ADD, {"uid": "u"}, "takes 3 or 8 file descriptors"),
        (channel.POD_MODE, {"uid": "u", "mode": "flying"}, "serving or draining"),
        (channel.POD_MODE, {"uid": "\0", "mode": "serving"}, "uid must be text"),
        (channel.POD_MODE, {"uid": "\ud800", "mode": "serving"}, "not"),
        (channel.POD_MODE, {"uid": 7, "mode": "serving"}, "uid must be text"),
        (channel.POD_MODE, {"uid": "nobody", "mode": "serving"}, "nobody"),
        (channel.POD_STATS, {}, "uid must be text"),
        (channel.DUMP, {"what": "keys"}, "what is one of"),
        (channel.SETTINGS, {"cluster_cidrs": ["10.0.0.0/99"]}, "settings"),
        (channel.SETTINGS, {"cluster_cidrs": "10.0.0.0/8"}, "list of text"),
        (channel.SETTINGS, {"same_node": "maybe"}, "direct, native or mtls"),
        (channel.IDENTITY_SET, {"identity": "spiffe://a/ns/b/sa/c"}, "chain_pem must be text"),
        (
            channel.IDENTITY_SET,
            {"identity": "spiffe://a/ns/b/sa/c", "key_pem": "k", "chain_pem": "c", "roots_pem": "r"},
            "identity spiffe",
        ),
        (channel.APPLY, {"size": 16}, "takes 1 file descriptors"),
        (channel.SHUTDOWN, {"drain_s": -1}, "whole number"),
        (channel.SETTINGS, {"root_namespace": 7}, "root_namespace must be text"),
        (channel.AUTHZ, {"identity": "", "source": "10.0.0.1"}, "destination must be text"),
        (channel.AUTHZ, {"identity": "", "source": "10.0.0.1", "destination": "10.0.0.2"}, "destination IP:PORT"),
        (channel.AUTHZ, {"identity": "me", "source": "10.0.0.1", "destination": "10.0.0.2:80"}, "SPIFFE URI or empty"),
    ],
)
def test_refused_commands(engine: EngineProcess, kind: int, body: dict[str, object], error: str) -> None:
    with engine.client() as client:
        if "\ud800" in str(body.get("uid")):
            data = json.dumps(body).encode()
            client.send(channel.HEADER.pack(channel.MAGIC, 1, kind, 1, len(data)) + data)
            answer = client.receive()
            assert answer is not None
            assert answer[0].body["ok"] is False
        else:
            with pytest.raises(CallError, match=error):
                client.call(kind, body)
        assert client.greet()["ok"]  # the same connection goes on


def settled_fds(engine: EngineProcess) -> int:
    """How many descriptors the engine has, once two looks agree: it may still be closing what was closed."""
    folder, last, end = f"/proc/{engine.process.pid}/fd", -1, time.monotonic() + DEADLINE_S
    while (now := len(os.listdir(folder))) != last:
        assert time.monotonic() < end
        last = now
        time.sleep(0.05)
    return now


def test_too_many_or_foreign_fds(engine: EngineProcess) -> None:
    with engine.client() as client:
        client.call(channel.POD_DEL, {"uid": "nobody"})  # by then it has closed what came with the reply to HELLO
        before = settled_fds(engine)
        with pytest.raises(CallError, match="takes 0 file descriptors"):
            client.call(channel.METRICS, {}, [0] * 16)
        with pytest.raises(CallError, match=r"batch|apply"):
            client.call(channel.APPLY, {"size": 0}, [client.socket.fileno()])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * 40))]
        client.socket.sendmsg([channel.encode(channel.METRICS, 3, {})], rights)
        assert client.receive() is None
    with engine.client() as client:
        client.call(channel.POD_DEL, {"uid": "nobody"})
        assert settled_fds(engine) == before


def test_batches_that_are_not_sealed_or_broken(engine: EngineProcess) -> None:
    good = batch.encode([workload(1)])
    with engine.client() as client:
        fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
        os.write(fd, good)
        with pytest.raises(CallError, match="Operation not permitted"):
            client.call(channel.APPLY, {"size": len(good)}, [fd])
        with pytest.raises(CallError, match="bytes, not"):
            client.call(channel.APPLY, {"size": len(good) + 1}, [fd])
        os.close(fd)
        for bad in (good[:-8], good[:40], b"", b"SSB2" + good[4:]):
            fd = os.memfd_create("bad", os.MFD_ALLOW_SEALING)
            os.write(fd, bad)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, batch.SEALS)
            with pytest.raises(CallError, match=r"apply|size"):
                client.call(channel.APPLY, {"size": len(bad)}, [fd])
            os.close(fd)
        assert client.greet()["ok"]
        assert client.versions == {}
        reply = client.apply([workload(1), batch.Record(batch.Op.ADDRESS_SET, "broken", "1", b"\xff")])
        assert reply["rejected"] == [{"name": "broken", "reason": "malformed protobuf"}]
        assert reply["workloads"] == 1


def test_more_rejected_records_than_a_reply_holds(engine: EngineProcess) -> None:
    with engine.client() as client:
        reply = client.apply(
            [batch.Record(batch.Op.ADDRESS_SET, "ü" * 900 + str(i), "1", b"\xff") for i in range(2000)]
        )
        assert 5 < len(reply["rejected"]) < 2000
        assert all(each["reason"] == "malformed protobuf" for each in reply["rejected"])


def test_a_hundred_thousand_workloads(engine: EngineProcess) -> None:
    with engine.client() as client:
        before = rss_kib(engine.process.pid)
        for start in range(0, 100_000, 20_000):
            with batch.Batch() as state:
                for number in range(start, start + 20_000):
                    uid = f"Kubernetes//Pod/namespace-{number % 50}/application-{number % 900}-5d9c7b8f6b-{number:05d}"
                    body = text(20, uid) + text(1, uid.rpartition("/")[2]) + text(2, f"namespace-{number % 50}")
                    body += text(7, f"account-{number % 900}") + text(9, f"node-{number % 1000}") + b"\x28\x01"
                    body += text(3, bytes([10, 8 + (number >> 16), number >> 8 & 255, number & 255]))
                    body += text(10, f"application-{number % 900}") + text(11, "latest")
                    service = f"namespace-{number % 50}/application-{number % 900}.svc.cluster.local"
                    body += text(22, text(1, service) + text(2, text(1, b"\x08\x50\x10\x90\x3f")))
                    state.add(batch.Record(batch.Op.ADDRESS_SET, uid, f"{number:x}", text(1, body)))
                fd, size = state.seal()
            reply = client.call(channel.APPLY, {"size": size}, [fd])
            os.close(fd)
            assert reply["rejected"] == []
        assert reply["workloads"] == 100_000
        grown = rss_kib(engine.process.pid) - before
        started = time.monotonic()
        for number in range(50):
            client.apply([workload(number, f"again {number}")])
        delta_ms = (time.monotonic() - started) * 1000 / 50
        print(f"{grown * 1024 / 100_000:.0f} bytes a workload; a delta of one {delta_ms:.2f} ms, channel included")
        assert grown < 100_000 * 700 // 1024


def rss_kib(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1])


def test_identities(engine: EngineProcess, tmp_path: Path) -> None:
    uri = "spiffe://cluster.local/ns/shop/sa/web"
    files = TestAuthority(tmp_path).issue(uri)
    pem = {name: (tmp_path / files[name]).read_text() for name in ("key", "chain", "roots")}
    leaf = x509.load_pem_x509_certificate(pem["chain"].encode())
    body = {"identity": uri, "key_pem": pem["key"], "chain_pem": pem["chain"], "roots_pem": pem["roots"]}
    with engine.client() as client:
        reply = client.call(channel.IDENTITY_SET, body)
        assert reply["not_after"] == int(leaf.not_valid_after_utc.timestamp())
        with pytest.raises(CallError):
            client.call(channel.IDENTITY_SET, {**body, "identity": "spiffe://cluster.local/ns/shop/sa/other"})
        (held,) = client.greet()["identities"]
        assert held["id"] == uri
        assert int(held["serial"], 16) == leaf.serial_number
        client.call(channel.IDENTITY_DEL, {"identity": uri})
        client.call(channel.IDENTITY_DEL, {"identity": uri})
        assert client.greet()["identities"] == []


def test_it_cannot_be_dumped(engine: EngineProcess) -> None:
    limits = Path(f"/proc/{engine.process.pid}/limits").read_text()
    assert re.search(r"Max core file size\s+0\s+0", limits)
    found = re.search(r"Max open files\s+(\d+)\s+(\d+)", limits)
    assert found
    assert found[1] == found[2]
    code = "import os, sys; os.setuid(65534); open(f'/proc/{sys.argv[1]}/environ')"
    done = subprocess.run([sys.executable, "-c", code, str(engine.process.pid)], capture_output=True, timeout=30)
    assert b"PermissionError" in done.stderr


def test_metrics_are_whole(engine: EngineProcess) -> None:
    with engine.client() as client:
        lines = client.metrics().splitlines()
    families = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    assert {
        "istio_tcp_connections_opened_total",
        "istio_tcp_sockets_open",
        "sidestep_log_lines_dropped_total",
    } <= families
    assert all(line.startswith("#") or re.fullmatch(r"\w+({.*})? -?\d+", line) for line in lines)


def test_it_ends_cleanly(tmp_path: Path) -> None:
    with EngineProcess(tmp_path) as engine:
        path = engine.path
        assert engine.stop() == 0
        assert not path.exists()
    with EngineProcess(tmp_path) as engine:
        with engine.client() as client:
            client.call(channel.SHUTDOWN, {"drain_s": 5})
        assert engine.process.wait(DEADLINE_S) == 0


def test_a_socket_that_is_left_over_is_replaced_and_a_living_one_is_not(tmp_path: Path) -> None:
    with EngineProcess(tmp_path) as engine:
        command = [sys.executable, "-m", "sidestep", "engine", "--socket", str(engine.path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        assert done.returncode == 1
        assert (
            done.stderr
            == f"sidestep engine: another engine serves {engine.path}: stop it first, or name another --socket\n"
        )
        assert alive(engine)
        engine.process.kill()
        engine.process.wait()
        assert engine.path.exists()
        again = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            end = time.monotonic() + DEADLINE_S
            while True:
                try:
                    Client(engine.path).close()
                    break
                except ConnectionRefusedError:
                    assert time.monotonic() < end
                    time.sleep(0.01)
        finally:
            again.terminate()
            assert again.wait(DEADLINE_S) == 0


@pytest.mark.parametrize(
    ("mode", "occupant", "says"),
    [(0o755, None, "with mode 0700"), (0o700, "file", "is not a socket")],
)
def test_a_place_that_is_not_safe(tmp_path: Path, mode: int, occupant: str | None, says: str) -> None:
    folder = tmp_path / "place"
    folder.mkdir(mode=0o700)
    folder.chmod(mode)
    if occupant:
        (folder / "s").write_text("precious")
    command = [sys.executable, "-m", "sidestep", "engine", "--socket", str(folder / "s")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    if occupant:
        assert (folder / "s").read_text() == "precious"


def test_supervised_is_back_after_each_kill(tmp_path: Path) -> None:
    with EngineProcess(tmp_path, supervised=True) as engine:
        pids = set()
        for _ in range(5):
            end = time.monotonic() + DEADLINE_S
            while True:
                try:
                    with engine.client() as client:
                        pid = int(client.hello["engine"]["pid"])
                    if pid not in pids:
                        break
                except (
                    ConnectionRefusedError,
                    FileNotFoundError,
                    AssertionError,
                    ConnectionResetError,
                    BrokenPipeError,
                ):
                    pass
                assert time.monotonic() < end, engine.log.read_text()
                time.sleep(0.01)
            pids.add(pid)
            os.kill(pid, signal.SIGKILL)
        assert "after it had answered; starting it again" in engine.log.read_text()


def test_supervised_pauses_when_it_never_answers(tmp_path: Path) -> None:
    """A command that ends at once is started ever more slowly: 0.1 + 0.2 + 0.4 + 0.8 + 1.6 s between the first six."""
    starts = tmp_path / "starts"
    command = [str(SUPERVISE), "sh", "-c", f"echo x >>{starts}; exit 3"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    began = time.monotonic()
    while not starts.exists() or len(starts.read_text()) < 12:
        assert time.monotonic() < began + 60
        time.sleep(0.01)
    took = time.monotonic() - began
    process.terminate()
    assert process.wait(DEADLINE_S) == 0
    assert took > 3.0


@pytest.mark.parametrize(("command", "status"), [("exit 0", 0), ("exit 2", 2)])
def test_supervised_that_was_told_to_end(command: str, status: int) -> None:
    assert subprocess.run([str(SUPERVISE), "sh", "-c", command], timeout=30).returncode == status


def test_supervisor_passes_on_the_signal_and_reaps(tmp_path: Path) -> None:
    """The end of another child, as pid 1 inherits them, must not be taken for the command's."""
    ready = tmp_path / "ready"
    script = f"trap 'echo told >{tmp_path}/told; exit 7' TERM; true & touch {ready}; while :; do sleep 0.05; done"
    process = subprocess.Popen([str(SUPERVISE), "sh", "-c", script])
    end = time.monotonic() + DEADLINE_S
    while not ready.exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    process.terminate()
    assert process.wait(DEADLINE_S) == 7
    assert (tmp_path / "told").read_text() == "told\n"
